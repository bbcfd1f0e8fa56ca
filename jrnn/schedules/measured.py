"""Where a schedule was measured to be fastest: what `choose` takes before it goes through the table in its order.

A row says for which cells, on which device and in which range of shapes a schedule won, forward and backward, over all
others that serve, and names the run that showed it, a file of ``benchmarks/results/``. Where no row fits, nothing was
measured, and the order of the table decides. No run on a GPU has been made yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jrnn._core.devices import default_device

__all__ = ["MEASURED", "Measured", "fitting"]


class Measured(NamedTuple):
    """``device`` as ``jax.Device.device_kind`` has it; ``cells`` names of classes; ranges include both their ends.

    ``batch`` counts sequences, all batch axes together; ``dtype`` is that of the inputs.
    """

    schedule: str
    device: str
    cells: tuple[str, ...]
    dtype: str
    hidden: tuple[int, int]
    batch: tuple[int, int]
    time: tuple[int, int]
    run: str


MEASURED: tuple[Measured, ...] = ()


def fitting(cell: Any, xs: Any) -> Iterator[Measured]:
    """The rows that were measured on this device for such a cell and such inputs, the first the most wanted."""
    rows = [row for row in MEASURED if type(cell).__name__ in row.cells and row.dtype == str(xs.dtype)]
    if not rows:
        return
    sizes = {"hidden": cell.hidden, "batch": math.prod(xs.shape[1:-1]), "time": xs.shape[0]}
    for row in rows:
        within = all(getattr(row, name)[0] <= size <= getattr(row, name)[1] for name, size in sizes.items())
        if within and row.device == default_device().device_kind:
            yield row
