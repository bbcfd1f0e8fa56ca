"""A step that was read as a recurrent cell, as something that every schedule of cells can run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn.cells.traced import TracedCell
from jrnn.jaxprs.affine import Affine
from jrnn.jaxprs.blocks import Piece
from jrnn.jaxprs.flat import Op, broadcast, evaluate, typed
from jrnn.jaxprs.recipes import INPUT, INVARIANT, Atom, Recipe, needed, side_by_side
from jrnn.schedules import SCHEDULES, native
from jrnn.schedules.steps import Steps

__all__ = ["WORK", "Body"]

# The least floating-point operations in a step's matmul of the state for which "hoisted" is chosen by default.
WORK = 2**18


@dataclass(frozen=True)
class Body:
    """A step that is a recurrent cell."""

    form: Affine

    @functools.cached_property
    def cell(self) -> TracedCell:
        form = self.form
        places = tuple(form.leaves.index(leaf) for leaf in self.emitted)
        return TracedCell(form.gates, form.units, form.leaves.index(form.hidden), self.product is None, places)

    @functools.cached_property
    def emitted(self) -> tuple[int, ...]:
        """The leaves of the carry that the outputs need, of all steps; the hidden one where they need none."""
        return tuple(sorted({leaf for leaf, _ in self.form.after.values()})) or (self.form.hidden,)

    @functools.cached_property
    def product(self) -> Any:
        """See `gates.Parts.input_product`."""
        return self.form.parts.input_product(self.form.kinds)

    @property
    def work(self) -> int:
        """Floating-point operations of the product of the state, a step."""
        return 2 * math.prod(self.form.batch) * self.form.units**2 * len(self.form.gates.summed)

    def shapes(self, xs: Any) -> tuple[Any, Any, Any]:
        """``(params, xs, resets)`` of the cell, by shape and dtype."""
        form, units = self.form, self.form.units
        time, width = jax.tree.leaves(xs)[0].shape[0], units * len(form.gates.summed)

        def array(*shape: int, dtype: Any = form.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        params: dict[str, Any] = {
            "w_hh": array(units, width),
            "theta": {str(i): array(units) for i in range(len(form.parts.theta))},
            "restart": (),
        }
        resets = None
        if form.resets is not None:
            resets = array(time, *form.batch, dtype=np.dtype(bool))
            params["restart"] = (array(*form.batch, units),) * len(form.leaves)
        if self.product is None:
            return params, array(time, *form.batch, width), resets
        features = sum(vector.shape[-1] for vector in self.product[0])
        params |= {"w_ih": array(features, width), "b": array(width)}
        return params, array(time, *form.batch, features), resets

    def operands(self, env: dict[int, Any], carry: Sequence[Any], xs: Any) -> tuple[Any, jax.Array, Any, Any]:
        """``(params, xs, state, resets)`` of the cell, given the variables that are the same at each step."""
        form, units = self.form, self.form.units

        def vector(recipe: Recipe | None) -> jax.Array:
            return jnp.zeros(units, form.dtype) if recipe is None else broadcast(recipe.make(env), (units,))

        def joined(recipes: Sequence[Recipe | None]) -> jax.Array:
            if any(recipe is None or recipe.shape != (units,) for recipe in recipes):
                return lax.concatenate(list(map(vector, recipes)), 0)
            made = [recipe.make(env) for recipe in side_by_side(recipes)]  # type: ignore[arg-type]
            return made[0] if len(made) == 1 else lax.concatenate(made, 0)

        params: dict[str, Any] = {
            "w_hh": columns(form.parts.v, env, (units, units), form.dtype),
            "theta": {str(i): vector(recipe) for i, recipe in enumerate(form.parts.theta)},
            "restart": (),
        }
        resets = None
        if form.resets is not None:
            (flags,) = self._at_all_steps(env, [form.resets.flags], xs)
            resets = over_batch(flags if form.resets.on else ~flags, form.batch)
            params["restart"] = tuple(broadcast(value.make(env), (*form.batch, units)) for value in form.resets.values)
        if self.product is None:
            parts = form.parts.inputs()
            made = iter(self._at_all_steps(env, [p for p in parts if p is not None], xs))
            time, shape = jax.tree.leaves(xs)[0].shape[0], (*form.batch, units)
            given = [
                jnp.zeros((time, *shape), form.dtype) if p is None else over_batch(next(made), shape) for p in parts
            ]
            inputs = jnp.concatenate(given, -1)
        else:
            vectors, weights, biases = self.product
            given = self._at_all_steps(env, vectors, xs)
            inputs = given[0] if len(given) == 1 else jnp.concatenate(given, -1)
            rows = [
                columns([gate[i] for gate in weights], env, (a.shape[-1], units), form.dtype)
                for i, a in enumerate(given)
            ]
            params["w_ih"] = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
            params["b"] = joined(biases)
        return params, inputs, self.cell.state_type(*(carry[i] for i in form.leaves)), resets

    def choose(self, params: Any, inputs: Any, steps: Steps, backend: str | None) -> tuple[str | None, str]:
        """The schedule that runs the cell, or None, and why; a named backend where that serves."""
        if backend is not None:
            served, reason = SCHEDULES[backend].serves(self.cell, params, inputs, steps)
            return backend if served else None, reason
        for decide in (native.pays, native.serves):
            chosen, reason = decide(self.cell, params, inputs, steps)
            if not chosen:
                break
        if chosen:
            return "native", reason
        if self.work < WORK:
            return None, f"not native: {reason}; not hoisted: {small(self.work)}"
        return "hoisted", f"what needs no state is taken out of the loop; not native: {reason}"

    def run(
        self, name: str, consts: Any, carry: Any, xs: Any, steps: Steps, restart: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps.

        Resets are those of ``steps``, to the leaves ``restart`` of a carry, where the step has none of its own.
        """
        env = self._invariant(consts, carry)
        params, inputs, state, resets = self.operands(env, carry, xs)
        if restart is not None:
            params["restart"] = tuple(restart[i] for i in self.form.leaves)
        steps = replace(steps, resets=steps.resets if resets is None else resets)
        last, hs = SCHEDULES[name].run(self.cell, params, inputs, state, steps)
        leaves = list(carry)
        for leaf, value in zip(self.form.leaves, last, strict=True):
            leaves[leaf] = value
        ys = self._outputs(env, carry, hs, xs, steps.reverse)
        outs = typed(self.form.program, [*leaves, *ys])
        return outs[: len(leaves)], outs[len(leaves) :]

    def _invariant(self, consts: Sequence[Any], carry: Sequence[Any]) -> dict[int, Any]:
        """The variables that are the same at each step. What is not used costs nothing once it is compiled."""
        form = self.form
        env = dict(enumerate(consts)) | {form.consts + i: carry[i] for i in form.fixed}
        evaluate((op for op in form.program.ops if form.kinds[op.outs[0]] == INVARIANT), env)
        return env

    def _at_all_steps(self, env: dict[int, Any], recipes: Sequence[Recipe], xs: Any) -> list[Any]:
        """``(T, ...)`` of each recipe."""
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

    def _outputs(self, env: dict[int, Any], carry: Sequence[Any], hs: jax.Array, xs: Any, reverse: bool) -> list[Any]:
        """The outputs of all steps at once, from the carry before the first step and what the cell emits."""
        form = self.form
        states = dict(zip(self.emitted, jnp.split(hs, len(self.emitted), -1), strict=True))
        given: dict[Any, jax.Array] = {}
        for variable, (leaf, is_new) in form.after.items():
            given[variable] = states[leaf] if is_new else _before(states[leaf], carry[leaf], reverse)
        rest = [out for out in form.outputs if out not in given]
        ops = _after(form, rest, given)

        def at_one(given: Any, x: Any) -> list[Any]:
            inside = env | given | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
            evaluate(ops, inside)
            return [inside[out] if isinstance(out, int) else jnp.asarray(out.value) for out in rest]

        made = iter(jax.vmap(at_one)(given, xs) if rest else ())
        return [given[out] if out in given else next(made) for out in form.outputs]


def _before(states: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """The state that each step meets, from the state after each."""
    first = lax.expand_dims(first, (0,))
    return jnp.concatenate([states[1:], first] if reverse else [first, states[:-1]])


def small(work: int) -> str:
    return f"{work:.2g} floating-point operations a step are too few to take it apart for (from {WORK:.2g} on)"


def over_batch(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``(T, ...)`` broadcast to ``(T, *shape)``, axes missing after the first."""
    missing = len(shape) + 1 - a.ndim
    return broadcast(a.reshape(a.shape[0], *(1,) * missing, *a.shape[1:]), (a.shape[0], *shape))


def columns(gates: Sequence[Sequence[Piece]], env: dict[int, Any], shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Weights of all gates side by side, each the sum of pieces ``shape``. Neighbours are taken in one piece."""
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


def _after(form: Affine, wanted: Any, given: Any) -> tuple[Op, ...]:
    """The operations, in order, that outputs need and that are not the same at each step."""
    names = {out for out in wanted if isinstance(out, int)}
    ops = []
    for op in reversed(form.program.ops):
        if names.intersection(op.outs) - set(given) and form.kinds[op.outs[0]] != INVARIANT:
            ops.append(op)
            names.update(a for a in op.ins if isinstance(a, int))
    return tuple(reversed(ops))
