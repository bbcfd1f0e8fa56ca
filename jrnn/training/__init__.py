"""Training: from a loss function to trained parameters.

- `optimizer` and `schedule` make an Optax transformation and its learning rate by name.
- `make_step` makes a training step from a loss function and an optimiser: a pure, compiled function of a state and a
  batch. `tbptt_step` makes one for `chunks` of long sequences (truncated backpropagation through time).
- `fit` runs a step over batches, with validation, early stopping, checkpoints, a progress bar and a record of all
  numbers. `load_params` reads the parameters from its checkpoints.
- `batches`, `prefetch`, `evaluate` and `predict` make batches of a data set, and run over all of one;
  `ragged_batches` and `predict_ragged` do so for sequences of different lengths.

T time, B batch axes (any number, or none), F input features.
"""

from jrnn.training.checkpoint import Checkpoint, Checkpointer
from jrnn.training.data import Batches, batches, evaluate, predict, prefetch
from jrnn.training.fitting import FitResult, NonFiniteError, Report, fit, load_params
from jrnn.training.logs import CSVLogger, Logger
from jrnn.training.optimizers import optimizer, schedule
from jrnn.training.ragged import predict_ragged, ragged_batches
from jrnn.training.step import Metrics, Step, TrainState, make_step
from jrnn.training.tbptt import Chunk, chunks, tbptt_step, truncated_unroll

__all__ = [
    "Batches",
    "CSVLogger",
    "Checkpoint",
    "Checkpointer",
    "Chunk",
    "FitResult",
    "Logger",
    "Metrics",
    "NonFiniteError",
    "Report",
    "Step",
    "TrainState",
    "batches",
    "chunks",
    "evaluate",
    "fit",
    "load_params",
    "make_step",
    "optimizer",
    "predict",
    "predict_ragged",
    "prefetch",
    "ragged_batches",
    "schedule",
    "tbptt_step",
    "truncated_unroll",
]
