"""One step of an affine cell as every kernel runs it, forward and backward, on arrays of any layout.

The gates are elementwise, so a step does not depend on the layout of its arrays: units may come first or last, and an
array may be the part of the batch that one block of a GPU holds in registers. The kernel provides the matmul.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.base import product
from jrnn.experimental.kernels.options import Settings, Steps
from jrnn.jaxprs.flat import Op, bind, flatten, run
from jrnn.jaxprs.primitives import primitive
from jrnn.schedules.read import unpack


def forward(plan: Settings, theta: Any, state: Any, restart: Any, step: Steps, multiply: Any) -> tuple[Any, Any]:
    """One step: ``(met, new)``, the state before the step, after resets, and the state after the step.

    ``step.read`` is u, one array for each gate. ``multiply(h)`` returns v, one array for each gate.
    """
    if step.resets is not None:
        state = choose(step.resets, restart, state)
    v = tuple(multiply(state.h))
    new = inline(lambda theta, u, v, state: plan.combine(theta, u, v, state, None))(theta, step.read, v, state)
    return state, new if step.valid is None else choose(step.valid, new, state)


def backward(plan: Settings, theta: Any, met: Any, dnew: Any, dh: Any, step: Steps, multiply: Any) -> tuple[Any, ...]:
    """The transpose of `forward` at one step: ``(dtheta, dread, dstate, drestart)``.

    ``step.read`` are the gate inputs (see `jrnn.schedules.read`). ``dnew`` is the cotangent of the state after the step
    and ``dh`` that of its output. ``multiply(dv)`` returns ``dv W_hh^T``.
    """
    dnew = dnew._replace(h=dnew.h + dh)
    held = None
    if step.valid is not None:
        zero = jax.tree.map(jnp.zeros_like, dnew)
        held, dnew = choose(step.valid, zero, dnew), choose(step.valid, dnew, zero)

    def pull(theta: Any, read: Any, met: Any, dnew: Any) -> Any:
        return jax.vjp(lambda *at: gates(plan, *at), theta, read, met)[1](dnew)

    dtheta, dread, dstate = inline(pull)(theta, step.read, met, dnew)
    dstate = dstate._replace(h=dstate.h + multiply(tuple(dread[slot] for slot in plan.slots)))
    if held is not None:
        dstate = jax.tree.map(jnp.add, dstate, held)
    if step.resets is None:
        return dtheta, dread, dstate, None
    zero = jax.tree.map(jnp.zeros_like, dstate)
    return dtheta, dread, choose(step.resets, zero, dstate), choose(step.resets, dstate, zero)


def gates(plan: Settings, theta: Any, read: Any, state: Any) -> Any:
    """The new state from the gate inputs ``read`` (see `jrnn.schedules.read`) and the state before the step."""
    return plan.combine(theta, *unpack(plan.sums, read), state, None)


def choose(flags: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(flags, n, o), new, old)


# --- the same in ordinary JAX, for derivatives of the kernels ----------------------------------------------------


def scan_forward(plan: Settings, shared: Any, steps: Steps, states: Any) -> tuple[Any, Any]:
    """The forward kernel as a scan over rows ``(N, H)``."""
    w_hh, theta = shared
    state, restart = states

    def multiply(h: jax.Array) -> Any:
        return jnp.split(product(h, w_hh), plan.gates, -1)

    def body(state: Any, step: Steps) -> tuple[Any, Any]:
        met, new = forward(plan, theta, state, restart, rows(plan, step), multiply)
        return new, (new.h, met if plan.keep else None)

    last, kept = lax.scan(body, state, steps, reverse=plan.reverse)
    return kept, last


def scan_backward(plan: Settings, shared: Any, steps: Any, states: Any) -> tuple[Any, Any]:
    """The backward kernel as a scan over rows ``(N, H)``."""
    w_hh, theta = shared
    dlast, zero = states
    widen = jax.tree.map(lambda a: jnp.broadcast_to(a, zero.h.shape), theta)

    def multiply(dv: Any) -> jax.Array:
        dv = jnp.concatenate(dv, -1).astype(w_hh.dtype)
        return product(dv, w_hh.T)

    def body(carry: Any, step: Any) -> tuple[Any, jax.Array]:
        (step, met, dh), (dnew, drestart, dtheta) = step, carry
        moved = backward(plan, widen, met, dnew, dh, rows(plan, step), multiply)
        dtheta = jax.tree.map(jnp.add, dtheta, moved[0])
        drestart = drestart if moved[3] is None else jax.tree.map(jnp.add, drestart, moved[3])
        return (moved[2], drestart, dtheta), jnp.concatenate(moved[1], -1)

    carry = (dlast, zero, jax.tree.map(jnp.zeros_like, widen))
    out, dread = lax.scan(body, carry, steps, reverse=not plan.reverse)
    return dread, out


def rows(plan: Settings, step: Steps) -> Steps:
    """A step of rows ``(N, …)``, with its flags as columns and one array for each part of the gate inputs."""
    flags = (None if f is None else f[:, None] for f in (step.valid, step.resets))
    return Steps(tuple(jnp.split(step.read, step.read.shape[-1] // plan.hidden, axis=-1)), *flags)


# --- a traced function with only operations that a kernel may contain --------------------------------------------


def inline(function: Any) -> Any:
    """The function with every call inside it inlined."""

    def apply(op: Op, values: list[Any]) -> Any:
        rule = primitive(op.name).pallas
        return (rule(op.params, *values),) if callable(rule) else bind(op.primitive, op.params, values)

    def call(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        program, consts = flatten(traced, opened=True)
        return jax.tree.unflatten(jax.tree.structure(shape), run(program, [*consts, *jax.tree.leaves(args)], apply))

    return call


def operations(plan: Settings, theta: Any, state: Any) -> set[str]:
    """The names of the operations that a step and its transpose consist of, besides the product."""
    row = jax.ShapeDtypeStruct((1, plan.hidden), jnp.float32)
    theta, state = jax.tree.map(lambda _: row, (theta, state))

    def both(theta: Any, u: Any, read: Any, state: Any, dnew: Any) -> Any:
        none = Steps(u, None, None)
        out = forward(plan, theta, state, None, none, lambda h: u)
        return out, backward(plan, theta, state, dnew, dnew.h, none._replace(read=read), lambda dv: dv[0])

    traced = jax.make_jaxpr(both)(theta, (row,) * plan.gates, (row,) * plan.parts, state, state)
    return {op.name for op in flatten(traced)[0].ops}
