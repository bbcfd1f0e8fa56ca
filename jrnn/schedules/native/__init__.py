"""The loop of an affine cell as a compiled function for the CPU: every product, the gates and all gradients in one.

XLA runs a loop as a list of operations, about ten a step, on arrays that go through memory. Here one function written
in C++ holds the whole loop (`kernel.cc`) and calls the cell's own gates, compiled for it (`emit.py`, `cell.cc`); XLA
calls it as one operation (`calls.py`). The machine's C++ compiler makes the loop once and the gates once for each cell
(`build.py`, `cache.py`). On a CPU it is the default wherever it serves and pays.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.devices import default_device
from jrnn.cells.base import compute_params, emitted, is_low, output, side_by_side
from jrnn.schedules import promises
from jrnn.schedules.native import build, emit, operation
from jrnn.schedules.native.calls import Flags, Inputs, Plan, loop
from jrnn.schedules.native.chunks import Chunks
from jrnn.schedules.steps import Steps, restarts, zeroed

__all__ = ["pays", "run", "serves"]

# From how much on it is chosen by default: floating-point operations, to be worth a compilation; and steps of all
# sequences, since the weights are packed anew in each call, which costs as much as some of these. Not so where few
# steps of few sequences read them in place (`forward.h`): there STEP operations are enough.
WORK, ROWS, STEP = 2**20, 32, 2**18
FEW_STEPS, FEW_SEQUENCES, WHOLE_BLOCKS = 4, 3, 32


def pays(cell: Any, params: Any, xs: Any, steps: Steps) -> tuple[bool, str]:
    """Whether it is chosen where nobody asked for it."""
    if not getattr(cell, "is_affine", False):
        return False, "the cell is not affine"
    if jax.device_count() > 1:
        return False, "XLA can divide a scan among several devices, and not a call of compiled code"
    if not all(isinstance(size, int) for size in xs.shape):
        return False, "sizes are symbols"
    rows, features = math.prod(xs.shape[:-1]), xs.shape[-1]
    hidden, width = jax.eval_shape(cell.recurrent_weights, params).shape
    work = 2 * rows * (features + hidden) * width
    few = xs.shape[0] <= FEW_STEPS and math.prod(xs.shape[1:-1]) <= FEW_SEQUENCES and hidden % WHOLE_BLOCKS == 0
    if few and work >= STEP:
        return True, ""
    if work < WORK:
        return False, f"{work:.2g} floating-point operations are too few to compile it for (from {WORK:.2g} on)"
    if rows < ROWS:
        return False, f"it packs the weights in each call, which does not pay for {rows} steps (from {ROWS} on)"
    return True, ""


def serves(cell: Any, params: Any, xs: Any, steps: Steps) -> tuple[bool, str]:
    if not getattr(cell, "is_affine", False):
        return False, "it runs affine cells (jrnn.AffineCell), whose step is two products and a function of gates"
    if not jax.sharding.get_abstract_mesh().empty:
        return False, "a mesh is set, and it knows nothing of arrays that lie on one"
    if steps.key is not None and cell.draws_at_steps:
        return False, "what is drawn at each step (zoneout) is not known to it"
    if cell.input_weights(params) is None:
        return False, "the cell makes its input projection itself"
    state = jax.eval_shape(lambda params: cell.initial_state(params, xs.shape[1 : xs.ndim - 1]), params)
    exact = (cell.theta(params), state, cell.recurrent_mask(params))
    rounded = (cell.input_weights(params), cell.recurrent_weights(params), xs)
    if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(exact)) or any(
        leaf.dtype != jnp.float32 and not is_low(leaf.dtype) for leaf in jax.tree.leaves(rounded)
    ):
        return False, "it computes in float32 only"
    if not hasattr(state, "_fields") or "h" not in state._fields:
        return False, "its state is no NamedTuple with a field h"
    for leaf in jax.tree.leaves(cell.theta(params)):
        if leaf.shape != state.h.shape[-1:]:
            return False, f"one of its parameters beside the weights has the shape {leaf.shape}, and is no vector (H,)"
    if any(leaf.shape != state.h.shape for leaf in state):
        return False, "the fields of its state differ in shape"
    try:
        header = _header(cell, params, state)
    except emit.Unserved as error:
        return False, str(error)
    if default_device().platform != "cpu":
        return False, f"it runs on a CPU, and the default device is {default_device().platform}"
    if not operation.available():
        return False, "this version of JAX no longer has the internals that its operation is made of"
    try:
        build.load(header)
    except RuntimeError as error:
        return False, str(error)
    return True, "the whole loop is one compiled function for this CPU"


def run(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> tuple[Any, jax.Array]:
    """An affine cell over all steps; batch axes are made one, and the results unmade.

    16-bit inputs and weights are as exact in float32, in which this processor multiplies faster.
    """
    time, *batch, features = xs.shape
    restart = restarts(cell, params, xs, state, steps)
    count = math.prod(batch)
    if time == 0 or count == 0:
        return _empty(cell, xs, state)
    params = compute_params(params, xs.dtype)
    length = steps.chunk(time)
    chunks = None if length is None else Chunks.of(time, count, length)
    sums = promises.sums(cell, cell.theta(params), state)
    plan = Plan(cell, sums, _header(cell, params, state), steps.reverse, chunks)
    (w_ih, b), w_hh = jax.tree.map(_float32, (cell.input_weights(params), cell.recurrent_weights(params)))
    theta, mask = cell.theta(params), cell.recurrent_mask(params)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*batch, w_hh.shape[0])).reshape(count, -1)
    valid, resets = (None if f is None else f.reshape(time, count) for f in (steps.valid, steps.resets))
    xs_rows = _float32(cell.entering(params, xs)).reshape(time, count, features)
    inputs = Inputs(xs_rows, w_ih, b, w_hh, theta, _rows(state, count), _rows(restart, count))
    last, outs = loop(plan, inputs, Flags(valid, resets, mask))
    ys = side_by_side(outs)
    if valid is not None:
        ys = zeroed(valid, ys)
    return jax.tree.map(lambda a: a.reshape(*batch, -1), last), emitted(ys, xs).reshape(time, *batch, -1)


def _float32(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float32)


def _rows(state: Any, count: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(count, -1), state)


def _empty(cell: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
    """No step, or no sequence."""
    y = jax.eval_shape(lambda state: output(cell, state), state)
    return state, emitted(jnp.zeros((*xs.shape[:-1], y.shape[-1]), y.dtype), xs)


def _header(cell: Any, params: Any, state: Any) -> str:
    theta = cell.theta(params)
    return emit.header(cell, promises.Forms.of(theta, state), promises.sums(cell, theta, state))
