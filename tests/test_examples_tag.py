"""The tagger: what it reads of a treebank, its features, its baselines, and a whole run on a small treebank."""

import importlib.metadata
import importlib.util

import jax
import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("tqdm", reason="examples show a bar")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SENTENCE = """# text = Evi gördü.
1-2\tEvi\t_\t_\t_\t_\t_\t_\t_\t_
1\tEvi\tev\tNOUN\tNN\t_\t2\tdobj\t_\t_
2\tgördü\tgör\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
3\t.\t.\tPUNCT\t.\t_\t2\tp\t_\t_
"""


@pytest.fixture
def tag():
    return load_example("tag")


def test_a_treebank_is_read(tag):
    wanted = [[("Evi", "NOUN", False), ("gördü", "VERB", True), (".", "PUNCT", False)]]
    assert tag.read_conllu(SENTENCE + "\n\n", tag.COARSE) == wanted
    assert tag.read_conllu(SENTENCE.replace("\n", "\r\n"), tag.FINE)[0][1] == ("gördü", "VB", True)


def test_features_tell_how_a_word_ends_and_is_written(tag):
    first, second, third = tag.features_of(tag.read_conllu(SENTENCE, tag.COARSE)[0])
    assert first == [
        "word evi", "ending i", "ending vi", "ending evi", "ending evi", "beginning evi", "written 10100"
    ]  # fmt: skip
    assert second[-1] == "written 00101"
    assert third[-1] == "written 00010"
    assert tag.lower("IRAK İZMİR") == "\N{LATIN SMALL LETTER DOTLESS I}rak izmir"


def test_most_frequent_tags(tag):
    sentences = [[(word, t, False) for word, t in [("a", "X"), ("a", "X"), ("a", "Y"), ("bla", "Z"), ("cla", "Z")]]]
    assert [tag.most_frequent(sentences, 0)(word) for word in ("A", "bla", "dla")] == ["X", "Z", "X"]
    assert [tag.most_frequent(sentences, 4)(word) for word in ("a", "bla", "dla", "q")] == ["X", "Z", "Z", "X"]


def test_padding_and_neighbours_do_not_change_what_is_said(tag):
    vocabulary = tag.Vocabulary(tag.read_conllu(SENTENCE, tag.COARSE) * 2)
    tagger = tag.Tagger(vocabulary, 3)
    ids = vocabulary.encode(tag.read_conllu(SENTENCE, tag.COARSE)[0])
    params = tagger.init(jax.random.key(0), ids.shape[1])
    (both, lengths), _ = tag.make_batch([(ids, np.zeros(3, np.int32)), (ids[:2], np.zeros(2, np.int32))])
    together = tagger.logits(params, both, lengths)
    alone = tagger.logits(params, ids[:2, None], np.array([2]))
    np.testing.assert_allclose(together[:2, 1], alone[:, 0], rtol=1e-5, atol=1e-6)


def test_a_run_on_a_file_learns_and_draws(tag, monkeypatch, tmp_path, capsys):
    """A language where the class of a word turns on the word after it alone."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(160):
        words = rng.choice(["da", "de", "li", "lu"], size=rng.integers(2, 6)).tolist()
        tags = [word[0] for word in [*words[1:], "x"]]
        rows = [f"{n}\t{w}\t_\t{t}\t{t}\t_\t0\t_\t_\t_" for n, (w, t) in enumerate(zip(words, tags, strict=True), 1)]
        lines += [f"# sentence {i}", *rows, ""]
    treebank, picture = tmp_path / "mine.conllu", tmp_path / "picture.png"
    treebank.write_text("\n".join(lines))
    for name, value in {"BATCH": 16, "PADDED": (1.0,)}.items():
        monkeypatch.setattr(tag, name, value)
    options = ["--conllu", str(treebank), "--hidden", "16", "--epochs", "10", "--out", str(picture)]
    options += ["--checkpoint", str(tmp_path / "run")] if importlib.util.find_spec("orbax.checkpoint") else []
    accuracy = tag.main(options)
    assert accuracy > 0.7  # the most frequent tag of a word is right in less than 60%
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    baseline = float(next(line for line in printed.splitlines() if "frequent" in line).split()[3])
    assert baseline < 60
    assert "16 sentences" in printed


@pytest.mark.parametrize(
    ("content", "match"),
    [(SENTENCE, "at least 50 sentences"), ("a b c\n", "ten columns"), ("é", "expected text in ascii")],
)
def test_a_file_that_cannot_be_used_is_named(tag, tmp_path, content, match):
    treebank = tmp_path / "mine.conllu"
    treebank.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=match):
        tag.main(["--conllu", str(treebank), "--encoding", "ascii" if content == "é" else "utf-8"])


def test_the_treebank_is_the_one_that_was_published(tag):
    try:
        importlib.metadata.version("turkish-treebanks")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package turkish-treebanks")
    parts = tag.load_treebank(tag.COARSE)
    assert [len(part) for part in parts] == [3881, 485, 485]
    assert sum(len(sentence) for part in parts for sentence in part) == 81_370
    assert [word for word, _, _ in parts[0][0][:3]] == ["Burda", "da", "öylemi"]
