"""Operations in C++ on vectors (see `schedules/native/vectors.h`) that a template of the operands cannot express."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = ["BOOL", "FLOAT", "INT", "KINDS", "UINT"]

# The vector type of each dtype. A vector of booleans is a mask: a vector of integers that are 0 or -1.
FLOAT, INT, UINT, BOOL = map(np.dtype, (np.float32, np.int32, np.uint32, np.bool_))
KINDS = {FLOAT: "vf", INT: "vi", UINT: "vu", BOOL: "vi"}

# Conversions from one kind to another.
_CONVERSIONS = {
    (FLOAT, INT): "vint({0})", (FLOAT, BOOL): "{0} != 0.0f", (INT, FLOAT): "__builtin_convertvector({0}, vf)",
    (INT, BOOL): "{0} != 0", (BOOL, FLOAT): "{0} ? splat(1) : splat(0)", (BOOL, INT): "-{0}",
    (INT, UINT): "(vu){0}", (UINT, INT): "(vi){0}", (UINT, FLOAT): "__builtin_convertvector({0}, vf)",
    (UINT, BOOL): "{0} != 0", (BOOL, UINT): "(vu)-{0}",
}  # fmt: skip


def convert(params: Any, dtypes: Any, dtype: Any, x: str) -> str | None:
    template = "{0}" if dtypes[0] == dtype else _CONVERSIONS.get((dtypes[0], dtype))
    return None if template is None else template.format(x)


def bitcast(params: Any, dtypes: Any, dtype: Any, x: str) -> str | None:
    return None if BOOL in (dtypes[0], dtype) else f"({KINDS[dtype]})({x})"


def select(params: Any, dtypes: Any, dtype: Any, which: str, *cases: str) -> str | None:
    if len(cases) != 2 or dtypes[0] == FLOAT:
        return None
    which = which if dtypes[0] == BOOL else f"({which} != 0)"
    return f"{which} ? {cases[1]} : {cases[0]}"


def library(function: str) -> Callable[..., str]:
    """A function of the C library, lane by lane (as a builtin, which needs no header)."""

    def text(params: Any, *values: str) -> str:
        arguments = ("float a", "float b")[: len(values)]
        given = ", ".join("ab"[: len(values)])
        return f"each([]({', '.join(arguments)}) {{ return __builtin_{function}({given}); }}, {', '.join(values)})"

    return text


def round(params: Any, x: str) -> str:
    even = params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN
    return library("rintf" if even else "roundf")(params, x)


def power(params: Any, x: str) -> str:
    """A power as the product of the same squares as in XLA, so that it rounds in the same way."""
    exponent = params["y"]
    left, square, factors = abs(exponent), x, []
    while left:
        if left & 1:
            factors.append(square)
        square, left = f"vsquare({square})", left // 2
    product = " * ".join(factors) or "splat(1)"
    return product if exponent >= 0 else f"1.0f / ({product})"


def polynomial(params: Any, x: str, *factors: str) -> str:
    return functools.reduce(lambda sum, factor: f"({sum}) * {x} + {factor}", reversed(factors))


def reduce_precision(params: Any, x: str) -> str:
    return f"vreduce<{params['exponent_bits']}, {params['mantissa_bits']}>({x})"
