"""The speakers example: its data, that padding changes nothing, what it trains and tests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("tqdm", reason="examples show a bar")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def speakers(monkeypatch):
    module = load_example("speakers")
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


def test_a_quick_run_trains_each_network_and_draws(speakers, monkeypatch, tmp_path, capsys):
    trained, train = [], speakers.train
    monkeypatch.setattr(speakers, "train", lambda *arguments: trained.append(train(*arguments)) or trained[0])
    picture = tmp_path / "picture.png"
    speakers.main(["--quick", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "training on 270 utterances of 9 speakers, test on 370" in printed
    assert "seed 1:" in printed
    assert "echo state network, published" in printed
    accuracies = [float(line.split()[2][:-1]) for line in printed.splitlines() if line.startswith("seed")]
    assert min(accuracies) > 15  # after six epochs of four units; chance is 11
    recurrent = trained[0][0]["forward"]["w_hh"]
    assert recurrent.shape == (2, 4, 12)
    assert np.abs(recurrent[0] - recurrent[1]).max() > 0.1  # two seeds, two networks


def test_validation_leaves_the_test_part_alone(speakers, monkeypatch, tmp_path, capsys):
    """Test utterances of NaN would show, in a mean or in an accuracy."""
    utterances, labels = speakers.load()
    monkeypatch.setattr(speakers, "load", lambda: ([*utterances[:270], *([np.full((7, 12), np.nan)] * 370)], labels))
    seen = []

    def untrained(xs, lengths, labels, seeds, epochs):
        seen.extend([xs, lengths, labels])
        return jax.vmap(lambda seed: speakers.MODEL.init(jax.random.key(seed), 12))(jnp.arange(seeds))

    monkeypatch.setattr(speakers, "train", untrained)
    speakers.main(["--validate", "--seeds", "1", "--out", str(tmp_path / "picture.png")])
    xs, lengths, speaker = seen
    assert "validation on 90" in capsys.readouterr().out
    assert np.bincount(speaker).tolist() == [20] * 9
    valid = np.arange(xs.shape[0])[:, None] < lengths
    np.testing.assert_allclose(np.asarray(xs)[valid].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(xs)[valid].std(0), 1, atol=1e-4)


@pytest.mark.parametrize(
    "options", [["--seeds", "0"], ["--epochs", "2"], ["--out", "/no/such/folder/a.png"], ["--out", "a.foo"]]
)
def test_bad_options_are_refused_before_training(speakers, options, capsys):
    with pytest.raises(SystemExit):
        speakers.main(options)
    assert options[0] in capsys.readouterr().err
