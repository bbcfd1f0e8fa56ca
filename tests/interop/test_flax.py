"""Flax, Linen and NNX: exact round trips, Flax's own outputs on ragged batches, refusals that name the option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.interop import _common, from_flax, to_flax
from tests.interop.laws import LENGTHS, VOCAB, B, F, H, T, assert_outputs, assert_same, inputs, random_params

nn = pytest.importorskip("flax.linen", reason="Flax is not installed")
nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def without_b_hn(model, params):
    """Parameters that NNX's GRU can hold."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: jnp.zeros_like(a) if getattr(path[-1], "key", None) == "b_hn" else a, params
    )


MODELS = {
    "elman": jrnn.elman(H),
    "elman relu": jrnn.elman(H, "relu"),
    "lstm": jrnn.lstm(H),
    "lstm functions": jrnn.lstm(H, activation="softplus", gate_activation=jax.nn.hard_sigmoid),
    "gru": jrnn.gru(H),
    "ugrnn": jrnn.ugrnn(H),
    "reversed": _common.reversed_layer(jrnn.gru(H), {})[0],
    "concat": jrnn.bidirectional(jrnn.lstm(H)),
    "sum": jrnn.bidirectional(jrnn.gru(H), merge="sum"),
    "mean": jrnn.bidirectional(jrnn.gru(H), jrnn.elman(H), merge="mean"),
    "product": jrnn.bidirectional(jrnn.elman(H), merge="product"),
    "function": jrnn.bidirectional(jrnn.elman(H), merge=jnp.maximum),
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
    ),
}
CASES = [(api, name) for api in ("linen", "nnx") for name in MODELS if not (api == "nnx" and name == "ugrnn")]


def run(rnn, variables, xs, **options):
    """Flax's outputs, time-major."""
    xs = jnp.asarray(np.swapaxes(xs, 0, 1))
    ys = rnn(xs, **options) if isinstance(rnn, nnx.Module) else rnn.apply(variables, xs, **options)
    return np.swapaxes(np.asarray(ys), 0, 1)


@pytest.mark.parametrize(("api", "name"), CASES)
@pytest.mark.sampled(3)
def test_there_and_back_is_exact_with_the_same_outputs(api, name):
    model = MODELS[name]
    params = random_params(model)
    if api == "nnx":
        params = without_b_hn(model, params)
    rnn, variables = to_flax(model, params, api=api)
    assert_same(from_flax(rnn, variables), (model, params))
    if api == "nnx":
        assert_same(from_flax(rnn), (model, params))
    xs = inputs(model)
    if isinstance(rnn, nn.RNN | nn.Bidirectional | nnx.RNN | nnx.Bidirectional):
        assert_outputs(model, params, run(rnn, variables, xs, seq_lengths=jnp.asarray(LENGTHS)))
    else:
        assert_outputs(model, params, run(rnn, variables, xs), None)


LINEN = {
    "LSTMCell": nn.RNN(nn.LSTMCell(H)),
    "OptimizedLSTMCell": nn.RNN(nn.OptimizedLSTMCell(H, gate_fn=nn.hard_sigmoid)),
    "time_major": nn.RNN(nn.GRUCell(H), time_major=True, return_carry=True),
    "a bare cell": nn.GRUCell(H),
    "no bias": nn.Dense(H, use_bias=False),
    "no scale": nn.LayerNorm(use_scale=False),
    "MGUCell": nn.RNN(nn.MGUCell(H, reset_gate=False)),
    "SimpleCell": nn.RNN(nn.SimpleCell(H, activation_fn=nn.relu), unroll=2),
    "directions": nn.Bidirectional(nn.RNN(nn.LSTMCell(H), reverse=True), nn.RNN(nn.GRUCell(H)), merge_fn=jnp.add),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_as_they_are_initialised(name):
    rnn = LINEN[name]
    xs = jnp.asarray(inputs(jrnn.gru(H)))
    x = (jnp.zeros((B, H)), xs[0]) if name == "a bare cell" else (xs,)
    variables = rnn.init(jax.random.key(0), *x)
    model, params = from_flax(rnn, variables)
    assert_same(from_flax(rnn, variables.get("params", {})), (model, params))
    again = from_flax(*to_flax(model, params))
    assert_same(again, (model, params))
    if name == "a bare cell":
        ys = jnp.stack([rnn.apply(variables, jnp.zeros((B, H)), x)[1] for x in xs[:1]])
        np.testing.assert_allclose(jrnn.unroll(model, params, xs[:1])[1], ys, rtol=1e-5, atol=1e-6)
    elif name == "time_major":
        assert_outputs(model, params, rnn.apply(variables, xs, seq_lengths=LENGTHS)[1])
    else:
        assert_outputs(model, params, run(rnn, variables, xs), None)


# Made where they are tested: initialising them compiles, which collecting the tests should not.
NNX_MODULES = {
    "LSTMCell": lambda rngs: nnx.RNN(nnx.LSTMCell(F, H, rngs=rngs)),
    "OptimizedLSTMCell": lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(F, H, gate_fn=jax.nn.hard_sigmoid, rngs=rngs)),
    "GRUCell": lambda rngs: nnx.RNN(nnx.GRUCell(F, H, rngs=rngs), reverse=True, keep_order=True),
    "SimpleCell": lambda rngs: nnx.RNN(nnx.SimpleCell(F, H, rngs=rngs)),
    "no bias": lambda rngs: nnx.Sequential(nnx.Linear(F, H, use_bias=False, rngs=rngs), jnp.tanh),
    "directions": lambda rngs: nnx.Bidirectional(
        nnx.RNN(nnx.LSTMCell(F, H, rngs=rngs)), nnx.RNN(nnx.GRUCell(F, H, rngs=rngs)), merge_fn=jnp.add
    ),
}


@pytest.mark.parametrize("name", NNX_MODULES)
def test_nnx_modules_as_they_are_made(name):
    rnn = NNX_MODULES[name](nnx.Rngs(1))
    model, params = from_flax(rnn)
    assert_same(from_flax(*to_flax(model, params, api="nnx")), (model, params))
    xs = inputs(model)
    if isinstance(rnn, nnx.Sequential):
        assert_outputs(model, params, run(rnn, None, xs), None)
    else:
        assert_outputs(model, params, run(rnn, None, xs, seq_lengths=jnp.asarray(LENGTHS)))


def test_gradients_are_flaxs():
    rnn = nn.RNN(nn.OptimizedLSTMCell(H))
    xs = jnp.asarray(inputs(jrnn.gru(H)))
    variables = rnn.init(jax.random.key(0), xs)
    model, params = from_flax(rnn, variables)
    weights = jax.random.normal(jax.random.key(1), (T, B, H))
    expected = jax.grad(lambda v: (weights * rnn.apply(v, xs.swapaxes(0, 1)).swapaxes(0, 1)).sum())(variables)
    actual = jax.grad(lambda p: (weights * jrnn.unroll(model, p, xs)[1]).sum())(params)
    _, expected = from_flax(rnn, expected)
    for name in actual:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


class Doubled(nn.GRUCell):
    @nn.compact
    def __call__(self, carry, inputs):
        carry, y = nn.GRUCell.__call__(self, carry, inputs)
        return carry, 2 * y


REFUSED = {
    "residual": (nn.RNN(nn.SimpleCell(H, residual=True)), "expected residual=False, got True"),
    "reset_gate": (nn.RNN(nn.MGUCell(H)), "expected reset_gate=False, got True"),
    "carry_init": (nn.RNN(nn.GRUCell(H, carry_init=nn.initializers.ones)), "expected a carry_init of zeros"),
    "dtype": (nn.RNN(nn.GRUCell(H, dtype=jnp.bfloat16)), "got dtype=bfloat16"),
    "keep_order": (nn.RNN(nn.GRUCell(H), reverse=True), "expected keep_order=True with reverse=True"),
    "return_carry": (nn.Sequential([nn.RNN(nn.GRUCell(H), return_carry=True)]), "expected return_carry=False"),
    "subclass": (nn.RNN(Doubled(H)), "got Doubled, a subclass of GRUCell"),
    "other": (nn.BatchNorm(use_running_average=True), "got BatchNorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_modules_say_why(name):
    rnn, message = REFUSED[name]
    with jax.numpy_dtype_promotion("standard"):
        variables = rnn.init(jax.random.key(0), jnp.ones((B, T, F)))
    with pytest.raises(TypeError, match=f"rnn.*: {message}|rnn.*{message}"):
        from_flax(rnn, variables)


def test_variables_that_do_not_fit():
    rnn = nn.RNN(nn.GRUCell(H))
    variables = rnn.init(jax.random.key(0), jnp.ones((B, T, F)))
    del variables["params"]["cell"]["hn"]["bias"]
    with pytest.raises(ValueError, match=r"variables: expected 'bias' for rnn\.cell\.hn, got \['kernel'\]"):
        from_flax(rnn, variables)
    with pytest.raises(TypeError, match=r"variables: expected what rnn\.init returned"):
        from_flax(rnn)
    with pytest.raises(TypeError, match=r"rnn: expected a module of flax\.linen or flax\.nnx"):
        from_flax("rnn", {})


@pytest.mark.parametrize(
    ("model", "api", "reason"),
    [
        (jrnn.gru(H, "before"), "linen", "applies its reset gate after the product"),
        (jrnn.peephole_lstm(H), "linen", "flax.linen has no module with the equations of PeepholeLSTM"),
        (jrnn.mgu(H), "linen", "MGUCell keeps what the paper"),
        (jrnn.ugrnn(H), "nnx", "flax.nnx has no module with the equations of UGRNN"),
        (jrnn.stack(jrnn.gru(F), jrnn.residual(jrnn.gru(F))), "linen", r"model\.layers\[1\]: .*Residual"),
    ],
)
def test_refused_models_say_why(model, api, reason):
    with pytest.raises(TypeError, match=reason):
        to_flax(model, random_params(model), api=api)


def test_nnx_has_no_b_hn():
    with pytest.raises(ValueError, match=r"expected b_hn=0, got another; flax\.nnx\.GRUCell has no bias"):
        to_flax(jrnn.gru(H), random_params(jrnn.gru(H)), api="nnx")
    with pytest.raises(ValueError, match='api: expected "linen" or "nnx"'):
        to_flax(jrnn.gru(H), random_params(jrnn.gru(H)), api="haiku")
