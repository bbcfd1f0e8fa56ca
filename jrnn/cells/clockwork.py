"""The Clockwork network: groups of units that run at their own pace."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn import activations, initializers
from jrnn._core.checks import batch_axes, non_negative_int, positive_int
from jrnn.cells.affine import WeightedCell
from jrnn.cells.base import check_features, check_projection, exported, product, stable

__all__ = ["ClockworkState", "clockwork"]


@exported
class ClockworkState(NamedTuple):
    """State of a Clockwork network: ``h (*B, H)``, and ``clock (*B,)``, the steps taken, modulo the common period.

    >>> cell = jrnn.clockwork(4, periods=(1, 2))
    >>> cell.initial_state(cell.init(jax.random.key(0), 3), (2,)).clock
    Array([0, 0], dtype=int32)
    """

    h: jax.Array
    clock: jax.Array


@dataclass(frozen=True, repr=False)
class Clockwork(WeightedCell):
    """See `clockwork`."""

    periods: tuple[int, ...] = field(kw_only=True)
    activation: activations.Activation = "tanh"

    state_type: ClassVar[Any] = ClockworkState

    _constructor = "clockwork"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.periods, tuple) or not self.periods:
            raise TypeError(f"periods: expected a tuple with the period of each group of units, got {self.periods!r}")
        for period in self.periods:
            positive_int(period, "periods")
        if self.hidden % len(self.periods):
            raise ValueError(
                f"periods: expected a number of periods that divides hidden={self.hidden}, since groups are of equal "
                f"size, got {len(self.periods)}: {self.periods}"
            )
        if math.lcm(*self.periods) >= 2**31:
            raise ValueError(
                f"periods: expected periods whose least common multiple is below 2**31, at which the clock starts "
                f"again, got {self.periods}"
            )
        activations.resolve(self.activation)

    @property
    def _periods(self) -> np.ndarray[Any, Any]:
        """The period of each unit."""
        return np.repeat(np.asarray(self.periods, np.int32), self.hidden // len(self.periods))

    @property
    def _mask(self) -> np.ndarray[Any, Any]:
        """Which weights there are: from each unit to those that are as fast or faster."""
        return self._periods[:, None] >= self._periods[None, :]

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        k_ih, k_hh, k_b = jax.random.split(key, 3)
        w_hh = initializers.draw(self.recurrent_init, k_hh, (self.hidden, self.hidden))
        return {
            "w_ih": initializers.draw(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": w_hh * self._mask.astype(np.float32),
            "b": initializers.draw(self.bias_init, k_b, (self.hidden,)),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> ClockworkState:
        batch = batch_axes(batch_shape)
        h = jnp.zeros((*batch, self.hidden), stable(params["w_hh"].dtype))
        return ClockworkState(h, jnp.zeros(batch, jnp.int32))

    def check(self, params: Any, x: Any) -> None:
        check_projection(self, params, self.hidden, {"w_hh": (self.hidden, self.hidden), "b": (self.hidden,)})
        check_features(x, params["w_ih"], "xs", self)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        w_hh = jnp.where(self._mask, params["w_hh"], jnp.zeros((), params["w_hh"].dtype))
        new = activations.resolve(self.activation)(p + product(state.h, w_hh))
        phase = state.clock[..., None] % lax.broadcast_to_rank(jnp.asarray(self._periods), new.ndim)
        h = jnp.where(phase == 0, new, state.h)
        return ClockworkState(h, (state.clock + 1) % np.int32(math.lcm(*self.periods))), h


def clockwork(
    hidden: int,
    *,
    periods: tuple[int, ...],
    activation: activations.Activation = "tanh",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> Clockwork:
    """Clockwork network (Koutnik et al. 2014): an Elman network in groups of units, each with a period::

        h_g = f(x W_ih + h W_hh + b)_g    where clock mod period_g = 0, else h_g as it was
        clock = clock + 1

    A group is fed by itself and by the groups that are as slow or slower; the other weights are zero. The clock is a
    part of the state: it stands still at steps that are not valid, and a reset sets it to zero.

    Args:
      hidden: H, units of all groups together.
      periods: the period of each group, such as ``(1, 2, 4, 8)``; groups are of equal size.
      activation: f.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b``.

    Parameters: ``w_ih (F, H)``, ``w_hh (H, H)``, ``b (H,)``.

    Raises:
      ValueError: if a period is not positive, or their number does not divide ``hidden``.

    >>> cell = jrnn.clockwork(4, periods=(1, 4))
    >>> ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))[1]
    >>> (ys[1:] == ys[:-1]).all(1).tolist(), (ys[1:, 2:] == ys[:-1, 2:]).all(1).tolist()
    ([False, False, False, False], [True, True, True, False])
    """
    if isinstance(periods, list):
        periods = tuple(periods)
    return Clockwork(
        hidden,
        periods=periods,
        activation=activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
