"""Checks that several modules share. Each raises before anything is traced, and names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tracer = jax.core.Tracer


def is_traced(value: Any) -> bool:
    """Whether any array in a value, which may be a pytree, is a tracer (inside jit, grad or vmap)."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def readable(*values: Any) -> bool:
    """Whether the host can read values without waiting, to check them.

    A traced array has no values. Reading an array on an accelerator would wait for all computations that are queued
    there. An array on several hosts is not complete on any of them.
    """
    return all(map(_readable, jax.tree.leaves(values)))


def _readable(leaf: Any) -> bool:
    if is_traced(leaf):
        return False
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def positive_int(value: Any, argument: str) -> None:
    _int(value, argument, 1, "a positive int")


def non_negative_int(value: Any, argument: str) -> None:
    _int(value, argument, 0, "a non-negative int")


def _int(value: Any, argument: str, least: int, expected: str) -> None:
    if getattr(value, "shape", ()):
        raise TypeError(
            f"{argument}: expected {expected}, got an array of shape {value.shape}; pass one of its sizes, such as "
            "x.shape[-1] for the features of x"
        )
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected {expected}, got {value!r}")
    if value < least:
        raise ValueError(f"{argument}: expected {expected}, got {value}")


def prng_key(key: Any, argument: str = "key") -> None:
    """Checks for one PRNG key: a typed key, or the 32-bit words of a raw key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == jnp.uint32 and shape is not None and len(shape) == 1):
        raise TypeError(f"{argument}: expected one PRNG key, as from jax.random.key(0), got {brief(key)}")


def brief(value: Any) -> str:
    """A one-line description of a value for error messages, without the contents of containers and arrays."""
    if isinstance(value, str | int | float | complex | type | None) or callable(value):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return describe(value)
    return f"a {type(value).__name__}"


def batch_axes(batch_shape: Any) -> tuple[Any, ...]:
    """The batch shape of a state, as a tuple. Raises for a number, which is an easy mistake."""
    if not isinstance(batch_shape, tuple | list):
        remedy = f"({batch_shape},)" if isinstance(batch_shape, int) else "(4,)"
        raise TypeError(
            f"batch_shape: expected a tuple of ints, got {batch_shape!r}; pass {remedy} for one batch axis of that "
            "size and () for a single sequence"
        )
    return tuple(batch_shape)


def rate(value: Any, argument: str) -> None:
    """Checks for a dropout rate. A rate of 1 would drop everything and divide by zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: expected a float in [0, 1), got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{argument}: expected a rate in [0, 1), got {value}")


def finite(value: Any, argument: str, *, above: float | None = None, least: float | None = None) -> None:
    """Checks for a finite number, ``above`` a bound or of at ``least`` a bound if one is given."""
    bound = "" if above is None and least is None else f" above {above}" if least is None else f" of at least {least}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: expected a finite float{bound}, got {value!r}")
    inside = (above is None or value > above) and (least is None or value >= least)
    if not (math.isfinite(value) and inside):
        raise ValueError(f"{argument}: expected a finite float{bound}, got {value}")


def divides(count: Any, whole: int, argument: str, of: str) -> None:
    """Checks for a positive int that divides ``whole``, the size of ``of``."""
    positive_int(count, argument)
    if whole % count:
        raise ValueError(
            f"{argument}: expected a number that divides {of}={whole}, got {count}; each gets {of} / {argument} units"
        )


def epsilon(value: Any) -> None:
    """Checks for a positive number, which is added to a variance so that its square root is not zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"epsilon: expected a positive float, got {value!r}")
    if not value > 0.0:
        raise ValueError(f"epsilon: expected a positive float, got {value}")


def module_level(function: Any, argument: str, names: list[str]) -> Callable[..., Any]:
    """Checks for a function that compares equal across two equal calls: not a lambda, not a closure."""
    if not callable(function):
        raise TypeError(f"{argument}: expected one of {names} or a module-level function, got {function!r}")
    qualname = getattr(function, "__qualname__", "")
    if "<lambda>" in qualname or "<locals>" in qualname:
        raise ValueError(
            f"{argument}: expected one of {names} or a module-level function, got {qualname}. A lambda or a local "
            "function compares by identity, so two equal cells would differ and jit would compile twice: define "
            "it at the top of a module, or as a frozen dataclass with __call__"
        )
    return function


def as_tree(params: Any) -> Any:
    """Parameters as a pytree. A mapping that is not a node to JAX, such as `MappingProxyType`, becomes a dict."""
    return jax.tree.map(lambda leaf: as_tree(dict(leaf)) if isinstance(leaf, Mapping) else leaf, params)


def describe(tree: Any) -> str:
    """Shapes and dtypes of a pytree, for messages: ``LSTMState(h=float32[2,3], c=float32[2,3])``."""

    def leaf(x: Any) -> Any:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return _Text(f"{x.dtype}[{','.join(map(str, x.shape))}]")
        return _Text(type(x).__name__)

    return repr(jax.tree.map(leaf, tree))


def same_form(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure, shapes and dtypes."""
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    if structures[0] != structures[1]:
        return False
    return all(
        jnp.shape(x) == jnp.shape(y) and jnp.result_type(x) == jnp.result_type(y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


class _Text(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
