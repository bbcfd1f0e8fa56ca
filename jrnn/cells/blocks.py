"""Cells with block-diagonal recurrent weights: their base class, and DreamerV3's GRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jrnn import initializers
from jrnn._core.checks import divides, epsilon, finite, non_negative_int, prng_key
from jrnn.cells.affine import AffineCell, theta_shapes
from jrnn.cells.base import HiddenState, check_features, check_projection, vector
from jrnn.cells.norm import layer_norm_gates

__all__ = ["block_gru"]


def block_diagonal(w: jax.Array, gates: int) -> jax.Array:
    """``(blocks, D, G*D)`` as the matrix ``(blocks * D, G * blocks * D)`` that acts on each block by itself."""
    blocks, size, _ = w.shape
    w = w.reshape(blocks, size, gates, 1, size)
    own = jnp.eye(blocks, dtype=w.dtype).reshape(blocks, 1, 1, blocks, 1)
    return (w * own).reshape(blocks * size, gates * blocks * size)


@dataclass(frozen=True, repr=False)
class BlockCell(AffineCell):
    """An affine cell whose units are in blocks, each with recurrent weights of its own: ``w_hh (blocks, D, G*D)``."""

    blocks: int = 1

    # What the blocks are called in messages.
    blocks_name: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        divides(self.blocks, self.hidden, self.blocks_name, "hidden")

    @property
    def _size(self) -> int:
        """D, the units of a block."""
        return self.hidden // self.blocks

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        prng_key(key)
        non_negative_int(in_features, "in_features")
        k_ih, k_hh, k_b, k_theta = jax.random.split(key, 4)
        shape = (self._size, self._size)
        blocks = [self._per_gate(self.recurrent_init, k, shape) for k in jax.random.split(k_hh, self.blocks)]
        return {
            "w_ih": self._per_gate(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": jnp.stack(blocks),
            "b": self.init_bias(k_b),
            **self.init_theta(k_theta),
        }

    def check(self, params: Any, x: Any) -> None:
        count, size = len(self.gate_names), self._size
        shapes = {"w_hh": (self.blocks, size, count * size), "b": (count * self.hidden,), **theta_shapes(self)}
        check_projection(self, params, count * self.hidden, shapes)
        check_features(x, params["w_ih"], "xs", self)

    def recurrent_weights(self, params: Any) -> jax.Array:
        return block_diagonal(params["w_hh"], len(self.gate_names))


@dataclass(frozen=True, repr=False)
class BlockGRU(BlockCell):
    """See `block_gru`."""

    norm: str = "rms"
    update_bias: float = -1.0
    epsilon: float = 1e-4

    gate_names: ClassVar[tuple[str, ...]] = ("r", "n", "z")
    elementwise: ClassVar[bool | None] = False
    additive = True

    _constructor = "block_gru"

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments, options = super()._constructor_arguments()
        return arguments, {"blocks": self.blocks, **options}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("rms", "layer"):
            raise ValueError(f'norm: expected "rms" or "layer", got {self.norm!r}')
        finite(self.update_bias, "update_bias")
        epsilon(self.epsilon)

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        width = 3 * self.hidden
        return {"scale": jnp.ones(width, jnp.float32), "shift": jnp.zeros(width, jnp.float32)}

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        parts = tuple(a + b for a, b in zip(u, v, strict=True))
        scales, shifts = self.split(theta["scale"]), self.split(theta["shift"])
        if self.norm == "layer":
            parts = layer_norm_gates(parts, scales, self.epsilon)
        else:
            square = sum(jnp.sum(x * x, -1, keepdims=True) for x in parts) / (3 * self.hidden)
            inverse = lax.rsqrt(square + self.epsilon)
            parts = tuple(x * inverse * vector(scale, x) for x, scale in zip(parts, scales, strict=True))
        r, n, z = (x + vector(shift, x) for x, shift in zip(parts, shifts, strict=True))
        z = jax.nn.sigmoid(z + self.update_bias)
        return HiddenState(z * jnp.tanh(jax.nn.sigmoid(r) * n) + (1 - z) * state.h)


def block_gru(
    hidden: int,
    *,
    blocks: int = 8,
    norm: str = "rms",
    update_bias: float = -1.0,
    epsilon: float = 1e-4,
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> BlockGRU:
    """GRU with normalised gates and recurrent weights in blocks, the recurrent core of DreamerV3 (Hafner et al. 2023)::

        r, n, z = norm(x W_ih + h blockdiag(w_hh) + b) * scale + shift      the norm is over all 3H
        z = sigmoid(z + update_bias)
        h = z * tanh(sigmoid(r) * n) + (1 - z) * h

    With ``blocks=1, norm="layer"`` it is the GRU of DreamerV2 and of the first DreamerV3; the blocks are those of the
    published one, whose layers before the gates are `jrnn.dense` layers of their own.

    Args:
      hidden: H, the number of units.
      blocks: a number that divides ``hidden``: units are fed back to those of their own block.
      norm: "rms" or "layer".
      update_bias: added to the update gate z; below zero the state changes slowly at first.
      epsilon: added to the mean square or variance.
      input_init, recurrent_init, bias_init: initialisers; ``w_hh`` is drawn block by block and gate by gate.

    Parameters: ``w_ih (F, 3H)``, ``w_hh (blocks, D, 3D)`` with ``D = H / blocks``, ``b``, ``scale`` and ``shift``
    ``(3H,)``, gates in the order r, n, z.

    Raises:
      ValueError: if ``blocks`` does not divide ``hidden``.

    >>> cell = jrnn.block_gru(8, blocks=4)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> params["w_hh"].shape, jrnn.unroll(cell, params, jnp.ones((5, 2, 3)))[1].shape
    ((4, 2, 6), (5, 2, 8))
    """
    return BlockGRU(
        hidden,
        blocks,
        norm,
        update_bias,
        epsilon,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
