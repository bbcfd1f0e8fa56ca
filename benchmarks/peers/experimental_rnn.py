"""`jax.experimental.rnn`: cuDNN's LSTM as JAX has it, all layers and directions in one call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from benchmarks.grid import Point
from benchmarks.peers.base import JaxPeer


class ExperimentalRNN(JaxPeer):
    form = "jax.experimental.rnn.lstm (cuDNN) under jit, float32, batch-major, all layers and directions in one call"
    cells = ("lstm",)
    batch_major = True
    lengths = True

    def refuses(self, point: Point) -> str | None:
        if jax.default_backend() != "gpu" or not hasattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes"):
            return "needs an NVIDIA GPU and jax's CUDA plugin"
        if point.work == "step":
            return "has no single step"
        return super().refuses(point) if point.dtype == "float32" else "float32 only"

    def convert(self, point: Point, params: Any) -> Any:
        pseudo = [p for layer in params for p in layer]
        linear = [p[name].T.reshape(-1) for p in pseudo for name in ("w_ih", "w_hh")]
        biases = [b for p in pseudo for b in (p["b"], jnp.zeros_like(p["b"]))]
        return jnp.concatenate([*linear, *biases])

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        zeros = jnp.zeros((point.layers * point.directions, point.batch, point.hidden), jnp.float32)
        if lengths is None:
            lengths = jnp.full(point.batch, point.time, jnp.int32)
        sizes = (point.features, point.hidden, point.layers, 0.0, point.bidirectional)
        return rnn.lstm(xs, zeros, zeros, own, lengths, *sizes)[0]
