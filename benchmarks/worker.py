"""One peer's process: ``python -m benchmarks.worker "flax.linen"``, driven by lines of JSON on its pipes.

A peer keeps its process over all points, so that its thread pool and its allocator are its own; between two of its
turns it waits on the pipe. Commands, each answered by one line with ``ok`` or ``error``:

- ``{"do": "describe", "point": …}``: whether the peer takes part, with which equations, and what to note.
- ``{"do": "prepare", "point": …, "data": path, "expected": path}``: build, compile, check, warm up.
- ``{"do": "time"}``: one repetition, long enough for the clock; answers milliseconds a call.
- ``{"do": "drop"}``: let go of the point's arrays.
- ``{"do": "expect", "point": …, "equations": …, "data": path, "expected": path}``: write jrnn's reference answer.
- ``{"do": "rates", "size": …}``: how fast this device multiplies and copies.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data, machine, peers
from benchmarks.grid import Point
from benchmarks.peers.base import Peer, Prepared

REPETITION_MS = 30.0  # shorter calls are repeated until the clock has this much to measure
WARM_MS = 15.0  # a turn begins with calls that are not timed, one and for so long: others have used the caches
STARTUP = Point("start", "lstm", "forward", 2, 3, 2, 4)


class Worker:
    """A peer, and the point it has ready."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.prepared: Prepared | None = None
        self.inner = 1

    def start(self) -> dict[str, Any]:
        """Builds and runs something tiny, so that the first point does not pay for imports."""
        if not self.peer.refuses(STARTUP):
            inputs = data.make(STARTUP)
            self.peer.prepare(STARTUP, inputs).call()
        return {"form": self.peer.form}

    def prepare(self, point: Point, inputs: Path, expected: Path) -> dict[str, Any]:
        self.drop()
        given = data.load(inputs)
        prepared = self.peer.prepare(point, given)
        found: dict[str, float] = {}
        if self.peer.checked:
            answer = prepared.answer()
            if point.ragged and "ys" in answer:  # what a peer puts in padding is its own affair
                valid = np.arange(point.time)[:, None] < given["lengths"]
                answer["ys"] = answer["ys"] * valid[..., None]
            found = data.errors(point, answer, data.load(expected))
            del answer
        self.prepared = prepared
        if data.agrees(point, found):
            self.warm_up()
        return {
            "errors": found,
            "inner": self.inner,
            "trace_ms": prepared.trace_ms,
            "compile_ms": prepared.compile_ms,
            "temp_bytes": prepared.temp_bytes,
        }

    def warm_up(self) -> None:
        """Two calls, and the number of them that make one repetition."""
        assert self.prepared is not None
        # Once here, and not before every repetition, where it would take longer than what is timed.
        gc.collect()
        gc.freeze()
        self.prepared.call()
        self.inner = 1
        ms = self.time()["ms"]
        if ms < REPETITION_MS:
            self.inner = math.ceil(REPETITION_MS / max(ms, 1e-3))
            ms = self.time()["ms"]
            self.inner = max(1, math.ceil(REPETITION_MS / max(ms, 1e-3)))

    def time(self) -> dict[str, Any]:
        """One repetition: the mean of ``inner`` calls."""
        assert self.prepared is not None
        call = self.prepared.call
        gc.disable()
        try:
            warm = time.perf_counter() + 1e-3 * WARM_MS
            call()
            while time.perf_counter() < warm:
                call()
            start = time.perf_counter()
            for _ in range(self.inner):
                call()
            return {"ms": 1e3 * (time.perf_counter() - start) / self.inner}
        finally:
            gc.enable()

    def drop(self) -> dict[str, Any]:
        self.prepared, self.inner = None, 1
        gc.unfreeze()
        gc.collect()
        return {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "describe":
                point = Point.from_json(command["point"])
                equations, note = self.peer.equations_of(point), self.peer.note(point)
                return {"refused": self.peer.refuses(point), "equations": equations, "note": note}
            case "prepare":
                paths = Path(command["data"]), Path(command["expected"])
                return self.prepare(Point.from_json(command["point"]), *paths)
            case "time":
                return self.time()
            case "drop":
                return self.drop()
            case "expect":
                point, inputs = Point.from_json(command["point"]), data.load(Path(command["data"]))
                with peers.base.products("exact"):
                    data.save(Path(command["expected"]), data.expected(point, command["equations"], inputs))
                return {}
            case "rates":
                return machine.rates(command["size"])
            case other:
                raise ValueError(f"do: expected describe, prepare, time or drop, got {other!r}")


def main(name: str) -> None:
    # Replies go to the pipe alone; whatever a library prints goes to standard error.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def guarded(work: Any) -> None:
        try:
            reply = {"ok": work()}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")

    holder: list[Worker] = []

    def begin() -> dict[str, Any]:
        holder.append(Worker(peers.create(name)))
        return holder[0].start()

    guarded(begin)
    for line in sys.stdin:
        guarded(lambda line=line: holder[0].answer(json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1])
