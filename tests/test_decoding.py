"""Decoding, held against the enumeration of all sequences, and against beams written out in Python."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import decoding

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCABULARY, END = 4, 3
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    layers = jrnn.stack(jrnn.embed(VOCABULARY, 3), jrnn.gru(5), jrnn.dense(VOCABULARY))
    params = layers.init(jax.random.key(0), None)
    params = jax.tree.map(lambda a: 2.0 * a, params)  # less even
    return layers, params


def stepper(model):
    layers, params = model
    return lambda state, token: layers.step(params, state, token)


def log_prob(model, first, tokens):
    """Of one sequence, token by token, in NumPy's float64 after the logits."""
    step, state, token, total = stepper(model), model[0].initial_state(model[1], ()), first, 0.0
    for chosen in tokens:
        state, logits = step(state, jnp.asarray(token))
        logits = np.asarray(logits, np.float64)
        total += logits[chosen] - np.log(np.exp(logits).sum())
        token = chosen
        if chosen == END:
            break
    return total


@functools.cache
def everything(length):
    """All sequences, those that end only once."""
    found = []
    for tokens in itertools.product(range(VOCABULARY), repeat=length):
        stop = tokens.index(END) + 1 if END in tokens else length
        found.append(tokens[:stop] + (END,) * (length - stop))
    return sorted(set(found))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_a_wide_beam_finds_the_best_of_all_sequences(model, batch):
    step, length, width = stepper(model), 3, VOCABULARY
    first = jnp.arange(np.prod(batch, dtype=int), dtype=jnp.int32).reshape(batch) % VOCABULARY
    state = model[0].initial_state(model[1], batch)
    run = jax.jit(lambda state, first: decoding.beam(step, state, first, length, width=width, end=END))
    beams = run(state, first)
    assert beams.tokens.shape == (length, *batch, width)
    assert (np.diff(np.asarray(beams.scores), axis=-1) <= 1e-6).all()
    for index in np.ndindex(*batch):
        token = int(first[index])
        # At width V only prefixes can be lost: the best two are found here.
        ranked = sorted(everything(length), key=lambda tokens: -log_prob(model, token, tokens))
        for place in range(width):
            tokens = tuple(np.asarray(beams.tokens[(slice(None), *index, place)]).tolist())
            expected = log_prob(model, token, tokens)
            np.testing.assert_allclose(beams.log_probs[(*index, place)], expected, rtol=1e-5)
            stop = tokens.index(END) if END in tokens else length
            assert int(beams.lengths[(*index, place)]) == stop
        assert tuple(np.asarray(beams.tokens[(slice(None), *index, 0)]).tolist()) == ranked[0]


def test_a_beam_of_one_is_greedy_and_a_length_penalty_reorders(model):
    step, state, first = stepper(model), model[0].initial_state(model[1], (3,)), jnp.array([0, 1, 2])
    greedy = decoding.greedy(step, state, first, 5, end=END)
    one = decoding.beam(step, state, first, 5, width=1, end=END)
    assert (one.tokens[..., 0] == greedy.tokens).all()
    assert (one.lengths[..., 0] == greedy.lengths).all()
    np.testing.assert_allclose(one.log_probs[..., 0], greedy.log_probs, rtol=1e-5)
    for penalty in (0.0, 0.6, 3.0):
        beams = decoding.beam(step, state, first, 5, width=4, end=END, length_penalty=penalty)
        count = np.minimum(np.asarray(beams.lengths) + 1, 5)
        np.testing.assert_allclose(beams.scores, np.asarray(beams.log_probs) / ((5 + count) / 6) ** penalty, rtol=1e-5)
        assert (np.diff(np.asarray(beams.scores), axis=-1) <= 1e-6).all()


def test_greedy_takes_the_largest_logit_and_stops_at_the_end(model):
    step, state, token = stepper(model), model[0].initial_state(model[1], ()), 0
    got = decoding.greedy(step, state, jnp.array(0), 6)
    for chosen in np.asarray(got.tokens):
        state, logits = step(state, jnp.asarray(token))
        token = int(np.argmax(logits))
        assert chosen == token
    assert int(got.lengths) == 6
    np.testing.assert_allclose(got.state[1].h, state[1].h, atol=1e-6)
    ended = decoding.greedy(lambda state, token: (state, jax.nn.one_hot(token + 1, 4)), (), jnp.array([0, 2]), 4, end=3)
    np.testing.assert_array_equal(ended.tokens, [[1, 3], [2, 3], [3, 3], [3, 3]])
    np.testing.assert_array_equal(ended.lengths, [2, 0])
    one = float(jax.nn.log_softmax(jax.nn.one_hot(0, 4))[0])
    np.testing.assert_allclose(ended.log_probs, [3 * one, one], rtol=1e-6)


LOGITS = jnp.log(jnp.array([0.45, 0.05, 0.3, 0.2]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.45, 0.05, 0.3, 0.2]),
        ({"temperature": 0.5}, np.array([0.45, 0.05, 0.3, 0.2]) ** 2 / 0.335),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.6, 0, 0.4, 0]),
        ({"top_k": 9}, [0.45, 0.05, 0.3, 0.2]),
        ({"top_p": 0.7}, [0.6, 0, 0.4, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.45, 0.05, 0.3, 0.2]),
        ({"top_k": 3, "top_p": 0.5}, [0.6, 0, 0.4, 0]),
    ],
)
def test_draws_have_the_frequencies_that_options_say(options, expected):
    keys = jax.random.split(jax.random.key(1), 4000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: decoding.draw_token(key, LOGITS, **options)))(keys))
    frequencies = np.bincount(draws, minlength=4) / len(keys)
    np.testing.assert_allclose(frequencies, expected, atol=0.03)
    assert (frequencies[np.asarray(expected) == 0] == 0).all()


def test_of_equal_logits_no_more_than_k_are_left():
    keys = jax.random.split(jax.random.key(1), 200)
    draws = jax.vmap(lambda key: decoding.draw_token(key, jnp.zeros(5), top_k=2))(keys)
    assert set(np.asarray(draws).tolist()) == {0, 1}


def test_samples_are_those_of_each_step_by_itself(model):
    step, key, first = stepper(model), jax.random.key(3), jnp.array([0, 1])
    state = model[0].initial_state(model[1], (2,))
    got = decoding.sample(step, state, first, 5, key, temperature=0.8, top_k=3, end=END)
    again = jax.jit(lambda key: decoding.sample(step, state, first, 5, key, temperature=0.8, top_k=3, end=END))(key)
    np.testing.assert_array_equal(got.tokens, again.tokens)
    token, ended = first, np.zeros(2, bool)
    for t in range(5):
        state, logits = step(state, token)
        drawn = decoding.draw_token(jax.random.fold_in(key, t), logits, temperature=0.8, top_k=3)
        token = jnp.where(ended, END, drawn)
        np.testing.assert_array_equal(got.tokens[t], token)
        ended = ended | np.asarray(token == END)


# --- CTC ---------------------------------------------------------------------------------------------------------


def collapse(path):
    merged = [label for i, label in enumerate(path) if i == 0 or label != path[i - 1]]
    return tuple(label for label in merged if label != 0)


def test_ctc_beams_are_sums_over_all_alignments():
    logits = jax.random.normal(jax.random.key(0), (4, 2, 3)) * 2
    lengths = np.array([4, 3])
    found = decoding.ctc_beam(logits, lengths, width=100)
    log_probs = np.asarray(jax.nn.log_softmax(logits, -1), np.float64)
    for b, length in enumerate(lengths):
        sums = {}
        for path in itertools.product(range(3), repeat=int(length)):
            p = np.exp(sum(log_probs[t, b, label] for t, label in enumerate(path)))
            sums[collapse(path)] = sums.get(collapse(path), 0.0) + p
        got = {tuple(labels): np.exp(value) for labels, value in found[b]}
        assert got.keys() == sums.keys()
        for labels, value in sums.items():
            np.testing.assert_allclose(got[labels], value, rtol=1e-5)
        assert tuple(found[b][0][0]) == max(sums, key=sums.get)
        # A hypothesis has the probability that the loss says it has.
        best = found[b][0][0]
        labels = jnp.zeros((4, 1), jnp.int32).at[: len(best), 0].set(jnp.array(best, jnp.int32))
        loss = jrnn.losses.ctc(logits[:, b : b + 1], jnp.array([int(length)]), labels, jnp.array([len(best)]))
        np.testing.assert_allclose(-np.asarray(loss), found[b][0][1], rtol=1e-4)
    assert decoding.ctc_beam(logits[:, 0])[0][0] == found[0][0][0]


@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_greedy_merges_and_drops(blank):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 5, 3)).astype(np.float32)
    lengths = np.array([7, 5, 0, 1, 6])
    labels, counts = jax.jit(lambda a, n: decoding.ctc_greedy(a, n, blank=blank))(logits, lengths)
    for b in range(5):
        path = logits[: lengths[b], b].argmax(-1)
        merged = [label for i, label in enumerate(path) if i == 0 or label != path[i - 1]]
        expected = [label for label in merged if label != blank]
        assert np.asarray(labels[: int(counts[b]), b]).tolist() == expected
        assert (np.asarray(labels[int(counts[b]) :, b]) == blank).all()


# --- error rates -------------------------------------------------------------------------------------------------


def recursive(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, recursive(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distances_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(3, size=rng.integers(0, 6)).tolist() for _ in range(2))
        assert decoding.edit_distance(a, b) == recursive(a, b) == decoding.edit_distance(np.array(b), np.array(a))


def test_error_rates():
    assert decoding.word_error_rate(["a b c", ""], ["a x c", "d"]) == 2 / 4
    assert decoding.character_error_rate([[1, 2]], [[1, 3, 4]]) == 2 / 3
    with pytest.raises(ValueError, match="predictions: expected one for each of 2"):
        decoding.word_error_rate(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="references: expected at least one"):
        decoding.word_error_rate([""], [""])


def test_chrf_is_that_of_its_definition():
    predictions = ["le chat est assis sur le tapis", "bonjour", ""]
    references = ["le chat était assis sur un tapis", "bonsoir", "rien"]
    shares = []
    for n in range(1, 7):
        found, wanted, common = 0, 0, 0
        for p, r in zip(predictions, references, strict=True):
            p, r = p.replace(" ", ""), r.replace(" ", "")
            ours, theirs = ([s[i : i + n] for i in range(len(s) - n + 1)] for s in (p, r))
            found, wanted = found + len(ours), wanted + len(theirs)
            for gram in ours:
                if gram in theirs:
                    common += 1
                    theirs.remove(gram)
        shares.append((common / found, common / wanted))
    precision, recall = np.mean(shares, axis=0)
    for beta in (1.0, 2.0):
        expected = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
        assert np.isclose(decoding.chrf(predictions, references, beta=beta), expected, rtol=1e-12)
    assert decoding.chrf(["ab"], ["ab"]) == 1.0  # no n-grams of three and more: they do not count
    assert decoding.chrf([""], ["ab"]) == decoding.chrf(["x"], [""]) == 0.0
    with pytest.raises(ValueError, match="predictions: expected one for each of 2"):
        decoding.chrf(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="references: expected at least one"):
        decoding.chrf([], [])
    with pytest.raises(ValueError, match="beta: expected a positive"):
        decoding.chrf(["a"], ["a"], beta=0.0)


def test_scheduled_sampling_without_own_tokens_is_teacher_forcing_with_its_gradients(model):
    layers, params = model
    tokens = jax.random.randint(jax.random.key(3), (6, 2, 3), 0, VOCABULARY)

    def scheduled(params):
        step = lambda state, token: layers.step(params, state, token)
        start = layers.initial_state(params, (2, 3))
        return decoding.scheduled_sampling(step, start, tokens, jax.random.key(0), 0.0)

    forced = lambda params: jrnn.unroll(layers, params, tokens)
    assert_close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(assert_close, jax.jit(scheduled)(params), forced(params))
    got, expected = (jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f(p)[1])))(params) for f in (scheduled, forced))
    jax.tree.map(assert_close, got, expected)


def test_scheduled_sampling_feeds_back_what_it_draws(model):
    layers, params = model
    state, tokens = layers.initial_state(params, (200,)), jnp.zeros((3, 200), jnp.int32)
    step = lambda state, token: ({"fed": token, "of": layers.step(params, state["of"], token)[0]}, seen(state, token))

    def seen(state, token):
        """Logits that all but name a token, which is never the right one."""
        return 50.0 * jax.nn.one_hot((token + 1) % VOCABULARY, VOCABULARY)

    run = jax.jit(lambda rate: decoding.scheduled_sampling(step, {"fed": tokens[0], "of": state}, tokens, KEY, rate))
    for rate, chosen in ((1.0, {2}), (0.0, {0}), (0.3, {0, 1, 2})):
        fed = np.asarray(run(rate)[0]["fed"])  # the last input: 2 after two of its own, 1 after one, else the right 0
        assert set(fed.tolist()) == chosen
    expected = [0.7, 0.3 * 0.7, 0.3 * 0.3]
    np.testing.assert_allclose(np.bincount(fed) / 200, expected, atol=0.1)


def test_no_gradient_passes_through_what_is_drawn():
    logits = lambda w, token: jnp.stack([w, 2 * w]) * (1 + token[..., None].astype(jnp.float32))
    value = lambda w: decoding.scheduled_sampling(lambda s, t: (s, logits(w, t)), (), jnp.zeros(4, int), KEY, 1.0)[1]
    drawn = value(1.0)
    gradient = jax.grad(lambda w: jnp.sum(value(w)[:, 0]))(1.0)
    np.testing.assert_allclose(gradient, drawn[:, 0].sum(), rtol=1e-6)  # linear in w for the tokens that were fed


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: decoding.scheduled_sampling(s, (), jnp.zeros(3), KEY, 0.1), TypeError, "tokens: expected integers"),
        (lambda s: decoding.scheduled_sampling(s, (), jnp.zeros(3, int), KEY, 1.5), ValueError, "rate: expected one"),
        (lambda s: decoding.scheduled_sampling(s, (), jnp.zeros(3, int), 0, 0.5), TypeError, "key: expected one PRNG"),
        (lambda s: decoding.greedy(s, (), jnp.array(0.0), 3), TypeError, "token: expected integers"),
        (lambda s: decoding.greedy(s, (), jnp.array(0), -1), ValueError, "length"),
        (lambda s: decoding.greedy(s, (), jnp.array(0), 3, end=7), ValueError, "end: expected one of the 2 classes"),
        (lambda s: decoding.greedy(lambda a, b: jnp.zeros(2), (), jnp.array(0), 3), TypeError, "step: expected"),
        (lambda s: decoding.greedy(lambda a, b: (a, jnp.zeros(2)), (), jnp.zeros(3, int), 3), ValueError, "logits of"),
        (lambda s: decoding.beam(s, (), jnp.array(0), 3, width=3), ValueError, "width: expected at most the 2"),
        (
            lambda s: decoding.beam(s, {"t": jnp.array(0)}, jnp.zeros(3, int), 3, width=2),
            ValueError,
            r"state\['t'\]: expected the batch axes \(3,\)",
        ),
        (lambda s: decoding.draw_token(jax.random.key(0), jnp.zeros(2), temperature=-1.0), ValueError, "temperature"),
        (lambda s: decoding.draw_token(jax.random.key(0), jnp.zeros(2), top_p=0.0), ValueError, "top_p"),
        (lambda s: decoding.draw_token(jax.random.key(0), jnp.zeros(2), top_k=0), ValueError, "top_k"),
        (lambda s: decoding.ctc_greedy(jnp.zeros((3, 2)), blank=2), ValueError, "blank: expected one of the 2"),
        (
            lambda s: decoding.ctc_beam(jnp.zeros((3, 4, 2)), jnp.zeros(3, int)),
            ValueError,
            "lengths: expected integers",
        ),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call(lambda state, token: (state, jnp.zeros((*token.shape, 2))))


@pytest.mark.parametrize(("option", "value"), [("temperature", 0.5), ("top_k", 2), ("top_p", 0.5)])
def test_how_to_draw_is_known_before_tracing(option, value):
    draw = lambda value: decoding.draw_token(KEY, LOGITS, **{option: value})
    with pytest.raises(TypeError, match=f"{option}: expected a Python number, known before tracing"):
        jax.jit(draw)(value)
    assert jax.jit(draw, static_argnums=0)(value) == draw(value)
