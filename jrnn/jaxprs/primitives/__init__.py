"""The table of JAX's primitive operations. The row of an operation holds all that jrnn knows about it.

An operation without a row makes its part of a program opaque. Its properties are never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jrnn.jaxprs.primitives import in_cpp as cpp
from jrnn.jaxprs.primitives import in_numpy as host
from jrnn.jaxprs.primitives import in_pallas as pallas

__all__ = ["TABLE", "Primitive", "primitive"]


class Primitive(NamedTuple):
    """A row of the table.

    Attributes:
      name: the name that JAX gives the primitive.
      elementwise: whether it acts on each element separately, for any order of the axes of its operands.
      rearranges: whether each element of its results is an element of its operands.
      mappable: whether it can run for all steps at once, with the same result and no more work than step by step.
      same: whether the values of its results are those of its operands (its derivative may differ).
      linear: the indices of the operands in each of which it is linear while the others are fixed.
      sums: the indices of the operands in which it is jointly linear.
      calls: the name of the parameter that holds a program, if the operation only calls this program.
      transparent: whether the call may be replaced by the program, because it has no derivative and no batching rule
        of its own.
      floats, ints, masks: the C++ of the operation on vectors of float32, of 32-bit integers and of booleans: a
        template of its operands, or a function of its parameters and operands.
      kinds: the C++ for operands of several dtypes: a function of the parameters, the dtypes of operands and result,
        and the operands, that returns None if there is no C++.
      numpy: the operation in NumPy: a ufunc, or a function of its parameters and operands.
      pallas: True if every kernel language that is used has the operation; or a function of its parameters and operands
        that expresses it in operations that every language has.
    """

    name: str
    elementwise: bool = False
    rearranges: bool = False
    mappable: bool = False
    same: bool = False
    linear: tuple[int, ...] = ()
    sums: tuple[int, ...] = ()
    calls: str = ""
    transparent: bool = False
    floats: str | Callable[..., str] | None = None
    ints: str | Callable[..., str] | None = None
    masks: str | Callable[..., str] | None = None
    kinds: Callable[..., str | None] | None = None
    numpy: Any = None
    pallas: Any = False


def _elementwise(name: str, **known: Any) -> Primitive:
    return Primitive(name, elementwise=True, mappable=True, **known)


def _rearranging(name: str, **known: Any) -> Primitive:
    return Primitive(name, rearranges=True, mappable=True, **known)


def _mappable(name: str, **known: Any) -> Primitive:
    return Primitive(name, mappable=True, **known)


def _library(name: str, function: str, **known: Any) -> Primitive:
    """A function of floats from the C library, applied lane by lane: correct, but not fast."""
    return _elementwise(name, floats=cpp.library(function), **known)


_ROWS = (
    # One operand.
    _elementwise("abs", floats="vabs({0})", numpy=np.abs, pallas=True),
    _library("acos", "acosf"),
    _library("acosh", "acoshf"),
    _library("asin", "asinf"),
    _library("asinh", "asinhf"),
    _library("atan", "atanf"),
    _library("atanh", "atanhf"),
    _elementwise("bessel_i0e"),
    _elementwise("bessel_i1e"),
    _elementwise("bitcast_convert_type", kinds=cpp.bitcast, numpy=host.bitcast),
    _library("cbrt", "cbrtf"),
    _library("ceil", "ceilf"),
    _elementwise("clz"),
    _elementwise("convert_element_type", linear=(0,), kinds=cpp.convert, numpy=host.convert, pallas=True),
    _elementwise("copy", same=True, numpy=host.same, pallas=pallas.same),
    _elementwise("copy_p", same=True, numpy=host.same, pallas=pallas.same),
    _library("cos", "cosf", numpy=np.cos, pallas=True),
    _library("cosh", "coshf"),
    _elementwise("digamma"),
    _library("erf", "erff"),
    _elementwise("erf_inv"),
    _library("erfc", "erfcf"),
    _elementwise("exp", floats="vexp({0})", numpy=np.exp, pallas=True),
    _library("exp2", "exp2f", pallas=True),
    _elementwise("expm1", floats="vexpm1({0})", numpy=np.expm1, pallas=pallas.expm1),
    _library("floor", "floorf"),
    _elementwise("integer_pow", floats=cpp.power, numpy=host.integer_pow, pallas=pallas.integer_pow),
    _elementwise("is_finite", floats="vabs({0}) <= 3.4028235e38f"),
    _elementwise("lgamma"),
    _elementwise("log", floats="vlog({0})", numpy=np.log, pallas=True),
    _elementwise("log1p", floats="vlog1p({0})", numpy=np.log1p, pallas=pallas.log1p),
    _elementwise("logistic", floats="vlogistic({0})", numpy=host.logistic, pallas=True),
    _elementwise("neg", linear=(0,), floats="-{0}", ints="-{0}", numpy=np.negative, pallas=True),
    _elementwise("not", ints="~{0}", masks="~{0}", numpy=np.invert),
    _elementwise("one_minus_square", floats="1.0f - {0} * {0}", pallas=pallas.one_minus_square),
    _elementwise("polynomial", floats=cpp.polynomial),
    _elementwise("population_count"),
    _elementwise("reduce_precision", floats=cpp.reduce_precision),
    _elementwise("round", floats=cpp.round),
    _elementwise("rsqrt", floats="1.0f / vsqrt({0})", numpy=host.rsqrt, pallas=True),
    _elementwise("sign", floats="vsign({0})", numpy=np.sign, pallas=True),
    _library("sin", "sinf", numpy=np.sin, pallas=True),
    _library("sinh", "sinhf"),
    _elementwise("sqrt", floats="vsqrt({0})", numpy=np.sqrt, pallas=pallas.sqrt),
    _elementwise("square", floats="{0} * {0}", numpy=np.square, pallas=True),
    _elementwise("stop_gradient", same=True, numpy=host.same, pallas=pallas.same),
    _library("tan", "tanf"),
    _elementwise("tanh", floats="vtanh({0})", numpy=np.tanh, pallas=True),
    # Two or three operands.
    _elementwise("add", sums=(0, 1), floats="{0} + {1}", ints="{0} + {1}", numpy=np.add, pallas=True),
    _elementwise("add_any", sums=(0, 1), floats="{0} + {1}", ints="{0} + {1}", numpy=np.add, pallas=pallas.add),
    _elementwise("and", ints="{0} & {1}", masks="{0} & {1}", numpy=np.bitwise_and, pallas=True),
    _library("atan2", "atan2f"),
    _elementwise("clamp", floats="vmin(vmax({1}, {0}), {2})", ints="vmin(vmax({1}, {0}), {2})", pallas=True),
    _elementwise("div", linear=(0,), floats="{0} / {1}", numpy=host.divide, pallas=True),
    _elementwise("eq", floats="{0} == {1}", ints="{0} == {1}", masks="~({0} ^ {1})", numpy=np.equal, pallas=True),
    _elementwise("ge", floats="{0} >= {1}", ints="{0} >= {1}", numpy=np.greater_equal, pallas=True),
    _elementwise("gt", floats="{0} > {1}", ints="{0} > {1}", numpy=np.greater, pallas=True),
    _elementwise("le", floats="{0} <= {1}", ints="{0} <= {1}", numpy=np.less_equal, pallas=True),
    _elementwise("lt", floats="{0} < {1}", ints="{0} < {1}", numpy=np.less, pallas=True),
    _elementwise("max", floats="vmax({0}, {1})", ints="vmax({0}, {1})", numpy=np.maximum, pallas=True),
    _elementwise("min", floats="vmin({0}, {1})", ints="vmin({0}, {1})", numpy=np.minimum, pallas=True),
    _elementwise("mul", linear=(0, 1), floats="{0} * {1}", ints="{0} * {1}", numpy=np.multiply, pallas=True),
    _elementwise("ne", floats="{0} != {1}", ints="{0} != {1}", masks="{0} ^ {1}", numpy=np.not_equal, pallas=True),
    _library("nextafter", "nextafterf"),
    _elementwise("or", ints="{0} | {1}", masks="{0} | {1}", numpy=np.bitwise_or, pallas=True),
    _library("pow", "powf"),
    _library("rem", "fmodf"),
    _elementwise("select_n", sums=(1, 2), kinds=cpp.select, numpy=host.select, pallas=True),
    _elementwise("shift_left", numpy=np.left_shift),
    _elementwise("shift_right_arithmetic"),
    _elementwise("shift_right_logical", numpy=np.right_shift),
    _elementwise("sub", sums=(0, 1), floats="{0} - {1}", ints="{0} - {1}", numpy=np.subtract, pallas=True),
    _elementwise("xor", ints="{0} ^ {1}", masks="{0} ^ {1}", numpy=np.bitwise_xor, pallas=True),
    # Operations that move elements.
    _rearranging("broadcast_in_dim", numpy=host.broadcast, pallas=True),
    _rearranging("concatenate", numpy=host.concatenate),
    _rearranging("expand_dims"),
    _rearranging("reshape", numpy=host.reshape),
    _rearranging("slice", numpy=host.slice_),
    _rearranging("split", numpy=host.split),
    _rearranging("squeeze", numpy=host.squeeze),
    _rearranging("transpose", numpy=host.transpose),
    _rearranging("unstack"),
    # Operations that move elements in ways that the readers do not follow, or that combine several elements.
    _mappable("argmax", numpy=host.argmax),
    _mappable("argmin"),
    _mappable("complex"),
    _mappable("conj"),
    _mappable("cumlogsumexp"),
    _mappable("cummax", numpy=host.cumulated(np.maximum)),
    _mappable("cummin", numpy=host.cumulated(np.minimum)),
    _mappable("cumprod"),
    _mappable("cumsum"),
    _mappable("dot_general", numpy=host.dot),
    _mappable("dynamic_slice"),
    _mappable("dynamic_update_slice"),
    _mappable("empty"),
    _mappable("empty2"),
    _mappable("gather"),
    _mappable("igamma"),
    _mappable("igamma_grad_a"),
    _mappable("igammac"),
    _mappable("imag"),
    _mappable("iota", numpy=host.iota),
    _mappable("log2"),
    _mappable("mulhi"),
    _mappable("name"),
    _mappable("pad", numpy=host.pad),
    _mappable("polygamma"),
    _mappable("real"),
    _mappable("reduce"),
    _mappable("reduce_and", numpy=host.reduced(np.all)),
    _mappable("reduce_max", numpy=host.reduced(np.max)),
    _mappable("reduce_min", numpy=host.reduced(np.min)),
    _mappable("reduce_or", numpy=host.reduced(np.any)),
    _mappable("reduce_prod"),
    _mappable("reduce_sum", numpy=host.reduced(host.sum_)),
    _mappable("reduce_window"),
    _mappable("reduce_window_max"),
    _mappable("reduce_window_min"),
    _mappable("reduce_window_sum"),
    _mappable("reduce_xor"),
    _mappable("regularized_incomplete_beta"),
    _mappable("rev", numpy=host.rev),
    _mappable("scatter"),
    _mappable("scatter-add"),
    _mappable("scatter-max"),
    _mappable("scatter-min"),
    _mappable("scatter-mul"),
    _mappable("scatter-sub"),
    _mappable("select_and_gather_add"),
    _mappable("select_and_scatter"),
    _mappable("select_and_scatter_add"),
    _mappable("stack"),
    _mappable("tile"),
    _mappable("weigh", numpy=host.matmul),  # see `jrnn._core.products`
    _mappable("zeros_like"),
    _mappable("zeta"),
    # Operations that only call another program.
    _mappable("checkpoint", calls="jaxpr", transparent=True),
    _mappable("closed_call", calls="call_jaxpr", transparent=True),
    _mappable("core_call", calls="call_jaxpr", transparent=True),
    _mappable("jit", calls="jaxpr", transparent=True),
    _mappable("pjit", calls="jaxpr", transparent=True),
    _mappable("remat", calls="jaxpr", transparent=True),
    _mappable("remat2", calls="jaxpr", transparent=True),
    _mappable("custom_jvp_call", calls="call_jaxpr"),
    Primitive("custom_vjp_call", calls="call_jaxpr"),
    Primitive("custom_vmap_call", calls="call"),
    # Operations that are not mappable. There are others, which have no row: under `vmap`, a `cond` takes both branches,
    # and the derivative of the branch not chosen may be NaN; a `while` runs as long as its longest member; and some
    # random number generators give different numbers.
    Primitive("optimization_barrier", same=True),
    Primitive("random_bits", numpy=host.bits),
    Primitive("random_fold_in", numpy=host.fold_in),
    Primitive("random_split", numpy=host.split_keys),
)

TABLE = {row.name: row for row in _ROWS}


def primitive(name: str) -> Primitive:
    """The row of a primitive, or a row without known properties if the table has none."""
    return TABLE.get(name) or Primitive(name)
