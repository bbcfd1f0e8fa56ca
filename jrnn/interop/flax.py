"""Weights from and to Flax, Linen and NNX: `RNN`, `Bidirectional`, their cells, and `Sequential`.

=======================================  =============================================================================
Flax                                     jrnn
=======================================  =============================================================================
`SimpleCell`                             `jrnn.elman`
`LSTMCell`, `OptimizedLSTMCell`          `jrnn.lstm`; the carry is (c, h) in Flax and (h, c) in jrnn
`GRUCell`                                `jrnn.gru`; NNX's has no bias in the recurrent part of its candidate
`MGUCell(reset_gate=False)` (Linen)      `jrnn.ugrnn`, whose g is Flax's f; with the reset gate it has no counterpart
`RNN(cell)`                              the cell; with `reverse=True, keep_order=True` a reversed layer
`Bidirectional`                          `jrnn.bidirectional`
`Dense`, `Linear`, `Embed`, `Dropout`    `jrnn.dense`, `jrnn.embed`, `jrnn.dropout`
`LayerNorm`, functions                   `jrnn.layer_norm`, `jrnn.activation`
`Sequential`                             `jrnn.stack`
=======================================  =============================================================================

Kernels are `(F, H)` for each gate or `(F, G*H)` for all, as jrnn's are, with the gates in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import activations
from jrnn.cells.base import Layer
from jrnn.cells.elman import Elman, elman
from jrnn.cells.gru import GRU, MGU, UGRNN, ResetBeforeGRU, gru, ugrnn
from jrnn.cells.lstm import LSTM, lstm
from jrnn.compose.combine import _MERGES, Bidirectional, Stack, bidirectional, stack
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
from jrnn.interop._common import checked, is_reversed, named, require, reversed_layer, to_params

__all__ = ["from_flax", "to_flax"]


def from_flax(rnn: Any, variables: Any = None) -> tuple[Layer, Any]:
    """A jrnn model and its parameters from a Flax module, of Linen or NNX.

    The docstring of `jrnn.interop.flax` lists the modules that are converted. A cell without `RNN` is converted too.
    jrnn's data are time-major, ``(T, B, F)``, whatever ``time_major`` of the module is, and `jrnn.unroll` always
    returns the state, whatever ``return_carry`` is.

    Args:
      rnn: a module; for Linen, as it is constructed, without a parent. Modules of `jrnn.flax` are treated as Flax's.
      variables: for Linen, the variables that ``rnn.init`` returned, or their ``"params"``. For NNX, an `nnx.State` to
        use instead of the module's own parameters, or None.

    Returns:
      ``(model, params)``, for ``jrnn.unroll(model, params, xs)``. Parameters are copies in the module's dtype.

    Raises:
      ImportError: Flax is not installed.
      TypeError: another module, or an option that jrnn has not (``residual=True``, ``reset_gate=True``, a carry that
        does not start at zero, ...); the error names it.
      ValueError: variables that do not fit the module.

    >>> import pytest; nn = pytest.importorskip("flax.linen")
    >>> rnn = nn.RNN(nn.LSTMCell(4))
    >>> variables = rnn.init(jax.random.key(0), jnp.ones((2, 5, 3)))
    >>> model, params = jrnn.interop.from_flax(rnn, variables)
    >>> xs = jax.random.normal(jax.random.key(1), (2, 5, 3))
    >>> ys = jrnn.unroll(model, params, xs.swapaxes(0, 1))[1]
    >>> bool(jnp.allclose(ys.swapaxes(0, 1), rnn.apply(variables, xs), atol=1e-6))
    True
    """
    linen, nnx = _flax()
    if isinstance(rnn, nnx.Module):
        if variables is not None:
            rnn = nnx.clone(rnn)
            nnx.update(rnn, variables)
        return _from_nnx(nnx, rnn, "rnn")
    if isinstance(rnn, linen.Module):
        if not isinstance(variables, Mapping):
            raise TypeError(f"variables: expected what rnn.init returned, got {type(variables).__name__}")
        tree = variables.get("params", {} if set(variables) <= {"params"} else variables)
        return _from_linen(linen, rnn, linen.meta.unbox(tree), "rnn")
    raise TypeError(f"rnn: expected a module of flax.linen or flax.nnx, got {type(rnn).__name__}")


def to_flax(model: Layer, params: Any, *, api: Literal["linen", "nnx"] = "linen") -> tuple[Any, Any]:
    """A Flax module and its variables from a jrnn model: the inverse of `from_flax`.

    `jrnn.elman`, `lstm`, `gru` (reset after) and, for Linen, `ugrnn` become an `RNN` of Flax's cell;
    `jrnn.bidirectional`, `dense`, `embed`, `dropout`, `layer_norm`, `activation` and stacks of all these become the
    modules that the docstring of `jrnn.interop.flax` lists.

    Args:
      model: the layer.
      params: its parameters, all in one dtype.
      api: "linen" or "nnx".

    Returns:
      ``(rnn, variables)``: for Linen, a module and ``{"params": …}``, to call as ``rnn.apply(variables, xs)``; for NNX,
      a module that holds its parameters, and these as an `nnx.State`. Both are batch-major, Flax's default.

    Raises:
      ImportError: Flax is not installed.
      TypeError: a layer that Flax has not; the error says which, and what Flax lacks.
      ValueError: parameters that do not fit the model or one another; a bias that NNX's GRU cannot hold.

    >>> import pytest; nn = pytest.importorskip("flax.linen")
    >>> model = jrnn.stack(jrnn.gru(4), jrnn.dense(2))
    >>> rnn, variables = jrnn.interop.to_flax(model, model.init(jax.random.key(0), 3))
    >>> rnn.apply(variables, jnp.ones((2, 5, 3))).shape
    (2, 5, 2)
    """
    linen, nnx = _flax()
    if api not in ("linen", "nnx"):
        raise ValueError(f'api: expected "linen" or "nnx", got {api!r}')
    params = checked(model, params)
    if api == "linen":
        module, tree = _to_linen(linen, model, params, "model")
        return module, {"params": jax.tree.map(jnp.asarray, tree)}
    module = _to_nnx(nnx, model, params, "model")
    return module, nnx.state(module, nnx.Param)


def _flax() -> tuple[Any, Any]:
    remedy = 'install it with pip install "jrnn[flax]"'
    return require("flax.linen", remedy), require("flax.nnx", remedy)


# --- what both have in common


def _is(module: Any, namespace: Any, name: str) -> bool:
    """Whether a module is Flax's of that name, or the one of `jrnn.flax` that stands for it."""
    kind = type(module)
    ours = kind.__module__.startswith("jrnn.flax") and kind.__name__ == name
    return kind is getattr(namespace, name, None) or ours


def _unknown(module: Any, namespace: Any, where: str) -> TypeError:
    got = type(module).__name__
    known = next(
        (base.__name__ for base in type(module).__mro__[1:] if getattr(namespace, base.__name__, None) is base), ""
    )
    if known and known != "Module":
        got += f", a subclass of {known}; what its own methods compute cannot be known from its weights"
    return TypeError(
        f"{where}: expected RNN, Bidirectional, one of Flax's cells, Dense, Embed, Dropout, LayerNorm, a function or "
        f"Sequential of these, got {got}; convert the parts of a larger model one by one"
    )


def _check(module: Any, where: str, **expected: Any) -> None:
    for option, value in expected.items():
        if getattr(module, option, value) != value:
            raise TypeError(
                f"{where}: expected {option}={value!r}, got {getattr(module, option)!r}, which jrnn has not"
            )


def _check_cell(cell: Any, arrays: dict[str, np.ndarray], where: str) -> None:
    _check_dtype(cell, arrays, where)
    start = getattr(cell, "carry_init", None)
    if start is not None and np.asarray(start(jax.random.key(0), (2, 3), jnp.float32)).any():
        raise TypeError(
            f"{where}: expected a carry_init of zeros, got {start!r}; convert the cell without it, and put it into "
            "jrnn.learned_state or give jrnn.unroll a state"
        )


def _check_dtype(module: Any, arrays: dict[str, np.ndarray], where: str) -> None:
    dtype = getattr(module, "dtype", None)
    for array in arrays.values():
        if dtype is not None and jnp.dtype(dtype) != array.dtype:
            raise TypeError(
                f"{where}: expected arithmetic in the parameters' dtype {array.dtype.name}, got "
                f"dtype={jnp.dtype(dtype).name}; for 16-bit products with float32 weights, give jrnn.unroll 16-bit "
                "inputs"
            )


def _functions(cell: Any) -> dict[str, Any]:
    return {"activation": named(cell.activation_fn), "gate_activation": named(cell.gate_fn)}


def _merge(function: Any) -> Any:
    """jrnn's name of a merge, or the function where there is none."""
    if getattr(function, "__name__", "") == "_concatenate" and "flax" in getattr(function, "__module__", ""):
        return "concat"
    names: dict[Any, str] = {jnp.add: "sum", jnp.multiply: "product", **{own: name for name, own in _MERGES.items()}}
    return names.get(function, function)


def _rnn(rnn: Any, cell: tuple[Layer, Any], where: str, direction: bool) -> tuple[Layer, Any]:
    """The cell of an `RNN`; as one direction of two, the module's own direction does not count."""
    if direction or not rnn.reverse:
        return cell
    if not rnn.keep_order:
        raise TypeError(
            f"{where}: expected keep_order=True with reverse=True, got False, which gives outputs in reversed order; "
            "jrnn's stay in input order"
        )
    return reversed_layer(*cell)


def _check_carry(module: Any, where: str) -> None:
    if getattr(module, "return_carry", False):
        raise TypeError(
            f"{where}: expected return_carry=False in Sequential, got True, whose pair the next layer would get"
        )


def _stacked(parts: list[tuple[Layer, Any]], where: str) -> tuple[Layer, Any]:
    if not parts:
        raise TypeError(f"{where}: expected layers in Sequential, got none")
    return stack(*(layer for layer, _ in parts)), tuple(params for _, params in parts)


def _normed(epsilon: Any, scale: Any, shift: Any, where: str) -> tuple[Layer, Any]:
    found = {name: value for name, value in (("scale", scale), ("shift", shift)) if value is not None}
    if not found:
        raise TypeError(
            f"{where}: expected use_scale=True or use_bias=True, got neither: how many features is not known"
        )
    like = next(iter(found.values()))
    return layer_norm(float(epsilon)), to_params(
        {"scale": np.ones_like(like), "shift": np.zeros_like(like), **found}, where
    )


_NORM = {"reduction_axes": -1, "feature_axes": -1, "axis_name": None}


# --- from Linen


def _from_linen(linen: Any, module: Any, tree: Any, where: str, direction: bool = False) -> tuple[Layer, Any]:
    if _is(module, linen, "RNN"):
        cell = _linen_cell(linen, module.cell, _entry(tree, "cell", where), f"{where}.cell")
        return _rnn(module, cell, where, direction)
    if _is(module, linen, "Bidirectional"):
        read = {}
        for name in ("forward", "backward"):
            own, place = getattr(module, f"{name}_rnn"), f"{where}.{name}_rnn"
            if not _is(own, linen, "RNN"):
                raise TypeError(f"{place}: expected RNN, got {type(own).__name__}")
            read[name] = _from_linen(linen, own, _entry(tree, f"{name}_rnn", where), place, True)
        merged = bidirectional(read["forward"][0], read["backward"][0], _merge(module.merge_fn))
        return merged, {name: params for name, (_, params) in read.items()}
    if _is(module, linen, "Sequential"):
        parts = []
        for i, layer in enumerate(module.layers):
            place = f"{where}.layers[{i}]"
            _check_carry(layer, place)
            if isinstance(layer, linen.Module):
                parts.append(_from_linen(linen, layer, tree.get(f"layers_{i}", {}), place))
            else:
                parts.append((activation(named(layer)), {}))
        return _stacked(parts, where)
    if _is(module, linen, "Dropout"):
        _check(module, where, broadcast_dims=())
        return dropout(float(module.rate)), {}
    if _is(module, linen, "Dense"):
        w = _array(tree, "kernel", where)
        b = _array(tree, "bias", where) if module.use_bias else np.zeros_like(w[0])
        _check_dtype(module, {"w": w}, where)
        return dense(module.features), to_params({"w": w, "b": b}, where)
    if _is(module, linen, "Embed"):
        w = _array(tree, "embedding", where)
        _check_dtype(module, {"w": w}, where)
        return embed(module.num_embeddings, module.features), to_params({"w": w}, where)
    if _is(module, linen, "LayerNorm"):
        _check(module, where, **_NORM)
        scale = _array(tree, "scale", where) if module.use_scale else None
        shift = _array(tree, "bias", where) if module.use_bias else None
        return _normed(module.epsilon, scale, shift, where)
    return _linen_cell(linen, module, tree, where)


def _linen_cell(linen: Any, cell: Any, tree: Any, where: str) -> tuple[Layer, Any]:
    def join(names: tuple[str, ...], leaf: str) -> np.ndarray:
        return np.concatenate([_array(_entry(tree, name, where), leaf, f"{where}.{name}") for name in names], axis=-1)

    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    if _is(cell, linen, "LSTMCell") or _is(cell, linen, "OptimizedLSTMCell"):
        model: Layer = lstm(cell.features, **_functions(cell))
        inputs, recurrent = ("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")
        arrays = {"w_ih": join(inputs, "kernel"), "w_hh": join(recurrent, "kernel"), "b": join(recurrent, "bias")}
    elif _is(cell, linen, "GRUCell"):
        model = gru(cell.features, **_functions(cell))
        inputs, recurrent = ("ir", "iz", "in"), ("hr", "hz", "hn")
        arrays = {"w_ih": join(inputs, "kernel"), "w_hh": join(recurrent, "kernel"), "b": join(inputs, "bias")}
        arrays["b_hn"] = join(("hn",), "bias")
    elif _is(cell, linen, "MGUCell"):
        if cell.reset_gate:
            raise TypeError(
                f"{where}: expected reset_gate=False, got True: Flax's cell then computes (1 - f) * n + f * h, "
                "where the "
                "paper's minimal gated unit and jrnn.mgu have (1 - f) * h + f * n, with the same f in the candidate n"
            )
        model = ugrnn(cell.features, **_functions(cell))
        arrays = {
            "w_ih": join(("if", "in"), "kernel"),
            "w_hh": join(("hf", "hn"), "kernel"),
            "b": join(("if", "in"), "bias"),
        }
    elif _is(cell, linen, "SimpleCell"):
        _check_residual(cell, where)
        model = elman(cell.features, named(cell.activation_fn))
        arrays = {"w_ih": join(("i",), "kernel"), "w_hh": join(("h",), "kernel"), "b": join(("i",), "bias")}
    else:
        raise _unknown(cell, linen, where)
    _check_cell(cell, arrays, where)
    return model, to_params(arrays, where)


def _check_residual(cell: Any, where: str) -> None:
    if cell.residual:
        raise TypeError(
            f"{where}: expected residual=False, got True, which adds the old state inside the activation; "
            "jrnn.elman has "
            "none: convert the cell without it and add the identity to w_hh, which is the same but for rounding"
        )


def _entry(tree: Any, name: str, where: str) -> Any:
    if not isinstance(tree, Mapping) or name not in tree:
        got = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
        raise ValueError(f"variables: expected {name!r} for {where}, got {got}")
    return tree[name]


def _array(tree: Any, name: str, where: str) -> np.ndarray:
    return np.asarray(_entry(tree, name, where))


# --- from NNX


def _value(variable: Any) -> np.ndarray:
    return np.asarray(variable[...])


def _from_nnx(nnx: Any, module: Any, where: str, direction: bool = False) -> tuple[Layer, Any]:
    if _is(module, nnx, "RNN"):
        return _rnn(module, _nnx_cell(nnx, module.cell, f"{where}.cell"), where, direction)
    if _is(module, nnx, "Bidirectional"):
        read = {}
        for name in ("forward", "backward"):
            own, place = getattr(module, f"{name}_rnn"), f"{where}.{name}_rnn"
            if not _is(own, nnx, "RNN"):
                raise TypeError(f"{place}: expected RNN, got {type(own).__name__}")
            read[name] = _from_nnx(nnx, own, place, True)
        merged = bidirectional(read["forward"][0], read["backward"][0], _merge(module.merge_fn))
        return merged, {name: params for name, (_, params) in read.items()}
    if _is(module, nnx, "Sequential"):
        parts = []
        for i, layer in enumerate(module.layers):
            place = f"{where}.layers[{i}]"
            _check_carry(layer, place)
            nested = isinstance(layer, nnx.Module)
            parts.append(_from_nnx(nnx, layer, place) if nested else (activation(named(layer)), {}))
        return _stacked(parts, where)
    if _is(module, nnx, "Dropout"):
        _check(module, where, broadcast_dims=())
        return dropout(float(module.rate)), {}
    if _is(module, nnx, "Linear"):
        w = _value(module.kernel)
        b = _value(module.bias) if module.use_bias else np.zeros_like(w[0])
        _check_dtype(module, {"w": w}, where)
        return dense(module.out_features), to_params({"w": w, "b": b}, where)
    if _is(module, nnx, "Embed"):
        w = _value(module.embedding)
        _check_dtype(module, {"w": w}, where)
        return embed(module.num_embeddings, module.features), to_params({"w": w}, where)
    if _is(module, nnx, "LayerNorm"):
        _check(module, where, **_NORM)
        scale = _value(module.scale) if module.use_scale else None
        return _normed(module.epsilon, scale, _value(module.bias) if module.use_bias else None, where)
    return _nnx_cell(nnx, module, where)


def _nnx_cell(nnx: Any, cell: Any, where: str) -> tuple[Layer, Any]:
    if _is(cell, nnx, "LSTMCell"):
        inputs, recurrent = (
            [getattr(cell, n) for n in names] for names in (("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho"))
        )
        arrays = {
            "w_ih": np.concatenate([_value(part.kernel) for part in inputs], -1),
            "w_hh": np.concatenate([_value(part.kernel) for part in recurrent], -1),
            "b": np.concatenate([_value(part.bias) for part in recurrent], -1),
        }
    elif any(_is(cell, nnx, name) for name in ("OptimizedLSTMCell", "GRUCell", "SimpleCell")):
        biased = cell.dense_h if _is(cell, nnx, "OptimizedLSTMCell") else cell.dense_i
        arrays = {"w_ih": _value(cell.dense_i.kernel), "w_hh": _value(cell.dense_h.kernel), "b": _value(biased.bias)}
    else:
        raise _unknown(cell, nnx, where)
    hidden = cell.hidden_features
    if _is(cell, nnx, "SimpleCell"):
        _check_residual(cell, where)
        model: Layer = elman(hidden, named(cell.activation_fn))
    elif _is(cell, nnx, "GRUCell"):
        model = gru(hidden, **_functions(cell))
        arrays["b_hn"] = np.zeros_like(arrays["b"][:hidden])
    else:
        model = lstm(hidden, **_functions(cell))
    _check_cell(cell, arrays, where)
    return model, to_params(arrays, where)


# --- to Linen


def _lacks(model: Any, api: str, where: str) -> TypeError:
    reason = f"flax.{api} has no module with the equations of {type(model).__name__}"
    if isinstance(model, ResetBeforeGRU):
        reason = "Flax's GRUCell applies its reset gate after the product, as jrnn.gru(reset='after') does"
    elif isinstance(model, MGU):
        reason = "Flax's MGUCell keeps what the paper's, and jrnn's, replaces: (1 - f) * n + f * h"
    return TypeError(
        f"{where}: expected a layer that Flax has too, got {model!r}; {reason} (see jrnn.interop.to_flax for what "
        "can be "
        "converted)"
    )


def _merge_options(model: Any) -> dict[str, Any]:
    if model.merge == "concat":
        return {}
    return {"merge_fn": {"sum": jnp.add, "product": jnp.multiply}.get(model.merge, model.merged)}


def _cell_options(model: Any) -> dict[str, Any]:
    options = {"activation_fn": activations.resolve(model.activation)}
    if hasattr(model, "gate_activation"):
        options["gate_fn"] = activations.resolve(model.gate_activation)
    return options


def _to_linen(linen: Any, model: Any, params: Any, where: str) -> tuple[Any, Any]:
    if isinstance(model, Stack):
        pairs = zip(model.layers, params, strict=True)
        parts = [_to_linen(linen, layer, own, f"{where}.layers[{i}]") for i, (layer, own) in enumerate(pairs)]
        return linen.Sequential([module for module, _ in parts]), {
            f"layers_{i}": tree for i, (_, tree) in enumerate(parts) if tree
        }
    if is_reversed(model):
        cell, tree = _linen_from(linen, model.backward, params["backward"], where)
        return linen.RNN(cell, reverse=True, keep_order=True), {"cell": tree}
    if isinstance(model, Bidirectional):
        forward, first = _linen_from(linen, model.forward, params["forward"], f"{where}.forward")
        backward, second = _linen_from(linen, model.backward, params["backward"], f"{where}.backward")
        module = linen.Bidirectional(linen.RNN(forward), linen.RNN(backward), **_merge_options(model))
        return module, {"forward_rnn": {"cell": first}, "backward_rnn": {"cell": second}}
    if isinstance(model, Dropout):
        return linen.Dropout(model.rate, deterministic=True), {}
    if isinstance(model, Activate):
        return activations.resolve(model.function), {}
    dtype = {"param_dtype": jax.tree.leaves(params)[0].dtype}
    if isinstance(model, Dense):
        return linen.Dense(model.features, **dtype), {"kernel": params["w"], "bias": params["b"]}
    if isinstance(model, Embed):
        return linen.Embed(model.vocab, model.features, **dtype), {"embedding": params["w"]}
    if isinstance(model, LayerNorm):
        return linen.LayerNorm(model.epsilon, **dtype), {"scale": params["scale"], "bias": params["shift"]}
    cell, tree = _linen_from(linen, model, params, where)
    return linen.RNN(cell), {"cell": tree}


def _linen_from(linen: Any, model: Any, params: Any, where: str) -> tuple[Any, Any]:
    if type(model) not in (Elman, LSTM, GRU, UGRNN):
        raise _lacks(model, "linen", where)
    gates = len(model.gate_names)
    inputs, recurrent = (np.split(params[name], gates, -1) for name in ("w_ih", "w_hh"))
    biases = np.split(params["b"], gates, -1)
    names = {Elman: ("",), LSTM: ("i", "f", "g", "o"), GRU: ("r", "z", "n"), UGRNN: ("f", "n")}[type(model)]
    tree: dict[str, dict[str, Any]] = {f"i{name}": {"kernel": w} for name, w in zip(names, inputs, strict=True)}
    tree |= {f"h{name}": {"kernel": w} for name, w in zip(names, recurrent, strict=True)}
    for name, b in zip(names, biases, strict=True):
        tree[f"{'h' if type(model) is LSTM else 'i'}{name}"]["bias"] = b
    if "b_hn" in params:
        tree["hn"]["bias"] = params["b_hn"]
    kind = {Elman: "SimpleCell", LSTM: "OptimizedLSTMCell", GRU: "GRUCell", UGRNN: "MGUCell"}[type(model)]
    options = {"reset_gate": False} if type(model) is UGRNN else {}
    return getattr(linen, kind)(model.hidden, param_dtype=params["b"].dtype, **options, **_cell_options(model)), tree


# --- to NNX


def _to_nnx(nnx: Any, model: Any, params: Any, where: str) -> Any:
    if isinstance(model, Stack):
        pairs = zip(model.layers, params, strict=True)
        return nnx.Sequential(
            *(_to_nnx(nnx, layer, own, f"{where}.layers[{i}]") for i, (layer, own) in enumerate(pairs))
        )
    if is_reversed(model):
        return nnx.RNN(_nnx_from(nnx, model.backward, params["backward"], where), reverse=True, keep_order=True)
    if isinstance(model, Bidirectional):
        forward = nnx.RNN(_nnx_from(nnx, model.forward, params["forward"], f"{where}.forward"))
        backward = nnx.RNN(_nnx_from(nnx, model.backward, params["backward"], f"{where}.backward"))
        return nnx.Bidirectional(forward, backward, **_merge_options(model))
    if isinstance(model, Dropout):
        return nnx.Dropout(model.rate, deterministic=True, rngs=nnx.Rngs(0))
    if isinstance(model, Activate):
        return activations.resolve(model.function)
    if isinstance(model, Dense | Embed | LayerNorm):
        like = {"rngs": nnx.Rngs(0), "param_dtype": next(iter(params.values())).dtype}
        if isinstance(model, Dense):
            return _set(nnx, nnx.Linear(*params["w"].shape, **like), kernel=params["w"], bias=params["b"])
        if isinstance(model, Embed):
            return _set(nnx, nnx.Embed(model.vocab, model.features, **like), embedding=params["w"])
        module = nnx.LayerNorm(*params["scale"].shape, epsilon=model.epsilon, **like)
        return _set(nnx, module, scale=params["scale"], bias=params["shift"])
    return nnx.RNN(_nnx_from(nnx, model, params, where))


def _nnx_from(nnx: Any, model: Any, params: Any, where: str) -> Any:
    kinds = {Elman: "SimpleCell", LSTM: "OptimizedLSTMCell", GRU: "GRUCell"}
    if type(model) not in kinds:
        raise _lacks(model, "nnx", where)
    if "b_hn" in params and params["b_hn"].any():
        raise ValueError(
            f"{where}: expected b_hn=0, got another; flax.nnx.GRUCell has no bias in the recurrent part of its "
            "candidate: "
            'convert with api="linen", whose GRUCell has one'
        )
    dtype = params["b"].dtype
    options = {**_cell_options(model), "param_dtype": dtype, "dtype": dtype, "rngs": nnx.Rngs(0)}
    cell = getattr(nnx, kinds[type(model)])(params["w_ih"].shape[0], model.hidden, **options)
    _set(nnx, cell.dense_i, kernel=params["w_ih"])
    _set(nnx, cell.dense_h, kernel=params["w_hh"])
    _set(nnx, cell.dense_h if type(model) is LSTM else cell.dense_i, bias=params["b"])
    return cell


def _set(nnx: Any, module: Any, **arrays: np.ndarray) -> Any:
    for name, array in arrays.items():
        setattr(module, name, nnx.Param(jnp.asarray(array)))
    return module
