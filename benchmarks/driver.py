"""Runs the peers' processes over the points: one repetition of each in turn, the others waiting on their pipes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import data
from benchmarks.grid import Point
from benchmarks.machine import ROOT

PAUSE_S = 0.01  # between two turns: thread pools spin for a while after their work
MIN_ROUNDS = 3


class Budget(NamedTuple):
    """How much a point is measured: so many repetitions of each peer, or as many as fit into the seconds."""

    repeats: int
    seconds: float


class Process:
    """A worker, and the two ends of its pipes. ``timeout``: seconds after which one that does not answer is ended."""

    def __init__(
        self, name: str, log: Path, variables: dict[str, str] | None = None, timeout: float | None = None
    ) -> None:
        self.name, self.log, self.timeout = name, log, timeout
        self.form = ""
        self.started = False
        usual = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "2"}
        with log.open("w") as errors:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", name],
                cwd=ROOT,
                env={**os.environ, **usual, **(variables or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )

    def wait_for_start(self) -> None:
        if not self.started:
            self.form = self._reply()["form"]
            self.started = True

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; raises `WorkerError` for one that failed."""
        self.send(**command)
        return self.receive()

    def send(self, **command: Any) -> None:
        """Sends a command, whose answer is then to be received before the next."""
        self.wait_for_start()
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(command) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(without_paths(f"the process ended: {self._tail()}")) from error

    def receive(self) -> dict[str, Any]:
        return self._reply()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self.child.stdin is not None
            self.child.stdin.close()
        try:
            self.child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        assert self.child.stdout is not None
        self.child.stdout.close()

    @property
    def alive(self) -> bool:
        return self.child.poll() is None

    def _reply(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        if self.timeout is not None and not select.select([self.child.stdout], [], [], self.timeout)[0]:
            self.child.kill()
            raise NoAnswerError(f"no answer in {self.timeout:.0f} s")
        line = self.child.stdout.readline()
        if not line:
            self.child.wait()
            raise WorkerError(without_paths(f"the process ended with code {self.child.returncode}: {self._tail()}"))
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(without_paths(reply["error"]))
        return reply["ok"]

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-500:]


def without_paths(text: str) -> str:
    """Files by their names alone: errors are kept in the results, and folders are nobody's business."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":,()]+/)+", "", text)


class WorkerError(RuntimeError):
    """What a peer could not do, in its own words."""


class NoAnswerError(WorkerError):
    """A peer hung, and was ended."""


class Pool:
    """All peers' processes. One that dies is started again for the next point."""

    def __init__(self, names: list[str], say: Callable[[str], None] = print) -> None:
        self.say = say
        self.temporary = tempfile.TemporaryDirectory(prefix="jrnn-benchmarks-")
        self.folder = Path(self.temporary.name)
        self.processes: dict[str, Process] = {name: self._start(name) for name in names}
        self.forms: dict[str, str] = {}
        for name in names:
            self._ready(name)

    def _start(self, name: str) -> Process:
        return Process(name, self.folder / f"{name.replace(' ', '-')}.log")

    def _ready(self, name: str) -> bool:
        try:
            self.processes[name].wait_for_start()
        except WorkerError as error:
            self.say(f"{name} did not start: {error}")
            return False
        self.forms[name] = self.processes[name].form
        return True

    def process(self, name: str) -> Process:
        if not self.processes[name].alive:
            self.processes[name].stop()
            self.processes[name] = self._start(name)
            self._ready(name)
        return self.processes[name]

    def close(self) -> None:
        for process in self.processes.values():
            process.stop()
        self.temporary.cleanup()


@contextlib.contextmanager
def pool(names: list[str], say: Callable[[str], None] = print) -> Iterator[Pool]:
    """The peers' processes, ended when the block is left."""
    running = Pool(names, say)
    try:
        yield running
    finally:
        running.close()


def measure(running: Pool, point: Point, budget: Budget) -> dict[str, Any]:
    """Checks and times all peers on one point: ``{peer: result}``.

    A result has ``samples_ms`` (one mean for each repetition) or says in ``refused``, ``disagrees`` or ``failed`` why
    it has none.
    """
    names = [name for name in running.processes if point.peers is None or name in point.peers]
    inputs = data.make(point)
    answers: dict[str, Path] = {}
    results: dict[str, Any] = {}
    for name in names:
        try:
            about = running.process(name).ask(do="describe", point=point.to_json())
        except WorkerError as error:
            results[name] = {"failed": str(error)}
            continue
        if about["refused"] is not None:
            results[name] = {"refused": about["refused"]}
            continue
        equations = about["equations"]
        given, expected = running.folder / f"{equations}.npz", running.folder / f"{equations}-expected.npz"
        if equations not in answers:
            data.save(given, inputs | {"params": data.reduced(equations, inputs["params"])})
            data.save(expected, data.expected(point, equations, inputs))
            answers[equations] = expected
        results[name] = _prepare(running.process(name), about["note"], point, given, expected)
    timed = [name for name, result in results.items() if "samples_ms" in result]
    rounds(lambda name, **command: running.process(name).ask(**command), timed, results, budget)
    for name in names:
        if "refused" not in results[name]:
            with contextlib.suppress(WorkerError):
                running.process(name).ask(do="drop")
    return results


def _prepare(process: Process, note: str, point: Point, given: Path, expected: Path) -> dict[str, Any]:
    try:
        ready = process.ask(do="prepare", point=point.to_json(), data=str(given), expected=str(expected))
    except WorkerError as error:
        return {"failed": str(error)}
    if not data.agrees(point, ready["errors"]):
        return {"disagrees": ready["errors"], "note": note}
    return {**ready, "note": note, "samples_ms": []}


def rounds(
    ask: Callable[..., Any], timed: list[str], results: dict[str, Any], budget: Budget, pause: float = PAUSE_S
) -> None:
    """Repetitions in turn, into the results' samples; ``ask(name, do="time")`` is one."""
    start = time.perf_counter()
    for turn in range(budget.repeats):
        if turn >= MIN_ROUNDS and time.perf_counter() - start > budget.seconds:
            break
        # Another one begins each round, so that nobody always follows the same neighbour's heat.
        shift = turn % max(1, len(timed))
        for name in timed[shift:] + timed[:shift]:
            if "failed" in results[name]:
                continue
            time.sleep(pause)
            try:
                results[name]["samples_ms"].append(ask(name, do="time")["ms"])
            except WorkerError as error:
                results[name] = {"failed": str(error)}
