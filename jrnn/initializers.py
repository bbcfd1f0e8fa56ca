"""Initialisers of parameters: frozen, hashable values, which may also be given by name.

An initialiser is called as ``init(key, shape, dtype)``. Cells take them by name (``"orthogonal"``), as one of the
values below where a setting matters (``orthogonal(scale=0.5)``), or as a module-level function with that signature.
A weight of G gates is drawn gate by gate, so that ``shape`` is ``(F, H)`` or ``(H, H)`` and each block is orthogonal
by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import finite, module_level

__all__ = [
    "chrono", "constant", "draw", "glorot_uniform", "identity", "normal", "orthogonal", "reservoir", "resolve",
    "rotations", "uniform", "zeros",
]  # fmt: skip

Initializer = str | Callable[..., jax.Array]


@dataclass(frozen=True)
class constant:
    """Every element equal to ``value``.

    >>> constant(2.0)(jax.random.key(0), (2,), jnp.float32)
    Array([2., 2.], dtype=float32)
    """

    value: float = 0.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class chrono:
    """Biases of forget gates whose memories last from 2 to ``steps`` steps, evenly spread (Tallec and Ollivier 2018).

    The logarithm of a number that is uniform in [1, steps - 1). A gate with the bias ``log u`` keeps a share of ``u /
    (1 + u)`` at each step, and so remembers for about ``1 + u`` steps. For the ``forget_bias`` of `jrnn.min_gru`,
    `jrnn.min_lstm`, `jrnn.sru` and `jrnn.qrnn`.

    Args:
      steps: the number of steps that the longest memory should last, at least 2.

    >>> share = jax.nn.sigmoid(chrono(100)(jax.random.key(0), (1000,)))
    >>> lasts = 1 / (1 - share)
    >>> bool(lasts.min() >= 1.99 and lasts.max() < 100.01), bool(abs(lasts.mean() - 51) < 3)
    (True, True)
    """

    steps: float

    def __post_init__(self) -> None:
        finite(self.steps, "steps", least=2.0)

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, self.steps - 1.0))


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Zeros.

    >>> zeros(jax.random.key(0), (2,))
    Array([0., 0.], dtype=float32)
    """
    return jnp.zeros(shape, dtype)


@dataclass(frozen=True)
class orthogonal:
    """``scale`` times a random orthogonal matrix (Saxe et al. 2014): every singular value is ``scale``.

    >>> w = orthogonal(2.0)(jax.random.key(0), (3, 3))
    >>> bool(jnp.allclose(w @ w.T, 4 * jnp.eye(3), atol=1e-5))
    True
    """

    scale: float = 1.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.nn.initializers.orthogonal(self.scale)(key, shape, dtype)


@dataclass(frozen=True)
class identity:
    """``scale`` times the identity matrix, for rectified Elman networks (Le, Jaitly and Hinton 2015).

    >>> identity(0.5)(jax.random.key(0), (2, 2))
    Array([[0.5, 0. ],
           [0. , 0.5]], dtype=float32)
    """

    scale: float = 1.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        if len(shape) != 2:
            raise ValueError(f"identity: expected the shape of a matrix, got {shape}")
        return self.scale * jnp.eye(*shape, dtype=dtype)


@dataclass(frozen=True)
class rotations:
    """A matrix S for which ``exp(S - S^T)`` turns each of H/2 planes by a random angle (Henaff, Szlam and LeCun 2016).

    Angles are uniform in [-pi, pi). For the recurrent weights of `jrnn.orthogonal_rnn`.

    >>> rotations()(jax.random.key(0), (4, 4)).shape
    (4, 4)
    """

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        _square(shape, "rotations")
        angles = jax.random.uniform(key, (shape[0],), dtype, -jnp.pi, jnp.pi)
        first = jnp.arange(shape[0]) % 2 == 0  # of the two units of a plane
        return jnp.diag(jnp.where(first, angles, jnp.zeros((), dtype))[:-1], 1)


@dataclass(frozen=True)
class reservoir:
    """A sparse random matrix of a given spectral radius, for the recurrent weights of `jrnn.echo_state` (Jaeger 2001).

    Each unit is fed by ``max(1, round(density * H))`` units, with weights uniform in [-1, 1), and the whole is scaled
    so that the largest absolute value of an eigenvalue is ``radius``.

    Args:
      radius: positive.
      density: the share of weights that are not zero, in (0, 1].

    >>> w = reservoir(0.9, density=0.2)(jax.random.key(0), (20, 20))
    >>> int((w != 0).sum()), round(float(abs(np.linalg.eigvals(w)).max()), 4)
    (80, 0.9)
    """

    radius: float = 0.9
    density: float = 0.1

    def __post_init__(self) -> None:
        finite(self.radius, "spectral_radius", above=0.0)
        finite(self.density, "density", above=0.0)
        if self.density > 1:
            raise ValueError(f"density: expected a share of the weights in (0, 1], got {self.density}")

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        _square(shape, "reservoir")
        k_places, k_values = jax.random.split(key)
        fed = max(1, round(self.density * shape[0]))
        # With as many weights into each unit there is always a cycle, without which every eigenvalue would be zero.
        ranks = jnp.argsort(jnp.argsort(jax.random.uniform(k_places, shape), 0), 0)
        w = jnp.where(ranks < fed, jax.random.uniform(k_values, shape, dtype, -1.0, 1.0), jnp.zeros((), dtype))
        return w * (self.radius / spectral_radius(w))


def spectral_radius(w: jax.Array) -> jax.Array:
    """The largest absolute value of an eigenvalue, ``lim |w^n|^(1/n)`` (Gelfand), by squaring; on every device.

    >>> round(float(spectral_radius(jnp.array([[0.0, 2.0], [-2.0, 0.0]]))), 4)
    2.0
    """

    def squared(i: Any, carry: Any) -> Any:
        matrix, logarithm, weight = carry
        matrix = jnp.matmul(matrix, matrix, precision="highest")
        norm = jnp.linalg.norm(matrix)
        return matrix / norm, logarithm + weight * jnp.log(norm), weight / 2

    norm = jnp.linalg.norm(w)
    return jnp.exp(jax.lax.fori_loop(0, 20, squared, (w / norm, jnp.log(norm), jnp.full((), 0.5, w.dtype)))[1])


def _square(shape: tuple[int, ...], name: str) -> None:
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{name}: expected the shape of a square matrix, got {shape}")


@dataclass(frozen=True)
class glorot_uniform:
    """Uniform with variance ``2 / (fan_in + fan_out)`` (Glorot and Bengio 2010), fans taken of one gate.

    >>> bool(jnp.abs(glorot_uniform()(jax.random.key(0), (3, 3))).max() <= 1.0)
    True
    """

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.nn.initializers.glorot_uniform()(key, shape, dtype)


@dataclass(frozen=True)
class uniform:
    """Uniform in ``[-bound, bound)``; without a bound PyTorch's ``1 / sqrt(H)``, H the last axis.

    >>> bool(jnp.abs(uniform()(jax.random.key(0), (100, 4))).max() < 0.5)
    True
    """

    bound: float | None = None

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = shape[-1] ** -0.5 if self.bound is None else self.bound
        return jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclass(frozen=True)
class normal:
    """Gaussian with standard deviation ``scale``.

    >>> normal(0.1)(jax.random.key(0), (2, 3)).shape
    (2, 3)
    """

    scale: float = 0.01

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return self.scale * jax.random.normal(key, shape, dtype)


_NAMES: dict[str, Callable[..., jax.Array]] = {
    "glorot_uniform": glorot_uniform(),
    "identity": identity(),
    "normal": normal(),
    "orthogonal": orthogonal(),
    "standard_normal": normal(1.0),
    "uniform": uniform(),
    "zeros": zeros,
}


def draw(init: Initializer, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A float32 array from an initialiser, which is not called for an array without elements: most divide by a size.

    >>> draw("glorot_uniform", jax.random.key(0), (0, 4)).shape
    (0, 4)
    """
    return resolve(init)(key, shape, jnp.float32) if 0 not in shape else jnp.zeros(shape, jnp.float32)


def resolve(init: Initializer, argument: str = "init") -> Callable[..., jax.Array]:
    """The function behind a name; a callable is returned as it is.

    >>> resolve("orthogonal")
    orthogonal(scale=1.0)
    """
    if isinstance(init, str):
        if init not in _NAMES:
            raise ValueError(
                f"{argument}: expected one of {sorted(_NAMES)} or a function (key, shape, dtype), got {init!r}"
            )
        return _NAMES[init]
    return module_level(init, argument, sorted(_NAMES))
