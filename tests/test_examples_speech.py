"""The speakers example: its data, that padding changes nothing, that several networks train as one would."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("tqdm", reason="examples show a bar")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "speakers.py"


@pytest.fixture
def speakers(monkeypatch):
    spec = importlib.util.spec_from_file_location("example_speakers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = jrnn.stack(jrnn.bidirectional(jrnn.gru(4)), jrnn.dropout(0.5), jrnn.dense(module.SPEAKERS))
    monkeypatch.setattr(module, "MODEL", small)  # the same kind of network, in a fraction of the time
    return module


def test_the_data_are_those_of_the_archive(speakers):
    utterances, labels = speakers.load()
    lengths = np.array([len(utterance) for utterance in utterances])
    assert lengths.sum() == 9961
    assert (lengths.min(), lengths.max()) == (7, 29)
    assert {utterance.shape[1] for utterance in utterances} == {12}
    assert np.bincount(labels[:270]).tolist() == [30] * 9
    assert np.bincount(labels[270:]).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert (np.diff(labels[:270]) >= 0).all()  # which --validate relies on
    # The first frame of the archive's file, as it is printed there.
    np.testing.assert_allclose(utterances[0][0, :4], [1.860936, -0.207383, 0.261557, -0.214562], rtol=1e-6)


def test_padding_and_neighbours_do_not_change_a_vote(speakers):
    params = speakers.MODEL.init(jax.random.key(0), 12)
    xs, lengths = jrnn.sequence.pad(speakers.load()[0][:3])
    together = speakers.votes(params, xs.at[lengths[1] :, 1].set(jnp.nan), lengths)
    alone = speakers.votes(params, xs[: lengths[1], 1:2], lengths[1:2])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-6)


def test_networks_trained_at_once_are_those_trained_alone(speakers):
    utterances, labels = speakers.load()
    xs, lengths = jrnn.sequence.pad(utterances[:270:3], 29)
    arguments = xs, lengths, jnp.asarray(labels[:270:3])
    both, first = speakers.train(*arguments, seeds=2, epochs=3), speakers.train(*arguments, seeds=1, epochs=3)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-3, atol=1e-4)
        assert np.abs(a[1] - a[0]).max() > 1e-2 or not a.any()


@pytest.mark.parametrize("options", [[], ["--validate"]])
def test_a_quick_run_prints_and_draws(speakers, options, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    speakers.main(["--quick", "--out", str(picture), *options])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "seed 1:" in printed
    assert "echo state network, published" in printed
    assert ("validation on 90" if options else "test on 370") in printed


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--epochs", "2"], ["--out", "/no/such/folder/a.png"]])
def test_bad_options_are_refused_before_training(speakers, options, capsys):
    with pytest.raises(SystemExit):
        speakers.main(options)
    assert options[0] in capsys.readouterr().err
