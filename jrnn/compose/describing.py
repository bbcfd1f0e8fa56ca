"""What a model is made of, as a table."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jrnn.cells.base import Layer
from jrnn.compose.combine import Bidirectional, Stack

__all__ = ["summary"]


def summary(model: Layer, in_features: Any) -> str:
    """A table of the layers of a model, with their output features, their parameters and the shapes of these.

    Nothing is computed: shapes are found by abstract evaluation.

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
    params = jax.eval_shape(lambda key: model.init(key, in_features), jax.random.key(0))
    rows = [("layer", "features", "parameters", "shapes"), *_rows("", "", model, params, in_features)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines)


def _rows(indent: str, name: str, layer: Layer, params: Any, in_features: Any) -> list[tuple[str, str, str, str]]:
    features = layer.out_features(in_features)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    parts: list[tuple[str, Layer, Any, Any]] = []
    if isinstance(layer, Stack):
        for part, own in zip(layer.layers, params, strict=True):
            parts.append(("", part, own, in_features))
            in_features = part.out_features(in_features)
    elif isinstance(layer, Bidirectional):
        parts = [(f"{way}: ", getattr(layer, way), params[way], in_features) for way in ("forward", "backward")]
    shown = "" if parts else ", ".join(_leaves(params))
    rows = [(f"{indent}{name}{type(layer).__name__}", str(features), f"{count:,}", shown)]
    for inside in parts:
        rows += _rows(indent + "  ", *inside)
    return rows


def _leaves(params: Any) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {tuple(np.shape(leaf))}".strip()
        for path, leaf in paths
    ]
