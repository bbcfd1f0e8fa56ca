"""Label sequences from the logits of a model that was trained with CTC (Graves et al. 2006)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._core.checks import non_negative_int, positive_int
from jrnn.sequence import valid_steps

__all__ = ["ctc_beam", "ctc_greedy"]


def ctc_greedy(logits: Any, lengths: Any = None, *, blank: int = 0) -> tuple[jax.Array, jax.Array]:
    """The most probable class of each step, repetitions merged and blanks removed.

    Args:
      logits: ``(T, *B, V)``.
      lengths: ``(*B,)`` integers, how many steps of each sequence are valid; None for all.
      blank: the class that stands for no label.

    Returns:
      ``(labels (T, *B) int32, counts (*B,) int32)``: the labels of each sequence first, ``blank`` after them.

    Raises:
      ValueError: if shapes do not fit, or ``blank`` is no class.

    >>> logits = jax.nn.one_hot(jnp.array([1, 1, 0, 1, 2]), 3)
    >>> labels, count = ctc_greedy(logits)
    >>> labels[: int(count)]
    Array([1, 1, 2], dtype=int32)
    """
    logits, valid = _checked(logits, lengths, blank)
    best = jnp.argmax(logits, -1).astype(jnp.int32)
    before = jnp.concatenate([jnp.full_like(best[:1], blank), best[:-1]])
    kept = (best != blank) & (best != before) & valid
    counts = jnp.sum(kept, 0).astype(jnp.int32)
    # Kept labels first, in order: a stable sort by whether they are left out.
    order = jnp.argsort(~kept, 0, stable=True)
    labels = jnp.take_along_axis(jnp.where(kept, best, jnp.int32(blank)), order, 0)
    return labels, counts


def ctc_beam(
    logits: Any, lengths: Any = None, *, width: int = 16, blank: int = 0
) -> list[list[tuple[list[int], float]]] | list[tuple[list[int], float]]:
    """The most probable label sequences, each summed over its alignments (prefix beam search, Hannun et al. 2014).

    Runs on the host, in NumPy.

    Args:
      logits: ``(T, B, V)`` or ``(T, V)``.
      lengths: ``(B,)`` integers, how many steps of each sequence are valid; None for all.
      width: how many prefixes to keep at each step.
      blank: the class that stands for no label.

    Returns:
      For each sequence at most ``width`` pairs ``(labels, log probability)``, the best first; for ``(T, V)`` logits one
      such list.

    Raises:
      ValueError: if shapes do not fit, ``blank`` is no class, or the width is not positive.

    >>> logits = jnp.log(jnp.array([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]]))
    >>> labels, log_prob = ctc_beam(logits)[0]     # greedy decoding gives none, 0.16; label 1 has three alignments
    >>> labels, round(float(np.exp(log_prob)), 4)
    ([1], 0.4025)
    """
    positive_int(width, "width")
    array, valid = _checked(logits, lengths, blank)
    if array.ndim not in (2, 3):
        raise ValueError(f"logits: expected (T, B, V) or (T, V), got shape {array.shape}")
    log_probs = np.asarray(jax.nn.log_softmax(array.astype(jnp.float32), -1), np.float64)
    steps = np.asarray(valid).sum(0)
    if array.ndim == 2:
        return _prefixes(log_probs[: int(steps)], width, blank)
    return [_prefixes(log_probs[: int(steps[b]), b], width, blank) for b in range(array.shape[1])]


def _prefixes(log_probs: np.ndarray, width: int, blank: int) -> list[tuple[list[int], float]]:
    # Of each prefix, the log probability of the alignments so far that end in a blank, and of those that end in its
    # last label: only after a blank does the same label again make a longer prefix.
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}
    for frame in log_probs:
        new: dict[tuple[int, ...], list[float]] = {}

        def add(prefix: tuple[int, ...], kind: int, value: float, new: Any = new) -> None:
            entry = new.setdefault(prefix, [-np.inf, -np.inf])
            entry[kind] = np.logaddexp(entry[kind], value)

        for prefix, (in_blank, in_label) in beams.items():
            either = np.logaddexp(in_blank, in_label)
            add(prefix, 0, either + frame[blank])
            if prefix:
                add(prefix, 1, in_label + frame[prefix[-1]])
            for label, log_prob in enumerate(frame):
                if label != blank:
                    again = bool(prefix) and label == prefix[-1]
                    add((*prefix, label), 1, (in_blank if again else either) + log_prob)
        possible = [item for item in new.items() if max(item[1]) > -np.inf]
        ranked = sorted(possible, key=lambda item: -np.logaddexp(item[1][0], item[1][1]))
        beams = {prefix: (a, b) for prefix, (a, b) in ranked[:width]}
    return [(list(prefix), float(np.logaddexp(values[0], values[1]))) for prefix, values in beams.items()]


def _checked(logits: Any, lengths: Any, blank: int) -> tuple[jax.Array, jax.Array]:
    logits = jnp.asarray(logits)
    if logits.ndim < 2:
        raise ValueError(f"logits: expected (T, *B, V), got shape {logits.shape}")
    non_negative_int(blank, "blank")
    if blank >= logits.shape[-1]:
        raise ValueError(f"blank: expected one of the {logits.shape[-1]} classes of the logits, got {blank}")
    shape = logits.shape[:-1]
    if lengths is None:
        return logits, jnp.ones(shape, bool)
    lengths = jnp.asarray(lengths)
    if lengths.shape != shape[1:] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths: expected integers of shape {shape[1:]}, the batch axes of the logits, got {lengths.dtype} of "
            f"shape {lengths.shape}"
        )
    valid: Any = valid_steps(lengths, None, shape[0], shape[1:])
    return logits, valid
