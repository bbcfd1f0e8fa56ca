"""Weights from and to Haiku, whose modules are known by their class's name and their entries in `params`.

==============================  ======================================================================================
Haiku                           jrnn
==============================  ======================================================================================
`VanillaRNN`                    `jrnn.elman(hidden, "relu")`; its two biases are summed
`LSTM`, gates i, g, f, o        `jrnn.lstm`, gates i, f, g, o; one weight for `[x, h]` is `w_ih` above `w_hh`, and the 1
                                that Haiku adds to the forget gate is added to `b`
`GRU`, gates z, r, a            `jrnn.gru(hidden, "before")`, gates r, z, n; Haiku's z is `1 - z`, so its signs change
`Linear`, `Embed`, `LayerNorm`  `jrnn.dense`, `jrnn.embed`, `jrnn.layer_norm`
==============================  ======================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jrnn import activations
from jrnn._core.checks import describe
from jrnn.cells.base import Layer
from jrnn.cells.elman import Elman, elman
from jrnn.cells.gru import GRU, ResetBeforeGRU, gru
from jrnn.cells.lstm import LSTM, lstm
from jrnn.compose.combine import Stack, stack
from jrnn.compose.timewise import Dense, Embed, LayerNorm, dense, embed, layer_norm
from jrnn.interop._common import checked, leaves, reorder, to_params, total

__all__ = ["from_haiku", "to_haiku"]

# The name under which Haiku keeps a module, and which entries it has below it.
_ENTRIES = {
    "VanillaRNN": ("vanilla_rnn", ("linear", "linear_1")),
    "LSTM": ("lstm", ("linear",)),
    "GRU": ("gru", ("",)),
    "Linear": ("linear", ("",)),
    "Embed": ("embed", ("",)),
    "LayerNorm": ("layer_norm", ("",)),
}
_LSTM_ORDER = (0, 2, 1, 3)  # i, g, f, o and i, f, g, o: the same order turns one into the other and back
_GRU_ORDER = (1, 0, 2)


def from_haiku(class_name: str | Sequence[str], params: Mapping[str, Mapping[str, Any]]) -> tuple[Layer, Any]:
    """A jrnn model and its parameters from Haiku's parameters, without Haiku.

    Haiku's modules exist only while a function is transformed, so the parameters that ``transformed.init`` returned are
    converted. Haiku numbers the names of several modules of one class in the order of their creation (``lstm``,
    ``lstm_1``), which becomes the order in the stack. `LayerNorm` is assumed to have Haiku's default ``eps`` of 1e-5.
    The docstring of `jrnn.interop.haiku` says how the parameters of each class are mapped.

    Args:
      class_name: "VanillaRNN", "LSTM", "GRU", "Linear", "Embed" or "LayerNorm"; or several of these, for a `jrnn.stack`
        (an `hk.DeepRNN`, say).
      params: Haiku's parameters of these modules and of no others.

    Returns:
      ``(model, params)``, for ``jrnn.unroll(model, params, xs)``. The forget gate's bias of an LSTM is rounded once,
      where 1 is added; all else is exact.

    Raises:
      TypeError: another class.
      ValueError: entries that are missing, left over, or of another shape, by name; a dtype that jrnn has not.

    >>> params = {"gru": {"w_i": np.ones((3, 12)), "w_h": np.ones((4, 12)), "b": np.zeros(12)}}
    >>> params = jax.tree.map(np.float32, params)
    >>> model, params = jrnn.interop.from_haiku("GRU", params)
    >>> model == jrnn.gru(4, "before")
    True
    """
    names = [class_name] if isinstance(class_name, str) else list(class_name)
    if not isinstance(params, Mapping) or not all(isinstance(entry, Mapping) for entry in params.values()):
        raise ValueError(
            "params: expected Haiku's parameters, a dict of dicts of arrays by the modules' names, got "
            f"{describe(params)}; pass what the init of the transformed function returned"
        )
    left = {path: {n: np.asarray(a) for n, a in entry.items()} for path, entry in params.items() if entry}
    layers: list[tuple[Layer, Any]] = [None] * len(names)  # type: ignore[list-item]
    # Cells first: the "linear" of an LSTM is no Linear.
    for i in sorted(range(len(names)), key=lambda i: names[i] in ("Linear", "Embed", "LayerNorm")):
        if names[i] not in _ENTRIES:
            raise TypeError(f"class_name: expected one or several of {sorted(_ENTRIES)}, got {names[i]!r}")
        layers[i] = _read(names[i], left)
    if left:
        raise ValueError(f"params: expected the entries of {names} only, got {sorted(left)} besides")
    if isinstance(class_name, str):
        return layers[0]
    if not layers:
        raise ValueError("class_name: expected at least one class, got none")
    return stack(*(layer for layer, _ in layers)), tuple(own for _, own in layers)


def to_haiku(model: Layer, params: Any) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """Haiku's parameters from a jrnn model, without Haiku: the inverse of `from_haiku`.

    These layers are converted: `jrnn.elman` with relu, `lstm`, `gru` with reset "before", `dense`, `embed`,
    `layer_norm` (with Haiku's epsilon of 1e-5), and stacks of these.

    Args:
      model: the layer.
      params: its parameters, all in one dtype.

    Returns:
      ``(class_name, params)``: the class, or a tuple of classes for a stack, and the parameters for
      ``transformed.apply`` of a function that creates the modules in this order, at its top level.

    Raises:
      TypeError: a layer that Haiku has not; the error says which, and what Haiku lacks.
      ValueError: parameters that do not fit the model or one another.

    >>> cell = jrnn.lstm(4)
    >>> name, params = jrnn.interop.to_haiku(cell, cell.init(jax.random.key(0), 3))
    >>> name, {path: sorted(entry) for path, entry in params.items()}
    ('LSTM', {'lstm/linear': ['b', 'w']})
    """
    params = checked(model, params)
    names: list[str] = []
    tree: dict[str, dict[str, np.ndarray]] = {}
    for where, layer, own in leaves(model, params):
        name, entries = _write(layer, own, where)
        base, _ = _ENTRIES[name]
        count = names.count(name)
        names.append(name)
        for below, arrays in entries.items():
            path = "/".join(filter(None, [base if not count else f"{base}_{count}", below]))
            tree[path] = {leaf: np.array(array, order="C") for leaf, array in arrays.items()}
    return (tuple(names) if isinstance(model, Stack) else names[0]), tree


def _read(name: str, left: dict[str, dict[str, np.ndarray]]) -> tuple[Layer, Any]:
    """The first module of a class among the entries that are left, which it takes out."""
    base, below = _ENTRIES[name]
    pattern = re.compile(rf"(?:.*/)?{base}(?:_(\d+))?" + (f"/{below[0]}" if below[0] else ""))
    found = {path: int(match[1] or 0) for path in left if (match := pattern.fullmatch(path))}
    if not found:
        raise ValueError(f"params: expected an entry {'/'.join(filter(None, [base, below[0]]))!r}, got {sorted(left)}")
    first = min(found, key=lambda path: found[path])
    if sum(number == found[first] for number in found.values()) > 1:
        raise ValueError(
            f"params: expected one module {base!r} of a number, got {sorted(found)}; convert them one by one"
        )
    root = first.removesuffix(below[0])
    arrays = {entry: left.pop(root + entry) for entry in below if root + entry in left}
    where = f"params[{first!r}]"
    if name == "VanillaRNN":
        one, two = arrays["linear"], arrays.get("linear_1", {})
        w, r = _leaf(one, "w", where), _leaf(two, "w", f"params[{root + 'linear_1'!r}]")
        own = {"w_ih": w, "w_hh": r, "b": total(*(entry["b"] for entry in (one, two) if "b" in entry))}
        return _fit(elman(w.shape[1], "relu"), own, where)
    entry = arrays[below[0]]
    if name == "LSTM":
        w, b = _leaf(entry, "w", where), _leaf(entry, "b", where)
        hidden = w.shape[1] // 4
        b = reorder(b, _LSTM_ORDER)
        b = np.concatenate([b[:hidden], b[hidden : 2 * hidden] + b.dtype.type(1), b[2 * hidden :]])
        w = reorder(w, _LSTM_ORDER)
        return _fit(lstm(hidden), {"w_ih": w[:-hidden], "w_hh": w[-hidden:], "b": b}, where)
    if name == "GRU":
        own = {
            ours: reorder(_leaf(entry, n, where), _GRU_ORDER, (1,))
            for ours, n in (("w_ih", "w_i"), ("w_hh", "w_h"), ("b", "b"))
        }
        return _fit(gru(own["w_hh"].shape[0], "before"), own, where)
    if name == "Linear":
        w = _leaf(entry, "w", where)
        return _fit(dense(w.shape[1]), {"w": w, "b": entry.get("b", np.zeros_like(w[0]))}, where)
    if name == "Embed":
        w = _leaf(entry, "embeddings", where)
        return _fit(embed(*map(int, w.shape)), {"w": w}, where)
    scale = entry.get("scale", np.ones_like(entry.get("offset", np.ones(()))))
    return _fit(layer_norm(), {"scale": scale, "shift": entry.get("offset", np.zeros_like(scale))}, where)


def _leaf(entry: Mapping[str, np.ndarray], name: str, where: str) -> np.ndarray:
    if name not in entry:
        raise ValueError(f"{where}: expected {name!r}, got {sorted(entry)}")
    return entry[name]


def _fit(layer: Layer, arrays: dict[str, np.ndarray], where: str) -> tuple[Layer, Any]:
    try:
        checked(layer, arrays)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return layer, to_params(arrays, where)


def _write(layer: Any, own: Any, where: str) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    if type(layer) is Elman and activations.resolve(layer.activation) is activations.resolve("relu"):
        return "VanillaRNN", {
            "linear": {"w": own["w_ih"], "b": own["b"]},
            "linear_1": {"w": own["w_hh"], "b": np.zeros_like(own["b"])},
        }
    usual = (getattr(layer, "activation", ""), getattr(layer, "gate_activation", "")) == ("tanh", "sigmoid")
    if type(layer) is LSTM and usual:
        hidden, b = layer.hidden, own["b"]
        b = np.concatenate([b[:hidden], b[hidden : 2 * hidden] - b.dtype.type(1), b[2 * hidden :]])
        w = np.concatenate([own["w_ih"], own["w_hh"]])
        return "LSTM", {"linear": {"w": reorder(w, _LSTM_ORDER), "b": reorder(b, _LSTM_ORDER)}}
    if type(layer) is ResetBeforeGRU and usual:
        names = {"w_i": "w_ih", "w_h": "w_hh", "b": "b"}
        return "GRU", {"": {name: reorder(own[ours], _GRU_ORDER, (0,)) for name, ours in names.items()}}
    if isinstance(layer, Dense):
        return "Linear", {"": {"w": own["w"], "b": own["b"]}}
    if isinstance(layer, Embed):
        return "Embed", {"": {"embeddings": own["w"]}}
    if isinstance(layer, LayerNorm) and layer.epsilon == 1e-5:
        return "LayerNorm", {"": {"scale": own["scale"], "offset": own["shift"]}}
    reason = f"Haiku has no module with the equations of {type(layer).__name__}"
    if type(layer) is GRU:
        reason = "Haiku's GRU applies its reset gate before the product, as jrnn.gru(reset='before') does"
    elif type(layer) is Elman:
        reason = "Haiku's VanillaRNN has relu only"
    elif type(layer) in (LSTM, ResetBeforeGRU):
        reason = "Haiku's cells have tanh and sigmoid only"
    elif isinstance(layer, LayerNorm):
        reason = "an epsilon other than Haiku's default of 1e-5 is no parameter"
    raise TypeError(
        f"{where}: expected a layer that Haiku has too, got {layer!r}; {reason} (see jrnn.interop.to_haiku for "
        "what can be "
        "converted)"
    )
