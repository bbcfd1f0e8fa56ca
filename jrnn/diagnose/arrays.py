"""Helpers for leaves, norms and masks in NumPy, and for axes to plot on."""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import sequence


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def is_inexact(leaf: Any) -> bool:
    """Whether numbers are real or complex, and so have a derivative."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def float_parts(state: Any, batch_ndim: int) -> tuple[list[Any], list[str], list[int]]:
    """The floating leaves of a state, their names, and how many numbers each has for one sequence."""
    found = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if is_float(leaf)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "state" for path, _ in found]
    return [leaf for _, leaf in found], names, [math.prod(leaf.shape[batch_ndim:]) for _, leaf in found]


def valid_flags(lengths: Any, mask: Any, time: int, batch_shape: tuple[int, ...]) -> np.ndarray:
    valid = sequence.valid_steps(lengths, mask, time, batch_shape)
    return np.ones((time, *batch_shape), bool) if valid is None else np.asarray(valid)


def norms_over(gradient: jax.Array, leading: int) -> np.ndarray:
    """Norms over all but the leading axes, in float64: the squares of tiny gradients underflow in float32."""
    squares = np.square(np.asarray(gradient, np.float64))
    return np.sqrt(squares.sum(axis=tuple(range(leading, squares.ndim))))


def rms_over(norms: np.ndarray, valid: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, norms.ndim))
    return np.sqrt(fraction_of(np.where(valid, np.square(norms), 0.0).sum(axes), valid.sum(axes)))


def fraction_of(part: Any, whole: Any) -> np.ndarray:
    """``part / whole``, or NaN where ``whole`` is 0."""
    whole = np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def singular_values_of(matrices: np.ndarray) -> np.ndarray:
    finite = np.isfinite(matrices).all((-2, -1))
    values = np.linalg.svd(np.where(finite[..., None, None], matrices, 0.0), compute_uv=False)
    return np.where(finite[..., None], values, np.nan)


def row_of(product: np.ndarray, known: np.ndarray, bound: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, ...]:
    values = np.where(known[..., None], singular_values_of(product), np.nan)
    return values, np.where(known, bound, np.nan), steps, known


def power(factor: float, counts: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.power(factor, counts.astype(float))


def nan_reduce(reduce: Any, values: np.ndarray) -> np.ndarray:
    """A reduction over the second axis that ignores NaN. It is NaN, without a warning, if all values are NaN."""
    result = np.full(len(values), np.nan)
    some = ~np.isnan(values).all(1)
    if some.any():
        result[some] = reduce(values[some], axis=1)
    return result


def flat(values: np.ndarray) -> np.ndarray:
    """The values with all axes but the first merged into one."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def positive(values: np.ndarray) -> np.ndarray:
    """The values that a logarithmic axis can show. NaN, which is drawn as a gap, replaces the others."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def axes_of(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed; pip install "jrnn[plot]"') from error
    return pyplot.subplots(layout="constrained")[1]
