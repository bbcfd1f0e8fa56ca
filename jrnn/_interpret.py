"""Runs a traced program one operation after another, for programs that are run a few times on tiny arrays.

Compiling costs seconds there and running microseconds. What is simple is done by NumPy, anything else by JAX, which
compiles each operation by itself. JAX's usual keys, two 32-bit words each, are one 64-bit number in NumPy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.jaxprs.flat import Op, Program, bind, flatten, run
from jrnn.jaxprs.primitives import primitive
from jrnn.jaxprs.primitives.in_numpy import packed, unpacked

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
    program, consts, out = _traced(function, treedef, avals, jnp.result_type(float))
    with np.errstate(all="ignore"):
        values = _run(program, [*map(_host, consts), *map(_host, leaves)])
        dtypes = [program.form(result).dtype for result in program.results]
        return jax.tree.unflatten(out, [_device(v, dtype) for v, dtype in zip(values, dtypes, strict=True)])


@functools.lru_cache(maxsize=512)
def _traced(function: Any, treedef: Any, avals: tuple[Any, ...], precision: Any) -> tuple[Program, Any, Any]:
    """The program of a function, the values of its constants, and the tree of its results."""
    del precision  # part of the key: what is traced depends on whether float64 is on
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(treedef, avals))
    return *flatten(jaxpr, opened=True), jax.tree.structure(shape)


@functools.lru_cache(maxsize=64)
def _jitted(function: Any) -> Any:
    return jax.jit(function)


def _host(value: Any) -> Any:
    """As NumPy has it; keys of another kind than JAX's usual ones stay as they are."""
    if not hasattr(value, "dtype"):
        return np.asarray(value)
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(value)
    return packed(np.asarray(jax.random.key_data(value))) if _is_usual(value.dtype) else value


def _device(value: Any, dtype: Any) -> Any:
    """As JAX has it where that differs."""
    if _is_usual(dtype) and isinstance(value, np.ndarray | np.generic):
        return jax.random.wrap_key_data(jnp.asarray(unpacked(value)), impl="threefry2x32")
    return value


def _is_usual(dtype: Any) -> bool:
    return str(dtype) == "key<fry>" and getattr(jax.config, "jax_threefry_partitionable", True)


def _run(program: Program, args: Any) -> list[Any]:
    def apply(op: Op, values: list[Any]) -> Any:
        if op.name == "scan":
            return _scan(program, op, values)
        row = primitive(op.name)
        if row.numpy is not None and all(map(_is_plain, values)):
            outs = row.numpy(*values) if isinstance(row.numpy, np.ufunc) else row.numpy(op.params, *values)
            return outs if op.primitive.multiple_results else [np.asarray(outs)]
        dtypes = [program.form(a).dtype for a in op.ins]
        return map(_host, bind(op.primitive, op.params, list(map(_device, values, dtypes))))

    return run(program, args, apply)


def _scan(program: Program, op: Op, values: list[Any]) -> list[Any]:
    (body, consts), length = op.body, op.params["length"]
    # What is carried keeps its rank and what is scanned has an axis more: said so, it holds for any version of JAX.
    ranks = [len(program.form(a).shape) for a in (*op.ins, *op.outs)]
    inside = [len(form.shape) for form in body.forms[len(consts) : body.inputs]]
    inside += [len(body.form(result).shape) for result in body.results]
    n_xs = sum(a > b for a, b in zip(ranks[: len(op.ins)], inside[: len(op.ins)], strict=True))
    n_carry = sum(a == b for a, b in zip(ranks[len(op.ins) :], inside[len(op.ins) :], strict=True))
    n_consts = len(values) - n_carry - n_xs
    given, carry = [*map(_host, consts), *values[:n_consts]], values[n_consts : n_consts + n_carry]
    xs = [_host(value) for value in values[n_consts + n_carry :]]
    steps: list[Any] = [None] * length
    for t in reversed(range(length)) if op.params["reverse"] else range(length):
        outs = _run(body, [*given, *carry, *(x[t] for x in xs)])
        carry, steps[t] = outs[:n_carry], outs[n_carry:]
    forms = [body.form(result) for result in body.results[n_carry:]]
    if not length:
        return [*carry, *(np.zeros((0, *form.shape), form.dtype) for form in forms)]
    return [*carry, *(_stacked([step[i] for step in steps]) for i in range(len(forms)))]


def _stacked(values: list[Any]) -> Any:
    return (np if isinstance(values[0], np.ndarray | np.generic) else jnp).stack(values)


_PLAIN = {np.dtype(name) for name in ("bool", "int32", "int64", "uint32", "uint64", "float32", "float64")}


def _is_plain(value: Any) -> bool:
    # Not 16-bit floats, whose rounding is JAX's own, and not PRNG keys.
    return isinstance(value, np.ndarray | np.generic) and value.dtype in _PLAIN
