"""Finding a recurrent layer in a model, and the probe that puts a tap in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jrnn.cells.base import Layer
from jrnn.compose.combine import Bidirectional, Highway, Residual, Stack
from jrnn.compose.timewise import Timewise
from jrnn.diagnose.arrays import float_parts
from jrnn.diagnose.taps import Recorded, Tapped, Trace
from jrnn.run.unrolling import unroll


def _descend(model: Any, params: Any, layer: Any) -> tuple[list[Any], Any, Any]:
    """The way from a model to one of its recurrent layers: ``(accessors, cell, its params)``."""
    wanted = [] if layer is None else list(layer) if isinstance(layer, tuple) else [layer]
    accessors: list[Any] = []
    while True:
        if isinstance(model, Residual):
            accessors.append("residual")
            model = model.layer
        elif isinstance(model, Highway):
            accessors.append("highway")
            model, params = model.layer, params["layer"]
        elif isinstance(model, Stack):
            index = wanted.pop(0) if wanted else _only_recurrent(model)
            count = len(model.layers)
            if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
                raise ValueError(f"layer: expected an index into the {count} layers of a stack, got {index!r}")
            index %= count
            accessors.append(index)
            model, params = model.layers[index], params[index]
        elif isinstance(model, Bidirectional):
            side = wanted.pop(0) if wanted else None
            if side not in ("forward", "backward"):
                raise ValueError(
                    'layer: expected "forward" or "backward", since a bidirectional layer has a state for each '
                    f'direction, got {side!r}; pass it last, as in layer=(0, "forward"), or layer="forward" for a '
                    "bidirectional layer by itself"
                )
            accessors.append(side)
            model, params = getattr(model, side), params[side]
        else:
            break
    if wanted:
        raise ValueError(f"layer: got {layer!r}, but {model!r} has no layers to choose from; leave out {wanted}")
    if isinstance(model, Timewise) or type(model).walk is not Layer.walk:
        raise ValueError(f"layer: expected a recurrent layer, got {model!r}, which has no state; choose another")
    return accessors, model, params


def _only_recurrent(model: Stack) -> int:
    indices = [i for i, layer in enumerate(model.layers) if not isinstance(layer, Timewise)]
    if len(indices) != 1:
        raise ValueError(f"layer: expected an index into the stack, one of {indices}, got None; choose one of them")
    return indices[0]


def _put_layer(model: Any, accessors: list[Any], tap: Any) -> Any:
    if not accessors:
        return tap
    first, *rest = accessors
    if first in ("residual", "highway"):
        return replace(model, layer=_put_layer(model.layer, rest, tap))
    if isinstance(first, int):
        layers = list(model.layers)
        layers[first] = _put_layer(layers[first], rest, tap)
        return replace(model, layers=tuple(layers))
    return replace(model, **{first: _put_layer(getattr(model, first), rest, tap)})


def _put_params(params: Any, accessors: list[Any], tapped: Any) -> Any:
    if not accessors:
        return tapped
    first, *rest = accessors
    if first == "residual":
        return _put_params(params, rest, tapped)
    if isinstance(first, int):
        inner = _put_params(params[first], rest, tapped)
        return (*params[:first], inner, *params[first + 1 :])
    name = "layer" if first == "highway" else first
    return {**params, name: _put_params(params[name], rest, tapped)}


def _take_state(state: Any, accessors: list[Any]) -> Any:
    for accessor in accessors:
        if accessor not in ("residual", "highway"):
            state = state[accessor]
    return state


class Probe(NamedTuple):
    """A model with one of its layers chosen."""

    whole: Layer
    whole_params: Any
    accessors: list[Any]
    cell: Any
    cell_params: Any
    state: Any
    batch_shape: tuple[int, ...]
    time: int

    def model(self, tap: Any) -> Any:
        return _put_layer(self.whole, self.accessors, tap(self.cell))

    def params(self, extra: Any) -> Any:
        return _put_params(self.whole_params, self.accessors, Tapped(self.cell_params, extra))

    def trace(self, xs: Any, options: dict[str, Any]) -> Trace:
        final, _ = unroll(self.model(Recorded), self.params(()), xs, **options)
        return _take_state(final, self.accessors)


def make_probe(model: Any, params: Any, xs: Any, options: dict[str, Any], layer: Any) -> Probe:
    # An abstract run makes every check that unroll makes, and gives the shape of the chosen layer's state.
    final, _ = jax.eval_shape(lambda: unroll(model, params, xs, **options))
    accessors, cell, cell_params = _descend(model, params, layer)
    state = _take_state(final, accessors)
    shape = np.shape(xs)
    batch_shape = shape[1 : len(shape) - model.event_ndim]
    if not float_parts(state, len(batch_shape))[0]:
        raise ValueError(f"layer: expected a layer with floats in its state, got {cell!r}; choose another")
    return Probe(model, params, accessors, cell, cell_params, state, batch_shape, shape[0])
