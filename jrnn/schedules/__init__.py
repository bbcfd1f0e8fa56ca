"""How many steps are run: one table of schedules, one signature, one place that chooses.

A schedule serves a cell or says why it cannot, and runs it::

    serves(cell, params, xs, steps) -> (bool, reason)
    run(cell, params, xs, state, steps) -> (state, ys)

`SCHEDULES` lists them in the order in which they are asked, the last resort last; a new one is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jrnn.schedules import chunkwise, cudnn, hoisted, kernels, measured, native, reference
from jrnn.schedules.steps import Steps

__all__ = ["SCHEDULES", "Schedule", "Steps", "choose"]


class Schedule(NamedTuple):
    """A row of the table; one that is not ``automatic`` runs only where it is asked for by name.

    ``pays(cell, params, xs, steps) -> (bool, reason)`` says of an automatic one where it is chosen, if not wherever it
    serves.
    """

    serves: Callable[[Any, Any, Any, Steps], tuple[bool, str]]
    run: Callable[[Any, Any, Any, Any, Steps], tuple[Any, Any]]
    automatic: bool = True
    pays: Callable[[Any, Any, Any, Steps], tuple[bool, str]] | None = None


SCHEDULES: dict[str, Schedule] = {
    "kernel": Schedule(kernels.serves, kernels.run, automatic=False),
    "native": Schedule(native.serves, native.run, pays=native.pays),
    "chunkwise": Schedule(chunkwise.serves, chunkwise.run, pays=chunkwise.pays),
    "hoisted": Schedule(hoisted.serves, hoisted.run),
    "cudnn": Schedule(cudnn.serves, cudnn.run, automatic=False),
    "reference": Schedule(reference.serves, reference.run),
}


def choose(cell: Any, params: Any, xs: Any, steps: Steps, backend: str | None = None) -> tuple[str, str]:
    """The schedule that runs a cell, and why. A named one that cannot serve is an error, never a fallback."""
    if backend is not None:
        served, reason = SCHEDULES[backend].serves(cell, params, xs, steps)
        if not served:
            raise ValueError(
                f"backend: {backend!r} cannot run {cell!r}: {reason}; pass backend=None to let jrnn choose"
            )
        return backend, reason
    passed_over: list[str] = []
    for row in measured.fitting(cell, xs):
        served, reason = SCHEDULES[row.schedule].serves(cell, params, xs, steps)
        if served:
            return row.schedule, f"{reason}; measured fastest for such shapes on {row.device} ({row.run})"
        passed_over.append(f"not {row.schedule}, though measured fastest: {reason}")
    for name, schedule in SCHEDULES.items():
        pays, reason = (True, "") if schedule.pays is None else schedule.pays(cell, params, xs, steps)
        if not pays:
            passed_over += [f"not {name}: {reason}"] if reason else []
            continue
        served, reason = schedule.serves(cell, params, xs, steps)
        if schedule.automatic:
            if served:
                return name, "; ".join([reason, *passed_over])
            passed_over.append(f"not {name}: {reason}")
        elif served:
            passed_over.append(f"{name} would serve, but runs only where asked for by name: {reason}")
    raise ValueError(f"cell: no schedule can run {cell!r}: {'; '.join(passed_over)}")
