"""Schedules that were never run on the device that they are for.

Importing this module adds them to the table of schedules::

    import jrnn.experimental

    state, ys = jrnn.unroll(cell, params, xs, backend="kernel")

- ``backend="kernel"``: the whole loop as one persistent Pallas kernel, for Hopper GPUs and TPUs (`kernels`). Kernels
  that take a whole GPU must not run at the same time: they may wait for each other for ever.
- ``backend="cudnn"``: NVIDIA's LSTM, through `jax.experimental.rnn` (`cudnn`).

Both were tested only in interpreters and against a stand-in for the device. They run only where they are named.
"""

from __future__ import annotations

from jrnn.experimental import cudnn, kernels
from jrnn.schedules import SCHEDULES, Schedule

__all__ = ["cudnn", "kernels"]

SCHEDULES["kernel"] = Schedule(kernels.plan, automatic=False)
SCHEDULES["cudnn"] = Schedule(cudnn.plan, automatic=False)
