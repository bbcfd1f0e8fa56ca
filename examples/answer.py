"""Questions about short stories: what a recurrent network remembers of what it has read.

    pip install -e ".[examples]" && python examples/answer.py      # some eight minutes on two cores
    python examples/answer.py --tasks 1                            # one task

The stories are synthetic: this script writes them, after three of the bAbI tasks (Weston et al. 2015). It is not the
published data set, but the same people, places and rules.

- task 1, one supporting fact: "mary went to the kitchen . john moved to the office ." "where is mary ?" "kitchen"
- task 2, two of them: "john went to the office . john took the milk ." "where is the milk ?" "office"
- task 6, yes or no: "mary went to the kitchen ." "is mary in the garden ?" "no"

Two networks answer. An LSTM reads the story and then the question, and all that it knows is in its state. The other one
reads the story with a bidirectional GRU, and the question with a GRU that attends to the words of the story.

What it printed by default, after 443 seconds of processor time (logs/answer.txt). Attention solves task 1 and begins to
solve task 6. The LSTM has not learned in so short a training who is where, and more questions do not help it:

    right answers, %                task 1     task 2     task 6
    the commonest answer              16.0       15.4       49.5
    LSTM, 1,000 questions             43.2       32.6       62.5
    LSTM, 10,000 questions            46.6       17.3       50.5
    attention, 10,000 questions      100.0       42.0       74.5
    published LSTM, 1,000 questions   50.0       20.0       48.0
"""

import dataclasses
import functools

import jax
import matplotlib
import numpy as np

import jrnn
import seq2seq
import shared
from jrnn import training

matplotlib.use("Agg")  # draws to a file, needs no display
import matplotlib.pyplot as plt

PEOPLE = ("daniel", "john", "mary", "sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GOES = ("went to the", "moved to the", "travelled to the", "journeyed to the", "went back to the")
TAKES = ("took the", "got the", "grabbed the", "picked up the")
LEAVES = ("dropped the", "left the", "discarded the", "put down the")
PHRASES = (*PEOPLE, *PLACES, *THINGS, *GOES, *TAKES, *LEAVES, "where is the ?", "in .", "yes", "no")
IDS = {word: i for i, word in enumerate(sorted({word for phrase in PHRASES for word in phrase.split()}))}
PUBLISHED = {1: 50, 2: 20, 6: 48}  # an LSTM trained on 1,000 questions (Weston et al. 2015, table 3), %
BATCH, TESTED = 64, 1000


# --- stories -------------------------------------------------------------------------------------------------------


def write(rng, task):
    """``(story, question, answer)``, strings of words."""
    pick = lambda options: options[rng.integers(len(options))]
    at, holder, lying, sentences = {}, {}, {}, []
    for _ in range(2 * rng.integers(1, 6) if task != 2 else rng.integers(4, 17)):
        person = pick(PEOPLE)
        held = [thing for thing in THINGS if holder.get(thing) == person]
        free = [thing for thing in THINGS if thing not in holder and lying.get(thing) in (None, at.get(person))]
        act = rng.random() if task == 2 and person in at else 0.0
        if act > 0.5 and free and not (held and act > 0.8):
            thing = pick(free)
            holder[thing] = person
            sentences.append(f"{person} {pick(TAKES)} {thing}")
        elif act > 0.5 and held:
            thing = pick(held)
            lying[thing] = at[person]
            del holder[thing]
            sentences.append(f"{person} {pick(LEAVES)} {thing}")
        else:
            at[person] = pick([place for place in PLACES if place != at.get(person)])
            sentences.append(f"{person} {pick(GOES)} {at[person]}")
    story = " . ".join(sentences) + " ."
    if task == 2:
        places = {**lying, **{thing: at[person] for thing, person in holder.items()}}
        if not places:
            return write(rng, task)  # there is nothing to ask for
        thing = pick(sorted(places))
        return story, f"where is the {thing} ?", places[thing]
    person = pick(sorted(at))
    if task == 1:
        return story, f"where is {person} ?", at[person]
    answer = pick(("yes", "no"))
    place = at[person] if answer == "yes" else pick([place for place in PLACES if place != at[person]])
    return story, f"is {person} in the {place} ?", answer


def questions(task, count, seed, without=frozenset()):
    """So many stories with their questions and answers, none of them among others."""
    rng, found = np.random.default_rng((seed, task)), []
    while len(found) < count:
        new = write(rng, task)
        if new not in without:
            found.append(new)
    return found


def encode(data, longest):
    """``(story (T, N), lengths (N,), question (Q, N), question_lengths (N,), answers (N,))``."""
    ids = lambda text: np.array([IDS[word] for word in text.split()], np.int32)
    stories, asked, answers = zip(*data, strict=True)
    columns = *jrnn.sequence.pad(list(map(ids, stories)), longest), *jrnn.sequence.pad(list(map(ids, asked)))
    return *map(np.asarray, columns), np.array([IDS[answer] for answer in answers])


# --- networks ------------------------------------------------------------------------------------------------------


class Answering:
    """What both networks have: a loss by their scores (B, V), which say which word is the answer."""

    def loss(self, params, batch, key):
        logits, answers = self.scores(params, batch), batch[-1]
        return jrnn.losses.cross_entropy(logits, answers), {"accuracy": jrnn.losses.accuracy(logits, answers)}


@dataclasses.dataclass(frozen=True)
class Reading(Answering):
    """An LSTM that reads the story and then the question; the answer is what it says after the last word."""

    model: jrnn.Layer

    def init(self, key):
        return self.model.init(key, None)

    def scores(self, params, batch):
        story, lengths, question, question_lengths, _ = batch
        state, _ = jrnn.unroll(self.model, params, story, lengths=lengths)
        _, logits = jrnn.unroll(self.model, params, question, state, lengths=question_lengths)
        return jrnn.sequence.last_valid(logits, question_lengths)


class Attending(Answering, seq2seq.Seq2Seq):
    """The decoder reads the question and attends to the story at each of its words."""

    def scores(self, params, batch):
        story, lengths, question, question_lengths, _ = batch
        ready = self.read(params, story, lengths)
        _, logits = jrnn.unroll(self.decoder, ready, question, lengths=question_lengths)
        return jrnn.sequence.last_valid(logits, question_lengths)

    def looked_at(self, params, batch):
        """How much each word of the question attended to each word of the story, (Q, T, B)."""
        story, lengths, question, *_ = batch
        return seq2seq.attention_weights(self.decoder.layers, self.read(params, story, lengths), question)


@functools.cache  # so that an LSTM that is trained on more questions is not compiled again
def networks(hidden):
    words, embedded = len(IDS), 32
    return {
        "lstm": Reading(jrnn.stack(jrnn.embed(words, embedded), jrnn.lstm(hidden), jrnn.dense(words))),
        "attention": Attending(
            jrnn.stack(jrnn.embed(words, embedded), jrnn.bidirectional(jrnn.gru(hidden), merge="sum")),
            jrnn.stack(jrnn.embed(words, embedded), jrnn.attention(jrnn.gru(hidden), hidden), jrnn.dense(words)),
        ),
    }


def train(network, data, validation, steps, key, checkpoint=None):
    """Parameters: those of the best validation."""
    rate = training.schedule("warmup_cosine", 5e-3, steps=steps, warmup_steps=min(100, 1 + steps // 5))
    result = training.fit(
        training.make_step(network.loss, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        network.init(key),
        training.batches(data, BATCH, seed=0, drop_last=True),
        steps=steps,
        validation=[validation],
        validate_every=max(1, steps // 10),
        monitor="accuracy",
        mode="max",
        checkpoint=checkpoint,
    )
    return shared.finished(result, checkpoint).params


def accuracy(network, params, data):
    logits = training.predict(network.scores, params, [data])
    return float(np.mean(logits.argmax(-1) == data[-1]))


def main(arguments=None):
    parser = shared.parser(__doc__, "answer.png")
    parser.add_argument("--tasks", type=int, nargs="+", choices=(1, 2, 6), default=[1, 2, 6])
    parser.add_argument(
        "--questions", type=int, default=10_000, help="of the larger training set (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=shared.positive, default=64, help="units (default: %(default)s)")
    parser.add_argument(
        "--steps", type=shared.positive, default=1000, help="training steps of each network (default: %(default)s)"
    )
    shared.add_checkpoint(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.questions < BATCH:
        parser.error(f"--questions: expected at least {BATCH}, got {options.questions}")
    few = min(1000, options.questions)
    trials = {
        f"LSTM, {few:,} questions": ("lstm", few),
        f"LSTM, {options.questions:,} questions": ("lstm", options.questions),
        f"attention, {options.questions:,} questions": ("attention", options.questions),
    }
    table, pictures = {}, []
    for task in options.tasks:
        tested = questions(task, TESTED, 1)
        validated = questions(task, TESTED // 2, 2, {*tested})
        trained = questions(task, options.questions, 3, {*tested, *validated})
        longest = max(len(story.split()) for part in (tested, validated, trained) for story, _, _ in part)
        test, validation, data = (encode(part, longest) for part in (tested, validated, trained))
        common = np.bincount(data[-1]).argmax()
        table["the commonest answer", task] = np.mean(test[-1] == common)
        for name, (kind, count) in trials.items():
            network = networks(options.hidden)[kind]
            key = jax.random.fold_in(jax.random.key(options.seed), task)
            fitted = jax.tree.map(lambda a, n=count: a[..., :n], data)
            checkpoint = shared.checkpoint_of(options.checkpoint, f"task {task} {kind} {count}")
            params = train(network, fitted, validation, options.steps, key, checkpoint)
            table[name, task] = accuracy(network, params, test)
            print(f"task {task}, {name}: {100 * table[name, task]:.1f}% of {TESTED:,} test questions", flush=True)
        pictures.append((tested[0], network.looked_at(params, jax.tree.map(lambda a: a[..., :1], test))[..., 0]))
    print(f"\n{'right answers, %':32}" + "".join(f"task {task:<6}" for task in options.tasks))
    for name in ("the commonest answer", *trials):
        print(f"{name:32}" + "".join(f"{100 * table[name, task]:6.1f}     " for task in options.tasks))
    print(f"{'published LSTM, 1,000 questions':32}" + "".join(f"{PUBLISHED[task]:6.1f}     " for task in options.tasks))
    draw(options.out, pictures)
    print(f"picture: {options.out}")
    return table


def draw(path, pictures):
    """What the words of a question attended to in the story, for one question of each task."""
    figure, axes = plt.subplots(
        len(pictures), 1, figsize=(14, 3.2 * len(pictures)), layout="constrained", squeeze=False
    )
    for ax, ((story, question, answer), weights) in zip(axes[:, 0], pictures, strict=True):
        words = story.split()
        seq2seq.draw_attention(ax, np.asarray(weights)[:, : len(words)], words, question.split())
        ax.tick_params(axis="x", rotation=90)
        ax.set_title(f"{question} {answer}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
