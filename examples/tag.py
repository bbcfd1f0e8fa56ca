"""Parts of speech in Turkish: a bidirectional LSTM reads the sentence both ways and names the class of every word.

    pip install -e ".[examples]" && python examples/tag.py           # 14 classes, about two minutes on two cores
    python examples/tag.py --fine                                    # 45 classes
    python examples/tag.py --full                                    # the larger network, for longer
    python examples/tag.py --conllu mine.conllu                      # your treebank, every tenth sentence for the test

The Turkish Web Treebank (Kayadelen, Öztürel and Bohnet 2020; package turkish-treebanks, Apache 2.0) has 4,851 sentences
tagged by hand. The split is its authors': of every ten sentences the ninth is for validation, the tenth for the test.
Its tokens are words, or where a suffix makes a word of another class, parts of words. Where they end is given.

Turkish builds words from suffixes, so every fifth test token is a word that training never showed. A network that
knew words alone could not tell its class: the inputs are also endings of one to four letters, the first three letters,
and how the word is written. Beside it stand the most frequent tag of each word, and the most frequent tag of a word's
longest known ending. No published figure for tagging this split was found; the treebank's paper is about parsing.

What it printed by default, after 104 seconds on two hyperthreads of one core that others used too:

    accuracy, %                     all 8025 test words     the 1570 unseen
      bidirectional LSTM                          93.99               91.91
      most frequent tag                           89.71               75.80
      most frequent tag, endings                  90.83               81.53

and with --fine, in the same order, 91.02 (82.55), 84.56 (53.25) and 87.38 (67.64). With --full the network has 95.43
(92.87), after six minutes (logs/tag-full.txt).
"""

import collections
import importlib.metadata
import itertools

import jax
import matplotlib
import numpy as np

import jrnn
import shared
from jrnn.training import fit, make_step, ragged_batches, schedule

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

BATCH = 32
PADDED = (0.5, 0.9, 1.0)  # quantiles of the lengths, to which sentences are padded: every shape costs a compilation
UNKNOWN = 0  # the id of what the training sentences have less than twice
FEWEST = 50  # sentences: less leaves nothing to test on
COARSE, FINE, MISC = 3, 4, 9  # columns of a CoNLL-U file, counted from 0


def load_treebank(column):
    """Training, validation and test sentences of the package, its two sections one after the other."""
    files = importlib.metadata.files("turkish-treebanks")
    sections = [file.locate().read_text(encoding="utf-8") for file in sorted(files) if file.suffix == ".conllu"]
    parts = zip(*(split(read_conllu(text, column)) for text in sections), strict=True)
    return [[*itertools.chain(*part)] for part in parts]


def load_file(path, encoding, column):
    sentences = read_conllu(shared.read_text(path, encoding), column, path)
    if len(sentences) < FEWEST:
        raise ValueError(f"{path}: expected at least {FEWEST} sentences in the format CoNLL-U, got {len(sentences)}")
    return split(sentences)


def split(sentences):
    return [[s for i, s in enumerate(sentences) if i % 10 in those] for those in (range(8), (8,), (9,))]


def read_conllu(text, column, path="the treebank"):
    """A list of sentences, each a list of (word, tag, whether the next word follows without a space)."""
    sentences = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        rows = [line.split("\t") for line in block.split("\n") if line and not line.startswith("#")]
        for row in rows:
            if len(row) != 10:
                raise ValueError(f"{path}: expected ten columns with tabs between them, as CoNLL-U has, got {row}")
        words = [row for row in rows if row[0].isdigit()]  # not the ranges and empty nodes that some treebanks have
        if words:
            sentences.append([(row[1], row[column], "SpaceAfter=No" in row[MISC]) for row in words])
    return sentences


def lower(word):
    return word.replace("I", "\N{LATIN SMALL LETTER DOTLESS I}").replace("İ", "i").lower()  # as Turkish pairs them


def features(word, glued_before, glued_after):
    """What the network is told of a word: strings, as many for every word."""
    low = lower(word)
    marks = [word[0].isupper(), any(map(str.isdigit, word)), any(map(str.isalpha, word)), glued_before, glued_after]
    endings = [f"ending {low[-n:]}" for n in (1, 2, 3, 4)]
    return [f"word {low}", *endings, f"beginning {low[:3]}", "written " + "".join("01"[mark] for mark in marks)]


def features_of(sentence):
    glued = [False, *(after for _, _, after in sentence)]
    return [features(word, glued[i], after) for i, (word, _, after) in enumerate(sentence)]


class Vocabulary:
    """Ids of the features and tags of the training sentences."""

    def __init__(self, sentences):
        counts = collections.Counter(f for sentence in sentences for word in features_of(sentence) for f in word)
        common = sorted(feature for feature, count in counts.items() if count > 1)
        self.ids = {feature: i for i, feature in enumerate(common, start=UNKNOWN + 1)}
        self.tags = sorted({tag for sentence in sentences for _, tag, _ in sentence})

    def encode(self, sentence):
        """Ids ``(T, features of a word)``."""
        return np.array([[self.ids.get(f, UNKNOWN) for f in word] for word in features_of(sentence)], np.int32)

    def tag_ids(self, sentence):
        """Ids ``(T,)``; a tag that training does not have counts as wrong, whatever is said."""
        found = [self.tags.index(tag) if tag in self.tags else len(self.tags) for _, tag, _ in sentence]
        return np.array(found, np.int32)


class Tagger:
    """A row of a table for each feature, those of a word side by side; then the sentence, read both ways."""

    def __init__(self, vocabulary, hidden, dropout=0.4):
        self.table = jrnn.embed(len(vocabulary.ids) + 1, 32)
        self.network = jrnn.stack(
            jrnn.dropout(dropout),
            jrnn.bidirectional(jrnn.lstm(hidden)),
            jrnn.dropout(dropout),
            jrnn.dense(len(vocabulary.tags)),
        )

    def init(self, key, count):
        k_table, k_network = jax.random.split(key)
        width = count * self.table.features
        return {"table": self.table.init(k_table, None), "network": self.network.init(k_network, width)}

    def logits(self, params, ids, lengths, key=None):
        """``(T, B, tags)`` of ids ``(T, B, features of a word)``."""
        _, rows = jrnn.unroll(self.table, params["table"], ids)
        xs = rows.reshape(*ids.shape[:2], -1)
        return jrnn.unroll(self.network, params["network"], xs, lengths=lengths, key=key)[1]

    def loss(self, params, batch, key):
        (ids, lengths), (tags, _) = batch
        logits = self.logits(params, ids, lengths, key)  # with a key, dropout is on
        valid = jrnn.sequence.valid_steps(lengths, None, *tags.shape[:1], tags.shape[1:])
        metrics = {"accuracy": jrnn.losses.accuracy(logits, tags, valid)}
        return jrnn.losses.cross_entropy(logits, tags, valid), metrics


def make_batch(examples):
    """All sentences in one batch, ``((ids (T, B, features), lengths (B,)), (tags (T, B), lengths (B,)))``."""
    (batch,) = ragged_batches(examples, len(examples), quantiles=())(0)
    return batch


def train(tagger, examples, validation, seed, epochs, checkpoint=None):
    k_init, k_dropout, k_shuffle = jax.random.split(jax.random.key(seed), 3)
    drop_last = len(examples) > 20 * BATCH  # what does not fill a batch is left out of this epoch
    batches = ragged_batches(examples, BATCH, quantiles=PADDED, seed=k_shuffle, drop_last=drop_last)
    steps = epochs * len(batches)
    rate = schedule("warmup_cosine", 4e-3, steps=max(2, steps), warmup_steps=max(1, steps // 20))
    result = fit(
        make_step(tagger.loss, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        tagger.init(k_init, examples[0][0].shape[1]),
        batches,
        key=k_dropout,
        epochs=epochs,
        validation=[validation],
        monitor="accuracy",
        mode="max",
        checkpoint=checkpoint,
    )
    return shared.noted(result)


def most_frequent(sentences, longest):
    """A function of a word: the most frequent tag of the word in training, or else of its longest ending that came
    there, of ``longest`` letters at most (0: of all words)."""

    def keys(word):
        low = lower(word)
        return [f"word {low}", *(low[-n:] for n in range(min(longest, len(low)), 0, -1)), ""]

    counts = collections.defaultdict(collections.Counter)
    for sentence in sentences:
        for word, tag, _ in sentence:
            for key in keys(word):
                counts[key][tag] += 1
    return lambda word: next(counts[key].most_common(1)[0][0] for key in keys(word) if key in counts)


def plot(path, history, truth, said, tags):
    side = shared.matrix_size(len(tags))
    figure, (curve, matrix) = plt.subplots(
        1, 2, figsize=(side + 6, side + 0.8), width_ratios=[4, side], layout="constrained"
    )
    accuracy = 100 * np.array(history["accuracy"])
    shared.draw_accuracy(curve, accuracy, margin=2)
    known = truth < len(tags)
    shared.draw_confusion(matrix, shared.confusion(truth[known], said[known], len(tags)), tags)
    matrix.set(xlabel="the network says", ylabel="it is", title="Test words")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = shared.parser(__doc__, "tag.png")
    parser.add_argument("--conllu", help="a treebank to learn from, in the format CoNLL-U, in the place of the Turkish")
    parser.add_argument("--encoding", default="utf-8-sig", help="how that file stores text (default: UTF-8)")
    parser.add_argument("--fine", action="store_true", help="the fine tags (the column XPOS), not the coarse (UPOS)")
    parser.add_argument("--hidden", type=int, help="units of each direction (default: 128; 256 with --full)")
    parser.add_argument("--epochs", type=int, help="passes over the sentences (default: 8; 20 with --full)")
    parser.add_argument("--full", action="store_true", help="the larger network, for longer")
    shared.add_checkpoint(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if any(number is not None and number < 1 for number in (options.hidden, options.epochs)):
        parser.error("--hidden and --epochs: expected 1 or more of each")
    hidden = options.hidden or (256 if options.full else 128)
    epochs = options.epochs or (20 if options.full else 8)
    column = FINE if options.fine else COARSE
    with shared.loading("tag.py", ", or use --conllu"):
        if options.conllu:
            parts = load_file(options.conllu, options.encoding, column)
        else:
            parts = load_treebank(column)

    vocabulary = Vocabulary(parts[0])
    examples = [[(vocabulary.encode(sentence), vocabulary.tag_ids(sentence)) for sentence in part] for part in parts]
    tagger = Tagger(vocabulary, hidden)
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        print(f"{name:>10}: {len(part):5} sentences, {sum(map(len, part)):6} words")
    print(f"{len(vocabulary.ids)} features that come at least twice in training, {len(vocabulary.tags)} tags\n")

    # Validation is one batch, so that every word counts the same. Its tags that training does not have are left out.
    seen = [(ids, tags) for ids, tags in examples[1] if tags.max() < len(vocabulary.tags)]
    result = train(tagger, examples[0], make_batch(seen), options.seed, epochs, options.checkpoint)

    (padded, lengths), (wanted, _) = make_batch(examples[2])
    valid = np.arange(len(padded))[:, None] < lengths
    said = np.asarray(jax.jit(tagger.logits)(result.params, padded, lengths).argmax(-1)).T[valid.T]
    truth = wanted.T[valid.T]
    words = [word for sentence in parts[2] for word, _, _ in sentence]
    trained_on = {lower(word) for sentence in parts[0] for word, _, _ in sentence}
    unseen = np.array([lower(word) not in trained_on for word in words])
    answers = {"bidirectional LSTM": said}
    for name, longest in {"most frequent tag": 0, "most frequent tag, endings": 6}.items():
        answer = most_frequent(parts[0], longest)
        answers[name] = np.array([vocabulary.tags.index(answer(word)) for word in words])
    print(f"accuracy, %{'all ' + str(len(words)) + ' test words':>40}{'the ' + str(unseen.sum()) + ' unseen':>20}")
    for name, answer in answers.items():
        shares = [
            100 * np.sum(counted & (answer == truth)) / max(1, counted.sum()) for counted in (True | unseen, unseen)
        ]
        print(f"  {name:29}" + "".join(f"{share:20.2f}" for share in shares))
    plot(options.out, result.history["validation"], truth, said, vocabulary.tags)
    print(f"picture: {options.out}")
    return np.mean(said == truth)


if __name__ == "__main__":
    main()
