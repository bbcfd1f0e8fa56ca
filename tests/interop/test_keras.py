"""Keras 3: every option of its recurrent layers is honoured, by the same outputs as Keras', or refused by name."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")

import jrnn
from jrnn.interop import _common, from_keras, to_keras
from tests.interop.laws import LENGTHS, VOCAB, B, F, H, T, assert_outputs, assert_same, inputs, random_params

pytestmark = pytest.mark.filterwarnings("ignore")


keras = pytest.importorskip("keras", reason="Keras is not installed")
if keras.config.backend() != "jax":
    pytest.skip("Keras runs on another backend than JAX", allow_module_level=True)
L = keras.layers

MODELS = {
    "elman": jrnn.elman(H),
    "elman relu": jrnn.elman(H, "relu"),
    "lstm": jrnn.lstm(H),
    "lstm functions": jrnn.lstm(H, activation="softplus", gate_activation=jax.nn.hard_sigmoid),
    "gru after": jrnn.gru(H),
    "gru before": jrnn.gru(H, "before"),
    "variational": jrnn.variational(jrnn.lstm(H), inputs=0.25, recurrent=0.5),
    "concat": jrnn.bidirectional(jrnn.lstm(H)),
    "sum": jrnn.bidirectional(jrnn.gru(H), merge="sum"),
    "mean": jrnn.bidirectional(jrnn.gru(H, "before"), merge="mean"),
    "product": jrnn.bidirectional(jrnn.elman(H), jrnn.gru(H), merge="product"),
    "dense": jrnn.dense(2),
    "layer norm": jrnn.layer_norm(1e-2),
    "stack": jrnn.stack(
        jrnn.embed(VOCAB, F),
        jrnn.bidirectional(jrnn.lstm(H)),
        jrnn.dropout(0.25),
        jrnn.stack(jrnn.gru(H), jrnn.layer_norm()),
        jrnn.dense(5),
        jrnn.activation("relu"),
        jrnn.dense(2),
        jrnn.activation(_common.softmax),
    ),
}


def run(layer, xs, mask=None):
    """Keras' outputs, time-major; under its own promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        options = {} if mask is None else {"mask": mask.T}
        return np.swapaxes(np.asarray(layer(np.swapaxes(xs, 0, 1), **options)), 0, 1)


def fill(layer, seed=11):
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.normal(size=w.shape).astype(w.dtype) for w in layer.get_weights()])
    return layer


def built(layer, features=F):
    layer.build((None, None, features))
    return fill(layer)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact_with_the_same_outputs(name):
    model = MODELS[name]
    params = random_params(model)
    layer = to_keras(model, params)
    assert_same(from_keras(layer), (model, params))
    assert_outputs(model, params, run(layer, inputs(model)), None)


def test_dtypes_are_kept_both_ways():
    with jax.enable_x64(True):
        for dtype in ("float64", "bfloat16", "float16"):
            params = random_params(MODELS["concat"], dtype)
            assert_same(from_keras(to_keras(MODELS["concat"], params)), (MODELS["concat"], params))


LAYERS = {
    "SimpleRNN": lambda **o: L.SimpleRNN(H, **o),
    "SimpleRNN no bias": lambda **o: L.SimpleRNN(H, use_bias=False, **o),
    "LSTM": lambda **o: L.LSTM(H, **o),
    "LSTM no bias": lambda **o: L.LSTM(H, use_bias=False, **o),
    "LSTM functions": lambda **o: L.LSTM(H, activation="selu", recurrent_activation="hard_sigmoid", **o),
    "LSTM unrolled": lambda **o: L.LSTM(H, unroll=True, **o),
    "GRU": lambda **o: L.GRU(H, **o),
    "GRU before": lambda **o: L.GRU(H, reset_after=False, **o),
    "GRU no bias": lambda **o: L.GRU(H, use_bias=False, **o),
    "GRU dropout": lambda **o: L.GRU(H, dropout=0.5, recurrent_dropout=0.25, **o),
    "RNN of a cell": lambda **o: L.RNN(L.GRUCell(H), **o),
    "Bidirectional": lambda **o: L.Bidirectional(L.LSTM(H, **o)),
    "Bidirectional ave": lambda **o: L.Bidirectional(L.GRU(H, **o), merge_mode="ave"),
    "Bidirectional of two": lambda **o: L.Bidirectional(
        L.GRU(H, **o), backward_layer=L.LSTM(H, go_backwards=True, **o), merge_mode="mul"
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_masked_layers_give_what_keras_gives(name):
    layer = built(LAYERS[name](return_sequences=True))
    model, params = from_keras(layer)
    assert_same(from_keras(to_keras(model, params)), (model, params))
    mask = np.arange(T)[:, None] < LENGTHS
    assert_outputs(model, params, run(layer, inputs(model), mask))


@pytest.mark.parametrize("name", [name for name in LAYERS if "Bidirectional" not in name])
def test_return_sequences_false_is_the_last_valid_step(name):
    layer = built(LAYERS[name]())
    model, params = from_keras(layer)
    ys = jrnn.unroll(model, params, inputs(model), lengths=LENGTHS)[1]
    with jax.numpy_dtype_promotion("standard"):
        expected = layer(inputs(model).swapaxes(0, 1), mask=(np.arange(T)[:, None] < LENGTHS).T)
    np.testing.assert_allclose(jrnn.sequence.last_valid(ys, LENGTHS), expected, rtol=1e-5, atol=1e-5)


def test_both_last_states_of_a_bidirectional():
    layer = built(L.Bidirectional(L.GRU(H)))
    model, params = from_keras(layer)
    state = jrnn.unroll(model, params, inputs(model), lengths=LENGTHS)[0]
    with jax.numpy_dtype_promotion("standard"):
        expected = layer(inputs(model).swapaxes(0, 1), mask=(np.arange(T)[:, None] < LENGTHS).T)
    found = np.concatenate([state["forward"].h, state["backward"].h], -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_classifier_with_mask_zero():
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            L.Embedding(VOCAB, F, mask_zero=True),
            L.Bidirectional(L.LSTM(H, return_sequences=True)),
            L.TimeDistributed(L.Dense(5, activation="gelu")),
            L.GRU(H),
            L.Dropout(0.5),
            L.Dense(2, activation="softmax"),
        ]
    )
    fill(model)
    converted, params = from_keras(model)
    ids = np.where(np.arange(T)[:, None] < LENGTHS, inputs(jrnn.embed(VOCAB, F)), 0)
    with jax.numpy_dtype_promotion("standard"):
        expected = model(ids.T)
    by_lengths = jrnn.unroll(converted, params, ids, lengths=(ids != 0).sum(0))[1]
    by_mask = jrnn.unroll(converted, params, ids, mask=ids != 0)[1]
    for ys in (by_lengths, by_mask):
        last = jrnn.sequence.last_valid(ys, LENGTHS)
        np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "GRU before"])
def test_gradients_are_keras(name):
    layer = built(LAYERS[name](return_sequences=True))
    model, params = from_keras(layer)
    xs = inputs(model)
    weights = np.random.default_rng(0).normal(size=(T, B, H)).astype(np.float32)
    actual = jax.grad(lambda params: (weights * jrnn.unroll(model, params, xs)[1]).sum())(params)

    def loss(values):
        with jax.numpy_dtype_promotion("standard"):
            ys, _ = layer.stateless_call(values, [v.value for v in layer.non_trainable_variables], xs.swapaxes(0, 1))
            return (weights * ys.swapaxes(0, 1)).sum()

    grads = jax.grad(loss)([v.value for v in layer.trainable_variables])
    layer.set_weights([np.asarray(g) for g in grads])
    _, expected = from_keras(layer)
    if "b_hn" in expected:  # two biases have one gradient each, which the conversion sums up
        expected["b"] = expected["b"].at[: 2 * H].divide(2.0)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


class Doubled(L.LSTM):
    def call(self, *arguments, **options):
        return 2 * super().call(*arguments, **options)


REFUSED = {
    "go_backwards": (lambda: L.LSTM(H, go_backwards=True), "expected go_backwards=False, got True"),
    "stateful": (lambda: L.LSTM(H, stateful=True), "expected stateful=False, got True"),
    "return_sequences": (
        lambda: keras.Sequential([L.LSTM(H), L.GRU(H)]),  # which Keras itself refuses to build
        "expected return_sequences=True of a layer with another recurrent one after it",
    ),
    "return_sequences of both": (
        lambda: keras.Sequential([built(L.Bidirectional(L.LSTM(H))), built(L.Dense(2), 2 * H)]),
        "expected return_sequences=True of a Bidirectional",
    ),
    "activation": (lambda: L.LSTM(H, activation="exponential"), "expected activation out of .*'exponential'"),
    "merge_mode": (lambda: L.Bidirectional(L.LSTM(H), merge_mode=None), "expected merge_mode out of"),
    "recurrent_dropout": (lambda: L.GRU(H, reset_after=False, recurrent_dropout=0.5), "expected recurrent_dropout=0"),
    "subclass": (lambda: Doubled(H), "Doubled, a subclass with a call of its own"),
    "masking": (lambda: L.Masking(), "Masking; leave it out and give jrnn.unroll the mask"),
    "stacked cells": (lambda: L.RNN([L.LSTMCell(H), L.LSTMCell(H)]), "expected SimpleRNNCell, LSTMCell or GRUCell"),
    "policy": (lambda: L.LSTM(H, dtype="mixed_bfloat16"), "expected one dtype .*'mixed_bfloat16'"),
    "axis": (lambda: L.LayerNormalization(axis=1), "expected axis=-1"),
    "other": (lambda: L.BatchNormalization(), "got BatchNormalization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_layers_say_why(name):
    make, message = REFUSED[name]
    layer = make()
    if not layer.built and not isinstance(layer, keras.Sequential):
        layer.build((B, T, F))
    with pytest.raises(TypeError, match=f"layer: .*{message}"):
        from_keras(layer)


def test_a_layer_without_weights():
    with pytest.raises(ValueError, match=r"layer: LSTM .*: expected a layer with weights; build it"):
        from_keras(L.LSTM(H))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (jrnn.mgu(H), "Keras has no layer with the equations of MGU"),
        (jrnn.lstm(H, activation=jnp.sin), "expected activations out of"),
        (jrnn.bidirectional(jrnn.lstm(H), merge=jnp.maximum), "expected directions merged by a name"),
        (_common.reversed_layer(jrnn.lstm(H), {})[0], "Keras' go_backwards gives its outputs in reversed order"),
        (jrnn.stack(jrnn.gru(F), jrnn.residual(jrnn.gru(F))), r"model\.layers\[1\]: .*Residual"),
    ],
    ids=repr,
)
def test_refused_models_say_why(model, reason):
    with pytest.raises(TypeError, match=reason):
        to_keras(model, random_params(model))
