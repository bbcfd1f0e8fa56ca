"""Weights from and to PyTorch: `nn.RNN`, `nn.LSTM` (with `proj_size`), `nn.GRU` and their cells.

Equations and gate orders are the same on both sides; what differs is the layout:

==================  =====================================  ==========================================================
jrnn                PyTorch, layer l                       note
==================  =====================================  ==========================================================
`w_ih (F, G*H)`     `weight_ih_l{l} (G*H, F)`              transposed
`w_hh (H, G*H)`     `weight_hh_l{l} (G*H, H)`              transposed
`w_hr (H, P)`       `weight_hr_l{l} (P, H)`                transposed; LSTM with `proj_size=P`
`b (G*H,)`          `bias_ih_l{l} + bias_hh_l{l}`          their sum is all that the equations see, except that
`b_hn (H,)`         the last H of `bias_hh_l{l}`           a GRU's reset gate acts on it (`b` has only `bias_ih` there)
==================  =====================================  ==========================================================

Several layers are a `jrnn.stack`, both directions a `jrnn.bidirectional` (PyTorch's `_reverse`), and PyTorch's
dropout, which acts between layers only, `jrnn.dropout` layers between them. PyTorch's `h_0[l * directions + d]` is the
state of layer l in direction d (0 forward, 1 backward).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import activations
from jrnn.cells.base import Layer
from jrnn.cells.elman import Elman, elman
from jrnn.cells.gru import GRU, gru
from jrnn.cells.lstm import LSTM, ProjectionLSTM, lstm, projection_lstm
from jrnn.compose.combine import Bidirectional, Stack, bidirectional, stack
from jrnn.compose.timewise import Dropout, dropout

__all__ = ["from_torch", "to_torch"]

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def from_torch(module: Any) -> tuple[Layer, Any]:
    """A jrnn model and its parameters from a PyTorch recurrent module.

    - `nn.RNN` ("tanh" or "relu"), `nn.LSTM`, `nn.GRU`: a cell for one layer in one direction, a
      `jrnn.bidirectional` for both, a `jrnn.stack` of these for several layers, with `jrnn.dropout` between them where
      the module has `dropout > 0`. As everywhere, a key switches dropout on; the module's train or eval mode is not
      read.
    - `nn.RNNCell`, `nn.LSTMCell`, `nn.GRUCell`: a cell.
    - `bias=False` becomes biases of zero.
    - `batch_first` concerns the layout of data alone: jrnn's is time-major, `(T, B, F)`, whatever it says.

    Args:
      module: the PyTorch module, on any device.

    Returns:
      `(model, params)`, for `jrnn.unroll(model, params, xs)`. Parameters are copies in the module's dtype.

    Raises:
      ImportError: PyTorch is not installed.
      TypeError: any other module, or a subclass with a `forward` of its own.
      ValueError: a double-precision module while `jax_enable_x64` is off, `dropout=1`, or a dtype jrnn has not.

    >>> import pytest; torch = pytest.importorskip("torch")
    >>> module = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    >>> model, params = jrnn.interop.from_torch(module)
    >>> model == jrnn.stack(jrnn.bidirectional(jrnn.lstm(4)), jrnn.bidirectional(jrnn.lstm(4)))
    True
    >>> xs = np.ones((5, 2, 3), np.float32)
    >>> state, ys = jrnn.unroll(model, params, xs)
    >>> np.allclose(ys, module(torch.from_numpy(xs))[0].detach(), atol=1e-6)
    True
    """
    nn = _torch().nn
    for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        if isinstance(module, kind):
            _check_forward(module, kind)
            cell = _cell(kind.__name__.removesuffix("Cell"), module)
            return cell, _read(cell, module, "")
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        if isinstance(module, kind):
            _check_forward(module, kind)
            return _from_layers(_cell(kind.__name__, module), module)
    raise TypeError(
        f"module: expected torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell or GRUCell, got {type(module).__name__}; convert "
        f"the recurrent parts of a larger model one by one"
    )


def to_torch(model: Layer, params: Any) -> Any:
    """A PyTorch module from a jrnn model and its parameters: the other way round from `from_torch`.

    `jrnn.elman` with tanh or relu, `jrnn.lstm`, `jrnn.projection_lstm`, `jrnn.gru` (reset after) become an
    `nn.RNN`, `nn.LSTM` or `nn.GRU`. So does `jrnn.bidirectional` of two such cells that are alike, merged by "concat",
    and a `jrnn.stack` of layers that are all alike, with or without one `jrnn.dropout` between each two.

    The whole bias goes into `bias_ih` and zero into `bias_hh` (but a GRU's `b_hn`), so that converting back gives
    exactly the parameters that went in. PyTorch trains both, to the same effect as twice the learning rate on b.

    Args:
      model: the layer.
      params: its parameters, all in one dtype.

    Returns:
      A module on the CPU, in the parameters' dtype, in training mode, with `batch_first=False`.

    Raises:
      ImportError: PyTorch is not installed.
      TypeError: a model for which PyTorch has no module.
      ValueError: parameters that do not fit the model or one another.

    >>> import pytest; torch = pytest.importorskip("torch")
    >>> model = jrnn.stack(jrnn.gru(4), jrnn.dropout(0.5), jrnn.gru(4))
    >>> jrnn.interop.to_torch(model, model.init(jax.random.key(0), 3))
    GRU(3, 4, num_layers=2, dropout=0.5)
    """
    torch = _torch()
    layers, rate = _layers(model, params)
    cells = [cell for directions in layers for cell, _ in directions]
    first = cells[0]
    for cell in cells:
        if _signature(cell) != _signature(first):
            raise TypeError(
                f"model: expected cells that are all alike, as in PyTorch's modules, got {first!r} and {cell!r}; "
                f"convert them one by one"
            )
    name, hidden, option = _signature(first)
    directions = len(layers[0])
    if any(len(layer) != directions for layer in layers):
        raise TypeError("model: expected layers all in one direction or all in both, got some of each")

    arrays: dict[str, np.ndarray] = {}
    features = out = np.shape(_entry(layers[0][0][1], "w_ih", first))[0]
    for i, layer in enumerate(layers):
        for (cell, leaves), suffix in zip(layer, (f"_l{i}", f"_l{i}_reverse"), strict=False):
            arrays.update(_write(cell, leaves, out, suffix))
        out = directions * (option if name == "LSTM" and option else hidden)
    dtypes = {array.dtype.name for array in arrays.values()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise ValueError(f"params: expected one dtype out of {', '.join(_DTYPES)}, got {', '.join(sorted(dtypes))}")

    # On the meta device first: drawing weights that are about to be set would advance torch's global generator.
    module = getattr(torch.nn, name)(
        features,
        hidden,
        num_layers=len(layers),
        bidirectional=directions == 2,
        dropout=rate,
        device="meta",
        dtype=getattr(torch, dtypes.pop()),
        **({"nonlinearity": option} if name == "RNN" else {"proj_size": option} if name == "LSTM" else {}),
    ).to_empty(device="cpu")
    with torch.no_grad():
        for parameter, array in arrays.items():
            # Through float32 or wider: NumPy's bfloat16 is not one that torch knows.
            wide = array if array.dtype == np.float64 else array.astype(np.float32)
            getattr(module, parameter).copy_(torch.from_numpy(np.array(wide, order="C")))
    return module


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "jrnn.interop: converting PyTorch modules needs PyTorch, which is not installed; the CPU build is enough: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    return torch


# --- from PyTorch


def _from_layers(cell: Layer, module: Any) -> tuple[Layer, Any]:
    layer = bidirectional(cell) if module.bidirectional else cell
    rate = float(module.dropout) if module.num_layers > 1 else 0.0
    if rate >= 1:
        raise ValueError(f"module: expected dropout below 1, got {rate}; nothing would pass between its layers")
    layers: list[Layer] = []
    params: list[Any] = []
    for i in range(module.num_layers):
        if i and rate:
            layers.append(dropout(rate))
            params.append({})
        read: Any = _read(cell, module, f"_l{i}")
        layers.append(layer)
        if module.bidirectional:
            read = {"forward": read, "backward": _read(cell, module, f"_l{i}_reverse")}
        params.append(read)
    if len(layers) == 1:
        return layers[0], params[0]
    return stack(*layers), tuple(params)


def _cell(name: str, module: Any) -> Layer:
    hidden = module.hidden_size
    if name == "RNN":
        return elman(hidden, module.nonlinearity)
    if name == "GRU":
        return gru(hidden)
    projection = getattr(module, "proj_size", 0)
    return projection_lstm(hidden, projection) if projection else lstm(hidden)


def _read(cell: Any, module: Any, suffix: str) -> dict[str, jax.Array]:
    """One cell's parameters; summed and transposed in NumPy, then copied to JAX in their own dtype."""
    raw = {
        name: getattr(module, name + suffix)
        for name in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
        if getattr(module, name + suffix, None) is not None
    }
    w_ih = raw["weight_ih"]
    dtype = str(w_ih.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"module: expected parameters in {', '.join(_DTYPES)}, got {dtype}")
    if dtype == "float64" and jnp.asarray(np.zeros(())).dtype != jnp.float64:
        raise ValueError(
            "module: expected float32 parameters while jax_enable_x64 is off, got float64; switch it on "
            '(jax.config.update("jax_enable_x64", True)) or convert the module with .float()'
        )
    # Sums in float64 are rounded once, on the way into the parameters' dtype.
    arrays = {name: value.detach().cpu().double().numpy() for name, value in raw.items()}
    rows, hidden = arrays["weight_ih"].shape[0], module.hidden_size
    b = arrays.get("bias_ih", np.zeros(rows))
    recurrent = arrays.get("bias_hh", np.zeros(rows))
    params = {"w_ih": arrays["weight_ih"].T, "w_hh": arrays["weight_hh"].T, "b": b + recurrent}
    if type(cell) is GRU:
        params["b"] = np.concatenate([params["b"][: 2 * hidden], b[2 * hidden :]])
        params["b_hn"] = recurrent[2 * hidden :]
    if "weight_hr" in arrays:
        params["w_hr"] = arrays["weight_hr"].T
    return {name: jnp.asarray(value.astype(jnp.dtype(dtype))) for name, value in params.items()}


def _check_forward(module: Any, kind: Any) -> None:
    if type(module).forward is not kind.forward:
        raise TypeError(
            f"module: expected torch.nn.{kind.__name__} as PyTorch defines it, got {type(module).__name__}, a subclass "
            f"with a forward of its own; what that computes cannot be known from its weights"
        )


# --- to PyTorch


def _layers(model: Any, params: Any) -> tuple[list[list[tuple[Any, Any]]], float]:
    """Each layer's directions as (cell, parameters), and the rate of the dropout between layers."""
    flat = _flatten(model, params, "params")
    recurrent = [i for i, (layer, _) in enumerate(flat) if not isinstance(layer, Dropout)]
    rates = {layer.rate for layer, _ in flat if isinstance(layer, Dropout)}
    spread = len(rates) == 1 and recurrent == list(range(0, len(flat), 2)) and len(flat) % 2 == 1
    if rates and not spread:
        raise TypeError(
            "model: expected jrnn.dropout exactly once between each two layers, at one rate, since PyTorch's modules "
            f"have no other, got {model!r}; leave other dropout out and add torch.nn.Dropout outside the module"
        )
    layers = []
    for i in recurrent:
        layer, leaves = flat[i]
        if isinstance(layer, Bidirectional):
            if layer.merge != "concat":
                raise TypeError(f'model: expected directions merged by "concat", as PyTorch does, got {layer.merge!r}')
            if not isinstance(leaves, Mapping) or set(leaves) != {"forward", "backward"}:
                raise ValueError('params: expected "forward" and "backward" for a bidirectional layer')
            layers.append([(layer.forward, leaves["forward"]), (layer.backward, leaves["backward"])])
        else:
            layers.append([(layer, leaves)])
    return layers, rates.pop() if rates else 0.0


def _flatten(model: Any, params: Any, where: str) -> list[tuple[Any, Any]]:
    if not isinstance(model, Stack):
        return [(model, params)]
    if not isinstance(params, tuple) or len(params) != len(model.layers):
        raise ValueError(f"{where}: expected a tuple with one entry for each of {len(model.layers)} layers")
    entries = zip(model.layers, params, strict=True)
    return [pair for i, (layer, p) in enumerate(entries) for pair in _flatten(layer, p, f"{where}[{i}]")]


def _signature(cell: Any) -> tuple[str, int, Any]:
    """PyTorch's module, its hidden size, and its nonlinearity or projection; a TypeError where it has none."""
    known: dict[Any, str] = {jnp.tanh: "tanh", jax.nn.relu: "relu", jax.nn.sigmoid: "sigmoid"}
    named = {
        field: known.get(activations.resolve(getattr(cell, field)))
        for field in ("activation", "gate_activation")
        if hasattr(cell, field)
    }
    if type(cell) is Elman and named["activation"] in ("tanh", "relu"):
        return "RNN", cell.hidden, named["activation"]
    if type(cell) is ProjectionLSTM:
        # PyTorch has proj_size for a true reduction only.
        if cell.projection < cell.hidden:
            return "LSTM", cell.hidden, cell.projection
    elif type(cell) in (LSTM, GRU) and named == {"activation": "tanh", "gate_activation": "sigmoid"}:
        return type(cell).__name__, cell.hidden, 0
    raise TypeError(
        f"model: expected jrnn.elman (tanh or relu), lstm, projection_lstm (to fewer features than units) or gru "
        f"(reset after), with PyTorch's activations, alone or in bidirectional and stack, got {cell!r}, which PyTorch "
        f"lacks"
    )


def _entry(leaves: Any, name: str, cell: Any) -> Any:
    if not isinstance(leaves, Mapping) or name not in leaves:
        raise ValueError(f"params: expected a dict with {name!r} for {cell!r}, got {_keys(leaves)}")
    return leaves[name]


def _keys(leaves: Any) -> str:
    return f"one with {sorted(leaves)}" if isinstance(leaves, Mapping) else type(leaves).__name__


def _write(cell: Any, leaves: Any, features: int, suffix: str) -> dict[str, np.ndarray]:
    name, hidden, option = _signature(cell)
    gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[name]
    fed_back = option if name == "LSTM" and option else hidden
    shapes = {"w_ih": (features, gates * hidden), "w_hh": (fed_back, gates * hidden), "b": (gates * hidden,)}
    if name == "GRU":
        shapes["b_hn"] = (hidden,)
    if fed_back != hidden:
        shapes["w_hr"] = (hidden, fed_back)
    for leaf, shape in shapes.items():
        if np.shape(_entry(leaves, leaf, cell)) != shape:
            raise ValueError(f"params: expected {leaf} of shape {shape} for {cell!r}, got {np.shape(leaves[leaf])}")
    arrays = {leaf: np.asarray(leaves[leaf]) for leaf in shapes}
    recurrent = np.zeros_like(arrays["b"])
    if name == "GRU":
        recurrent[2 * hidden :] = arrays["b_hn"]
    written = {
        "weight_ih": arrays["w_ih"].T,
        "weight_hh": arrays["w_hh"].T,
        "bias_ih": arrays["b"],
        "bias_hh": recurrent,
    }
    if "w_hr" in arrays:
        written["weight_hr"] = arrays["w_hr"].T
    return {leaf + suffix: array for leaf, array in written.items()}
