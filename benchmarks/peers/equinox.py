"""Equinox: its cells, for one sequence, in a scan and a `vmap`, as its documentation says."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.grid import Point
from benchmarks.peers.base import JaxPeer


class Equinox(JaxPeer):
    form = "lax.scan over vmap of eqx.nn.LSTMCell, GRUCell, time-major; under jit"
    cells = ("lstm", "gru")

    def convert(self, point: Point, params: Any) -> Any:
        return [
            [self.convert_one(point, p, features) for p in layer]
            for features, layer in zip(point.layer_features(), params, strict=True)
        ]

    def convert_one(self, point: Point, p: Any, features: int) -> Any:
        make = eqx.nn.LSTMCell if point.cell == "lstm" else eqx.nn.GRUCell
        cell = eqx.filter_eval_shape(make, features, point.hidden, key=jax.random.key(0))
        leaves = [p["w_ih"].T, p["w_hh"].T, p["b"]] + ([p["b_hn"]] if point.cell == "gru" else [])
        return jax.tree.unflatten(jax.tree.structure(cell), leaves)

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        dtype = xs.dtype
        for layer in jax.tree.map(lambda a: a.astype(dtype), own):
            outputs = []
            for j, cell in enumerate(layer):
                state = jax.tree.map(lambda s: s.astype(dtype), self.initial(point, None))
                body = lambda state, x, cell=cell: self.step_cell(cell, state, x)
                outputs.append(lax.scan(body, state, xs, reverse=j == 1)[1])
            xs = jnp.concatenate(outputs, -1) if len(outputs) > 1 else outputs[0]
        return xs

    def initial(self, point: Point, own: Any) -> Any:
        zeros = jnp.zeros((point.batch, point.hidden), jnp.float32)
        return (zeros, zeros) if point.cell == "lstm" else zeros

    def step_cell(self, cell: Any, state: Any, x: Any) -> tuple[Any, Any]:
        state = jax.vmap(cell)(x, state)
        return state, state[0] if isinstance(state, tuple) else state

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        return self.step_cell(own[0][0], state, x)
