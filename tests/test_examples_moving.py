"""The moving digits: how they move, patches, what the network may see, and a whole short run."""

import jax
import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("tqdm", reason="examples show a bar")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def moving(monkeypatch):
    module = load_example("moving_digits")
    for name, value in {"GIVEN": 3, "FOLLOWING": 2, "BATCH": 4, "TEST_FILMS": 8}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_the_data_are_those_of_the_archive(moving):
    images = moving.load()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    np.testing.assert_array_equal(16 * images[0, 0], [0, 0, 5, 13, 9, 1, 0, 0])
    np.testing.assert_array_equal(16 * images[0, -1], [0, 0, 6, 13, 10, 0, 0, 0])


def test_digits_stay_in_the_field_and_move_evenly(moving):
    corners, straight = moving.places(np.random.default_rng(0), 50, 2)
    assert corners.shape == straight.shape == (5, 50, 2, 2)
    for path in (corners, straight):
        assert path.min() >= 0
        assert path.max() <= moving.SIZE - moving.SIDE
    speed = np.diff(corners, axis=0)
    turned = np.sign(speed[1:]) * np.sign(speed[:-1]) < 1  # at a wall, where a step may be shorter
    np.testing.assert_array_equal(np.abs(speed[1:])[~turned], np.abs(speed[:-1])[~turned])
    np.testing.assert_array_equal(corners[: moving.GIVEN], straight[: moving.GIVEN])
    assert (corners != straight).any()


def test_a_frame_is_its_digits(moving):
    images = np.ones((1, 2, 8, 8), np.float32) * np.array([0.25, 0.5], np.float32)[:, None, None]
    (frame,) = moving.draw(images, np.array([[[[0, 0], [4, 1]]]]))[:, 0]
    assert frame.shape == (16, 16)
    assert frame[0, 0] == 0.25
    assert frame[4, 1] == frame[7, 7] == frame[11, 8] == 0.5
    assert frame[4, 0] == 0.25
    assert frame.sum() == 64 * 0.5 + (64 - 4 * 7) * 0.25


def test_patches_are_undone(moving):
    frames = np.random.default_rng(0).random((3, 2, 16, 16))
    maps = moving.to_patches(frames)
    assert maps.shape == (3, 2, 8, 8, 4)
    np.testing.assert_array_equal(maps[0, 0, 1, 2], frames[0, 0, 2:4, 4:6].ravel())
    np.testing.assert_array_equal(moving.to_frames(maps), frames)


def test_a_forecast_is_the_network_fed_with_its_own_frames(moving):
    forecaster = moving.Forecaster(3)
    params = forecaster.init(jax.random.key(0))
    films = np.random.default_rng(0).random((5, 2, 16, 16)).astype(np.float32)
    got = forecaster.forecast(params, films)
    np.testing.assert_array_equal(got, forecaster.forecast(params, films * (np.arange(5) < 3)[:, None, None, None]))
    state = forecaster.cells.initial_state(params["cells"], (2,))
    frame = None
    for t in range(4):
        seen = moving.to_patches(films[t]) if t < 3 else frame
        state, h = forecaster.cells.step(params["cells"], state, seen)
        frame = jax.nn.sigmoid(h @ params["pen"]["w"] + params["pen"]["b"])
        if t >= 2:
            np.testing.assert_allclose(got[t - 2], moving.to_frames(frame), rtol=1e-4, atol=1e-5)


def test_a_short_run_learns_and_draws(moving, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    error = moving.main(["--digits", "1", "--features", "6", "--steps", "30", "--out", str(picture)])
    assert error < 0.22  # it begins with gray, 0.25: thirty steps learn that most of the field is empty
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in printed.splitlines() if "  " in line][-3:] == [
        "ConvLSTM", "straight on", "last frame"
    ]  # fmt: skip


@pytest.mark.parametrize("options", [["--digits", "0"], ["--steps", "-1"]])
def test_bad_options_are_refused(moving, options, capsys):
    with pytest.raises(SystemExit):
        moving.main(options)
    assert options[0] in capsys.readouterr().err
