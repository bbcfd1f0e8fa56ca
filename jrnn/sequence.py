"""Sequences of different lengths: padding, masks, windows, buckets, and reductions over valid steps.

Legend: T time, B batch (any number of leading batch axes, or none), F features. Sequences are time-major: `xs` is
`(T, *B, ...)`, `lengths` `(*B,)` integers, `mask`, `resets` and `done` `(T, *B)` booleans. Step t is valid where
`t < lengths` and `mask[t]` is true; an argument left out (None) allows every step.

Every function also takes NumPy arrays. Arrays of data are returned as JAX arrays of the same dtype (64-bit data becomes
32-bit, as everywhere in JAX, unless `jax_enable_x64` is on). `buckets` returns plain data for the host: indices in
NumPy arrays, and lengths as integers. `valid_steps` returns None if it is given neither lengths nor a mask.

Shapes and dtypes are always checked. Values, such as lengths longer than T, are checked where the host can read them at
once: in NumPy arrays, lists, and arrays on a CPU. In traced arrays and arrays on an accelerator they are not checked,
and `valid_steps` never checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jrnn._core.checks import is_traced, readable
from jrnn._core.devices import batch_spec, placed

__all__ = [
    "Bucket",
    "buckets",
    "last_valid",
    "max_valid",
    "mean_valid",
    "pad",
    "resets_from_done",
    "reverse",
    "unpad",
    "valid_steps",
    "windows",
]


def valid_steps(
    lengths: ArrayLike | None, mask: ArrayLike | None, time: int, batch_shape: tuple[int, ...]
) -> jax.Array | None:
    """Which steps are valid: those where `t < lengths` and `mask` is true.

    Only shapes and dtypes are checked, never values, so this may be called under `jit` and `vmap`.

    Args:
      lengths: `(*B,)` integers, or None: every sequence is as long as the batch.
      mask: `(T, *B)` booleans, or None: no step is masked out.
      time: T.
      batch_shape: `(*B,)`, a tuple; `()` if unbatched.

    Returns:
      `(T, *B)` booleans, or None where both `lengths` and `mask` are None (every step is valid).

    Raises:
      TypeError: `lengths` are not integers or `mask` is not boolean.
      ValueError: `lengths` or `mask` have the wrong shape.

    >>> valid_steps(np.array([2, 0]), None, 3, (2,)).astype(int).tolist()
    [[1, 0], [1, 0], [0, 0]]
    """
    valid = None
    if lengths is not None:
        lengths = _integers("lengths", lengths)
        if lengths.shape != tuple(batch_shape):
            raise ValueError(
                f"lengths: expected shape {tuple(batch_shape)}, one length for each batch element, got {lengths.shape}."
            )
        steps = jnp.arange(time, dtype=jnp.int32).reshape((time,) + (1,) * lengths.ndim)
        # In int32, whatever the dtype of the lengths: a uint8 count could not be compared with a longer T.
        valid = steps < lengths.astype(jnp.int32)[None]
    if mask is not None:
        mask = _booleans("mask", mask)
        if mask.shape != (time, *batch_shape):
            raise ValueError(
                f"mask: expected shape {(time, *batch_shape)}, (T, *B), got {mask.shape}; a mask has no feature "
                f"axis and is time-major."
            )
        valid = mask if valid is None else valid & mask
    return valid


def pad(sequences: Sequence[ArrayLike], length: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Pads sequences of different lengths with zeros to one time-major batch.

    Args:
      sequences: B arrays `(T_i, ...)` that differ in `T_i` only. `T_i = 0` is legal.
      length: T, the padded length; by default the longest `T_i`. Take it from a small set (see `buckets`): every
        new length compiles the model again.

    Returns:
      `(xs, lengths)`: `xs` is `(T, B, ...)` in the dtype of the sequences, `lengths` is `(B,)` int32.

    Raises:
      ValueError: no sequences, sequences that differ in dtype or in more than `T_i`, or one longer than `length`.

    >>> xs, lengths = pad([np.array([1, 2, 3]), np.array([4])])
    >>> xs.tolist(), lengths.tolist()
    ([[1, 4], [2, 0], [3, 0]], [3, 1])
    """
    if len(sequences) == 0:
        raise ValueError("sequences: expected at least one array, got none; without one the features are unknown.")
    traced = is_traced(sequences)
    # Concrete data is laid out by NumPy: a JAX operation for each new T_i would compile for each new T_i.
    arrays: list[Any] = [jnp.asarray(s) if traced else np.asarray(s) for s in sequences]
    first = arrays[0]
    for i, array in enumerate(arrays):
        if array.ndim == 0:
            raise ValueError(f"sequences[{i}]: expected an array (T_i, ...), got a scalar.")
        if array.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"sequences[{i}]: expected shape (T_i, {', '.join(map(str, first.shape[1:]))}) as in sequences[0], "
                f"got {array.shape}; sequences may differ in their first axis (time) only."
            )
        if array.dtype != first.dtype:
            raise ValueError(
                f"sequences[{i}]: expected dtype {first.dtype} as in sequences[0], got {array.dtype}; "
                f"cast them to one dtype."
            )
    longest = max(array.shape[0] for array in arrays)
    time = longest if length is None else _positive("length", length, minimum=0)
    if time < longest:
        i = next(i for i, array in enumerate(arrays) if array.shape[0] > time)
        raise ValueError(
            f"length: expected at least {longest}, the longest sequence, got {time}; sequences[{i}] has "
            f"{arrays[i].shape[0]} steps. Cut it, or give a larger length."
        )
    lengths = jnp.asarray(np.array([array.shape[0] for array in arrays], np.int32))
    if traced:
        rest = ((0, 0),) * (first.ndim - 1)
        padded = [jnp.pad(array, ((0, time - array.shape[0]), *rest)) for array in arrays]
        return jnp.stack(padded, axis=1), lengths
    return jnp.asarray(laid_out(arrays, time)), lengths


def laid_out(arrays: Sequence[np.ndarray], time: int, fill: Any = 0) -> np.ndarray:
    """Arrays ``(T_i, ...)`` as one of ``(T, B, ...)``, with a number in the padding; nothing is checked."""
    xs = np.full((time, len(arrays), *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for i, array in enumerate(arrays):
        xs[: len(array), i] = array
    return xs


def unpad(xs: ArrayLike, lengths: ArrayLike) -> list[jax.Array]:
    """Takes a padded batch apart again: the inverse of `pad`.

    Args:
      xs: `(T, B, ...)`, with exactly one batch axis.
      lengths: `(B,)` integers, known (not traced by `jit`): the shapes of the result depend on them.

    Returns:
      A list of B arrays `(lengths[i], ...)`.

    Raises:
      TypeError: `lengths` are not integers, or traced.
      ValueError: wrong shapes, or lengths that are negative or longer than T.

    >>> [x.tolist() for x in unpad(*pad([np.array([1, 2, 3]), np.array([4])]))]
    [[1, 2, 3], [4]]
    """
    if is_traced(lengths):
        raise TypeError(
            "lengths: expected known values, got a traced array; the shapes unpad returns depend on them. Call it "
            "outside jit."
        )
    shape = np.shape(xs)
    if len(shape) < 2:
        raise ValueError(f"xs: expected shape (T, B, ...), got {shape}.")
    counts = np.asarray(lengths)
    _check_lengths(counts, shape[0], shape[1:2])
    if isinstance(xs, jax.core.Tracer):
        return [xs[:n, i] for i, n in enumerate(counts.tolist())]
    array = np.asarray(xs)
    return [jnp.asarray(array[:n, i]) for i, n in enumerate(counts.tolist())]


def windows(series: ArrayLike, length: int, horizon: int = 1, stride: int = 1) -> tuple[jax.Array, jax.Array]:
    """Cuts a series into overlapping windows, each step with the value `horizon` steps after it as its target.

    With N windows, for t < length and n < N::

        inputs[t, n]  = series[n * stride + t]
        targets[t, n] = series[n * stride + t + horizon]

    Targets line up with a network's outputs: at step t the network has seen the series up to `n * stride + t`, so with
    `horizon >= 1` no target is among the inputs seen so far. They contain three kinds of forecast:

    - `targets`: one forecast at every step of the window;
    - `targets[-1]`, `(N, ...)`: one forecast, `horizon` steps after the end of the window;
    - `targets[-horizon:]`, `(horizon, N, ...)`: the next `horizon` values after the window (`horizon <= length`).

    N is `(T - length - horizon) // stride + 1`: only whole windows whose every target exists. A window that overlaps
    the border between training and test data leaks one into the other: split the series first, then cut each part into
    windows. For targets from another series of equal T, cut both series the same way, and take the inputs of one and
    the targets of the other.

    Args:
      series: `(T, ...)`.
      length: steps in a window, at least 1.
      horizon: steps from an input to its target, at least 1.
      stride: steps from the start of one window to the next, at least 1.

    Returns:
      `(inputs, targets)`, both `(length, N, ...)`, time-major.

    Raises:
      TypeError: `length`, `horizon` or `stride` is not an integer.
      ValueError: one of them is below 1, or the series is too short for a single window.

    >>> inputs, targets = windows(np.arange(6), length=3, horizon=2)
    >>> inputs.T.tolist(), targets.T.tolist()
    ([[0, 1, 2], [1, 2, 3]], [[2, 3, 4], [3, 4, 5]])
    """
    length, horizon = _positive("length", length), _positive("horizon", horizon)
    stride = _positive("stride", stride)
    series = jnp.asarray(series)
    if series.ndim == 0:
        raise ValueError("series: expected an array (T, ...), got a scalar.")
    spare = series.shape[0] - length - horizon
    if spare < 0:
        raise ValueError(
            f"series: expected at least length + horizon = {length} + {horizon} = {length + horizon} steps, got "
            f"{series.shape[0]}; take shorter windows or a longer series."
        )
    starts = np.arange(0, spare + 1, stride)
    index = np.arange(length)[:, None] + starts
    return series[index], series[index + horizon]


class Bucket(NamedTuple):
    """One batch of `buckets`: which sequences, and the length to pad them to.

    Attributes:
      indices: ``(B,)`` NumPy integers, the numbers of the sequences.
      length: T, the length to pad them to.

    >>> buckets([3, 5, 3], batch_size=2)[0]
    Bucket(indices=array([0, 2]), length=3)
    """

    indices: np.ndarray
    length: int


def buckets(
    lengths: ArrayLike,
    batch_size: int,
    *,
    key: jax.Array | None = None,
    growth: float = 1.25,
    boundaries: Sequence[int] | None = None,
    drop_remainder: bool = False,
) -> list[Bucket]:
    """Batches sequences of similar length, so that little is padding and few shapes are compiled.

    Every sequence is padded to the smallest of a few lengths that holds it. By default these are 1, 2, 3, ... growing
    by the factor `growth`, none above the longest sequence. So a sequence of n >= 1 steps is padded to at most
    `growth * n`, and there are at most `1 + 1/(growth - 1) + log(longest)/log(growth)` lengths, for any data.

    Args:
      lengths: `(N,)` integers, `[len(s) for s in sequences]`.
      batch_size: sequences in a batch, at least 1.
      key: shuffles sequences within their bucket, and the order of batches. A new one for each epoch:
        `jax.random.fold_in(key, epoch)`. None: shortest first, in the order given.
      growth: above 1; smaller means less padding and more compilations.
      boundaries: the padded lengths, ascending, instead of `growth`. The last must hold the longest sequence.
      drop_remainder: leave out a batch that did not fill up. By default it is kept, smaller, so that every
        sequence comes exactly once; that makes at most two batch shapes for each padded length.

    Returns:
      A list of `Bucket(indices, length)`: plain data, which `pad` turns into a batch.

    Raises:
      TypeError: `lengths` or `batch_size` are not integers.
      ValueError: wrong rank, negative lengths, or `growth` or `boundaries` out of range.

    >>> sequences = [np.ones(n) for n in (3, 19, 20, 3, 19)]
    >>> for indices, length in buckets([len(s) for s in sequences], batch_size=2):
    ...     xs, lengths = pad([sequences[i] for i in indices], length)
    ...     print(indices, xs.shape, lengths)
    [0 3] (3, 2) [3 3]
    [1 2] (20, 2) [19 20]
    [4] (20, 1) [19]
    """
    batch_size = _positive("batch_size", batch_size)
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths: expected shape (N,), one length for each sequence, got {array.shape}.")
    if array.size == 0:
        return []
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"lengths: expected integers, got {array.dtype}.")
    if array.min() < 0:
        raise ValueError(f"lengths: expected no negative length, got {array.min()} at index {array.argmin()}.")
    longest = int(array.max())
    if boundaries is None:
        sizes = _geometric(growth, max(longest, 1))
    else:
        sizes = [_positive("boundaries", b) for b in boundaries]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"boundaries: expected ascending lengths, got {tuple(boundaries)}.")
        if not sizes or sizes[-1] < longest:
            raise ValueError(
                f"boundaries: expected a last length of at least {longest}, the longest sequence (index "
                f"{array.argmax()}), got {tuple(boundaries)}."
            )
    generator = None if key is None else _generator(key)
    bucket_of = np.searchsorted(sizes, array)
    batches = []
    for i, size in enumerate(sizes):
        members = np.flatnonzero(bucket_of == i)
        if generator is not None:
            members = generator.permutation(members)
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            if len(indices) == batch_size or not drop_remainder:
                batches.append(Bucket(indices, size))
    if generator is not None:
        batches = [batches[i] for i in generator.permutation(len(batches))]
    return batches


def last_valid(ys: ArrayLike, lengths: ArrayLike | None = None, mask: ArrayLike | None = None) -> jax.Array:
    """The output at the last valid step of each sequence.

    Args:
      ys: `(T, *B, ...)`; how many axes are batch axes is read off `lengths` and `mask`.
      lengths: `(*B,)` integers, or None.
      mask: `(T, *B)` booleans, or None.

    Returns:
      `(*B, ...)`, in the dtype of `ys`; zeros for a sequence without a valid step. Padding, NaN included, changes
      neither the result nor its gradient.

    Raises:
      TypeError: `lengths` are not integers or `mask` is not boolean.
      ValueError: wrong shapes, or lengths that are negative or longer than T.

    >>> last_valid(np.array([[1, 4], [2, 5], [3, 6]]), np.array([2, 0])).tolist()
    [2, 0]
    """
    ys, valid = _with_validity(ys, lengths, mask)
    time = ys.shape[0]
    if time == 0:
        return jnp.zeros(ys.shape[1:], ys.dtype)
    if valid is None:
        return ys[-1]
    last = time - 1 - jnp.argmax(valid[::-1], axis=0)
    found = jnp.take_along_axis(ys, _trailing(last[None], ys.ndim), axis=0)[0]
    return jnp.where(_trailing(valid.any(0), found.ndim), found, jnp.zeros((), ys.dtype))


def mean_valid(ys: ArrayLike, lengths: ArrayLike | None = None, mask: ArrayLike | None = None) -> jax.Array:
    """The mean over the valid steps of each sequence.

    Args:
      ys: `(T, *B, ...)`; how many axes are batch axes is read off `lengths` and `mask`.
      lengths: `(*B,)` integers, or None.
      mask: `(T, *B)` booleans, or None.

    Returns:
      `(*B, ...)`, in the dtype of `ys` (summed in float32 where that is narrower; float32 where `ys` are integers);
      zeros for a sequence without a valid step. Padding, NaN included, changes neither the result nor its gradient.

    Raises:
      TypeError: `lengths` are not integers or `mask` is not boolean.
      ValueError: wrong shapes, or lengths that are negative or longer than T.

    >>> mean_valid(np.array([[1.0, 4.0], [2.0, np.nan]]), np.array([2, 1])).tolist()
    [1.5, 4.0]
    """
    ys, valid = _with_validity(ys, lengths, mask)
    out = ys.dtype if jnp.issubdtype(ys.dtype, jnp.inexact) else jnp.dtype(jnp.float32)
    wide = jnp.dtype(jnp.float32) if jnp.finfo(out).bits < 32 else out
    if valid is None:
        return (ys.astype(wide).sum(0) / max(ys.shape[0], 1)).astype(out)
    kept = jnp.where(_trailing(valid, ys.ndim), ys.astype(wide), jnp.zeros((), wide))
    count = jnp.maximum(valid.sum(0, dtype=jnp.int32), 1).astype(wide)
    return (kept.sum(0) / _trailing(count, ys.ndim - 1)).astype(out)


def max_valid(ys: ArrayLike, lengths: ArrayLike | None = None, mask: ArrayLike | None = None) -> jax.Array:
    """The largest value over the valid steps of each sequence, for each feature.

    Args:
      ys: `(T, *B, ...)`; how many axes are batch axes is read off `lengths` and `mask`.
      lengths: `(*B,)` integers, or None.
      mask: `(T, *B)` booleans, or None.

    Returns:
      `(*B, ...)`, in the dtype of `ys`; zeros for a sequence without a valid step. Padding, NaN included, changes
      neither the result nor its gradient. Equal largest values share the gradient.

    Raises:
      TypeError: `lengths` are not integers or `mask` is not boolean.
      ValueError: wrong shapes, or lengths that are negative or longer than T.

    >>> max_valid(np.array([[-1, 4], [-2, 5], [3, 6]]), np.array([2, 0])).tolist()
    [-1, 0]
    """
    ys, valid = _with_validity(ys, lengths, mask)
    if valid is None:
        return ys.max(0) if ys.shape[0] else jnp.zeros(ys.shape[1:], ys.dtype)
    if jnp.issubdtype(ys.dtype, jnp.inexact):
        lowest = -jnp.inf
    else:
        lowest = False if ys.dtype == jnp.bool_ else jnp.iinfo(ys.dtype).min
    floor = jnp.array(lowest, ys.dtype)
    largest = jnp.where(_trailing(valid, ys.ndim), ys, floor).max(0, initial=lowest)
    return jnp.where(_trailing(valid.any(0), largest.ndim), largest, jnp.zeros((), ys.dtype))


def resets_from_done(done: ArrayLike, previous: ArrayLike | None = None) -> tuple[jax.Array, jax.Array]:
    """Turns the `done` flags of reinforcement learning into `resets`, shifted by the one step that is easily missed.

    `done[t]` belongs to the transition: acting on `x[t]` ended the episode. So `x[t]` is the *last* observation of
    its episode and must still be read with that episode's state; the *next* observation, `x[t + 1]`, is the first of
    a new episode. `resets[t]` replaces the state *before* `x[t]` is consumed. Hence::

        resets[t + 1] = done[t]        resets[0] = previous

    Passing `done` itself as `resets` would wipe the memory one step early, just before the last decision of each
    episode, and let the old episode's last state into the new one.

    The flag of a chunk's last step has no place in that chunk's resets: it is returned, to be given as `previous`
    with the next chunk. A rollout that already stores, beside each observation, whether that observation *begins* an
    episode (often called `is_first`, or the "last done") holds resets: pass those to `unroll` as they are.

    Args:
      done: `(T, *B)` booleans.
      previous: `(*B,)` booleans, the `last_done` of the previous chunk; None where there was none, which is
        right for a first chunk, since it starts from the initial state anyway.

    Returns:
      `(resets, last_done)`: `(T, *B)` and `(*B,)` booleans. With T = 0, `last_done` is `previous`.

    Raises:
      TypeError: `done` or `previous` is not boolean.
      ValueError: `done` has no time axis, or `previous` is not of shape `(*B,)`.

    >>> resets, last_done = resets_from_done(np.array([False, True, False, True]))
    >>> resets.astype(int).tolist(), bool(last_done)
    ([0, 0, 1, 0], True)
    >>> resets_from_done(np.array([False, False]), last_done)[0].astype(int).tolist()
    [1, 0]
    """
    done = _booleans("done", done)
    if done.ndim == 0:
        raise ValueError("done: expected shape (T, *B), got a scalar.")
    if previous is None:
        previous = jnp.zeros(done.shape[1:], bool)
    previous = _booleans("previous", previous)
    if previous.shape != done.shape[1:]:
        raise ValueError(
            f"previous: expected shape {done.shape[1:]}, (*B,) of done {done.shape}, got {previous.shape}; give the "
            f"last_done that the previous chunk returned."
        )
    shifted = jnp.concatenate([previous[None], done])
    return shifted[:-1], shifted[-1]


def reverse(xs: ArrayLike, lengths: ArrayLike | None = None) -> jax.Array:
    """Reverses the valid prefix of each sequence in time; padding is unchanged and stays in its place.

    Args:
      xs: `(T, *B, ...)`.
      lengths: `(*B,)` integers; None: all T steps are reversed.

    Returns:
      An array like `xs`; reversing it again gives `xs` back.

    Raises:
      TypeError: `lengths` are not integers.
      ValueError: wrong shapes, or lengths that are negative or longer than T.

    >>> reverse(np.array([[1, 4], [2, 5], [3, 6]]), np.array([2, 3])).tolist()
    [[2, 6], [1, 5], [3, 4]]
    """
    xs = jnp.asarray(xs)
    if xs.ndim == 0:
        raise ValueError("xs: expected shape (T, *B, ...), got a scalar.")
    if lengths is None:
        return xs[::-1]
    time = xs.shape[0]
    _check_lengths(lengths, time, xs.shape[1 : 1 + _ndim(lengths)])
    count = jnp.asarray(lengths).astype(jnp.int32)
    steps = jnp.arange(time, dtype=jnp.int32).reshape((time,) + (1,) * count.ndim)
    source = jnp.where(steps < count[None], count[None] - 1 - steps, steps)
    spec = batch_spec(count.ndim, sequences=xs, states=count)
    return jnp.take_along_axis(placed(xs, spec, 1), _trailing(source, xs.ndim), axis=0)


def _with_validity(
    ys: ArrayLike, lengths: ArrayLike | None, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    ys = jnp.asarray(ys)
    if ys.ndim == 0:
        raise ValueError("ys: expected shape (T, *B, ...), got a scalar.")
    batch_axes = 0
    if lengths is not None:
        batch_axes = _ndim(lengths)
    elif mask is not None:
        batch_axes = _ndim(mask) - 1
    batch_shape = ys.shape[1 : 1 + max(batch_axes, 0)]
    if lengths is not None:
        _check_lengths(lengths, ys.shape[0], batch_shape)
    # A gather needs its operand to be sharded over a mesh as its indices are.
    spec = batch_spec(len(batch_shape), sequences=(ys, mask), states=lengths)
    return placed(ys, spec, 1), valid_steps(lengths, mask, ys.shape[0], batch_shape)


def _known_steps(
    lengths: ArrayLike | None, mask: ArrayLike | None, time: int, batch_shape: tuple[int, ...]
) -> np.ndarray:
    """`valid_steps` of values that are known, by NumPy: inside `jit` the result of any JAX operation is traced."""
    valid = np.ones((time, *batch_shape), bool)
    if lengths is not None:
        valid &= np.arange(time).reshape((time,) + (1,) * len(batch_shape)) < np.asarray(lengths)
    if mask is not None:
        valid &= np.asarray(mask)
    return valid


def _check_lengths(
    lengths: ArrayLike, time: int, batch_shape: tuple[int, ...], name: str = "lengths", limit: str = "T"
) -> None:
    """Shape and dtype always; values too where the host can read them at once."""
    array = _integers(name, lengths)
    if array.shape != batch_shape:
        raise ValueError(f"{name}: expected shape {batch_shape}, one for each batch element, got {array.shape}.")
    if not readable(lengths) or array.size == 0:
        return
    values = np.asarray(lengths)
    if values.min() < 0 or values.max() > time:
        raise ValueError(
            f"{name}: expected values from 0 to {limit} = {time}, got values from {values.min()} to {values.max()}."
        )


def _ndim(value: ArrayLike) -> int:
    return value.ndim if isinstance(value, jax.Array) else jnp.asarray(value).ndim


def _integers(name: str, value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        # An empty Python list counts as float; there is nothing in it to be wrong.
        if array.size == 0 and not hasattr(value, "dtype"):
            return array.astype(jnp.int32)
        raise TypeError(f"{name}: expected integers, got {array.dtype}; cast with .astype(int32) if they are whole.")
    return array


def _booleans(name: str, value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name}: expected booleans, got {array.dtype}; compare it, as in `{name} != 0`.")
    return array


def _positive(name: str, value: Any, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}.")
    return int(value)


def _trailing(array: jax.Array, ndim: int) -> jax.Array:
    """Appends axes of size one, so that `(T, *B)` broadcasts against `(T, *B, ...)`."""
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))


def _geometric(growth: float, longest: int) -> list[int]:
    if not growth > 1:
        raise ValueError(f"growth: expected a factor above 1, got {growth}; for exact lengths give boundaries.")
    sizes = [1]
    while sizes[-1] < longest:
        sizes.append(min(max(sizes[-1] + 1, int(growth * sizes[-1])), longest))
    return sizes


def _generator(key: jax.Array) -> np.random.Generator:
    """A host generator from a JAX key: a permutation on the device would compile for each bucket's size."""
    if is_traced(key):
        raise TypeError(
            "key: expected a known key, got a traced one; which sequences are in a batch depends on it. Call buckets "
            "outside jit."
        )
    with jax.ensure_compile_time_eval():
        data = jax.random.key_data(key) if jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key) else key
        entropy = np.asarray(data).ravel()
    if entropy.dtype != np.uint32:
        raise TypeError(f"key: expected a JAX key, as from jax.random.key(0), got {key!r}.")
    return np.random.default_rng([int(word) for word in entropy])
