"""The GRU family: reset after or before the product, layer-normalised, and the smaller MGU and UGRNN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrnn import activations, initializers
from jrnn._core import checks
from jrnn.cells.affine import AffineCell, WeightedCell, check_affine
from jrnn.cells.base import HiddenState, check_features, product, vector
from jrnn.cells.norm import layer_norm, layer_norm_gates

__all__ = ["gru", "layer_norm_gru", "mgu", "ugrnn"]


@dataclass(frozen=True, repr=False)
class _Gated(AffineCell):
    """The base of the gated units, with a function for the gates and one for the candidate."""

    activation: activations.Activation = field(default="tanh", kw_only=True)
    gate_activation: activations.Activation = field(default="sigmoid", kw_only=True)

    elementwise: ClassVar[bool | None] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        activations.resolve(self.activation)
        activations.resolve(self.gate_activation, "gate_activation")

    @property
    def functions(self) -> tuple[Any, Any]:
        """The functions of the gates (sigma) and of the candidate (tanh)."""
        return activations.resolve(self.gate_activation), activations.resolve(self.activation)


@dataclass(frozen=True, repr=False)
class GRU(_Gated):
    """See `gru`: reset after the product."""

    gate_names: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    additive: ClassVar[Any] = ("r", "z")

    _constructor = "gru"

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        return {"b_hn": initializers.resolve(self.bias_init)(key, (self.hidden,), jnp.float32)}

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        sigma, tanh = self.functions
        r, z = sigma(u.r + v.r), sigma(u.z + v.z)
        n = tanh(u.n + r * (v.n + vector(theta["b_hn"], r)))
        return HiddenState((1 - z) * n + z * state.h)


@dataclass(frozen=True, repr=False)
class ResetBeforeGRU(WeightedCell):
    """See `gru`: reset before the product, which makes the step two products, one after the other."""

    activation: activations.Activation = field(default="tanh", kw_only=True)
    gate_activation: activations.Activation = field(default="sigmoid", kw_only=True)

    _constructor = "gru"

    def __post_init__(self) -> None:
        self._gru  # noqa: B018 - checks every field

    @property
    def _gru(self) -> GRU:
        """The reset-after GRU with the same weights."""
        names = ("activation", "gate_activation", "input_init", "recurrent_init", "bias_init")
        return GRU(self.hidden, **{name: getattr(self, name) for name in names})

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments, options = super()._constructor_arguments()
        return arguments, {"reset": "before", **options}

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        return {name: value for name, value in self._gru.init(key, in_features).items() if name != "b_hn"}

    def check(self, params: Any, x: Any) -> None:
        check_affine(self, params, (self.hidden, 3 * self.hidden))
        check_features(x, params["w_ih"], "xs", self)

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        return self._gru.project(params, xs)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        sigma, tanh = self._gru.functions
        h, hidden = state.h, self.hidden
        rz = product(h, params["w_hh"][:, : 2 * hidden])
        r, z = sigma(p.r + rz[..., :hidden]), sigma(p.z + rz[..., hidden:])
        n = tanh(p.n + product(r * h, params["w_hh"][:, 2 * hidden :]))
        h = (1 - z) * n + z * h
        return HiddenState(h), h


def gru(
    hidden: int,
    reset: str = "after",
    *,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> GRU | ResetBeforeGRU:
    """Gated recurrent unit (Cho et al. 2014)::

        r = sigmoid(x W_r + h U_r + b_r)    z = sigmoid(x W_z + h U_z + b_z)
        n = tanh(x W_n + b_n + r * (h U_n + b_hn))    reset="after", as PyTorch, cuDNN and Keras (one product)
        n = tanh(x W_n + b_n + (r * h) U_n)           reset="before", as the paper's second version (two products)
        h = (1 - z) * n + z * h

    B batch axes (any number, or none), F input features, H hidden features.

    Args:
      hidden: H, the number of units.
      reset: "after" or "before": whether the reset gate multiplies the product ``h U_n`` or its factor ``h``. Only
        "after" runs in the compiled loop of a CPU.
      activation: the function written tanh above, of the candidate: a name of `jrnn.activations` or a module-level
        function.
      gate_activation: the function of the gates, written sigmoid above.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b``, drawn gate by gate (see
        `jrnn.initializers`).

    Parameters: ``w_ih (F, 3H)``, ``w_hh (H, 3H)``, ``b (3H,)``, float32, with the gates in the order r, z, n; with
    reset="after" also ``b_hn (H,)``. The state is `HiddenState` with ``h (*B, H)``. The output is ``h``.

    Raises:
      ValueError, TypeError: ``hidden`` is no positive int, ``reset`` is neither of the two, or an activation or an
        initialiser is unknown.

    >>> cell = jrnn.gru(4)
    >>> sorted(cell.init(jax.random.key(0), 3))
    ['b', 'b_hn', 'w_hh', 'w_ih']
    >>> jrnn.gru(4) == jrnn.gru(4, reset="after"), jrnn.gru(4) == jrnn.gru(4, "before")
    (True, False)
    """
    if reset not in ("after", "before"):
        raise ValueError(f'reset: expected "after" or "before", got {reset!r}')
    kind: Any = GRU if reset == "after" else ResetBeforeGRU
    return kind(
        hidden,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class LayerNormGRU(GRU):
    """See `layer_norm_gru`."""

    epsilon: float = field(default=1e-5, kw_only=True)

    elementwise: ClassVar[bool | None] = False
    additive = False

    _constructor = "layer_norm_gru"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.epsilon(self.epsilon)

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        width = 3 * self.hidden
        return {
            "scale_ih": jnp.ones(width, jnp.float32),
            "scale_hh": jnp.ones(width, jnp.float32),
            **super().init_theta(key),
        }

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        u = layer_norm(product(xs, params["w_ih"]), params["scale_ih"], self.epsilon)
        return self.split(u + vector(params["b"], u))

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        v = type(v)(*layer_norm_gates(v, self.split(theta["scale_hh"]), self.epsilon))
        return super().gates(theta, u, v, state)


def layer_norm_gru(
    hidden: int,
    *,
    epsilon: float = 1e-5,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> LayerNormGRU:
    """Layer-normalised GRU, reset after (Ba, Kiros and Hinton 2016)::

        u = LN(x W_ih) * scale_ih + b    v = LN(h W_hh) * scale_hh    LN over all 3H
        r, z = sigmoid(u + v)    n = tanh(u_n + r * (v_n + b_hn))    h = (1 - z) * n + z * h

    Args:
      epsilon: added to variances.
      hidden, activation, gate_activation, input_init, recurrent_init, bias_init: as for `gru`.

    >>> cell = jrnn.layer_norm_gru(4)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 4)
    """
    return LayerNormGRU(
        hidden,
        epsilon=epsilon,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class MGU(_Gated):
    """See `mgu`."""

    gate_names: ClassVar[tuple[str, ...]] = ("f", "n")
    additive = ("f",)

    _constructor = "mgu"

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        return {"b_hn": initializers.resolve(self.bias_init)(key, (self.hidden,), jnp.float32)}

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        sigma, tanh = self.functions
        f = sigma(u.f + v.f)
        n = tanh(u.n + f * (v.n + vector(theta["b_hn"], f)))
        return HiddenState((1 - f) * state.h + f * n)


def mgu(
    hidden: int,
    *,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> MGU:
    """Minimal gated unit (Zhou et al. 2016), its one gate acting after the product::

        f = sigmoid(x W_f + h U_f + b_f)
        n = tanh(x W_n + b_n + f * (h U_n + b_hn))
        h = (1 - f) * h + f * n

    The paper's ``(f * h) U_n`` would need two products one after the other; here the gate acts after the product, as
    that of `gru` does by default.

    Args:
      hidden, activation, gate_activation, input_init, recurrent_init, bias_init: as for `gru`.

    Parameters: ``w_ih (F, 2H)``, ``w_hh (H, 2H)``, ``b (2H,)``, gates in the order f, n, and ``b_hn (H,)``.

    >>> jrnn.mgu(4).init(jax.random.key(0), 3)["w_ih"].shape
    (3, 8)
    """
    return MGU(
        hidden,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class UGRNN(_Gated):
    """See `ugrnn`."""

    gate_names: ClassVar[tuple[str, ...]] = ("g", "n")
    additive = True

    _constructor = "ugrnn"

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        sigma, tanh = self.functions
        g, n = sigma(u.g + v.g), tanh(u.n + v.n)
        return HiddenState(g * state.h + (1 - g) * n)


def ugrnn(
    hidden: int,
    *,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> UGRNN:
    """Update-gate network (Collins, Sohl-Dickstein and Sussillo 2017)::

        g = sigmoid(x W_g + h U_g + b_g)    n = tanh(x W_n + h U_n + b_n)    h = g * h + (1 - g) * n

    Args:
      hidden, activation, gate_activation, input_init, recurrent_init, bias_init: as for `gru`.

    Parameters: ``w_ih (F, 2H)``, ``w_hh (H, 2H)``, ``b (2H,)``, gates in the order g, n.

    >>> jrnn.ugrnn(4).init(jax.random.key(0), 3)["b"].shape
    (8,)
    """
    return UGRNN(
        hidden,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
