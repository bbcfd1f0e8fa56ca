"""Optimisers by name equal the Optax transformations they stand for; schedules equal their formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrnn.training import optimizer, schedule

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array(12.0)}  # global norm 13


def run(tx, steps=4):
    params, state = PARAMS, tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            updates, state = tx.update(GRADS, state, params)
            params = optax.apply_updates(params, updates)
    return params


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


@pytest.mark.parametrize("rate", [0.01, optax.linear_schedule(0.1, 0.0, 3)], ids=["float", "schedule"])
@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd", "adamw"])
def test_is_the_optax_chain(name, rate):
    clip = optax.clip_by_global_norm(1.0)
    rules = {"adam": optax.adam, "rmsprop": optax.rmsprop, "sgd": optax.sgd}
    if name == "adamw":
        expected = optax.chain(clip, optax.adamw(rate, weight_decay=0.1))
    else:
        expected = optax.chain(clip, optax.add_decayed_weights(0.1), rules[name](rate))
    assert_same(run(optimizer(name, rate, clip_norm=1.0, weight_decay=0.1)), run(expected))


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_plain_rule_without_options(name):
    assert_same(run(optimizer(name, 0.01)), run(getattr(optax, name)(0.01)))


def test_adamw_without_decay_is_adam():
    assert_same(run(optimizer("adamw", 0.01)), run(optax.adam(0.01)))


def test_clips_before_the_decay_is_added():
    tx = optimizer("sgd", 1.0, clip_norm=1.0, weight_decay=10.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], [-(3 / 13 + 10.0), -(4 / 13 - 20.0)], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd", "adamw"])
def test_updates_under_strict_promotion(name):
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    tx = optimizer(name, schedule("warmup_cosine", 0.1, steps=10, warmup_steps=2), clip_norm=1.0)
    updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert jax.tree.all(jax.tree.map(lambda u: jnp.isfinite(u).all(), updates))


@pytest.mark.smoke
def test_equal_calls_are_one_object():
    assert optimizer("adam", 0.1, clip_norm=1) is optimizer("adam", 0.1, clip_norm=1.0)
    assert optimizer("adam", 0.1) is not optimizer("adam", 0.2)
    a, b = (schedule("exponential", 0.1, steps=10, rate=0.9) for _ in range(2))
    assert a is b
    assert optimizer("sgd", a) is optimizer("sgd", b)


NARROW = ["float16", "bfloat16"]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("name", "clip_norm"), [("adam", None), ("rmsprop", None), ("sgd", 100.0), ("adamw", 100.0)])
def test_narrow_parameters_take_the_updates_of_float32(name, clip_norm, dtype):
    """Gradients of zero, and ones whose squares or whose squares' mean 16 bits cannot hold."""
    tx = optimizer(name, 0.25, clip_norm=clip_norm, weight_decay=0.5)
    narrow = jax.tree.map(lambda p: p.astype(dtype), {"w": jnp.array([1.0, -2.0, 0.0]), "dead": jnp.zeros(2)})
    gradients = {"w": jnp.array([512.0, -3e-5, 1024.0], dtype), "dead": jnp.zeros(2, dtype)}
    as_float32 = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    state, expected_state = tx.init(narrow), tx.init(as_float32(narrow))
    for factor in (1.0, 0.5, 0.25):
        scaled = jax.tree.map(lambda g, by=factor: g * by, gradients)
        updates, state = jax.jit(tx.update)(scaled, state, narrow)
        expected, expected_state = jax.jit(tx.update)(as_float32(scaled), expected_state, as_float32(narrow))
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        close = functools.partial(np.testing.assert_allclose, rtol=float(jnp.finfo(dtype).eps))
        jax.tree.map(close, as_float32(updates), expected)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, expected_state)
        with jax.numpy_dtype_promotion("standard"):
            narrow = optax.apply_updates(narrow, updates)
    assert jax.tree.all(jax.tree.map(lambda p: jnp.isfinite(p).all(), narrow))
    assert not narrow["dead"].any()


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_narrow_and_wide_parameters_in_one_tree(name, x64):
    params = {t: jnp.ones(2, t) for t in ("float16", "float32", "float64")} | {"none": None}
    tx = optimizer(name, 0.125, clip_norm=1.0)
    state = tx.init(params)
    updates, state = tx.update(params, state)
    assert {t: u.dtype.name for t, u in updates.items() if u is not None} == {t: t for t in params if t != "none"}
    moments = state[-1][0].mu if name == "adam" else {}
    assert [leaf.dtype.name for leaf in jax.tree.leaves(moments)] == ["float32", "float32", "float64"][: len(moments)]


def test_injected_hyperparameters():
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.inject_hyperparams(optimizer)("sgd", learning_rate=0.5, weight_decay=0.0)
        state = tx.init(PARAMS)
        state.hyperparams["learning_rate"] = jnp.float32(0.25)
        updates, _ = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["w"], [-0.75, -1.0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (("adagrad", 0.1), {}, ValueError, "name: expected one of .*'adam'.*got 'adagrad'"),
        (("adam", -0.1), {}, ValueError, "learning_rate: expected a finite number above 0, got -0.1"),
        (("adam", 0.0), {}, ValueError, "learning_rate"),
        (("adam", math.nan), {}, ValueError, "learning_rate"),
        (("adam", "fast"), {}, TypeError, "learning_rate: expected a number, got 'fast'"),
        (("adam", True), {}, TypeError, "learning_rate"),
        (("adam", 0.1), {"clip_norm": 0.0}, ValueError, "clip_norm: expected a finite number above 0"),
        (("adam", 0.1), {"clip_norm": -1}, ValueError, "clip_norm"),
        (("adam", 0.1), {"weight_decay": -1e-3}, ValueError, "weight_decay: expected a finite number of at least 0"),
        (("adam", 0.1), {"weight_decay": None}, TypeError, "weight_decay"),
    ],
)
def test_optimizer_errors(arguments, options, error, match):
    with pytest.raises(error, match=match):
        optimizer(*arguments, **options)


@pytest.mark.smoke
def test_schedules_follow_their_formulas():
    ts = np.arange(0, 40)
    at = lambda f: np.array([float(f(jnp.int32(t))) for t in ts])
    np.testing.assert_allclose(at(schedule("constant", 0.1)), 0.1, rtol=1e-6)
    exponential = schedule("exponential", 0.1, steps=10, rate=0.5, end=0.01)
    np.testing.assert_allclose(at(exponential), np.maximum(0.1 * 0.5 ** (ts / 10), 0.01), rtol=1e-5)
    linear = schedule("linear", 0.1, steps=20, end=0.02)
    np.testing.assert_allclose(at(linear), 0.1 - 0.08 * np.minimum(ts / 20, 1), rtol=1e-5)
    cosine = schedule("warmup_cosine", 0.1, steps=30, warmup_steps=10, end=0.01)
    fraction = np.clip((ts - 10) / 20, 0, 1)
    decay = 0.01 + 0.09 * 0.5 * (1 + np.cos(np.pi * fraction))
    np.testing.assert_allclose(at(cosine), np.where(ts < 10, 0.1 * ts / 10, decay), rtol=1e-5, atol=1e-8)
    at_once = schedule("warmup_cosine", 0.1, steps=30, warmup_steps=0, end=0.01)
    decay = 0.01 + 0.09 * 0.5 * (1 + np.cos(np.pi * np.clip(ts / 30, 0, 1)))
    np.testing.assert_allclose(at(at_once), decay, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (("cosine", 0.1), {}, ValueError, "name: expected one of"),
        (("constant", -0.1), {}, ValueError, "learning_rate"),
        (("exponential", 0.1), {"steps": 5}, ValueError, "rate: the 'exponential' schedule needs it"),
        (("constant", 0.1), {"steps": 5}, ValueError, "steps: the 'constant' schedule does not use it"),
        (("linear", 0.1), {"steps": 5, "rate": 0.5}, ValueError, "rate: the 'linear' schedule does not use it"),
        (("linear", 0.1), {"steps": 0}, ValueError, "steps: expected a positive int, got 0"),
        (("linear", 0.1), {"steps": 2.0}, TypeError, "steps"),
        (("linear", 0.1), {"steps": 2, "end": -1.0}, ValueError, "end"),
        (("warmup_cosine", 0.1), {"steps": 5, "warmup_steps": 5}, ValueError, "warmup_steps: expected fewer"),
        (("warmup_cosine", 0.1), {"steps": 5, "warmup_steps": -1}, ValueError, "warmup_steps: expected a non-negative"),
        (("warmup_cosine", 0.1), {"steps": 5}, ValueError, "warmup_steps: the 'warmup_cosine' schedule needs it"),
    ],
)
def test_schedule_errors(arguments, options, error, match):
    with pytest.raises(error, match=match):
        schedule(*arguments, **options)
