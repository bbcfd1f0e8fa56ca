"""Whether Newton's method over the whole sequence converges, and how fast."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.cells.base import Layer
from jrnn.diagnose.layers import make_probe
from jrnn.diagnose.taps import Solved
from jrnn.run.unrolling import unroll
from jrnn.schedules import newton as schedule


class Newton(NamedTuple):
    """The report of `newton`.

    Attributes:
      converged: ``(*B,)`` booleans. A sequence that has not converged runs by a scan.
      residual: ``(*B,)``, the largest residual ``|F_t(s_{t-1}) - s_t|`` over all steps and units in the last iteration,
        in units of rounding at the size of the state: ``epsilon * (1 + |F_t|)``, with the state dtype's epsilon. NaN
        where the run is not finite.
      iterations: how many iterations were made, until all sequences had converged.
      tolerance: the residual at which a sequence counts as converged.
      limit: the iterations after which those that have not converged run by a scan.
      jacobians: "whole" or "diagonal": what each iteration takes of the steps' Jacobians. Diagonals, which larger
        states take, need more iterations.

    >>> Newton._fields[:3]
    ('converged', 'residual', 'iterations')
    """

    converged: np.ndarray
    residual: np.ndarray
    iterations: int
    tolerance: float
    limit: int
    jacobians: str


def newton(
    model: Layer,
    params: Any,
    xs: Any,
    *,
    state: Any = None,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    layer: Any = None,
) -> Newton:
    """Whether ``backend="newton"`` converges on these sequences, with what residual, and in how many iterations.

    The states ``s_t = F_t(s_{t-1})`` of all steps are the root of one system of equations. Newton's method solves it
    for all steps at once (Lim et al. 2024, "Parallelizing non-linear sequential models over the sequence length";
    Gonzalez et al. 2024, "Towards scalable and stable parallelization of nonlinear RNNs").

    `jrnn.unroll` never says that a sequence has not converged: it runs that sequence by a scan, in the same program, so
    that its result is that of the scan either way, and only the time is lost. This function shows it. The sign of the
    exponent of `lyapunov` predicts the result.

    Args:
      model, params, xs, state, lengths, mask, resets, reverse, key, layer: see `jrnn.diagnose`. The layers below the
        chosen one run by the schedule that jrnn chooses for them.

    Raises:
      ValueError, TypeError: as `jrnn.unroll`; ``layer`` is not the place of a recurrent layer; Newton's method cannot
        run the layer, for the reason in the message (a state with integers or complex numbers, random numbers at each
        step, a mesh).

    >>> xs = 0.1 * jax.random.normal(jax.random.key(1), (200, 2, 3))
    >>> for gain in (0.5, 3.0):  # the largest eigenvalue of w_hh, in absolute value
    ...     cell = jrnn.elman(16, recurrent_init=jrnn.initializers.orthogonal(gain))
    ...     result = jrnn.diagnose.newton(cell, cell.init(jax.random.key(0), 3), xs)
    ...     print(result.converged.tolist(), result.iterations < result.limit)
    [True, True] True
    [False, False] False
    """
    options = dict(state=state, lengths=lengths, mask=mask, resets=resets, reverse=reverse, key=key)
    probe = make_probe(model, params, xs, options, layer, jnp.generic)
    found = unroll(probe.model(Solved), probe.params(()), xs, **options)[0]
    size = sum(math.prod(leaf.shape[len(probe.batch_shape) :]) for leaf in jax.tree.leaves(probe.state))
    return Newton(
        converged=np.asarray(found.converged),
        residual=np.asarray(found.residual, np.float64),
        iterations=int(found.iterations),
        tolerance=float(schedule.ROUNDING),
        limit=schedule.ITERATIONS,
        jacobians="whole" if size <= schedule.DENSE else "diagonal",
    )
