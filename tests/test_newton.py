"""Newton's method over the whole sequence, held to the plain scan: in values and every derivative, converged or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.schedules import newton
from tests.cases import Counting, Rotating, StepOnly

F, T, B = 3, 24, 3


def setup(cell, scale=1.0, seed=0):
    params = jax.tree.map(lambda a: scale * a.astype(jnp.float64), cell.init(jax.random.key(seed), F))
    xs = jax.random.normal(jax.random.key(1), (T, B, F), jnp.float64)
    flags = {"lengths": jnp.array([T, 17, 0]), "resets": jax.random.bernoulli(jax.random.key(2), 0.05, (T, B))}
    return params, xs, flags


CELLS = {
    "gru": jrnn.gru(4),
    "lstm": jrnn.lstm(4),
    "step_only": StepOnly(0.5),
    "learned_and_wrapped": jrnn.learned_state(jrnn.zoneout(jrnn.lstm(4), c=0.4)),
    "diagonal": jrnn.gru(newton.DENSE + 4),
    "diagonal_of_two_fields": jrnn.lstm(newton.DENSE // 2 + 2),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.sampled(3)
def test_values_and_gradients_equal_the_scan(x64, quick_compilation, name):
    reverse = name != "gru"
    params, xs, flags = setup(CELLS[name])

    def loss(params, xs, state, backend):
        last, ys = jrnn.unroll(CELLS[name], params, xs, state, **flags, reverse=reverse, backend=backend)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(last))

    state = jax.tree.map(lambda a: a + 0.3, CELLS[name].initial_state(params, (B,)))
    got, expected = (
        jax.value_and_grad(loss, argnums=(0, 1, 2))(params, xs, state, backend) for backend in ("newton", "reference")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [jrnn.gru(3), jrnn.gru(newton.DENSE + 1)], ids=["whole", "diagonal"])
def test_higher_derivatives_and_vmap(x64, quick_compilation, cell):
    params, xs, _ = setup(cell)
    xs = xs[:6]
    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), params)

    def loss(params, xs, backend):
        return jnp.sum(jnp.sin(jrnn.unroll(cell, params, xs, backend=backend)[1]))

    def second(params, xs, backend):
        return jax.jvp(jax.grad(lambda p: loss(p, xs, backend)), (params,), (direction,))[1]

    def twice(params, xs, backend):
        return jax.grad(lambda xs: jnp.sum(jnp.sin(jax.grad(loss, 1)(params, xs, backend))))(xs)

    mapped = jax.vmap(jax.grad(loss), (None, 1, None))
    for derivative in (second, twice, mapped):
        got, expected = (derivative(params, xs, backend) for backend in ("newton", "reference"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), got, expected)


def given(params, xs, cell, batch=(B,)):
    return newton.Given(params, xs, cell.initial_state(params, batch), None, None, None)


def test_a_contracting_cell_converges_in_a_few_iterations(x64, quick_compilation):
    cell = jrnn.gru(4)
    params, xs, _ = setup(cell)
    found = newton.solve(cell, False, given(params, xs, cell))
    assert found.converged.all()
    assert found.iterations <= 8
    assert (found.residual <= newton.ROUNDING).all()


def test_what_does_not_converge_is_scanned_in_the_same_program(x64, quick_compilation, monkeypatch):
    """A chaotic network, and beside it a sequence that is NaN: the others converge."""
    monkeypatch.setattr(newton, "ITERATIONS", 4)
    cell = jrnn.elman(5)
    params, xs, _ = setup(cell)
    params = {**params, "w_hh": 4 * params["w_hh"]}
    xs = xs.at[:, 0].set(0.0).at[9, 2].set(jnp.nan)
    found = newton.solve(cell, False, given(params, xs, cell))
    assert found.converged.tolist() == [True, False, False]  # at rest, chaotic, NaN
    expected = jrnn.unroll(cell, params, xs, backend="reference")[1]
    np.testing.assert_allclose(found.states.h, expected, atol=1e-12)
    assert np.isnan(expected[9:, 2]).all()

    def loss(params, xs, backend):
        return jnp.sum(jnp.sin(jrnn.unroll(cell, params, xs[:, :2], backend=backend)[1][:10]))

    got, wanted = (jax.grad(loss, argnums=(0, 1))(params, xs, backend) for backend in ("newton", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), got, wanted)


@pytest.mark.parametrize("cell", [jrnn.gru(4), jrnn.gru(20)], ids=["whole", "diagonal"])
def test_float32(quick_compilation, cell):
    params = cell.init(jax.random.key(0), F)
    xs = jax.random.normal(jax.random.key(1), (200, B, F))
    got, expected = (jrnn.unroll(cell, params, xs, backend=backend)[1] for backend in ("newton", "reference"))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("cell", "key", "message"),
    [
        (Counting(), None, "solves for a state of real numbers of one dtype, and this one has float32, int32"),
        (Rotating(3), None, "this one has complex64"),
        (jrnn.zoneout(jrnn.gru(3), h=0.2), jax.random.key(0), "may draw random numbers at each step"),
    ],
)
def test_what_it_cannot_run(cell, key, message):
    params = cell.init(jax.random.key(0), F)
    with pytest.raises(ValueError, match=f"backend: 'newton' cannot run .*{message}"):
        jrnn.unroll(cell, params, jnp.ones((4, F)), key=key, backend="newton")


def test_it_knows_nothing_of_a_mesh():
    cell = jrnn.gru(3)
    params = cell.init(jax.random.key(0), F)
    with jax.set_mesh(jax.make_mesh((1,), ("batch",))), pytest.raises(ValueError, match="a mesh is set"):
        jrnn.unroll(cell, params, jnp.ones((4, F)), backend="newton")
