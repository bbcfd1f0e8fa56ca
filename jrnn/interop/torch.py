"""Weights from and to PyTorch: recurrent modules, cells, and the modules between them.

Equations and gate orders are the same in both libraries. The layouts of the parameters differ:

==================  =====================================  ==========================================================
jrnn                PyTorch, layer l                       note
==================  =====================================  ==========================================================
`w_ih (F, G*H)`     `weight_ih_l{l} (G*H, F)`              transposed
`w_hh (H, G*H)`     `weight_hh_l{l} (G*H, H)`              transposed
`w_hr (H, P)`       `weight_hr_l{l} (P, H)`                transposed; LSTM with `proj_size=P`
`b (G*H,)`          `bias_ih_l{l} + bias_hh_l{l}`          the equations depend only on their sum, except that
`b_hn (H,)`         the last H of `bias_hh_l{l}`           a GRU's reset gate acts on it (`b` has only `bias_ih` there)
`w (F, out)`, `b`   `weight (out, F)`, `bias`              `jrnn.dense` and `nn.Linear`
`w (vocab, F)`      `weight (vocab, F)`                    `jrnn.embed` and `nn.Embedding`
`scale`, `shift`    `weight`, `bias`                       `jrnn.layer_norm` and `nn.LayerNorm`
==================  =====================================  ==========================================================

Several layers are a `jrnn.stack`, both directions a `jrnn.bidirectional` (PyTorch's `_reverse`), and PyTorch's
dropout, which acts between layers only, `jrnn.dropout` layers between them. PyTorch's `h_0[l * directions + d]` is the
state of layer l in direction d (0 forward, 1 backward).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import activations
from jrnn.cells.base import Layer
from jrnn.cells.elman import Elman, elman
from jrnn.cells.gru import GRU, ResetBeforeGRU, gru
from jrnn.cells.lstm import LSTM, ProjectionLSTM, lstm, projection_lstm
from jrnn.compose.combine import Bidirectional, Stack, bidirectional, stack
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
from jrnn.interop._arrays import PYTORCH, read_arrays
from jrnn.interop._common import check_dtype, checked, leaves, lookup, require, to_params, total

__all__ = ["from_torch", "load_torch", "to_torch"]

# Activations by the name of PyTorch's module, and what the options of that module have to be.
_ACTIVATIONS: dict[str, tuple[activations.Activation, dict[str, Any]]] = {
    "Tanh": ("tanh", {}),
    "Sigmoid": ("sigmoid", {}),
    "ReLU": ("relu", {}),
    "SiLU": ("silu", {}),
    "ELU": ("elu", {"alpha": 1.0}),
    "Softplus": ("softplus", {"beta": 1.0, "threshold": 20.0}),
    "GELU": (_common.gelu_erf, {"approximate": "none"}),
    "Identity": ("linear", {}),
    "LeakyReLU": (_common.leaky_relu, {"negative_slope": 0.01}),
    "ReLU6": (jax.nn.relu6, {}),
    "SELU": (jax.nn.selu, {}),
    "Softsign": (jax.nn.soft_sign, {}),
    "LogSigmoid": (jax.nn.log_sigmoid, {}),
    "Hardsigmoid": (jax.nn.hard_sigmoid, {}),
    "Hardswish": (jax.nn.hard_swish, {}),
    "Hardtanh": (jax.nn.hard_tanh, {"min_val": -1.0, "max_val": 1.0}),
    "Softmax": (_common.softmax, {"dim": -1}),
    "LogSoftmax": (_common.log_softmax, {"dim": -1}),
}


def from_torch(module: Any) -> tuple[Layer, Any]:
    """A jrnn model and its parameters from a PyTorch module.

    - `nn.RNN` ("tanh" or "relu"), `nn.LSTM`, `nn.GRU`: a cell for one layer in one direction, a
      `jrnn.bidirectional` for both, a `jrnn.stack` of these for several layers, with `jrnn.dropout` between them where
      the module has `dropout > 0`. As everywhere, a key switches dropout on, whether the module is in train or in
      eval mode.
    - `nn.RNNCell`, `nn.LSTMCell`, `nn.GRUCell`: a cell.
    - `nn.Linear`, `nn.Embedding`, `nn.Dropout`, `nn.LayerNorm`: `jrnn.dense`, `embed`, `dropout`, `layer_norm`.
    - `nn.Tanh`, `nn.ReLU` and other activations: `jrnn.activation`.
    - `nn.Sequential` of all these, nested too: a `jrnn.stack`, in which the outputs of a recurrent module go on to
      the next one. (PyTorch's own `nn.Sequential` would pass the pair of outputs and state on; see `to_torch`.)
    - `bias=False` becomes biases of zero.
    - `batch_first` has no effect on the parameters. The data of the jrnn model are time-major, `(T, B, F)`.
    - An embedding's `padding_idx` stops gradients to that row. In jrnn, `lengths` or `mask` do so.

    Args:
      module: the PyTorch module, on any device.

    Returns:
      `(model, params)`, for `jrnn.unroll(model, params, xs)`. Parameters are copies in the module's dtype.

    Raises:
      ImportError: PyTorch is not installed.
      TypeError: any other module, an option of a module that jrnn does not have, or a subclass with a `forward` of
        its own.
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
    recurrent = [part for part in _parts(nn, module) if isinstance(part, nn.RNNBase)]
    if len({part.batch_first for part in recurrent}) > 1:
        raise TypeError(
            "module: expected batch_first alike in all recurrent modules, got both; some of them would run over the "
            "batch axis instead of time"
        )
    return _convert(nn, module, "module")


def to_torch(model: Layer, params: Any) -> Any:
    """A PyTorch module from a jrnn model and its parameters: the inverse of `from_torch`.

    - `jrnn.elman` with tanh or relu, `jrnn.lstm`, `jrnn.projection_lstm`, `jrnn.gru` (reset after) become an
      `nn.RNN`, `nn.LSTM` or `nn.GRU`. So does `jrnn.bidirectional` of two such cells that are alike, merged by
      "concat", and a `jrnn.stack` of layers that are all alike, with or without one `jrnn.dropout` between each two.
    - `jrnn.dense`, `embed`, `dropout`, `layer_norm` and `activation` become `nn.Linear`, `nn.Embedding`, `nn.Dropout`,
      `nn.LayerNorm` and the module of that activation.
    - Any other `jrnn.stack` becomes an `nn.Sequential` whose `forward` passes only the outputs of recurrent modules
      on (`jrnn.interop.torch.Chain`), and so can be called; its entries and `state_dict` are those of an
      `nn.Sequential`.

    The whole bias goes into `bias_ih`, and `bias_hh` is zero (except for the `b_hn` of a GRU), so that converting back
    gives exactly the same parameters. PyTorch trains both, with the effect of twice the learning rate for b.

    Args:
      model: the layer.
      params: its parameters, all in one dtype.

    Returns:
      A module on the CPU, in the parameters' dtype, in training mode, with `batch_first=False`.

    Raises:
      ImportError: PyTorch is not installed.
      TypeError: a layer for which PyTorch has no module; the error says which, and what PyTorch lacks.
      ValueError: parameters that do not fit the model or one another.

    >>> import pytest; torch = pytest.importorskip("torch")
    >>> model = jrnn.stack(jrnn.gru(4), jrnn.dropout(0.5), jrnn.gru(4))
    >>> jrnn.interop.to_torch(model, model.init(jax.random.key(0), 3))
    GRU(3, 4, num_layers=2, dropout=0.5)
    >>> model = jrnn.stack(jrnn.embed(10, 3), jrnn.gru(4), jrnn.dense(2))
    >>> jrnn.interop.to_torch(model, model.init(jax.random.key(0), None))
    Chain(
      (0): Embedding(10, 3)
      (1): GRU(3, 4)
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    torch = _torch()
    return _to_module(torch, model, checked(model, params), "model")


def load_torch(model: Layer, source: Any, *, names: Sequence[str] | None = None, strict: bool = True) -> Any:
    """Parameters for a jrnn model from a PyTorch ``state_dict`` or a file of one; PyTorch's module is not needed.

    The entries for each layer of the model are found by the kind of the layer and by shapes. A cell needs
    ``….weight_ih_l0`` and so on (or ``….weight_ih``, of an `nn.LSTMCell`). `jrnn.dense`, `jrnn.embed` and
    `jrnn.layer_norm` need ``….weight`` and ``….bias``. An `nn.LSTM` of several layers provides the weights of as many
    cells that follow one another. If several modules have the same kind and shapes, they are ordered by the numbers in
    their names (``layers.0`` comes before ``layers.1``). If their names differ otherwise, pass them as ``names``.

    Args:
      model: a cell, a layer, or `jrnn.stack` and `jrnn.bidirectional` of those that `from_torch` makes.
      source: a mapping of names to tensors or arrays; or the path of a file: ``.safetensors``, ``.npz``, ``.pkl`` of a
        dict of NumPy arrays (read by a reader that executes nothing), or as `torch.save` writes a ``state_dict``
        (read with ``weights_only=True``).
      names: the modules' names in the ``state_dict``, one for each in the order of the model's layers: for example
        ``("encoder.embedding", "encoder.lstm", "head")``. None finds them.
      strict: whether every entry must be used, and every bias must exist. If False, entries of other modules are
        ignored, and biases of modules that have none (``bias=False``) are zero.

    Returns:
      Parameters, in the dtype of the source, for ``jrnn.unroll(model, params, xs)``.

    Raises:
      ImportError: the file's format needs PyTorch or safetensors, and that is not installed.
      TypeError: the model has a layer for which PyTorch has no module.
      ValueError: entries are missing, have another shape, are left over, or fit in more than one way; the message names
        them.

    >>> model = jrnn.stack(jrnn.embed(10, 3), jrnn.lstm(4))
    >>> found = {"emb.weight": (10, 3), "rnn.weight_ih_l0": (16, 3), "rnn.weight_hh_l0": (16, 4)}
    >>> found |= {"rnn.bias_ih_l0": (16,), "rnn.bias_hh_l0": (16,)}
    >>> found = {name: np.ones(shape, np.float32) for name, shape in found.items()}
    >>> params = jrnn.interop.load_torch(model, found)
    >>> jrnn.unroll(model, params, jnp.zeros((5, 2), int))[1].shape
    (5, 2, 4)
    """
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a layer, such as jrnn.lstm(128), got {model!r}")
    groups = _groups(read_arrays(source))
    units = list(_units(model, "model"))
    chosen = _by_name(units, groups, names) if names is not None else _by_shape(units, groups, strict)
    unused = sorted(set(groups) - {group for group, _ in chosen})
    if strict and unused:
        entries = sorted(entry for name in unused for entry in groups[name].entries)
        raise ValueError(
            f"source: expected entries for {model!r} only, got {_some(entries)} besides; put the layers they belong to "
            "into the model, or pass strict=False to ignore them"
        )
    filled = {}
    features = None
    for unit, (name, index) in zip(units, chosen, strict=True):
        if problems := _misfits(unit, groups[name], index, features, strict):
            raise ValueError(f"source: expected entries that fit {unit.layer!r} ({unit.where}): {'; '.join(problems)}")
        features = unit.layer.out_features(features)
        filled[unit.where] = unit.read(groups[name], index)
    return _fill(model, filled, "model")


def _torch() -> Any:
    return require("torch", PYTORCH)


@functools.cache
def _chain() -> Any:
    """The class `Chain`, made where it is used, since this module does without PyTorch until then."""
    nn: Any = _torch().nn

    class Chain(nn.Sequential):
        """`nn.Sequential` in which recurrent modules pass their outputs on, without their state."""

        def forward(self, x: Any) -> Any:
            for module in self:
                x = module(x)
                if isinstance(module, nn.RNNBase):
                    x = x[0]
            return x

    Chain.__module__, Chain.__qualname__ = __name__, "Chain"
    return Chain


def __getattr__(name: str) -> Any:
    if name == "Chain":  # as pickles of such modules look it up
        return _chain()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- from PyTorch


def _parts(nn: Any, module: Any) -> Iterator[Any]:
    if isinstance(module, nn.Sequential):
        for part in module:
            yield from _parts(nn, part)
    else:
        yield module


def _convert(nn: Any, module: Any, where: str) -> tuple[Layer, Any]:
    if isinstance(module, nn.Sequential):
        _check_forward(module, _chain() if isinstance(module, _chain()) else nn.Sequential, where)
        if not len(module):
            raise TypeError(f"{where}: expected modules in nn.Sequential, got none")
        parts = [_convert(nn, part, f"{where}[{i}]") for i, part in enumerate(module)]
        return stack(*(layer for layer, _ in parts)), tuple(params for _, params in parts)
    for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        if isinstance(module, kind):
            _check_forward(module, kind, where)
            cell = _cell(kind.__name__.removesuffix("Cell"), module)
            return cell, _read(cell, module, "", where)
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        if isinstance(module, kind):
            _check_forward(module, kind, where)
            return _from_layers(_cell(kind.__name__, module), module, where)
    for kind, convert in ((nn.Linear, _linear), (nn.Embedding, _embedding), (nn.LayerNorm, _layer_norm)):
        if isinstance(module, kind):
            _check_forward(module, kind, where)
            layer, arrays = convert(module, where)
            return layer, to_params(arrays, where)
    if isinstance(module, nn.Dropout):
        _check_forward(module, nn.Dropout, where)
        return dropout(_rate(module.p, where)), {}
    for name, (function, options) in _ACTIVATIONS.items():
        kind = getattr(nn, name)
        if isinstance(module, kind):
            _check_forward(module, kind, where)
            if name == "GELU" and module.approximate == "tanh":
                return activation("gelu"), {}
            for option, expected in options.items():
                if getattr(module, option) != expected:
                    raise TypeError(
                        f"{where}: expected nn.{name} with {option}={expected!r}, got {getattr(module, option)!r}, for "
                        "which jrnn has no activation; write it as a module-level function in jrnn.activation"
                    )
            return activation(function), {}
    raise TypeError(
        f"{where}: expected torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, Linear, Embedding, Dropout, "
        f"LayerNorm, an activation or Sequential of these, got {type(module).__name__}; convert the parts of "
        "a larger model one by one and put them into jrnn.stack"
    )


def _linear(module: Any, where: str) -> tuple[Layer, dict[str, np.ndarray]]:
    w = _numpy(module.weight, where).T
    b = np.zeros_like(w[0]) if module.bias is None else _numpy(module.bias, where)
    return dense(module.out_features), {"w": w, "b": b}


def _embedding(module: Any, where: str) -> tuple[Layer, dict[str, np.ndarray]]:
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            raise TypeError(
                f"{where}: expected nn.Embedding without {option}, got {getattr(module, option)!r}; jrnn.embed has none"
            )
    return embed(module.num_embeddings, module.embedding_dim), {"w": _numpy(module.weight, where)}


def _layer_norm(module: Any, where: str) -> tuple[Layer, dict[str, np.ndarray]]:
    if len(module.normalized_shape) != 1:
        raise TypeError(
            f"{where}: expected nn.LayerNorm over the last axis, got normalized_shape={tuple(module.normalized_shape)}"
        )
    ones = np.ones(module.normalized_shape, np.float32)
    scale = ones if module.weight is None else _numpy(module.weight, where)
    shift = np.zeros_like(scale) if module.bias is None else _numpy(module.bias, where)
    return layer_norm(float(module.eps)), {"scale": scale, "shift": shift}


def _rate(value: Any, where: str) -> float:
    if value >= 1:
        raise ValueError(f"{where}: expected dropout below 1, got {value}; nothing would pass")
    return float(value)


def _from_layers(cell: Layer, module: Any, where: str) -> tuple[Layer, Any]:
    layer = bidirectional(cell) if module.bidirectional else cell
    rate = _rate(module.dropout, where) if module.num_layers > 1 else 0.0
    layers: list[Layer] = []
    params: list[Any] = []
    for i in range(module.num_layers):
        if i and rate:
            layers.append(dropout(rate))
            params.append({})
        read: Any = _read(cell, module, f"_l{i}", where)
        layers.append(layer)
        if module.bidirectional:
            read = {"forward": read, "backward": _read(cell, module, f"_l{i}_reverse", where)}
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


_LEAVES = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")


def _read(cell: Any, module: Any, suffix: str, where: str) -> dict[str, jax.Array]:
    found = {name: getattr(module, name + suffix, None) for name in _LEAVES}
    return to_params(_cell_arrays(cell, {n: _numpy(v, where) for n, v in found.items() if v is not None}), where)


def _cell_arrays(cell: Any, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One cell's parameters from PyTorch's; biases that are not there are zero."""
    zero = np.zeros_like(raw["weight_ih"][:, 0])
    b, recurrent = raw.get("bias_ih", zero), raw.get("bias_hh", zero)
    params = {"w_ih": raw["weight_ih"].T, "w_hh": raw["weight_hh"].T}
    if type(cell) is GRU:
        gates = 2 * cell.hidden
        params["b"] = np.concatenate([total(b[:gates], recurrent[:gates]), b[gates:]])
        params["b_hn"] = recurrent[gates:]
    else:
        params["b"] = total(b, recurrent)
    if "weight_hr" in raw:
        params["w_hr"] = raw["weight_hr"].T
    return params


def _numpy(tensor: Any, where: str) -> np.ndarray:
    """A tensor as a NumPy array of its own dtype."""
    name = str(tensor.dtype).removeprefix("torch.")
    check_dtype(name, where)
    tensor = tensor.detach().cpu()
    # NumPy's bfloat16 is not one that torch knows.
    return tensor.float().numpy().astype(jnp.bfloat16) if name == "bfloat16" else tensor.numpy()


def _check_forward(module: Any, kind: Any, where: str) -> None:
    if type(module).forward is not kind.forward:
        raise TypeError(
            f"{where}: expected torch.nn.{kind.__name__} as PyTorch defines it, got {type(module).__name__}, a "
            f"subclass with a forward of its own; what that computes cannot be known from its weights"
        )


# --- to PyTorch


def _to_module(torch: Any, model: Any, params: Any, where: str) -> Any:
    if isinstance(model, Stack):
        flat = leaves(model, params, where)
        rates = [layer.rate for _, layer, _ in flat if isinstance(layer, Dropout)]
        cells = [(place, layer, own) for place, layer, own in flat if not isinstance(layer, Dropout)]
        if _alike(flat, rates, cells):
            return _recurrent(torch, cells, rates[0] if rates else 0.0)
        parts = zip(model.layers, params, strict=True)
        return _chain()(
            *(_to_module(torch, layer, own, f"{where}.layers[{i}]") for i, (layer, own) in enumerate(parts))
        )
    nn, like = torch.nn, {"device": "meta", "dtype": _torch_dtype(torch, params)}
    if isinstance(model, Dense):
        module = nn.Linear(*params["w"].shape, **like)
        return _filled(torch, module, {"weight": params["w"].T, "bias": params["b"]})
    if isinstance(model, Embed):
        return _filled(torch, nn.Embedding(model.vocab, model.features, **like), {"weight": params["w"]})
    if isinstance(model, LayerNorm):
        module = nn.LayerNorm(params["scale"].shape, eps=model.epsilon, **like)
        return _filled(torch, module, {"weight": params["scale"], "bias": params["shift"]})
    if isinstance(model, Dropout):
        return nn.Dropout(model.rate)
    if isinstance(model, Activate):
        name = lookup({name: function for name, (function, _) in _ACTIVATIONS.items()}, model.function)
        if name is None and activations.resolve(model.function) is jax.nn.gelu:
            return nn.GELU("tanh")
        if name is None:
            raise TypeError(f"{where}: expected an activation that torch.nn has, got {model!r}")
        return getattr(nn, name)(**_ACTIVATIONS[name][1])
    return _recurrent(torch, [(where, model, params)], 0.0)


def _torch_dtype(torch: Any, params: Any) -> Any:
    names = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    return getattr(torch, names.pop()) if names else None


def _alike(flat: list[Any], rates: list[float], cells: list[Any]) -> bool:
    """Whether the layers of a stack are what one PyTorch module of several layers is."""
    if not cells or len(set(rates)) > 1:
        return False
    if rates and not (
        len(flat) == 2 * len(cells) - 1 and all(isinstance(layer, Dropout) for _, layer, _ in flat[1::2])
    ):
        return False
    kinds = set()
    for _, layer, _ in cells:
        try:
            kinds.add(_directions(layer, ""))
        except TypeError:
            return False
    return len(kinds) == 1


def _directions(layer: Any, where: str) -> tuple[int, str, int, Any]:
    """How many directions a layer has, and the `_signature` of its cells."""
    if not isinstance(layer, Bidirectional):
        return 1, *_signature(layer, where)
    if layer.merge != "concat":
        raise TypeError(
            f'{where}: expected directions merged by "concat", as PyTorch does, got {layer.merge!r}; add the '
            "directions up outside the module"
        )
    forward, backward = (_signature(cell, f"{where}.{name}") for _, name, cell in layer._each())
    if forward != backward:
        raise TypeError(
            f"{where}: expected two directions that are alike, as in PyTorch's modules, got {layer.forward!r} and "
            f"{layer.backward!r}; convert them one by one"
        )
    return 2, *forward


def _signature(cell: Any, where: str) -> tuple[str, int, Any]:
    """PyTorch's module, its hidden size, and its nonlinearity or projection; a TypeError with the reason if none."""
    known: dict[Any, str] = {jnp.tanh: "tanh", jax.nn.relu: "relu", jax.nn.sigmoid: "sigmoid"}
    functions = {
        field: known.get(activations.resolve(getattr(cell, field)))
        for field in ("activation", "gate_activation")
        if hasattr(cell, field)
    }
    usual = {"activation": "tanh", "gate_activation": "sigmoid"}
    if type(cell) is Elman:
        if functions["activation"] in ("tanh", "relu"):
            return "RNN", cell.hidden, functions["activation"]
        reason = "torch.nn.RNN has tanh and relu only"
    elif type(cell) is ProjectionLSTM:
        if cell.projection < cell.hidden:
            return "LSTM", cell.hidden, cell.projection
        reason = "torch.nn.LSTM takes a proj_size below its hidden_size only"
    elif type(cell) is ResetBeforeGRU:
        reason = "torch.nn.GRU applies its reset gate after the product, as jrnn.gru(reset='after') does"
    elif type(cell) in (LSTM, GRU):
        if functions == usual:
            return type(cell).__name__, cell.hidden, 0
        reason = f"torch.nn.{type(cell).__name__} has tanh and sigmoid only"
    else:
        reason = f"torch.nn has no module with the equations of {type(cell).__name__}"
    raise TypeError(
        f"{where}: expected a layer that PyTorch has too, got {cell!r}; {reason} (see jrnn.interop.to_torch for what "
        "can be converted)"
    )


def _recurrent(torch: Any, layers: list[tuple[str, Any, Any]], rate: float) -> Any:
    """One PyTorch module for layers that are all alike."""
    directions, name, hidden, option = _directions(layers[0][1], layers[0][0])
    arrays: dict[str, np.ndarray] = {}
    for i, (_, layer, own) in enumerate(layers):
        if isinstance(layer, Bidirectional):
            arrays |= _write(layer.forward, own["forward"], f"_l{i}")
            arrays |= _write(layer.backward, own["backward"], f"_l{i}_reverse")
        else:
            arrays |= _write(layer, own, f"_l{i}")
    features = arrays["weight_ih_l0"].shape[1]
    # On the meta device first: drawing weights that are about to be set would advance torch's global generator.
    module = getattr(torch.nn, name)(
        features,
        hidden,
        num_layers=len(layers),
        bidirectional=directions == 2,
        dropout=rate,
        device="meta",
        dtype=_torch_dtype(torch, arrays),
        **({"nonlinearity": option} if name == "RNN" else {"proj_size": option} if name == "LSTM" else {}),
    )
    return _filled(torch, module, arrays)


def _filled(torch: Any, module: Any, arrays: dict[str, np.ndarray]) -> Any:
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, array in arrays.items():
            # Through float32 or wider: NumPy's bfloat16 is not one that torch knows.
            wide = array if array.dtype == np.float64 else array.astype(np.float32)
            getattr(module, parameter).copy_(torch.from_numpy(np.array(wide, order="C")))
    return module


def _write(cell: Any, own: Any, suffix: str) -> dict[str, np.ndarray]:
    recurrent = np.zeros_like(own["b"])
    if "b_hn" in own:
        recurrent[-cell.hidden :] = own["b_hn"]
    written = {"weight_ih": own["w_ih"].T, "weight_hh": own["w_hh"].T, "bias_ih": own["b"], "bias_hh": recurrent}
    if "w_hr" in own:
        written["weight_hr"] = own["w_hr"].T
    return {leaf + suffix: array for leaf, array in written.items()}


# --- from a state_dict, by the structure of a model

_RECURRENT = re.compile(
    r"(?:(?P<name>.*)\.)?(?P<leaf>weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)(?P<suffix>_l\d+(_reverse)?)?"
)
_PLAIN = re.compile(r"(?:(?P<name>.*)\.)?(?P<leaf>weight|bias)")


@dataclass
class _Group:
    """The entries of one PyTorch module: arrays by their suffix (of layer and direction) and leaf."""

    name: str
    recurrent: bool
    arrays: dict[str, dict[str, np.ndarray]]

    @property
    def entries(self) -> list[str]:
        found = [self.entry(leaf, suffix) for suffix, found in self.arrays.items() for leaf in found]
        return found or [self.name]

    def entry(self, leaf: str, suffix: str = "") -> str:
        return f"{self.name}.{leaf}{suffix}" if self.name else leaf + suffix

    @property
    def depth(self) -> int:
        """How many layers of a model these are."""
        return max((int(s.split("_")[1][1:]) + 1 for s in self.arrays if s), default=1)


@dataclass
class _Unit:
    """A layer of the model that has parameters."""

    where: str
    layer: Any

    @property
    def recurrent(self) -> bool:
        return not isinstance(self.layer, Dense | Embed | LayerNorm)

    def suffixes(self, group: _Group, index: int) -> list[str]:
        first = f"_l{index}" if "" not in group.arrays else ""
        return [first, f"_l{index}_reverse"] if isinstance(self.layer, Bidirectional) else [first]

    def shapes(self, features: int | None) -> dict[str, tuple[int | None, ...]]:
        """The shapes of its entries in PyTorch; None for a size that is not known."""
        layer = self.layer
        if isinstance(layer, Dense):
            return {"weight": (layer.features, features), "bias": (layer.features,)}
        if isinstance(layer, Embed):
            return {"weight": (layer.vocab, layer.features)}
        if isinstance(layer, LayerNorm):
            return {"weight": (features,), "bias": (features,)}
        _, name, hidden, option = _directions(layer, self.where)
        rows = {"RNN": 1, "LSTM": 4, "GRU": 3}[name] * hidden
        out = option if name == "LSTM" and option else hidden
        shapes: dict[str, tuple[int | None, ...]] = {"weight_ih": (rows, features), "weight_hh": (rows, out)}
        if out != hidden:
            shapes["weight_hr"] = (out, hidden)
        return {**shapes, "bias_ih": (rows,), "bias_hh": (rows,)}

    def read(self, group: _Group, index: int) -> Any:
        layer, found = self.layer, [group.arrays[suffix] for suffix in self.suffixes(group, index)]
        where = f"source[{group.name!r}]"
        if isinstance(layer, Bidirectional):
            both = zip(("forward", "backward"), layer.children(), found, strict=True)
            return {name: to_params(_cell_arrays(cell, raw), where) for name, cell, raw in both}
        if self.recurrent:
            return to_params(_cell_arrays(layer, found[0]), where)
        weight = found[0]["weight"]
        if isinstance(layer, Embed):
            return to_params({"w": weight}, where)
        if isinstance(layer, Dense):
            return to_params({"w": weight.T, "b": found[0].get("bias", np.zeros_like(weight[:, 0]))}, where)
        return to_params({"scale": weight, "shift": found[0].get("bias", np.zeros_like(weight))}, where)


def _groups(arrays: dict[str, np.ndarray]) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    for entry, array in arrays.items():
        match = _RECURRENT.fullmatch(entry) or _PLAIN.fullmatch(entry)
        found = match.groupdict() if match else {"name": entry, "leaf": ""}
        recurrent = "suffix" in found
        name = found["name"] or ""
        group = groups.setdefault(name, _Group(name, recurrent, {}))
        if match is None or group.recurrent != recurrent:
            # Something that no layer of jrnn has: kept, so that it is named as left over.
            groups.setdefault(entry, _Group(entry, False, {}))
        else:
            group.arrays.setdefault(found.get("suffix") or "", {})[found["leaf"]] = array
    return groups


def _units(layer: Any, where: str) -> Iterator[_Unit]:
    if isinstance(layer, Stack):
        for i, part in enumerate(layer.layers):
            yield from _units(part, f"{where}.layers[{i}]")
    elif isinstance(layer, Dense | Embed | LayerNorm):
        yield _Unit(where, layer)
    elif not isinstance(layer, Dropout | Activate):
        _directions(layer, where)  # raises where PyTorch has no such cell
        yield _Unit(where, layer)


def _fill(layer: Any, filled: dict[str, Any], where: str) -> Any:
    if isinstance(layer, Stack):
        return tuple(_fill(part, filled, f"{where}.layers[{i}]") for i, part in enumerate(layer.layers))
    return filled.get(where, {})


def _misfits(unit: _Unit, group: _Group, index: int, features: int | None, strict: bool) -> list[str]:
    """What is wrong with a group as the source of a layer: entries that are missing or of another shape, by name."""
    problems = []
    for suffix in unit.suffixes(group, index):
        found = group.arrays.get(suffix, {})
        for leaf, shape in unit.shapes(features).items():
            entry = group.entry(leaf, suffix)
            if leaf not in found:
                if strict or not leaf.startswith("bias"):
                    problems.append(f"{entry} is missing")
            elif len(found[leaf].shape) != len(shape) or any(
                size is not None and size != got for size, got in zip(shape, found[leaf].shape, strict=True)
            ):
                expected = tuple("F" if size is None else size for size in shape)
                problems.append(f"{entry} has shape {found[leaf].shape} instead of {expected}".replace("'F'", "F"))
        if extra := sorted(set(found) - set(unit.shapes(features))):
            problems.append(f"{_some([group.entry(leaf, suffix) for leaf in extra])} has no place")
    return problems


def _served(units: list[_Unit], at: int, group: _Group) -> list[_Unit] | None:
    """The units from ``at`` on that a group would serve, None where there are not that many or they differ in kind."""
    served = units[at : at + group.depth]
    directions = {suffix.endswith("_reverse") for suffix in group.arrays}
    both = len(directions) == 2
    if len(served) < group.depth or any(unit.recurrent != group.recurrent for unit in served):
        return None
    if group.recurrent and any(isinstance(unit.layer, Bidirectional) != both for unit in served):
        return None
    return served


def _by_name(units: list[_Unit], groups: dict[str, _Group], names: Sequence[str]) -> list[tuple[str, int]]:
    chosen: list[tuple[str, int]] = []
    for name in names:
        if name not in groups:
            raise ValueError(f"names: expected names of modules in the source, {_some(sorted(groups))}, got {name!r}")
        chosen += [(name, index) for index in range(groups[name].depth)]
    if len(chosen) != len(units):
        layers = ", ".join(f"{unit.layer!r}" for unit in units)
        raise ValueError(
            f"names: expected modules for {len(units)} layers with parameters ({layers}), got {len(chosen)}: {names!r}"
        )
    return chosen


def _by_shape(units: list[_Unit], groups: dict[str, _Group], strict: bool) -> list[tuple[str, int]]:
    found: list[tuple[str, ...]] = []
    deepest: tuple[int, tuple[str, ...], int | None] = (-1, (), None)

    def search(at: int, used: tuple[str, ...], features: int | None) -> None:
        nonlocal deepest
        if at > deepest[0]:
            deepest = (at, used, features)
        if len(found) > 1:
            return
        if at == len(units):
            found.append(used)
            return
        for name, group in groups.items():
            # Of modules whose names differ in numbers alone, the lower number comes first.
            if name in used or any(_stem(u) == _stem(name) and _order(u) > _order(name) for u in used):
                continue
            served = _served(units, at, group)
            if served is None:
                continue
            out = features
            for index, unit in enumerate(served):
                if _misfits(unit, group, index, out, strict):
                    break
                out = _out(unit, group, index, out)
            else:
                search(at + len(served), (*used, name), out)

    search(0, (), None)
    if len(found) > 1:
        ways = " or ".join(map(repr, found))
        raise ValueError(f"source: expected entries that fit in one way, got {ways}; pass the right one as names=")
    if not found:
        at, used, features = deepest
        unit = units[at]
        free = [group for name, group in groups.items() if name not in used]
        reasons = []
        for group in free:
            if group.recurrent == unit.recurrent and group.arrays:
                problems, out = [], features
                for index, served in enumerate(units[at : at + group.depth]):
                    problems += _misfits(served, group, index, out, strict)
                    out = None if problems else _out(served, group, index, out)
                reasons.append("; ".join(problems[:3]))
        reasons = [reason for reason in reasons if reason]
        reasons = reasons or [f"left are {_some(sorted(entry for group in free for entry in group.entries))}"]
        raise ValueError(
            f"source: expected entries for {unit.layer!r} ({unit.where}), got none that fit: "
            f"{', or '.join(reasons[:3])}"
        )
    return [(name, index) for name in found[0] for index in range(groups[name].depth)]


def _out(unit: _Unit, group: _Group, index: int, features: int | None) -> int:
    if features is None and isinstance(unit.layer, LayerNorm):
        return group.arrays[""]["weight"].shape[0]
    return unit.layer.out_features(features)


def _stem(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _order(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
