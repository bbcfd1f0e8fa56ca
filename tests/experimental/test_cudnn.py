"""cuDNN's LSTM: its weights, what is refused, and everything round the call, with JAX's own reference in its place.

The same tests run with cuDNN itself on a GPU: ``pytest -m gpu tests/experimental/test_cudnn.py``.
"""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import jaxlib.gpu_rnn
import numpy as np
import pytest
from jax.experimental import rnn
from jax.interpreters import mlir

import jrnn
from jrnn import _interpret, testing
from jrnn._interpret import call
from jrnn.experimental import cudnn
from jrnn.schedules import Plan, Refusal, Steps, Task

F, H = 3, 4
CELL = jrnn.lstm(H)


# --- cuDNN's place, taken on the CPU --------------------------------------------------------------------------------


def _reference(x, h, c, weights, lengths):
    sizes = (x.shape[-1], h.shape[-1], 1)
    parts = rnn.unpack_lstm_weights(weights, *sizes, False)
    y, h, c = rnn.lstm_ref(x, h[None], c[None], *parts, lengths, *sizes, 0.0, False)
    return y, h[0], c[0]


def _spoil(a, lengths):
    """NaN in padding: nothing may rest on what cuDNN leaves there."""
    return jnp.where((jnp.arange(a.shape[1]) < lengths[:, None])[..., None], a, jnp.nan)


def _forward(x, h, c, weights, lengths, *options):
    assert options[2:5] == (1, 0.0, False)
    y, h_n, c_n = _reference(x, h[0], c[0], weights, lengths)
    return (_spoil(y, lengths), h_n[None], c_n[None]), (x, h, c, weights, lengths, y, jnp.zeros(5))


def _backward(features, hidden, layers, dropout, bidirectional, precision, residuals, cotangents):
    x, h, c, weights, lengths, _, reserve = residuals
    assert (features, hidden, reserve.shape) == (x.shape[-1], h.shape[-1], (5,))
    dy, dh, dc = cotangents
    _, pull = jax.vjp(lambda *args: _reference(*args, lengths), x, h[0], c[0], weights)
    dx, dh, dc, dw = pull((dy, dh[0], dc[0]))
    return _spoil(dx, lengths), dh[None], dc[None], dw, None


def forget():
    jax.clear_caches()
    _interpret._traced.cache_clear()


@pytest.fixture(params=["reference", pytest.param("cudnn", marks=pytest.mark.gpu)])
def engine(request, monkeypatch):
    """cuDNN on a GPU, elsewhere JAX's reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(cudnn, "unavailable", lambda: None)
        monkeypatch.setattr(rnn, "lstm_fwd", _forward)
        monkeypatch.setattr(rnn, "lstm_bwd", _backward)
    with jax.default_matmul_precision("highest"):
        yield request.param


@pytest.fixture
def fresh():
    """Programs of other tests are forgotten: in some of them, something else stands in cuDNN's place."""
    forget()
    yield
    forget()


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def noisy(tree, rng):
    return jax.tree.map(lambda a: np.asarray(a) + 0.3 * normal(rng, *a.shape), tree)


def trial_of(layer, time=7, batch=(3,), features=F, seed=0, **fields):
    rng = np.random.default_rng(seed)
    params = noisy(layer.init(jax.random.key(seed), features), rng)
    state = noisy(layer.initial_state(params, batch), rng)
    trial = testing.Trial(params, normal(rng, time, *batch, features), state, **fields)
    out = jax.eval_shape(lambda p, x, s: jrnn.unroll(layer, p, x, s), params, trial.xs, state)
    cotangents = jax.tree.map(lambda a: normal(rng, *a.shape), out)
    return trial._replace(cotangents=(*jax.tree.leaves(cotangents[0]), cotangents[1]))


@dataclasses.dataclass(frozen=True)
class Run:
    """What `testing.fold` answers, by cuDNN."""

    layer: jrnn.Layer
    options: tuple = ()

    def __call__(self, trial):
        flags = {"lengths": trial.lengths, "mask": trial.mask, **dict(self.options)}

        def forward(params, xs, state):
            return jrnn.unroll(self.layer, params, xs, state, **flags, backend="cudnn")

        out, pull = jax.vjp(forward, trial.params, trial.xs, trial.state)
        d_state = jax.tree.unflatten(jax.tree.structure(out[0]), trial.cotangents[:-1])
        d_params, d_xs, d_start = pull((d_state, trial.cotangents[-1]))
        state, ys = out
        gradients = {"gradient of params": d_params, "gradient of xs": d_xs, "gradient of state": d_start}
        return {"state": state, "ys": ys, **gradients}


def run(layer, trial, engine, **options):
    """On a GPU compiled; elsewhere interpreted, which is faster on shapes as small as these."""
    return call(Run(layer, tuple(options.items())), trial, jit=engine == "cudnn")


def holes(time, batch, seed=3):
    return np.random.default_rng(seed).random((time, *batch)) < 0.6


TRIALS = {
    "all valid": {},
    "ragged": {"lengths": np.array([7, 4, 1], np.int32)},
    "no step at all": {"lengths": np.array([0, 7, 0], np.int32)},
    "holes": {"mask": holes(7, (3,))},
    "holes and lengths": {"mask": holes(7, (3,)), "lengths": np.array([6, 0, 7], np.int32)},
    "two batch axes": {"batch": (2, 2), "mask": holes(7, (2, 2))},
    "no batch axis": {"batch": (), "mask": holes(7, ())},
    "no time": {"time": 0},
    "no batch": {"batch": (0,)},
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.sampled(3)
def test_values_and_gradients(name, reverse, engine):
    trial = trial_of(CELL, **TRIALS[name])
    got, expected = run(CELL, trial, engine, reverse=reverse), testing.fold(CELL, trial, reverse=reverse)
    if name == "no time":  # the literal reading has no outputs then
        assert (got.pop("ys").shape, expected.pop("ys")) == ((0, 3, H), None)
    testing.compare(got, expected, 3e-5, name)


@pytest.mark.parametrize(
    "layer",
    [
        jrnn.stack(jrnn.lstm(H), jrnn.dense(3), jrnn.lstm(5)),
        jrnn.bidirectional(jrnn.lstm(H)),
        jrnn.stack(jrnn.bidirectional(jrnn.lstm(H)), jrnn.bidirectional(jrnn.lstm(H), merge="sum")),
        jrnn.residual(jrnn.lstm(F)),
    ],
    ids=["stack", "bidirectional", "stack_of_bidirectional", "residual"],
)
@pytest.mark.sampled(3)
def test_models_are_walked_layer_by_layer(layer, engine):
    trial = trial_of(layer, lengths=np.array([7, 4, 0], np.int32))
    testing.compare(run(layer, trial, engine), testing.fold(layer, trial), 3e-5, repr(layer))


def test_padding_changes_nothing(engine):
    trial = trial_of(CELL, **TRIALS["holes and lengths"])
    valid, _ = trial.flags((3,))
    spoilt = trial._replace(xs=np.where(valid[..., None], trial.xs, np.nan))
    got = run(CELL, spoilt, engine)
    testing.compare(got, run(CELL, trial, engine), 0.0, "NaN in padding")
    assert not np.asarray(got["ys"])[~valid].any()
    assert not np.asarray(got["gradient of xs"])[~valid].any()


def test_chunks_and_remat_equal_the_whole(engine):
    trial = trial_of(CELL, mask=holes(7, (3,)))
    whole = run(CELL, trial, engine)
    for remat, reverse in ((3, False), ("sqrt", True)):
        expected = run(CELL, trial, engine, reverse=reverse)
        testing.compare(run(CELL, trial, engine, remat=remat, reverse=reverse), expected, 3e-5, f"remat={remat!r}")
    state, ys = trial.state, []
    for part in (slice(0, 4), slice(4, 7)):
        state, y = jrnn.unroll(CELL, trial.params, trial.xs[part], state, mask=trial.mask[part], backend="cudnn")
        ys.append(y)
    testing.compare((state, jnp.concatenate(ys)), (whole["state"], whole["ys"]), 3e-5, "chunks")


def test_vmap_equals_a_batch_axis(engine):
    """Gradients of weights stay apart under vmap: each sequence has its own."""
    trial = trial_of(CELL, lengths=np.array([7, 4, 0], np.int32))

    def loss(params, xs, lengths):
        return jnp.sum(jnp.sin(jrnn.unroll(CELL, params, xs, lengths=lengths, backend="cudnn")[1]))

    gradient = jax.grad(loss)
    each = jax.jit(jax.vmap(gradient, (None, 1, 0)))(trial.params, trial.xs, trial.lengths)
    one = jax.jit(gradient)
    expected = [one(trial.params, trial.xs[:, b], trial.lengths[b]) for b in range(3)]
    testing.compare(each, jax.tree.map(lambda *gs: jnp.stack(gs), *expected), 3e-5, "vmap of grad")
    models = jax.tree.map(lambda a: np.stack([a, 0.5 * a]), trial.params)
    both = jax.jit(jax.vmap(gradient, (0, None, None)))(models, trial.xs[:, 1], trial.lengths[1])
    testing.compare(jax.tree.map(lambda a: a[0], both), expected[1], 3e-5, "vmap over models")


def test_jit_compiles_once(engine):
    trial, traces = trial_of(CELL), []

    @jax.jit
    def gradient(params, xs):
        traces.append(None)
        return jax.grad(lambda p: jnp.sum(jrnn.unroll(CELL, p, xs, backend="cudnn")[1]))(params)

    first, second = gradient(trial.params, trial.xs), gradient(trial.params, trial.xs)
    testing.compare(first, second, 0.0, "twice")
    assert len(traces) == 1
    without_cudnn = jax.grad(lambda p: jnp.sum(jrnn.unroll(CELL, p, trial.xs, backend="reference")[1]))(trial.params)
    testing.compare(first, without_cudnn, 3e-5, "jit")


def test_higher_derivatives_say_what_to_take_instead(engine):
    trial = trial_of(CELL)

    def loss(xs):
        return jnp.sum(jnp.sin(jrnn.unroll(CELL, trial.params, xs, backend="cudnn")[1]))

    with pytest.raises(NotImplementedError, match=r"first derivatives only.*hoisted"):
        jax.grad(lambda xs: jnp.sum(jax.grad(loss)(xs) ** 2))(trial.xs)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (trial.xs,), (trial.xs,))


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_stand_where_cudnn_has_them():
    """JAX's own reading of the flat weights, in an LSTM written in NumPy's float64, answers what jrnn answers."""
    trial = trial_of(CELL, batch=(2,))
    flat = np.asarray(cudnn.flat_weights(CELL.form(trial.params)))
    assert flat.shape == (rnn.get_num_params_in_lstm(F, H, 1, False),)
    w_ih, w_hh, b_ih, b_hh = (part[0].astype(np.float64) for part in rnn.unpack_lstm_weights(flat, F, H, 1, False))
    np.testing.assert_array_equal(b_ih, trial.params["b"])
    assert not b_hh.any()
    h, c = (a.astype(np.float64) for a in trial.state)
    expected = []
    for x in trial.xs.astype(np.float64):
        i, f, g, o = np.split(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh, 4, axis=-1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        expected.append(h)
    ys = jrnn.unroll(CELL, trial.params, trial.xs, trial.state, backend="reference")[1]
    np.testing.assert_allclose(ys, np.stack(expected), atol=2e-6)


def test_gradients_come_back_to_their_parameters():
    params = trial_of(CELL).params
    flat, pull = jax.vjp(lambda params: cudnn.flat_weights(CELL.form(params)), params)
    cotangent = normal(np.random.default_rng(0), *flat.shape)
    w_ih, w_hh, b_ih, _ = (part[0] for part in rnn.unpack_lstm_weights(cotangent, F, H, 1, False))
    testing.compare(pull(cotangent)[0], {"w_ih": w_ih.T, "w_hh": w_hh.T, "b": b_ih}, 0.0, "gradients")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_refused_without_a_gpu(fresh):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    trial = trial_of(CELL)
    with pytest.raises(
        ValueError, match=r"'cudnn' cannot run lstm.*: cuDNN runs on NVIDIA GPUs.*is a cpu.*backend=None"
    ):
        jrnn.unroll(CELL, trial.params, trial.xs, backend="cudnn")


def task_of(cell, params, xs):
    return Task.of(cell, params, xs, cell.initial_state(params, xs.shape[1:-1]), Steps())


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (jrnn.gru(H), "plain LSTM"),
        (jrnn.peephole_lstm(H), "plain LSTM"),
        (jrnn.lstm(H, activation="relu"), "plain LSTM"),
        (jrnn.zoneout(jrnn.lstm(H), h=0.1), "plain LSTM"),
        (jrnn.variational(jrnn.lstm(H), inputs=0.1), "plain LSTM"),
    ],
    ids=repr,
)
def test_refused_cells(cell, reason, monkeypatch):
    monkeypatch.setattr(cudnn, "unavailable", lambda: None)
    params, xs = cell.init(jax.random.key(0), F), jnp.ones((5, 2, F))
    assert isinstance(cudnn.plan(task_of(cell, params, xs)), Refusal)
    with pytest.raises(ValueError, match=f"backend: 'cudnn' cannot run .*{reason}"):
        jrnn.unroll(cell, params, xs, backend="cudnn")


def test_refused_inputs(monkeypatch):
    monkeypatch.setattr(cudnn, "unavailable", lambda: None)
    params, xs = CELL.init(jax.random.key(0), F), jnp.ones((5, 2, F))
    assert isinstance(cudnn.plan(task_of(CELL, params, xs)), Plan)
    with pytest.raises(ValueError, match="float32 parameters and inputs here, not bfloat16 and float32"):
        jrnn.unroll(CELL, params, xs.astype(jnp.bfloat16), backend="cudnn")
    with pytest.raises(ValueError, match="cannot restart inside a sequence"):
        jrnn.unroll(CELL, params, xs, resets=jnp.zeros((5, 2), bool), backend="cudnn")


def test_chosen_only_by_name(monkeypatch):
    monkeypatch.setattr(cudnn, "unavailable", lambda: None)
    name, _ = jrnn.choose_backend(CELL, CELL.init(jax.random.key(0), F), jnp.ones((5, 2, F)))
    assert name != "cudnn"


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, "HIGH"), ("tensorfloat32", "HIGH"), ("bfloat16", "HIGH"), ("highest", "HIGHEST"), ("float32", "HIGHEST")],
)
def test_precision_follows_the_setting(asked, given):
    with jax.default_matmul_precision(asked) if asked else contextlib.nullcontext():
        assert cudnn._precision() == getattr(jax.lax.Precision, given)
        assert rnn._lstm_cudnn_allow_tf32(cudnn._precision()) == (given == "HIGH")


# --- lowering for CUDA without a device -----------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch, fresh):
    """What tracing and lowering ask of the CUDA plugin: sizes, and a descriptor."""
    asked = []

    def sizes(*args):
        asked.append(args)
        return 16, 32

    fake = types.SimpleNamespace(build_rnn_descriptor=lambda *args: b"descriptor")
    monkeypatch.setattr(cudnn, "unavailable", lambda: None)
    monkeypatch.setattr(rnn, "gpu_rnn", types.SimpleNamespace(compute_rnn_workspace_reserve_space_sizes=sizes))
    monkeypatch.setattr(jaxlib.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes", sizes, raising=False)
    rules = {rnn.rnn_fwd_p: ("_rnn_fwd_lowering", "cudnn_rnn_lowering"),
             rnn.rnn_bwd_p: ("_rnn_bwd_lowering", "cudnn_rnn_bwd_lowering")}  # fmt: skip
    for primitive, (name, _) in rules.items():
        mlir.register_lowering(primitive, functools.partial(getattr(jaxlib.gpu_rnn, name), fake, "cu"), platform="cuda")
    yield asked
    for primitive, (_, name) in rules.items():
        mlir.register_lowering(primitive, getattr(jaxlib.gpu_rnn, name), platform="cuda")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU: cuDNN itself is tested")
@pytest.mark.parametrize("remat", [None, 3])
@pytest.mark.sampled(2)
def test_lowers_for_cuda_without_a_device(plugin, remat):
    """The program for a GPU holds cuDNN's two calls, with shapes that JAX's own lowering accepts."""
    trial = trial_of(CELL, time=6, lengths=np.array([6, 4, 1], np.int32))

    def loss(params, xs, state, lengths):
        out = jrnn.unroll(CELL, params, xs, state, lengths=lengths, backend="cudnn", remat=remat)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

    args = (trial.params, trial.xs, trial.state, trial.lengths)
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn_rnn_ffi" in text
    assert "cudnn_rnn_bwd_ffi" in text
    time = 6 if remat is None else remat
    assert {args[:5] for args in plugin} == {(F, H, 1, 3, time)}
    assert f"tensor<{3}x{time}x{F}xf32>" in text  # batch-major
    exported = jax.export.export(jax.jit(loss), platforms=["cuda"], disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call("cudnn_rnn_ffi")])(*args)  # fmt: skip
    assert exported.platforms == ("cuda",)
