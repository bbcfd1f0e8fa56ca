"""What do cells remember? The adding problem and copying memory, over 100 steps and more, one cell beside another.

    pip install -e ".[examples]" && python examples/memory.py          # five cells
    python examples/memory.py --task copying --cells orthogonal_rnn lstm
    python examples/memory.py --length 400 --cells gru lem rg_lru       # any of the names that --help lists

Both tasks are those of Hochreiter and Schmidhuber (1997), drawn anew for every step of the training:

* adding: of ``length`` random numbers two are marked, one in each half, and the last output is to be their sum. A model
  that always answers 1, which takes no memory, has a mean squared error of 1/6 = 0.167.
* copying (as in Arjovsky, Shah and Bengio 2016): ten symbols of eight kinds, ``length`` steps of blanks, and then the
  ten again. A model that forgets them and guesses has a cross-entropy of 10 ln 8 / (length + 20).

All cells have the same number of units, the same batches and the same learning rate. Nothing is tuned for any of them:
a cell that fails here may do better with other settings, or in a longer training (`--steps`, `--learning-rate`).

What it printed by default, after 112 seconds of processor time (logs/memory.txt):

    test: mean squared error    parameters  at the end   at best  solved at  seconds
      elman                          3,265      0.1573    0.1572          -       24
      lstm                           9,505      0.0019    0.0019       1100       23
      gru                            7,457      0.0001    0.0001        400       22
      min_gru                        3,297      0.0012    0.0012        700       24
      lru                            6,401      0.1574    0.1571          -       30
      no memory                                 0.1667    0.1667
"""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

import jrnn
import shared
from jrnn import training

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

CELLS = {
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
    "lru": lambda hidden: jrnn.lru(hidden, hidden),
    "s5": lambda hidden: jrnn.s5(hidden, hidden),
    "rg_lru": lambda hidden: jrnn.stack(jrnn.dense(hidden), jrnn.rg_lru(hidden)),  # its inputs have as many features
    "slstm": lambda hidden: jrnn.slstm(hidden, heads=2),
    "mlstm": lambda hidden: jrnn.mlstm(hidden, heads=2),
    "gated_delta_net": lambda hidden: jrnn.gated_delta_net(hidden, heads=2),
}
SYMBOLS, COPIED = 8, 10
BATCH, TESTS, ROUNDS = 32, 512, 20  # sequences of a step and of the test; tests in a training
SOLVED = 0.1  # of the loss of chance: below this share of it we call a task solved


class Task(NamedTuple):
    title: str
    ylabel: str
    features: int
    outputs: int
    sample: Any  # (key, batch) -> inputs (T, batch, features), targets
    loss: Any  # (outputs (T, batch, outputs), targets) -> the loss
    chance: float  # the loss of a model without memory


def adding(length):
    def sample(key, batch):
        k_values, k_first, k_second = jax.random.split(key, 3)
        values = jax.random.uniform(k_values, (length, batch))
        first = jax.random.randint(k_first, (batch,), 0, length // 2)
        second = jax.random.randint(k_second, (batch,), length // 2, length)
        times = jnp.arange(length)[:, None]
        marks = ((times == first) | (times == second)).astype(values.dtype)
        return jnp.stack([values, marks], axis=-1), jnp.sum(values * marks, axis=0)

    loss = lambda ys, targets: jrnn.losses.mse(ys[-1, :, 0], targets)
    return Task(f"Adding problem, {length} steps", "mean squared error", 2, 1, sample, loss, 1 / 6)


def copying(length):
    blank, sign = SYMBOLS, SYMBOLS + 1

    def sample(key, batch):
        symbols = jax.random.randint(key, (COPIED, batch), 0, SYMBOLS)
        fill = lambda steps, value: jnp.full((steps, batch), value, symbols.dtype)
        ids = jnp.concatenate([symbols, fill(length - 1, blank), fill(1, sign), fill(COPIED, blank)])
        return jax.nn.one_hot(ids, SYMBOLS + 2), jnp.concatenate([fill(length + COPIED, blank), symbols])

    title, chance = f"Copying memory, {length} steps", COPIED * math.log(SYMBOLS) / (length + 2 * COPIED)
    loss = jrnn.losses.cross_entropy
    return Task(title, "cross-entropy, nats", SYMBOLS + 2, SYMBOLS + 1, sample, loss, chance)


TASKS = {"adding": adding, "copying": copying}


def network(name, hidden, outputs):
    gelu = jrnn.activation("gelu")
    return jrnn.stack(jrnn.dense(32), gelu, CELLS[name](hidden), jrnn.dense(32), gelu, jrnn.dense(outputs))


def train(model, task, steps, learning_rate, seed):
    """The result of `fit`: new sequences at every step, and a test on the same ones after each of the rounds."""

    def loss_fn(params, batch, key):
        xs, targets = batch
        return task.loss(jrnn.unroll(model, params, xs)[1], targets)

    k_init, k_data, k_test = jax.random.split(jax.random.key(seed), 3)
    draw = jax.jit(lambda step: task.sample(jax.random.fold_in(k_data, step), BATCH))
    size = steps // ROUNDS
    rate = training.schedule("warmup_cosine", learning_rate, steps=size * ROUNDS, warmup_steps=size)
    result = training.fit(
        training.make_step(loss_fn, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        model.init(k_init, task.features),
        lambda epoch: (draw(step) for step in range(epoch * size, (epoch + 1) * size)),
        epochs=ROUNDS,
        validation=[task.sample(k_test, TESTS)],
    )
    return shared.finished(result)


def plot(path, task, curves):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve["step"], curve["loss"], marker=".", lw=1.2, label=name)
    axes.axhline(task.chance, color="0.3", ls="--", lw=1, label=f"no memory ({task.chance:.3f})")
    axes.set(title=task.title, xlabel="training step", ylabel=f"test: {task.ylabel}", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "memory.png")
    parser.add_argument("--task", choices=TASKS, default="adding", help="(default: %(default)s)")
    parser.add_argument("--length", type=shared.positive, help="steps to remember over (default: 100; 20 with --quick)")
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=CELLS,
        default=["elman", "lstm", "gru", "min_gru", "lru"],
        metavar="CELL",
        help=f"of {', '.join(CELLS)} (default: elman lstm gru min_gru lru)",
    )
    parser.add_argument("--hidden", type=shared.positive, default=32, help="units of each cell (default: %(default)s)")
    parser.add_argument("--steps", type=shared.positive, help="of each training (default: 2000; 40 with --quick)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 steps to remember over, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    length = (20 if options.quick else 100) if options.length is None else options.length
    steps = (2 * ROUNDS if options.quick else 2000) if options.steps is None else options.steps
    if length < 2 or steps < ROUNDS or not options.learning_rate > 0:
        parser.error(f"expected --length of 2 or more, --steps of {ROUNDS} or more, --learning-rate above 0")

    task = TASKS[options.task](length)
    print(f"{task.title}: {steps // ROUNDS * ROUNDS:,} training steps of {BATCH} sequences for each cell")
    curves, rows = {}, []
    for name in dict.fromkeys(options.cells):
        model = network(name, options.hidden, task.outputs)
        print(f"\n{model}")
        begin = time.perf_counter()
        result = train(model, task, steps, options.learning_rate, options.seed)
        seconds = time.perf_counter() - begin
        curve = curves[name] = result.history["validation"]
        solved = [step for step, loss in zip(curve["step"], curve["loss"], strict=True) if loss < SOLVED * task.chance]
        count = sum(leaf.size for leaf in jax.tree.leaves(result.params))
        rows.append((name, count, curve["loss"][-1], min(curve["loss"]), solved, seconds))

    columns = f"{'parameters':>12}{'at the end':>12}{'at best':>10}{'solved at':>11}{'seconds':>9}"
    print(f"\n{f'test: {task.ylabel}':26}{columns}")
    for name, count, last, best, solved, seconds in rows:
        print(f"  {name:24}{count:12,}{last:12.4f}{best:10.4f}{solved[0] if solved else '-':>11}{seconds:9.0f}")
    print(f"  {'no memory':36}{task.chance:12.4f}{task.chance:10.4f}")
    print(f"(solved: below {SOLVED:.0%} of the loss without memory)")
    if options.quick:
        print("(so few training steps show only that everything runs)")
    plot(options.out, task, curves)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
