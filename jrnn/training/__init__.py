"""Training: optimisers, a pure step, a loop, truncated backpropagation, checkpoints."""

from jrnn.training.optimizers import optimizer, schedule
from jrnn.training.step import Metrics, Step, TrainState, make_step

__all__ = ["Metrics", "Step", "TrainState", "make_step", "optimizer", "schedule"]
