"""The laws of a training step: it is the plain update, it is pure, and a step that is not finite changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrnn.training import TrainState, make_step, optimizer
from tests.conftest import count_compilations

KEYS = {"typed": jax.random.key, "legacy": jax.random.PRNGKey}
OPTIMIZERS = {
    "adam": lambda: optimizer("adam", 0.1, clip_norm=1.0, weight_decay=0.01),
    "rmsprop": lambda: optimizer("rmsprop", 0.1),
    "sgd": lambda: optimizer("sgd", 0.1),
    "adamw": lambda: optimizer("adamw", 0.1),
    "plateau": lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(1)), optax.sgd(0.1)),
}


def loss_fn(params, batch, key):
    noise = 0.0 if key is None else 0.1 * jax.random.normal(key, ())
    return jnp.mean((batch @ params["w"] + params["b"] - 1.0 + noise) ** 2)


def params():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)}


def batch(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 3)), jnp.float32)


def bits(tree):
    """Every leaf as bytes, so that NaN equals NaN and -0 differs from 0."""

    def leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return (str(x.dtype), x.shape, np.asarray(x).tobytes())

    return jax.tree.map(leaf, tree)


@pytest.mark.parametrize("kind", KEYS)
def test_equals_the_update_written_out(kind):
    tx, key = optimizer("adam", 0.1, clip_norm=0.1), KEYS[kind](3)
    step = make_step(loss_fn, tx)
    state = step.init(params(), key)
    expected, opt_state = params(), tx.init(params())
    for i in range(5):
        state, metrics = step(state, batch(i))
        loss, grads = jax.value_and_grad(loss_fn)(expected, batch(i), jax.random.fold_in(key, i))
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
        squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
        np.testing.assert_allclose(metrics.grad_norm, jnp.sqrt(squares), rtol=1e-6)
        updates, opt_state = tx.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, expected)
    assert int(state.step) == 5
    assert float(metrics.grad_norm) > 0.1, "the norm reported is the one before clipping"


def test_gradient_norms_by_leaf():
    step = make_step(loss_fn, optax.sgd(0.1))
    _, metrics = step(step.init(params()), batch())
    grads = jax.grad(loss_fn)(params(), batch(), None)
    leaves = [jnp.linalg.norm(jnp.ravel(g)) for g in jax.tree.leaves(grads)]
    np.testing.assert_allclose(metrics.leaf_norms, jnp.stack(leaves), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sampled(3)
def test_a_step_that_is_not_finite_changes_nothing(name, bad):
    step = make_step(loss_fn, OPTIMIZERS[name]())
    state = step.init(params(), jax.random.key(0))
    for i in range(3):
        state, metrics = step(state, batch(i))
        assert bool(metrics.finite)
    before = bits((state.params, state.opt_state, state.key))
    for i in range(1, 4):
        state, metrics = step(state, batch().at[0, 0].set(bad))
        assert not bool(metrics.finite)
        assert bits((state.params, state.opt_state, state.key)) == before
        assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (3 + i, i, i)
    state, metrics = step(state, batch())
    assert bool(metrics.finite)
    assert bits(state.params) != before[0]
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (7, 3, 0)


def test_finite_loss_with_gradients_that_are_not():
    step = make_step(lambda p, b, k: jnp.sqrt(p["x"] * b) + p["y"] ** 2, optax.sgd(0.1))
    state, metrics = step(step.init({"x": 0.0, "y": 1.0}), jnp.float32(1.0))
    assert float(metrics.loss) == 1.0
    assert not bool(metrics.finite)
    assert np.isfinite(metrics.leaf_norms).tolist() == [False, True]
    assert (float(state.params["x"]), float(state.params["y"])) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd", "adamw"])
def test_narrow_parameters_train(name, dtype):
    """A parameter that the loss does not use has a gradient of exactly zero, and stays where it is."""
    distance = lambda p, b: ((p["w"].astype(jnp.float32) * b).sum() - 300.0) ** 2 / 100.0
    loss = lambda p, b, k: distance(p, b) + 0.0 * p["dead"].astype(jnp.float32).sum()
    step = make_step(loss, optimizer(name, 0.0625, clip_norm=1.0))
    state = step.init({"w": jnp.ones(3, dtype), "dead": jnp.ones(2, dtype)})
    losses = []
    for _ in range(20):
        state, metrics = step(state, jnp.full(3, 20.0))
        assert bool(metrics.finite)
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    assert state.params["dead"].tolist() == [1.0, 1.0]


NOT_FINITE = {
    # An update that divides by zero, a parameter that overflows, a moment that does: all with finite gradients.
    "update": (optax.stateless(lambda g, p: jax.tree.map(lambda g: g / g, g)), 0.0, [False, True]),
    "parameter": (optax.scale(-1.0), -6e4, [False, True]),
    "moment": (optax.adam(0.1, eps=1e-3), 512.0, [True, True]),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_updates_parameters_and_moments_that_are_not_finite_change_nothing(name):
    transform, slope, leaf_finite = NOT_FINITE[name]
    step = make_step(lambda p, b, k: sum(p[k].astype(jnp.float32) * b[k] for k in p), transform)
    state = step.init({"a": jnp.float16(6e4), "b": jnp.float16(1.0)})
    before = bits((state.params, state.opt_state))
    state, metrics = step(state, {"a": jnp.float32(slope), "b": jnp.float32(1.0)})
    assert (bool(metrics.finite), int(state.skipped)) == (False, 1)
    assert np.isfinite([metrics.loss, metrics.grad_norm]).all()
    assert metrics.leaf_finite.tolist() == leaf_finite
    assert bits((state.params, state.opt_state)) == before


def test_what_was_infinite_from_the_start_may_stay_so():
    """A class that a bias rules out; the best loss so far, which some optimisers begin at infinity."""
    step = make_step(lambda p, b, k: -jax.nn.log_softmax(p)[0], OPTIMIZERS["plateau"]())
    state = step.init(jnp.array([0.0, 0.0, -jnp.inf]))
    state, metrics = step(state, None)
    assert bool(metrics.finite)
    assert float(state.params[2]) == -np.inf


def test_the_users_own_arrays_survive_donation():
    mine, key = params(), jax.random.key(0)
    host = {"w": np.ones(3, np.float32), "b": np.float32(0.0)}
    step = make_step(loss_fn, optimizer("adam", 0.1))
    for start in (mine, host):
        state = step.init(start, key)
        state, _ = step(state, batch())
    assert bits(mine) == bits(params())
    assert host["w"].tolist() == [1.0, 1.0, 1.0]
    jax.random.normal(key, ())
    first = step.init(mine, key)
    step(first, batch())
    assert first.params["w"].is_deleted(), "the state is donated"


def test_one_array_in_two_places_and_in_the_optimizer_state():
    shared = jnp.ones(3)
    keeps_params = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, s))
    step = make_step(lambda p, b, k: jnp.sum(p["a"] * p["b"]), optax.chain(keeps_params, optax.sgd(0.1)))
    state, _ = step(step.init({"a": shared, "b": shared}), None)
    np.testing.assert_allclose(state.params["a"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(shared, 1.0)


def test_equal_steps_compile_once():
    def build():
        return make_step(loss_fn, optimizer("adam", 0.0125, clip_norm=1.0))

    state = build().init(params(), jax.random.key(0))
    state, _ = build()(state, batch())
    fresh, data = build().init({"w": np.ones(3, np.float32), "b": 0.0}, jax.random.key(1)), [batch(i) for i in range(3)]
    with count_compilations() as counter:
        for b in data:
            state, _ = build()(state, b)
            fresh, _ = build()(fresh, b)
    assert counter["compilations"] == 0
    assert build() == build()
    assert hash(build()) == hash(build())


def test_is_pure_and_randomness_follows_key_and_step():
    step = make_step(lambda p, b, k: p * jax.random.normal(k, ()), optax.sgd(0.0))

    def losses(seed):
        state, seen = step.init(1.0, jax.random.key(seed)), []
        for _ in range(3):
            state, metrics = step(state, None)
            seen.append(float(metrics.loss))
        return seen

    expected = [float(jax.random.normal(jax.random.fold_in(jax.random.key(0), i), ())) for i in range(3)]
    assert losses(0) == losses(0) == expected
    assert losses(1) != expected


@pytest.mark.smoke
def test_aux_beside_the_loss():
    step = make_step(lambda p, b, k: (p**2, {"double": 2 * p, "vector": jnp.ones(3)}), optax.sgd(0.1))
    _, metrics = step(step.init(3.0), None)
    assert float(metrics.aux["double"]) == 6.0
    assert metrics.aux["vector"].shape == (3,)
    _, evaluated = step.evaluate(3.0, None)
    assert sorted(evaluated) == ["double", "loss", "vector"]


def test_evaluation_has_no_key():
    step = make_step(loss_fn, optax.sgd(0.1))
    _, metrics = step.evaluate(params(), batch())
    np.testing.assert_allclose(metrics["loss"], loss_fn(params(), batch(), None), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(dtype, x64):
    step = make_step(lambda p, b, k: jnp.sum(p * b).astype(jnp.float32), optax.sgd(0.125))
    state, metrics = step(step.init(jnp.ones(4, dtype)), jnp.full(4, 512.0, dtype))
    assert state.params.dtype == dtype
    assert float(metrics.grad_norm) == 1024.0
    assert metrics.grad_norm.dtype == ("float64" if dtype == "float64" else "float32")
    assert bool(metrics.finite)


@pytest.mark.smoke
def test_works_inside_jit_and_scan():
    step = make_step(loss_fn, optimizer("adam", 0.1))
    data = jnp.stack([batch(i) for i in range(4)])
    looped = step.init(params(), jax.random.key(0))
    for b in data:
        looped, _ = step(looped, b)
    scanned, metrics = jax.jit(lambda s: jax.lax.scan(step, s, data))(step.init(params(), jax.random.key(0)))
    assert metrics.loss.shape == (4,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scanned.params, looped.params)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: make_step(3, optax.sgd(0.1)), TypeError, "loss_fn: expected a function"),
        (
            lambda: make_step(lambda params, batch: 0.0, optax.sgd(0.1)),
            TypeError,
            r"loss_fn: expected a function of \(params, batch, key\).*takes \(params, batch\); it must take all three",
        ),
        (lambda: make_step(loss_fn, "adam"), TypeError, "optimizer: expected an Optax transformation"),
        (lambda: make_step(loss_fn, optax.sgd(0.1)).init({"n": 1}), TypeError, r"floating-point.*at \['n'\]"),
        (lambda: make_step(loss_fn, optax.sgd(0.1)).init({}), ValueError, "params: expected at least one array"),
        (lambda: make_step(loss_fn, optax.sgd(0.1)).init(params(), 0), TypeError, "key: expected one key"),
        (lambda: make_step(loss_fn, optax.sgd(0.1))(params(), batch()), TypeError, "state: expected a TrainState"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda p: p * jnp.ones(2), TypeError, r"scalar loss, got float32 of shape \(2,\)"),
        (lambda p: jnp.int32(1), TypeError, "floating-point scalar loss, got int32"),
        (lambda p: (p, 3), TypeError, "aux of type int"),
        (lambda p: (p, {"loss": p}), ValueError, r"are taken, got \['loss'\]"),
        (lambda p: None, TypeError, "loss_fn: expected a scalar loss, got NoneType"),
        (lambda p: "low", TypeError, "loss_fn: expected a scalar loss, got str"),
    ],
)
def test_errors_of_the_loss(result, error, match):
    step = make_step(lambda p, b, k: result(p), optax.sgd(0.1))
    with pytest.raises(error, match=match):
        step(step.init(1.0), None)


def test_state_is_a_plain_pytree():
    state = make_step(loss_fn, optax.sgd(0.1)).init(params())
    assert isinstance(jax.tree.map(lambda x: x, state), TrainState)
    assert state.key is None
