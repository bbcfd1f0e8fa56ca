"""A layer that puts out its state beside its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.cells.base import Cell, Emitted, Layer, check_state, emitted_fields, is_low, side_by_side
from jrnn.cells.form import AffineForm
from jrnn.compose.combine import Bidirectional, Combinator, Highway, Residual, Stack, check_part
from jrnn.compose.regularise import Wrapper
from jrnn.compose.tied import Tied
from jrnn.compose.timewise import Timewise

__all__ = ["EmitState", "emit_state"]


@dataclass(frozen=True, repr=False)
class EmitState(Combinator):
    """See `emit_state`."""

    layer: Layer

    _constructor = "emit_state"

    def __post_init__(self) -> None:
        check_part(self.layer, "layer")

    @property
    def uses_key(self) -> Any:
        return self.layer.uses_key

    @property
    def event_ndim(self) -> Any:
        return self.layer.event_ndim

    def init(self, key: jax.Array, in_features: Any) -> Any:
        return self.layer.init(key, in_features)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        return self.layer.initial_state(params, batch_shape)

    def out_features(self, in_features: Any) -> int:
        return self.layer.out_features(in_features)

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        return self.layer.draw(params, key, batch_shape, in_features)

    def check(self, params: Any, x: Any) -> None:
        self.layer.check(params, x)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        self.layer.check_values(xs, lengths, mask)

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, Any]:
        x = jnp.asarray(x)
        check_state(self, params, state, x)
        state, y = self.layer.step(params, state, x, key)
        return state, Emitted(y, state)

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, Any]:
        state, ys, states = _walk(run, self.layer, params, xs, state)
        return state, Emitted(ys, states)


def _walk(run: Any, layer: Layer, params: Any, xs: jax.Array, state: Any) -> tuple[Any, Any, Any]:
    """A layer over all steps: its last state, its outputs and its states. Each part of a model runs over all T at once,
    as without its states, so that each has the schedule that suits it."""
    layer.check(params, xs)
    if isinstance(layer, Stack):
        last, every = [], []
        for i, (part, p, s) in enumerate(zip(layer.layers, params, state, strict=True)):
            s, xs, states = _walk(run.child(i), part, p, xs, s)
            last.append(s)
            every.append(states)
        return tuple(last), xs, tuple(every)
    if isinstance(layer, Bidirectional):
        forward = _walk(run.child(0), layer.forward, params["forward"], xs, state["forward"])
        backward = _walk(run.child(1).opposite(), layer.backward, params["backward"], xs, state["backward"])
        ys = run.zero_invalid(layer.merged(forward[1], backward[1]))
        return {"forward": forward[0], "backward": backward[0]}, ys, {"forward": forward[2], "backward": backward[2]}
    if isinstance(layer, Residual):
        last, ys, states = _walk(run, layer.layer, params, xs, state)
        return last, xs + ys, states
    if isinstance(layer, Highway):
        last, ys, states = _walk(run, layer.layer, params["layer"], xs, state)
        return last, layer._mix(params, xs, ys), states
    if isinstance(layer, Tied):
        _, rows = run(layer.embed, params["embed"], xs, ())
        last, ys, states = _walk(run, layer.layer, params["layer"], rows, state)
        return last, run.zero_invalid(layer._logits(params, ys)), states
    if isinstance(layer, Timewise):
        return *run(layer, params, xs, state), ()
    if isinstance(layer.form(params), AffineForm) and not is_low(xs.dtype):  # outputs in 16 bits would round the states
        names = state._fields
        last, ys = run.scan(_Fields(layer, names), params, xs, state)
        ends = np.cumsum([field.shape[-1] for field in state])[:-1].tolist()
        states = type(state)(*jnp.split(ys, ends, -1))
        return last, side_by_side([getattr(states, name) for name in emitted_fields(layer)]), states
    last, (ys, states) = run.scan(_WithState(layer), params, xs, state)
    return last, ys, states


@dataclass(frozen=True, repr=False)
class _Fields(Wrapper):
    """An affine cell that puts out all fields of its state side by side, by whichever schedule runs the cell."""

    cell: Any
    names: tuple[str, ...]

    @property
    def emits(self) -> Any:
        return self.names


@dataclass(frozen=True, repr=False)
class _WithState(Cell):
    """Any layer with its state beside its output, step by step; its projection, if it declares one, stays declared."""

    layer: Any

    @property
    def uses_key(self) -> Any:
        return self.layer.uses_key

    @property
    def event_ndim(self) -> Any:
        return self.layer.event_ndim

    @property
    def hoistable(self) -> bool:
        return getattr(self.layer, "hoistable", False)

    @property
    def draws_once(self) -> bool:
        return self.layer.draws_once

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        return self.layer.initial_state(params, batch_shape)

    def check(self, params: Any, x: Any) -> None:
        self.layer.check(params, x)

    def project(self, params: Any, xs: jax.Array) -> Any:
        return self.layer.project(params, xs)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, Any]:
        state, y = self.layer.update(params, state, p, key)
        return state, Emitted(y, state)

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, Any]:
        state, y = self.layer.step(params, state, x, key)
        return state, Emitted(y, state)


def emit_state(layer: Layer) -> EmitState:
    """A layer whose outputs include its state after every step.

    `jrnn.unroll` then returns ``(state, Emitted(y, state))``: the state after the last step as always, and for all T
    steps the outputs ``y (T, *B, H)`` and the states, a tree like the layer's state whose leaves are ``(T, *B, ...)``.
    At steps that are not valid both are zero.

    Put it around a whole model, be it a cell, a stack or a bidirectional layer. It cannot be a part of another layer,
    since its outputs are not features.

    Args:
      layer: the layer. Its parameters and states are those of the result.

    >>> cell = jrnn.emit_state(jrnn.lstm(4))
    >>> params = cell.init(jax.random.key(0), 3)
    >>> state, (ys, states) = jrnn.unroll(cell, params, jnp.ones((5, 2, 3)))
    >>> ys.shape, states.c.shape, bool((states.c[-1] == state.c).all())
    ((5, 2, 4), (5, 2, 4), True)
    """
    return EmitState(layer)
