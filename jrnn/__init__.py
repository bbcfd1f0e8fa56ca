"""jrnn: recurrent networks for JAX. Cells as pure functions, many schedules.

    cell = jrnn.lstm(128)
    params = cell.init(jax.random.key(0), in_features)
    state, ys = jrnn.unroll(cell, params, xs)          # xs (T, *B, F), ys (T, *B, H)

T time, B batch (any number of leading axes, or none), F input features, H hidden features, G gates.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jrnn import activations, initializers, sequence
from jrnn.cells.base import AffineCell, Cell, HiddenState, Layer, product
from jrnn.cells.elman import ElmanState, IndRNNState, JordanState, elman, indrnn, jordan
from jrnn.cells.gru import GRUState, MGUState, UGRNNState, gru, layer_norm_gru, mgu, ugrnn
from jrnn.cells.lstm import LSTMState, coupled_lstm, layer_norm_lstm, lstm, peephole_lstm, projection_lstm
from jrnn.cells.tdnn import TDNNState, tdnn
from jrnn.compose.combine import bidirectional, highway, residual, stack
from jrnn.compose.regularise import dropconnect, learned_state, variational, zoneout
from jrnn.compose.timewise import activation, dense, dropout, embed, layer_norm
from jrnn.run.scan import choose_scan_backend, scan
from jrnn.streaming import stepper
from jrnn.tuning import Timing, Tuning, tune
from jrnn.unroll import choose_backend, draw, unroll

if TYPE_CHECKING:
    import jrnn.diagnose as diagnose
    import jrnn.flax as flax
    import jrnn.interop as interop
    import jrnn.losses as losses
    import jrnn.native as native
    import jrnn.testing as testing
    import jrnn.training as training
    from jrnn.training import optimizer

__version__ = "0.1.0"

# Imported where they are used: each needs a library that a plain forward pass does not.
_LAZY = {
    "diagnose": "jrnn.diagnose",
    "flax": "jrnn.flax",
    "interop": "jrnn.interop",
    "losses": "jrnn.losses",
    "native": "jrnn.native",
    "testing": "jrnn.testing",
    "training": "jrnn.training",
}

__all__ = [
    "AffineCell",
    "Cell",
    "ElmanState",
    "GRUState",
    "HiddenState",
    "IndRNNState",
    "JordanState",
    "LSTMState",
    "Layer",
    "MGUState",
    "TDNNState",
    "Timing",
    "Tuning",
    "UGRNNState",
    "activation",
    "activations",
    "bidirectional",
    "choose_backend",
    "choose_scan_backend",
    "coupled_lstm",
    "dense",
    "diagnose",
    "draw",
    "dropconnect",
    "dropout",
    "elman",
    "embed",
    "flax",
    "gru",
    "highway",
    "indrnn",
    "initializers",
    "interop",
    "jordan",
    "layer_norm",
    "layer_norm_gru",
    "layer_norm_lstm",
    "learned_state",
    "losses",
    "lstm",
    "mgu",
    "native",
    "optimizer",
    "peephole_lstm",
    "product",
    "projection_lstm",
    "residual",
    "scan",
    "sequence",
    "stack",
    "stepper",
    "tdnn",
    "testing",
    "training",
    "tune",
    "ugrnn",
    "unroll",
    "variational",
    "zoneout",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    if name == "optimizer":
        return importlib.import_module("jrnn.training").optimizer
    raise AttributeError(f"module 'jrnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
