"""Watch gradients vanish and explode through a hundred days of the S&P 500, and what is done about it.

    pip install -e ".[examples]" && python examples/gradient_flow.py       # about a minute; --quick for a first look

The task is real: from the last 100 daily returns, forecast how volatile the next 20 days are. The loss looks at the
last step alone, so all that the first day can teach has to travel back through 100 steps. Bengio, Simard and Frasconi
(1994) and Pascanu, Mikolov and Bengio (2013) say what happens on the way; `jrnn.diagnose` measures it.
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm

import jrnn
import shared
from jrnn.diagnose import (
    gate_saturation,
    gradient_norms,
    jacobian_products,
    plot_gate_saturation,
    plot_jacobian_products,
)
from jrnn.initializers import orthogonal
from jrnn.training import make_step

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

DAYS, AHEAD = 100, 20  # days the network sees, days whose volatility it forecasts
HIDDEN, BATCH = 32, 64
RADII = (0.5, 0.9, 1.0, 1.25, 1.5)
VANISHED, EXPLODED = 1e-3, 1e2  # what we call so, over all DAYS
RATE, CLIP = 0.1, 1.0  # learning rate of plain gradient descent, and the largest gradient norm let through


def load_windows():
    """Returns ``(DAYS, windows, 1)`` and log volatility of the days after them ``(windows, 1)``, both standardised."""
    from arch.data import sp500

    returns = np.diff(np.log(sp500.load()["Adj Close"].to_numpy(float)))
    windows = np.lib.stride_tricks.sliding_window_view(returns / returns.std(), DAYS + AHEAD)[::5]
    target = np.log(np.abs(windows[:, DAYS:]).mean(1, keepdims=True))
    target = (target - target.mean()) / target.std()
    return jnp.asarray(windows[:, :DAYS].T[..., None], jnp.float32), jnp.asarray(target, jnp.float32)


def elman(radius):
    """An orthogonal matrix times the radius: every eigenvalue and every singular value is as large as the radius."""
    return jrnn.stack(jrnn.elman(HIDDEN, recurrent_init=orthogonal(radius)), jrnn.dense(1))


def start(model, bias=None):
    """First parameters; with a bias for a GRU's update gate z, which keeps the state where it is open, as f does."""
    cell, head = model.init(jax.random.key(0), 1)
    if bias is not None:
        cell = {**cell, "b": cell["b"].at[HIDDEN : 2 * HIDDEN].add(bias)}  # gates in the order r, z, n
    return cell, head


def networks():
    """The networks to look at: ``{name: (model, params)}``.

    How a network starts is all in its parameters: networks that differ in nothing else are one model, compiled once.
    """
    found = {f"Elman, radius {radius:g}": (elman(1.0), start(elman(radius))) for radius in RADII}
    lstm = jrnn.stack(jrnn.lstm(HIDDEN), jrnn.dense(1))
    for bias in (0.0, 1.0, 2.0):
        found[f"LSTM, forget bias {bias:g}"] = (
            lstm,
            start(jrnn.stack(jrnn.lstm(HIDDEN, forget_bias=bias), jrnn.dense(1))),
        )
    for bias in (0.0, 2.0, 4.0):
        model = jrnn.stack(jrnn.gru(HIDDEN), jrnn.dense(1))
        found[f"GRU, update bias {bias:g}"] = model, start(model, bias)
    return found


def train(model, xs, targets, steps, name, clip=None, readout_only=False):
    """Plain gradient descent; the loss and the norm of the gradient before clipping, for every step."""

    def loss(params, batch, key):
        if readout_only:
            params = (jax.lax.stop_gradient(params[0]), params[1])
        xs, targets = batch
        return jnp.mean((jrnn.unroll(model, params, xs)[1][-1] - targets) ** 2)

    step = make_step(loss, jrnn.optimizer("sgd", RATE, clip_norm=clip))
    state, draw, history = step.init(start(model)), np.random.default_rng(0), []
    with tqdm(range(steps), desc=name, mininterval=0.5) as bar:
        for _ in bar:
            chosen = draw.integers(0, len(targets), BATCH)
            state, metrics = step(state, (xs[:, chosen], targets[chosen]))
            history.append((float(metrics.loss), float(metrics.grad_norm)))
            bar.set_postfix_str(f"loss {history[-1][0]:.3g}, gradient {history[-1][1]:.3g}", refresh=False)
    return np.array(history)


def print_flow(flow):
    windows = next(iter(flow.values())).valid.shape[1]
    print(f"\nNorm of dL/dh before any training, root mean square over {windows} windows")
    print(f"(it vanishes where it falls below {VANISHED:g} of the last day's, explodes above {EXPLODED:g} times it)")
    print(f"{'network':<22}{'last day':>10}{'first day':>11}{'a day':>8}   from the last day to the first")
    for name, result in flow.items():
        last, first = float(result.rms["h"][-1]), float(result.rms["h"][0])
        ratio = first / last
        verdict = "vanishes" if ratio < VANISHED else "explodes" if ratio > EXPLODED else "arrives"
        print(f"{name:<22}{last:>10.1e}{first:>11.1e}{ratio ** (1 / (DAYS - 1)):>8.3f}   times {ratio:.0e}: {verdict}")


def print_training(runs, targets, past):
    print(
        f"\nMean squared error in training: 1 is the mean as a forecast, {past:.2f} the last {AHEAD} days' volatility"
    )
    print(f"{'network':<36}{'first 20':>10}{'last 20':>10}{'largest gradient':>18}")
    for name, history in runs.items():
        losses, norms = history.T
        broken = np.flatnonzero(~np.isfinite(history).all(1))
        note = f"   not finite from step {broken[0]} on" if len(broken) else ""
        print(f"{name:<36}{losses[:20].mean():>10.3g}{losses[-20:].mean():>10.3g}{norms.max():>18.2g}{note}")


def smooth(values, width=20):
    """The mean of the last values up to each step: ``width`` of them where there are as many."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(flow, products, gates, runs, out):
    figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    days = np.arange(DAYS) - DAYS + 1
    elmans, gated = axes[0, 0], axes[0, 1]
    shades = {"Elman": plt.cm.plasma(np.linspace(0, 0.85, len(RADII))), "LSTM": plt.cm.Greens([0.4, 0.65, 0.95])}
    shades["GRU"] = plt.cm.Purples([0.4, 0.65, 0.95])
    colors = {kind: iter(values) for kind, values in shades.items()}
    for name, result in flow.items():
        kind, label = name.split(", ")
        ax = elmans if kind == "Elman" else gated
        label = label if kind == "Elman" else name
        ax.plot(days, result.rms["h"], color=next(colors[kind]), label=label, linestyle="--" if kind == "GRU" else "-")
    limits = [min(r.rms["h"].min() for r in flow.values()) / 10, max(r.rms["h"].max() for r in flow.values()) * 10]
    for ax, title in ((elmans, "Elman: the radius of W decides"), (gated, "LSTM and GRU: the gates' biases decide")):
        ax.set(yscale="log", ylim=limits, xlabel="days before the forecast", ylabel="norm of dL/dh$_t$", title=title)
        ax.legend(loc="lower right")

    plot_jacobian_products(products, axes[0, 2])
    axes[0, 2].set(
        title="Elman, radius 1.5: dh$_t$/dh$_k$ and its bounds",
        xlabel="lag t-k in days, from the initial state on",
        ylabel="singular values of dh$_t$/dh$_k$",
    )
    plot_gate_saturation(gates, axes[1, 0])
    axes[1, 0].set_title(f"LSTM, forget bias 2: gates within {gates.epsilon:g} of a limit")

    for (name, history), color in zip(runs.items(), ("C0", "C2", "C3", "C1"), strict=True):
        losses, norms = history.T
        axes[1, 1].plot(np.where(np.isfinite(losses), losses, np.nan), color=color, alpha=0.3, linewidth=0.8)
        if np.isfinite(losses).all():
            axes[1, 1].plot(smooth(losses), color=color, label=name)
        else:  # no mean of what has no bound
            axes[1, 1].plot(losses, color=color, label=name)
        axes[1, 2].plot(np.where(np.isfinite(norms), norms, np.nan), color=color, label=name, linewidth=0.8)
    axes[1, 1].set(yscale="log", ylim=(0.2, 1e2), xlabel="step", ylabel="loss", title="Training loss (pale: one batch)")
    axes[1, 2].axhline(CLIP, color="black", linestyle=":", label="clipped to")
    axes[1, 2].set(
        yscale="log", ylim=(1e-2, 1e8), xlabel="step", ylabel="norm", title="Norm of the gradient, before clipping"
    )
    axes[1, 1].legend(loc="upper right")
    axes[1, 2].legend(loc="upper right")
    figure.suptitle(f"Gradients through {DAYS} days of the S&P 500")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "gradient_flow.png")
    parser.add_argument("--quick", action="store_true", help="fewer windows and training steps")
    options = parser.parse_args(arguments)
    steps, windows = (60, 16) if options.quick else (400, 128)

    with shared.loading("gradient_flow.py"):
        xs, targets = load_windows()
    some = np.linspace(0, len(targets) - 1, windows).astype(int)

    def loss(state, ys):
        return jnp.mean((ys[-1] - targets[some]) ** 2)

    flow, models = {}, networks()
    for name, (model, params) in tqdm(models.items(), desc="gradients through time"):
        flow[name] = gradient_norms(model, params, xs[:, some], loss)
    products = jacobian_products(*models["Elman, radius 1.5"], xs[:, some[:8]])
    gates = gate_saturation(*models["LSTM, forget bias 2"], xs[:, some])

    runs = {
        "Elman, radius 0.9": train(elman(0.9), xs, targets, steps, "radius 0.9"),
        "Elman, radius 1.5, readout only": train(elman(1.5), xs, targets, steps, "readout only", readout_only=True),
        "Elman, radius 1.5": train(elman(1.5), xs, targets, steps, "radius 1.5"),
        f"Elman, radius 1.5, clipped to {CLIP:g}": train(elman(1.5), xs, targets, steps, "clipped", CLIP),
    }

    print_flow(flow)
    last = np.median(products.norms[-1]), np.median(products.bound[-1]), np.median(products.weight_bound[-1])
    print(
        f"\nElman, radius 1.5, {DAYS} steps: the largest singular value of the product of Jacobians is {last[0]:.1e},"
    )
    print(f"at most the product of the steps' own norms, {last[1]:.1e}, and that at most 1.5 ** {DAYS} = {last[2]:.1e}")
    past = np.log(np.abs(np.asarray(xs)[-AHEAD:, :, 0]).mean(0))
    past = (past - past.mean()) / past.std()
    print_training(runs, targets, float(np.mean((past - np.asarray(targets)[:, 0]) ** 2)))
    draw(flow, products, gates, runs, options.out)
    print(f"\nPicture: {options.out}")


if __name__ == "__main__":
    main()
