"""Finds a recurrent layer in a model, and makes the probe that puts a tap in its place."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.cells.base import Layer
from jrnn.compose.combine import Bidirectional, Stack
from jrnn.compose.timewise import Timewise
from jrnn.diagnose.taps import Located, Recorded, Tapped, Trace
from jrnn.run.unrolling import unroll


def _descend(model: Any, layer: Any) -> tuple[tuple[int, ...], Any]:
    """The path from a model to one of its recurrent layers, as indices into `Layer.children`, and the layer."""
    wanted = [] if layer is None else list(layer) if isinstance(layer, tuple) else [layer]
    path: list[int] = []
    while type(model).walk is not Layer.walk and (parts := model.children()):
        if isinstance(model, Bidirectional):
            side = wanted.pop(0) if wanted else None
            if side not in ("forward", "backward"):
                raise ValueError(
                    'layer: expected "forward" or "backward", since a bidirectional layer has a state for each '
                    f'direction, got {side!r}; pass it last, as in layer=(0, "forward"), or layer="forward" for a '
                    "bidirectional layer by itself"
                )
            index = ("forward", "backward").index(side)
        elif isinstance(model, Stack) or len(parts) > 1:
            what = "the stack" if isinstance(model, Stack) else f"the children of {model!r}"
            index = wanted.pop(0) if wanted else _only_recurrent(parts, what)
            if isinstance(index, bool) or not isinstance(index, int) or not -len(parts) <= index < len(parts):
                what = "layers of a stack" if isinstance(model, Stack) else f"children of {model!r}"
                raise ValueError(f"layer: expected an index into the {len(parts)} {what}, got {index!r}")
            index %= len(parts)
        else:
            index = 0  # a combinator of one layer takes no place in the path of the user
        path.append(index)
        model = parts[index]
    if wanted:
        raise ValueError(f"layer: got {layer!r}, but {model!r} has no layers to choose from; leave out {wanted}")
    if isinstance(model, Timewise) or type(model).walk is not Layer.walk:
        raise ValueError(f"layer: expected a recurrent layer, got {model!r}, which has no state; choose another")
    return tuple(path), model


def _only_recurrent(parts: tuple[Layer, ...], what: str) -> int:
    indices = [i for i, layer in enumerate(parts) if not isinstance(layer, Timewise)]
    if len(indices) != 1:
        raise ValueError(f"layer: expected an index into {what}, one of {indices}, got None; choose one of them")
    return indices[0]


class Probe(NamedTuple):
    """A model and one of its layers, to be measured."""

    whole: Layer
    whole_params: Any
    path: tuple[int, ...]
    cell: Any
    state: Any
    batch_shape: tuple[int, ...]
    time: int

    def model(self, tap: Any) -> Any:
        return tap(self.whole, self.path)

    def params(self, extra: Any) -> Any:
        return Tapped(self.whole_params, extra)

    def trace(self, xs: Any, options: dict[str, Any]) -> Trace:
        return unroll(self.model(Recorded), self.params(()), xs, **options)[0]


def make_probe(
    model: Any, params: Any, xs: Any, options: dict[str, Any], layer: Any, kind: Any = jnp.floating
) -> Probe:
    """The probe of a layer whose state has numbers of a kind, as `jnp.issubdtype` knows it."""
    # An abstract run makes every check that unroll makes.
    jax.eval_shape(lambda: unroll(model, params, xs, **options))
    path, cell = _descend(model, layer)
    state, _ = jax.eval_shape(lambda: unroll(Located(model, path), Tapped(params, ()), xs, **options))
    shape = np.shape(xs)
    batch_shape = shape[1 : len(shape) - model.event_ndim]
    if not any(jnp.issubdtype(leaf.dtype, kind) for leaf in jax.tree.leaves(state)):
        raise ValueError(f"layer: expected a layer with floats in its state, got {cell!r}; choose another")
    return Probe(model, params, path, cell, state, batch_shape, shape[0])
