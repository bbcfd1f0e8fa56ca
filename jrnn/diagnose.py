"""Why training fails or works: how gradients travel through time, measured on real parameters and a real batch.

`gradient_norms` says how much of the loss reaches the state of every step, `jacobian_products` why (the products of
the steps' Jacobians, and the bounds they obey), `gate_saturation` which gates have stopped passing gradients. Each
returns NumPy arrays, and has a plot.

Shared arguments:
  model, params, xs, state, lengths, mask, resets, reverse, key: as for `jrnn.unroll`; a step that is padding there is
    padding here, and everything measured is NaN at it.
  layer: which recurrent layer of a model to look at: an index into a stack, "forward" or "backward" for a direction of
    a bidirectional layer, or a tuple of them from the outside in, such as ``(1, "forward")``. `jrnn.residual` and
    `jrnn.highway` are looked through and take no place in it. None where there is but one recurrent layer. The
    layers below the chosen one feed it, those above carry its gradient.

Nothing here can be called inside jit: results are for reading, and leave the device.

T time, B batch (any number of leading axes, or none), F input features, H hidden features, N numbers in a state.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import activations, sequence
from jrnn.cells.affine import AffineCell
from jrnn.cells.base import Layer, compute_params, emitted, output
from jrnn.cells.elman import Elman, IndRNN, Jordan
from jrnn.cells.gru import ResetBeforeGRU
from jrnn.cells.lstm import ProjectionLSTM
from jrnn.compose.combine import Bidirectional, Highway, Residual, Stack
from jrnn.compose.regularise import DropConnect, LearnedState, Variational, Wrapper
from jrnn.compose.timewise import Timewise
from jrnn.run.unrolling import unroll
from jrnn.schedules.steps import restarts, scan, select

__all__ = [
    "GateSaturation",
    "GradientNorms",
    "JacobianProducts",
    "gate_saturation",
    "gradient_norms",
    "jacobian_products",
    "plot_gate_saturation",
    "plot_gradient_norms",
    "plot_jacobian_products",
]


# --- gradients through time --------------------------------------------------------------------------------------


class GradientNorms(NamedTuple):
    """What `gradient_norms` measured. The dictionaries have one entry for each field of the state.

    Attributes:
      norms: ``(T, *B)``, the Euclidean norm of dL/ds_t for each sequence, s_t the field's value after step t; NaN at
        padding.
      rms: ``(T,)``, the root mean square of ``norms`` over the sequences for which step t is valid; NaN where none is.
      initial: ``(*B,)``, the norm of the gradient with respect to the state the run started from.
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

    The total derivative: through y_t where the step returns a part of its new state as ``y`` (h, for every built-in
    cell but `jrnn.tdnn`), through all later steps, and through the final state. One forward and one backward pass,
    whatever T is: zeros are added to the state after each step, and the gradient is taken with respect to them.

    Gradients are computed in the state's dtype: in float32 they reach 0 below about 1e-38 (1e-45 where the device
    keeps subnormal numbers) and infinity above 3e38. Norms are taken in float64.

    Args:
      loss: ``loss(state, ys) -> scalar`` of what ``jrnn.unroll(model, ...)`` returns: the whole model's final state
        and ``ys (T, *B, H)``, which is zero at padding.
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`.

    Raises:
      ValueError, TypeError: as `jrnn.unroll`; where ``layer`` names no recurrent layer; where the loss is no scalar.

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
    probe = _probe(model, params, xs, options, layer)
    tapped, batch, time = probe.model(_Shifted), probe.batch_shape, probe.time
    floats, names, _ = _floats(probe.state, len(batch))
    zeros = _Shifts(
        [jnp.zeros(leaf.shape, leaf.dtype) for leaf in floats],
        [jnp.zeros((time, *leaf.shape), leaf.dtype) for leaf in floats],
    )

    def value(shifts: _Shifts) -> jax.Array:
        final, ys = unroll(tapped, probe.params(shifts), xs, **options)
        result = jnp.asarray(loss(final, ys))
        if result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
            raise ValueError(
                f"loss: expected a function of (state, ys) that returns one float, got {result.dtype} of shape "
                f"{result.shape}; take a mean or a sum"
            )
        return result

    result, gradient = jax.value_and_grad(value)(zeros)
    valid = _valid(lengths, mask, time, batch)
    norms = {
        name: np.where(valid, _norm(g, 1 + len(batch)), np.nan) for name, g in zip(names, gradient.steps, strict=True)
    }
    return GradientNorms(
        norms=norms,
        rms={name: _rms(value, valid) for name, value in norms.items()},
        initial={name: _norm(g, len(batch)) for name, g in zip(names, gradient.initial, strict=True)},
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
    ax = _axes(ax)
    time = np.arange(len(result.valid))
    for name, norms in result.norms.items():
        (line,) = ax.plot(time, _positive(result.rms[name]), label=name)
        per_sequence = _flat(norms)
        if per_sequence.shape[1] > 1:
            low, high = _nan_reduce(np.nanmin, per_sequence), _nan_reduce(np.nanmax, per_sequence)
            ax.fill_between(time, _positive(low), _positive(high), color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_yscale("log")
    ax.set_xlabel("step t")
    ax.set_ylabel("norm of dL/ds$_t$")
    ax.set_title("Gradient of the loss with respect to the state")
    ax.legend(title="field of the state")
    return ax


# --- products of step Jacobians ----------------------------------------------------------------------------------


class JacobianProducts(NamedTuple):
    """What `jacobian_products` measured: one row for each lag t-k, from 0 (the identity) on.

    Attributes:
      lags: ``(L,)`` integers, t-k.
      norms: ``(L, *B)``, the largest singular value of ds_t/ds_k, s the whole state.
      singular_values: ``(L, *B, N)``, all of them, in descending order. Those below 1e-16 of the largest, the
        precision of float64, are rounding.
      bound: ``(L, *B)``, the product of the largest singular values of the single steps' Jacobians, measured: no norm
        is above it, whatever the cell.
      weight_bound: ``(L, *B)``, the bound that follows from the weights alone, or None where none is known.
      weight_bound_reason: what ``weight_bound`` is, or why it is None.
      fields: the fields of the state, in the order in which they are joined, and how many numbers each has.

    All are NaN where step t or step k is padding of a sequence, or where a Jacobian is not finite.

    >>> JacobianProducts._fields[:4]
    ('lags', 'norms', 'singular_values', 'bound')
    """

    lags: np.ndarray
    norms: np.ndarray
    singular_values: np.ndarray
    bound: np.ndarray
    weight_bound: np.ndarray | None
    weight_bound_reason: str
    fields: dict[str, int]


def jacobian_products(
    model: Layer,
    params: Any,
    xs: Any,
    *,
    start: int | None = None,
    end: int | None = None,
    lags: int | None = None,
    slope: float | None = None,
    state: Any = None,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    layer: Any = None,
) -> JacobianProducts:
    """Norms and singular values of ds_t/ds_k over the lag t-k, and the bounds they obey (Pascanu et al. 2013)::

        ds_t/ds_k = J_t J_{t-1} ... J_{k+1}      J_t = ds_t/ds_{t-1}      s_t the state after step t

    The state is taken whole: h and c of an LSTM side by side, N = 2H. For Elman's network ``J_t = diag(f'(a_t)) W^T``,
    so that with gamma the largest slope of the activation (1 for tanh and relu, 1/4 for the sigmoid) ::

        |dh_t/dh_k| <= (gamma * largest singular value of w_hh) ** (t-k)

    below 1 of which gradients must vanish (Bengio et al. 1994; Pascanu, Mikolov and Bengio 2013). The same argument
    gives ``weight_bound`` for IndRNN (largest absolute weight) and Jordan's network (both its weights and slopes). No
    such bound is known for gated cells, whose Jacobian has terms that grow with the state: there ``weight_bound`` is
    None, and ``bound``, the product of the norms of the measured J_t, is what holds for every cell.

    A reset makes the product 0; a step that is padding holds the state and counts in no bound. Jacobians are taken in
    the state's dtype, products and singular values in float64. The work grows with L * B * N**3: pass a few sequences,
    or limit ``lags``.

    Args:
      start: k, fixed: products from the state after step k to that after every later step. With neither ``start`` nor
        ``end``, from the initial state.
      end: t, fixed: products to the state after step t from that after every earlier one, back to the initial state.
      lags: the largest lag, or None for all there are.
      slope: the activation's largest absolute slope, for an activation that jrnn does not know.
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`. Where the layer runs
        in reverse, "later" is a smaller t and lags count in the order of the run.

    Raises:
      ValueError, TypeError: as `jrnn.unroll`; both ``start`` and ``end``, or one outside [0, T).

    >>> cell = jrnn.elman(4, recurrent_init=jrnn.initializers.orthogonal(0.5))
    >>> params = cell.init(jax.random.key(0), 3)
    >>> xs = jax.random.normal(jax.random.key(1), (6, 2, 3))
    >>> result = jrnn.diagnose.jacobian_products(cell, params, xs)
    >>> result.weight_bound[:4, 0].round(4).tolist(), bool((result.norms <= 1.000001 * result.weight_bound).all())
    ([1.0, 0.5, 0.25, 0.125], True)
    """
    options = dict(state=state, lengths=lengths, mask=mask, resets=resets, reverse=reverse, key=key)
    probe = _probe(model, params, xs, options, layer)
    time, batch = probe.time, probe.batch_shape
    if start is not None and end is not None:
        raise ValueError(f"start, end: expected at most one of them, got start={start} and end={end}")
    for name, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < time):
            raise ValueError(f"{name}: expected a step, an int in [0, {time}), got {value!r}")
    if lags is not None and (isinstance(lags, bool) or not isinstance(lags, int) or lags < 0):
        raise ValueError(f"lags: expected a count of at least 0, got {lags!r}")

    trace = probe.trace(xs, options)
    order = list(range(time))[:: -1 if trace.reverse else 1]  # steps in the order in which they ran
    # Each further lag adds the Jacobian of a step in `path`, and has the state after a step in `others` (None: the
    # initial state) at its other end; `fixed` is the end that stays.
    path: list[int]
    others: list[int | None]
    fixed: int | None
    if end is not None:
        path = order[order.index(end) :: -1]
        others, fixed = [*path[1:], None], end
    else:
        path = order if start is None else order[order.index(start) + 1 :]
        others, fixed = [*path], start
    if lags is not None:
        path, others = path[:lags], others[:lags]

    valid = _valid(lengths, mask, time, batch)
    restarted = np.zeros((time, *batch), bool) if trace.resets is None else np.asarray(trace.resets)
    _, names, sizes = _floats(probe.state, len(batch))
    width = sum(sizes)
    eye = np.broadcast_to(np.eye(width), (*batch, width, width))
    factor, reason = _weight_factor(probe.cell, probe.cell_params, slope, key)

    product, bound, steps = eye, np.ones(batch), np.zeros(batch, int)
    known = np.ones(batch, bool) if fixed is None else valid[fixed]
    rows = [_row(eye, known, bound, steps)]
    for step, other in zip(path, others, strict=True):
        jacobian = np.asarray(trace.jacobian(probe.cell, step), np.float64)
        jacobian = np.where(restarted[step][..., None, None], 0.0, jacobian)
        jacobian = np.where(valid[step][..., None, None], jacobian, eye)
        with np.errstate(over="ignore", invalid="ignore"):
            product = product @ jacobian if end is not None else jacobian @ product
            bound = bound * _singular_values(jacobian)[..., 0]
        steps = steps + valid[step]
        rows.append(_row(product, known if other is None else known & valid[other], bound, steps))
    values, bounds, counts, knowns = (np.stack(column) for column in zip(*rows, strict=True))
    return JacobianProducts(
        lags=np.arange(len(rows)),
        norms=values[..., 0],
        singular_values=values,
        bound=bounds,
        weight_bound=None if factor is None else np.where(knowns, _power(factor, counts), np.nan),
        weight_bound_reason=reason,
        fields=dict(zip(names, sizes, strict=True)),
    )


def plot_jacobian_products(result: JacobianProducts, ax: Any = None) -> Any:
    """Plots the norms, the other singular values (pale) and the bounds over the lag t-k, as medians over sequences.

    Args:
      result: from `jacobian_products`.
      ax: a matplotlib Axes, or None for a new figure.

    Returns:
      The Axes.

    Raises:
      ImportError: without matplotlib, which the extra ``jrnn[plot]`` installs.

    >>> cell = jrnn.gru(4)
    >>> result = jrnn.diagnose.jacobian_products(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> jrnn.diagnose.plot_jacobian_products(result).get_xlabel()
    'lag t-k'
    """
    ax = _axes(ax)

    def median(values: np.ndarray) -> np.ndarray:
        return _positive(_nan_reduce(np.nanmedian, _flat(values)))

    for i in range(1, result.singular_values.shape[-1]):
        label = "other singular values" if i == 1 else None
        ax.plot(result.lags, median(result.singular_values[..., i]), color="C0", alpha=0.25, linewidth=0.7, label=label)
    ax.plot(result.lags, median(result.norms), color="C0", linewidth=2, label="norm (largest singular value)")
    ax.plot(result.lags, median(result.bound), color="C1", linestyle="--", label="product of the steps' norms")
    if result.weight_bound is not None:
        ax.plot(result.lags, median(result.weight_bound), color="C3", linestyle=":", label="bound from the weights")
    ax.set_yscale("log")
    ax.set_xlabel("lag t-k")
    ax.set_ylabel("singular values of ds$_t$/ds$_k$")
    ax.set_title("Products of step Jacobians")
    ax.legend()
    return ax


# --- saturation of gates -----------------------------------------------------------------------------------------


class GateSaturation(NamedTuple):
    """What `gate_saturation` measured. The dictionaries have one entry for each gate, by name.

    Attributes:
      fraction: a float, how much of all valid steps, sequences and units is saturated; NaN where nothing is valid.
      low, high: ``(T,)``, the fraction of the units of all sequences that is saturated at the activation's lower and
        upper limit at step t; NaN where no sequence has a valid step t.
      units: ``(H,)``, the fraction of all valid steps and sequences at which each unit is saturated.
      values: ``(T, *B, H)``, the gate's activations; NaN at padding.
      limits: ``(lower, upper)``, what the activation tends to; infinite where it does not.
      epsilon: as given.

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
    """How many gates are saturated, open or shut (Karpathy, Johnson and Fei-Fei 2015): there the slope is near 0.

    A sigmoid gate is saturated below ``epsilon`` or above ``1 - epsilon``, a tanh candidate where its absolute value
    is above ``1 - epsilon``, a relu where it is 0. Gates that are meant to stay open (a forget gate with a bias) are
    saturated too: look at which side.

    The gates are those of the cell as it is, peepholes and layer normalisation included: the step runs with recording
    activations, and a gate's is the one whose argument moves one to one with that gate's part of the input
    projection. It serves every built-in recurrent cell, with its wrappers, and cells of your own that declare
    ``project`` and take their functions from fields whose names end in ``activation``. The gates of an `AffineCell`
    are ``gate_names``; elman, indrnn and jordan have one, "h".

    Args:
      epsilon: the distance from a limit, in (0, 0.5).
      limits: ``{gate: (lower, upper)}`` for gates whose activation has none known: any but "sigmoid", "tanh",
        "relu", "elu", "softplus" and "linear".
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`.

    Raises:
      ValueError, TypeError: as `jrnn.unroll`; where the activations of a cell cannot be recorded or their limits are
        not known.

    >>> cell = jrnn.lstm(4, forget_bias=5.0)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> xs = jax.random.normal(jax.random.key(1), (10, 2, 3))
    >>> result = jrnn.diagnose.gate_saturation(cell, params, xs)
    >>> result.fraction["f"] > 0.9, float(result.low["f"].max())
    (True, 0.0)
    """
    options = dict(state=state, lengths=lengths, mask=mask, resets=resets, reverse=reverse, key=key)
    probe = _probe(model, params, xs, options, layer)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 0.5:
        raise ValueError(f"epsilon: expected a float in (0, 0.5), got {epsilon!r}")
    names = _gate_names(probe.cell)
    unknown = sorted(set(limits or {}) - set(names))
    if unknown:
        raise ValueError(f"limits: expected gates among {list(names)}, got {unknown}")

    trace = probe.trace(xs, options)
    values, functions = trace.gates(probe.cell, names)
    ranges, reached = {}, {}
    for name, function in zip(names, functions, strict=True):
        ranges[name], reached[name] = _limits(probe.cell, name, function, limits or {})

    valid = _valid(lengths, mask, probe.time, probe.batch_shape)
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
        low[name] = _fraction(below.sum(inner), count)
        high[name] = _fraction(above.sum(inner), count)
        units[name] = _fraction(either.sum(tuple(range(value.ndim - 1))), np.full(hidden, valid.sum()))
        fraction[name] = float(_fraction(either.sum(), count.sum()))
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
    ax = _axes(ax)
    names = list(result.fraction)
    weights = {name: np.isfinite(value).sum(axis=tuple(range(1, value.ndim))) for name, value in result.values.items()}

    def overall(parts: dict[str, np.ndarray]) -> list[float]:
        return [float(_fraction((np.nan_to_num(parts[n]) * weights[n]).sum(), weights[n].sum())) for n in names]

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


# --- choosing a layer --------------------------------------------------------------------------------------------


def _descend(model: Any, params: Any, layer: Any) -> tuple[list[Any], Any, Any]:
    """The way from a model to one of its recurrent layers: ``(accessors, cell, its params)``."""
    wanted = [] if layer is None else list(layer) if isinstance(layer, tuple) else [layer]
    accessors: list[Any] = []
    while True:
        if isinstance(model, Residual):
            accessors.append("residual")
            model = model.layer
        elif isinstance(model, Highway):
            accessors.append("highway")
            model, params = model.layer, params["layer"]
        elif isinstance(model, Stack):
            index = wanted.pop(0) if wanted else _only_recurrent(model)
            count = len(model.layers)
            if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
                raise ValueError(f"layer: expected an index into the {count} layers of a stack, got {index!r}")
            index %= count
            accessors.append(index)
            model, params = model.layers[index], params[index]
        elif isinstance(model, Bidirectional):
            side = wanted.pop(0) if wanted else None
            if side not in ("forward", "backward"):
                raise ValueError(
                    'layer: expected "forward" or "backward", since a bidirectional layer has a state for each '
                    f'direction, got {side!r}; pass it last, as in layer=(0, "forward"), or layer="forward" for a '
                    "bidirectional layer by itself"
                )
            accessors.append(side)
            model, params = getattr(model, side), params[side]
        else:
            break
    if wanted:
        raise ValueError(f"layer: got {layer!r}, but {model!r} has no layers to choose from; leave out {wanted}")
    if isinstance(model, Timewise) or type(model).walk is not Layer.walk:
        raise ValueError(f"layer: expected a recurrent layer, got {model!r}, which has no state; choose another")
    return accessors, model, params


def _only_recurrent(model: Stack) -> int:
    indices = [i for i, layer in enumerate(model.layers) if not isinstance(layer, Timewise)]
    if len(indices) != 1:
        raise ValueError(f"layer: expected an index into the stack, one of {indices}, got None; choose one of them")
    return indices[0]


def _put_layer(model: Any, accessors: list[Any], tap: Any) -> Any:
    if not accessors:
        return tap
    first, *rest = accessors
    if first in ("residual", "highway"):
        return replace(model, layer=_put_layer(model.layer, rest, tap))
    if isinstance(first, int):
        layers = list(model.layers)
        layers[first] = _put_layer(layers[first], rest, tap)
        return replace(model, layers=tuple(layers))
    return replace(model, **{first: _put_layer(getattr(model, first), rest, tap)})


def _put_params(params: Any, accessors: list[Any], tapped: Any) -> Any:
    if not accessors:
        return tapped
    first, *rest = accessors
    if first == "residual":
        return _put_params(params, rest, tapped)
    if isinstance(first, int):
        inner = _put_params(params[first], rest, tapped)
        return (*params[:first], inner, *params[first + 1 :])
    name = "layer" if first == "highway" else first
    return {**params, name: _put_params(params[name], rest, tapped)}


def _take_state(state: Any, accessors: list[Any]) -> Any:
    for accessor in accessors:
        if accessor not in ("residual", "highway"):
            state = state[accessor]
    return state


class _Probe(NamedTuple):
    """A model with one of its layers chosen."""

    whole: Layer
    whole_params: Any
    accessors: list[Any]
    cell: Any
    cell_params: Any
    state: Any
    batch_shape: tuple[int, ...]
    time: int

    def model(self, tap: Any) -> Any:
        return _put_layer(self.whole, self.accessors, tap(self.cell))

    def params(self, extra: Any) -> Any:
        return _put_params(self.whole_params, self.accessors, _Tapped(self.cell_params, extra))

    def trace(self, xs: Any, options: dict[str, Any]) -> _Trace:
        final, _ = unroll(self.model(_Recorded), self.params(()), xs, **options)
        return _take_state(final, self.accessors)


def _probe(model: Any, params: Any, xs: Any, options: dict[str, Any], layer: Any) -> _Probe:
    # An abstract run makes every check that unroll makes, and gives the shape of the chosen layer's state.
    final, _ = jax.eval_shape(lambda: unroll(model, params, xs, **options))
    accessors, cell, cell_params = _descend(model, params, layer)
    state = _take_state(final, accessors)
    shape = np.shape(xs)
    batch_shape = shape[1 : len(shape) - model.event_ndim]
    if not _floats(state, len(batch_shape))[0]:
        raise ValueError(f"layer: expected a layer with floats in its state, got {cell!r}; choose another")
    return _Probe(model, params, accessors, cell, cell_params, state, batch_shape, shape[0])


# --- taps: a layer in its place in the model, run with something added or recorded ----------------------------------


class _Tapped(NamedTuple):
    params: Any
    extra: Any


class _Shifts(NamedTuple):
    """What is added to the state: before the first step, and after each step."""

    initial: list[jax.Array]
    steps: list[jax.Array]


@dataclass(frozen=True)
class _Tap(Layer):
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


class _Shifted(_Tap):
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


class _Recorded(_Tap):
    """Returns what every step was given in place of the final state."""

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        update = _parts(self.cell, params.params, xs)[2]

        def step(params: Any, state: Any, p: Any, extra: Any, key: Any) -> tuple[Any, Any]:
            new, y = update(params, state, p, key)
            return new, (y, state)

        _, (ys, states) = self.scan(run, params.params, xs, state, (), step)
        keys, resets = run.step_keys(xs.shape[0]), run.steps.resets
        trace = _Trace(params.params, xs, states, keys, resets, jnp.asarray(run.steps.reverse))
        return trace, run.zero_invalid(emitted(ys, xs))


def _parts(cell: Any, params: Any, xs: jax.Array) -> tuple[Any, Any, Any]:
    """``(params, project, update)`` of a cell, which is its step where it declares no projection."""
    if getattr(cell, "hoistable", False):
        return compute_params(params, xs.dtype), cell.project, cell.update
    return params, lambda params, xs: xs, cell.step


def _add(state: Any, shifts: list[jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten(state)
    left = iter(shifts)
    return jax.tree.unflatten(structure, [leaf + next(left) if _is_float(leaf) else leaf for leaf in leaves])


class _Trace(NamedTuple):
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

        def calls(params: Any, state: Any, p: Any, key: Any) -> list[_Call]:
            heard: list[_Call] = []
            _listening(cell, heard).update(params, state, p, key)
            return heard

        found, functions = _find_gates(cell, names, params, self.states, ps, calls)

        def values(state: Any, p: Any, key: Any) -> tuple[jax.Array, ...]:
            heard = calls(params, state, p, key)
            return tuple(heard[i].value for i in found)

        return jax.jit(jax.vmap(values))(self.states, ps, self.keys), functions


@functools.partial(jax.jit, static_argnums=0)
def _step_jacobian(cell: Any, params: Any, state: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
    params, project, update = _parts(cell, params, x)
    leaves, structure = jax.tree.flatten(state)
    batch = x.shape[: x.ndim - cell.event_ndim]
    floats, _, sizes = _floats(state, len(batch))

    def step(floats: list[jax.Array]) -> list[jax.Array]:
        left = iter(floats)
        old = jax.tree.unflatten(structure, [next(left) if _is_float(leaf) else leaf for leaf in leaves])
        new, _ = update(params, old, project(params, x), key)
        return [leaf for leaf in jax.tree.leaves(new) if _is_float(leaf)]

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


# --- listening to gates ------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    function: Any
    argument: jax.Array
    value: jax.Array


@dataclass(frozen=True, eq=False)
class _Listener:
    """An activation that writes down its calls."""

    function: Any
    heard: list[_Call]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.function(x)
        self.heard.append(_Call(self.function, x, y))
        return y


@dataclass(frozen=True)
class _ListeningProjection(ProjectionLSTM):
    """A projection LSTM whose gates are those of the LSTM it is given."""

    gated: Any = field(kw_only=True)

    @property
    def _lstm(self) -> Any:
        return self.gated


def _listening(cell: Any, heard: list[_Call]) -> Any:
    """The same cell, whose activations write down their calls."""
    if isinstance(cell, Wrapper):
        return replace(cell, cell=_listening(cell.cell, heard))  # type: ignore[type-var]
    if isinstance(cell, ProjectionLSTM):
        values = {f.name: getattr(cell, f.name) for f in fields(cell)}
        return _ListeningProjection(**values, gated=_listening(cell._lstm, heard))
    names = [f.name for f in fields(cell) if f.name.endswith("activation")] if is_dataclass(cell) else []
    if not names:
        return cell
    return replace(cell, **{name: _Listener(activations.resolve(getattr(cell, name)), heard) for name in names})


def _gate_names(cell: Any) -> tuple[str, ...]:
    while isinstance(cell, Wrapper):
        cell = cell.cell
    if isinstance(cell, ProjectionLSTM):
        cell = cell._lstm
    elif isinstance(cell, ResetBeforeGRU):
        cell = cell._gru
    return cell.gate_names if isinstance(cell, AffineCell) else ("h",)


def _find_gates(
    cell: Any, names: tuple[str, ...], params: Any, states: Any, ps: Any, calls: Any
) -> tuple[list[int], tuple[Any, ...]]:
    """Which call of an activation is which gate's: the one whose argument moves one to one with its projection."""

    def random(tree: Any) -> Any:  # a point where nothing is 1 by chance, as it might be in saturated data
        key = jax.random.key(0)
        leaves, structure = jax.tree.flatten(tree)
        drawn = [
            jax.random.normal(jax.random.fold_in(key, i), a.shape[1:], a.dtype)
            if _is_float(a)
            else jnp.zeros(a.shape[1:], a.dtype)
            for i, a in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, drawn)

    state, (parts, structure) = random(states), jax.tree.flatten(random(ps))
    functions: list[Any] = []

    def arguments(parts: list[jax.Array]) -> list[jax.Array]:
        heard = calls(params, state, jax.tree.unflatten(structure, parts), None)
        functions[:] = [call.function for call in heard]
        return [call.argument for call in heard]

    found = []
    for j, name in enumerate(names if len(parts) == len(names) else ()):
        tangents = [jnp.full_like(part, 1.0 if i == j else 0.0) for i, part in enumerate(parts)]
        moves = jax.jvp(arguments, (parts,), (tangents,))[1]
        matches = [i for i, m in enumerate(moves) if m.shape == parts[j].shape and bool((m == 1).all())]
        if not matches:
            raise TypeError(
                f"layer: found no activation of gate {name!r} in {cell!r}, got {len(moves)} calls of recorded "
                "activations; take the gates' functions from dataclass fields named activation or gate_activation "
                "(jrnn.activations.resolve), and add each gate's projection to their argument unscaled"
            )
        found.append(matches[0])
    if len(found) != len(names):
        raise TypeError(
            f"layer: expected a projection with one array for each gate {list(names)}, got {len(parts)} arrays from "
            f"{cell!r}; make the cell a jrnn.AffineCell"
        )
    return found, tuple(functions[i] for i in found)


# Limits by activation, and whether it reaches them, so that no epsilon is needed.
_LIMITS: dict[str, tuple[tuple[float, float], bool]] = {
    "elu": ((-1.0, np.inf), False),
    "linear": ((-np.inf, np.inf), False),
    "relu": ((0.0, np.inf), True),
    "sigmoid": ((0.0, 1.0), False),
    "softplus": ((0.0, np.inf), False),
    "tanh": ((-1.0, 1.0), False),
}

# The largest absolute slope of each activation; those of silu and gelu (its tanh form) rounded up.
_SLOPES: dict[str, float] = {
    "elu": 1.0,
    "gelu": 1.1291,
    "linear": 1.0,
    "relu": 1.0,
    "sigmoid": 0.25,
    "silu": 1.0999,
    "softplus": 1.0,
    "tanh": 1.0,
}


def _known(table: dict[str, Any], function: Any) -> Any:
    return next((value for name, value in table.items() if activations.resolve(name) is function), None)


def _limits(cell: Any, gate: str, function: Any, given: Mapping[str, Any]) -> tuple[tuple[float, float], bool]:
    if gate in given:
        try:
            low, high = (float(limit) for limit in given[gate])
        except (TypeError, ValueError):
            low = high = np.nan
        if not low < high:
            raise ValueError(f"limits: expected (lower, upper) for gate {gate!r}, got {given[gate]!r}")
        return (low, high), False
    known = _known(_LIMITS, function)
    if known is None:
        raise ValueError(
            f"limits: the activation {function!r} of gate {gate!r} in {cell!r} has no known limits; pass "
            f"limits={{{gate!r}: (lower, upper)}}, with an infinity where it has none"
        )
    return known


def _weight_factor(cell: Any, params: Any, slope: float | None, key: Any) -> tuple[float | None, str]:
    """The largest norm that a step's Jacobian can have, whatever the input: from the weights alone."""
    while isinstance(cell, LearnedState) or (key is None and isinstance(cell, Variational | DropConnect)):
        cell, params = cell.cell, cell.inner(params)  # without a key these wrappers leave the step as it is
    if slope is not None and (isinstance(slope, bool) or not isinstance(slope, int | float) or not slope > 0):
        raise ValueError(f"slope: expected the activation's largest absolute slope, a positive float, got {slope!r}")
    if not isinstance(cell, Elman | IndRNN | Jordan):
        return None, (
            f"none known for {type(cell).__name__}: its step's Jacobian is not bounded by the weights alone (it has "
            "terms that grow with the state) or depends on what is drawn; bound is measured"
        )
    slopes = [slope if slope is not None else _known(_SLOPES, activations.resolve(cell.activation))]
    if isinstance(cell, Jordan):
        slopes.append(_known(_SLOPES, activations.resolve(cell.out_activation)))
    if None in slopes:
        return None, "none: the largest slope of the activation is not known; pass slope="
    names = ("w_hh", "w_ho") if isinstance(cell, Jordan) else ("w_hh",)
    weights = [np.asarray(params[name], np.float64) for name in names]
    norms = [np.abs(w).max() if w.ndim == 1 else np.linalg.norm(w, 2) for w in weights]
    factor = float(np.prod(norms) * np.prod(np.array(slopes, float)))
    what = "largest absolute" if isinstance(cell, IndRNN) else "largest singular value of"
    return factor, (
        f"({' * '.join(f'{what} {name} {norm:.4g}' for name, norm in zip(names, norms, strict=True))} * largest slope "
        f"{float(np.prod(np.array(slopes, float))):.4g}) to the power of the valid steps from k to t"
    )


# --- small things ------------------------------------------------------------------------------------------------


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floats(state: Any, batch_ndim: int) -> tuple[list[Any], list[str], list[int]]:
    """The floating leaves of a state, their names, and how many numbers each has for one sequence."""
    found = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if _is_float(leaf)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "state" for path, _ in found]
    return [leaf for _, leaf in found], names, [math.prod(leaf.shape[batch_ndim:]) for _, leaf in found]


def _valid(lengths: Any, mask: Any, time: int, batch_shape: tuple[int, ...]) -> np.ndarray:
    valid = sequence.valid_steps(lengths, mask, time, batch_shape)
    return np.ones((time, *batch_shape), bool) if valid is None else np.asarray(valid)


def _norm(gradient: jax.Array, leading: int) -> np.ndarray:
    """Norms over all but the leading axes, in float64: the squares of what has vanished underflow in float32."""
    squares = np.square(np.asarray(gradient, np.float64))
    return np.sqrt(squares.sum(axis=tuple(range(leading, squares.ndim))))


def _rms(norms: np.ndarray, valid: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, norms.ndim))
    return np.sqrt(_fraction(np.where(valid, np.square(norms), 0.0).sum(axes), valid.sum(axes)))


def _fraction(part: Any, whole: Any) -> np.ndarray:
    """``part / whole``, NaN where there is no whole."""
    whole = np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _singular_values(matrices: np.ndarray) -> np.ndarray:
    finite = np.isfinite(matrices).all((-2, -1))
    values = np.linalg.svd(np.where(finite[..., None, None], matrices, 0.0), compute_uv=False)
    return np.where(finite[..., None], values, np.nan)


def _row(product: np.ndarray, known: np.ndarray, bound: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, ...]:
    values = np.where(known[..., None], _singular_values(product), np.nan)
    return values, np.where(known, bound, np.nan), steps, known


def _power(factor: float, counts: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.power(factor, counts.astype(float))


def _nan_reduce(reduce: Any, values: np.ndarray) -> np.ndarray:
    """A reduction over the second axis that leaves out NaN, and is NaN where nothing is left, without a warning."""
    result = np.full(len(values), np.nan)
    some = ~np.isnan(values).all(1)
    if some.any():
        result[some] = reduce(values[some], axis=1)
    return result


def _flat(values: np.ndarray) -> np.ndarray:
    """All but the first axis as one."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _positive(values: np.ndarray) -> np.ndarray:
    """What a logarithmic axis can show; the rest becomes a gap."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed; pip install "jrnn[plot]"') from error
    return pyplot.subplots(layout="constrained")[1]
