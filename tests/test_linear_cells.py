"""Cells that are linear in their state, against their equations in NumPy, on every schedule that runs them.

An oracle is ``(xp, p, x, *state) -> (state, y)`` for one unbatched step, as in `tests/test_cells.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import testing
from jrnn.schedules import associative, linear

F, H, N, T = 3, 4, 5, 7


def sigmoid(xp, z):
    return 1 / (1 + xp.exp(-z))


def gates(p, x, count):
    return [x @ p["w_ih"][:, k * H : (k + 1) * H] + p["b"][k * H : (k + 1) * H] for k in range(count)]


def positive(xp, x):
    return xp.where(x >= 0, x + 0.5, sigmoid(xp, x))


def min_gru(xp, p, x, h):
    z, n = gates(p, x, 2)
    z = sigmoid(xp, z)
    h = (1 - z) * h + z * positive(xp, n)
    return (h,), h


def min_lstm(xp, p, x, h):
    i, f, n = gates(p, x, 3)
    i, f = sigmoid(xp, i), sigmoid(xp, f)
    h = f / (f + i) * h + i / (f + i) * positive(xp, n)
    return (h,), h


def sru(g):
    def step(xp, p, x, c):
        w, b = p["w_ih"], p["b"]
        f, r = sigmoid(xp, x @ w[:, H : 2 * H] + b[:H]), sigmoid(xp, x @ w[:, 2 * H :] + b[H:])
        c = f * c + (1 - f) * (x @ w[:, :H])
        return (c,), r * g(xp, c) + (1 - r) * (x @ p["w_skip"] if "w_skip" in p else x)

    return step


def qrnn(pooling, window):
    def step(xp, p, x, c, past):
        wide = xp.concatenate([past.reshape(-1), x])
        z, f, *rest = gates(p, wide, len(pooling) + 1)
        f = sigmoid(xp, f)
        c = f * c + (sigmoid(xp, rest[0]) if pooling == "ifo" else 1 - f) * xp.tanh(z)
        past = xp.concatenate([past, x[None]])[1:]
        return (c, past), c if pooling == "f" else sigmoid(xp, rest[-1]) * c

    return step


def halves(w, axis):
    n = w.shape[axis] // 2
    return (w[:, :n] + 1j * w[:, n:]) if axis else (w[:n] + 1j * w[n:])


def lru(xp, p, x, h):
    eigenvalue = xp.exp(-xp.exp(p["nu_log"]) + 1j * xp.exp(p["theta_log"]))
    h = eigenvalue * h + xp.exp(p["gamma_log"]) * (x @ halves(p["w_b"], 1))
    return (h,), xp.real(h @ halves(p["w_c"], 0)) + x @ p["w_d"]


def s5(xp, p, x, h):
    eigenvalue, step = -xp.exp(p["decay_log"]) + 1j * p["frequency"], xp.exp(p["step_log"])
    turn = xp.exp(eigenvalue * step)
    h = turn * h + (turn - 1) / eigenvalue * (x @ halves(p["w_b"], 1))
    return (h,), 2 * xp.real(h @ halves(p["w_c"], 0)) + x @ p["w_d"]


def rg_lru(xp, p, x, h):
    r, i = (sigmoid(xp, g) for g in gates(p, x, 2))
    a = sigmoid(xp, p["decay"]) ** (8 * r)
    h = a * h + xp.sqrt(1 - a**2) * (i * x)
    return (h,), h


CELLS = {
    "min_gru": (jrnn.min_gru(H), F, min_gru),
    "min_lstm": (jrnn.min_lstm(H), F, min_lstm),
    "sru": (jrnn.sru(H), F, sru(lambda xp, c: xp.tanh(c))),
    "sru_square": (jrnn.sru(H, activation="linear"), H, sru(lambda xp, c: c)),
    "qrnn": (jrnn.qrnn(H), F, qrnn("fo", 2)),
    "qrnn_f": (jrnn.qrnn(H, 1, pooling="f"), F, qrnn("f", 1)),
    "qrnn_ifo": (jrnn.qrnn(H, 3, pooling="ifo"), F, qrnn("ifo", 3)),
    "lru": (jrnn.lru(H, N), F, lru),
    "s5": (jrnn.s5(H, N), F, s5),
    "s5_lin": (jrnn.s5(H, N, spectrum="s4d_lin"), F, s5),
    "s5_inv": (jrnn.s5(H, N, spectrum="s4d_inv"), F, s5),
    "rg_lru": (jrnn.rg_lru(H), H, rg_lru),
}


def fold(xp, step, p, state, xs):
    ys = []
    for x in xs:
        state, y = step(xp, p, x, *state)
        ys.append(y)
    return state, xp.stack(ys)


@pytest.fixture
def case(request, x64):
    """A cell, its oracle, and random float64 parameters, state and inputs."""
    cell, features, step = CELLS[request.param]
    rng = np.random.default_rng(0)
    params = cell.init(jax.random.key(0), features)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * rng.normal(size=p.shape), params)

    def draw(leaf):
        value = rng.normal(size=leaf.shape)
        return value + 1j * rng.normal(size=leaf.shape) if np.iscomplexobj(leaf) else value

    return cell, step, params, jax.tree.map(draw, cell.initial_state(params, ())), rng.normal(size=(T, features))


every_cell = pytest.mark.parametrize("case", CELLS, indirect=True)
every_backend = pytest.mark.parametrize("backend", [None, "reference", "hoisted", "associative"])


def served(backend, cell):
    return "reference" if backend == "hoisted" and not cell.hoistable else backend


@every_cell
@every_backend
def test_values_equal_the_equations_in_numpy(case, quick_compilation, backend):
    cell, step, params, state, xs = case
    expected_state, expected = fold(np, step, params, tuple(state), xs)
    got_state, got = jrnn.unroll(cell, params, xs, state, backend=served(backend, cell))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, atol=1e-12)
    for a, b in zip(got_state, expected_state, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
@every_cell
@pytest.mark.parametrize("backend", ["reference", "associative"])
def test_every_gradient_equals_that_of_the_equations(case, quick_compilation, backend):
    cell, step, params, state, xs = case
    rng = np.random.default_rng(1)
    _, ys = jax.eval_shape(lambda: jrnn.unroll(cell, params, xs, state))
    weights = rng.normal(size=ys.shape)
    ends = [rng.normal(size=s.shape) for s in state]

    def loss(result):
        last, ys = result
        parts = [jnp.sum((s.real + 2 * s.imag) * w) for s, w in zip(last, ends, strict=True)]
        return jnp.sum(ys * weights) + sum(parts)

    args = (params, jax.tree.map(jnp.asarray, state), jnp.asarray(xs))
    got = jax.jit(jax.grad(lambda p, s, x: loss(jrnn.unroll(cell, p, x, s, backend=backend)), argnums=(0, 1, 2)))(*args)
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(jax.grad(lambda p, s, x: loss(fold(jnp, step, p, tuple(s), x)), argnums=(0, 1, 2)))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected) if leaf.size), "a gradient nobody tests"


@every_cell
def test_float32_is_the_default_and_near_float64(case):
    cell, step, params, state, xs = case

    def single(a):
        return jnp.asarray(a, jnp.complex64 if np.iscomplexobj(a) else jnp.float32)

    p, s, x = jax.tree.map(single, (params, state, xs))
    _, ys = jrnn.unroll(cell, p, x, s)
    assert ys.dtype == jnp.float32
    np.testing.assert_allclose(ys, fold(np, step, params, tuple(state), xs)[1], atol=5e-5)


@pytest.mark.parametrize("name", CELLS)
def test_equal_calls_give_equal_cells(name):
    cell = CELLS[name][0]
    twin = dataclasses.replace(cell)
    assert twin == cell
    assert hash(twin) == hash(cell)
    assert len({c for c, _, _ in CELLS.values()}) == len(CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_the_associative_schedule_is_the_default(name):
    cell, features, _ = CELLS[name]
    params = cell.init(jax.random.key(0), features)
    chosen, reason = jrnn.choose_backend(cell, params, jnp.ones((T, 2, features)))
    assert chosen == "associative", reason


@pytest.mark.usefixtures("quick_compilation")
def test_a_long_sequence_runs_as_compiled_code_and_equals_the_scan():
    cell = jrnn.min_gru(16)
    params = cell.init(jax.random.key(0), 8)
    xs = jax.random.normal(jax.random.key(1), (2000, 3, 8))
    assert jrnn.choose_backend(cell, params, xs)[0] == "native"
    lengths = jnp.array([2000, 1500, 0])
    resets = jax.random.bernoulli(jax.random.key(2), 0.01, (2000, 3))

    def run(params, xs, backend):
        state, ys = jrnn.unroll(cell, params, xs, lengths=lengths, resets=resets, backend=backend)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(state.h)

    expected, *found = (jax.value_and_grad(run, (0, 1))(params, xs, b) for b in ("reference", "associative", "native"))
    for got in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


@dataclasses.dataclass(frozen=True)
class Charged(jrnn.LinearCell):
    """A user's cell that starts at one, with the same decay at every step."""

    hidden: int

    def init(self, key, in_features):
        return {"w": jax.random.normal(key, (in_features, self.hidden))}

    def initial_state(self, params, batch_shape):
        return jrnn.HiddenState(jnp.ones((*batch_shape, self.hidden), params["w"].dtype))

    def coefficients(self, params, xs):
        return 0.5, jrnn.product(xs, params["w"])

    def readout(self, params, h, xs):
        return jnp.tanh(h)


@pytest.mark.usefixtures("quick_compilation")
def test_a_users_cell_keeps_every_law():
    testing.check_cell(Charged(3), 2, dtype="float64", laws=[
        law for law in testing.LAWS if law not in (testing.check_jit, testing.check_compiles_once)
    ])  # fmt: skip
    params = Charged(3).init(jax.random.key(0), 2)
    assert jrnn.choose_backend(Charged(3), params, jnp.ones((4, 2)))[0] == "associative"


def test_a_cell_with_a_step_of_its_own_is_not_linear():
    class Own(Charged):
        def step(self, params, state, x, key=None):
            state, y = super().step(params, state, x, key)
            return jrnn.HiddenState(jnp.tanh(state.h)), y

    params = Own(3).init(jax.random.key(0), 2)
    assert jrnn.choose_backend(Own(3), params, jnp.ones((4, 2)))[0] != "associative"
    with pytest.raises(ValueError, match=r"'associative' cannot run .*Own.*it runs linear cells"):
        jrnn.unroll(Own(3), params, jnp.ones((4, 2)), backend="associative")
    with pytest.raises(ValueError, match=r"'associative' cannot run lstm.*it runs linear cells"):
        jrnn.unroll(jrnn.lstm(3), jrnn.lstm(3).init(jax.random.key(0), 2), jnp.ones((4, 2)), backend="associative")


def test_minimal_cells_stay_finite_where_gates_underflow():
    for cell in (jrnn.min_lstm(H), jrnn.min_gru(H), jrnn.rg_lru(H)):
        params = cell.init(jax.random.key(0), H)
        for value in (-1e4, 1e4):
            xs = jnp.full((5, H), value)
            got, found = jax.value_and_grad(lambda p, xs=xs, cell=cell: jrnn.unroll(cell, p, xs)[1].sum())(params)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((got, found)))


def test_lru_starts_on_its_ring():
    cell = jrnn.lru(2, 500, r_min=0.8, r_max=0.95, max_phase=0.3)
    params = cell.init(jax.random.key(0), 3)
    eigenvalues = np.exp(-np.exp(params["nu_log"]) + 1j * np.exp(params["theta_log"]))
    assert 0.8 <= np.abs(eigenvalues).min() < 0.81
    assert 0.94 < np.abs(eigenvalues).max() <= 0.95
    assert 0 <= np.angle(eigenvalues).min() < np.angle(eigenvalues).max() <= 0.3
    np.testing.assert_allclose(np.exp(params["gamma_log"]), np.sqrt(1 - np.abs(eigenvalues) ** 2), rtol=1e-4)


def test_s5_starts_at_hippo():
    """The normal part of HiPPO-LegS, whose every impulse response its eigenvalues and vectors give."""
    n = np.arange(2 * N)
    hippo = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1)
    normal = hippo + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5))
    eigenvalues, vectors = jrnn.s5(H, N).start()
    np.testing.assert_allclose(normal @ vectors, vectors * eigenvalues, atol=1e-10)
    whole = 2 * np.real(vectors @ np.diag(eigenvalues) @ vectors.conj().T)
    np.testing.assert_allclose(whole, normal, atol=1e-10)
    lin, inv = (jrnn.s5(H, N, spectrum=name).start()[0] for name in ("s4d_lin", "s4d_inv"))
    np.testing.assert_allclose(lin, [-0.5 + 1j * np.pi * k for k in range(N)])
    np.testing.assert_allclose(inv, [-0.5 + 1j * 2 * N / np.pi * (2 * N / (2 * k + 1) - 1) for k in range(N)])


def test_rg_lru_starts_with_long_memory():
    decay = jrnn.rg_lru(1000).init(jax.random.key(0), 1000)["decay"]
    power = (1 / (1 + np.exp(-np.asarray(decay, np.float64)))) ** 8
    assert 0.9 <= power.min() < 0.91
    assert 0.99 < power.max() <= 0.999 + 1e-5


FORGETTING = {
    "min_gru": jrnn.min_gru,
    "min_lstm": jrnn.min_lstm,
    "sru": jrnn.sru,
    "qrnn": jrnn.qrnn,
    "qrnn_ifo": functools.partial(jrnn.qrnn, pooling="ifo"),
}


@pytest.mark.parametrize("name", FORGETTING)
def test_forget_bias_says_what_is_kept_of_the_state(name):
    """``σ(forget_bias)`` at an input of zero, and the other gates and the weights as without it."""

    def params_and_kept(**options):
        cell = FORGETTING[name](200, **options)
        params = cell.init(jax.random.key(0), F)
        return params, np.asarray(cell.coefficients(params, jnp.zeros((1, F * cell.window)))[0][0], np.float64)

    plain, half = params_and_kept()
    np.testing.assert_allclose(half, 0.5, atol=1e-6)
    moved, kept = params_and_kept(forget_bias=3.0)
    np.testing.assert_allclose(kept, 1 / (1 + np.exp(-3.0)), rtol=1e-6)
    assert all(np.array_equal(plain[key], moved[key]) for key in plain if key != "b")
    changed = np.unique(np.asarray(moved["b"] - plain["b"]))
    assert set(changed) <= {-3.0, 0.0, 3.0}
    _, kept = params_and_kept(forget_bias=jrnn.initializers.chrono(50))
    lasts = 1 / (1 - kept)
    assert 1.99 < lasts.min() < 4
    assert 48 < lasts.max() < 50.1
    assert abs(lasts.mean() - 26) < 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jrnn.min_gru(3, forget_bias="chrono"), ValueError, "forget_bias: expected one of"),
        (lambda: jrnn.min_lstm(3, forget_bias=None), TypeError, "forget_bias: expected a finite float"),
        (lambda: jrnn.sru(3, forget_bias=float("inf")), ValueError, "forget_bias: expected a finite float"),
        (lambda: jrnn.initializers.chrono(1), ValueError, "steps: expected a finite float of at least 2"),
        (lambda: jrnn.min_gru(0), ValueError, "hidden: expected a positive int, got 0"),
        (lambda: jrnn.qrnn(3, 0), ValueError, "window: expected a positive int, got 0"),
        (lambda: jrnn.qrnn(3, pooling="of"), ValueError, 'pooling: expected "f", "fo" or "ifo", got \'of\''),
        (lambda: jrnn.sru(3, activation="tan"), ValueError, "activation: expected one of"),
        (lambda: jrnn.lru(3, 4.0), TypeError, "state: expected a positive int"),
        (lambda: jrnn.lru(3, 4, r_min=0.5, r_max=1.5), ValueError, "r_min, r_max: expected 0 <= r_min < r_max <= 1"),
        (lambda: jrnn.lru(3, 4, max_phase=0.0), ValueError, "max_phase: expected an angle"),
        (lambda: jrnn.lru(3, 4, r_max="1"), TypeError, "r_max: expected a float"),
        (lambda: jrnn.s5(3, 4, spectrum="hippo"), ValueError, 'spectrum: expected "legs"'),
        (lambda: jrnn.s5(3, 4, step_min=0.0), ValueError, "step_min, step_max: expected 0 < step_min"),
        (lambda: jrnn.rg_lru(3).init(jax.random.key(0), 2), ValueError, "in_features: expected 3.*jrnn.dense"),
        (lambda: run(jrnn.min_gru(3), jnp.ones((4, 5))), ValueError, "xs: expected 2 features"),
        (lambda: run(jrnn.qrnn(3), jnp.ones((4, 4))), ValueError, "xs: expected 2 features"),
        (lambda: run(jrnn.lru(3, 4), jnp.ones((4, 5))), ValueError, "xs: expected 2 features"),
        (lambda: run(jrnn.lru(3, 4), jnp.ones((4, 2), complex)), TypeError, "xs: expected floats"),
        (lambda: run(jrnn.sru(3), jnp.ones((4, 2)), {"w_ih": jnp.ones((2, 9))}), ValueError, "params: expected"),
        (lambda: jrnn.LinearCell().coefficients({}, None), NotImplementedError, "must define coefficients"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


def run(cell, xs, params=None):
    return jrnn.unroll(cell, cell.init(jax.random.key(0), 2) if params is None else params, xs)


# --- chunks that stay in the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "cell", [jrnn.min_gru(5), jrnn.qrnn(5, window=3), jrnn.lru(5, 3)], ids=["min_gru", "qrnn", "lru"]
)
@pytest.mark.sampled(3)
def test_chunks_equal_single_steps(cell, reverse, monkeypatch):
    monkeypatch.setattr(associative, "CHUNK", 40)
    monkeypatch.setattr(linear, "NUMBERS", 0)
    params = cell.init(jax.random.key(0), 3)
    xs = jax.random.normal(jax.random.key(1), (37, 2, 3))  # chunks of four steps, and one that is left
    resets = jax.random.bernoulli(jax.random.key(2), 0.1, (37, 2))

    def run(params, xs, backend):
        return jrnn.unroll(
            cell, params, xs, backend=backend, reverse=reverse, lengths=np.array([30, 37]), resets=resets
        )

    traced = jax.make_jaxpr(lambda *args: run(*args, None))(params, xs)
    assert "remat" in str(traced) or "checkpoint" in str(traced)
    loss = lambda backend: lambda *args: sum(jnp.sum(jnp.sin(jnp.abs(a))) for a in jax.tree.leaves(run(*args, backend)))
    for got, expected in zip(*(jax.tree.leaves(run(params, xs, b)) for b in (None, "reference")), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    grads = (jax.tree.leaves(jax.grad(loss(b), (0, 1))(params, xs)) for b in (None, "reference"))
    for got, expected in zip(*grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-4)
