"""Runs a step that was read as linear in its state: coefficients for all T, one `linear_scan`, outputs for all T."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jrnn.jaxprs.flat import broadcast, evaluate, typed
from jrnn.jaxprs.linear import Coefficient, Linear, make
from jrnn.jaxprs.recipes import INPUT, INVARIANT, needed
from jrnn.run.body import Body, before, invariant, outputs
from jrnn.schedules import Plan, Refusal, Steps
from jrnn.schedules.associative import chunk_of
from jrnn.schedules.linear import choose_linear, linear_scan
from jrnn.schedules.steps import checkpointed, expand

__all__ = ["Recurrences"]

# The largest ratio of a step's coefficients to its inputs and outputs, in elements, for which it runs so by default.
MEMORY = 2


@dataclass(frozen=True)
class Recurrences:
    """A step in which every leaf of the carry is a linear recurrence.

    ``cell`` is the same step as one whose gates are elementwise functions of products of the input, or None. The native
    loop runs such a step faster than `linear_scan`, since it does not write the coefficients to memory.
    """

    form: Linear
    cell: Body | None = None

    def plan(self, xs: Any, steps: Steps, backend: str | None) -> Plan | Refusal:
        """The plan of the native loop, or the reason why it does not run the step."""
        if self.cell is None:
            return Refusal("its coefficients are no elementwise functions of products of its input")
        found = self.cell.plan(self.cell.shapes(xs, steps), backend)
        return found if isinstance(found, Refusal) else found[1]

    def serves(self, xs: Any, backend: str | None) -> str | Refusal:
        """The description of how the loop runs, as a part of a sentence; or a refusal to run it so."""
        if backend not in (None, "associative"):
            return Refusal(f"it is linear in its state, which {backend!r} does not use")
        name, reason = self._backend(xs)
        if backend is None and name != "native":
            # An associative scan multiplies coefficients by each other, which may overflow where a scan does not.
            return Refusal(f"it is linear in its state, and by default only compiled code runs such a step: {reason}")
        if backend is None and (refusal := self._memory(xs)) is not None:
            return refusal
        return f"it is linear in its state, and runs as jrnn.linear_scan ({name}: {reason})"

    @property
    def _largest(self) -> Any:
        """The shape and dtype of the largest leaf."""
        form = self.form
        return max((form.program.forms[form.consts + i] for i in form.leaves), key=lambda f: math.prod(f.shape))

    def _backend(self, xs: Any) -> tuple[str, str]:
        """The backend of `linear_scan`, and the reason."""
        largest = self._largest
        return choose_linear((jax.tree.leaves(xs)[0].shape[0], *largest.shape), largest.dtype, None, xs)

    def _chunk(self, xs: Any) -> int | None:
        return chunk_of(jax.tree.leaves(xs)[0].shape[0], math.prod(self._largest.shape), self._backend(xs)[0])

    def _memory(self, xs: Any) -> Refusal | None:
        form = self.form
        size = lambda shapes: sum(math.prod(shape) for shape in shapes)
        state = size(form.program.forms[form.consts + i].shape for i in form.leaves)
        around = size(leaf.shape[1:] for leaf in jax.tree.leaves(xs)) + size(
            form.program.form(out).shape for out in form.outputs
        )
        if state > MEMORY * around:
            return Refusal(
                f"it is linear in its state, but its coefficients for all steps would take {state / around:.3g} times "
                'the memory of its inputs and outputs; ask for it with backend="associative"'
            )
        return None

    def run(
        self, plan: Plan | None, consts: Any, carry: Any, xs: Any, steps: Steps, restart: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps.

        ``plan`` is that of the native loop, or None for `linear_scan`. ``steps`` may have resets, to the leaves
        ``restart`` of a carry, if the step itself contains none.
        """
        if plan is not None and self.cell is not None:
            return self.cell.run(plan, consts, carry, xs, steps, restart)
        form = self.form
        env = invariant(form, consts, carry)
        run = lambda xs, state, steps: self._segment(env, xs, list(state), steps, restart)
        if steps.remat is None:
            steps = replace(steps, remat=self._chunk(xs))
        last, ys = checkpointed(run, xs, tuple(carry[i] for i in form.leaves), steps)
        leaves = list(carry)
        for leaf, value in zip(form.leaves, last, strict=True):
            leaves[leaf] = value
        outs = typed(form.program, [*leaves, *ys])
        return outs[: len(leaves)], outs[len(leaves) :]

    def _segment(
        self, env: dict[int, Any], xs: Any, state: list[Any], steps: Steps, restart: Any
    ) -> tuple[tuple[Any, ...], list[Any]]:
        form = self.form
        found = self._coefficients(env, xs)
        after = {}
        for at, r in enumerate(form.recurrences):
            h0 = state[at]
            a, b, resets = (None if c is None else found[id(c)] for c in r[1:])
            a = jnp.ones((), h0.dtype) if a is None else a
            b = jnp.zeros((), h0.dtype) if b is None else b
            time = jax.tree.leaves(xs)[0].shape[0]
            b = broadcast(_over(b, h0.ndim, r.b), (time, *h0.shape))
            a = _over(a, h0.ndim, r.a)
            if resets is not None:
                resets = broadcast(_over(resets, h0.ndim, r.reset), (time, *h0.shape))
            elif steps.resets is not None:
                resets = steps.resets
                again = broadcast(restart[form.leaves[at]], h0.shape)
                b = jnp.where(expand(resets, b), a * again + b, b)
            if steps.valid is not None:
                held = expand(steps.valid, b)
                a = jnp.where(held, a, jnp.ones((), a.dtype))
                b = jnp.where(held, b, jnp.zeros((), b.dtype))
            hs = linear_scan(a, b, h0, resets=resets, reverse=steps.reverse)
            after[form.leaves[at]] = hs
        given = {
            variable: after[leaf] if is_new else before(after[leaf], state[form.leaves.index(leaf)], steps.reverse)
            for variable, (leaf, is_new) in form.after.items()
        }
        end = 0 if steps.reverse else -1
        return tuple(after[leaf][end] for leaf in form.leaves), outputs(form, env, given, xs)

    def _coefficients(self, env: dict[int, Any], xs: Any) -> dict[int, Any]:
        """The arrays of all coefficients, by id. A coefficient that depends on the input has a time axis."""
        form = self.form
        wanted = [c for r in form.recurrences for c in r[1:] if c is not None]
        same: dict[int, Any] = {}
        for c in wanted:
            if c.kind == INVARIANT:
                make(c, env, same)
        differ = [c for c in wanted if c.kind == INPUT]
        ops = needed(form.program, form.kinds, INPUT, [v for c in differ for v in c.variables()])

        def at_one(x: Any) -> list[Any]:
            inside = env | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
            evaluate(ops, inside)
            made = dict(same)
            return [make(c, inside, made) for c in differ]

        found = jax.vmap(at_one)(xs) if differ else []
        return same | {id(c): array for c, array in zip(differ, found, strict=True)}


def _over(array: Any, ndim: int, coefficient: Coefficient | None) -> Any:
    """A coefficient with all axes. The first is time, of size one if the coefficient is the same at all steps."""
    array = jnp.asarray(array)
    steps = coefficient is not None and coefficient.kind == INPUT
    lead, rest = (array.shape[:1], array.shape[1:]) if steps else ((1,), array.shape)
    return array.reshape(*lead, *(1,) * (ndim - len(rest)), *rest)
