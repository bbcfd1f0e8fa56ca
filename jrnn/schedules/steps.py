"""What a schedule is told about the steps it runs, and the loop over time that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn._core.checks import describe, same_form
from jrnn._core.devices import placed_as
from jrnn.jaxprs.flat import calls

# Times are folded in as 32-bit unsigned integers; the last of them is kept for what is drawn once per sequence.
SEQUENCE = 0xFFFFFFFF


@dataclass(frozen=True)
class Steps:
    """How to run steps: which are valid, where to restart, in which order, with which randomness and memory.

    ``valid`` and ``resets`` are ``(T, *B)`` booleans or None. ``key`` is the run's key, ``start`` the absolute time of
    the first step and ``path`` the position of the layer in the model: the key of a step is ``key`` with the time and
    then each index of the path folded in. The numbers of a path may be traced.
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

    def parted(self) -> tuple[Steps, tuple[Any, ...]]:
        """What is static, and what is or may be traced: the same for layers that differ in their place alone."""
        random = (0, ()) if self.key is None else (self.start, self.path)
        static = replace(self, valid=None, resets=None, key=None, start=0, path=())
        return static, (self.valid, self.resets, self.key, *random)

    def joined(self, arrays: tuple[Any, ...]) -> Steps:
        """From both parts the whole."""
        valid, resets, key, start, path = arrays
        return replace(self, valid=valid, resets=resets, key=key, start=start, path=path)

    def opposite(self) -> Steps:
        """The same steps run from the other end, where a boundary is met at the last valid step before it."""
        resets = self.resets
        if resets is not None and resets.shape[0]:
            length = resets.shape[0]
            edge = jnp.zeros_like(resets[:1])
            if self.valid is None:
                resets = jnp.concatenate([edge, resets[:-1]] if self.reverse else [resets[1:], edge])
            else:
                # Steps that are not valid lie between two steps that are neighbours all the same.
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
        """``(*B)``: whether the given state meets a step, the first valid one, before a reset replaces it."""
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
        """Steps between those whose state is kept, None where all are."""
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
    """``(*B)`` booleans, with axes added to broadcast against ``(*B, ...)``."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def select(flags: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where flags hold and ``old`` elsewhere, leaf by leaf; never a product, which would pass NaN on."""
    return jax.tree.map(lambda n, o: jnp.where(expand(flags, o), n, o), new, old)


def restarts(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps) -> Any:
    """The state that a reset restores, or None where nothing resets; of parameters that are not yet rounded."""
    if steps.resets is None:
        return None
    return placed_as(cell.initial_state(params, xs.shape[1 : xs.ndim - cell.event_ndim]), state)


def zeroed(valid: jax.Array, tree: Any) -> Any:
    """Zeros at what is not valid, leaf by leaf."""
    return jax.tree.map(lambda a: jnp.where(expand(valid, a), a, jnp.zeros((), a.dtype)), tree)


def scan(
    cell: Any,
    params: Any,
    xs: jax.Array,
    state: Any,
    restart: Any,
    steps: Steps,
    project: Callable[[Any, jax.Array], Any],
    step: Callable[..., tuple[Any, jax.Array]],
    loop: Callable[..., tuple[Any, Any]] = lax.scan,
) -> tuple[Any, jax.Array]:
    """``step(params, state, p, key)`` over what ``project(params, xs)`` gives, under the sequence contract.

    ``loop`` runs a body as `jax.lax.scan` does.
    """
    length = xs.shape[0]

    def body(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        p, valid, resets, time = inputs
        if resets is not None:
            state = select(resets, restart, state)
        new, y = step(params, state, p, steps.key_at(time))
        if valid is not None:
            new = select(valid, new, state)
            y = zeroed(valid, y)
        return new, y

    def segment(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        # The projection is made inside the segment, so that with remat it is recomputed and not kept for all T.
        xs, *rest = inputs
        unroll = times_in_a_body(steps.unroll, xs.shape[0])
        return loop(body, state, (project(params, xs), *rest), None, steps.reverse, unroll)

    inputs = (xs, steps.valid, steps.resets, steps.times(length))
    return checkpointed(segment, state, inputs, length, steps)


def times_in_a_body(unroll: int, count: Any) -> int:
    """How many of ``count`` steps a body holds; a count may be a symbol, as in a program exported for any length."""
    return max(1, min(unroll, count)) if unroll > 1 else 1


def checkpointed(segment: Any, state: Any, inputs: Any, length: int, steps: Steps) -> tuple[Any, Any]:
    """Runs a segment function over all steps, in chunks whose insides are recomputed backwards (Chen et al. 2016)."""
    chunk = steps.chunk(length)
    if chunk is None:
        return segment(state, inputs)
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

    # The steps that fill no chunk run last, whichever end is last.
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
    """The form of the state after a step.

    Raises where structure, shapes and dtypes are not those of the state before, and where the step draws what is drawn
    once per sequence.
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
