"""A table of embeddings that is the output layer too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import describe, prng_key
from jrnn.cells.base import Layer, check_state, emitted, product, vector
from jrnn.compose.combine import Combinator, check_part
from jrnn.compose.timewise import Embed, shape_of

__all__ = ["Tied", "tied"]


@dataclass(frozen=True, repr=False)
class Tied(Combinator):
    """See `tied`."""

    embed: Embed
    layer: Layer

    event_ndim = 0

    _constructor = "tied"

    def __post_init__(self) -> None:
        if not isinstance(self.embed, Embed):
            raise TypeError(f"embed: expected jrnn.embed(vocab, features), got {self.embed!r}")
        check_part(self.layer, "layer")
        if self.layer.event_ndim != 1:
            raise ValueError(
                f"layer: expected a layer that takes features, those of {self.embed!r}, got {self.layer!r}"
            )

    @property
    def uses_key(self) -> Any:
        return self.layer.uses_key

    def init(self, key: jax.Array, in_features: Any = None) -> dict[str, Any]:
        prng_key(key)
        self.out_features(in_features)  # raises where the widths differ
        k_embed, k_layer = jax.random.split(key)
        return {
            "embed": self.embed.init(k_embed),
            "layer": self.layer.init(k_layer, self.embed.features),
            "b": jnp.zeros(self.embed.vocab, jnp.float32),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        self._check_params(params)
        return self.layer.initial_state(params["layer"], batch_shape)

    def out_features(self, in_features: Any) -> int:
        width = self.embed.features
        out = self.layer.out_features(width)
        if out != width:
            raise ValueError(
                f"layer: expected {width} output features, as many as {self.embed!r} has, for the product with its "
                f"table, got {out} of {self.layer!r}; end it with jrnn.dense({width}), in a jrnn.stack"
            )
        return self.embed.vocab

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> dict[str, Any]:
        return {**params, "layer": self.layer.draw(params["layer"], key, batch_shape, self.embed.features)}

    def check(self, params: Any, x: Any) -> None:
        self._check_params(params)
        self.embed.check(params["embed"], x)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        self.embed.check_values(xs, lengths, mask)

    def _check_params(self, params: Any) -> None:
        named = isinstance(params, Mapping) and set(params) == {"embed", "layer", "b"}
        if not named or shape_of(params, "b") != (self.embed.vocab,):
            raise ValueError(
                f'params: expected a dict with "embed", "layer" and "b" ({self.embed.vocab},) for {self!r}, got '
                f"{describe(params)}"
            )

    def _logits(self, params: Any, y: jax.Array) -> jax.Array:
        logits = product(y, params["embed"]["w"].T)
        return emitted(logits + vector(params["b"], logits), y)

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        x = jnp.asarray(x)
        self.check(params, x)
        check_state(self, params, state, x)
        _, row = self.embed.step(params["embed"], (), x)
        state, y = self.layer.step(params["layer"], state, row, key)
        return state, self._logits(params, y)

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        _, rows = run(self.embed, params["embed"], xs, ())
        state, ys = run(self.layer, params["layer"], rows, state)
        return state, run.zero_invalid(self._logits(params, ys))


def tied(embed: Embed, layer: Layer) -> Tied:
    """A model from ids to logits whose output layer is the transposed table of its embeddings.

    ``e_t = w[x_t]``, ``h_t = layer(e_t)``, ``y_t = h_t w^T + b`` (Press and Wolf 2017, Inan et al. 2017). One table
    where there would be two of the vocabulary's size; gradients from both of its uses add up. The state is the layer's.

    The table's initialiser serves both uses. The default of `jrnn.embed`, with a standard deviation of one, makes the
    first logits large, of a standard deviation of the norm of ``h_t``. ``table_init="uniform"``, whose bound is one
    over the square root of the features, keeps them below one.

    Args:
      embed: a `jrnn.embed`, V ids and F features.
      layer: a layer from F features to F features, such as a `jrnn.stack` that ends with ``jrnn.dense(F)``.

    Parameters: ``{"embed": {"w": (V, F)}, "layer": …, "b": (V,)}``; ``model.init(key, None)``, since there are no input
    features.

    Raises:
      TypeError, ValueError: if ``embed`` is no `jrnn.embed`; from ``init``, if the layer does not have F output
        features.

    >>> model = jrnn.tied(jrnn.embed(10, 3, table_init="uniform"), jrnn.stack(jrnn.lstm(8), jrnn.dense(3)))
    >>> params = model.init(jax.random.key(0), None)
    >>> jrnn.unroll(model, params, jnp.array([[1, 2], [3, 4]]))[1].shape
    (2, 2, 10)
    """
    return Tied(embed, layer)
