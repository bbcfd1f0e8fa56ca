"""Recurrent policies in reinforcement learning: acting, stored states, burn-in, and checks of `done` against `resets`.

Legend: T time, B batch (environments; any number of axes, or none), F input features, N windows. Sequences are
time-major. ``resets[t]`` is true where ``x[t]`` is the first observation of an episode; it is made from ``done`` flags
by `jrnn.sequence.resets_from_done`.

A rollout acts by `step`, and keeps observations, resets and the state that it began with. On-policy learners then run
``jrnn.unroll(model, params, xs, state, resets=resets)`` over it. Learners with a replay memory store the states at the
steps where windows may begin (`jrnn.emit_state` and `states_before` give those of all steps), draw windows by `sample`,
and run them by `replay`, which makes up for stored states that are out of date with a burn-in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn._core.checks import as_tree, describe, is_traced, non_negative_int, positive_int, readable
from jrnn.cells.base import Layer
from jrnn.compose.combine import stepless
from jrnn.run.unrolling import unroll
from jrnn.schedules.steps import select
from jrnn.sequence import _booleans, _integers

__all__ = [
    "Windows",
    "burn_in",
    "check_resets",
    "check_rollout",
    "replay",
    "sample",
    "states_before",
    "step",
    "windows_at",
]


def _check_model(model: Any) -> None:
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a layer, such as jrnn.gru(128) or a subclass of jrnn.Cell, got {model!r}")


def _alike(a: Any, b: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    return structures[0] == structures[1]


# --- acting ------------------------------------------------------------------------------------------------------


def step(
    model: Layer, params: Any, state: Any, x: Any, resets: Any = None, key: jax.Array | None = None
) -> tuple[Any, Any]:
    """One step with resets, for the loop that acts in an environment: the same as one step of `jrnn.unroll`.

    Args:
      model: a layer that has a step.
      params: its parameters.
      state: its state, with leaves ``(*B, ...)``.
      x: one observation for each environment, ``(*B, F)``, or ids ``(*B,)``.
      resets: ``(*B,)`` booleans, true where ``x`` is the first observation of an episode: the state is replaced by the
        initial one before ``x`` is consumed. None for no resets.
      key: the key of this step, as for `jrnn.Layer.step`; None runs without dropout.

    Returns:
      ``(state, y)``.

    Raises:
      TypeError: the model has no step, or resets are not boolean.
      ValueError: the state or the resets lack the batch axes of ``x``.

    >>> model = jrnn.gru(4)
    >>> params = model.init(jax.random.key(0), 3)
    >>> state = jax.tree.map(jnp.ones_like, model.initial_state(params, (2,)))
    >>> state, y = jrnn.rl.step(model, params, state, jnp.zeros((2, 3)), jnp.array([False, True]))
    >>> y.any(-1)
    Array([ True, False], dtype=bool)
    """
    _check_model(model)
    if stepless(model):
        raise TypeError(f"model: expected a layer that has a step, got {model!r}; act with the forward layer alone")
    x = jnp.asarray(x)
    if resets is not None:
        batch = x.shape[: x.ndim - model.event_ndim]
        resets = _booleans("resets", resets)
        if resets.shape != batch:
            raise ValueError(f"resets: expected shape {batch}, (*B,) of x {x.shape}, got {resets.shape}")
        start = model.initial_state(params, batch)
        if not _alike(state, start):
            raise ValueError(f"state: expected {describe(start)} for {model!r} and this batch, got {describe(state)}")
        state = select(resets, start, state)
    return model.step(params, state, x, key)


# --- stored states -----------------------------------------------------------------------------------------------


def states_before(first: Any, states: Any) -> Any:
    """The state before each step, which a replay memory stores, from the state after each step.

    Args:
      first: the state before the first step; leaves ``(*B, ...)``.
      states: the states after each of T steps, as `jrnn.emit_state` gives them; leaves ``(T, *B, ...)``.

    Returns:
      A tree of ``(T, *B, ...)``: ``first``, then all but the last of ``states``. Where ``resets[t]`` is true, the state
      before step t is that of the episode before: a run from there resets it.

    >>> jrnn.rl.states_before(jnp.zeros(1), jnp.array([[1.0], [2.0], [3.0]])).ravel()
    Array([0., 1., 2.], dtype=float32)
    """
    if not _alike(first, states):
        raise ValueError(f"states: expected a tree like first, {describe(first)}, got {describe(states)}")
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b])[:-1], first, states)


class Windows(NamedTuple):
    """Windows of stored sequences.

    Attributes:
      data: what was stored, ``(length, N, ...)``.
      state: the stored states at the windows' beginnings, ``(N, ...)``.
      times: ``(N,)`` integers, where in time each window begins.
      sequences: ``(N,)`` integers, of which sequence it is.

    >>> Windows._fields
    ('data', 'state', 'times', 'sequences')
    """

    data: Any
    state: Any
    times: jax.Array
    sequences: jax.Array


def windows_at(data: Any, states: Any, times: Any, sequences: Any, length: int, *, every: int = 1) -> Windows:
    """Windows of stored sequences that begin at given steps, with the states stored there.

    Args:
      data: a tree of ``(T, B, ...)``: observations, resets, actions, …
      states: a tree of ``(K, B, ...)``: the states before the steps 0, every, 2 * every, …
      times: ``(N,)`` integers in [0, T - length], multiples of ``every``: where each window begins.
      sequences: ``(N,)`` integers in [0, B): of which sequence it is.
      length: steps in a window, those of the burn-in included.
      every: how many steps there are from one stored state to the next.

    Raises:
      TypeError: times or sequences are not integers.
      ValueError: a window that is not within the data, or begins where no state is stored, where the host can read the
        times at once; data and states that do not fit one another.

    >>> data, states = {"x": jnp.arange(6.0).reshape(6, 1)}, jnp.arange(3.0).reshape(3, 1)
    >>> windows = jrnn.rl.windows_at(data, states, np.array([2]), np.array([0]), 3, every=2)
    >>> windows.data["x"].ravel(), windows.state
    (Array([2., 3., 4.], dtype=float32), Array([1.], dtype=float32))
    """
    steps, batch = _check_stored(data, states, length, every)
    given = times, sequences
    times, sequences = _integers("times", times), _integers("sequences", sequences)
    if times.ndim != 1 or times.shape != sequences.shape:
        raise ValueError(f"times: expected shape (N,), as sequences have, got {times.shape} and {sequences.shape}")
    if readable(*given) and times.size:
        known, among = np.asarray(given[0]), np.asarray(given[1])
        if known.min() < 0 or known.max() > steps - length:
            raise ValueError(
                f"times: expected values from 0 to T - length = {steps - length}, got {known.min()} to {known.max()}"
            )
        if (known % every).any():
            raise ValueError(f"times: expected multiples of every = {every}, where states are stored, got {known}")
        if among.min() < 0 or among.max() >= batch:
            raise ValueError(f"sequences: expected values from 0 to {batch - 1}, got {among.min()} to {among.max()}")
    at = times[None] + jnp.arange(length, dtype=times.dtype)[:, None]
    picked = jax.tree.map(lambda a: jnp.asarray(a)[at, sequences[None]], data)
    state = jax.tree.map(lambda a: jnp.asarray(a)[times // every, sequences], states)
    return Windows(picked, state, times, sequences)


def sample(
    key: jax.Array, data: Any, states: Any, length: int, count: int, *, every: int = 1, lengths: Any = None
) -> Windows:
    """Draws windows of stored sequences, with the states stored at their beginnings (Kapturowski et al. 2019).

    Every window that lies within its sequence, and begins where a state is stored, is equally probable. It may hold the
    ends of episodes: store resets among the data, and give them to `replay`.

    Args:
      key: a PRNG key.
      data: a tree of ``(T, B, ...)``: observations, resets, actions, …
      states: a tree of ``(K, B, ...)``: the states before the steps 0, every, 2 * every, …
      length: steps in a window, those of the burn-in included.
      count: N, how many windows.
      every: how many steps there are from one stored state to the next.
      lengths: ``(B,)`` integers, how many of each sequence's first steps are stored; None for all T.

    Raises:
      ValueError: no sequence is as long as a window; data and states that do not fit one another.

    >>> data, states = {"x": jnp.arange(40.0).reshape(10, 4)}, {"h": jnp.arange(40.0).reshape(10, 4)}
    >>> windows = jrnn.rl.sample(jax.random.key(0), data, states, length=3, count=5)
    >>> windows.data["x"].shape, bool((windows.data["x"][0] == windows.state["h"]).all())
    ((3, 5), True)
    """
    steps, batch = _check_stored(data, states, length, every)
    positive_int(count, "count")
    if lengths is None:
        begins = (steps - length) // every + 1
        k_time, k_sequence = jax.random.split(key)
        times = every * jax.random.randint(k_time, (count,), 0, begins)
        return windows_at(data, states, times, jax.random.randint(k_sequence, (count,), 0, batch), length, every=every)
    known = lengths
    lengths = _integers("lengths", lengths).astype(jnp.int32)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), one for each sequence, got {lengths.shape}")
    if readable(known) and (np.max(np.asarray(known)) < length or np.max(np.asarray(known)) > steps):
        raise ValueError(f"lengths: expected one of at least {length}, a window, and none above {steps}, got {known}")
    last = jnp.cumsum(jnp.maximum((lengths - length) // every + 1, 0))
    chosen = jax.random.randint(key, (count,), 0, last[-1])
    sequences = jnp.searchsorted(last, chosen, side="right").astype(jnp.int32)
    begins_before = jnp.where(sequences > 0, last[sequences - 1], 0)
    return windows_at(data, states, every * (chosen - begins_before), sequences, length, every=every)


def _check_stored(data: Any, states: Any, length: Any, every: Any) -> tuple[int, int]:
    """T and B of stored sequences."""
    positive_int(length, "length")
    positive_int(every, "every")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    if not shapes or any(len(shape) < 2 or shape[:2] != shapes[0][:2] for shape in shapes):
        raise ValueError(f"data: expected a tree of arrays (T, B, ...) with the same T and B, got {describe(data)}")
    steps, batch = shapes[0][:2]
    if length > steps:
        raise ValueError(f"length: expected at most T = {steps}, got {length}; store longer sequences")
    stored = -(-steps // every)
    for leaf in jax.tree.leaves(states):
        if jnp.shape(leaf)[:2] != (stored, batch):
            raise ValueError(
                f"states: expected arrays ({stored}, {batch}, ...), a state before every {every} of {steps} steps, got "
                f"{describe(states)}"
            )
    return steps, batch


# --- burn-in -----------------------------------------------------------------------------------------------------


def burn_in(
    model: Layer,
    params: Any,
    xs: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    key: jax.Array | None = None,
    start: Any = 0,
) -> Any:
    """Runs a model without gradients, and returns the state to train from (Kapturowski et al. 2019).

    A state that was stored while another set of parameters acted is out of date. A run from it over the first steps of
    a window, with the parameters of now, gives a state that is less so.

    Args:
      model, params, xs, state, lengths, mask, resets, key, start: as for `jrnn.unroll`.

    Returns:
      The state after the last step, without gradients with respect to anything.

    >>> model = jrnn.gru(4)
    >>> params, xs = model.init(jax.random.key(0), 3), jnp.ones((8, 2, 3))
    >>> state = jrnn.rl.burn_in(model, params, xs[:5])
    >>> state, ys = jrnn.unroll(model, params, xs[5:], state, start=5)
    >>> bool(jnp.allclose(ys, jrnn.unroll(model, params, xs)[1][5:], atol=1e-6))
    True
    """
    _check_model(model)
    params, xs, state = lax.stop_gradient((as_tree(params), jax.tree.map(jnp.asarray, xs), state))
    last, _ = unroll(model, params, xs, state, lengths=lengths, mask=mask, resets=resets, key=key, start=start)
    return last


def replay(
    model: Layer,
    params: Any,
    xs: Any,
    state: Any = None,
    *,
    burn_in: int,
    mask: Any = None,
    resets: Any = None,
    key: jax.Array | None = None,
    backend: str | None = None,
    remat: int | str | None = None,
    start: Any = 0,
) -> tuple[Any, Any]:
    """Runs a model over replayed windows whose first steps are a burn-in, and returns the results of the other steps.

    Values equal those of `jrnn.unroll` over all T steps. Gradients come from the steps after the burn-in alone.

    Args:
      model, params, xs, mask, resets, key, backend, remat, start: as for `jrnn.unroll`.
      state: the stored state at the windows' beginnings; None for the initial one.
      burn_in: how many of the T first steps are run without gradients, in [0, T].

    Returns:
      ``(state, ys)``, with ``ys (T - burn_in, *B, H)``.

    >>> model = jrnn.gru(4)
    >>> params, xs = model.init(jax.random.key(0), 3), jnp.ones((8, 2, 3))
    >>> state, ys = jrnn.rl.replay(model, params, xs, burn_in=5)
    >>> bool(jnp.allclose(ys, jrnn.unroll(model, params, xs)[1][5:], atol=1e-6))
    True
    """
    _check_model(model)
    non_negative_int(burn_in, "burn_in")
    xs = jnp.asarray(xs)
    if xs.ndim == 0 or burn_in > xs.shape[0]:
        raise ValueError(f"burn_in: expected at most T of xs, got {burn_in} for xs of shape {xs.shape}")

    def parted(flags: Any, name: str) -> tuple[Any, Any]:
        if flags is None:
            return None, None
        flags = _booleans(name, flags)
        if flags.shape[:1] != xs.shape[:1]:
            raise ValueError(f"{name}: expected shape (T, *B) with the T of xs {xs.shape}, got {flags.shape}")
        return flags[:burn_in], flags[burn_in:]

    (mask, mask_after), (resets, resets_after) = parted(mask, "mask"), parted(resets, "resets")
    if burn_in:
        state = _burnt_in(model, params, xs[:burn_in], state, mask=mask, resets=resets, key=key, start=start)
    return unroll(
        model, params, xs[burn_in:], state, mask=mask_after, resets=resets_after, key=key, backend=backend, remat=remat,
        start=start + burn_in,
    )  # fmt: skip


_burnt_in = burn_in  # `replay` has an argument of that name


# --- checks ------------------------------------------------------------------------------------------------------


def check_resets(resets: Any, done: Any, previous: Any = None) -> None:
    """Raises unless ``resets`` are ``done`` one step later, as `jrnn.unroll` expects them.

    ``done[t]`` says that acting on ``x[t]`` ended an episode, so that ``x[t + 1]`` is the first observation of the next
    one; ``resets[t]`` says that ``x[t]`` is the first. For tests of a rollout: it needs known values, outside `jit`.

    Args:
      resets: ``(T, *B)`` booleans.
      done: ``(T, *B)`` booleans.
      previous: ``(*B,)`` booleans, the ``done`` of the step before the first; None where it is not known.

    Raises:
      ValueError: they are not aligned; the message says where first, and whether they are a step early or late.
      TypeError: they are traced, or not boolean.

    >>> done = np.array([False, True, False, False])
    >>> jrnn.rl.check_resets(np.array([True, False, True, False]), done)
    >>> jrnn.rl.check_resets(done, done)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: resets: expected False where no episode has just ended, got True at step 1; these are done itself, ...
    """
    given = (resets, done) if previous is None else (resets, done, previous)
    if is_traced(given):
        raise TypeError("resets: expected known values, got traced ones; call check_resets outside jit")
    r, d = np.asarray(_booleans("resets", resets)), np.asarray(_booleans("done", done))
    if r.ndim == 0 or r.shape != d.shape:
        raise ValueError(f"resets: expected the shape of done, (T, *B), got {r.shape} and {d.shape}")
    wanted = np.concatenate([r[:1] if previous is None else np.asarray(_booleans("previous", previous))[None], d])[:-1]
    if wanted.shape != r.shape:
        raise ValueError(f"previous: expected shape {d.shape[1:]}, (*B,) of done, got {np.shape(previous)}")
    if (r == wanted).all():
        return
    place = np.argwhere(r != wanted)[0]
    where = f"step {place[0]}" + (f" of sequence {tuple(map(int, place[1:]))}" if r.ndim > 1 else "")
    if (r[1:] == d[1:]).all():
        hint = (
            "these are done itself, one step early, which would wipe the memory before the last decision of an "
            "episode; shift them by jrnn.sequence.resets_from_done(done, previous)"
        )
    elif len(r) > 2 and (r[2:] == d[:-2]).all():
        hint = "they are one step late: done[t] goes to resets[t + 1]"
    else:
        hint = "make them by jrnn.sequence.resets_from_done(done, previous)"
    if wanted[tuple(place)]:
        raise ValueError(f"resets: expected True after a step where done is, got False at {where}; {hint}")
    raise ValueError(f"resets: expected False where no episode has just ended, got True at {where}; {hint}")


def check_rollout(
    model: Layer, params: Any, xs: Any, ys: Any, state: Any = None, *, resets: Any = None, tolerance: float = 1e-4
) -> None:
    """Raises unless training computes, from a stored rollout, the outputs that the policy had while it acted.

    It finds what no shape shows: resets a step early or late, a stored state of the wrong step, parameters that changed
    in between, or observations that were normalised in another way. For tests of a rollout: it needs known values.

    Args:
      model, params, xs, state, resets: what training gives to `jrnn.unroll`.
      ys: ``(T, *B, H)``, the outputs while acting.
      tolerance: the largest difference that is taken for rounding, relative to 1 or to the largest output.

    Raises:
      ValueError: they differ; the message says at which step first, and how that step lies to the resets.

    >>> model, xs = jrnn.gru(4), jnp.ones((6, 2, 3))
    >>> params = model.init(jax.random.key(0), 3)
    >>> resets = jnp.zeros((6, 2), bool).at[3].set(True)
    >>> state = model.initial_state(params, (2,))
    >>> ys = []
    >>> for x, r in zip(xs, resets):
    ...     state, y = jrnn.rl.step(model, params, state, x, r)
    ...     ys.append(y)
    >>> jrnn.rl.check_rollout(model, params, xs, jnp.stack(ys), resets=resets)
    """
    _check_model(model)
    if is_traced((params, xs, ys, state, resets)):
        raise TypeError("ys: expected known values, got traced ones; call check_rollout outside jit")
    _, expected = unroll(model, params, xs, state, resets=resets)
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    got, wanted = np.asarray(ys).astype(wide), np.asarray(expected).astype(wide)
    if got.shape != wanted.shape:
        raise ValueError(f"ys: expected shape {wanted.shape}, as training computes them, got {got.shape}")
    apart = np.abs(got - wanted) > tolerance * max(1.0, np.abs(wanted).max(initial=0.0))
    apart |= np.isnan(got) != np.isnan(wanted)
    if not apart.any():
        return
    place = np.argwhere(apart)[0]
    time, sequence = int(place[0]), tuple(map(int, place[1:-1]))
    note = "; is the state the one from before that step?" if time == 0 else ""
    if resets is not None:
        flags = np.moveaxis(np.asarray(resets), 0, -1)[sequence]
        near = [t for t in (time - 1, time, time + 1) if 0 <= t < len(flags) and flags[t]]
        note += f"; resets are true at step {near[0]}: are they aligned with done (check_resets)?" if near else ""
    raise ValueError(
        f"ys: expected what training computes, {wanted[tuple(place)]:.6g} at step {time}, sequence {sequence} and "
        f"feature {int(place[-1])}, got {got[tuple(place)]:.6g}{note}"
    )
