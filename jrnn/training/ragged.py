"""Batches of sequences of different lengths, and predictions for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jrnn._core.checks import non_negative_int, positive_int, prng_key
from jrnn.sequence import Bucket, buckets, laid_out
from jrnn.training.data import Batches

__all__ = ["predict_ragged", "ragged_batches"]


def ragged_batches(
    examples: Sequence[Any],
    size: int,
    *,
    quantiles: Sequence[float] = (0.5, 0.9, 1.0),
    boundaries: Sequence[int] | None = None,
    ragged: bool | Any = True,
    padding: float | Any = 0,
    seed: int | jax.Array | None = None,
    drop_last: bool = False,
) -> Batches:
    """Batches of sequences of different lengths, padded: the ``data`` of `fit`, shuffled anew in each epoch.

    Examples of similar length make a batch, so that little of it is padding, and all batches have one of few shapes,
    because each shape compiles the step once. The length of an example is that of the longest of its sequences; the
    `boundaries` divide the lengths into buckets. In a batch, a sequence is padded to a boundary: the smallest that
    holds all sequences in its place in the examples of this bucket. Where all sequences in one place are shorter than
    the first boundary, such as a few labels beside a long recording, they are padded to the longest of them.

    Args:
      examples: N pytrees of one structure, such as tuples ``(letters (T_i,), phonemes (U_i,), label)``. An array with
        axes is a sequence, its first axis is time; it may be longer or shorter than the others of the same example. A
        number, or an array without axes, is one value for each example.
      size: examples in a batch.
      quantiles: the boundaries are these quantiles of the lengths, from 0 to 1, 1 always included. By default half of
        the examples are padded to at most the median length. Fewer quantiles mean fewer shapes and more padding.
      boundaries: the boundaries themselves, ascending lengths, instead of `quantiles`, so that several data sets can
        have the same shapes. The last must hold the longest sequence.
      ragged: which arrays with axes are sequences: True for all, or a pytree of booleans like an example (or a prefix
        of one). The others are of one shape, and are stacked.
      padding: the value in the padding: one number, or a pytree of numbers like an example (or a prefix of one).
      seed: shuffles by this number, or JAX key, and the epoch's number, so that a run can be repeated and resumed: the
        examples within their bucket, and the order of the batches. None keeps the order, shortest bucket first.
      drop_last: leaves out the examples of a bucket that fill no batch: in the next epoch these are others. A bucket
        with fewer than ``size`` examples is joined with the next one, so that all examples come in some epoch.
        Otherwise the last batch of each bucket is smaller, which compiles once more.

    Returns:
      A function of the epoch's number that returns an iterator over batches; its ``len`` is the number of batches in
      an epoch. A batch is a pytree like an example: in the place of a sequence the pair ``(xs (T, B, ...), lengths
      (B,))``, as from `jrnn.sequence.pad`; in the place of anything else an array ``(B, ...)``. All are NumPy arrays.

    Raises:
      ValueError: no examples, or examples that differ in structure, dtypes or features; `boundaries` or `quantiles`
        out of range; no batch is left by `drop_last`.
      TypeError: a size or seed that is no integer; no array in an example is a sequence.

    >>> words = [np.array([3, 4]), np.array([5]), np.array([6, 7, 8]), np.array([9, 1])]
    >>> data = ragged_batches([(ids, len(ids) % 2) for ids in words], 2, quantiles=(0.5, 1.0))
    >>> for (ids, lengths), odd in data(0):
    ...     print(ids.T.tolist(), lengths, odd)
    [[3, 4], [5, 0]] [2 1] [0 1]
    [[9, 1]] [2] [0]
    [[6, 7, 8]] [3] [1]
    >>> len(data)
    3
    """
    positive_int(size, "size")
    if seed is not None and not isinstance(seed, jax.Array):
        non_negative_int(seed, "seed")
        seed = jax.random.key(seed)
    if seed is not None:
        prng_key(seed, "seed")
    columns, tree = _columns(examples)
    timed = [bool(flag) and column[0].ndim > 0 for flag, column in zip(_spread(ragged, tree), columns, strict=True)]
    if not any(timed):
        raise TypeError("examples: expected at least one array with a first axis, time, in each example, got none")
    fills = [_fill(x, column[0].dtype) for x, column in zip(_spread(padding, tree), columns, strict=True)]
    _check_columns(columns, timed)

    lengths = np.array([[len(x) for x in c] for c, flag in zip(columns, timed, strict=True) if flag], np.int64).T
    longest = lengths.max(axis=1)
    if boundaries is None:
        found = np.quantile(longest, [*map(_quantile, quantiles), 1.0], method="higher")
        bounds = np.unique(np.maximum(found, 1)).astype(int).tolist()
    else:
        bounds = list(boundaries)
    buckets(longest, size, boundaries=bounds)  # checks the boundaries
    if drop_last:
        if len(longest) < size:
            raise ValueError(f"examples: expected at least size={size} with drop_last, got {len(longest)}")
        bounds = _joined(bounds, longest, size)
    bucket_of, steps = np.searchsorted(bounds, longest), {}
    in_all = lengths.max(axis=0)
    for i, bound in enumerate(bounds):
        in_bucket = lengths[bucket_of == i].max(axis=0, initial=0)
        rounded = np.array(bounds)[np.searchsorted(bounds, in_bucket)]
        found = iter(np.where(in_all < bounds[0], in_all, rounded).tolist())
        steps[bound] = [next(found) if flag else None for flag in timed]
    return _RaggedBatches(columns, tree, fills, longest, steps, size, seed, drop_last)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _RaggedBatches(Batches):
    """See `ragged_batches`. Each column holds the arrays that stand in one place of the examples.

    ``steps`` maps the boundary of a bucket to the padded length of each column; None where it is no sequence.
    """

    columns: list[list[np.ndarray]]
    tree: Any
    fills: list[Any]
    lengths: np.ndarray
    steps: dict[int, list[int | None]]
    size: int
    key: jax.Array | None
    drop_last: bool

    def __call__(self, epoch: int) -> Iterator[Any]:
        return map(self.batch, self.order(epoch))

    def __len__(self) -> int:
        return len(self.order(None))

    def order(self, epoch: int | None) -> list[Bucket]:
        """Which examples are in each batch of an epoch; in the order given where that is None."""
        key = None if self.key is None or epoch is None else jax.random.fold_in(self.key, epoch)
        return buckets(self.lengths, self.size, key=key, boundaries=[*self.steps], drop_remainder=self.drop_last)

    def batch(self, bucket: Bucket) -> Any:
        steps = self.steps[bucket.length]
        parts = zip(self.columns, steps, self.fills, strict=True)
        return self.tree.unflatten([_batch([c[i] for i in bucket.indices], time, fill) for c, time, fill in parts])


def predict_ragged(
    function: Callable[[Any, Any], Any],
    params: Any,
    examples: Sequence[Any],
    size: int,
    *,
    axis: int = 0,
    quantiles: Sequence[float] = (0.5, 0.9, 1.0),
    boundaries: Sequence[int] | None = None,
    ragged: bool | Any = True,
    padding: float | Any = 0,
) -> list[Any]:
    """Applies a function to sequences of different lengths, in padded batches, and returns the results in their order.

    Args:
      function: ``(params, batch) -> pytree of arrays``, for batches as from `ragged_batches`. It is compiled once for
        each bucket: a batch that does not fill up is filled with examples that it has already.
      params: the parameters.
      examples: see `ragged_batches`.
      size: examples in a batch.
      axis: the axis of the results that counts examples; an array with fewer axes counts them on its last. So 1 serves
        outputs ``(T, B, ...)`` beside ``(B,)``.
      quantiles, boundaries, ragged, padding: see `ragged_batches`.

    Returns:
      A list with a pytree of NumPy arrays for each example, without the axis that counted them. Arrays with a time axis
      are as long as the batch that the example was in.

    Raises:
      ValueError, TypeError: see `ragged_batches`; results without a row for each example.

    >>> words = [np.array([3, 4]), np.array([5]), np.array([6, 7, 8])]
    >>> def last(params, batch):
    ...     xs, lengths = batch
    ...     return params * jrnn.sequence.last_valid(xs, lengths)
    >>> [int(x) for x in predict_ragged(last, 10, words, 2)]
    [40, 50, 80]
    """
    positive_int(size, "size")
    if len(examples) == 0:
        return []
    size = min(size, len(examples))
    options: Any = dict(quantiles=quantiles, boundaries=boundaries, ragged=ragged, padding=padding)
    data: Any = ragged_batches(examples, size, **options)
    compiled, found = jax.jit(function), [None] * len(examples)
    for chosen, length in data.order(None):
        result = jax.device_get(compiled(params, data.batch(Bucket(np.resize(chosen, size), length))))
        leaves, tree = jax.tree.flatten(result)
        axes = [min(axis, np.ndim(leaf) - 1) for leaf in leaves]
        for leaf, place in zip(leaves, axes, strict=True):
            if place < 0 or leaf.shape[place] != size:
                raise ValueError(
                    f"function: expected results with {size} rows on axis {axis}, one for each example of the batch, "
                    f"got shape {np.shape(leaf)}; say with axis= where they are"
                )
        for row, i in enumerate(chosen):
            rows = [np.take(x, row, place) for x, place in zip(leaves, axes, strict=True)]
            found[i] = jax.tree.unflatten(tree, rows)
    return found


def _columns(examples: Sequence[Any]) -> tuple[list[list[np.ndarray]], Any]:
    """The arrays that stand in each place of the examples, and the structure of one example."""
    if len(examples) == 0:
        raise ValueError("examples: expected at least one, got none")
    tree: Any = jax.tree.structure(examples[0])
    rows = []
    for i, example in enumerate(examples):
        leaves, found = jax.tree.flatten(example)
        if found != tree:
            raise ValueError(f"examples[{i}]: expected the structure of examples[0], {tree}, got {found}")
        rows.append([np.asarray(leaf) for leaf in leaves])
    return [list(column) for column in zip(*rows, strict=True)], tree


def _check_columns(columns: list[list[np.ndarray]], timed: list[bool]) -> None:
    """Raises unless the arrays in each place differ in their number of steps only."""
    for place, (column, flag) in enumerate(zip(columns, timed, strict=True)):
        kind = lambda x, flag=flag: (x.dtype, x.ndim, x.shape[flag:])
        for i, array in enumerate(column):
            if kind(array) != kind(column[0]):
                may = "arrays may differ in their first axis (time) only" if flag else "they are stacked"
                raise ValueError(
                    f"examples[{i}]: expected array {place} of it to be like that of examples[0], {column[0].dtype} of "
                    f"shape {column[0].shape}, got {array.dtype} of shape {array.shape}; {may}"
                )


def _spread(prefix: Any, tree: Any) -> list[Any]:
    """A value for each leaf of a tree, from a prefix of it."""
    return jax.tree.leaves(jax.tree.broadcast(prefix, jax.tree.unflatten(tree, [0] * tree.num_leaves)))


def _fill(value: Any, dtype: np.dtype) -> Any:
    with np.errstate(all="ignore"):
        cast = np.asarray(value).astype(dtype)
    if cast.ndim or not np.array_equal(cast, np.asarray(value), equal_nan=cast.dtype.kind == "f"):
        raise ValueError(f"padding: expected a number that {dtype} holds, got {value!r}")
    return cast


def _quantile(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"quantiles: expected numbers from 0 to 1, got {value!r}; lengths are given as boundaries=")
    return float(value)


def _joined(bounds: list[int], lengths: np.ndarray, size: int) -> list[int]:
    """The boundaries without those whose buckets would not fill one batch."""
    bounds = list(bounds)
    while len(bounds) > 1:
        counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
        few = [i for i, count in enumerate(counts) if 0 < count < size]
        if not few:
            break
        # The longest bucket has none after it to be joined with, so the one before it goes.
        bounds.pop(few[0] if few[0] < len(bounds) - 1 else few[0] - 1)
    return bounds


def _batch(arrays: list[np.ndarray], time: int | None, fill: Any) -> Any:
    """``(xs, lengths)`` of sequences, padded on the host; a stack of anything else."""
    if time is None:
        return np.stack(arrays)
    return laid_out(arrays, time, fill), np.array([len(array) for array in arrays], np.int32)
