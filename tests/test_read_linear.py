"""Steps that are read as linear in their state, in `jrnn.scan` and in a cell of one's own, against plain scans."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.run.step import read
from jrnn.schedules.parts import trace

T, B, H = 7, 3, 4
FORWARD = dict(rtol=1e-12, atol=1e-12)


def average(w, c, x):
    c = w * c + (1 - w) * x
    return c, c


def constant_decay(w, c, x):
    return 0.9 * c - x, w * c  # puts out the state that the step meets


def negative(w, c, x):
    c = x - w * c
    return c, jnp.tanh(c)


def factored(w, c, x):
    c = ((c + x) * jax.nn.sigmoid(x) - x) / (1.5 + w**2)
    return c, (c, x * w)


def twice(w, c, x):
    c = c + x * c - w * (c - x)
    return c, c


def summed(w, c, x):
    return c + x, None


def reset(w, c, x):
    c = jnp.where(x > 0.3, w, c)
    c = w * c + x
    return c, c


def reset_after(w, c, x):
    c = jnp.where((x[..., :1] > 0.3) | (x > 2), x, w * c + x)
    return c, c


def held(w, c, x):
    c = jnp.where(x > 0.3, c, w * c + x)
    return c, c


def two_leaves(w, c, x):
    a, b = c
    a, b = w * a + x, b - jnp.sin(x)
    return (a, b), a * b


def fixed_leaf(w, c, x):
    h, decay = c
    h = decay * h + x
    return (h, decay), h


def inner(w, c, x):
    c = jax.jit(lambda c: jax.checkpoint(lambda c: w * c + x)(c))(c)
    return c, jnp.sum(c)


def looped(w, c, x):
    """A loop over the input alone, which does not run for all steps at once."""
    c = w * c + jax.lax.fori_loop(0, 2, lambda i, a: a + jnp.sin(x), x)
    return c, c


def running_mean(w, c, x):
    """A mean by a counter, which needs no state of the mean."""
    mean, count = c["mean"], c["count"] + 1
    mean = mean + w * (x - mean) / count
    return {"mean": mean, "count": count}, mean * count


BODIES = [looped, average, constant_decay, negative, factored, twice, summed, reset, reset_after, held, inner]
TREES = {two_leaves: 2, fixed_leaf: 2, running_mean: 1}


def built(body, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 4)
    w = jax.random.uniform(keys[0], (B, H), dtype, 0.2, 0.8)
    c = tuple(jax.random.normal(k, (B, H), dtype) for k in keys[1:3])
    c = {"mean": c[0], "count": dtype(0)} if body is running_mean else c if body in TREES else c[0]
    return w, c, jax.random.normal(keys[3], (T, B, H), dtype)


def run(scan, body, **options):
    return lambda w, c, xs: scan(functools.partial(body, w), c, xs, **options)


def same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, **(tolerance or FORWARD))


def loss(function):
    return lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(*args)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("body", [*BODIES, *TREES])
@pytest.mark.sampled(3)
def test_equals_lax_scan_in_values_and_gradients(body, reverse, x64):
    args = built(body)
    ours = run(jrnn.scan, body, reverse=reverse, backend="associative")
    plain = run(jax.lax.scan, body, reverse=reverse)
    same(jax.jit(ours)(*args), jax.jit(plain)(*args))
    same(*(jax.jit(jax.grad(loss(f), (0, 1, 2)))(*args) for f in (ours, plain)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("body", [average, reset, two_leaves])
def test_transformations(body, x64):
    args = built(body)
    ours, plain = (run(scan, body, **o) for scan, o in ((jrnn.scan, {"backend": "associative"}), (jax.lax.scan, {})))
    tangents = jax.tree.map(lambda a: jnp.cos(a), args)
    same(*(jax.jvp(f, args, tangents) for f in (ours, plain)), rtol=1e-10, atol=1e-11)
    second = lambda f: jax.jvp(jax.grad(loss(f), (0, 1, 2)), args, tangents)
    same(*map(second, (ours, plain)), rtol=1e-9, atol=1e-10)
    batch = lambda f: jax.vmap(f, (None, 0, 0))(args[0], *jax.tree.map(lambda a: jnp.stack([a, 2 * a]), args[1:]))
    same(*map(batch, (ours, plain)))
    same(run(jrnn.scan, body, backend="associative", remat=3)(*args), plain(*args))
    same(
        jax.grad(loss(run(jrnn.scan, body, backend="associative", remat=3)), (0, 1, 2))(*args),
        jax.grad(loss(plain), (0, 1, 2))(*args),
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("body", [reset, reset_after])
def test_a_reset_lets_no_nan_pass(body, x64):
    w, c, xs = built(body)
    xs = xs.at[0].set(-1.0).at[1].set(1.0)  # replaced everywhere at the second step at the latest
    c = c.at[0].set(jnp.nan).at[1].set(jnp.inf)
    for f in (lambda *a: run(jrnn.scan, body, backend="associative")(*a)[1][1:],):
        assert np.isfinite(f(w, c, xs)).all()
        assert np.isfinite(jax.grad(lambda w, xs, f=f: jnp.sum(f(w, c, xs)), (0, 1))(w, xs)[1][1:]).all()


def test_complex_state(x64):
    w = jnp.asarray(0.9 * np.exp(1j * np.linspace(0.0, 3.0, H)))
    xs = jax.random.normal(jax.random.key(0), (T, B, H), jnp.complex128)

    def body(c, x):
        c = w * c + x
        return c, c.real

    args = body, jnp.ones((B, H), jnp.complex128), xs
    same(jrnn.scan(*args, backend="associative"), jax.lax.scan(*args))


def test_what_runs_by_default():
    c, xs = jnp.zeros((8, 16)), jnp.ones((100, 8, 16))
    step = lambda c, x: (0.9 * c + x, c)
    name, reason = jrnn.choose_scan_backend(step, c, xs)
    assert name == "associative", reason
    same(jrnn.scan(step, c, xs), jax.lax.scan(step, c, xs), rtol=1e-6, atol=1e-6)
    name, reason = jrnn.choose_scan_backend(step, c[0, 0], xs[:5, 0, 0])
    assert name == "reference"
    assert "too few" in reason
    # A state much larger than what goes in and out is not stored for all steps unasked.
    wide = lambda c, x: (0.9 * c + x[:, None], jnp.sum(c))
    name, reason = jrnn.choose_scan_backend(wide, jnp.zeros((8, 64)), jnp.ones((100, 8)))
    assert name == "reference"
    assert "times the memory" in reason
    assert (
        jrnn.choose_scan_backend(wide, jnp.zeros((8, 64)), jnp.ones((100, 8)), backend="associative")[0]
        == "associative"
    )


@pytest.mark.parametrize(
    ("step", "carry", "reason"),
    [
        (lambda c, x: (jnp.tanh(c) + x, c), jnp.zeros(H), "'tanh' of its state, which is not linear"),
        (lambda c, x: (c * c + x, c), jnp.zeros(H), "'mul' of its state, which is not linear"),
        (lambda c, x: (x / (c + 1), c), jnp.zeros(H), "'div' of its state, which is not linear"),
        (lambda c, x: (jnp.where(c > 0, c, x), c), jnp.zeros(H), "depend on its state|is not linear"),
        (lambda c, x: (c[::-1] + x, c), jnp.zeros(H), "'rev' of its state, which is not linear"),
        (lambda c, x: ((c[1], c[0] + x), x), (jnp.zeros(H),) * 2, "leaves of its carry change places"),
        (lambda c, x: ((c[0] + c[1], c[1] - c[0]), x), (jnp.zeros(H),) * 2, "depends on another leaf"),
        (lambda c, x: (c + 1, x), jnp.zeros(H, jnp.int32), "a leaf of its carry that changes is int32"),
        (lambda c, x: (c + x.astype(jnp.bfloat16), x), jnp.zeros(H, jnp.bfloat16), "changes is bfloat16"),
        (lambda c, x: (jax.lax.fori_loop(0, 2, lambda i, a: a + c, x), c), jnp.zeros(H), "'scan' of its state"),
    ],
)
def test_what_is_not_linear_is_refused_by_name(step, carry, reason):
    with pytest.raises(ValueError, match=f"backend: 'associative' cannot run this body: .*({reason})"):
        jrnn.scan(step, carry, jnp.ones((T, H)), backend="associative")


@pytest.mark.parametrize(
    ("step", "carry"),
    [
        (lambda c, x: ((0.5 * c[0] + jnp.sin(c[1]), c[1] + x), c[0] * x), (jnp.ones(H),) * 2),
        (lambda c, x: (c + x, jax.lax.fori_loop(0, 2, lambda i, a: a + c, x)), jnp.ones(H)),
        (lambda c, x: ((c[0] + x, jnp.maximum(c[0].sum(), c[1])), c[1]), (jnp.ones(H), jnp.float32(2))),
    ],
)
def test_what_depends_on_a_linear_step_runs_after_it(step, carry):
    xs = jax.random.normal(jax.random.key(0), (T, H))
    run = lambda scan: jax.jit(lambda c, xs: jax.tree.leaves(scan(step, c, xs)))
    got, expected = run(functools.partial(jrnn.scan, backend="associative")), run(jax.lax.scan)
    same(got(carry, xs), expected(carry, xs), rtol=1e-5, atol=1e-5)
    of = lambda run: jax.grad(lambda c, xs: sum(jnp.sum(jnp.sin(leaf)) for leaf in run(c, xs)), (0, 1))(carry, xs)
    same(of(got), of(expected), rtol=1e-5, atol=1e-5)


def test_equal_steps_compile_once():
    step = lambda c, x: (0.9 * c + x, c)
    shapes = jnp.zeros(H), jax.ShapeDtypeStruct((H,), jnp.float32)
    first, second = (read(trace(step, *shapes)[0], 0, 1) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


# --- a cell of one's own -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gated(jrnn.Cell):
    """A minGRU, of which nothing is said but its step."""

    hidden: int

    def init(self, key, in_features):
        return {"w": jax.random.normal(key, (in_features, 2 * self.hidden))}

    def initial_state(self, params, batch_shape):
        return jnp.full((*batch_shape, self.hidden), 0.5, params["w"].dtype)

    def step(self, params, state, x, key=None):
        z, n = jnp.split(x @ params["w"], 2, -1)
        z = jax.nn.sigmoid(z)
        h = state + z * (n - state)
        return h, h


@pytest.mark.parametrize(
    "given", [{}, {"lengths": np.array([7, 0, 3])}, {"resets": True}, {"mask": True, "resets": True}]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_cell_of_ones_own(given, reverse, x64):
    cell = Gated(H)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), cell.init(jax.random.key(0), 2))
    xs = jax.random.normal(jax.random.key(1), (T, B, 2), jnp.float64)
    flags = jax.random.bernoulli(jax.random.key(2), 0.5, (2, T, B))
    given = {name: flags[i] if value is True else value for i, (name, value) in enumerate(given.items())}

    def f(params, xs, backend):
        return jrnn.unroll(cell, params, xs, reverse=reverse, backend=backend, **given)

    same(*(f(params, xs, backend) for backend in ("associative", "reference")))
    grads = (
        jax.grad(loss(functools.partial(f, backend=backend)), (0, 1))(params, xs)
        for backend in ("associative", "reference")
    )
    same(*grads, rtol=1e-10, atol=1e-11)


def test_a_cell_of_ones_own_by_default():
    cell = Gated(64)
    params, xs = cell.init(jax.random.key(0), 64), jnp.ones((50, 8, 64))
    name, reason = jrnn.choose_backend(cell, params, xs)
    assert name == "native", reason
    few = Gated(8)  # units that do not fill the vectors of the native loop
    assert jrnn.choose_backend(few, few.init(jax.random.key(0), 64), jnp.ones((1000, 8, 64)))[0] == "associative"
    with pytest.raises(ValueError, match="'hoisted' cannot run"):
        jrnn.unroll(cell, params, xs, backend="hoisted")
