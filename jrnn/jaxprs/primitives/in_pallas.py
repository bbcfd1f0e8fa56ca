"""Operations that some kernel languages lack, expressed in operations that every kernel language has.

Near zero, `log1p` and `expm1` have a small absolute error, but not a small relative error.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def same(params: Any, x: Any) -> Any:
    return x


def add(params: Any, x: Any, y: Any) -> Any:
    return lax.add(x, y)


def expm1(params: Any, x: Any) -> Any:
    return lax.exp(x) - 1


def log1p(params: Any, x: Any) -> Any:
    return lax.log(1 + x)


def one_minus_square(params: Any, x: Any) -> Any:
    return 1 - x * x


def sqrt(params: Any, x: Any) -> Any:
    return lax.select(lax.eq(x, lax.full_like(x, 0)), x, x * lax.rsqrt(x))


def integer_pow(params: Any, x: Any) -> Any:
    return _power(x, params["y"])


def _power(x: jax.Array, y: int) -> jax.Array:
    if y < 0:
        return 1 / _power(x, -y)
    half = None if y < 2 else _power(x, y // 2)
    square = lax.full_like(x, 1) if half is None else half * half
    return square * x if y % 2 else square
