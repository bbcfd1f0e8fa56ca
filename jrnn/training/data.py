"""Data sets as batches, and the loss and the predictions of a model over a whole data set."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._core.checks import non_negative_int, positive_int
from jrnn.training.step import Step

__all__ = ["Batches", "batches", "evaluate", "predict", "prefetch"]


class Batches:
    """The batches of a data set, made anew in each epoch: what `batches` and `ragged_batches` return for `fit`.

    It is a function of the epoch's number that returns an iterator over the batches of this epoch. ``len`` is their
    number, which is the same in each epoch, so that the progress bar of `fit` knows where the run ends.

    >>> data = batches(np.arange(6.0)[:, None], 4, axis=0)
    >>> isinstance(data, Batches), len(data), [batch.shape for batch in data(0)]
    (True, 2, [(4, 1), (2, 1)])
    """

    def __call__(self, epoch: int) -> Iterator[Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _ArrayBatches(Batches):
    """See `batches`: the leaves of the data set, the axis of each that counts sequences, and their structure."""

    leaves: list[np.ndarray]
    axes: list[int]
    tree: Any
    count: int
    size: int
    seed: int | None
    drop_last: bool

    def __call__(self, epoch: int) -> Iterator[Any]:
        if self.seed is None:
            order = np.arange(self.count)
        else:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        for start in range(0, len(self) * self.size, self.size):
            chosen = order[start : start + self.size]
            yield self.tree.unflatten([np.take(x, chosen, a) for a, x in zip(self.axes, self.leaves, strict=True)])

    def __len__(self) -> int:
        return self.count // self.size if self.drop_last else -(-self.count // self.size)


def batches(data: Any, size: int, *, axis: int | Any = 1, seed: int | None = None, drop_last: bool = False) -> Batches:
    """Batches of a data set that fits into the host's memory: the ``data`` of `fit`, shuffled anew in each epoch.

    The sequences are of one length, or padded already; `ragged_batches` pads those of different lengths.

    Args:
      data: a pytree of arrays, such as ``(xs (T, N, F), lengths (N,), labels (N,))`` of N sequences.
      size: sequences a batch.
      axis: which axis of each array counts sequences: one number for all arrays, or a pytree of numbers like ``data``.
        An array with fewer axes than that counts them on its last: with the default 1, ``(T, N, F)`` and ``(N,)`` go
        together.
      seed: shuffles by this seed and the epoch's number, so that a run can be repeated and resumed; None keeps the
        order.
      drop_last: leaves out the sequences that fill no batch. Otherwise the last batch is smaller, which compiles once
        more.

    Returns:
      A function of the epoch's number that returns an iterator over batches, pytrees like ``data`` of NumPy arrays;
      its ``len`` is the number of batches in an epoch.

    Raises:
      ValueError: if arrays do not agree on N, or ``drop_last`` leaves nothing.

    >>> xs, labels = np.arange(12.0).reshape(2, 6, 1), np.arange(6)
    >>> data = batches((xs, labels), 4, seed=0)
    >>> [labels.shape for xs, labels in data(0)]
    [(4,), (2,)]
    >>> sorted(int(n) for xs, labels in data(1) for n in labels)
    [0, 1, 2, 3, 4, 5]
    """
    positive_int(size, "size")
    if seed is not None:
        non_negative_int(seed, "seed")
    tree: Any
    leaves, tree = jax.tree.flatten(data)
    if not leaves:
        raise ValueError("data: expected at least one array, got an empty tree")
    leaves = [np.asarray(leaf) for leaf in leaves]
    axes = [axis] * len(leaves) if isinstance(axis, int) else tree.flatten_up_to(axis)
    axes = [min(a, leaf.ndim - 1) for a, leaf in zip(axes, leaves, strict=True)]
    counts = {leaf.shape[a] if leaf.ndim else None for a, leaf in zip(axes, leaves, strict=True)}
    if len(counts) != 1 or None in counts:
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(
            f"data: expected arrays with equally many sequences on axes {axes}, got shapes {shapes}; say with axis= "
            "where each array counts them"
        )
    count = counts.pop()
    if not count or (drop_last and count < size):
        raise ValueError(f"data: expected at least {size if drop_last else 1} sequences, got {count}")

    return _ArrayBatches(leaves, axes, tree, count, size, seed, drop_last)


def prefetch(data: Iterable[Any], size: int = 2, *, device: Any = None) -> Iterator[Any]:
    """Batches moved to the device ahead of their turn, so that copying them overlaps with the work before.

    Args:
      data: an iterable of pytrees of arrays.
      size: how many batches to keep there.
      device: where to, as for `jax.device_put`: a device, a sharding, or a pytree of them that is a prefix of a batch,
        such as the shardings of ``(xs (T, B, F), lengths (B,))`` by B. None for JAX's default device.

    Returns:
      An iterator over the same batches as JAX arrays. In `fit`: ``lambda epoch: prefetch(data(epoch))``.

    Raises:
      ValueError, TypeError: a size below 1.

    >>> [batch.sum().item() for batch in prefetch([np.ones(2), np.ones(3)])]
    [2.0, 3.0]
    """
    positive_int(size, "size")
    return _prefetched(iter(data), size, device)


def _prefetched(data: Iterator[Any], size: int, device: Any) -> Iterator[Any]:
    waiting = collections.deque(jax.device_put(batch, device) for batch in itertools.islice(data, size))
    while waiting:
        batch = waiting.popleft()
        waiting.extend(jax.device_put(following, device) for following in itertools.islice(data, 1))
        yield batch


def evaluate(
    step: Step,
    params: Any,
    data: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    weight: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """The mean loss and the mean scalar metrics over a data set, without dropout.

    Args:
      step: from `make_step` or `tbptt_step`, for its loss function.
      params: the parameters.
      data: batches, in order; chunks for a step of `tbptt_step`. A function of the epoch's number, such as `batches`
        returns, is called with 0.
      weight: a function ``batch -> number`` that gives the weight of a batch in the mean, such as its number of
        sequences or of valid steps. None gives all batches the same weight.

    Returns:
      ``{"loss": ..., ...}``, means over the batches.

    Raises:
      ValueError: no batch, or weights that sum to zero.

    >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
    >>> step = jrnn.training.make_step(loss_fn, jrnn.optimizer("sgd", 0.1))
    >>> evaluate(step, 1.0, [np.array([1.0, 1.0]), np.array([3.0])], weight=len)["loss"]
    1.3333333333333333
    """
    return weighted_means(step, params, data, weight, "data")


def weighted_means(step: Step, params: Any, data: Any, weight: Any, argument: str) -> dict[str, float]:
    """See `evaluate`; ``argument`` is the name of ``data`` in messages."""
    carry, rows, weights = None, [], []
    for batch in of_epoch(data, 0):
        carry, metrics = step.evaluate(params, batch, carry)
        rows.append({name: x for name, x in metrics.items() if jnp.shape(x) == ()})
        weights.append(1.0 if weight is None else weight(batch))
    if not rows:
        raise ValueError(f"{argument}: expected at least one batch, got none")
    rows, numbers = jax.device_get(rows), [float(w) for w in jax.device_get(weights)]
    total = math.fsum(numbers)
    if not total > 0:
        raise ValueError(f"weight: expected weights with a positive sum, got {total:g}")
    mean = lambda name: math.fsum(w * float(row[name]) for w, row in zip(numbers, rows, strict=True)) / total
    return {name: mean(name) for name in rows[-1]}


def of_epoch(data: Any, epoch: int) -> Iterable[Any]:
    """The batches of an epoch, from a function of its number or from what is the same in every epoch."""
    return data(epoch) if callable(data) else data


def predict(
    function: Callable[[Any, Any], Any],
    params: Any,
    data: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    axis: int = 0,
) -> Any:
    """Applies a function to each batch of a data set, and joins the results on the host.

    Args:
      function: ``(params, batch) -> pytree of arrays``; compiled once for each shape of a batch.
      params: the parameters.
      data: batches, in order. A function of the epoch's number, such as `batches` returns, is called with 0: give it
        no seed, which would shuffle the results.
      axis: the axis along which the results are joined: 0 if they have one row for each sequence, 1 for outputs
        ``(T, B, ...)``, all of one length.

    Returns:
      A pytree of NumPy arrays.

    Raises:
      ValueError: no batch, or results of different shapes.

    >>> predict(lambda params, batch: params * batch, 2.0, [np.array([1.0, 2.0]), np.array([3.0])])
    array([2., 4., 6.], dtype=float32)
    """
    compiled = jax.jit(function)
    results = [jax.device_get(compiled(params, batch)) for batch in of_epoch(data, 0)]
    if not results:
        raise ValueError("data: expected at least one batch, got none")
    for result in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(result), strict=True):
            if a.ndim <= axis or np.delete(a.shape, axis).tolist() != np.delete(b.shape, axis).tolist():
                raise ValueError(
                    f"data: expected results that differ in axis {axis} alone, got shapes {a.shape} and {b.shape}; pad "
                    "sequences to one length, or take the results batch by batch"
                )
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis), *results)
