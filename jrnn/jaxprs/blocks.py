"""What a reader knows of an array that depends on the state: expressions, side by side along the axis of features."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

from jrnn.jaxprs.flat import Op, Refusal
from jrnn.jaxprs.recipes import Recipe

__all__ = ["EVERY", "Elementwise", "Gate", "Held", "Piece", "Refusal", "Reset", "State", "Sum", "Value"]

EVERY = -1  # the width of a scalar, which fits every width


class State(NamedTuple):
    """A leaf of the carry as the step meets it: ``(*B, H)``."""

    leaf: int
    width: int


class Reset(NamedTuple):
    """A leaf of the carry, replaced by ``value`` where ``flags`` (a recipe of ``(*B)``) is ``on``."""

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
    """Pieces of products, and a recipe or None, that are added up: ``(*B, width)``."""

    pieces: tuple[Piece, ...]
    known: Recipe | None
    width: int


class Elementwise:
    """An elementwise operation and the dtypes of its results, apart from its operands: equal where these are."""

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
    """A result of an elementwise operation of expressions. Equal to itself alone: expressions share parts."""

    op: Elementwise
    args: tuple[Any, ...]
    which: int
    width: int


class Held(NamedTuple):
    """``new`` where ``flags`` (a recipe of ``(*B)``) is ``on``, and ``old``, a leaf of the carry, elsewhere."""

    flags: Recipe
    on: bool
    new: Any
    old: State | Reset
    width: int


class Value(NamedTuple):
    """An array: ``blocks`` side by side along its axis of features.

    ``axes`` names each axis: ``("b", i)`` a batch axis, ``"f"`` features, ``"g"`` groups of features (the blocks are
    then those of all groups, one group after another), and ``"1"`` an axis of size one.
    """

    blocks: tuple[Any, ...]
    axes: tuple[Any, ...]

    def ranges(self, start: int, stop: int) -> list[tuple[Any, int, int]]:
        """The blocks that a range of features falls into, and the range within each."""
        found, at = [], 0
        for block in self.blocks:
            low, high = max(start, at), min(stop, at + block.width)
            if low < high:
                found.append((block, low - at, high - at))
            at += block.width
        return found


def shared_ranges(values: list[Value]) -> list[tuple[int, int]]:
    """The ranges of features on which each of several values has one block."""
    edges = {0}
    for value in values:
        if value.blocks[0].width != EVERY:
            edges.update(itertools.accumulate(block.width for block in value.blocks))
    return list(itertools.pairwise(sorted(edges)))
