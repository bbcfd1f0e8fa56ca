"""Sequences from the logits of a model, and how far they are from the right ones.

- `greedy`, `sample` and `beam` decode token by token, with any function ``step(state, token) -> (state, logits)``.
- `scheduled_sampling` trains a decoder on some of its own tokens.
- `ctc_greedy` and `ctc_beam` decode the outputs of a model that was trained with `jrnn.losses.ctc`.
- `edit_distance`, `word_error_rate`, `character_error_rate` and `chrf` compare sequences with references.

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
