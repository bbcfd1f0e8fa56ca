"""Keras 3 on its JAX backend: its layers, called without hidden state."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras

from benchmarks.grid import Point
from benchmarks.peers.base import JaxPeer, reorder


class Keras(JaxPeer):
    form = (
        "keras.layers.LSTM, GRU(reset_after=True), SimpleRNN, batch-major (it has no other layout), "
        "stateless_call under jit; masks for ragged lengths"
    )
    batch_major = True
    lengths = True

    def layer(self, point: Point) -> Any:
        make = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "elman": keras.layers.SimpleRNN}[point.cell]
        dtype = "float32" if point.dtype == "float32" else f"mixed_{point.dtype}"
        layer = make(point.hidden, return_sequences=True, dtype=dtype)
        return keras.layers.Bidirectional(layer, dtype=dtype) if point.bidirectional else layer

    def convert(self, point: Point, params: Any) -> Any:
        return [[array for p in layer for array in self.convert_one(point, p)] for layer in params]

    def convert_one(self, point: Point, p: Any) -> list[Any]:
        if point.cell != "gru":
            return [p["w_ih"], p["w_hh"], p["b"]]
        hidden = point.hidden  # gates z, r, n, and two biases
        b_hh = jnp.concatenate([jnp.zeros(2 * hidden, p["b_hn"].dtype), p["b_hn"]])
        w_ih, w_hh, b = (reorder(p[name], (1, 0, 2), hidden) for name in ("w_ih", "w_hh", "b"))
        return [w_ih, w_hh, jnp.stack([b, b_hh])]

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        mask = None if lengths is None else jnp.arange(point.time) < lengths[:, None]
        for features, variables in zip(point.layer_features(), own, strict=True):
            layer = self.layer(point)
            layer.build((point.batch, point.time, features))
            others = [v.value for v in layer.non_trainable_variables]
            xs, _ = layer.stateless_call(variables, others, xs, mask=mask)
        return xs

    def initial(self, point: Point, own: Any) -> Any:
        zeros = jnp.zeros((point.batch, point.hidden), jnp.float32)
        return (zeros, zeros) if point.cell == "lstm" else (zeros,)

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        cell = self.layer(point).cell
        cell.build((point.batch, point.features))
        (y, state), _ = cell.stateless_call(own[0], [v.value for v in cell.non_trainable_variables], x, list(state))
        return tuple(state), y
