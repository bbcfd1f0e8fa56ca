"""The diagonal linear recurrence ``h[t] = a[t] * h[t-1] + b[t]``, one step after another or in parallel over time.

Its tangent is a recurrence with the same coefficients, and the transpose of the tangent is one in the other direction.
With ``d`` for tangents, and ``g`` for the cotangent of ``h``::

    dh[t] = a[t] * dh[t-1] + (da[t] * h[t-1] + db[t])
    l[t]  = g[t] + a[t+1] * l[t+1]

    cotangents:  l[t] * h[t-1] of a[t],  l[t] of b[t],  a[0] * l[0] of h0

The residuals of the gradient are therefore ``a`` and ``h``, whatever backend computed ``h``. The recurrence, its
tangent and its transpose are the operations `Scan`, `Tangent` and `Adjoint`. Their derivative rules use one another, so
derivatives of every order follow, in both modes. Where ``resets[t]`` holds, ``h[t-1]`` is zero in all three.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn._core.checks import is_traced
from jrnn._core.devices import default_device, knows_mesh, varying_as
from jrnn.schedules.native import build, operation
from jrnn.schedules.native.operation import Operation

__all__ = ["BACKENDS", "choose_linear", "linear_scan"]

BACKENDS = ("sequential", "associative", "chunked", "native")
# The least number of elements of h for which the compiled recurrence is the default: compiling it takes two seconds.
NUMBERS = 2**13


def linear_scan(
    a: Any,
    b: Any,
    h0: Any = None,
    *,
    resets: Any = None,
    reverse: bool = False,
    backend: str | None = None,
) -> jax.Array:
    """``h[t] = a[t] * h[t-1] + b[t]`` along the first axis, elementwise; returns every ``h``.

    T time, B batch axes (any number, or none), H features.

    ``a`` and ``b`` broadcast against each other as in NumPy. A decay that is the same at every step may have the shape
    ``(H,)``, and one that all features of a step share ``(T, *B, 1)``.

    Derivatives of every order are exact, in forward and in reverse mode. The residuals of a gradient are ``a`` and
    ``h``, with every backend.

    Args:
      a: coefficients, floats or complex numbers whose shape is ``(T, *B, H)`` or broadcasts to it.
      b: the terms that are added, of such a shape too. 16-bit floats are converted to float32 for the computation, and
        the residuals are float32 as well.
      h0: the value before the first step, ``(*B, H)``; None for zeros.
      resets: booleans ``(T, *B)``. Where ``resets[t]`` holds, h is set to zero before step t: no value (NaN included)
        and no gradient passes. The shape may be that of ``h`` without any number of its last axes.
      reverse: run from the last step to the first: ``h[t] = a[t] * h[t+1] + b[t]``, with ``h0`` after the last step.
      backend: None chooses.

        - "sequential", a `jax.lax.scan`
        - "associative", a `jax.lax.associative_scan`: log2(T) rounds, each parallel over time. It multiplies
          coefficients by each other. These products must not overflow: it is meant for ``abs(a) <= 1``
        - "chunked", sqrt(T) chunks side by side in one `jax.lax.scan`, a scan over the final values of the chunks, and
          a pass that adds the value before each chunk: 2 sqrt(T) steps. It multiplies coefficients by each other too
        - "native", code for a CPU that reads and writes each array once, compiled by the C++ compiler of this machine
          (see `jrnn.native`)

    Returns:
      ``h (T, *B, H)``, in the dtype of ``a`` and ``b``; complex if one of them is.

    Raises:
      ValueError, TypeError: an argument does not fit (the message names it), or the backend cannot serve.

    >>> jrnn.linear_scan(jnp.array([0.5, 0.5, 0.5]), jnp.ones(3))
    Array([1.  , 1.5 , 1.75], dtype=float32)
    >>> jrnn.linear_scan(0.5, jnp.ones(3), 8.0, resets=jnp.array([False, False, True]))
    Array([5. , 3.5, 1. ], dtype=float32)
    >>> jrnn.linear_scan(1.0, jnp.ones(3), reverse=True, backend="associative")
    Array([3., 2., 1.], dtype=float32)
    """
    arrays, dtype = _in_one_dtype(a=a, b=b, h0=h0)
    a, b, h0 = arrays
    try:
        shape = lax.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            f"a: expected a shape that broadcasts against that of b, {b.shape}, got {a.shape}; for one coefficient a "
            "step give it axes of size one after time, as in a[:, None]"
        ) from None
    if not shape:
        raise ValueError("b: expected time as the first axis, got no axis at all; pass an array (T, *B, H)")
    if h0 is not None and h0.shape != shape[1:]:
        raise ValueError(f"h0: expected the shape {shape[1:]} of one step of a and b, got {h0.shape}")
    if resets is not None:
        resets = jnp.asarray(resets)
        if resets.dtype != jnp.bool_:
            raise TypeError(f"resets: expected booleans, got {resets.dtype}; convert with .astype(bool) or compare")
        if not resets.ndim or resets.shape != shape[: resets.ndim]:
            raise ValueError(
                f"resets: expected the first axes of {shape}, time and then batch, got the shape {resets.shape}"
            )
    if not isinstance(reverse, bool | np.bool_):
        raise TypeError(f"reverse: expected True or False, got {reverse!r}; it must be known before tracing")
    name, reason = choose_linear(shape, dtype, backend, (a, b, h0, resets))
    if backend is not None and name != backend:
        raise ValueError(f"backend: {backend!r} cannot run this recurrence: {reason}; pass backend=None")
    return _run(a, b, h0, resets, name, bool(reverse), dtype)


def choose_linear(shape: Any, dtype: Any, backend: str | None = None, arrays: Any = ()) -> tuple[str, str]:
    """The backend of `linear_scan` that runs a recurrence of the given shape, and why, or why not the named one."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: expected None or one of {list(BACKENDS)}, got {backend!r}")
    if backend in ("sequential", "associative", "chunked"):
        if backend != "sequential" and not isinstance(shape[0], int):
            return "sequential", f"T is a symbol, {shape[0]}, and how an {backend} scan is divided depends on it"
        return str(backend), "asked for by name"
    platform = default_device().platform
    if platform != "cpu":
        why = f"it runs on a CPU, and the default device is {platform}"
    elif any(knows_mesh(leaf) for leaf in jax.tree.leaves(arrays)) or not jax.sharding.get_abstract_mesh().empty:
        why = "a mesh is set, and it does not support arrays that lie on one"
    elif not all(isinstance(size, int) for size in shape):
        why = "sizes are symbols"
    elif not operation.available():
        why = "this version of JAX no longer has what its operation is made of"
    elif backend is None and jax.device_count() > 1:
        why = "XLA can divide a scan among several devices, and not a call of compiled code"
    elif backend is None and math.prod(shape) < NUMBERS:
        why = f"{math.prod(shape)} numbers are too few to compile it for (from {NUMBERS} on)"
    else:
        try:
            build.load_linear()
            return "native", "compiled code for this CPU goes through memory once"
        except RuntimeError as error:
            why = str(error)
    if platform == "cpu" or not isinstance(shape[0], int):
        return "sequential", f"not native: {why}"
    return "associative", f"log2(T) rounds, each parallel over time; not native: {why}"


def _in_one_dtype(**arguments: Any) -> tuple[list[Any], Any]:
    """The arguments as arrays of the dtype to compute in, and the dtype of the result."""
    arrays: dict[str, Any] = {}
    for name, value in arguments.items():
        try:
            arrays[name] = value if value is None or is_traced(value) else jnp.asarray(value)
        except TypeError as error:
            raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from error
        if value is not None and not jnp.issubdtype(arrays[name].dtype, jnp.inexact):
            if not (isinstance(value, int) and not isinstance(value, bool)):
                raise TypeError(f"{name}: expected floats or complex numbers, got {arrays[name].dtype}; convert them")
            arrays[name] = jnp.asarray(float(value))
    given = {name: array for name, array in arrays.items() if array is not None}
    # A Python number has no dtype of its own.
    fixed = {name: array.dtype for name, array in given.items() if not jax.typeof(array).weak_type}
    reals = {name: jnp.finfo(dtype).dtype for name, dtype in fixed.items()}
    if len(set(reals.values())) > 1:
        raise TypeError(
            f"a: expected one precision for a, b and h0, got {', '.join(f'{n} {d}' for n, d in fixed.items())}; "
            "convert them, jrnn never promotes silently"
        )
    real = next(iter(reals.values()), jnp.finfo(jnp.result_type(float)).dtype)
    if not is_float(real):
        raise TypeError(f"a: expected floats of 16, 32 or 64 bits, got {real}; convert them")
    if any(jnp.issubdtype(array.dtype, jnp.complexfloating) for array in given.values()):
        wanted = result = jnp.dtype(jnp.complex128 if real == jnp.float64 else jnp.complex64)
    else:
        wanted, result = jnp.dtype(jnp.float32) if jnp.finfo(real).bits < 32 else jnp.dtype(real), jnp.dtype(real)
    return [None if array is None else array.astype(wanted) for array in arrays.values()], result


def is_float(dtype: Any) -> bool:
    return jnp.dtype(dtype) in [jnp.dtype(kind) for kind in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)]


@functools.partial(jax.jit, static_argnames=("name", "reverse", "dtype"))
def _run(a: Any, b: Any, h0: Any, resets: Any, name: str, reverse: bool, dtype: Any) -> jax.Array:
    shape = lax.broadcast_shapes(a.shape, b.shape)
    constant = a.ndim < len(shape) or (_is_constant(a) and not _is_constant(b))
    # A coefficient that is the same at every step keeps a time axis of size one.
    a = jnp.broadcast_to(a.reshape((1,) * (len(shape) - a.ndim) + a.shape), (1 if constant else shape[0], *shape[1:]))
    b = jnp.broadcast_to(b, shape)
    if shape[0] == 0 or any(isinstance(size, int) and size == 0 for size in shape):
        return b.astype(dtype)
    if h0 is None:
        h0 = jnp.zeros(shape[1:], b.dtype)
    if any(knows_mesh(leaf) for leaf in (a, b, h0)) or not operation.available():
        # The type of an array includes its sharding over a mesh, for which the operations have no rule.
        return plain(name, reverse, a, b, varying_as(h0, a, b, resets), resets).astype(dtype)
    batch = max(1, len(shape) - 1) if resets is None else resets.ndim

    def folded(array: Any, lead: int) -> Any:
        """The array with its batch axes merged into one, and the axes after them into another."""
        cut = lead + batch - 1
        return array.reshape(*array.shape[:lead], math.prod(array.shape[lead:cut]), math.prod(array.shape[cut:]))

    resets = None if resets is None else resets.reshape(shape[0], -1)
    return bind(Scan, (folded(a, 1), resets, folded(b, 1), folded(h0, 0)), name, reverse).reshape(shape).astype(dtype)


def _is_constant(a: Any) -> bool:
    """Whether an array with a time axis has only one step."""
    return isinstance(a.shape[0], int) and a.shape[0] == 1


def bind(kind: Any, operands: Any, name: str, reverse: bool, **static: Any) -> Any:
    leaves, tree = jax.tree.flatten(operands)
    return kind(tree, name, reverse, **static).bind(leaves)


# --- in plain JAX, on arrays of any shape; the time axis of a may have size one ----------------------------------


def plain(name: str, reverse: bool, a: Any, b: Any, h0: Any, resets: Any) -> jax.Array:
    if name == "associative":
        return associative(reverse, a, b, h0, resets)
    if name == "chunked":
        return chunked(reverse, a, b, h0, resets)
    if name == "native" and isinstance(b.shape[0], int):  # an exported program, or another platform
        return lax.platform_dependent(
            a, b, h0, resets,
            cpu=functools.partial(sequential, reverse),
            default=functools.partial(associative, reverse),
        )  # fmt: skip
    return sequential(reverse, a, b, h0, resets)


def sequential(reverse: bool, a: Any, b: Any, h0: Any, resets: Any) -> jax.Array:
    constant = _is_constant(a)

    def step(h: Any, inputs: Any) -> Any:
        a_t, b_t, reset = inputs
        if reset is not None:
            h = jnp.where(_expand(reset, h), jnp.zeros((), h.dtype), h)
        h = (a[0] if constant else a_t) * h + b_t
        if reset is not None:  # a_t may be NaN, which a product with zero would propagate
            h = jnp.where(_expand(reset, h), b_t, h)
        return h, h

    return lax.scan(step, h0, (None if constant else a, b, resets), None, reverse)[1]


def associative(reverse: bool, a: Any, b: Any, h0: Any, resets: Any) -> jax.Array:
    first = b.shape[0] - 1 if reverse else 0
    a = jnp.broadcast_to(a, b.shape)
    flags = None if resets is None else jnp.broadcast_to(_expand(resets, b), b.shape)
    begin = h0 if flags is None else jnp.where(flags[first], jnp.zeros((), h0.dtype), h0)
    b = b.at[first].add(a[first] * begin)

    def combine(one: Any, other: Any) -> Any:
        (a1, b1, _), (a2, b2, reset) = one, other
        if reset is None:
            return a1 * a2, a2 * b1 + b2, None
        # A value that a reset replaces may be NaN, which a product with zero would propagate.
        return jnp.where(reset, a2, a1 * a2), jnp.where(reset, b2, a2 * b1 + b2), one[2] | reset

    return lax.associative_scan(combine, (a, b, flags), reverse=reverse)[1]


def chunked(reverse: bool, a: Any, b: Any, h0: Any, resets: Any) -> jax.Array:
    """Runs all chunks side by side from zero, with the products of their coefficients; then adds the value before each.

    For a chunk of the steps s, ..., and ``k[t]`` its recurrence from zero: ``h[t] = (a[t] ... a[s]) * h[s-1] + k[t]``.
    """
    time = b.shape[0]
    size = math.isqrt(time - 1) + 1
    count = -(-time // size)

    def cut(array: Any) -> Any:
        """``(T, ...)`` as ``(size, count, ...)``: all chunks side by side, with padding at the end of the run."""
        padding = (count * size - time, 0) if reverse else (0, count * size - time)
        array = jnp.pad(array, (padding, *((0, 0),) * (array.ndim - 1)))
        return jnp.swapaxes(array.reshape(count, size, *array.shape[1:]), 0, 1)

    def step(carry: Any, inputs: Any) -> Any:
        product, h, seen = carry
        a_t, b_t, reset = inputs
        product, h = a_t * product, a_t * h + b_t
        if reset is not None:
            seen = seen | reset
            h, product = (jnp.where(_expand(reset, h), other, x) for x, other in ((h, b_t), (product, zero)))
        return (product, h, seen), (product, h, seen)

    zero = jnp.zeros((), b.dtype)
    steps = cut(jnp.broadcast_to(a, b.shape)), cut(b), None if resets is None else cut(resets)
    zeros = jnp.zeros_like(steps[1][0])
    none = None if resets is None else jnp.zeros_like(cut(resets)[0])
    start = varying_as((zeros + 1, zeros, none), *steps)
    (product, h, reset), (products, hs, seen) = lax.scan(step, start, steps, None, reverse)
    begins = before(sequential(reverse, product, h, h0, reset), h0, None, reverse)
    moved = products * begins
    hs = hs + (moved if seen is None else jnp.where(_expand(seen, moved), zero, moved))
    hs = jnp.swapaxes(hs, 0, 1).reshape(count * size, *b.shape[1:])
    return hs[count * size - time :] if reverse else hs[:time]


def _expand(flags: Any, like: Any) -> Any:
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def before(h: Any, h0: Any, resets: Any, reverse: bool) -> jax.Array:
    """The value that each step starts from: h of the step before it, or zero at a reset."""
    h = jnp.concatenate([h[1:], h0[None]] if reverse else [h0[None], h[:-1]])
    return h if resets is None else jnp.where(_expand(resets, h), jnp.zeros((), h.dtype), h)


# --- the operations, on a (T or 1, B, W), b and h (T, B, W), h0 (B, W), resets (T, B) or None ---------------------


@dataclass(frozen=True)
class _Linear(Operation):
    name: str
    reverse: bool

    def call(self, which: str, results: Any, *operands: Any) -> Any:
        """Calls a compiled function on all operands, of which resets are the last."""
        *arrays, resets = operands
        flags = jnp.zeros((0,), jnp.bool_) if resets is None else resets
        return jax.ffi.ffi_call(getattr(build.load_linear(), which), results)(*arrays, flags, reverse=int(self.reverse))


@dataclass(frozen=True)
class Scan(_Linear):
    """``(a, resets, b, h0)`` to h, linear in b and h0."""

    def forms(self, a: Any, resets: Any, b: Any, h0: Any) -> Any:
        return _form(b)

    def plain(self, a: Any, resets: Any, b: Any, h0: Any) -> Any:
        return plain(self.name, self.reverse, a, b, h0, resets)

    def compiled(self, a: Any, resets: Any, b: Any, h0: Any) -> Any:
        if self.name != "native":
            return self.plain(a, resets, b, h0)
        return self.call("forward", _form(b), a, b, h0, resets)

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        a, resets, _, h0 = operands
        da, _, db, dh0 = tangents
        h = bind(Scan, operands, self.name, self.reverse)
        if da is None:  # the tangent does not use h, which is then no residual
            db, dh0 = (jnp.zeros_like(x) if d is None else d for x, d in zip(operands[2:], (db, dh0), strict=True))
            return h, bind(Scan, (a, resets, db, dh0), self.name, self.reverse)
        return h, bind(Tangent, (a, h, h0, resets, (da, db, dh0)), self.name, self.reverse)

    def transpose(self, cotangents: Any, a: Any, resets: Any, b: Any, h0: Any) -> Any:
        zeros, moving = jnp.zeros(cotangents.shape[1:], cotangents.dtype), (False, True, True)
        return bind(Adjoint, (a, None, zeros, resets, cotangents), self.name, self.reverse, moving=moving)[1:]

    def sequences(self, a: Any, resets: Any, b: Any, h0: Any) -> tuple[Any, Any]:
        return (1, None if resets is None else 1, 1, 0), 1


@dataclass(frozen=True)
class Tangent(_Linear):
    """``(a, h, h0, resets, d)`` to the tangent of h for tangents ``d = (da, db, dh0)``, each of which may be None."""

    def forms(self, a: Any, h: Any, h0: Any, resets: Any, d: Any) -> Any:
        return _form(h)

    def plain(self, a: Any, h: Any, h0: Any, resets: Any, d: Any) -> Any:
        da, db, dh0 = d
        moved = None if da is None else da * before(h, h0, resets, self.reverse)
        both = [each for each in (moved, db) if each is not None]
        inputs = sum(both[1:], both[0]) if both else jnp.zeros_like(h)
        return bind(Scan, (a, resets, inputs, jnp.zeros_like(h0) if dh0 is None else dh0), self.name, self.reverse)

    compiled = plain

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        out = bind(Tangent, operands, self.name, self.reverse)
        if not jax.tree.leaves(tangents[:4]):  # only d has a tangent, and the operation is linear in it
            return out, bind(Tangent, (*operands[:4], tangents[4]), self.name, self.reverse)
        return out, _moved(self.plain, operands, tangents)

    def transpose(self, cotangents: Any, a: Any, h: Any, h0: Any, resets: Any, d: Any) -> Any:
        moving = tuple(each is not None for each in d)
        kept = h if moving[0] else None
        return bind(Adjoint, (a, kept, h0, resets, cotangents), self.name, self.reverse, moving=moving)

    def sequences(self, a: Any, h: Any, h0: Any, resets: Any, d: Any) -> tuple[Any, Any]:
        places = tuple(None if each is None else place for each, place in zip(d, (1, 1, 0), strict=True))
        return (1, 1, 0, None if resets is None else 1, places), 1


@dataclass(frozen=True)
class Adjoint(_Linear):
    """``(a, h, h0, resets, g)`` to the gradients with respect to a, b and h0; None for those that are not ``moving``.

    h is None if a is not ``moving``.
    """

    moving: tuple[bool, bool, bool]

    def only(self, found: Any) -> Any:
        return tuple(each if moves else None for each, moves in zip(found, self.moving, strict=True))

    def forms(self, a: Any, h: Any, h0: Any, resets: Any, g: Any) -> Any:
        return self.only((_form(a), _form(g), _form(h0)))

    def plain(self, a: Any, h: Any, h0: Any, resets: Any, g: Any) -> Any:
        def following(array: Any) -> Any:
            """The value of the next step for each step, and zero for the last."""
            none = jnp.zeros_like(array[:1])
            return jnp.concatenate([none, array[:-1]] if self.reverse else [array[1:], none])

        first = g.shape[0] - 1 if self.reverse else 0
        a_next = a if _is_constant(a) else following(a)
        resets_next = None if resets is None else following(resets)
        operands = (a_next, resets_next, g, jnp.zeros_like(h0))
        db = bind(Scan, operands, self.name, not self.reverse)
        da, dh0 = None, a[0 if _is_constant(a) else first] * db[first]
        if resets is not None:
            dh0 = jnp.where(_expand(resets[first], dh0), jnp.zeros((), dh0.dtype), dh0)
        if self.moving[0]:
            da = db * before(h, h0, resets, self.reverse)
            da = da.sum(0, keepdims=True) if _is_constant(a) else da
        return self.only((da, db, dh0))

    def compiled(self, a: Any, h: Any, h0: Any, resets: Any, g: Any) -> Any:
        if self.name != "native":
            return self.plain(a, h, h0, resets, g)
        da = _form(a) if self.moving[0] else jax.ShapeDtypeStruct((0,), a.dtype)
        h = jnp.zeros((0,), a.dtype) if h is None else h
        return self.only(self.call("backward", (da, _form(g), _form(h0)), a, h0, h, g, resets))

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        out = bind(Adjoint, operands, self.name, self.reverse, moving=self.moving)
        return out, _moved(self.plain, operands, tangents)

    def transpose(self, cotangents: Any, a: Any, h: Any, h0: Any, resets: Any, g: Any) -> Any:
        return jax.linear_transpose(lambda g: self.plain(a, h, h0, resets, g), _form(g.aval))(cotangents)[0]

    def sequences(self, a: Any, h: Any, h0: Any, resets: Any, g: Any) -> tuple[Any, Any]:
        return (1, None if h is None else 1, 0, None if resets is None else 1, 1), self.only((1, 1, 0))


def _moved(function: Any, operands: Any, tangents: Any) -> Any:
    """The tangents of the results of a function, for the tangents of its operands that are not None."""
    tree: Any
    leaves, tree = jax.tree.flatten(operands)
    moving = tree.flatten_up_to(tangents)
    places = [i for i, tangent in enumerate(moving) if tangent is not None]

    def of(*values: Any) -> Any:
        whole = list(leaves)
        for place, value in zip(places, values, strict=True):
            whole[place] = value
        return function(*tree.unflatten(whole))

    return jax.jvp(of, tuple(leaves[i] for i in places), tuple(moving[i] for i in places))[1]


def _form(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
