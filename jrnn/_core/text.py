"""Values as Python expressions, for the ``repr`` of layers."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["call", "field_arguments", "written"]

_PUBLIC = {"jrnn.initializers": "initializers.", "jrnn.activations": "activations."}


def written(value: Any) -> str:
    """A value as an expression. Functions are given by name, and jrnn's own values by their names in jrnn."""
    if isinstance(value, tuple) and type(value) is tuple:
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{_PUBLIC.get(getattr(value, '__module__', ''), '')}{value.__qualname__}"
    return f"{_PUBLIC.get(type(value).__module__, '')}{value!r}"


def call(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """``name(*arguments, **options)`` as an expression."""
    parts = [*map(written, arguments), *(f"{key}={written(value)}" for key, value in options.items())]
    return f"{name}({', '.join(parts)})"


def field_arguments(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The fields of a dataclass as arguments of its constructor, without those that equal their defaults."""
    arguments: list[Any] = []
    options: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        given, default = getattr(value, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not field.init or (default is not dataclasses.MISSING and given == default):
            continue
        if default is dataclasses.MISSING and not field.kw_only and not options:
            arguments.append(given)
        else:
            options[field.name] = given
    return tuple(arguments), options
