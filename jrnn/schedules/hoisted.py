"""The scan of what needs the state, with the projection of all T inputs taken out of the loop."""

from __future__ import annotations

from typing import Any

import jax

from jrnn.cells.base import compute_params, emitted
from jrnn.schedules import affine, parts
from jrnn.schedules.steps import Steps, restarts, scan


def serves(cell: Any, params: Any, xs: Any, steps: Steps) -> tuple[bool, str]:
    if getattr(cell, "hoistable", False):
        return True, "the cell declares its input projection, which is taken out of the loop over time"
    return False, "the cell defines only its step, so nothing is known to be free of the state"


def run(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> tuple[Any, jax.Array]:
    restart = restarts(cell, params, xs, state, steps)
    params = compute_params(params, xs.dtype)
    if getattr(cell, "is_affine", False):
        state, ys = affine.run(cell, params, xs, state, restart, steps)
        return state, emitted(ys, xs)
    state, ys = scan(cell, params, xs, state, restart, steps, cell.project, cell.update, parts.scan)
    return state, emitted(ys, xs)
