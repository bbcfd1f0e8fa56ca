"""The largest Lyapunov exponent of a layer on data, from one tangent vector that is carried along the run."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn.cells.base import Layer
from jrnn.diagnose.arrays import axes_of, flat, fraction_of, is_inexact, nan_reduce, valid_flags
from jrnn.diagnose.layers import make_probe
from jrnn.diagnose.taps import Trace, parts_of
from jrnn.schedules.steps import select


class Lyapunov(NamedTuple):
    """The measurements of `lyapunov`.

    Attributes:
      exponent: ``(*B,)``, the largest Lyapunov exponent of each sequence, per step and in nats: the mean of ``growth``
        over the counted steps. Minus infinity where the state forgot its past entirely, and NaN where no step is
        counted or the run is not finite.
      growth: ``(T, *B)``, the logarithm of the factor by which step t stretched the tangent vector; NaN at padding.
      counted: ``(T, *B)`` booleans, the valid steps that are not part of the burn-in.
      reverse: whether the layer ran from the last step to the first.

    >>> Lyapunov._fields
    ('exponent', 'growth', 'counted', 'reverse')
    """

    exponent: np.ndarray
    growth: np.ndarray
    counted: np.ndarray
    reverse: bool


def lyapunov(
    model: Layer,
    params: Any,
    xs: Any,
    *,
    burn_in: int = 0,
    seed: int = 0,
    state: Any = None,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    layer: Any = None,
) -> Lyapunov:
    """The largest Lyapunov exponent: the rate at which two nearby states separate under the same inputs::

        v_t = J_t v_{t-1} / |J_t v_{t-1}|        J_t = ds_t/ds_{t-1}        s_t the state after step t
        exponent = mean over t of log |J_t v_{t-1}|

    The vector is renormalised after every step (Benettin et al. 1980), so that nothing overflows or underflows however
    long the sequence is, and the product of J_t and the vector is one jvp of the step: no Jacobian is formed. The state
    is taken whole: h and c of an LSTM side by side.

    - Below 0 the run is stable: the state forgets where it began, and ds_t/ds_k shrinks like ``exp(exponent * (t-k))``.
      Then Newton's method over the whole sequence (``backend="newton"``) takes few iterations, which hardly grow with T
      (Gonzalez et al. 2025, "Predictability enables parallelization of nonlinear state space models").
    - Above 0 the run is chaotic (Engelken, Wolf and Abbott 2023): gradients explode, and Newton's method may need as
      many iterations as there are steps, so that it does not pay. `newton` reports what it does.

    The exponent is a limit over infinitely many steps, and its estimate is as good as the sequence is long. The vector
    begins in a random direction and turns into that of the fastest growth within the first steps: leave them out by
    ``burn_in``, with those in which the state still approaches the region where it stays.

    After a reset the state does not depend on what was before. A new vector begins there, with a burn-in of its own. A
    step that is padding holds the state and does not count. Vectors are computed in the state's dtype, and means in
    float64.

    Args:
      burn_in: how many valid steps to leave out of the mean, at the beginning of each sequence and after each reset.
      seed: of the direction in which the vector begins, the same for all sequences.
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`.

    Raises:
      ValueError, TypeError: as `jrnn.unroll`; ``layer`` is not the place of a recurrent layer; ``burn_in`` is not a
        count below T; ``seed`` is not an int.

    >>> xs = 0.1 * jax.random.normal(jax.random.key(1), (300, 2, 3))
    >>> for gain in (0.5, 3.0):  # the largest eigenvalue of w_hh, in absolute value
    ...     cell = jrnn.elman(16, recurrent_init=jrnn.initializers.orthogonal(gain))
    ...     result = jrnn.diagnose.lyapunov(cell, cell.init(jax.random.key(0), 3), xs, burn_in=100)
    ...     print((result.exponent < 0).tolist())
    [True, True]
    [False, False]
    """
    options = dict(state=state, lengths=lengths, mask=mask, resets=resets, reverse=reverse, key=key)
    probe = make_probe(model, params, xs, options, layer, jnp.inexact)
    time, batch = probe.time, probe.batch_shape
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or not 0 <= burn_in < max(time, 1):
        raise ValueError(f"burn_in: expected a count of steps, an int in [0, {max(time, 1)}), got {burn_in!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")

    trace = probe.trace(xs, options)
    backward = bool(trace.reverse)
    valid = valid_flags(lengths, mask, time, batch)
    growth = np.asarray(_growth(probe.cell, backward, trace, valid, jax.random.key(seed)), np.float64)
    restarted = np.zeros((time, *batch), bool) if trace.resets is None else np.asarray(trace.resets)
    counted = valid & (_steps_since_restart(valid, restarted, backward) >= burn_in)
    exponent = fraction_of(np.where(counted, growth, 0.0).sum(0), counted.sum(0))
    return Lyapunov(exponent, np.where(valid, growth, np.nan), counted, backward)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _growth(cell: Any, reverse: bool, trace: Trace, valid: Any, key: jax.Array) -> jax.Array:
    """``(T, *B)``, log |J_t v_{t-1}|."""
    params, project, update = parts_of(cell, trace.params, trace.xs)
    batch = trace.xs.shape[1 : trace.xs.ndim - cell.event_ndim]
    numbers = [leaf for leaf in jax.tree.leaves(trace.states) if is_inexact(leaf)]
    shapes = [leaf.shape[1 + len(batch) :] for leaf in numbers]
    drawn = [
        jnp.broadcast_to(jax.random.normal(jax.random.fold_in(key, i), shape, leaf.dtype), (*batch, *shape))
        for i, (leaf, shape) in enumerate(zip(numbers, shapes, strict=True))
    ]
    _, first = _normalised(drawn, batch)

    def body(vector: list[jax.Array], inputs: Any) -> tuple[list[jax.Array], jax.Array]:
        state, p, step_key, valid, resets = inputs
        vector = vector if resets is None else select(resets, first, vector)
        leaves, structure = jax.tree.flatten(state)

        def step(numbers: list[jax.Array]) -> list[jax.Array]:
            left = iter(numbers)
            old = jax.tree.unflatten(structure, [next(left) if is_inexact(leaf) else leaf for leaf in leaves])
            new, _ = update(params, old, p, step_key)
            return [leaf for leaf in jax.tree.leaves(new) if is_inexact(leaf)]

        moved = jax.jvp(step, ([leaf for leaf in leaves if is_inexact(leaf)],), (vector,))[1]
        growth, moved = _normalised(moved, batch)
        return select(valid, moved, vector), growth

    inputs = (trace.states, project(params, trace.xs), trace.keys, valid, trace.resets)
    return lax.scan(body, first, inputs, reverse=reverse)[1]


def _normalised(vector: list[jax.Array], batch: tuple[int, ...]) -> tuple[jax.Array, list[jax.Array]]:
    """The logarithm of each sequence's norm, and the vectors divided by it; a vector of zeros stays one.

    The largest number is divided out first: squares of numbers below 1e-19 underflow in float32.
    """
    wide = np.result_type(*(jnp.finfo(leaf.dtype).dtype for leaf in vector))
    sizes = [jnp.abs(leaf).reshape(*batch, math.prod(leaf.shape[len(batch) :])).astype(wide) for leaf in vector]
    joined = jnp.concatenate(sizes, -1)
    largest = jnp.max(joined, -1, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest, jnp.ones((), wide))
    norm = jnp.sqrt(jnp.sum(jnp.square(joined / scale), -1, keepdims=True))
    rest = jnp.where(norm == 0, jnp.ones((), wide), norm)

    def divided(leaf: jax.Array) -> jax.Array:
        for divisor in (scale, rest):  # one after the other, since their product may overflow
            leaf = leaf / divisor.reshape(*batch, *(1,) * (leaf.ndim - len(batch))).astype(leaf.dtype)
        return leaf

    return jnp.squeeze(jnp.log(largest) + jnp.log(rest), -1), [divided(leaf) for leaf in vector]


def _steps_since_restart(valid: np.ndarray, restarted: np.ndarray, reverse: bool) -> np.ndarray:
    """``(T, *B)``, how many valid steps there are between the last restart and each step, in the order of the run."""
    order = slice(None, None, -1 if reverse else None)
    valid, restarted = valid[order].astype(int), restarted[order]
    before = np.cumsum(valid, 0) - valid
    return (before - np.maximum.accumulate(np.where(restarted, before, 0), 0))[order]


def plot_lyapunov(result: Lyapunov, ax: Any = None) -> Any:
    """Plots the estimate as it settles: the mean of the growth up to each step, for each sequence and as their median.

    Above the line at 0 the run is chaotic, and Newton's method does not pay.

    Args:
      result: from `lyapunov`.
      ax: a matplotlib Axes, or None for a new figure.

    Returns:
      The Axes.

    Raises:
      ImportError: without matplotlib, which the extra ``jrnn[plot]`` installs.

    >>> cell = jrnn.gru(4)
    >>> result = jrnn.diagnose.lyapunov(cell, cell.init(jax.random.key(0), 3), jnp.ones((50, 2, 3)))
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> jrnn.diagnose.plot_lyapunov(result).get_xlabel()
    'step t'
    """
    ax = axes_of(ax)
    order = slice(None, None, -1 if result.reverse else None)
    counted = flat(result.counted)[order]
    total = np.cumsum(np.where(counted, flat(result.growth)[order], 0.0), 0)
    running = np.where(counted, fraction_of(total, np.cumsum(counted, 0)), np.nan)[order]
    time = np.arange(len(running))
    shown = np.where(np.isfinite(running), running, np.nan)
    if shown.shape[1] > 1:
        for i in range(shown.shape[1]):
            ax.plot(time, shown[:, i], color="C0", alpha=0.3, linewidth=0.7, label=None if i else "each sequence")
    ax.plot(time, nan_reduce(np.nanmedian, shown), color="C0", linewidth=2, label="median")
    ax.axhline(0.0, color="0.3", linestyle=":", label="chaos above, stability below")
    ax.set_xlabel("step t")
    ax.set_ylabel("mean growth so far, nats a step")
    ax.set_title("Largest Lyapunov exponent")
    ax.legend()
    return ax
