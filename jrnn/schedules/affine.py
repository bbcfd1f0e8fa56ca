"""The loop of an affine cell, and its derivative with every weight gradient taken out of the loop.

The loop itself runs ``v = h W_hh`` and ``gates``. Its tangent is written as a loop too, linear in what flows::

    ds_t = gates'(du_t, dv_t, ds_{t-1})        dv_t = dh_{t-1} W_hh + [h_{t-1} dW_hh]

where the bracket is one product for all T, before the loop. JAX transposes that into a backward loop with one product
a step, ``dz_t W_hh^T``, and one product over T*B after it for the gradient of ``W_hh``: nothing accumulates inside.
Both modes and all higher derivatives follow, since the rule is made of ordinary JAX.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jrnn.cells.base import product, stable
from jrnn.schedules.steps import Steps, checkpointed, expand, select


@dataclass(frozen=True)
class Plan:
    """What is static about a run: it compiles once for each."""

    cell: Any
    reverse: bool
    unroll: int
    path: tuple[int, ...]


class Inputs(NamedTuple):
    """What the loop is differentiated by."""

    theta: Any
    w_hh: jax.Array
    mask: Any
    state: Any
    restart: Any
    u: tuple[jax.Array, ...]


class Schedule(NamedTuple):
    """What steers the loop and has no derivative."""

    key: Any
    times: Any
    valid: Any
    resets: Any


def run(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> tuple[Any, jax.Array]:
    """An affine cell over all steps; ``ys`` in the state's dtype."""
    batch_shape = xs.shape[1 : xs.ndim - cell.event_ndim]
    restart = None if steps.resets is None else cell.initial_state(params, batch_shape)
    plan = Plan(cell, steps.reverse, steps.unroll, steps.path)

    def segment(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        xs, valid, resets, times = inputs
        u = cell.project(params, xs)
        weights = (cell.theta(params), cell.recurrent_weights(params), cell.recurrent_mask(params))
        last, states = loop(plan, Inputs(*weights, state, restart, u), Schedule(steps.key, times, valid, resets))
        ys = states.h
        return last, ys if valid is None else jnp.where(expand(valid, ys), ys, jnp.zeros((), ys.dtype))

    inputs = (xs, steps.valid, steps.resets, steps.times(xs.shape[0]))
    return checkpointed(segment, state, inputs, xs.shape[0], steps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def loop(plan: Plan, inputs: Inputs, schedule: Schedule) -> tuple[Any, Any]:
    """The state after the last step, and the states after every step."""
    cell = plan.cell

    def body(state: Any, step: Any) -> tuple[Any, Any]:
        u, (time, valid, resets) = step
        if resets is not None:
            state = select(resets, inputs.restart, state)
        v = cell.split(product(fed(state.h, inputs.mask), inputs.w_hh))
        new = cell.combine(inputs.theta, u, v, state, key_at(plan, schedule.key, time))
        if valid is not None:
            new = select(valid, new, state)
        return new, new

    steps = (inputs.u, (schedule.times, schedule.valid, schedule.resets))
    return scan(plan, body, inputs.state, steps)


@functools.partial(loop.defjvp, symbolic_zeros=True)
def _loop_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Any, Any]:
    inputs, schedule = primals
    last, states = loop(plan, inputs, schedule)
    moving = jax.tree.map(lambda t: not isinstance(t, SymbolicZero), tangents[0], is_leaf=_is_zero)
    dense = jax.tree.map(_instantiate, tangents[0], is_leaf=_is_zero)
    return (last, states), tangent(plan, moving.w_hh, inputs, schedule, states, dense)


# Recomputed backwards from the states: what the tangent loop needs of the primal one (v, the gates) is never kept.
@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def tangent(
    plan: Plan, weights_move: bool, inputs: Inputs, schedule: Schedule, states: Any, d: Inputs
) -> tuple[Any, Any]:
    """The derivative of `loop` in the direction ``d``."""
    cell = plan.cell
    before = jax.tree.map(lambda first, all_: shifted(first, all_, plan.reverse), inputs.state, states)
    if schedule.resets is not None:
        before = select(schedule.resets, inputs.restart, before)
    h = fed(before.h, inputs.mask)
    v = cell.split(product(h, inputs.w_hh))
    dv = cell.split(product(h, d.w_hh)) if weights_move else (None,) * len(v)
    # Of a gate that uses only u + v the sum is enough, to read and to send back.
    sums = cell.sums
    u, v = zip(*(((a + b, None) if s else (a, b)) for a, b, s in zip(inputs.u, v, sums, strict=True)), strict=True)
    du, dv = zip(*((_add(a, b), None) if s else (a, b) for a, b, s in zip(d.u, dv, sums, strict=True)), strict=True)
    # The transposed loop multiplies by W_hh^T; made here once, row-major, or XLA would transpose it at every step.
    w_hh_t = inputs.w_hh.T

    def body(ds: Any, step: Any) -> tuple[Any, Any]:
        u, v, state, du, dv, (time, valid, resets) = step
        if resets is not None:
            ds = select(resets, d.restart, ds)
        key = key_at(plan, schedule.key, time)
        through = cell.split(product_t(fed(ds.h, inputs.mask), w_hh_t))
        du = tuple(_add(a, t) if s else a for a, t, s in zip(du, through, sums, strict=True))
        dv = tuple(None if s else _add(a, t) for a, t, s in zip(dv, through, sums, strict=True))

        def gates(theta: Any, u: Any, v: Any, state: Any) -> Any:
            v = tuple(jnp.zeros_like(a) if b is None else b for a, b in zip(u, v, strict=True))
            return cell.combine(theta, u, v, state, key)

        dnew = _gates_jvp(gates, (inputs.theta, u, v, state), (d.theta, du, dv, ds))
        if valid is not None:
            dnew = select(valid, dnew, ds)
        return dnew, dnew

    steps = (u, v, before, du, dv, (schedule.times, schedule.valid, schedule.resets))
    return scan(plan, body, d.state, steps)


def _gates_jvp(gates: Any, primals: Any, tangents: Any) -> Any:
    # Checkpointed, so that the transposed loop recomputes the gates instead of reading their derivatives from memory.
    return jax.checkpoint(lambda p, t: jax.jvp(gates, p, t)[1], prevent_cse=False)(primals, tangents)


def fed(h: jax.Array, mask: jax.Array | None) -> jax.Array:
    """What goes into the recurrent product."""
    return h if mask is None else h * mask


def product_t(x: jax.Array, w_t: jax.Array) -> jax.Array:
    """``x @ w_t.T`` without transposing, so that its transpose is a plain product."""
    x = x.astype(w_t.dtype)
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w_t, dims, preferred_element_type=stable(w_t.dtype))


def shifted(first: jax.Array, states: jax.Array, reverse: bool) -> jax.Array:
    """The state before each step, from the one before the first and those after each."""
    if not states.shape[0]:
        return states
    parts = [states[1:], first[None]] if reverse else [first[None], states[:-1]]
    return jnp.concatenate(parts)


def key_at(plan: Plan, key: Any, time: Any) -> Any:
    return Steps(key=key, path=plan.path).key_at(time)


def scan(plan: Plan, body: Any, state: Any, steps: Any) -> tuple[Any, Any]:
    count = jax.tree.leaves(steps)[0].shape[0]
    return jax.lax.scan(body, state, steps, count, plan.reverse, max(1, min(plan.unroll, count)))


def _add(a: jax.Array | None, b: jax.Array | None) -> Any:
    return b if a is None else a if b is None else a + b


def _is_zero(t: Any) -> bool:
    return isinstance(t, SymbolicZero)


def _instantiate(t: Any) -> Any:
    return jnp.zeros(t.shape, t.dtype) if isinstance(t, SymbolicZero) else t
