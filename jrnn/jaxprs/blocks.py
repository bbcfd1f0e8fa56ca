"""The symbolic value of an array that depends on the state: blocks of expressions along the feature axis."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

from jrnn.jaxprs.flat import Op, Refusal
from jrnn.jaxprs.recipes import Recipe

__all__ = ["EVERY", "Elementwise", "Gate", "Held", "Piece", "Refusal", "Reset", "State", "Sum", "Value"]

EVERY = -1  # the width of a scalar, which fits every width


class State(NamedTuple):
    """A leaf of the carry before the step: ``(*B, H)``."""

    leaf: int
    width: int


class Reset(NamedTuple):
    """A leaf of the carry, replaced by ``value`` where ``flags`` (a recipe of ``(*B)``) equal ``on``."""

    leaf: int
    width: int
    flags: Recipe
    on: bool
    value: Recipe


class Piece(NamedTuple):
    """Columns ``start`` to ``stop`` of the product of a vector with weights ``(K, N)``.

    The vector is a leaf of the carry, or a recipe of ``(*B, K)``.
    """

    vector: State | Reset | Recipe
    weights: Recipe
    start: int
    stop: int

    @property
    def recurrent(self) -> bool:
        return isinstance(self.vector, State | Reset)


class Sum(NamedTuple):
    """The sum of pieces of products and of a recipe or None: ``(*B, width)``."""

    pieces: tuple[Piece, ...]
    known: Recipe | None
    width: int


class Elementwise:
    """An elementwise operation and the dtypes of its results, without its operands. Compares by these two."""

    def __init__(self, op: Op, dtypes: tuple[Any, ...]) -> None:
        self.op, self.dtypes = op, dtypes

    def __hash__(self) -> int:
        return hash(self.op.signature)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Elementwise) and self._key == other._key

    @property
    def _key(self) -> Any:
        return self.op.signature, self.dtypes


@dataclass(frozen=True, eq=False)
class Gate:
    """One result of an elementwise operation on expressions. Compares by identity, since expressions share parts."""

    op: Elementwise
    args: tuple[Any, ...]
    which: int
    width: int


class Held(NamedTuple):
    """``new`` where ``flags`` (a recipe of ``(*B)``) equal ``on``, and ``old``, a leaf of the carry, elsewhere."""

    flags: Recipe
    on: bool
    new: Any
    old: State | Reset
    width: int


class Value(NamedTuple):
    """An array: ``blocks`` side by side along its feature axis.

    ``axes`` names each axis: ``("b", i)`` for a batch axis, ``"f"`` for features, ``"g"`` for groups of features, and
    ``"1"`` for an axis of size one. With groups, the blocks are those of all groups, one group after another.
    """

    blocks: tuple[Any, ...]
    axes: tuple[Any, ...]

    def ranges(self, start: int, stop: int) -> list[tuple[Any, int, int]]:
        """The blocks that overlap a range of features, and the range within each block."""
        found, at = [], 0
        for block in self.blocks:
            low, high = max(start, at), min(stop, at + block.width)
            if low < high:
                found.append((block, low - at, high - at))
            at += block.width
        return found


def shared_ranges(values: list[Value]) -> list[tuple[int, int]]:
    """The ranges of features within which every one of several values has a single block."""
    edges = {0}
    for value in values:
        if value.blocks[0].width != EVERY:
            edges.update(itertools.accumulate(block.width for block in value.blocks))
    return list(itertools.pairwise(sorted(edges)))
