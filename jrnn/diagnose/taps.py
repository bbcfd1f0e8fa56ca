"""Taps: a layer in its place in the model, run with something added to its state or recorded."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.cells.base import Layer, compute_params, emitted, output
from jrnn.diagnose.arrays import float_parts, is_float
from jrnn.diagnose.gates import Call, find_gates, listening
from jrnn.schedules.steps import restarts, scan, select


class Tapped(NamedTuple):
    params: Any
    extra: Any


class Shifts(NamedTuple):
    """What is added to the state: before the first step, and after each step."""

    initial: list[jax.Array]
    steps: list[jax.Array]


@dataclass(frozen=True)
class Tap(Layer):
    """Stands for a layer in a model; its parameters are the layer's and something extra."""

    cell: Any

    @property
    def uses_key(self) -> Any:
        return self.cell.uses_key

    @property
    def event_ndim(self) -> Any:
        return self.cell.event_ndim

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        return self.cell.initial_state(params.params, batch_shape)

    def out_features(self, in_features: Any) -> int:
        return self.cell.out_features(in_features)

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        return params._replace(params=self.cell.draw(params.params, key, batch_shape, in_features))

    def check(self, params: Any, x: Any) -> None:
        self.cell.check(params.params, x)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        self.cell.check_values(xs, lengths, mask)

    def scan(self, run: Any, params: Any, xs: jax.Array, state: Any, extra: Any, step: Any) -> Any:
        """The library's loop, over ``step(params, state, p, extra_t, key) -> (state, anything)``."""
        params, project, _ = _parts(self.cell, params, xs)
        # Validity is handled here and not in the loop, whose output is an array; ours may be a tree.
        steps = replace(run.steps, valid=None, remat=None, unroll=1)

        def held(params: Any, old: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
            p, extra, valid = inputs
            new, out = step(params, old, p, extra, key)
            return (new if valid is None else select(valid, new, old)), out

        restart = restarts(self.cell, params, xs, state, steps)
        inputs = lambda w, xs: (project(w, xs), extra, run.steps.valid)
        return scan(params, xs, state, restart, steps, inputs, held)


class Shifted(Tap):
    """Adds to the state before the first and after every step. ``y`` follows where it is a part of the state."""

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        params, shifts = params
        update = _parts(self.cell, params, xs)[2]

        def step(params: Any, state: Any, p: Any, shift: Any, key: Any) -> tuple[Any, jax.Array]:
            new, y = update(params, state, p, key)
            shifted = _add(new, shift)
            for before, after in zip(jax.tree.leaves(new), jax.tree.leaves(shifted), strict=True):
                if y is before:  # the very array: reading it is reading the state
                    return shifted, after
            if getattr(self.cell, "emits", None) is not None:
                return shifted, output(self.cell, shifted).astype(y.dtype)
            return shifted, y

        state, ys = self.scan(run, params, xs, _add(state, shifts.initial), shifts.steps, step)
        return state, run.zero_invalid(emitted(ys, xs))


class Recorded(Tap):
    """Returns what every step was given in place of the final state."""

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        update = _parts(self.cell, params.params, xs)[2]

        def step(params: Any, state: Any, p: Any, extra: Any, key: Any) -> tuple[Any, Any]:
            new, y = update(params, state, p, key)
            return new, (y, state)

        _, (ys, states) = self.scan(run, params.params, xs, state, (), step)
        keys, resets = run.step_keys(xs.shape[0]), run.steps.resets
        trace = Trace(params.params, xs, states, keys, resets, jnp.asarray(run.steps.reverse))
        return trace, run.zero_invalid(emitted(ys, xs))


def _parts(cell: Any, params: Any, xs: jax.Array) -> tuple[Any, Any, Any]:
    """``(params, project, update)`` of a cell, which is its step where it declares no projection."""
    if getattr(cell, "hoistable", False):
        return compute_params(params, xs.dtype), cell.project, cell.update
    return params, lambda params, xs: xs, cell.step


def _add(state: Any, shifts: list[jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten(state)
    left = iter(shifts)
    return jax.tree.unflatten(structure, [leaf + next(left) if is_float(leaf) else leaf for leaf in leaves])


class Trace(NamedTuple):
    """What the steps of one layer were given: ``states[t]`` is the state that step t consumed, after any reset."""

    params: Any
    xs: jax.Array
    states: Any
    keys: jax.Array | None
    resets: jax.Array | None
    reverse: jax.Array

    def jacobian(self, cell: Any, step: int) -> jax.Array:
        """``(*B, N, N)``: row i, column j is how number i of the new state depends on number j of the old one."""
        state = jax.tree.map(lambda a: a[step], self.states)
        return _step_jacobian(cell, self.params, state, self.xs[step], None if self.keys is None else self.keys[step])

    def gates(self, cell: Any, names: tuple[str, ...]) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
        """The activations of each gate, ``(T, *B, H)``, and their functions."""
        if not getattr(cell, "hoistable", False):
            raise TypeError(
                f"layer: expected a cell that declares its input projection, which tells its gates apart, got "
                f"{cell!r}; make it a jrnn.AffineCell, or define project and update"
            )
        params = compute_params(self.params, self.xs.dtype)
        ps = cell.project(params, self.xs)

        def calls(params: Any, state: Any, p: Any, key: Any) -> list[Call]:
            heard: list[Call] = []
            listening(cell, heard).update(params, state, p, key)
            return heard

        found, functions = find_gates(cell, names, params, self.states, ps, calls)

        def values(state: Any, p: Any, key: Any) -> tuple[jax.Array, ...]:
            heard = calls(params, state, p, key)
            return tuple(heard[i].value for i in found)

        return jax.jit(jax.vmap(values))(self.states, ps, self.keys), functions


@functools.partial(jax.jit, static_argnums=0)
def _step_jacobian(cell: Any, params: Any, state: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
    params, project, update = _parts(cell, params, x)
    leaves, structure = jax.tree.flatten(state)
    batch = x.shape[: x.ndim - cell.event_ndim]
    floats, _, sizes = float_parts(state, len(batch))

    def step(floats: list[jax.Array]) -> list[jax.Array]:
        left = iter(floats)
        old = jax.tree.unflatten(structure, [next(left) if is_float(leaf) else leaf for leaf in leaves])
        new, _ = update(params, old, project(params, x), key)
        return [leaf for leaf in jax.tree.leaves(new) if is_float(leaf)]

    def column(unit: jax.Array) -> jax.Array:
        # Sequences do not depend on each other: one tangent moves the same number of all of them at once.
        parts = jnp.split(unit, np.cumsum(sizes)[:-1])
        tangents = [
            jnp.broadcast_to(part.reshape(leaf.shape[len(batch) :]), leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, floats, strict=True)
        ]
        _, moved = jax.jvp(step, (floats,), (tangents,))
        wide = np.result_type(*(m.dtype for m in moved))
        return jnp.concatenate(
            [m.reshape(*batch, size).astype(wide) for m, size in zip(moved, sizes, strict=True)], axis=-1
        )

    return jax.vmap(column, out_axes=-1)(jnp.eye(sum(sizes)))
