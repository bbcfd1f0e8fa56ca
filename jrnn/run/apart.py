"""Runs a step whose carry holds more than the state of one cell: as two loops, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.jaxprs import flat
from jrnn.jaxprs.apart import Split
from jrnn.jaxprs.flat import Program
from jrnn.run.body import Body
from jrnn.run.recurrence import Recurrences
from jrnn.schedules import Steps
from jrnn.schedules.steps import select

__all__ = ["Apart", "Loop"]


@dataclass(frozen=True)
class Loop:
    """A step ``(consts, carry, x) -> (carry, y)`` that runs as a scan."""

    program: Program

    def run(
        self, plan: None, consts: Sequence[Any], carry: Sequence[Any], xs: Any, steps: Steps, restart: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps. ``restart`` is the carry that resets restore."""

        def step(old: list[Any], inputs: Any) -> tuple[list[Any], list[Any]]:
            x, valid, resets = inputs
            if resets is not None:
                old = select(resets, restart, old)
            bind = lambda op, args: flat.bind(op.primitive, op.params, args)
            outs = flat.run(self.program, [*consts, *old, *x], bind)
            new = [jnp.asarray(a, before.dtype) for a, before in zip(outs[: len(old)], old, strict=True)]
            return new if valid is None else select(valid, new, old), outs[len(old) :]

        leaves = jax.tree.leaves(xs)
        inputs = (leaves, steps.valid, steps.resets)
        return lax.scan(step, list(carry), inputs, leaves[0].shape[0], steps.reverse, steps.unroll)


@dataclass(frozen=True)
class Apart:
    """A step in two parts, each of which is a cell, a scan, or in two parts again."""

    form: Split
    first: Loop | Body | Recurrences
    rest: Loop | Body | Recurrences | Apart

    def inputs(self, xs: Any) -> list[Any]:
        """The inputs of the rest as shapes and dtypes: the values that the first part gives, and the leaves of xs."""
        form, leaves = self.form, jax.tree.leaves(xs)
        at = form.consts + len(form.fixed) + len(form.others)
        given = form.rest.forms[at : at + form.given]
        return [*(jax.ShapeDtypeStruct((leaves[0].shape[0], *f.shape), f.dtype) for f in given), *leaves]

    def run(
        self, plan: Any, consts: Any, carry: Sequence[Any], xs: Any, steps: Steps, restart: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps. ``plan`` is a pair.

        ``steps`` may have resets, to the leaves ``restart`` of a carry, if the step itself contains none.
        """
        form, leaves = self.form, list(carry)
        consts = [*consts, *(carry[i] for i in form.fixed)]

        def part(which: int, xs: Any) -> list[Any]:
            own = (form.own, form.others)[which]
            again = None if restart is None else [restart[i] for i in own]
            start = [carry[i] for i in own]
            last, outs = (self.first, self.rest)[which].run(plan[which], consts, start, xs, steps, again)
            for i, value in zip(own, last, strict=True):
                leaves[i] = value
            return outs

        outs = part(0, xs)
        given, early = outs[: form.given], outs[form.given :]
        late = part(1, [*given, *jax.tree.leaves(xs)])
        ys = dict(zip(form.early, early, strict=True))
        found = iter(late)
        count = len(form.program.results) - form.carry
        typed = flat.typed(form.program, [*leaves, *(ys[i] if i in ys else next(found) for i in range(count))])
        return typed[: form.carry], typed[form.carry :]
