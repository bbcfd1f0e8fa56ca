"""Runs a traced program one operation after another, for programs that are run a few times on tiny arrays.

Compiling costs seconds there and running microseconds. What is simple is done by NumPy, anything else by JAX, which
compiles each operation by itself. JAX's usual keys, two 32-bit words each, are one 64-bit number in NumPy.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jrnn.jaxprs.primitives import called

__all__ = ["call"]


def call(function: Any, *args: Any, jit: bool = False) -> Any:
    """``function(*args)``, pytrees of arrays to pytrees of NumPy arrays; traced once for equal functions and shapes.

    Args:
      function: hashable, and equal to another only if it does the same.
      *args: pytrees of arrays.
      jit: compile it after all.
    """
    if jit:
        return jax.tree.map(_host, _jitted(function)(*args))
    leaves, treedef = jax.tree.flatten(args)
    leaves = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf, jnp.result_type(leaf)) for leaf in leaves]
    avals = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    jaxpr, out = _traced(function, treedef, avals, jnp.result_type(float))
    with np.errstate(all="ignore"):
        values = _run(*_opened(jaxpr), map(_host, leaves))
        atoms = jaxpr.jaxpr.outvars
        return jax.tree.unflatten(out, [_device(v, atom) for v, atom in zip(values, atoms, strict=True)])


@functools.lru_cache(maxsize=512)
def _traced(function: Any, treedef: Any, avals: tuple[Any, ...], precision: Any) -> tuple[Any, Any]:
    del precision  # part of the key: what is traced depends on whether float64 is on
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(treedef, avals))
    return jaxpr, jax.tree.structure(shape)


@functools.lru_cache(maxsize=64)
def _jitted(function: Any) -> Any:
    return jax.jit(function)


def _host(value: Any) -> Any:
    """As NumPy has it; keys of another kind than JAX's usual ones stay as they are."""
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(value)
    return _packed(np.asarray(jax.random.key_data(value))) if _is_usual(value) else value


def _device(value: Any, atom: Any) -> Any:
    """As JAX has it where that differs."""
    if _is_usual(atom.aval) and isinstance(value, np.ndarray | np.generic):
        return jax.random.wrap_key_data(jnp.asarray(_unpacked(value)), impl="threefry2x32")
    return value


def _opened(jaxpr: Any) -> tuple[Any, Any]:
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _run(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        if isinstance(atom, jax.extend.core.Literal):
            return np.asarray(atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
        return env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        name, params, values = eqn.primitive.name, eqn.params, [read(atom) for atom in eqn.invars]
        if name == "scan":
            outs = _scan(eqn, values)
        elif (program := called(eqn)) is not None:
            outs = _run(*program, values)
        elif name in _NUMPY and all(_is_plain(value) for value in values):
            outs = _NUMPY[name](params, *values)
            outs = outs if eqn.primitive.multiple_results else [np.asarray(outs)]
        else:
            values = [_device(value, atom) for value, atom in zip(values, eqn.invars, strict=True)]
            outs = eqn.primitive.bind(*values, **params)
            outs = list(map(_host, outs if eqn.primitive.multiple_results else [outs]))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    (body, body_consts), length = _opened(params["jaxpr"]), params["length"]
    # What is carried keeps its rank and what is scanned has an axis more: said so, it holds for any version of JAX.
    n_carry = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, body.outvars, strict=True))
    n_xs = sum(a.aval.ndim > b.aval.ndim for a, b in zip(eqn.invars, body.invars, strict=True))
    n_consts = len(values) - n_carry - n_xs
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    xs = [_host(value) for value in values[n_consts + n_carry :]]
    steps: list[Any] = [None] * length
    for t in reversed(range(length)) if params["reverse"] else range(length):
        outs = _run(body, body_consts, [*consts, *carry, *(x[t] for x in xs)])
        carry, steps[t] = outs[:n_carry], outs[n_carry:]
    avals = [atom.aval for atom in body.outvars[n_carry:]]
    if not length:
        return [*carry, *(np.zeros((0, *aval.shape), aval.dtype) for aval in avals)]
    return [*carry, *(_stacked([step[i] for step in steps]) for i in range(len(avals)))]


def _stacked(values: list[Any]) -> Any:
    return (np if isinstance(values[0], np.ndarray | np.generic) else jnp).stack(values)


# --- operations --------------------------------------------------------------------------------------------------

_PLAIN = {np.dtype(name) for name in ("bool", "int32", "int64", "uint32", "uint64", "float32", "float64")}


def _is_plain(value: Any) -> bool:
    # Not 16-bit floats, whose rounding is JAX's own, and not PRNG keys.
    return isinstance(value, np.ndarray | np.generic) and value.dtype in _PLAIN


# --- randomness: Threefry-2x32 in 20 rounds (Salmon et al. 2011), as JAX uses it for its usual keys


def _is_usual(aval: Any) -> bool:
    return str(aval.dtype) == "key<fry>" and getattr(jax.config, "jax_threefry_partitionable", True)


def _packed(words: Any) -> Any:
    words = np.asarray(words)
    return _number((words[..., 0], words[..., 1]))


def _unpacked(keys: Any) -> Any:
    return np.stack(_words(keys), -1)


def _words(numbers: Any) -> tuple[Any, Any]:
    """Upper and lower half of 64-bit numbers."""
    return (numbers >> np.uint64(32)).astype(np.uint32), numbers.astype(np.uint32)


def _threefry(keys: Any, counts: Any) -> tuple[Any, Any]:
    """Two words for each key and count, both of 64 bits: two words each."""
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


def _number(words: tuple[Any, Any]) -> Any:
    upper, lower = words
    return upper.astype(np.uint64) << np.uint64(32) | lower


def _counted(keys: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    counts = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    return _threefry(keys.reshape(keys.shape + (1,) * len(shape)), counts)


def _bits(params: Any, keys: Any) -> Any:
    width, words = params["bit_width"], _counted(keys, params["shape"])
    if width == 64:
        return _number(words)
    return (words[0] ^ words[1]).astype(f"uint{width}")


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *values: function(*values)


def _logistic(x: Any) -> Any:
    return np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x))).astype(x.dtype)


def _broadcast(params: Any, x: Any, *_: Any) -> Any:
    shape, dims = params["shape"], params["broadcast_dimensions"]
    inner = [1] * len(shape)
    for axis, dim in enumerate(dims):
        inner[dim] = x.shape[axis]
    out = np.empty(shape, x.dtype)  # quicker than a view of so few elements
    out[...] = x.reshape(inner)
    return out


def _dot(params: Any, x: Any, y: Any) -> Any:
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


def _pad(params: Any, x: Any, value: Any) -> Any:
    config = params["padding_config"]
    spread = [(n - 1) * (inner + 1) + 1 if n else 0 for n, (_, _, inner) in zip(x.shape, config, strict=True)]
    out = np.full([n + max(low, 0) + max(high, 0) for n, (low, high, _) in zip(spread, config, strict=True)], value)
    place = tuple(
        slice(max(low, 0), max(low, 0) + n, inner + 1) for n, (low, _, inner) in zip(spread, config, strict=True)
    )
    out[place] = x
    return out[tuple(slice(max(-low, 0), out.shape[i] - max(-high, 0)) for i, (low, high, _) in enumerate(config))]


def _split(params: Any, x: Any) -> Any:
    before, ends = (slice(None),) * params["axis"], itertools.accumulate(params["sizes"])
    return [x[(*before, slice(end - size, end))] for size, end in zip(params["sizes"], ends, strict=True)]


def _reshape(params: Any, x: Any) -> Any:
    order = params["dimensions"]
    return (x if order is None else np.transpose(x, order)).reshape(params["new_sizes"])


def _slice(params: Any, x: Any) -> Any:
    strides = params["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]


def _truncated(x: Any, y: Any) -> Any:
    return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(x.dtype)


def _reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, x: function(x, axis=tuple(params["axes"]))


def _cumulated(function: Any, x: Any, params: Any) -> Any:
    if params["reverse"]:
        return np.flip(function.accumulate(np.flip(x, params["axis"]), params["axis"]), params["axis"])
    return function.accumulate(x, params["axis"])


def _sum(x: Any, axis: Any) -> Any:
    return np.add.reduce(x, axis=axis, dtype=x.dtype)


_NUMPY: dict[str, Callable[..., Any]] = {
    **{name: _elementwise(getattr(np, name)) for name in ("cos", "exp", "expm1", "log", "log1p")},
    **{name: _elementwise(getattr(np, name)) for name in ("abs", "sign", "sin", "sqrt", "square", "tanh")},
    "argmax": lambda params, x: np.argmax(x, *params["axes"]).astype(params["index_dtype"]),
    "bitcast_convert_type": lambda params, x: np.asarray(x).view(params["new_dtype"]),
    "cummax": lambda params, x: _cumulated(np.maximum, x, params),
    "cummin": lambda params, x: _cumulated(np.minimum, x, params),
    "add": _elementwise(np.add),
    "add_any": _elementwise(np.add),
    "and": _elementwise(np.bitwise_and),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda params, *xs: np.concatenate(xs, params["dimension"]),
    "convert_element_type": lambda params, x: x.astype(params["new_dtype"]),
    "copy": lambda params, x: x,
    "div": lambda params, x, y: np.divide(x, y) if np.issubdtype(x.dtype, np.floating) else _truncated(x, y),
    "dot_general": _dot,
    "eq": _elementwise(np.equal),
    "ge": _elementwise(np.greater_equal),
    "gt": _elementwise(np.greater),
    "integer_pow": lambda params, x: np.power(x, x.dtype.type(params["y"])),
    "iota": lambda params: _broadcast(
        {"shape": params["shape"], "broadcast_dimensions": (params["dimension"],)},
        np.arange(params["shape"][params["dimension"]], dtype=params["dtype"]),
    ),
    "le": _elementwise(np.less_equal),
    "logistic": _elementwise(_logistic),
    "lt": _elementwise(np.less),
    "max": _elementwise(np.maximum),
    "min": _elementwise(np.minimum),
    "mul": _elementwise(np.multiply),
    "ne": _elementwise(np.not_equal),
    "neg": _elementwise(np.negative),
    "not": _elementwise(np.invert),
    "or": _elementwise(np.bitwise_or),
    "pad": _pad,
    "random_bits": _bits,
    "random_fold_in": lambda params, keys, data: _number(_threefry(keys, data.astype(np.uint64))),
    "random_split": lambda params, keys: _number(_counted(keys, params["shape"])),
    "reduce_and": _reduced(np.all),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_or": _reduced(np.any),
    "reduce_sum": _reduced(_sum),
    "reshape": _reshape,
    "rev": lambda params, x: np.flip(x, params["dimensions"]),
    "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x)),
    "select_n": lambda params, which, *cases: (
        np.choose(which.astype(np.int32), cases) if len(cases) != 2 else np.where(which, cases[1], cases[0])
    ),
    "shift_left": _elementwise(np.left_shift),
    "shift_right_logical": _elementwise(np.right_shift),
    "slice": _slice,
    "split": _split,
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "stop_gradient": lambda params, x: x,
    "sub": _elementwise(np.subtract),
    "transpose": lambda params, x: np.transpose(x, params["permutation"]),
    "xor": _elementwise(np.bitwise_xor),
    "weigh": lambda params, x, w: np.matmul(x, w),
}
