"""The loop over time as operations: the run, its tangent, and the transpose of the tangent.

The run and the transpose are compiled code. Their derivatives, and their replacements where compiled code cannot run,
are the hoisted schedule's loop.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn.cells.form import AffineForm
from jrnn.schedules import affine, linear
from jrnn.schedules.native import build
from jrnn.schedules.native.chunks import Chunks, Met
from jrnn.schedules.native.operation import Operation
from jrnn.schedules.read import parts
from jrnn.schedules.steps import Steps, checkpointed, select

__all__ = ["Flags", "Inputs", "Options", "loop"]


@dataclass(frozen=True)
class Options:
    """The static part of a run.

    ``emits`` are the fields of the state that are outputs. ``sums`` says of each gate whether it needs only ``u + v``.
    ``header`` is the C++ of the gates. With ``chunks``, only the state before each chunk is a residual.
    """

    emits: tuple[str, ...]
    sums: tuple[bool, ...]
    header: str = field(repr=False)
    reverse: bool
    chunks: Chunks | None = None

    def emitted(self, after: Any) -> tuple[Any, ...]:
        """The fields that the cell emits, of the states after each step."""
        return tuple(getattr(after, name) for name in self.emits)

    def row(self, hidden: int) -> int:
        """Floats in a row of gate inputs: whole blocks of units, and not a multiple of a page (`run.h`)."""
        block = build.load(self.header).unit_block
        floats = -(-hidden // block) * block * parts(self.sums)
        return floats if floats % 256 else floats + 16

    def keywords(self, hidden: int, chunked: bool = True) -> dict[str, int]:
        """The attributes of a call of the compiled functions."""
        length, together = (self.chunks.length, self.chunks.together) if self.chunks and chunked else (0, 0)
        return dict(reverse=int(self.reverse), parts_row=self.row(hidden), chunk=length, together=together)

    def work(self, states: int, count: int, hidden: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The buffer for the residuals that the derivative in chunks recomputes."""
        if self.chunks is None:
            return ()
        steps = self.chunks.length if self.chunks.groups else 0
        return (_float(steps, self.chunks.together * count, self.row(hidden) + states * hidden),)


class Inputs(NamedTuple):
    """The operands that the loop has derivatives with respect to.

    The form has no masks. ``restart`` is None if no step resets.
    """

    xs: Any
    form: AffineForm
    state: Any
    restart: Any


class Flags(NamedTuple):
    """The masks of a run, each of which may be None.

    ``valid`` and ``resets`` are booleans ``(T, N)``. ``mask (N, H)`` is the dropout mask that ``h`` is multiplied by
    before the recurrent product; only the loop in plain JAX has a derivative with respect to it.
    """

    valid: Any
    resets: Any
    mask: Any


class Kept(NamedTuple):
    """The residuals of a run: the states after every step, and the gate inputs."""

    after: Any
    read: Any


def loop(options: Options, inputs: Inputs, flags: Flags) -> tuple[Any, tuple[jax.Array, ...]]:
    """The state after the last step ``(N, H)``, and each field that the cell emits after every step ``(T, N, H)``."""
    return apply(Forward, options, (inputs, flags))


def apply(kind: Any, options: Options, operands: Any, **static: Any) -> Any:
    leaves, tree = jax.tree.flatten(operands)
    return kind(tree, options, **static).bind(leaves)


# --- the operations ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward(Operation):
    """``(inputs, flags)`` to ``(last, outs)``, a field in each of outs, or to ``(last, kept)`` for a derivative."""

    options: Options
    keep: bool = False

    def forms(self, inputs: Inputs, flags: Flags) -> Any:
        (time, count, _), hidden = inputs.xs.shape, inputs.form.hidden
        last = jax.tree.map(_form, inputs.state)

        def kept(time: int) -> Kept:
            after = jax.tree.map(lambda _: _float(time, count, hidden), last)
            return Kept(after, _float(time, count, self.options.row(hidden)))

        outs = self.options.emitted(kept(time).after)
        if not self.keep:
            return last, outs
        if (chunks := self.options.chunks) is None:
            return last, kept(time)
        met = jax.tree.map(lambda _: _float(chunks.groups, chunks.together, count, hidden), last)
        return last, Met(outs, met, (last, kept(chunks.rest)) if chunks.rest else None)

    def compiled(self, inputs: Inputs, flags: Flags) -> Any:
        last, kept = self.forms(inputs, flags)
        shape, states = (*inputs.xs.shape[:2], inputs.form.hidden), type(inputs.state)
        # The loop itself reads h after every step.
        wanted = {"h", *self.options.emits} if not isinstance(kept, Kept) else set(states._fields)
        after = [_float(*shape) if name in wanted else _NOTHING for name in states._fields]
        rest: list[Any] = [_NOTHING]
        if self.keep:
            rest = jax.tree.leaves(kept._replace(outs=None) if isinstance(kept, Met) else kept.read)
        call = jax.ffi.ffi_call(build.load(self.options.header).forward, [*last, *after, *rest])
        keywords = self.options.keywords(inputs.form.hidden, chunked=self.keep)
        results = iter(call(*_arguments(inputs, flags), inputs.form.inputs[1], **keywords))
        new, after = (states(*itertools.islice(results, len(last))) for _ in range(2))
        if not self.keep:
            return new, self.options.emitted(after)
        if isinstance(kept, Kept):
            return new, Kept(after, next(results))
        met = jax.tree.unflatten(jax.tree.structure(kept._replace(outs=None)), results)
        return new, met._replace(outs=self.options.emitted(after))

    def plain(self, inputs: Inputs, flags: Flags) -> Any:
        last, outs = hoisted(self.options, inputs, flags)
        # The transpose in plain JAX recomputes its residuals.
        return (last, self.unkept(outs, inputs, flags)) if self.keep else (last, outs)

    def unkept(self, outs: Any, inputs: Inputs, flags: Flags) -> Any:
        """Residuals that are all zeros, except for the outputs among them."""
        kept = jax.tree.map(_zeros, self.forms(inputs, flags)[1])
        if isinstance(kept, Met):
            return kept._replace(outs=outs)
        return kept._replace(after=kept.after._replace(**dict(zip(self.options.emits, outs, strict=True))))

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        inputs, flags = operands
        d, dmask = tangents[0], tangents[1].mask
        if dmask is not None and not self.keep:
            return apply(Forward, self.options, operands), tangent(self.options, inputs, flags, d, dmask)
        last, kept = apply(Forward, self.options, operands, keep=True)
        if self.keep:
            # A second derivative: only the transpose reads the residuals, and its derivative recomputes its own.
            dlast, douts = tangent(self.options, inputs, flags, d, dmask)
            return (last, kept), (dlast, self.unkept(douts, inputs, flags))
        if self.options.chunks is None:
            outs, needed = self.options.emitted(kept.after), kept
        else:  # the outputs are not among the residuals
            outs, needed = kept.outs, kept._replace(outs=None)
        return (last, outs), apply(Tangent, self.options, (inputs, flags, needed, d))

    def sequences(self, inputs: Inputs, flags: Flags) -> tuple[Any, Any]:
        none, first, second, third = ((lambda _, axis=axis: axis) for axis in (-1, 0, 1, 2))
        state, restart = jax.tree.map(first, (inputs.state, inputs.restart))
        axes = jax.tree.map(none, inputs)._replace(xs=1, state=state, restart=restart)
        kept = Kept(jax.tree.map(second, inputs.state), 1)
        outs = self.options.emitted(kept.after)
        results: Any = kept if self.keep else outs
        if self.keep and (chunks := self.options.chunks) is not None:
            results = Met(outs, jax.tree.map(third, inputs.state), (state, kept) if chunks.rest else None)
        marks = jax.tree.map(second, flags)._replace(mask=jax.tree.map(first, flags.mask))
        return (axes, marks), (state, results)


@dataclass(frozen=True)
class Tangent(Operation):
    """``(inputs, flags, kept, d)`` to the tangents of ``(last, outs)``, linear in the tangents ``d`` of the inputs.

    ``d`` is an `Inputs` with None for each zero tangent.
    """

    options: Options

    def forms(self, inputs: Inputs, flags: Flags, kept: Kept | Met, d: Inputs) -> Any:
        out = _float(*inputs.xs.shape[:2], inputs.form.hidden)
        return jax.tree.map(_form, inputs.state), (out,) * len(self.options.emits)

    def plain(self, inputs: Inputs, flags: Flags, kept: Kept | Met, d: Inputs) -> Any:
        return tangent(self.options, inputs, flags, d)

    compiled = plain

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        inputs, flags, kept, d = operands
        out = apply(Tangent, self.options, operands)
        if not jax.tree.leaves((tangents[0], tangents[1].mask)):  # only d moves, and the operation is linear in it
            return out, apply(Tangent, self.options, (inputs, flags, kept, tangents[3]))
        moved = affine.jvp_of(
            lambda inputs, mask, d: tangent(self.options, inputs, flags._replace(mask=mask), d),
            (inputs, flags.mask, d),
            (tangents[0], tangents[1].mask, tangents[3]),
        )[1]
        return out, moved

    def transpose(self, cotangents: Any, inputs: Inputs, flags: Flags, kept: Kept | Met, d: Inputs) -> Inputs:
        tree: Any = jax.tree.structure(inputs)
        moving = tuple(leaf is not None for leaf in tree.flatten_up_to(d))
        return apply(Backward, self.options, (inputs, flags, kept, cotangents), moving=moving)


@dataclass(frozen=True)
class Backward(Operation):
    """``(inputs, flags, kept, (dlast, douts))`` to the gradients with respect to the ``moving`` leaves of inputs."""

    options: Options
    moving: tuple[bool, ...]

    def forms(self, inputs: Inputs, *_: Any) -> Inputs:
        return self.only(jax.tree.map(_form, inputs))

    def only(self, inputs: Inputs) -> Inputs:
        """The inputs, with None for each leaf that is not moving."""
        tree: Any
        leaves, tree = jax.tree.flatten(inputs)
        return tree.unflatten([leaf if moves else None for leaf, moves in zip(leaves, self.moving, strict=True)])

    def compiled(self, inputs: Inputs, flags: Flags, kept: Kept | Met, cotangents: Any) -> Inputs:
        (dlast, douts), form = cotangents, inputs.form
        w_ih, b = form.inputs
        dafter = dict(zip(self.options.emits, douts, strict=True))
        xs = _form(inputs.xs) if self.moving[0] else _NOTHING
        w_ih = _NOTHING if form.given else w_ih
        results = [xs, *map(_form, jax.tree.leaves((w_ih, form.w_hh, form.theta, inputs.state)))]
        results += map(_form, inputs.restart or (_NOTHING,) * len(inputs.state))
        results += [_form(b), *self.options.work(len(dlast), *douts[0].shape[1:])]
        nothing = _zeros(_NOTHING)
        operands = [*_arguments(inputs, flags), b, *jax.tree.leaves(kept), *dlast]
        operands += [dafter.get(name, nothing) for name in type(inputs.state)._fields]
        call = jax.ffi.ffi_call(build.load(self.options.header).backward, results)
        dxs, dw_ih, dw_hh, *rest = call(*operands, **self.options.keywords(inputs.form.hidden))
        thetas, states = len(jax.tree.leaves(form.theta)), len(inputs.state)
        dtheta = jax.tree.unflatten(jax.tree.structure(form.theta), rest[:thetas])
        rest, (db, *_) = rest[: thetas + 2 * states], rest[thetas + 2 * states :]
        dstate = type(inputs.state)(*rest[thetas : thetas + states])
        drestart = None if inputs.restart is None else type(inputs.restart)(*rest[thetas + states :])
        dform = replace(form, inputs=(None if form.given else dw_ih, db), w_hh=dw_hh, theta=dtheta)
        return self.only(Inputs(dxs, dform, dstate, drestart))

    def plain(self, inputs: Inputs, flags: Flags, kept: Kept | Met, cotangents: Any) -> Inputs:
        return self.only(jax.vjp(lambda inputs: hoisted(self.options, inputs, flags), inputs)[1](cotangents)[0])

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        inputs, flags, kept, cotangents = operands
        out = apply(Backward, self.options, operands, moving=self.moving)
        moved = affine.jvp_of(
            lambda inputs, mask, cotangents: self.plain(inputs, flags._replace(mask=mask), kept, cotangents),
            (inputs, flags.mask, cotangents),
            (tangents[0], tangents[1].mask, tangents[3]),
        )[1]
        return out, moved


# --- the same loop in plain JAX ----------------------------------------------------------------------------------


def hoisted(options: Options, inputs: Inputs, flags: Flags) -> tuple[Any, tuple[jax.Array, ...]]:
    """`loop` in plain JAX, with every derivative."""
    if inputs.form.gates.linear:
        return recurrences(options, inputs, flags)
    remat = None if options.chunks is None else options.chunks.length
    steps = Steps(flags.valid, flags.resets, options.reverse, remat=remat)

    def run(xs: Any, state: Any, steps: Steps) -> tuple[Any, tuple[jax.Array, ...]]:
        given = affine.Inputs(replace(inputs.form, mask=flags.mask), xs, state, inputs.restart)
        return affine.loop(affine.choose_options(given, steps), given, steps)[:2]

    return checkpointed(run, inputs.xs, inputs.state, steps)


def recurrences(options: Options, inputs: Inputs, flags: Flags) -> tuple[Any, tuple[jax.Array, ...]]:
    """`loop` for gates that are linear in the state: a `linear_scan` for each field, elsewhere parallel over time."""
    remat = None if options.chunks is None else options.chunks.length
    form, fields = inputs.form, type(inputs.state)

    def run(xs: Any, state: Any, steps: Steps) -> tuple[Any, tuple[jax.Array, ...]]:
        u = form.project(xs)
        zero, one = (fields(*(jnp.full_like(u[0], value) for _ in state)) for value in (0, 1))
        # A field is a * field + b: its value at zero is b, and its derivative is a.
        gates = lambda state: form.gates.combine(form.theta, u, zero[:1] * len(u), state, None)
        b, a = jax.jvp(gates, (zero,), (one,))
        if steps.resets is not None:
            b = select(steps.resets, jax.tree.map(lambda a, b, again: a * again[None] + b, a, b, inputs.restart), b)
        if steps.valid is not None:
            a, b = select(steps.valid, a, one), select(steps.valid, b, zero)
        scanned = functools.partial(linear.linear_scan, resets=steps.resets, reverse=steps.reverse)
        after = fields(*map(scanned, a, b, state))
        return jax.tree.map(lambda h: h[0 if steps.reverse else -1], after), options.emitted(after)

    return checkpointed(run, inputs.xs, inputs.state, Steps(flags.valid, flags.resets, options.reverse, remat=remat))


def tangent(options: Options, inputs: Inputs, flags: Flags, d: Inputs, dmask: Any = None) -> tuple[Any, Any]:
    """The tangents of `hoisted` for the tangents ``d`` of the inputs and ``dmask`` of the mask."""
    return affine.jvp_of(
        lambda inputs, mask: hoisted(options, inputs, flags._replace(mask=mask)), (inputs, flags.mask), (d, dmask)
    )[1]


# --- forms -------------------------------------------------------------------------------------------------------


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _form(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _zeros(form: Any) -> jax.Array:
    return jnp.zeros(form.shape, form.dtype)


_NOTHING = _float(0)


def _arguments(inputs: Inputs, flags: Flags) -> list[jax.Array]:
    """The first operands of both compiled functions; an absent one is an array without elements."""
    nothing = _zeros(_NOTHING)
    marks = [jnp.zeros((0,), jnp.bool_) if f is None else f for f in (flags.valid, flags.resets)]
    marks.append(nothing if flags.mask is None else flags.mask)
    restart = inputs.restart or (nothing,) * len(inputs.state)
    form = inputs.form
    w_ih = nothing if form.given else form.inputs[0]
    return [inputs.xs, w_ih, form.w_hh, *marks, *jax.tree.leaves(form.theta), *inputs.state, *restart]
