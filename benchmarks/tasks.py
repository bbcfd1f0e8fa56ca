"""Cells beside each other on the small tasks of the papers: ``python benchmarks/tasks.py``.

Every pair of a cell and a task is trained with the same number of steps on the same batches, by the same optimiser at
one learning rate, in a model that differs in the cell alone::

    dense(32), gelu -> the cell -> dense(32), gelu -> dense(outputs)

The cell is as wide as a budget of parameters lets it be. Nothing is tuned, per cell or per task, and one seed is run
unless ``--seeds`` says otherwise: the table says what comes out of the box in a short training, and not what a cell
can do at best. One option is not the default: the gates of minGRU, minLSTM, SRU and QRNN are half open before training,
so that a memory lasts for about two steps, and in a short training some never learn more. Their forget biases start
with memories of up to T steps, T being the steps of the task (`jrnn.initializers.chrono`).

Writes ``benchmarks/results/tasks-CPU.json`` and a table beside it, anew after each pair. After an interruption the same
command goes on from there.

    python benchmarks/tasks.py --list                     # the pairs, with the width and the parameters of each cell
    python benchmarks/tasks.py --only copying             # the pairs whose name contains this; may be given twice
    python benchmarks/tasks.py --minutes 30               # begins no pair that may end later
    python benchmarks/tasks.py --quick                    # a few steps of each pair: whether it runs
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jrnn
from benchmarks import machine, store

FORMAT = 1
BUDGET = 6_000  # parameters of a cell, with what it needs before it
WIDTH = 32
RATE, CLIP = 3e-3, 1.0
ROUNDS = 10  # of a training, with a test after each
RESULTS = machine.ROOT / "benchmarks" / "results"


# --- cells -----------------------------------------------------------------------------------------------------------

CELLS: dict[str, Callable[[int], Any]] = {
    "elman": jrnn.elman,
    "lstm": jrnn.lstm,
    "gru": jrnn.gru,
    "indrnn": jrnn.indrnn,
    "orthogonal_rnn": jrnn.orthogonal_rnn,
    "antisymmetric": jrnn.antisymmetric,
    "cornn": jrnn.cornn,
    "lem": jrnn.lem,
    "min_gru": jrnn.min_gru,
    "min_lstm": jrnn.min_lstm,
    "sru": jrnn.sru,
    "qrnn": jrnn.qrnn,
    "lru": lambda hidden: jrnn.lru(hidden, hidden),
    "s5": lambda hidden: jrnn.s5(hidden, hidden),
    "rg_lru": lambda hidden: jrnn.stack(jrnn.dense(hidden), jrnn.rg_lru(hidden)),  # its inputs have H features
    "slstm": lambda hidden: jrnn.slstm(hidden, heads=2),
    "mlstm": lambda hidden: jrnn.mlstm(hidden, heads=2),
    "gated_delta_net": lambda hidden: jrnn.gated_delta_net(hidden, heads=2),
}

# The cells that are given forget biases for memories of up to the steps of the task.
FORGETTING = ("min_gru", "min_lstm", "sru", "qrnn")


def options_of(name: str, task: Task) -> dict[str, Any]:
    """The options of a cell on a task that are not the defaults."""
    return {"forget_bias": jrnn.initializers.chrono(task.length)} if name in FORGETTING else {}


def count(layer: Any, in_features: int) -> int:
    """The numbers among a layer's parameters."""
    params = jax.eval_shape(lambda key: layer.init(key, in_features), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.cache
def fitted(name: str) -> tuple[Any, int, int]:
    """The widest cell of a name that the budget allows, its width, a multiple of 4, and its parameters."""
    fits = lambda quarter: count(CELLS[name](4 * quarter), WIDTH) <= BUDGET
    high = 2
    while fits(high):  # from below, since to initialise a wide S5 takes its eigenvectors
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    cell = CELLS[name](4 * low)
    return cell, 4 * low, count(cell, WIDTH)


# --- tasks -----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task: ``sample(key, batch)`` gives inputs ``(T, B, F)`` and targets, ``loss(ys, targets)`` is trained.

    ``metrics(ys, targets)`` are measured on the test set, ``test``; the first of them is the one of the table.
    ``trivial`` is what predictors that know nothing of the inputs get in it, ``lower`` whether less is better.
    ``length`` is T.
    """

    about: str
    length: int
    features: int
    outputs: int
    batch: int
    steps: int
    sample: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    test: Callable[[], tuple[jax.Array, jax.Array]]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    metrics: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
    trivial: dict[str, float | None]
    lower: bool


TEST_KEY = 1_000_003


def adding(length: int, steps: int, batch: int = 32) -> Task:
    """The adding problem (Hochreiter and Schmidhuber 1997): the sum of the two numbers that are marked."""

    def sample(key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        k_values, k_first, k_second = jax.random.split(key, 3)
        values = jax.random.uniform(k_values, (length, batch))
        first = jax.random.randint(k_first, (batch,), 0, length // 2)
        second = jax.random.randint(k_second, (batch,), length // 2, length)
        times = jnp.arange(length)[:, None]
        marks = ((times == first) | (times == second)).astype(values.dtype)
        return jnp.stack([values, marks], -1), jnp.sum(values * marks, 0)

    def test() -> tuple[jax.Array, jax.Array]:
        return sample(jax.random.key(TEST_KEY), 256)

    def error(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return jrnn.losses.mse(ys[-1, :, 0], targets)

    ones = jnp.ones((1, 256, 1))
    return Task(
        f"adding problem, T = {length}: mean squared error at the last step",
        length=length,
        features=2,
        outputs=1,
        batch=batch,
        steps=steps,
        sample=sample,
        test=test,
        loss=error,
        metrics=lambda ys, targets: {"mse": error(ys, targets)},
        trivial={"always 1, the mean": 1 / 6, "the same on these tests": _number(error(ones, test()[1]))},
        lower=True,
    )


SYMBOLS, COPIED = 8, 10


def copying(delay: int, steps: int, batch: int = 32) -> Task:
    """Copying memory (Hochreiter and Schmidhuber 1997; as in Arjovsky, Shah and Bengio 2016).

    Ten symbols of eight kinds, ``delay - 1`` blanks, a sign to begin and ten blanks more; the outputs are blanks, and
    then the ten symbols.
    """
    blank, sign = SYMBOLS, SYMBOLS + 1

    def sample(key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        symbols = jax.random.randint(key, (COPIED, batch), 0, SYMBOLS)
        fill = lambda steps, value: jnp.full((steps, batch), value, symbols.dtype)
        ids = jnp.concatenate([symbols, fill(delay - 1, blank), fill(1, sign), fill(COPIED, blank)])
        return jax.nn.one_hot(ids, SYMBOLS + 2), jnp.concatenate([fill(delay + COPIED, blank), symbols])

    def metrics(ys: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        recalled = jrnn.losses.accuracy(ys[-COPIED:], targets[-COPIED:])
        return {"cross-entropy": jrnn.losses.cross_entropy(ys, targets), "recalled": recalled}

    return Task(
        f"copying memory, T = {delay}: cross-entropy over all {delay + 2 * COPIED} steps, in nats",
        length=delay + 2 * COPIED,
        features=SYMBOLS + 2,
        outputs=SYMBOLS + 1,
        batch=batch,
        steps=steps,
        sample=sample,
        test=lambda: sample(jax.random.key(TEST_KEY), 128),
        loss=jrnn.losses.cross_entropy,
        metrics=metrics,
        trivial={"blanks, then any symbol": COPIED * math.log(SYMBOLS) / (delay + 2 * COPIED)},
        lower=True,
    )


def mackey_glass_series(length: int, delay: float = 17.0, substeps: int = 10) -> np.ndarray:
    """The equation of Mackey and Glass (1977), one value for each unit of time, by Runge-Kutta steps of a tenth.

    ``dx/dt = 0.2 x(t - delay) / (1 + x(t - delay)^10) - 0.1 x``; what comes before a time of 300 is left out.
    """
    h, lag, skip = 1 / substeps, round(delay * substeps), 300
    total = (length + skip) * substeps
    x = [1.2] * (lag + 1)
    production = lambda late: 0.2 * late / (1 + late**10)
    for i in range(total):
        begin, end = production(x[i]), production(x[i + 1])
        middle = production(0.5 * (x[i] + x[i + 1]))
        now = x[-1]
        k1 = begin - 0.1 * now
        k2 = middle - 0.1 * (now + 0.5 * h * k1)
        k3 = middle - 0.1 * (now + 0.5 * h * k2)
        k4 = end - 0.1 * (now + h * k3)
        x.append(now + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return np.array(x[lag::substeps][skip : skip + length])


WASHOUT = 50


def mackey_glass(steps: int, length: int = 150, ahead: int = 15, batch: int = 32) -> Task:
    """Mackey-Glass with a delay of 17: at every step the value 15 units of time later (as in Voelker et al. 2019)."""
    trained, tested = 6_000, 2_000

    @functools.cache
    def series() -> np.ndarray:
        x = mackey_glass_series(trained + tested)
        return ((x - x[:trained].mean()) / x[:trained].std()).astype(np.float32)

    def windows(x: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = x[starts[None] + jnp.arange(length + ahead)[:, None]]
        return found[:length, :, None], found[ahead:]

    def sample(key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        starts = jax.random.randint(key, (batch,), 0, trained - length - ahead)
        return windows(jnp.asarray(series()[:trained]), starts)

    def test() -> tuple[jax.Array, jax.Array]:
        return windows(jnp.asarray(series()[trained:]), jnp.arange(0, tested - length - ahead, 10))

    def error(ys: jax.Array, targets: jax.Array) -> jax.Array:
        return jrnn.losses.mse(ys[WASHOUT:, :, 0], targets[WASHOUT:])

    def metrics(ys: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        return {"nrmse": jnp.sqrt(error(ys, targets) / jnp.var(targets[WASHOUT:]))}

    def persistence() -> float:
        xs, targets = test()
        return round(float(metrics(xs, targets)["nrmse"]), 3)

    return Task(
        f"Mackey-Glass, delay 17, {ahead} steps ahead in windows of {length}: root mean square error over the "
        f"standard deviation, from step {WASHOUT} on",
        length=length,
        features=1,
        outputs=1,
        batch=batch,
        steps=steps,
        sample=sample,
        test=test,
        loss=error,
        metrics=metrics,
        trivial={"the mean": 1.0, "the last value": persistence()},
        lower=True,
    )


def classification(about: str, data: Callable[[], tuple[np.ndarray, ...]], length: int, steps: int) -> Task:
    """A class at the last step. ``data`` gives sequences ``(T, N, 1)`` and classes ``(N,)``, then those of the test."""

    def sample(key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        xs, classes, *_ = data()
        chosen = jax.random.randint(key, (batch,), 0, len(classes))
        return jnp.asarray(xs)[:, chosen], jnp.asarray(classes)[chosen]

    def test() -> tuple[jax.Array, jax.Array]:
        *_, xs, classes = data()
        return jnp.asarray(xs), jnp.asarray(classes)

    return Task(
        about,
        length=length,
        features=1,
        outputs=10,
        batch=64,
        steps=steps,
        sample=sample,
        test=test,
        loss=lambda ys, classes: jrnn.losses.cross_entropy(ys[-1], classes),
        metrics=lambda ys, classes: {"accuracy": jrnn.losses.accuracy(ys[-1], classes)},
        trivial={"any digit": 0.1},
        lower=False,
    )


@functools.cache
def _curves() -> tuple[np.ndarray, ...]:
    try:
        from mnist1d.data import get_dataset_args, make_dataset  # make_dataset computes; get_dataset would download
    except ImportError as error:
        raise ImportError('the curves need mnist1d, which is not installed; pip install -e ".[examples]"') from error
    data = make_dataset(get_dataset_args())
    curves = [data[name].T[..., None].astype(np.float32) for name in ("x", "x_test")]
    digits = [data[name].astype(np.int32) for name in ("y", "y_test")]
    return curves[0], digits[0], curves[1], digits[1]


def mnist1d(steps: int) -> Task:
    """MNIST-1D (Greydanus and Kobak 2024): noisy curves of ten digits, 40 points one after another."""
    return classification(
        "MNIST-1D, 40 points one by one: accuracy at the last of them, on 1,000 curves", _curves, length=40, steps=steps
    )


PIXELS, TESTED = 64, 360


@functools.cache
def _images() -> tuple[np.ndarray, ...]:
    path = machine.ROOT / "examples" / "data" / "digits.npz"  # its README.md: source, authors, licence
    with np.load(path) as found:
        pixels = found["images"].reshape(-1, PIXELS, 1).swapaxes(0, 1).astype(np.float32) / 16
        labels = found["labels"].astype(np.int32)
    return pixels[:, :-TESTED], labels[:-TESTED], pixels[:, -TESTED:], labels[-TESTED:]


def digits(steps: int) -> Task:
    """Digits of 8 x 8 pixels (Alpaydin and Kaynak 1998), one pixel after another as in Le, Jaitly and Hinton (2015)."""
    return classification(
        f"handwritten digits, {PIXELS} pixels one by one: accuracy at the last of them, on {TESTED} images",
        _images,
        length=PIXELS,
        steps=steps,
    )


# In the order in which they are run.
TASKS: dict[str, Callable[[], Task]] = {
    "adding-100": lambda: adding(100, steps=2_000),
    "mnist1d": lambda: mnist1d(steps=1_000),
    "digits": lambda: digits(steps=1_000),
    "copying-100": lambda: copying(100, steps=1_000),
    "mackey-glass": lambda: mackey_glass(steps=800),
    "adding-400": lambda: adding(400, steps=2_000),
    "copying-400": lambda: copying(400, steps=1_000),
}


# --- training --------------------------------------------------------------------------------------------------------


def model_of(cell: Any, outputs: int) -> Any:
    gelu = jrnn.activation("gelu")
    return jrnn.stack(jrnn.dense(WIDTH), gelu, cell, jrnn.dense(WIDTH), gelu, jrnn.dense(outputs))


def train(cell: Any, task: Task, steps: int, seed: int, deadline: float = math.inf) -> dict[str, Any] | None:
    """One training: metrics after each round, and times. None where the deadline came first."""
    model = model_of(cell, task.outputs)
    warmup = max(1, steps // 20)
    rate = jrnn.training.schedule("warmup_cosine", RATE, steps=steps, warmup_steps=warmup)
    tx = jrnn.optimizer("adam", rate, clip_norm=CLIP)
    test = task.test()

    def loss(params: Any, xs: jax.Array, targets: jax.Array) -> jax.Array:
        return task.loss(jrnn.unroll(model, params, xs)[1], targets)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *task.sample(key, task.batch))
        updates, state = tx.update(gradient, state, params)
        return (jax.tree.map(lambda p, u: p + u, params, updates), state), value

    @jax.jit
    def one_round(carry: Any, keys: jax.Array, test: Any) -> tuple[Any, jax.Array, Any]:
        carry, losses = lax.scan(step, carry, keys)
        xs, targets = test
        return carry, jnp.mean(losses), task.metrics(jrnn.unroll(model, carry[0], xs)[1], targets)

    k_init, k_data = jax.random.split(jax.random.key(seed))
    params = model.init(k_init, task.features)
    carry = params, tx.init(params)
    keys = jax.random.split(k_data, (ROUNDS, steps // ROUNDS))
    begin = time.perf_counter()
    compiled = one_round.lower(carry, keys[0], test).compile()
    ready = time.perf_counter()
    curve: list[dict[str, float]] = []
    for i in range(ROUNDS):
        carry, value, metrics = jax.block_until_ready(compiled(carry, keys[i], test))
        curve.append({"loss": _number(value), **{name: _number(found) for name, found in metrics.items()}})
        if time.perf_counter() > deadline and i < ROUNDS - 1:
            return None
    end = time.perf_counter()
    return {
        "curve": curve,
        "compile_s": round(ready - begin, 1),
        "train_s": round(end - ready, 1),
        "step_ms": round(1e3 * (end - ready) / (ROUNDS * (steps // ROUNDS)), 2),
        "backend": jrnn.choose_backend(model, params, test[0])[0],
    }


def _number(value: Any) -> float | None:
    """A number for JSON, which has none that are not finite."""
    found = float(value)
    return float(f"{found:.5g}") if math.isfinite(found) else None


# --- results ---------------------------------------------------------------------------------------------------------


def settings_of(task: Task, steps: int) -> dict[str, Any]:
    """What a pair was trained with: a pair with other settings is trained again."""
    return {"steps": steps, "batch": task.batch, "rate": RATE, "clip": CLIP, "budget": BUDGET, "width": WIDTH}


def described(task: Task, metric: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a task."""
    about = {"about": task.about, "metric": metric, "trivial": task.trivial, "lower": task.lower}
    return {**about, "settings": settings}


def load(path: Path) -> dict[str, Any]:
    if path.exists():
        content = json.loads(path.read_text())
        if content.get("format") == FORMAT:
            return content
    return {"format": FORMAT, "tasks": {}, "cells": {}, "pairs": {}}


def final(pair: dict[str, Any], metric: str) -> float | None:
    """The mean over seeds of a metric after the last round; None where a run was not finite."""
    values = [run["curve"][-1][metric] for run in pair["runs"].values()]
    return None if None in values else sum(values) / len(values)


def markdown(content: dict[str, Any]) -> str:
    """The table of cells and tasks, and what belongs to it."""
    tasks = {name: content["tasks"][name] for name in TASKS if name in content["tasks"]}
    lines = ["# Cells on small tasks", ""]
    lines += [
        "Written by `python benchmarks/tasks.py`. All cells of a task have the same steps, batches, optimiser and "
        f"learning rate ({RATE}), and at most {BUDGET:,} parameters, in the same model. Nothing was tuned for any of "
        "them: this is what comes out of the box in a short training, but for the options that are named below. The "
        "best of a column is bold, and - is a pair that was not run.",
        "",
    ]
    hardware, versions = content.get("hardware", {}), content.get("versions", {})
    machine_line = f"{hardware.get('cpu')}, {hardware.get('cores')} core(s)"
    lines += ["; ".join([machine_line, *(f"{name} {version}" for name, version in versions.items())]) + ".", ""]
    columns = {name: {cell: _value(content, name, cell) for cell in CELLS} for name in tasks}
    best = {name: _best(column.values(), tasks[name]["lower"]) for name, column in columns.items()}
    lines += ["| | " + " | ".join(f"{name} ({tasks[name]['metric']})" for name in tasks) + " |"]
    lines += ["|---|" + "---|" * len(tasks)]
    for cell in CELLS:
        texts = [_text(columns[name][cell], best[name]) for name in tasks]
        lines += [f"| `{cell}` | " + " | ".join(texts) + " |"]
    trivial = ["; ".join(f"{what}: {value:.3g}" for what, value in tasks[name]["trivial"].items()) for name in tasks]
    lines += ["| *trivial predictors* | " + " | ".join(trivial) + " |", ""]
    for name, task in tasks.items():
        settings = task["settings"]
        seeds = sorted({len(p["runs"]) for key, p in content["pairs"].items() if key.startswith(f"{name}/")})
        lines += [
            f"- **{name}**: {task['about']}. {settings['steps']:,} steps of {settings['batch']} sequences; "
            f"{' or '.join(map(str, seeds))} seed(s)."
        ]
    for cell in CELLS:
        pairs = {name: content["pairs"].get(f"{name}/{cell}", {"settings": {}}) for name in tasks}
        biases = {name: pair["settings"].get("forget_bias") for name, pair in pairs.items()}
        texts = [f"`{bias}` in {name}" for name, bias in biases.items() if bias is not None]
        if texts:
            lines += [f"- `{cell}` not with its defaults, but with the `forget_bias` {', '.join(texts)}."]
    lines += [
        "",
        "The width H of each cell, its parameters, and the milliseconds of one training step, with the tests that come "
        "in between. On a machine that others use, these times say little.",
        "",
    ]
    lines += ["| | H | parameters | " + " | ".join(tasks) + " |", "|---|---|---|" + "---|" * len(tasks)]
    for cell in CELLS:
        known = content["cells"].get(cell)
        if known is None:
            continue
        pairs = [content["pairs"].get(f"{name}/{cell}") for name in tasks]
        times = [min(run["step_ms"] for run in pair["runs"].values()) if pair else None for pair in pairs]
        texts = ["-" if value is None else f"{value:.3g}" for value in times]
        lines += [f"| `{cell}` | {known['hidden']} | {known['parameters']:,} | " + " | ".join(texts) + " |"]
    return "\n".join(lines) + "\n"


def _value(content: dict[str, Any], task: str, cell: str) -> float | str | None:
    pair = content["pairs"].get(f"{task}/{cell}")
    if pair is None:
        return None
    value = final(pair, content["tasks"][task]["metric"])
    return "not finite" if value is None else value


def _best(values: Any, lower: bool) -> float | None:
    numbers = [value for value in values if isinstance(value, float)]
    return (min if lower else max)(numbers) if numbers else None


def _text(value: float | str | None, best: float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    text = f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"
    return f"**{text}**" if value == best else text


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="the pairs TASK/CELL whose name contains this")
    parser.add_argument("--list", action="store_true", help="what would be run, and the cells' widths")
    parser.add_argument("--quick", action="store_true", help=f"{2 * ROUNDS} steps a pair: whether it runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begins no pair that may end later")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of a pair (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="trains again what is there already")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/tasks-CPU.json)")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    deadline = begin + 60 * options.minutes

    names = [f"{task}/{cell}" for task in TASKS for cell in CELLS]
    wanted = [name for name in names if options.only is None or any(text in name for text in options.only)]
    if not wanted:
        parser.error(f"--only: expected a part of TASK/CELL, tasks {list(TASKS)} and cells {list(CELLS)}")
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if options.list:
        print("\n".join(wanted), "", sep="\n")
        print("\n".join(f"{cell:16} H = {fitted(cell)[1]:4}  {fitted(cell)[2]:6,} parameters" for cell in CELLS))
        return 0

    hardware = machine.hardware()
    slug = "".join(c if c.isalnum() else "-" for c in hardware["cpu"].lower()).strip("-")
    path = options.out or RESULTS / f"tasks-{'quick' if options.quick else slug}.json"
    content = load(path)
    print(
        f"{len(wanted)} pairs; cells of at most {BUDGET:,} parameters; Adam at {RATE}, gradients clipped to {CLIP}, "
        f"warm-up and cosine; {options.seeds} seed(s)",
        flush=True,
    )
    left: list[str] = []
    made: dict[str, Task] = {}
    longest = 0.0
    for name in wanted:
        task_name, cell_name = name.split("/")
        if task_name not in made:
            made[task_name], longest = TASKS[task_name](), 0.0
            steps = 2 * ROUNDS if options.quick else made[task_name].steps
            print(f"{task_name}: {made[task_name].about}; {steps:,} steps of {made[task_name].batch}", flush=True)
        task = made[task_name]
        settings, own = settings_of(task, steps), options_of(cell_name, task)
        trained = {**settings, **{option: repr(value) for option, value in own.items()}}
        known = content["pairs"].get(name)
        runs = {} if options.fresh or known is None or known["settings"] != trained else known["runs"]
        for seed in range(options.seeds):
            if str(seed) in runs:
                continue
            start = time.perf_counter()
            # As long as the longest of this task so far: then a pair that is begun is, as a rule, finished.
            cell = dataclasses.replace(fitted(cell_name)[0], **own)
            found = None if start + longest > deadline else train(cell, task, steps, seed, deadline)
            jax.clear_caches()
            if found is None:
                left.append(f"{name} (seed {seed})")
                continue
            longest = max(longest, time.perf_counter() - start)
            runs[str(seed)] = found
            metric = next(iter(key for key in found["curve"][-1] if key != "loss"))
            _, hidden, parameters = fitted(cell_name)
            content["hardware"], content["versions"] = hardware, _versions()
            content["cells"][cell_name] = {"hidden": hidden, "parameters": parameters}
            content["tasks"][task_name] = described(task, metric, settings)
            content["pairs"][name] = {"settings": trained, "runs": runs}
            _write(path, content)
            print(
                f"  {name}: {metric} {found['curve'][-1][metric]}, {found['compile_s']} s to compile and "
                f"{found['train_s']} s to train ({found['backend']})",
                flush=True,
            )
    print(f"{path}: {len(content['pairs'])} pairs; {time.perf_counter() - begin:.0f} s")
    if left:
        print(f"not run, since the minutes were over: {', '.join(left)}")
    return 0


def _versions() -> dict[str, str]:
    source = machine.source_hash(machine.ROOT / "jrnn")
    known = {name: version for name, version in machine.versions().items() if name in ("python", "jax", "numpy")}
    return {"jrnn": f"{jrnn.__version__} (source {source})", **known}


def _write(path: Path, content: dict[str, Any]) -> None:
    store.replace(path, json.dumps(content, indent=1) + "\n")
    store.replace(path.with_suffix(".md"), markdown(content))


if __name__ == "__main__":
    sys.exit(main())
