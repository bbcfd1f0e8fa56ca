"""A GRU reads MNIST-1D, ten digits drawn as noisy curves of 40 points, beside the accuracies its authors publish.

    pip install -e ".[examples]" && python examples/mnist1d.py        # three seeds, about a minute

A digit may begin anywhere in its 40 points, which defeats a linear classifier. A GRU does the same at every point, so
it need not learn each digit at each place.

The test part is looked at once, at the end. Settings, and the epoch whose parameters are kept, were chosen on the last
400 of the 4,000 training curves.
"""

import pathlib
import sys

import jax
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn.training import batches, fit, make_step, schedule

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

DIGITS, VALIDATION, BATCH = 10, 400, 100
# Test accuracy in percent, from the README of the package mnist1d.
PUBLISHED = {"logistic regression": 32, "MLP": 68, "GRU": 91, "CNN": 94, "human expert": 96}

# A vote at every point, then for each digit its strongest vote: it does not matter where the digit was seen.
GRU = jrnn.stack(jrnn.gru(64), jrnn.dropout(0.2), jrnn.dense(DIGITS))
LOGISTIC = jrnn.dense(DIGITS)


def load():
    """Curves as (40, examples, 1) and their digits, training and test, as the package makes them (seed 42)."""
    # This script has the name of the package that it needs, and Python looks into a script's own folder first: without
    # taking that folder out, `import mnist1d` would find this file.
    here = pathlib.Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if pathlib.Path(folder).resolve() != here]
    from mnist1d.data import get_dataset_args, make_dataset  # make_dataset computes; get_dataset would download

    data = make_dataset(get_dataset_args())
    names = ("x", "y"), ("x_test", "y_test")
    return [(data[x].T[..., None].astype(np.float32), data[y].astype(np.int32)) for x, y in names]


def gru(params, xs, key=None):
    _, ys = jrnn.unroll(GRU, params, xs, key=key)  # (40, batch, digits); with a key, dropout is on
    return ys.max(axis=0)


def logistic(params, xs):
    _, ys = jrnn.unroll(LOGISTIC, params, xs[..., 0].T)  # (batch, digits): all 40 points at once, no recurrence
    return ys


def scores(logits, digits):
    return jrnn.losses.cross_entropy(logits, digits), {"accuracy": jrnn.losses.accuracy(logits, digits)}


def gru_loss(params, batch, key):
    xs, digits = batch
    return scores(gru(params, xs, key), digits)


def logistic_loss(params, batch, key):
    xs, digits = batch
    return scores(logistic(params, xs), digits)


def train(loss_fn, model, in_features, xs, digits, seed, epochs, peak):
    """Trains on all but the last 400 curves; what is kept is the epoch with the best accuracy on these."""
    part, validation = (xs[:, :-VALIDATION], digits[:-VALIDATION]), (xs[:, -VALIDATION:], digits[-VALIDATION:])
    data = batches(part, BATCH, seed=seed, drop_last=True)
    steps = len(data)  # in an epoch

    # Recurrent networks have cliffs in their loss: clipping makes the step over one short. The warm-up lets Adam
    # measure gradients before it takes long steps; the cosine ends with short ones, which settle.
    learning_rate = schedule("warmup_cosine", peak, steps=epochs * steps, warmup_steps=steps)
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    result = fit(
        make_step(loss_fn, jrnn.optimizer("adam", learning_rate, clip_norm=1.0)),
        model.init(init_key, in_features),
        data,
        key=dropout_key,
        steps=epochs * steps,
        validation=[validation],
        validate_every=steps,
        monitor="accuracy",
        mode="max",
    )
    return shared.finished(result)


def accuracy(logits, digits):
    return 100 * float(jrnn.losses.accuracy(logits, digits))


def plot(path, histories, results, xs, digits, said):
    figure = plt.figure(figsize=(11, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.5, 1])
    curve, bars = top.subplots(1, 2)
    few = len(histories) <= 5  # more would fill the picture with their names
    for seed, history in enumerate(histories):
        values = 100 * np.array(history["validation"]["accuracy"])
        label = f"seed {seed}" if few else f"{len(histories)} seeds" if seed == 0 else None
        curve.plot(np.arange(1, len(values) + 1), values, label=label, color=None if few else "tab:blue", linewidth=1)
    curve.set(ylabel="accuracy, %", title="GRU on the 400 validation curves", ylim=(0, 100))
    shared.epoch_axis(curve, len(values))
    curve.axhline(PUBLISHED["GRU"], color="0.3", linestyle=":", label="GRU, published (test)")
    curve.grid(alpha=0.3)
    curve.legend(loc="lower right")
    names = list(results)
    colors = ["0.7" if "published" in name else "tab:blue" for name in names]
    drawn = bars.barh(names, list(results.values()), color=colors)
    bars.bar_label(drawn, fmt=" %.1f")
    bars.invert_yaxis()
    bars.set(xlim=(0, 112), xlabel="test accuracy, %", title="Measured here (blue) and published")
    # The first test curve of each digit, drawn as its authors do: as if written from top to bottom.
    for digit, axes in enumerate(bottom.subplots(1, DIGITS)):
        i = np.flatnonzero(digits == digit)[0]
        axes.plot(xs[:, i, 0], np.arange(len(xs)), color="tab:blue" if said[i] == digit else "tab:red")
        axes.invert_yaxis()
        axes.set(xticks=[], yticks=[], title=f"{digit}, said {said[i]}")
    bottom.suptitle("The first test curve of each digit, and what the network of seed 0 said")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "mnist1d.png")
    parser.add_argument("--seeds", type=int, default=3, help="how many networks (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one network, three epochs, to see that it works")
    options = parser.parse_args(arguments)
    seeds, epochs = (1, 3) if options.quick else (options.seeds, options.epochs)
    if seeds < 1 or epochs < 2:
        parser.error(f"expected --seeds of 1 or more and --epochs of 2 or more, got {seeds} and {epochs}")
    with shared.loading("mnist1d.py"):
        (xs, digits), (test_xs, test_digits) = load()

    print(f"training on {len(digits) - VALIDATION} curves, validation on {VALIDATION}, test on {len(test_digits)}")
    linear = train(logistic_loss, LOGISTIC, len(xs), xs, digits, 0, epochs, peak=1e-2)
    runs = [train(gru_loss, GRU, xs.shape[-1], xs, digits, seed, epochs, peak=5e-3) for seed in range(seeds)]

    outputs = [gru(run.params, test_xs) for run in runs]
    scores = np.array([accuracy(logits, test_digits) for logits in outputs])
    print("\n" + "\n".join(f"GRU, seed {seed}: {score:.1f}%" for seed, score in enumerate(scores)))
    if options.quick:
        print("(three epochs are far too few: this shows only that everything runs)")
    results = {f"GRU, mean of {seeds} seed(s)": scores.mean()}
    results["logistic regression"] = accuracy(logistic(linear.params, test_xs), test_digits)
    results |= {f"{name}, published": score for name, score in PUBLISHED.items()}
    print(f"\n{'accuracy on the test part':34}{'%':>5}")
    print("\n".join(f"{name:34}{score:5.1f}" for name, score in results.items()))
    plot(options.out, [run.history for run in runs], results, test_xs, test_digits, outputs[0].argmax(axis=-1))
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
