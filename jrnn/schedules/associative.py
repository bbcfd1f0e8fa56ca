"""Runs all steps of a linear cell at once: the coefficients for all T, one `linear_scan`, the outputs for all T.

On a CPU a long sequence runs in chunks, whose coefficients stay in the cache between the matmul, the recurrence and the
outputs. The backward pass recomputes the coefficients of each chunk: a second matmul takes less time than writing the
coefficients of all steps to memory and reading them back.

At an invalid step ``a`` is 1 and ``b`` is 0, so that the state is held.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.devices import varying_as
from jrnn.cells.form import LinearForm
from jrnn.cells.linear import LinearCell
from jrnn.schedules.linear import choose_linear, linear_scan
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import chunked, expand, latest, select, taken

__all__ = ["chunk_of", "plan", "run", "windows"]

CHUNK = 2**17  # elements of one coefficient in a chunk: half a megabyte in float32


def plan(task: Task) -> Plan | Refusal:
    if not isinstance(task.form, LinearForm):
        return Refusal("it runs linear cells (jrnn.LinearCell): h = a * h + b, where a and b depend only on the input")
    h = task.state[0]
    name, reason = choose_linear((task.xs.shape[0], *h.shape), h.dtype, None, task.xs)
    reason = f"the cell is linear in its state, and runs as jrnn.linear_scan ({name}: {reason})"
    return Plan(run, reason, chunk_of(task.xs.shape[0], math.prod(h.shape), name), of_form=True)


def chunk_of(time: Any, numbers: int, name: str) -> int | None:
    """The number of steps in a chunk, for ``numbers`` coefficients a step; None to run all steps at once."""
    if name != "native" or not isinstance(time, int):
        return None
    chunk = max(1, CHUNK // max(1, numbers))
    return chunk if time > 4 * chunk else None


def run(chunk: int | None, task: Task) -> tuple[Any, Any]:
    steps, state = task.steps, task.state

    def segment(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        return _segment(task.form.cell, task.form.params, state, task.restart, steps.reverse, *inputs)

    inputs = (task.xs, steps.valid, steps.resets)
    if task.xs.shape[0] == 0:
        ys = jax.eval_shape(segment, state, jax.tree.map(_one_step, inputs))[1]
        return state, jnp.zeros((0, *ys.shape[1:]), ys.dtype)
    if chunk is None:
        return segment(state, inputs)
    return chunked(jax.checkpoint(segment, prevent_cse=False), state, inputs, task.xs.shape[0], chunk, steps.reverse)


def _one_step(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)


def _segment(
    cell: Any, params: Any, state: Any, restart: Any, reverse: bool, xs: jax.Array, valid: Any, resets: Any
) -> tuple[Any, jax.Array]:
    inputs, rest = windows(cell, state, restart, reverse, xs, valid, resets)
    a, b = cell.coefficients_of(params, inputs)
    if resets is not None and type(cell).initial_state is not LinearCell.initial_state:
        reset = expand(resets, b)
        b = b + jnp.where(reset, a * restart[0], jnp.zeros((), b.dtype))
    if valid is not None:
        held = expand(valid, b)
        a = jnp.where(held, a, jnp.ones((), a.dtype))
        b = jnp.where(held, b, jnp.zeros((), b.dtype))
    hs = linear_scan(a, b, varying_as(state[0], a, b), resets=resets, reverse=reverse)
    ys = cell.readout(params, hs, inputs)
    last = type(state)(hs[0 if reverse else -1], *rest)
    return last, ys


def windows(
    cell: Any, state: Any, restart: Any, reverse: bool, xs: jax.Array, valid: Any, resets: Any
) -> tuple[jax.Array, Any]:
    """The inputs of the last ``cell.window`` steps side by side, for all steps, and the new fields beside h."""
    if cell.window == 1:
        return xs, state[1:]
    before = Before(xs.shape[0], valid, resets, reverse)
    taps, past = before.taps(xs.astype(state[1].dtype), state[1], None if resets is None else restart[1])
    return jnp.concatenate([tap.astype(xs.dtype) for tap in (*taps, xs)], -1), (past,)


class Before:
    """For each step, the last valid step before it in the order of the run."""

    def __init__(self, time: Any, valid: Any, resets: Any, reverse: bool) -> None:
        self.resets, self.reverse, self.valid = resets, reverse, valid
        if valid is not None:
            seen = latest(valid, reverse)
            if reverse:
                self.last = seen[0]
                self.step = jnp.concatenate([seen[1:], jnp.full_like(seen[:1], time)])
            else:
                self.last = seen[-1]
                self.step = jnp.concatenate([jnp.full_like(seen[:1], -1), seen[:-1]])

    def taps(self, xs: jax.Array, past: jax.Array, restart: Any) -> tuple[list[jax.Array], jax.Array]:
        """The past inputs of each step, the oldest first, and the past inputs of a step that would follow the last.

        ``past (*B, taps, F)`` are the inputs before the first step. A reset replaces past inputs by ``restart``.
        """
        taps, tap, ends = [], xs, []
        for k in range(1, past.shape[-2] + 1):
            first = past[..., -k, :]
            ends.append(self._at_end(tap, first))
            tap = self._shifted(tap, first)
            if self.resets is not None:
                tap = select(self.resets, jnp.broadcast_to(restart[..., -k, :], tap.shape), tap)
            taps.append(tap)
        return taps[::-1], jnp.stack(ends[::-1], -2)

    def _shifted(self, xs: jax.Array, first: jax.Array) -> jax.Array:
        if self.valid is None:
            return jnp.concatenate([xs[1:], first[None]] if self.reverse else [first[None], xs[:-1]])
        return taken(xs, self.step, first)

    def _at_end(self, xs: jax.Array, first: jax.Array) -> jax.Array:
        if self.valid is None:
            return xs[0 if self.reverse else -1]
        return taken(xs, self.last[None], first)[0]
