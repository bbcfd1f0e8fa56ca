"""The traffic example: what its parts know of each other, that each hour counts once, and small runs."""

import importlib.util

import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def traffic():
    return load_example("traffic")


@pytest.fixture(scope="module")
def series(traffic):
    return traffic.load_traffic()


@pytest.fixture(scope="module")
def problem(traffic, series):
    return traffic.Problem(series)


def short(series, steps=2500):
    """The first steps of a series."""
    fields = ("time", "values", "known", "rhythm", "calendar")
    return series._replace(**{name: getattr(series, name)[:steps] for name in fields}, shown=100)


def test_the_data_are_those_of_the_archive(series):
    counted = np.isfinite(series.values)
    assert counted.sum() == 40_575
    assert (str(series.time[0]), str(series.time[-1])) == ("2012-10-02T09", "2018-09-30T23")
    assert (series.values[0], series.values[1], series.values[-1]) == (5545, 4516, 954)
    assert series.rhythm[0] == 24 + 9  # a Tuesday at nine
    assert np.isfinite(series.known).all()
    holidays = np.unique(series.time[series.calendar[:, 0]].astype("datetime64[D]"))
    assert np.datetime64("2013-12-25") in holidays
    assert len(holidays) == 53


def test_the_hour_of_week_mean_is_as_good_as_it_is_said_to_be(problem):
    test = slice(*problem.parts["test"])
    error = np.nanmean((problem.usual[test] - problem.truth[test]) ** 2)
    np.testing.assert_allclose(error, 0.0503, atol=0.0002)


def test_what_lies_before_the_test_knows_nothing_of_it(traffic, series, problem):
    begin = problem.parts["test"][0]
    changed = series.values.copy()
    changed[begin:] *= 3
    other = traffic.Problem(series._replace(values=changed))
    assert (other.mean, other.deviation) == (problem.mean, problem.deviation)
    np.testing.assert_array_equal(other.inputs[:begin], problem.inputs[:begin])
    for part in ("training", "validation"):
        (xs, targets, mask, steps), expected = other.sequences(part, 500), problem.sequences(part, 500)
        np.testing.assert_array_equal(mask, expected[2])
        np.testing.assert_array_equal(targets[mask], expected[1][mask])
        # Beyond the end of a part a sequence is read, but nothing that is forecast there counts.
        np.testing.assert_array_equal(xs[steps < begin], expected[0][steps < begin])
        assert not mask[steps >= begin].any()


def test_targets_are_the_departures_to_come(problem, series):
    xs, targets, mask, steps = problem.sequences("training", 5000)
    for h, horizon in enumerate(series.horizons):
        at = steps[mask[..., h]] + horizon
        np.testing.assert_allclose(
            targets[mask[..., h], h], problem.truth[at] - problem.usual[at], rtol=1e-5, atol=1e-6
        )
        assert at.max() < problem.parts["training"][1]
    np.testing.assert_array_equal(xs, problem.inputs[steps])
    assert not mask[: series.warm_up].any()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_each_hour_is_forecast_once(problem, series, part):
    begin, end = problem.parts[part]
    _, _, mask, steps = problem.sequences(part)
    wanted = begin + np.flatnonzero(np.isfinite(series.values[begin:end]))
    for h, horizon in enumerate(series.horizons):
        np.testing.assert_array_equal(np.sort(steps[mask[..., h]] + horizon), wanted)


def test_gaps_are_masked_and_read_as_usual(problem, series):
    gap = np.flatnonzero(np.isnan(series.values))
    assert not problem.inputs[gap, :2].any()  # no departure, not observed
    assert not problem.target_observed[gap - 1, 0].any()


def test_a_small_run_prints_and_draws(traffic, series, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(traffic, "load_traffic", lambda: short(series))
    picture = tmp_path / "picture.png"
    errors = traffic.main(["--hidden", "4", "--epochs", "3", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert "share of the truth within the interval" in printed
    assert picture.stat().st_size > 10_000
    assert np.isfinite(list(errors.values())).all()
    assert errors["network, median"][0] < errors["persistence"][2]


@pytest.mark.skipif(importlib.util.find_spec("vega_datasets") is None, reason="it ships with vega_datasets")
def test_a_small_run_on_the_weather(traffic, tmp_path):
    errors = traffic.main(
        ["--data", "weather", "--hidden", "2", "--epochs", "1", "--out", str(tmp_path / "picture.png")]
    )
    assert np.isfinite(list(errors.values())).all()
    np.testing.assert_allclose(errors["climatology"], errors["climatology"][0])
