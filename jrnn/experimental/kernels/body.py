"""One step of an affine cell as every kernel runs it, forward and backward, on arrays of any layout.

The gates act on each element by itself, so a step does not ask how its arrays lie: units may come first or last, and
an array may be the part of the batch that one block of a GPU holds in registers. A kernel brings the product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax

from jrnn.cells.base import product
from jrnn.experimental.kernels.plan import Settings, Steps
from jrnn.jaxprs.primitives import called
from jrnn.schedules.read import unpack


def forward(plan: Settings, theta: Any, state: Any, restart: Any, step: Steps, multiply: Any) -> tuple[Any, Any]:
    """One step: ``(met, new)``, the state that it met once resets are done and the state after it.

    ``step.read`` is u, one array a gate; ``multiply(h)`` gives v, one array a gate.
    """
    if step.resets is not None:
        state = choose(step.resets, restart, state)
    v = tuple(multiply(state.h))
    new = inline(lambda theta, u, v, state: plan.combine(theta, u, v, state, None))(theta, step.read, v, state)
    return state, new if step.valid is None else choose(step.valid, new, state)


def backward(plan: Settings, theta: Any, met: Any, dnew: Any, dh: Any, step: Steps, multiply: Any) -> tuple[Any, ...]:
    """The transpose of `forward` at one step: ``(dtheta, dread, dstate, drestart)``.

    ``step.read`` is what the gates read (see `jrnn.schedules.read`), ``dnew`` what flows back into the state
    after the step and ``dh`` what its output adds; ``multiply(dv)`` gives ``dv W_hh^T``.
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
    """The new state from what the gates read: ``u``, with v in it where the sum is enough, then the other v."""
    return plan.combine(theta, *unpack(plan.sums, read), state, None)


def choose(flags: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(flags, n, o), new, old)


# --- the same in ordinary JAX: what a kernel is differentiated by ------------------------------------------------


def scan_forward(plan: Settings, shared: Any, steps: Steps, states: Any) -> tuple[Any, Any]:
    """What `Device.forward` computes, as a scan over ``(N, H)`` rows."""
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
    """What `Device.backward` computes, as a scan over ``(N, H)`` rows."""
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
    """A step of rows ``(N, …)``: its flags as columns, what is read as one array a part."""
    flags = (None if f is None else f[:, None] for f in (step.valid, step.resets))
    return Steps(tuple(jnp.split(step.read, step.read.shape[-1] // plan.hidden, axis=-1)), *flags)


# --- a traced function with nothing in it but operations that a kernel may hold ----------------------------------

# Operations that not every kernel language has, from their parameters and operands, by those it has. Near zero log1p
# and expm1 keep an absolute error of rounding and not a relative one.
_REWRITTEN: dict[str, Any] = {
    "add_any": lambda params, x, y: lax.add(x, y),
    "copy": lambda params, x: x,
    "copy_p": lambda params, x: x,
    "expm1": lambda params, x: lax.exp(x) - 1,
    "integer_pow": lambda params, x: _power(x, params["y"]),
    "log1p": lambda params, x: lax.log(1 + x),
    "one_minus_square": lambda params, x: 1 - x * x,
    "sqrt": lambda params, x: lax.select(lax.eq(x, lax.full_like(x, 0)), x, x * lax.rsqrt(x)),
    "stop_gradient": lambda params, x: x,
}


def _power(x: jax.Array, y: int) -> jax.Array:
    if y < 0:
        return 1 / _power(x, -y)
    half = None if y < 2 else _power(x, y // 2)
    square = lax.full_like(x, 1) if half is None else half * half
    return square * x if y % 2 else square


def inline(function: Any) -> Any:
    """The function with every call in it opened."""

    def call(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outs = _run(traced.jaxpr, traced.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return call


def _run(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if (program := called(eqn)) is not None:
            outs = _run(*program, values)
        elif name in _REWRITTEN:
            outs = [_REWRITTEN[name](eqn.params, *values)]
        else:
            outs = eqn.primitive.bind(*values, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def operations(plan: Settings, theta: Any, state: Any) -> set[str]:
    """The names of the operations that a step and its transpose consist of, besides the product."""
    row = jax.ShapeDtypeStruct((1, plan.hidden), jnp.float32)
    theta, state = jax.tree.map(lambda _: row, (theta, state))

    def both(theta: Any, u: Any, read: Any, state: Any, dnew: Any) -> Any:
        none = Steps(u, None, None)
        out = forward(plan, theta, state, None, none, lambda h: u)
        return out, backward(plan, theta, state, dnew, dnew.h, none._replace(read=read), lambda dv: dv[0])

    traced = jax.make_jaxpr(both)(theta, (row,) * plan.gates, (row,) * plan.parts, state, state)
    return {eqn.primitive.name for eqn in traced.jaxpr.eqns}
