"""The real-gated linear recurrent unit of Griffin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrnn import initializers
from jrnn.cells.base import check_named, vector
from jrnn.cells.linear import GatedLinearCell

__all__ = ["rg_lru"]

POWER = 8.0  # c of the paper


@dataclass(frozen=True, repr=False)
class RGLRU(GatedLinearCell):
    """See `rg_lru`."""

    gate_names: ClassVar[tuple[str, ...]] = ("r", "i")
    emits = "h"

    _constructor = "rg_lru"

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        if in_features != self.hidden:
            raise ValueError(
                f"in_features: expected {self.hidden}, the units of {self!r}, which gates its input unit by unit, got "
                f"{in_features!r}; put jrnn.dense({self.hidden}) before it, in a jrnn.stack"
            )
        k_gates, k_decay = jax.random.split(key)
        start = jax.random.uniform(k_decay, (self.hidden,), jnp.float32, 0.9, 0.999) ** (1 / POWER)
        return {**super().init(k_gates, in_features), "decay": jnp.log(start) - jnp.log1p(-start)}

    def check(self, params: Any, x: Any) -> None:
        check_named(self, params, {"w_ih": (self.hidden, 2 * self.hidden), "decay": (self.hidden,)})
        super().check(params, x)

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        r, i = self.gate_inputs(params, xs)
        log_a = -POWER * vector(jax.nn.softplus(-params["decay"]), r) * jax.nn.sigmoid(r)
        # Not below what the square root can be differentiated at, where r underflows and a is one.
        rest = jnp.maximum(-jnp.expm1(2 * log_a), jnp.array(1e-14, r.dtype))
        return jnp.exp(log_a), jnp.sqrt(rest) * jax.nn.sigmoid(i) * xs.astype(r.dtype)


def rg_lru(
    hidden: int,
    *,
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> RGLRU:
    """Real-gated linear recurrent unit (De et al. 2024, "Griffin"): a decay and an input gate by the input.

    ``r = σ(x W_r + b_r)``, ``i = σ(x W_i + b_i)``, ``a = σ(decay) ** (8 r)``, ``h = a * h + sqrt(1 - a²) * (i * x)``.
    Its inputs have H features: in Griffin a linear layer and a short convolution (`jrnn.tdnn`) come before it.

    Args:
      hidden: H, the number of units.
      input_init, bias_init: initialisers of ``w_ih`` and ``b``, drawn gate by gate.

    Parameters: ``w_ih (H, 2H)`` and ``b (2H,)`` in the order r, i; ``decay (H,)``, which starts where ``σ(decay) ** 8``
    is uniform in [0.9, 0.999).

    Raises:
      ValueError: by ``init``, where the inputs do not have H features.

    >>> cell = jrnn.rg_lru(4)
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 4), jnp.ones((5, 2, 4)))
    >>> ys.shape, state.h.shape
    ((5, 2, 4), (2, 4))
    """
    return RGLRU(hidden, input_init=input_init, bias_init=bias_init)
