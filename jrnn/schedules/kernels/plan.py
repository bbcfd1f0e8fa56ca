"""What is static about a run of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jrnn.schedules import read


class Steps(NamedTuple):
    """What every step is given: what its gates read, and whether it is valid and is a reset, or None for all or none.

    Over all steps ``read`` is ``(T, N, P*H)`` for P parts and the flags ``(T, N)``.
    """

    read: Any
    valid: Any
    resets: Any


@dataclass(frozen=True)
class Plan:
    """What is static about a run: it compiles once for each.

    ``device`` is the module of the kernels by name and ``interpret`` whether it runs through Pallas' interpreter;
    ``sums`` says of each gate whether ``u + v`` is enough; ``keep`` says whether the states that the steps met are
    kept for a derivative.
    """

    cell: Any
    sums: tuple[bool, ...]
    device: str
    interpret: bool
    reverse: bool
    keep: bool = False

    @property
    def gates(self) -> int:
        return len(self.sums)

    @property
    def parts(self) -> int:
        return read.parts(self.sums)

    @property
    def slots(self) -> tuple[int, ...]:
        return read.slots(self.sums)
