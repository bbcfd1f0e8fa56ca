"""The `jax.lax.scan` that a careful user writes by hand, without a library; an empty function; and products alone."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.grid import Point
from benchmarks.peers.base import PRODUCT, JaxPeer, Peer, Prepared, compile_ahead


def product(x: Any, w: Any) -> Any:
    """``x @ w`` in the dtype of x, accumulated in float32."""
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def update(cell: str, p: Any, state: Any, u: Any) -> tuple[Any, Any]:
    """One step, given the input's part of all gates: all gates in one product, as the fused matrices allow."""
    h = state[0]
    v = product(h.astype(p["w_hh"].dtype), p["w_hh"])
    if cell == "lstm":
        i, f, g, o = jnp.split(u + v, 4, axis=-1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h
    if cell == "gru":
        (u_r, u_z, u_n), (v_r, v_z, v_n) = jnp.split(u, 3, axis=-1), jnp.split(v, 3, axis=-1)
        r, z = jax.nn.sigmoid(u_r + v_r), jax.nn.sigmoid(u_z + v_z)
        n = jnp.tanh(u_n + r * (v_n + p["b_hn"]))
        h = (1 - z) * n + z * h
        return (h,), h
    h = jnp.tanh(u + v)
    return (h,), h


class Hand(JaxPeer):
    """Everything in the step."""

    form = "lax.scan under jit, time-major, gate matrices fused, h U and x W both inside the step"
    hoisted = False

    def convert(self, point: Point, params: Any) -> Any:
        return params

    def initial(self, point: Point, own: Any) -> Any:
        zeros = jnp.zeros((point.batch, point.hidden), jnp.float32)
        return (zeros, zeros) if point.cell == "lstm" else (zeros,)

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        p = own[0][0]
        return update(point.cell, p, state, product(x, p["w_ih"]) + p["b"])

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        low = xs.dtype != jnp.float32
        for layer in own:
            outputs = []
            for direction, p in enumerate(layer):
                if low:  # the weights once, not at every step
                    p = {k: v.astype(xs.dtype) if k.startswith("w_") else v for k, v in p.items()}
                outputs.append(self.scan(point, p, xs, reverse=direction == 1))
            xs = jnp.concatenate(outputs, -1) if len(outputs) > 1 else outputs[0]
            xs = xs.astype(point.dtype)
        return xs

    def scan(self, point: Point, p: Any, xs: Any, reverse: bool) -> Any:
        project = lambda x: product(x, p["w_ih"]) + p["b"]
        if self.hoisted:
            body = lambda state, u: update(point.cell, p, state, u)
            return lax.scan(body, self.initial(point, p), project(xs), reverse=reverse)[1]
        body = lambda state, x: update(point.cell, p, state, project(x))
        return lax.scan(body, self.initial(point, p), xs, reverse=reverse)[1]


class HandHoisted(Hand):
    """The input projection of all T steps in one product before the loop."""

    form = "the same with x W of all T steps in one product before the loop"
    hoisted = True

    def refuses(self, point: Point) -> str | None:
        return "nothing to hoist out of a single step" if point.work == "step" else super().refuses(point)


class Empty(Hand):
    """What dispatching a call costs: the arguments of a single step, and next to no arithmetic."""

    form = (
        "a jitted function of a single step's arguments, all passed, that adds one to the state: the cost of dispatch"
    )
    checked = False
    step_options: ClassVar[dict[str, Any]] = {**Hand.step_options, "keep_unused": True}

    def refuses(self, point: Point) -> str | None:
        return None if point.work == "step" else "measures the dispatch of single steps only"

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        state = jax.tree.map(lambda s: s + 1, state)
        return state, state[0]


class Products(Peer):
    """The floor's rate in the same rounds: how fast this machine multiplies while the others are timed."""

    form = f"one float32 product of two matrices of {PRODUCT} x {PRODUCT}: the rate of the floor in the same rounds"
    checked = False

    def refuses(self, point: Point) -> str | None:
        return None if point.work in ("forward", "train") else "single steps have no floor"

    def prepare(self, point: Point, data: dict[str, Any]) -> Prepared:
        a = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
        prepared, compiled = compile_ahead(jnp.matmul, (a, a))
        prepared.call = lambda: jax.block_until_ready(compiled(a, a))
        return prepared
