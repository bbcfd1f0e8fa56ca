"""The loop over time as operations: the run itself, its derivative in a direction, and that transposed.

The run and the transpose are compiled code; what differentiates them again, and what runs where they cannot, is the
hoisted schedule's loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn.cells.base import product
from jrnn.schedules import affine
from jrnn.schedules.native import build
from jrnn.schedules.native.operation import Operation
from jrnn.schedules.read import parts
from jrnn.schedules.steps import Steps

__all__ = ["Flags", "Inputs", "Plan", "loop"]


@dataclass(frozen=True)
class Plan:
    """What is static about a run: the cell, which gates read a sum, the cell's C++ and the direction of time."""

    cell: Any
    sums: tuple[bool, ...]
    header: str = field(repr=False)
    reverse: bool

    def row(self, hidden: int) -> int:
        """Floats of a row of what the gates read: whole blocks of units, and no multiple of a page (`kernel.cc`)."""
        block = build.load(self.header).unit_block
        floats = -(-hidden // block) * block * parts(self.sums)
        return floats if floats % 256 else floats + 16


class Inputs(NamedTuple):
    """What the loop is differentiated by; ``restart`` is None where nothing resets."""

    xs: Any
    w_ih: Any
    b: Any
    w_hh: Any
    theta: Any
    state: Any
    restart: Any


class Flags(NamedTuple):
    """Booleans ``(T, N)``, or None: which steps are valid, and before which the state is replaced."""

    valid: Any
    resets: Any


class Kept(NamedTuple):
    """What the transpose needs of a run: ``h`` after every step, what the gates read, and the other states."""

    hs: Any
    read: Any
    others: Any


def loop(plan: Plan, inputs: Inputs, flags: Flags) -> tuple[Any, jax.Array]:
    """The state after the last step ``(N, H)`` and ``h`` after every step ``(T, N, H)``."""
    return apply(Forward, plan, (inputs, flags))


def apply(kind: Any, plan: Plan, operands: Any, **static: Any) -> Any:
    leaves, tree = jax.tree.flatten(operands)
    return kind(tree, plan, **static).bind(leaves)


# --- the operations ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward(Operation):
    """``(inputs, flags)`` to ``(last, hs)``, or to ``(last, kept)`` for a derivative."""

    plan: Plan
    keep: bool = False

    def forms(self, inputs: Inputs, flags: Flags) -> Any:
        (time, count, _), hidden = inputs.xs.shape, inputs.w_hh.shape[0]
        last, hs = jax.tree.map(_form, inputs.state), _float(time, count, hidden)
        if not self.keep:
            return last, hs
        return last, Kept(hs, _float(time, count, self.plan.row(hidden)), (hs,) * (len(inputs.state) - 1))

    def compiled(self, inputs: Inputs, flags: Flags) -> Any:
        last, kept = self.forms(inputs, flags)
        if not self.keep:
            kept = Kept(kept, _NOTHING, (_NOTHING,) * (len(inputs.state) - 1))
        kernel = build.load(self.plan.header)
        call = jax.ffi.ffi_call(kernel.forward, [*last, *kept[:2], *kept.others])
        row = self.plan.row(inputs.w_hh.shape[0])
        outs = call(*_arguments(inputs, flags), inputs.b, reverse=int(self.plan.reverse), parts_row=row)
        last, (hs, read, *others) = type(inputs.state)(*outs[: len(last)]), outs[len(last) :]
        return last, Kept(hs, read, tuple(others)) if self.keep else hs

    def plain(self, inputs: Inputs, flags: Flags) -> Any:
        last, hs = hoisted(self.plan, inputs, flags)
        if not self.keep:
            return last, hs
        # The plain transpose makes again what it needs.
        return last, Kept(hs, *jax.tree.map(_zeros, self.forms(inputs, flags)[1][1:]))

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        inputs, flags = operands
        last, kept = apply(Forward, self.plan, operands, keep=True)
        if self.keep:
            # A derivative of a derivative: what is kept is read by the transpose alone, which has its own.
            dlast, dhs = tangent(self.plan, inputs, flags, tangents[0])
            return (last, kept), (dlast, Kept(dhs, *jax.tree.map(jnp.zeros_like, kept[1:])))
        return (last, kept.hs), apply(Tangent, self.plan, (inputs, flags, kept, tangents[0]))

    def sequences(self, inputs: Inputs, flags: Flags) -> tuple[Any, Any]:
        none, first, second = ((lambda _, axis=axis: axis) for axis in (-1, 0, 1))
        state, restart = jax.tree.map(first, (inputs.state, inputs.restart))
        axes = jax.tree.map(none, inputs)._replace(xs=1, state=state, restart=restart)
        results = Kept(1, 1, (1,) * (len(state) - 1)) if self.keep else 1
        return (axes, jax.tree.map(second, flags)), (state, results)


@dataclass(frozen=True)
class Tangent(Operation):
    """``(inputs, flags, kept, d)`` to the derivative of ``(last, hs)`` in the direction ``d``, and linear in that.

    ``d`` is an `Inputs` with None where nothing moves.
    """

    plan: Plan

    def forms(self, inputs: Inputs, flags: Flags, kept: Kept, d: Inputs) -> Any:
        return jax.tree.map(_form, (inputs.state, kept.hs))

    def plain(self, inputs: Inputs, flags: Flags, kept: Kept, d: Inputs) -> Any:
        return tangent(self.plan, inputs, flags, d)

    compiled = plain

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        inputs, flags, kept, d = operands
        out = apply(Tangent, self.plan, operands)
        if not jax.tree.leaves(tangents[0]):  # linear in what moves
            return out, apply(Tangent, self.plan, (inputs, flags, kept, tangents[3]))
        moved = affine.jvp_of(
            lambda inputs, d: tangent(self.plan, inputs, flags, d), (inputs, d), (tangents[0], tangents[3])
        )[1]
        return out, moved

    def transpose(self, cotangents: Any, inputs: Inputs, flags: Flags, kept: Kept, d: Inputs) -> Inputs:
        tree: Any = jax.tree.structure(inputs)
        moving = tuple(leaf is not None for leaf in tree.flatten_up_to(d))
        return apply(Backward, self.plan, (inputs, flags, kept, cotangents), moving=moving)


@dataclass(frozen=True)
class Backward(Operation):
    """``(inputs, flags, kept, (dlast, dhs))`` to the gradients by the leaves of inputs that are ``moving``."""

    plan: Plan
    moving: tuple[bool, ...]

    def forms(self, inputs: Inputs, *_: Any) -> Inputs:
        return self.only(jax.tree.map(_form, inputs))

    def only(self, inputs: Inputs) -> Inputs:
        """None where nothing moves."""
        tree: Any
        leaves, tree = jax.tree.flatten(inputs)
        return tree.unflatten([leaf if moves else None for leaf, moves in zip(leaves, self.moving, strict=True)])

    def compiled(self, inputs: Inputs, flags: Flags, kept: Kept, cotangents: Any) -> Inputs:
        dlast, dhs = cotangents
        xs = _form(inputs.xs) if self.moving[0] else _NOTHING
        results = [xs, *map(_form, jax.tree.leaves((inputs.w_ih, inputs.w_hh, inputs.theta, inputs.state)))]
        results += map(_form, inputs.restart or (_NOTHING,) * len(inputs.state))
        kernel, row = build.load(self.plan.header), self.plan.row(inputs.w_hh.shape[0])
        operands = (*_arguments(inputs, flags), *kept[:2], *kept.others, *dlast, dhs)
        call = jax.ffi.ffi_call(kernel.backward, [*results, _form(inputs.b)])
        dxs, dw_ih, dw_hh, *rest, db = call(*operands, reverse=int(self.plan.reverse), parts_row=row)
        thetas, states = len(jax.tree.leaves(inputs.theta)), len(inputs.state)
        dtheta = jax.tree.unflatten(jax.tree.structure(inputs.theta), rest[:thetas])
        dstate = type(inputs.state)(*rest[thetas : thetas + states])
        drestart = None if inputs.restart is None else type(inputs.restart)(*rest[thetas + states :])
        return self.only(Inputs(dxs, dw_ih, db, dw_hh, dtheta, dstate, drestart))

    def plain(self, inputs: Inputs, flags: Flags, kept: Kept, cotangents: Any) -> Inputs:
        return self.only(jax.vjp(lambda inputs: hoisted(self.plan, inputs, flags), inputs)[1](cotangents)[0])

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        inputs, flags, kept, cotangents = operands
        out = apply(Backward, self.plan, operands, moving=self.moving)
        moved = affine.jvp_of(
            lambda inputs, cotangents: self.plain(inputs, flags, kept, cotangents),
            (inputs, cotangents),
            (tangents[0], tangents[3]),
        )[1]
        return out, moved


# --- the same loop in plain JAX ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projected:
    """A cell of which the loop is given the weights of its input projection, for the hoisted schedule's loop."""

    cell: Any

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        w_ih, b = params
        return tuple(jnp.split(product(xs, w_ih) + b, len(self.cell.sums), -1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cell, name)


def hoisted(plan: Plan, inputs: Inputs, flags: Flags) -> tuple[Any, jax.Array]:
    """The same as `loop`, and whatever JAX makes of it."""
    xs, w_ih, b, w_hh, theta, state, restart = inputs
    given = affine.Inputs((w_ih, b), xs, theta, w_hh, None, state, restart)
    chosen = affine.make_plan(Projected(plan.cell), given, Steps(reverse=plan.reverse))
    last, hs, _ = affine.loop(chosen, given, affine.Schedule(None, (), None, *flags))
    return last, hs


def tangent(plan: Plan, inputs: Inputs, flags: Flags, d: Inputs) -> tuple[Any, jax.Array]:
    """The derivative of `hoisted` in the direction ``d``."""
    return affine.jvp_of(lambda inputs: hoisted(plan, inputs, flags), (inputs,), (d,))[1]


# --- forms -------------------------------------------------------------------------------------------------------


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _form(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _zeros(form: Any) -> jax.Array:
    return jnp.zeros(form.shape, form.dtype)


_NOTHING = _float(0)


def _arguments(inputs: Inputs, flags: Flags) -> list[jax.Array]:
    """The operands that both compiled functions begin with; without elements where there is nothing."""
    nothing = _zeros(_NOTHING)
    marks = [jnp.zeros((0,), jnp.bool_) if f is None else f for f in flags]
    restart = inputs.restart or (nothing,) * len(inputs.state)
    return [inputs.xs, inputs.w_ih, inputs.w_hh, *marks, *jax.tree.leaves(inputs.theta), *inputs.state, *restart]
