"""Runs a step that was read as a recurrent cell, on any schedule for affine cells."""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.form import AffineForm, Gates, ReadGates
from jrnn.jaxprs.affine import Affine, Mask, Resets
from jrnn.jaxprs.blocks import Piece
from jrnn.jaxprs.flat import Op, broadcast, contraction, evaluate, typed
from jrnn.jaxprs.recipes import INPUT, INVARIANT, STATE, Atom, Recipe, needed, side_by_side
from jrnn.schedules import SCHEDULES, Plan, Refusal, Steps, Task, hoisted, native
from jrnn.schedules.steps import latest, select, taken

__all__ = ["WORK", "Body", "before", "invariant", "outputs"]

# The least floating-point operations in a step's matmul of the state for which "hoisted" is chosen by default.
WORK = 2**18
# The least units for which the native loop is chosen by default for a step that `linear_scan` could run, which takes
# units and sequences together as the lanes of a vector.
UNITS = 16


@dataclass(frozen=True)
class Body:
    """A step that is a recurrent cell. ``linear`` is a promise of its gates (see `jrnn.cells.form.Gates`)."""

    form: Affine
    linear: bool = False

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the changing leaves of the carry, as fields of a state. The leaf that the matmul takes is h."""
        return tuple("h" if leaf == self.form.hidden else f"s{i}" for i, leaf in enumerate(self.form.leaves))

    @functools.cached_property
    def emitted(self) -> tuple[int, ...]:
        """The leaves of the carry that the outputs need for all steps; the hidden leaf if they need none."""
        return tuple(sorted({leaf for leaf, _ in self.form.after.values()})) or (self.form.hidden,)

    @functools.cached_property
    def product(self) -> Any:
        """See `gates.Parts.input_product`."""
        return self.form.parts.input_product(self.form.kinds)

    @functools.cached_property
    def holds(self) -> bool:
        """Whether the outputs depend on the carry of steps at which the mask inside the step holds it."""
        form = self.form
        carry = form.program.results[: form.carry]
        return form.mask is not None and any(not new or a in carry for a, (_, new) in form.after.items())

    @functools.cached_property
    def repeats(self) -> bool:
        """Whether the outputs need a matmul of the state that the loop has made already."""
        form = self.form
        made = {id(op) for op in _after(form, form.program.results[: form.carry], ())}
        again = [op for op in _after(form, form.outputs, form.after) if id(op) in made]
        return any(contraction(form.program, op) is not None and form.kinds[op.outs[0]] == STATE for op in again)

    @property
    def coupled(self) -> bool:
        """Whether the step has a matmul of its state."""
        return any(self.form.parts.v)

    @property
    def work(self) -> int:
        """Floating-point operations in a step's matmul of the state."""
        return 2 * math.prod(self.form.batch) * self.form.units**2 * len(self.form.gates.summed)

    def affine(self, inputs: Any, w_hh: Any, theta: Any) -> AffineForm:
        """The form of the step, from its arrays."""
        gates = self.form.gates
        return AffineForm(
            Gates(ReadGates(gates), gates.summed, elementwise=True, linear=self.linear),
            tuple(self.fields[self.form.leaves.index(leaf)] for leaf in self.emitted),
            inputs,
            w_hh,
            theta,
        )

    def shapes(self, xs: Any, steps: Steps) -> Task:
        """The loop over the cell as shapes and dtypes, without the resets and the mask inside the step."""
        form, units = self.form, self.form.units
        time, width = jax.tree.leaves(xs)[0].shape[0], units * len(form.gates.summed)
        array = lambda *shape: jax.ShapeDtypeStruct(shape, form.dtype)
        features, w_ih = width, None
        if self.product is not None:
            features = sum(vector.shape[-1] for vector in self.product[0])
            w_ih = array(features, width)
        w_hh = array(units, width if self.coupled else 0)
        affine = self.affine((w_ih, array(width)), w_hh, (array(units),) * len(form.parts.theta))
        state = _state_type(self.fields)(*(array(*form.batch, units),) * len(form.leaves))
        return Task(None, None, affine, array(time, *form.batch, features), state, None, steps)

    def task(self, env: dict[int, Any], carry: Sequence[Any], xs: Any, steps: Steps, restart: Any = None) -> Task:
        """The loop over the cell, given the variables that are the same at every step.

        ``restart`` is the carry that a reset of ``steps`` restores, or None.
        """
        form, units = self.form, self.form.units
        state_type = _state_type(self.fields)

        def vector(recipe: Recipe | None) -> jax.Array:
            return jnp.zeros(units, form.dtype) if recipe is None else broadcast(recipe.make(env), (units,))

        def joined(recipes: Sequence[Recipe | None]) -> jax.Array:
            if any(recipe is None or recipe.shape != (units,) for recipe in recipes):
                return lax.concatenate(list(map(vector, recipes)), 0)
            made = [recipe.make(env) for recipe in side_by_side(recipes)]  # type: ignore[arg-type]
            return made[0] if len(made) == 1 else lax.concatenate(made, 0)

        if form.mask is not None:
            steps = replace(steps, valid=self._flags(env, form.mask, xs))
        if form.resets is not None:
            resets = self._flags(env, form.resets, xs)
            steps = replace(steps, resets=resets if steps.valid is None else resets & steps.valid)
            restart = state_type(*self._values(env, form.resets))
        elif form.ends is not None:  # the same as a reset before the next step
            flags = self._flags(env, form.ends, xs)
            edge = jnp.zeros_like(flags[:1])
            resets = jnp.concatenate([flags[1:], edge] if steps.reverse else [edge, flags[:-1]])
            steps, restart = replace(steps, resets=resets), state_type(*self._values(env, form.ends))
        elif restart is not None:
            restart = state_type(*(restart[i] for i in form.leaves))
        w_ih = None
        if self.product is None:
            parts, biases = form.parts.inputs(form.kinds)
            inputs = self._side_by_side(env, parts, xs)
        else:
            vectors, pieces, biases = self.product
            time = jax.tree.leaves(xs)[0].shape[0]
            given = self._at_all_steps(env, vectors, xs) or [jnp.zeros((time, *form.batch, 0), form.dtype)]
            rows = [
                columns([gate[i] for gate in pieces], env, (a.shape[-1], units), form.dtype)
                for i, a in enumerate(given[: len(vectors)])
            ] or [jnp.zeros((0, units * len(pieces)), form.dtype)]
            w_ih = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
            inputs = given[0] if len(given) == 1 else jnp.concatenate(given, -1)
        w_hh = jnp.zeros((units, 0), form.dtype)
        if self.coupled:
            w_hh = columns(form.parts.v, env, (units, units), form.dtype)
        affine = self.affine((w_ih, joined(biases)), w_hh, tuple(map(vector, form.parts.theta)))
        return Task(None, None, affine, inputs, state_type(*(carry[i] for i in form.leaves)), restart, steps)

    def plan(self, task: Task, backend: str | None) -> tuple[str, Plan] | Refusal:
        """The schedule that runs the loop over the cell, and its plan. A named backend is the only one considered."""
        if backend is None and self.linear and self.form.units < UNITS:
            return Refusal(f"{self.form.units} units do not fill the vectors of its loop (from {UNITS} on)")
        if backend not in (None, "native") and not self.coupled:
            return Refusal(f"it has no product of its state with weights, without which {backend!r} gains nothing")
        if backend is not None:
            found = SCHEDULES[backend].plan(task)
            return found if isinstance(found, Refusal) else (backend, found)
        if self.repeats:
            again = "its outputs need a matmul of its state that the loop does not put out"
            return Refusal(f"{again}, and making it a second time costs more than the loop saves")
        if self.coupled and not all(self.form.parts.v):
            alone = "some of its gates take no product of its state"
            return Refusal(f"{alone}, and the loop would multiply by zeros for them, which costs more than it saves")
        found = native.pays(task) or native.plan(task)
        if isinstance(found, Plan):
            return "native", found
        if not self.coupled:  # nothing leaves the loop that XLA would not take out itself
            why = "it has no product of its state with weights, and only the native loop would be faster: "
            return found if self.linear else Refusal(f"{why}{found.reason}")
        reason = f"not native: {found.reason}"
        if self.work < WORK:
            return Refusal(f"{reason}; not hoisted: {small(self.work)}")
        found = hoisted.plan(task)
        if isinstance(found, Refusal):
            return Refusal(f"{reason}; not hoisted: {found.reason}")
        return "hoisted", replace(found, reason=f"what needs no state is taken out of the loop; {reason}")

    def run(
        self, plan: Plan, consts: Any, carry: Any, xs: Any, steps: Steps, restart: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps.

        ``steps`` may have resets, to the leaves ``restart`` of a carry, if the step itself contains none.
        """
        env = invariant(self.form, consts, carry)
        task = self.task(env, carry, xs, steps, restart)
        last, hs = plan(task)
        if self.form.ends is not None:
            flags = self._flags(env, self.form.ends, xs)[0 if steps.reverse else -1]
            last = select(flags, self._values(env, self.form.ends), list(last))
        leaves = list(carry)
        for leaf, value in zip(self.form.leaves, last, strict=True):
            leaves[leaf] = value
        form = self.form
        if self.holds and task.steps.valid is not None:
            emitted = lax.concatenate([carry[leaf] for leaf in self.emitted], len(form.batch))
            hs = taken(hs, latest(task.steps.valid, steps.reverse), emitted)
        ys = self._outputs(env, carry, hs, xs, steps.reverse)
        outs = typed(self.form.program, [*leaves, *ys])
        return outs[: len(leaves)], outs[len(leaves) :]

    def _flags(self, env: dict[int, Any], flagged: Mask | Resets, xs: Any) -> jax.Array:
        """Where a mask or resets inside the step apply: ``(T, *B)``."""
        (flags,) = self._at_all_steps(env, [flagged.flags], xs)
        return over_batch(flags if flagged.on else ~flags, self.form.batch)

    def _values(self, env: dict[int, Any], resets: Resets) -> list[jax.Array]:
        """The carry that resets inside the step restore."""
        return [broadcast(value.make(env), (*self.form.batch, self.form.units)) for value in resets.values]

    def _at_all_steps(self, env: dict[int, Any], recipes: Sequence[Recipe], xs: Any) -> list[Any]:
        """The array ``(T, ...)`` of each recipe, for all steps."""
        form = self.form
        given = dict(enumerate(jax.tree.leaves(xs), form.consts + form.carry))
        found = [given.get(recipe.value) if isinstance(recipe, Atom) else None for recipe in recipes]  # type: ignore[arg-type]
        rest = [recipe for recipe, there in zip(recipes, found, strict=True) if there is None]
        ops = needed(form.program, form.kinds, INPUT, rest)

        def at_one(x: Any) -> list[Any]:
            inside = env | x
            evaluate(ops, inside)
            return [recipe.make(inside) for recipe in rest]

        made = iter(jax.vmap(at_one)(given) if rest else ())
        return [next(made) if there is None else there for there in found]

    def _side_by_side(self, env: dict[int, Any], parts: Sequence[Recipe | None], xs: Any) -> jax.Array:
        """Arrays for all steps, one for each gate, concatenated: ``(T, *B, G*H)``. None stands for zeros."""
        form, shape = self.form, (*self.form.batch, self.form.units)
        if all(part is not None and part.shape == shape for part in parts):
            made = self._at_all_steps(env, side_by_side(parts), xs)  # type: ignore[arg-type]
        else:
            found = iter(self._at_all_steps(env, [part for part in parts if part is not None], xs))
            zeros = jnp.zeros((jax.tree.leaves(xs)[0].shape[0], *shape), form.dtype)
            made = [zeros if part is None else over_batch(next(found), shape) for part in parts]
        return made[0] if len(made) == 1 else jnp.concatenate(made, -1)

    def _outputs(self, env: dict[int, Any], carry: Sequence[Any], hs: jax.Array, xs: Any, reverse: bool) -> list[Any]:
        """The outputs of all steps at once, from the carry before the first step and the fields that the cell emits."""
        form = self.form
        states = dict(zip(self.emitted, jnp.split(hs, len(self.emitted), -1), strict=True))
        given: dict[Any, jax.Array] = {}
        for variable, (leaf, is_new) in form.after.items():
            after = states[leaf]
            if not is_new and form.ends is not None:
                value = self._values(env, form.ends)[form.leaves.index(leaf)]
                after = select(self._flags(env, form.ends, xs), jnp.broadcast_to(value, after.shape), after)
            given[variable] = after if is_new else before(after, carry[leaf], reverse)
        return outputs(form, env, given, xs)


@functools.lru_cache(maxsize=64)
def _state_type(fields: tuple[str, ...]) -> Any:
    """A named tuple with these fields. Equal names give the same type."""
    return namedtuple("State", fields)


def before(states: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """The state before each step, given the state after each step."""
    first = lax.expand_dims(first, (0,))
    return jnp.concatenate([states[1:], first] if reverse else [first, states[:-1]])


def small(work: int) -> str:
    return f"{work:.2g} floating-point operations a step are too few to take it apart for (from {WORK:.2g} on)"


def over_batch(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An array ``(T, ...)`` broadcast to ``(T, *shape)``, with missing axes added after the first."""
    missing = len(shape) + 1 - a.ndim
    return broadcast(a.reshape(a.shape[0], *(1,) * missing, *a.shape[1:]), (a.shape[0], *shape))


def columns(gates: Sequence[Sequence[Piece]], env: dict[int, Any], shape: tuple[int, int], dtype: Any) -> jax.Array:
    """The weights of all gates, concatenated; each is a sum of pieces ``shape``. Adjacent pieces are sliced at once."""
    parts: list[list[Piece]] = []
    for pieces in gates:
        last = parts[-1] if parts else []
        alone = len(pieces) == 1 and len(last) == 1
        if alone and last[0].weights == pieces[0].weights and last[0].stop == pieces[0].start:
            parts[-1] = [last[0]._replace(stop=pieces[0].stop)]
        else:
            parts.append(list(pieces))

    def made(pieces: list[Piece]) -> Any:
        found = [piece.weights.columns(piece.start, piece.stop).make(env) for piece in pieces]
        return functools.reduce(lax.add, found) if found else jnp.zeros(shape, dtype)

    return jnp.concatenate([made(pieces) for pieces in parts], -1) if len(parts) > 1 else made(parts[0])


def invariant(form: Any, consts: Sequence[Any], carry: Sequence[Any]) -> dict[int, Any]:
    """The variables that are the same at every step. XLA removes those that are not used."""
    env = dict(enumerate(consts)) | {form.consts + i: carry[i] for i in form.fixed}
    evaluate((op for op in form.program.ops if form.kinds[op.outs[0]] == INVARIANT), env)
    return env


def outputs(form: Any, env: dict[int, Any], given: dict[Any, jax.Array], xs: Any) -> list[Any]:
    """The outputs of all steps at once, from the values at all steps of the loop's variables that they need."""
    rest = [out for out in form.outputs if out not in given]
    ops = _after(form, rest, given)

    def at_one(given: Any, x: Any) -> list[Any]:
        inside = env | given | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
        evaluate(ops, inside)
        return [inside[out] if isinstance(out, int) else jnp.asarray(out.value) for out in rest]

    made = iter(jax.vmap(at_one)(given, xs) if rest else ())
    return [given[out] if out in given else next(made) for out in form.outputs]


def _after(form: Any, wanted: Any, given: Any) -> tuple[Op, ...]:
    """The operations, in order, that the outputs need after the loop, without invariant ones."""
    names = {out for out in wanted if isinstance(out, int)}
    ops = []
    for op in reversed(form.program.ops):
        if names.intersection(op.outs) - set(given) and form.kinds[op.outs[0]] != INVARIANT:
            ops.append(op)
            names.update(a for a in op.ins if isinstance(a, int))
    return tuple(reversed(ops))
