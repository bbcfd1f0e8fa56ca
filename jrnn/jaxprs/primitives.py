"""The table of JAX's primitive operations, by name: what jrnn knows of each.

An operation that is not in the table makes the part of a program that it stands in opaque. It is never guessed at.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CALLS", "ELEMENTWISE", "INLINED", "SAME", "UNMAPPABLE", "called"]

# Operations that act on each element by itself, in whatever order the axes of their operands stand.
# fmt: off
ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "one_minus_square", "or", "polynomial", "population_count", "pow", "reduce_precision", "rem",
    "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
))
# fmt: on
# Those among them whose values are those of their operand; the derivative of `stop_gradient` is not.
SAME = frozenset(("copy", "copy_p", "stop_gradient"))

# Operations that only call another program, by the name of the parameter that holds it.
CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}

# Of these, the ones that may be replaced by the program that they call: the others have a derivative, or a rule for
# batches, of their own.
INLINED = frozenset(("checkpoint", "closed_call", "core_call", "jit", "pjit", "remat", "remat2"))

# Operations that are not the same, or not as cheap, for all steps at once as for one step after another: a `cond` would
# take both branches, and the derivative of the one that was not meant may be NaN; a `while` would run as long as the
# longest; some generators of random numbers give other numbers under `vmap`.
UNMAPPABLE = frozenset((
    "cond", "while", "scan", "rng_bit_generator", "rng_uniform", "random_bits", "random_wrap", "random_unwrap",
    "random_seed", "random_split", "random_fold_in", "threefry2x32", "custom_vjp_call", "custom_vmap_call",
    "pure_callback", "io_callback", "debug_callback", "debug_print", "ffi_call", "conv_general_dilated", "custom_call",
    "shard_map", "psum", "all_gather", "linear_solve", "custom_linear_solve", "sort", "top_k", "fft",
    "optimization_barrier",
))  # fmt: skip


def called(eqn: Any) -> tuple[Any, Any] | None:
    """The program that an operation does nothing but call, and its constants; None if it does something itself."""
    inner = eqn.params.get(CALLS.get(eqn.primitive.name))
    return None if inner is None else (getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))
