"""A step that was read, as something to run: the cell that it is, what this is given, and what is made of its outputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.traced import TracedCell
from jrnn.jaxprs import affine, sites
from jrnn.jaxprs.blocks import Piece
from jrnn.jaxprs.flat import Op, evaluate
from jrnn.jaxprs.recipes import INPUT, INVARIANT, Recipe, needed, spread
from jrnn.schedules import sites as schedule
from jrnn.schedules.steps import Steps, checkpointed

__all__ = ["Body", "Parts"]


@dataclass(frozen=True)
class Body:
    """A body that was read: its form, and the tree of its outputs."""

    form: affine.Affine
    ys: Any

    @functools.cached_property
    def cell(self) -> TracedCell:
        hidden = self.form.leaves.index(self.form.hidden)
        return TracedCell(self.form.gates, self.form.units, hidden, self.product is None)

    @functools.cached_property
    def product(self) -> Any:
        """See `Parts.input_product`."""
        return self.form.parts.input_product(self.form.kinds)


@dataclass(frozen=True)
class Parts:
    """A body that is no cell, cut into what leaves the loop and what stays in it."""

    form: sites.Sites
    ys: Any

    @property
    def work(self) -> int:
        """Floating-point operations of the products of its state, a step."""
        forms, found = self.form.program.forms, 0
        for site in self.form.sites:
            op = self.form.loop[site.place]
            (contracted, _), _ = op.params["dimension_numbers"]
            vector, _ = site.operands(op)
            axes = contracted if site.weights == 1 else op.params["dimension_numbers"][0][1]
            found += 2 * math.prod(forms[op.outs[0]].shape) * math.prod(forms[vector].shape[axis] for axis in axes)
        return found



def _run_parts(body: Parts, consts: Any, init: Any, xs: Any, steps: Steps) -> tuple[Any, Any]:
    form = body.form
    env = dict(enumerate(consts))
    evaluate((op for op in form.program.ops if form.kinds[op.outs[0]] == INVARIANT), env)
    first, tree = jax.tree.flatten(init)
    plan = schedule.Plan(form, steps.reverse, steps.unroll)

    def segment(state: Any, xs: Any) -> tuple[Any, Any]:
        def before(x: Any) -> Any:
            inside = env | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
            evaluate(form.before, inside)
            return tuple(inside[name] for name in form.inputs)

        def after(x: Any, emitted: Any) -> Any:
            inside = env | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
            evaluate(form.before, inside)
            inside.update(zip(form.emitted, emitted, strict=True))
            evaluate(form.after, inside)
            return [inside[out] if isinstance(out, int) else jnp.asarray(out.value) for out in form.outputs]

        invariant = tuple(env[name] for name in form.invariant)
        last, emitted = schedule.run(plan, invariant, jax.vmap(before)(xs), state)
        return last, jax.vmap(after)(xs, emitted)

    last, ys = checkpointed(segment, tuple(first), xs, jax.tree.leaves(xs)[0].shape[0], steps)
    return tree.unflatten(last), jax.tree.unflatten(body.ys, ys)


def _invariant(body: Body, consts: Any, init: Any) -> dict[int, Any]:
    """The variables that are the same at each step. What is not used costs nothing once it is compiled."""
    form, leaves = body.form, jax.tree.leaves(init)
    env = dict(enumerate(consts))
    env.update((form.consts + i, leaves[i]) for i in form.fixed)
    evaluate((op for op in form.program.ops if form.kinds[op.outs[0]] == INVARIANT), env)
    return env


def _at_all_steps(body: Body, env: dict[int, Any], recipes: Sequence[Recipe], xs: Any) -> list[Any]:
    """``(T, ...)`` of each recipe."""
    form = body.form
    ops = needed(form.program, form.kinds, INPUT, recipes)

    def at_one(x: Any) -> list[Any]:
        inside = env | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
        evaluate(ops, inside)
        return [recipe.make(inside) for recipe in recipes]

    return jax.vmap(at_one)(xs) if recipes else []


def _operands(body: Body, consts: Any, init: Any, xs: Any) -> tuple[Any, jax.Array, Any, Any]:
    """``(params, xs, state, resets)`` of the cell that the body is."""
    form, units = body.form, body.form.units
    env = _invariant(body, consts, init)

    def vector(recipe: Recipe | None) -> jax.Array:
        return jnp.zeros(units, form.dtype) if recipe is None else spread(recipe.make(env), (units,))

    params: dict[str, Any] = {
        "w_hh": _columns(form.parts.v, env, (units, units), form.dtype),
        "theta": {str(i): vector(recipe) for i, recipe in enumerate(form.parts.theta)},
        "restart": (),
    }
    resets = None
    if form.resets is not None:
        (flags,) = _at_all_steps(body, env, [form.resets.flags], xs)
        resets = _over_batch(flags if form.resets.on else ~flags, form.batch)
        params["restart"] = tuple(spread(value.make(env), (*form.batch, units)) for value in form.resets.values)
    if body.product is None:
        parts = form.parts.inputs()
        made = iter(_at_all_steps(body, env, [p for p in parts if p is not None], xs))
        time = jax.tree.leaves(xs)[0].shape[0]
        shape = (*form.batch, units)
        given = [jnp.zeros((time, *shape), form.dtype) if p is None else _over_batch(next(made), shape) for p in parts]
        inputs = jnp.concatenate(given, -1)
    else:
        vectors, weights, biases = body.product
        given = _at_all_steps(body, env, vectors, xs)
        inputs = given[0] if len(given) == 1 else jnp.concatenate(given, -1)
        rows = [
            _columns([gate[i] for gate in weights], env, (a.shape[-1], units), form.dtype) for i, a in enumerate(given)
        ]
        params["w_ih"] = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
        params["b"] = jnp.concatenate([vector(bias) for bias in biases])
    leaves = jax.tree.leaves(init)
    return params, inputs, body.cell.state_type(*(leaves[i] for i in form.leaves)), resets


def _over_batch(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``(T, ...)`` broadcast to ``(T, *shape)``, axes missing after the first."""
    missing = len(shape) + 1 - a.ndim
    return spread(a.reshape(a.shape[0], *(1,) * missing, *a.shape[1:]), (a.shape[0], *shape))


def _columns(gates: Sequence[Sequence[Piece]], env: dict[int, Any], shape: tuple[int, int], dtype: Any) -> jax.Array:
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
        columns = [piece.weights.columns(piece.start, piece.stop).make(env) for piece in pieces]
        return functools.reduce(lax.add, columns) if columns else jnp.zeros(shape, dtype)

    return jnp.concatenate([made(pieces) for pieces in parts], -1) if len(parts) > 1 else made(parts[0])


def _outputs(body: Body, env: dict[int, Any], first: jax.Array, hs: jax.Array, xs: Any, reverse: bool) -> Any:
    """The outputs of all steps at once, from the hidden state before the first step and after each."""
    form = body.form
    given: dict[Any, jax.Array] = {}
    if form.new_hidden in form.after:
        given[form.new_hidden] = hs
    if form.old_hidden in form.after:
        first = lax.expand_dims(first, (0,))
        given[form.old_hidden] = jnp.concatenate([hs[1:], first] if reverse else [first, hs[:-1]])
    rest = [out for out in form.outputs if out not in given]
    ops = _after(form, rest, given)

    def at_one(given: Any, x: Any) -> list[Any]:
        inside = env | given | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
        evaluate(ops, inside)
        return [inside[out] if isinstance(out, int) else jnp.asarray(out.value) for out in rest]

    made = iter(jax.vmap(at_one)(given, xs) if rest else ())
    return jax.tree.unflatten(body.ys, [given[out] if out in given else next(made) for out in form.outputs])


def _after(form: affine.Affine, wanted: Any, given: Any) -> tuple[Op, ...]:
    """The operations, in order, that outputs need and that are not the same at each step."""
    names = {out for out in wanted if isinstance(out, int)}
    ops = []
    for op in reversed(form.program.ops):
        if names.intersection(op.outs) - set(given) and form.kinds[op.outs[0]] != INVARIANT:
            ops.append(op)
            names.update(a for a in op.ins if isinstance(a, int))
    return tuple(reversed(ops))
