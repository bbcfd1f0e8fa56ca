"""What is static about a run of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


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
        """How many arrays the gates read: u + v where that is enough, else u and v."""
        return 2 * self.gates - sum(self.sums)

    @property
    def slots(self) -> tuple[int, ...]:
        """Where each gate's recurrent part is among what the gates read: in its input part where the sum is enough."""
        after = iter(range(self.gates, self.parts))
        return tuple(gate if summed else next(after) for gate, summed in enumerate(self.sums))
