"""Why plain recurrent networks forget: gradients that vanish and explode, and what gates and clipping do about it.

    pip install -e ".[examples]" && python examples/gradient_flow.py

One hundred days of S&P 500 returns go in, the volatility of the next twenty is asked for at the last of them. How much
of that loss still reaches the first day? In Elman's network that is decided by the spectral radius of its recurrent
weights: the gradient is multiplied by them, and by the slope of the activation, at every step back (Bengio et al.
1994, Pascanu et al. 2013). The memory of an LSTM and the state of a GRU are carried, not multiplied.
"""

import argparse
import pathlib
import sys

import jax
import matplotlib
import numpy as np
from tqdm import tqdm

import jrnn
from jrnn.initializers import orthogonal
from jrnn.training import make_step

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

DAYS, AHEAD, HIDDEN = 100, 20, 32
EXPLODING = 1.75  # spectral radius of the network that clipping is to save


def load():
    """Scaled returns (DAYS, windows, 1) and scaled log volatility of the AHEAD days after each window (windows,)."""
    from arch.data import sp500  # here: slow to import

    returns = np.diff(np.log(sp500.load()["Adj Close"].to_numpy(float)))
    windows = np.lib.stride_tricks.sliding_window_view(returns / returns.std(), DAYS + AHEAD)[::5]
    volatility = np.log(np.abs(windows[:, DAYS:]).mean(axis=1))
    volatility = (volatility - volatility.mean()) / volatility.std()
    return windows[:, :DAYS].T[..., None].astype(np.float32), volatility.astype(np.float32)


def elman(radius):
    """Elman's network whose recurrent matrix is orthogonal times `radius`: every singular value is `radius`."""
    return jrnn.elman(HIDDEN, recurrent_init=orthogonal(radius))


def remembering(cell):
    """Parameters of a cell whose gates start out keeping its memory: a bias of 3 on the gate that decides on it."""
    params = cell.init(jax.random.key(0), 1)
    keep = {"LSTM": "f", "GRU": "z"}.get(type(cell).__name__)  # Elman's has no gates, and starts as it is
    if keep is not None:
        first = cell.gate_names.index(keep) * HIDDEN
        params["b"] = params["b"].at[first : first + HIDDEN].set(3.0)
    return params


def flow(cell, inputs):
    """|dL/ds_t|, s the state after day t and L a random linear readout of the last output, before any training."""
    readout = jax.random.normal(jax.random.key(1), (HIDDEN,))
    return jrnn.diagnose.gradient_norms(cell, remembering(cell), inputs, lambda state, ys: (ys[-1] @ readout).mean())


def train(radius, clip_norm, inputs, targets, steps):
    """Loss and gradient norm (before clipping) of every step; a step that is not finite changes nothing."""
    model = jrnn.stack(elman(radius), jrnn.dense(1))

    def loss_fn(params, batch, key):
        xs, volatility = batch
        return jrnn.losses.mse(jrnn.unroll(model, params, xs)[1][-1, :, 0], volatility)

    step = make_step(loss_fn, jrnn.optimizer("sgd", 0.05, clip_norm=clip_norm))
    state = step.init(model.init(jax.random.key(0), 1))
    losses, norms, rng = [], [], np.random.default_rng(0)
    bar = tqdm(range(steps), desc=f"clip_norm={clip_norm}", leave=False)
    for _ in bar:
        chosen = rng.choice(inputs.shape[1], 64, replace=False)
        state, metrics = step(state, (inputs[:, chosen], targets[chosen]))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
        bar.set_postfix(loss=losses[-1], grad_norm=norms[-1], refresh=False)
    return np.array(losses), np.array(norms)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gradient_flow.png", help="where to draw the picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few training steps, to see that it works")
    options = parser.parse_args(arguments)
    if not pathlib.Path(options.out).resolve().parent.is_dir():
        parser.error(f"--out: there is no folder to write {options.out} to")
    try:
        inputs, targets = load()
    except ImportError as error:
        sys.exit(f'gradient_flow.py: {error}; pip install -e ".[examples]" brings it')
    sample = inputs[:, ::50]  # a few sequences tell enough
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")

    cells = {f"Elman, radius {radius}": elman(radius) for radius in (0.5, 0.9, 1.0, 1.2, 1.5)}
    cells |= {"LSTM": jrnn.lstm(HIDDEN), "GRU": jrnn.gru(HIDDEN)}
    print(f"{'before training':20}{'first day':>14}{'day 50':>14}{'last day':>14}{'first / last':>14}")
    for name, cell in cells.items():
        # The whole state counts: an LSTM's memory is in c.
        norm = np.sqrt(sum(rms**2 for rms in flow(cell, sample).rms.values()))
        print(f"{name:20}{norm[0]:14.2e}{norm[DAYS // 2]:14.2e}{norm[-1]:14.2e}{norm[0] / norm[-1]:14.2e}")
        axes[0, 0].plot(np.maximum(norm, 1e-35), label=name, linestyle="-" if "Elman" in name else "--")
    axes[0, 0].set(yscale="log", xlabel="day t", ylabel=r"norm of $\partial L/\partial s_t$, s the state")
    axes[0, 0].set_title("What of the last day's loss reaches day t")
    axes[0, 0].legend(fontsize="small")

    cell = elman(0.9)
    products = jrnn.diagnose.jacobian_products(cell, cell.init(jax.random.key(0), 1), sample[:, :4], lags=40)
    jrnn.diagnose.plot_jacobian_products(products, axes[0, 1])
    axes[0, 1].set_title("Elman, radius 0.9: the bound is obeyed")
    within = bool((products.norms <= products.weight_bound * (1 + 1e-5)).all())
    print(f"\nElman, radius 0.9: norms of Jacobian products below 0.9 ** (t-k): {within}")

    print(f"\ntraining Elman, radius {EXPLODING}, by gradient descent")
    print(f"{'':20}{'loss, first 20':>15}{'loss, last 20':>15}{'largest loss':>14}{'largest gradient':>18}")
    for clip_norm in (None, 1.0):
        losses, norms = train(EXPLODING, clip_norm, inputs, targets, 40 if options.quick else 400)
        label = f"clip_norm={clip_norm}"
        print(f"{label:20}{losses[:20].mean():15.3g}{losses[-20:].mean():15.3g}{losses.max():14.3g}{norms.max():18.3g}")
        axes[1, 0].plot(losses, label=label, alpha=0.8)
        axes[1, 1].plot(norms, label=label, alpha=0.8)
    axes[1, 0].axhline(1.0, color="0.5", linestyle=":", label="the mean as forecast")
    axes[1, 0].set_title(f"Training Elman, radius {EXPLODING}: loss")
    axes[1, 1].set_title("and gradient norm, before clipping")
    axes[1, 0].set_ylabel("mean squared error")
    axes[1, 1].set_ylabel("global norm of the gradient")
    for ax in axes[1]:
        ax.set(yscale="log", xlabel="step")
        ax.legend()
    figure.savefig(options.out, dpi=110)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
