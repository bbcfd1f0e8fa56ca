"""The benchmark on a GPU: ``python benchmarks/run.py --grid gpu``, and ``--grid settings`` for XLA's settings.

``--grid suite`` is what to run on a GPU that is there for a while only: correctness, then both of these.

Unlike a run on a CPU it has an end: points stand in the order of their importance, and no point is begun that may not
be done within ``--minutes``. What has failed is kept and not tried again. All processes share the one GPU, take its
memory as they need it, and one works at a time. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import data, driver, gpu_report, machine, peers
from benchmarks.grid import Point
from benchmarks.store import Store

REPEATS, SECONDS = 10, 3.0
FIRST_GUESS_S = 30.0  # of a point's time, before one was measured
ANSWER_S = 60.0  # the longest that a process may take: a kernel that hangs must not hang the run
GRACE_S = 20.0  # after the deadline, to end the point under way; what it lacks then is left for the next run
HELPER = "jrnn reference"  # whose process also answers, exactly, what all others are held against

ENTRANTS = (
    "jrnn", "jrnn hoisted", "jrnn reference", "jrnn cudnn", "jrnn kernel", "jrnn own cell", "jrnn own cell in kernel",
    "hand", "hand hoisted", "flax.linen", "keras", "jax.experimental.rnn", "torch cuda", "empty",
)  # fmt: skip


class Entrant(NamedTuple):
    """Who is timed: a peer, in a process with these variables."""

    peer: str
    variables: dict[str, str] = {}  # noqa: RUF012


# --- what is measured --------------------------------------------------------------------------------------------


def points(section: str, cell: str, shape: tuple[int, int, int, int], *numbers: str, **options: Any) -> list[Point]:
    """Forward and forward+backward, in each of the given arithmetics."""
    found = []
    for name in numbers:
        exact = {"precision": name, "dtype": "float32"} if name in ("tf32", "exact") else {"dtype": name}
        found += [Point(section, cell, work, *shape, **{"precision": name} | exact | options) for work in WORKS]
    return found


WORKS = ("train", "forward")
ANCHOR = (16, 1024, 768, 768)


def full() -> tuple[Point, ...]:
    """The points, the most important first: the anchor, what decides between schedules, then what users run."""
    lstm_like = ("grid", "lstm"), ("grid", "gru")
    found = points(*lstm_like[0], ANCHOR, "bfloat16", "float16", "tf32")
    found += points(*lstm_like[1], ANCHOR, "bfloat16", "tf32")
    found += points("two directions", "lstm", ANCHOR, "bfloat16", "tf32", bidirectional=True)
    found += points("ragged", "lstm", ANCHOR, "bfloat16", "tf32", ragged=True)
    found += points("grid", "gru", (16, 128, 64, 64), "tf32")
    found += points("grid", "lstm", (64, 1024, 512, 512), "bfloat16", "tf32")
    found += points("grid", "lstm", (16, 1024, 1024, 1024), "bfloat16", "tf32")
    found += points("grid", "lstm", (16, 1024, 128, 128), "bfloat16", "tf32")
    found += points("grid", "lstm", ANCHOR, "exact")
    found += points("own cell", "lstm", ANCHOR, "bfloat16", peers=OWN)
    found += points("grid", "gru", (64, 64, 256, 512), "bfloat16", "tf32")
    found += points("grid", "lstm", (32, 1000, 8, 128), "tf32")
    found += points("grid", "lstm", (64, 256, 1024, 1024), "bfloat16", "tf32")
    found += points("grid", "elman", ANCHOR, "bfloat16", "tf32")
    found += points("two layers", "lstm", ANCHOR, "bfloat16", "tf32", layers=2)
    found += points("grid", "gru", (64, 1024, 512, 512), "bfloat16", "tf32")
    found += points("five layers", "lstm", (32, 1000, 512, 512), "tf32", layers=5, bidirectional=True, ragged=True)
    found += points("grid", "lstm", (1, 16384, 64, 64), "tf32")
    found += points("grid", "lstm", (64, 256, 512, 512), "bfloat16", "tf32")
    found += points("two directions", "lstm", (64, 1024, 512, 512), "bfloat16", "tf32", bidirectional=True)
    found += points("ragged", "lstm", (64, 1024, 512, 512), "bfloat16", "tf32", ragged=True)
    found += points("two directions", "lstm", (32, 1024, 512, 512), "tf32", bidirectional=True)
    found += [Point("one step", cell, "step", 1, 1, 256, 256, precision="tf32") for cell in ("lstm", "gru")]
    return tuple(found)


OWN = ("jrnn", "jrnn kernel", "jrnn own cell", "jrnn own cell in kernel")


def quick() -> tuple[Point, ...]:
    """Every kind of work on small shapes."""
    shape = (4, 16, 32, 64)
    found = points("grid", "lstm", shape, "bfloat16", "tf32")
    found += points("grid", "gru", shape, "float16")
    found += points("two directions", "lstm", shape, "tf32", bidirectional=True, ragged=True)[:1]
    found += points("own cell", "lstm", shape, "exact", peers=OWN)[:1]
    return (*found, Point("one step", "gru", "step", 1, 1, 32, 64, precision="tf32"))


LOOPS = "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_graph_min_graph_size=1"
SETTINGS = {
    "as it is": "",
    "loops in command buffers": LOOPS,
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
}
BODIES = (1, 2, 4, 8)


def settings_entrants() -> dict[str, Entrant]:
    """The hoisted schedule under each setting of XLA's, with one or more steps in the body of the loop."""
    found, own = {}, os.environ.get("XLA_FLAGS", "")
    for name, flags in SETTINGS.items():
        for steps in BODIES if name in ("as it is", "loops in command buffers") else BODIES[:1]:
            variables = {"JRNN_BENCHMARK_UNROLL": str(steps)} | (
                {"XLA_FLAGS": f"{own} {flags}".strip()} if flags else {}
            )
            found[f"{name} ({steps} a body)" if steps > 1 else name] = Entrant("jrnn hoisted", variables)
    return found


def settings_points(small: bool) -> tuple[Point, ...]:
    if small:
        return tuple(points("settings", "lstm", (4, 16, 32, 64), "tf32"))
    found = points("settings", "lstm", ANCHOR, "bfloat16", "tf32")
    found += points("settings", "gru", (16, 128, 64, 64), "tf32")
    found += points("settings", "gru", ANCHOR, "bfloat16")
    return (*found, *points("settings", "lstm", (64, 64, 256, 512), "tf32"))


# --- the run -----------------------------------------------------------------------------------------------------


class GpuPool:
    """A process for each entrant, and the helper. One that dies, or fails, is started again when it is needed."""

    def __init__(self, entrants: dict[str, Entrant], variables: dict[str, str], deadline: float) -> None:
        self.entrants, self.variables, self.deadline = entrants, variables, deadline
        self.family: Any = None
        self.answers: dict[tuple[str, bool], tuple[Path, Path] | driver.WorkerError] = {}
        self.broken: dict[str, driver.WorkerError] = {}
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(driver.tempfile.TemporaryDirectory(prefix="jrnn-benchmarks-")))
        self.processes = {name: self._start(name) for name in (*entrants, "")}
        self.forms: dict[str, str] = {}

    def _start(self, name: str) -> driver.Process:
        entrant = self.entrants.get(name, Entrant(HELPER))
        log = self.folder / f"{name.replace(' ', '-').replace('/', '-') or 'helper'}.log"
        return driver.Process(entrant.peer, log, self.variables | entrant.variables, ANSWER_S)

    def ask(self, name: str, **command: Any) -> dict[str, Any]:
        """An answer, from the helper if ``name`` is empty. One that could not give it starts anew the next time."""
        self.send(name, **command)
        return self.receive(name)

    def send(self, name: str, **command: Any) -> None:
        """A command, so that several can work at once until their answers are received."""
        if name in self.broken:
            raise self.broken[name]
        if not self.processes[name].alive:
            self.processes[name].stop()
            self.processes[name] = self._start(name)
        with self._in_time(name) as process:
            process.send(**command)

    def receive(self, name: str) -> dict[str, Any]:
        with self._in_time(name) as process:
            answer = process.receive()
        self.forms[name] = process.form
        return answer

    @contextlib.contextmanager
    def _in_time(self, name: str) -> Iterator[driver.Process]:
        """Ends a process that fails, or that does not answer while there is time."""
        process = self.processes[name]
        left = self.deadline + GRACE_S - time.perf_counter()
        if left <= 0:
            raise OutOfTimeError
        process.timeout = min(ANSWER_S, left)
        try:
            yield process
        except driver.WorkerError as error:
            # What an error leaves on the GPU, memory or worse, ends with the process.
            process.child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.child.wait(timeout=10)
            if time.perf_counter() > self.deadline + GRACE_S:
                raise OutOfTimeError from None
            if not process.started:  # a library that does not load, a flag that is not known
                self.broken[name] = driver.WorkerError(f"did not start: {error}")
            elif isinstance(error, driver.NoAnswerError) and name:  # who hangs once would take the others' time again
                self.broken[name] = driver.WorkerError(f"left out since it did not answer: {error}")
            raise

    def answer(self, point: Point, equations: str, inputs: dict[str, Any]) -> tuple[Path, Path]:
        """Files of what an entrant with these equations is given, and of what it must answer.

        They are the same in every arithmetic, and what training must answer holds the outputs too.
        """
        family = dataclasses.replace(point, work="", dtype="float32", precision=None, section="", peers=None)
        if family != self.family:
            for path in (*self.folder.glob("given-*.npz"), *self.folder.glob("expected-*.npz")):
                path.unlink()
            self.family, self.answers = family, {}
        for trained in (True, False):
            known = self.answers.get((equations, trained)) if trained >= (point.work == "train") else None
            if isinstance(known, driver.WorkerError):
                raise known
            if known is not None:
                return known
        given, expected = (self.folder / f"{what}-{equations}-{point.work}.npz" for what in ("given", "expected"))
        data.save(given, inputs | {"params": data.reduced(equations, inputs["params"])})
        command = {"equations": equations, "data": str(given), "expected": str(expected)}
        try:
            self.ask("", do="expect", point=point.to_json(), **command)
        except driver.WorkerError as error:
            failure = driver.WorkerError(f"there is nothing to hold it against: {error}")
            self.answers[equations, point.work == "train"] = failure
            raise failure from error
        self.answers[equations, point.work == "train"] = given, expected
        return given, expected

    def close(self) -> None:
        for process in self.processes.values():
            process.child.kill()
            process.stop()
        self.stack.close()


class OutOfTimeError(Exception):
    """The run must end, whatever is under way."""

    results: dict[str, Any] = {}  # noqa: RUF012 - of the point under way, as far as it got


@contextlib.contextmanager
def pool(entrants: dict[str, Entrant], variables: dict[str, str], deadline: float) -> Iterator[GpuPool]:
    running = GpuPool(entrants, variables, deadline)
    try:
        yield running
    finally:
        running.close()


def measure(running: GpuPool, point: Point, names: list[str], repeats: int, seconds: float) -> dict[str, Any]:
    """Checks and times all entrants on one point: ``{name: result}``, as `driver.measure` does."""
    results: dict[str, Any] = {}
    try:
        _prepare(running, point, names, results)
        timed = [name for name in names if "samples_ms" in results[name]]
        driver.rounds(running.ask, timed, results, driver.Budget(repeats, seconds), pause=0.0)
        for name in timed:
            if "failed" not in results[name]:
                with contextlib.suppress(driver.WorkerError):
                    running.ask(name, do="drop")
    except OutOfTimeError as end:
        end.results = {name: result for name, result in results.items() if result.get("samples_ms") != []}
        raise
    return results


def _prepare(running: GpuPool, point: Point, names: list[str], results: dict[str, Any]) -> None:
    """Everybody builds and compiles at once, and is then held against the answer."""
    inputs, notes = data.make(point), {}
    for name in names:
        try:
            about = running.ask(name, do="describe", point=point.to_json())
            if about["refused"] is not None:
                results[name] = {"refused": about["refused"]}
                continue
            given, expected = running.answer(point, about["equations"], inputs)
            running.send(name, do="prepare", point=point.to_json(), data=str(given), expected=str(expected))
            notes[name] = about["note"]
        except driver.WorkerError as error:
            results[name] = {"failed": str(error)}
    for name, note in notes.items():
        try:
            ready = running.receive(name)
        except driver.WorkerError as error:
            results[name] = {"failed": str(error)}
            continue
        agreed = data.agrees(point, ready["errors"])
        results[name] = {**ready, "samples_ms": []} if agreed else {"disagrees": ready["errors"]}
        results[name]["note"] = note


def finished(store: Store, point: Point, names: list[str]) -> bool:
    """Whether everybody was there, whatever came of it: who failed once would fail each time, at the others' cost."""
    known = store.content["points"].get(point.id)
    return (
        known is not None
        and known["environment"] == store.fingerprint
        and all(name in known["results"] for name in taking_part(point, names))
    )


def taking_part(point: Point, names: list[str]) -> list[str]:
    return [name for name in names if point.peers is None or name in point.peers]


CORRECTNESS, TIMING = 0.4, 0.75  # of all the time, and of what is left after it


def suite(options: Any) -> int:
    """Correctness, then timing, unattended: whatever hangs or fails is ended, and the next begins."""
    deadline = time.perf_counter() + 60 * options.minutes
    left = lambda: (deadline - time.perf_counter()) / 60
    log = (options.out or machine.ROOT / "benchmarks" / "results") / "gpu-tests.txt"
    passed = correct(60 * CORRECTNESS * options.minutes, "cpu" if options.device == "cpu" else "cuda,cpu", log)
    statuses = []
    for name, share in (("gpu", TIMING), ("settings", 1.0)):
        print(f"== {name}", flush=True)
        changed = {"grid": name, "minutes": share * left()} | ({"out": options.out / name} if options.out else {})
        try:
            statuses.append(main(argparse.Namespace(**{**vars(options), **changed})))
        except Exception:
            traceback.print_exc()
            statuses.append(1)
    return int(not passed or any(statuses))


def correct(seconds: float, platforms: str, log: Path) -> bool:
    """Whether all that ``pytest -m gpu`` runs passed; it is ended, with all that it began, after so many seconds."""
    print(f"== pytest -m gpu, for {seconds:.0f} s at most, into {log.name}", flush=True)
    # Only the files that have such tests, and no plugin whose warnings would be errors.
    files = ("tests/experimental/test_kernels.py", "tests/experimental/test_cudnn.py")
    options = ("-m", "gpu", "-v", "-n", "4", "-p", "no:benchmark", "--durations=5")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *files], cwd=machine.ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, "JAX_PLATFORMS": platforms}, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that hang too
        process.wait()
    print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), flush=True)
    if status is None:
        print(f"the tests did not end in {seconds:.0f} s: what is not in {log.name} did not pass", flush=True)
    return status == 0


def main(options: Any) -> int:
    """The command: see `benchmarks.run`. Returns the process's exit status."""
    if options.grid == "suite":
        return suite(options)
    deadline = time.perf_counter() + 60 * options.minutes
    if options.grid == "settings":
        entrants, todo = settings_entrants(), settings_points(options.quick)
    else:
        entrants, todo = {name: Entrant(name) for name in ENTRANTS}, quick() if options.quick else full()
    todo = tuple(point for point in todo if options.only in point.id)
    if options.list:
        print("\n".join(point.id for point in todo))
        return 0
    names = [name for name in entrants if options.peers is None or name in options.peers]
    absent = [name for name in names if not peers.available(entrants[name].peer)]
    names = [name for name in names if name not in absent]
    variables = {"JAX_PLATFORMS": "cpu"}
    if options.device == "gpu":
        variables = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    repeats = options.repeats or (3 if options.quick else REPEATS)
    seconds = options.seconds or (0.5 if options.quick else SECONDS)
    environment = machine.environment({"repeats": repeats, "seconds": seconds, "grid": options.grid})
    if options.device == "gpu":
        environment["hardware"]["gpu"] = machine.gpu()
    what = options.grid if options.grid == "settings" else "gpu"
    device = environment["hardware"].get("gpu", {}).get("name", options.device)
    folder = options.out or Path(__file__).parent / "results" / machine.slug_of(f"{device} {what}", options.quick)
    store = Store(folder, environment)
    if options.fresh:
        store.forget(todo if options.only else None)
    for name in absent:
        store.content["peers"].setdefault(name, {"absent": True})
        print(f"{name}: not installed")
    left = [point for point in todo if not finished(store, point, names)]
    print(f"{len(left)} of {len(todo)} points to measure in {options.minutes:g} minutes; results in {folder}")
    with pool({name: entrants[name] for name in names}, variables, deadline) as running:
        try:
            for name in names:  # all are up before anything is measured
                with contextlib.suppress(driver.WorkerError):
                    running.ask(name, do="drop")
            rates = running.ask("", do="rates", size=256 if options.quick else 8192)
        except OutOfTimeError:
            print("time was up before anything was measured: --minutes takes more")
            return 1
        except driver.WorkerError as error:
            print(
                f"no GPU that JAX can use, with jax's CUDA plugin ({error})\n"
                "--device cpu tries out everything but the device"
            )
            return 1
        print(
            ", ".join(
                f"{name} {rate / 1e12:.3g} T{'B' if name == 'copy' else 'FLOP'}/s" for name, rate in rates.items()
            )
        )
        try:
            _all(running, store, left, names, rates, deadline, (repeats, seconds))
        except KeyboardInterrupt:
            print("\ninterrupted: the same command goes on from here")
        store.write()
    gpu_report.write(folder, store.content)
    print(f"wrote {folder / 'results.json'} and results.md")
    return 0


def _all(
    running: GpuPool, store: Store, left: list[Point], names: list[str], rates: Any, deadline: float, budget: Any
) -> None:
    longest = 0.0
    for index, point in enumerate(left, 1):
        start = time.perf_counter()
        if start + 1.2 * (longest or FIRST_GUESS_S) > deadline:
            print(f"time is up: {len(left) - index + 1} points are left for the same command to go on with")
            return
        over = False
        try:
            results = measure(running, point, taking_part(point, names), *budget)
        except OutOfTimeError as end:
            results, over = end.results, True
        _keep_forms(running, store)
        steps = int(data.make(point)["lengths"].sum()) if point.ragged else point.batch * point.time
        more = {"bytes": point.traffic(steps), "copy_bytes_per_second": rates["copy"], "rate_of": point.arithmetic}
        store.add(point, results, rates[point.arithmetic], 0.0, steps, **more)
        gpu_report.write(store.path.parent, store.content)
        longest = max(longest, time.perf_counter() - start)
        line = gpu_report.line(store.content["points"][point.id])
        print(f"[{index}/{len(left)}] {point.id}  ({time.perf_counter() - start:.0f} s)  {line}", flush=True)
        if over:
            print(f"time is up in {point.id}, which is left for the same command, as are {len(left) - index} more")
            return


def _keep_forms(running: GpuPool, store: Store) -> None:
    """How each entrant is used, and its version."""
    for name, form in running.forms.items():
        if name:
            entrant = running.entrants[name]
            about = "; ".join([form, *(f"{key}={value}" for key, value in entrant.variables.items())])
            store.content["peers"][name] = {"form": about, "version": peers.version(entrant.peer)}
