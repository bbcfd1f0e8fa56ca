"""Batches of ragged examples: which come together, how they are padded; predictions in the order of the examples."""

import jax
import numpy as np
import pytest

import jrnn
from jrnn import training

pytestmark = pytest.mark.usefixtures("quick_compilation")


def examples(count, seed=0, most=9):
    """Triples: features (T, 2), labels (U,) of another length, and the number of the example."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(rng.integers(0, most), 2)).astype(np.float32), rng.integers(1, 5, rng.integers(1, 4)), i)
        for i in range(count)
    ]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("boundaries", [None, (2, 5, 12)])
def test_batches_hold_the_examples_and_padding_alone(drop_last, boundaries):
    data = examples(53)
    batches = training.ragged_batches(data, 8, boundaries=boundaries, padding=(0.5, -1, 0), seed=3, drop_last=drop_last)
    shapes, orders, seen = set(), [], set()
    for epoch in (0, 1, 0, 2, 3, 4):
        order = []
        for (xs, steps), (labels, counts), numbers in batches(epoch):
            shapes.add((xs.shape, labels.shape))
            assert (xs.dtype, steps.dtype, numbers.dtype) == (np.float32, np.int32, np.asarray(1).dtype)
            for column, i in enumerate(numbers):
                np.testing.assert_array_equal(xs[: steps[column], column], data[i][0])
                np.testing.assert_array_equal(labels[: counts[column], column], data[i][1])
                assert (xs[steps[column] :, column] == 0.5).all()
                assert (labels[counts[column] :, column] == -1).all()
            order += numbers.tolist()
        assert len(order) == len({*order})
        assert drop_last or len(order) == 53
        seen |= {*order}
        orders.append(order)
        assert len(batches) == len(list(batches(epoch)))
    assert orders[0] == orders[2] != orders[1]
    assert seen == {*range(53)}
    assert len(shapes) <= 3 * (2 - drop_last)
    if boundaries:
        assert {time for (time, *_), _ in shapes} <= {*boundaries}


def test_each_sequence_has_its_own_padded_length():
    """A boundary that holds those in its place in the bucket, or the longest of them where no boundary is as short."""
    lengths = [(2, 9, 3), (9, 2, 1), (20, 4, 2), (15, 8, 1)]
    data = [tuple(np.ones(n) for n in example) for example in lengths]
    shapes = [[len(xs) for xs, _ in batch] for batch in training.ragged_batches(data, 2, boundaries=(5, 10, 20))(0)]
    assert shapes == [[10, 10, 3], [20, 10, 3]]


def test_batches_are_those_of_buckets_and_pad():
    data, key = examples(40), jax.random.key(7)
    longest = [max(len(xs), len(labels)) for xs, labels, _ in data]
    bounds = np.unique(np.quantile(longest, (0.5, 0.9, 1.0), method="higher")).tolist()
    batches = training.ragged_batches(data, 8, seed=key)
    for epoch in range(3):
        wanted = jrnn.sequence.buckets(longest, 8, key=jax.random.fold_in(key, epoch), boundaries=bounds)
        for (chosen, _), ((xs, lengths), _, numbers) in zip(wanted, batches(epoch), strict=True):
            np.testing.assert_array_equal(numbers, chosen)
            for ours, theirs in zip(
                (xs, lengths), jrnn.sequence.pad([data[i][0] for i in chosen], len(xs)), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
    with_number = training.ragged_batches(data, 8, seed=7)
    assert jax.tree.all(jax.tree.map(np.array_equal, [*batches(1)], [*with_number(1)]))


def test_without_a_seed_the_order_is_kept_and_one_batch_can_hold_all():
    data = examples(7)
    ((_, _, numbers),) = training.ragged_batches(data, 7, quantiles=())(0)
    assert numbers.tolist() == [*range(7)]
    batches = training.ragged_batches(data, 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, [*batches(0)], [*batches(5)]))
    assert len(training.batches(np.zeros((2, 7)), 2)) == 4
    assert len(training.batches(np.zeros((2, 7)), 2, drop_last=True)) == 3


def test_buckets_too_small_for_a_batch_are_joined():
    lengths = [1] * 3 + [4] * 10 + [9]
    batches = training.ragged_batches(
        [(np.full(n, i), i) for i, n in enumerate(lengths)], 4, boundaries=(1, 4, 9, 20), seed=0, drop_last=True
    )
    seen = set()
    for epoch in range(20):
        for (xs, steps), numbers in batches(epoch):
            assert xs.shape == (9, 4)
            assert steps.tolist() == [lengths[i] for i in numbers]
            seen |= {*numbers.tolist()}
    assert seen == {*range(14)}
    assert len(batches) == 3


def test_arrays_that_are_no_sequences_are_stacked():
    data = [{"xs": np.zeros((n, 1)), "where": np.arange(3) + n, "empty": None} for n in (2, 5, 3)]
    (batch,) = training.ragged_batches(data, 3, quantiles=(), ragged={"xs": True, "where": False, "empty": None})(0)
    assert batch["xs"][0].shape == (5, 3, 1)
    assert batch["xs"][1].tolist() == [2, 5, 3]
    assert batch["where"][:, 0].tolist() == [2, 5, 3]
    assert batch["empty"] is None


def test_training_counts_on_the_number_of_batches_and_is_repeated():
    """`fit` of sums of ragged sequences: as many steps as there are batches; the same again, bit for bit."""
    data = [(xs, np.float32(xs.sum())) for xs, _, _ in examples(30)]
    model = jrnn.stack(jrnn.gru(3), jrnn.dense(1))

    def loss(params, batch, key):
        (xs, lengths), wanted = batch
        _, ys = jrnn.unroll(model, params, xs, lengths=lengths)
        return jrnn.losses.mse(jrnn.sequence.last_valid(ys, lengths)[:, 0], wanted)

    step = training.make_step(loss, jrnn.optimizer("adam", 1e-2))
    batches = training.ragged_batches(data, 8, seed=1, drop_last=True)
    runs = [training.fit(step, model.init(jax.random.key(0), 2), batches, epochs=3, progress=False) for _ in range(2)]
    assert int(runs[0].state.step) == 3 * len(batches)
    assert jax.tree.all(jax.tree.map(np.array_equal, runs[0].params, runs[1].params))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_predictions_come_in_the_order_of_the_examples(size):
    data = examples(23)
    traced = []

    def function(params, batch):
        (xs, _), _, numbers = batch
        traced.append(xs.shape)
        return {"twice": params * xs, "number": numbers}

    found = training.predict_ragged(function, np.float32(2), data, size, axis=1)
    for i, (row, (xs, _, _)) in enumerate(zip(found, data, strict=True)):
        assert row["number"] == i
        np.testing.assert_array_equal(row["twice"][: len(xs)], 2 * xs)
    assert len(traced) <= 3  # one for each bucket
    assert training.predict_ragged(function, 2.0, [], size) == []


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: training.ragged_batches([], 2), ValueError, "at least one, got none"),
        (lambda: training.ragged_batches([np.zeros(2)], 0), ValueError, "size"),
        (lambda: training.ragged_batches([1.0, 2.0], 2), TypeError, "a first axis, time"),
        (lambda: training.ragged_batches([np.zeros(2), (np.zeros(2),)], 2), ValueError, r"examples\[1\]: .*structure"),
        (lambda: training.ragged_batches([np.zeros((2, 3)), np.zeros((2, 4))], 2), ValueError, "got .*2, 4"),
        (lambda: training.ragged_batches([np.zeros(2), np.zeros(2, int)], 2), ValueError, "float64 .* got int64"),
        (lambda: training.ragged_batches([np.zeros(2)], 2, boundaries=(1,)), ValueError, "boundaries: .*at least 2"),
        (lambda: training.ragged_batches([np.zeros(2)], 2, quantiles=(5,)), ValueError, "quantiles: .*from 0 to 1"),
        (lambda: training.ragged_batches([np.zeros(2, int)], 2, padding=0.5), ValueError, "padding: .*int64 holds"),
        (lambda: training.ragged_batches([np.zeros(2)], 2, drop_last=True), ValueError, "at least size=2"),
        (lambda: training.ragged_batches([np.zeros(2)], 1, seed=-1), ValueError, "seed"),
        (lambda: training.ragged_batches([(np.zeros(2), np.zeros(n)) for n in (3, 4)], 2, ragged=(True, False)),
         ValueError, "stacked"),
        (lambda: training.predict_ragged(lambda p, b: b[0], 0, [np.zeros(2), np.zeros(3)], 2), ValueError, "axis="),
    ],
)  # fmt: skip
def test_bad_examples_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
