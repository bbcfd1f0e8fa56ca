"""The reservoir example: its equation, its linear baselines, that the network runs on alone, and a small run."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("tqdm", reason="examples show a bar")

pytestmark = pytest.mark.usefixtures("quick_compilation")

needs_sunspots = pytest.mark.skipif(
    importlib.util.find_spec("statsmodels") is None, reason="the sunspots ship with statsmodels"
)


@pytest.fixture(scope="module")
def reservoir():
    return load_example("reservoir")


def test_the_equation_keeps_its_fixed_point_and_converges(reservoir):
    np.testing.assert_allclose(reservoir.mackey_glass(np.ones((171, 2)), 20), 1, atol=1e-12)
    coarse, fine = (
        reservoir.mackey_glass(1 + 0.3 * np.sin(np.linspace(-17, 0, points))[:, None], 60) for points in (171, 681)
    )
    assert np.ptp(fine) > 0.3
    np.testing.assert_allclose(coarse, fine, atol=1e-3)


def test_a_linear_forecast_goes_on_with_a_wave(reservoir):
    wave = np.sin(0.3 * np.arange(80))
    following = reservoir.linear_run_on(reservoir.linear(wave[:60], 2), wave[:60, None], 20)
    np.testing.assert_allclose(following[:, 0], wave[60:], atol=1e-9)


def test_each_output_is_the_next_input(reservoir):
    model = jrnn.stack(jrnn.echo_state(8, density=0.5), jrnn.dense(1))
    params = model.init(jax.random.key(0), 1)
    read = jnp.sin(jnp.arange(12.0)).reshape(6, 2, 1)
    got = reservoir.run_on(model, params, read, 3)
    state, ys = jrnn.unroll(model, params, read)
    y = ys[-1]
    for said in got:
        np.testing.assert_allclose(said, y[:, 0], rtol=1e-5)
        state, y = model.step(params, state, y)


@needs_sunspots
def test_autoregression_gives_the_published_figures(reservoir):
    years, spots = reservoir.load_sunspots()
    assert (years[0], years[-1], spots[0], spots[-1]) == (1700, 2008, 5, 2.9)
    forecast = reservoir.autoregression(years, spots, 9)
    found = [reservoir.arv(years, spots, forecast, period) for period in reservoir.YEARS.values()]
    np.testing.assert_allclose(found, reservoir.PUBLISHED_ARV["AR(9), published"], atol=0.001)


@needs_sunspots
def test_a_small_run_prints_and_draws(reservoir, monkeypatch, tmp_path, capsys):
    sizes = {"WASHOUT": 100, "TRAIN": 500, "READ": 100, "TESTS": 3, "DRAWN": 90, "SMALL": 10, "PENALTIES": (1.0,)}
    for name, value in {**sizes, "SETTINGS": [dict(input_scale=0.2, leak=0.7)]}.items():
        monkeypatch.setattr(reservoir, name, value)
    picture = tmp_path / "picture.png"
    reservoir.main(["--units", "40", "--reservoirs", "1", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert "NRMSE84" in printed
    assert "best on 1880 to 1920: input_scale 0.2, leak 0.7" in printed
    assert picture.stat().st_size > 10_000


def test_bad_options_are_refused(reservoir, capsys):
    with pytest.raises(SystemExit):
        reservoir.main(["--units", "2"])
    assert "--units" in capsys.readouterr().err
