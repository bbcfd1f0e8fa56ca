"""The points: which work is measured, at which shapes, by whom.

B batch, T time, F input features, H hidden features, as everywhere in jrnn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

GATES = {"lstm": 4, "gru": 3, "elman": 1}

# (B, T, F, H), small to large, then one long sequence, one that is all overhead, and one whose units are no multiple of
# 64: blocks of units then do not divide evenly among threads.
SHAPES = (
    (16, 128, 64, 64),
    (32, 100, 64, 128),
    (32, 100, 256, 256),
    (64, 50, 512, 512),
    (32, 35, 1024, 1024),
    (16, 1000, 64, 64),
    (1, 1000, 16, 32),
    (48, 70, 96, 200),
)
WORK = {"forward": "forward", "train": "forward and backward", "step": "one step"}

ONLY_JRNN = ("jrnn", "jrnn hoisted", "products")
OWN_CELL = (*ONLY_JRNN, "jrnn own cell", "jrnn own cell hoisted")
STEPS = "anybody's step"
STEPPED = tuple(
    f"{library} in {scan}"
    for library in ("hand", "flax.linen", "haiku", "equinox")
    for scan in ("lax.scan", "jrnn.scan")
)
IN_STEPS = ("jrnn", "products", "jrnn own step", *STEPPED)
DROP_IN = "flax drop-in"
DROPPED_IN = tuple(
    f"{cell} on {library}" for cell in ("linen", "linen LSTMCell", "nnx") for library in ("flax", "jrnn")
)
IN_PLACE = ("jrnn", "products", *DROPPED_IN)
ROLLOUT = (64, 64, 256, 256)  # of reinforcement learning, with resets
REMAT = (*ONLY_JRNN, "jrnn remat", "jrnn hoisted remat")


@dataclasses.dataclass(frozen=True)
class Point:
    """One piece of work, the same for every peer.

    ``work`` is "forward" (outputs of all T steps), "train" (the loss ``sum(ys * weights)`` and its gradients with
    respect to all parameters and to the inputs) or "step" (one time step in one call, its state fed back).
    ``peers`` names who takes part; None for all.
    """

    section: str
    cell: str
    work: str
    batch: int
    time: int
    features: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    resets: bool = False
    dtype: str = "float32"
    peers: tuple[str, ...] | None = None
    precision: str | None = None  # of float32 products on a GPU: "tf32" or "exact"

    @property
    def id(self) -> str:
        """A name that says what is measured; results are kept under it."""
        shape = f"B{self.batch}-T{self.time}-F{self.features}-H{self.hidden}"
        return "/".join([self.section, self.cell, self.work, shape] + ([self.arithmetic] if self.precision else []))

    @property
    def arithmetic(self) -> str:
        """In which numbers products are taken."""
        return self.precision if self.precision and self.dtype == "float32" else self.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, T, F, H)."""
        return self.batch, self.time, self.features, self.hidden

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out_features(self) -> int:
        return self.directions * self.hidden

    def layer_features(self) -> tuple[int, ...]:
        """Input features of each layer."""
        return (self.features,) + (self.out_features,) * (self.layers - 1)

    def flops(self, steps: int) -> float:
        """Arithmetic of the matrix products over so many valid steps (all sequences together).

        Two for each multiplication and addition; the backward pass has two products for each of the forward pass.
        """
        gates = GATES[self.cell]
        per_step = sum(2.0 * gates * self.hidden * (f + self.hidden) for f in self.layer_features())
        return per_step * self.directions * steps * (3 if self.work == "train" else 1)

    def traffic(self, steps: int) -> float:
        """Bytes that must pass through memory once: inputs, outputs of each layer, and parameters.

        The backward pass reads inputs, outputs and their cotangents, and writes gradients: three times as much.
        """
        size = 4 if self.dtype == "float32" else 2
        numbers = float(steps) * (self.features + self.layers * self.out_features)
        for features in self.layer_features():
            numbers += self.directions * GATES[self.cell] * self.hidden * (features + self.hidden + 1)
        return size * numbers * (3 if self.work == "train" else 1)

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        # Results are kept by these fields: what was added later is left out where it says nothing.
        return {name: value for name, value in fields.items() if value or name not in ("precision", "resets")}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Point:
        peers = fields.get("peers")
        return Point(**{**fields, "peers": None if peers is None else tuple(peers)})


def _both(section: str, cell: str, shape: tuple[int, int, int, int], **options: Any) -> Iterator[Point]:
    for work in ("forward", "train"):
        yield Point(section, cell, work, *shape, **options)


def full() -> tuple[Point, ...]:
    """Every point of the benchmark, in the order in which they run."""
    points: list[Point] = []
    for cell in GATES:
        for shape in SHAPES:
            points += _both("grid", cell, shape)
    for cell in ("lstm", "gru"):
        points += _both("two layers", cell, (32, 100, 256, 256), layers=2)
        points += _both("two directions", cell, (32, 100, 256, 256), bidirectional=True)
        points += _both("ragged", cell, (32, 100, 64, 128), ragged=True)
    points += _both("two layers", "lstm", (16, 128, 64, 64), layers=2)
    points += _both("two directions", "lstm", (16, 128, 64, 64), bidirectional=True)
    points += _both("ragged", "lstm", (16, 1000, 64, 64), ragged=True)
    for shape in SHAPES[:5]:
        points += _both("own cell", "lstm", shape, peers=OWN_CELL)
    for cell in GATES:
        for shape in (*SHAPES[:4], SHAPES[6]):
            points += _both(STEPS, cell, shape, peers=IN_STEPS)
    for cell in ("lstm", "gru"):
        for shape in SHAPES:
            points += _both(DROP_IN, cell, shape, peers=IN_PLACE)
        points += _both(DROP_IN, cell, ROLLOUT, resets=True, peers=IN_PLACE)
    for shape in (SHAPES[2], SHAPES[3]):
        points += _both("bfloat16", "lstm", shape, dtype="bfloat16")
    for cell in GATES:
        points.append(Point("one step", cell, "step", 1, 1, 64, 256))
    for time in (100, 1_000, 10_000, 100_000):
        points += _both("long", "lstm", (1, time, 16, 64), peers=ONLY_JRNN)
    points.append(Point("memory", "lstm", "train", 1, 100_000, 64, 256, peers=REMAT))
    return tuple(points)


def quick() -> tuple[Point, ...]:
    """A few points that touch every kind of work, for a first look and for trying out changes to the benchmark."""
    shape = SHAPES[0]
    return (
        *_both("grid", "lstm", shape),
        Point("grid", "gru", "train", *shape),
        Point("grid", "elman", "forward", *shape),
        Point("ragged", "lstm", "forward", *shape, ragged=True),
        Point("own cell", "lstm", "train", *shape, peers=OWN_CELL),
        Point(STEPS, "lstm", "train", *shape, peers=IN_STEPS),
        Point(DROP_IN, "gru", "train", *shape, resets=True, peers=IN_PLACE),
        Point("one step", "lstm", "step", 1, 1, 64, 256),
    )
