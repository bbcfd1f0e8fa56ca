"""Equinox: exact round trips, its own outputs and gradients, refusals that name the option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.interop import from_equinox, to_equinox
from tests.interop.laws import VOCAB, B, F, H, T, assert_outputs, assert_same, inputs, random_params

eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
KEY = jax.random.key(0)

MODELS = {
    "lstm": jrnn.lstm(H),
    "gru": jrnn.gru(H),
    "dense": jrnn.dense(2),
    "embed": jrnn.embed(VOCAB, F),
    "layer norm": jrnn.layer_norm(1e-2),
    "stack": jrnn.stack(
        jrnn.embed(VOCAB, F), jrnn.lstm(H), jrnn.dropout(0.5), jrnn.stack(jrnn.gru(H), jrnn.layer_norm()),
        jrnn.dense(2), jrnn.activation("relu"),
    ),
}  # fmt: skip


def run(module, xs):
    """A module over time, `(T, B, F)`: one step of one sequence is all that Equinox's layers take."""
    if isinstance(module, eqx.nn.Sequential):
        for layer in module.layers:
            xs = run(layer, xs)
        return xs
    if isinstance(module, eqx.nn.LSTMCell | eqx.nn.GRUCell):
        zeros = jnp.zeros((xs.shape[1], module.hidden_size))
        state = (zeros, zeros) if isinstance(module, eqx.nn.LSTMCell) else zeros

        def step(state, x):
            state = jax.vmap(module)(x, state)
            return state, state[0] if isinstance(state, tuple) else state

        return jax.lax.scan(step, state, xs)[1]
    if isinstance(module, eqx.nn.Dropout):
        return xs
    return jax.vmap(jax.vmap(module))(xs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled(3)
def test_there_and_back_is_exact_with_the_same_outputs(name):
    model = MODELS[name]
    params = random_params(model)
    module = to_equinox(model, params)
    assert_same(from_equinox(module), (model, params))
    # What runs forward alone does the same on ragged batches, up to each sequence's length.
    assert_outputs(model, params, run(module, jnp.asarray(inputs(model))))


# Made where they are tested: initialising them compiles, which collecting the tests should not.
MODULES = {
    "LSTMCell": lambda: eqx.nn.LSTMCell(F, H, key=KEY),
    "LSTMCell no bias": lambda: eqx.nn.LSTMCell(F, H, use_bias=False, key=KEY),
    "GRUCell": lambda: eqx.nn.GRUCell(F, H, key=KEY),
    "GRUCell no bias": lambda: eqx.nn.GRUCell(F, H, use_bias=False, key=KEY),
    "Linear no bias": lambda: eqx.nn.Linear(F, H, use_bias=False, key=KEY),
    "LayerNorm no weight": lambda: eqx.nn.LayerNorm(F, use_weight=False),
    "LayerNorm neither": lambda: eqx.nn.LayerNorm(F, use_weight=False, use_bias=False),
    "Sequential": lambda: eqx.nn.Sequential(
        [eqx.nn.Linear(F, H, key=KEY), eqx.nn.Lambda(jax.nn.relu), eqx.nn.Identity(), eqx.nn.Dropout(0.5)]
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_as_they_are_made(name):
    module = MODULES[name]()
    model, params = from_equinox(module)
    assert_outputs(model, params, run(module, jnp.asarray(inputs(model))))
    assert_same(from_equinox(to_equinox(model, params)), (model, params))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_gradients_are_equinoxs(name):
    module = MODULES[name]()
    model, params = from_equinox(module)
    xs = jnp.asarray(inputs(model))
    weights = jax.random.normal(jax.random.key(1), (T, B, H))
    expected = eqx.filter_grad(lambda module: (weights * run(module, xs)).sum())(module)
    actual = jax.grad(lambda params: (weights * jrnn.unroll(model, params, xs)[1]).sum())(params)
    for name, value in from_equinox(expected)[1].items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes_are_kept_both_ways(dtype):
    with jax.enable_x64(True):
        params = random_params(MODELS["stack"], dtype)
        assert_same(from_equinox(to_equinox(MODELS["stack"], params)), (MODELS["stack"], params))


class Doubled(eqx.nn.LSTMCell):
    pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (eqx.nn.Linear("scalar", H, key=KEY), "expected a number of in_features, got 'scalar'"),
        (eqx.nn.LayerNorm((2, F)), "expected a shape of one axis"),
        (eqx.nn.Sequential([eqx.nn.Conv1d(F, H, 3, key=KEY)]), r"module\[0\]: .*got Conv1d"),
        (Doubled(F, H, key=KEY), "got Doubled"),
    ],
    ids=["scalar", "axes", "other", "subclass"],
)
def test_refused_modules_say_why(module, message):
    with pytest.raises(TypeError, match=message):
        from_equinox(module)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (jrnn.elman(H), "equinox.nn has no module with the equations of Elman"),
        (jrnn.gru(H, "before"), "applies its reset gate after the product"),
        (jrnn.lstm(H, activation="relu"), "LSTMCell has tanh and sigmoid only"),
        (jrnn.bidirectional(jrnn.lstm(H)), "no layer over time"),
        (jrnn.stack(jrnn.gru(F), jrnn.residual(jrnn.gru(F))), r"model\.layers\[1\]: .*Residual"),
    ],
    ids=repr,
)
def test_refused_models_say_why(model, reason):
    with pytest.raises(TypeError, match=reason):
        to_equinox(model, random_params(model))
