"""The plain scan of the cell's own step: serves every cell, and is what the other schedules are held to."""

from __future__ import annotations

from typing import Any

import jax

from jrnn.cells.base import emitted
from jrnn.schedules.steps import Steps, restarts, scan


def serves(cell: Any, params: Any, xs: Any, steps: Steps) -> tuple[bool, str]:
    return True, "a plain scan of the cell's step serves every cell"


def run(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> tuple[Any, jax.Array]:
    state, ys = scan(
        cell, params, xs, state, restarts(cell, params, xs, state, steps), steps, lambda params, xs: xs, cell.step
    )
    return state, emitted(ys, xs)
