"""Truncated backpropagation: the values of the whole, the gradient of the chunk, and nothing across a boundary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jrnn
from jrnn import losses
from jrnn.training import Chunk, chunks, fit, make_step, optimizer, tbptt_step, truncated_unroll
from tests.conftest import count_compilations

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, B, F = 11, 3, 2

MODELS = {
    "gru": jrnn.gru(4),
    "stack": jrnn.stack(jrnn.zoneout(jrnn.lstm(4), h=0.3), jrnn.dropout(0.5), jrnn.dense(4)),
    "variational": jrnn.variational(jrnn.elman(4), inputs=0.3, recurrent=0.3),
    "tdnn": jrnn.stack(jrnn.tdnn(4, 3), jrnn.gru(4)),
}
RANDOM = ("stack", "variational")
KINDS = (*RANDOM, "tdnn")  # which holds a GRU


def sequences(dtype=np.float32, seed=0):
    """A batch in which everything happens: ragged lengths, holes, resets, NaN in the padding."""
    rng = np.random.default_rng(seed)
    xs, ys = rng.normal(size=(T, B, F)).astype(dtype), rng.normal(size=(T, B, 4)).astype(dtype)
    lengths = np.array([11, 6, 2])
    mask = rng.random((T, B)) < 0.8
    resets = rng.random((T, B)) < 0.2
    xs[~(mask & (np.arange(T)[:, None] < lengths))] = np.nan
    return xs, ys, {"lengths": lengths, "mask": mask, "resets": resets}


def key_of(name):
    return jax.random.key(5) if name in RANDOM else None


def close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-10, "atol": 1e-12, **tolerance}), a, b)


def params_of(name, dtype=jnp.float64):
    return jax.tree.map(lambda x: x.astype(dtype), MODELS[name].init(jax.random.key(0), F))


@pytest.mark.parametrize("length", [4, 50])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.sampled(3)
def test_forward_values_do_not_depend_on_the_chunks(name, length, x64):
    model, params, key = MODELS[name], params_of(name), key_of(name)
    xs, ys, flags = sequences(np.float64)
    state, whole = jrnn.unroll(model, params, xs, key=key, **flags)
    parts, carry = np.zeros(whole.shape), None
    for index, chunk in enumerate(chunks(xs, ys, length, **flags)):
        end = chunk.start + len(chunk.xs)
        carry, parts[chunk.start : end] = jrnn.unroll(
            model, params, chunk.xs, carry, lengths=chunk.lengths, mask=chunk.mask, resets=chunk.resets, key=key,
            start=chunk.start,
        )  # fmt: skip
        np.testing.assert_array_equal(chunk.ys, ys[chunk.start : end])
        assert chunk.index == index
    close(parts, np.asarray(whole))
    close(carry, state)
    truncated_state, truncated = truncated_unroll(model, params, xs, length, key=key, **flags)
    close(truncated, whole)
    close(truncated_state, state)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.sampled(3)
def test_one_chunk_for_the_whole_is_full_backpropagation(name, x64):
    model, params, key = MODELS[name], params_of(name), key_of(name)
    xs, ys, flags = sequences(np.float64)

    def loss_fn(params, batch, key):
        xs, ys, flags = batch
        _, predictions = jrnn.unroll(model, params, xs, key=key, **flags)
        return losses.mse(predictions, ys, jrnn.sequence.valid_steps(flags["lengths"], flags["mask"], T, (B,)))

    tx = optimizer("sgd", 0.1)
    full, truncated = make_step(loss_fn, tx), tbptt_step(model, losses.mse, tx)
    (chunk,) = chunks(xs, ys, T, **flags)
    a, expected = full(full.init(params, key), (xs, ys, flags))
    b, metrics = truncated(truncated.init(params, key), chunk)
    close(metrics.loss, expected.loss)
    close(metrics.leaf_norms, expected.leaf_norms)
    close(b.params, a.params)

    grads = lambda run: jax.grad(lambda p: jnp.sum(run(p)[1] ** 2))(params)
    for length in (T, 2 * T):
        close(
            grads(lambda p, n=length: truncated_unroll(model, p, xs, n, key=key, **flags)),
            grads(lambda p: jrnn.unroll(model, p, xs, key=key, **flags)),
        )


@pytest.mark.parametrize("name", KINDS)
def test_no_gradient_crosses_a_boundary(name, x64):
    model, params, key, length = MODELS[name], params_of(name), key_of(name), 4
    xs = np.random.default_rng(0).normal(size=(T, B, F))
    by_step = lambda xs: jnp.sum(truncated_unroll(model, params, xs, length, key=key)[1] ** 2, axis=(1, 2))
    grads = jax.jit(jax.jacrev(by_step))(xs)
    for t, grad in enumerate(np.asarray(grads)):
        begin = t - t % length
        assert not np.any(grad[:begin]), f"output {t} has a gradient before {begin}"
        assert not np.any(grad[t + 1 :])
        assert np.any(grad[begin:t]) or t == begin


def test_gradient_is_the_sum_over_chunks_by_hand(x64):
    model, params, length = MODELS["gru"], params_of("gru"), 4
    xs, ys, flags = sequences(np.float64)

    def total(params):
        _, predictions = truncated_unroll(model, params, xs, length, **flags)
        return jnp.sum((predictions - ys) ** 2)

    def one(params, state, chunk):
        _, predictions = jrnn.unroll(model, params, chunk.xs, state, lengths=chunk.lengths, mask=chunk.mask,
                                     resets=chunk.resets)  # fmt: skip
        return jnp.sum((predictions - chunk.ys) ** 2)

    expected, state = jax.tree.map(jnp.zeros_like, params), None
    for chunk in chunks(xs, ys, length, **flags):
        expected = jax.tree.map(jnp.add, expected, jax.grad(one)(params, state, chunk))
        state, _ = jrnn.unroll(model, params, chunk.xs, state, lengths=chunk.lengths, mask=chunk.mask,
                               resets=chunk.resets)  # fmt: skip
    close(jax.grad(total)(params), expected)


@pytest.mark.parametrize("name", RANDOM)
def test_chunks_of_a_sequence_share_a_key_and_sequences_do_not(name, x64):
    """With a learning rate of zero, the losses of the chunks are those of the whole, drawn with one key."""
    model, params, key = MODELS[name], params_of(name), jax.random.key(5)
    xs, ys, flags = sequences(np.float64)
    step = tbptt_step(model, lambda p, y, mask: jnp.sum(jnp.where(mask[..., None], p - y, 0.0) ** 2), optax.sgd(0.0))
    state, done = step.init(params, key), 0
    for _ in range(2):
        total, first = 0.0, done
        for chunk in chunks(xs, ys, 3, **flags):
            state, metrics = step(state, chunk)
            total, done = total + metrics.loss, done + 1
        _, predictions = jrnn.unroll(model, params, xs, key=jax.random.fold_in(key, first), **flags)
        valid = jrnn.sequence.valid_steps(flags["lengths"], flags["mask"], T, (B,))
        close(total, jnp.sum(jnp.where(valid[..., None], predictions - ys, 0.0) ** 2))


@pytest.mark.smoke
def test_a_learned_initial_state_gets_its_gradient_in_the_first_chunk():
    model = jrnn.learned_state(jrnn.gru(4))
    step = tbptt_step(model, losses.mse, optax.sgd(0.1))
    xs = np.random.default_rng(0).normal(size=(8, B, F)).astype(np.float32)
    state = step.init(model.init(jax.random.key(0), F))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    norms = []
    for chunk in chunks(xs, np.ones((8, B, 4), np.float32), 4):
        state, metrics = step(state, chunk)
        norms.append(dict(zip(names, metrics.leaf_norms.tolist(), strict=True)))
    inner = {name for name, norm in norms[1].items() if norm == 0.0}
    assert inner, "the initial state has no part in the second chunk"
    assert all(norms[0][name] > 0.0 for name in inner)


def test_a_step_that_is_not_finite_holds_the_recurrent_state():
    model = jrnn.lstm(4)
    step = tbptt_step(model, losses.mse, optimizer("adam", 0.1))
    xs, ys = np.ones((8, B, F), np.float32), np.ones((8, B, 4), np.float32)
    first, second = chunks(xs, ys, 4)
    bad = lambda chunk: chunk._replace(xs=np.full_like(chunk.xs, np.inf), ys=np.full_like(chunk.ys, np.nan))
    state, _ = step(step.init(model.init(jax.random.key(0), F)), first)
    before = jax.device_get((state.params, state.opt_state, state.carry))
    state, metrics = step(state, bad(second))
    assert not metrics.finite
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state, state.carry), before)
    state, _ = step(step.init(model.init(jax.random.key(0), F)), bad(first))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.carry)), "the initial state, not NaN"


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
@pytest.mark.sampled(3)
def test_any_batch_axes_and_integer_inputs(shape):
    model = jrnn.stack(jrnn.embed(7, 3), jrnn.gru(4), jrnn.dense(7))
    ids = np.random.default_rng(0).integers(0, 7, (9, *shape))
    step = tbptt_step(model, losses.cross_entropy, optimizer("adam", 0.05))
    data = lambda epoch: chunks(ids[:-1], ids[1:], 3)
    result = fit(step, model.init(jax.random.key(0), None), data, epochs=30, log_every=3)
    losses_ = result.history["train"]["loss"]
    assert losses_[-1] < 0.5 * losses_[0]


def test_compiles_for_the_first_chunk_and_for_the_others():
    model = jrnn.lstm(5)
    xs, ys = np.ones((16, B, F), np.float32), np.ones((16, B, 5), np.float32)
    build = lambda: tbptt_step(jrnn.lstm(5), losses.mse, optimizer("adam", 0.015625))
    state = build().init(model.init(jax.random.key(0), F))
    first, second, *rest = chunks(xs, ys, 4)
    state, _ = build()(state, first)
    state, _ = build()(state, second)
    with count_compilations() as counter:
        for chunk in (*rest, first, second):
            state, _ = build()(state, chunk)
    assert counter["compilations"] == 0


def test_fit_learns_validates_and_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    model = jrnn.stack(jrnn.gru(8), jrnn.dropout(0.1), jrnn.dense(1))
    step = tbptt_step(model, losses.mse, optimizer("adam", 0.02, clip_norm=1.0))
    series = np.sin(0.3 * np.arange(61, dtype=np.float32))[:, None, None]
    params = model.init(jax.random.key(0), 1)

    def run(directory, steps):
        data = lambda epoch: chunks(series[:-1] + np.float32(0.01 * epoch), series[1:], 10)
        return fit(
            step, params, data, key=jax.random.key(1), steps=steps, checkpoint=directory, checkpoint_every=9,
            validation=list(chunks(series[:-1], series[1:], 25)), log_every=1,
        )  # fmt: skip

    whole = run(tmp_path / "whole", 40)
    for steps in (9, 23, 40):  # in the middle of a sequence: the recurrent state is part of the checkpoint
        parts = run(tmp_path / "parts", steps)
    bits = lambda state: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state._replace(key=None))]
    assert bits(parts.state) == bits(whole.state)
    assert parts.history["train"] == whole.history["train"]
    assert type(parts.state.carry[0]) is type(model.layers[0].initial_state(params[0], (1,)))
    validation = whole.history["validation"]["loss"]
    assert validation[-1] < validation[0]


def test_validation_does_not_depend_on_the_chunks(x64):
    model, params = MODELS["gru"], params_of("gru")
    rng = np.random.default_rng(0)
    xs, ys = rng.normal(size=(12, B, F)), rng.normal(size=(12, B, 4))
    step = tbptt_step(model, losses.mse, optax.sgd(0.0))
    values = []
    for length in (3, 4, 12):
        carry, total = None, []
        for chunk in chunks(xs, ys, length):
            carry, metrics = step.evaluate(params, chunk, carry)
            total.append(float(metrics["loss"]))
        values.append(np.mean(total))
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


def test_chunks_without_a_valid_step_are_left_out():
    xs, mask = np.zeros((9, 2, 1)), np.ones((9, 2), bool)
    mask[0:3] = False
    cut = list(chunks(xs, {"a": xs, "b": (xs,)}, 3, lengths=np.array([6, 1], np.uint8), mask=mask))
    assert [(chunk.start, chunk.index, chunk.lengths.tolist()) for chunk in cut] == [(3, 0, [3, 0])]
    assert cut[0].ys["b"][0].shape == (3, 2, 1)
    assert list(chunks(xs, None, 3, lengths=np.array([0, 0]))) == []
    assert list(chunks(xs[:0], None, 3)) == []


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda xs: chunks(xs, None, 0), ValueError, "length: expected a positive int"),
        (lambda xs: chunks(xs, None, 2.0), TypeError, "length"),
        (lambda xs: chunks(xs, {"a": xs[1:]}, 2), ValueError, r"ys\['a'\]: expected 5 steps"),
        (lambda xs: chunks(xs, None, 2, lengths=[6, 1]), ValueError, r"lengths: expected values in \[0, 5\]"),
        (lambda xs: chunks(xs, None, 2, lengths=[-1, 1]), ValueError, "lengths"),
        (lambda xs: chunks(xs, None, 2, lengths=[1.0, 1.0]), TypeError, "lengths: expected integers"),
        (lambda xs: chunks(xs, None, 2, lengths=[1, 1, 1]), ValueError, "lengths: expected the batch shape"),
        (lambda xs: chunks(xs, None, 2, mask=np.ones((5, 2))), ValueError, "mask: expected booleans"),
        (lambda xs: chunks(xs, None, 2, resets=np.ones((4, 2), bool)), ValueError, "resets: expected booleans"),
        (lambda xs: chunks(3.0, None, 2), ValueError, "xs: expected time as the first axis"),
        (lambda xs: tbptt_step(3, losses.mse, optax.sgd(0.1)), TypeError, "model: expected a layer"),
        (lambda xs: tbptt_step(jrnn.gru(2), 3, optax.sgd(0.1)), TypeError, "loss: expected a function"),
        (
            lambda xs: tbptt_step(jrnn.gru(2), lambda predictions, targets: 0.0, optax.sgd(0.1)),
            TypeError,
            r"loss: expected a function of \(predictions, targets, mask\).*takes \(predictions, targets\)",
        ),
        (lambda xs: tbptt_step(jrnn.gru(2), losses.mse, 3), TypeError, "optimizer"),
        (
            lambda xs: jax.jit(lambda n: len(list(chunks(xs, None, 2, lengths=n))))(np.array([1, 2])),
            TypeError,
            "lengths: expected known values, got a traced array",
        ),
        (
            lambda xs: tbptt_step(jrnn.stack(jrnn.residual(jrnn.bidirectional(jrnn.gru(2)))), losses.mse, optax.sgd(1)),
            ValueError,
            "model: expected one that runs forward in time",
        ),
        (
            lambda xs: truncated_unroll(jrnn.bidirectional(jrnn.gru(2)), {}, xs, 2),
            ValueError,
            "model: expected one that runs forward",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call(np.zeros((5, 2, 1), np.float32))


@pytest.mark.smoke
def test_errors_of_a_chunk_out_of_turn():
    step = tbptt_step(jrnn.gru(2), losses.mse, optax.sgd(0.1))
    state = step.init(jrnn.gru(2).init(jax.random.key(0), 1))
    _, second = chunks(np.zeros((4, 2, 1), np.float32), np.zeros((4, 2, 2), np.float32), 2)
    with pytest.raises(ValueError, match="expected the first chunk of a sequence, index 0"):
        step(state, second)
    with pytest.raises(TypeError, match="batch: expected a Chunk"):
        step(state, second.xs)
    assert isinstance(second, Chunk)
