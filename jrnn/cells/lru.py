"""Diagonal recurrences in complex numbers: the linear recurrent unit, and the simplified state space layer S5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn import initializers
from jrnn._core.checks import non_negative_int, positive_int
from jrnn.cells.base import HiddenState, check_features, check_named, product, vector
from jrnn.cells.linear import LinearCell, form, parameter_dtype

__all__ = ["lru", "s5"]

Spectrum = Literal["legs", "s4d_lin", "s4d_inv"]


@dataclass(frozen=True, repr=False)
class _ComplexCell(LinearCell):
    """A linear cell with a complex state; all its parameters are real, with real and imaginary parts side by side.

    ``w_b (F, 2N)`` and ``w_c (2N, H)`` are complex matrices, ``w_d (F, H)`` is real.
    """

    hidden: int
    state: int

    def __post_init__(self) -> None:
        positive_int(self.hidden, "hidden")
        positive_int(self.state, "state")

    def out_features(self, in_features: Any) -> int:
        return self.hidden

    def state_form(self, params: Any) -> HiddenState:
        dtype = jnp.complex128 if parameter_dtype(params) == jnp.float64 else jnp.complex64
        return HiddenState(form((self.state,), dtype))

    def check(self, params: Any, x: Any) -> None:
        inputs = jnp.shape(params["w_d"])[:1] if isinstance(params, Mapping) and "w_d" in params else (x.shape[-1],)
        shapes = {name: (self.state,) for name in self.vectors()}
        matrices = {
            "w_b": (*inputs, 2 * self.state),
            "w_c": (2 * self.state, self.hidden),
            "w_d": (*inputs, self.hidden),
        }
        check_named(self, params, {**shapes, **matrices})
        check_features(x, params["w_d"], "xs", self)

    def vectors(self) -> tuple[str, ...]:
        """The names of the parameters ``(N,)``."""
        raise NotImplementedError

    def driven(self, params: Any, xs: jax.Array) -> jax.Array:
        """``B x``, complex."""
        return lax.complex(*jnp.split(product(xs, params["w_b"]), 2, -1))

    def real_readout(self, params: Any, h: jax.Array, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``Re(C h)`` and ``D x``."""
        return product(jnp.concatenate([h.real, -h.imag], -1), params["w_c"]), product(xs, params["w_d"])


@dataclass(frozen=True, repr=False)
class LRU(_ComplexCell):
    """See `lru`."""

    r_min: float = field(default=0.0, kw_only=True)
    r_max: float = field(default=1.0, kw_only=True)
    max_phase: float = field(default=2 * math.pi, kw_only=True)

    _constructor = "lru"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r_min", "r_max", "max_phase"):
            _number(getattr(self, name), name)
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(
                f"r_min, r_max: expected 0 <= r_min < r_max <= 1, the ring of stable eigenvalues, got {self.r_min} and "
                f"{self.r_max}"
            )
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase: expected an angle in (0, 2 pi], got {self.max_phase}")

    def vectors(self) -> tuple[str, ...]:
        return ("nu_log", "theta_log", "gamma_log")

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        k_nu, k_theta, k_b, k_c, k_d = jax.random.split(key, 5)
        u, v = (jax.random.uniform(k, (self.state,), jnp.float32, 1e-6) for k in (k_nu, k_theta))
        square = u * (self.r_max**2 - self.r_min**2) + self.r_min**2  # uniform on the ring, by area
        scale = 1 / math.sqrt(max(1, in_features))
        normal = initializers.normal
        return {
            "nu_log": jnp.log(-0.5 * jnp.log(square)),
            "theta_log": jnp.log(self.max_phase * v),
            "gamma_log": 0.5 * jnp.log1p(-square),
            "w_b": normal(scale / math.sqrt(2))(k_b, (in_features, 2 * self.state), jnp.float32),
            "w_c": normal(1 / math.sqrt(self.state))(k_c, (2 * self.state, self.hidden), jnp.float32),
            "w_d": normal(scale)(k_d, (in_features, self.hidden), jnp.float32),
        }

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        nu, theta = jnp.exp(params["nu_log"]), jnp.exp(params["theta_log"])
        b = self.driven(params, xs)
        return jnp.exp(lax.complex(-nu, theta)).astype(b.dtype), vector(jnp.exp(params["gamma_log"]), b) * b

    def readout(self, params: Any, h: jax.Array, xs: jax.Array) -> jax.Array:
        y, direct = self.real_readout(params, h, xs)
        return y + direct


@dataclass(frozen=True, repr=False)
class S5(_ComplexCell):
    """See `s5`."""

    spectrum: Spectrum = field(default="legs", kw_only=True)
    step_min: float = field(default=0.001, kw_only=True)
    step_max: float = field(default=0.1, kw_only=True)

    _constructor = "s5"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spectrum not in ("legs", "s4d_lin", "s4d_inv"):
            raise ValueError(f'spectrum: expected "legs", "s4d_lin" or "s4d_inv", got {self.spectrum!r}')
        for name in ("step_min", "step_max"):
            _number(getattr(self, name), name)
        if not 0 < self.step_min <= self.step_max:
            raise ValueError(
                f"step_min, step_max: expected 0 < step_min <= step_max, got {self.step_min} and {self.step_max}"
            )

    def vectors(self) -> tuple[str, ...]:
        return ("decay_log", "frequency", "step_log")

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        k_b, k_c, k_d, k_step = jax.random.split(key, 4)
        eigenvalues, basis = self.start()
        scale, normal, state = 1 / math.sqrt(max(1, in_features)), initializers.normal, self.state
        if basis is None:
            w_b = normal(scale / math.sqrt(2))(k_b, (in_features, 2 * state), jnp.float32)
            w_c = normal(math.sqrt(0.5 / state))(k_c, (2 * state, self.hidden), jnp.float32)
        else:  # real matrices in the basis of the whole operator, seen from that of its eigenvectors
            real_b = normal(scale)(k_b, (in_features, 2 * state), jnp.float32)
            real_c = normal(math.sqrt(0.5 / state))(k_c, (2 * state, self.hidden), jnp.float32)
            real, imaginary = jnp.asarray(basis.real, jnp.float32), jnp.asarray(basis.imag, jnp.float32)
            w_b = jnp.concatenate([real_b @ real, -real_b @ imaginary], -1)
            w_c = jnp.concatenate([real.T @ real_c, imaginary.T @ real_c])
        low, high = math.log(self.step_min), math.log(self.step_max)
        return {
            "decay_log": jnp.asarray(np.log(-eigenvalues.real), jnp.float32),
            "frequency": jnp.asarray(eigenvalues.imag, jnp.float32),
            "step_log": jax.random.uniform(k_step, (state,), jnp.float32, low, high),
            "w_b": w_b,
            "w_c": w_c,
            "w_d": normal(scale)(k_d, (in_features, self.hidden), jnp.float32),
        }

    def start(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The eigenvalues ``(N,)``, and for LegS the eigenvectors ``(2N, N)``, one of each conjugate pair."""
        n = np.arange(self.state)
        if self.spectrum == "s4d_lin":
            return -0.5 + 1j * np.pi * n, None
        if self.spectrum == "s4d_inv":
            return -0.5 + 1j * 2 * self.state / np.pi * (2 * self.state / (2 * n + 1) - 1), None
        root = np.sqrt(2 * np.arange(2 * self.state) + 1)
        skew = 0.5 * (np.triu(np.outer(root, root), 1) - np.tril(np.outer(root, root), -1))
        values, vectors = np.linalg.eigh(-1j * skew)  # in rising order, in pairs of opposite sign
        return -0.5 + 1j * values[self.state :], vectors[:, self.state :]

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        eigenvalues = lax.complex(-jnp.exp(params["decay_log"]), params["frequency"])
        turned = eigenvalues * jnp.exp(params["step_log"]).astype(eigenvalues.dtype)
        b = self.driven(params, xs)
        return jnp.exp(turned).astype(b.dtype), vector(jnp.expm1(turned) / eigenvalues, b) * b

    def readout(self, params: Any, h: jax.Array, xs: jax.Array) -> jax.Array:
        y, direct = self.real_readout(params, h, xs)
        return 2 * y + direct


def _number(value: Any, argument: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: expected a float, got {value!r}")


def lru(hidden: int, state: int, *, r_min: float = 0.0, r_max: float = 1.0, max_phase: float = 2 * math.pi) -> LRU:
    """Linear recurrent unit (Orvieto et al. 2023): a diagonal recurrence in complex numbers, stable by construction.

    ``h = λ * h + γ * (x B)``, ``y = Re(h C) + x D``, with ``λ = exp(-exp(nu_log) + i exp(theta_log))`` and ``γ =
    exp(gamma_log)``, which starts as ``sqrt(1 - |λ|²)``. A nonlinearity comes after it (`jrnn.activation`, or a gated
    `jrnn.dense`).

    Args:
      hidden: H, features of the output.
      state: N, complex numbers of the state.
      r_min, r_max: the ring in which the eigenvalues λ start, uniform by area.
      max_phase: the angles of the eigenvalues start uniform between zero and this number.

    Parameters: ``nu_log``, ``theta_log`` and ``gamma_log (N,)``; ``w_b (F, 2N)``, the real part of B and then the
    imaginary one; ``w_c (2N, H)``, likewise; ``w_d (F, H)``. The state is ``HiddenState(h)``, ``h (*B, N)`` complex.

    >>> cell = jrnn.lru(4, 8, r_min=0.9, r_max=0.999)
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, state.h.shape, state.h.dtype
    ((5, 2, 4), (2, 8), dtype('complex64'))
    """
    return LRU(hidden, state, r_min=r_min, r_max=r_max, max_phase=max_phase)


def s5(hidden: int, state: int, *, spectrum: Spectrum = "legs", step_min: float = 0.001, step_max: float = 0.1) -> S5:
    """S5 (Smith, Warrington and Linderman 2023): a diagonal linear state space model in continuous time.

    ``dh/dt = Λ h + x B``, with x held constant over a step of length Δ, is ``h = exp(ΛΔ) * h + (exp(ΛΔ) - 1) / Λ * (x
    B)``. The output is ``y = 2 Re(h C) + x D``: of 2N states, which come in conjugate pairs, N are computed.
    ``Λ = -exp(decay_log) + i frequency`` is stable by construction, and ``Δ = exp(step_log)`` is learned, one for each
    state.

    Args:
      hidden: H, features of the output.
      state: N, complex numbers of the state.
      spectrum: where Λ starts: "legs", the eigenvalues of the normal part of HiPPO-LegS, with B and C seen from its
        eigenvectors, as in S5; "s4d_lin", ``-1/2 + i π n``; "s4d_inv", ``-1/2 + i 2N/π (2N/(2n + 1) - 1)``, both of
        S4D (Gu, Gupta, Goel and Ré 2022).
      step_min, step_max: Δ starts between them, uniform in its logarithm.

    Parameters: ``decay_log``, ``frequency`` and ``step_log (N,)``; ``w_b (F, 2N)``, the real part of B and then the
    imaginary one; ``w_c (2N, H)``, likewise; ``w_d (F, H)``. The state is ``HiddenState(h)``, ``h (*B, N)`` complex.

    >>> cell = jrnn.s5(4, 8, spectrum="s4d_lin")
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, state.h.shape
    ((5, 2, 4), (2, 8))
    """
    return S5(hidden, state, spectrum=spectrum, step_min=step_min, step_max=step_max)
