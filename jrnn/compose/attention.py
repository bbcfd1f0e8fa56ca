"""A cell that attends to a memory: the states of an encoder, say, at each step of a decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn import initializers
from jrnn._core.checks import batch_axes, positive_int
from jrnn.cells.base import (
    Cell,
    Layer,
    check_features,
    compute_params,
    exported,
    product,
    stable,
    vector,
)
from jrnn.compose.combine import Residual, Stack, stepless
from jrnn.compose.tied import Tied
from jrnn.sequence import valid_steps

__all__ = ["Attention", "AttentionState", "Memory", "attend", "attention", "remember"]

SCORES = ("additive", "dot", "general", "multihead")


@exported
class AttentionState(NamedTuple):
    """State of `attention`: the state of the cell, and the context ``(*B, M)`` that its next input is joined with.

    >>> AttentionState(cell=1, context=2).context
    2
    """

    cell: Any
    context: Any


class Memory(NamedTuple):
    """A memory for `attention`, which `remember` makes of the outputs of an encoder. It has S steps.

    Attributes:
      keys: ``(S, *B, K)``, what queries are compared with.
      values: ``(S, *B, M)``, what is averaged.
      valid: ``(S, *B)`` booleans, which steps can be attended to.

    >>> Memory(keys=1, values=2, valid=3).valid
    3
    """

    keys: Any
    values: Any
    valid: Any


def attend(scores: jax.Array, values: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The average of values by the softmax of scores over the steps of a memory.

    S steps of the memory, N heads, which share the features of the values between them.

    Args:
      scores: ``(S, *B, N)``.
      values: ``(S, *B, M)``, M a multiple of N.
      valid: ``(S, *B)`` booleans. A step that is not valid has weight zero, whatever its score. Where no step is valid
        the average is zero.

    Returns:
      ``(average (*B, M), weights (S, *B, N))``, in the dtype of the scores.

    >>> average, weights = attend(jnp.zeros((2, 1)), jnp.array([[1.0], [3.0]]), jnp.array([True, True]))
    >>> average, weights[:, 0]
    (Array([2.], dtype=float32), Array([0.5, 0.5], dtype=float32))
    """
    seen = valid[..., None]
    low = jnp.finfo(scores.dtype).min
    scores = jnp.where(seen, scores, low)
    weights = jnp.where(seen, jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, 0, keepdims=True))), 0.0)
    total = jnp.sum(weights, 0, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    heads = scores.shape[-1]
    parts = values.astype(scores.dtype).reshape(*values.shape[:-1], heads, values.shape[-1] // heads)
    average = jnp.sum(weights[..., None] * parts, 0)
    return average.reshape(*average.shape[:-2], values.shape[-1]), weights


@dataclass(frozen=True, repr=False)
class Attention(Cell):
    """See `attention`."""

    cell: Layer
    memory_features: int
    score: str = "additive"
    features: int | None = None
    heads: int = 1

    _constructor = "attention"

    def __post_init__(self) -> None:
        if not isinstance(self.cell, Layer) or stepless(self.cell) or self.cell.event_ndim != 1:
            raise TypeError(
                f"cell: expected a layer that takes features step by step, such as jrnn.gru(128), got {self.cell!r}"
            )
        positive_int(self.memory_features, "memory_features")
        positive_int(self.heads, "heads")
        if self.score not in SCORES:
            raise ValueError(f"score: expected one of {list(SCORES)}, got {self.score!r}")
        if self.features is not None:
            positive_int(self.features, "features")
            if self.score in ("dot", "general"):
                raise ValueError(f'features: expected None for the score "{self.score}", got {self.features}')
        if self.score != "multihead" and self.heads != 1:
            raise ValueError(
                f'heads: expected 1 for the score "{self.score}", got {self.heads}; take score="multihead"'
            )
        for name, width in (("memory_features", self.memory_features), ("features", self.width)):
            if width % self.heads:
                raise ValueError(f"{name}: expected a multiple of the {self.heads} heads, got {width}")

    @property
    def width(self) -> int:
        """K, the features of keys and queries."""
        return self.memory_features if self.features is None else self.features

    @property
    def uses_key(self) -> Any:
        return self.cell.uses_key

    @property
    def draws_once(self) -> bool:
        return self.cell.draws_once

    def init(self, key: jax.Array, in_features: Any) -> dict[str, Any]:
        positive_int(in_features, "in_features")
        k_cell, k_query, k_keys, k_values, k_score = jax.random.split(key, 5)
        joined = in_features + self.memory_features
        hidden = self.cell.out_features(joined)
        glorot = initializers.resolve("glorot_uniform")
        params: dict[str, Any] = {"cell": self.cell.init(k_cell, joined)}
        if self.score == "dot" and hidden != self.memory_features:
            raise ValueError(
                f"memory_features: expected the {hidden} output features of {self.cell!r}, for their dot product, got "
                f'{self.memory_features}; take score="general", which has weights between the two'
            )
        if self.score != "dot":
            params["w_query"] = glorot(k_query, (hidden, self.width), jnp.float32)
        if self.score in ("additive", "multihead"):
            params["w_keys"] = glorot(k_keys, (self.memory_features, self.width), jnp.float32)
        if self.score == "multihead":
            params["w_values"] = glorot(k_values, (self.memory_features, self.memory_features), jnp.float32)
        if self.score == "additive":
            params["b"] = jnp.zeros(self.width, jnp.float32)
            params["v"] = glorot(k_score, (self.width, 1), jnp.float32)[:, 0]
        return params

    def remember(self, params: Any, memory: Any, *, lengths: Any = None, mask: Any = None) -> dict[str, Any]:
        """Parameters with a memory in them; see `jrnn.remember`."""
        memory = jnp.asarray(memory)
        if memory.ndim < 2 or memory.shape[-1] != self.memory_features:
            raise ValueError(
                f"memory: expected (S, *B, {self.memory_features}) for {self!r}, got shape {memory.shape}; give "
                "memory_features as many features as the encoder's outputs have"
            )
        valid = valid_steps(lengths, mask, memory.shape[0], memory.shape[1:-1])
        valid = jnp.ones(memory.shape[:-1], bool) if valid is None else valid
        values = jnp.where(valid[..., None], memory, jnp.zeros((), memory.dtype))  # NaN in padding stays there
        own = {name: value for name, value in params.items() if name != "memory"}
        weights = compute_params(own, memory.dtype)
        keys = values
        if "w_keys" in own:
            check_features(values, own["w_keys"], "memory", self)
            keys = product(values, weights["w_keys"])
        if "w_values" in own:
            values = product(values, weights["w_values"])
        return {**own, "memory": Memory(keys, values, valid)}

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> AttentionState:
        batch_axes(batch_shape)
        cell = self.cell.initial_state(params["cell"], batch_shape)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(params["cell"]) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        dtype = functools.reduce(np.promote_types, {stable(dtype) for dtype in dtypes}, np.dtype(np.float32))
        return AttentionState(cell, jnp.zeros((*batch_shape, self.memory_features), dtype))

    def out_features(self, in_features: Any) -> int:
        return self.cell.out_features(in_features + self.memory_features) + self.memory_features

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> dict[str, Any]:
        drawn = self.cell.draw(params["cell"], key, batch_shape, in_features + self.memory_features)
        return {**params, "cell": drawn}

    def check(self, params: Any, x: Any) -> None:
        if not isinstance(params, Mapping) or "cell" not in params:
            raise ValueError(
                f"params: expected those of {self!r}, a dict with the entry 'cell', got {type(params).__name__}; make "
                "them with init, and give them a memory with jrnn.remember"
            )
        if not isinstance(params.get("memory"), Memory):
            raise ValueError(
                f"params: expected parameters with a memory to attend to, got those of init alone; give them one with "
                f"jrnn.remember(model, params, memory), memory (S, *B, {self.memory_features})"
            )
        memory, batch = params["memory"].values.shape[1:-1], x.shape[:-1]
        if memory and batch[len(batch) - len(memory) :] != memory:
            raise ValueError(
                f"memory: expected the batch axes of the inputs, {batch} or the last of these, or no batch axes, got "
                f"the batch shape {memory}"
            )

    def update(
        self, params: Any, state: AttentionState, p: jax.Array, key: jax.Array | None = None
    ) -> tuple[AttentionState, jax.Array]:
        joined = jnp.concatenate([p, state.context.astype(p.dtype)], -1)
        cell, h = self.cell.step(params["cell"], state.cell, joined, key)
        context = self._context(params, h)[0].astype(state.context.dtype)
        return AttentionState(cell, context), jnp.concatenate([h, context.astype(h.dtype)], -1)

    def weights(self, params: Any, ys: Any) -> jax.Array:
        """How much each step attended to each step of the memory, from the outputs of `jrnn.unroll`.

        Args:
          params: parameters with the memory in them.
          ys: ``(T, *B, H + M)``, or one step of it.

        Returns:
          ``(T, S, *B, N)``, which sum to one over S.

        >>> cell = jrnn.attention(jrnn.gru(4), 3)
        >>> params = jrnn.remember(cell, cell.init(jax.random.key(0), 2), jnp.ones((6, 3)))
        >>> ys = jrnn.unroll(cell, params, jnp.ones((5, 2)))[1]
        >>> cell.weights(params, ys).shape
        (5, 6, 1)
        """
        queries = jnp.asarray(ys)[..., : -self.memory_features]
        rest = params["memory"].valid.ndim - 1  # the batch axes of the memory
        if queries.ndim - 1 == rest:
            return self._context(params, queries)[1]
        return jax.vmap(lambda h: self._context(params, h)[1])(queries)

    def _context(self, params: Any, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The context for outputs ``h (*B, H)`` of the cell, and the weights ``(S, *B, N)``."""
        weights, batch = compute_params(params, h.dtype), h.shape[:-1]
        query = h if self.score == "dot" else product(h, weights["w_query"])
        # A memory without batch axes is shared by all sequences.
        memory = jax.tree.map(lambda a: _for_batch(a, batch, params["memory"].valid.ndim - 1), params["memory"])
        keys = memory.keys.astype(query.dtype)
        if self.score == "additive":
            sums = jnp.tanh(keys + query[None] + vector(params["b"], keys))
            scores = jnp.sum(sums * vector(params["v"], sums), -1, keepdims=True)
        else:
            parts = (keys * query[None]).reshape(*keys.shape[:-1], self.heads, keys.shape[-1] // self.heads)
            scores = jnp.sum(parts, -1)
            if self.score == "multihead":
                scores = scores / jnp.asarray(math.sqrt(parts.shape[-1]), scores.dtype)
        return attend(scores, memory.values, memory.valid)


def _for_batch(a: jax.Array, batch: tuple[int, ...], own: int) -> jax.Array:
    """``(S, *own, ...)`` repeated over the batch axes that it lacks, which come first."""
    missing, rest = batch[: len(batch) - own], a.shape[1:]
    return jnp.broadcast_to(a.reshape(a.shape[0], *(1,) * len(missing), *rest), (a.shape[0], *missing, *rest))


def attention(
    cell: Layer, memory_features: int, *, score: str = "additive", features: int | None = None, heads: int = 1
) -> Attention:
    r"""A cell that attends to a memory at each step (Bahdanau et al. 2015, Luong et al. 2015)::

        h_t = cell([x_t, c_{t-1}])                      the context of the step before is part of the input
        a_t = softmax over s of score(h_t, m_s)         the weights of the S steps of the memory
        c_t = sum over s of a_{t,s} m_s                 the context
        y_t = [h_t, c_t]

    The scores are

    - "dot": ``h . m``
    - "general": ``(h W_q) . m``
    - "additive": ``v . tanh(h W_q + m W_k + b)``
    - "multihead": ``(h W_q) . (m W_k) / sqrt(K / N)`` in N heads of K / N features, and ``m W_v`` in the place of ``m``
      in the sum (Vaswani et al. 2017)

    The memory is given with the parameters, by `remember`, which takes the products ``m W_k`` and ``m W_v`` once for
    all steps. Gradients pass to the memory and so to the encoder that made it. A memory without batch axes is shared
    by all sequences. The model runs in `unroll`, `stepper` and `jrnn.decoding` like any other.

    Args:
      cell: a cell, or a stack of layers, for inputs of F + M features.
      memory_features: M.
      score: one of the above.
      features: K, for "additive" and "multihead"; None for M.
      heads: N, for "multihead".

    Parameters: ``cell``; ``w_query (H, K)`` but for "dot"; ``w_keys (M, K)`` for "additive" and "multihead";
    ``v (K,)`` and ``b (K,)`` for "additive"; ``w_values (M, M)`` for "multihead". The state is an `AttentionState`.

    Raises:
      ValueError, TypeError: if an option does not fit; from `unroll`, if the parameters have no memory.

    >>> encoder = jrnn.bidirectional(jrnn.gru(4))
    >>> decoder = jrnn.stack(jrnn.attention(jrnn.gru(6), 8, features=5), jrnn.dense(3))
    >>> k_encoder, k_decoder = jax.random.split(jax.random.key(0))
    >>> params = encoder.init(k_encoder, 2), decoder.init(k_decoder, 3)
    >>> lengths = jnp.array([7, 4])
    >>> _, memory = jrnn.unroll(encoder, params[0], jnp.ones((7, 2, 2)), lengths=lengths)
    >>> with_memory = jrnn.remember(decoder, params[1], memory, lengths=lengths)
    >>> jrnn.unroll(decoder, with_memory, jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 3)
    """
    return Attention(cell, memory_features, score, features, heads)


def remember(model: Layer, params: Any, memory: Any, *, lengths: Any = None, mask: Any = None) -> Any:
    """Parameters of a decoder with the memory that its `attention` layers attend to.

    S steps of the memory, B batch axes, M features.

    Args:
      model: an `attention` layer, or a `stack`, `residual` or `tied` that holds one or more.
      params: its parameters, from ``model.init``; a memory that they hold already is replaced.
      memory: ``(S, *B, M)`` floats, such as an encoder's outputs; ``(S, M)`` for one that all sequences share.
      lengths: ``(*B,)`` integers in [0, S], how many steps of each memory can be attended to; None for all.
      mask: ``(S, *B)`` booleans, true where a step can be attended to.

    Returns:
      A pytree to pass as ``params`` to `unroll`, `stepper` or ``model.step``. It is no tree of parameters:
      differentiate with respect to ``params``, and call this inside the loss.

    Raises:
      ValueError: if shapes do not fit, or the model has no attention layer.

    >>> cell = jrnn.attention(jrnn.gru(4), 3, score="general")
    >>> params = jrnn.remember(cell, cell.init(jax.random.key(0), 2), jnp.ones((6, 3)))
    >>> jrnn.unroll(cell, params, jnp.ones((5, 2)))[1].shape
    (5, 7)
    """
    found, params = _remember(model, params, memory, {"lengths": lengths, "mask": mask})
    if not found:
        raise ValueError(
            f"model: expected jrnn.attention, or a stack, residual or tied of it, got {model!r}; in a layer of your "
            "own, give its attention layer the memory by that layer's own remember(params, memory)"
        )
    return params


def _remember(model: Layer, params: Any, memory: Any, valid: dict[str, Any]) -> tuple[bool, Any]:
    if isinstance(model, Attention):
        return True, model.remember(params, memory, **valid)
    if isinstance(model, Stack):
        pairs = [_remember(layer, p, memory, valid) for layer, p in zip(model.layers, params, strict=True)]
        return any(found for found, _ in pairs), tuple(p for _, p in pairs)
    if isinstance(model, Residual):
        return _remember(model.layer, params, memory, valid)
    if isinstance(model, Tied):
        found, own = _remember(model.layer, params["layer"], memory, valid)
        return found, {**params, "layer": own}
    return False, params
