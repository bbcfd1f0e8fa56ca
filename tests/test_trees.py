"""Parameters that are any mapping, and outputs that are any tree of arrays."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.run.tuning import tune
from tests.cases import inputs, rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

LSTM = jrnn.lstm(4)
XS = np.asarray(np.random.default_rng(0).normal(size=(6, 2, 3)), np.float32)


# --- parameters --------------------------------------------------------------------------------------------------


def frozen(tree):
    """Every dict as Flax's FrozenDict."""
    freeze = pytest.importorskip("flax.core").freeze
    return mapped(tree, freeze)


def states(tree):
    """Every dict as the State that Flax's nnx makes of one inside an nnx.Param."""
    return mapped(tree, pytest.importorskip("flax.nnx").State)


def proxies(tree):
    """Every dict as a mapping that is no pytree."""
    return mapped(tree, types.MappingProxyType)


def mapped(tree, kind):
    if isinstance(tree, dict):
        return kind({name: mapped(value, kind) for name, value in tree.items()})
    return tuple(mapped(value, kind) for value in tree) if isinstance(tree, tuple) else tree


@pytest.mark.parametrize("kind", [frozen, states])
@pytest.mark.parametrize("case", rows(pytest.mark.nightly))
def test_any_mapping_serves_and_its_gradients_have_its_structure(case, kind):
    layer = case.layer
    params = kind(jax.eval_shape(lambda: layer.init(jax.random.key(0), case.in_features)))
    xs = inputs(case, XS)

    def loss(params):
        _, ys = jrnn.unroll(layer, params, xs, lengths=np.array([6, 3]))
        return jnp.sum(ys.real)

    gradients = jax.eval_shape(jax.grad(loss, allow_int=True), params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    state = jax.eval_shape(lambda p: layer.initial_state(p, (2,)), params)
    if not case.name.startswith(("bidirectional", "deep", "residual_of_bidirectional")):
        jax.eval_shape(layer.step, params, state, xs[0])


@pytest.mark.parametrize("kind", [frozen, states, proxies])
def test_values_of_any_mapping(kind):
    model = jrnn.highway(jrnn.bidirectional(jrnn.gru(3), merge="sum"))
    params = model.init(jax.random.key(0), 3)
    run = lambda params: jrnn.unroll(model, params, jnp.asarray(XS, jnp.bfloat16), lengths=np.array([6, 3]))
    jax.tree.map(np.testing.assert_array_equal, run(kind(params)), run(params))
    assert jrnn.choose_backend(model, kind(params), XS) == jrnn.choose_backend(model, params, XS)


def test_parameters_inside_one_flax_parameter_are_trained():
    """What Flax's optimiser gives back of a dict is no dict."""
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")

    class Module(nnx.Module):
        def __init__(self):
            self.params = nnx.Param(LSTM.init(jax.random.key(0), 3))

        def __call__(self, xs):
            return jrnn.unroll(LSTM, self.params.get_value(), xs)[1]

    module = Module()
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    losses = []
    for _ in range(3):
        loss, gradients = nnx.value_and_grad(lambda module: jnp.mean((module(XS) - 0.5) ** 2))(module)
        optimizer.update(module, gradients)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]


WRONG = {
    "none": (LSTM, None, "expected a dict with w_ih, w_hh and b, got None"),
    "array": (LSTM, np.ones(3, np.float32), r"expected a dict with w_ih, w_hh and b, got float32\[3\]"),
    "object": (LSTM, {1, 2}, "expected a dict with w_ih, w_hh and b, got set"),
    "tuple": (LSTM, (np.ones(3, np.float32),), r"expected a dict with w_ih, w_hh and b, got \(float32\[3\],\)"),
    "dense": (
        jrnn.dense(2),
        {"w": np.ones((3, 2), np.float32)},
        r"expected w \(F, 2\) and b \(2,\).*got {'w': float32",
    ),
    "embed": (jrnn.embed(5, 3), None, r"expected w \(5, 3\).*got None"),
    "layer_norm": (jrnn.layer_norm(), (), r"expected .* among the parameters of layer_norm\(\), got \(\)"),
    "highway": (jrnn.highway(jrnn.gru(3)), 1, 'expected a dict with "layer", "w" and "b".*got int'),
    "learned": (jrnn.learned_state(LSTM), None, 'expected a dict with "cell" and "initial".*got None'),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_types_are_named(name):
    layer, params, message = WRONG[name]
    x = np.zeros(2, np.int32) if layer.event_ndim == 0 else XS[0]
    with pytest.raises(ValueError, match="params: " + message):
        layer.check(params, jnp.asarray(x))


# --- outputs -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Readout(jrnn.Cell):
    """A cell whose output is a tree: floats, integers and booleans, with axes of their own and without."""

    def init(self, key, in_features):
        return {"w_ih": jax.random.normal(key, (in_features, 4)), "decay": jnp.full(4, 0.5)}

    def initial_state(self, params, batch_shape):
        return jrnn.HiddenState(jnp.zeros((*batch_shape, 4), jnp.float32))

    def step(self, params, state, x, key=None):
        h = jnp.tanh(jrnn.product(x, params["w_ih"]) + params["decay"] * state.h)
        outer = h[..., :, None] * h[..., None, :]
        return jrnn.HiddenState(h), {"h": h, "best": (jnp.argmax(h, -1), h[..., 0] > 0), "outer": outer}


class Declared(Readout):
    """The same with its projection declared, for the hoisted schedule."""

    def project(self, params, xs):
        return jrnn.product(xs, params["w_ih"])

    def update(self, params, state, p, key=None):
        h = jnp.tanh(p + params["decay"] * state.h)
        outer = h[..., :, None] * h[..., None, :]
        return jrnn.HiddenState(h), {"h": h, "best": (jnp.argmax(h, -1), h[..., 0] > 0), "outer": outer}

    step = jrnn.Cell.step


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"remat": 2}], ids=["", "reverse", "remat"])
@pytest.mark.parametrize(("cell", "backend"), [(Readout(), "reference"), (Declared(), "hoisted")], ids=["step", "form"])
def test_a_tree_of_outputs_is_zeroed_leaf_by_leaf(cell, backend, options):
    params = cell.init(jax.random.key(0), 3)
    lengths, mask = np.array([6, 2]), np.ones((6, 2), bool)
    mask[1, 0] = False
    valid = mask & (np.arange(6)[:, None] < lengths)
    order = range(6)[:: -1 if options.get("reverse") else 1]

    def expected(params):
        state, ys = cell.initial_state(params, (2,)), [None] * 6
        for t in order:
            new, y = cell.step(params, state, jnp.asarray(XS[t]))
            keep = lambda a, b, t=t: jnp.where(valid[t].reshape(2, *[1] * (a.ndim - 1)), a, b)
            state = jax.tree.map(keep, new, state)
            ys[t] = jax.tree.map(lambda a, keep=keep: keep(a, jnp.zeros_like(a)), y)
        return state, jax.tree.map(lambda *a: jnp.stack(a), *ys)

    def loss(run):
        def of(params):
            _, ys = run(params)
            return jnp.sum(ys["h"]) + jnp.sum(jnp.sin(ys["outer"]))

        return jax.jit(jax.grad(of))(params)

    run = lambda params: jrnn.unroll(cell, params, XS, lengths=lengths, mask=mask, backend=backend, **options)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, run(params), expected(params))
    jax.tree.map(close, loss(run), loss(expected))


def test_a_tree_of_outputs_through_what_takes_cells():
    cell = Readout()
    params = cell.init(jax.random.key(0), 3)
    whole = jrnn.unroll(cell, params, XS)
    chunked = jrnn.training.truncated_unroll(cell, params, XS, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), chunked, whole)
    low = jax.eval_shape(lambda: jrnn.unroll(cell, params, jnp.asarray(XS, jnp.bfloat16), lengths=np.array([6, 2])))[1]
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(low)] == ["int32", "bool", "bfloat16", "bfloat16"]
    assert tune(cell, params, XS, backends=("reference",), repeats=1, quiet=True).train == "reference"
