"""The translation example: its data share nothing, its pieces of words lose nothing, and a run in small works."""

import importlib.metadata
import json

import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def example(monkeypatch):
    module = load_example("translate")
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(module, "MERGES", 30)
    monkeypatch.setattr(module.seq2seq, "QUANTILES", (1.0,))  # fewer compilations
    return module


def messages():
    verbs = {"save": "enregistrer", "close": "fermer", "copy": "copier", "open": "ouvrir", "move": "déplacer"}
    things = {"cell": "la cellule", "file": "le fichier", "tab": "l'onglet", "window": "la fenêtre", "line": "la ligne"}
    return [(f"{v} {t}", f"{verbs[v]} {things[t]}") for v in verbs for t in things] + [
        (f"{v} {t} {n}", f"{verbs[v]} {things[t]} {n}") for v in verbs for t in things for n in range(3)
    ]


def test_pieces_put_together_are_the_text(example):
    texts = ["save the file...", 'use "%1" (or not)', "l'éditeur: déjà ouvert", "a-b"]
    pieces = example.Pieces(texts, 20)
    for text in [*texts, "never seen before!"]:
        assert example.text_of(pieces.cut(text)) == text
        assert "".join(pieces.cut(text)) == "".join(example.words_of(text))


def test_the_most_frequent_pair_is_merged_first(example):
    # "aab" three times and "ab" twice: ab is there five times, then aab three times.
    assert example.learn_merges({"aab": 3, "ab": 2}, 10) == [("a", "b"), ("a", "ab")]
    assert example.learn_merges({"aab": 1}, 10) == []
    # In a text the mark of the space is a neighbour too. Of equally frequent pairs the last in the alphabet is first:
    # (mark, a), (mark a, a), (mark aa, b), (mark a, b).
    pieces, mark = example.Pieces(["aab aab aab ab ab"], 10), example.SPACE
    assert pieces.cut("aab ab aaab") == [f"{mark}aab", f"{mark}ab", f"{mark}aa", "a", "b"]


def test_messages_of_the_same_words_are_in_one_part(example):
    pairs = [(f"{text}{mark}", str(i)) for i, (text, _) in enumerate(messages()) for mark in ("", "...", "?")]
    parts = example.split(pairs)
    assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    words = [{text.rstrip(".?") for text, _ in part} for part in parts]
    assert not words[0] & words[1]
    assert not words[0] & words[2]
    assert not words[1] & words[2]
    assert len(parts[0]) == 0.8 * len(pairs)


def test_what_is_read_of_a_language_pack(example, monkeypatch, tmp_path):
    content = {
        "": {"domain": "x"},
        "Save All": ["Tout  enregistrer"],
        "menu\x04Copy Cell": ["Copier la cellule", "Copier les cellules"],
        "NSIS": ["NSIS"],
        "Not yet": [""],
        "word " * 16: ["trop long"],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))

    class File:
        suffix, name = ".json", "a.json"
        locate = lambda self: tmp_path / "a.json"
        __lt__ = lambda self, other: False

    monkeypatch.setattr(example.importlib.metadata, "files", lambda name: [File()])
    assert example.load("fr-FR") == [("save all", "tout enregistrer"), ("copy cell", "copier la cellule")]


def test_the_package_has_the_messages(example):
    try:
        importlib.metadata.distribution("jupyterlab-language-pack-fr-FR")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the messages ship with jupyterlab-language-pack-fr-FR")
    pairs = example.load("fr-FR")
    assert len(pairs) > 2_500
    if importlib.metadata.version("jupyterlab-language-pack-fr-FR") == "4.5.post3":  # whose numbers the docstring has
        assert [len(part) for part in example.split(pairs)] == [2219, 280, 273]
    assert all(english and french and english != french for english, french in pairs)


def test_the_nearest_message(example):
    train = [("save all files", "A"), ("close the tab", "B"), ("", "C")]
    assert example.nearest(["save files", "close tabs", "zzz"], train) == ["A", "B", "A"]


@pytest.mark.slow
def test_a_run_in_small_prints_scores_and_samples_and_draws(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "load", lambda language: messages())
    picture = tmp_path / "picture.png"
    options = ["--steps", "5", "--hidden", "8", "--beam", "2", "--text", "Save Cell"]
    score = example.main([*options, "--out", str(picture)])
    assert 0 <= score <= 1
    assert picture.stat().st_size
    printed = capsys.readouterr().out
    baseline = next(line for line in printed.splitlines() if "most similar message" in line)
    assert float(baseline.split()[-2]) > 30
    assert "(should be: " in printed
    assert "'Save Cell': " in printed


def test_pairs_of_a_file(example, tmp_path, capsys):
    path = tmp_path / "mine.txt"
    lines = [f"Save cell {i}\tSichere  Zelle {i}\tfrom somewhere" for i in range(60)]
    path.write_text("\n".join([*lines, "", "save CELL 3\tanders", "word " * 16 + "\tzu lang"]))
    pairs = example.load_pairs(path, "utf-8-sig")
    assert pairs == [(f"save cell {i}", f"sichere zelle {i}") for i in range(60)]
    assert "left out 1 pairs of more than 15 words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a\tb\nno tab\n", "line 2: expected two texts with a tab between them, got 'no tab'"),
        (b"a\t \n", "line 1: expected two texts"),
        (b"a\tb\n", "at least 50 pairs of at most 15 words, got 1"),
        (b"caf\xe9\tb\n", "expected text in utf-8"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_used_is_named(example, tmp_path, content, match):
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"translate.py: .*mine.txt.*{match}"):
        example.main(["--pairs", str(tmp_path / "mine.txt")])


def test_a_language_that_is_not_installed_is_named(example):
    with pytest.raises(SystemExit, match=r"translate.py: .*pip install jupyterlab-language-pack-xx-XX"):
        example.main(["--language", "xx-XX"])
