"""Inputs that lie over a mesh by their batch, where the mesh's axes are Explicit, as `jax.make_mesh` makes them.

Types are the same over one device as over many: the table of cases is traced over one, and a few models are run over
four, in a process of their own.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jrnn
from jrnn import losses, sequence
from tests.cases import inputs, rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
XS = np.asarray(RNG.normal(size=(6, 4, 3)), np.float32)
LENGTHS, MASK = np.array([6, 3, 0, 5]), RNG.random((6, 4)) < 0.7
CTC = {
    "lengths": np.array([6, 3, 4, 5]),
    "labels": np.tile([[1], [2]], (1, 4)),
    "label_lengths": np.array([2, 1, 0, 2]),
}


@pytest.fixture
def mesh():
    with jax.set_mesh(jax.make_mesh((1,), ("data",))) as mesh:
        yield mesh


def over(tree, lead):
    """A tree of arrays whose batch axis comes after so many, over the mesh."""
    return jax.tree.map(lambda a: jax.device_put(a, P(*(None,) * lead, "data")), tree)


def specs(tree):
    return {jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(tree)}


# A second Python need not run these on every row.
ROWS = rows(pytest.mark.nightly)


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.sampled(3)
def test_every_layer_is_traced_with_every_option(mesh, case):
    layer = case.layer
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), case.in_features))
    xs = over(inputs(case, XS), 1)
    key = None if layer.uses_key is False else jax.random.key(0)
    whole = {"lengths": LENGTHS, "mask": MASK, "resets": MASK}
    spread = {"lengths": over(LENGTHS, 0), "resets": over(MASK, 1)}
    runs = [{}, {"key": key, **whole}, {"reverse": True, "remat": 2, **spread}, {"backend": "reference", **whole}]

    def loss(params, state, options):
        state, ys = jrnn.unroll(layer, params, xs, state, **options)
        assert all(jax.typeof(leaf).sharding.spec[0] == "data" for leaf in jax.tree.leaves(state))
        assert jax.typeof(ys).sharding.spec[1] == "data"
        return jnp.sum(ys.real), state

    for options in runs:
        gradient = jax.grad(lambda params, state, options=options: loss(params, state, options), has_aux=True)
        gradients, state = jax.eval_shape(gradient, params, None)
        assert jax.tree.structure(gradients) == jax.tree.structure(params)
        jax.eval_shape(gradient, params, state)  # the next chunk
    assert jrnn.choose_backend(layer, params, xs)[0] in (
        "associative",
        "chunkwise",
        "hoisted",
        "reference",
        "hoisted+reference",
    )


def test_inputs_that_lie_whole_follow_what_is_spread(mesh):
    cell = jrnn.gru(4)
    params = cell.init(jax.random.key(0), 3)
    for options in ({"state": over(cell.initial_state(params, (4,)), 0)}, {"lengths": over(LENGTHS, 0)}):
        state, ys = jax.eval_shape(lambda options=options: jrnn.unroll(cell, params, XS, **options))
        assert specs((state, ys)) == {P("data", None), P(None, "data", None)}


def test_features_over_a_mesh():
    """Weights whose units lie over an axis of their own: the state follows the step."""
    cell = jrnn.elman(4)
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"))):
        params = cell.init(jax.random.key(0), 3)
        where = {"w_ih": P(None, "model"), "w_hh": P(None, "model"), "b": P("model")}
        params = {name: jax.device_put(params[name], where[name]) for name in params}
        run = lambda params: jrnn.unroll(cell, params, over(XS, 1), lengths=LENGTHS, resets=MASK)
        assert specs(jax.eval_shape(run, params)) == {P("data", "model"), P(None, "data", "model")}
        gradients = jax.eval_shape(jax.grad(lambda params: jnp.sum(run(params)[1])), params)
        assert {name: leaf.sharding.spec for name, leaf in gradients.items()} == where


def test_steps(mesh):
    layer = jrnn.stack(jrnn.zoneout(jrnn.gru(4), h=0.1), jrnn.dense(2))
    params, step = layer.init(jax.random.key(0), 3), jrnn.stepper(layer)
    state, xs = over(layer.initial_state(params, (4,)), 0), over(XS, 1)
    for x in xs:
        state, y = step(params, state, x)
    np.testing.assert_allclose(y, jrnn.unroll(layer, params, XS)[1][-1], atol=1e-6)
    whole = layer.initial_state(params, (4,))
    assert specs(jax.eval_shape(step, params, whole, xs[0], jax.random.key(0))[0]) == {P("data", None)}


FUNCTIONS = {
    "mse": lambda x, like, labels, mask, n: losses.mse(x, like, mask),
    "mae": lambda x, like, labels, mask, n: losses.mae(x, like, mask),
    "pinball": lambda x, like, labels, mask, n: losses.pinball(x, like[..., 0], (0.1, 0.5, 0.9), mask),
    "cross_entropy": lambda x, like, labels, mask, n: losses.cross_entropy(x, labels, mask, label_smoothing=0.1),
    "probabilities": lambda x, like, labels, mask, n: losses.cross_entropy(x, jax.nn.softmax(like), mask),
    "binary_cross_entropy": lambda x, like, labels, mask, n: losses.binary_cross_entropy(x, jax.nn.sigmoid(like), mask),
    "accuracy": lambda x, like, labels, mask, n: losses.accuracy(x, labels, mask),
    "perplexity": lambda x, like, labels, mask, n: losses.perplexity(x, labels, mask),
    "last_valid": lambda x, like, labels, mask, n: jnp.sum(sequence.last_valid(x, n, mask) ** 2),
    "mean_valid": lambda x, like, labels, mask, n: jnp.sum(sequence.mean_valid(x, n, mask) ** 2),
    "max_valid": lambda x, like, labels, mask, n: jnp.sum(sequence.max_valid(x, n, mask) ** 2),
    "reverse": lambda x, like, labels, mask, n: jnp.sum(sequence.reverse(x, n) * x),
    "resets": lambda x, like, labels, mask, n: jnp.sum(x[..., 0], where=sequence.resets_from_done(mask, mask[0])[0]),
}
LABELS = RNG.integers(0, 3, (6, 4))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_losses_and_sequences(name, mesh):
    function = jax.value_and_grad(FUNCTIONS[name])
    given = (np.asarray(RNG.normal(size=XS.shape), np.float32), LABELS, MASK)
    for x, rest, n in (
        (over(XS, 1), over(given, 1), over(LENGTHS, 0)),
        (over(XS, 1), given, LENGTHS),
        (jnp.asarray(XS), over(given, 1), over(LENGTHS, 0)),
    ):
        jax.eval_shape(function, x, *rest, n)


def test_training(mesh):
    model = jrnn.stack(jrnn.embed(5, 3), jrnn.variational(jrnn.lstm(4), inputs=0.1, recurrent=0.1), jrnn.dense(3))
    params, ids = model.init(jax.random.key(0), None), over(LABELS, 1)

    def loss(params, batch, key):
        logits = jrnn.unroll(model, params, batch, lengths=LENGTHS, key=key)[1]
        return losses.cross_entropy(logits, batch, MASK) + losses.ctc(logits, **CTC)

    step = jrnn.training.make_step(loss, jrnn.optimizer("adam", 1e-2, clip_norm=1.0))
    _, metrics = step(step.init(params, jax.random.key(1)), ids)
    assert metrics.finite
    cell = jrnn.lstm(3)
    step = jrnn.training.tbptt_step(cell, losses.mse, jrnn.optimizer("sgd", 1e-2))
    state = step.init(cell.init(jax.random.key(0), 3))
    for chunk in jrnn.training.chunks(over(XS, 1), over(XS, 1), 4, lengths=LENGTHS):
        state, metrics = step(state, chunk)
    assert specs(state.carry) == {P("data", None)}


# --- over four devices -------------------------------------------------------------------------------------------


def compare_over_devices():
    """Values and gradients over four devices are those of one; run by the test below."""
    assert jax.device_count() == 4
    model = jrnn.stack(
        jrnn.bidirectional(jrnn.lstm(4)),
        jrnn.dropout(0.2),
        jrnn.zoneout(jrnn.gru(4), h=0.1),
        jrnn.tdnn(3, window=2, dilation=2),
    )
    params = model.init(jax.random.key(0), 3)
    flags = (LENGTHS, MASK, ~MASK)

    def loss(params, xs, state, lengths, mask, resets):
        state, ys = jrnn.unroll(
            model, params, xs, state, lengths=lengths, mask=mask, resets=resets, key=jax.random.key(1)
        )
        return losses.mse(ys, xs, mask) + losses.ctc(ys, **CTC), state

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    first = run(params, XS, None, *flags)
    expected = (first, run(params, XS, first[0][1], *flags))
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        spread = (over(LENGTHS, 0), over(MASK, 1), over(~MASK, 1))
        first = run(params, over(XS, 1), None, *spread)
        got = (first, run(params, over(XS, 1), first[0][1], *spread))
        assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(first[0][1]))
        assert first[1][1].sharding.spec == P(None, "data", None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_values_and_gradients_over_four_devices():
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", "from tests import test_mesh; test_mesh.compare_over_devices()"]
    subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], env=environment, check=True)


def test_a_mesh_that_is_not_set_is_named():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    xs = jax.device_put(XS, jax.sharding.NamedSharding(mesh, P(None, "data")))
    layer = jrnn.gru(3)
    with pytest.raises(ValueError, match=r"xs: expected the mesh .* to be set, got none; .*jax.set_mesh"):
        jrnn.unroll(layer, layer.init(jax.random.key(0), 3), xs)
