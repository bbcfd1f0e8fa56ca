"""Layers as plain data that JSON can hold, and back.

A layer is a frozen dataclass, so its class and its fields are all of it. Classes are known by name:

- jrnn's own as ``jrnn.`` and the name of the class, wherever in the package it is defined,
- others by module and name, ``package.module.MyCell``; whoever loads such a file gives the classes.

Fields are None, numbers, strings, tuples, layers, functions known by name, and frozen dataclasses that are functions
(initialisers). Nothing else is written, and nothing that a file names is imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jrnn.cells
import jrnn.compose
from jrnn.cells.base import Layer

__all__ = ["decode", "encode", "known_layers", "named"]

# Elementwise functions, of one array or two, that may be an activation or merge two directions.
_NUMPY = (
    "abs", "add", "arcsinh", "arctan", "cos", "exp", "expm1", "log1p", "logaddexp", "maximum", "minimum", "multiply",
    "negative", "sign", "sin", "sinh", "square", "subtract", "tanh",
)  # fmt: skip
# Modules of jrnn whose functions and initialisers fields may hold.
_PLACES = ("jrnn.activations", "jrnn.initializers", "jrnn.cells.", "jrnn.compose.")
_FIELDS = "None, a number, a string, a layer, a module-level function, a frozen dataclass that is called, or a tuple"


def path_of(value: Any) -> str:
    """The name of a user's class or function: its module and its qualified name."""
    return f"{value.__module__}.{value.__qualname__}"


def known_layers() -> dict[str, type[Layer]]:
    """jrnn's layers by name: the classes of layers that its modules hold.

    >>> known_layers()["jrnn.LSTM"] is type(jrnn.lstm(4))
    True
    """
    for package in (jrnn.cells, jrnn.compose):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found: dict[str, type[Layer]] = {}
    pending: list[type[Layer]] = [Layer]
    while pending:
        layer = pending.pop()
        pending.extend(layer.__subclasses__())
        if layer.__module__.partition(".")[0] == "jrnn" and _holds(layer.__module__, layer):
            found[f"jrnn.{layer.__name__}"] = layer
    return found


def _holds(module: str, value: Any) -> bool:
    return getattr(sys.modules.get(module), getattr(value, "__name__", ""), None) is value


def _known_functions() -> dict[str, Any]:
    known = {f"jax.numpy.{name}": getattr(jnp, name) for name in _NUMPY if hasattr(jnp, name)}
    for name, value in vars(jax.nn).items():
        if callable(value) and not name.startswith("_") and not inspect.isclass(value):
            known[f"jax.nn.{name}"] = value
    return known


def _in_jrnn(value: Any) -> bool:
    """Whether a function or class is one of jrnn's that a field may hold."""
    module = getattr(value, "__module__", None) or ""
    return module.startswith(_PLACES) and _holds(module, value)


def _from_jrnn(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    value = getattr(sys.modules.get(module), attribute, None) if module.startswith(_PLACES) else None
    return value if value is not None and _in_jrnn(value) else None


# --- to data -----------------------------------------------------------------------------------------------------


def encode(model: Layer) -> dict[str, Any]:
    """A layer as plain data; a TypeError that names the field which is none."""
    return _encode(model, "model", {})


def _encode(value: Any, where: str, classes: dict[str, Any]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if type(value) is tuple:
        return [_encode(entry, f"{where}[{i}]", classes) for i, entry in enumerate(value)]
    if isinstance(value, Layer):
        return {"layer": _name(value, where, classes, known_layers()), "fields": _fields(value, where, classes)}
    if callable(value) and not inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            return {"value": _name(value, where, classes, {}), "fields": _fields(value, where, classes)}
        return {"function": _function(value, where, classes)}
    raise TypeError(
        f"{where}: expected {_FIELDS}, which a file can hold as text, got {value!r}; keep arrays in the parameters, "
        "and numbers as Python numbers"
    )


def _fields(value: Any, where: str, classes: dict[str, Any]) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        raise TypeError(
            f"{where}: expected a frozen dataclass, whose fields are all that there is to it, got {value!r}, an "
            f"instance of {path_of(type(value))}; write @dataclasses.dataclass(frozen=True) above the class"
        )
    return {
        field.name: _encode(getattr(value, field.name), f"{where}.{field.name}", classes)
        for field in dataclasses.fields(value)
        if field.init
    }


def _name(value: Any, where: str, classes: dict[str, Any], known: Mapping[str, Any]) -> str:
    """The name of the class of a value, by which it is found again."""
    own = type(value)
    name = f"jrnn.{own.__name__}"
    return name if known.get(name) is own else _checked(own, where, classes)


def _checked(value: Any, where: str, classes: dict[str, Any]) -> str:
    """A path that means one thing in all of a file."""
    name = path_of(value)
    if classes.setdefault(name, value) is not value:
        raise TypeError(f"{where}: expected one class or function called {name}, got two; give them different names")
    return name


def _function(value: Any, where: str, classes: dict[str, Any]) -> str:
    for name, known in _known_functions().items():
        if known is value:
            return name
    if "<" in getattr(value, "__qualname__", "<none>"):
        raise TypeError(f"{where}: expected a module-level function, got {value!r}; define it at the top of a module")
    return _checked(value, where, classes)


# --- and back ----------------------------------------------------------------------------------------------------


def named(layers: Any) -> dict[str, Any]:
    """Users' classes and functions, by the names that files have for them."""
    if isinstance(layers, Mapping):
        found = dict(layers)
    elif isinstance(layers, Iterable) and not isinstance(layers, str):
        found = {}
        for value in layers:
            if not hasattr(value, "__qualname__"):
                raise TypeError(f"layers: expected classes and functions, got {value!r}; give the class of a layer")
            found[path_of(value)] = value
    else:
        raise TypeError(f"layers: expected a list of classes and functions, or a mapping from names, got {layers!r}")
    for name, value in found.items():
        if not isinstance(name, str) or not callable(value) or isinstance(value, Layer):
            raise TypeError(f"layers: expected names of classes and functions, got {name!r}: {value!r}")
    return found


def decode(data: Any, own: Mapping[str, Any]) -> Layer:
    """A layer from plain data; a ValueError that names what is unknown, or does not fit."""
    model = _decode(data, "model", own)
    if not isinstance(model, Layer):
        raise ValueError(f"model: expected a layer, got {model!r}")
    return model


def _decode(data: Any, where: str, own: Mapping[str, Any]) -> Any:
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return tuple(_decode(entry, f"{where}[{i}]", own) for i, entry in enumerate(data))
    kind = next(iter(data), None)
    if set(data) == {"float"} and data["float"] in ("inf", "-inf", "nan"):
        return float(data["float"])
    if set(data) == {"function"} and isinstance(data["function"], str):
        return _find(data["function"], where, "function", own)
    if kind in ("layer", "value") and set(data) == {kind, "fields"}:
        name, fields = data[kind], data["fields"]
        if isinstance(name, str) and isinstance(fields, dict):
            return _made(_find(name, where, kind, own), fields, where, own)
    raise ValueError(f"{where}: expected a description of a layer or of a field, got {data!r}")


def _find(name: str, where: str, kind: str, own: Mapping[str, Any]) -> Any:
    if name in own:
        found = own[name]
    elif kind == "layer":
        found = known_layers().get(name)
    elif kind == "function" and name.startswith("jax."):
        found = _known_functions().get(name)
    else:
        found = _from_jrnn(name)
    is_fit = {
        "layer": lambda: inspect.isclass(found) and issubclass(found, Layer) and dataclasses.is_dataclass(found),
        "value": lambda: inspect.isclass(found) and dataclasses.is_dataclass(found) and not issubclass(found, Layer),
        "function": lambda: callable(found) and not inspect.isclass(found),
    }[kind]()
    if not is_fit:
        short = name.rpartition(".")[2]
        what = {"layer": "layer", "value": "initialiser", "function": "function"}[kind]
        got = "it is not among jrnn's" if found is None else f"got {found!r}"
        raise ValueError(
            f"{where}: unknown {what} {name!r}: {got}; if it is your own, give it, as in "
            f'jrnn.load(path, layers=[{short}]), or under the name that the file has, layers={{"{name}": {short}}}; if '
            "not, the file is of a newer jrnn"
        )
    return found


def _made(found: Any, data: dict[str, Any], where: str, own: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(found) if field.init}
    for name in data:
        if name not in fields:
            raise ValueError(
                f"{where}: expected the fields {', '.join(fields)} of {path_of(found)}, got {name!r}; the file is of "
                "another version of that class"
            )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ValueError(f"{where}: expected the field {name!r} of {path_of(found)}, which the file lacks")
    values = {name: _decode(value, f"{where}.{name}", own) for name, value in data.items()}
    try:
        return found(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {path_of(found)} does not take the fields in the file: {error}") from error
