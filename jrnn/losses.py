"""Losses, penalties and metrics, each a mean over valid elements only.

Legend: T time, B batch (any number of leading batch axes, or none), F features, C classes. Sequences are
time-major, `(T, *B, ...)`. These conventions hold throughout:

- Shapes must agree exactly. `(T, B, 1)` against `(T, B)` is an error, never a silent broadcast to `(T, B, B)`.
- `mask` is boolean, true where an element counts, and may cover only the leading axes: `(T, *B)` goes with
  `(T, *B, F)`. For lengths, make it with `jrnn.sequence.valid_steps(lengths, None, T, batch_shape)`.
- The mean is over elements: long sequences weigh more than short ones. If nothing is valid it is 0, with zero
  gradients, so that an empty batch changes nothing.
- Elements where the mask is false, NaN and infinity included, change neither the value nor any gradient.
- Shapes and dtypes are always checked. Values (class ids, lengths) are checked where the host can read them at once: in
  NumPy arrays, lists, and arrays on a CPU; not where they are traced, or lie on an accelerator.
- Arithmetic and the result are float32 for inputs of float32 and below, float64 for float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jrnn._core.checks import readable
from jrnn._core.devices import batch_spec, is_placed, placed
from jrnn.sequence import _booleans, _check_lengths, _integers, _known_steps, _trailing, valid_steps

__all__ = [
    "accuracy",
    "binary_cross_entropy",
    "bits_per_character",
    "cross_entropy",
    "ctc",
    "l1",
    "l2",
    "mae",
    "mse",
    "perplexity",
    "pinball",
]

Path = tuple[str | int, ...]

# Which leaves of a cell's parameters act on the state, on the input, or on neither.
_GROUPS = {"recurrent": ("w_hh",), "input": ("w_ih",), "bias": ("b", "b_hn", "b_o")}


def mse(predictions: ArrayLike, targets: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Mean squared error, `mean((predictions - targets)**2)` over valid elements.

    Args:
      predictions: `(T, *B, ...)` floats.
      targets: like `predictions`; integers are taken as floats.
      mask: booleans over the leading axes of `predictions`, `(T, *B)` usually; None: every element counts.

    Returns:
      A scalar; 0 if no element is valid.

    Raises:
      TypeError: `predictions` are not floats, or `mask` is not boolean.
      ValueError: shapes that do not agree.

    >>> print(mse(np.array([1.0, 2.0, np.nan]), np.array([0.0, 0.0, 0.0]), np.array([True, True, False])))
    2.5
    """
    predicted, wanted, valid = _elementwise("predictions", predictions, "targets", targets, mask)
    return _mean(optax.losses.squared_error(predicted, wanted), valid)


def mae(predictions: ArrayLike, targets: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Mean absolute error, `mean(|predictions - targets|)` over valid elements; slope 0 where they are equal.

    Args:
      predictions: `(T, *B, ...)` floats.
      targets: like `predictions`; integers are taken as floats.
      mask: booleans over the leading axes of `predictions`, `(T, *B)` usually; None: every element counts.

    Returns:
      A scalar; 0 if no element is valid.

    Raises:
      TypeError: `predictions` are not floats, or `mask` is not boolean.
      ValueError: shapes that do not agree.

    >>> print(mae(np.array([1.0, 2.0]), np.array([0.0, 0.0])))
    1.5
    """
    predicted, wanted, valid = _elementwise("predictions", predictions, "targets", targets, mask)
    return _mean(_absolute(predicted - wanted), valid)


def pinball(
    predictions: ArrayLike, targets: ArrayLike, quantiles: Sequence[float], mask: ArrayLike | None = None
) -> jax.Array:
    """Pinball (quantile) loss: the predictions that minimise it are quantiles of the targets (Koenker & Bassett 1978)::

        mean(max(q * (targets - predictions), (q - 1) * (targets - predictions)))

    over valid elements and quantiles q. For q = 0.5 it is half the absolute error, whose best prediction is the median;
    two quantiles, such as 0.1 and 0.9, bound an interval that holds 80% of the targets. Where a prediction equals its
    target, the slope is the mean of those on both sides.

    Args:
      predictions: `(T, *B, ..., Q)` floats, one prediction for each quantile on the last axis.
      targets: `(T, *B, ...)`, the shape of `predictions` without the last axis; integers are taken as floats.
      quantiles: Q numbers above 0 and below 1.
      mask: booleans over the leading axes of `targets`, `(T, *B)` usually; None: every element counts.

    Returns:
      A scalar; 0 if no element is valid.

    Raises:
      TypeError: `predictions` are not floats, or `mask` is not boolean.
      ValueError: shapes that do not agree, or a quantile out of range.

    >>> print(pinball(np.array([[1.0, 1.0]]), np.array([3.0]), (0.5, 0.75)), (0.5 * 2 + 0.75 * 2) / 2)
    1.25 1.25
    """
    values = np.asarray(quantiles, np.float64)
    if values.ndim != 1 or not values.size or not ((values > 0) & (values < 1)).all():
        raise ValueError(f"quantiles: expected a sequence of numbers above 0 and below 1, got {quantiles}.")
    predicted, wanted = _float("predictions", predictions), jnp.asarray(targets)
    if predicted.ndim == 0 or predicted.shape[-1] != values.size:
        raise ValueError(
            f"predictions: expected one prediction for each of {values.size} quantiles on the last axis, got shape "
            f"{predicted.shape}."
        )
    if wanted.shape != predicted.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {predicted.shape[:-1]}, that of predictions without the axis of quantiles, got "
            f"{wanted.shape}."
        )
    valid = _valid(mask, wanted.shape, "targets")
    wanted = jnp.broadcast_to(wanted[..., None], predicted.shape)
    predicted, wanted, valid = _elementwise("predictions", predicted, "targets", wanted, valid)
    error = wanted - predicted
    q = jnp.asarray(values, error.dtype).reshape((1,) * (error.ndim - 1) + (-1,))
    half = jnp.asarray(0.5, error.dtype)
    return _mean(half * _absolute(error) + (q - half) * error, valid)


def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross-entropy in nats, `mean(-sum_c q_c log p_c)` with `p = softmax(logits)`, over valid elements.

    `q` is the labels' distribution, `(1 - s) q + s / C` with `label_smoothing` s (Szegedy et al. 2016, Rethinking
    the Inception Architecture for Computer Vision).

    Args:
      logits: `(T, *B, C)` floats.
      labels: class ids, `(T, *B)` integers from 0 to C - 1, or probabilities, `(T, *B, C)` floats that sum to one
        over the last axis.
      mask: booleans over the leading axes of `logits` without the last, `(T, *B)` usually; None: all count.
      label_smoothing: s, from 0 to 1.

    Returns:
      A scalar; 0 if no element is valid. A class id out of range that is not checked gives NaN.

    Raises:
      TypeError: `logits` are not floats, `labels` neither integers nor floats, or `mask` is not boolean.
      ValueError: shapes that do not agree, a class id out of range at a valid element, or `label_smoothing` out of
        range.

    >>> logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> print(jnp.round(cross_entropy(logits, np.array([0, 2])), 4), -(np.log(0.5) + np.log(0.8)) / 2)
    0.4581 0.458145...
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}.")
    scores, wanted, valid = _classification(logits, labels, mask)
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        values = optax.losses.softmax_cross_entropy_with_integer_labels(scores, wanted)
    else:
        values = optax.losses.safe_softmax_cross_entropy(scores, wanted)
    if label_smoothing:
        # The same as smoothed labels, without C probabilities for each class id.
        uniform = -jax.nn.log_softmax(scores).mean(-1)
        values = (1 - label_smoothing) * values + label_smoothing * uniform
    return _mean(values, valid)


def binary_cross_entropy(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Sigmoid cross-entropy in nats, `mean(-q log p - (1 - q) log(1 - p))` with `p = sigmoid(logits)`.

    Each feature is a binary decision of its own.

    Args:
      logits: `(T, *B, ...)` floats.
      labels: like `logits`: booleans, 0 and 1, or probabilities.
      mask: booleans over the leading axes of `logits`, `(T, *B)` usually; None: every element counts.

    Returns:
      A scalar; 0 if no element is valid.

    Raises:
      TypeError: `logits` are not floats, or `mask` is not boolean.
      ValueError: shapes that do not agree.

    >>> print(jnp.round(binary_cross_entropy(np.array([0.0, 0.0]), np.array([True, False])), 4))
    0.6931
    """
    scores, wanted, valid = _elementwise("logits", logits, "labels", labels, mask)
    return _mean(optax.losses.sigmoid_binary_cross_entropy(scores, wanted), valid)


def ctc(
    logits: ArrayLike,
    lengths: ArrayLike,
    labels: ArrayLike,
    label_lengths: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    blank: int = 0,
) -> jax.Array:
    """Connectionist temporal classification (Graves et al. 2006): labels without the steps at which they occur.

    The loss of a sequence is the negative log-probability of all ways to write its labels as T symbols, in which
    blanks are removed and equal neighbours are merged, unless a blank separates them. The result is the mean over
    sequences.

    Args:
      logits: `(T, *B, C)` floats, the blank among the C classes.
      lengths: `(*B,)` integers, valid steps of `logits`.
      labels: `(N, *B)` integers, none of them `blank`, with time first, as `jrnn.sequence.pad` returns them.
      label_lengths: `(*B,)` integers, valid steps of `labels`.
      mask: `(*B,)` booleans, which sequences count; None: all.
      blank: the class id of the blank.

    Returns:
      A scalar; 0 if no sequence is valid. Infinity, with zero gradients from that sequence, where a sequence cannot
      spell its labels: because it is too short (it needs one step a label, and one more between equal neighbours), or
      because logits that it needs are minus infinity. Leave such sequences out by `mask`. A traced label that is out of
      range, or the blank, gives NaN.

    Raises:
      TypeError: `logits` are not floats, `lengths`, `labels` or `label_lengths` not integers, `mask` not boolean.
      ValueError: shapes that do not agree, or lengths or labels out of range.

    >>> logits = np.zeros((2, 1, 3), np.float32)  # two steps, three classes, all equally likely
    >>> loss = ctc(logits, np.array([2]), np.array([[1]]), np.array([1]))
    >>> print(jnp.round(jnp.exp(-loss), 4), 3 / 9)  # 1 1, 1 blank, blank 1
    0.3333 0.3333333333333333
    """
    scores, spelling = _float("logits", logits), _integers("labels", labels)
    if scores.ndim < 2:
        raise ValueError(f"logits: expected shape (T, *B, C), got {scores.shape}.")
    time, batch, classes = scores.shape[0], scores.shape[1:-1], scores.shape[-1]
    if spelling.ndim == 0 or spelling.shape[1:] != batch:
        raise ValueError(f"labels: expected shape (N, *B) with *B = {batch}, got {spelling.shape}.")
    most = spelling.shape[0]
    _check_lengths(lengths, time, batch)
    _check_lengths(label_lengths, most, batch, "label_lengths", "N")
    counted = jnp.ones(batch, bool) if mask is None else _booleans("mask", mask)
    if counted.shape != batch:
        raise ValueError(f"mask: expected shape {batch}, (*B,), one for each sequence, got {counted.shape}.")
    if isinstance(blank, bool) or not isinstance(blank, int | np.integer) or not 0 <= blank < classes:
        raise ValueError(f"blank: expected a class id from 0 to C - 1 = {classes - 1}, got {blank!r}.")
    if readable(labels, label_lengths, mask):
        used = _known_steps(label_lengths, None if mask is None else np.asarray(mask)[None], most, batch)
        _check_class_ids(labels, used, classes)
        if (used & (np.asarray(labels) == blank)).any():
            raise ValueError(f"labels: expected none to be the blank, {blank}; shift them, or choose another blank.")

    (scores,) = _widen(scores)
    arrays = (scores, jnp.asarray(lengths), spelling, jnp.asarray(label_lengths), counted)
    run = functools.partial(_ctc, blank=int(blank))
    if any(map(is_placed, arrays)):  # Optax's loop has no types for arrays that lie over a mesh
        run = jax.sharding.auto_axes(run, out_sharding=PartitionSpec())
    return run(*arrays)


def l1(params: Any, select: str | Sequence[str] | Callable[[Path], bool] | None = None) -> jax.Array:
    """The sum of absolute values of chosen parameters; scale it and add it to a loss.

    Args:
      params: a pytree of arrays.
      select: which leaves:

        - None: every floating leaf;
        - `"recurrent"` (`w_hh`), `"input"` (`w_ih`) or `"bias"` (`b`, `b_hn`, `b_o`);
        - any other name, or several: the leaves whose own key that is, `"w"` or `("w", "w_ih")`;
        - a function of a leaf's path, such as `(1, "forward", "w_hh")` in a stack.

    Returns:
      A scalar, summed in float32 at least; zero gradient where a parameter is 0.

    Raises:
      ValueError: `select` matches no leaf; usually a name is misspelt.
      TypeError: `select` is none of these.

    >>> params = ({"w_hh": np.array([[-1.0, 2.0]]), "b": np.array([5.0])}, {"w": np.array([10.0])})
    >>> print(l1(params), l1(params, "recurrent"), l1(params, ("w", "b")), l1(params, lambda path: path[0] == 0))
    18.0 3.0 15.0 8.0
    """
    return _total(params, select, _absolute)


def l2(params: Any, select: str | Sequence[str] | Callable[[Path], bool] | None = None) -> jax.Array:
    """The sum of squares of chosen parameters (no factor 1/2); scale it and add it to a loss.

    Args:
      params: a pytree of arrays.
      select: which leaves, as for `l1`.

    Returns:
      A scalar, summed in float32 at least.

    Raises:
      ValueError: `select` matches no leaf.
      TypeError: `select` is neither None, names, nor a function.

    >>> print(l2({"w_hh": np.array([[-1.0, 2.0]]), "b": np.array([5.0])}, "recurrent"))
    5.0
    """
    return _total(params, select, optax.losses.squared_error)


def accuracy(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """The fraction of valid elements whose most likely class is the label (of equal logits, the first).

    Args:
      logits: `(T, *B, C)` floats.
      labels: `(T, *B)` integer class ids, or `(T, *B, C)` probabilities, whose largest is the label.
      mask: booleans over the leading axes of `logits` without the last; None: every element counts.

    Returns:
      A scalar from 0 to 1; 0 if no element is valid. As in `cross_entropy`, a class id out of range that cannot be
      seen while tracing gives NaN.

    Raises:
      TypeError, ValueError: as `cross_entropy`.

    >>> print(accuracy(np.array([[2.0, 1.0], [3.0, 4.0]]), np.array([0, 0])))
    0.5
    """
    scores, wanted, valid = _classification(logits, labels, mask)
    if not jnp.issubdtype(wanted.dtype, jnp.integer):
        wanted = jnp.argmax(wanted, -1)
    right = jnp.argmax(scores, -1).astype(jnp.int32) == wanted.astype(jnp.int32)
    # A row with NaN has no most likely class; argmax would name the first NaN.
    right &= ~jnp.isnan(scores).any(-1)
    values = jnp.where(wanted == scores.shape[-1], jnp.nan, right.astype(scores.dtype))
    return _mean(values, valid)


def perplexity(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """`exp(cross_entropy)`: how many equally likely classes would be as hard to guess from.

    Over several batches, average the cross-entropies, weighted by their valid elements, and take `exp` at the end.

    Args:
      logits: `(T, *B, C)` floats.
      labels: `(T, *B)` integer class ids, or `(T, *B, C)` probabilities.
      mask: booleans over the leading axes of `logits` without the last; None: every element counts.

    Returns:
      A scalar, at least 1; 1 if no element is valid.

    Raises:
      TypeError, ValueError: as `cross_entropy`.

    >>> print(jnp.round(perplexity(np.zeros((5, 8)), np.arange(5)), 3))
    8.0
    """
    return jnp.exp(cross_entropy(logits, labels, mask))


def bits_per_character(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Cross-entropy in bits: `cross_entropy / log(2)`, the bits that a compressor would spend on each symbol.

    Args:
      logits: `(T, *B, C)` floats.
      labels: `(T, *B)` integer class ids, or `(T, *B, C)` probabilities.
      mask: booleans over the leading axes of `logits` without the last; None: every element counts.

    Returns:
      A scalar; 0 if no element is valid.

    Raises:
      TypeError, ValueError: as `cross_entropy`.

    >>> print(jnp.round(bits_per_character(np.zeros((5, 8)), np.arange(5))))
    3.0
    """
    return cross_entropy(logits, labels, mask) / math.log(2)


def _absolute(x: jax.Array) -> jax.Array:
    """`|x|` with slope 0 at 0, where `jnp.abs` has slope 1: exact predictions and zero weights get no gradient."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean over elements where the mask, which may lack trailing axes, is true; 0 if there are none."""
    if mask is None:
        return values.sum() / max(values.size, 1)
    each = math.prod(values.shape[mask.ndim :])
    kept = jnp.where(_trailing(mask, values.ndim), values, jnp.zeros((), values.dtype))
    # A product in floating point: the number of elements may be past int32.
    count = jnp.maximum(mask.sum(dtype=jnp.int32), 1).astype(values.dtype) * max(each, 1)
    return kept.sum() / count


def _elementwise(
    first: str, predictions: ArrayLike, second: str, targets: ArrayLike, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checked predictions and targets of one shape and dtype, zeros where the mask is false, and the mask."""
    a, b = _float(first, predictions), jnp.asarray(targets)
    if a.shape != b.shape:
        raise ValueError(
            f"{second}: expected shape {a.shape}, that of {first}, got {b.shape}; nothing is broadcast, so add or "
            f"remove the axis that differs, as in `{second}[..., None]` or `{first}[..., 0]`."
        )
    a, b = _together(a.ndim, a, b)
    valid = _valid(mask, a.shape, first)
    a, b = _masked(valid, *_widen(a, b))
    return a, b, valid


def _classification(
    logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checked logits and labels, int32 class ids or probabilities, zeros where the mask is false, and the mask."""
    scores, wanted = _float("logits", logits), jnp.asarray(labels)
    if scores.ndim == 0:
        raise ValueError("logits: expected shape (T, *B, C), got a scalar.")
    leading, classes = scores.shape[:-1], scores.shape[-1]
    valid = _valid(mask, leading, "logits without their last axis")
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        if wanted.shape != leading:
            raise ValueError(
                f"labels: expected shape {leading}, one class id for each row of logits {scores.shape}, got "
                f"{wanted.shape}; probabilities of the classes must be floats."
            )
        if readable(labels, mask):
            used = np.array(True) if mask is None else np.asarray(mask)
            _check_class_ids(labels, used.reshape(used.shape + (1,) * (wanted.ndim - used.ndim)), classes)
        (scores,) = _widen(scores)
        wanted = _class_ids(wanted, classes)
    elif jnp.issubdtype(wanted.dtype, jnp.floating):
        if wanted.shape != scores.shape:
            raise ValueError(
                f"labels: expected shape {scores.shape}, that of logits, for probabilities, got {wanted.shape}; class "
                f"ids must be integers."
            )
        scores, wanted = _widen(scores, wanted)
    else:
        raise TypeError(f"labels: expected integer class ids or float probabilities, got {wanted.dtype}.")
    scores, wanted = _masked(valid, *_together(len(leading), scores, wanted))
    return scores, wanted, valid


def _together(ndim: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays whose first `ndim` axes lie alike over the devices of a mesh."""
    return placed(arrays, batch_spec(ndim, states=arrays), 0)


def _valid(mask: ArrayLike | None, shape: tuple[int, ...], name: str) -> jax.Array | None:
    if mask is None:
        return None
    array = _booleans("mask", mask)
    if array.shape != shape[: array.ndim]:
        raise ValueError(
            f"mask: expected the leading axes of {shape}, the shape of {name}, got {array.shape}; a mask has no "
            f"feature axis of size 1, and is time-major."
        )
    return array


def _masked(mask: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Zeros where the mask is false: before the loss is taken, so that nothing can leak into a gradient."""
    if mask is None:
        return arrays
    return tuple(jnp.where(_trailing(mask, a.ndim), a, jnp.zeros((), a.dtype)) for a in arrays)


def _check_class_ids(labels: ArrayLike, used: np.ndarray, classes: int) -> None:
    values = np.asarray(labels)
    wrong = used & ((values < 0) | (values >= classes))
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"labels: expected class ids from 0 to C - 1 = {classes - 1}, got {values[index]} at index {index}; mask "
            f"out what is padding."
        )


def _class_ids(labels: jax.Array, classes: int) -> jax.Array:
    """The labels as int32, with `classes`, which is no class, in the place of every id out of range.

    Without this, -1, a common mark of padding, would silently be the last class, because indices count from the end.
    """
    # The labels are compared in their own type: as int32, a uint32 of 2**32 - 1 would be -1. Their own type may be
    # unable to represent -1 or `classes`.
    limits = jnp.iinfo(labels.dtype)
    ids = jnp.clip(labels, max(limits.min, -1), min(limits.max, classes)).astype(jnp.int32)
    return jnp.where(ids < 0, classes, ids)


@functools.partial(jax.jit, static_argnames="blank")
def _ctc(
    scores: jax.Array,
    lengths: jax.Array,
    spelling: jax.Array,
    label_lengths: jax.Array,
    counted: jax.Array,
    *,
    blank: int,
) -> jax.Array:
    time, batch, classes, most = scores.shape[0], scores.shape[1:-1], scores.shape[-1], spelling.shape[0]
    # Padding is replaced by zeros before any arithmetic, because the gradient through NaN is NaN.
    valid = counted[None] & jnp.asarray(valid_steps(lengths, None, time, batch))
    labelled = counted[None] & jnp.asarray(valid_steps(label_lengths, None, most, batch))
    scores = jnp.where(valid[..., None], scores, jnp.zeros((), scores.dtype))
    ids = jnp.where(labelled, _class_ids(spelling, classes), blank)
    unknown = (labelled & ((ids == classes) | (ids == blank))).any(0)

    # The states of an alignment after some steps, for n = 0 .. N labels spelled: `blanks[n]`, the last step was a blank
    # (or there was no step yet), and `emits[n - 1]`, the last step was label n. Both are log-probabilities, and minus
    # infinity, exactly, where no alignment leads there. They have the label axis last, as the scores have the classes.
    ids = jnp.moveaxis(jnp.minimum(ids, classes - 1), 0, -1)
    logp = jax.nn.log_softmax(scores)
    emissions = jnp.take_along_axis(logp, ids[None], -1)
    repeats = jnp.concatenate([jnp.zeros((*batch, 1), bool), ids[..., 1:] == ids[..., :-1]], -1)[..., :most]
    nothing = jnp.full((*batch, 1), -jnp.inf, scores.dtype)

    def spelled(blanks: jax.Array, emits: jax.Array) -> jax.Array:
        """The states with n labels spelled, whatever the last step was."""
        return _log_add(blanks, jnp.concatenate([nothing, emits], -1))

    def step(states: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
        (blanks, emits), (blank_score, emission, here) = states, x
        both = spelled(blanks, emits)
        # Between two equal labels a blank must stand; without it the second would merge with the first.
        before = jnp.where(repeats, blanks[..., :-1], both[..., :-1])
        after = both + blank_score[..., None], _log_add(emits, before) + emission
        return jax.tree.map(functools.partial(jnp.where, here[..., None]), after, states), None

    emits = jnp.full((*batch, most), -jnp.inf, scores.dtype)
    blanks = jnp.concatenate([jnp.zeros_like(nothing), emits], -1)
    states, _ = jax.lax.scan(step, (blanks, emits), (logp[..., blank], emissions, valid))
    count = labelled.sum(0, dtype=jnp.int32)[..., None]
    values = -jnp.take_along_axis(spelled(*states), count, -1)[..., 0]
    return _mean(jnp.where(unknown, jnp.nan, values), counted)


def _log_add(a: jax.Array, b: jax.Array) -> jax.Array:
    """`log(exp(a) + exp(b))`; where both are minus infinity, so is the result, with zero gradients.

    The gradient of `jnp.logaddexp` is NaN there.
    """
    largest = jax.lax.stop_gradient(jnp.maximum(a, b))
    impossible = largest == -jnp.inf
    largest = jnp.where(impossible, jnp.zeros((), a.dtype), largest)
    total = jnp.exp(a - largest) + jnp.exp(b - largest)
    return jnp.where(impossible, -jnp.inf, largest + jnp.log(jnp.where(impossible, jnp.ones((), a.dtype), total)))


def _total(params: Any, select: Any, penalty: Callable[[jax.Array], jax.Array]) -> jax.Array:
    leaves = [
        (tuple(_entry(key) for key in path), jnp.asarray(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    if select is None:
        chosen = [leaf for _, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    else:
        chosen = [leaf for path, leaf in leaves if _selector(select)(path)]
        if not chosen:
            names = sorted({str(path[-1]) for path, _ in leaves if path})
            raise ValueError(f"select: expected at least one leaf to match {select!r}; the leaves are named {names}.")
    total = jnp.zeros((), jnp.float32)
    for leaf in chosen:
        (wide,) = _widen(leaf)
        total, part = _widen(total, penalty(wide).sum())
        total = total + part
    return total


def _selector(select: Any) -> Callable[[Path], bool]:
    if callable(select):
        return lambda path: bool(select(path))
    names = (select,) if isinstance(select, str) else tuple(select) if isinstance(select, Sequence) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"select: expected None, a name, a tuple of names, or a function of the path, got {select!r}.")
    wanted = {leaf for name in names for leaf in _GROUPS.get(name, (name,))}
    return lambda path: bool(path) and path[-1] in wanted


def _entry(key: Any) -> str | int:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def _float(name: str, value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floats, got {array.dtype}; cast them.")
    return array


def _widen(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All in one dtype, float32 unless one of them is float64: a bfloat16 sum stops growing at 256 ones."""
    wide = jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32
    return tuple(a.astype(wide) for a in arrays)
