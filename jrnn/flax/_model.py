"""What both `Recurrent` modules share: parameters and states as Flax has them, and a call that is batch-major."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import describe
from jrnn.cells.base import Layer
from jrnn.flax._loop import check_lengths
from jrnn.run.unrolling import unroll

__all__ = ["as_dicts", "check_layer", "from_dicts", "in_features", "run"]


def check_layer(model: Any) -> None:
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a jrnn layer, such as jrnn.lstm(128) or a stack, got {model!r}")


def as_dicts(tree: Any) -> Any:
    """A tree with dicts in the place of its tuples, as variables of Flax are: by number, or by the names of fields."""
    if isinstance(tree, Mapping):
        return {name: as_dicts(value) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return {name: as_dicts(value) for name, value in zip(_names(tree), tree, strict=True)}
    return tree


def from_dicts(tree: Any, like: Any, name: str) -> Any:
    """The tree that `as_dicts` was given, which has the structure of ``like``."""
    if not isinstance(like, Mapping | tuple):
        return tree
    if isinstance(tree, tuple) and isinstance(like, tuple):
        tree = dict(zip(_names(like), tree, strict=False))
    names = list(like) if isinstance(like, Mapping) else _names(like)
    if not isinstance(tree, Mapping) or set(tree) != set(names):
        got = sorted(tree) if isinstance(tree, Mapping) else describe(tree)
        raise ValueError(f"{name}: expected entries {sorted(names)}, got {got}; make them with the module's init")
    values = like.values() if isinstance(like, Mapping) else like
    made = {n: from_dicts(tree[n], value, f"{name}.{n}") for n, value in zip(names, values, strict=True)}
    if isinstance(like, Mapping):
        return made
    return type(like)(*made.values()) if hasattr(like, "_fields") else tuple(made.values())


def _names(tree: tuple[Any, ...]) -> list[str]:
    return list(getattr(tree, "_fields", map(str, range(len(tree)))))


def in_features(model: Layer, xs: Any) -> Any:
    """What ``model.init`` wants to know of its inputs: features, a shape, or None for ids."""
    shape = xs.shape[xs.ndim - model.event_ndim :]
    return shape if len(shape) > 1 else shape[0] if shape else None


def run(
    model: Layer,
    params: Any,
    xs: Any,
    state: Any,
    *,
    lengths: Any,
    mask: Any,
    resets: Any,
    key: Any,
    time_major: bool,
    reverse: bool,
    backend: str | None,
    remat: int | str | None,
) -> tuple[Any, Any]:
    """`jrnn.unroll` of sequences ``(*B, T, *features)``, or ``(T, *B, *features)`` where they are time-major."""
    time_axis = 0 if time_major else xs.ndim - model.event_ndim - 1
    if time_axis < 0:
        raise ValueError(
            f"xs: expected (*B, T, F) for {model!r}, got shape {xs.shape}; give a sequence its time axis, and a "
            "univariate one its axis of one feature with xs[..., None]"
        )
    sequence = xs.shape[: xs.ndim - model.event_ndim]

    def flags(name: str, value: Any) -> Any:
        if value is None:
            return None
        value = jnp.asarray(value)
        if value.shape != sequence:
            axes = "(T, *B)" if time_major else "(*B, T)"
            raise ValueError(f"{name}: expected shape {sequence}, {axes} of xs, got {value.shape}")
        return jnp.moveaxis(value, time_axis, 0)

    if lengths is not None:
        batch_shape = tuple(n for axis, n in enumerate(sequence) if axis != time_axis)
        lengths = check_lengths(lengths, sequence[time_axis], batch_shape, "lengths")
    state, ys = unroll(
        model,
        params,
        jnp.moveaxis(xs, time_axis, 0),
        state,
        lengths=lengths,
        mask=flags("mask", mask),
        resets=flags("resets", resets),
        reverse=reverse,
        key=key,
        backend=backend,
        remat=remat,
    )
    return state, jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), ys)
