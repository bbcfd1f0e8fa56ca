"""A decoder in training, which is given the right tokens, or now and then its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import prng_key, readable
from jrnn.cells.base import stable
from jrnn.decoding.search import Step, check_logits
from jrnn.run.scanning import scan

__all__ = ["scheduled_sampling"]


def scheduled_sampling(
    step: Step, state: Any, tokens: Any, key: jax.Array, rate: float | jax.Array
) -> tuple[Any, jax.Array]:
    """Logits for the training of a decoder that gets some of its own tokens as inputs (Bengio et al. 2015).

    In teacher forcing each input is the right token, which `jrnn.unroll` runs. In use it is the token that was decoded
    before, and an error leads to inputs that were never trained on. Here each input but the first is, with probability
    ``rate``, a token drawn from the logits of the step before. No gradient passes through what is drawn.

    Args:
      step: as for `greedy`: ``(state, token (*B,)) -> (state, logits (*B, V))``.
      state: the state before the first step.
      tokens: ``(T, *B)`` integers, the inputs of teacher forcing: a token that says "begin", then the right ones.
      key: a PRNG key. Step t draws with ``fold_in(key, t)``.
      rate: a probability, which may be traced and so follow a schedule. With 0 this is teacher forcing.

    Returns:
      ``(state, logits (T, *B, V))``. For a loss, leave out what stands in padding by its ``mask``.

    Raises:
      ValueError, TypeError: if tokens are no integers, the logits do not have their batch axes, or the rate is no
        probability.

    >>> model = jrnn.stack(jrnn.embed(5, 3), jrnn.gru(4), jrnn.dense(5))
    >>> params, tokens = model.init(jax.random.key(0), None), jnp.array([[0, 0], [3, 1], [2, 4]])
    >>> step = lambda state, token: model.step(params, state, token)
    >>> state = model.initial_state(params, (2,))
    >>> _, logits = scheduled_sampling(step, state, tokens, jax.random.key(1), 0.0)
    >>> bool(jnp.allclose(logits, jrnn.unroll(model, params, tokens)[1], atol=1e-6))
    True
    """
    prng_key(key)
    tokens, rate = jnp.asarray(tokens), jnp.asarray(rate, jnp.float32)
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim == 0:
        raise TypeError(f"tokens: expected integers (T, *B), got {tokens.dtype} of shape {tokens.shape}")
    if rate.shape != () or (readable(rate) and not 0 <= float(rate) <= 1):
        raise ValueError(f"rate: expected one probability, from 0 to 1, got {rate}")
    tokens = tokens.astype(jnp.int32)
    check_logits(step, state, tokens[0] if tokens.shape[0] else jnp.zeros(tokens.shape[1:], jnp.int32))

    def once(carry: Any, given: Any) -> tuple[Any, jax.Array]:
        state, drawn = carry
        t, token = given
        k_choose, k_draw = jax.random.split(jax.random.fold_in(key, t))
        own = (t > 0) & jax.random.bernoulli(k_choose, rate, token.shape)
        state, logits = step(state, jnp.where(own, drawn, token))
        drawn = jax.random.categorical(k_draw, jax.lax.stop_gradient(logits).astype(stable(logits.dtype)), -1)
        return (state, drawn.astype(jnp.int32)), logits

    start = state, jnp.zeros(tokens.shape[1:], jnp.int32)
    (state, _), logits = scan(once, start, (jnp.arange(tokens.shape[0]), tokens))
    return state, logits
