"""flax.linen: `nn.RNN` over its cells."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from benchmarks.grid import Point
from benchmarks.peers.base import JaxPeer, gate

GATE_NAMES = {"lstm": "ifgo", "gru": "rzn"}


class Linen(JaxPeer):
    form = "nn.RNN(time_major=True) of OptimizedLSTMCell (fused), GRUCell, SimpleCell; apply under jit"
    lengths = True
    modules: ClassVar[Any] = nn  # where RNN and Bidirectional come from

    def cell(self, point: Point) -> Any:
        dtype = None if point.dtype == "float32" else jnp.dtype(point.dtype)
        make = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "elman": nn.SimpleCell}[point.cell]
        return make(point.hidden, dtype=dtype)

    def convert(self, point: Point, params: Any) -> Any:
        return [[self.convert_one(point, p) for p in layer] for layer in params]

    def convert_one(self, point: Point, p: Any) -> Any:
        if point.cell == "elman":
            return {"i": {"kernel": p["w_ih"], "bias": p["b"]}, "h": {"kernel": p["w_hh"]}}
        own: dict[str, dict[str, Any]] = {}
        for index, name in enumerate(GATE_NAMES[point.cell]):
            i, h = own.setdefault(f"i{name}", {}), own.setdefault(f"h{name}", {})
            i["kernel"], h["kernel"] = gate(p["w_ih"], index, point.hidden), gate(p["w_hh"], index, point.hidden)
            (h if point.cell == "lstm" else i)["bias"] = gate(p["b"], index, point.hidden)
        if point.cell == "gru":
            own["hn"]["bias"] = p["b_hn"]
        return own

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        rnn = lambda: self.modules.RNN(self.cell(point), time_major=True)
        layer: nn.Module = self.modules.Bidirectional(rnn(), rnn(), time_major=True) if point.bidirectional else rnn()
        for directions in own:
            if point.bidirectional:
                forward, backward = directions
                params = {"forward_rnn": {"cell": forward}, "backward_rnn": {"cell": backward}}
            else:
                params = {"cell": directions[0]}
            xs = layer.apply({"params": params}, xs, seq_lengths=lengths)
        return xs

    def initial(self, point: Point, own: Any) -> Any:
        zeros = jnp.zeros((point.batch, point.hidden), jnp.float32)
        return (zeros, zeros) if point.cell == "lstm" else zeros

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        return self.cell(point).apply({"params": own[0][0]}, state, x)
