"""Decoding token by token: greedy, sampled, and by beam search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn._core.checks import is_traced, non_negative_int, positive_int
from jrnn.cells.base import stable

__all__ = ["Beams", "Decoded", "beam", "draw_token", "greedy", "sample"]

Step = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


class Decoded(NamedTuple):
    """The result of `greedy` and `sample`.

    Attributes:
      tokens: ``(T, *B)`` int32; after the end token, the end token again.
      lengths: ``(*B,)`` int32, how many tokens stand before the end token; T where there is none.
      log_probs: ``(*B,)`` float32, the sum of the log probabilities of the tokens, the end token included.
      state: the state after the last of the T steps, including those after the end token.

    >>> Decoded(tokens=1, lengths=2, log_probs=3, state=4).lengths
    2
    """

    tokens: Any
    lengths: Any
    log_probs: Any
    state: Any


class Beams(NamedTuple):
    """The result of `beam`: W hypotheses for each sequence, the best first.

    Attributes:
      tokens: ``(T, *B, W)`` int32; after the end token, the end token again.
      lengths: ``(*B, W)`` int32, how many tokens stand before the end token; T where there is none.
      log_probs: ``(*B, W)`` float32, the sum of the log probabilities of the tokens.
      scores: ``(*B, W)`` float32, by which the hypotheses are ordered: ``log_probs`` over the length penalty.

    >>> Beams(tokens=1, lengths=2, log_probs=3, scores=4).scores
    4
    """

    tokens: Any
    lengths: Any
    log_probs: Any
    scores: Any


def greedy(step: Step, state: Any, token: Any, length: int, *, end: int | None = None) -> Decoded:
    """Takes the most probable token at each step.

    Args:
      step: ``(state, token (*B,)) -> (state, logits (*B, V))``. For a model of jrnn's that begins with `jrnn.embed`:
        ``lambda state, token: model.step(params, state, token)``. Its state may be any pytree.
      state: the state before the first step.
      token: ``(*B,)`` integers, the first input, such as a token that says "begin".
      length: T, how many tokens to decode at most.
      end: the token that ends a sequence; None where none does.

    Returns:
      A `Decoded`. The loop is one ``lax.scan``; call this under ``jax.jit``.

    Raises:
      ValueError, TypeError: if a token is no integer, or the logits do not have its batch axes.

    >>> counting = lambda state, token: (state, jax.nn.one_hot((token + 1) % 5, 5))
    >>> greedy(counting, (), jnp.array(0), 6, end=4).tokens
    Array([1, 2, 3, 4, 4, 4], dtype=int32)
    """
    return _decode(step, state, token, length, end, None, lambda key, logits: jnp.argmax(logits, -1))


def sample(
    step: Step,
    state: Any,
    token: Any,
    length: int,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
) -> Decoded:
    """Draws each token from the model's distribution, as `draw_token` does.

    Args:
      step, state, token, length, end: as for `greedy`.
      key: a PRNG key. Step t draws with ``fold_in(key, t)``.
      temperature, top_k, top_p: as for `draw_token`.

    Returns:
      A `Decoded`. Its ``log_probs`` are those of the model, whatever the temperature.

    >>> coin = lambda state, token: (state, jnp.zeros((*token.shape, 2)))
    >>> sample(coin, (), jnp.zeros(3, int), 4, jax.random.key(0)).tokens.shape
    (4, 3)
    """
    _check_choice(temperature, top_k, top_p)
    choose = lambda key, logits: draw_token(key, logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return _decode(step, state, token, length, end, key, choose)


def draw_token(
    key: jax.Array,
    logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draws a token from the distribution of the logits, or from its most probable part.

    Args:
      key: a PRNG key.
      logits: ``(*B, V)``.
      temperature: logits are divided by it; 0 takes the most probable.
      top_k: only the k most probable tokens can be drawn (Fan et al. 2018).
      top_p: only the fewest tokens can be drawn whose probabilities, at this temperature, sum to at least ``top_p``
        (nucleus sampling, Holtzman et al. 2020). With ``top_k``, of those that are left.

    The temperature, ``top_k`` and ``top_p`` are Python numbers, known before tracing. If a function under ``jit`` takes
    them as arguments, name them in ``static_argnames``.

    Returns:
      ``(*B,)`` int32.

    Raises:
      ValueError: for a negative temperature, a ``top_k`` below 1, or a ``top_p`` outside (0, 1].
      TypeError: if one of the three is traced, or ``top_k`` is no integer.

    >>> logits = jnp.array([0.0, 3.0, 2.9, -1.0])
    >>> draws = jax.vmap(lambda key: draw_token(key, logits, top_k=2))(jax.random.split(jax.random.key(0), 50))
    >>> sorted(set(draws.tolist()))
    [1, 2]
    """
    _check_choice(temperature, top_k, top_p)
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits.astype(stable(logits.dtype))
    logits = logits / jnp.asarray(temperature, logits.dtype)
    if top_k is not None and top_k < logits.shape[-1]:
        # By rank and not by value, so that of equal logits no more than k are left.
        logits = jnp.where(_ranks(logits) < top_k, logits, -jnp.inf)
    if top_p is not None and top_p < 1:
        order = jnp.argsort(-logits, -1, stable=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1)
        before = jnp.cumsum(probabilities, -1) - probabilities  # of the tokens that are more probable
        kept = before < jnp.asarray(top_p, logits.dtype)
        kept = jnp.take_along_axis(kept.at[..., 0].set(True), jnp.argsort(order, -1), -1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits, -1).astype(jnp.int32)


def beam(
    step: Step,
    state: Any,
    token: Any,
    length: int,
    *,
    width: int,
    end: int | None = None,
    length_penalty: float = 0.0,
) -> Beams:
    """Keeps the ``width`` most probable sequences at each step (beam search).

    A hypothesis that has ended keeps its place and its log probability. At the end the hypotheses are ordered by their
    log probability over ``((5 + n) / 6) ** length_penalty``, where n counts their tokens, the end token included (Wu et
    al. 2016). With ``width`` 1 this is `greedy`.

    Args:
      step, token, length, end: as for `greedy`. ``step`` is called with the hypotheses beside each other, as one more
        batch axis before all others: tokens ``(W, *B)``. A step of a jrnn model takes any number of batch axes.
      state: the state before the first step; each leaf has the batch axes ``(*B, ...)`` first, and is repeated W times.
      width: W, how many hypotheses to keep, at most V.
      length_penalty: above 0, longer sequences score higher than their log probability alone.

    Returns:
      A `Beams`.

    Raises:
      ValueError, TypeError: if a token is no integer, a leaf of the state has no batch axes, or ``width`` is larger
        than the vocabulary.

    >>> table = jnp.log(jnp.array([[0.0, 0.6, 0.4], [0.0, 0.4, 0.6], [0.0, 0.05, 0.95]]) + 1e-9)
    >>> step = lambda state, token: (state, table[token])
    >>> greedy(step, (), jnp.array(0), 2).tokens              # 1, then 2: 0.6 * 0.6
    Array([1, 2], dtype=int32)
    >>> beam(step, (), jnp.array(0), 2, width=2).tokens[:, 0]  # 2, then 2: 0.4 * 0.95
    Array([2, 2], dtype=int32)
    """
    token = _check_start(token, length)
    positive_int(width, "width")
    batch = token.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.shape(leaf)[: len(batch)] != batch:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)}: expected the batch axes {batch} of the tokens first, since beam "
                f"search moves states between hypotheses, got shape {jnp.shape(leaf)}; repeat it for each sequence"
            )
    repeated = jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(a)[None], (width, *jnp.shape(a))), state)
    tokens = jnp.broadcast_to(token[None], (width, *batch))
    vocabulary = check_logits(step, repeated, tokens)
    _check_end(end, vocabulary)
    if width > vocabulary:
        raise ValueError(f"width: expected at most the {vocabulary} classes of the vocabulary, got {width}")

    first = jnp.full((width, *batch), -jnp.inf, jnp.float32).at[0].set(0.0)  # all are equal still: one of them counts
    no_tokens = jnp.zeros((length, width, *batch), jnp.int32)
    start = (repeated, tokens, first, jnp.zeros((width, *batch), bool), no_tokens)

    def once(carry: Any, t: jax.Array) -> tuple[Any, None]:
        state, tokens, scores, ended, history = carry
        new, logits = step(state, tokens)
        log_probs = _log_softmax(logits)
        if end is not None:
            # One way to go on after the end, which costs nothing.
            stay = jnp.where(jnp.arange(vocabulary) == end, 0.0, -jnp.inf).astype(log_probs.dtype)
            log_probs = jnp.where(ended[..., None], jnp.broadcast_to(stay, log_probs.shape), log_probs)
        sums = jnp.moveaxis(scores[..., None] + log_probs, 0, -2)  # (*B, W, V)
        scores, flat = lax.top_k(sums.reshape(*batch, width * vocabulary), width)
        parents = jnp.moveaxis(flat // vocabulary, -1, 0)
        chosen = jnp.moveaxis(flat % vocabulary, -1, 0).astype(jnp.int32)
        state = jax.tree.map(lambda a: _gathered(a, parents), new)
        ended, history = _gathered(ended, parents), jax.vmap(lambda a: _gathered(a, parents))(history)
        history = history.at[t].set(chosen)
        if end is not None:
            ended = ended | (chosen == end)
        return (state, chosen, jnp.moveaxis(scores, -1, 0), ended, history), None

    (_, _, log_probs, _, history), _ = lax.scan(once, start, jnp.arange(length))
    lengths = _lengths(history, end)
    count = jnp.minimum(lengths + 1, length) if end is not None else lengths
    penalty = ((5.0 + count.astype(jnp.float32)) / 6.0) ** jnp.float32(length_penalty)
    scores = log_probs / penalty
    order = jnp.argsort(-scores, 0, stable=True)
    last = lambda a: jnp.moveaxis(jnp.take_along_axis(a, order, 0), 0, -1)
    return Beams(jax.vmap(last)(history), last(lengths), last(log_probs), last(scores))


# --- parts -------------------------------------------------------------------------------------------------------


def _decode(
    step: Step, state: Any, token: Any, length: int, end: int | None, key: Any, choose: Callable[..., jax.Array]
) -> Decoded:
    token = _check_start(token, length)
    _check_end(end, check_logits(step, state, token))

    def once(carry: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        state, token, total, ended = carry
        state, logits = step(state, token)
        chosen = choose(None if key is None else jax.random.fold_in(key, t), logits).astype(jnp.int32)
        log_prob = jnp.take_along_axis(_log_softmax(logits), chosen[..., None], -1)[..., 0]
        if end is not None:
            chosen = jnp.where(ended, jnp.int32(end), chosen)
            log_prob = jnp.where(ended, jnp.zeros_like(log_prob), log_prob)
            ended = ended | (chosen == end)
        return (state, chosen, total + log_prob, ended), chosen

    start = (state, token, jnp.zeros(token.shape, jnp.float32), jnp.zeros(token.shape, bool))
    (state, _, total, _), tokens = lax.scan(once, start, jnp.arange(length))
    return Decoded(tokens, _lengths(tokens, end), total, state)


def _log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), -1)


def _ranks(logits: jax.Array) -> jax.Array:
    """How many logits come before each, of equal ones the first first."""
    return jnp.argsort(jnp.argsort(-logits, -1, stable=True), -1)


def _gathered(a: jax.Array, parents: jax.Array) -> jax.Array:
    """``a (W, *B, ...)`` with hypotheses replaced by those they come from, ``parents (W, *B)``."""
    parents = parents.reshape(parents.shape + (1,) * (a.ndim - parents.ndim))
    return jnp.take_along_axis(a, jnp.broadcast_to(parents, a.shape), 0)


def _lengths(tokens: jax.Array, end: int | None) -> jax.Array:
    if end is None:
        return jnp.full(tokens.shape[1:], tokens.shape[0], jnp.int32)
    return jnp.sum(jnp.cumsum((tokens == end).astype(jnp.int32), 0) == 0, 0).astype(jnp.int32)


def _check_start(token: Any, length: int) -> jax.Array:
    non_negative_int(length, "length")
    token = jnp.asarray(token)
    if not jnp.issubdtype(token.dtype, jnp.integer):
        raise TypeError(
            f"token: expected integers (*B,), got {token.dtype}; it is the first input of the step, such as the id "
            "that begins a sequence"
        )
    return token.astype(jnp.int32)


def check_logits(step: Step, state: Any, token: jax.Array) -> int:
    """V, the number of classes of a step's logits. Raises if the step returns no logits for the tokens."""
    result = jax.eval_shape(step, state, token)
    if not (isinstance(result, tuple) and len(result) == 2 and hasattr(result[1], "shape")):
        raise TypeError(
            "step: expected a function (state, token) -> (state, logits), got one that returns "
            f"{type(result).__name__}; for a jrnn model, pass lambda state, token: model.step(params, state, token)"
        )
    logits = result[1]
    if logits.shape[:-1] != token.shape or logits.ndim != token.ndim + 1:
        raise ValueError(
            f"step: expected logits of shape {(*token.shape, 'V')} for tokens of shape {token.shape}, got "
            f"{logits.shape}; decode with as many sequences as the state has"
        )
    return logits.shape[-1]


def _check_end(end: int | None, vocabulary: int) -> None:
    if end is None:
        return
    non_negative_int(end, "end")
    if end >= vocabulary:
        raise ValueError(f"end: expected one of the {vocabulary} classes of the logits, got {end}")


def _check_choice(temperature: float, top_k: int | None, top_p: float | None) -> None:
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if is_traced(value):
            raise TypeError(
                f"{name}: expected a Python number, known before tracing, got {value!r}; under jit name it static: "
                f'jax.jit(function, static_argnames="{name}")'
            )
    if not isinstance(temperature, int | float | np.number) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature!r}")
    if top_k is not None:
        positive_int(top_k, "top_k")
    if top_p is not None and not (isinstance(top_p, int | float | np.number) and 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
