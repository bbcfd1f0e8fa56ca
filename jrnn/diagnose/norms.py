"""Measures the norm of the loss's gradient with respect to the state of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.cells.base import Layer
from jrnn.diagnose.arrays import axes_of, flat, float_parts, nan_reduce, norms_over, positive, rms_over, valid_flags
from jrnn.diagnose.layers import make_probe
from jrnn.diagnose.taps import Shifted, Shifts
from jrnn.run.unrolling import unroll


class GradientNorms(NamedTuple):
    """The measurements of `gradient_norms`. The dictionaries have one entry for each field of the state.

    Attributes:
      norms: ``(T, *B)``, the Euclidean norm of dL/ds_t for each sequence, where s_t is the field's value after step t;
        NaN at padding.
      rms: ``(T,)``, the root mean square of ``norms`` over the sequences for which step t is valid; NaN where none is.
      initial: ``(*B,)``, the norm of the gradient with respect to the state before the first step.
      valid: ``(T, *B)`` booleans, the steps that are not padding.
      loss: the loss.

    >>> GradientNorms._fields
    ('norms', 'rms', 'initial', 'valid', 'loss')
    """

    norms: dict[str, np.ndarray]
    rms: dict[str, np.ndarray]
    initial: dict[str, np.ndarray]
    valid: np.ndarray
    loss: float


def gradient_norms(
    model: Layer,
    params: Any,
    xs: Any,
    loss: Callable[[Any, jax.Array], jax.Array],
    *,
    state: Any = None,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    layer: Any = None,
) -> GradientNorms:
    """The norm of dL/dh_t for every t, and of every other field of the state (Bengio, Simard and Frasconi 1994).

    This is the total derivative: through y_t if the step returns a part of its new state as ``y`` (h, for every
    built-in cell but `jrnn.tdnn`), through all later steps, and through the final state. It takes one forward and one
    backward pass for any T: zeros are added to the state after each step, and the gradient is taken with respect to
    these zeros.

    Gradients are computed in the state's dtype. In float32 they underflow to 0 below about 1e-38 (1e-45 where the
    device keeps subnormal numbers) and overflow above 3e38. Norms are taken in float64.

    Args:
      loss: ``loss(state, ys) -> scalar``, a function of the results of ``jrnn.unroll(model, ...)``: the whole model's
        final state, and ``ys (T, *B, H)``, which is zero at padding.
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`.

    Raises:
      ValueError, TypeError: the errors of `jrnn.unroll`; ``layer`` is not the position of a recurrent layer; the loss
        is not a scalar.

    >>> cell = jrnn.elman(4, recurrent_init=jrnn.initializers.orthogonal(0.5))
    >>> params = cell.init(jax.random.key(0), 3)
    >>> xs = jax.random.normal(jax.random.key(1), (20, 2, 3))
    >>> def loss(state, ys):
    ...     return jnp.sum(ys[-1] ** 2)
    >>> result = jrnn.diagnose.gradient_norms(cell, params, xs, loss)
    >>> result.norms["h"].shape, bool(result.rms["h"][0] < 0.5**19 * result.rms["h"][-1])
    ((20, 2), True)
    """
    options = dict(state=state, lengths=lengths, mask=mask, resets=resets, reverse=reverse, key=key)
    probe = make_probe(model, params, xs, options, layer)
    tapped, batch, time = probe.model(Shifted), probe.batch_shape, probe.time
    floats, names, _ = float_parts(probe.state, len(batch))
    zeros = Shifts(
        [jnp.zeros(leaf.shape, leaf.dtype) for leaf in floats],
        [jnp.zeros((time, *leaf.shape), leaf.dtype) for leaf in floats],
    )

    def value(shifts: Shifts) -> jax.Array:
        final, ys = unroll(tapped, probe.params(shifts), xs, **options)
        result = jnp.asarray(loss(final, ys))
        if result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
            raise ValueError(
                f"loss: expected a function of (state, ys) that returns one float, got {result.dtype} of shape "
                f"{result.shape}; take a mean or a sum"
            )
        return result

    result, gradient = jax.value_and_grad(value)(zeros)
    valid = valid_flags(lengths, mask, time, batch)
    norms = {
        name: np.where(valid, norms_over(g, 1 + len(batch)), np.nan)
        for name, g in zip(names, gradient.steps, strict=True)
    }
    return GradientNorms(
        norms=norms,
        rms={name: rms_over(value, valid) for name, value in norms.items()},
        initial={name: norms_over(g, len(batch)) for name, g in zip(names, gradient.initial, strict=True)},
        valid=valid,
        loss=float(result),
    )


def plot_gradient_norms(result: GradientNorms, ax: Any = None) -> Any:
    """Plots the root mean square over sequences for each field of the state, and the range over sequences, over t.

    Args:
      result: from `gradient_norms`.
      ax: a matplotlib Axes, or None for a new figure.

    Returns:
      The Axes.

    Raises:
      ImportError: without matplotlib, which the extra ``jrnn[plot]`` installs.

    >>> cell = jrnn.elman(4)
    >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3))
    >>> result = jrnn.diagnose.gradient_norms(cell, params, xs, lambda state, ys: jnp.sum(state.h))
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> jrnn.diagnose.plot_gradient_norms(result).get_yscale()
    'log'
    """
    ax = axes_of(ax)
    time = np.arange(len(result.valid))
    for name, norms in result.norms.items():
        (line,) = ax.plot(time, positive(result.rms[name]), label=name)
        per_sequence = flat(norms)
        if per_sequence.shape[1] > 1:
            low, high = nan_reduce(np.nanmin, per_sequence), nan_reduce(np.nanmax, per_sequence)
            ax.fill_between(time, positive(low), positive(high), color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_yscale("log")
    ax.set_xlabel("step t")
    ax.set_ylabel("norm of dL/ds$_t$")
    ax.set_title("Gradient of the loss with respect to the state")
    ax.legend(title="field of the state")
    return ax
