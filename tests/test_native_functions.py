"""Every operation that gates in C++ may consist of, against XLA over the whole range of float32."""

import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jrnn
from jrnn.jaxprs.primitives import TABLE
from jrnn.schedules.native import build
from tests.conftest import OPTIMIZED

pytestmark = pytest.mark.skipif(not build.available()[0], reason=build.available()[1] or "")


def rounded_as(rounding):
    return lambda x: lax.round(x, rounding)


def power(y):
    return lambda x: lax.integer_pow(x, y)


def reduced(exponent, mantissa):
    return lambda x: lax.reduce_precision(x, exponent, mantissa)


def compared(name):
    return lambda x, y: getattr(lax, name)(x, y).astype(x.dtype)


# How far, in units in the last place, each may be from what XLA gives. Where that is more than a few it is XLA that is
# so far from the exact value.
ULP = {"cosh": 32, "erfc": 128, "exp2": 128, "sinh": 32}
UNARY = {
    **{name: getattr(lax, name) for name in (
        "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "cos", "cosh", "erf", "erfc", "exp",
        "exp2", "expm1", "floor", "log", "log1p", "logistic", "neg", "rsqrt", "sign", "sin", "sinh", "sqrt", "square",
        "tan", "tanh",
    )},
    "clamp": lambda x: lax.clamp(-0.5, x, 0.5),
    "clamp_to_zero": lambda x: lax.clamp(0.0, x, 1.0),
    "is_finite": lambda x: lax.is_finite(x).astype(x.dtype),
    "round_to_even": rounded_as(lax.RoundingMethod.TO_NEAREST_EVEN),
    "round_away": rounded_as(lax.RoundingMethod.AWAY_FROM_ZERO),
    **{f"power_{y}": power(y) for y in (-3, -1, 0, 1, 2, 7, 12)},
    **{f"precision_{e}_{m}": reduced(e, m) for e, m in ((8, 7), (5, 10), (4, 3), (5, 2), (8, 23), (8, 10))},
    "integers": lambda x: lax.convert_element_type(lax.convert_element_type(x, jnp.int32), jnp.float32),
    "bits": lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) ^ jnp.int32(1), jnp.float32),
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}  # fmt: skip
BINARY = {
    **{name: getattr(lax, name) for name in ("add", "atan2", "div", "max", "min", "mul", "pow", "rem", "sub")},
    **{name: compared(name) for name in ("eq", "ge", "gt", "le", "lt", "ne")},
}

HIDDEN = 1024
SPECIAL = np.array([
    0, 1e-45, 1e-40, 1.1754944e-38, 1e-30, 1e-6, 4e-4, 0.1, 0.25, 0.5, 0.99999994, 1, 1.0000001, 2, 2.5, 3, 4, 7.9,
    7.99, 8, 9, 10, 20, 87, 87.4, 88, 88.7, 88.8, 100, 104, 2**23 + 1, 2**31, 1e10, 1e20, 3.4028235e38, np.inf,
], np.float32)  # fmt: skip
SPECIAL = np.concatenate([SPECIAL, -SPECIAL, [np.float32(np.nan)]])


@functools.cache
def table(names, binary):
    """A cell that makes each function's result a state of its own, from operands that are states too."""
    results = [f"result_{i}" for i in range(len(names))]

    class Table(jrnn.AffineCell):
        state_type: ClassVar[Any] = NamedTuple("Results", [(field, Any) for field in ("h", "a", "b", *results)])

        def gates(self, theta, u, v, state):
            functions, operands = (BINARY, (state.a, state.b)) if binary else (UNARY, (state.a,))
            values = [functions[name](*operands) for name in names]
            return state._replace(h=0 * u[0], **dict(zip(results, values, strict=True)))

    return Table(HIDDEN)


def results(names, operands, backend):
    cell = table(names, len(operands) == 2)
    rows = [np.resize(a, (-(-a.size // HIDDEN), HIDDEN)) for a in operands]
    params = {"w_ih": jnp.zeros((1, HIDDEN)), "w_hh": jnp.zeros((HIDDEN, HIDDEN)), "b": jnp.zeros(HIDDEN)}
    nothing = np.zeros_like(rows[0])
    state = cell.state_type(nothing, rows[0], rows[-1], *(nothing for _ in names))
    last, _ = jax.jit(
        lambda state: jrnn.unroll(cell, params, jnp.zeros((1, len(nothing), 1)), state, backend=backend),
        compiler_options=OPTIMIZED,  # without optimization XLA approximates some functions in another way
    )(jax.tree.map(jnp.asarray, state))
    return rows, dict(zip(names, map(np.asarray, last[3:]), strict=True))


def ordered(x):
    """Consecutive integers for consecutive floats."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def assert_as_xla(name, rows, got, expected):
    """Limits, infinities, NaN and zeros (with their signs) are those of XLA, to which subnormal numbers are zeros."""
    tiny = np.finfo(np.float32).tiny
    got, expected = (np.where(np.abs(a) < tiny, np.copysign(np.float32(0), a), a) for a in (got, expected))
    with np.errstate(invalid="ignore"):
        wrong = np.isnan(got) != np.isnan(expected)
        wrong |= ~np.isnan(expected) & ~(np.isfinite(got) & np.isfinite(expected)) & (got != expected)
        if name != "asin":  # XLA's is zero from 2.4e-38 on, and not itself
            wrong |= (got == 0) != (expected == 0)
        wrong |= (got == 0) & (expected == 0) & (np.signbit(got) != np.signbit(expected))
        if name in ("tanh", "logistic"):
            wrong |= (np.abs(expected) == 1) & (np.abs(rows[0]) > 16.7) & (got != expected)
        if name == "tanh":
            wrong |= (np.abs(expected) == 1) != (np.abs(got) == 1)
    numbers = np.isfinite(got) & np.isfinite(expected) & (got != 0) & (expected != 0)
    wrong |= numbers & (np.abs(ordered(got) - ordered(expected)) > ULP.get(name, 5))
    where = np.flatnonzero(wrong)[:5]
    assert not where.size, [tuple(float(a.flat[i]) for a in (*rows, got, expected)) for i in where]


@functools.cache
def swept(names):
    """Results at a dense sweep of all floats, NaN and subnormal ones among them."""
    every = np.arange(0, 2**32, 2**12 - 1, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = np.linspace(-110, 110, 2**18, dtype=np.float32)
    operands = (np.concatenate([SPECIAL, every, near]),)
    (rows, got), (_, expected) = (results(names, operands, backend) for backend in ("native", "reference"))
    return rows, got, expected


@pytest.mark.parametrize("name", UNARY)
def test_one_operand(name):
    rows, got, expected = swept(tuple(UNARY))
    assert_as_xla(name, rows, got[name], expected[name])


@functools.cache
def paired(names):
    """Results at all pairs of special values, at pairs of any floats, and at pairs of moderate size."""
    a, b = (m.ravel() for m in np.meshgrid(SPECIAL, SPECIAL))
    random = np.random.default_rng(0)
    bits = [random.integers(0, 2**32, 2**17, dtype=np.uint32).view(np.float32) for _ in range(2)]
    sizes = [np.exp(random.normal(0, 3, 2**16)).astype(np.float32) for _ in range(2)]
    operands = (np.concatenate([a, bits[0], sizes[0], -sizes[0]]), np.concatenate([b, bits[1], sizes[1], sizes[1]]))
    (rows, got), (_, expected) = (results(names, operands, backend) for backend in ("native", "reference"))
    return rows, got, expected


@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name):
    rows, got, expected = paired(tuple(BINARY))
    assert_as_xla(name, rows, got[name], expected[name])


def test_nothing_is_left_out():
    """An operation whose C++ is added to the table is added here."""
    spelt = {"is_finite", "clamp", *UNARY, *BINARY}
    spelt |= {"integer_pow", "polynomial", "reduce_precision", "round"}  # by their parameters, under other names
    derivatives = {"add_any", "one_minus_square"}  # only as part of gradients, or of sums that are here
    undifferentiated = {"nextafter"}  # has no derivative in JAX, so no gates hold it
    known = {row.name for row in TABLE.values() if row.floats is not None}
    assert known - derivatives - undifferentiated <= spelt
