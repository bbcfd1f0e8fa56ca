"""How many steps are run: one table of schedules, one signature, one place that chooses.

A schedule plans a task or says why it cannot, and a plan runs it (see `jrnn.schedules.plan`)::

    plan(task) -> Plan | Refusal
    plan(task)(task) -> (state, ys)

`SCHEDULES` lists them in the order in which they are asked, the last resort last; a new one is a new row. Importing
`jrnn.experimental` adds rows at its end that run only where they are asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from jrnn.schedules import associative, hoisted, native, newton, reference
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import Steps

__all__ = ["SCHEDULES", "Plan", "Refusal", "Schedule", "Steps", "Task", "check_backend", "choose"]


class Schedule(NamedTuple):
    """A row of the table; one that is not ``automatic`` runs only where it is asked for by name.

    ``pays(task)`` says of an automatic one why it is not chosen for a task that it may serve, or None.
    """

    plan: Callable[[Task], Plan | Refusal]
    automatic: bool = True
    pays: Callable[[Task], Refusal | None] | None = None


SCHEDULES: dict[str, Schedule] = {
    "native": Schedule(native.plan, pays=native.pays),
    "associative": Schedule(associative.plan),
    "hoisted": Schedule(hoisted.plan),
    "newton": Schedule(newton.plan, automatic=False),
    "reference": Schedule(reference.plan),
}

EXPERIMENTAL = ("cudnn", "kernel")  # the rows that importing `jrnn.experimental` adds


def check_backend(backend: Any, argument: str = "backend") -> None:
    """Raises ``ValueError`` where a name is not that of a schedule, or of one whose module was not imported."""
    if backend in SCHEDULES:
        return
    if backend in EXPERIMENTAL:
        raise ValueError(
            f"{argument}: {backend!r} is experimental, since it was never run on its device; "
            "import jrnn.experimental to add it"
        )
    raise ValueError(f"{argument}: expected None or one of {sorted(SCHEDULES)}, got {backend!r}")


def choose(task: Task, backend: str | None = None) -> tuple[str, Plan]:
    """The schedule that runs a task, and its plan. A named one that cannot serve is an error, never a fallback."""
    cell = task.cell
    if backend is not None:
        found = SCHEDULES[backend].plan(task)
        if isinstance(found, Refusal):
            raise ValueError(
                f"backend: {backend!r} cannot run {cell!r}: {found.reason}; pass backend=None to let jrnn choose"
            )
        return backend, found
    passed_over: list[str] = []
    for name, schedule in SCHEDULES.items():
        found = (schedule.pays and schedule.pays(task)) or schedule.plan(task)
        if isinstance(found, Refusal):
            if schedule.automatic:
                passed_over.append(f"not {name}: {found.reason}")
        elif schedule.automatic:
            return name, replace(found, reason="; ".join([found.reason, *passed_over]))
        else:
            passed_over.append(f"{name} would serve, but runs only where asked for by name: {found.reason}")
    raise ValueError(f"cell: no schedule can run {cell!r}: {'; '.join(passed_over)}")
