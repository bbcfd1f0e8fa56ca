"""Sequences into sequences: the attention model that several examples train, and how it is fed, trained and decoded."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jrnn
import shared
from jrnn import decoding, training

END = 0  # ends a sequence, and stands before its first symbol; what is padded is this too, and masked out
QUANTILES = 0.5, 0.9, 1.0  # of the lengths: those to which sequences are padded; each of them is compiled once
UNKNOWN = 1  # the id of all symbols that the training data do not have


def add_options(parser, steps, hidden):
    """``steps`` and ``hidden`` say what the defaults are."""
    parser.add_argument("--steps", type=shared.positive, help=f"training steps (default: {steps})")
    parser.add_argument("--hidden", type=shared.positive, help=f"units of each GRU (default: {hidden})")
    parser.add_argument(
        "--beam", type=shared.positive, default=4, help="hypotheses of the beam search (default: %(default)s)"
    )
    parser.add_argument(
        "--scheduled",
        type=share,
        default=0.0,
        help="scheduled sampling: the share of inputs that are the decoder's own",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the parameters and batches; the split of the data stays"
    )


def share(text):
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text}")
    return number


class Symbols:
    """Characters, phonemes or pieces of words as ids from 2."""

    def __init__(self, sequences):
        self.names = ["<end>", "?", *sorted({symbol for sequence in sequences for symbol in sequence})]
        self.ids = {name: i for i, name in enumerate(self.names)}

    def __len__(self):
        return len(self.names)

    def encode(self, sequence):
        return np.array([self.ids.get(symbol, UNKNOWN) for symbol in sequence], np.int32)

    def decode(self, ids):
        return [self.names[i] for i in ids]


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """An encoder, and a decoder that attends to its outputs (Bahdanau et al. 2015)."""

    encoder: jrnn.Layer
    decoder: jrnn.Layer

    def init(self, key):
        k_encoder, k_decoder = jax.random.split(key)
        return {"encoder": self.encoder.init(k_encoder, None), "decoder": self.decoder.init(k_decoder, None)}

    def read(self, params, source, lengths, key=None):
        """The decoder's parameters with what the encoder makes of the source (S, B) as its memory."""
        _, memory = jrnn.unroll(self.encoder, params["encoder"], source, lengths=lengths, key=key)
        return jrnn.remember(self.decoder, params["decoder"], memory, lengths=lengths)

    def logits(self, params, batch, key=None, own=0.0):
        """Logits (T, B, V): teacher forcing, or with ``own`` above 0 so many inputs are the decoder's own."""
        (source, lengths), (target, target_lengths) = batch
        if key is None:
            k_encoder = k_decoder = None
        else:
            k_encoder, k_decoder, k_own = jax.random.split(key, 3)
        ready = self.read(params, source, lengths, k_encoder)
        inputs = jnp.concatenate([jnp.full_like(target[:1], END), target[:-1]])
        if key is None or not own:
            return jrnn.unroll(self.decoder, ready, inputs, lengths=target_lengths, key=k_decoder)[1]

        def step(state, token):
            t, state = state
            now = None if k_decoder is None else jax.random.fold_in(k_decoder, t)
            state, logits = self.decoder.step(ready, state, token, now)
            return (t + 1, state), logits

        start = jnp.int32(0), self.decoder.initial_state(ready, lengths.shape)
        return decoding.scheduled_sampling(step, start, inputs, k_own, own)[1]

    def weights(self, params, batch):
        """How much each step of the target attended to each step of the source, (T, S, B)."""
        (source, lengths), (target, _) = batch
        ready = self.read(params, source, lengths)
        inputs = jnp.concatenate([jnp.full_like(target[:1], END), target[:-1]])
        layers = self.decoder.embed, *self.decoder.layer.layers
        return attention_weights(layers, (ready["embed"], *ready["layer"]), inputs)


def attention_weights(layers, params, inputs):
    """Weights (T, S, B) of the attention among some layers, whose parameters have their memory, for inputs (T, B)."""
    at = next(i for i, layer in enumerate(layers) if hasattr(layer, "memory_features"))
    _, ys = jrnn.unroll(jrnn.stack(*layers[: at + 1]), tuple(params[: at + 1]), inputs)
    return layers[at].weights(params[at], ys)[..., 0]


def network(source_symbols, target_symbols, features, hidden, dropout=0.0):
    """Bidirectional GRU into GRU with additive attention; the decoder's embeddings are its output layer too.

    The directions of the encoder are summed: most of the time goes into the memory, which is as wide as its outputs.
    """
    drop = (jrnn.dropout(dropout),) if dropout else ()
    return Seq2Seq(
        jrnn.stack(
            jrnn.embed(source_symbols, features), *drop, jrnn.bidirectional(jrnn.gru(hidden), merge="sum"), *drop
        ),
        jrnn.tied(
            jrnn.embed(target_symbols, features, table_init="uniform"),
            jrnn.stack(
                *drop, jrnn.attention(jrnn.gru(hidden), hidden, features=hidden // 2), *drop, jrnn.dense(features)
            ),
        ),
    )


def with_end(pairs):
    return [(source, np.append(target, np.int32(END))) for source, target in pairs]


def make_batch(pairs, length=None):
    """All in one batch, ``((source (S, B), lengths (B,)), (target (T, B), lengths (B,)))``, the end in each target."""
    boundaries = None if length is None else (length,)
    (batch,) = training.ragged_batches(with_end(pairs), len(pairs), quantiles=(), boundaries=boundaries)(0)
    return batch


def train(model, params, pairs, validation, steps, batch, learning_rate, key, own=0.0, smoothing=0.0, checkpoint=None):
    """The result of `fit`. Pairs of like length make a batch, padded to one of three lengths: each is compiled once."""
    k_order, k_fit = jax.random.split(key)
    drop_last = len(pairs) > 20 * batch  # what does not fill a batch is left out of this epoch
    batches = training.ragged_batches(with_end(pairs), batch, quantiles=QUANTILES, seed=k_order, drop_last=drop_last)

    def loss_fn(params, batch, key):
        logits = model.logits(params, batch, key, own)
        _, (target, target_lengths) = batch
        mask = jrnn.sequence.valid_steps(target_lengths, None, len(target), target_lengths.shape)
        # Validation, which has no key, is by the cross-entropy itself.
        return jrnn.losses.cross_entropy(logits, target, mask, label_smoothing=0.0 if key is None else smoothing)

    rate = training.schedule("warmup_cosine", learning_rate, steps=steps, warmup_steps=min(200, 1 + steps // 5))
    result = training.fit(
        training.make_step(loss_fn, jrnn.optimizer("adam", rate, clip_norm=1.0)),
        params,
        batches,
        key=k_fit,
        steps=steps,
        validation=[make_batch(validation)],
        validate_every=max(1, steps // 8),
        checkpoint=checkpoint,
    )
    return shared.noted(result)


def decode(model, params, sources, width=1, length_penalty=0.0):
    """The target ids of each source: the most probable next one at each step, or the best of a beam."""

    def most_probable(params, batch):
        source, lengths = batch
        ready = model.read(params, source, lengths)
        step = lambda state, token: model.decoder.step(ready, state, token)
        state, begin = model.decoder.initial_state(ready, lengths.shape), jnp.full(lengths.shape, END)
        longest = len(source) + len(source) // 2 + 4
        if width == 1:
            return decoding.greedy(step, state, begin, longest, end=END)[:2]
        most = min(width, model.decoder.embed.vocab)
        beams = decoding.beam(step, state, begin, longest, width=most, end=END, length_penalty=length_penalty)
        return beams.tokens[..., 0], beams.lengths[..., 0]

    found = training.predict_ragged(most_probable, params, sources, 512, axis=1, quantiles=QUANTILES[-2:])
    return [tokens[:count] for tokens, count in found]


def weights_of(model, params, pairs):
    """How much each symbol of a target, and its end, attended to each symbol of its source: an array for each pair."""
    weights = np.asarray(jax.jit(model.weights)(params, make_batch(pairs)))
    return [weights[: len(target) + 1, : len(source), i] for i, (source, target) in enumerate(pairs)]


def draw_attention(axes, weights, source, target):
    """The weights (T, S) of one pair, the source across and the target down."""
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source)
    axes.set_yticks(range(len(target)), target)
    axes.tick_params(labelsize=8)
