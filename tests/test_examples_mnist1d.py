"""The MNIST-1D example: it finds the package whose name it bears, learns, and keeps validation and test apart."""

import pathlib
import sys

import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "mnist1d.py"


@pytest.fixture
def example(monkeypatch):
    module = load_example("mnist1d")
    small = jrnn.stack(jrnn.gru(8), jrnn.dropout(0.2), jrnn.dense(module.DIGITS))
    monkeypatch.setattr(module, "GRU", small)  # the same kind of network, in a fraction of the time
    return module


def curves(count, seed):
    """Curves that a GRU of 8 units learns at once: a digit is how high the curve lies."""
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, 10, count).astype(np.int32)
    xs = digits / 3 - 1.5 + rng.normal(0, 0.1, (40, count))
    return xs[..., None].astype(np.float32), digits


def test_the_package_is_found_beside_the_script_of_its_name(example, monkeypatch):
    pytest.importorskip("mnist1d", reason="the data set's package")
    for name in [name for name in sys.modules if name.split(".")[0] == "mnist1d"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])  # as in `python examples/mnist1d.py`

    def no_network(*arguments):
        raise AssertionError("the data set must be computed, not fetched")

    monkeypatch.setattr("socket.socket.connect", no_network)
    parts = example.load()
    assert pathlib.Path(sys.modules["mnist1d"].__file__).parent != SCRIPT.parent
    assert [xs.shape for xs, _ in parts] == [(40, 4000, 1), (40, 1000, 1)]
    assert sum(np.bincount(digits) for _, digits in parts).tolist() == [500] * 10
    everything = np.concatenate([xs for xs, _ in parts], axis=1)
    assert (abs(everything.mean()) < 1e-4, abs(everything.std() - 1) < 1e-4) == (True, True)


def test_the_strongest_vote_counts_wherever_it_is(example):
    params = ({}, {}, {"w": np.eye(10, dtype=np.float32), "b": np.zeros(10, np.float32)})
    example.GRU = jrnn.stack(jrnn.dropout(0.2), jrnn.dropout(0.2), jrnn.dense(10))
    xs = np.zeros((40, 2, 10), np.float32)
    xs[3, 0, 7] = xs[39, 1, 2] = 1
    assert example.gru(params, xs).argmax(-1).tolist() == [7, 2]


def test_a_run_learns_keeps_the_best_epoch_and_draws(example, monkeypatch, tmp_path, capsys):
    runs, train = [], example.train

    def remember(*arguments, **options):
        runs.append(train(*arguments, **options))
        return runs[-1]

    monkeypatch.setattr(example, "load", lambda: [curves(1400, seed=0), curves(200, seed=1)])
    monkeypatch.setattr(example, "train", remember)
    picture = tmp_path / "picture.png"
    example.main(["--seeds", "1", "--epochs", "10", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "training on 1000 curves, validation on 400, test on 200" in printed
    assert "logistic regression, published" in printed
    for run in runs:
        validation = run.history["validation"]["accuracy"]
        assert len(validation) == 10
        assert run.best["value"] == max(validation)
    accuracy = next(float(line.split()[-1][:-1]) for line in printed.splitlines() if line.startswith("GRU, seed 0"))
    assert accuracy > 25  # chance is 10


@pytest.mark.parametrize(
    "options", [["--seeds", "0"], ["--epochs", "1"], ["--out", "/no/such/folder/a.png"], ["--out", "a.foo"]]
)
def test_bad_options_are_refused_before_training(example, options, capsys):
    with pytest.raises(SystemExit):
        example.main(options)
    assert options[0] in capsys.readouterr().err
