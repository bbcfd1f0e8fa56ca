"""The memory example: its tasks are what they say, chance is what it says, every cell fits, and a small run."""

import jax
import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 12


@pytest.fixture(scope="module")
def memory():
    return load_example("memory")


def test_the_sum_is_that_of_the_two_marked_numbers(memory):
    task = memory.adding(LENGTH)
    xs, sums = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 2000)
    values, marks = np.moveaxis(np.asarray(xs), -1, 0)
    for half in (marks[: LENGTH // 2], marks[LENGTH // 2 :]):
        np.testing.assert_array_equal(half.sum(0), 1)
        assert half.any(1).all()
    np.testing.assert_allclose(sums, (values * marks).sum(0), rtol=1e-6)
    ones = np.ones((LENGTH, 2000, 1), np.float32)
    np.testing.assert_allclose(task.loss(ones, sums), task.chance, rtol=0.1)


def test_the_copy_comes_after_the_sign_and_chance_is_blanks_and_guesses(memory):
    task = memory.copying(LENGTH)
    xs, ids = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 50)
    shown, wanted = np.asarray(xs).argmax(-1), np.asarray(ids)
    copied, blank, sign = memory.COPIED, memory.SYMBOLS, memory.SYMBOLS + 1
    assert shown.shape == wanted.shape == (LENGTH + 2 * copied, 50)
    np.testing.assert_array_equal(wanted[-copied:], shown[:copied])
    assert set(shown[:copied].ravel()) == set(range(memory.SYMBOLS))
    np.testing.assert_array_equal(wanted[:-copied], blank)
    assert (shown == sign).sum(0).tolist() == [1] * 50
    np.testing.assert_array_equal(shown[-copied - 1], sign)
    guesses = np.zeros((*ids.shape, task.outputs), np.float32)
    guesses[-copied:, :, blank] = guesses[:-copied, :, :blank] = -1e3
    np.testing.assert_allclose(task.loss(guesses, ids), task.chance, rtol=1e-5)


def test_every_cell_fits_into_the_network(memory):
    for name in memory.CELLS:
        model = memory.network(name, 8, 1)
        params = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), 2))
        run = lambda params, model=model: jrnn.unroll(model, params, np.ones((3, 2, 2), np.float32))[1]
        assert jax.eval_shape(run, params).shape == (3, 2, 1)


def test_a_quick_run_learns_prints_and_draws(memory, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "ROUNDS", 3)
    monkeypatch.setattr(memory, "TESTS", 32)
    picture = tmp_path / "picture.png"
    options = ["--cells", "min_gru", "--hidden", "8", "--steps", "30", "--learning-rate", "0.01"]
    memory.main(["--quick", "--length", "6", *options, "--out", str(picture)])
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("  min_gru"))
    assert float(row[2]) < 0.5  # 1.2 for the answer 0
    assert "no memory                                 0.1667" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [["--steps", "3"], ["--cells", "perceptron"], ["--length", "0"]])
def test_bad_options_are_refused(memory, options, capsys):
    with pytest.raises(SystemExit):
        memory.main(options)
    assert options[0] in capsys.readouterr().err.splitlines()[-1]
