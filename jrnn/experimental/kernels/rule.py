"""The recurrence of an affine cell by the kernels of a device, with its rules for derivatives and `vmap`.

The kernels run only what needs the state. The projection of all T inputs is computed before them. After them, the
gate inputs are recomputed, and the gradient of each weight is one matmul over all T.

`jax.grad` runs the backward kernel. The derivative of each kernel is that of the same computation as a scan, in `body`,
so that derivatives of gradients are right, if slower. JAX refuses `jax.jvp`, as for any `custom_vjp`.
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
    """The operands that the recurrence has derivatives with respect to.

    ``u`` is ``(T, N, G*H)``. The fields of ``state`` and ``restart`` are ``(N, H)``.
    """

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
    """The module of a device's kernels. It is imported at its first use, since importing Pallas takes long."""
    return importlib.import_module(f"jrnn.experimental.kernels.{device}")


def _forward(plan: Settings, shared: Any, steps: Any, states: Any) -> Any:
    return _kernel("forward", plan, shared, steps, states)


def _backward(plan: Settings, shared: Any, steps: Any, states: Any) -> Any:
    return _kernel("backward", plan, shared, steps, states)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kernel(name: str, plan: Settings, shared: Any, steps: Any, states: Any) -> Any:
    """The kernel of that name, as a function of arrays.

    ``shared`` are the operands that all sequences share. ``steps`` have a value for each step, ``(T, N, …)``, and
    ``states`` one for each sequence, ``(N, …)``. The results are of the latter two kinds.
    """

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
            # Each has other weights: they run one after another.
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
    """The mapped axis of a `vmap`, which is the first, merged into the axis of sequences, which is ``axis``."""
    a = jnp.moveaxis(a, 0, axis)
    return a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])


def _unfold(size: int, axis: int, a: jax.Array) -> jax.Array:
    a = a.reshape(*a.shape[:axis], size, a.shape[axis] // size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a, axis, 0)
