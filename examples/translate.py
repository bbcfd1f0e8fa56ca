"""English into French, learned from the messages of a program's interface.

    pip install -e ".[examples]" && python examples/translate.py           # some three minutes on two cores
    python examples/translate.py --text "save all files" "delete cell"     # ... and your sentences
    python examples/translate.py --language de-DE                          # another language pack, once installed
    python examples/translate.py --pairs mine.txt                          # your pairs: two columns with a tab between

The data are JupyterLab's messages and their French translations: very few for the task, and all of one kind. So this
shows how an attention model is trained and judged, and no translator for daily use. Text is in lower case, cut into
pieces of words by byte-pair encoding (Sennrich et al. 2016), learned from the training messages alone.

The language pack has 3,464 messages. Of these, 187 have more than 15 words, 315 are repeated, and 190 were left in
English: all three kinds are left out. The other 2,772 are split at random (seed 0): 2,219 to train on, 280 for
validation, 273 for the test. Messages that differ in punctuation alone stay together. Of those to train on, 88 have 30
pieces or more in one of the languages and are left out too, so that 2,131 remain. All test messages are kept. Beside
the network stand the translation of the most similar training message, and the English text.

What it printed by default. It finds the exact words four times as often as the most similar message has them. By the
characters it has in common with the right translation, that message is the better one: where the network is wrong, it
makes up words.

    on the 273 test messages, %            chrF   exact
      network, greedy                        45.3    10.3
      network, beam of 4                     46.3    11.0
      most similar message                   53.5     2.9
      English left as it is                  24.1     0.0
      ...
      cut the selected cells
        couper les cellules sélectionnées
      failed to merge branch '%1' into '%2'.
        impossible de fusionner la branche '%1' '%2'.
        (should be: échec de la fusion de la branche '%1' dans '%2'.)
      debugger does not have stopped threads - cannot evaluate
        curseur de l'est produseur de %1 a étés
        (should be: le débogueur n'a pas arrêté de threads - impossible d'évaluer)
"""

import collections
import functools
import importlib.metadata
import itertools
import json
import re

import jax
import matplotlib
import numpy as np

import seq2seq
import shared
from jrnn import decoding

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

BATCH = 32
MERGES = 600  # pieces that byte-pair encoding makes, for each language
LONGEST = 15  # words of a message: the few that are longer are left out
MOST_PIECES = 30  # of a message: the few that have more are not trained on, but tested
FEWEST = 50  # pairs in a file: fewer leave nothing to test on
SHOWN = 16  # messages of the test that are printed
SPACE = "\u2581"  # stands for the space before a word, in its first piece


def load(language):
    """English messages and their translations, without those that were left in English."""
    package = f"jupyterlab-language-pack-{language}"
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the messages are in a package that is not installed; pip install {package}") from None
    pairs = {}
    for file in sorted(f for f in files if f.suffix == ".json"):
        for message, forms in json.loads(file.locate().read_text(encoding="utf-8")).items():
            english = tidy(message.rpartition("\x04")[2])  # a context may stand before the message
            if isinstance(forms, list) and message and 0 < len(english.split()) <= LONGEST:
                pairs.setdefault(english, tidy(forms[0]))
    return [(english, other) for english, other in pairs.items() if other and other != english]


def load_pairs(path, encoding):
    """The pairs of a file, one a line with a tab between; what may stand in further columns is not read."""
    pairs = {}
    for number, line in enumerate(shared.read_text(path, encoding).splitlines(), 1):
        if line.strip():
            first, second, *_ = (*map(tidy, line.split("\t")), "", "")
            if not first or not second:
                raise ValueError(
                    f"{path}, line {number}: expected two texts with a tab between them, got {line[:60]!r}"
                )
            pairs.setdefault(first, second)
    found = [pair for pair in pairs.items() if len(pair[0].split()) <= LONGEST]
    if len(found) < FEWEST:
        raise ValueError(f"{path}: expected at least {FEWEST} pairs of at most {LONGEST} words, got {len(found)}")
    if len(found) < len(pairs):
        print(f"{path}: left out {len(pairs) - len(found)} pairs of more than {LONGEST} words (LONGEST in this script)")
    return found


def tidy(text):
    return " ".join(text.lower().replace("\u2019", "'").split())


def split(pairs, seed=0):
    """Pairs for the training, the validation and the test: 80, 10 and 10%; messages of the same words stay together."""
    groups = collections.defaultdict(list)
    for pair in pairs:
        groups[tuple(re.findall(r"\w+", pair[0])) or pair[0]].append(pair)
    groups = list(groups.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    cuts = np.split(order, [int(0.8 * len(order)), int(0.9 * len(order))])
    return [[pair for i in cut for pair in groups[i]] for cut in cuts]


# --- pieces of words -----------------------------------------------------------------------------------------------


class Pieces:
    """Byte-pair encoding: the pair of neighbours that is most frequent becomes one piece, again and again."""

    def __init__(self, texts, merges):
        counts = collections.Counter(word for text in texts for word in words_of(text))
        self.ranks = {pair: i for i, pair in enumerate(learn_merges(counts, merges))}
        self.cut_word = functools.cache(self._cut_word)

    def cut(self, text):
        return [piece for word in words_of(text) for piece in self.cut_word(word)]

    def _cut_word(self, word):
        pieces = list(word)
        while found := [pair for pair in itertools.pairwise(pieces) if pair in self.ranks]:
            pieces = merge(pieces, min(found, key=self.ranks.__getitem__))
        return pieces


def words_of(text):
    """Words and punctuation; each that follows a space begins with a mark for it."""
    return re.findall(rf"{SPACE}?(?:\w+|[^\w{SPACE}])", SPACE + text.replace(" ", SPACE))


def text_of(pieces):
    return "".join(pieces).replace(SPACE, " ").strip()


def merge(pieces, pair):
    merged, i = [], 0
    while i < len(pieces):
        whole = tuple(pieces[i : i + 2]) == pair
        merged.append("".join(pair) if whole else pieces[i])
        i += 1 + whole
    return merged


def learn_merges(counts, most):
    """Pairs of pieces in the order in which they are merged, for words with their counts."""
    words = {word: list(word) for word in counts}
    pairs, places = collections.Counter(), collections.defaultdict(set)

    def add(word, times):
        for pair in itertools.pairwise(words[word]):
            pairs[pair] += times * counts[word]
            places[pair].add(word)

    for word in words:
        add(word, 1)
    merges = []
    while len(merges) < most and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for word in sorted(places.pop(best)):
            add(word, -1)
            words[word] = merge(words[word], best)
            add(word, 1)
    return merges


# --- the baseline --------------------------------------------------------------------------------------------------


def nearest(texts, train_pairs):
    """For each text the translation of the training message that shares most character trigrams with it (Dice)."""
    known = [(trigrams(english), other) for english, other in train_pairs]
    answers = []
    for text in texts:
        own = trigrams(text)
        answers.append(max(known, key=lambda pair: len(own & pair[0]) / (len(own) + len(pair[0])))[1])
    return answers


def trigrams(text):
    return {f"  {text} "[i : i + 3] for i in range(len(text) + 1)}


# --- the whole -----------------------------------------------------------------------------------------------------


def draw(path, history, pictures):
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    curve, *grid = (figure.add_subplot(2, 2, i + 1) for i in range(1 + len(pictures)))
    for name, color in (("train", "tab:gray"), ("validation", "tab:blue")):
        curve.plot(history[name]["step"], history[name]["loss"], color=color, label=name)
    curve.set(xlabel="training step", ylabel="cross-entropy, nats", title="Training (with label smoothing and dropout)")
    curve.legend()
    for axes, (weights, source, target) in zip(grid, pictures, strict=True):
        seq2seq.draw_attention(axes, weights, source, target)
        axes.tick_params(axis="x", rotation=60)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "translate.png")
    parser.add_argument("--text", nargs="+", default=[], help="sentences to translate once trained")
    parser.add_argument("--language", default="fr-FR", help="of the language pack (default: %(default)s)")
    shared.add_file(parser, "--pairs", "your own pairs of texts, a tab between them, in the place of the language pack")
    seq2seq.add_options(parser, "1000", "128")
    options = parser.parse_args(arguments)
    if not all(map(tidy, options.text)):
        parser.error("--text: expected sentences of at least one word")
    with shared.loading("translate.py"):
        parts = split(load_pairs(options.pairs, options.encoding) if options.pairs else load(options.language))
    cutters = [Pieces([pair[side] for pair in parts[0]], MERGES) for side in (0, 1)]
    cut = [[tuple(c.cut(text) for c, text in zip(cutters, pair, strict=True)) for pair in part] for part in parts]
    symbols = [seq2seq.Symbols(pair[side] for pair in cut[0]) for side in (0, 1)]
    train_ids, validation_ids, test_ids = (
        [tuple(s.encode(pieces) for s, pieces in zip(symbols, pair, strict=True)) for pair in part] for part in cut
    )
    train_ids, validation_ids = (
        [pair for pair in part if max(map(len, pair)) < MOST_PIECES] for part in (train_ids, validation_ids)
    )
    hidden, steps = options.hidden or 128, options.steps or 1000
    model = seq2seq.network(len(symbols[0]), len(symbols[1]), hidden, hidden, 0.2)
    k_init, k_fit = jax.random.split(jax.random.key(options.seed))
    params = model.init(k_init)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{len(train_ids):,} messages to train on, {len(test_ids):,} to test on; {count:,} parameters")
    print(f"{steps} steps of {BATCH} messages, {steps * BATCH / len(train_ids):.0f} times through")

    result = seq2seq.train(
        model, params, train_ids, validation_ids, steps, BATCH, 3e-3, k_fit, options.scheduled, smoothing=0.1
    )
    sources, english, right = [ids[0] for ids in test_ids], *zip(*parts[2], strict=True)

    decode = lambda sources, width: seq2seq.decode(model, result.params, sources, width, length_penalty=0.6)
    texts = lambda found: [text_of(symbols[1].decode(ids)) for ids in found]
    found = decode(sources, options.beam)
    said = texts(found)
    answers = {
        "network, greedy": texts(decode(sources, 1)),
        f"network, beam of {options.beam}": said,
        "most similar message": nearest(english, parts[0]),
        "the text left as it is" if options.pairs else "English left as it is": english,
    }
    print(f"on the {len(right)} test messages, %            chrF   exact")
    for name, answer in answers.items():
        exact = np.mean([a == r for a, r in zip(answer, right, strict=True)])
        print(f"  {name:30} {100 * decoding.chrf(answer, right):12.1f} {100 * exact:7.1f}")
    print("\nthe first of them, good and bad:")
    for text, ours, wanted in list(zip(english, said, right, strict=True))[:SHOWN]:
        print(f"  {text}\n    {ours}" + ("" if ours == wanted else f"\n    (should be: {wanted})"))
    if options.text:
        own = [symbols[0].encode(cutters[0].cut(tidy(text))) for text in options.text]
        for text, ours in zip(options.text, texts(decode(own, options.beam)), strict=True):
            print(f"{text!r}: {ours}")

    shown = [i for i, ids in enumerate(sources) if 4 <= len(ids) <= 9][:3]
    weights = seq2seq.weights_of(model, result.params, [(sources[i], found[i]) for i in shown])
    names = lambda symbols, ids: [piece.replace(SPACE, "_") for piece in symbols.decode(ids)]
    pictures = [
        (w, names(symbols[0], sources[i]), [*names(symbols[1], found[i]), "end"])
        for w, i in zip(weights, shown, strict=True)
    ]
    draw(options.out, result.history, pictures)
    print(f"picture: {options.out}")
    return decoding.chrf(said, right)


if __name__ == "__main__":
    main()
