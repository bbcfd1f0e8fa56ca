"""Chunks of steps at once, for cells that say how (those with a matrix for a state); a scan over the chunks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.base import Cell, compute_params
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import chunked, expand

# Steps in a chunk, where remat does not say.
LENGTH = 64


def plan(task: Task) -> Plan | Refusal:
    if not _has_form(task.cell):
        return Refusal("the cell does not say how to run many steps at once")
    if not isinstance(task.xs.shape[0], int) or not task.xs.shape[0]:
        return Refusal("the number of steps is not known, or zero")
    return Plan(run, f"{LENGTH} steps at once, as products of matrices", recomputes=True)


def pays(task: Task) -> Refusal | None:
    """Wherever it serves; it has nothing to say of the many cells that have no such form."""
    return None if _has_form(task.cell) else Refusal("")


def _has_form(cell: Any) -> bool:
    return isinstance(cell, Cell) and type(cell).chunk is not Cell.chunk


def run(options: Any, task: Task) -> tuple[Any, Any]:
    cell, xs, steps = task.cell, task.xs, task.steps
    params = compute_params(task.params, xs.dtype)
    length = steps.chunk(xs.shape[0])

    def segment(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        xs, valid, resets = jax.tree.map(lambda a: jnp.flip(a, 0), inputs) if steps.reverse else inputs
        p = cell.project(params, xs)
        # A product of a chunk's steps has all of them in it, times zero where one does not see the other: what is not
        # finite stays out of it, and is put back where the steps one by one would have had it.
        bad, lost = _unsound(p, xs.ndim - cell.event_ndim), _unsound(state, xs.ndim - cell.event_ndim - 1)
        zero = jnp.zeros((), jnp.float32)
        state, ys = cell.chunk(params, _where(lost, zero, state), _where(bad, zero, p), valid, resets)
        spoilt = _spoilt(bad, lost, resets)
        nan = jnp.full((), jnp.nan, jnp.float32)
        state, ys = _where(spoilt[-1], nan, state), _where(spoilt, nan, ys)
        return state, jnp.flip(ys, 0) if steps.reverse else ys

    if length is not None:
        segment = jax.checkpoint(segment, prevent_cse=False)
    inputs = (xs, steps.valid, steps.resets)
    return chunked(segment, task.state, inputs, xs.shape[0], min(length or LENGTH, LENGTH), steps.reverse)


def _unsound(tree: Any, lead: int) -> jax.Array:
    """Where any number of a tree is not finite, over all axes but so many first ones."""
    found = [~jnp.isfinite(a).all(tuple(range(lead, a.ndim))) for a in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_or, found)


def _spoilt(bad: jax.Array, lost: jax.Array, resets: jax.Array | None) -> jax.Array:
    """The steps ``(C, *B)`` whose state has met what is not finite since the last reset, or since before the chunk."""
    times = expand(jnp.arange(bad.shape[0], dtype=jnp.int32), bad)
    last = lax.cummax(jnp.where(bad, times, jnp.where(lost[None], -1, -2)), axis=0)
    return last >= (-1 if resets is None else lax.cummax(jnp.where(resets, times, -1), axis=0))


def _where(flags: jax.Array, value: jax.Array, tree: Any) -> Any:
    """A tree with one number where flags ``(...)`` hold for its leaves ``(..., ·)``."""
    return jax.tree.map(lambda a: jnp.where(expand(flags, a), value.astype(a.dtype), a), tree)
