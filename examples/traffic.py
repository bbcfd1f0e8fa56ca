"""Traffic of the next hours, or temperatures of the next days, with intervals that should hold 80% of the truth.

    pip install -e ".[examples]" && python examples/traffic.py         # Minneapolis by the hour, about two minutes
    python examples/traffic.py --data weather                          # Seattle by the day, less than a minute
    python examples/traffic.py --full                                  # a larger network, for longer

A GRU reads the series and says at every step, for several horizons, the 10%, 50% and 90% quantiles of the value to
come: the pinball loss has its minimum there. Gaps are masked out. Parts are chronological: the last one is for the
test, the one before it tells when to stop.

Traffic has a daily and a weekly rhythm, the weather a yearly one: the mean of the same hour of the week, and the curve
of the year, are hard to beat some way ahead. The network forecasts the departure from them, and both are printed
beside it, with persistence (the value to come is the last one).

What it printed by default, after a minute on two hyperthreads of one core:

    mean squared error, standardised              1 h      3 h      6 h     24 h
      network, median                          0.0142   0.0251   0.0311   0.0409
      hour-of-week mean                        0.0503   0.0503   0.0503   0.0503
      persistence                              0.1683   0.9706   2.0692   0.2693
    share of the truth within the interval      84.0%    82.2%    82.3%    82.6%

With --full, after four minutes (logs/traffic-full.txt), the errors are 0.0134, 0.0245, 0.0301 and 0.0382; but the
intervals, which should hold 80% of the truth, hold 80%, 75%, 75% and 77% of it.

(Where hours with several descriptions of the weather count several times, as in the source of the data, the
hour-of-week mean has 0.059.) And for the weather, whose test year was the
warmest of the four (dropout and units are the best of four tries on the validation part):

    mean squared error, standardised              1 d      2 d      3 d      7 d
      network, median                          0.1482   0.2467   0.2887   0.3150
      climatology                              0.2880   0.2880   0.2880   0.2880
      persistence                              0.1572   0.2875   0.3645   0.4127
"""

import pathlib
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn import training

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).parent / "data" / "metro_traffic.npz"  # data/README.md: source, authors, licence
QUANTILES = (0.1, 0.5, 0.9)
BATCH = 32


class Series(NamedTuple):
    """N steps of a series, and how to forecast it."""

    title: str
    unit: str
    time: Any  # (N,) datetime64
    values: Any  # (N,) with NaN in gaps
    known: Any  # (N, F) what else is known at each step
    rhythm: Any  # (N,) integers: where in its cycle a step is
    calendar: Any  # (N, C) what is known of a step long before, such as holidays
    usual: str  # what the mean of each part of the cycle is called
    smooth: int  # over how many parts of the cycle that mean is taken
    horizons: tuple
    ahead: str  # the unit of horizons
    window: int  # steps of a training sequence
    warm_up: int  # the first of them, at which no forecast is asked for
    stride: int  # steps from one training sequence to the next
    shares: tuple  # where the validation and the test begin, as shares of all steps that have a value
    dropout: float
    epochs: int
    shown: int  # steps in the picture


def load_traffic():
    """Cars an hour towards the west on Interstate 94 near Minneapolis, 2012 to 2018, and the weather."""
    with np.load(DATA) as file:
        hour, start = file["hour"], np.datetime64(str(file["start"]), "h")
        steps = int(hour[-1]) + 1
        column = lambda name: _spread(file[name], hour, steps)
        values = column("volume")
        weather = [np.maximum(column("temperature"), 2400) / 100 - 28, column("clouds") / 100]  # a few are 0 kelvin
        weather += [np.log1p(np.minimum(column("rain"), 600)) / 3, column("snow") > 0]
        holidays = file["holiday"]
    time = start + np.arange(steps)
    # A day counts as a holiday in its gaps too.
    days = time.astype("datetime64[D]")
    holiday = np.isin(days, np.unique(days[hour[holidays]]))[:, None]
    weekday_hour = (time.astype(int) + 3 * 24) % 168  # the epoch was a Thursday; Monday at midnight is 0
    phase = 2 * np.pi * np.arange(steps)[:, None] / 24
    known = np.concatenate([np.nan_to_num(np.stack(weather, 1)), np.sin(phase), np.cos(phase)], axis=1)
    return Series(
        title="Traffic on Interstate 94", unit="cars an hour", time=time, values=values, known=known,
        rhythm=weekday_hour, calendar=holiday, usual="hour-of-week mean", smooth=1, horizons=(1, 3, 6, 24), ahead="h",
        window=192, warm_up=48, stride=48, shares=(0.75, 0.85), dropout=0.2, epochs=25, shown=24 * 9,
    )  # fmt: skip


def load_weather():
    """Highest temperature of each day in Seattle, 2012 to 2015, and the other measurements of the day."""
    table = []
    path = shared.package_file("vega-datasets", "vega_datasets/_data/seattle-weather.csv")
    names = ("temp_max", "temp_min", "precipitation", "wind")
    shared.read_csv(path, ("date", *names), lambda cells: table.append([cells["date"], *(cells[n] for n in names)]))
    time = np.array([row[0].replace("/", "-") for row in table], "datetime64[D]")
    highest, lowest, rain, wind = np.array([row[1:] for row in table], float).T
    known = np.stack([lowest / 10 - 1, np.log1p(rain), wind / 3 - 1, (highest - lowest) / 10 - 1], axis=1)
    day_of_year = (time - time.astype("datetime64[Y]")).astype(int)
    return Series(
        title="Highest temperature of the day in Seattle", unit="degrees Celsius", time=time, values=highest,
        known=known, rhythm=day_of_year, calendar=np.zeros((len(time), 0)), usual="climatology", smooth=31,
        horizons=(1, 2, 3, 7), ahead="d", window=60, warm_up=14, stride=3, shares=(0.5, 0.75), dropout=0.2, epochs=40,
        shown=150,
    )  # fmt: skip


def _spread(column, places, steps):
    found = np.full(steps, np.nan)
    found[places] = column
    return found


class Problem:
    """A series as inputs and targets: what is learnt is the departure from the usual value, standardised."""

    def __init__(self, series):
        steps, self.series = len(series.values), series
        counted = np.cumsum(np.isfinite(series.values))
        begins = [int(np.searchsorted(counted, share * counted[-1])) for share in series.shares]
        bounds = zip([0, *begins], [*begins, steps], strict=True)
        self.parts = dict(zip(("training", "validation", "test"), bounds, strict=True))
        # Usual values, and what they are standardised by, are those of all that lies before the test.
        seen = np.isfinite(series.values) & (np.arange(steps) < begins[1])
        self.mean, self.deviation = series.values[seen].mean(), series.values[seen].std()
        self.truth = (series.values - self.mean) / self.deviation
        self.usual = self._usual(seen)
        self.observed = np.isfinite(self.truth)
        departure = np.where(self.observed, self.truth - self.usual, 0)

        def later(column, fill=0.0):
            """The column at each horizon ahead, ``(N, horizons, ...)``."""
            padded = np.concatenate([column, np.full((max(series.horizons), *column.shape[1:]), fill, column.dtype)])
            return np.stack([padded[h : h + steps] for h in series.horizons], axis=1)

        calendar = later(series.calendar).reshape(steps, -1)
        inputs = [departure[:, None], self.observed[:, None], self.usual[:, None], later(self.usual)]
        self.inputs = np.concatenate([*inputs, calendar, series.known], axis=1).astype(np.float32)
        self.targets, self.target_observed = later(departure).astype(np.float32), later(self.observed, False)
        self.target_step = later(np.arange(steps), steps)

    def _usual(self, seen):
        """The mean of what was seen at each place in the cycle, over ``smooth`` neighbours in it."""
        series, places = self.series, self.series.rhythm.max() + 1
        sums = np.bincount(series.rhythm[seen], self.truth[seen], places)
        counts = np.bincount(series.rhythm[seen], minlength=places)
        around = np.arange(series.smooth) - series.smooth // 2
        window = (np.arange(places)[:, None] + around) % places
        return (sums[window].sum(1) / counts[window].sum(1))[series.rhythm]

    def sequences(self, part, stride=None):
        """``(inputs (T, B, F), targets (T, B, horizons), mask, steps (T, B))``: what counts is forecast of this part.

        Each sequence begins with a warm-up. Without a stride, they follow each other so that each step counts once.
        """
        (begin, end), series = self.parts[part], self.series
        first = max(0, begin - max(series.horizons) - series.warm_up)
        starts = np.arange(first, max(first + 1, end - series.warm_up), stride or series.window - series.warm_up)
        steps = starts + np.arange(series.window)[:, None]
        inside = (steps < end) & (np.arange(series.window)[:, None] >= series.warm_up)
        steps = np.minimum(steps, len(series.values) - 1)
        step = self.target_step[steps]
        mask = self.target_observed[steps] & (step >= begin) & (step < end) & inside[..., None]
        useful = mask.any((0, 2))  # a sequence within a gap teaches nothing
        return tuple(a[:, useful] for a in (self.inputs[steps], self.targets[steps], mask, steps))


def network(problem, hidden):
    """The readout starts at zero, at the usual value, with nothing known of how far off it is."""
    outputs = len(problem.series.horizons) * len(QUANTILES)
    dropout = jrnn.dropout(problem.series.dropout)
    return jrnn.stack(jrnn.gru(hidden), dropout, jrnn.dense(outputs, input_init="zeros"))


def forecast(model, params, xs, key=None):
    """Quantiles of the departure, ``(T, B, horizons, quantiles)``."""
    _, ys = jrnn.unroll(model, params, xs, key=key)
    return ys.reshape(*ys.shape[:-1], -1, len(QUANTILES))


def train(problem, model, epochs, seed, checkpoint=None):
    def loss_fn(params, batch, key):
        xs, targets, mask, _ = batch
        return jrnn.losses.pinball(forecast(model, params, xs, key), targets, QUANTILES, mask)

    data = problem.sequences("training", problem.series.stride)
    batches = training.batches(data, min(BATCH, data[0].shape[1]), seed=seed, drop_last=True)
    steps = epochs * len(batches)
    rate = training.schedule("warmup_cosine", 3e-3, steps=steps, warmup_steps=max(1, steps // 20))
    init_key, key = jax.random.split(jax.random.key(seed))
    result = training.fit(
        training.make_step(loss_fn, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        model.init(init_key, problem.inputs.shape[1]),
        batches,
        key=key,
        steps=steps,
        validation=[problem.sequences("validation")],
        checkpoint=checkpoint,
    )
    return shared.noted(result)


def tested(problem, model, params):
    """Quantiles ``(N, horizons, quantiles)``, standardised, at the step that they are forecast for; NaN elsewhere."""
    xs, _, mask, steps = problem.sequences("test")
    said = training.predict(lambda params, xs: forecast(model, params, xs), params, [xs], axis=1)
    found = np.full((len(problem.truth), len(problem.series.horizons), len(QUANTILES)), np.nan)
    for h, horizon in enumerate(problem.series.horizons):
        at = steps[mask[..., h]] + horizon
        # Quantiles that cross are put in order, which never makes them worse.
        found[at, h] = np.sort(said[..., h, :][mask[..., h]], axis=-1) + problem.usual[at, None]
    return found


def compare(problem, said):
    """Rows of the printed table: the mean squared errors by horizon of each way to forecast, and of the intervals."""
    series, truth = problem.series, problem.truth
    test = slice(*problem.parts["test"])
    errors = {name: [] for name in ("network, median", series.usual, "persistence")}
    inside, width = [], []
    for h, horizon in enumerate(series.horizons):
        low, middle, high = said[test, h].T
        persistence = np.concatenate([np.full(horizon, np.nan), truth[:-horizon]])[test]
        for name, values in zip(errors, (middle, problem.usual[test], persistence), strict=True):
            errors[name].append(np.nanmean((values - truth[test]) ** 2))
        valid = np.isfinite(low) & np.isfinite(truth[test])
        inside.append(np.mean(((truth[test] >= low) & (truth[test] <= high))[valid]))
        width.append(np.mean((high - low)[valid]) * problem.deviation)
    return errors, inside, width


def usual_interval(problem):
    """Coverage on the test, and width, of the interval that holds 80% of what lies before it, by place in the cycle."""
    series, end = problem.series, problem.parts["test"][0]
    departure = problem.truth - problem.usual
    places = series.rhythm.max() + 1
    around = np.arange(series.smooth) - series.smooth // 2
    low, high = np.empty((2, places))
    for place in range(places):
        near = np.isin(series.rhythm[:end], (place + around) % places)
        low[place], high[place] = np.nanquantile(departure[:end][near], (QUANTILES[0], QUANTILES[-1]))
    test = slice(*problem.parts["test"])
    value, place = departure[test], series.rhythm[test]
    valid = np.isfinite(value)
    inside = (value >= low[place]) & (value <= high[place])
    return inside[valid].mean(), (high - low)[place][valid].mean() * problem.deviation


def plot(path, problem, said, errors):
    series = problem.series
    back = lambda standardised: standardised * problem.deviation + problem.mean
    figure = plt.figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=[1, 1, 0.8])
    end = problem.parts["test"][1] - max(series.horizons)
    shown = slice(end - series.shown, end)
    for row, h in enumerate((0, len(series.horizons) - 1)):
        axes = figure.add_subplot(grid[row])
        low, middle, high = back(said[shown, h]).T
        axes.fill_between(series.time[shown], low, high, color="tab:red", alpha=0.2, linewidth=0, label="80% interval")
        axes.plot(series.time[shown], back(problem.usual[shown]), color="tab:blue", lw=1, ls="--", label=series.usual)
        axes.plot(series.time[shown], middle, color="tab:red", lw=1.2, label="median")
        axes.plot(series.time[shown], series.values[shown], color="0.2", lw=1, marker=".", ms=3, label="truth")
        axes.set(ylabel=series.unit, title=f"{series.title}, {series.horizons[h]} {series.ahead} ahead")
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        axes.legend(loc="upper left", ncols=4, fontsize=9)
        axes.set_ylim(top=axes.get_ylim()[1] + 0.25 * np.ptp(axes.get_ylim()))
    axes = figure.add_subplot(grid[2])
    for (name, values), color in zip(errors.items(), ("tab:red", "tab:blue", "0.5"), strict=True):
        axes.plot(range(len(values)), values, marker="o", color=color, label=name)
    axes.set_xticks(range(len(series.horizons)), [f"{h} {series.ahead}" for h in series.horizons])
    axes.set(yscale="log", ylabel="MSE, standardised", title="Error on the test part, by horizon")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "traffic.png")
    parser.add_argument("--data", choices=("traffic", "weather"), default="traffic", help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, help="units of the GRU (default: 64, weather 16; twice that with --full)")
    parser.add_argument("--epochs", type=int, help="(default: 25, weather 40; four times that with --full)")
    parser.add_argument("--full", action="store_true", help="a larger network, for longer")
    shared.add_checkpoint(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.hidden or 1, options.epochs or 1) < 1:
        parser.error("expected --hidden and --epochs of 1 or more")
    with shared.loading("traffic.py"):
        series = load_weather() if options.data == "weather" else load_traffic()
    problem = Problem(series)
    for name, (begin, end) in problem.parts.items():
        count = np.isfinite(series.values[begin:end]).sum()
        print(f"{name:>10}: {count:6,} steps, {str(series.time[begin])[:10]} to {str(series.time[end - 1])[:10]}")

    hidden = options.hidden or (16 if options.data == "weather" else 64) * (2 if options.full else 1)
    epochs = options.epochs or series.epochs * (4 if options.full else 1)
    model = network(problem, hidden)
    result = train(problem, model, epochs, options.seed, options.checkpoint)
    print(f"best on the validation part after {result.best['step']} of {result.state.step} steps\n")

    said = tested(problem, model, result.params)
    errors, inside, width = compare(problem, said)
    ahead = "".join(f"{f'{h} {series.ahead}':>9}" for h in series.horizons)
    print(f"{'mean squared error, standardised':40}{ahead}")
    for name, values in errors.items():
        print(f"  {name:38}" + "".join(f"{value:9.4f}" for value in values))
    print(f"{'share of the truth within the interval':40}" + "".join(f"{value:9.1%}" for value in inside))
    usual_inside, usual_width = usual_interval(problem)
    print(f"  {'the same around the ' + series.usual:38}" + f"{usual_inside:9.1%}" * len(inside))
    print(f"{'mean width, ' + series.unit:40}" + "".join(f"{value:9.1f}" for value in width))
    print(f"  {'the same around the ' + series.usual:38}" + f"{usual_width:9.1f}" * len(inside))
    plot(options.out, problem, said, errors)
    print(f"\npicture: {options.out}")
    return errors


if __name__ == "__main__":
    main()
