"""Haiku: `hk.dynamic_unroll` of its cores."""

from __future__ import annotations

from typing import Any, ClassVar

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks.grid import Point
from benchmarks.peers.base import JaxPeer, gate, reorder


class Haiku(JaxPeer):
    form = (
        "hk.dynamic_unroll, time-major, of hk.LSTM ([x, h] in one product, 1 added to the forget gate), hk.GRU, "
        "hk.VanillaRNN(double_bias=False); hk.transform under jit"
    )
    equations: ClassVar[dict[str, str]] = {"gru": "gru, reset before the product", "elman": "elman with relu"}

    def core(self, point: Point, name: str) -> Any:
        if point.cell == "elman":
            return hk.VanillaRNN(point.hidden, double_bias=False, name=name)
        return (hk.LSTM if point.cell == "lstm" else hk.GRU)(point.hidden, name=name)

    def convert(self, point: Point, params: Any) -> Any:
        own: dict[str, Any] = {}
        for i, layer in enumerate(params):
            for j, p in enumerate(layer):
                own |= self.convert_one(point, p, f"layer{i}_{j}")
        return own

    def convert_one(self, point: Point, p: Any, name: str) -> Any:
        hidden = point.hidden
        if point.cell == "elman":
            return {f"{name}/linear": {"w": p["w_ih"], "b": p["b"]}, f"{name}/linear_1": {"w": p["w_hh"]}}
        if point.cell == "lstm":  # gates i, g, f, o, and 1 in the equations that jrnn has in the bias
            w = reorder(jnp.concatenate([p["w_ih"], p["w_hh"]]), (0, 2, 1, 3), hidden)
            b = reorder(p["b"], (0, 2, 1, 3), hidden)
            b = jnp.concatenate([b[: 2 * hidden], gate(b, 2, hidden) - 1, gate(b, 3, hidden)])
            return {f"{name}/linear": {"w": w, "b": b}}
        # Gates z, r, n, where z takes the place of 1 - z: the logistic function of the negative.
        turn = lambda a: jnp.concatenate([-gate(a, 1, hidden), gate(a, 0, hidden), gate(a, 2, hidden)], -1)
        return {name: {"w_i": turn(p["w_ih"]), "w_h": turn(p["w_hh"]), "b": turn(p["b"])}}

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        dtype = xs.dtype

        def run(xs: Any) -> Any:
            for i in range(point.layers):
                outputs = []
                for j in range(point.directions):
                    core = self.core(point, f"layer{i}_{j}")
                    state = jax.tree.map(lambda s: s.astype(dtype), core.initial_state(point.batch))
                    outputs.append(hk.dynamic_unroll(core, xs, state, reverse=j == 1)[0])
                xs = jnp.concatenate(outputs, -1) if len(outputs) > 1 else outputs[0]
            return xs

        own = jax.tree.map(lambda a: a.astype(dtype), own)
        return hk.without_apply_rng(hk.transform(run)).apply(own, xs)

    def initial(self, point: Point, own: Any) -> Any:
        zeros = jnp.zeros((point.batch, point.hidden), jnp.float32)
        return hk.LSTMState(zeros, jnp.zeros_like(zeros)) if point.cell == "lstm" else zeros

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        run = lambda x, state: self.core(point, "layer0_0")(x, state)
        y, state = hk.without_apply_rng(hk.transform(run)).apply(own, x, state)
        return state, y
