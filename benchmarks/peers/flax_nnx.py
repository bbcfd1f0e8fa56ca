"""flax.nnx: `nnx.RNN` over its cells."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

import jax.numpy as jnp
from flax import nnx

from benchmarks.grid import Point
from benchmarks.peers.base import JaxPeer


class NNX(JaxPeer):
    form = (
        "nnx.RNN(time_major=True) of OptimizedLSTMCell, GRUCell (no b_hn), SimpleCell, parameters broadcast to the "
        "scan's steps; split once, merged under jit"
    )
    equations: ClassVar[dict[str, str]] = {"gru": "gru without b_hn"}
    lengths = True
    modules: ClassVar[Any] = nnx  # where RNN comes from

    def cell(self, point: Point, features: int) -> Any:
        dtype = {"dtype": jnp.dtype(point.dtype)}
        make = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell, "elman": nnx.SimpleCell}[point.cell]
        return make(features, point.hidden, rngs=nnx.Rngs(0), **dtype)

    def convert(self, point: Point, params: Any) -> Any:
        return [[self.convert_one(point, p) for p in layer] for layer in params]

    def convert_one(self, point: Point, p: Any) -> Any:
        biased = "dense_h" if point.cell == "lstm" else "dense_i"
        own = {"dense_i": {"kernel": p["w_ih"]}, "dense_h": {"kernel": p["w_hh"]}}
        own[biased]["bias"] = p["b"]
        return own

    def layer(self, point: Point, features: int) -> Any:
        """A layer in one direction. Parameters are the same at all steps: broadcast, not carried, which is faster."""
        axes: Any = nnx.StateAxes(cast(Any, {...: None}))
        return self.modules.RNN(self.cell(point, features), time_major=True, state_axes=axes, rngs=False)

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        for features, directions in zip(point.layer_features(), own, strict=True):
            outputs = []
            for index, p in enumerate(directions):
                layer = self.restore(functools.partial(self.layer, point, features), {"cell": p})
                options = {"seq_lengths": lengths, "reverse": index == 1, "keep_order": True}
                outputs.append(layer(xs, initial_carry=self.initial(point, own), **options))
            xs = jnp.concatenate(outputs, -1) if len(outputs) > 1 else outputs[0]
        return xs

    def restore(self, make: Any, params: Any) -> Any:
        """The module with these parameters; made abstractly, so that no initialiser runs."""
        graph, abstract, others = cast(Any, nnx.split(nnx.eval_shape(make), nnx.Param, ...))
        nnx.replace_by_pure_dict(abstract, params)
        return nnx.merge(graph, abstract, others)

    def initial(self, point: Point, own: Any) -> Any:
        zeros = jnp.zeros((point.batch, point.hidden), jnp.float32)
        return (zeros, zeros) if point.cell == "lstm" else zeros

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        return self.restore(lambda: self.cell(point, point.features), own[0][0])(state, x)
