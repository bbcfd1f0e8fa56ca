"""Recurrent neural networks for JAX: cells as pure functions, run over time by the fastest schedule that serves.

A model is a value without arrays. Its parameters and states are pytrees, which functions take and return::

    model = jrnn.stack(jrnn.lstm(128), jrnn.dropout(0.1), jrnn.dense(10))
    params = model.init(jax.random.key(0), 8)                        # for inputs of 8 features
    state, ys = jrnn.unroll(model, params, xs)                       # xs (T, *B, 8), ys (T, *B, 10)
    state, ys = jrnn.unroll(model, params, xs, state, lengths=lengths, key=key)    # a key switches dropout on

T time, B batch (any number of batch axes, or none), F input features, H hidden features, G gates. Time is the first
axis of sequences, and features are the last.

Run a model or a step
  `unroll` over whole sequences, `stepper` for inputs that arrive one at a time, `scan` in the place of
  ``jax.lax.scan`` for anybody's step, `linear_scan` for ``h = a * h + b``; `choose_backend` and `choose_scan_backend`
  tell which schedule runs, and why; `draw` for steps with dropout; `summary` shows the layers of a model.

Cells
  gated: `lstm`, `gru` and their variants `peephole_lstm`, `coupled_lstm`, `projection_lstm`, `layer_norm_lstm`,
  `layer_norm_gru`, `mgu`, `ugrnn`, `block_gru`; simple: `elman`, `jordan`, `indrnn`; linear in their state, and so
  parallel over time: `min_gru`, `min_lstm`, `sru`, `qrnn`, `lru`, `s5`, `rg_lru`; with a matrix as their state:
  `mlstm`, `ssd`, `gated_delta_net`; others: `slstm`, `conv_lstm`, `conv_gru`, `cornn`, `lem`, `antisymmetric`,
  `orthogonal_rnn`, `clockwork`, `narx`, `tdnn`, `echo_state` (with `ridge`).

Layers
  of layers: `stack`, `bidirectional`, `residual`, `skip`, `highway`, `tied`, `emit_state`; around one cell:
  `attention` (with `remember`), `variational`, `zoneout`, `dropconnect`, `learned_state`; without recurrence: `dense`,
  `embed`, `dropout`, `layer_norm`, `activation`.

A cell of your own
  subclass `Cell` and define ``init``, ``initial_state`` and ``step``, or subclass `AffineCell`, `LinearCell` or
  `Wrapper`; ``jrnn.testing.check_cell`` tests it.

Modules
  `sequence` (padding, masks, windows, buckets), `losses`, `training` (`optimizer`, ``fit``, checkpoints, truncated
  backpropagation), `decoding` (sampling, beam search, CTC, error rates), `diagnose`, `testing`, `rl`, `interop`
  (weights from and to other libraries), `flax` (modules for Flax), `native` (the compiled loop), `initializers`,
  `activations`.

Files
  `save` and `load` for a model with its parameters, `export` for a program that runs without jrnn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jrnn import activations, initializers, sequence
from jrnn.cells.affine import AffineCell
from jrnn.cells.base import Cell, Emitted, HiddenState, Layer, product
from jrnn.cells.blocks import block_gru
from jrnn.cells.clockwork import ClockworkState, clockwork
from jrnn.cells.conv import conv_gru, conv_lstm
from jrnn.cells.delta import DeltaNetState, gated_delta_net
from jrnn.cells.elman import elman, indrnn, jordan
from jrnn.cells.gru import gru, layer_norm_gru, mgu, ugrnn
from jrnn.cells.linear import LinearCell
from jrnn.cells.lru import lru, s5
from jrnn.cells.lstm import LSTM, LSTMState, coupled_lstm, layer_norm_lstm, lstm, peephole_lstm, projection_lstm
from jrnn.cells.minimal import min_gru, min_lstm
from jrnn.cells.narx import NARXState, narx
from jrnn.cells.orthogonal import antisymmetric, orthogonal_rnn
from jrnn.cells.oscillator import CoRNNState, LEMState, cornn, lem
from jrnn.cells.qrnn import QRNNState, qrnn
from jrnn.cells.reservoir import echo_state
from jrnn.cells.rg_lru import rg_lru
from jrnn.cells.sru import SRUState, sru
from jrnn.cells.ssd import SSDState, ssd
from jrnn.cells.tdnn import TDNNState, tdnn
from jrnn.cells.xlstm import MLSTMState, SLSTMState, mlstm, slstm
from jrnn.compose.attention import AttentionState, Memory, attend, attention, remember
from jrnn.compose.combine import bidirectional, highway, residual, skip, stack
from jrnn.compose.describing import summary
from jrnn.compose.emit import emit_state
from jrnn.compose.regularise import Wrapper, dropconnect, learned_state, variational, zoneout
from jrnn.compose.tied import tied
from jrnn.compose.timewise import activation, dense, dropout, embed, layer_norm
from jrnn.readout import ridge
from jrnn.run.scanning import choose_scan_backend, scan
from jrnn.run.streaming import stepper
from jrnn.run.unrolling import choose_backend, draw, unroll
from jrnn.schedules.linear import linear_scan

if TYPE_CHECKING:
    import jrnn.decoding as decoding
    import jrnn.diagnose as diagnose
    import jrnn.flax as flax
    import jrnn.interop as interop
    import jrnn.losses as losses
    import jrnn.native as native
    import jrnn.rl as rl
    import jrnn.testing as testing
    import jrnn.training as training
    from jrnn.files import export, load, save
    from jrnn.training import optimizer

__version__ = "0.1.0"

# Imported where they are used: each needs a library that a plain forward pass does not.
_LAZY = {
    "decoding": "jrnn.decoding",
    "diagnose": "jrnn.diagnose",
    "flax": "jrnn.flax",
    "interop": "jrnn.interop",
    "losses": "jrnn.losses",
    "native": "jrnn.native",
    "rl": "jrnn.rl",
    "testing": "jrnn.testing",
    "training": "jrnn.training",
}

__all__ = [
    "LSTM",
    "AffineCell",
    "AttentionState",
    "Cell",
    "ClockworkState",
    "CoRNNState",
    "DeltaNetState",
    "Emitted",
    "HiddenState",
    "LEMState",
    "LSTMState",
    "Layer",
    "LinearCell",
    "MLSTMState",
    "Memory",
    "NARXState",
    "QRNNState",
    "SLSTMState",
    "SRUState",
    "SSDState",
    "TDNNState",
    "Wrapper",
    "activation",
    "activations",
    "antisymmetric",
    "attend",
    "attention",
    "bidirectional",
    "block_gru",
    "choose_backend",
    "choose_scan_backend",
    "clockwork",
    "conv_gru",
    "conv_lstm",
    "cornn",
    "coupled_lstm",
    "decoding",
    "dense",
    "diagnose",
    "draw",
    "dropconnect",
    "dropout",
    "echo_state",
    "elman",
    "embed",
    "emit_state",
    "export",
    "flax",
    "gated_delta_net",
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
    "lem",
    "linear_scan",
    "load",
    "losses",
    "lru",
    "lstm",
    "mgu",
    "min_gru",
    "min_lstm",
    "mlstm",
    "narx",
    "native",
    "optimizer",
    "orthogonal_rnn",
    "peephole_lstm",
    "product",
    "projection_lstm",
    "qrnn",
    "remember",
    "residual",
    "rg_lru",
    "ridge",
    "rl",
    "s5",
    "save",
    "scan",
    "sequence",
    "skip",
    "slstm",
    "sru",
    "ssd",
    "stack",
    "stepper",
    "summary",
    "tdnn",
    "testing",
    "tied",
    "training",
    "ugrnn",
    "unroll",
    "variational",
    "zoneout",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    if name in ("export", "load", "save"):
        return getattr(importlib.import_module("jrnn.files"), name)
    if name == "optimizer":
        return importlib.import_module("jrnn.training").optimizer
    raise AttributeError(f"module 'jrnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
