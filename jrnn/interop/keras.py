"""Weights from and to Keras 3: recurrent layers, the layers between them, and `Sequential`.

====================================  ================================================================================
Keras                                 jrnn
====================================  ================================================================================
`SimpleRNN`                           `jrnn.elman`
`LSTM`, gates i, f, c, o              `jrnn.lstm`, gates i, f, g, o
`GRU`, gates z, r, h                  `jrnn.gru`, gates r, z, n; `reset_after` is reset "after", else "before"
`dropout`, `recurrent_dropout`        `jrnn.variational`: one mask for a whole sequence
`Bidirectional`                       `jrnn.bidirectional`; `merge_mode` "mul" is "product", "ave" is "mean"
`Dense`, `Embedding`, `Dropout`       `jrnn.dense`, `jrnn.embed`, `jrnn.dropout`
`LayerNormalization`, `Activation`    `jrnn.layer_norm`, `jrnn.activation`
`Sequential`                          `jrnn.stack`
====================================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import activations
from jrnn.cells.base import Layer
from jrnn.cells.elman import Elman, elman
from jrnn.cells.gru import GRU, ResetBeforeGRU, gru
from jrnn.cells.lstm import LSTM, lstm
from jrnn.compose.combine import Bidirectional, Stack, bidirectional, stack
from jrnn.compose.regularise import Variational, variational
from jrnn.compose.timewise import (
    Activate,
    Dense,
    Dropout,
    Embed,
    LayerNorm,
    activation,
    dense,
    dropout,
    embed,
    layer_norm,
)
from jrnn.interop import _common
from jrnn.interop._common import checked, is_reversed, lookup, reorder, require, to_params, total

__all__ = ["from_keras", "to_keras"]

_ACTIVATIONS: dict[str, activations.Activation] = {
    "elu": "elu",
    "gelu": _common.gelu_erf,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_swish,
    "hard_tanh": jax.nn.hard_tanh,
    "linear": "linear",
    "log_sigmoid": jax.nn.log_sigmoid,
    "log_softmax": _common.log_softmax,
    "mish": jax.nn.mish,
    "relu": "relu",
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": "sigmoid",
    "silu": "silu",
    "softmax": _common.softmax,
    "softplus": "softplus",
    "softsign": jax.nn.soft_sign,
    "tanh": "tanh",
}
_MERGES = {"concat": "concat", "sum": "sum", "mul": "product", "ave": "mean"}
# Layers that are activations, and what their options have to be.
_LAYERS: dict[str, tuple[activations.Activation, dict[str, Any]]] = {
    "ReLU": ("relu", {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}),
    "ELU": ("elu", {"alpha": 1.0}),
    "LeakyReLU": (_common.leaky_relu, {"negative_slope": 0.01}),
    "Softmax": (_common.softmax, {"axis": -1}),
}
# Gates z, r, h of Keras against r, z, n: the same order turns one into the other and back.
_GRU_ORDER = (1, 0, 2)


def from_keras(layer: Any) -> tuple[Layer, Any]:
    """A jrnn model and its parameters from a built Keras layer or `keras.Sequential`, with any backend.

    The docstring of `jrnn.interop.keras` lists the layers that are converted. In addition, the ``activation`` of a
    layer becomes a `jrnn.activation` after it, and `TimeDistributed` becomes the layer inside it. Keras' data are
    batch-major, and jrnn's are time-major: ``(T, B, F)``.

    Some options of Keras' layers are arguments of the call in jrnn, or a function of its results:

    - Masks. Where Keras has ``Embedding(mask_zero=True)``, call
      ``jrnn.unroll(model, params, ids, mask=ids != 0)``. For padding at the end, ``lengths=(ids != 0).sum(0)`` has the
      same effect. Outputs at padding are zero.
    - ``return_sequences=False`` of the last recurrent layer, whether or not `Dense` layers follow. Keras' output is
      ``jrnn.sequence.last_valid(ys, lengths)``. For a `Bidirectional` at the end of the model, it is the two last
      states merged, ``state["forward"].h`` and ``state["backward"].h``.
    - ``return_state``: `jrnn.unroll` always returns the state.
    - Dropout: a key switches it on. ``recurrent_dropout`` draws one mask for all gates, where Keras draws one for each.

    Args:
      layer: a layer that has been built, or a `keras.Sequential` of such layers.

    Returns:
      ``(model, params)``, for ``jrnn.unroll(model, params, xs)``; a `Sequential` gives a `jrnn.stack`. Parameters are
      copies in the layer's dtype.

    Raises:
      ImportError: Keras is not installed.
      TypeError: another layer, a subclass with a ``call`` of its own, or an option that jrnn's models cannot have
        (``go_backwards``, ``stateful``, an unknown activation, ...); the error names it.
      ValueError: a layer that is not built, or a dtype that jrnn has not.

    >>> import os, pytest; _ = os.environ.setdefault("KERAS_BACKEND", "jax"); keras = pytest.importorskip("keras")
    >>> layer = keras.layers.LSTM(4, return_sequences=True)
    >>> layer.build((None, None, 3))
    >>> model, params = jrnn.interop.from_keras(layer)
    >>> model, params["w_ih"].shape
    (lstm(4), (3, 16))
    """
    keras = _keras()
    flat = list(_flat(keras, layer))
    recurrent = [part for part in flat if isinstance(part, keras.layers.RNN | keras.layers.Bidirectional)]
    for part in recurrent:
        if part.return_sequences:
            continue
        if part is not recurrent[-1]:
            raise TypeError(
                f"{_place(part)}: expected return_sequences=True of a layer with another recurrent one after it, "
                "got False"
            )
        if isinstance(part, keras.layers.Bidirectional) and part is not flat[-1]:
            raise TypeError(
                f"{_place(part)}: expected return_sequences=True of a Bidirectional with layers after it, got "
                "False: its two directions end at different steps; convert the parts before and after it one by one"
            )
    entries = _convert(keras, layer)
    return entries[0] if len(entries) == 1 else _stack(entries)


def to_keras(model: Layer, params: Any) -> Any:
    """A built Keras layer, or a `keras.Sequential`, from a jrnn model: the inverse of `from_keras`.

    These layers are converted: `jrnn.elman`, `lstm` and `gru` (both resets), alone or in `jrnn.variational`;
    `jrnn.bidirectional` of two of these, if ``merge`` is a name; `dense`, `embed`, `dropout`, `layer_norm`,
    `activation`; and stacks of all these.

    Args:
      model: the layer.
      params: its parameters, all in one dtype.

    Returns:
      A layer with ``return_sequences=True``, batch-major like all of Keras, in the parameters' dtype.

    Raises:
      ImportError: Keras is not installed.
      TypeError: a layer that Keras has not; the error says which, and what Keras lacks.
      ValueError: parameters that do not fit the model or one another.

    >>> import os, pytest; _ = os.environ.setdefault("KERAS_BACKEND", "jax"); keras = pytest.importorskip("keras")
    >>> cell = jrnn.gru(4)
    >>> layer = jrnn.interop.to_keras(cell, cell.init(jax.random.key(0), 3))
    >>> layer.units, layer.reset_after, jrnn.interop.from_keras(layer)[0]
    (4, True, gru(4))
    """
    keras = _keras()
    params = checked(model, params)
    names = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    return _layer(keras, model, params, {"dtype": names.pop()} if names else {}, "model")


def _keras() -> Any:
    return require("keras", 'install it with pip install "jrnn[keras]" and set KERAS_BACKEND=jax')


# --- from Keras


def _flat(keras: Any, layer: Any) -> Iterator[Any]:
    if isinstance(layer, keras.Sequential):
        for part in layer.layers:
            yield from _flat(keras, part)
    else:
        yield layer


def _stack(entries: list[tuple[Layer, Any]]) -> tuple[Layer, Any]:
    return stack(*(layer for layer, _ in entries)), tuple(params for _, params in entries)


def _convert(keras: Any, layer: Any) -> list[tuple[Layer, Any]]:
    """A Keras layer as one or several layers: its activation is one of its own."""
    layers, where = keras.layers, _place(layer)
    if isinstance(layer, keras.Sequential):
        parts = [
            entry for part in layer.layers if not isinstance(part, layers.InputLayer) for entry in _convert(keras, part)
        ]
        if not parts:
            raise TypeError(f"{where}: expected layers in keras.Sequential, got none")
        return [_stack(parts)]
    kinds = (
        *(layers.SimpleRNN, layers.LSTM, layers.GRU, layers.RNN, layers.Bidirectional, layers.TimeDistributed),
        *(layers.Dense, layers.Embedding, layers.Dropout, layers.LayerNormalization, layers.Activation),
        *(getattr(layers, name) for name in _LAYERS),
    )
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if kind is None:
        remedy = "convert the parts of a larger model one by one and put them into jrnn.stack"
        if isinstance(layer, layers.Masking):
            remedy = "leave it out and give jrnn.unroll the mask, as mask= or lengths="
        raise TypeError(
            f"{where}: expected SimpleRNN, LSTM, GRU, Bidirectional, Dense, Embedding, Dropout, LayerNormalization, "
            f"Activation, TimeDistributed or Sequential, got {type(layer).__name__}; {remedy}"
        )
    if type(layer).call is not kind.call:
        raise TypeError(
            f"{where}: expected keras.layers.{kind.__name__} as Keras defines it, got {type(layer).__name__}, a "
            "subclass with a call of its own; what that computes cannot be known from its weights"
        )
    if kind is not layers.Dropout and not layer.built:
        raise ValueError(f"{where}: expected a layer with weights; build it, or call it once, before it is converted")
    if layer.compute_dtype != layer.variable_dtype or getattr(layer, "quantization_mode", None):
        raise TypeError(
            f"{where}: expected one dtype for weights and arithmetic, got the policy {layer.dtype_policy.name!r}; for "
            "16-bit products with float32 weights, give jrnn.unroll 16-bit inputs"
        )
    if issubclass(kind, layers.RNN):
        return [_recurrent(keras, layer)]
    if kind is layers.Bidirectional:
        return [_both(keras, layer)]
    if kind is layers.TimeDistributed:
        if isinstance(layer.layer, layers.RNN | layers.Bidirectional | keras.Sequential):
            raise TypeError(f"{where}: expected a layer for one step, got {type(layer.layer).__name__}")
        return _convert(keras, layer.layer)
    if kind is layers.Dense:
        w = _numpy(keras, layer.kernel)
        b = np.zeros_like(w[0]) if layer.bias is None else _numpy(keras, layer.bias)
        entry = dense(layer.units), to_params({"w": w, "b": b}, where)
        function = _activation(keras, layer, "activation")
        return [entry] if function == "linear" else [entry, (activation(function), {})]
    if kind is layers.Embedding:
        return [(embed(layer.input_dim, layer.output_dim), to_params({"w": _numpy(keras, layer.embeddings)}, where))]
    if kind is layers.Dropout:
        if layer.noise_shape is not None:
            raise TypeError(
                f"{where}: expected no noise_shape, got {layer.noise_shape}; jrnn.dropout draws every element"
            )
        return [(dropout(_rate(layer, "rate")), {})]
    if kind is layers.LayerNormalization:
        return [_layer_norm(keras, layer)]
    if kind is layers.Activation:
        return [(activation(_activation(keras, layer, "activation")), {})]
    function, options = _LAYERS[kind.__name__]
    for name, expected in options.items():
        if getattr(layer, name) != expected:
            raise TypeError(f"{where}: expected {name}={expected}, got {getattr(layer, name)}")
    return [(activation(function), {})]


def _layer_norm(keras: Any, layer: Any) -> tuple[Layer, Any]:
    where = _place(layer)
    if layer.axis not in (-1, [-1], [2]):
        raise TypeError(f"{where}: expected axis=-1, the features, got {layer.axis}")
    if layer.rms_scaling:
        raise TypeError(f"{where}: expected rms_scaling=False, got True; jrnn.layer_norm subtracts the mean")
    found = {"scale": layer.gamma, "shift": layer.beta}
    arrays = {name: _numpy(keras, value) for name, value in found.items() if value is not None}
    if not arrays:
        raise TypeError(f"{where}: expected scale=True or center=True, got neither: how many features is not known")
    like = next(iter(arrays.values()))
    arrays = {"scale": np.ones_like(like), "shift": np.zeros_like(like), **arrays}
    return layer_norm(float(layer.epsilon)), to_params(arrays, where)


def _both(keras: Any, layer: Any) -> tuple[Layer, Any]:
    where = _place(layer)
    if layer.merge_mode not in _MERGES:
        raise TypeError(f"{where}: expected merge_mode out of {sorted(_MERGES)}, got {layer.merge_mode!r}")
    if layer.forward_layer.go_backwards:
        raise TypeError(f"{where}: expected a forward layer with go_backwards=False, got True; swap the two layers")
    forward, own = _recurrent(keras, layer.forward_layer)
    backward, other = _recurrent(keras, layer.backward_layer, backwards=True)
    return bidirectional(forward, backward, _MERGES[layer.merge_mode]), {"forward": own, "backward": other}


def _recurrent(keras: Any, layer: Any, backwards: bool = False) -> tuple[Layer, Any]:
    where = _place(layer)
    cell: Any = getattr(layer, "cell", None)
    if not isinstance(layer, keras.layers.RNN):
        raise TypeError(f"{where}: expected SimpleRNN, LSTM or GRU in Bidirectional, got {type(layer).__name__}")
    if layer.stateful:
        raise TypeError(
            f"{where}: expected stateful=False, got True; jrnn has no hidden state: pass the state that jrnn.unroll "
            "returns to the next call"
        )
    if layer.go_backwards and not backwards:
        raise TypeError(
            f"{where}: expected go_backwards=False, got True, which gives its outputs in reversed order; convert "
            "the layer without it, and call jrnn.unroll(..., reverse=True), whose outputs stay in input order"
        )
    kinds = (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)
    kind = next((kind for kind in kinds if isinstance(cell, kind) and type(cell).call is kind.call), None)
    if kind is None:
        raise TypeError(f"{where}: expected SimpleRNNCell, LSTMCell or GRUCell as the cell, got {type(cell).__name__}")
    hidden, function = cell.units, _activation(keras, cell, "activation")
    w, r = _numpy(keras, cell.kernel), _numpy(keras, cell.recurrent_kernel)
    bias = None if cell.bias is None else _numpy(keras, cell.bias)
    model: Any
    if kind is keras.layers.GRUCell:
        gate = _activation(keras, cell, "recurrent_activation")
        model = gru(hidden, "after" if cell.reset_after else "before", activation=function, gate_activation=gate)
        arrays = {"w_ih": reorder(w, _GRU_ORDER), "w_hh": reorder(r, _GRU_ORDER)}
        if cell.reset_after:
            first, second = np.zeros((2, 3 * hidden), w.dtype) if bias is None else bias
            gates = 2 * hidden
            b = np.concatenate([total(first[:gates], second[:gates]), first[gates:]])
            arrays |= {"b": reorder(b, _GRU_ORDER), "b_hn": second[gates:]}
        else:
            arrays["b"] = reorder(np.zeros_like(w[0]) if bias is None else bias, _GRU_ORDER)
    else:
        if kind is keras.layers.LSTMCell:
            gate = _activation(keras, cell, "recurrent_activation")
            model = lstm(hidden, activation=function, gate_activation=gate)
        else:
            model = elman(hidden, function)
        arrays = {"w_ih": w, "w_hh": r, "b": np.zeros_like(w[0]) if bias is None else bias}
    inputs, recurrent = _rate(cell, "dropout"), _rate(cell, "recurrent_dropout")
    if recurrent and isinstance(model, ResetBeforeGRU):
        raise TypeError(
            f"{where}: expected recurrent_dropout=0 with reset_after=False, got {recurrent}; jrnn.variational has "
            "it for cells with one recurrent product"
        )
    if inputs or recurrent:
        model = variational(model, inputs=inputs, recurrent=recurrent)
    return model, to_params(arrays, where)


def _rate(layer: Any, option: str) -> float:
    rate = float(getattr(layer, option) or 0.0)
    if rate >= 1:
        raise ValueError(f"{_place(layer)}: expected {option} below 1, got {rate}; nothing would pass")
    return rate


def _activation(keras: Any, layer: Any, option: str) -> activations.Activation:
    function = getattr(layer, option)
    if function is None:
        return "linear"
    for name, own in _ACTIVATIONS.items():
        if function is keras.activations.get(name):
            return own
    raise TypeError(
        f"{_place(layer)}: expected {option} out of {sorted(_ACTIVATIONS)}, got "
        f"{getattr(function, '__name__', function)!r}"
    )


def _numpy(keras: Any, value: Any) -> np.ndarray:
    value = keras.ops.convert_to_tensor(value)
    if "bfloat16" in str(value.dtype) and not isinstance(value, jax.Array):
        return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32"))).astype(jnp.bfloat16)
    return np.asarray(keras.ops.convert_to_numpy(value))


def _place(layer: Any) -> str:
    return f"layer: {type(layer).__name__} {getattr(layer, 'name', '')!r}"


# --- to Keras


def _layer(keras: Any, model: Any, params: Any, options: dict[str, Any], where: str) -> Any:
    layers = keras.layers
    if isinstance(model, Stack):
        parts = [
            _layer(keras, layer, own, options, f"{where}.layers[{i}]")
            for i, (layer, own) in enumerate(zip(model.layers, params, strict=True))
        ]
        return keras.Sequential(parts)
    if isinstance(model, Dense):
        return _built(layers.Dense(model.features, **options), params["w"].shape[0], params["w"], params["b"])
    if isinstance(model, Embed):
        return _built(layers.Embedding(model.vocab, model.features, **options), None, params["w"])
    if isinstance(model, Dropout):
        return layers.Dropout(model.rate, **options)
    if isinstance(model, LayerNorm):
        layer = layers.LayerNormalization(epsilon=model.epsilon, **options)
        return _built(layer, params["scale"].shape[0], params["scale"], params["shift"])
    if isinstance(model, Activate):
        layer = layers.Activation(_name(model, model.function, where), **options)
        layer.build((None, None, None))
        return layer
    if isinstance(model, Bidirectional) and not is_reversed(model):
        mode = next((mode for mode, merge in _MERGES.items() if merge == model.merge), None)
        if mode is None:
            raise TypeError(f"{where}: expected directions merged by a name, got {model.merge!r}, which is a function")
        forward, first = _cell(keras, model.forward, params["forward"], options, f"{where}.forward")
        backward, second = _cell(keras, model.backward, params["backward"], options, f"{where}.backward", True)
        layer = layers.Bidirectional(forward, merge_mode=mode, backward_layer=backward, **options)
        return _built(layer, first[0].shape[0], *first, *second)
    layer, arrays = _cell(keras, model, params, options, where)
    return _built(layer, arrays[0].shape[0], *arrays)


def _built(layer: Any, features: int | None, *arrays: np.ndarray) -> Any:
    layer.build((None, None) if features is None else (None, None, features))
    layer.set_weights([np.array(array, order="C") for array in arrays])
    return layer


def _cell(
    keras: Any, model: Any, params: Any, options: dict[str, Any], where: str, backwards: bool = False
) -> tuple[Any, list[np.ndarray]]:
    options = {**options, "return_sequences": True, "go_backwards": backwards}
    if isinstance(model, Variational):
        options |= {"dropout": model.inputs, "recurrent_dropout": model.recurrent}
        model = model.cell
    if type(model) not in (Elman, LSTM, GRU, ResetBeforeGRU):
        reason = f"Keras has no layer with the equations of {type(model).__name__}"
        if is_reversed(model):
            reason = "Keras' go_backwards gives its outputs in reversed order"
        raise TypeError(
            f"{where}: expected a layer that Keras has too, got {model!r}; {reason} (see jrnn.interop.to_keras for "
            "what can be converted)"
        )
    options["activation"] = _name(model, model.activation, where)
    if options.get("dtype") in ("float16", "bfloat16"):
        options["recurrent_initializer"] = "glorot_uniform"  # the default one needs a QR decomposition, in 16 bits
    if type(model) is Elman:
        return keras.layers.SimpleRNN(model.hidden, **options), [params["w_ih"], params["w_hh"], params["b"]]
    options["recurrent_activation"] = _name(model, model.gate_activation, where)
    if type(model) is LSTM:
        return keras.layers.LSTM(model.hidden, **options), [params["w_ih"], params["w_hh"], params["b"]]
    arrays = [reorder(params[name], _GRU_ORDER) for name in ("w_ih", "w_hh", "b")]
    if type(model) is GRU:
        recurrent = np.zeros_like(arrays[2])
        recurrent[-model.hidden :] = params["b_hn"]
        arrays[2] = np.stack([arrays[2], recurrent])
    return keras.layers.GRU(model.hidden, reset_after=type(model) is GRU, **options), arrays


def _name(model: Any, function: activations.Activation, where: str) -> str:
    name = lookup(_ACTIVATIONS, function)
    if name is None:
        raise TypeError(
            f"{where}: expected activations out of {sorted(_ACTIVATIONS)}, as Keras has them, got {model!r}"
        )
    return name
