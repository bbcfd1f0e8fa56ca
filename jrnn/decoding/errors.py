"""How far decoded sequences are from the right ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jrnn._core.checks import positive_int

__all__ = ["character_error_rate", "chrf", "edit_distance", "word_error_rate"]


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
      ValueError: if their numbers differ, or no reference has a word.

    >>> word_error_rate(["the cat sat", "a dog"], ["the cat sat", "the dog"])
    0.2
    """
    return _rate([p.split() for p in predictions], [r.split() for r in references])


def character_error_rate(predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> float:
    """Edit distances in characters, or tokens, over the length of the references, all sequences together.

    Args:
      predictions, references: as many strings, or sequences of tokens, of each.

    Raises:
      ValueError: if their numbers differ, or all references are empty.

    >>> character_error_rate(["abc", "de"], ["abd", "de"])
    0.2
    """
    return _rate(list(predictions), list(references))


def chrf(predictions: Sequence[str], references: Sequence[str], *, order: int = 6, beta: float = 2.0) -> float:
    """The F score of character n-grams, all sentences together (chrF, Popović 2015): 1 where all are equal, 0 at worst.

    ``F = (1 + beta^2) P R / (beta^2 P + R)``. P is the share of the predictions' n-grams that the references have too,
    R the share of the references' n-grams that the predictions have, each a mean over the n of 1 to ``order`` of which
    both sides have n-grams. Spaces do not count. Tables usually have it times 100.

    Args:
      predictions, references: as many sentences of each.
      order: the longest n-grams.
      beta: how many times as much recall counts as precision.

    Raises:
      ValueError: if their numbers differ, there are none, or ``beta`` is not positive.

    >>> chrf(["the cat"], ["the cat"]), chrf(["dog"], ["cat"])
    (1.0, 0.0)
    >>> round(chrf(["the cat sat"], ["the cat sits"]), 3)
    0.61
    """
    positive_int(order, "order")
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}")
    _check_pairs(predictions, references)
    if not len(references):
        raise ValueError("references: expected at least one sentence, got none")
    shares = []
    for n in range(1, order + 1):
        counts = [(_ngrams(p, n), _ngrams(r, n)) for p, r in zip(predictions, references, strict=True)]
        common = sum((p & r).total() for p, r in counts)
        predicted, wanted = sum(p.total() for p, _ in counts), sum(r.total() for _, r in counts)
        if predicted and wanted:
            shares.append((common / predicted, common / wanted))
    if not shares:
        return 0.0
    precision, recall = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    below = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / below if below else 0.0


def _ngrams(sentence: str, n: int) -> Counter[str]:
    characters = "".join(sentence.split())
    return Counter(characters[i : i + n] for i in range(len(characters) - n + 1))


def _check_pairs(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"predictions: expected one for each of {len(references)} references, got {len(predictions)}")


def _rate(predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> float:
    _check_pairs(predictions, references)
    total = sum(len(reference) for reference in references)
    if not total:
        raise ValueError("references: expected at least one that is not empty, to divide by; got none")
    return sum(map(edit_distance, predictions, references)) / total


def _elements(sequence: Any) -> list[Any]:
    return sequence.tolist() if hasattr(sequence, "tolist") else list(sequence)
