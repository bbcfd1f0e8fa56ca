"""A combinator of a user's own works alike wherever a layer is taken: its parts are found by `Layer.children`."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import diagnose, testing
from jrnn.testing import oracle
from jrnn.testing.bench import Bench
from jrnn.training import tbptt_step, truncated_unroll

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Scaled(jrnn.Layer):
    """One layer, its outputs scaled by a parameter; no step."""

    layer: Any

    def init(self, key, in_features):
        return {"layer": self.layer.init(key, in_features), "scale": jnp.array(0.5, jnp.float32)}

    def initial_state(self, params, batch_shape):
        return {"inner": self.layer.initial_state(params["layer"], batch_shape)}

    def draw(self, params, key, batch_shape, in_features):
        return {**params, "layer": self.layer.draw(params["layer"], key, batch_shape, in_features)}

    def walk(self, run, params, xs, state):
        state, ys = run(self.layer, params["layer"], xs, state["inner"])
        return {"inner": state}, params["scale"] * ys


@dataclasses.dataclass(frozen=True)
class ScaledStep(Scaled):
    """The same with a step."""

    def step(self, params, state, x, key=None):
        state, y = self.layer.step(params["layer"], state["inner"], x, key)
        return {"inner": state}, params["scale"] * y


@dataclasses.dataclass(frozen=True)
class Through(jrnn.Layer):
    """A gate of one layer's outputs and another's, the second fed by the first; zeros do not stay zeros."""

    layers: tuple

    def init(self, key, in_features):
        first, second = self.layers
        return {"a": first.init(key, in_features), "b": second.init(key, first.out_features(in_features))}

    def initial_state(self, params, batch_shape):
        first, second = self.layers
        return (second.initial_state(params["b"], batch_shape), first.initial_state(params["a"], batch_shape))

    def draw(self, params, key, batch_shape, in_features):
        return {
            name: layer.draw(params[name], jax.random.fold_in(key, i), batch_shape, in_features)
            for i, (name, layer) in enumerate(zip("ab", self.layers, strict=True))
        }

    def walk(self, run, params, xs, state):
        first, ys = run.child(0)(self.layers[0], params["a"], xs, state[1])
        second, zs = run.child(1)(self.layers[1], params["b"], ys, state[0])
        return (second, first), run.zero_invalid(jax.nn.sigmoid(ys) * zs + jnp.cos(zs))


@dataclasses.dataclass(frozen=True)
class Backwards(Scaled):
    """A layer in the opposite direction, which no child of it says."""

    causal = False

    def walk(self, run, params, xs, state):
        return super().walk(run.opposite(), params, xs, state)


@dataclasses.dataclass(frozen=True)
class OneHot(jrnn.Layer):
    """A layer that takes ids and says nothing of its features."""

    vocab: int
    event_ndim: ClassVar[Any] = 0

    def init(self, key, in_features):
        return {"w": jax.random.normal(key, (self.vocab, 3))}

    def initial_state(self, params, batch_shape):
        return ()

    def step(self, params, state, x, key=None):
        return state, jax.nn.one_hot(x, self.vocab, dtype=params["w"].dtype) @ params["w"]


MODELS = {
    "around_bidirectional": (Scaled(jrnn.bidirectional(jrnn.gru(2), jrnn.elman(2))), 3),
    "around_bidirectional_with_a_step": (ScaledStep(jrnn.bidirectional(jrnn.elman(2))), 3),
    "around_recurrent": (Scaled(jrnn.gru(2)), 3),
    "with_a_step": (ScaledStep(jrnn.zoneout(jrnn.gru(2), h=0.3)), 3),
    "of_two": (Through((jrnn.variational(jrnn.elman(3), inputs=0.3), jrnn.stack(jrnn.dropout(0.3), jrnn.gru(3)))), 3),
    "nested": (jrnn.stack(Scaled(Through((jrnn.elman(3), Scaled(jrnn.gru(3))))), jrnn.dense(2)), 3),
    "backwards": (Backwards(jrnn.elman(3)), 3),
    "ids_in_a_stack": (jrnn.stack(OneHot(5), jrnn.elman(3)), None),
}


OFTEN = ("around_recurrent", "with_a_step", "nested", "backwards", "ids_in_a_stack")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in OFTEN)) for name in MODELS]
)
def test_every_law(name):
    model, features = MODELS[name]
    laws = tuple(law for law in testing.LAWS if law not in (testing.check_jit, testing.check_compiles_once))
    if name == "nested":
        laws = (testing.check_step_equals_unroll, testing.check_reverse)
    testing.check_cell(model, features, dtype="float64", laws=laws)


@pytest.mark.parametrize("name", ["around_bidirectional", "of_two", "backwards"])
def test_a_wrong_walk_is_found(name):
    class Wrong(type(MODELS[name][0])):
        def walk(self, run, params, xs, state):
            state, ys = super().walk(run, params, xs, state)
            return state, ys + 1  # in padding too

    model = Wrong(**{f.name: getattr(MODELS[name][0], f.name) for f in dataclasses.fields(MODELS[name][0])})
    with pytest.raises(AssertionError, match="check_padding"):
        testing.check_padding(model)


def test_a_direction_that_is_not_declared_is_found():
    class Undeclared(Backwards):
        causal = True

    with pytest.raises(AssertionError, match=r"check_(resets|chunks)"):
        testing.check_cell(Undeclared(jrnn.elman(3)), laws=(testing.check_resets, testing.check_chunks))


def test_what_a_walk_says_is_what_the_contract_says(monkeypatch):
    """`fold` has two readings of jrnn's combinators: its own, and that of any combinator's walk."""
    model = jrnn.stack(
        jrnn.bidirectional(jrnn.zoneout(jrnn.gru(2), h=0.2), jrnn.elman(2)),
        jrnn.highway(jrnn.bidirectional(jrnn.elman(4), merge="sum")),
        jrnn.residual(jrnn.bidirectional(jrnn.elman(2))),
    )
    with jax.enable_x64(True):
        bench = Bench("fold", model, 3, "float64", 0, False, None)
        trial = bench.trial(key=jax.random.key(3))
        expected = [bench.fold(trial, reverse) for reverse in (False, True)]
        monkeypatch.setattr(oracle, "_READ", ())
        for reverse in (False, True):
            bench.compare(bench.fold(trial, reverse), expected[reverse], f"walks, reverse={reverse}")


@pytest.mark.smoke
def test_causal():
    for name, (model, _) in MODELS.items():
        assert model.causal == (name not in ("around_bidirectional", "around_bidirectional_with_a_step", "backwards"))
    assert jrnn.zoneout(jrnn.lstm(4), h=0.1).causal


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled(3)
def test_truncated_backpropagation(name):
    model, features = MODELS[name]
    params = model.init(jax.random.key(0), features)
    xs = jnp.ones((6, 2), jnp.int32) if features is None else jnp.ones((6, 2, 3))

    def loss(predictions, targets, mask):
        return jnp.mean(predictions)

    if model.causal:
        tbptt_step(model, loss, jrnn.optimizer("sgd", 0.1))
        expected = jrnn.unroll(model, params, xs)[1]
        np.testing.assert_allclose(truncated_unroll(model, params, xs, 2)[1], expected, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="model: expected one that runs forward in time"):
            tbptt_step(model, loss, jrnn.optimizer("sgd", 0.1))
        with pytest.raises(ValueError, match="model: expected one that runs forward in time"):
            truncated_unroll(model, params, xs, 2)


def test_a_stepper_needs_a_step():
    with pytest.raises(TypeError, match="layer: expected a layer that has a step"):
        jrnn.stepper(Scaled(jrnn.gru(2)))
    model = ScaledStep(jrnn.gru(2))
    params, x = model.init(jax.random.key(0), 3), jnp.ones(3)
    _, y = jrnn.stepper(model)(params, model.initial_state(params, ()), x)
    np.testing.assert_allclose(y, jrnn.unroll(model, params, x[None])[1][0], atol=1e-6)


# --- diagnosis ---------------------------------------------------------------------------------------------------


def square(state, ys):
    return jnp.sum(ys[-1] ** 2)


def test_diagnosis_looks_through():
    """Through a combinator of one layer: the gradient is the inner layer's, times the derivative of the scale."""
    inner = jrnn.gru(4)
    model = Scaled(inner)
    params, xs = model.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (6, 2, 3))
    got = diagnose.gradient_norms(model, params, xs, square)
    expected = diagnose.gradient_norms(inner, params["layer"], xs, lambda state, ys: jnp.sum((0.5 * ys[-1]) ** 2))
    np.testing.assert_allclose(got.norms["h"], expected.norms["h"], rtol=1e-5)
    np.testing.assert_allclose(got.initial["h"], expected.initial["h"], rtol=1e-5)
    got, expected = (diagnose.jacobian_products(m, p, xs).norms for m, p in ((model, params), (inner, params["layer"])))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got, expected = (diagnose.gate_saturation(m, p, xs).values for m, p in ((model, params), (inner, params["layer"])))
    for gate in "rzn":
        np.testing.assert_allclose(got[gate], expected[gate], rtol=1e-5)


def test_diagnosis_of_one_of_several():
    first, second = jrnn.elman(4), jrnn.gru(4)
    model = jrnn.stack(jrnn.dense(3), Through((first, Scaled(second))))
    params, xs = model.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (6, 2, 3))
    between = jrnn.unroll(first, params[1]["a"], jrnn.unroll(jrnn.dense(3), params[0], xs)[1])[1]
    got = diagnose.jacobian_products(model, params, xs, layer=(1, 1)).norms
    expected = diagnose.jacobian_products(second, params[1]["b"]["layer"], between).norms
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    weight_bound = diagnose.jacobian_products(model, params, xs, layer=(1, 0)).weight_bound
    np.testing.assert_allclose(weight_bound[:, 0], np.linalg.norm(params[1]["a"]["w_hh"], 2) ** np.arange(7), rtol=1e-5)
    with pytest.raises(ValueError, match=r"layer: expected an index into the children of Through.*one of \[0, 1\]"):
        diagnose.gradient_norms(model, params, xs, square, layer=1)
    with pytest.raises(ValueError, match=r"layer: expected an index into the 2 children of Through.*got 2"):
        diagnose.gradient_norms(model, params, xs, square, layer=(1, 2))


def test_equal_children_are_told_apart():
    model = Through((jrnn.elman(3), jrnn.elman(3)))
    params, xs = model.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (6, 2, 3))
    params["b"]["w_hh"] = 2 * params["b"]["w_hh"]
    bounds = [diagnose.jacobian_products(model, params, xs, layer=i).weight_bound[1, 0] for i in (0, 1)]
    np.testing.assert_allclose(bounds[1], 2 * bounds[0], rtol=1e-5)


def test_other_libraries_lack_it():
    torch = pytest.importorskip("torch")
    del torch
    model = Scaled(jrnn.gru(2))
    with pytest.raises(TypeError, match=r"model: expected jrnn\.elman.*got Scaled\(layer=gru\(2\)\)"):
        jrnn.interop.to_torch(model, model.init(jax.random.key(0), 3))
