"""Measures how often each gate is so close to a limit of its activation that it passes no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jrnn.cells.base import Layer
from jrnn.diagnose.arrays import axes_of, fraction_of, valid_flags
from jrnn.diagnose.bounds import limits_of
from jrnn.diagnose.gates import gate_names
from jrnn.diagnose.layers import make_probe


class GateSaturation(NamedTuple):
    """The measurements of `gate_saturation`. The dictionaries have one entry for each gate, by name.

    Attributes:
      fraction: a float, the saturated fraction of all valid steps, sequences and units; NaN where nothing is valid.
      low, high: ``(T,)``, the fraction of the units of all sequences that is saturated at the activation's lower and
        upper limit at step t; NaN where no sequence has a valid step t.
      units: ``(H,)``, the fraction of all valid steps and sequences at which each unit is saturated.
      values: ``(T, *B, H)``, the gate's activations; NaN at padding.
      limits: ``(lower, upper)``, the limits of the activation; infinite where it has none.
      epsilon: the argument.

    >>> GateSaturation._fields[:3]
    ('fraction', 'low', 'high')
    """

    fraction: dict[str, float]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    units: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    limits: dict[str, tuple[float, float]]
    epsilon: float


def gate_saturation(
    model: Layer,
    params: Any,
    xs: Any,
    *,
    epsilon: float = 0.1,
    limits: Mapping[str, tuple[float, float]] | None = None,
    state: Any = None,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    layer: Any = None,
) -> GateSaturation:
    """The fraction of gates that are saturated, open or shut (Karpathy, Johnson and Fei-Fei 2015): the slope is near 0.

    A sigmoid gate is saturated below ``epsilon`` or above ``1 - epsilon``, a tanh candidate if its absolute value is
    above ``1 - epsilon``, and a relu if it is 0. A gate that is meant to stay open (a forget gate with a bias) counts
    as saturated too: ``low`` and ``high`` show on which side.

    The gates are those of the cell's own step, peepholes and layer normalisation included. The step is run with
    activations that record their calls, and the call of a gate is the one whose argument has derivative 1 with respect
    to that gate's part of the input projection. This works for every built-in recurrent cell, with its wrappers, and
    for cells of your own that declare ``project`` and take their functions from fields whose names end in
    ``activation``. The gates of an `AffineCell` are ``gate_names``; elman, indrnn and jordan have one gate, "h".

    Args:
      epsilon: the distance from a limit, in (0, 0.5).
      limits: ``{gate: (lower, upper)}`` for gates whose activation has limits that jrnn does not know: any but
        "sigmoid", "tanh", "relu", "elu", "softplus" and "linear".
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`.

    Raises:
      ValueError, TypeError: the errors of `jrnn.unroll`; the activations of the cell cannot be recorded, or their
        limits are not known.

    >>> cell = jrnn.lstm(4, forget_bias=5.0)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> xs = jax.random.normal(jax.random.key(1), (10, 2, 3))
    >>> result = jrnn.diagnose.gate_saturation(cell, params, xs)
    >>> result.fraction["f"] > 0.9, float(result.low["f"].max())
    (True, 0.0)
    """
    options = dict(state=state, lengths=lengths, mask=mask, resets=resets, reverse=reverse, key=key)
    probe = make_probe(model, params, xs, options, layer)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 0.5:
        raise ValueError(f"epsilon: expected a float in (0, 0.5), got {epsilon!r}")
    names = gate_names(probe.cell)
    unknown = sorted(set(limits or {}) - set(names))
    if unknown:
        raise ValueError(f"limits: expected gates among {list(names)}, got {unknown}")

    trace = probe.trace(xs, options)
    values, functions = trace.gates(probe.cell, names)
    ranges, reached = {}, {}
    for name, function in zip(names, functions, strict=True):
        ranges[name], reached[name] = limits_of(probe.cell, name, function, limits or {})

    valid = valid_flags(lengths, mask, probe.time, probe.batch_shape)
    low, high, units, fraction, recorded = {}, {}, {}, {}, {}
    for name, activation in zip(names, values, strict=True):
        value = np.where(valid[..., None], np.asarray(activation, np.float64), np.nan)
        lower, upper = ranges[name]
        margin = 0.0 if reached[name] else epsilon
        below = value <= lower if reached[name] else value < lower + margin  # NaN is neither
        above = value >= upper if reached[name] else value > upper - margin
        either, hidden, inner = below | above, value.shape[-1], tuple(range(1, value.ndim))
        count = valid.sum(inner[:-1]) * hidden
        recorded[name] = value
        low[name] = fraction_of(below.sum(inner), count)
        high[name] = fraction_of(above.sum(inner), count)
        units[name] = fraction_of(either.sum(tuple(range(value.ndim - 1))), np.full(hidden, valid.sum()))
        fraction[name] = float(fraction_of(either.sum(), count.sum()))
    return GateSaturation(fraction, low, high, units, recorded, ranges, float(epsilon))


def plot_gate_saturation(result: GateSaturation, ax: Any = None) -> Any:
    """Plots, for each gate, the fraction saturated at the lower and at the upper limit, over all valid steps.

    Args:
      result: from `gate_saturation`.
      ax: a matplotlib Axes, or None for a new figure.

    Returns:
      The Axes.

    Raises:
      ImportError: without matplotlib, which the extra ``jrnn[plot]`` installs.

    >>> cell = jrnn.gru(4)
    >>> result = jrnn.diagnose.gate_saturation(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> [label.get_text() for label in jrnn.diagnose.plot_gate_saturation(result).get_xticklabels()]
    ['r', 'z', 'n']
    """
    ax = axes_of(ax)
    names = list(result.fraction)
    weights = {name: np.isfinite(value).sum(axis=tuple(range(1, value.ndim))) for name, value in result.values.items()}

    def overall(parts: dict[str, np.ndarray]) -> list[float]:
        return [float(fraction_of((np.nan_to_num(parts[n]) * weights[n]).sum(), weights[n].sum())) for n in names]

    place = np.arange(len(names))
    ax.bar(place - 0.2, overall(result.low), 0.4, label="at the lower limit")
    ax.bar(place + 0.2, overall(result.high), 0.4, label="at the upper limit")
    ax.set_xticks(place, names)
    ax.set_ylim(0, 1)
    ax.set_xlabel("gate")
    ax.set_ylabel("fraction of units and steps")
    ax.set_title(f"Gates within {result.epsilon:g} of a limit")
    ax.legend()
    return ax
