"""Where the numbers of a run go."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["CSVLogger", "Logger"]


class Logger(Protocol):
    """Anything that takes scalars: `fit` calls ``log`` after each record and after each validation.

    A logger for TensorBoard, with any of its writers, such as ``torch.utils.tensorboard.SummaryWriter("runs")``. Here
    the writer prints:

    >>> class TensorBoard:
    ...     def __init__(self, writer):
    ...         self.writer = writer
    ...     def log(self, step, scalars):
    ...         for name, value in scalars.items():
    ...             self.writer.add_scalar(name, value, step)
    >>> class Writer:
    ...     def add_scalar(self, name, value, step):
    ...         print(step, name, value)
    >>> TensorBoard(Writer()).log(10, {"train/loss": 0.5})
    10 train/loss 0.5
    """

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars of a step; names begin with "train/" or "validation/"."""


class CSVLogger:
    """A `Logger` that appends to a CSV file: a row ``step,name,value`` for each number.

    A file that is there is continued, so that a resumed run goes on in the same file. A run that was killed resumes
    from its last checkpoint: the rows of the steps after it are in the file twice, with the same numbers. A run that
    ^C ended between two records has one more row for each number of its last step.

    Args:
      path: the file.

    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "run.csv")
    >>> CSVLogger(path).log(10, {"train/loss": 0.5})
    >>> with open(path) as file:
    ...     file.read().split()
    ['step,name,value', '10,train/loss,0.5']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not os.path.exists(self.path) or os.path.getsize(self.path) == 0:
            self._append([["step", "name", "value"]])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a row for each scalar."""
        self._append([[step, name, repr(float(value))] for name, value in scalars.items()])

    def _append(self, rows: list[list[Any]]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
