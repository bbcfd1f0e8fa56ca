"""Operations in NumPy that are not ufuncs: functions of an operation's parameters and operands.

A key of JAX's default kind, two 32-bit words, is represented as one 64-bit number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["packed", "unpacked"]


def same(params: Any, x: Any) -> Any:
    return x


def logistic(params: Any, x: Any) -> Any:
    return np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x))).astype(x.dtype)


def rsqrt(params: Any, x: Any) -> Any:
    return 1 / np.sqrt(x)


def divide(params: Any, x: Any, y: Any) -> Any:
    if np.issubdtype(x.dtype, np.floating):
        return np.divide(x, y)
    return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(x.dtype)


def integer_pow(params: Any, x: Any) -> Any:
    return np.power(x, x.dtype.type(params["y"]))


def convert(params: Any, x: Any) -> Any:
    return x.astype(params["new_dtype"])


def bitcast(params: Any, x: Any) -> Any:
    return np.asarray(x).view(params["new_dtype"])


def select(params: Any, which: Any, *cases: Any) -> Any:
    if len(cases) != 2:
        return np.choose(which.astype(np.int32), cases)
    return np.where(which, cases[1], cases[0])


# --- axes --------------------------------------------------------------------------------------------------------


def broadcast(params: Any, x: Any, *_: Any) -> Any:
    shape, dims = params["shape"], params["broadcast_dimensions"]
    inner = [1] * len(shape)
    for axis, dim in enumerate(dims):
        inner[dim] = x.shape[axis]
    out = np.empty(shape, x.dtype)  # faster than a view for so few elements
    out[...] = x.reshape(inner)
    return out


def concatenate(params: Any, *xs: Any) -> Any:
    return np.concatenate(xs, params["dimension"])


def iota(params: Any) -> Any:
    numbers = np.arange(params["shape"][params["dimension"]], dtype=params["dtype"])
    return broadcast({"shape": params["shape"], "broadcast_dimensions": (params["dimension"],)}, numbers)


def pad(params: Any, x: Any, value: Any) -> Any:
    config = params["padding_config"]
    spread = [(n - 1) * (inner + 1) + 1 if n else 0 for n, (_, _, inner) in zip(x.shape, config, strict=True)]
    out = np.full([n + max(low, 0) + max(high, 0) for n, (low, high, _) in zip(spread, config, strict=True)], value)
    place = tuple(
        slice(max(low, 0), max(low, 0) + n, inner + 1) for n, (low, _, inner) in zip(spread, config, strict=True)
    )
    out[place] = x
    return out[tuple(slice(max(-low, 0), out.shape[i] - max(-high, 0)) for i, (low, high, _) in enumerate(config))]


def reshape(params: Any, x: Any) -> Any:
    order = params["dimensions"]
    return (x if order is None else np.transpose(x, order)).reshape(params["new_sizes"])


def rev(params: Any, x: Any) -> Any:
    return np.flip(x, params["dimensions"])


def slice_(params: Any, x: Any) -> Any:
    strides = params["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]


def split(params: Any, x: Any) -> Any:
    before, ends = (slice(None),) * params["axis"], itertools.accumulate(params["sizes"])
    return [x[(*before, slice(end - size, end))] for size, end in zip(params["sizes"], ends, strict=True)]


def squeeze(params: Any, x: Any) -> Any:
    return np.squeeze(x, tuple(params["dimensions"]))


def transpose(params: Any, x: Any) -> Any:
    return np.transpose(x, params["permutation"])


# --- sums and products -------------------------------------------------------------------------------------------


def argmax(params: Any, x: Any) -> Any:
    return np.argmax(x, *params["axes"]).astype(params["index_dtype"])


def cumulated(function: Any) -> Callable[..., Any]:
    def along(params: Any, x: Any) -> Any:
        if params["reverse"]:
            return np.flip(function.accumulate(np.flip(x, params["axis"]), params["axis"]), params["axis"])
        return function.accumulate(x, params["axis"])

    return along


def reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, x: function(x, axis=tuple(params["axes"]))


def sum_(x: Any, axis: Any) -> Any:
    return np.add.reduce(x, axis=axis, dtype=x.dtype)


def matmul(params: Any, x: Any, w: Any) -> Any:
    return np.matmul(x, w)


def dot(params: Any, x: Any, y: Any) -> Any:
    (x_sum, y_sum), (x_batch, y_batch) = params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    x_names = [next(letters) for _ in x.shape]
    y_names = [next(letters) for _ in y.shape]
    for i, j in (*zip(x_sum, y_sum, strict=True), *zip(x_batch, y_batch, strict=True)):
        y_names[j] = x_names[i]
    batch = [x_names[i] for i in x_batch]
    free = [n for i, n in enumerate(x_names) if i not in (*x_sum, *x_batch)]
    free += [n for i, n in enumerate(y_names) if i not in (*y_sum, *y_batch)]
    return np.einsum(f"{''.join(x_names)},{''.join(y_names)}->{''.join(batch + free)}", x, y)


# --- randomness: Threefry-2x32 in 20 rounds (Salmon et al. 2011), as in JAX's default keys -----------------------


def packed(words: Any) -> Any:
    """Keys as 64-bit numbers, from ``(..., 2)`` words."""
    words = np.asarray(words)
    return _number((words[..., 0], words[..., 1]))


def unpacked(keys: Any) -> Any:
    """The words ``(..., 2)`` of keys."""
    return np.stack(_words(keys), -1)


def bits(params: Any, keys: Any) -> Any:
    width, words = params["bit_width"], _counted(keys, params["shape"])
    if width == 64:
        return _number(words)
    return (words[0] ^ words[1]).astype(f"uint{width}")


def fold_in(params: Any, keys: Any, data: Any) -> Any:
    return _number(_threefry(keys, data.astype(np.uint64)))


def split_keys(params: Any, keys: Any) -> Any:
    return _number(_counted(keys, params["shape"]))


def _words(numbers: Any) -> tuple[Any, Any]:
    """The upper and the lower half of 64-bit numbers."""
    return (numbers >> np.uint64(32)).astype(np.uint32), numbers.astype(np.uint32)


def _number(words: tuple[Any, Any]) -> Any:
    upper, lower = words
    return upper.astype(np.uint64) << np.uint64(32) | lower


def _threefry(keys: Any, counts: Any) -> tuple[Any, Any]:
    """The two words of Threefry for each key and count, which are 64-bit numbers: two words each."""
    first, second = _words(keys)
    schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x, y = _words(counts)
    x, y = x + first, y + second
    for block in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            x = x + y
            y = (y << np.uint32(by) | y >> np.uint32(32 - by)) ^ x
        x = x + schedule[(block + 1) % 3]
        y = y + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def _counted(keys: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    counts = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    return _threefry(keys.reshape(keys.shape + (1,) * len(shape)), counts)
