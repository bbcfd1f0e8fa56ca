"""With ``jax_numpy_rank_promotion="raise"``, as careful users set it, everything runs, and gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import losses, sequence, testing
from tests.cases import inputs, rows

pytestmark = pytest.mark.usefixtures("quick_compilation", "strict_ranks")

# Users' own steps, in which a vector meets a batch.
OWN = {"step_only", "counting", "variational_step_only", "rotating", "drawing_decoder"}
ROWS = rows(pytest.mark.nightly, OWN)
RNG = np.random.default_rng(0)
XS = np.asarray(RNG.normal(size=(6, 2, 3)), np.float32)
LENGTHS, MASK = np.array([6, 3]), RNG.random((6, 2)) < 0.7


@pytest.fixture
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def test_the_switch_is_on():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.sampled(3)
def test_laws(case):
    testing.check_step_equals_unroll(case.layer, case.in_features)


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.sampled(3)
def test_every_way_to_run_is_traced(case):
    """Options that the law above leaves out, with gradients; ranks are checked where a program is traced."""
    layer = case.layer
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), case.in_features))
    xs = inputs(case, XS)
    xs = xs if layer.event_ndim == 0 else jnp.asarray(xs, jnp.bfloat16)
    flags = {"lengths": LENGTHS, "mask": MASK, "resets": ~MASK}
    key = None if layer.uses_key is False else jax.random.key(0)
    runs = [{"remat": 2}, {"reverse": True, "key": key}, {"backend": "reference", **flags}, {"remat": "sqrt", **flags}]

    def loss(params, options):
        return jnp.sum(jrnn.unroll(layer, params, xs, **options)[1].astype(jnp.float32))

    for options in runs:
        jax.eval_shape(jax.grad(lambda params, options=options: loss(params, options)), params)


@pytest.mark.parametrize("layer", [jrnn.gru(256), jrnn.peephole_lstm(256)], ids=repr)
@pytest.mark.parametrize("backend", ["hoisted", "native"])
def test_larger_sizes(layer, backend):
    """Those for which other layouts are taken, and the compiled loop."""
    params, xs = jax.eval_shape(lambda: layer.init(jax.random.key(0), 3)), np.zeros((4, 2, 16, 3), np.float32)
    masked = jrnn.variational(layer, inputs=0.2, recurrent=0.3)
    if backend == "native" and jrnn.choose_backend(layer, params, xs)[0] != "native":
        pytest.skip("native cannot run here: " + jrnn.choose_backend(layer, params, xs)[1])

    def loss(params, cell, key):
        return jnp.sum(jrnn.unroll(cell, params, xs, lengths=np.full((2, 16), 3), backend=backend, key=key)[1] ** 2)

    for cell, key in ((layer, None), (masked, jax.random.key(1))):
        jax.eval_shape(lambda params, cell=cell, key=key: jax.grad(loss)(params, cell, key), params)


LOSSES = {
    "mse": lambda x: losses.mse(x, jnp.zeros_like(x), MASK),
    "mae": lambda x: losses.mae(x, jnp.zeros_like(x), MASK),
    "pinball": lambda x: losses.pinball(x, jnp.zeros_like(x[..., 0]), (0.1, 0.5, 0.9), MASK),
    "cross_entropy": lambda x: losses.cross_entropy(x, np.zeros((6, 2), int), MASK, label_smoothing=0.1),
    "cross_entropy_of_probabilities": lambda x: losses.cross_entropy(x, np.full((6, 2, 3), 1 / 3, np.float32), MASK),
    "binary_cross_entropy": lambda x: losses.binary_cross_entropy(x, np.ones((6, 2, 3), bool), MASK),
    "ctc": lambda x: losses.ctc(x, LENGTHS, np.array([[1, 2], [2, 1]]), np.array([2, 1])),
    "perplexity": lambda x: losses.perplexity(x, np.zeros((6, 2), int), MASK),
    "bits_per_character": lambda x: losses.bits_per_character(x, np.zeros((6, 2), int), MASK),
    "accuracy": lambda x: losses.accuracy(x, np.zeros((6, 2), int), MASK),
    "l1": lambda x: losses.l1({"w": x, "b": x[0, 0]}),
    "l2": lambda x: losses.l2({"w": x, "b": x[0, 0]}),
    "last_valid": lambda x: sequence.last_valid(x, LENGTHS, MASK).sum(),
    "mean_valid": lambda x: sequence.mean_valid(x, LENGTHS, MASK).sum(),
    "max_valid": lambda x: sequence.max_valid(x, LENGTHS, MASK).sum(),
    "reverse": lambda x: (sequence.reverse(x, LENGTHS) ** 2).sum(),
    "pad": lambda x: (sequence.pad([x, x[:2]])[0] ** 2).sum(),
    "windows": lambda x: (sequence.windows(x, 2)[0] ** 2).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.sampled(3)
def test_losses_and_sequences(name):
    of = jax.value_and_grad(LOSSES[name])
    got = of(jnp.asarray(XS))
    with jax.numpy_rank_promotion("allow"):
        jax.tree.map(np.testing.assert_array_equal, got, of(jnp.asarray(XS)))


def test_other_functions_of_sequences():
    resets, last = sequence.resets_from_done(~MASK, MASK[0])
    assert resets.shape == (6, 2)
    assert last.shape == (2,)
    sequence.valid_steps(LENGTHS, MASK, 6, (2,))
    sequence.buckets(LENGTHS, 1, key=jax.random.key(0))


def test_training():
    model = jrnn.stack(jrnn.variational(jrnn.lstm(4), inputs=0.1, recurrent=0.1), jrnn.dropout(0.1), jrnn.dense(3))
    params = model.init(jax.random.key(0), 3)

    def loss(params, batch, key):
        return losses.mse(jrnn.unroll(model, params, batch, lengths=LENGTHS, key=key)[1], batch, MASK)

    step = jrnn.training.make_step(loss, jrnn.optimizer("adamw", 1e-2, clip_norm=1.0, weight_decay=0.1))
    state, metrics = step(step.init(params, jax.random.key(1)), XS)
    assert metrics.finite
    stepper, carry = jrnn.stepper(model), model.initial_state(params, (2,))
    for x in XS:
        carry, _ = stepper(state.params, carry, x, jax.random.key(0))
    step = jrnn.training.tbptt_step(model, losses.mse, jrnn.optimizer("sgd", 1e-2))
    state = step.init(params)
    for chunk in jrnn.training.chunks(XS, XS, 4, lengths=LENGTHS):
        state, _ = step(state, chunk)
    jrnn.training.truncated_unroll(model, params, XS, 4, lengths=LENGTHS)
