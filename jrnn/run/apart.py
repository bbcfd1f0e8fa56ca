"""Runs a step whose carry holds more than the state of its cell: the rest of the carry first, then the cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.jaxprs import flat
from jrnn.jaxprs.apart import Split
from jrnn.run.body import Body
from jrnn.run.recurrence import Recurrences
from jrnn.schedules import Steps
from jrnn.schedules.steps import select

__all__ = ["Apart"]


@dataclass(frozen=True)
class Apart:
    """A step in two parts: leaves of the carry that do not depend on the cell's state, and the cell."""

    form: Split
    cell: Body | Recurrences

    def inputs(self, xs: Any) -> list[Any]:
        """The inputs of the cell as shapes and dtypes: the values that the first part gives, and the leaves of xs."""
        rest, leaves = self.form.rest, jax.tree.leaves(xs)
        at = self.form.consts + len(self.form.others)
        given = rest.forms[at : at + self.form.given]
        return [*(jax.ShapeDtypeStruct((leaves[0].shape[0], *f.shape), f.dtype) for f in given), *leaves]

    def run(
        self, plan: Any, consts: Any, carry: Sequence[Any], xs: Any, steps: Steps, restart: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps.

        ``steps`` may have resets, to the leaves ``restart`` of a carry, if the step itself contains none.
        """
        form = self.form
        own, given = self._first(consts, [carry[i] for i in form.own], xs, steps, restart)
        others = [carry[i] for i in form.others]
        again = None if restart is None else [restart[i] for i in form.others]
        last, ys = self.cell.run(plan, consts, others, [*given, *jax.tree.leaves(xs)], steps, again)
        leaves = dict(zip((*form.own, *form.others), (*own, *last), strict=True))
        outs = flat.typed(form.program, [*(leaves[i] for i in range(form.carry)), *ys])
        return outs[: form.carry], outs[form.carry :]

    def _first(self, consts: Any, own: list[Any], xs: Any, steps: Steps, restart: Any) -> tuple[list[Any], list[Any]]:
        """The leaves of the first part after the last step, and the values that it gives at all steps."""
        form = self.form
        again = None if restart is None else [restart[i] for i in form.own]

        def step(old: list[Any], inputs: Any) -> tuple[list[Any], list[Any]]:
            x, valid, resets = inputs
            if resets is not None:
                old = select(resets, again, old)
            outs = flat.run(form.first, [*consts, *old, *x], lambda op, args: flat.bind(op.primitive, op.params, args))
            new = [jnp.asarray(a, before.dtype) for a, before in zip(outs[: len(old)], old, strict=True)]
            return new if valid is None else select(valid, new, old), outs[len(old) :]

        leaves = jax.tree.leaves(xs)
        inputs = (leaves, steps.valid, steps.resets)
        return lax.scan(step, own, inputs, leaves[0].shape[0], steps.reverse, steps.unroll)
