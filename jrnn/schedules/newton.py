"""Runs all steps of any cell at once, by Newton's method over the whole sequence (DEER; Lim et al. 2024).

The states ``s[t] = F[t](s[t-1])`` of all steps are the root of one system of equations. From a guess ``s`` of all
states, each iteration solves the equations linearised at ``s``, which form one linear recurrence::

    d[t] = J[t] d[t-1] + F[t](s[t-1]) - s[t]        J[t] the Jacobian of F[t] at s[t-1]        then s[t] + d[t]

For states of at most `DENSE` numbers, ``J[t]`` is the whole Jacobian and the recurrence an associative scan of
matrices. For larger states, ``J[t]`` is its diagonal (quasi-DEER; Gonzalez et al. 2024) and the recurrence a
`linear_scan`. If the residual of a sequence grew in an iteration, its Jacobians are halved in the next; otherwise
halved Jacobians are doubled again. With Jacobians of zero the method iterates ``F``, which is exact after T iterations.

A sequence has converged if no residual ``F[t](s[t-1]) - s[t]`` exceeds rounding error. Its states are then as accurate
as those of a scan, which rounds at each step too. Sequences that have not converged after `ITERATIONS` are run by a
scan, inside the same program. The derivative is that of the equations at their root, ``s[t] = F[t](s[t-1])``::

    ds[t] = J[t] ds[t-1] + (dF[t])(s[t-1])        dF[t] the tangent of F[t] at fixed s[t-1]

which is the same linear recurrence, with the whole Jacobian.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn.cells.base import Cell
from jrnn.schedules.linear import linear_scan
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import expand, select

__all__ = ["DENSE", "ITERATIONS", "Solution", "plan", "run", "solve"]

DENSE = 16  # the largest number of elements of a state for which whole Jacobians are used
ITERATIONS = 40
ROUNDING = 32  # units in the last place that a residual may have


def plan(task: Task) -> Plan | Refusal:
    cell, params, xs = task.cell, task.params, task.xs
    if not (isinstance(cell, Cell) or hasattr(cell, "step")):
        return Refusal("it runs cells, which have a step")
    if task.steps.key is not None and cell.uses_key is not False:
        return Refusal("it does not support cells that may draw random numbers at each step")
    if not jax.sharding.get_abstract_mesh().empty:
        return Refusal("a mesh is set, and it does not support arrays that lie on one")
    if not isinstance(xs.shape[0], int):
        return Refusal("T is a symbol, and it iterates over all steps at once")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(task.state)}
    if len(dtypes) != 1 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        found = ", ".join(sorted(map(str, dtypes))) or "nothing"
        return Refusal(f"it solves for a state of real numbers of one dtype, and this one has {found}")
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: cell.initial_state(p, ()), params)))
    kind = "whole Jacobians" if size <= DENSE else "the diagonals of Jacobians"
    return Plan(run, f"Newton's method over all steps at once, with {kind}; a scan where it does not converge")


class Given(NamedTuple):
    """The data of the equations. ``restart``, ``valid`` and ``resets`` may be None."""

    params: Any
    xs: Any
    state: Any
    restart: Any
    valid: Any
    resets: Any


class Solution(NamedTuple):
    """The states after every step, ``(T, *B, ...)``. For each sequence, its largest residual, in units of the rounding
    error of the state, and whether it converged. The number of iterations."""

    states: Any
    residual: jax.Array
    converged: jax.Array
    iterations: jax.Array


def run(options: Any, task: Task) -> tuple[Any, Any]:
    cell, params, xs, state, steps = task.cell, task.params, task.xs, task.state, task.steps
    if xs.shape[0] == 0:
        ys = jax.eval_shape(lambda x: cell.step(params, state, x), jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype))[1]
        return state, jax.tree.map(lambda y: jnp.zeros((0, *y.shape), y.dtype), ys)
    given = Given(params, xs, state, task.restart, steps.valid, steps.resets)
    states = solve(cell, steps.reverse, given).states
    _, ys = _steps(cell, params, before(states, given, steps.reverse), xs)
    return jax.tree.map(lambda s: s[0 if steps.reverse else -1], states), ys


# --- the equations -----------------------------------------------------------------------------------------------


def _steps(cell: Any, params: Any, states: Any, xs: jax.Array) -> tuple[Any, Any]:
    """One step at every time, each from its own state."""
    return jax.vmap(lambda state, x: cell.step(params, state, x))(states, xs)


def before(states: Any, given: Given, reverse: bool) -> Any:
    """The state that each step starts from, given the states after every step."""

    def shifted(after: Any, first: Any) -> Any:
        return jnp.concatenate([after[1:], first[None]] if reverse else [first[None], after[:-1]])

    old = jax.tree.map(shifted, states, given.state)
    if given.resets is None:
        return old
    return select(given.resets, jax.tree.map(lambda r, o: jnp.broadcast_to(r, o.shape), given.restart, old), old)


def image(cell: Any, given: Given, old: Any) -> Any:
    """``F``: the state after each step, given the state before it."""
    new, _ = _steps(cell, given.params, old, given.xs)
    return new if given.valid is None else select(given.valid, new, old)


def _equations(cell: Any, reverse: bool, given: Given, states: Any) -> Any:
    return image(cell, given, before(states, given, reverse))


def _batch(cell: Any, xs: Any) -> tuple[int, ...]:
    return xs.shape[: xs.ndim - cell.event_ndim]


def _vector(tree: Any, lead: tuple[int, ...]) -> jax.Array:
    """States as vectors, ``(*lead, n)``."""
    leaves = [leaf.reshape(*lead, math.prod(leaf.shape[len(lead) :])) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves, -1)


def _tree(vectors: jax.Array, like: Any) -> Any:
    """Vectors as states again."""
    leaves, tree = jax.tree.flatten(like)
    lead, place, found = vectors.ndim - 1, 0, []
    for leaf in leaves:
        size = math.prod(leaf.shape[lead:])
        found.append(vectors[..., place : place + size].reshape(leaf.shape))
        place += size
    return jax.tree.unflatten(tree, found)


# --- the root of the equations, and its derivative ---------------------------------------------------------------


def solve(cell: Any, reverse: bool, given: Given) -> Solution:
    """Solves the equations for the states after every step."""
    states, rest = _root(cell, reverse, given)
    return Solution(states, *rest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _root(cell: Any, reverse: bool, given: Given) -> Any:
    lead = _batch(cell, given.xs)
    dtype = jax.tree.leaves(given.state)[0].dtype
    limit = jnp.array(ROUNDING, dtype)
    guess = jax.tree.map(lambda s: jnp.broadcast_to(s, (lead[0], *s.shape)), given.state)

    def residual(s: jax.Array, f: jax.Array) -> jax.Array:
        units = jnp.abs(f - s) / (jnp.finfo(dtype).eps * (1 + jnp.abs(f)))
        return jnp.max(units, (0, -1), initial=0) if units.size else jnp.zeros(lead[1:], dtype)

    def unsolved(carry: Any) -> jax.Array:
        _, found, _, count = carry
        return (count < ITERATIONS) & jnp.any(~(found <= limit))  # NaN is no solution

    def improved(carry: Any) -> Any:
        s, last, damping, count = carry
        old = before(_tree(s, guess), given, reverse)
        f = _vector(image(cell, given, old), lead)
        found = residual(s, f)
        damping = jnp.where(found <= last, jnp.minimum(1, 2 * damping), 0.5 * damping)
        d = _newton(cell, reverse, given, old, damping, f - s)
        better = jnp.where(jnp.isfinite(d), s + d, f)
        done = (found <= limit)[..., None]
        return jnp.where(done, s, better), found, damping, count + 1

    start = (_vector(guess, lead), jnp.full(lead[1:], jnp.inf, dtype), jnp.ones(lead[1:], dtype), jnp.int32(0))
    s, found, _, count = lax.while_loop(unsolved, improved, start)
    converged = found <= limit

    def scanned(s: jax.Array) -> jax.Array:
        return jnp.where(converged[..., None], s, _vector(_scan(cell, reverse, given), lead))

    s = lax.cond(jnp.all(converged), lambda s: s, scanned, s)
    return _tree(s, guess), (found, converged, count)


def _scan(cell: Any, reverse: bool, given: Given) -> Any:
    def body(state: Any, inputs: Any) -> Any:
        x, valid, resets = inputs
        old = state if resets is None else select(resets, given.restart, state)
        new, _ = cell.step(given.params, old, x)
        new = new if valid is None else select(valid, new, old)
        return new, new

    return lax.scan(body, given.state, (given.xs, given.valid, given.resets), reverse=reverse)[1]


def _along(cell: Any, given: Given, old: Any, direction: Any) -> Any:
    """The product of each step's Jacobian with a direction."""
    return jax.jvp(lambda old: image(cell, given, old), (old,), (direction,))[1]


def _units(old: Any, lead: tuple[int, ...]) -> tuple[jax.Array, Any]:
    vectors = _vector(old, lead)
    eye = jnp.eye(vectors.shape[-1], dtype=vectors.dtype)

    def of(unit: jax.Array) -> Any:
        return _tree(jnp.broadcast_to(unit, vectors.shape), old)

    return eye, of


def _jacobians(cell: Any, given: Given, old: Any) -> jax.Array:
    """The Jacobians of all steps, ``(T, *B, n, n)``, which are zero at resets."""
    lead = _batch(cell, given.xs)
    eye, of = _units(old, lead)
    columns = jax.vmap(lambda unit: _vector(_along(cell, given, old, of(unit)), lead))(eye)
    found = jnp.moveaxis(columns, 0, -1)
    return found if given.resets is None else jnp.where(expand(given.resets, found), jnp.zeros((), found.dtype), found)


def _newton(cell: Any, reverse: bool, given: Given, old: Any, damping: jax.Array, rest: jax.Array) -> jax.Array:
    """The update ``d`` of one iteration."""
    lead, n = _batch(cell, given.xs), rest.shape[-1]
    if n <= DENSE:
        return _matrix_scan(damping[..., None, None] * _jacobians(cell, given, old), rest, reverse)
    eye, of = _units(old, lead)
    # One unit after another, since all at once would take n times the memory.
    diagonal = lax.map(lambda unit: jnp.sum(unit * _vector(_along(cell, given, old, of(unit)), lead), -1), eye)
    return linear_scan(damping[..., None] * jnp.moveaxis(diagonal, 0, -1), rest, resets=given.resets, reverse=reverse)


def _matrix_scan(a: jax.Array, b: jax.Array, reverse: bool) -> jax.Array:
    """``h[t] = a[t] @ h[t-1] + b[t]``."""

    def combine(one: Any, other: Any) -> Any:
        (a1, b1), (a2, b2) = one, other
        return a2 @ a1, jnp.squeeze(a2 @ b1[..., None], -1) + b2

    return lax.associative_scan(combine, (a, b), reverse=reverse)[1]


@_root.defjvp
def _root_jvp(cell: Any, reverse: bool, primals: Any, tangents: Any) -> Any:
    (given,), (moved,) = primals, tangents
    states, rest = _root(cell, reverse, given)
    lead = _batch(cell, given.xs)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(given)]
    tree: Any
    leaves, tree = jax.tree.flatten(given)
    found = iter(leaf for leaf, is_inexact in zip(jax.tree.leaves(moved), inexact, strict=True) if is_inexact)

    def of(*values: Any) -> Any:
        whole, each = list(leaves), iter(values)
        whole = [next(each) if is_inexact else leaf for leaf, is_inexact in zip(leaves, inexact, strict=True)]
        return _equations(cell, reverse, tree.unflatten(whole), states)

    moving = tuple(leaf for leaf, is_inexact in zip(leaves, inexact, strict=True) if is_inexact)
    direct = jax.jvp(of, moving, tuple(found))[1]
    old = before(states, given, reverse)
    if _vector(direct, lead).shape[-1] <= DENSE:
        dstates = _tree(_matrix_scan(_jacobians(cell, given, old), _vector(direct, lead), reverse), states)
    else:
        dstates = _carried(cell, reverse, given, old, direct)
    return (states, rest), (dstates, jax.tree.map(_no_tangent, rest))


def _no_tangent(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _carried(cell: Any, reverse: bool, given: Given, old: Any, direct: Any) -> Any:
    """``d[t] = J[t] d[t-1] + direct[t]`` step by step, for Jacobians that are too large to store."""

    def body(d: Any, inputs: Any) -> Any:
        x, valid, resets, state, b = inputs
        zeros = jax.tree.map(jnp.zeros_like, d)
        d = d if resets is None else select(resets, zeros, d)
        new = jax.jvp(lambda state: cell.step(given.params, state, x)[0], (state,), (d,))[1]
        new = new if valid is None else select(valid, new, d)
        d = jax.tree.map(jnp.add, new, b)
        return d, d

    zeros = jax.tree.map(jnp.zeros_like, given.state)
    return lax.scan(body, zeros, (given.xs, given.valid, given.resets, old, direct), reverse=reverse)[1]
