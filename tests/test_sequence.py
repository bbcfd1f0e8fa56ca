"""Padding, windows, buckets and reductions: values against loops in NumPy, and padding that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrnn import sequence
from tests.conftest import count_compilations

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAN = float("nan")
LENGTHS = np.array([3, 0, 5])
MASK = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 0]], bool)
REDUCTIONS = {
    "last": (sequence.last_valid, lambda rows: rows[-1]),
    "mean": (sequence.mean_valid, lambda rows: rows.mean(0)),
    "max": (sequence.max_valid, lambda rows: rows.max(0)),
}


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def validity(lengths, mask, time, batch):
    valid = np.ones((time, *batch), bool)
    for index in np.ndindex(time, *batch):
        if lengths is not None and index[0] >= lengths[index[1:]]:
            valid[index] = False
        if mask is not None and not mask[index]:
            valid[index] = False
    return valid


# --- valid_steps


@pytest.mark.parametrize("lengths", [None, LENGTHS, LENGTHS.astype(np.uint8)])
@pytest.mark.parametrize("mask", [None, MASK])
def test_valid_steps_is_lengths_and_mask(lengths, mask):
    valid = sequence.valid_steps(lengths, mask, 5, (3,))
    if lengths is None and mask is None:
        assert valid is None
        return
    assert valid.dtype == bool
    np.testing.assert_array_equal(valid, validity(lengths, mask, 5, (3,)))


def test_valid_steps_compares_a_small_integer_type_with_a_long_sequence():
    valid = sequence.valid_steps(np.array([200], np.uint8), None, 600, (1,))
    assert int(valid.sum()) == 200


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("time", [0, 4])
def test_valid_steps_any_batch_axes(batch, time):
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, time + 1, batch)
    mask = rng.random((time, *batch)) < 0.5
    valid = sequence.valid_steps(lengths, mask, time, batch)
    np.testing.assert_array_equal(valid, validity(lengths, mask, time, batch))


def test_valid_steps_under_jit_and_vmap():
    expected = validity(LENGTHS, MASK, 5, (3,))
    np.testing.assert_array_equal(
        jax.jit(sequence.valid_steps, static_argnums=(2, 3))(LENGTHS, MASK, 5, (3,)), expected
    )
    one = lambda n, m: sequence.valid_steps(n, m, 5, ())
    np.testing.assert_array_equal(jax.vmap(one, (0, 1), 1)(LENGTHS, MASK), expected)


@pytest.mark.parametrize(
    ("lengths", "mask", "error", "match"),
    [
        (np.array([1.0, 2.0]), None, TypeError, "lengths: expected integers, got float32"),
        (np.array([True, False]), None, TypeError, "lengths: expected integers, got bool"),
        (np.array([1, 2, 3]), None, ValueError, r"lengths: expected shape \(2,\).*got \(3,\)"),
        (None, np.ones((4, 2)), TypeError, "mask: expected booleans, got float32"),
        (None, np.ones((2, 4), bool), ValueError, r"mask: expected shape \(4, 2\).*got \(2, 4\)"),
        (None, np.ones((4, 2, 1), bool), ValueError, r"mask: expected shape \(4, 2\)"),
    ],
)
def test_valid_steps_errors(lengths, mask, error, match):
    with pytest.raises(error, match=match):
        sequence.valid_steps(lengths, mask, 4, (2,))


# --- pad and unpad


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, bool, jnp.bfloat16])
@pytest.mark.parametrize("length", [None, 9])
@pytest.mark.parametrize("rest", [(), (2,), (2, 3)])
def test_pad_and_unpad_round_trip(dtype, length, rest):
    originals = [data(n, *rest, seed=n).astype(dtype) for n in (4, 0, 7, 1)]
    xs, lengths = sequence.pad(originals, length)
    assert xs.shape == (length or 7, 4, *rest)
    assert xs.dtype == dtype
    assert lengths.tolist() == [4, 0, 7, 1]
    assert lengths.dtype == jnp.int32
    for i, original in enumerate(originals):
        assert not np.asarray(xs, np.float32)[len(original) :, i].any()
    for original, back in zip(originals, sequence.unpad(xs, lengths), strict=True):
        assert isinstance(back, jax.Array)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, original)


def test_pad_does_not_compile_for_new_lengths():
    sequences = [jnp.asarray(data(n)) for n in (5, 7)]
    sequence.pad([data(2), data(3)], 8)
    with count_compilations() as count:
        sequence.pad(sequences, 8)
    assert count["compilations"] == 0


@pytest.mark.smoke
def test_pad_and_unpad_are_differentiable():
    def total(short, long):
        xs, lengths = sequence.pad([short, long])
        return sum((i + 1.0) * x.sum() for i, x in enumerate(sequence.unpad(xs, lengths)))

    short, long = jnp.ones(2), jnp.ones(5)
    for gradient, scale in zip(jax.grad(total, (0, 1))(short, long), (1, 2), strict=True):
        np.testing.assert_array_equal(gradient, np.full(gradient.shape, scale))


@pytest.mark.parametrize(
    ("sequences", "length", "error", "match"),
    [
        ([], None, ValueError, "sequences: expected at least one"),
        ([np.ones((2, 3)), np.ones((2, 4))], None, ValueError, r"sequences\[1\].*\(T_i, 3\).*got \(2, 4\)"),
        ([np.ones(2), np.ones(2, np.float32)], None, ValueError, r"sequences\[1\].*float64.*float32"),
        ([np.ones(2), np.float64(1)], None, ValueError, r"sequences\[1\].*scalar"),
        ([np.ones(2), np.ones(5)], 4, ValueError, r"length: expected at least 5.*got 4; sequences\[1\]"),
        ([np.ones(2)], 4.0, TypeError, "length: expected an integer"),
    ],
)
def test_pad_errors(sequences, length, error, match):
    with pytest.raises(error, match=match):
        sequence.pad(sequences, length)


@pytest.mark.parametrize(
    ("xs", "lengths", "error", "match"),
    [
        (np.ones(3), np.array([1]), ValueError, "xs: expected shape"),
        (np.ones((3, 2)), np.array([1, 4]), ValueError, "lengths: expected values from 0 to T = 3.*1 to 4"),
        (np.ones((3, 2)), np.array([-1, 2]), ValueError, "from -1 to 2"),
        (np.ones((3, 2)), np.array([1]), ValueError, r"lengths: expected shape \(2,\)"),
        (np.ones((3, 2)), np.array([1.0, 2.0]), TypeError, "lengths: expected integers"),
    ],
)
def test_unpad_errors(xs, lengths, error, match):
    with pytest.raises(error, match=match):
        sequence.unpad(xs, lengths)


def test_unpad_refuses_traced_lengths():
    with pytest.raises(TypeError, match="lengths: expected known values"):
        jax.jit(sequence.unpad)(np.ones((3, 1)), np.array([1]))


# --- windows


@pytest.mark.parametrize("stride", [1, 2, 7])
@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("rest", [(), (2,), (2, 2)])
def test_windows_hold_the_documented_indices(stride, horizon, rest):
    series = data(20, *rest)
    inputs, targets = sequence.windows(series, 5, horizon, stride)
    starts = [s for s in range(0, 20, stride) if s + 5 - 1 + horizon < 20]
    assert inputs.shape == targets.shape == (5, len(starts), *rest)
    assert inputs.dtype == targets.dtype == np.float32
    for n, start in enumerate(starts):
        for t in range(5):
            np.testing.assert_array_equal(inputs[t, n], series[start + t])
            np.testing.assert_array_equal(targets[t, n], series[start + t + horizon])
        np.testing.assert_array_equal(targets[-horizon:, n], series[start + 5 : start + 5 + horizon])


@pytest.mark.smoke
def test_windows_never_look_ahead():
    # A target is always later than every input its step has seen, and none of its own value.
    inputs, targets = sequence.windows(np.arange(50), 8, 2, 3)
    seen = np.maximum.accumulate(np.asarray(inputs), axis=0)
    assert (np.asarray(targets) >= seen + 2).all()


def test_windows_use_the_whole_series_and_keep_integers():
    inputs, targets = sequence.windows(np.arange(4), 3)
    assert inputs.dtype == targets.dtype == jnp.int32
    assert inputs.tolist() == [[0], [1], [2]]
    assert targets.tolist() == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((np.arange(3), 3), ValueError, r"series: expected at least length \+ horizon = 3 \+ 1 = 4 steps, got 3"),
        ((np.arange(9), 3, 0), ValueError, "horizon: expected at least 1"),
        ((np.arange(9), 0), ValueError, "length: expected at least 1"),
        ((np.arange(9), 3, 1, 0), ValueError, "stride: expected at least 1"),
        ((np.arange(9), 3.0), TypeError, "length: expected an integer"),
        ((np.float32(3), 3), ValueError, "series: expected an array"),
    ],
)
def test_windows_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        sequence.windows(*arguments)


# --- buckets


@pytest.mark.parametrize("growth", [1.05, 1.25, 2.0])
@pytest.mark.parametrize("seeded", [False, True])
def test_buckets_cover_every_sequence_once_with_bounded_padding(growth, seeded):
    lengths = np.random.default_rng(0).integers(0, 300, 500)
    key = jax.random.key(0) if seeded else None
    batches = sequence.buckets(lengths, 16, key=key, growth=growth)
    assert sorted(np.concatenate([b.indices for b in batches])) == list(range(500))
    for indices, length in batches:
        assert type(length) is int
        assert 1 <= len(indices) <= 16
        assert (lengths[indices] <= length).all()
        assert (length <= growth * np.maximum(lengths[indices], 1)).all()
    padded = {b.length for b in batches}
    assert max(padded) == lengths.max()
    assert len(padded) <= 1 + 1 / (growth - 1) + np.log(300) / np.log(growth)
    assert len({(len(b.indices), b.length) for b in batches}) <= 2 * len(padded)


@pytest.mark.smoke
def test_buckets_inside_jit():
    key = jax.random.key(3)
    outside = sequence.buckets([4, 1, 9, 4], 2, key=key)
    inside = []
    jax.jit(lambda x: inside.extend(sequence.buckets([4, 1, 9, 4], 2, key=key)) or x)(1.0)
    assert [b.indices.tolist() for b in inside] == [b.indices.tolist() for b in outside]
    with pytest.raises(TypeError, match="key: expected a known key, got a traced one"):
        jax.jit(lambda key: len(sequence.buckets([1], 1, key=key)))(key)


def test_buckets_of_equal_lengths_are_not_padded():
    assert {b.length for b in sequence.buckets([40] * 10, 4)} == {40}


def test_buckets_shuffle_by_key_and_by_nothing_else():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    order = lambda key: [b.indices.tolist() for b in sequence.buckets(lengths, 8, key=key)]
    assert order(jax.random.key(1)) == order(jax.random.key(1))
    assert order(jax.random.key(1)) != order(jax.random.key(2))
    assert order(None) == order(None)
    assert order(jax.random.key(1)) == order(jax.random.PRNGKey(1))  # typed keys and raw ones
    plain = sequence.buckets(lengths, 8)
    assert [b.length for b in plain] == sorted(b.length for b in plain)
    assert [b.length for b in sequence.buckets(lengths, 8, key=jax.random.key(1))] != [b.length for b in plain]


def test_buckets_with_given_boundaries_and_full_batches_only():
    batches = sequence.buckets([1, 5, 6, 10, 2, 3], 2, boundaries=(5, 10), drop_remainder=True)
    assert [(b.indices.tolist(), b.length) for b in batches] == [([0, 1], 5), ([4, 5], 5), ([2, 3], 10)]
    assert len(sequence.buckets([1, 2, 3], 2, boundaries=(5,), drop_remainder=True)) == 1
    assert sequence.buckets([], 4) == []
    assert [(b.indices.tolist(), b.length) for b in sequence.buckets([0, 0], 4)] == [([0, 1], 1)]


@pytest.mark.parametrize(
    ("lengths", "arguments", "error", "match"),
    [
        ([1, 2], {"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ([[1, 2]], {}, ValueError, r"lengths: expected shape \(N,\)"),
        ([1.0, 2.0], {}, TypeError, "lengths: expected integers"),
        ([1, -2], {}, ValueError, "lengths: expected no negative length, got -2 at index 1"),
        ([1, 2], {"growth": 1.0}, ValueError, "growth: expected a factor above 1"),
        ([1, 2], {"boundaries": (2, 1)}, ValueError, "boundaries: expected ascending"),
        ([1, 7], {"boundaries": (2, 5)}, ValueError, "boundaries: expected a last length of at least 7.*index 1"),
        ([1, 7], {"boundaries": ()}, ValueError, "boundaries"),
        ([1, 7], {"key": 3}, TypeError, "key: expected a JAX key"),
    ],
)
def test_buckets_errors(lengths, arguments, error, match):
    with pytest.raises(error, match=match):
        sequence.buckets(lengths, **{"batch_size": 2, **arguments})


# --- last_valid, mean_valid, max_valid


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("rest", [(), (2,), (2, 4)])
def test_reductions_equal_a_loop_over_the_batch(name, lengths, mask, rest):
    reduce, oracle = REDUCTIONS[name]
    ys = data(5, 3, *rest) - 3  # all negative: a zero out of the padding would win the maximum
    valid = validity(lengths, mask, 5, (3,))
    actual = jax.jit(reduce)(ys, lengths, mask)
    assert actual.dtype == np.float32
    for b in range(3):
        rows = ys[valid[:, b], b]
        expected = oracle(rows) if len(rows) else np.zeros(rest)
        np.testing.assert_allclose(actual[b], expected, rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("poison", [NAN, np.inf, -np.inf])
@pytest.mark.parametrize("use_mask", [False, True])
def test_padding_changes_no_reduction_and_none_of_its_gradients(name, poison, use_mask):
    reduce, _ = REDUCTIONS[name]
    mask = MASK if use_mask else None
    valid = validity(LENGTHS, mask, 5, (3,))[..., None]
    ys, weights = data(5, 3, 2), data(3, 2, seed=1)
    poisoned = np.where(valid, ys, np.float32(poison))
    # A square makes a NaN upstream visible in the gradient, where a linear functional would not.
    loss = lambda ys: (jnp.asarray(weights) * reduce(ys, LENGTHS, mask) ** 2).sum()
    expected, gradient = jax.value_and_grad(loss)(ys)
    for array in (poisoned, np.where(valid, ys, 1e6).astype(np.float32)):
        value, actual = jax.value_and_grad(loss)(array)
        assert value == expected
        np.testing.assert_array_equal(actual, gradient)
    assert not np.asarray(gradient)[~np.broadcast_to(valid, gradient.shape)].any()
    assert np.asarray(gradient).any()


@pytest.mark.parametrize("name", REDUCTIONS)
def test_nan_at_a_valid_step_stays_in_its_own_sequence(name):
    reduce, _ = REDUCTIONS[name]
    ys = data(5, 3, 2)
    ys[2, 0] = NAN
    out = np.asarray(reduce(ys, LENGTHS))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
@pytest.mark.parametrize("time", [0, 4])
def test_reductions_of_any_batch_axes_empty_ones_too(name, batch, time):
    reduce, oracle = REDUCTIONS[name]
    ys = data(time, *batch, 2)
    lengths = np.random.default_rng(3).integers(0, time + 1, batch)
    for given in (lengths, None):
        actual = reduce(ys, given)
        assert actual.shape == (*batch, 2)
        assert np.isfinite(jax.grad(lambda ys, given=given: reduce(ys, given).sum())(ys)).all()
        for index in np.ndindex(*batch):
            rows = ys[: time if given is None else given[index], *index]
            expected = oracle(rows) if len(rows) else np.zeros(2)
            np.testing.assert_allclose(actual[index], expected, rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_vmap_equals_batch_axes(name):
    reduce, _ = REDUCTIONS[name]
    ys = data(5, 3, 2)
    np.testing.assert_allclose(jax.vmap(reduce, (1, 0, 1))(ys, LENGTHS, MASK), reduce(ys, LENGTHS, MASK), rtol=1e-6)


def test_reductions_keep_dtypes():
    for dtype in (np.int32, np.int8, bool):
        ys = np.ones((4, 2), dtype)
        assert sequence.last_valid(ys, np.array([2, 0])).dtype == dtype
        assert sequence.max_valid(ys, np.array([2, 0])).tolist() == [1, 0]
        assert sequence.max_valid(ys, np.array([2, 0])).dtype == dtype
        assert sequence.mean_valid(ys, np.array([2, 0])).dtype == np.float32
    half = jnp.ones((4, 2), jnp.bfloat16)
    for reduce, _ in REDUCTIONS.values():
        assert reduce(half, np.array([2, 0])).dtype == jnp.bfloat16


def test_mean_of_narrow_floats_is_summed_in_float32():
    # In bfloat16 the running sum of ones stops at 256.
    ys = jnp.ones((1000, 1), jnp.bfloat16)
    for lengths in (None, np.array([1000])):
        assert sequence.mean_valid(ys, lengths).tolist() == [1.0]


def test_reductions_in_double_precision(x64):
    for reduce, _ in REDUCTIONS.values():
        assert reduce(np.ones((4, 2)), np.array([2, 0])).dtype == np.float64


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize(
    ("lengths", "mask", "error", "match"),
    [
        (np.array([1, 5]), None, ValueError, "lengths: expected values from 0 to T = 4"),
        (np.array([-1, 2]), None, ValueError, "lengths: expected values from 0 to T = 4"),
        (np.array([1.0, 2.0]), None, TypeError, "lengths: expected integers"),
        (np.array([1, 2, 3]), None, ValueError, "lengths: expected shape"),
        (None, np.ones((2, 4), bool), ValueError, "mask: expected shape"),
        (None, np.ones((4, 2), int), TypeError, "mask: expected booleans"),
    ],
)
def test_reduction_errors(name, lengths, mask, error, match):
    with pytest.raises(error, match=match):
        REDUCTIONS[name][0](np.ones((4, 2, 3)), lengths, mask)


# --- resets_from_done


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_resets_follow_the_end_of_an_episode_by_one_step(batch):
    done = np.random.default_rng(0).random((9, *batch)) < 0.4
    resets, last = sequence.resets_from_done(done)
    assert resets.shape == done.shape
    assert not np.asarray(resets)[0].any()
    np.testing.assert_array_equal(resets[1:], done[:-1])
    np.testing.assert_array_equal(last, done[-1])


@pytest.mark.smoke
def test_resets_in_chunks_equal_resets_in_one_go():
    done = np.random.default_rng(0).random((10, 3)) < 0.4
    whole, last = sequence.resets_from_done(done)
    pieces, previous = [], None
    for start, stop in ((0, 4), (4, 4), (4, 5), (5, 10)):  # an empty chunk too
        resets, previous = jax.jit(sequence.resets_from_done)(done[start:stop], previous)
        pieces.append(resets)
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    np.testing.assert_array_equal(previous, last)


@pytest.mark.parametrize(
    ("done", "previous", "error", "match"),
    [
        (np.zeros((4, 2)), None, TypeError, "done: expected booleans, got float32.*done != 0"),
        (np.zeros((4, 2), bool), np.zeros(2), TypeError, "previous: expected booleans"),
        (np.zeros((4, 2), bool), np.zeros(3, bool), ValueError, r"previous: expected shape \(2,\).*got \(3,\)"),
        (np.bool_(True), None, ValueError, "done: expected shape"),
    ],
)
def test_resets_errors(done, previous, error, match):
    with pytest.raises(error, match=match):
        sequence.resets_from_done(done, previous)


# --- reverse


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("rest", [(), (2,)])
@pytest.mark.parametrize("time", [0, 5])
def test_reverse_turns_the_valid_prefix_only(batch, rest, time):
    xs = data(time, *batch, *rest)
    lengths = np.random.default_rng(1).integers(0, time + 1, batch)
    actual = np.asarray(jax.jit(sequence.reverse)(xs, lengths))
    assert actual.dtype == np.float32
    for index in np.ndindex(*batch):
        n = lengths[index]
        np.testing.assert_array_equal(actual[:n, *index], xs[:n, *index][::-1])
        np.testing.assert_array_equal(actual[n:, *index], xs[n:, *index])
    np.testing.assert_array_equal(sequence.reverse(actual, lengths), xs)
    np.testing.assert_array_equal(sequence.reverse(xs), xs[::-1])


def test_reverse_errors():
    with pytest.raises(ValueError, match="lengths: expected values from 0 to T = 4"):
        sequence.reverse(np.ones((4, 2)), np.array([5, 1]))
    with pytest.raises(ValueError, match="lengths: expected shape"):
        sequence.reverse(np.ones((4, 2)), np.array([[1, 1]]))
    with pytest.raises(TypeError, match="lengths: expected integers"):
        sequence.reverse(np.ones((4, 2)), np.array([1.0, 1.0]))
