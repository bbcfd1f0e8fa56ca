"""The loop over time of a Flax cell, a pure function of carry and input, under the sequence contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import sequence
from jrnn._core.checks import describe, readable, same_form
from jrnn.run.scanning import scan
from jrnn.run.step import read_step
from jrnn.schedules import Refusal, Task
from jrnn.schedules.parts import of_one_step
from jrnn.schedules.steps import Steps, expand, times_in_a_body, zeroed

__all__ = ["check_carry", "check_lengths", "flipped", "held", "run", "time_axis", "with_padding", "zero_padding"]


def time_axis(inputs: jax.Array, feature_axes: int, time_major: bool) -> int:
    """Where Flax has the time axis of the inputs of a cell with so many feature axes."""
    axis = 0 if time_major else inputs.ndim - (feature_axes + 1)
    return axis + inputs.ndim if axis < 0 else axis


def with_padding(xs: jax.Array, lengths: Any, feature_axes: int) -> tuple[jax.Array, Any, Any]:
    """``(xs, lengths, valid)``: time-major inputs with zeros in their padding, and which steps are none.

    Zero before the cell sees them: a NaN that is only hidden afterwards still has a NaN gradient.
    """
    if lengths is None:
        return xs, None, None
    lengths = check_lengths(lengths, xs.shape[0], xs.shape[1 : xs.ndim - feature_axes])
    valid: Any = sequence.valid_steps(lengths, None, xs.shape[0], lengths.shape)
    return zero_padding(valid, xs), lengths, valid


def flipped(tree: Any, lengths: Any) -> Any:
    """Time-major arrays in reverse order, padding at the end."""
    return jax.tree.map(lambda a: sequence.reverse(a, lengths) if a.size else a, tree)


def check_lengths(lengths: Any, time: int, batch_shape: tuple[int, ...], name: str = "seq_lengths") -> Any:
    """Lengths ``(*B,)`` as int32; values are checked where the host can read them at once."""
    known = readable(lengths)
    lengths = np.asarray(lengths) if known and not isinstance(lengths, jax.Array) else jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name}: expected integers, got {lengths.dtype}; convert them with .astype(int)")
    if lengths.shape != batch_shape:
        raise ValueError(
            f"{name}: expected the shape {batch_shape} of the batch axes of the inputs, got {lengths.shape}; give each "
            "sequence its length, and time_major=True where time is the first axis of the inputs"
        )
    if known and lengths.size:
        values = np.asarray(lengths)
        if values.min() < 0 or values.max() > time:
            raise ValueError(
                f"{name}: expected values from 0 to {time}, the time axis of the inputs, got values from "
                f"{values.min()} to {values.max()}; give each sequence the number of its steps that are no padding"
            )
    return jnp.asarray(lengths, jnp.int32)


def check_carry(carry: Any, batch_shape: tuple[int, ...]) -> None:
    """Raises if a part of a carry can't be held for each sequence by itself."""
    if not all(_has(batch_shape, leaf) for leaf in jax.tree.leaves(carry)):
        raise ValueError(
            f"initial_carry: expected arrays whose first axes are the batch axes {batch_shape}, where seq_lengths and "
            f"return_carry ask for the carry of each sequence after its last step, got {describe(carry)}; leave out "
            "one of the two arguments, or give each array of the cell's carry batch axes"
        )


def _has(batch_shape: tuple[int, ...], leaf: Any) -> bool:
    return jnp.shape(leaf)[: len(batch_shape)] == batch_shape


def held(valid: jax.Array, new: Any, old: Any) -> Any:
    """The new carry at valid steps and the old one elsewhere, of each array that has batch axes."""
    structures: list[Any] = [jax.tree.structure(new), jax.tree.structure(old)]
    if structures[0] != structures[1]:
        return new  # which is an error of the scan, in its own words

    def one(new: Any, old: Any) -> Any:
        if not _has(valid.shape, new) or not same_form(new, old):
            return new
        return jnp.where(expand(valid, new), new, old)

    return jax.tree.map(one, new, old)


def zero_padding(valid: jax.Array, tree: Any) -> Any:
    """Zeros at what is not valid, in each array that begins with the axes of ``valid``."""
    return jax.tree.map(lambda a: zeroed(valid, a) if _has(valid.shape, a) else a, tree)


@dataclass(frozen=True)
class _Cell:
    """What `read_step` reads: a step that has its parameters inside."""

    function: Callable[[Any, Any], Any]

    def step(self, params: Any, state: Any, x: Any) -> Any:
        return self.function(state, x)


def run(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    valid: jax.Array | None = None,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[Any, Any]:
    """A pure step over time, as fast as `jrnn.scan` can.

    Args:
      step: ``(carry, x) -> (carry, y)``.
      carry: before the first step.
      xs: ``(T, *B, ...)``, with zeros at steps that are not valid.
      valid: ``(T, *B)`` booleans or None: elsewhere the carry is held and outputs are zero.
      reverse: run from the last step to the first; outputs stay in the order of the inputs.
      unroll: how many steps to compile into one body, where the loop is a scan.

    Returns:
      The carry after the last valid step, and the outputs of all steps.
    """
    if valid is None:
        return scan(step, carry, xs, reverse=reverse, unroll=unroll)
    some = valid.any(0)
    last, ys = _run_valid(step, _finite(some, carry), xs, valid, reverse, unroll)
    return held(some, last, carry), ys


def _finite(some: jax.Array, carry: Any) -> Any:
    """The carry without what is not finite in that of sequences that have no step.

    It is held over all steps, where a NaN would meet the zero gradients of these steps.
    """

    def one(leaf: Any) -> Any:
        if not _has(some.shape, leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(expand(some, leaf) | jnp.isfinite(leaf), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(one, carry)


def _run_valid(step: Any, carry: Any, xs: Any, valid: jax.Array, reverse: bool, unroll: int) -> tuple[Any, Any]:
    time = valid.shape[0]
    if time and _each_has_batch_axes(step, carry, xs, valid.shape[1:]):
        steps = Steps(valid=valid, reverse=reverse, unroll=times_in_a_body(unroll, time))
        task = Task(_Cell(step), None, None, xs, carry, None, steps)
        form = read_step(task)
        if not isinstance(form, Refusal):
            task = replace(task, form=form)
            found = form.plan(task, None)
            if not isinstance(found, Refusal):
                _, plan = found
                return plan(task)

    def masked(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, valid = inputs
        new, y = step(carry, x)
        return held(valid, new, carry), zero_padding(valid, y)

    return scan(masked, carry, (xs, valid), reverse=reverse, unroll=unroll)


def _each_has_batch_axes(step: Any, carry: Any, xs: Any, batch_shape: tuple[int, ...]) -> bool:
    out = jax.eval_shape(step, carry, jax.tree.map(of_one_step, xs))
    return all(_has(batch_shape, leaf) for leaf in jax.tree.leaves((carry, out)))
