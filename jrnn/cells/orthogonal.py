"""Cells that keep gradients alive by the form of their recurrent matrix: orthogonal, and antisymmetric."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrnn import activations, initializers
from jrnn._core.checks import finite
from jrnn.cells.affine import AffineCell
from jrnn.cells.base import HiddenState, check_features, check_projection, is_low, vector

__all__ = ["antisymmetric", "orthogonal_rnn"]


@dataclass(frozen=True, repr=False)
class Antisymmetric(AffineCell):
    """See `antisymmetric`."""

    step_size: float = 0.1
    diffusion: float = 0.01
    activation: activations.Activation = "tanh"
    recurrent_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)

    elementwise: ClassVar[bool | None] = True
    additive = True

    _constructor = "antisymmetric"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.step_size, "step_size", above=0.0)
        finite(self.diffusion, "diffusion", least=0.0)
        activations.resolve(self.activation)

    def recurrent_weights(self, params: Any) -> jax.Array:
        w = params["w_hh"]
        matrix = w - w.T - self.diffusion * jnp.eye(self.hidden, dtype=w.dtype)
        return matrix if len(self.gate_names) == 1 else jnp.concatenate([matrix] * len(self.gate_names), -1)

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        return HiddenState(state.h + self.step_size * activations.resolve(self.activation)(u[0] + v[0]))


@dataclass(frozen=True, repr=False)
class GatedAntisymmetric(Antisymmetric):
    """See `antisymmetric`: with a gate."""

    gate_names: ClassVar[tuple[str, ...]] = ("z", "n")

    _constructor = "antisymmetric"

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments, options = super()._constructor_arguments()
        return arguments, {"gated": True, **options}

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        params = super().init(key, in_features)
        return {**params, "w_hh": params["w_hh"][:, : self.hidden]}

    def check(self, params: Any, x: Any) -> None:
        check_projection(self, params, 2 * self.hidden, {"w_hh": (self.hidden, self.hidden), "b": (2 * self.hidden,)})
        check_features(x, params["w_ih"], "xs", self)

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        z = jax.nn.sigmoid(u[0] + v[0])
        n = activations.resolve(self.activation)(u[1] + v[1])
        return HiddenState(state.h + self.step_size * z * n)


def antisymmetric(
    hidden: int,
    *,
    gated: bool = False,
    step_size: float = 0.1,
    diffusion: float = 0.01,
    activation: activations.Activation = "tanh",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> Antisymmetric:
    """AntisymmetricRNN (Chang et al. 2019), a stable differential equation taken in steps of Euler's method::

        A = W_hh - W_hh^T - diffusion I
        h = h + step_size tanh(x W_ih + h A + b)                            ungated
        h = h + step_size sigmoid(x W_z + h A + b_z) tanh(x W_n + h A + b_n)    gated=True; both gates share A

    Args:
      hidden: H, the number of units.
      gated: whether the step is scaled by a gate.
      step_size: the step size of Euler's method, positive (epsilon in the paper).
      diffusion: a number that is subtracted from the diagonal for stability, not negative (gamma in the paper).
      activation: the function written tanh above.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b``.

    Parameters: ``w_ih (F, H)``, ``w_hh (H, H)``, ``b (H,)``; gated ``w_ih (F, 2H)`` and ``b (2H,)``, gates in the
    order z, n.

    Raises:
      ValueError: if ``step_size`` is not positive, or ``diffusion`` is negative.

    >>> cell = jrnn.antisymmetric(4)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 4)
    """
    return (GatedAntisymmetric if gated else Antisymmetric)(
        hidden,
        step_size,
        diffusion,
        activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class OrthogonalRNN(AffineCell):
    """See `orthogonal_rnn`."""

    activation: activations.Activation = "modrelu"
    map: str = "exponential"
    recurrent_init: initializers.Initializer = field(default=initializers.rotations(), kw_only=True)

    elementwise: ClassVar[bool | None] = True
    additive = True

    _constructor = "orthogonal_rnn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation != "modrelu":
            activations.resolve(self.activation)
        if self.map not in ("exponential", "cayley"):
            raise ValueError(f'map: expected "exponential" or "cayley", got {self.map!r}')

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        return {"b_mod": jnp.zeros(self.hidden, jnp.float32)} if self.activation == "modrelu" else {}

    def recurrent_weights(self, params: Any) -> jax.Array:
        w = params["w_hh"]
        wide = w.astype(jnp.float32) if is_low(w.dtype) else w
        skew = wide - wide.T
        if self.map == "exponential":
            matrix = jax.scipy.linalg.expm(skew)
        else:
            eye = jnp.eye(self.hidden, dtype=skew.dtype)
            matrix = jnp.linalg.solve(eye + skew, eye - skew)
        return matrix.astype(w.dtype)

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        z = u[0] + v[0]
        if self.activation == "modrelu":
            return HiddenState(jnp.sign(z) * jax.nn.relu(jnp.abs(z) + vector(theta["b_mod"], z)))
        return HiddenState(activations.resolve(self.activation)(z))


def orthogonal_rnn(
    hidden: int,
    *,
    activation: activations.Activation = "modrelu",
    map: str = "exponential",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = initializers.rotations(),  # noqa: B008 - a frozen value
    bias_init: initializers.Initializer = "zeros",
) -> OrthogonalRNN:
    """Elman network whose recurrent matrix is orthogonal, and stays so under training::

        A = w_hh - w_hh^T          skew-symmetric, whatever w_hh is
        Q = exp(A)                 map="exponential" (Lezcano-Casado and Martinez-Rubio 2019)
        Q = (I + A)^-1 (I - A)     map="cayley" (Helfrich, Willmott and Ye 2018)
        h = f(x W_ih + h Q + b)

    Q is computed once for a sequence, not at each step. If f is the identity, the state keeps its length, and so does
    the gradient. The default f is modReLU, ``f(z) = sign(z) relu(|z| + b_mod)``, with a bias that is learned.

    Args:
      hidden: H, the number of units.
      activation: f: "modrelu", or an activation as for `elman`.
      map: "exponential", which reaches all rotations, or "cayley", which solves a linear system instead of taking a
        matrix exponential.
      input_init, bias_init: initialisers of ``w_ih`` and ``b``.
      recurrent_init: initialiser of ``w_hh``; `jrnn.initializers.rotations` makes a rotation by a random angle in each
        of H/2 planes of it.

    Parameters: ``w_ih (F, H)``, ``w_hh (H, H)``, ``b (H,)``, and with modReLU ``b_mod (H,)``.

    Raises:
      ValueError: if ``map`` is neither of the two.

    >>> cell = jrnn.orthogonal_rnn(4)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> q = cell.recurrent_weights(params)
    >>> bool(jnp.allclose(q @ q.T, jnp.eye(4), atol=1e-5))
    True
    """
    return OrthogonalRNN(
        hidden,
        activation,
        map,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
