"""The forecast example: its features see no future, its scaling no test day, and its CSV errors say where."""

import importlib.util
import pathlib

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "forecast.py"


@pytest.fixture(scope="module")
def forecast():
    spec = importlib.util.spec_from_file_location("example_forecast", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_walk(days=300, seed=0):
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, days)))
    start = close * np.exp(rng.normal(0, 0.005, days))
    high, low = np.maximum(close, start) * 1.002, np.minimum(close, start) * 0.998
    return {"open": start, "high": high, "low": low, "close": close, "volume": rng.uniform(1e6, 2e6, days)}


def csv_lines(table, header="Date,Open,High,Low,Close,Volume"):
    days = np.datetime64("2020-01-01") + np.arange(len(table["close"]))
    columns = [table[name] for name in ("open", "high", "low", "close", "volume")]
    return [header] + [",".join(map(str, row)) for row in zip(days, *columns, strict=True)]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_features_against_their_definitions(forecast):
    table = random_walk()
    features, close, t = forecast.make_features(table), table["close"], 123
    change = np.diff(np.log(close))[t - 14 : t]  # the 14 changes that end on day t
    last20 = close[t - 19 : t + 1]
    expected = [
        np.log(close[t] / close[t - 1]),
        np.log(close[t] / table["open"][t]),
        np.log(table["high"][t] / table["low"][t]),
        np.log(close[t] / close[t - 4 : t + 1].mean()),
        np.log(close[t] / last20.mean()),
        change[change > 0].sum() / np.abs(change).sum(),
        (close[t] - last20.mean()) / (2 * last20.std()),
        4 * last20.std() / last20.mean(),
        table["volume"][t] / table["volume"][t - 19 : t + 1].mean() - 1,
    ]
    np.testing.assert_allclose(features[t], expected, rtol=1e-6, atol=1e-9)


def test_features_are_complete_after_the_warm_up_and_see_no_future(forecast):
    table = random_walk()
    features = forecast.make_features(table)
    assert np.isfinite(features[forecast.WARM_UP :]).all()
    changed = {name: np.where(np.arange(300) > 200, column * 3, column) for name, column in table.items()}
    np.testing.assert_array_equal(forecast.make_features(changed)[:201], features[:201])


def test_features_do_not_depend_on_the_unit_of_price(forecast):
    table = random_walk()
    dearer = {name: column * (1 if name == "volume" else 1000) for name, column in table.items()}
    after = slice(forecast.WARM_UP, None)
    np.testing.assert_allclose(forecast.make_features(dearer)[after], forecast.make_features(table)[after], atol=1e-6)


def test_a_flat_price_without_volume_has_finite_features(forecast):
    flat = {name: np.full(100, 50.0) for name in ("open", "high", "low", "close")} | {"volume": np.zeros(100)}
    assert np.isfinite(forecast.make_features(flat)[forecast.WARM_UP :]).all()


def test_scaling_is_fitted_on_what_it_is_given_and_comes_back(forecast):
    values = np.random.default_rng(0).normal(3, 2, (100, 4))
    scaler = forecast.Scaler(values[:50])
    scaled = scaler.scale(values)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[:50].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled[:50].std(0), 1, atol=1e-6)
    np.testing.assert_allclose(scaler.restore(scaled.astype(float)), values, atol=1e-5)


def test_errors_by_hand(forecast):
    rmse, mae, mape = forecast.errors(np.array([100.0, 200.0]), np.array([103.0, 196.0]))
    np.testing.assert_allclose([rmse, mae, mape], [np.sqrt(12.5), 3.5, 2.5])


def test_persistence_on_the_last_fifth_of_the_sp500(forecast):
    pytest.importorskip("arch", reason="the S&P 500 data ship with arch")
    _, table = forecast.load_sp500()
    close, first = table["close"], int(0.8 * 5031)
    rmse, _, mape = forecast.errors(close[first:], close[first - 1 : -1])
    assert (len(close), round(rmse, 2), round(mape, 3)) == (5031, 19.98, 0.586)


def test_the_verdict_does_not_flatter(forecast):
    rng = np.random.default_rng(0)
    truth = 100 + np.cumsum(rng.normal(size=500))
    persistence = truth + rng.normal(size=500)
    assert "does NOT beat" in forecast.verdict(truth, persistence, persistence)
    assert "does NOT beat" in forecast.verdict(truth, persistence + 1, persistence)
    barely = truth + np.where(np.arange(500) % 2, 0.94, 1.05) * (persistence - truth)
    assert "NOT clearly" in forecast.verdict(truth, barely, persistence)
    assert "NOT" not in forecast.verdict(truth, truth + 0.5 * (persistence - truth), persistence)


def test_csv_in_any_order_and_case(forecast, tmp_path):
    table = random_walk()
    lines = csv_lines(table, "DATE,open,HIGH, Low ,Close,volume")
    dates, loaded = forecast.load_csv(write(tmp_path / "a.csv", [lines[0], *reversed(lines[1:])]))
    assert (np.diff(dates).astype(int) == 1).all()
    for name, column in table.items():
        np.testing.assert_array_equal(loaded[name], column)


def broken(change):
    lines = csv_lines(random_walk())
    change(lines)
    return lines


def set_cell(line, column, text):
    def change(lines):
        cells = lines[line - 1].split(",")
        cells[column] = text
        lines[line - 1] = ",".join(cells)

    return change


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["Date,Open,Close"], r"missing column\(s\) high, low, volume; its header has date, open, close"),
        (csv_lines(random_walk(100)), "expected at least 250 days, got 100"),
        (broken(set_cell(7, 4, "n/a")), "line 7, column close: expected a price above zero, got 'n/a'"),
        (broken(set_cell(8, 2, "nan")), "line 8, column high: expected a price above zero, got 'nan'"),
        (broken(set_cell(9, 1, "-3")), "line 9, column open: expected a price above zero, got '-3'"),
        (broken(set_cell(9, 5, "")), "line 9, column volume: expected a number, zero or more, got ''"),
        (broken(set_cell(10, 0, "someday")), "line 10, column date: expected a date such as 2018-12-31, got 'someday'"),
        (broken(set_cell(10, 0, "2020-01-01")), "2020-01-01 is there twice"),
        (broken(lambda lines: lines.insert(4, "2020-01-03,1,2")), "line 5, column low: .* got ''"),
    ],
)  # fmt: skip
def test_csv_errors_say_what_and_where(forecast, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        forecast.load_csv(write(tmp_path / "bad.csv", lines))


def test_a_missing_file_ends_with_one_line_and_no_traceback(forecast, tmp_path):
    with pytest.raises(SystemExit, match=r"forecast.py: .*absent.csv"):
        forecast.main(["--csv", str(tmp_path / "absent.csv")])


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--out", "no/such/folder/a.png"]])
def test_bad_options_are_found_before_the_training(forecast, arguments, capsys):
    with pytest.raises(SystemExit):
        forecast.main(arguments)
    assert f"{arguments[0]}: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("own_data", [False, True], ids=["sp500", "csv"])
def test_it_runs_as_a_newcomer_runs_it(forecast, tmp_path, monkeypatch, capsys, own_data):
    pytest.importorskip("tqdm", reason="examples show a bar")
    monkeypatch.chdir(tmp_path)
    arguments = ["--quick", "--out", "picture.png"]
    if own_data:
        arguments += ["--csv", write(tmp_path / "mine.csv", csv_lines(random_walk(400)))]
    else:
        pytest.importorskip("arch", reason="the S&P 500 data ship with arch")
    forecast.main(arguments)
    printed = capsys.readouterr().out
    assert "persistence" in printed
    assert "The network" in printed
    assert (tmp_path / "picture.png").stat().st_size > 10_000
