"""The benchmark's run on a GPU, with everything but the GPU. Nothing here asserts on a time."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # as `python benchmarks/run.py` does

from benchmarks import data, driver, gpu, gpu_report, grid, machine, peers, run, worker
from benchmarks.peers import hand
from benchmarks.peers.jrnn import Cudnn, Jrnn
from benchmarks.store import Store

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = grid.Point("grid", "lstm", "train", 2, 5, 3, 4, precision="tf32")
FORWARD = dataclasses.replace(TINY, work="forward")
ENVIRONMENT = {
    "hardware": {"cpu": "Some CPU", "cores": 2, "system": "Linux", "gpu": {"name": "Some GPU", "driver": "1"}},
    "versions": {"jax": "0"},
    "settings": {"repeats": 3, "seconds": 1.0, "grid": "gpu"},
}
RATES = {"tf32": 4e9, "exact": 1e9, "bfloat16": 8e9, "float16": 8e9, "copy": 1e8}


@pytest.fixture(autouse=True)
def _no_repetition_is_long(monkeypatch):
    monkeypatch.setattr(worker, "REPETITION_MS", 0.01)
    monkeypatch.setattr(worker, "WARM_MS", 0.0)


class Local:
    """A worker in this process, in place of one at the other end of a pipe."""

    class Child:
        def kill(self):
            pass

        def wait(self, timeout=None):
            pass

    def __init__(self, peer):
        self.worker, self.alive, self.started, self.form = worker.Worker(peer), True, True, peer.form
        self.child, self.timeout, self.asked = self.Child(), None, []

    def send(self, **command):
        self.asked.append(command["do"])
        self.command = command

    def receive(self):
        try:
            return self.worker.answer(json.loads(json.dumps(self.command)))
        except Exception as error:
            raise driver.WorkerError(f"{type(error).__name__}: {error}") from error

    def stop(self):
        pass


class LocalPool(gpu.GpuPool):
    def __init__(self, left=60.0, **given):
        self.given = given
        super().__init__({name: gpu.Entrant(name) for name in given}, {}, time.perf_counter() + left)

    def _start(self, name):
        return Local(self.given[name] if name else Jrnn())


@contextlib.contextmanager
def pool(**given):
    running = LocalPool(**given)
    try:
        yield running
    finally:
        running.close()


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "points",
    [gpu.full(), gpu.quick(), gpu.settings_points(False), gpu.settings_points(True)],
    ids=["full", "quick", "settings", "quick settings"],
)
def test_points_are_well_formed(points):
    assert len({point.id for point in points}) == len(points)
    for point in points:
        assert point.section in gpu_report.ABOUT
        assert point.arithmetic in RATES
        assert set(point.peers or ()) <= set(gpu.ENTRANTS)
        assert grid.Point.from_json(json.loads(json.dumps(point.to_json()))) == point


def test_the_most_important_points_come_first():
    points = gpu.full()
    first = points[:6]
    assert {point.shape for point in first} == {gpu.ANCHOR} == {(16, 1024, 768, 768)}
    assert {(p.arithmetic, p.work) for p in first} == {
        (number, work) for number in ("bfloat16", "float16", "tf32") for work in ("forward", "train")
    }
    assert set(gpu.ENTRANTS) <= set(peers.ALL)


def test_points_of_a_cpu_are_kept_as_before():
    point = grid.full()[0]
    assert "precision" not in point.to_json()
    assert point.id.count("/") == 3
    assert data.tolerance(dataclasses.replace(point, dtype="bfloat16")) == 0.05
    assert data.tolerance(point) < data.tolerance(TINY)


def test_settings_each_have_a_process_of_their_own(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    entrants = gpu.settings_entrants()
    assert len({tuple(sorted(entrant.variables.items())) for entrant in entrants.values()}) == len(entrants)
    assert any("+WHILE" in entrant.variables.get("XLA_FLAGS", "") for entrant in entrants.values())
    assert all(e.variables["XLA_FLAGS"].startswith("--mine ") for e in entrants.values() if "XLA_FLAGS" in e.variables)
    assert {entrant.variables["JRNN_BENCHMARK_UNROLL"] for entrant in entrants.values()} == {"1", "2", "4", "8"}


# --- the floor -------------------------------------------------------------------------------------------------------


def test_the_floor_is_that_of_products_or_of_memory(tmp_path):
    batch, time_, features, hidden = 2, 5, 3, 4
    numbers = batch * time_ * (features + hidden) + features * 4 * hidden + hidden * 4 * hidden + 4 * hidden
    assert FORWARD.traffic(batch * time_) == 4 * numbers
    assert TINY.traffic(batch * time_) == 3 * 4 * numbers
    assert dataclasses.replace(FORWARD, dtype="bfloat16").traffic(batch * time_) == 2 * numbers
    store = Store(tmp_path, ENVIRONMENT)
    low = dataclasses.replace(TINY, dtype="bfloat16", precision="bfloat16")
    for point, copy in ((TINY, 1e3), (low, 1e15)):
        more = {"bytes": point.traffic(10), "copy_bytes_per_second": copy, "rate_of": point.arithmetic}
        store.add(point, {}, RATES[point.arithmetic], 0.0, 10, **more)
    floors = {entry["rate_of"]: entry["floor_ms"] for entry in store.content["points"].values()}
    # The best bandwidth that was seen holds for both; the rates of products are each arithmetic's own.
    assert floors["tf32"] == pytest.approx(1e3 * TINY.flops(10) / 4e9)
    assert floors["bfloat16"] == pytest.approx(1e3 * low.flops(10) / 8e9)
    store.content["points"][low.id]["copy_bytes_per_second"] = 1e3
    store.write()
    assert store.content["points"][TINY.id]["floor_ms"] == pytest.approx(1e3 * TINY.traffic(10) / 1e3)


def test_rates_of_this_machine():
    found = machine.rates(size=16, repeats=1)
    assert found.keys() == RATES.keys()
    assert all(rate > 0 for rate in found.values())
    assert all(isinstance(value, str) for value in machine.gpu().values())


# --- measuring -------------------------------------------------------------------------------------------------------


class Raises(hand.Hand):
    def apply(self, point, own, xs, lengths):
        raise MemoryError("RESOURCE_EXHAUSTED")


class Wrong(hand.Hand):
    def convert(self, point, params):
        return tuple(tuple({**p, "b": p["b"] + 1} for p in layer) for layer in params)


@pytest.mark.nightly
def test_what_fails_is_kept_and_stops_nobody():
    with pool(first=Raises(), jrnn=Jrnn(), wrong=Wrong(), cudnn=Cudnn(), hand=hand.Hand()) as running:
        results = gpu.measure(running, FORWARD, list(running.given), 3, 1.0)
    assert results["first"] == {"failed": "MemoryError: RESOURCE_EXHAUSTED"}
    assert results["wrong"]["disagrees"]["ys"] > 0.01
    assert results["cudnn"]["refused"].startswith("backend: 'cudnn' cannot run")
    for name in ("jrnn", "hand"):
        assert len(results[name]["samples_ms"]) == 3


@pytest.mark.nightly
def test_the_answer_is_made_once_for_every_arithmetic():
    train = dataclasses.replace(TINY, cell="elman")
    with pool(hand=hand.Hand()) as running:
        for point in (train, dataclasses.replace(train, dtype="bfloat16", precision="bfloat16", work="forward")):
            (result,) = gpu.measure(running, point, ["hand"], 1, 1.0).values()
            assert data.agrees(point, result["errors"]), result
        assert running.processes[""].asked == ["expect"]
        gpu.measure(running, dataclasses.replace(train, time=6, work="forward"), ["hand"], 1, 1.0)
        assert running.processes[""].asked == ["expect", "expect"]


def test_without_an_answer_nobody_is_timed(monkeypatch):
    def fail(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(data, "expected", fail)
    with pool(jrnn=Jrnn(), hand=hand.Hand()) as running:
        results = gpu.measure(running, FORWARD, ["jrnn", "hand"], 1, 1.0)
        assert running.processes[""].asked == ["expect"]  # and not again for the second
    assert all(result["failed"].startswith("there is nothing to hold it against") for result in results.values())


def test_a_process_that_does_not_answer_is_ended(tmp_path):
    process = driver.Process("hand", tmp_path / "log", timeout=0.01)
    with pytest.raises(driver.WorkerError, match="no answer in 0 s"):
        process.ask(do="drop")
    process.stop()
    assert not process.alive


def test_a_process_that_does_not_start_is_not_started_again(tmp_path):
    running = gpu.GpuPool({"hand": gpu.Entrant("no such peer")}, {}, time.perf_counter() + 60)
    try:
        with pytest.raises(driver.WorkerError, match="no such peer"):
            running.ask("hand", do="drop")
        process = running.processes["hand"]
        with pytest.raises(driver.WorkerError, match="did not start"):
            running.ask("hand", do="drop")
        assert running.processes["hand"] is process
    finally:
        running.close()


def test_the_end_comes_in_the_middle_of_a_point():
    with pool(left=-gpu.GRACE_S, jrnn=Jrnn()) as running, pytest.raises(gpu.OutOfTimeError):
        gpu.measure(running, FORWARD, ["jrnn"], 1, 1.0)


@pytest.mark.nightly
def test_what_was_measured_before_the_end_is_kept():
    with pool(hand=hand.Hand(), jrnn=Jrnn()) as running:
        ask = running.ask

        def late(name, **command):
            if name == "jrnn" and command["do"] == "time" and running.processes["hand"].asked[-1] == "time":
                raise gpu.OutOfTimeError
            return ask(name, **command)

        running.ask = late
        with pytest.raises(gpu.OutOfTimeError) as end:
            gpu.measure(running, FORWARD, ["hand", "jrnn"], 2, 1.0)
    assert list(end.value.results) == ["hand"]
    assert len(end.value.results["hand"]["samples_ms"]) == 1


@pytest.mark.nightly
def test_who_hangs_once_is_left_out():
    def hang():
        raise driver.NoAnswerError("no answer in 60 s")

    with pool(hand=hand.Hand(), jrnn=Jrnn()) as running:
        running.processes["jrnn"].receive = hang
        for first in (True, False):
            results = gpu.measure(running, FORWARD, ["hand", "jrnn"], 1, 1.0)
            assert results["jrnn"]["failed"].startswith("no answer" if first else "left out since it did not answer")
            assert len(results["hand"]["samples_ms"]) == 1


# --- peers -----------------------------------------------------------------------------------------------------------

WORK = {
    "gru, bfloat16, gradients": dataclasses.replace(TINY, cell="gru", dtype="bfloat16", precision="bfloat16"),
    "ragged, both directions, two layers": dataclasses.replace(
        FORWARD, ragged=True, bidirectional=True, layers=2, precision="exact"
    ),
}


@pytest.mark.parametrize("point", WORK.values(), ids=WORK.keys())
def test_torch_as_on_a_gpu_agrees(point, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.peers import torch_cuda

    monkeypatch.setattr(torch_cuda, "DEVICE", "cpu")
    with pool(torch=torch_cuda.TorchCuda()) as running:
        (result,) = gpu.measure(running, point, ["torch"], 1, 1.0).values()
    assert len(result["samples_ms"]) == 1, result


def test_the_weights_of_jax_experimental_rnn():
    """By its own reference, since cuDNN is not here: two layers of two directions."""
    from jax.experimental import rnn

    from benchmarks.peers.experimental_rnn import ExperimentalRNN

    point = WORK["ragged, both directions, two layers"]
    peer, drawn = ExperimentalRNN(), data.make(point)
    assert "GPU" in peer.refuses(point)
    sizes = (point.features, point.hidden, point.layers)
    own = peer.convert(point, jax.tree.map(jax.numpy.asarray, drawn["params"]))
    parts = rnn.unpack_lstm_weights(own, *sizes, True)
    zeros = jax.numpy.zeros((4, point.batch, point.hidden))
    xs = drawn["xs"].swapaxes(0, 1)
    ys = rnn.lstm_ref(xs, zeros, zeros, *parts, jax.numpy.asarray(drawn["lengths"]), *sizes, 0.0, True)[0]
    np.testing.assert_allclose(ys.swapaxes(0, 1), data.expected(point, "lstm", drawn)["ys"], atol=1e-6)


def test_schedules_say_why_they_take_no_part():
    assert "the default device is a cpu" in Cudnn().refuses(TINY)
    assert "single step" in Cudnn().refuses(dataclasses.replace(TINY, work="step"))
    assert "lengths" in hand.Hand().refuses(WORK["ragged, both directions, two layers"])


# --- results and the command -----------------------------------------------------------------------------------------


def test_the_report(tmp_path):
    store = Store(tmp_path, ENVIRONMENT)
    store.content["peers"] = {"jrnn": {"form": "as it is", "version": "0"}, "keras": {"absent": True}}
    timed = lambda ms: {"samples_ms": [ms], "errors": {"ys": 1e-3}, "inner": 1, "note": "", "trace_ms": 1.0}
    results = {
        "jrnn": timed(3.0),
        "jrnn cudnn": timed(2.0),
        "jrnn kernel": {"refused": "backend: 'kernel' cannot run LSTM(4): no GPU: none; pass backend=None to let jrnn"},
        "hand": {"failed": "no memory"},
        "torch cuda": timed(1.0),
    }
    more = {"bytes": 1.0, "copy_bytes_per_second": 1e12, "rate_of": "tf32"}
    store.add(TINY, results, 1e9, 0.0, 10, **more)
    gpu_report.write(tmp_path, store.content)
    text = (tmp_path / "results.md").read_text()
    assert "name Some GPU, driver 1; beside it Some CPU" in text
    row = next(line for line in text.splitlines() if line.startswith("| forward and backward"))
    assert row.startswith("| forward and backward (2, 5, 3, 4), tf32 | 3.00 | 2.00 | 1.00 | **0.50x torch cuda** |")
    assert row.endswith("| 400 |")
    assert "jrnn kernel takes no part: no GPU: none." in text
    assert "**hand failed**" in text
    assert "- **keras** : not installed" in text
    assert gpu_report.line(store.content["points"][TINY.id]) == "jrnn cudnn 2.00 ms, torch cuda 1.00 ms, hand FAILED"


@pytest.mark.nightly
def test_a_run_ends_in_time_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "quick", lambda: (TINY, FORWARD))
    monkeypatch.setattr(machine, "rates", lambda size: RATES)
    given = {"hand": hand.Hand(), "jrnn": Raises()}
    opened = []

    @contextlib.contextmanager
    def local(entrants, variables, deadline):
        opened.append(variables)
        with pool(**given) as running:
            yield running

    monkeypatch.setattr(gpu, "pool", local)
    command = ["--grid", "gpu", "--quick", "--peers", "jrnn,hand", "--out", str(tmp_path)]

    def go(*more):
        with pytest.raises(SystemExit) as end:
            run.main([*command, *more])
        assert end.value.code == 0
        return capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())["points"]

    out, points = go("--device", "cpu", "--minutes", "0")
    assert "time is up: 2 points are left" in out
    assert points == {}
    real = gpu.measure

    def interrupted(running, point, *args):
        if point == FORWARD:
            raise KeyboardInterrupt
        return real(running, point, *args)

    monkeypatch.setattr(gpu, "measure", interrupted)
    out, points = go("--device", "cpu")
    assert "interrupted" in out
    assert list(points) == [TINY.id]
    assert "failed" in points[TINY.id]["results"]["jrnn"]
    assert len(points[TINY.id]["results"]["hand"]["samples_ms"]) == 3
    monkeypatch.setattr(gpu, "measure", real)
    out, points = go("--device", "cpu")  # who failed is not tried again
    assert "1 of 2 points" in out
    assert list(points) == [TINY.id, FORWARD.id]
    assert all(math.isfinite(entry["floor_ms"]) for entry in points.values())
    assert opened[0] == {"JAX_PLATFORMS": "cpu"}
    go("--device", "gpu", "--minutes", "0")
    assert opened[-1] == {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def test_the_command_lists(capsys):
    for name, points in (("gpu", gpu.full()), ("settings", gpu.settings_points(False))):
        with pytest.raises(SystemExit):
            run.main(["--grid", name, "--list"])
        assert capsys.readouterr().out.split("\n")[:-1] == [point.id for point in points]


def test_the_suite_goes_from_correctness_to_timing(tmp_path, monkeypatch):
    """Whatever becomes of the tests, the points and the settings follow, in the time that is left."""
    seen = []
    monkeypatch.setattr(gpu, "correct", lambda *given: seen.append(given))
    real = gpu.main
    monkeypatch.setattr(gpu, "main", lambda options: seen.append((options.grid, options.minutes, options.out)) or 0)
    assert real(run.arguments(["--grid", "suite", "--minutes", "10", "--out", str(tmp_path)])) == 1  # as the tests
    assert seen[0] == (240, "cuda,cpu", tmp_path / "gpu-tests.txt")
    assert [(name, round(minutes, 1), out) for name, minutes, out in seen[1:]] == [
        ("gpu", 7.5, tmp_path / "gpu"),
        ("settings", 10.0, tmp_path / "settings"),
    ]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param("pass", "1 passed", id="pass", marks=pytest.mark.nightly),
        pytest.param("assert False", "1 failed", id="fail"),
        pytest.param("__import__('time').sleep(600)", "did not end in 15 s", id="hang", marks=pytest.mark.nightly),
    ],
)
def test_tests_that_hang_are_ended(body, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "tests" / "experimental").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    for name in ("kernels", "cudnn"):
        mark = "gpu" if name == "kernels" else "skip"
        text = f"import pytest\n\n@pytest.mark.{mark}\ndef test_it():\n    {body}\n"
        (tmp_path / "tests" / "experimental" / f"test_{name}.py").write_text(text)
    assert gpu.correct(60.0 if "1" in says[:1] else 15.0, "cpu", tmp_path / "out" / "log.txt") == ("passed" in says)
    assert says in capsys.readouterr().out
