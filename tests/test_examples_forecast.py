"""The forecast example: its features see no future, its scaling no test day, and its CSV errors say where."""

import re

import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def forecast():
    return load_example("forecast")


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
        (["Date,Open,High"], "a date and one value; its header has date, open, high .* name the column .* --value"),
        (["Day,Value"], r"missing column\(s\) date; its header has day, value"),
        (csv_lines(random_walk(100)), "expected at least 250 days, got 100"),
        (broken(set_cell(7, 4, "n/a")), "line 7, column close: expected a price above zero, got 'n/a'"),
        (broken(set_cell(8, 2, "nan")), "line 8, column high: expected a price above zero, got 'nan'"),
        (broken(set_cell(9, 1, "-3")), "line 9, column open: expected a price above zero, got '-3'"),
        (broken(set_cell(9, 5, "")), "line 9, column volume: expected a number, zero or more, got ''"),
        (broken(set_cell(10, 0, "someday")), "line 10, column date: expected a date such as 2018-12-31, got 'someday'"),
        (broken(set_cell(10, 0, "2020-01-01")), "2020-01-01 is there twice"),
        (broken(lambda lines: lines.insert(4, "2020-01-03,1,2")), "line 5, column low: .* got ''"),
        (broken(set_cell(7, 4, "1,234.5")), "line 7, expected 6 cells, as the header has, got 7"),
        (broken(lambda lines: [set_cell(i, 4, "null")(lines) for i in (7, 9)]), r"line 7, .*\(2 such rows\); --skip"),
        (["Date;Open;High;Low;Close;Volume"], "a comma between columns is expected"),
        (csv_lines(random_walk(), "Date,Open,High,Low,Close,Volume,Close"), "the column close more than once"),
    ],
)  # fmt: skip
def test_csv_errors_say_what_and_where(forecast, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        forecast.load_csv(write(tmp_path / "bad.csv", lines))


@pytest.mark.parametrize(
    ("header", "value"),
    [("Date,Rate", None), ("DATE,x,Close", None), ("date,EUR,value", None), ("Date,Close,Volume,usd", "USD")],
)
def test_a_date_and_a_value_are_enough(forecast, tmp_path, header, value):
    """Exchange rates, say: the other columns of a table of prices follow from the values of two days."""
    close, names = random_walk()["close"], header.lower().split(",")
    column = names.index(value.lower() if value else names[-1])
    days = np.datetime64("2020-01-01") + np.arange(len(close))
    rows = [",".join([str(day), *("7" if i != column else str(c) for i in range(1, len(names)))])
            for day, c in zip(days, close, strict=True)]  # fmt: skip
    dates, table = forecast.load_csv(write(tmp_path / "a.csv", [header, *rows]), value)
    assert dates.tolist() == days.tolist()
    np.testing.assert_array_equal(table["close"], close)
    np.testing.assert_array_equal(table["open"][1:], close[:-1])
    np.testing.assert_array_equal(table["high"], np.maximum(table["open"], close))
    np.testing.assert_array_equal(table["low"], np.minimum(table["open"], close))
    features = forecast.make_features(table)[forecast.WARM_UP :]
    assert np.isfinite(features).all()
    assert np.isfinite(forecast.Scaler(features[:100]).scale(features)).all()


def test_a_bad_value_of_an_own_column_is_named(forecast, tmp_path):
    path = write(tmp_path / "a.csv", ["date,rate", "2020-01-01,1.1", "2020-01-02,n/a"])
    with pytest.raises(ValueError, match="line 3, column rate: expected a price above zero, got 'n/a'"):
        forecast.load_csv(path)


def test_a_missing_file_ends_with_one_line_and_no_traceback(forecast, tmp_path):
    with pytest.raises(SystemExit, match=r"forecast.py: .*absent.csv"):
        forecast.main(["--csv", str(tmp_path / "absent.csv")])


def test_bad_rows_are_skipped_and_counted_on_request(forecast, tmp_path, capsys):
    lines = csv_lines(random_walk())
    lines[7] = "2020-01-07" + ",null" * 5
    lines[9] = lines[8]  # the same day again
    lines += ["", ",,,,,"]  # empty rows, as spreadsheets write them, are no bad rows
    path = write(tmp_path / "a.csv", lines)
    dates, table = forecast.load_csv(path, skip_bad_rows=True)
    printed = capsys.readouterr().out
    assert f"{path}: left out 2 of 300 rows, the first of them line 8, column open" in printed
    assert len(dates) == len(table["close"]) == 298
    assert not np.isin(np.array(["2020-01-07", "2020-01-09"], "datetime64"), dates).any()
    np.testing.assert_array_equal(table["close"], np.delete(random_walk()["close"], [6, 8]))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_a_file_that_is_not_utf8_is_named_and_can_be_read(forecast, tmp_path, encoding):
    path = tmp_path / "other.csv"
    lines = csv_lines(random_walk(), "Date,Open,High,Low,Close,Volume,Prévision")
    path.write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(SystemExit, match=rf"forecast.py: .*other.csv: .*--encoding {encoding}"):
        forecast.main(["--csv", str(path)])
    _, table = forecast.load_csv(path, encoding=encoding)
    np.testing.assert_array_equal(table["close"], random_walk()["close"])


def test_tomorrow_is_forecast_from_the_last_days_as_any_other_day(forecast, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "MODEL", jrnn.stack(jrnn.gru(4), jrnn.dropout(0.2), jrnn.dense(1)))
    calls, forecast_closes = [], forecast.forecast_closes

    def remember(*arguments):
        calls.append((arguments, forecast_closes(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(forecast, "forecast_closes", remember)
    table = random_walk(300)
    forecast.main(["--quick", "--csv", write(tmp_path / "a.csv", csv_lines(table))])
    (params, inputs, _, scaler), _ = calls[0]
    (_, last, close, _), (tomorrow,) = calls[1]
    assert close.tolist() == table["close"][-1:].tolist()
    # The window of the last test day, one day on: all but its newest day is the same.
    np.testing.assert_array_equal(last[:-1, 0], inputs[1:, -1])
    features = forecast.make_features(table)
    np.testing.assert_allclose(last[-1, 0], forecast.Scaler(features[20:210]).scale(features[-1]), rtol=1e-5)
    outputs = jrnn.unroll(forecast.MODEL, params, last)[1]
    expected = close * np.exp(np.float64(outputs[-1, :, 0]) * scaler.std + scaler.mean)
    np.testing.assert_allclose(tomorrow, expected[0], rtol=1e-6)
    date, number = re.search(r"first close after (\S+): ([\d.]+),", capsys.readouterr().out).groups()
    assert date == "2020-10-26"
    np.testing.assert_allclose(float(number), tomorrow, rtol=1e-4)


def test_a_price_that_never_changes_has_a_verdict(forecast):
    flat = np.full(50, 3.0)
    assert "nothing to forecast" in forecast.verdict(flat, flat, flat)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--out", "no/such/folder/a.png"],
        ["--out", "a.foo"],
        ["--out", "."],
        ["--encoding", "base64"],
    ],
)
def test_bad_options_are_found_before_the_training(forecast, arguments, capsys):
    with pytest.raises(SystemExit):
        forecast.main(arguments)
    assert f"{arguments[0]}: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("own_data", ["", "prices", "rates"], ids=["sp500", "csv", "rates"])
def test_it_runs_as_a_newcomer_runs_it(forecast, tmp_path, monkeypatch, capsys, own_data):
    pytest.importorskip("tqdm", reason="examples show a bar")
    monkeypatch.chdir(tmp_path)
    arguments = ["--quick", "--out", "picture.png"]
    if own_data:
        lines = csv_lines(random_walk(400))
        if own_data == "rates":
            lines = ["date,rate", *(",".join(np.array(line.split(","))[[0, 4]]) for line in lines[1:])]
        arguments += ["--csv", write(tmp_path / "mine.csv", lines)]
    else:
        pytest.importorskip("arch", reason="the S&P 500 data ship with arch")
    forecast.main(arguments)
    printed = capsys.readouterr().out
    assert "persistence" in printed
    assert "The network" in printed
    assert (tmp_path / "picture.png").stat().st_size > 10_000
