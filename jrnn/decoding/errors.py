"""How far decoded sequences are from the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["character_error_rate", "edit_distance", "word_error_rate"]


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many insertions, deletions and substitutions turn one sequence into the other (Levenshtein 1966).

    Args:
      a, b: strings, lists of words, or arrays of tokens. Elements are compared by ``==``.

    >>> edit_distance("kitten", "sitting"), edit_distance(["the", "cat"], ["the", "hat", "sat"])
    (3, 2)
    """
    numbers: dict[Any, int] = {}
    left, right = (np.array([numbers.setdefault(e, len(numbers)) for e in _elements(s)], int) for s in (a, b))
    # One row of the table at a time. Insertions run along the row, so they are a running minimum.
    places = np.arange(len(right) + 1)
    row = places.copy()
    for i, element in enumerate(left, 1):
        best = np.concatenate([[i], np.minimum(row[:-1] + (right != element), row[1:] + 1)])
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def word_error_rate(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Edit distances in words over the number of words of the references, all sentences together.

    Args:
      predictions, references: as many sentences of each; words are what spaces separate.

    Raises:
      ValueError: where their numbers differ, or no reference has a word.

    >>> word_error_rate(["the cat sat", "a dog"], ["the cat sat", "the dog"])
    0.2
    """
    return _rate([p.split() for p in predictions], [r.split() for r in references])


def character_error_rate(predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> float:
    """Edit distances in characters, or tokens, over the length of the references, all sequences together.

    Args:
      predictions, references: as many strings, or sequences of tokens, of each.

    Raises:
      ValueError: where their numbers differ, or all references are empty.

    >>> character_error_rate(["abc", "de"], ["abd", "de"])
    0.2
    """
    return _rate(list(predictions), list(references))


def _rate(predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> float:
    if len(predictions) != len(references):
        raise ValueError(f"predictions: expected one for each of {len(references)} references, got {len(predictions)}")
    total = sum(len(reference) for reference in references)
    if not total:
        raise ValueError("references: expected at least one that is not empty, to divide by; got none")
    return sum(map(edit_distance, predictions, references)) / total


def _elements(sequence: Any) -> list[Any]:
    return sequence.tolist() if hasattr(sequence, "tolist") else list(sequence)
