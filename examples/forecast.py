"""Forecast tomorrow's close of a stock or an index with two LSTM layers, and say whether that was worth it.

    pip install -e ".[examples]" && python examples/forecast.py            # S&P 500, 1999 to 2018, about a minute
    python examples/forecast.py --csv mine.csv --out mine.png              # Date,Open,High,Low,Close,Volume
    python examples/forecast.py --csv rates.csv                            # ... or a date and a value: exchange rates
    python examples/forecast.py --csv rates.csv --value USD                # ... of several columns, this one
    python examples/forecast.py --csv mine.csv --skip-bad-rows             # ... of which some days are null

Prices are close to a random walk: "tomorrow's close is today's" (persistence) is hard to beat, and any forecast looks
right in a plot because it lags the truth by one day. So the same days are forecast by persistence, and printed beside.
"""

import datetime
import math

import jax
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn.training import batches, fit, make_step

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

COLUMNS = ("open", "high", "low", "close", "volume")
WINDOW = 30  # days the network sees before it forecasts the next one
WARM_UP = 20  # days before the longest moving average is complete
FEWEST = 250  # rows, a year of trading days: less leaves nothing to test on
BATCH = 64

# The head starts at zero: the first forecast is persistence plus the mean return, and what is learnt departs from that.
HEAD = jrnn.dense(1, input_init="zeros")
MODEL = jrnn.stack(jrnn.lstm(50), jrnn.dropout(0.2), jrnn.lstm(50), jrnn.dropout(0.2), HEAD)


def load_sp500():
    """Daily S&P 500 that ships with the package arch: dates (days,) and a dict of columns (days,)."""
    from arch.data import sp500  # here, since it is slow to import and --csv does not need it

    table = sp500.load()
    return table.index.to_numpy(), {name: table[name.capitalize()].to_numpy(float) for name in COLUMNS}


def load_csv(path, value=None, encoding="utf-8-sig", skip_bad_rows=False):
    """The same from a file with a column Date: with Open, High, Low, Close and Volume, or with one value a day.

    ``value`` names the column to forecast of a file that has several others and is no table of prices.
    """
    header = shared.csv_header(path, encoding)
    prices = value is None and set(COLUMNS) <= set(header)
    names = COLUMNS if prices else (value_column(path, header, value),)
    table = {}

    def add(cells):
        date, values = read_day(cells, names)
        if date in table:
            raise ValueError(f"column date: {date} is there twice; expected one row per day")
        table[date] = values

    shared.read_csv(path, ("date", *names), add, encoding=encoding, skip_bad_rows=skip_bad_rows)
    if len(table) < FEWEST:
        raise ValueError(f"{path}: expected at least {FEWEST} days, got {len(table)}")
    days = sorted(table)  # some sources list the newest day first
    columns = np.array([table[day] for day in days]).T
    dates = np.array(days, "datetime64[D]")
    return dates, dict(zip(COLUMNS, columns, strict=True)) if prices else closes_only(columns[0])


def value_column(path, header, value):
    """Which column of a file to forecast: the one that is named, ``close`` or ``value``, or the only one."""
    if value is not None:
        return value.strip().lower()
    others = [name for name in header if name and name != "date"]
    usual = [name for name in ("close", "value") if name in others]
    if len(others) == 1 or usual:
        return (usual or others)[0]
    raise ValueError(
        f"{path}: expected the columns date, {', '.join(COLUMNS)}, or a date and one value; its header has "
        f"{', '.join(header)} (a comma between columns is expected); name the column to forecast with --value"
    )


def closes_only(close):
    """A table of prices of which one a day is known: the day begins where the last one ended, and has no volume."""
    start = np.concatenate([close[:1], close[:-1]])
    high, low = np.maximum(start, close), np.minimum(start, close)
    return {"open": start, "high": high, "low": low, "close": close, "volume": np.zeros_like(close)}


def read_day(cells, names=COLUMNS):
    """One row of the file as its date and the values of these columns."""
    text = cells["date"]
    try:
        date = datetime.datetime.fromisoformat(text).date()
    except ValueError:
        raise ValueError(f"column date: expected a date such as 2018-12-31, got {text!r}") from None
    values = []
    for name in names:
        text = cells[name]
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0 or (number == 0 and name != "volume"):
            wanted = "a number, zero or more" if name == "volume" else "a price above zero"
            raise ValueError(f"column {name}: expected {wanted}, got {text!r}")
        values.append(number)
    return date, values


def moving_average(series, days):
    """The mean of the last `days` values, today's included; NaN where there are not yet that many."""
    means = np.lib.stride_tricks.sliding_window_view(series, days).mean(axis=-1)
    return np.concatenate([np.full(days - 1, np.nan), means])


def make_features(table):
    """What is known at the close of each day, (days, 9). Only ratios: prices of 1999 and of 2018 look alike in them."""
    close, volume = table["close"], table["volume"]
    change = np.diff(np.log(close), prepend=np.nan)
    up, down = (moving_average(np.maximum(sign * change, 0), 14) for sign in (1, -1))
    middle = moving_average(close, 20)
    deviation = np.sqrt(np.maximum(moving_average(close**2, 20) - middle**2, 0))
    usual_volume = moving_average(volume, 20)
    tiny = 1e-12  # a flat price or an index without volume must not divide by zero
    return np.stack(
        [
            change,  # the return of the day
            np.log(close / table["open"]),
            np.log(table["high"] / table["low"]),
            np.log(close / moving_average(close, 5)),
            np.log(close / middle),
            up / (up + down + tiny),  # relative strength index, RSI / 100
            (close - middle) / (2 * deviation + tiny * close),  # where in the Bollinger band: -1 lower, 1 upper
            4 * deviation / middle,  # how wide that band is
            (volume - usual_volume) / (usual_volume + tiny),
        ],
        axis=1,
    )


class Scaler:
    """Zero mean and unit variance, as they were in the training part: later days must not shape the input."""

    def __init__(self, training):
        self.mean, self.std = training.mean(axis=0), training.std(axis=0) + 1e-12

    def scale(self, values):
        return ((values - self.mean) / self.std).astype(np.float32)

    def restore(self, values):
        return values * self.std + self.mean


def errors(truth, forecast):
    """RMSE and MAE in points, MAPE in percent."""
    error = forecast - truth
    return np.sqrt(np.mean(error**2)), np.mean(np.abs(error)), 100 * np.mean(np.abs(error / truth))


def verdict(truth, forecast, persistence):
    """In words: is the network better than persistence, and by more than luck?"""
    ours, theirs = errors(truth, forecast)[0], errors(truth, persistence)[0]
    # The mean gain per day against its standard error. Beyond 2, luck is an unlikely explanation.
    gain = (persistence - truth) ** 2 - (forecast - truth) ** 2
    z = gain.mean() / (gain.std() / math.sqrt(len(gain)) + 1e-12)
    if theirs == 0:
        return "The price never changed on the test days: there was nothing to forecast."
    share = 100 * abs(ours / theirs - 1)
    if ours >= theirs:
        return f"The network does NOT beat persistence: its RMSE is {share:.2f}% higher. It has learnt nothing of use."
    if z < 2:
        return (
            f"The network does NOT clearly beat persistence: its RMSE is {share:.2f}% lower, but that is within luck\n"
            f"(the gain is {z:.1f} standard errors; 2 would be worth a second look). Do not trade on it."
        )
    return f"The network beats persistence: its RMSE is {share:.2f}% lower, {z:.1f} standard errors from luck."


def plot(path, dates, truth, forecast, persistence):
    figure, (whole, zoom) = plt.subplots(2, 1, figsize=(10, 8), layout="constrained")
    whole.plot(dates, truth, color="0.6", linewidth=2.5, label="truth")
    whole.plot(dates, forecast, color="tab:red", linewidth=0.8, label="forecast, one day ahead")
    whole.set_title("All test days")
    last = slice(-60, None)
    zoom.plot(dates[last], truth[last], color="0.4", linewidth=1.5, marker="o", markersize=4, label="truth")
    # Wide and pale: a forecast that is hardly more than persistence lies on top of it.
    zoom.plot(dates[last], persistence[last], color="tab:blue", alpha=0.35, linewidth=5, label="persistence")
    zoom.plot(dates[last], forecast[last], color="tab:red", linewidth=1.2, label="forecast, one day ahead")
    zoom.set_title(f"The last {len(truth[last])} of them (persistence is the truth, one day late)")
    for axes in (whole, zoom):
        axes.set_ylabel("close, points")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def loss_fn(params, batch, key):
    inputs, targets = batch
    _, outputs = jrnn.unroll(MODEL, params, inputs, key=key)  # (WINDOW, batch, 1); with a key, dropout is on
    return jrnn.losses.mse(outputs[-1, :, 0], targets)  # only the last day's output has seen the whole window


def forecast_closes(params, inputs, today, return_scaler):
    """The close of the day after each window, (windows,), from windows (WINDOW, windows, 9) and their last closes."""
    _, outputs = jrnn.unroll(MODEL, params, inputs)
    return today * np.exp(return_scaler.restore(np.asarray(outputs[-1, :, 0], float)))


def main(arguments=None):
    parser = shared.parser(__doc__, "forecast.png")
    shared.add_csv_options(
        parser, "your own data: Date,Open,High,Low,Close,Volume, or a date and a value (default: S&P 500)"
    )
    parser.add_argument("--value", help="the column to forecast, if the CSV file is no table of prices")
    parser.add_argument("--epochs", type=int, default=30, help="at most so many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs: expected 1 or more, got {options.epochs}")
    with shared.loading("forecast.py", ", or use --csv"):
        if options.csv:
            dates, table = load_csv(options.csv, options.value, options.encoding, options.skip_bad_rows)
        else:
            dates, table = load_sp500()

    # Chronological parts: the last 20% of days are for the test, the 10% before them for validation. Parts drawn at
    # random would let the network train on the days around the ones it is asked to forecast.
    days, close = len(dates), table["close"]
    first_validation, first_test = int(0.7 * days), int(0.8 * days)

    # The network forecasts tomorrow's return, scaled. The prices of the test days go far beyond those it was trained
    # on; their returns do not, and give the price back: tomorrow = today * exp(return).
    features, returns = make_features(table), np.diff(np.log(close), prepend=np.nan)
    training = slice(WARM_UP, first_validation)
    feature_scaler, return_scaler = Scaler(features[training]), Scaler(returns[training])
    scaled = feature_scaler.scale(features[WARM_UP:])
    inputs, _ = jrnn.sequence.windows(scaled, WINDOW)
    _, targets = jrnn.sequence.windows(return_scaler.scale(returns[WARM_UP:]), WINDOW)
    inputs, targets = np.asarray(inputs), np.asarray(targets[-1])  # (WINDOW, windows, 9) and the day after each
    day = np.arange(WARM_UP + WINDOW, days)  # the day each window forecasts, which decides on its part
    train = np.flatnonzero(day < first_validation)
    validation = np.flatnonzero((day >= first_validation) & (day < first_test))
    test = np.flatnonzero(day >= first_test)
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        print(f"{name:>10}: {len(part):5} days, {str(dates[day[part[0]]])[:10]} to {str(dates[day[part[-1]]])[:10]}")

    fitted = inputs[:, train], targets[train]
    data = batches(fitted, BATCH, seed=options.seed, drop_last=True)
    init_key, dropout_key = jax.random.split(jax.random.key(options.seed))
    steps_per_epoch = len(data)
    result = fit(
        make_step(loss_fn, jrnn.optimizer("adam", 1e-3, clip_norm=1.0)),
        MODEL.init(init_key, features.shape[1]),
        data,
        key=dropout_key,
        steps=(2 if options.quick else options.epochs) * steps_per_epoch,
        validation=[(inputs[:, validation], targets[validation])],
        validate_every=steps_per_epoch,
        patience=8,
    )
    shared.noted(result)
    epochs, best = result.state.step // steps_per_epoch, result.best["step"] // steps_per_epoch
    print(f"trained for {epochs} epochs; the parameters of epoch {best} were best on the validation days\n")

    truth, today = close[day[test]], close[day[test] - 1]
    forecast = forecast_closes(result.params, inputs[:, test], today, return_scaler)
    forecasts = {
        "network": forecast,
        "persistence (today's close)": today,
        "moving average (5 days)": moving_average(close, 5)[day[test] - 1],
    }
    digits = max(2, 4 - math.floor(math.log10(close[-1])))  # decimals: some prices are thousands, some a thousandth
    print(f"{'forecast of the test days':29}{'RMSE, points':>13}{'MAE, points':>13}{'MAPE, %':>9}")
    for name, values in forecasts.items():
        rmse, mae, mape = errors(truth, values)
        print(f"{name:29}{rmse:13.{digits}f}{mae:13.{digits}f}{mape:9.3f}")
    print("\n" + verdict(truth, forecast, today))
    tomorrow = forecast_closes(result.params, scaled[-WINDOW:, None], close[-1:], return_scaler)[0]
    print(
        f"\nforecast of the first close after {str(dates[-1])[:10]}: {tomorrow:.{digits}f}, "
        f"{100 * (tomorrow / close[-1] - 1):+.3f}% on {close[-1]:.{digits}f}\n"
        f"(on the test days such a forecast was off by {errors(truth, forecast)[2]:.3f}% on average)"
    )
    plot(options.out, dates[day[test]], truth, forecast, today)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
