"""The benchmark: its points, that wrong answers are refused, that it goes on where it stopped, and what it reports.

Nothing here asserts on a time.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

import jrnn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # as `python benchmarks/run.py` does

from benchmarks import data, driver, grid, machine, peers, plot, report, run, tasks, worker
from benchmarks.peers import hand
from benchmarks.peers.base import PRODUCT
from benchmarks.store import Store

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = grid.Point("grid", "lstm", "train", 2, 5, 3, 4)
ENVIRONMENT = {
    "hardware": {"cpu": "Some CPU", "machine": "x86_64", "cores": 2, "flags": {"avx2": True}, "system": "Linux"},
    "versions": {"python": "3.11", "jrnn": "0", "jax": "0"},
    "settings": {"repeats": 3, "seconds": 1.0},
}
ELMAN = dataclasses.replace(TINY, cell="elman")
CASES = {
    "gru, gradients": dataclasses.replace(TINY, cell="gru"),
    "two layers of two directions": dataclasses.replace(TINY, work="forward", layers=2, bidirectional=True),
    "ragged, gradients": dataclasses.replace(ELMAN, ragged=True),
    "ragged": dataclasses.replace(TINY, work="forward", ragged=True),
    "bfloat16": dataclasses.replace(TINY, work="forward", dtype="bfloat16"),
    "one step": dataclasses.replace(TINY, work="step", time=1, cell="gru"),
}
OFTEN = ("gru, gradients", "ragged", "one step")


class LocalProcess:
    """A worker in this process, in place of one at the other end of a pipe."""

    def __init__(self, peer):
        self.worker, self.alive = worker.Worker(peer), True

    def ask(self, **command):
        return self.worker.answer(json.loads(json.dumps(command)))


class LocalPool:
    """What `driver.measure` needs of a pool."""

    def __init__(self, folder, **given):
        self.folder, self.processes = folder, {name: LocalProcess(peer) for name, peer in given.items()}
        self.forms = {name: peer.form for name, peer in given.items()}

    def process(self, name):
        return self.processes[name]


@pytest.fixture(autouse=True)
def _no_repetition_is_long(monkeypatch):
    monkeypatch.setattr(worker, "REPETITION_MS", 0.01)
    monkeypatch.setattr(worker, "WARM_MS", 0.0)
    monkeypatch.setattr(driver, "PAUSE_S", 0.0)


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [grid.full(), grid.quick()], ids=["full", "quick"])
def test_points_are_well_formed(points):
    assert len({point.id for point in points}) == len(points)
    for point in points:
        assert point.section in report.SECTIONS
        assert point.work in grid.WORK
        assert point.cell in grid.GATES
        assert set(point.peers or ()) <= set(peers.PEERS)
        assert grid.Point.from_json(json.loads(json.dumps(point.to_json()))) == point
        assert point.flops(point.batch * point.time) > 0


def test_the_grid_has_every_kind_of_work():
    points = grid.full()
    for cell in grid.GATES:
        for work in ("forward", "train"):
            shapes = {p.shape for p in points if (p.section, p.cell, p.work) == ("grid", cell, work)}
            assert shapes == set(grid.SHAPES)
    assert {p.section for p in points} == set(report.SECTIONS)
    assert [p.time for p in points if p.section == "long" and p.work == "train"] == [100, 1_000, 10_000, 100_000]
    assert [p.peers for p in points if p.section == "memory"] == [grid.REMAT]
    assert {p.cell for p in points if p.work == "step"} == set(grid.GATES)


def test_the_floor_counts_the_matrix_products():
    batch, time, features, hidden = 2, 5, 3, 4
    one = 2 * batch * time * (features * 4 * hidden + hidden * 4 * hidden)  # x W and h U, two operations an entry
    assert dataclasses.replace(TINY, work="forward").flops(batch * time) == one
    assert TINY.flops(batch * time) == 3 * one
    assert dataclasses.replace(TINY, cell="elman").flops(batch * time) == 3 * one / 4
    second = 2 * batch * time * (2 * hidden * 4 * hidden + hidden * 4 * hidden)
    assert dataclasses.replace(TINY, layers=2, bidirectional=True).flops(batch * time) == 3 * 2 * (one + second)


def test_the_floor_takes_the_best_rate_of_its_environment(tmp_path):
    store = Store(tmp_path, ENVIRONMENT)
    for work, rate in (("forward", 2e9), ("train", 1e9)):
        store.add(dataclasses.replace(TINY, work=work), {}, rate, 0.0, steps=10)
    floors = {entry["point"]["work"]: entry["floor_ms"] for entry in store.content["points"].values()}
    assert floors["forward"] == pytest.approx(1e3 * TINY.flops(10) / 3 / 2e9)
    assert floors["train"] == pytest.approx(3 * floors["forward"])


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, id=name, marks=[pytest.mark.nightly] * (name not in OFTEN)) for name, point in CASES.items()],
)
def test_jrnn_and_the_hand_written_scan_agree(point, tmp_path):
    from benchmarks.peers.jrnn import Jrnn

    pool = LocalPool(tmp_path, jrnn=Jrnn(), hand=hand.Hand())
    for name, result in driver.measure(pool, point, driver.Budget(1, 1.0)).items():
        assert data.agrees(point, result["errors"]), (name, result)
        assert len(result["samples_ms"]) == 1
        assert result["trace_ms"] > 0
        assert result["compile_ms"] > 0
        expected = {"value", "inputs' gradients", "parameters' gradients"} if point.work == "train" else {"ys"}
        assert set(result["errors"]) == expected


@pytest.mark.parametrize("equations", data.EQUATIONS)
def test_every_kind_of_equations_has_an_answer(equations):
    name, lacking, options = data.EQUATIONS[equations]
    point = dataclasses.replace(TINY, cell=name, work="forward")
    drawn = data.make(point)
    answer = data.expected(point, equations, drawn)
    given = data.reduced(equations, drawn["params"])
    assert not set(lacking) & set(given[0][0])
    cell = getattr(jrnn, name)(4, **options)
    params = dict(given[0][0]) | ({"b_hn": np.zeros(4, np.float32)} if equations == "gru without b_hn" else {})
    np.testing.assert_allclose(answer["ys"], jrnn.unroll(cell, params, drawn["xs"])[1], atol=1e-6)


def test_the_own_cell_agrees():
    from benchmarks.peers.jrnn import OwnLSTM

    drawn = data.make(TINY)
    ours = jrnn.unroll(OwnLSTM(4), drawn["params"][0][0], drawn["xs"])[1]
    np.testing.assert_allclose(ours, data.expected(TINY, "lstm", drawn)["ys"], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "cell", "resets"),
    [
        ("linen on flax", "gru", True),
        ("linen on jrnn", "gru", True),
        ("linen LSTMCell on jrnn", "lstm", False),
        ("nnx on jrnn", "gru", False),
    ],
)
def test_flax_and_what_takes_its_place_agree(name, cell, resets):
    if not peers.available(name):
        pytest.skip("Flax is not installed")
    point = grid.Point(grid.DROP_IN, cell, "train", 2, 40, 3, 4, resets=resets)
    assert (data.resets(point) is None) != resets
    drawn, peer = data.make(point), peers.create(name)
    equations = peer.equations_of(point)
    assert peer.refuses(point) is None
    answer = peer.prepare(point, drawn | {"params": data.reduced(equations, drawn["params"])}).answer()
    assert data.agrees(point, data.errors(point, answer, data.expected(point, equations, drawn)))


def test_inputs_are_the_same_every_time_and_padding_weighs_nothing():
    point = CASES["ragged"]
    first, second = data.make(point), data.make(point)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    padding = np.arange(point.time)[:, None] >= first["lengths"]
    assert padding.any()
    assert not first["weights"][padding].any()


def test_arrays_survive_their_file(tmp_path):
    drawn = data.make(CASES["two layers of two directions"])
    data.save(tmp_path / "a.npz", drawn)
    jax.tree.map(np.testing.assert_array_equal, drawn, data.load(tmp_path / "a.npz"))


class SwappedGates(hand.Hand):
    """Wrong: two gates of the bias in each other's place."""

    def convert(self, point, params):
        swap = lambda b: jax.numpy.concatenate([b[4:8], b[:4], b[8:]])
        return tuple(tuple(p | {"b": swap(p["b"])} for p in layer) for layer in params)


class NoGradient(hand.Hand):
    """Wrong: right outputs, but no gradient reaches the recurrent weights."""

    def convert(self, point, params):
        stop = jax.lax.stop_gradient
        return tuple(tuple(p | {"w_hh": stop(p["w_hh"])} for p in layer) for layer in params)

    def apply(self, point, own, xs, lengths):
        own = tuple(tuple(p | {"w_hh": jax.lax.stop_gradient(p["w_hh"])} for p in layer) for layer in own)
        return super().apply(point, own, xs, lengths)


def test_a_peer_with_wrong_outputs_is_refused(tmp_path):
    forward = dataclasses.replace(TINY, work="forward")
    pool = LocalPool(tmp_path, right=hand.Hand(), wrong=SwappedGates())
    results = driver.measure(pool, forward, driver.Budget(1, 1.0))
    assert "samples_ms" in results["right"]
    assert "samples_ms" not in results["wrong"]
    assert results["wrong"]["disagrees"]["ys"] > data.tolerance(forward)


def test_a_peer_with_wrong_gradients_is_refused(tmp_path):
    (result,) = driver.measure(LocalPool(tmp_path, wrong=NoGradient()), ELMAN, driver.Budget(1, 1.0)).values()
    assert "samples_ms" not in result
    assert result["disagrees"]["value"] < 1e-5  # its value is right: the gradients give it away
    assert result["disagrees"]["parameters' gradients"] > 0.5


def test_a_peer_that_leaves_something_out_is_refused():
    drawn = data.make(TINY)
    want = {"value": np.float32(3.0), "scale": np.float32(2.0), "xs": drawn["xs"], "params": drawn["params"]}
    assert data.agrees(TINY, data.errors(TINY, want, want))
    for name in ("value", "xs", "params"):
        left = {key: value for key, value in want.items() if key != name}
        assert not data.agrees(TINY, data.errors(TINY, left, want))
    for name in ("value", "xs"):
        assert not data.agrees(TINY, data.errors(TINY, want | {name: want[name] * np.nan}, want))
    (layer,) = want["params"]
    short = ({name: value for name, value in layer[0].items() if name != "w_hh"},)
    assert not data.agrees(TINY, data.errors(TINY, want | {"params": (short,)}, want))


def test_errors_keep_no_folders():
    assert driver.without_paths('OSError: "/home/me/x/file.py", line 3: 1/2 of a/b') == (
        'OSError: "file.py", line 3: 1/2 of a/b'
    )


# --- results ---------------------------------------------------------------------------------------------------------


def stored(folder):
    """A store with two points, one of them with everything that can happen to a peer."""
    store = Store(folder, ENVIRONMENT)
    store.content["peers"] = {"jrnn": {"form": "as it is", "version": "0"}, "torch": {"absent": True}}
    timed = lambda *samples: {
        "samples_ms": list(samples),
        "errors": {"value": 1e-7},
        "inner": 1,
        "trace_ms": 3.0,
        "compile_ms": 40.0,
        "temp_bytes": 2048,
        "note": "",
    }
    results = {"jrnn": timed(2.0, 1.0, 3.0), "hand": timed(5.0, 4.0, 6.0), "keras": timed(1.5) | {"note": "a note"}}
    results |= {"haiku": {"disagrees": {"value": 0.5}, "note": ""}, "equinox": {"failed": "no memory"}}
    results["products"] = timed(1e3 * 2 * PRODUCT**3 / 4e6)  # at 4e6 operations a second
    store.add(TINY, results, 1e9, 0.1, steps=10)
    step = dataclasses.replace(TINY, section="one step", work="step", batch=1, time=1)
    store.add(step, {"jrnn": timed(0.02), "empty": timed(0.01)}, 1e9, 0.1, steps=1)
    return store


def test_a_finished_point_is_not_measured_again(tmp_path):
    stored(tmp_path)
    again = Store(tmp_path, ENVIRONMENT)
    assert again.finished(TINY, ["jrnn", "hand"])
    assert not again.finished(TINY, ["jrnn", "flax.nnx"])  # a peer that was not there
    assert not again.finished(TINY, ["jrnn", "equinox"])  # one that failed
    assert not again.finished(dataclasses.replace(TINY, time=6), ["jrnn"])
    changed = ENVIRONMENT | {"versions": {"jax": "1"}}
    assert not Store(tmp_path, changed).finished(TINY, ["jrnn"])
    again.forget([TINY])
    assert not again.finished(TINY, ["jrnn"])
    assert len(again.content["points"]) == 1
    again.forget()
    assert not again.content["points"]


def test_an_interrupted_write_leaves_the_old_results(tmp_path, monkeypatch):
    store = stored(tmp_path)
    before = store.path.read_text()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.add(ELMAN, {}, 1e9, 0.0, steps=10)
    assert store.path.read_text() == before


def test_the_report(tmp_path):
    content = stored(tmp_path).content
    pictured = report.write(tmp_path, content)
    text = (tmp_path / "results.md").read_text()
    assert "Some CPU, 2 cores (avx2)" in text
    row = next(line for line in text.splitlines() if line.startswith("| forward and backward"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["forward and backward (2, 5, 3, 4)", "2.00", "5.00", "1.50†"]
    assert cells[4] == "**0.75x keras**"  # a loss is told
    entry = content["points"][TINY.id]
    assert cells[6] == f"{100 * 1e3 * entry['flops'] / 4e6 / 2.0:.0f}%"  # of the floor at the rate in the rounds
    assert cells[7] == "400"  # microseconds a step
    assert "- 0.75x grid, lstm" in text
    assert "† keras: a note." in text
    assert "**haiku disagrees**" in text
    assert "**equinox failed**" in text
    assert "2.00 KiB" in text
    assert "| 20.0 | 10.0 |" in text  # single steps, in microseconds
    assert "**torch** : not installed" in text.replace("  ", " ")
    entry = content["points"][TINY.id]
    assert report.best_other(entry) == ("keras", 1.5)
    assert report.line(content, TINY).startswith("jrnn 2.00 ms, keras 1.50 ms (0.75x)")
    assert pictured == (tmp_path / "results.png").exists()


def test_disturbed_points_are_measured_again(tmp_path, monkeypatch, capsys):
    points = [dataclasses.replace(ELMAN, work="forward", hidden=h) for h in (4, 5, 6)]
    monkeypatch.setattr(grid, "quick", lambda: points)
    monkeypatch.setattr(machine, "matmul_rate", lambda **_: 1e9)
    monkeypatch.setattr(driver, "pool", lambda names: contextlib.nullcontext(LocalPool(tmp_path)))
    seen = []

    def measured(running, point, budget):
        seen.append(point.hidden)
        slow = point.hidden == 5 and len(seen) < 4  # at its first turn, and no more
        return {"products": {"samples_ms": [2.0 if slow else 1.0]}}

    monkeypatch.setattr(driver, "measure", measured)
    run.main(["--quick", "--peers", "products", "--out", str(tmp_path)])
    assert seen == [4, 5, 6, 5]
    assert "again" in capsys.readouterr().out
    assert "1 of the points were measured again" in (tmp_path / "results.md").read_text()


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")
    assert plot.write(tmp_path / "results.png", stored(tmp_path).content)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not plot.write(tmp_path / "none.png", {"points": {}, "environments": {}})


def test_what_is_said_about_the_machine_names_nobody():
    import platform

    text = json.dumps(machine.environment({}))
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(machine.ROOT) not in text
    assert machine.hardware()["cores"] >= 1
    assert machine.slug()
    assert machine.matmul_rate(size=16, repeats=1) > 0


def test_every_line_of_the_source_counts(tmp_path):
    hashes = []
    for name in ("a.py", "b.cc", "c.h", "d.md"):
        (tmp_path / name).write_text(name)
        hashes.append(machine.source_hash(tmp_path))
    assert len(set(hashes)) == 3


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_run_from_end_to_end_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    points = (ELMAN, dataclasses.replace(ELMAN, work="forward"))
    monkeypatch.setattr(grid, "quick", lambda: points)
    monkeypatch.setattr(machine, "matmul_rate", lambda **_: 1e9)
    command = ["--quick", "--peers", "jrnn,hand", "--out", str(tmp_path), "--repeats", "2"]

    real = driver.measure

    def stop_at_the_second(running, point, budget):
        if point.work == "forward":
            raise KeyboardInterrupt
        return real(running, point, budget)

    monkeypatch.setattr(driver, "measure", stop_at_the_second)
    run.main(command)
    assert "interrupted" in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["points"]) == [ELMAN.id]
    first = content["points"][ELMAN.id]
    for name in ("jrnn", "hand"):
        assert len(first["results"][name]["samples_ms"]) == 2, first

    monkeypatch.setattr(driver, "measure", lambda running, point, budget: first["results"])
    monkeypatch.setattr(driver, "pool", lambda names: contextlib.nullcontext(LocalPool(tmp_path)))
    run.main(command)
    assert "1 of 2 points to measure" in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["points"]) == [point.id for point in points]
    assert content["points"][ELMAN.id] == first
    run.main(command)
    assert "0 of 2 points to measure" in capsys.readouterr().out


@pytest.mark.smoke
def test_the_command_lists_and_selects(capsys):
    run.main(["--quick", "--list"])
    assert capsys.readouterr().out.split("\n")[:-1] == [point.id for point in grid.quick()]
    run.main(["--only", "long/", "--list"])
    assert len(capsys.readouterr().out.split()) == 8
    with pytest.raises(SystemExit, match="--only: expected"):
        run.main(["--only", "nothing"])
    with pytest.raises(SystemExit):
        run.arguments(["--peers", "nobody"])
    assert "unknown" not in capsys.readouterr().out


def test_the_extra_names_no_torch():
    text = (machine.ROOT / "pyproject.toml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("benchmarks = "))
    assert "torch" not in line
    assert "cuda" not in line


# --- cells on small tasks --------------------------------------------------------------------------------------------


def test_tasks_are_what_the_papers_say_and_their_trivial_predictors_get_what_is_said_of_them():
    adding = tasks.adding(20, steps=1)
    xs, sums = adding.test()
    assert xs.shape == (adding.length, 256, 2)
    values, marks = np.asarray(xs[..., 0]), np.asarray(xs[..., 1])
    assert (marks[:10].sum(0) == 1).all()
    assert (marks[10:].sum(0) == 1).all()
    np.testing.assert_allclose(sums, [values[:, i][marks[:, i] == 1].sum() for i in range(256)], rtol=1e-6)
    ones = adding.metrics(np.ones((20, 256, 1), np.float32), sums)["mse"]
    np.testing.assert_allclose(ones, adding.trivial["the same on these tests"], rtol=1e-4)
    np.testing.assert_allclose(np.var(adding.sample(jax.random.key(0), 20_000)[1]), 1 / 6, rtol=0.05)

    copying = tasks.copying(30, steps=1)
    xs, ids = copying.test()
    assert xs.shape == (copying.length, 128, 10) == (50, 128, 10)
    shown = np.asarray(xs).argmax(-1)
    np.testing.assert_array_equal(shown[:10], ids[-10:])
    assert (shown[10:39] == 8).all()
    assert (shown[39] == 9).all()
    assert (shown[40:] == 8).all()
    assert (np.asarray(ids[:40]) == 8).all()
    logits = np.full((50, 128, 9), -30.0, np.float32)
    logits[:40, :, 8], logits[40:, :, :8] = 0.0, 0.0
    blind = copying.metrics(logits, ids)["cross-entropy"]
    np.testing.assert_allclose(blind, copying.trivial["blanks, then any symbol"], rtol=1e-5)
    right = 30 * np.eye(9, dtype=np.float32)[np.asarray(ids)]
    assert copying.metrics(right, ids)["recalled"] == 1

    digits = tasks.digits(steps=1)
    xs, labels = digits.test()
    assert xs.shape == (digits.length, 360, 1)
    assert (xs.min(), xs.max()) == (0, 1)
    assert digits.metrics(jax.nn.one_hot(labels, 10)[None], labels)["accuracy"] == 1
    train, _ = digits.sample(jax.random.key(0), 2_000)
    images = lambda xs: {image.tobytes() for image in np.asarray(xs[..., 0].T)}
    assert len(images(train)) > 1_000
    assert not images(train) & images(xs)


def test_the_series_of_mackey_and_glass_solves_its_equation():
    series = tasks.mackey_glass_series(200)
    fine = tasks.mackey_glass_series(200, substeps=20)
    np.testing.assert_allclose(series[:100], fine[:100], atol=1e-3)  # chaotic, and so not for long
    assert 0.2 < series.min() < 0.6 < 1.1 < series.max() < 1.5  # the attractor's range
    slope = (fine[19:] - fine[17:-2]) / 2
    equation = 0.2 * fine[1:-18] / (1 + fine[1:-18] ** 10) - 0.1 * fine[18:-1]
    np.testing.assert_allclose(slope, equation, atol=0.01)


def test_all_cells_have_about_as_many_parameters():
    for name in tasks.CELLS:
        _, hidden, parameters = tasks.fitted(name)
        assert 0.8 * tasks.BUDGET < parameters <= tasks.BUDGET
        assert hidden % 4 == 0


def test_a_task_is_trained_once_and_reported(tmp_path, monkeypatch, capsys):
    tiny = tasks.adding(6, steps=tasks.ROUNDS, batch=4)._replace(test=lambda: tiny.sample(jax.random.key(0), 4))
    monkeypatch.setattr(tasks, "TASKS", {"adding-6": lambda: tiny})
    monkeypatch.setattr(tasks, "BUDGET", 300)
    monkeypatch.setattr(tasks, "WIDTH", 4)
    tasks.fitted.cache_clear()
    path = tmp_path / "tasks.json"
    run = lambda *arguments: tasks.main(["--out", str(path), "--only", "adding-6/elman", *arguments])
    try:
        assert run("--minutes", "0") == 0
        assert "not run, since the minutes were over: adding-6/elman" in capsys.readouterr().out
        assert run() == 0
        content = json.loads(path.read_text())
        (training,) = content["pairs"]["adding-6/elman"]["runs"].values()
        assert len(training["curve"]) == tasks.ROUNDS
        assert 0 < training["curve"][-1]["mse"] < 10
        monkeypatch.setattr(tasks, "train", lambda *_: pytest.fail("trained again"))
        assert run() == 0
        assert json.loads(path.read_text()) == content
        cells = []
        monkeypatch.setattr(tasks, "train", lambda cell, *_: cells.append(cell) or training)
        assert tasks.main(["--out", str(path), "--only", "adding-6/min_gru"]) == 0
        assert [cell.forget_bias for cell in cells] == [jrnn.initializers.chrono(6)]
    finally:
        tasks.fitted.cache_clear()
    text = path.with_suffix(".md").read_text()
    assert "- `min_gru` not with its defaults, but with the `forget_bias` `chrono(steps=6)` in adding-6." in text
    assert f"| `elman` | **{training['curve'][-1]['mse']:.3f}** |" in text
    assert "| `lstm` | - |" in text
    with pytest.raises(SystemExit):
        tasks.main(["--only", "no such pair"])
    assert "--only: expected a part of TASK/CELL, tasks ['adding-6'] and cells ['elman'," in capsys.readouterr().err
