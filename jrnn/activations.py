"""Activations by name, so that a cell stays a value that compares and hashes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrnn._core.checks import module_level

__all__ = ["Activation", "linear", "resolve"]

Activation = str | Callable[[jax.Array], jax.Array]


def linear(x: jax.Array) -> jax.Array:
    """The identity.

    >>> linear(1.0)
    1.0
    """
    return x


_NAMES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "linear": linear,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


def resolve(activation: Activation, argument: str = "activation") -> Callable[[jax.Array], jax.Array]:
    """The function behind a name; a module-level function is returned as it is.

    >>> resolve("tanh") is jnp.tanh
    True
    """
    if isinstance(activation, str):
        if activation not in _NAMES:
            raise ValueError(
                f"{argument}: expected one of {sorted(_NAMES)} or a module-level function, got {activation!r}"
            )
        return _NAMES[activation]
    return module_level(activation, argument, sorted(_NAMES))
