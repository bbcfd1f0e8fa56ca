"""The recurrence of an affine cell by a device's kernels, and what JAX needs of it: derivatives and `vmap`.

The kernels run what needs the state, and nothing else. Before them stands the projection of all T inputs; after them,
what the gates read is made again and the gradients of the weights are taken, each as one product over all T.

`jax.grad` runs the backward kernel. Each kernel is itself differentiated through its twin in `body`, a scan, so that
derivatives of gradients are right, if slower; `jax.jvp` of the recurrence is refused by JAX, as of any `custom_vjp`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn.cells.base import product
from jrnn.experimental.kernels import body
from jrnn.experimental.kernels.options import Settings, Steps
from jrnn.schedules.read import pack


class Operands(NamedTuple):
    """What the recurrence is differentiated by: ``u (T, N, G*H)``, ``w_hh``, theta, and states ``(N, H)``."""

    u: jax.Array
    w_hh: jax.Array
    theta: Any
    state: Any
    restart: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(plan: Settings, operands: Operands, valid: Any, resets: Any) -> tuple[Any, jax.Array]:
    """The state after the last step, and ``h (T, N, H)`` after every step; flags are ``(T, N)`` or None."""
    return _recur(plan, operands, valid, resets)[0]


def _recur(plan: Settings, operands: Operands, valid: Any, resets: Any) -> tuple[Any, Any]:
    u, w_hh, theta, state, restart = operands
    (hs, met), last = _forward(plan, (w_hh, theta), Steps(u, valid, resets), (state, restart))
    return (last, hs), (operands, valid, resets, met)


def _recur_fwd(plan: Settings, operands: Operands, valid: Any, resets: Any) -> tuple[Any, Any]:
    return _recur(replace(plan, keep=True), operands, valid, resets)


def _recur_bwd(plan: Settings, kept: Any, d: Any) -> tuple[Any, None, None]:
    (u, w_hh, theta, state, restart), valid, resets, met = kept
    dlast, dhs = d
    v, pull = jax.vjp(lambda w_hh: product(met.h, w_hh), w_hh)
    steps = (Steps(pack(plan.sums, u, v), valid, resets), met, dhs)
    zero = jax.tree.map(jnp.zeros_like, state)
    dread, (dstate, drestart, dtheta) = _backward(plan, (w_hh, theta), steps, (dlast, zero))
    parts = jnp.split(dread, plan.parts, axis=-1)
    du = jnp.concatenate(parts[: plan.gates], -1)
    (dw_hh,) = pull(jnp.concatenate([parts[slot] for slot in plan.slots], -1))
    dtheta = jax.tree.map(lambda d, leaf: d.sum(0).astype(leaf.dtype), dtheta, theta)
    return Operands(du, dw_hh, dtheta, dstate, None if restart is None else drestart), None, None


recur.defvjp(_recur_fwd, _recur_bwd)


# --- a kernel as a function of JAX -------------------------------------------------------------------------------


def module(device: str) -> Any:
    """The kernels of a device, imported only where they are wanted: Pallas takes its time."""
    return importlib.import_module(f"jrnn.experimental.kernels.{device}")


def _forward(plan: Settings, shared: Any, steps: Any, states: Any) -> Any:
    return _kernel("forward", plan, shared, steps, states)


def _backward(plan: Settings, shared: Any, steps: Any, states: Any) -> Any:
    return _kernel("backward", plan, shared, steps, states)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kernel(name: str, plan: Settings, shared: Any, steps: Any, states: Any) -> Any:
    """A device's kernel of that name: from what all sequences share, of each step ``(T, N, …)`` and of each sequence
    ``(N, …)``, to what comes out of each step and of each sequence."""

    @jax.custom_batching.custom_vmap
    def call(shared: Any, steps: Any, states: Any) -> Any:
        return getattr(module(plan.device), name)(plan, shared, steps, states)

    @call.def_vmap
    def batched(size: int, is_batched: Any, shared: Any, steps: Any, states: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten((shared, steps, states))
        flags = jax.tree.leaves(is_batched)
        spread = [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(leaves, flags, strict=True)]
        args = jax.tree.unflatten(tree, spread)
        if any(jax.tree.leaves(is_batched[0])):
            # Weights of their own for each: one run after another.
            out = jax.lax.map(lambda args: call(*args), args)
        else:
            steps = jax.tree.map(functools.partial(_fold, 1), args[1])
            states = jax.tree.map(functools.partial(_fold, 0), args[2])
            of_steps, of_states = call(shared, steps, states)
            out = (
                jax.tree.map(functools.partial(_unfold, size, 1), of_steps),
                jax.tree.map(functools.partial(_unfold, size, 0), of_states),
            )
        return out, jax.tree.map(lambda _: True, out)

    return call(shared, steps, states)


@_kernel.defjvp
def _kernel_jvp(name: str, plan: Settings, primals: Any, tangents: Any) -> Any:
    twin = functools.partial(getattr(body, f"scan_{name}"), plan)
    return _kernel(name, plan, *primals), jax.jvp(twin, primals, tangents)[1]


def _fold(axis: int, a: jax.Array) -> jax.Array:
    """The runs of a `vmap`, on the first axis, among the sequences, on another."""
    a = jnp.moveaxis(a, 0, axis)
    return a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])


def _unfold(size: int, axis: int, a: jax.Array) -> jax.Array:
    a = a.reshape(*a.shape[:axis], size, a.shape[axis] // size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a, axis, 0)
