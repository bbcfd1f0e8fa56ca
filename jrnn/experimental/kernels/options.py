"""What is static about a run of a kernel, and how many blocks of a GPU share its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jrnn.schedules import read


class Steps(NamedTuple):
    """What every step is given: what its gates read, and whether it is valid and is a reset, or None for all or none.

    Over all steps ``read`` is ``(T, N, P*H)`` for P parts and the flags ``(T, N)``.
    """

    read: Any
    valid: Any
    resets: Any


class Chip(NamedTuple):
    """What a GPU has: ``blocks`` that run at once, one a multiprocessor, each with bytes of shared ``memory``."""

    blocks: int = 132
    memory: int = 227 * 1024


@dataclass(frozen=True)
class Settings:
    """What is static about a run: it compiles once for each.

    ``combine`` is the function of the gates (see `jrnn.cells.form.Gates`), of H units and ``states`` fields of a state.
    ``device`` is the module of the kernels by name and ``interpret`` whether it runs through Pallas' interpreter,
    ``chip`` what it has if it is a GPU; ``sums`` says of each gate whether ``u + v`` is enough; ``keep`` says whether
    the states that the steps met are kept for a derivative.
    """

    combine: Any
    hidden: int
    states: int
    sums: tuple[bool, ...]
    device: str
    interpret: bool
    reverse: bool
    chip: Chip
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


# --- how a run is cut up for a GPU -------------------------------------------------------------------------------

# Rows of a tensor core instruction, and the units that rows come in.
ROWS, UNITS = 64, 16
# Warpgroups of a block, at most; sizes of a cluster that every GPU has; bytes that the barriers are left.
WARPGROUPS, CLUSTERS, BARRIERS = 8, (2, 4, 8), 1024
# Parts, at most, in which what is sent is received: an LSTM of 768 units in float32 takes as many.
PARTS = 16


@dataclass(frozen=True)
class Cut:
    """``blocks`` of ``warpgroups`` share the weights, by units, and run on a tile of ``width`` sequences at a time.

    One block shares them with nobody; up to eight can be a cluster; more are a ``grid``: as many groups of blocks as
    run at once, which then take the tiles in ``rounds``. Each warpgroup has the rows of all gates of its units.
    ``pieces`` are the 16-bit floats that a factor is split into. Where the shared memory does not hold what all units
    send, a block of one warpgroup receives it in ``parts``, one while it multiplies by another.
    """

    hidden: int
    sequences: int
    gates: int
    pieces: int
    chip: Chip
    blocks: int
    warpgroups: int
    width: int
    grid: bool = False
    parts: int = 1

    @property
    def share(self) -> int:
        """Units of a warpgroup."""
        return UNITS * -(-self.hidden // (UNITS * self.blocks * self.warpgroups))

    @property
    def rows(self) -> int:
        """Rows of the weights of a warpgroup."""
        return ROWS * -(-self.gates * self.share // ROWS)

    @property
    def units(self) -> int:
        return self.share * self.warpgroups * self.blocks

    @property
    def groups(self) -> int:
        """Groups of blocks that run tiles of their own, at once if the blocks of a group have to meet in a grid."""
        tiles = -(-self.sequences // self.width)
        return min(tiles, self.chip.blocks // self.blocks) if self.grid else tiles

    @property
    def rounds(self) -> int:
        return -(-self.sequences // (self.width * self.groups))

    @property
    def tiles(self) -> int:
        return self.groups * self.rounds

    @property
    def part(self) -> int:
        """Units that are received at once."""
        return self.width * -(-self.units // (self.width * self.parts))

    @property
    def slots(self) -> int:
        """Room for what is sent: in one block warpgroups write while others still read, and several meet between."""
        return 1 if self.blocks > 1 and self.parts == 1 else 2

    def memory(self, sent: int) -> int:
        """Bytes of shared memory for the weights, so many arrays that are sent at a step, and what comes out."""
        weights = self.pieces * self.warpgroups * self.rows * self.units
        received = self.pieces * self.slots * self.part * sent * self.width
        return 2 * (weights + received) + 4 * self.warpgroups * self.rows * self.width + BARRIERS

    @property
    def need(self) -> int:
        """Of the backward kernel, which sends the most."""
        return self.memory(self.gates)

    @property
    def place(self) -> str:
        if self.blocks == 1:
            return "one block"
        return f"each of {self.blocks} blocks" if self.grid else f"each block of a cluster of {self.blocks}"


def most(gates: int) -> int:
    """Units of a warpgroup, at most."""
    return max(UNITS, ROWS // gates // UNITS * UNITS)


def cuts(hidden: int, sequences: int, gates: int, pieces: int, chip: Chip) -> Iterator[Cut]:
    """The ways to cut up a run, the fewest blocks first, whether or not they fit."""
    for blocks in (1, *CLUSTERS, -(-hidden // most(gates))):
        grid = blocks not in (1, *CLUSTERS)
        warpgroups = -(-hidden // (blocks * most(gates)))
        if warpgroups > WARPGROUPS or blocks > chip.blocks:
            continue
        for parts in range(1, PARTS + 1 if grid else 2):
            narrow = Cut(hidden, sequences, gates, pieces, chip, blocks, warpgroups, 16, grid, parts)
            wide = sequences > 16 * (chip.blocks // blocks) and narrow.units % 32 == 0
            for cut in (replace(narrow, width=32), narrow)[not wide :]:
                if cut.part * (parts - 1) < cut.units:  # or the last part would be empty
                    yield cut


def choose(hidden: int, sequences: int, gates: int, pieces: int, chip: Chip) -> tuple[Cut | None, str]:
    """The cut of the fewest blocks that fits, and what it needs; or None, and what is lacking."""
    need = ""
    for cut in cuts(hidden, sequences, gates, pieces, chip):
        if cut.need <= chip.memory:
            return cut, f"take {cut.need} of the {chip.memory} bytes of shared memory of {cut.place}"
        need = f"need {cut.need} bytes of shared memory in {cut.place}, and a block has {chip.memory}"
    if (blocks := -(-hidden // most(gates))) > chip.blocks:
        need = f"need {blocks} blocks, and {chip.blocks} run at once"
    return None, need
