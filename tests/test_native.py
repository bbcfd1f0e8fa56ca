"""The compiled loop: equal to the plain scan, in values and every gradient, whatever the gates and the threads."""

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn._interpret import call
from jrnn.schedules import native, read
from jrnn.schedules.native import build
from jrnn.testing.bench import Bench
from tests.cases import CASES, HiddenAndMemory, Leaky, softsign

pytestmark = pytest.mark.skipif(not build.available()[0], reason=build.available()[1] or "")

# What is drawn at each step, what mixes units and what makes a projection of its own is refused; all else is served,
# steps that are read among it.
SERVED = {
    "elman", "elman_relu", "elman_sigmoid", "elman_function", "lstm", "peephole_lstm", "coupled_lstm", "gru_after",
    "mgu", "ugrnn", "leaky", "learned_state", "dropconnect", "residual", "stack_nested", "stack_embed", "bidirectional",
    "bidirectional_sum", "bidirectional_mean", "bidirectional_product", "bidirectional_function", "stack",
    "variational", "variational_gru", "zoneout", "zoneout_gru", "learned_and_wrapped", "highway", "wrapped_thrice",
    "zoneout_of_learned", "residual_of_wrapped", "highway_of_random", "stack_random", "bidirectional_random",
    "bidirectional_nested", "dense", "embed", "layer_norm", "activation", "dropout", "bidirectional_embed",
    "bidirectional_different", "residual_of_bidirectional", "variational_twice", "no_inputs",
    "emits_all", "emits_memory", "emits_all_wrapped", "antisymmetric", "antisymmetric_gated", "orthogonal_rnn",
    "echo_state", "slstm", "skip", "step_lstm", "project_and_update", "wrapper_with_an_update",
    "wrapper_with_a_projection", "zoneout_project", "drawing_decoder", "tied", "aging",
    # Without a product of the state.
    "indrnn", "indrnn_tanh", "dropconnect_indrnn", "counting", "min_gru", "min_lstm", "sru", "qrnn", "qrnn_wide",
    "bidirectional_qrnn", "zoneout_min_gru",
}  # fmt: skip
WITH_A_KEY = {
    "dropconnect", "variational", "variational_gru", "residual_of_wrapped", "highway_of_random", "dropout",
    "residual_of_bidirectional", "stack_nested", "variational_twice", "skip",
}  # fmt: skip
OPTIONS = [
    {"reverse": False, "remat": None, "batch": (2, 2)},
    {"reverse": True, "remat": 2, "batch": (5,), "lengths": None, "resets": None},
    {"reverse": True, "remat": None, "batch": (), "mask": None},
    {"reverse": False, "remat": 2, "batch": (4,)},
]


def in_turn(cases):
    return pytest.mark.parametrize(
        ("case", "options"),
        [
            pytest.param(case, OPTIONS[i % len(OPTIONS)], marks=() if case.full else pytest.mark.slow)
            for i, case in enumerate(cases)
        ],
        ids=lambda value: getattr(value, "name", ""),
    )


def check_row(case, options, served, **more):
    bench = Bench("native", case.layer, case.in_features, "float32", 1, False, None)
    options = dict(options)
    flow = {name: options.pop(name) for name in ("reverse", "remat")}
    trial = bench.trial(**options, **more)
    if case.name not in served:
        with pytest.raises(ValueError, match="backend: 'native' cannot run"):
            bench.run(trial, backend="native", **flow)
        return
    got = bench.run(trial, backend="native", **flow)
    bench.compare(got, bench.run(trial, backend="reference", **flow), f"{case.name} {options} {flow}")


@in_turn(CASES)
@pytest.mark.sampled(3)
def test_equals_the_plain_scan_float32(case, options):
    """With masks, resets and initial states; a row that is refused is one that should be."""
    check_row(case, options, SERVED)


@in_turn([case for case in CASES if case.name in SERVED and case.layer.uses_key is not False])
def test_equals_the_plain_scan_with_a_key(case, options):
    """What is drawn once a sequence is served; what is drawn at each step is not."""
    check_row(case, options, WITH_A_KEY, key=jax.random.key(5))


def data(cell, time, batch, features, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    # Interpreted, since other modules make their data while they are collected.
    params = call(functools.partial(cell.init, in_features=features), keys[0])
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(keys[1], a.shape), params)
    xs = jax.random.normal(keys[2], (time, batch, features))
    state = jax.tree.map(lambda a: jax.random.normal(keys[3], a.shape), cell.initial_state(params, (batch,)))
    marks = {
        "lengths": jax.random.randint(keys[4], (batch,), 0, time + 1),
        "resets": jax.random.bernoulli(keys[5], 0.2, (time, batch)),
    }
    if cell.uses_key:
        marks["key"] = jax.random.key(seed + 1)
    return params, xs, state, marks


def loss(cell, backend, marks):
    def of(params, xs, state):
        last, ys = jrnn.unroll(cell, params, xs, state, backend=backend, **marks)
        return jnp.sum(jnp.sin(ys) * jnp.cos(ys[:, ::-1])) + sum(jnp.sum(jnp.sin(leaf)) for leaf in last)

    return of


def assert_near(got, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1e-3 + float(jnp.abs(b).max(initial=0))))


SHARED = [
    (jrnn.lstm(64), 40, 16, 0, True),  # no input features
    (jrnn.lstm(200), 9, 16, 70, True),  # an odd number of blocks of units for two threads
    (jrnn.lstm(64), 9, 16, 70, False),  # the batch shared by threads, in several chunks
    (jrnn.gru(150), 6, 33, 100, True),  # the units shared, in blocks of which the last is short
    (jrnn.peephole_lstm(40), 300, 1, 3, True),  # few rows: panels taken together
    (jrnn.elman(37), 9, 1, 5, True),
    (jrnn.lstm(32), 1, 1, 5, False),  # a step, which reads the weights where they are
    (jrnn.variational(jrnn.gru(150), recurrent=0.4), 6, 33, 100, True),  # masks, likewise
]
SHARED_TOO = [
    (jrnn.variational(jrnn.gru(224), recurrent=0.4), 9, 5, 300, True),
    (jrnn.gru(96), 5, 2, 600, False),
    (jrnn.gru(37), 9, 3, 5, True),
    (jrnn.elman(17), 60, 7, 33, True),
    (jrnn.elman(2200), 1, 1, 3, False),  # fewer rows than threads
    (jrnn.gru(64), 3, 2, 13, True),
    (jrnn.peephole_lstm(96), 4, 3, 8, True),
    (jrnn.variational(jrnn.lstm(64), recurrent=0.4), 9, 16, 70, True),
    (jrnn.variational(jrnn.gru(37), inputs=0.3, recurrent=0.4), 9, 3, 5, True),
    (jrnn.variational(jrnn.lstm(32), recurrent=0.4), 2, 1, 5, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "time", "batch", "features", "marked"),
    [*SHARED, *(pytest.param(*row, marks=pytest.mark.nightly) for row in SHARED_TOO)],
    ids=lambda value: getattr(value, "hidden", value),
)
@pytest.mark.sampled(3)
def test_however_it_is_shared(cell, time, batch, features, marked):
    """Sizes at which threads share the batch, the units or nothing, and blocks that are not whole."""
    params, xs, state, marks = data(cell, time, batch, features)
    got, expected = (
        jax.jit(jax.value_and_grad(loss(cell, backend, marks if marked else {}), (0, 1, 2)))(params, xs, state)
        for backend in ("native", "reference")
    )
    assert_near(got, expected, 1e-4)


CHUNKED = [
    (jrnn.lstm(40), 70, 1, "sqrt"),  # one group of eight chunks that are made again side by side, and a rest
    (jrnn.gru(17), 32, 1, 2),  # two groups, no rest
    (jrnn.peephole_lstm(20), 16, 4, 3),  # groups of two
    (jrnn.elman(9), 13, 5, 3),  # each chunk by itself
    (jrnn.gru(8), 3, 1, 2),  # nothing but a rest
    (jrnn.lstm(32), 8, 1, 1),  # steps that read the weights where they are, made again by one that packs them
    (jrnn.elman(64), 4, 2, 1),
    (HiddenAndMemory(20), 25, 3, 4),
    (jrnn.variational(jrnn.gru(20), inputs=0.3, recurrent=0.4), 40, 2, 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "time", "batch", "remat", "reverse"),
    # Each compiles eight programs: in reverse only some of them do so every time.
    [
        pytest.param(*row, reverse, marks=[pytest.mark.nightly] * (reverse and i not in (1, 4)))
        for i, row in enumerate(CHUNKED)
        for reverse in (False, True)
    ],
    ids=lambda value: getattr(value, "hidden", value),
)
@pytest.mark.sampled(3)
def test_remat(cell, time, batch, remat, reverse):
    """With masks, resets and a state, however the steps fall into groups of chunks; some gradients are left out."""
    params, xs, state, marks = data(cell, time, batch, 3)
    for argnums in ((0, 1, 2), 0):
        got, expected = (
            jax.jit(jax.value_and_grad(loss(cell, backend, {**marks, "reverse": reverse, **kept}), argnums))(
                params, xs, state
            )
            for backend, kept in (("native", {"remat": remat}), ("reference", {}))
        )
        assert_near(got, expected, 1e-4)


@pytest.mark.smoke
def test_infinite_weights_stay_infinite():
    """In the last of the input weights too, of which there are fewer than are read at once."""
    cell = jrnn.elman(32, "linear")
    params = cell.init(jax.random.key(0), 11)
    params = {**params, "w_ih": params["w_ih"].at[8, 0].set(jnp.inf)}
    ys = jrnn.unroll(cell, params, jnp.ones((1, 1, 11)), backend="native")[1]
    assert jnp.isposinf(ys[0, 0, 0])
    assert jnp.isfinite(ys[0, 0, 1:]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_as_exact(dtype):
    """The error against float32 throughout, from the same rounded numbers, is about that of the plain scan."""
    cell = jrnn.gru(40)
    params, xs, state, marks = data(cell, 12, 5, 7)
    params = {n: a.astype(dtype).astype(a.dtype) if n.startswith("w_") else a for n, a in params.items()}
    xs = xs.astype(dtype)

    def outcome(backend, xs):
        run = lambda params, xs, state: jrnn.unroll(cell, params, xs, state, backend=backend, **marks)
        (last, ys), back = jax.vjp(run, params, xs, state)
        return (last, ys), back((jax.tree.map(jnp.ones_like, last), jnp.ones_like(ys)))

    got, plain = (jax.jit(outcome, static_argnums=0)(backend, xs) for backend in ("native", "reference"))
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, plain)
    exact = jax.jit(outcome, static_argnums=0)("reference", xs.astype(jnp.float32))
    difference = lambda a, b: float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
    ours, theirs = (max(jax.tree.leaves(jax.tree.map(difference, one, exact))) for one in (got, plain))
    assert ours <= 2 * theirs


@pytest.mark.parametrize(("hidden", "time"), [(64, 40), (200, 10)])
def test_the_same_twice(hidden, time):
    """Bit for bit, and by calls at the same time, whose threads are their own."""
    cell = jrnn.gru(hidden)
    params, xs, state, marks = data(cell, time, 16, 40)
    run = jax.jit(jax.value_and_grad(loss(cell, "native", marks), (0, 1, 2)))
    first = run(params, xs, state)
    with ThreadPoolExecutor(3) as pool:
        for other in pool.map(lambda _: run(params, xs, state), range(9)):
            assert jax.tree.all(jax.tree.map(np.array_equal, first, other))


@pytest.mark.parametrize(
    ("cell", "floats"),
    [(jrnn.elman(64), 1 + 1 + 1), (jrnn.lstm(64), 4 + 2 + 1), (jrnn.gru(64), 4 + 1 + 1)],
    ids=("elman", "lstm", "gru"),
)
def test_memory(cell, floats):
    """A gradient holds what the gates read, the states after each step and the cotangent of the outputs."""
    params = jax.eval_shape(lambda key: cell.init(key, 16), jax.random.key(0))
    xs = jax.ShapeDtypeStruct((1000, 8, 16), jnp.float32)
    gradient = jax.grad(lambda params, xs: jnp.sum(jrnn.unroll(cell, params, xs, backend="native")[1] ** 2))
    held = jax.jit(gradient).lower(params, xs).compile().memory_analysis().temp_size_in_bytes
    assert held <= 1.1 * floats * 1000 * 8 * 64 * 4


@pytest.mark.parametrize(
    ("time", "remat", "beside"), [(100_000, "sqrt", 20e6), (10_000, 2500, 24e6), (9999, 2500, 24e6)]
)
def test_memory_with_remat(time, remat, beside):
    """Outputs, and little else: the gradients of inputs are put where they belong, and what is made again is little."""
    cell, hidden = jrnn.lstm(256), 256
    params = jax.eval_shape(lambda key: cell.init(key, 64), jax.random.key(0))
    xs, weights = (jax.ShapeDtypeStruct((time, 1, n), jnp.float32) for n in (64, hidden))

    def total(params, xs, weights):
        return jnp.sum(jrnn.unroll(cell, params, xs, backend="native", remat=remat)[1] * weights)

    gradient = jax.jit(jax.value_and_grad(total, (0, 1)))
    held = gradient.lower(params, xs, weights).compile().memory_analysis().temp_size_in_bytes
    assert held <= 4 * time * hidden + beside


def test_nothing_to_run():
    cell = jrnn.lstm(3)
    params, _, state, _ = data(cell, 4, 2, 2)
    for shape in ((0, 2, 2), (4, 0, 2)):
        start = state if shape[1] else None
        got, expected = (jrnn.unroll(cell, params, jnp.ones(shape), start, backend=b) for b in ("native", "reference"))
        assert jax.tree.all(jax.tree.map(np.array_equal, got, expected))


# --- gates -------------------------------------------------------------------------------------------------------


FUNCTIONS = {
    "tanh": jnp.tanh, "logistic": jax.nn.sigmoid, "exp": jnp.exp, "relu": jax.nn.relu, "relu6": jax.nn.relu6,
    "softplus": jax.nn.softplus, "gelu": jax.nn.gelu, "exact_gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "erf": jax.lax.erf, "silu": jax.nn.silu, "elu": jax.nn.elu, "softsign": softsign,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_tanh": jax.nn.hard_tanh, "log": lambda x: jnp.log(1 + x * x), "sqrt": lambda x: jnp.sqrt(1 + x * x),
    "rsqrt": lambda x: jax.lax.rsqrt(1 + x * x), "sin": jnp.sin, "cos": jnp.cos, "cube": lambda x: x**3,
    "inverse": lambda x: (2 + x * x) ** -2, "sign": lambda x: jnp.sign(x) * x,
    "where": lambda x: jnp.where(x > 0.3, x, 0.1 * x),
    "logic": lambda x: jnp.where((x > 0) & ~(x > 1), x, 2 * x),
    "max": lambda x: jnp.maximum(x, 0.2) + jnp.minimum(x, -0.1),
    "expm1": jnp.expm1, "floor": lambda x: jnp.floor(x) + x,
    "power": lambda x: jnp.power(jnp.abs(x) + 1, 1.5),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5), "abs": jnp.abs, "arctan2": lambda x: jnp.arctan2(x, 2.0),
    "arcsin": lambda x: jnp.arcsin(0.3 * x), "arccos": lambda x: jnp.arccos(0.3 * x), "arctan": jnp.arctan,
    "arcsinh": jnp.arcsinh, "arccosh": lambda x: jnp.arccosh(1.1 + x * x), "arctanh": lambda x: jnp.arctanh(0.3 * x),
    "round": lambda x: jnp.round(10 * x) * x, "remainder": lambda x: jnp.remainder(x, 0.3),
    "integers": lambda x: jnp.clip((10 * x).astype(jnp.int32), -3, 4).astype(x.dtype) * x,
    "reduce_precision": lambda x: jax.lax.reduce_precision(x, 5, 10),
    "barrier": lambda x: sum(jax.lax.optimization_barrier((jnp.sin(x), jnp.cos(x)))),
}  # fmt: skip
GRID = np.concatenate(
    [np.linspace(-12, 12, 401), [0.0, -0.0, 1e-30, -1e-6, 100.0, -100.0, 3e38, -3e38, np.inf, -np.inf, np.nan]]
)


class FourStates(NamedTuple):
    h: Any
    logistic: Any
    exp: Any
    max: Any


@dataclasses.dataclass(frozen=True)
class Four(jrnn.AffineCell):
    """A function of the table in each state."""

    gate_names: ClassVar[tuple[str, ...]] = ("h",)
    state_type: ClassVar[Any] = FourStates

    def gates(self, theta, u, v, state):
        z = u[0] + v[0]
        return FourStates(*(FUNCTIONS[name](z) for name in ("tanh", "logistic", "exp", "max")))


class TwoStates(NamedTuple):
    """``h`` stands second."""

    trace: Any
    h: Any


@pytest.mark.slow
@dataclasses.dataclass(frozen=True)
class Everything(jrnn.AffineCell):
    """Two vectors in theta, a state that does not begin with h, and every function of the table in one gate."""

    gate_names: ClassVar[tuple[str, ...]] = ("a", "b")
    state_type: ClassVar[Any] = TwoStates

    def init_theta(self, key):
        return {"k": jax.random.normal(key, (self.hidden,)), "l": jnp.ones(self.hidden)}

    def gates(self, theta, u, v, state):
        a = sum(f(0.1 * u[0] + 0.05 * i) for i, f in enumerate(FUNCTIONS.values())) / len(FUNCTIONS)
        trace = jnp.tanh(theta["k"] * state.trace + a * v[0])
        return TwoStates(trace, jax.nn.sigmoid(u[1] + v[1] * theta["l"]) * trace)


def test_every_operation():
    """All functions in one cell (one compilation): values and gradients as XLA's."""
    cell = Everything(6)
    params, xs, state, marks = data(cell, 5, 3, 2)
    got, expected = (
        jax.jit(jax.value_and_grad(loss(cell, backend, marks), (0, 1, 2)))(params, xs, state)
        for backend in ("native", "reference")
    )
    assert_near(got, expected)


def test_values_over_the_whole_range():
    """One step on what float32 can hold: within a few ulp of the exact value; infinities and NaN as in XLA."""
    params = {"w_ih": jnp.ones((1, 1)), "w_hh": jnp.zeros((1, 1)), "b": jnp.zeros(1)}
    xs = jnp.asarray(GRID, jnp.float32)[None, :, None]
    last, _ = jrnn.unroll(Four(1), params, xs, backend="native")
    for got, name in zip(last, ("tanh", "logistic", "exp", "max"), strict=True):
        with jax.enable_x64(True), np.errstate(over="ignore"):
            exact = np.asarray(FUNCTIONS[name](jnp.asarray(np.asarray(xs[0], np.float64)))).astype(np.float32)
        # What is smaller than the smallest normal number has few digits, or none.
        np.testing.assert_allclose(got, exact, rtol=1e-6, atol=2e-38, err_msg=name)


class Mixing(jrnn.AffineCell):
    def gates(self, theta, u, v, state):
        return state._replace(h=jnp.cumsum(jnp.tanh(u[0] + v[0]), -1))


class Gamma(jrnn.AffineCell):
    elementwise: ClassVar[Any] = True

    def gates(self, theta, u, v, state):
        return state._replace(h=jax.lax.lgamma(2 + jnp.tanh(u[0] + v[0])))


class Scalar(jrnn.AffineCell):
    def init_theta(self, key):
        return {"scale": jnp.ones(())}

    def gates(self, theta, u, v, state):
        return state._replace(h=jnp.tanh(theta["scale"] * (u[0] + v[0])))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Mixing(4), "elementwise over H: 'cumsum'"),
        (Scalar(4), r"shape \(\), and is no vector"),
        (Gamma(4), "lgamma"),
        (jrnn.gru(4, "before"), "affine cells"),
        (jrnn.layer_norm_lstm(4), "its input projection|no vector"),
    ],
    ids=("mixing", "scalar", "operation", "kind", "projection"),
)
def test_refusals(cell, reason):
    params = cell.init(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=rf"backend: 'native' cannot run .*({reason})"):
        jrnn.unroll(cell, params, jnp.ones((4, 2, 3)), backend="native")


# --- gates that read sizes, hold constants or choose -------------------------------------------------------------


@jax.custom_vjp
def straight(x):
    """Rounded forwards, as if it were not backwards."""
    return jnp.round(3 * x)


straight.defvjp(lambda x: (straight(x), x), lambda x, d: (3 * d * (1 - jnp.tanh(x) ** 2),))


@jax.custom_vjp
def shrinking(x):
    """The size is read by the derivative alone."""
    return jnp.tanh(x)


shrinking.defvjp(lambda x: (jnp.tanh(x), None), lambda _, d: (d / d.size,))


@jax.custom_vjp
def clipped(k):
    """The gradient is clipped, which is one thing for each sequence and another for all together."""
    return k


clipped.defvjp(lambda k: (k, None), lambda _, d: (jnp.clip(d, -0.1, 0.1),))

TABLE = np.linspace(-1, 2, 21, dtype=np.float32)

# By name, a function of z (*B, H) and of a vector k (H,), where H is 21.
GATES = {
    "custom_vjp": lambda z, k: jnp.tanh(straight(k)) * jnp.tanh(z),
    "constant_numpy": lambda z, k: jnp.tanh(z) * TABLE + k,
    "constant_made": lambda z, k: jnp.sin(z + jnp.sqrt(jnp.arange(21, dtype=z.dtype)) * k),
    "constant_mask": lambda z, k: jnp.where(jnp.arange(21) % 2 == 0, jnp.tanh(z), k * z * 0.1),
    "constant_integers": lambda z, k: jnp.where((k > 1).astype(jnp.int32) + jnp.arange(21) < 5, jnp.tanh(z), k),
    "constant_broadcast": lambda z, k: jnp.tanh(z) * jnp.broadcast_to(TABLE, z.shape),
    "constant_special": lambda z, k: jnp.where(TABLE > 0, jnp.tanh(z), jnp.where(TABLE > 1, np.float32(np.inf), -0.0)),
    "cond": lambda z, k: jax.lax.cond(z.shape[-1] > 20, jnp.tanh, jnp.sin, z) * k,
    "cond_by_unit": lambda z, k: jnp.vectorize(lambda z: jax.lax.cond(z > 0, jnp.tanh, jnp.sin, z))(z) * k,
    "switch": lambda z, k: jax.lax.switch(1, [jnp.tanh, jnp.sin], k * z),
    "features": lambda z, k: jnp.tanh(z) * k / np.sqrt(z.shape[-1], dtype=np.float32),
    "key": lambda z, k: jnp.tanh(z + jax.random.normal(jax.random.key(0), (21,))),
    "reduce_precision": lambda z, k: jax.lax.reduce_precision(k * jnp.ceil(z), 8, 3) * jnp.tanh(z),
    "barrier": lambda z, k: jnp.multiply(*jax.lax.optimization_barrier((jnp.tanh(z), k))),
}  # fmt: skip
# Likewise, but what they do depends on the batch shape.
SIZED = {
    "size": lambda z, k: jnp.tanh(z) * 100 / z.size,
    "ndim": lambda z, k: jnp.sin(z) * k * z.ndim,
    "batch": lambda z, k: jnp.tanh(z) / z.shape[0],
    "product": lambda z, k: jnp.tanh(z) * 100 / math.prod(z.shape),
    "derivative": lambda z, k: shrinking(z) * k,
    "clipped": lambda z, k: jnp.tanh(z) * clipped(k),
    "sequences": lambda z, k: jnp.tanh(z) * jnp.arange(z.size, dtype=z.dtype).reshape(z.shape) / z.size,
}


@functools.cache
def named(names):
    """The state with a field for each name: one type, however often it is asked for."""
    return NamedTuple("Named", [("h", Any), *((name, Any) for name in names)])


@dataclasses.dataclass(frozen=True)
class Gated(jrnn.AffineCell):
    """A state for each function of the tables that is named, and h, their mean; it promises what is asked."""

    names: tuple[str, ...] = ()
    promised: bool | None = None

    @property
    def elementwise(self):
        return self.promised

    @property
    def state_type(self):
        return named(self.names)

    def init_theta(self, key):
        return {"k": 1 + 0.1 * jax.random.normal(key, (self.hidden,))}

    def gates(self, theta, u, v, state):
        new = {name: {**GATES, **SIZED}[name](u[0] + v[0], theta["k"]) for name in self.names}
        return state._replace(h=sum(new.values()) / len(new), **new)


@pytest.mark.slow
def differentiated(cell, batch, backend):
    """The last state and gradients of a run, and of one over a further axis by `jax.vmap`."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = cell.init(keys[0], 3)
    xs = jax.random.normal(keys[1], (4, *batch, 3))

    def total(params, xs):
        last, ys = jrnn.unroll(cell, params, xs, backend=backend)
        return jnp.sum(ys**2) + sum(jnp.sum(jnp.sin(leaf)) for leaf in last), last

    run = lambda xs: jax.value_and_grad(total, (0, 1), has_aux=True)(params, xs)
    return jax.jit(run)(xs), jax.jit(jax.vmap(run))(jnp.stack([xs, -xs]))


def test_gates_are_served():
    """Constants, conditions and derivatives of one's own."""
    cell = Gated(21, names=tuple(GATES))
    got, expected = (differentiated(cell, (2, 2), backend) for backend in ("native", "reference"))
    assert_near(got, expected)


@pytest.mark.parametrize(("hidden", "batch"), [(1, (3,)), (21, (1,)), (21, (21,)), (3, ())])
def test_gates_of_one_unit_or_sequence_are_read(hidden, batch):
    """Where sizes say nothing about which axis is which."""
    cell = jrnn.peephole_lstm(hidden)
    params = cell.init(jax.random.key(0), 3)
    state = cell.initial_state(params, batch)
    header, usual = (
        native.read_gates(cell.form(params), state)[1],
        native.read_gates(cell.form(params), cell.initial_state(params, (2,)))[1],
    )
    assert header == usual


@pytest.mark.parametrize("promised", [None, True])
@pytest.mark.parametrize("name", SIZED)
def test_gates_that_depend_on_the_batch_are_refused(name, promised):
    cell = Gated(21, names=(name,), promised=promised)
    params = cell.init(jax.random.key(0), 3)
    for batch in ((), (2,), (21,)):
        with pytest.raises(ValueError, match=r"cannot run .*(the shape of the batch|between sequences|over sequences)"):
            jrnn.unroll(cell, params, jnp.ones((4, *batch, 3)), backend="native")


def test_gates_that_depend_on_the_batch_are_right_by_default():
    cell = Gated(21, names=tuple(SIZED))
    params = cell.init(jax.random.key(0), 3)
    assert jrnn.choose_backend(cell, params, jnp.ones((400, 8, 3)))[0] == "hoisted"
    got, expected = (differentiated(cell, (8,), backend) for backend in (None, "reference"))
    assert_near(got, expected)


@dataclasses.dataclass(frozen=True)
class Printing(jrnn.AffineCell):
    def gates(self, theta, u, v, state):
        jax.debug.print("{}", u[0])
        return state._replace(h=jnp.tanh(u[0] + v[0]))


def test_gates_with_a_side_effect_are_refused():
    cell = Printing(4)
    with pytest.raises(ValueError, match="has a side effect"):
        jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((4, 2, 3)), backend="native")


def saturated(cell, backend):
    """Gradients of the sum of outputs where one input is a unix time, and so all gates are at their limits."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = cell.init(keys[0], 3)
    xs = jax.random.normal(keys[1], (20, 4, 3)).at[:, :, 0].set(1.7e9)
    return jax.grad(lambda params, xs: jnp.sum(jrnn.unroll(cell, params, xs, backend=backend)[1]), (0, 1))(params, xs)


@pytest.mark.parametrize("cell", [jrnn.elman(16), jrnn.lstm(16), jrnn.gru(16), jrnn.elman(16, "gelu")], ids=repr)
def test_saturated_gates_have_no_gradient(cell):
    got, expected = (saturated(cell, backend) for backend in ("native", "reference"))
    assert_near(got, expected)


def test_infinite_states_are_not_gated_away():
    """A gate at its limit is zero, and zero times infinity is NaN, as in the plain scan."""
    cell = jrnn.lstm(4)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 1))
    params["b"] = params["b"].at[4:8].set(-200.0)
    state = cell.initial_state(params, (2,))
    state = state._replace(c=jnp.full_like(state.c, jnp.inf))
    got, expected = (
        jrnn.unroll(cell, params, jnp.ones((3, 2, 1)), state, backend=backend) for backend in ("native", "reference")
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), got, expected))
    assert jnp.isnan(got[1]).all()


def test_float64_is_refused():
    with jax.enable_x64(True):
        cell = jrnn.lstm(4)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), cell.init(jax.random.key(0), 3))
        with pytest.raises(ValueError, match="float32 only"):
            jrnn.unroll(cell, params, jnp.ones((4, 2, 3), jnp.float64), backend="native")


@pytest.mark.smoke
def test_header_of_a_users_cell():
    """What is promised of a cell of one's own holds: its gates are in the header."""
    cell = Leaky(4)
    params = cell.init(jax.random.key(0), 3)
    header = native.read_gates(cell.form(params), cell.initial_state(params, ()))[1]
    assert "GATES = 2, SUMS = 2, PARTS = 2" in header
    assert read.slots((True, False, True)) == (0, 3, 2)


@pytest.mark.parametrize(
    "cell", [jrnn.lstm(4), jrnn.slstm(4), jrnn.elman(4, "softplus"), jrnn.elman(4, "elu")], ids=repr
)
def test_gates_are_vectors_throughout(cell):
    """No function of the C library is called lane by lane: one such call takes longer than all other operations."""
    params = cell.init(jax.random.key(0), 3)
    header = native.read_gates(cell.form(params), cell.initial_state(params, ()))[1]
    assert "each(" not in header
