"""Recurrent neural networks for JAX: cells as pure functions, run over time by the fastest schedule that serves.

A model is a value without arrays. Its parameters and states are pytrees, which functions take and return::

    model = jrnn.stack(jrnn.lstm(128), jrnn.dropout(0.1), jrnn.dense(10))
    params = model.init(jax.random.key(0), 8)                        # for inputs of 8 features
    state, ys = jrnn.unroll(model, params, xs)                       # xs (T, *B, 8), ys (T, *B, 10)
    state, ys = jrnn.unroll(model, params, xs, state, lengths=lengths, key=key)    # a key switches dropout on

T time, B batch (any number of batch axes, or none), F input features, H hidden features, G gates. Time is the first
axis of sequences, and features are the last.

Running a model or a step
  `unroll`                a model over whole sequences
  `stepper`               a compiled step, for inputs that arrive one at a time
  `scan`                  ``jax.lax.scan`` for anybody's step, faster where the step is recurrent
  `linear_scan`           ``h = a * h + b``, element by element
  `choose_backend`, `choose_scan_backend`    which schedule runs, and why
  `summary`, `draw`       the layers of a model; the masks of dropout for single steps

Cells
  gated                   `lstm`, `gru`, `mgu`, `ugrnn`, `block_gru`, `slstm`, `peephole_lstm`, `coupled_lstm`,
                          `projection_lstm`, `layer_norm_lstm`, `layer_norm_gru`
  simple                  `elman`, `jordan`, `indrnn`
  linear in their state   `min_gru`, `min_lstm`, `sru`, `qrnn`, `lru`, `s5`, `rg_lru`; on a CPU they run as compiled
                          loops, and elsewhere all steps can run at once
  with a matrix as state  `mlstm`, `ssd`, `gated_delta_net`
  convolutional           `conv_lstm`, `conv_gru`
  others                  `cornn`, `lem`, `antisymmetric`, `orthogonal_rnn`, `clockwork`, `narx`, `tdnn`, `echo_state`
                          (whose readout `ridge` solves for)

Layers
  made of layers          `stack`, `bidirectional`, `residual`, `skip`, `highway`, `tied`, `emit_state`
  around a cell           `attention` (with `remember` and `attend`), `variational`, `zoneout`, `dropconnect`,
                          `learned_state`
  without recurrence      `dense`, `embed`, `dropout`, `layer_norm`, `activation`
  of your own             subclasses of `Cell`, `AffineCell`, `LSTM`, `LinearCell`, `Wrapper` or `Layer`; their matrix
                          products by `product`

Modules
  `sequence`              padding, masks, resets, windows, buckets, reductions over valid steps
  `losses`, `training`    losses; `optimizer`, ``fit``, truncated backpropagation, checkpoints
  `decoding`              sampling, beam search, CTC, error rates
  `diagnose`, `testing`   gradients and gates of a network; the laws that every cell keeps, for a cell of your own
  `rl`                    acting with resets, burn-in, stored states
  `interop`, `flax`       weights from and to other libraries; modules for Flax
  `native`                the compiled loop: its cache, and programs in files
  `initializers`, `activations`

Files
  `save`, `load`          a model with its parameters
  `export`                a program that runs where jrnn is not installed
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
