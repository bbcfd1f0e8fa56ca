"""All steps of a linear cell at once: its coefficients for all T, one `linear_scan`, its outputs for all T.

A step that is not valid is one that keeps the state: ``a`` is 1 and ``b`` is 0 there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn._core.devices import varying_as
from jrnn.cells.base import compute_params, emitted
from jrnn.cells.linear import LinearCell
from jrnn.schedules.linear import choose_linear, linear_scan
from jrnn.schedules.steps import Steps, checkpointed, expand, restarts, select, zeroed

__all__ = ["run", "serves"]


def serves(cell: Any, params: Any, xs: Any, steps: Steps) -> tuple[bool, str]:
    if not (isinstance(cell, LinearCell) and cell.is_linear):
        return False, "it runs linear cells (jrnn.LinearCell), whose step is h = a * h + b, with a and b of the input"
    state = jax.eval_shape(lambda params: cell.initial_state(params, xs.shape[1:-1]), params)
    name, reason = choose_linear((xs.shape[0], *state[0].shape), state[0].dtype, None, xs)
    return True, f"the cell is linear in its state, and runs as jrnn.linear_scan ({name}: {reason})"


def run(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> tuple[Any, jax.Array]:
    restart = restarts(cell, params, xs, state, steps)
    params = compute_params(params, xs.dtype)

    def segment(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        return _segment(cell, params, state, restart, steps.reverse, *inputs)

    inputs = (xs, steps.valid, steps.resets)
    if xs.shape[0] == 0:
        ys = jax.eval_shape(segment, state, jax.tree.map(_one_step, inputs))[1]
        return state, emitted(jnp.zeros((0, *ys.shape[1:]), ys.dtype), xs)
    state, ys = checkpointed(segment, state, inputs, xs.shape[0], steps)
    return state, emitted(ys, xs)


def _one_step(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)


def _segment(
    cell: Any, params: Any, state: Any, restart: Any, reverse: bool, xs: jax.Array, valid: Any, resets: Any
) -> tuple[Any, jax.Array]:
    inputs, rest = xs, state[1:]
    if cell.window > 1:
        before = Before(xs.shape[0], valid, resets, reverse)
        taps, past = before.taps(xs.astype(state[1].dtype), state[1], None if resets is None else restart[1])
        inputs, rest = jnp.concatenate([tap.astype(xs.dtype) for tap in (*taps, xs)], -1), (past,)
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
    return last, ys if valid is None else zeroed(valid, ys)


class Before:
    """For each step the valid one before it, in the order in which steps are run."""

    def __init__(self, time: Any, valid: Any, resets: Any, reverse: bool) -> None:
        self.resets, self.reverse, self.valid = resets, reverse, valid
        if valid is not None:
            times = expand(jnp.arange(time, dtype=jnp.int32), valid)
            if reverse:
                seen = lax.cummin(jnp.where(valid, times, time), axis=0, reverse=True)
                self.last = seen[0]
                self.step = jnp.concatenate([seen[1:], jnp.full_like(seen[:1], time)])
            else:
                seen = lax.cummax(jnp.where(valid, times, -1), axis=0)
                self.last = seen[-1]
                self.step = jnp.concatenate([jnp.full_like(seen[:1], -1), seen[:-1]])
            self.time = time

    def taps(self, xs: jax.Array, past: jax.Array, restart: Any) -> tuple[list[jax.Array], jax.Array]:
        """The inputs of the steps before each, the oldest first, and those that a step after all of these would see.

        ``past (*B, taps, F)`` are the inputs before the first step, and ``restart`` those that a reset leaves.
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
        return self._taken(xs, self.step, first)

    def _at_end(self, xs: jax.Array, first: jax.Array) -> jax.Array:
        if self.valid is None:
            return xs[0 if self.reverse else -1]
        return self._taken(xs, self.last[None], first)[0]

    def _taken(self, xs: jax.Array, step: jax.Array, first: jax.Array) -> jax.Array:
        """``xs`` of the given steps, ``first`` where there is none."""
        inside = (step >= 0) & (step < self.time)
        found = jnp.take_along_axis(xs, expand(jnp.clip(step, 0, self.time - 1), xs), axis=0)
        return select(inside, found, jnp.broadcast_to(first, found.shape))
