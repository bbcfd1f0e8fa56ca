"""Sequences from the logits of a model: greedy, sampled and beam search over any step, scheduled sampling for training,
CTC decoding, and error rates.

T time, B batch axes (any number, or none), V classes of the vocabulary, W width of a beam.
"""

from jrnn.decoding.ctc import ctc_beam, ctc_greedy
from jrnn.decoding.errors import character_error_rate, chrf, edit_distance, word_error_rate
from jrnn.decoding.forcing import scheduled_sampling
from jrnn.decoding.search import Beams, Decoded, beam, draw_token, greedy, sample

__all__ = [
    "Beams",
    "Decoded",
    "beam",
    "character_error_rate",
    "chrf",
    "ctc_beam",
    "ctc_greedy",
    "draw_token",
    "edit_distance",
    "greedy",
    "sample",
    "scheduled_sampling",
    "word_error_rate",
]
