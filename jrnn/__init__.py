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
from jrnn.cells.blocks import BlockGRUState, block_gru
from jrnn.cells.clockwork import ClockworkState, clockwork
from jrnn.cells.conv import ConvGRUState, conv_gru, conv_lstm
from jrnn.cells.delta import DeltaNetState, gated_delta_net
from jrnn.cells.elman import ElmanState, IndRNNState, JordanState, elman, indrnn, jordan
from jrnn.cells.gru import GRUState, MGUState, UGRNNState, gru, layer_norm_gru, mgu, ugrnn
from jrnn.cells.lstm import LSTMState, coupled_lstm, layer_norm_lstm, lstm, peephole_lstm, projection_lstm
from jrnn.cells.narx import NARXState, narx
from jrnn.cells.orthogonal import AntisymmetricState, OrthogonalState, antisymmetric, orthogonal_rnn
from jrnn.cells.oscillator import CoRNNState, LEMState, cornn, lem
from jrnn.cells.reservoir import EchoStateState, echo_state
from jrnn.cells.ssd import SSDState, ssd
from jrnn.cells.tdnn import TDNNState, tdnn
from jrnn.cells.xlstm import MLSTMState, SLSTMState, mlstm, slstm
from jrnn.compose.combine import bidirectional, highway, residual, skip, stack
from jrnn.compose.regularise import dropconnect, learned_state, variational, zoneout
from jrnn.compose.timewise import activation, dense, dropout, embed, layer_norm
from jrnn.readout import ridge
from jrnn.run.scan import choose_scan_backend, scan
from jrnn.streaming import stepper
from jrnn.tuning import Timing, Tuning, tune
from jrnn.unroll import choose_backend, draw, unroll

if TYPE_CHECKING:
    import jrnn.diagnose as diagnose
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
    "interop": "jrnn.interop",
    "losses": "jrnn.losses",
    "native": "jrnn.native",
    "testing": "jrnn.testing",
    "training": "jrnn.training",
}

__all__ = [
    "AffineCell",
    "AntisymmetricState",
    "BlockGRUState",
    "Cell",
    "ClockworkState",
    "CoRNNState",
    "ConvGRUState",
    "DeltaNetState",
    "EchoStateState",
    "ElmanState",
    "GRUState",
    "HiddenState",
    "IndRNNState",
    "JordanState",
    "LEMState",
    "LSTMState",
    "Layer",
    "MGUState",
    "MLSTMState",
    "NARXState",
    "OrthogonalState",
    "SLSTMState",
    "SSDState",
    "TDNNState",
    "Timing",
    "Tuning",
    "UGRNNState",
    "activation",
    "activations",
    "antisymmetric",
    "bidirectional",
    "block_gru",
    "choose_backend",
    "choose_scan_backend",
    "clockwork",
    "conv_gru",
    "conv_lstm",
    "cornn",
    "coupled_lstm",
    "dense",
    "diagnose",
    "draw",
    "dropconnect",
    "dropout",
    "echo_state",
    "elman",
    "embed",
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
    "losses",
    "lstm",
    "mgu",
    "mlstm",
    "narx",
    "native",
    "optimizer",
    "orthogonal_rnn",
    "peephole_lstm",
    "product",
    "projection_lstm",
    "residual",
    "ridge",
    "scan",
    "sequence",
    "skip",
    "slstm",
    "ssd",
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
