"""What comes next in a film: a convolutional LSTM sees five frames of a moving digit and draws the five that follow.

    pip install -e ".[train,plot]" && python examples/moving_digits.py        # about two minutes on two cores
    python examples/moving_digits.py --full                                   # two digits, more features, for longer

Handwritten digits of 8 x 8 pixels (data/digits.npz, see data/README.md) move straight on through a field of 16 x 16,
pass over each other, and bounce off its walls. This is the task of Srivastava et al. (2015), Moving MNIST, made small
enough for a processor, so figures from the literature do not apply. The films of the test show digits that no training
film shows.

The network reads the given frames, and then its own. As in the ConvLSTM's paper (Shi et al. 2015), patches of pixels
are folded into features, which makes the maps smaller. Beside it: the last given frame, copied; and each digit moved
straight on from where it is, which knows the digits and their speeds without looking, but not the walls.

What it printed by default, after 155 seconds of processor time. The digits of its frames are blurred, but they turn
round at the walls:

    squared error of a frame's 256 pixels, summed, on 200 test films
    frame                6       7       8       9      10    mean
    ConvLSTM          7.36    8.90    9.49    9.69    9.37    8.96
    straight on       6.55   14.22   20.38   25.15   27.43   18.75
    last frame       17.42   24.44   27.07   28.51   28.26   25.14

With --full (logs/moving-full.txt):

    ConvLSTM          9.30   10.98   11.33   11.96   11.74   11.06
    straight on      12.27   24.07   34.53   41.74   46.11   31.74
    last frame       26.63   36.41   40.01   42.82   41.40   37.46
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn.training import fit, make_step, predict, schedule

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).parent / "data" / "digits.npz"  # data/README.md: source, authors, licence
GIVEN, FOLLOWING = 5, 5  # frames
SIZE, SIDE, PATCH = 16, 8, 2  # pixels along a side of the field, of a digit, and of a patch
BATCH, TEST_FILMS = 16, 200
HELD_OUT = (
    300  # the last of the 1,797 digits come in no training film: half of them are for validation, half for the test
)


def load():
    """1,797 digits ``(8, 8)``, from 0 to 1."""
    with np.load(DATA) as file:
        return (file["images"] / 16).astype(np.float32)


def places(rng, count, digits):
    """The corners of the digits ``(T, count, digits, 2)``, once as they are and once as if there were no bounce after
    the last given frame."""
    span = SIZE - SIDE
    start = rng.integers(0, span + 1, (count, digits, 2))
    speed = rng.integers(1, 3, start.shape) * rng.choice([-1, 1], start.shape)  # one or two pixels a frame, each way
    times = np.arange(GIVEN + FOLLOWING)[:, None, None, None]
    bounced = span - np.abs((start + speed * times) % (2 * span) - span)
    last, before = bounced[GIVEN - 1], bounced[GIVEN - 2]
    onwards = np.clip(last + (last - before) * (times[GIVEN:] - GIVEN + 1), 0, span)
    return bounced, np.concatenate([bounced[:GIVEN], onwards])


def draw(images, corners):
    """Films ``(T, N, SIZE, SIZE)`` of images ``(N, digits, 8, 8)`` at these corners."""
    films = np.zeros((*corners.shape[:2], SIZE, SIZE), np.float32)
    time, number = np.ogrid[: corners.shape[0], : corners.shape[1]]
    pixels = np.arange(SIDE)
    for d in range(corners.shape[2]):
        rows, columns = (corners[:, :, d, axis, None] + pixels for axis in (0, 1))
        at = time[..., None, None], number[..., None, None], rows[..., :, None], columns[..., None, :]
        films[at] = np.maximum(films[at], images[None, :, d])
    return films


def make_films(images, count, digits, seed):
    """Films of digits drawn from ``images``, and the same with digits that go straight on."""
    rng = np.random.default_rng(seed)
    chosen = images[rng.integers(len(images), size=(count, digits))]
    return [draw(chosen, corners) for corners in places(rng, count, digits)]


def to_patches(frames):
    """``(..., SIZE, SIZE)`` as maps ``(..., SIZE / PATCH, SIZE / PATCH, PATCH * PATCH)``."""
    *lead, rows, columns = frames.shape
    cut = frames.reshape(*lead, rows // PATCH, PATCH, columns // PATCH, PATCH)
    return cut.swapaxes(-3, -2).reshape(*lead, rows // PATCH, columns // PATCH, PATCH * PATCH)


def to_frames(maps):
    """The inverse of `to_patches`."""
    *lead, rows, columns, _ = maps.shape
    cut = maps.reshape(*lead, rows, columns, PATCH, PATCH).swapaxes(-3, -2)
    return cut.reshape(*lead, rows * PATCH, columns * PATCH)


class Forecaster:
    """Two convolutional LSTMs, and at every place a linear layer that draws its patch of the next frame."""

    def __init__(self, features, kernel=3):
        self.cells = jrnn.stack(jrnn.conv_lstm(features, kernel), jrnn.conv_lstm(features, kernel))
        self.pen = jrnn.dense(PATCH * PATCH)

    def init(self, key):
        k_cells, k_pen = jax.random.split(key)
        event = SIZE // PATCH, SIZE // PATCH, PATCH * PATCH
        cells = self.cells.init(k_cells, event)
        return {"cells": cells, "pen": self.pen.init(k_pen, self.cells.out_features(event)[-1])}

    def logits(self, params, given):
        """Maps ``(GIVEN + FOLLOWING - 1, N, ...)``: the next frame after each of the given ones, and then after each
        frame of its own."""
        draw = lambda hs: jrnn.unroll(self.pen, params["pen"], hs)[1]
        # Both loops are written out, ``unroll=``: in a loop, XLA for CPUs has only a slow gradient of a convolution.
        state, hs = jrnn.unroll(self.cells, params["cells"], given, unroll=GIVEN)
        drawn = draw(hs)

        def follow(carry, _):
            state, drawn = carry
            state, h = self.cells.step(params["cells"], state, jax.nn.sigmoid(drawn))
            drawn = draw(h[None])[0]
            return (state, drawn), drawn

        _, rest = jrnn.scan(follow, (state, drawn[-1]), length=FOLLOWING - 1, unroll=FOLLOWING - 1)
        return jnp.concatenate([drawn, rest])

    def loss(self, params, films, key):
        maps = to_patches(films)
        logits = self.logits(params, maps[:GIVEN])
        error = jrnn.losses.mse(jax.nn.sigmoid(logits[GIVEN - 1 :]), maps[GIVEN:])
        return jrnn.losses.binary_cross_entropy(logits, maps[1:]), {"mse": error}

    def forecast(self, params, films):
        """The frames after the given ones ``(FOLLOWING, N, SIZE, SIZE)``."""
        return to_frames(jax.nn.sigmoid(self.logits(params, to_patches(films[:GIVEN]))[GIVEN - 1 :]))


def train(forecaster, images, held_out, digits, steps, seed, checkpoint=None):
    """Every batch is made of new films: there is nothing to learn by heart but the digits."""
    every = max(1, steps // 5)

    def batches(epoch):
        return (make_films(images, BATCH, digits, [seed, epoch, i])[0] for i in range(every))

    rate = schedule("warmup_cosine", 3e-3, steps=max(2, steps), warmup_steps=max(1, min(50, steps // 5)))
    result = fit(
        make_step(forecaster.loss, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        forecaster.init(jax.random.key(seed)),
        batches,
        steps=steps,
        validation=[make_films(held_out, 4 * BATCH, digits, [seed, 1])[0]],
        validate_every=every,
        checkpoint=checkpoint,
    )
    return shared.noted(result)


def strip(path, films, rows):
    """Three films, each as rows of frames: those that happen, and those that are forecast."""
    count, time = min(3, films.shape[1]), len(films)
    lines = [(n, name, frames) for n in range(count) for name, frames in [("what happens", films), *rows.items()]]
    figure, axes = plt.subplots(len(lines), time, figsize=(0.7 * time + 1.2, 0.7 * len(lines)), layout="constrained")
    for (n, name, frames), line in zip(lines, axes, strict=True):
        for t, axis in enumerate(line):
            axis.set(xticks=[], yticks=[])
            plt.setp(axis.spines.values(), color="tab:blue" if t < GIVEN else "0.7")
            if t >= time - len(frames):
                axis.imshow(frames[t - time, n], cmap="gray_r", vmin=0, vmax=1)
            else:
                axis.axis("off")
        line[0].text(-0.2, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for t, axis in enumerate(axes[0]):
        axis.set_title(f"given {t + 1}" if t < GIVEN else t + 1, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "moving_digits.png")
    parser.add_argument("--digits", type=int, help="digits in each film (default: 1; 2 with --full)")
    parser.add_argument("--features", type=int, help="features of each layer (default: 32; 64 with --full)")
    parser.add_argument("--steps", type=int, help="training steps (default: 1500; 3000 with --full)")
    parser.add_argument("--full", action="store_true", help="two digits, more features, for longer")
    shared.add_checkpoint(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if any(number is not None and number < 1 for number in (options.digits, options.features, options.steps)):
        parser.error("--digits, --features and --steps: expected 1 or more of each")
    digits = options.digits or (2 if options.full else 1)
    features = options.features or (64 if options.full else 32)
    steps = options.steps or (3000 if options.full else 1500)
    with shared.loading("moving_digits.py"):
        images = load()
    images, held_out, test_images = np.split(images, [-HELD_OUT, -HELD_OUT // 2])
    forecaster = Forecaster(features)
    print(f"{steps} steps of {BATCH} new films, {forecaster.cells}")
    result = train(forecaster, images, held_out, digits, steps, options.seed, options.checkpoint)

    films, onwards = make_films(test_images, TEST_FILMS, digits, [options.seed, 2])
    parts = np.split(films, range(50, TEST_FILMS, 50), axis=1)
    following = films[GIVEN:]
    answers = {
        "ConvLSTM": predict(forecaster.forecast, result.params, parts, axis=1),
        "straight on": onwards[GIVEN:],
        "last frame": np.broadcast_to(films[GIVEN - 1], following.shape),
    }
    print(f"\nsquared error of a frame's {SIZE * SIZE} pixels, summed, on {TEST_FILMS} test films")
    shown = range(1, FOLLOWING + 1)
    print(f"{'frame':14}" + "".join(f"{GIVEN + t:>8}" for t in shown) + f"{'mean':>8}")
    for name, frames in answers.items():
        errors = np.square(frames - following).sum(axis=(-1, -2)).mean(axis=1)
        print(f"{name:14}" + "".join(f"{errors[t - 1]:8.2f}" for t in shown) + f"{errors.mean():8.2f}")
    strip(options.out, films, {name: answers[name] for name in ("ConvLSTM", "straight on")})
    print(f"picture: {options.out}")
    return np.square(answers["ConvLSTM"] - following).mean()


if __name__ == "__main__":
    main()
