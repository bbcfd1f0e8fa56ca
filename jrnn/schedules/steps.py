"""The steps of a run (their validity, resets, order and keys), and the loop over time that all schedules share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn._core.checks import describe, same_form
from jrnn._core.devices import placed_as
from jrnn.jaxprs.flat import calls

# Times are folded into keys as 32-bit unsigned integers. The largest is reserved for draws once per sequence.
SEQUENCE = 0xFFFFFFFF


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("valid", "resets", "key", "start", "path"),
    meta_fields=("reverse", "remat", "unroll"),
)
@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a run: which are valid, where the state is reset, and their order, randomness and memory.

    ``valid`` and ``resets`` are ``(T, *B)`` booleans or None. ``key`` is the run's key, ``start`` the absolute time of
    the first step and ``path`` the position of the layer in the model: the key of a step is ``key`` with the time and
    then each index of the path folded in. The indices of a path may be traced.

    The class is a pytree. Layers that differ only in their position have the same tree structure.
    """

    valid: jax.Array | None = None
    resets: jax.Array | None = None
    reverse: bool = False
    key: jax.Array | None = None
    start: Any = 0
    path: tuple[Any, ...] = ()
    remat: int | str | None = None
    unroll: int = 1

    def child(self, index: int) -> Steps:
        return replace(self, path=(*self.path, index))

    def without_key(self) -> Steps:
        return replace(self, key=None, start=0, path=())

    def opposite(self) -> Steps:
        """The same steps run from the other end. A reset at t becomes a reset at the last valid step before t."""
        resets = self.resets
        if resets is not None and resets.shape[0]:
            length = resets.shape[0]
            edge = jnp.zeros_like(resets[:1])
            if self.valid is None:
                resets = jnp.concatenate([edge, resets[:-1]] if self.reverse else [resets[1:], edge])
            else:
                # Two valid steps are neighbours even if invalid steps lie between them.
                times = expand(jnp.arange(length, dtype=jnp.int32), resets)
                if self.reverse:
                    seen = lax.cummax(jnp.where(self.valid, times, -1), axis=0)
                    neighbour = jnp.concatenate([jnp.full_like(seen[:1], -1), seen[:-1]])
                else:
                    seen = lax.cummin(jnp.where(self.valid, times, length), axis=0, reverse=True)
                    neighbour = jnp.concatenate([seen[1:], jnp.full_like(seen[:1], length)])
                inside = (neighbour >= 0) & (neighbour < length)
                met = jnp.take_along_axis(resets, jnp.clip(neighbour, 0, length - 1), axis=0)
                resets = met & inside & self.valid
        return replace(self, reverse=not self.reverse, resets=resets)

    def meets(self) -> jax.Array:
        """``(*B)``: whether the given state reaches the first valid step, and is not replaced by a reset there."""
        if self.valid is None:
            raise ValueError("valid: expected booleans, got None")
        if self.resets is None:
            return self.valid.any(0)
        order = slice(None, None, -1) if self.reverse else slice(None)
        first = jnp.argmax(self.valid[order], axis=0)[None]
        return self.valid.any(0) & ~jnp.take_along_axis(self.resets[order], first, axis=0)[0]

    def times(self, length: int) -> jax.Array | None:
        if self.key is None:
            return None
        return jnp.arange(length, dtype=jnp.uint32) + jnp.asarray(self.start).astype(jnp.uint32)

    def chunk(self, length: int) -> int | None:
        """The number of steps from one stored state to the next, or None if every state is stored."""
        if self.remat is None or length < 2:
            return None
        return max(1, round(length**0.5)) if self.remat == "sqrt" else min(int(self.remat), length)

    def key_at(self, time: jax.Array | None) -> jax.Array | None:
        if self.key is None or time is None:
            return None
        key = jax.random.fold_in(self.key, time)
        for index in self.path:
            key = jax.random.fold_in(key, index)
        return key


def expand(flags: jax.Array, like: jax.Array) -> jax.Array:
    """``(*B)`` booleans with trailing axes added, to broadcast against ``(*B, ...)``."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def select(flags: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where flags hold and ``old`` elsewhere, leaf by leaf. Never by a product, which would propagate NaN."""
    return jax.tree.map(lambda n, o: jnp.where(expand(flags, o), n, o), new, old)


def latest(valid: jax.Array, reverse: bool) -> jax.Array:
    """``(T, *B)``: the last valid step up to each step, in the order of the run; -1 or T where there is none."""
    times = expand(jnp.arange(valid.shape[0], dtype=jnp.int32), valid)
    if reverse:
        return lax.cummin(jnp.where(valid, times, valid.shape[0]), axis=0, reverse=True)
    return lax.cummax(jnp.where(valid, times, -1), axis=0)


def taken(xs: jax.Array, step: jax.Array, first: jax.Array) -> jax.Array:
    """``xs (T, *B, ...)`` at the given steps, and ``first`` where a step is outside ``[0, T)``."""
    time = xs.shape[0]
    found = jnp.take_along_axis(xs, expand(jnp.clip(step, 0, time - 1), xs), axis=0)
    return select((step >= 0) & (step < time), found, jnp.broadcast_to(first, found.shape))


def restarts(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> Any:
    """The state that a reset restores, or None if there are no resets. The parameters are those before rounding."""
    if steps.resets is None:
        return None
    return placed_as(cell.initial_state(params, xs.shape[1 : xs.ndim - cell.event_ndim]), state)


def zeroed(valid: jax.Array, tree: Any) -> Any:
    """The leaves of a tree with zeros where ``valid`` is false."""
    return jax.tree.map(lambda a: jnp.where(expand(valid, a), a, jnp.zeros((), a.dtype)), tree)


def scan(
    params: Any,
    xs: jax.Array,
    state: Any,
    restart: Any,
    steps: Steps,
    project: Callable[[Any, jax.Array], Any],
    step: Callable[..., tuple[Any, jax.Array]],
    loop: Callable[..., tuple[Any, Any]] = lax.scan,
) -> tuple[Any, jax.Array]:
    """Runs ``step(params, state, p, key)`` over the results ``p`` of ``project(params, xs)``.

    At invalid steps the state is held, and the outputs are unspecified. ``loop`` has the interface of `jax.lax.scan`.
    """

    def body(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        p, valid, resets, time = inputs
        if resets is not None:
            state = select(resets, restart, state)
        new, y = step(params, state, p, steps.key_at(time))
        if valid is not None:
            new = select(valid, new, state)
        return new, y

    unroll = times_in_a_body(steps.unroll, xs.shape[0])
    inputs = (project(params, xs), steps.valid, steps.resets, steps.times(xs.shape[0]))
    return loop(body, state, inputs, None, steps.reverse, unroll)


def times_in_a_body(unroll: int, count: Any) -> int:
    """The number of steps in a loop body, at most ``count``, which is a symbol in a program exported for any length."""
    return max(1, min(unroll, count)) if unroll > 1 else 1


def checkpointed(run: Callable[[Any, Any, Steps], Any], xs: Any, state: Any, steps: Steps) -> tuple[Any, Any]:
    """``run(xs, state, steps)``, in chunks that the backward pass recomputes (Chen et al. 2016) if ``remat`` is set."""
    length = jax.tree.leaves(xs)[0].shape[0]
    chunk = steps.chunk(length)
    if chunk is None:
        return run(xs, state, steps)

    def segment(state: Any, inputs: Any) -> tuple[Any, Any]:
        xs, valid, resets, times = inputs
        start = 0 if times is None else times[0]
        return run(xs, state, replace(steps, valid=valid, resets=resets, start=start, remat=None))

    inputs = (xs, steps.valid, steps.resets, steps.times(length))
    return chunked(jax.checkpoint(segment, prevent_cse=False), state, inputs, length, chunk, steps.reverse)


def chunked(segment: Any, state: Any, inputs: Any, length: int, chunk: int, reverse: bool) -> tuple[Any, Any]:
    """A loop over chunks of steps, each run by ``segment(state, inputs) -> (state, outputs)``."""
    if chunk >= length:
        return segment(state, inputs)
    count, rest = divmod(length, chunk)

    def take(first: int, last: int) -> Any:
        return jax.tree.map(lambda a: a[first:last], inputs)

    def whole(state: Any, first: int) -> tuple[Any, Any]:
        chunks = jax.tree.map(lambda a: a.reshape(count, chunk, *a.shape[1:]), take(first, first + count * chunk))
        state, ys = lax.scan(segment, state, chunks, count, reverse)
        return state, jax.tree.map(lambda y: y.reshape(count * chunk, *y.shape[2:]), ys)

    # The steps that do not fill a chunk run last, in either direction.
    if not rest:
        return whole(state, 0)
    if reverse:
        state, later = whole(state, rest)
        state, earlier = segment(state, take(0, rest))
    else:
        state, earlier = whole(state, 0)
        state, later = segment(state, take(count * chunk, length))
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), earlier, later)


def check_remat(remat: Any) -> None:
    is_count = isinstance(remat, int) and not isinstance(remat, bool) and remat >= 1
    if not (remat is None or is_count or (isinstance(remat, str) and remat == "sqrt")):
        raise ValueError(f'remat: expected None, a positive number of steps or "sqrt", got {remat!r}')


def check_step(cell: Any, params: Any, x: Any, state: Any, key: Any) -> Any:
    """The shapes and dtypes of the state after a step.

    Raises if its structure, shapes or dtypes differ from those of the state before the step. Also raises if the step
    itself draws randomness that is drawn once per sequence.
    """
    traced, (new, _) = jax.make_jaxpr(cell.step, return_shape=True)(params, state, x, key)
    if calls(traced, "draw_in_step"):  # see `jrnn.cells.base.draw_in_step`
        raise TypeError(
            f"cell: expected the step of {cell!r} to draw nothing that is drawn once per sequence, but a part of it "
            "does, from parameters into which nothing was drawn; define draw(params, key, batch_shape, in_features) "
            "to return params with those of the part replaced by what its own draw returns (see jrnn.Layer.draw), and "
            "give these to the part in step"
        )
    if not same_form(new, state):
        raise TypeError(
            f"cell: expected the step of {cell!r} to return a state like the one it was given, {describe(state)}, got "
            f"{describe(new)}; a state keeps its structure, shapes and dtypes from step to step"
        )
    return new
