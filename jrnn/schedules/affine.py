"""The loop of an affine cell, and its derivative with every weight gradient taken out of the loop.

The loop itself computes ``v = h W_hh`` and ``gates``. Its tangent is written as a loop too, linear in the tangents::

    ds_t = gates'(du_t, dv_t, ds_{t-1})        dv_t = dh_{t-1} W_hh + [h_{t-1} dW_hh]

The bracket, like ``du = dx W_ih + x dW_ih + db``, is one matmul for many steps, before their loop. JAX transposes the
tangent. With ``g_t`` the cotangent of ``v_t``, the backward loop has one matmul a step, ``g_t W_hh^T``. The gradients
of all weights, such as ``sum_t h_{t-1}^T g_t``, are matmuls over many steps after it: nothing accumulates inside. Both
modes and all higher derivatives follow, since the rule consists of ordinary JAX operations.

Both loops run in chunks of steps, so that values needed only within a chunk stay in the cache and are never stored for
all of T.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jrnn._core.devices import default_device, is_placed
from jrnn.cells.base import product, side_by_side
from jrnn.cells.form import AffineForm
from jrnn.schedules import promises
from jrnn.schedules.layout import Rows, Units
from jrnn.schedules.plan import Task
from jrnn.schedules.read import pack, parts, slots, unpack
from jrnn.schedules.steps import Steps, chunked, times_in_a_body


@dataclass(frozen=True)
class Options:
    """The static part of a run, which compiles once for equal options.

    ``sums`` says of each gate whether it needs only ``u + v``. ``forward`` and ``backward`` are the layouts of the loop
    and of its derivative. ``chunk`` is the number of steps whose matmuls are computed at once. ``keep`` says whether
    the loop returns residuals. ``read`` says whether these include the gate inputs, or the derivative recomputes them.
    """

    sums: tuple[bool, ...]
    forward: Rows | Units
    backward: Rows | Units
    chunk: int
    keep: bool
    read: bool


class Inputs(NamedTuple):
    """The operands that the loop has derivatives with respect to."""

    form: AffineForm
    xs: jax.Array
    state: Any
    restart: Any


class Kept(NamedTuple):
    """The residuals of the loop: the state that each step consumes, and the gate inputs or None."""

    before: Any
    read: Any


def run(options: Any, task: Task) -> tuple[Any, jax.Array]:
    """Runs an affine form over all steps. ``ys`` have the dtype of the state."""
    inputs = Inputs(task.form, task.xs, task.state, task.restart)
    last, outs, _ = loop(choose_options(inputs, task.steps), inputs, task.steps)
    return last, side_by_side(outs)


# --- choices, made from shapes alone -----------------------------------------------------------------------------


class Limits(NamedTuple):
    """The least sizes at which a choice pays, as measured on two AVX2 cores, for N sequences and H units.

    - ``sequences``: N for units first. In addition ``units``: N * H for the loop, ``backward``: H for its derivative.
    - ``parts_sequences`` and ``parts``: N and N * H for a loop with units first in two parts.
    - ``read``: F + H for storing the gate inputs instead of recomputing them.
    - ``width``: elements of all gates in a chunk, if its T * N is between the two ``rows``.
    """

    sequences: int = 8
    units: int = 8192
    parts: int = 8192
    parts_sequences: int = 32
    backward: int = 768
    read: int = 160
    width: int = 2**20
    rows: tuple[int, int] = (1024, 4096)


LIMITS = Limits()


def choose_options(inputs: Inputs, steps: Steps) -> Options:
    """The options of a run over these inputs."""
    form, (time, *batch, features) = inputs.form, inputs.xs.shape
    count, hidden = math.prod(batch), form.hidden
    forward: Rows | Units = Rows()
    backward: Rows | Units = Rows()
    known = isinstance(time, int) and isinstance(count, int)  # not symbols, as in a program exported for any size
    # Units first was measured on CPUs only. On other devices, two parts would launch twice as many kernels.
    quiet = steps.key is None or not form.gates.draws  # random numbers depend on the order of the axes
    several = known and quiet and count >= LIMITS.sequences and default_device().platform == "cpu"
    placed = any(map(is_placed, jax.tree.leaves((inputs.xs, inputs.state))))  # units first reshapes the batch
    if several and not placed and promises.elementwise(form.gates, form.theta, inputs.state):
        in_parts = count % 2 == 0 and count >= LIMITS.parts_sequences and count * hidden >= LIMITS.parts
        forward = Units(2 if in_parts else 1) if count * hidden >= LIMITS.units else Rows()
        backward = Units() if hidden >= LIMITS.backward else Rows()
    sums = promises.sums(form.gates, form.theta, inputs.state)
    read = features + hidden >= LIMITS.read
    chunk = choose_chunk(time, count, len(sums) * hidden) if known else time
    return Options(sums, forward, backward, chunk, False, read)


def choose_chunk(time: int, count: int, width: int, rows: tuple[int, int] | None = None) -> int:
    """The number of steps in a chunk: enough rows for a fast matmul, few enough to stay in the cache."""
    fewest, most = rows or LIMITS.rows
    chunks = max(1, -(-time * count // min(max(LIMITS.width // width, fewest), most)))
    even = [n for n in range(chunks, min(2 * chunks, time) + 1) if time % n == 0]
    return max(1, -(-time // (even[0] if even else chunks)))


# --- the loop ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def loop(options: Options, inputs: Inputs, steps: Steps) -> tuple[Any, Any, Any]:
    """The state after the last step, the fields that the cell emits after every step, and the residuals.

    The residuals are None without ``options.keep``.
    """
    form, layout, batch = inputs.form, options.forward, inputs.xs.shape[1:-1]
    w_hh = layout.weights(form.w_hh)
    masks, restarts = layout.enter(form.mask), layout.enter(inputs.restart)

    def advance(state: Any, step: Any, mask: Any, restart: Any, time: Any) -> tuple[Any, Any]:
        u, valid, resets = step
        if resets is not None:
            state = layout.select(resets, restart, state)
        v = layout.product(fed(state.h, mask), w_hh)
        key = steps.key_at(time)
        vs = layout.split(v, form.count) if form.coupled else jax.tree.map(jnp.zeros_like, u)
        new = layout.gates(form.gates, form.theta, u, vs, state, key)
        if valid is not None:
            new = layout.select(valid, new, state)
        kept = Kept(state, v if options.read else None) if options.keep else None
        return new, (form.fields(new), kept)

    def body(states: Any, step: Any) -> tuple[Any, Any]:
        parts, time = step
        return both([advance(s, p, m, r, time) for s, p, m, r in zip(states, parts, masks, restarts, strict=True)])

    def segment(state: Any, given: Any) -> tuple[Any, Any]:
        xs, times, valid, resets = given
        u = form.project(xs)
        us, flags = layout.enter(u, steps=True), layout.enter((valid, resets), steps=True, flags=True)
        parts = tuple((u, *flags) for u, flags in zip(us, flags, strict=True))
        last, outs = scan(steps, body, layout.enter(state), (parts, times))
        ys, kept = (layout.leave(parts, batch, steps=True) for parts in both(outs))
        if options.keep and options.read:
            kept = Kept(kept.before, pack(options.sums, u, kept.read))
        return layout.leave(last, batch), (ys, kept)

    last, (ys, kept) = chunks(options, steps, segment, inputs.state, (inputs.xs,))
    return last, ys, kept


@functools.partial(loop.defjvp, symbolic_zeros=True)
def _loop_jvp(options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    inputs, steps = primals
    last, ys, kept = loop(replace(options, keep=True), inputs, steps)
    d = jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, tangents[0], is_leaf=_is_zero)
    return (last, ys, kept if options.keep else None), tangent(options, inputs, steps, kept, d)


# --- its derivative ----------------------------------------------------------------------------------------------


def tangent(options: Options, inputs: Inputs, steps: Steps, kept: Kept, d: Inputs) -> tuple[Any, Any, Any]:
    """The tangents of the results of `loop`, for the tangents ``d`` of its inputs. A zero leaf of ``d`` is None."""
    form, layout, batch = inputs.form, options.backward, inputs.xs.shape[1:-1]
    w_hh = layout.weights_t(form.w_hh)
    (mask,), (restart,) = layout.enter(form.mask), layout.enter(dense(inputs.restart, d.restart))
    dtheta = dense(form.theta, d.form.theta)
    count, places = parts(options.sums), slots(options.sums)

    def body(ds: Any, step: Any) -> tuple[Any, Any]:
        read, dread, state, valid, resets, time = step
        if resets is not None:
            ds = layout.select(resets, restart, ds)
        key = steps.key_at(time)
        dv = layout.product_t(fed(ds.h, mask), w_hh)

        def gates(theta: Any, parts: Any, state: Any) -> Any:
            return layout.gates(form.gates, theta, *unpack(options.sums, parts), state, key)

        # Checkpointed, so that the transposed loop recomputes the gates instead of reading their derivatives from
        # memory. Splits and sums are inside: outside, they would run in a loop of their own, with results stored.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def moved(read: Any, state: Any, theta: Any, dread: Any, dv: Any, ds: Any, dtheta: Any) -> Any:
            parts, dparts = layout.split(read, count), list(layout.split(dread, count))
            for slot, part in zip(places, layout.split(dv, form.count), strict=True):
                dparts[slot] = dparts[slot] + part if form.coupled else dparts[slot]
            dnew = jax.jvp(gates, (theta, parts, state), (dtheta, tuple(dparts), ds))[1]
            return dnew, tuple(dparts) if options.keep and options.read else None

        dnew, dparts = moved(read, state, form.theta, dread, dv, ds, dtheta)
        if valid is not None:
            dnew = layout.select(valid, dnew, ds)
        return dnew, (form.fields(dnew), Kept(ds, dparts) if options.keep else None)

    def project(form: AffineForm, xs: Any) -> jax.Array:
        return jnp.concatenate(form.project(xs), -1)

    def recur(form: AffineForm, h: Any) -> jax.Array:
        return product(fed(h, form.mask), form.w_hh)

    # Checkpointed: the backward pass recomputes the residuals of the tangent chunk by chunk, from those of the loop.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def segment(ds: Any, given: Any) -> tuple[Any, Any]:
        xs, dxs, before, read, times, valid, resets = given
        u, du = jvp_of(project, (form, xs), (d.form, dxs))
        v, dv = jvp_of(recur, (form, before.h), (d.form, None))
        read = pack(options.sums, u, v) if read is None else read
        (inside,) = layout.enter((read, pack(options.sums, du, dv), before), steps=True)
        (flags,) = layout.enter((valid, resets), steps=True, flags=True)
        (ds,) = layout.enter(ds)
        last, outs = scan(steps, body, ds, (*inside, *flags, times))
        ys, kept = (layout.leave((part,), batch, steps=True) for part in outs)
        if options.keep and options.read:
            kept = Kept(kept.before, jnp.concatenate(kept.read, -1))
        return layout.leave((last,), batch), (ys, kept)

    given = (inputs.xs, d.xs, kept.before, kept.read)
    last, (ys, kept) = chunks(options, steps, segment, dense(inputs.state, d.state), given)
    return last, ys, kept


def jvp_of(function: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`jax.jvp` with respect to the leaves whose tangent is not None. If all are None, the result's tangent is zero."""
    tree: Any
    leaves, tree = jax.tree.flatten(primals)
    d = tree.flatten_up_to(tangents)
    moving = [i for i, t in enumerate(d) if t is not None]

    def of(*values: Any) -> Any:
        filled = list(leaves)
        for i, value in zip(moving, values, strict=True):
            filled[i] = value
        return function(*tree.unflatten(filled))

    if not moving:
        out = of()
        return out, jax.tree.map(jnp.zeros_like, out)
    return jax.jvp(of, [leaves[i] for i in moving], [d[i] for i in moving])


def dense(primal: Any, d: Any) -> Any:
    """Tangents with zeros in place of None."""
    tree: Any
    leaves, tree = jax.tree.flatten(primal)
    moving = tree.flatten_up_to(d)
    return tree.unflatten([jnp.zeros_like(p) if t is None else t for p, t in zip(leaves, moving, strict=True)])


def fed(h: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The vector of the recurrent matmul, for one step or several: ``h``, times the dropout mask if there is one."""
    return h if mask is None else h * lax.broadcast_to_rank(mask, h.ndim)


def both(pairs: Any) -> tuple[Any, ...]:
    """A list of pairs as a pair of tuples."""
    return tuple(zip(*pairs, strict=True))


def chunks(options: Options, steps: Steps, segment: Any, state: Any, given: tuple[Any, ...]) -> tuple[Any, Any]:
    length = given[0].shape[0]
    given = (*given, steps.times(length), steps.valid, steps.resets)
    return chunked(segment, state, given, length, options.chunk, steps.reverse)


def scan(steps: Steps, body: Any, state: Any, given: Any) -> tuple[Any, Any]:
    count = jax.tree.leaves(given)[0].shape[0]
    return jax.lax.scan(body, state, given, None, steps.reverse, times_in_a_body(steps.unroll, count))


def _is_zero(t: Any) -> bool:
    return isinstance(t, SymbolicZero)
