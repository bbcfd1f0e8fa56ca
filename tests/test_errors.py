"""Bad input gets an error that names the argument, what was expected, what came and what to do, before any scan."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn._core import checks
from tests.cases import StepOnly

pytestmark = pytest.mark.usefixtures("quick_compilation")

LSTM = jrnn.lstm(4)


def shaped(layer, in_features):
    """Parameters of the right shapes; there is no need to compile what draws them."""
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), in_features))
    return jax.tree.map(lambda a: np.full(a.shape, 0.1, a.dtype), shapes)


PARAMS = shaped(LSTM, 3)
XS = np.zeros((6, 2, 3), np.float32)
KEY = jax.random.key(0)
MODEL = jrnn.stack(jrnn.gru(4), jrnn.dropout(0.1), jrnn.dense(2))
MODEL_PARAMS = shaped(MODEL, 3)
BIDIRECTIONAL = jrnn.bidirectional(jrnn.gru(4))
EMBED = jrnn.embed(5, 3)
EMBED_PARAMS = shaped(EMBED, None)
GRU_STATE = jrnn.gru(4).initial_state(MODEL_PARAMS[0], (2,))


def run(cell=LSTM, params=PARAMS, xs=XS, state=None, **options):
    return jrnn.unroll(cell, params, xs, state, **options)


@dataclasses.dataclass(frozen=True)
class Drifting(StepOnly):
    """Its state does not keep its shape."""

    def step(self, params, state, x, key=None):
        return jnp.concatenate([state, state], -1), x


@dataclasses.dataclass(frozen=True)
class Widening(StepOnly):
    """Its state does not keep its dtype."""

    def step(self, params, state, x, key=None):
        return state.astype(jnp.float16), x


@dataclasses.dataclass(frozen=True)
class WithArray(StepOnly):
    """It cannot be hashed."""

    weights: object = dataclasses.field(default_factory=lambda: np.ones(2))


class Emits(jrnn.LSTM):
    """It emits a field that its state does not have."""

    emits = ("h", "m")


@dataclasses.dataclass(frozen=True)
class Nothing(jrnn.Cell):
    """It defines no step."""

    def init(self, key, in_features):
        return {}

    def initial_state(self, params, batch_shape):
        return jnp.zeros(batch_shape)


# Each row: what is done, the exception, and what its message must say, in this order.
ERRORS = {
    # xs
    "xs_rank": (lambda: run(xs=np.zeros(3, np.float32)), ValueError, "xs: expected (T, *B, F)", "got shape (3,)"),
    "xs_features": (lambda: run(xs=XS[..., :2]), ValueError, "xs: expected 3 features", "(6, 2, 2)", "in_features=2"),
    "xs_univariate": (
        lambda: run(params=shaped(LSTM, 1), xs=XS[..., 0]), ValueError, "xs: expected 1 features", "shape (6, 2)",
        "xs[..., None]",
    ),
    "xs_univariate_unbatched": (
        lambda: run(params=shaped(LSTM, 1), xs=XS[:, 0, 0]), ValueError, "xs: expected (T, *B, F)", "xs[..., None]",
    ),
    "xs_integers": (lambda: run(xs=XS.astype(int)), TypeError, "xs: expected floats", "int", "jrnn.embed"),
    "xs_booleans": (lambda: run(xs=XS > 0), TypeError, "xs: expected floats", "bool"),
    "xs_ragged": (lambda: run(xs=[[[1.0] * 3], [[1.0] * 2]]), TypeError, "xs: expected an array", "jrnn.sequence.pad"),
    "xs_struct": (
        lambda: run(xs=jax.ShapeDtypeStruct(XS.shape, XS.dtype)), TypeError, "xs: expected an array",
        "got ShapeDtypeStruct", "jax.eval_shape",
    ),
    "xs_none": (lambda: run(xs=None), TypeError, "xs: expected an array"),
    "xs_strings": (lambda: run(xs=np.array([["a"]])), TypeError, "xs: expected"),
    "xs_stack_features": (lambda: run(MODEL, MODEL_PARAMS, XS[..., :1]), ValueError, "xs: expected 3 features"),
    "xs_dense": (lambda: run(jrnn.dense(2), {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}), ValueError, "xs: expected 4"),
    "xs_bidirectional": (
        lambda: run(BIDIRECTIONAL, BIDIRECTIONAL.init(KEY, 5)), ValueError, "xs: expected 5 features", "in_features=3",
    ),
    "xs_tdnn": (lambda: run(jrnn.tdnn(4, 2), jrnn.tdnn(4, 2).init(KEY, 5)), ValueError, "xs: expected 5 features"),
    "xs_layer_norm": (
        lambda: run(jrnn.layer_norm(), jrnn.layer_norm().init(KEY, 5)), ValueError, "xs: expected 5 features",
    ),
    "ids_floats": (lambda: run(EMBED, EMBED_PARAMS, XS), TypeError, "xs: expected integer ids", "float32"),
    "ids_too_large": (
        lambda: run(EMBED, EMBED_PARAMS, np.full((6, 2), 5)), ValueError, "xs: expected ids in [0, 5)", "from 5 to 5",
        "enlarge vocab",
    ),
    "ids_negative": (lambda: run(EMBED, EMBED_PARAMS, np.full((6, 2), -1)), ValueError, "xs: expected ids in [0, 5)"),
    "ids_in_stack": (
        lambda: run(jrnn.stack(EMBED), (EMBED_PARAMS,), np.full((6, 2), 9)), ValueError, "xs: expected ids in [0, 5)",
    ),
    # lengths, mask, resets
    "lengths_long": (
        lambda: run(lengths=np.array([7, 2])), ValueError, "lengths: expected values in [0, 6]", "from 2 to 7",
    ),
    "lengths_negative": (lambda: run(lengths=np.array([-1, 2])), ValueError, "lengths: expected values in [0, 6]"),
    "lengths_float": (
        lambda: run(lengths=np.array([1.0, 2.0])), TypeError, "lengths: expected integers, got float64", ".astype(int)",
    ),
    "lengths_booleans": (lambda: run(lengths=np.array([True, False])), TypeError, "lengths: expected integers"),
    "lengths_shape": (
        lambda: run(lengths=np.array([1, 2, 3])), ValueError, "lengths: expected the batch shape (2,)", "shape (3,)",
    ),
    "lengths_batch_major": (
        lambda: run(lengths=np.ones(6, int)), ValueError, "lengths: expected the batch shape (2,)", "shape (6,)",
        "time-major", "jnp.swapaxes(xs, 0, 1)",
    ),
    "lengths_scalar": (lambda: run(lengths=3), ValueError, "lengths: expected the batch shape (2,)", "shape ()"),
    "mask_transposed": (
        lambda: run(mask=np.ones((2, 6), bool)), ValueError, "mask: expected shape (6, 2)", "got (2, 6)",
        "time-major",
    ),
    "mask_features": (lambda: run(mask=np.ones((6, 2, 3), bool)), ValueError, "mask: expected shape (6, 2)"),
    "mask_floats": (lambda: run(mask=np.ones((6, 2))), TypeError, "mask: expected booleans", ".astype(bool)"),
    "mask_integers": (lambda: run(mask=np.ones((6, 2), int)), TypeError, "mask: expected booleans"),
    "resets_shape": (lambda: run(resets=np.ones((5, 2), bool)), ValueError, "resets: expected shape (6, 2)", "(5, 2)"),
    "resets_floats": (lambda: run(resets=np.ones((6, 2))), TypeError, "resets: expected booleans"),
    # state
    "state_of_another_cell": (
        lambda: run(state=GRU_STATE), ValueError, "state: expected LSTMState(", "got HiddenState(", "initial_state",
    ),
    "state_batch": (
        lambda: run(state=LSTM.initial_state(PARAMS, (3,))), ValueError, "state: expected", "float32[2,4]",
        "got LSTMState(h=float32[3,4]",
    ),
    "state_unbatched": (lambda: run(state=LSTM.initial_state(PARAMS, ())), ValueError, "state: expected", "[4]"),
    "state_dtype": (
        lambda: run(state=jax.tree.map(lambda a: a.astype(jnp.bfloat16), LSTM.initial_state(PARAMS, (2,)))),
        ValueError, "state: expected", "float32[2,4]", "bfloat16[2,4]",
    ),
    "state_array": (lambda: run(state=np.zeros((2, 4), np.float32)), ValueError, "state: expected LSTMState("),
    "state_of_stack": (lambda: run(MODEL, MODEL_PARAMS, state=GRU_STATE), ValueError, "state: expected (HiddenState("),
    "state_of_bidirectional": (
        lambda: run(BIDIRECTIONAL, BIDIRECTIONAL.init(KEY, 3), state=GRU_STATE), ValueError, "state: expected {",
        "forward",
    ),
    # params
    "params_of_another_cell": (
        lambda: run(params=MODEL_PARAMS[0]), ValueError, "params: expected w_ih (F, 16)", "init(key, in_features)",
    ),
    "params_missing": (
        lambda: run(params={"w_ih": PARAMS["w_ih"]}), ValueError, "params: expected a dict with w_ih, w_hh and b",
        "['b', 'w_hh']",
    ),
    "params_none": (lambda: run(params=None), ValueError, "params: expected a dict"),
    "params_of_stack": (
        lambda: run(MODEL, MODEL_PARAMS[:2]), ValueError, "params: expected a tuple", "3 layers", "of 2",
    ),
    "params_of_stack_list": (lambda: run(MODEL, list(MODEL_PARAMS)), ValueError, "params: expected a tuple", "list"),
    "params_of_bidirectional": (
        lambda: run(BIDIRECTIONAL, PARAMS), ValueError, 'params: expected a dict with "forward" and "backward"',
    ),
    "params_of_dense": (lambda: run(jrnn.dense(2), {}), ValueError, "params: expected w (F, 2)"),
    "params_of_embed": (lambda: run(EMBED, {}, np.zeros((6, 2), int)), ValueError, "params: expected w (5, 3)"),
    "params_of_learned_state": (
        lambda: run(jrnn.learned_state(LSTM), PARAMS), ValueError, 'params: expected a dict with "cell" and "initial"',
    ),
    "params_of_highway": (
        lambda: run(jrnn.highway(jrnn.gru(3)), PARAMS), ValueError, 'params: expected a dict with "layer", "w" and "b"',
    ),
    "params_of_layer_norm": (lambda: run(jrnn.layer_norm(), {}), ValueError, "params: expected"),
    "params_of_tdnn": (lambda: run(jrnn.tdnn(4, 2), {}), ValueError, "params: expected"),
    "params_of_jordan": (lambda: run(jrnn.jordan(4, 4), jrnn.elman(4).init(KEY, 3)), ValueError, "params: expected"),
    "params_of_peephole": (lambda: run(jrnn.peephole_lstm(4), PARAMS), ValueError, "params: expected"),
    "params_of_gru_before": (
        lambda: run(jrnn.gru(4), jrnn.gru(4, "before").init(KEY, 3)), ValueError, "params: expected", "b_hn",
    ),
    # key
    "key_of_no_use": (lambda: run(key=0), TypeError, "key: expected one PRNG key", "jax.random.key(0)"),
    "key_seed": (lambda: run(MODEL, MODEL_PARAMS, key=0), TypeError, "key: expected one PRNG key", "jax.random.key(0)"),
    "key_several": (
        lambda: run(MODEL, MODEL_PARAMS, key=jax.random.split(KEY)), TypeError, "key: expected one PRNG key",
    ),
    # options
    "backend": (lambda: run(backend="cudnn9"), ValueError, "backend: expected None or one of", "'cudnn9'"),
    "backend_type": (lambda: run(backend=1), ValueError, "backend: expected None or one of"),
    "backend_unfit": (
        lambda: run(StepOnly(0.5), {"scale": jnp.ones(3)}, backend="hoisted"), ValueError,
        "backend: 'hoisted' cannot run StepOnly", "backend=None",
    ),
    "remat_zero": (lambda: run(remat=0), ValueError, 'remat: expected None, a positive number of steps or "sqrt"'),
    "remat_name": (lambda: run(remat="log"), ValueError, "remat: expected", "'log'"),
    "remat_true": (lambda: run(remat=True), ValueError, "remat: expected", "True"),
    "unroll_zero": (lambda: run(unroll=0), ValueError, "unroll: expected a positive int"),
    "unroll_float": (lambda: run(unroll=1.5), ValueError, "unroll: expected a positive int"),
    "start_float": (lambda: run(start=1.5), TypeError, "start: expected an integer", "1.5"),
    "start_negative": (lambda: run(start=-1), ValueError, "start: expected a time"),
    "reverse_name": (lambda: run(reverse="False"), TypeError, "reverse: expected True or False", "'False'"),
    # cells
    "cell_swapped": (
        lambda: run(PARAMS, LSTM), TypeError, "cell: expected a layer", "got a dict; lstm(4) came where the parameters",
    ),
    "cell_class": (lambda: run(jrnn.AffineCell), TypeError, "cell: expected a layer"),
    "cell_function": (lambda: run(jrnn.lstm), TypeError, "cell: expected a layer", "jrnn.lstm(128)"),
    "cell_unhashable": (lambda: run(WithArray(0.5)), TypeError, "cell: expected a hashable layer", "params"),
    "cell_drifts": (
        lambda: run(Drifting(0.5), {"scale": jnp.ones(3)}), TypeError, "cell: expected the step of", "float32[2,3]",
        "float32[2,6]",
    ),
    "cell_narrows": (
        lambda: run(Widening(0.5), {"scale": jnp.ones(3)}), TypeError, "cell: expected the step of", "float16[2,3]",
    ),
    "cell_without_step": (lambda: run(Nothing(), {}), NotImplementedError, "Nothing must define step"),
    "bidirectional_step": (
        lambda: BIDIRECTIONAL.step(None, None, XS[0]), TypeError, "step: a bidirectional layer has no step",
        "jrnn.unroll",
    ),
    "step_features": (lambda: LSTM.step(PARAMS, LSTM.initial_state(PARAMS, (2,)), XS[0, :, :1]), ValueError, "xs: "),
    "choose_backend_model": (lambda: jrnn.choose_backend(None, PARAMS, XS), TypeError, "model: expected a layer"),
    "stepper_bidirectional": (
        lambda: jrnn.stepper(jrnn.stack(jrnn.dense(2), BIDIRECTIONAL)), TypeError,
        "layer: expected a layer that has a step", "a bidirectional layer has no step", "jrnn.unroll",
    ),
    "draw_key": (lambda: jrnn.draw(LSTM, PARAMS, 0, XS[0]), TypeError, "key: expected one PRNG key"),
    "draw_features": (lambda: jrnn.draw(MODEL, MODEL_PARAMS, KEY, XS[0, :, :2]), ValueError, "xs: expected 3 features"),
    "draw_layer": (lambda: jrnn.draw(None, PARAMS, KEY, XS[0]), TypeError, "layer: expected a layer"),
    # constructors
    "hidden_zero": (lambda: jrnn.lstm(0), ValueError, "hidden: expected a positive int, got 0"),
    "hidden_float": (lambda: jrnn.gru(4.0), TypeError, "hidden: expected a positive int, got 4.0"),
    "hidden_bool": (lambda: jrnn.elman(True), TypeError, "hidden: expected a positive int"),
    **{
        f"init_key_{layer!r}": (
            lambda layer=layer: layer.init(0, 3), TypeError, "key: expected one PRNG key", "got 0",
        )
        for layer in (
            LSTM, jrnn.gru(4), jrnn.gru(4, "before"), jrnn.jordan(4, 2), jrnn.indrnn(4), jrnn.projection_lstm(4, 2),
            jrnn.tdnn(4, 2), jrnn.dense(2), EMBED, MODEL, BIDIRECTIONAL, jrnn.residual(jrnn.gru(3)),
            jrnn.highway(jrnn.gru(3)), jrnn.learned_state(LSTM),
        )
    },
    "in_features": (lambda: LSTM.init(KEY, -1), ValueError, "in_features: expected a non-negative int"),
    "in_features_array": (
        lambda: LSTM.init(KEY, XS), TypeError, "in_features: expected a non-negative int, got an array of shape",
        "x.shape[-1]",
    ),
    "in_features_array_residual": (
        lambda: jrnn.residual(jrnn.gru(3)).init(KEY, XS), TypeError, "in_features: expected", "x.shape[-1]",
    ),
    "in_features_none": (lambda: LSTM.init(KEY, None), TypeError, "in_features: expected a non-negative int"),
    "activation": (lambda: jrnn.elman(4, "tahn"), ValueError, "activation: expected one of", "'tahn'"),
    "activation_lambda": (lambda: jrnn.elman(4, lambda x: x), ValueError, "activation: expected", "top of a module"),
    "activation_number": (lambda: jrnn.elman(4, 1.0), TypeError, "activation: expected"),
    "initialiser": (lambda: jrnn.lstm(4, input_init="xavier"), ValueError, "input_init: expected one of", "'xavier'"),
    "gru_reset": (lambda: jrnn.gru(4, reset="both"), ValueError, 'reset: expected "after" or "before"', "'both'"),
    "jordan_out": (lambda: jrnn.jordan(4, 0), ValueError, "out: expected a positive int"),
    "projection": (lambda: jrnn.projection_lstm(4, 0), ValueError, "projection: expected a positive int"),
    "tdnn_window": (lambda: jrnn.tdnn(4, window=0), ValueError, "window: expected a positive int"),
    "tdnn_dilation": (lambda: jrnn.tdnn(4, 2, dilation=0), ValueError, "dilation: expected a positive int"),
    "dropout_one": (lambda: jrnn.dropout(1.0), ValueError, "rate: expected a rate in [0, 1), got 1.0"),
    "dropout_negative": (lambda: jrnn.dropout(-0.1), ValueError, "rate: expected a rate in [0, 1)"),
    "dropout_name": (lambda: jrnn.dropout("half"), TypeError, "rate: expected a float in [0, 1)"),
    "dense_zero": (lambda: jrnn.dense(0), ValueError, "features: expected a positive int"),
    "embed_vocab": (lambda: jrnn.embed(0, 3), ValueError, "vocab: expected a positive int"),
    "layer_norm_epsilon": (lambda: jrnn.layer_norm(-1.0), ValueError, "epsilon: expected"),
    "stack_empty": (lambda: jrnn.stack(), ValueError, "layers: expected at least one layer"),
    "stack_list": (
        lambda: jrnn.stack([LSTM, LSTM]), TypeError, "layers[0]: expected a layer", "one by one", "stack(*layers)",
    ),
    "stack_function": (
        lambda: jrnn.stack(LSTM, jax.nn.relu), TypeError, "layers[1]: expected a layer", "jrnn.activation(function)",
    ),
    "stack_constructor": (
        lambda: jrnn.stack(jrnn.lstm), TypeError, "layers[0]: expected a layer", "call what makes a layer",
    ),
    "residual_function": (lambda: jrnn.residual(jnp.tanh), TypeError, "layer: expected a layer", "jrnn.activation"),
    "bidirectional_cell": (lambda: jrnn.bidirectional("lstm"), TypeError, "cell: expected a layer"),
    "merge_name": (lambda: jrnn.bidirectional(LSTM, merge="add"), ValueError, "merge: expected one of", "'add'"),
    "merge_lambda": (lambda: jrnn.bidirectional(LSTM, merge=lambda a, b: a), ValueError, "merge: expected"),
    "merge_widths": (
        lambda: jrnn.bidirectional(LSTM, jrnn.gru(3), merge="sum").init(KEY, 3), ValueError, "merge: expected two",
        "4 and 3", "concat",
    ),
    "residual_widths": (
        lambda: jrnn.residual(LSTM).init(KEY, 3), ValueError, "layer: expected as many output as input features",
        "3 in and 4 out", "jrnn.dense(4)",
    ),
    "residual_embed": (lambda: jrnn.residual(EMBED), ValueError, "layer: expected a layer whose input has features"),
    "highway_widths": (lambda: jrnn.highway(LSTM).init(KEY, 3), ValueError, "layer: expected as many output as input"),
    "zoneout_rate": (lambda: jrnn.zoneout(LSTM, h=1.0), ValueError, "h: expected a rate in [0, 1)"),
    "zoneout_memory": (lambda: jrnn.zoneout(jrnn.gru(4), c=0.1), ValueError, "c: expected 0", "('h',)"),
    "zoneout_stack": (lambda: jrnn.zoneout(MODEL), TypeError, "cell: expected a cell for zoneout", "one by one"),
    "emits": (lambda: Emits(4), ValueError, "emits: expected one of the fields ('h', 'c')", "got ('h', 'm')"),
    "zoneout_tdnn": (lambda: jrnn.zoneout(jrnn.tdnn(4, 2), h=0.1), TypeError, "cell: expected", 'emits = "h"'),
    "variational_rate": (lambda: jrnn.variational(LSTM, inputs=2.0), ValueError, "inputs: expected a rate"),
    "variational_recurrent": (
        lambda: jrnn.variational(jrnn.gru(4, "before"), recurrent=0.1), TypeError, "cell: expected an AffineCell",
    ),
    "dropconnect_rate": (lambda: jrnn.dropconnect(LSTM, 1.0), ValueError, "rate: expected a rate"),
    "dropconnect_tdnn": (lambda: jrnn.dropconnect(jrnn.tdnn(4, 2), 0.1).init(KEY, 3), ValueError, "w_hh"),
    "learned_state_array": (lambda: jrnn.learned_state(StepOnly(0.5)).init(KEY, 3), TypeError, "cell: expected a cell"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    call, kind, *said = ERRORS[name]
    with pytest.raises(kind) as caught:
        call()
    assert re.search(".*".join(map(re.escape, said)), str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize(
    "layer",
    [
        LSTM, jrnn.gru(4, "before"), jrnn.jordan(4, 2), jrnn.indrnn(4), jrnn.tdnn(4, 2), jrnn.projection_lstm(4, 2),
        jrnn.learned_state(LSTM), jrnn.dense(4), MODEL, BIDIRECTIONAL,
    ],
    ids=repr,
)  # fmt: skip
def test_a_batch_shape_is_a_tuple(layer):
    params = shaped(layer, 3)
    with pytest.raises(TypeError, match=r"batch_shape: expected a tuple of ints, got 4; pass \(4,\)"):
        layer.initial_state(params, 4)
    jax.eval_shape(lambda: layer.initial_state(params, [4]))


# Where batch, time and units are equally many, shapes that do not belong together look alike.
@pytest.mark.parametrize("how", ["eager", "jit", "stepper"])
@pytest.mark.parametrize(
    "layer",
    [
        LSTM, jrnn.gru(4, "before"), jrnn.tdnn(4, 2), jrnn.learned_state(LSTM), jrnn.zoneout(LSTM, h=0.1),
        jrnn.residual(jrnn.elman(4)), jrnn.highway(jrnn.elman(4)), jrnn.stack(jrnn.dense(4), StepOnly(0.5)),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.sampled(3)
def test_a_step_does_not_broadcast_its_state(layer, how):
    if how == "stepper":
        step = jrnn.stepper(layer)
    else:
        step = jax.jit(layer.step) if how == "jit" else layer.step
    params = shaped(layer, 4)
    four, one = (layer.initial_state(params, batch) for batch in ((4,), ()))
    sequence = np.zeros((4, 4, 4), np.float32)
    for state, x in ((four, sequence), (one, sequence[0]), (four, sequence[0, 0])):
        with pytest.raises(ValueError, match=r"state: expected .*same batch axes.*through jrnn\.unroll"):
            step(params, state, x)
    step(params, four, sequence[0])
    step(params, one, sequence[0, 0])


def test_a_stepper_checks_the_state_of_a_cell_with_a_step_of_its_own():
    with pytest.raises(ValueError, match=r"state: expected float32\[2,3\].*got float32\[3\]"):
        jrnn.stepper(StepOnly(0.5))({"scale": jnp.ones(3)}, jnp.zeros(3), XS[0])


@pytest.mark.parametrize(
    "name", ["xs_rank", "xs_features", "lengths_float", "lengths_shape", "mask_transposed", "state_of_another_cell"]
)
def test_shapes_are_checked_under_jit_too(name):
    call, kind, *_ = ERRORS[name]
    with pytest.raises(kind):
        jax.jit(call)()


def test_16_bit_inputs_need_float32_parameters(x64):
    params = jax.tree.map(lambda a: a.astype(jnp.float64), PARAMS)
    with pytest.raises(TypeError, match="xs: expected float64 like the parameters, got bfloat16"):
        run(params=params, xs=jnp.asarray(XS, jnp.bfloat16))


def test_wrong_dtype_of_inputs_is_not_promoted(x64):
    with pytest.raises(TypeError, match=r"xs: expected float32 like the parameters .* got float64.*convert one"):
        run(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), PARAMS), xs=XS.astype(np.float64))


def test_ids_outside_the_vocabulary_are_nan_where_they_cannot_raise():
    ys = jax.jit(lambda ids: run(EMBED, EMBED_PARAMS, ids)[1])(jnp.array([[0], [5], [-1]]))
    np.testing.assert_array_equal(np.isnan(ys).all(-1)[:, 0], [False, True, True])


def test_ids_in_padding_may_be_anything():
    ids = np.array([[0, 1], [99, 2]])
    _, ys = run(EMBED, EMBED_PARAMS, ids, lengths=np.array([1, 2]))
    assert np.isfinite(ys).all()


def test_errors_come_before_the_loop_is_traced():
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Traced(StepOnly):
        def step(self, params, state, x, key=None):
            traces.append(x.shape)
            return super().step(params, state, x, key)

    cell, params = Traced(0.5), {"scale": jnp.ones(3)}
    for options in ({"lengths": [9, 9]}, {"mask": XS}, {"resets": XS}, {"backend": "no"}, {"state": ()}, {"key": 1}):
        with pytest.raises((ValueError, TypeError)):
            run(cell, params, **options)
    assert not traces


def test_a_list_is_as_good_as_an_array():
    state, ys = run(xs=XS.tolist(), lengths=[6, 2], mask=np.ones((6, 2), bool).tolist(), start=np.int64(2))
    assert ys.shape == (6, 2, 4)
    assert state.h.shape == (2, 4)


# --- values that are known while something else is traced -----------------------------------------------------------

KNOWN = {"numpy": np.asarray, "jax": jnp.asarray, "list": lambda value: value.tolist()}


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("flags", [("lengths",), ("mask",), ("lengths", "mask"), ()], ids="_and_".join)
def test_known_ids_are_checked_where_parameters_are_traced(kind, flags):
    known = KNOWN[kind]
    given = {"lengths": np.array([1, 2]), "mask": np.array([[True, True], [False, True]])}
    options = {name: known(given[name]) for name in flags}

    def total(params, ids):
        return jnp.sum(run(EMBED, params, ids, **options)[1])

    ids, wrong = np.array([[0, 1], [99 if flags else 2, 2]]), known(np.array([[0, 99], [0, 0]]))
    gradient = jax.jit(jax.grad(lambda params: total(params, known(ids))))(EMBED_PARAMS)["w"]
    counts = [1, 1, 1, 0, 0] if flags else [1, 1, 2, 0, 0]
    np.testing.assert_array_equal(gradient[:, 0], counts)
    if kind != "list":  # JAX traces what it makes of a list
        with pytest.raises(ValueError, match=r"ids in \[0, 5\)"):
            jax.jit(lambda params: total(params, wrong))(EMBED_PARAMS)


def test_lists_of_traced_lengths():
    ends = jax.jit(
        lambda n: (run(lengths=[n, 6])[1], jrnn.sequence.last_valid(XS, [n, 6]), jrnn.sequence.reverse(XS, [n, 6]))
    )
    np.testing.assert_array_equal(ends(2)[0], run(lengths=[2, 6])[1])


def test_arrays_on_a_device_stay_there():
    arrays = jax.device_put((PARAMS, XS, np.array([6, 2], np.int32), np.ones((6, 2), bool), np.int32(0)))

    def over(params, xs, lengths, mask, start):
        return run(params=params, xs=xs, lengths=lengths, mask=mask, start=start)

    over(*arrays)
    with jax.transfer_guard("disallow"):  # fails where the lengths go to the host and back
        over(*arrays)


def test_values_on_an_accelerator_are_not_waited_for(monkeypatch):
    """What is there only to be checked is not read, and is dealt with as where it is traced."""
    monkeypatch.setattr(checks, "_readable", lambda leaf: not isinstance(leaf, jax.Array))
    _, ys = run(lengths=jnp.array([9, -1]))
    np.testing.assert_array_equal(ys, run(lengths=np.array([6, 0]))[1])
    assert np.isnan(run(EMBED, EMBED_PARAMS, jnp.array([[7]]))[1]).all()
    assert np.isnan(jrnn.losses.cross_entropy(jnp.ones((1, 2)), jnp.array([2])))
    with pytest.raises(ValueError, match="lengths: expected values in"):
        run(lengths=np.array([9, 0]))
