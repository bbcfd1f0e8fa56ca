"""The static options of a run of a kernel, and how its weights are divided among the blocks of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jrnn.schedules import read


class Steps(NamedTuple):
    """The inputs of a step: the gate inputs, and the flags of valid steps and of resets.

    ``valid`` is None if all steps are valid, and ``resets`` is None if there are none. For all steps, ``read`` is
    ``(T, N, P*H)`` with P parts, and the flags are ``(T, N)``.
    """

    read: Any
    valid: Any
    resets: Any


class Chip(NamedTuple):
    """A GPU: the ``blocks`` that run at once, one on each multiprocessor, and the bytes of shared ``memory`` of one."""

    blocks: int = 132
    memory: int = 227 * 1024


@dataclass(frozen=True)
class Settings:
    """The static options of a run, which compiles once for equal options.

    ``combine`` is the function of the gates (see `jrnn.cells.form.Gates`), for H units and ``states`` fields of the
    state. ``device`` is the name of the module of the kernels, ``interpret`` says whether Pallas' interpreter runs
    them, and ``chip`` describes the GPU. ``sums`` says of each gate whether it needs only ``u + v``. ``keep`` says
    whether the states before the steps are returned, as residuals.
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


# --- how a run is divided among the blocks of a GPU --------------------------------------------------------------

# The rows of a tensor core instruction, and the number of units that rows come in multiples of.
ROWS, UNITS = 64, 16
# The most warpgroups of a block; the sizes of a cluster that every GPU supports; the bytes reserved for barriers.
WARPGROUPS, CLUSTERS, BARRIERS = 8, (2, 4, 8), 1024
# The most parts in which a block receives what the others send: an LSTM of 768 units in float32 needs as many.
PARTS = 16


@dataclass(frozen=True)
class Cut:
    """A division of the weights, by units, among ``blocks`` with ``warpgroups`` each.

    The blocks run on a tile of ``width`` sequences at a time. Two to eight blocks form a cluster. More blocks form a
    ``grid``: as many groups of blocks as can run at once, which work on the tiles in several ``rounds``. Each warpgroup
    has the rows of all gates of its units. ``pieces`` is the number of 16-bit floats that a factor is split into. If
    the shared memory is too small for the vectors that all units send, a block of one warpgroup receives them in
    ``parts``: one part arrives while it multiplies by another.
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
        """The number of units of a warpgroup."""
        return UNITS * -(-self.hidden // (UNITS * self.blocks * self.warpgroups))

    @property
    def rows(self) -> int:
        """The number of rows of the weights of a warpgroup."""
        return ROWS * -(-self.gates * self.share // ROWS)

    @property
    def units(self) -> int:
        return self.share * self.warpgroups * self.blocks

    @property
    def groups(self) -> int:
        """The number of groups of blocks, each of which works on other tiles. The groups of a grid run at once."""
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
        """The number of units that are received at once."""
        return self.width * -(-self.units // (self.width * self.parts))

    @property
    def slots(self) -> int:
        """The number of buffers for sent vectors. One block needs two: some warpgroups write while others read."""
        return 1 if self.blocks > 1 and self.parts == 1 else 2

    def memory(self, sent: int) -> int:
        """The bytes of shared memory for the weights, the ``sent`` arrays of a step, and the result."""
        weights = self.pieces * self.warpgroups * self.rows * self.units
        received = self.pieces * self.slots * self.part * sent * self.width
        return 2 * (weights + received) + 4 * self.warpgroups * self.rows * self.width + BARRIERS

    @property
    def need(self) -> int:
        """The bytes of shared memory of the backward kernel, which sends the most arrays."""
        return self.memory(self.gates)

    @property
    def place(self) -> str:
        if self.blocks == 1:
            return "one block"
        return f"each of {self.blocks} blocks" if self.grid else f"each block of a cluster of {self.blocks}"


def most(gates: int) -> int:
    """The most units of a warpgroup."""
    return max(UNITS, ROWS // gates // UNITS * UNITS)


def cuts(hidden: int, sequences: int, gates: int, pieces: int, chip: Chip) -> Iterator[Cut]:
    """The ways to divide the weights, beginning with the fewest blocks, whether or not they fit."""
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
    """The first division that fits, and the memory that it needs; or None, and the reason why none fits."""
    need = ""
    for cut in cuts(hidden, sequences, gates, pieces, chip):
        if cut.need <= chip.memory:
            return cut, f"take {cut.need} of the {chip.memory} bytes of shared memory of {cut.place}"
        need = f"need {cut.need} bytes of shared memory in {cut.place}, and a block has {chip.memory}"
    if (blocks := -(-hidden // most(gates))) > chip.blocks:
        need = f"need {blocks} blocks, and {chip.blocks} run at once"
    return None, need
