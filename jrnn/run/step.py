"""A cell's own step, read: what `jrnn.unroll` runs where a cell says nothing about its step but the step itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from jrnn.jaxprs import affine
from jrnn.jaxprs.blocks import Refusal
from jrnn.run.body import Body
from jrnn.schedules.parts import trace
from jrnn.schedules.steps import Steps, zeroed

__all__ = ["Step", "read_step"]


@dataclass(frozen=True)
class Step:
    """A step that is a recurrent cell: its body, the values of its constants, and the tree of its outputs."""

    body: Body
    consts: Any
    ys: Any

    def choose(self, state: Any, xs: Any, steps: Steps, backend: str | None) -> tuple[str | None, str]:
        """The schedule that runs it, or None, and why."""
        params, inputs, _ = self.body.shapes(xs)
        name, reason = self.body.choose(params, inputs, steps, backend)
        return name, f"its step was read as that of an affine cell; {reason}"

    def run(self, name: str, xs: jax.Array, state: Any, restart: Any, steps: Steps) -> tuple[Any, Any]:
        """The state after the last step, and the outputs of all steps; ``restart`` is what a reset restores."""
        last, ys = _run(name, self.body, self.consts, xs, state, restart, *steps.parted())
        return last, jax.tree.unflatten(self.ys, ys)


def read_step(cell: Any, params: Any, x: Any, state: Any, steps: Steps) -> Step | str:
    """The step of a cell that does not declare its form, as that of an affine cell; or why it is not one.

    ``x`` is the input of one step, by shape.
    """
    if steps.key is not None:
        return "it may draw at its steps"
    try:
        program, ys, consts = trace(lambda state, x: cell.step(params, state, x), state, x, params)
        form = affine.read(program, len(consts), len(jax.tree.leaves(state)))
    except Refusal as refusal:
        return str(refusal)
    contract = steps.valid is not None or steps.resets is not None
    if contract and (form.resets is not None or not all(is_new for _, is_new in form.after.values())):
        return "its step replaces its state, or puts out what it was, which masks and resets change"
    return Step(Body(form), consts, ys)


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def _run(
    name: str, body: Body, consts: Any, xs: Any, state: Any, restart: Any, static: Steps, arrays: tuple[Any, ...]
) -> tuple[Any, list[Any]]:
    tree: Any
    leaves, tree = jax.tree.flatten(state)
    steps = static.joined(arrays)
    last, ys = body.run(name, consts, leaves, xs, steps, None if restart is None else jax.tree.leaves(restart))
    return tree.unflatten(last), ys if steps.valid is None else zeroed(steps.valid, ys)
