"""The loop of an affine cell as a compiled function for the CPU: every product, the gates and all gradients in one.

XLA runs a loop as a list of operations, about ten a step, on arrays that go through memory. Here one function written
in C++ (`kernel.cc`) holds the whole loop, with the cell's own gates compiled into it (`emit.py`), and is called by XLA
as one operation. It needs a C++ compiler, once for each cell and machine (`build.py`), and is used where it is asked
for.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.base import product
from jrnn.schedules import promises
from jrnn.schedules.native import build, emit
from jrnn.schedules.read import parts
from jrnn.schedules.steps import Steps, checkpointed, expand, select

__all__ = ["run", "serves"]


@dataclass(frozen=True)
class Plan:
    """What is static about a run."""

    cell: Any
    sums: tuple[bool, ...]
    header: str
    reverse: bool


class Inputs(NamedTuple):
    """What the loop is differentiated by; ``restart`` is None where nothing resets."""

    xs: jax.Array
    w_ih: jax.Array
    b: jax.Array
    w_hh: jax.Array
    theta: Any
    state: Any
    restart: Any


class Flags(NamedTuple):
    """Booleans ``(T, N)``, or None: which steps are valid, and before which the state is replaced."""

    valid: Any
    resets: Any


def serves(cell: Any, params: Any, xs: Any, steps: Steps) -> tuple[bool, str]:
    if not getattr(cell, "is_affine", False):
        return False, "it runs affine cells (jrnn.AffineCell), whose step is two products and a function of gates"
    if steps.key is not None and cell.uses_key is not False:
        return False, "what is drawn at each step (zoneout, dropout) is not known to it"
    if cell.input_weights(params) is None or cell.recurrent_mask(params) is not None:
        return False, "the cell makes its input projection, or what goes into the recurrent product, itself"
    state = jax.eval_shape(lambda params: cell.initial_state(params, xs.shape[1 : xs.ndim - 1]), params)
    used = (cell.theta(params), cell.input_weights(params), cell.recurrent_weights(params), state, xs)
    if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(used)):
        return False, "it computes in float32 only"
    if not hasattr(state, "_fields") or "h" not in state._fields:
        return False, "its state is no NamedTuple with a field h"
    if not promises.elementwise(cell, cell.theta(params), state):
        return False, "its gates are not elementwise over H"
    try:
        _header(cell, params, state)
    except emit.Unserved as error:
        return False, str(error)
    if jax.default_backend() != "cpu":
        return False, f"it runs on a CPU, and the default device is {jax.default_backend()}"
    found, reason = build.available()
    return found, reason or "the whole loop is one compiled function for this CPU"


def run(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> tuple[Any, jax.Array]:
    """An affine cell over all steps; batch axes are made one, and the results unmade."""
    time, *batch, features = xs.shape
    if not xs.size:
        return _empty(xs, state)
    count = math.prod(batch)
    plan = Plan(cell, promises.sums(cell, cell.theta(params), state), _header(cell, params, state), steps.reverse)
    w_ih, b = cell.input_weights(params)
    w_hh, theta = cell.recurrent_weights(params), cell.theta(params)
    restart = None if steps.resets is None else _rows(cell.initial_state(params, tuple(batch)), count)

    def segment(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        xs, *flags = inputs
        last, ys = loop(plan, Inputs(xs, w_ih, b, w_hh, theta, state, restart), Flags(*flags))
        return last, ys if flags[0] is None else jnp.where(expand(flags[0], ys), ys, jnp.zeros((), ys.dtype))

    flags = (None if f is None else f.reshape(time, count) for f in (steps.valid, steps.resets))
    inputs = (xs.reshape(time, count, features), *flags)
    last, ys = checkpointed(segment, _rows(state, count), inputs, time, steps)
    return jax.tree.map(lambda a: a.reshape(*batch, -1), last), ys.reshape(time, *batch, -1)


def _rows(state: Any, count: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(count, -1), state)


def _empty(xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
    """No step, or no sequence."""
    return state, jnp.zeros((*xs.shape[:-1], state.h.shape[-1]), state.h.dtype)


def _header(cell: Any, params: Any, state: Any) -> str:
    theta = cell.theta(params)
    sums = promises.sums(cell, theta, state)
    return emit.header(cell, jax.tree.structure(theta), jax.tree.structure(state), sums)


# --- the loop and its derivative ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loop(plan: Plan, inputs: Inputs, flags: Flags) -> tuple[Any, jax.Array]:
    """The state after the last step and ``h`` after every step."""
    return forward(plan, False, inputs, flags)[:2]


def _loop_fwd(plan: Plan, inputs: Inputs, flags: Flags) -> Any:
    last, hs, *kept = forward(plan, True, inputs, flags)
    return (last, hs), (inputs, flags, hs, kept)


def _loop_bwd(plan: Plan, residuals: Any, cotangents: Any) -> Any:
    inputs, flags, hs, kept = residuals
    return backward(plan, inputs, flags, (hs, *kept), cotangents), None


loop.defvjp(_loop_fwd, _loop_bwd)


# Of both functions the derivatives are those of a plain loop: the second derivatives of a run, then, and higher ones.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def forward(plan: Plan, keep: bool, inputs: Inputs, flags: Flags) -> Any:
    """``(last, hs, parts, others)``: and, to keep for a derivative, what the gates read and the states besides h."""
    kernel = build.load(plan.header)
    time, count, _ = inputs.xs.shape
    hidden = inputs.w_hh.shape[0]
    row = _row(plan, kernel, hidden)
    form = jax.ShapeDtypeStruct((time, count, hidden), jnp.float32)
    nothing = jax.ShapeDtypeStruct((0,), jnp.float32)
    last = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in inputs.state]
    kept = jax.ShapeDtypeStruct((time, count, row), jnp.float32) if keep else nothing
    others = [form if keep else nothing for _ in range(len(last) - 1)]
    call = jax.ffi.ffi_call(kernel.forward, [*last, form, kept, *others], vmap_method="sequential")
    outs = call(*_operands(inputs, flags), inputs.b, reverse=int(plan.reverse), parts_row=row)
    states = len(last)
    return type(inputs.state)(*outs[:states]), outs[states], outs[states + 1], tuple(outs[states + 2 :])


@forward.defjvp
def _forward_jvp(plan: Plan, keep: bool, primals: Any, tangents: Any) -> Any:
    (inputs, flags), (d, _) = primals, tangents
    outs = forward(plan, keep, inputs, flags)
    moved = jax.jvp(lambda inputs: plain(plan, inputs, flags), (inputs,), (d,))[1]
    # What is kept is read by `backward` alone, whose derivative does not go through it.
    return outs, (*moved, *jax.tree.map(jnp.zeros_like, outs[2:]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def backward(plan: Plan, inputs: Inputs, flags: Flags, kept: Any, cotangents: Any) -> Inputs:
    """The gradient by every input, given those of ``last`` and ``hs``."""
    kernel = build.load(plan.header)
    hs, parts, others = kept
    dlast, dhs = cotangents

    def forms(tree: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    nothing = [jax.ShapeDtypeStruct((0,), jnp.float32)] * len(inputs.state)
    results = [*forms((inputs.xs, inputs.w_ih, inputs.w_hh, inputs.theta, inputs.state))]
    results += [*(forms(inputs.restart) or nothing), *forms(inputs.b)]
    call = jax.ffi.ffi_call(kernel.backward, results, vmap_method="sequential")
    row = _row(plan, kernel, inputs.w_hh.shape[0])
    operands = (*_operands(inputs, flags), hs, parts, *others, *dlast, dhs)
    dx, dw_ih, dw_hh, *rest, db = call(*operands, reverse=int(plan.reverse), parts_row=row)
    thetas, states = len(jax.tree.leaves(inputs.theta)), len(inputs.state)
    dtheta = jax.tree.unflatten(jax.tree.structure(inputs.theta), rest[:thetas])
    dstate = type(inputs.state)(*rest[thetas : thetas + states])
    drestart = None if inputs.restart is None else type(inputs.restart)(*rest[thetas + states :])
    return Inputs(dx, dw_ih, db, dw_hh, dtheta, dstate, drestart)


@backward.defjvp
def _backward_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    (inputs, flags, kept, cotangents), (d, _, _, d_cotangents) = primals, tangents

    def pulled(inputs: Inputs, cotangents: Any) -> Inputs:
        return jax.vjp(lambda inputs: plain(plan, inputs, flags), inputs)[1](cotangents)[0]

    moved = jax.jvp(pulled, (inputs, cotangents), (d, d_cotangents))[1]
    return backward(plan, inputs, flags, kept, cotangents), moved


def plain(plan: Plan, inputs: Inputs, flags: Flags) -> tuple[Any, jax.Array]:
    """The same loop as a scan."""
    cell = plan.cell

    def body(state: Any, step: Any) -> tuple[Any, jax.Array]:
        u, valid, resets = step
        if resets is not None:
            state = select(resets, inputs.restart, state)
        v = jnp.split(product(state.h, inputs.w_hh), len(plan.sums), -1)
        new = cell.combine(inputs.theta, jnp.split(u, len(plan.sums), -1), v, state, None)
        if valid is not None:
            new = select(valid, new, state)
        return new, new.h

    u = product(inputs.xs, inputs.w_ih) + inputs.b
    return lax.scan(body, inputs.state, (u, *flags), reverse=plan.reverse)


def _operands(inputs: Inputs, flags: Flags) -> list[jax.Array]:
    """The operands that both functions begin with; without elements where there is nothing."""
    nothing = jnp.zeros((0,), jnp.float32)
    marks = [jnp.zeros((0,), jnp.bool_) if f is None else f for f in flags]
    restart = inputs.restart or (nothing,) * len(inputs.state)
    return [inputs.xs, inputs.w_ih, inputs.w_hh, *marks, *jax.tree.leaves(inputs.theta), *inputs.state, *restart]


def _row(plan: Plan, kernel: build.Kernel, hidden: int) -> int:
    """Floats of a row of what the gates read: whole blocks of units, and no multiple of a page (see `kernel.cc`)."""
    floats = -(-hidden // kernel.unit_block) * kernel.unit_block * parts(plan.sums)
    return floats if floats % 256 else floats + 16
