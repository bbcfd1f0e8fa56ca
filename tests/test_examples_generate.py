"""The character model: its streams, its text, its options, and a whole run on a small text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def example(monkeypatch):
    module = load_example("generate")
    for name, value in {"STREAMS": 4, "PIECE": 8, "TEST_STREAMS": 2, "FEWEST": 100}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_targets_are_the_next_characters(example):
    xs, ys = example.streams(np.arange(26), 4)
    assert xs.shape == ys.shape == (6, 4)
    np.testing.assert_array_equal(ys, xs + 1)
    np.testing.assert_array_equal(xs[:, 1], np.arange(6, 12))


def test_characters_that_were_not_trained_on_are_one(example):
    alphabet = example.Alphabet("banana")
    assert alphabet.decode(alphabet.encode("ban")) == "ban"
    assert alphabet.encode("xyz").tolist() == [example.UNKNOWN] * 3


def test_new_text_is_what_the_model_says_step_by_step(example):
    model = example.network(5, 6, 1)
    params = jax.tree.map(lambda a: 3 * a, model.init(jax.random.key(0), None))
    prompt = jnp.array([1, 2, 3])
    got = example.continued(model, params, prompt, 4, 0.0, None, None, jax.random.key(1))
    state = model.initial_state(params, ())
    for token in prompt[:-1]:
        state, _ = model.step(params, state, token)
    token = prompt[-1]
    for chosen in got:
        state, logits = model.step(params, state, token)
        token = jnp.argmax(logits)
        assert int(chosen) == int(token)


def test_a_run_on_a_file_learns_and_draws(example, tmp_path, capsys):
    text, picture = tmp_path / "mine.txt", tmp_path / "picture.png"
    text.write_text("a rose is a rose is a rose. " * 60)
    options = ["--text", str(text), "--steps", "60", "--hidden", "16", "--length", "20", "--prompt", "rose"]
    bits = example.main([*options, "--out", str(picture), "--top-k", "3", "--top-p", "0.9"])
    assert bits < 3.0  # ten characters in equal shares would take 3.3
    assert picture.stat().st_size
    out = capsys.readouterr().out
    assert "bits per character on the test text" in out
    assert "gzip" in out


@pytest.mark.parametrize(
    ("content", "match"), [(b"too short", "expected at least 100 characters"), ("é".encode("latin-1"), "utf-8")]
)
def test_a_file_that_cannot_be_used_is_named(example, tmp_path, content, match):
    text = tmp_path / "mine.txt"
    text.write_bytes(content)
    with pytest.raises(SystemExit, match=match):
        example.main(["--text", str(text)])


@pytest.mark.parametrize("option", ["--steps", "--hidden", "--layers", "--length", "--top-k", "--top-p"])
def test_an_option_of_zero_is_refused_before_training(example, option, capsys):
    with pytest.raises(SystemExit):
        example.main([option, "0"])
    assert option in capsys.readouterr().err.splitlines()[-1]
