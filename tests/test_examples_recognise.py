"""The recogniser of spoken digits: its features and noise on tones, CTC on a made-up language, and, where eSpeak NG is
installed, what it says."""

import sys

import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("tqdm", reason="examples show a bar")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def speech():
    return load_example("speech")


def tone(hertz, seconds=0.5, sample_rate=22_050):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * sample_rate)) / sample_rate).astype(np.float32)


def test_a_tone_is_loudest_in_its_band(speech):
    filters = speech.mel_filters(22_050)
    assert filters.shape == (257, speech.FEATURES)
    assert (filters.max(axis=0) > 0.5).all()
    mel = 2595 * np.log10(1 + np.array([80, 8000, 1000]) / 700)
    band = (mel[2] - mel[0]) / (mel[1] - mel[0]) * (speech.FEATURES + 1) - 1
    features = speech.log_mel(np.concatenate([tone(1000), tone(4000)]), filters)
    first = features[: len(features) // 2 - 1, : speech.FEATURES].mean(axis=0)
    assert abs(first.argmax() - band) < 1
    np.testing.assert_allclose(features.reshape(-1, speech.FEATURES).mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("loudness", [0, 20])
def test_noise_is_as_loud_as_was_asked(speech, loudness):
    samples = tone(500)
    noise = speech.add_noise(np.random.default_rng(0), samples, loudness) - samples
    assert 10 * np.log10(np.mean(samples**2) / np.mean(noise**2)) == pytest.approx(loudness, abs=1e-2)


def test_voices_of_the_test_are_others(speech):
    assert len(set(speech.VOICES)) == 40
    assert len(set(speech.TEST_VOICES)) == 10
    assert not set(speech.VOICES) & set(speech.TEST_VOICES)


def test_errors(speech):
    assert speech.errors(["123", "45"], ["123", "456"]) == (pytest.approx(100 / 6), 50)


class Tones:
    """A speaker for whom each digit is a tone, so that the whole example runs without a synthesiser."""

    sample_rate = 22_050

    def speak(self, text, accent, voice, words_a_minute, pitch):
        words = load_example("speech").WORDS
        silence = np.zeros(1500, np.float32)
        pieces = [np.append(tone(300 * 1.25 ** words.index(word), 0.12), silence) for word in text.split()]
        return np.concatenate(pieces)


@pytest.mark.slow
def test_a_short_run_learns_the_tones_and_draws(speech, monkeypatch, tmp_path, capsys):
    for name, value in {"Synthesiser": Tones, "BATCH": 16, "PADDED": (1.0,)}.items():
        monkeypatch.setattr(speech, name, value)
    picture = tmp_path / "picture.png"
    options = ["--utterances", "64", "--tests", "8", "--hidden", "16", "--epochs", "70", "--beam", "3"]
    error = speech.main([*options, "--out", str(picture)])
    printed = capsys.readouterr().out
    assert error < 80  # of the noisiest test; all would be wrong if CTC said blanks only, as it does at first
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "new voices, 0 dB" in printed


def test_espeak_says_the_digits(speech):
    pytest.importorskip("espeakng_loader", reason="the package espeakng-loader brings eSpeak NG")
    synthesiser = speech.Synthesiser()
    for i, voice in enumerate((*speech.VOICES, *speech.TEST_VOICES)):
        samples = synthesiser.speak("seven", speech.ACCENTS[i % len(speech.ACCENTS)], voice, 170, 50)
        assert 0.1 < len(samples) / synthesiser.sample_rate < 2
        assert 0.05 < np.abs(samples).max() <= 1
    high, low = (synthesiser.speak("seven", "en", voice, 170, 50) for voice in ("f4", "m4"))
    assert len(high) != len(low) or np.abs(high - low).max() > 0.1
    slow, fast = (synthesiser.speak("seven one", "en", "m4", speed, 50) for speed in (130, 220))
    assert len(slow) > 1.2 * len(fast)
    features, strings = speech.utterances(synthesiser, speech.TEST_VOICES, 3, 0)
    again = speech.utterances(synthesiser, speech.TEST_VOICES, 3, 0)
    assert strings == again[1]
    assert all(len(xs) > 2 * len(string) for xs, string in zip(features, strings, strict=True))  # CTC has room
    with pytest.raises(ValueError, match="no voice xx-nosuch"):
        synthesiser.speak("one", "xx-nosuch", "m4", 170, 50)


def test_without_the_package_the_command_is_named(speech, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SystemExit, match=r'pip install -e "\.\[examples,speech\]"'):
        speech.main([])
