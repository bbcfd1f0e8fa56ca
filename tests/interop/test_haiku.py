"""Haiku: exact round trips of its parameters, its own outputs and gradients, refusals with the reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.interop import from_haiku, to_haiku
from tests.interop.laws import VOCAB, B, F, H, T, assert_outputs, assert_same, inputs, random_params

hk = pytest.importorskip("haiku", reason="Haiku is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {
    "VanillaRNN": jrnn.elman(H, "relu"),
    "LSTM": jrnn.lstm(H),
    "GRU": jrnn.gru(H, "before"),
    "Linear": jrnn.dense(2),
    "Embed": jrnn.embed(VOCAB, F),
    "LayerNorm": jrnn.layer_norm(),
    "stack": jrnn.stack(
        jrnn.embed(VOCAB, F), jrnn.lstm(H), jrnn.gru(H, "before"), jrnn.lstm(H), jrnn.dense(5), jrnn.dense(2)
    ),
}


def network(names, sizes):
    """What the classes compute over time, as a transformed function of `(T, B, F)`."""

    def forward(xs):
        for name, size in zip(names, sizes, strict=True):
            if name in ("VanillaRNN", "LSTM", "GRU"):
                core = getattr(hk, name)(size)
                xs, _ = hk.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))
            elif name == "LayerNorm":
                xs = hk.LayerNorm(-1, True, True)(xs)
            else:
                xs = (hk.Linear(size) if name == "Linear" else hk.Embed(VOCAB, F))(xs)
        return xs

    return hk.without_apply_rng(hk.transform(forward))


def transformed(model, names):
    layers = model.layers if hasattr(model, "layers") else (model,)
    sizes = [getattr(layer, "hidden", getattr(layer, "features", None)) for layer in layers]
    return network([names] if isinstance(names, str) else names, sizes)


def exact_forget_bias(params):
    """Haiku adds 1 to the forget gate's bias as it runs: halves survive the subtraction and the addition exactly."""
    return jax.tree.map(lambda a: jnp.round(a * 8) / 8 if a.ndim == 1 else a, params)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact_with_the_same_outputs(name):
    model = MODELS[name]
    params = exact_forget_bias(random_params(model))
    names, tree = to_haiku(model, params)
    assert_same(from_haiku(names, tree), (model, params))
    assert_same(from_haiku(names, jax.tree.map(jnp.asarray, tree)), (model, params))  # whose keys are sorted
    net = transformed(model, names)
    shapes = jax.eval_shape(net.init, jax.random.key(0), inputs(model))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda a: a.shape, shapes)
    assert_outputs(model, params, net.apply(tree, jnp.asarray(inputs(model))))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_as_haiku_makes_them(name):
    model = MODELS[name]
    names = to_haiku(model, random_params(model))[0]
    net = transformed(model, names)
    tree = net.init(jax.random.key(0), jnp.asarray(inputs(model)))
    converted, params = from_haiku(names, tree)
    assert converted == model
    assert_outputs(model, params, net.apply(tree, jnp.asarray(inputs(model))))
    if name != "VanillaRNN":  # whose second bias goes into the first
        back = to_haiku(converted, params)[1]
        jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_rounding_of_a_forget_bias_is_one_rounding():
    params = random_params(jrnn.lstm(H))
    back = from_haiku(*to_haiku(jrnn.lstm(H), params))[1]
    np.testing.assert_allclose(back["b"], params["b"], rtol=0, atol=1.2e-7 * 4)
    np.testing.assert_array_equal(back["w_hh"], params["w_hh"])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "VanillaRNN"])
def test_gradients_are_haikus(name):
    net = transformed(MODELS[name], name)
    xs = jnp.asarray(inputs(MODELS[name]))
    tree = net.init(jax.random.key(0), xs)
    model, params = from_haiku(name, tree)
    weights = jax.random.normal(jax.random.key(1), (T, B, H))
    expected = jax.grad(lambda tree: (weights * net.apply(tree, xs)).sum())(tree)
    actual = jax.grad(lambda params: (weights * jrnn.unroll(model, params, xs)[1]).sum())(params)
    _, expected = from_haiku(name, expected)
    if name == "LSTM":  # a gradient has no 1 added to it
        expected["b"] = expected["b"].at[H : 2 * H].add(-1)
    if name == "VanillaRNN":  # two biases have one gradient each
        expected["b"] = expected["b"] / 2
    for leaf, value in expected.items():
        np.testing.assert_allclose(actual[leaf], value, rtol=1e-4, atol=1e-5, err_msg=leaf)


def test_a_deep_rnn_inside_a_module():
    class Net(hk.Module):
        def __call__(self, xs):
            core = hk.DeepRNN([hk.LSTM(H), jax.nn.relu, hk.LSTM(H)])
            return hk.dynamic_unroll(core, xs, core.initial_state(B))[0]

    net = hk.without_apply_rng(hk.transform(lambda xs: Net()(xs)))
    tree = net.init(jax.random.key(0), jnp.asarray(inputs(jrnn.lstm(H))))
    model, (first, second) = from_haiku(("LSTM", "LSTM"), tree)
    model = jrnn.stack(model.layers[0], jrnn.activation("relu"), model.layers[1])
    assert_outputs(model, (first, {}, second), net.apply(tree, jnp.asarray(inputs(model))))


def test_entries_that_do_not_fit():
    name, tree = to_haiku(jrnn.gru(H, "before"), random_params(jrnn.gru(H, "before")))
    with pytest.raises(ValueError, match=r"params: expected an entry 'lstm/linear', got \['gru'\]"):
        from_haiku("LSTM", tree)
    with pytest.raises(ValueError, match=r"expected the entries of \['GRU'\] only, got \['linear'\] besides"):
        from_haiku(name, {**tree, "linear": {"w": np.ones((3, 3))}})
    with pytest.raises(ValueError, match=r"params\['gru'\]: expected 'w_h', got \['b', 'w_i'\]"):
        from_haiku(name, {"gru": {k: v for k, v in tree["gru"].items() if k != "w_h"}})
    with pytest.raises(ValueError, match=r"params\['gru'\]: params: expected b of shape"):
        from_haiku(name, {"gru": {**tree["gru"], "b": np.zeros(6, np.float32)}})
    with pytest.raises(TypeError, match=r"class_name: expected one or several of .*'Conv1DLSTM'"):
        from_haiku("Conv1DLSTM", tree)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (jrnn.gru(H), "applies its reset gate before the product"),
        (jrnn.elman(H), "VanillaRNN has relu only"),
        (jrnn.lstm(H, activation="relu"), "tanh and sigmoid only"),
        (jrnn.layer_norm(1e-3), "epsilon other than"),
        (jrnn.bidirectional(jrnn.lstm(H)), "Haiku has no module with the equations of Bidirectional"),
        (jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5)), r"model\.layers\[1\]: .*Dropout"),
    ],
    ids=repr,
)
def test_refused_models_say_why(model, reason):
    with pytest.raises(TypeError, match=reason):
        to_haiku(model, random_params(model))
