"""Taps: run a model with one of its layers replaced by a version that shifts or records the layer's state."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.cells.base import Layer, compute_params, emitted, output
from jrnn.diagnose.arrays import float_parts, is_float
from jrnn.diagnose.gates import Call, find_gates, listening
from jrnn.run.unrolling import Run
from jrnn.schedules import Task, choose, newton
from jrnn.schedules.steps import restarts, scan, select


class Tapped(NamedTuple):
    """A model's parameters, and the extra argument of the tap."""

    params: Any
    extra: Any


class Shifts(NamedTuple):
    """The numbers that are added to the state: before the first step, and after each step."""

    initial: list[jax.Array]
    steps: list[jax.Array]


@dataclass(frozen=True)
class _Following(Run):
    """A run over time that calls ``reach`` for the layer at the end of a path, and runs every other layer as usual.

    ``parts`` are the children of the layer that is being walked, and ``met`` the indices of those that have run. Equal
    children are distinguished by the order in which they run.
    """

    path: tuple[int, ...] = ()
    parts: tuple[Layer, ...] = ()
    met: list[int] = field(default_factory=list)
    reach: Any = None

    def __call__(self, layer: Layer, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        index = next((i for i, part in enumerate(self.parts) if i not in self.met and part == layer), None)
        usual = Run(self.steps, self.batch_shape, self.backend, self.chosen)
        if index is None:
            return usual(layer, params, xs, state)
        self.met.append(index)
        if index != self.path[0]:
            return usual(layer, params, xs, state)
        layer.check(params, xs)
        if len(self.path) == 1:
            return self.reach(usual, layer, params, xs, state)
        inner = replace(self, path=self.path[1:], parts=layer.children(), met=[])
        return layer.walk(inner, params, xs, state)


@dataclass(frozen=True)
class Tap(Layer):
    """A model in which `run_cell` runs the layer at the end of a path. Its parameters are of the type `Tapped`."""

    model: Any
    path: tuple[int, ...]

    @property
    def uses_key(self) -> Any:
        return self.model.uses_key

    @property
    def event_ndim(self) -> Any:
        return self.model.event_ndim

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        return self.model.initial_state(params.params, batch_shape)

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        return params._replace(params=self.model.draw(params.params, key, batch_shape, in_features))

    def check(self, params: Any, x: Any) -> None:
        self.model.check(params.params, x)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        self.model.check_values(xs, lengths, mask)

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        found: list[Any] = []

        def reach(run: Any, cell: Any, own: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
            last, ys, kept = self.run_cell(run, cell, own, params.extra, xs, state)
            found.append(kept)
            return last, ys

        if self.path:
            follow = _Following(
                run.steps, run.batch_shape, run.backend, path=self.path, parts=self.model.children(), reach=reach
            )
            last, ys = self.model.walk(follow, params.params, xs, state)
        else:
            last, ys = reach(run, self.model, params.params, xs, state)
        if not found:
            raise TypeError(
                f"layer: expected {self.model!r} to run each of its children by run(child, params, xs, state), got a "
                "walk that does not run the chosen one; choose another"
            )
        return self.result(last, found[0]), ys

    def run_cell(self, run: Any, cell: Any, params: Any, extra: Any, xs: jax.Array, state: Any) -> Any:
        """The cell over all steps: its last state, its outputs, and a value that is passed to `result`."""
        raise NotImplementedError

    def result(self, last: Any, kept: Any) -> Any:
        """The value to return in place of the model's last state."""
        return kept


class Located(Tap):
    """Returns the last state of the layer in place of the model's."""

    def run_cell(self, run: Any, cell: Any, params: Any, extra: Any, xs: jax.Array, state: Any) -> Any:
        last, ys = run(cell, params, xs, state)
        return last, ys, last


class Shifted(Tap):
    """Adds to the state before the first and after every step. ``y`` follows where it is a part of the state."""

    def run_cell(self, run: Any, cell: Any, params: Any, extra: Any, xs: jax.Array, state: Any) -> Any:
        update = parts_of(cell, params, xs)[2]

        def step(params: Any, state: Any, p: Any, shift: Any, key: Any) -> tuple[Any, jax.Array]:
            new, y = update(params, state, p, key)
            shifted = _add(new, shift)
            for before, after in zip(jax.tree.leaves(new), jax.tree.leaves(shifted), strict=True):
                if y is before:  # y is a field of the state, so it is shifted too
                    return shifted, after
            if getattr(cell, "emits", None) is not None:
                return shifted, output(cell, shifted).astype(y.dtype)
            return shifted, y

        last, ys = _scan(run, cell, params, xs, _add(state, extra.initial), extra.steps, step)
        return last, run.zero_invalid(emitted(ys, xs)), None

    def result(self, last: Any, kept: Any) -> Any:
        return last


class Recorded(Tap):
    """Returns the arguments of every step in place of the final state."""

    def run_cell(self, run: Any, cell: Any, params: Any, extra: Any, xs: jax.Array, state: Any) -> Any:
        update = parts_of(cell, params, xs)[2]

        def step(params: Any, state: Any, p: Any, extra: Any, key: Any) -> tuple[Any, Any]:
            new, y = update(params, state, p, key)
            return new, (y, state)

        last, (ys, states) = _scan(run, cell, params, xs, state, (), step)
        keys, resets = run.step_keys(xs.shape[0]), run.steps.resets
        trace = Trace(params, xs, states, keys, resets, jnp.asarray(run.steps.reverse))
        return last, run.zero_invalid(emitted(ys, xs)), trace


class Solved(Tap):
    """Returns, in place of the final state, what Newton's method does on the layer's steps; its states are left out.

    It is given what `Run.scan` gives a schedule.
    """

    def run_cell(self, run: Any, cell: Any, params: Any, extra: Any, xs: jax.Array, state: Any) -> Any:
        last, ys = run(cell, params, xs, state)
        steps = run.steps.without_key() if cell.uses_key is False else run.steps
        choose(Task.of(cell, params, xs, state, steps), "newton")  # raises where it cannot run
        if not xs.shape[0]:
            lead = run.batch_shape
            return last, ys, newton.Solution(None, jnp.zeros(lead), jnp.ones(lead, bool), jnp.int32(0))
        if steps.valid is not None:
            state = select(steps.meets(), state, cell.initial_state(params, run.batch_shape))
        restart = restarts(cell, params, xs, state, steps)
        given = newton.Given(params, xs, state, restart, steps.valid, steps.resets)
        return last, ys, newton.solve(cell, steps.reverse, given)._replace(states=None)


def _scan(run: Any, cell: Any, params: Any, xs: jax.Array, state: Any, extra: Any, step: Any) -> Any:
    """The library's loop, over ``step(params, state, p, extra_t, key) -> (state, anything)``."""
    params, project, _ = parts_of(cell, params, xs)
    # Validity is handled here and not in the loop, whose output is an array; ours may be a tree.
    steps = replace(run.steps, valid=None, remat=None, unroll=1)

    def held(params: Any, old: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
        p, extra, valid = inputs
        new, out = step(params, old, p, extra, key)
        return (new if valid is None else select(valid, new, old)), out

    restart = restarts(cell, params, xs, state, steps)
    inputs = lambda w, xs: (project(w, xs), extra, run.steps.valid)
    return scan(params, xs, state, restart, steps, inputs, held)


def parts_of(cell: Any, params: Any, xs: jax.Array) -> tuple[Any, Any, Any]:
    """``(params, project, update)`` of a cell, which is its step where it declares no projection."""
    if getattr(cell, "hoistable", False):
        return compute_params(params, xs.dtype), cell.project, cell.update
    return params, lambda params, xs: xs, cell.step


def _add(state: Any, shifts: list[jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten(state)
    left = iter(shifts)
    return jax.tree.unflatten(structure, [leaf + next(left) if is_float(leaf) else leaf for leaf in leaves])


class Trace(NamedTuple):
    """The arguments of one layer's steps: ``states[t]`` is the state that step t consumed, after any reset."""

    params: Any
    xs: jax.Array
    states: Any
    keys: jax.Array | None
    resets: jax.Array | None
    reverse: jax.Array

    def jacobian(self, cell: Any, step: int) -> jax.Array:
        """``(*B, N, N)``: row i, column j is the derivative of number i of the new state by number j of the old one."""
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
    params, project, update = parts_of(cell, params, x)
    leaves, structure = jax.tree.flatten(state)
    batch = x.shape[: x.ndim - cell.event_ndim]
    floats, _, sizes = float_parts(state, len(batch))

    def step(floats: list[jax.Array]) -> list[jax.Array]:
        left = iter(floats)
        old = jax.tree.unflatten(structure, [next(left) if is_float(leaf) else leaf for leaf in leaves])
        new, _ = update(params, old, project(params, x), key)
        return [leaf for leaf in jax.tree.leaves(new) if is_float(leaf)]

    def column(unit: jax.Array) -> jax.Array:
        # Sequences are independent, so one tangent serves all of them: it moves the same number of each state.
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
