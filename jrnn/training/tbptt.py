"""Truncated backpropagation through time: chunks of long sequences, the state carried, the gradient stopped.

Williams and Peng (1990), "An efficient gradient-based algorithm for on-line training of recurrent network
trajectories"; here with one update per chunk of k steps (k1 = k2 = k).

T time, B batch axes (any number, or none), F input features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrnn import sequence
from jrnn._core.checks import is_traced, positive_int
from jrnn._core.devices import batch_spec, placed
from jrnn.cells.base import Layer
from jrnn.run import unrolling
from jrnn.training.step import Metrics, Step, TrainState, check_function, check_optimizer, split_loss


class Chunk(NamedTuple):
    """A stretch of time out of a batch of sequences, as `chunks` cuts it.

    Attributes:
      xs: ``(t, *B, F)``, or ``(t, *B)`` integers.
      ys: targets: a pytree of arrays with time first, or None.
      lengths: ``(*B,)`` integers counted from the start of this chunk, in [0, t], or None.
      mask: ``(t, *B)`` booleans, or None.
      resets: ``(t, *B)`` booleans, or None.
      start: the absolute time of ``xs[0]``.
      index: how many chunks of these sequences came before.

    >>> Chunk._fields
    ('xs', 'ys', 'lengths', 'mask', 'resets', 'start', 'index')
    """

    xs: Any
    ys: Any
    lengths: Any
    mask: Any
    resets: Any
    start: Any
    index: Any


def chunks(
    xs: Any, ys: Any, length: int, *, lengths: Any = None, mask: Any = None, resets: Any = None
) -> Iterator[Chunk]:
    """Cuts a batch of sequences into chunks of `length` steps; the last may be shorter.

    Lengths are counted anew in each chunk, ``clip(lengths - start, 0, t)``. Chunks in which no sequence has a valid
    step are left out, since they would only hold the state. NumPy arrays stay NumPy arrays on the host, so a series
    larger than the device's memory can be cut.

    Args:
      xs: ``(T, *B, F)``, or ``(T, *B)`` integers for a model that begins with an embedding.
      ys: targets, a pytree of arrays whose first axis is T, or None.
      length: steps per chunk.
      lengths: ``(*B,)`` integers in [0, T].
      mask: ``(T, *B)`` booleans.
      resets: ``(T, *B)`` booleans.

    Raises:
      ValueError, TypeError: an argument does not fit; raised by the call, not at the first chunk.

    >>> xs = np.zeros((5, 2, 1))
    >>> for chunk in chunks(xs, None, 2, lengths=np.array([5, 3])):
    ...     print(chunk.start, chunk.xs.shape, chunk.lengths)
    0 (2, 2, 1) [2 2]
    2 (2, 2, 1) [2 1]
    4 (1, 2, 1) [1 0]
    """
    positive_int(length, "length")
    time = _time(xs, "xs")
    for path, leaf in jax.tree_util.tree_leaves_with_path(ys):
        if _time(leaf, "ys") != time:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"ys{where}: expected {time} steps, the time axis of xs, got shape {np.shape(leaf)}")
    for name, value in (("lengths", lengths), ("mask", mask)):
        if is_traced(value):
            raise TypeError(
                f"{name}: expected known values, got a traced array; which chunks there are depends on them. Call "
                "chunks outside jit, or take truncated_unroll inside it."
            )
    valid = np.ones(time, bool)
    if lengths is not None:
        lengths = np.asarray(lengths)
        if not np.issubdtype(lengths.dtype, np.integer):
            raise TypeError(f"lengths: expected integers, got {lengths.dtype}; convert them with .astype(int)")
        if lengths.shape != np.shape(xs)[1 : 1 + lengths.ndim]:
            raise ValueError(f"lengths: expected the batch shape of xs {np.shape(xs)}, got shape {lengths.shape}")
        if lengths.size and (lengths.min() < 0 or lengths.max() > time):
            raise ValueError(f"lengths: expected values in [0, {time}], got {lengths.min()} to {lengths.max()}")
        # Signed, so that the difference to the start of a chunk may fall below zero.
        lengths = lengths.astype(np.int32)
        valid &= np.arange(time) < lengths.max(initial=0)
    for name, flags in (("mask", mask), ("resets", resets)):
        if flags is not None and (jnp.result_type(flags) != jnp.bool_ or _time(flags, name) != time):
            raise ValueError(
                f"{name}: expected booleans (T, *B) with T = {time}, got {jnp.result_type(flags)} of shape "
                f"{np.shape(flags)}"
            )
    if mask is not None:
        valid &= np.asarray(mask).reshape(time, -1).any(axis=1)
    return _chunks(xs, ys, length, lengths, mask, resets, valid)


def _chunks(xs: Any, ys: Any, length: int, lengths: Any, mask: Any, resets: Any, valid: Any) -> Iterator[Chunk]:
    index = 0
    for start in range(0, len(valid), length):
        end = min(start + length, len(valid))
        if not valid[start:end].any():
            continue
        part, left = slice(start, end), None
        if lengths is not None:
            left = np.clip(lengths - start, 0, end - start)
        cut = lambda flags, part=part: None if flags is None else flags[part]
        targets = jax.tree.map(lambda leaf, part=part: leaf[part], ys)
        yield Chunk(xs[part], targets, left, cut(mask), cut(resets), start, index)
        index += 1


@dataclasses.dataclass(frozen=True)
class TBPTTStep(Step):
    """The step of `tbptt_step`.

    >>> TBPTTStep.__mro__[1].__name__
    'Step'
    """

    model: Layer
    loss: Callable[..., Any]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """One update from one chunk. `state` is donated: go on with the state returned."""
        if isinstance(state, TrainState):
            state = state._replace(carry=_carry_into(batch, state.carry))
        return super().__call__(state, batch)

    def evaluate(self, params: Any, batch: Any, carry: Any = None) -> tuple[Any, dict[str, jax.Array]]:
        """Loss and aux of one chunk with ``key=None``, and the recurrent state after it."""
        return super().evaluate(params, batch, _carry_into(batch, carry))

    def key(self, state: TrainState, batch: Chunk) -> jax.Array | None:
        """All chunks of a sequence share a key; their own part of it follows from absolute time, as in `unroll`."""
        if state.key is None:
            return None
        return jax.random.fold_in(state.key, state.step - jnp.asarray(batch.index, state.step.dtype))

    def forward(self, params: Any, carry: Any, batch: Chunk, key: Any) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
        carry, predictions = unrolling.unroll(
            self.model, params, batch.xs, carry, lengths=batch.lengths, mask=batch.mask, resets=batch.resets,
            key=key, start=batch.start,
        )  # fmt: skip
        valid = sequence.valid_steps(batch.lengths, batch.mask, batch.xs.shape[0], self._batch_shape(batch.xs))
        loss, aux = split_loss(self.loss(predictions, batch.ys, valid), "loss")
        return loss, (carry, aux)

    def initial_carry(self, params: Any, batch: Chunk) -> Any:
        batch_shape = self._batch_shape(batch.xs)
        spec = batch_spec(len(batch_shape), sequences=batch.xs)
        return placed(self.model.initial_state(params, batch_shape), spec, 0)

    def carry_structure(self, params: Any) -> Any:
        return jax.tree.structure(jax.eval_shape(lambda params: self.model.initial_state(params, ()), params))

    def _batch_shape(self, xs: Any) -> tuple[int, ...]:
        return xs.shape[1 : xs.ndim - self.model.event_ndim]


def tbptt_step(model: Layer, loss: Callable[..., Any], optimizer: optax.GradientTransformation) -> TBPTTStep:
    """A training step on chunks of long sequences: truncated backpropagation through time.

    ``state.carry`` holds the recurrent state from one chunk to the next. It enters the next chunk as a number, not as
    a function of the parameters, so no gradient crosses the boundary. A chunk with ``index`` 0 begins new sequences
    from the model's initial state (which gets its gradient there, if it is learned).

    Laws:
      * Forward values do not depend on the chunk length, dropout included, while the parameters stay the same.
      * With one chunk for the whole sequence the step is that of full backpropagation.
      * A step that is not finite holds the recurrent state too.

    Args:
      model: any layer that runs forward in time, not `jrnn.bidirectional`.
      loss: ``loss(predictions, targets, mask)``, such as `jrnn.losses.mse`: predictions and targets of one chunk, and
        the valid steps ``(t, *B)`` or None. Returns a scalar, or ``(scalar, dictionary of arrays)``.
      optimizer: any Optax transformation.

    Returns:
      A step for `fit`, or to call with one `Chunk` after the other, in order. With a state that has a key, the chunks
      of a sequence use ``fold_in(key, n)``, n the number of the step of their first chunk.

    Raises:
      TypeError, ValueError: a model that is no layer, or that needs the future; a chunk out of turn.

    >>> import jrnn
    >>> model = jrnn.stack(jrnn.gru(4), jrnn.dense(1))
    >>> step = tbptt_step(model, jrnn.losses.mse, jrnn.optimizer("adam", 1e-2))
    >>> state = step.init(model.init(jax.random.key(0), 1))
    >>> series = np.sin(np.arange(101.0, dtype=np.float32))[:, None, None]      # one long sequence
    >>> for chunk in chunks(series[:-1], series[1:], 25):
    ...     state, metrics = step(state, chunk)
    >>> int(state.step), state.carry[0].h.shape
    (4, (1, 4))

    In `fit`, an epoch is all the chunks of all the batches in turn:

    >>> data = lambda epoch: chunks(series[:-1], series[1:], 25)
    >>> result = jrnn.training.fit(step, model.init(jax.random.key(0), 1), data, epochs=2)
    >>> int(result.state.step)
    8
    """
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a layer, such as jrnn.lstm(128), got {type(model).__name__}")
    if not model.causal:
        raise ValueError(
            f"model: expected one that runs forward in time, got {model!r}; a layer that is not causal needs the "
            "end of the sequence first, so train it on whole sequences with make_step"
        )
    check_function(
        loss,
        "loss",
        ("predictions", "targets", "mask"),
        "it must take all three, mask too, which is None where every step is valid",
    )
    check_optimizer(optimizer)
    return TBPTTStep(optimizer, model, loss)


def truncated_unroll(
    model: Layer,
    params: Any,
    xs: Any,
    length: int,
    state: Any = None,
    *,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    key: jax.Array | None = None,
    start: Any = 0,
    backend: str | None = None,
    remat: int | str | None = None,
    unroll: int = 1,
) -> tuple[Any, jax.Array]:
    """`jrnn.unroll` whose gradient is stopped every `length` steps: one update for many chunks.

    The values are those of `unroll`. No gradient passes from a step to one in an earlier chunk, so the gradient of a
    loss is the sum of the gradients that `tbptt_step` takes chunk by chunk at the same parameters. The chunks run in
    one loop: neither the size of the program nor the time to compile it grows with T.

    Args:
      model: any layer that runs forward in time.
      length: steps per chunk.
      params, xs, state, lengths, mask, resets, key, start, backend, remat, unroll: as for `jrnn.unroll`.

    >>> import jrnn
    >>> cell = jrnn.elman(3)
    >>> params, xs = cell.init(jax.random.key(0), 2), jnp.ones((6, 2))
    >>> last = lambda xs, length: truncated_unroll(cell, params, xs, length)[1][-1].sum()
    >>> grad = jax.grad(last)(xs, 2)
    >>> [bool(g.any()) for g in grad]
    [False, False, False, False, True, True]
    """
    positive_int(length, "length")
    if isinstance(model, Layer) and not model.causal:
        raise ValueError(f"model: expected one that runs forward in time, got {model!r}")
    time, flags = _time(xs, "xs"), {"mask": mask, "resets": resets}
    if lengths is not None:
        # One mask for all chunks: inside the loop they all run with the same arguments.
        batch_shape = np.shape(xs)[1 : np.ndim(xs) - model.event_ndim]
        sequence._check_lengths(lengths, time, batch_shape)
        flags["mask"] = sequence.valid_steps(lengths, mask, time, batch_shape)

    def run(state: Any, part: Any, at: Any) -> tuple[Any, jax.Array]:
        xs, flags = part
        options: dict[str, Any] = {"backend": backend, "remat": remat, "unroll": unroll}
        return unrolling.unroll(model, params, xs, state, key=key, start=start + at, **flags, **options)

    cut = lambda a, b: jax.tree.map(lambda x: jnp.asarray(x)[a:b], (xs, flags))
    state, first = run(state, cut(0, length), 0)
    whole = max(time // length, 1)
    outputs = [first]
    if whole > 1:
        parts = jax.tree.map(lambda x: x.reshape(whole - 1, length, *x.shape[1:]), cut(length, whole * length))
        times = length * jnp.arange(1, whole, dtype=jnp.int32)
        state, middle = jax.lax.scan(lambda s, part: run(jax.lax.stop_gradient(s), *part), state, (parts, times))
        outputs.append(jax.tree.map(lambda y: y.reshape((whole - 1) * length, *y.shape[2:]), middle))
    if whole * length < time:
        state, last = run(jax.lax.stop_gradient(state), cut(whole * length, time), whole * length)
        outputs.append(last)
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _carry_into(chunk: Any, carry: Any) -> Any:
    if not isinstance(chunk, Chunk):
        raise TypeError(f"batch: expected a Chunk from jrnn.training.chunks, got {type(chunk).__name__}")
    if isinstance(chunk.index, jax.core.Tracer):
        raise TypeError("batch: expected a chunk whose index is known, got a traced one; the step is jitted already")
    if int(chunk.index) == 0:
        return None
    if carry is None:
        raise ValueError(
            f"batch: expected the first chunk of a sequence, index 0, since no state is carried yet, got index "
            f"{chunk.index}"
        )
    return carry


def _time(array: Any, argument: str) -> int:
    shape = np.shape(array)
    if not shape:
        raise ValueError(f"{argument}: expected time as the first axis, got a scalar")
    return shape[0]
