"""The faults example: reading the archives' files, pieces of series, the held-out part, and a small run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def faults():
    return load_example("faults")


def test_files_of_the_archives(faults, tmp_path):
    path = tmp_path / "a.ts"
    path.write_text("# a comment\n@problemName A\n@data\n1,2,3:4,5,6:no\n\n7,8:9,1:yes\n")
    series, labels = faults.read_ts(path)
    assert labels.tolist() == ["no", "yes"]
    assert [values.tolist() for values in series] == [[[1, 4], [2, 5], [3, 6]], [[7, 9], [8, 1]]]


SERIES = "".join(f"{i},{i + 1},2:3,4,{i % 5}:{('no', 'yes')[i % 2]}\n" for i in range(12))


def test_series_of_ones_own(faults, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(faults, "UNITS", 2)
    (tmp_path / "GunPoint.ts").write_text(SERIES)  # the name of a set, whose published results say nothing of these
    (tmp_path / "b.ts").write_text("@data\n" + SERIES)
    files = ["--train", str(tmp_path / "GunPoint.ts"), "--test", str(tmp_path / "b.ts")]
    results = faults.main([*files, "--runs", "1", "--steps", "2", "--out", str(tmp_path / "picture.png")])
    assert results["GunPoint"].shape == (1,)
    printed = capsys.readouterr().out
    assert "published" not in printed
    assert "99.1" not in printed


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        ("@data\n", SERIES, "a.ts: expected series"),
        ("1,2:a\n1,x:b\n", SERIES, r"a.ts, line 2: expected channels .* '1,x:b'"),
        ("1,2:3:a\n", SERIES, "a.ts, line 1: expected channels of equally many"),
        ("1,?:a\n", SERIES, "a.ts, line 1"),
        ("label\n", SERIES, "a.ts, line 1"),
        ("1,2:3,4:a\n", SERIES, "at least two labels"),
        (SERIES, SERIES.replace("yes", "perhaps"), r"b.ts: expected the labels of .*a.ts, got perhaps too"),
        (SERIES, "1,2:no\n", "equally many channels"),
    ],
)
def test_series_that_cannot_be_used_are_named(faults, tmp_path, train, test, match):
    (tmp_path / "a.ts").write_text(train)
    (tmp_path / "b.ts").write_text(test)
    with pytest.raises(SystemExit, match=rf"faults.py: .*{match}"):
        faults.main(["--train", str(tmp_path / "a.ts"), "--test", str(tmp_path / "b.ts")])


def test_both_files_are_needed(faults, tmp_path, capsys):
    with pytest.raises(SystemExit):
        faults.main(["--train", "a.ts"])
    assert "--train and --test together" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"faults.py: .*absent.ts"):
        faults.main(["--train", str(tmp_path / "absent.ts"), "--test", "b.ts"])


def test_pieces_of_a_series(faults):
    (piece,) = faults.pieces([np.array([[1, 10], [2, 20], [3, 30]], np.float32)], 2)
    assert piece.tolist() == [[1, 10, 2, 20], [3, 30, 3, 30]]
    (same,) = faults.pieces([np.ones((5, 3), np.float32)], 1)
    assert same.shape == (5, 3)


def test_a_third_of_each_class_is_held_out(faults):
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1])
    (kept, kept_labels), (held, held_labels) = faults.held_out([np.full((2, 1), i) for i in range(9)], labels)
    assert np.bincount(kept_labels).tolist() == [2, 4]
    assert np.bincount(held_labels).tolist() == [1, 2]
    assert [int(values[0, 0]) for values in held] == [2, 5, 8]
    assert len(kept) == 6


def test_padding_changes_no_vote(faults):
    model = faults.network(3)
    params = model.init(jax.random.key(0), 2)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 2)), jnp.float32)
    together = faults.votes(model, params, xs.at[4:, 0].set(jnp.nan), jnp.array([4, 6]))
    np.testing.assert_allclose(together[0], faults.votes(model, params, xs[:4, :1], jnp.array([4]))[0], rtol=1e-5)


def test_a_missing_package_is_named_with_its_command(faults, monkeypatch):
    monkeypatch.setitem(faults.SETS, "Trace", faults.SETS["Trace"]._replace(packages=("no-such-package",)))
    with pytest.raises(SystemExit, match=r"Trace: .* no-such-package; pip install --no-deps no-such-package"):
        faults.main(["--sets", "Trace"])


def test_a_small_run_prints_a_table_and_draws(faults, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(faults, "UNITS", 4)
    monkeypatch.setattr(faults, "MOST_STEPS", 15)
    picture = tmp_path / "picture.png"
    arguments = ["--sets", "JapaneseVowels", "--runs", "2", "--steps", "40", "--out", str(picture)]
    results = faults.main(arguments)
    assert results["JapaneseVowels"].shape == (2,)
    assert results["JapaneseVowels"].min() > 15  # chance is 11
    printed = capsys.readouterr().out
    assert "99.2 (0.3)" in printed
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["Trace", "GunPoint", "ArrowHead", "ItalyPowerDemand", "OSULeaf", "Coffee"])
def test_sets_that_are_installed_have_their_sizes(faults, name):
    sizes = {
        "Trace": (100, 100, 275, 4),
        "GunPoint": (50, 150, 150, 2),
        "ArrowHead": (36, 175, 251, 3),
        "ItalyPowerDemand": (67, 1029, 24, 2),
        "OSULeaf": (200, 242, 427, 6),
        "Coffee": (28, 28, 286, 2),
    }
    try:
        (series, labels), (held, held_labels) = faults.load(name)
    except ValueError as error:
        pytest.skip(str(error))
    assert (len(series), len(held), len(series[0]), len(np.unique(labels))) == sizes[name]
    assert len(labels) == len(series)
    assert set(held_labels) == set(labels) == set(range(sizes[name][3]))
