"""Training: optimisers, a pure step, a loop, truncated backpropagation, checkpoints."""

from jrnn.training.checkpoint import Checkpoint, Checkpointer
from jrnn.training.data import batches, evaluate, predict, prefetch
from jrnn.training.fitting import FitResult, NonFiniteError, Report, fit, load_params
from jrnn.training.logs import CSVLogger, Logger
from jrnn.training.optimizers import optimizer, schedule
from jrnn.training.step import Metrics, Step, TrainState, make_step
from jrnn.training.tbptt import Chunk, chunks, tbptt_step, truncated_unroll

__all__ = [
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
    "prefetch",
    "schedule",
    "tbptt_step",
    "truncated_unroll",
]
