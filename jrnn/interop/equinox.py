"""Weights from and to Equinox: its cells, and the layers between them.

==================================  ==================================================================================
Equinox                             jrnn
==================================  ==================================================================================
`LSTMCell`: weights `(4H, F)`       `jrnn.lstm`, transposed; gates in the same order
`GRUCell`: `bias`, `bias_n`         `jrnn.gru` (reset after): `b`, `b_hn`
`Linear`, `Embedding`, `LayerNorm`  `jrnn.dense`, `jrnn.embed`, `jrnn.layer_norm`
`Dropout`, `Lambda`, `Identity`     `jrnn.dropout`, `jrnn.activation`
`Sequential`                        `jrnn.stack`
==================================  ==================================================================================
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import activations
from jrnn.cells.base import Layer
from jrnn.cells.gru import GRU, ResetBeforeGRU, gru
from jrnn.cells.lstm import LSTM, lstm
from jrnn.compose.combine import Bidirectional, Stack, stack
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
from jrnn.interop._common import checked, named, require, to_params

__all__ = ["from_equinox", "to_equinox"]


def from_equinox(module: Any) -> tuple[Layer, Any]:
    """A jrnn model and its parameters from an Equinox module.

    The docstring of `jrnn.interop.equinox` lists the modules that are converted. Equinox has no layer over time: its
    cells compute one step, which `jrnn.unroll` runs over a sequence. A cell in an `eqx.nn.Sequential` becomes a layer
    of the stack, which is run over time. ``use_bias=False`` becomes biases of zero.

    Args:
      module: the module.

    Returns:
      ``(model, params)``, for ``jrnn.unroll(model, params, xs)``. Parameters are copies in the module's dtype.

    Raises:
      ImportError: Equinox is not installed.
      TypeError: another module, a subclass, or an option that jrnn has not; the error names it.
      ValueError: a dtype that jrnn has not.

    >>> import pytest; eqx = pytest.importorskip("equinox")
    >>> cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(0))
    >>> model, params = jrnn.interop.from_equinox(cell)
    >>> h = jrnn.unroll(model, params, jnp.ones((1, 3)))[0].h
    >>> bool(jnp.allclose(h, cell(jnp.ones(3), jnp.zeros(4)), atol=1e-6))
    True
    """
    return _convert(_equinox().nn, module, "module")


def to_equinox(model: Layer, params: Any) -> Any:
    """An Equinox module from a jrnn model: the inverse of `from_equinox`.

    These layers are converted: `jrnn.lstm`, `gru` (reset after), `dense`, `embed`, `dropout`, `layer_norm`,
    `activation`, and stacks of these.

    Args:
      model: the layer.
      params: its parameters, all in one dtype.

    Returns:
      A module. If it is an `eqx.nn.Sequential` with a cell in it, it has the parts of the model in their order, but
      cannot be called, since Equinox' cells take a state.

    Raises:
      ImportError: Equinox is not installed.
      TypeError: a layer that Equinox has not; the error says which, and what Equinox lacks.
      ValueError: parameters that do not fit the model or one another.

    >>> import pytest; eqx = pytest.importorskip("equinox")
    >>> cell = jrnn.lstm(4)
    >>> module = jrnn.interop.to_equinox(cell, cell.init(jax.random.key(0), 3))
    >>> module.hidden_size, jrnn.interop.from_equinox(module)[0]
    (4, lstm(4))
    """
    equinox = _equinox()
    return _module(equinox, model, checked(model, params), "model")


def _equinox() -> Any:
    return require("equinox", 'install it with pip install "jrnn[equinox]"')


def _convert(nn: Any, module: Any, where: str) -> tuple[Layer, Any]:
    kind = type(module)
    if kind is nn.Sequential:
        parts = [_convert(nn, part, f"{where}[{i}]") for i, part in enumerate(module.layers)]
        if not parts:
            raise TypeError(f"{where}: expected layers in Sequential, got none")
        return stack(*(layer for layer, _ in parts)), tuple(params for _, params in parts)
    if kind in (nn.LSTMCell, nn.GRUCell):
        w, r = np.asarray(module.weight_ih), np.asarray(module.weight_hh)
        arrays = {"w_ih": w.T, "w_hh": r.T, "b": _or_zeros(module.bias, w[:, 0])}
        if kind is nn.LSTMCell:
            return lstm(module.hidden_size), to_params(arrays, where)
        arrays["b_hn"] = _or_zeros(module.bias_n, r[0])
        return gru(module.hidden_size), to_params(arrays, where)
    if kind is nn.Linear:
        for option in ("in_features", "out_features"):
            if getattr(module, option) == "scalar":
                raise TypeError(f"{where}: expected a number of {option}, got 'scalar'; jrnn's features are an axis")
        w = np.asarray(module.weight)
        return dense(module.out_features), to_params({"w": w.T, "b": _or_zeros(module.bias, w[:, 0])}, where)
    if kind is nn.Embedding:
        w = np.asarray(module.weight)
        return embed(*map(int, w.shape)), to_params({"w": w}, where)
    if kind is nn.LayerNorm:
        if len(module.shape) != 1:
            raise TypeError(f"{where}: expected a shape of one axis, the features, got {tuple(module.shape)}")
        like = next((a for a in (module.weight, module.bias) if a is not None), np.ones(module.shape, np.float32))
        scale = np.ones_like(like) if module.weight is None else np.asarray(module.weight)
        return layer_norm(float(module.eps)), to_params({"scale": scale, "shift": _or_zeros(module.bias, scale)}, where)
    if kind is nn.Dropout:
        return dropout(float(module.p)), {}
    if kind in (nn.Lambda, nn.Identity):
        return activation("linear" if kind is nn.Identity else named(module.fn)), {}
    raise TypeError(
        f"{where}: expected LSTMCell, GRUCell, Linear, Embedding, LayerNorm, Dropout, Lambda, Identity or "
        "Sequential of "
        f"equinox.nn, got {kind.__name__}; convert the parts of a larger model one by one and put them into jrnn.stack"
    )


def _or_zeros(array: Any, like: Any) -> np.ndarray:
    return np.zeros_like(like) if array is None else np.asarray(array)


def _module(equinox: Any, model: Any, params: Any, where: str) -> Any:
    nn = equinox.nn
    if isinstance(model, Stack):
        pairs = enumerate(zip(model.layers, params, strict=True))
        return nn.Sequential([_module(equinox, layer, own, f"{where}.layers[{i}]") for i, (layer, own) in pairs])
    if isinstance(model, Dropout):
        return nn.Dropout(model.rate)
    if isinstance(model, Activate):
        return nn.Lambda(activations.resolve(model.function))
    like: dict[str, Any] = {"dtype": jax.tree.leaves(params)[0].dtype}
    if isinstance(model, LayerNorm):
        module = nn.LayerNorm(params["scale"].shape, eps=model.epsilon, **like)
        return _filled(equinox, module, weight=params["scale"], bias=params["shift"])
    like["key"] = jax.random.key(0)
    if isinstance(model, Dense):
        module = nn.Linear(*params["w"].shape, **like)
        return _filled(equinox, module, weight=params["w"].T, bias=params["b"])
    if isinstance(model, Embed):
        return nn.Embedding(weight=jnp.asarray(params["w"]))
    if type(model) in (LSTM, GRU) and (model.activation, model.gate_activation) == ("tanh", "sigmoid"):
        kind = nn.LSTMCell if type(model) is LSTM else nn.GRUCell
        arrays = {"weight_ih": params["w_ih"].T, "weight_hh": params["w_hh"].T, "bias": params["b"]}
        if type(model) is GRU:
            arrays["bias_n"] = params["b_hn"]
        return _filled(equinox, kind(params["w_ih"].shape[0], model.hidden, **like), **arrays)
    reason = f"equinox.nn has no module with the equations of {type(model).__name__}"
    if isinstance(model, Bidirectional):
        reason = "equinox.nn has no layer over time, and so none in both directions; convert the directions one by one"
    elif isinstance(model, ResetBeforeGRU):
        reason = "equinox.nn.GRUCell applies its reset gate after the product, as jrnn.gru(reset='after') does"
    elif type(model) in (LSTM, GRU):
        reason = f"equinox.nn.{type(model).__name__}Cell has tanh and sigmoid only"
    raise TypeError(
        f"{where}: expected a layer that Equinox has too, got {model!r}; {reason} (see jrnn.interop.to_equinox for "
        "what can "
        "be converted)"
    )


def _filled(equinox: Any, module: Any, **arrays: np.ndarray) -> Any:
    names = list(arrays)
    return equinox.tree_at(
        lambda tree: [getattr(tree, name) for name in names], module, [jnp.asarray(arrays[name]) for name in names]
    )
