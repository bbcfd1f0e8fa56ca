"""Every law of the sequence contract, over every cell, layer and combination of the table."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import testing
from jrnn.testing import oracle
from jrnn.testing.bench import Bench
from tests.cases import CASES, Decoder, DrawingDecoder, Rotating, StepOnly, rows

# These compile, which takes longer than all the other laws together: on some rows.
COMPILE = (testing.check_jit, testing.check_compiles_once)
INTERPRET = tuple(law for law in testing.LAWS if law not in COMPILE)
# What a row that met all laws in float64 may still break in float32: 16-bit inputs, constants in a dtype of their own;
# and on some rows what is rounded or overflows.
NARROW = (testing.check_state_dtype,)
NARROW_FULL = (testing.check_step_equals_unroll, testing.check_padding, testing.check_state_dtype)
SMOKE = ("lstm", "step_only", "zoneout", "stack", "bidirectional")
NARROW_ROWS = [
    pytest.param(*row.values, id=row.id, marks=[*row.marks, pytest.mark.smoke] if row.id in SMOKE else row.marks)
    for row in rows(pytest.mark.nightly)
]
ROWS = [pytest.param(case, id=case.name) for case in CASES]
FULL = [pytest.param(case, id=case.name) for case in CASES if case.full]
# Interpreted: XLA compiles single operations.
interpreted = pytest.mark.usefixtures("quick_compilation")


@interpreted
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.sampled(2)
def test_laws_float64(case):
    testing.check_cell(case.layer, case.in_features, dtype="float64", laws=INTERPRET)


@interpreted
@pytest.mark.parametrize("case", NARROW_ROWS)
@pytest.mark.sampled(3)
def test_laws_float32(case):
    testing.check_cell(case.layer, case.in_features, laws=NARROW_FULL if case.full else NARROW)


@pytest.mark.parametrize("case", FULL)
@pytest.mark.sampled(3)
def test_laws_that_compile(case):
    testing.check_cell(case.layer, case.in_features, laws=COMPILE)


def test_laws_compiled():
    """What is interpreted elsewhere, compiled: the interpreter is not what makes the laws hold."""
    laws = (testing.check_padding, testing.check_resets, testing.check_derivatives)
    testing.check_cell(jrnn.gru(2), 2, laws=laws, jit=True)


# Each row under one combination of everything at once, drawn anew for each; the rest of the product is covered by
# the laws, which take the arguments in turn.
PRODUCT = list(
    itertools.product(
        *[(False, True)] * 6,
        (None, 1, 2, 3, "sqrt", 9),
        (None, "reference", "hoisted", "associative"),
        (1, 2, 9),
        ((4,), (), (2, 2)),
    )
)
COMBINATIONS = [(case, random.Random(f"{case.name}{i}").choice(PRODUCT)) for case in CASES for i in range(1)]


@interpreted
@pytest.mark.parametrize(("case", "options"), COMBINATIONS, ids=lambda value: getattr(value, "name", ""))
@pytest.mark.sampled(2)
def test_combination(case, options):
    """lengths x mask x resets x state x reverse x key x remat x backend x unroll x batch axes."""
    lengths, mask, resets, state, reverse, keyed, remat, backend, unroll, batch = options
    with jax.enable_x64(True):
        bench = Bench("combination", case.layer, case.in_features, "float64", 1, False, None)
        chosen = {"lengths": lengths, "mask": mask, "resets": resets, "state": state}
        absent = {name: None for name, present in chosen.items() if not present}
        key = jax.random.key(5) if keyed and bench.may_draw else None
        trial = bench.trial(batch=batch, key=key, **absent)
        try:
            got = bench.run(trial, reverse=reverse, remat=remat, backend=backend, unroll=unroll)
        except ValueError as refusal:  # a schedule that does not serve the layer
            if not str(refusal).startswith("backend:"):
                raise
            got = bench.run(trial, reverse=reverse, remat=remat, unroll=unroll)
        bench.compare(got, bench.fold(trial, reverse), str(options))


@interpreted
def test_fold_without_a_step():
    """`fold` reads a layer without a step as its parts; where a layer has a step both readings agree."""
    model = jrnn.stack(jrnn.gru(4), jrnn.dropout(0.3), jrnn.highway(jrnn.elman(4)))
    bench = Bench("fold", model, 3, "float32", 0, False, None)
    trial = bench.trial(key=jax.random.key(3))
    expected = bench.fold(trial)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "stepless", lambda layer: isinstance(layer, type(model) | type(model.layers[2])))
        bench.compare(bench.fold(trial), expected, "parts")


# What holds on average.


def mean_and_bound(values):
    """Means over the first axis and five standard errors."""
    values = np.asarray(values, np.float64)
    return values.mean(0), 5 * values.std(0) / np.sqrt(len(values)) + 1e-6


@pytest.mark.parametrize(
    "cell", [jrnn.zoneout(jrnn.lstm(4), h=0.2, c=0.6), jrnn.zoneout(jrnn.gru(4), h=0.7)], ids=["lstm", "gru"]
)
def test_zoneout_without_key_is_the_mean_over_keys(cell):
    params = cell.init(jax.random.key(0), 3)
    state = jax.tree.map(lambda a: a + 1.5, cell.initial_state(params, ()))
    x = jnp.array([0.5, -1.0, 2.0])
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = jax.jit(jax.vmap(lambda key: cell.step(params, state, x, key)[0]))(keys)
    expected, _ = cell.step(params, state, x)
    for values, wanted in zip(jax.tree.leaves(drawn), jax.tree.leaves(expected), strict=True):
        mean, bound = mean_and_bound(values)
        assert (np.abs(mean - np.asarray(wanted)) <= bound).all()


def test_zoneout_rates_are_the_rates_of_keeping():
    cell = jrnn.zoneout(jrnn.lstm(50), h=0.1, c=0.6)
    params = cell.init(jax.random.key(0), 3)
    state = jax.tree.map(lambda a: a + 1.5, cell.initial_state(params, (200,)))
    new, _ = jax.jit(cell.step)(params, state, jnp.ones((200, 3)), jax.random.key(1))
    assert abs(float((new.h == 1.5).mean()) - 0.1) < 0.02
    assert abs(float((new.c == 1.5).mean()) - 0.6) < 0.02


def test_dropout_keeps_the_mean_and_draws_anew_at_each_step():
    xs = jnp.full((300, 40), 2.0)
    _, ys = jrnn.unroll(jrnn.dropout(0.25), {}, xs, key=jax.random.key(0))
    mean, bound = mean_and_bound(np.asarray(ys).ravel())
    assert abs(mean - 2.0) <= bound
    assert len({tuple(row) for row in np.asarray(ys != 0).tolist()}) > 290


def test_variational_draws_once_for_a_sequence_and_anew_for_each():
    cell = jrnn.variational(StepOnly(0.0), inputs=0.5)
    params = {"scale": jnp.ones(20)}
    _, ys = jrnn.unroll(cell, params, jnp.ones((6, 30, 20)), key=jax.random.key(0))
    kept = np.asarray(ys != 0)
    assert (kept == kept[:1]).all()
    assert len({tuple(row) for row in kept[0].tolist()}) == 30
    assert abs(kept.mean() - 0.5) < 0.1
    assert float(jnp.abs(ys - jnp.where(kept, jnp.tanh(2.0) ** 2, 0)).max()) < 1e-6


def test_dropconnect_draws_weights_once_for_a_run_and_its_batch():
    cell = jrnn.dropconnect(jrnn.elman(30, "linear"), 0.4)
    params = cell.init(jax.random.key(0), 1)
    params = {**params, "w_ih": jnp.zeros((1, 30)), "w_hh": jnp.eye(30)}
    state = jrnn.HiddenState(jnp.ones((2, 30)))
    _, ys = jrnn.unroll(cell, params, jnp.zeros((3, 2, 1)), state, key=jax.random.key(2))
    kept = np.asarray(ys[0, 0] > 0)
    assert 5 < kept.sum() < 29
    for t in range(3):
        np.testing.assert_allclose(ys[t], np.tile(np.where(kept, (1 / 0.6) ** (t + 1), 0), (2, 1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["hoisted", "native", "reference"])
def test_16_bit_inputs_keep_float32_sums_and_state(dtype, backend):
    """Against the same rounded operands in float32: only what is fed back is rounded, and there is nothing of it."""
    cell = jrnn.elman(4, "linear")
    params = cell.init(jax.random.key(0), 4096)
    params = {**params, "w_ih": params["w_ih"].astype(dtype).astype(jnp.float32), "w_hh": jnp.zeros((4, 4))}
    xs = jax.random.uniform(jax.random.key(1), (3, 2, 4096)).astype(dtype)
    state, ys = jrnn.unroll(cell, params, xs, backend=backend)
    expected, _ = jrnn.unroll(cell, params, xs.astype(jnp.float32), backend=backend)
    assert state.h.dtype == jnp.float32
    assert ys.dtype == dtype
    np.testing.assert_allclose(state.h, expected.h, rtol=1e-5, atol=1e-5)
    # Gradients of weights are sums over T and B, in float32 as the weights are.
    one, other = (
        jax.grad(lambda p, x: jrnn.unroll(cell, p, x, backend=backend)[0].h.sum())(params, x)["w_ih"]
        for x in (xs, xs.astype(jnp.float32))
    )
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)


# The laws themselves: a cell that breaks one is told so, by the law that it breaks.


@dataclasses.dataclass(frozen=True)
class Broken(jrnn.Cell):
    """A leaky sum with one fault."""

    fault: str

    def init(self, key, in_features):
        return {"scale": jnp.ones(in_features)}

    def initial_state(self, params, batch_shape):
        return jnp.zeros((*batch_shape, *params["scale"].shape), params["scale"].dtype)

    def step(self, params, state, x, key=None):
        x = params["scale"] * x
        if self.fault == "derivative at zero":
            x = jnp.sqrt(jnp.abs(x))
        elif self.fault == "batch":
            x = x - x.mean(0, keepdims=x.ndim > 1)
        state = 0.5 * state + x
        return state, jnp.tanh(state)

    def project(self, params, xs):
        return xs

    def update(self, params, state, p, key=None):
        state, y = self.step(params, state, p, key)
        return (state, 2 * y) if self.fault == "projection" else (state, y)

    def __eq__(self, other):
        return self is other if self.fault == "identity" else type(other) is Broken and self.fault == other.fault

    def __hash__(self):
        return id(self) if self.fault == "identity" else hash(self.fault)

    def out_features(self, in_features):
        return in_features + 1 if self.fault == "features" else in_features


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("derivative at zero", "check_padding"),
        ("batch", "check_vmap"),
        ("projection", "check_backends"),
        ("identity", "check_compiles_once"),
        ("identity", "check_hashing"),
        ("features", "check_hashing"),
    ],
)
def test_a_broken_cell_fails_the_law_it_breaks(fault, law):
    with pytest.raises(AssertionError, match=f"^{law}: Broken"):
        getattr(testing, law)(Broken(fault))
    getattr(testing, law)(Broken(""))


DRAWS = jrnn.stack(jrnn.variational(jrnn.gru(4), inputs=0.3), jrnn.dense(2))


class Decoding(Decoder):
    """A wrapper that zoneout takes."""

    emits = "h"


class HiddenPart(Decoder):
    """Its part is not among its fields."""

    def init(self, key, in_features):
        return {"part": DRAWS.init(key, in_features)}

    def initial_state(self, params, batch_shape):
        return DRAWS.initial_state(params["part"], batch_shape)

    def step(self, params, state, x, key=None):
        return jax.checkpoint(DRAWS.step)(params["part"], state, x, key)


class HiddenProjection(Decoder):
    """It hands on the two halves of a step of a part that is not among its fields."""

    cell = jrnn.dropconnect(jrnn.gru(4), 0.3)

    def init(self, key, in_features):
        return self.cell.init(key, in_features)

    def initial_state(self, params, batch_shape):
        return self.cell.initial_state(params, batch_shape)

    step = jrnn.Cell.step

    def project(self, params, xs):
        return self.cell.project(params, xs)

    def update(self, params, state, p, key=None):
        return self.cell.update(params, state, p, key)


@dataclasses.dataclass(frozen=True)
class OwnMask(StepOnly):
    """A user's cell that draws once per sequence."""

    def draw(self, params, key, batch_shape, in_features):
        return {"scale": params["scale"] * jax.random.bernoulli(key, 0.5, params["scale"].shape)}


@interpreted
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Decoder(jrnn.variational(jrnn.lstm(4), inputs=0.3)), "Decoder to define draw.*part variational"),
        (Decoder(DRAWS), "Decoder to define draw.*part stack"),
        (Decoder(OwnMask(0.5)), "Decoder to define draw.*part OwnMask"),
        (Decoder(DrawingDecoder(DRAWS)), "Decoder to define draw.*part DrawingDecoder"),
        (jrnn.stack(jrnn.dense(4), Decoder(DRAWS)), "Decoder to define draw"),
        (
            jrnn.bidirectional(jrnn.elman(4), jrnn.zoneout(Decoding(jrnn.variational(jrnn.gru(4), inputs=0.3)), h=0.1)),
            "Decoding to define draw",
        ),
        (HiddenPart(None), "expected the step of HiddenPart.* to draw nothing"),
        (HiddenProjection(None), "expected what the draw of dropconnect"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, jrnn.Layer) else "",
)
def test_what_a_part_draws_once_per_sequence_is_never_drawn_at_each_step(layer, message):
    params = layer.init(jax.random.key(0), 3)
    jrnn.unroll(layer, params, jnp.ones((5, 2, 3)))
    with pytest.raises(TypeError, match=message):
        jrnn.unroll(layer, params, jnp.ones((5, 2, 3)), key=jax.random.key(1))
    with pytest.raises(AssertionError, match=f"^check_draws: .*{message}"):
        testing.check_draws(layer)


def test_a_part_that_draws_through_a_users_wrapper_keeps_its_mask():
    part = jrnn.variational(jrnn.elman(20, "linear"), inputs=0.5)
    layer = DrawingDecoder(part)
    params, key = layer.init(jax.random.key(0), 3), jax.random.key(1)
    xs = jax.random.normal(jax.random.key(2), (6, 2, 3))
    expected = jrnn.unroll(part, params["layer"], xs, key=key)[1]
    np.testing.assert_allclose(jrnn.unroll(layer, params, xs, key=key)[1], expected, atol=1e-6)


def test_a_step_may_run_a_sequence_of_its_own_with_its_own_masks():
    @dataclasses.dataclass(frozen=True)
    class Inner(Decoder):
        def draw(self, params, key, batch_shape, in_features):
            return params

        def step(self, params, state, x, key=None):
            state, ys = jrnn.unroll(self.layer, params["layer"], jnp.stack([x] * 3), state, key=key)
            return state, ys[-1]

    layer = Inner(jrnn.variational(jrnn.gru(4), inputs=0.5))
    ys = jrnn.unroll(layer, layer.init(jax.random.key(0), 3), jnp.ones((5, 3)), key=jax.random.key(1))[1]
    assert ys.shape == (5, 4)


def test_children_are_the_layers_among_the_fields():
    one, two = jrnn.gru(2), jrnn.dense(3)
    assert jrnn.bidirectional(one).children() == (one, one)
    assert Decoder((one, ("name", (two,)))).children() == (one, two)
    assert one.children() == Decoder(None).children() == ()
    drawing = jrnn.dropconnect(one, 0.3)
    with pytest.raises(TypeError, match="part dropconnect"):
        Decoder((two, (drawing,))).draw({}, jax.random.key(0), (), 3)


def test_a_complex_cell_that_loses_its_imaginary_part_is_found():
    class Losing(Rotating):
        def update(self, params, state, p, key=None):
            state, y = super().update(params, state, p, key)
            return (state, y) if p.ndim > 1 else (state, jax.lax.complex(y.real, jnp.zeros_like(y.real)))

    testing.check_step_equals_unroll(Rotating(3))
    with pytest.raises(AssertionError, match="check_vmap"):
        testing.check_vmap(Losing(3))
    with pytest.raises(AssertionError, match="differs by 1"):
        testing.compare(np.array([1 + 1j]), np.array([1 + 0j]), 1e-6, "a law")


def test_compare_says_what_differs_and_by_how_much():
    with pytest.raises(AssertionError, match=r"a law: \['h'\] differs by 0.5 at \(1,\): got 1.0, expected 1.5"):
        testing.compare({"h": np.ones(2)}, {"h": np.array([1.0, 1.5])}, 1e-6, "a law")
    with pytest.raises(AssertionError, match="differs by inf"):
        testing.compare(np.array([np.nan]), np.array([1.0]), 1e-6, "a law")
    with pytest.raises(AssertionError, match=r"expected float64\(2,\), got float32\(2,\)"):
        testing.compare(np.ones(2, np.float32), np.ones(2), 1e-6, "a law")
    with pytest.raises(AssertionError, match="expected the structure"):
        testing.compare({"a": 1.0}, {"b": 1.0}, 1e-6, "a law")


def test_checks_of_the_laws_arguments():
    with pytest.raises(TypeError, match="cell: expected a layer"):
        testing.check_cell("lstm")
    with pytest.raises(ValueError, match="dtype: expected"):
        testing.check_cell(jrnn.elman(2), dtype="int32")
