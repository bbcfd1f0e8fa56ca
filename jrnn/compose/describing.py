"""What a model is made of, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jrnn.cells.base import Layer, event_shape

__all__ = ["summary"]


def summary(model: Layer, in_features: Any) -> str:
    """A table of the layers of a model, with their output features, their parameters and the shapes of these.

    Nothing is computed: shapes are found by abstract evaluation. The parts of a combinator, one of your own too, are
    those that its `jrnn.Layer.walk` runs. What a layer holds itself is on its own line. A cell around a cell is one
    line, such as ``Zoneout(LSTM)``.

    Args:
      model: any layer.
      in_features: features of its inputs; None for a model that begins with `jrnn.embed`.

    Returns:
      Text of several lines, for `print`.

    >>> print(jrnn.summary(jrnn.stack(jrnn.embed(50, 8), jrnn.bidirectional(jrnn.gru(4)), jrnn.dense(2)), None))
    layer              features  parameters  shapes
    Stack                     2         738
      Embed                   8         400  w (50, 8)
      Bidirectional           8         320
        forward: GRU          4         160  b (12,), b_hn (4,), w_hh (4, 12), w_ih (8, 12)
        backward: GRU         4         160  b (12,), b_hn (4,), w_hh (4, 12), w_ih (8, 12)
      Dense                   2          18  b (2,), w (8, 2)
    """
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a layer, such as jrnn.lstm(128), got {model!r}")
    found: list[_Part] = []

    def run(key: jax.Array) -> None:
        params = model.init(key, in_features)
        one_step = (1,) if model.event_ndim == 0 else (1, *event_shape(in_features))
        xs = jnp.zeros(one_step, jnp.int32 if model.event_ndim == 0 else jnp.float32)
        found.append(_Part.of("", model, params, xs, model.initial_state(params, ()))[0])

    jax.eval_shape(run, jax.random.key(0))
    rows = [("layer", "features", "parameters", "shapes"), *found[0].rows("")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Part:
    """A layer of the table. Its leaves are those of a trace, in which a parameter is one object wherever it is met."""

    name: str
    features: Any
    leaves: list[tuple[str, Any]]
    parts: list[_Part]

    @staticmethod
    def of(name: str, layer: Layer, params: Any, xs: jax.Array, state: Any) -> tuple[_Part, jax.Array]:
        """The entry of a layer, and outputs of the right shape."""
        features = _features(layer, xs)
        inside = _Walk(layer, params)
        label, children = _name(layer), layer.children()
        if type(layer).walk is not Layer.walk and children:
            layer.walk(inside, params, xs, state)
        if children and not inside.parts:
            label += f"({', '.join(map(_name, children))})"
        paths = jax.tree_util.tree_leaves_with_path(params)
        leaves = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]
        return _Part(name + label, features, leaves, inside.parts), _outputs(layer, xs)

    def rows(self, indent: str) -> list[tuple[str, str, str, str]]:
        inside = {id(leaf) for part in self.parts for _, leaf in part.leaves}
        shown = [f"{name} {leaf.shape}".strip() for name, leaf in self.leaves if id(leaf) not in inside]
        count = sum(math.prod(leaf.shape) for _, leaf in self.leaves)
        rows = [(indent + self.name, str(self.features), f"{count:,}", ", ".join(shown))]
        for part in self.parts:
            rows += part.rows(indent + "  ")
        return rows


def _features(layer: Layer, xs: jax.Array) -> Any:
    return layer.out_features(xs.shape[-1] if layer.event_ndim == 1 else xs.shape[1:] or None)


def _outputs(layer: Layer, xs: jax.Array) -> jax.Array:
    return jnp.zeros((xs.shape[0], *event_shape(_features(layer, xs))), jnp.float32)


def _name(layer: Layer) -> str:
    return type(layer).__name__.lstrip("_")


@dataclass(frozen=True)
class _Walk:
    """Stands for the run over time in a layer's `walk`, and notes the parts that it is asked to run."""

    layer: Layer
    params: Any
    parts: list[_Part] = field(default_factory=list)

    def __call__(self, layer: Layer, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        named = self.params.items() if isinstance(self.params, Mapping) else ()
        name = next((f"{name}: " for name, own in named if own is params), "")
        part, ys = _Part.of(name, layer, params, xs, state)
        self.parts.append(part)
        return state, ys

    def scan(self, layer: Layer, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        if layer is self.layer:  # its own steps, and no part of it
            return state, _outputs(layer, xs)
        return self(layer, params, xs, state)

    def child(self, index: int) -> _Walk:
        return self

    def opposite(self) -> _Walk:
        return self

    def zero_invalid(self, ys: Any) -> Any:
        return ys
