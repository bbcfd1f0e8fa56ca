"""Layers without recurrence: each step by itself, so that all T are done at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jrnn import activations, initializers
from jrnn._core import checks
from jrnn._core.checks import batch_axes, describe, positive_int, prng_key, rate, readable
from jrnn._core.devices import is_placed
from jrnn.cells import norm
from jrnn.cells.base import Layer, check_features, check_named, compute_params, emitted, product, stable, vector
from jrnn.sequence import _known_steps

__all__ = ["Timewise", "activation", "dense", "dropout", "embed", "layer_norm"]


class Timewise(Layer):
    """A layer whose output at a step depends on that step's input alone; its state is ``()``.

    A subclass gives ``apply(params, x, key=None)`` for one step ``(*B, F)``, and ``init``.

    >>> layer = jrnn.dense(2)
    >>> params = layer.init(jax.random.key(0), 3)
    >>> layer.initial_state(params, (4,)), layer.step(params, (), jnp.ones((4, 3)))[1].shape
    ((), (4, 2))
    """

    uses_key = False

    def apply(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The output for one step, or without a key for any number of steps."""
        raise NotImplementedError(f"{type(self).__name__} must define apply(params, x, key=None)")

    def init(self, key: jax.Array, in_features: Any) -> Any:
        return {}

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        batch_axes(batch_shape)
        return ()

    def out_features(self, in_features: Any) -> int:
        return in_features

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        x = jnp.asarray(x)
        self.check(params, x)
        return state, self.apply(params, x, key)

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        keys = run.step_keys(xs.shape[0])
        if keys is None or self.uses_key is False:
            ys = self.apply(params, xs)
        else:
            ys = jax.vmap(self.apply, in_axes=(None, 0, 0))(params, xs, keys)
        return state, run.zero_invalid(ys)


def shape_of(params: Any, name: str) -> tuple[int, ...]:
    """Shape of a parameter, ``()`` where there is none of that name."""
    return np.shape(params[name]) if isinstance(params, Mapping) and name in params else ()


@dataclass(frozen=True, repr=False)
class Dense(Timewise):
    """See `dense`."""

    features: int
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    _constructor = "dense"

    def __post_init__(self) -> None:
        positive_int(self.features, "features")
        initializers.resolve(self.input_init, "input_init")
        initializers.resolve(self.bias_init, "bias_init")

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        positive_int(in_features, "in_features")
        prng_key(key)
        k_w, k_b = jax.random.split(key)
        return {
            "w": initializers.resolve(self.input_init)(k_w, (in_features, self.features), jnp.float32),
            "b": initializers.resolve(self.bias_init)(k_b, (self.features,), jnp.float32),
        }

    def out_features(self, in_features: Any) -> int:
        return self.features

    def check(self, params: Any, x: Any) -> None:
        if (shape_of(params, "w")[1:], shape_of(params, "b")) != ((self.features,), (self.features,)):
            raise ValueError(
                f"params: expected w (F, {self.features}) and b ({self.features},) for {self!r}, got "
                f"{describe(params)}; make them with {self!r}.init(key, in_features)"
            )
        check_features(x, params["w"], "xs", self)

    def apply(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y = product(x, compute_params(params, x.dtype)["w"])
        return emitted(y + vector(params["b"], y), x)


def dense(
    features: int,
    *,
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> Dense:
    """A linear layer at every step: ``y = x w + b``.

    Args:
      features: features of the output.
      input_init, bias_init: initialisers of ``w`` and ``b`` (see `jrnn.initializers`).

    Parameters: ``w (F, features)``, ``b (features,)``.

    >>> layer = jrnn.dense(2)
    >>> jrnn.unroll(layer, layer.init(jax.random.key(0), 3), jnp.ones((5, 4, 3)))[1].shape
    (5, 4, 2)
    """
    return Dense(features, input_init=input_init, bias_init=bias_init)


@dataclass(frozen=True, repr=False)
class Embed(Timewise):
    """See `embed`."""

    vocab: int
    features: int
    table_init: initializers.Initializer = field(default="standard_normal", kw_only=True)

    event_ndim = 0

    _constructor = "embed"

    def __post_init__(self) -> None:
        positive_int(self.vocab, "vocab")
        positive_int(self.features, "features")
        initializers.resolve(self.table_init, "table_init")

    def init(self, key: jax.Array, in_features: Any = None) -> dict[str, jax.Array]:
        prng_key(key)
        return {"w": initializers.resolve(self.table_init)(key, (self.vocab, self.features), jnp.float32)}

    def out_features(self, in_features: Any) -> int:
        return self.features

    def check(self, params: Any, x: Any) -> None:
        if shape_of(params, "w") != (self.vocab, self.features):
            raise ValueError(
                f"params: expected w ({self.vocab}, {self.features}) for {self!r}, got {describe(params)}; make them "
                f"with {self!r}.init(key)"
            )
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(
                f"xs: expected integer ids for {self!r}, got {x.dtype}; convert them with .astype(int), or use "
                "jrnn.dense for inputs that are features"
            )

    def apply(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        # Compiled code cannot raise for an id outside the vocabulary. A row of NaN is noticed, another id's is not.
        known = (x >= 0) & (x < self.vocab)
        # Over a mesh, rows are sharded as their ids are.
        sharding = PartitionSpec(*jax.typeof(x).sharding.spec, None) if is_placed(x) else None
        rows = params["w"].at[jnp.where(known, x, 0)].get(mode="clip", out_sharding=sharding)
        return jnp.where(known[..., None], rows, jnp.nan)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        if not readable(xs, lengths, mask):
            return
        ids = np.asarray(xs)
        ids = ids[_known_steps(lengths, mask, ids.shape[0], ids.shape[1:])]
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab):
            raise ValueError(
                f"xs: expected ids in [0, {self.vocab}) for {self!r}, got ids from {ids.min()} to {ids.max()}; "
                "enlarge vocab or map unknown ids to one of their own"
            )


def embed(vocab: int, features: int, *, table_init: initializers.Initializer = "standard_normal") -> Embed:
    """A row of a table for each integer id: ids ``(T, *B)`` give ``ys (T, *B, features)``.

    An id outside ``[0, vocab)`` raises where the host can read it at once: from a NumPy array, a list, or an array on a
    CPU. Where ids are traced, or lie on an accelerator, its row is NaN. Padding may hold any id.

    Args:
      vocab: number of ids.
      features: features of the output.
      table_init: initialiser of the table.

    Parameters: ``w (vocab, features)``; ``layer.init(key, None)``, since there are no input features.

    >>> layer = jrnn.embed(10, 3)
    >>> jrnn.unroll(layer, layer.init(jax.random.key(0), None), jnp.array([[1, 2], [3, 4]]))[1].shape
    (2, 2, 3)
    """
    return Embed(vocab, features, table_init=table_init)


@dataclass(frozen=True, repr=False)
class LayerNorm(Timewise):
    """See `layer_norm`."""

    epsilon: float = 1e-5

    _constructor = "layer_norm"

    def __post_init__(self) -> None:
        checks.epsilon(self.epsilon)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        positive_int(in_features, "in_features")
        return {"scale": jnp.ones(in_features, jnp.float32), "shift": jnp.zeros(in_features, jnp.float32)}

    def check(self, params: Any, x: Any) -> None:
        width = jnp.shape(params["scale"]) if isinstance(params, Mapping) and "scale" in params else x.shape[-1:]
        check_named(self, params, {"scale": width, "shift": width})
        check_features(x, params["scale"], "xs", self)

    def apply(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        wide = x.astype(stable(x.dtype))
        return emitted(norm.layer_norm(wide, params["scale"], self.epsilon) + vector(params["shift"], wide), x)


def layer_norm(epsilon: float = 1e-5) -> LayerNorm:
    """Layer normalisation over features (Ba, Kiros and Hinton 2016).

    ``y = (x - mean) / sqrt(variance + epsilon) * scale + shift``; parameters ``scale (F,)``, ``shift (F,)``.

    Args:
      epsilon: added to the variance.

    >>> layer = jrnn.layer_norm()
    >>> y = jrnn.unroll(layer, layer.init(jax.random.key(0), 2), jnp.array([[1.0, 3.0]]))[1]
    >>> y.round(2)
    Array([[-1.,  1.]], dtype=float32)
    """
    return LayerNorm(epsilon)


@dataclass(frozen=True, repr=False)
class Activate(Timewise):
    """See `activation`."""

    function: activations.Activation

    _constructor = "activation"

    def __post_init__(self) -> None:
        activations.resolve(self.function, "function")

    def apply(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return activations.resolve(self.function)(x)


def activation(function: activations.Activation) -> Activate:
    """An activation as a layer, elementwise.

    Args:
      function: a name of `jrnn.activations` or a module-level function.

    >>> jrnn.unroll(jrnn.activation("relu"), {}, jnp.array([[-1.0, 2.0]]))[1]
    Array([[0., 2.]], dtype=float32)
    """
    return Activate(function)


@dataclass(frozen=True, repr=False)
class Dropout(Timewise):
    """See `dropout`."""

    rate: float

    uses_key = True

    _constructor = "dropout"

    def __post_init__(self) -> None:
        rate(self.rate, "rate")

    def apply(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if key is None:
            return x
        return drop(key, self.rate, x)


def drop(key: jax.Array, rate: float, x: jax.Array) -> jax.Array:
    """Zeros each element with probability ``rate`` and scales the rest so that the mean stays."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0)


def dropout(rate: float) -> Dropout:
    """Dropout between layers, a new mask at every step (Srivastava et al. 2014; Zaremba et al. 2014).

    With a key, each element is zero with probability ``rate`` and divided by ``1 - rate`` otherwise; without a key
    the layer does nothing. It drops elements of its own input: in a stack, put it between layers.

    Args:
      rate: probability of dropping, in [0, 1).

    >>> ys = jrnn.unroll(jrnn.dropout(0.5), {}, jnp.ones((2, 100)), key=jax.random.key(0))[1]
    >>> sorted(set(ys.ravel().tolist()))
    [0.0, 2.0]
    """
    return Dropout(rate)
