"""A run that stores the state before each chunk of steps, and recomputes the other residuals in the backward pass.

Since every chunk starts from a stored state, several chunks can be recomputed side by side, as sequences of one batch.
A few sequences take hardly longer than one, because the time of a step is mostly the time to read the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Chunks", "Met"]

SEQUENCES = 8  # a step with so many sequences costs little more than a step with one


@dataclass(frozen=True)
class Chunks:
    """``time`` steps in chunks of ``length``, of which a group of ``together`` is recomputed at once.

    The steps that do not fill a group run last, and all their residuals are stored: at most as many as a group's.
    """

    time: int
    length: int
    together: int

    @classmethod
    def of(cls, time: int, sequences: int, length: int) -> Chunks:
        if not isinstance(sequences, int):  # a symbol, as in a program exported for any batch
            return cls(time, length, 1)
        # So few that the recomputed residuals are those of SEQUENCES * sqrt(T) steps at most, unless a chunk is longer.
        together = min(SEQUENCES // sequences, SEQUENCES * math.isqrt(time) // length)
        return cls(time, length, max(1, together))

    @property
    def groups(self) -> int:
        return self.time // (self.length * self.together)

    @property
    def rest(self) -> int:
        return self.time - self.groups * self.together * self.length


class Met(NamedTuple):
    """The residuals of a run in chunks, and its outputs after every step.

    ``states (groups, together, N, H)`` are the states before the chunks. ``rest`` is the state before the steps that
    fill no group, with all their residuals; None where there are no such steps.
    """

    outs: Any
    states: Any
    rest: Any
