"""Training: optimisers, a pure step, a loop, truncated backpropagation, checkpoints."""

from jrnn.training.checkpoint import Checkpoint, Checkpointer
from jrnn.training.fitting import FitResult, NonFiniteError, fit, load_params
from jrnn.training.optimizers import optimizer, schedule
from jrnn.training.step import Metrics, Step, TrainState, make_step
from jrnn.training.tbptt import Chunk, chunks, tbptt_step, truncated_unroll

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "Chunk",
    "FitResult",
    "Metrics",
    "NonFiniteError",
    "Step",
    "TrainState",
    "chunks",
    "fit",
    "load_params",
    "make_step",
    "optimizer",
    "schedule",
    "tbptt_step",
    "truncated_unroll",
]
