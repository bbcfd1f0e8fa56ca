"""Who is speaking? A bidirectional GRU tells nine men apart by one "ae", 7 to 29 frames long (Japanese Vowels).

    pip install -e ".[examples]" && python examples/speakers.py       # five networks at once, about a minute
    python examples/speakers.py --validate                            # how its settings were chosen

Utterances differ in length: they are padded to one batch, and `lengths` says where each ends. The backward direction
begins at an utterance's own last frame, and the mean counts its own frames only, so padding changes nothing.

Nothing was chosen on the test part. Of some twenty settings (GRU or LSTM, 32 or 64 units, noise, dropout, mean, max or
last, 30 or 60 epochs) these gave the best accuracy on the last ten training utterances of each speaker, after training
on the other twenty.
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import jrnn
import shared
from jrnn.training import make_step, schedule

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).parent / "data" / "japanese_vowels.npz"  # data/README.md: source, authors, licence
SPEAKERS, TRAIN, BATCH = 9, 270, 30
PUBLISHED = {"echo state network": 96.5, "ResNet": 99.2, "FCN": 99.3}  # on the same split; the last two: dl-4-tsc

# A vote at every frame. The mean of the votes is that of the hidden states, read out once: dense is linear.
MODEL = jrnn.stack(jrnn.bidirectional(jrnn.gru(64)), jrnn.dropout(0.5), jrnn.dense(SPEAKERS))
NOISE = 0.6  # added in training to inputs of unit variance: 270 utterances are few, and this makes more of them


def load():
    """640 utterances, each (frames, 12) cepstral coefficients, and who spoke; the first 270 are for training."""
    with np.load(DATA) as file:
        ends = np.cumsum(file["lengths"], dtype=int)
        return np.split(file["frames"], ends[:-1]), file["speakers"].astype(np.int32) - 1


def votes(params, xs, lengths, key=None):
    _, ys = jrnn.unroll(MODEL, params, xs, lengths=lengths, key=key)  # (time, batch, speakers)
    return jrnn.sequence.mean_valid(ys, lengths)


def loss_fn(params, batch, key):
    xs, lengths, speakers = batch
    if key is not None:  # in training, not where it is judged
        noise_key, key = jax.random.split(key)
        xs += NOISE * jax.random.normal(noise_key, xs.shape)  # in the padding too, where it changes nothing
    return jrnn.losses.cross_entropy(votes(params, xs, lengths, key), speakers)


def train(xs, lengths, speakers, seeds, epochs):
    """A network for each seed. Parameters, with the seeds as the first axis of every array."""
    steps = len(speakers) // BATCH  # in an epoch
    learning_rate = schedule("warmup_cosine", 3e-3, steps=epochs * steps, warmup_steps=2 * steps)
    step = make_step(loss_fn, jrnn.optimizer("adam", learning_rate, clip_norm=1.0))

    def start(seed):
        init_key, key = jax.random.split(jax.random.key(seed))
        return step.init(MODEL.init(init_key, xs.shape[-1]), key)

    def train_epoch(state, batches):
        def train_step(state, chosen):
            state, metrics = step(state, (xs[:, chosen], lengths[chosen], speakers[chosen]))
            return state, metrics.loss

        state, losses = jax.lax.scan(train_step, state, batches)
        return state, losses.mean()

    # All of the above is about one network. It is made of pure functions, so vmap makes it about several, and jit
    # compiles a whole epoch of all of them to one program.
    states = jax.jit(jax.vmap(start))(jnp.arange(seeds))
    train_all = jax.jit(jax.vmap(train_epoch), donate_argnums=0)
    with tqdm(total=epochs, unit="epoch", disable=None) as bar:
        for epoch in range(epochs):
            orders = [np.random.default_rng([seed, epoch]).permutation(len(speakers)) for seed in range(seeds)]
            batches = np.stack(orders)[:, : steps * BATCH].reshape(seeds, steps, BATCH)
            states, losses = train_all(states, batches)
            bar.set_postfix(loss=f"{losses.mean():.3f}", refresh=False)
            bar.update()
    return states.params


def mean_frame_baseline(train, test):
    """Accuracy of least squares on each utterance's mean frame: what can be told without any order in time."""
    means = [np.asarray(jrnn.sequence.mean_valid(xs, lengths)) for xs, lengths, _ in (train, test)]
    inputs, held_out = (np.concatenate([mean, np.ones((len(mean), 1))], axis=1) for mean in means)
    weights, *_ = np.linalg.lstsq(inputs, np.eye(SPEAKERS)[train[2]], rcond=None)
    return 100 * np.mean((held_out @ weights).argmax(axis=1) == test[2])


def plot(path, confusion, accuracies, part):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.8), width_ratios=[1.15, 1], layout="constrained")
    shared.draw_confusion(left, confusion, np.arange(SPEAKERS) + 1)
    left.set(xlabel="said the network", ylabel="speaker", title=f"{part.title()} part, mean of {len(accuracies)} seeds")
    right.plot(accuracies, "o", color="tab:blue", markersize=7, clip_on=False, label=f"this network, {part} part")
    for (name, accuracy), style in zip(PUBLISHED.items(), (":", "--", "-"), strict=True):
        right.axhline(accuracy, color="0.3", linestyle=style, linewidth=1, label=f"{name}, test part, published")
    right.set(xlim=(-0.5, len(accuracies) - 0.5), ylim=(min(94, accuracies.min() - 2), 100))
    right.set(xlabel="seed", ylabel="accuracy, %", title="Accuracy of each seed")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below, where it covers no seed
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "speakers.png")
    parser.add_argument("--seeds", type=int, default=5, help="how many networks (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--validate", action="store_true", help="test on a third of the training part, held out")
    parser.add_argument("--quick", action="store_true", help="two networks, six epochs, to see that it works")
    options = parser.parse_args(arguments)
    seeds, epochs = (2, 6) if options.quick else (options.seeds, options.epochs)
    if seeds < 1 or epochs < 3:
        parser.error(f"expected --seeds of 1 or more and --epochs of 3 or more, got {seeds} and {epochs}")

    with shared.loading("speakers.py"):
        utterances, speakers = load()
    number = np.arange(len(utterances))
    fitted, held_out, part = number < TRAIN, number >= TRAIN, "test"
    if options.validate:
        last_ten = number % 30 >= 20  # a speaker's thirty training utterances follow one another
        fitted, held_out, part = fitted & ~last_ten, fitted & last_ten, "validation"
    frames = np.concatenate([utterances[i] for i in np.flatnonzero(fitted)])
    mean, std = frames.mean(axis=0), frames.std(axis=0)  # of what is trained on: the rest must not shape the input

    def batch(chosen):
        xs, lengths = jrnn.sequence.pad([(utterances[i] - mean) / std for i in np.flatnonzero(chosen)])
        return xs, lengths, speakers[chosen]

    training, testing = batch(fitted), batch(held_out)
    print(f"training on {fitted.sum()} utterances of {SPEAKERS} speakers, {part} on {held_out.sum()}: {seeds} networks")
    params = train(training[0], training[1], jnp.asarray(training[2]), seeds, epochs)
    xs, lengths, truth = testing
    said = jax.vmap(lambda params: votes(params, xs, lengths).argmax(axis=-1))(params)  # (seeds, utterances)
    accuracies = 100 * np.mean(np.asarray(said) == truth, axis=1)

    print("\n" + "\n".join(f"seed {seed}: {accuracy:.2f}%" for seed, accuracy in enumerate(accuracies)))
    spread = f"{accuracies.mean():.2f} (lowest {accuracies.min():.2f}, highest {accuracies.max():.2f})"
    print(f"\n{f'accuracy, %, {part} part':44}{spread}")
    print(f"{'least squares on the mean frame, same part':44}{mean_frame_baseline(training, testing):.2f}")
    for name, accuracy in PUBLISHED.items():
        print(f"{name + ', published, test part':44}{accuracy}")
    confusion = shared.confusion(np.broadcast_to(truth, said.shape), said, SPEAKERS)
    plot(options.out, confusion / seeds, accuracies, part)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
