"""cuDNN's LSTM, which JAX reaches as `jax.experimental.rnn`: one layer in one direction, all T in one call.

It serves the plain LSTM in float32 on an NVIDIA GPU. A stack or a bidirectional layer is walked layer by layer, so
that each of its LSTMs comes here by itself. cuDNN knows lengths and nothing else: valid steps are moved to the front of
their sequence, in the order in which they run, and the outputs are moved back, which serves every mask and both orders.

Gradients are cuDNN's own: first derivatives, in reverse mode. `vmap` makes one call after another. Products follow
``jax_default_matmul_precision``: TF32 unless it asks for more, as XLA's own do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from jrnn._core.devices import is_placed
from jrnn.cells.form import AffineForm
from jrnn.cells.lstm import LSTM
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import select

# Values of jax_default_matmul_precision that ask for no more than TF32; cuDNN has this choice alone.
_TF32 = (None, "default", "fastest", "bfloat16", "high", "tensorfloat32", "BF16_BF16_F32", "TF32_TF32_F32")


def plan(task: Task) -> Plan | Refusal:
    cell, operands = task.cell, jax.tree.leaves((task.params, task.xs))
    usual = type(cell) is LSTM and (cell.activation, cell.gate_activation) == ("tanh", "sigmoid")
    if not usual:
        return Refusal("cuDNN has the plain LSTM alone, with tanh and sigmoid and no wrapper that changes its step")
    dtypes = sorted({str(leaf.dtype) for leaf in operands})
    if dtypes != ["float32"]:
        return Refusal(f"cuDNN takes float32 parameters and inputs here, not {' and '.join(dtypes)}")
    if task.xs.shape[-1] == 0:
        return Refusal("cuDNN takes at least one input feature")
    if task.steps.resets is not None:
        return Refusal("cuDNN cannot restart inside a sequence, as resets ask")
    if any(map(is_placed, operands)):
        return Refusal("the axes of a mesh are Explicit, and cuDNN does not support arrays that lie over one")
    missing = unavailable()
    if missing is not None:
        return Refusal(missing)
    return Plan(run, "cuDNN's LSTM in one call for all steps", of_form=True, flat=True)


def run(options: Any, task: Task) -> tuple[Any, jax.Array]:
    return _sequences(flat_weights(task.form), task.xs, task.steps.valid, task.state, task.steps.reverse)


def unavailable() -> str | None:
    """Why cuDNN cannot be reached; None where it can. Asked in Python first: even tracing its call needs the plugin."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return f"cuDNN runs on NVIDIA GPUs, and the default device is a {platform}"
    try:
        jax.devices("cuda")
    except RuntimeError:
        return "cuDNN runs on NVIDIA GPUs, and JAX found no CUDA device"
    from jax.experimental import rnn

    if not hasattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes"):
        return "the installed JAX has no cuDNN LSTM; install jax[cuda13] or jax[cuda12]"
    return None


def flat_weights(form: AffineForm) -> jax.Array:
    """The weights as cuDNN has them: ``W_ih (4H, F)``, ``W_hh (4H, H)``, ``b_ih``, ``b_hh``, flat, one after another.

    The gates stand in the same order, i, f, g, o. cuDNN adds two biases: ours is the first, whatever initialised its
    forget gate, and the second is zero.
    """
    w_ih, b = form.inputs
    parts = (w_ih.T, form.w_hh.T, b, jnp.zeros_like(b))
    return jnp.concatenate([part.reshape(-1) for part in parts])


def _sequences(weights: Any, xs: Any, valid: Any, state: Any, reverse: bool) -> tuple[Any, Any]:
    """``xs (T, B, F)`` with ``valid (T, B)`` or None: the state after the last valid step, and ``ys (T, B, H)``."""
    if reverse:
        valid = None if valid is None else valid[::-1]
        state, ys = _sequences(weights, xs[::-1], valid, state, False)
        return state, ys[::-1]
    length, count = xs.shape[:2]
    if valid is None:
        lengths = jnp.full(count, length, jnp.int32)
        y, h, c = _lstm(xs.swapaxes(0, 1), *state, weights, lengths)
        return type(state)(h, c), y.swapaxes(0, 1)
    lengths = valid.sum(0, dtype=jnp.int32)
    # Where each step goes, the valid ones first: a permutation, undone by its inverse.
    place = jnp.where(valid, jnp.cumsum(valid, 0), lengths[None] + jnp.cumsum(~valid, 0)).astype(jnp.int32) - 1
    order = jnp.argsort(place, axis=0)
    # cuDNN may refuse a sequence without steps: it gets one of zeros, and its answer is thrown away.
    y, h, c = _lstm(_permute(xs, order).swapaxes(0, 1), *state, weights, jnp.maximum(lengths, 1))
    return select(lengths > 0, type(state)(h, c), state), _permute(y.swapaxes(0, 1), place)


def _permute(a: jax.Array, order: jax.Array) -> jax.Array:
    """``a[order[t, b], b]`` for ``a (T, B, …)``."""
    columns = jnp.arange(a.shape[1], dtype=jnp.int32)[None]
    return a.at[order, columns].get(unique_indices=True, mode="promise_in_bounds")


# --- the call ----------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _lstm(x: Any, h: Any, c: Any, weights: Any, lengths: Any) -> tuple[Any, Any, Any]:
    """``x (B, T, F)``, ``h`` and ``c (B, H)``, ``lengths (B,)`` from 1 to T: outputs ``(B, T, H)``, the last state."""
    return _forward(x, h, c, weights, lengths)[:3]


def _lstm_forward(x: Any, h: Any, c: Any, weights: Any, lengths: Any) -> Any:
    y, h_n, c_n, reserve = _forward(x, h, c, weights, lengths)
    return (y, h_n, c_n), (x, h, c, weights, lengths, y, reserve)


def _lstm_backward(residuals: Any, cotangents: Any) -> Any:
    return *_backward(*residuals, *cotangents), None


_lstm.defvjp(_lstm_forward, _lstm_backward)


# cuDNN's primitives have no rule for vmap. Folding the mapped axis into the batch would add up gradients of weights
# that must stay apart, so calls are made one after another.
@jax.custom_vjp
@sequential_vmap
def _forward(x: Any, h: Any, c: Any, weights: Any, lengths: Any) -> Any:
    """``(y, h_n, c_n, reserve)``, of which the last is cuDNN's own, for the backward pass."""
    from jax.experimental import rnn

    (y, h, c), residuals = rnn.lstm_fwd(x, h[None], c[None], weights, lengths, *_options(x, h))
    return y, h[0], c[0], residuals[-1]


@jax.custom_vjp
@sequential_vmap
def _backward(
    x: Any, h: Any, c: Any, weights: Any, lengths: Any, y: Any, reserve: Any, dy: Any, dh: Any, dc: Any
) -> Any:
    """Gradients of ``x, h, c, weights``."""
    from jax.experimental import rnn

    residuals = (x, h[None], c[None], weights, lengths, y, reserve)
    args: Any = (*_options(x, h), residuals, (dy, dh[None], dc[None]))
    dx, dh, dc, dw, _ = rnn.lstm_bwd(*args)
    return dx, dh[0], dc[0], dw


def _no_second_derivative(*_: Any) -> Any:
    raise NotImplementedError(
        "backend: 'cudnn' has first derivatives only, got a derivative of its gradient; take backend='hoisted'"
    )


_forward.defvjp(_no_second_derivative, _no_second_derivative)
_backward.defvjp(_no_second_derivative, _no_second_derivative)


def _options(x: Any, h: Any) -> tuple[Any, ...]:
    """F, H, one layer, no dropout, one direction, precision."""
    return x.shape[-1], h.shape[-1], 1, 0.0, False, _precision()


def _precision() -> jax.lax.Precision:
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return jax.lax.Precision.HIGH if asked in _TF32 else jax.lax.Precision.HIGHEST
