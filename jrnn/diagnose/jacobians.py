"""Measures products of the steps' Jacobians, their singular values, and the bounds that they obey."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jrnn.cells.base import Layer
from jrnn.diagnose.arrays import (
    axes_of,
    flat,
    float_parts,
    nan_reduce,
    positive,
    power,
    row_of,
    singular_values_of,
    valid_flags,
)
from jrnn.diagnose.bounds import weight_factor
from jrnn.diagnose.layers import make_probe


class JacobianProducts(NamedTuple):
    """The measurements of `jacobian_products`: one row for each lag t-k, from 0 (the identity) on.

    Attributes:
      lags: ``(L,)`` integers, t-k.
      norms: ``(L, *B)``, the largest singular value of ds_t/ds_k, where s is the whole state.
      singular_values: ``(L, *B, N)``, all of them, in descending order. Those below 1e-16 of the largest, the
        precision of float64, are rounding errors.
      bound: ``(L, *B)``, the product of the largest singular values of the steps' measured Jacobians: an upper bound of
        the norms, for every cell.
      weight_bound: ``(L, *B)``, the bound that follows from the weights alone, or None where none is known.
      weight_bound_reason: how ``weight_bound`` was derived, or why it is None.
      fields: the fields of the state, in the order in which they are joined, and the size of each.

    All arrays are NaN where step t or step k is padding of a sequence, or where a Jacobian is not finite.

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
    """Norms and singular values of ds_t/ds_k over the lag t-k, and their bounds (Pascanu et al. 2013)::

        ds_t/ds_k = J_t J_{t-1} ... J_{k+1}      J_t = ds_t/ds_{t-1}      s_t the state after step t

    The state is taken whole: h and c of an LSTM side by side, N = 2H. For Elman's network ``J_t = diag(f'(a_t)) W^T``,
    so that with gamma the largest slope of the activation (1 for tanh and relu, 1/4 for the sigmoid) ::

        |dh_t/dh_k| <= (gamma * largest singular value of w_hh) ** (t-k)

    If the base of this power is below 1, gradients must vanish (Bengio et al. 1994; Pascanu, Mikolov and Bengio 2013).
    The same argument gives ``weight_bound`` for IndRNN (with the largest absolute weight) and for Jordan's network
    (with both its weights and slopes). No such bound is known for gated cells, whose Jacobians have terms that grow
    with the state: for them ``weight_bound`` is None. ``bound``, the product of the norms of the measured J_t, holds
    for every cell.

    A reset makes the product 0. A step that is padding holds the state and counts in no bound. Jacobians are computed
    in the state's dtype, and products and singular values in float64. The work grows with L * B * N**3: pass a few
    sequences, or limit ``lags``.

    Args:
      start: fixes k: the products lead from the state after step k to the state after every later step. With neither
        ``start`` nor ``end``, they lead from the initial state.
      end: fixes t: the products lead to the state after step t from the state after every earlier step, and from the
        initial state.
      lags: the largest lag; None for all lags.
      slope: the activation's largest absolute slope, for an activation whose slope jrnn does not know.
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`. Where the layer runs
        in reverse, "later" is a smaller t and lags count in the order of the run.

    Raises:
      ValueError, TypeError: the errors of `jrnn.unroll`; ``start`` and ``end`` are both given, or outside [0, T).

    >>> cell = jrnn.elman(4, recurrent_init=jrnn.initializers.orthogonal(0.5))
    >>> params = cell.init(jax.random.key(0), 3)
    >>> xs = jax.random.normal(jax.random.key(1), (6, 2, 3))
    >>> result = jrnn.diagnose.jacobian_products(cell, params, xs)
    >>> result.weight_bound[:4, 0].round(4).tolist(), bool((result.norms <= 1.000001 * result.weight_bound).all())
    ([1.0, 0.5, 0.25, 0.125], True)
    """
    options = dict(state=state, lengths=lengths, mask=mask, resets=resets, reverse=reverse, key=key)
    probe = make_probe(model, params, xs, options, layer)
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
    # Each further lag multiplies by the Jacobian of the next step in `path`. The product leads between the state after
    # the step `fixed` and that after the next step in `others`, where None stands for the initial state.
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

    valid = valid_flags(lengths, mask, time, batch)
    restarted = np.zeros((time, *batch), bool) if trace.resets is None else np.asarray(trace.resets)
    _, names, sizes = float_parts(probe.state, len(batch))
    width = sum(sizes)
    eye = np.broadcast_to(np.eye(width), (*batch, width, width))
    factor, reason = weight_factor(probe.cell, trace.params, slope, key)

    product, bound, steps = eye, np.ones(batch), np.zeros(batch, int)
    known = np.ones(batch, bool) if fixed is None else valid[fixed]
    rows = [row_of(eye, known, bound, steps)]
    for step, other in zip(path, others, strict=True):
        jacobian = np.asarray(trace.jacobian(probe.cell, step), np.float64)
        jacobian = np.where(restarted[step][..., None, None], 0.0, jacobian)
        jacobian = np.where(valid[step][..., None, None], jacobian, eye)
        with np.errstate(over="ignore", invalid="ignore"):
            product = product @ jacobian if end is not None else jacobian @ product
            bound = bound * singular_values_of(jacobian)[..., 0]
        steps = steps + valid[step]
        rows.append(row_of(product, known if other is None else known & valid[other], bound, steps))
    values, bounds, counts, knowns = (np.stack(column) for column in zip(*rows, strict=True))
    return JacobianProducts(
        lags=np.arange(len(rows)),
        norms=values[..., 0],
        singular_values=values,
        bound=bounds,
        weight_bound=None if factor is None else np.where(knowns, power(factor, counts), np.nan),
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
    ax = axes_of(ax)

    def median(values: np.ndarray) -> np.ndarray:
        return positive(nan_reduce(np.nanmedian, flat(values)))

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
