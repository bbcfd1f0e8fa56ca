"""What the converters share: arrays and their dtypes, checks of parameters, activations, and reversed layers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import activations
from jrnn.cells.base import Layer
from jrnn.compose.combine import Bidirectional, Stack, bidirectional, stack
from jrnn.compose.timewise import Activate, Dropout, activation

FLOATS = ("float16", "bfloat16", "float32", "float64")


def require(module: str, remedy: str) -> Any:
    """An imported module of another framework, or an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"jrnn.interop: this conversion needs {package}, which is not installed (or fails to import: {error}); "
            f"{remedy}"
        ) from error


# --- arrays


def to_params(arrays: Mapping[str, np.ndarray], argument: str) -> dict[str, jax.Array]:
    """NumPy arrays as parameters, copied in their own dtypes."""
    return {name: to_param(array, argument) for name, array in arrays.items()}


def to_param(array: np.ndarray, argument: str) -> jax.Array:
    check_dtype(array.dtype.name, argument)
    return jnp.array(np.array(array, order="C"))


def check_dtype(name: str, argument: str) -> None:
    """Raises if parameters of a dtype cannot become arrays of the same dtype."""
    if name not in FLOATS:
        raise ValueError(f"{argument}: expected parameters in {', '.join(FLOATS)}, got {name}")
    if name == "float64" and jnp.asarray(np.zeros(())).dtype != jnp.float64:
        raise ValueError(
            f"{argument}: expected float32 parameters while jax_enable_x64 is off, got float64; switch it on "
            '(jax.config.update("jax_enable_x64", True)) or convert the parameters to float32'
        )


def total(*arrays: np.ndarray) -> np.ndarray:
    """The sum of arrays of one dtype, rounded to it once; a single array is returned as it is."""
    if len(arrays) == 1:
        return arrays[0]
    return np.sum([a.astype(np.float64) for a in arrays], axis=0).astype(arrays[0].dtype)


def reorder(array: np.ndarray, order: tuple[int, ...], negate: tuple[int, ...] = ()) -> np.ndarray:
    """Gates along the last axis in another order: gate i of the result is gate ``order[i]`` of the array.

    Those at the places ``negate`` of the result change their sign, which is exact.
    """
    parts = np.split(array, len(order), axis=-1)
    return np.concatenate([-parts[k] if i in negate else parts[k] for i, k in enumerate(order)], axis=-1)


# --- parameters that go out


def checked(model: Any, params: Any) -> Any:
    """The parameters with NumPy arrays for leaves, after a check that they fit the model and have one float dtype."""
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a layer, such as jrnn.lstm(128), got {model!r}")
    params, _ = _checked(model, params, None, "params")
    dtypes = sorted({leaf.dtype.name for leaf in jax.tree.leaves(params)})
    if len(dtypes) > 1 or not set(dtypes) <= set(FLOATS):
        raise ValueError(f"params: expected one dtype out of {', '.join(FLOATS)}, got {', '.join(dtypes)}")
    return params


def _checked(model: Any, params: Any, features: Any, where: str) -> tuple[Any, Any]:
    if isinstance(model, Stack):
        if not isinstance(params, tuple) or len(params) != len(model.layers):
            raise ValueError(
                f"{where}: expected a tuple with one entry for each of {len(model.layers)} layers, got {_kind(params)}"
            )
        entries = []
        for i, (layer, own) in enumerate(zip(model.layers, params, strict=True)):
            entry, features = _checked(layer, own, features, f"{where}[{i}]")
            entries.append(entry)
        return tuple(entries), features
    if isinstance(model, Bidirectional):
        if not isinstance(params, Mapping) or set(params) != {"forward", "backward"}:
            raise ValueError(
                f'{where}: expected "forward" and "backward" for a bidirectional layer, got {_kind(params)}'
            )
        both = {
            name: _checked(layer, params[name], features, f'{where}["{name}"]')[0] for _, name, layer in model._each()
        }
        features = features or in_features(params["forward"]) or in_features(params["backward"])
        return both, None if features is None else model.out_features(features)
    got = dict(_named(params))
    features = features if features is not None else in_features(params)
    if features is None and model.event_ndim and not isinstance(model, Activate | Dropout):
        if type(model).walk is not Layer.walk and isinstance(params, Mapping):
            raise TypeError(
                f"model: expected jrnn.elman, lstm, gru or another layer that the other library has, got {model!r}, "
                "a combinator of one's own; convert its parts one by one"
            )
        raise ValueError(
            f"{where}: expected a dict with the parameters of {model!r}, got {_kind(params)}; make them with "
            f"{model!r}.init(key, in_features)"
        )
    if not isinstance(model, Activate | Dropout):
        expected = dict(_named(jax.eval_shape(lambda key: model.init(key, features), jax.random.key(0))))
        for name, leaf in expected.items():
            if name not in got:
                raise ValueError(f"{where}: expected a dict with {name!r} for {model!r}, got {_kind(params)}")
            if np.shape(got[name]) != leaf.shape:
                raise ValueError(
                    f"{where}: expected {name} of shape {leaf.shape} for {model!r}, got {np.shape(got[name])}"
                )
        if unknown := sorted(set(got) - set(expected)):
            raise ValueError(f"{where}: expected {sorted(expected)} for {model!r}, got {unknown} besides")
        features = model.out_features(features)
    return jax.tree.map(np.asarray, params), features


def in_features(params: Any) -> int | None:
    """How many input features the parameters of a layer are for, as their weights say."""
    if not isinstance(params, Mapping):
        return None
    if "cell" in params:
        return in_features(params["cell"])
    for name in ("w_ih", "w", "scale"):
        if np.ndim(params.get(name, 0.0)):
            return int(np.shape(params[name])[0])
    return None


def _named(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, by their keys: ``initial.h``."""
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _kind(params: Any) -> str:
    return f"one with {sorted(params)}" if isinstance(params, Mapping) else type(params).__name__


# --- activations


def gelu_erf(x: jax.Array) -> jax.Array:
    """GELU by the error function, as PyTorch's and Keras' default; `jax.nn.gelu`'s default is by tanh."""
    return jax.nn.gelu(x, approximate=False)


def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the features."""
    return jax.nn.softmax(x, axis=-1)


def log_softmax(x: jax.Array) -> jax.Array:
    """Logarithm of the softmax over the features."""
    return jax.nn.log_softmax(x, axis=-1)


def leaky_relu(x: jax.Array) -> jax.Array:
    """``max(x, 0.01 x)``."""
    return jax.nn.leaky_relu(x, 0.01)


_NAMED: dict[Any, str] = {
    activations.resolve(name): name for name in ("elu", "gelu", "linear", "relu", "sigmoid", "silu", "softplus", "tanh")
}


def named(function: activations.Activation) -> activations.Activation:
    """An activation by jrnn's name for it where there is one, so that equal models compare equal."""
    return function if isinstance(function, str) else _NAMED.get(function, function)


def lookup(table: Mapping[str, activations.Activation], activation: activations.Activation) -> str | None:
    """The name under which a framework's table has an activation; None where it has none."""
    function = activations.resolve(activation)
    return next((name for name, own in table.items() if activations.resolve(own) is function), None)


# --- structure


def flat_stack(layers: list[tuple[Layer, Any]]) -> tuple[Layer, Any]:
    """One layer for a list of converted layers, in order: a stack, or the only one itself."""
    if len(layers) == 1:
        return layers[0]
    return stack(*(layer for layer, _ in layers)), tuple(params for _, params in layers)


def leaves(model: Any, params: Any, where: str = "model") -> list[tuple[str, Any, Any]]:
    """The layers of nested stacks in the order in which they run, each with its place and its parameters."""
    if not isinstance(model, Stack):
        return [(where, model, params)]
    return [
        leaf
        for i, (layer, own) in enumerate(zip(model.layers, params, strict=True))
        for leaf in leaves(layer, own, f"{where}.layers[{i}]")
    ]


def backward_only(forward: jax.Array, backward: jax.Array) -> jax.Array:
    """A merge that keeps the outputs of the backward direction (see `reversed_layer`)."""
    return backward


def reversed_layer(cell: Layer, params: Any) -> tuple[Layer, Any]:
    """A cell that runs from the last valid step to the first, its outputs in input order, as a layer of a stack.

    It is a bidirectional layer whose forward direction is the identity and is not used.
    """
    layer = bidirectional(activation("linear"), cell, backward_only)
    return layer, {"forward": {}, "backward": params}


def is_reversed(layer: Any) -> bool:
    """Whether a layer is one that `reversed_layer` makes."""
    return isinstance(layer, Bidirectional) and layer.merge is backward_only


def hard_sigmoid_fifth(x: jax.Array) -> jax.Array:
    """``clip(0.2 x + 0.5, 0, 1)``, ONNX's HardSigmoid; `jax.nn.hard_sigmoid` has a slope of 1/6."""
    return jnp.clip(0.2 * x + 0.5, 0, 1)
