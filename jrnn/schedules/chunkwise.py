"""A scan over chunks of steps, for cells that compute a whole chunk at once (those whose state is a matrix)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.base import Cell, compute_params
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import chunked, expand

# The number of steps in a chunk, unless remat asks for fewer.
LENGTH = 64


def plan(task: Task) -> Plan | Refusal:
    if not _has_form(task.cell):
        return Refusal("the cell does not define how to run many steps at once (jrnn.Cell.chunk)")
    if not isinstance(task.xs.shape[0], int) or not task.xs.shape[0]:
        return Refusal("the number of steps is not known, or zero")
    return Plan(run, f"{LENGTH} steps at once, as products of matrices", recomputes=True)


def pays(task: Task) -> Refusal | None:
    """It pays wherever it serves. Other cells get a refusal without a reason, which `choose` leaves out."""
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
        # The matmuls of a chunk multiply later steps by zero instead of leaving them out. So numbers that are not
        # finite are replaced by zero, and NaN is put back where a run step by step would have it.
        # The barrier keeps XLA from folding the reduction over the zeros that a run begins with, which takes seconds.
        before, batch = lax.optimization_barrier(state), xs.ndim - cell.event_ndim
        bad, lost = _unsound(p, batch), _unsound(before, batch - 1)
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
    """Whether any number of a tree is not finite, reduced over all axes but the first ``lead``."""
    found = [~jnp.isfinite(a).all(tuple(range(lead, a.ndim))) for a in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_or, found)


def _spoilt(bad: jax.Array, lost: jax.Array, resets: jax.Array | None) -> jax.Array:
    """The steps ``(C, *B)`` whose state depends on a number that is not finite: since the last reset, such a number
    was in an input, or in the state before the chunk."""
    times = expand(jnp.arange(bad.shape[0], dtype=jnp.int32), bad)
    last = lax.cummax(jnp.where(bad, times, jnp.where(lost[None], -1, -2)), axis=0)
    return last >= (-1 if resets is None else lax.cummax(jnp.where(resets, times, -1), axis=0))


def _where(flags: jax.Array, value: jax.Array, tree: Any) -> Any:
    """A tree of leaves ``(..., ·)``, with ``value`` where flags ``(...)`` hold."""
    return jax.tree.map(lambda a: jnp.where(expand(flags, a), value.astype(a.dtype), a), tree)
