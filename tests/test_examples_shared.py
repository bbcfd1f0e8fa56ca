"""What the examples share: trainings that were cut off, where they are saved, and counts of confusions."""

import signal
import types

import jax
import numpy as np
import pytest

import jrnn
from jrnn import training
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def shared():
    return load_example("shared")


@pytest.fixture
def cut_off_trainings(monkeypatch):
    """Lets ^C cut off every training at its first record, by Python's own handler, which pytest-xdist replaces."""
    fit = training.fit
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def cut_off(*arguments, **options):
        return fit(*arguments, **options | dict(callbacks=[lambda report: signal.raise_signal(signal.SIGINT)]))

    monkeypatch.setattr(training, "fit", cut_off)
    yield
    signal.signal(signal.SIGINT, before)


def test_confusions_are_counted(shared):
    truth, said = np.array([[0, 1, 2], [2, 2, 1]]), np.array([[0, 1, 1], [1, 2, 1]])
    wanted = np.zeros((4, 4), int)
    np.add.at(wanted, (truth, said), 1)
    np.testing.assert_array_equal(shared.confusion(truth, said, 4), wanted)
    assert shared.confusion([], [], 2).tolist() == [[0, 0], [0, 0]]


def test_several_trainings_are_saved_apart(shared):
    assert shared.checkpoint_of(None, "a b") is None
    assert shared.checkpoint_of("runs", "a b") != shared.checkpoint_of("runs", "a c")


def test_one_of_several_trainings_that_was_cut_off_ends_the_program(shared):
    result = lambda stopped: types.SimpleNamespace(stopped=stopped, state=types.SimpleNamespace(step=7))
    for stopped in ("epochs", "steps", "patience", "callback"):
        assert shared.finished(whole := result(stopped)) is whole
    with pytest.raises(SystemExit, match=r"interrupted at step 7: [^;]*$"):
        shared.finished(result("interrupt"))
    with pytest.raises(SystemExit, match="goes on from there"):
        shared.finished(result("interrupt"), "runs")


@pytest.mark.usefixtures("cut_off_trainings")
def test_no_table_of_trainings_that_were_cut_off(monkeypatch, capsys):
    faults = load_example("faults")
    monkeypatch.setattr(faults, "UNITS", 2)
    with pytest.raises(SystemExit, match="interrupted at step 100"):
        faults.main(["--sets", "JapaneseVowels", "--runs", "5", "--steps", "200"])
    printed = capsys.readouterr().out
    assert "run 1 of 5" in printed
    assert "run 2 of 5" not in printed
    assert "accuracy" not in printed


@pytest.mark.usefixtures("cut_off_trainings")
def test_a_single_training_that_was_cut_off_is_shown_with_a_note(monkeypatch, tmp_path, capsys):
    heartbeat = load_example("heartbeat")
    record = heartbeat.Record("made up", np.sin(np.arange(4000) / 10), np.arange(100, 3900, 60), np.arange(64) % 9 == 8)
    monkeypatch.setattr(heartbeat, "load_piece", lambda: record)
    heartbeat.main(["--steps", "50", "--hidden", "2", "--out", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    assert printed.index("interrupted at step 10") < printed.index("sensitivity")


@pytest.mark.usefixtures("cut_off_trainings")
def test_a_test_that_learns_as_it_reads_has_no_result_if_it_was_cut_off(monkeypatch):
    generate = load_example("generate")
    for name, value in {"PIECE": 8, "TEST_STREAMS": 2}.items():
        monkeypatch.setattr(generate, name, value)
    model = generate.network(5, 6, 1)
    with pytest.raises(SystemExit, match="interrupted at step 1"):
        generate.tested(model, model.init(jax.random.key(0), None), np.arange(200) % 5)


@pytest.mark.parametrize("name", ["faults", "speakers"])
def test_losses_are_those_of_the_votes_without_a_key(name, monkeypatch):
    """So that the same loss serves to train and to validate; with a key there are noise and dropout."""
    module, steps = load_example(name), []
    xs = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    batch = xs, np.array([5, 2, 3, 5]), np.array([0, 1, 1, 2])
    if name == "faults":
        model = module.network(3)
        result = types.SimpleNamespace(stopped="steps", params=None)
        monkeypatch.setattr(training, "fit", lambda step, *_, **__: steps.append(step) or result)
        module.train("made up", model, batch, 1, 4, 0)
        params = model.init(jax.random.key(0), 3)
        votes = module.votes(model, params, *batch[:2])
    else:
        steps.append(training.make_step(module.loss_fn, training.optimizer("sgd", 0.1)))
        params = module.MODEL.init(jax.random.key(0), 3)
        votes = module.votes(params, *batch[:2])
    wanted = float(jrnn.losses.cross_entropy(votes, batch[2]))
    assert training.evaluate(steps[0], params, [batch])["loss"] == pytest.approx(wanted, rel=1e-5)
    _, noisy = steps[0](steps[0].init(params, jax.random.key(1)), batch)
    assert abs(float(noisy.loss) - wanted) > 1e-4
