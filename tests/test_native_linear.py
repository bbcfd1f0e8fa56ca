"""Cells without a recurrent product in the native loop: linear ones, declared or read, and others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jrnn
from jrnn.cells.form import LinearForm
from jrnn.run.step import read_linear
from jrnn.schedules import Steps, Task, native
from tests.test_linear_cells import Charged
from tests.test_read_linear import Gated

native_only = pytest.mark.skipif(not native.build.available()[0], reason=native.build.available()[1])
pytestmark = [native_only, pytest.mark.usefixtures("quick_compilation")]

T, B, F, H = 23, 3, 5, 40  # two blocks of units, of which the second is short


@dataclasses.dataclass(frozen=True)
class Two(jrnn.Cell):
    """Two fields, each with a decay of its own; gates of one product, of which one is used twice."""

    hidden: int

    def init(self, key, in_features):
        k_w, k_decay = jax.random.split(key)
        return {"w": jax.random.normal(k_w, (in_features, 2 * self.hidden)), "decay": jax.random.normal(k_decay, (H,))}

    def initial_state(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden)), jnp.ones((*batch_shape, self.hidden))

    def step(self, params, state, x, key=None):
        u, z = jnp.split(x @ params["w"], 2, -1)
        fast = jax.nn.sigmoid(params["decay"])[None] * state[0] + u
        slow = jnp.exp(-jnp.abs(z)) * state[1] + z * jnp.tanh(u)
        return (fast, slow), fast * slow


CELLS = {
    "min_gru": jrnn.min_gru(H),
    "min_lstm": jrnn.min_lstm(H),
    "sru": jrnn.sru(H),
    "qrnn": jrnn.qrnn(H, window=3, pooling="ifo"),
    "indrnn": jrnn.indrnn(H, "tanh"),
    "declared": Charged(H),
    "read": Gated(H),
    "two": Two(H),
}
every_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)


def case(cell, time=T):
    k_params, k_xs, k_state, k_resets = jax.random.split(jax.random.key(0), 4)
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(k_xs, a.shape), cell.init(k_params, F))
    xs = jax.random.normal(k_xs, (time, B, F))
    state = jax.tree.map(lambda a: jax.random.normal(k_state, a.shape), cell.initial_state(params, (B,)))
    flags = {"lengths": np.array([time, time // 2, 0]), "resets": jax.random.bernoulli(k_resets, 0.2, (time, B))}
    return params, state, xs, flags


def loss(cell, flags, **options):
    def of(params, state, xs):
        last, ys = jrnn.unroll(cell, params, xs, state, **flags, **options)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(last))

    return of


def same(a, b, rtol=2e-4, atol=2e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)


@every_cell
@pytest.mark.parametrize("options", [{}, {"reverse": True, "remat": 4}], ids=str)
@pytest.mark.sampled(3)
def test_equals_the_scan_in_values_and_gradients(cell, options):
    params, state, xs, flags = case(cell)
    got, expected = (
        jax.value_and_grad(loss(cell, flags, backend=backend, **options), (0, 1, 2))(params, state, xs)
        for backend in ("native", "reference")
    )
    same(got, expected)


@pytest.mark.parametrize("name", ["min_gru", "indrnn"])
def test_many_sequences_shared_by_threads(name):
    """Enough work for two threads: they share the units, or the sequences where there is one block of units."""
    cell = dataclasses.replace(CELLS[name], hidden=16)
    params = cell.init(jax.random.key(0), F)
    for count, time in ((7, 2000), (1, 20)):
        xs = jax.random.normal(jax.random.key(1), (time, count, F))
        got, expected = (
            jax.value_and_grad(lambda p, x, b=b: jnp.sum(jnp.sin(jrnn.unroll(cell, p, x, backend=b)[1])), (0, 1))(
                params, xs
            )
            for b in ("native", "reference")
        )
        same(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["min_gru", "qrnn", "two", "indrnn"])
def test_derivatives_in_both_modes_and_of_second_order(name):
    cell = CELLS[name]
    params, state, xs, flags = case(cell, 9)
    tangents = jax.tree.map(jnp.cos, (params, state, xs))
    for take in (lambda f: f, lambda f: jax.grad(f, (0, 1, 2))):
        got, expected = (
            jax.jvp(take(loss(cell, flags, backend=b)), (params, state, xs), tangents) for b in ("native", "reference")
        )
        same(got, expected, rtol=1e-3, atol=2e-3)


def test_vmap_over_sequences_and_over_parameters():
    cell = jrnn.min_gru(H)
    params, state, xs, _ = case(cell, 9)
    run = lambda params, xs, b: jrnn.unroll(cell, params, xs, state, backend=b)[1]
    for axes in ((None, 0), (0, None)):
        stacked = [jax.tree.map(lambda a: jnp.stack([a, a / 2]), v) for v in (params, xs)]
        given = [v if axis is None else w for v, w, axis in zip((params, xs), stacked, axes, strict=True)]
        got, expected = (jax.vmap(lambda p, x, b=b: run(p, x, b), axes)(*given) for b in ("native", "reference"))
        same(got, expected, atol=1e-5)


def test_an_exported_program_runs_in_parallel_over_time():
    cell = jrnn.min_gru(H)
    params, _, xs, flags = case(cell, 100)  # so long that `linear_scan` itself would not run as a scan
    run = jax.jit(lambda params, xs: jrnn.unroll(cell, params, xs, **flags, backend="native")[1])
    same(export.export(run)(params, xs).call(params, xs), run(params, xs), atol=1e-5)
    elsewhere = export.export(run, platforms=["cuda"])(params, xs).mlir_module()
    assert "custom_call" not in elsewhere
    assert "stablehlo.while" not in elsewhere


@pytest.mark.parametrize(("name", "gates"), [("min_gru", 2), ("min_lstm", 3), ("sru", 2), ("qrnn", 3)])
def test_each_gate_is_stored_once(name, gates):
    """minGRU uses ``n`` and ``n + 1/2``, and stores one of them: what is stored is what a gradient takes in memory."""
    cell = CELLS[name]
    params, state, xs, _ = case(cell)
    task = Task(cell, params, LinearForm(cell, params), xs, state, None, Steps())
    assert len(read_linear(task).body.form.gates.summed) == gates
    run = jax.jit(lambda params, xs: jax.vjp(lambda p: jrnn.unroll(cell, p, xs, backend="native")[1], params)[1])
    rows = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(run, params, xs)) if leaf.shape[:2] == (T, B)]
    block = native.build.load(native.read_gates(*_affine(cell, params, xs))[1]).unit_block
    assert sorted(shape[-1] for shape in rows if shape[-1] > H)[-1] <= gates * -(-H // block) * block + 16


def _affine(cell, params, xs):
    task = Task(cell, params, LinearForm(cell, params), xs, cell.initial_state(params, (B,)), None, Steps())
    step = read_linear(task)
    inputs = jax.ShapeDtypeStruct((T, B, cell.window * F), xs.dtype)
    inner = step.body.shapes(inputs, Steps())
    return inner.form, inner.state


@pytest.mark.parametrize("name", ["min_gru", "min_lstm", "sru", "qrnn"])
def test_the_default_where_it_pays(name):
    cell, xs = dataclasses.replace(CELLS[name], hidden=64), jnp.ones((100, 8, 64))
    params = cell.init(jax.random.key(0), 64)
    chosen, reason = jrnn.choose_backend(cell, params, xs)
    assert chosen == "native", reason
    few = dataclasses.replace(cell, hidden=8)
    chosen, reason = jrnn.choose_backend(few, few.init(jax.random.key(0), 64), jnp.ones((1000, 8, 64)))
    assert chosen == "associative"
    assert "8 units do not fill the vectors of its loop" in reason


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (jrnn.rg_lru(F), "no elementwise functions of products of its input"),
        (jrnn.lru(H, 4), "no elementwise functions of products of its input"),
        (jrnn.lem(H), "is not recognised"),
    ],
    ids=["rg_lru", "lru", "lem"],
)
def test_what_it_does_not_serve_says_why(cell, reason):
    params = cell.init(jax.random.key(0), F)
    with pytest.raises(ValueError, match=f"'native' cannot run .*{reason}"):
        jrnn.unroll(cell, params, jnp.ones((T, B, F)), backend="native")


def test_a_scan_without_a_product_of_its_state():
    w = jax.random.normal(jax.random.key(0), (F, 2 * H))
    xs = jax.random.normal(jax.random.key(1), (T, B, F))

    def body(h, x):
        u, z = jnp.split(x @ w, 2, -1)
        h = jnp.tanh(u - jnp.abs(h)) + z
        return h, h * u

    init = jnp.ones((B, H))
    assert jrnn.choose_scan_backend(body, init, xs, backend="native")[0] == "native"
    same(jrnn.scan(body, init, xs, backend="native"), jax.lax.scan(body, init, xs), atol=1e-5)
    with pytest.raises(ValueError, match="'hoisted' cannot run this body"):
        jrnn.scan(lambda h, x: (0.5 * h + x @ w, h), jnp.ones((B, 2 * H)), xs, backend="hoisted")
