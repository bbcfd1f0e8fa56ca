"""The heartbeat example: reading PhysioNet's files, finding beats, and a small run on a made-up record."""

import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")

EARLY = {40, 47, 55}  # beats


@pytest.fixture(scope="module")
def heartbeat():
    return load_example("heartbeat")


def made_up(beats=60, rate=360):
    """A signal in steps of 1/200 mV with a spike for each beat, of which some are early; and where they are."""
    gaps = np.where(np.isin(np.arange(beats), list(EARLY)), 0.5, 0.8)
    places = (np.cumsum(gaps) * rate).astype(int)
    time = np.arange(places[-1] + rate)
    signal = sum(
        200 * np.exp(-(((time - place) / 6) ** 2)) - 30 * np.exp(-(((time - place - 90) / 25) ** 2)) for place in places
    )
    return np.round(signal + np.random.default_rng(0).normal(size=len(time))).astype(int), places


def pack_212(a, b):
    a, b = a & 0xFFF, b & 0xFFF
    return np.stack([a & 255, (a >> 8) | (b >> 8 << 4), b & 255], axis=1).astype(np.uint8).tobytes()


def pack_annotations(samples, codes):
    """PhysioNet's format, with a remark, a change of rhythm and a long pause in it, as its files have them."""
    words, last = [], 0
    for sample, code in zip(samples, codes, strict=True):
        step = sample - last
        if step > 1023:
            words += [59 << 10, step >> 16, step & 0xFFFF]
            step = 0
        words += [(code << 10) | step, (63 << 10) | 3, 0x4E28, 0x0000]  # three bytes of text fill two words
        last = sample
    return np.array([*words, 0], "<u2").tobytes()


@pytest.fixture
def record(tmp_path):
    signal, places = made_up()
    (tmp_path / "7.dat").write_bytes(pack_212(signal + 1024, -signal))
    lines = ["7 2 360 0", "7.dat 212 200 11 1024 995 0 0 MLII", "7.dat 212 200 11 0 995 0 0 V5", "# made up"]
    (tmp_path / "7.hea").write_text("\n".join(lines))
    codes = [8 if beat in EARLY else 1 for beat in range(len(places))]
    (tmp_path / "7.atr").write_bytes(pack_annotations([18, *places], [28, *codes]))
    return tmp_path / "7"


def test_a_record_is_read(heartbeat, record):
    signal, places = made_up()
    millivolts, rate = heartbeat.read_signal(record.with_suffix(".hea"))
    assert rate == 360
    np.testing.assert_allclose(millivolts[: len(signal)], signal / 200)
    samples, codes = heartbeat.read_annotations(record.with_suffix(".atr").read_bytes())
    assert samples.tolist() == [18, *places]
    assert codes.tolist()[:3] == [28, 1, 1]
    loaded = heartbeat.load_record(record)
    np.testing.assert_array_equal(loaded.beats, places // 3)
    assert set(np.flatnonzero(loaded.abnormal)) == EARLY
    np.testing.assert_allclose(loaded.signal[:50], signal[:150].reshape(-1, 3).mean(1) / 200)


def test_a_header_with_the_zero_in_brackets_and_sixteen_bits(heartbeat, tmp_path):
    (tmp_path / "a.dat").write_bytes(np.array([10, 7, -20, 8], "<i2").tobytes())
    (tmp_path / "a.hea").write_text("a 2 128/1 2\na.dat 16 100(-5)/mV 16 0 0 0 0 I\na.dat 16 200 16 0 0 0 0 II\n")
    millivolts, rate = heartbeat.read_signal(tmp_path / "a.hea")
    assert rate == 128
    np.testing.assert_allclose(millivolts, [0.15, -0.15])
    (tmp_path / "a.hea").write_text("a 1 128 2\na.dat 80 100 16 0 0 0 0 I\n")
    with pytest.raises(ValueError, match="expected a signal in format 212 or 16, got 80"):
        heartbeat.read_signal(tmp_path / "a.hea")


def test_beats_are_found_where_they_are(heartbeat):
    signal, places = made_up()
    found = heartbeat.peaks(heartbeat.slow_down(signal / 200, 3))
    np.testing.assert_allclose(found, places // 3, atol=2)


def test_the_piece_that_ships_with_sktime(heartbeat):
    try:
        piece = heartbeat.load_piece()
    except ValueError as error:
        pytest.skip(str(error))
    assert len(piece.signal) == 2500
    assert (len(piece.beats), piece.abnormal.sum()) == (26, 1)


def test_a_missing_record_ends_with_one_line(heartbeat):
    with pytest.raises(SystemExit, match=r"heartbeat.py: .*none.hea"):
        heartbeat.main(["--record", "/no/such/none"])


def test_a_small_run_prints_and_draws(heartbeat, record, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(heartbeat, "WINDOW", 240)
    picture = tmp_path / "picture.png"
    heartbeat.main(["--record", str(record), "--steps", "60", "--hidden", "8", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert "sensitivity" in printed
    assert "area under the ROC" in printed
    assert picture.stat().st_size > 10_000
