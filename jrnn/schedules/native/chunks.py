"""A run that keeps the state before each chunk of steps, and makes the rest again when it is differentiated.

What is made again is known to begin at the kept states, so several chunks can be run side by side, as sequences of one
batch: few sequences take hardly longer than one, whose every step waits for the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Chunks", "Met"]

SEQUENCES = 8  # that a step takes at little more than the cost of one


@dataclass(frozen=True)
class Chunks:
    """``time`` steps in chunks of ``length``, ``together`` of which are made again at once.

    Steps that fill no group of these run last, and all of theirs is kept: as much as a group's, at most.
    """

    time: int
    length: int
    together: int

    @classmethod
    def of(cls, time: int, sequences: int, length: int) -> Chunks:
        if not isinstance(sequences, int):  # a symbol, as in a program exported for any batch
            return cls(time, length, 1)
        # As few as keep what is made again at some multiple of sqrt(T) steps, where chunks are longer than that.
        together = min(SEQUENCES // sequences, SEQUENCES * math.isqrt(time) // length)
        return cls(time, length, max(1, together))

    @property
    def groups(self) -> int:
        return self.time // (self.length * self.together)

    @property
    def rest(self) -> int:
        return self.time - self.groups * self.together * self.length


class Met(NamedTuple):
    """Outputs after every step, the states that chunks met ``(groups, together, N, H)``, and what is kept of the rest.

    ``rest`` is the state that it met and all that its derivative needs, None where groups take all steps.
    """

    outs: Any
    states: Any
    rest: Any
