"""The schedules, which run a cell over many steps: one table, one signature, and one function that chooses.

A schedule plans a task or says why it cannot, and a plan runs it (see `jrnn.schedules.plan`)::

    plan(task) -> Plan | Refusal
    plan(task)(task) -> (state, ys)

`choose` asks the schedules in the order of `SCHEDULES`. The plain scan, which serves every cell, comes last. A new
schedule is a new row. Importing `jrnn.experimental` appends rows that run only if they are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from jrnn.schedules import associative, chunkwise, hoisted, native, newton, reference
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import Steps

__all__ = ["SCHEDULES", "Plan", "Refusal", "Schedule", "Steps", "Task", "check_backend", "choose"]


class Schedule(NamedTuple):
    """A row of the table. A schedule that is not ``automatic`` runs only if it is named.

    ``pays(task)`` returns the reason why the schedule is not chosen for a task that it may be able to run, or None.
    """

    plan: Callable[[Task], Plan | Refusal]
    automatic: bool = True
    pays: Callable[[Task], Refusal | None] | None = None


SCHEDULES: dict[str, Schedule] = {
    "native": Schedule(native.plan, pays=native.pays),
    "associative": Schedule(associative.plan),
    "chunkwise": Schedule(chunkwise.plan, pays=chunkwise.pays),
    "hoisted": Schedule(hoisted.plan, pays=hoisted.pays),
    "newton": Schedule(newton.plan, automatic=False),
    "reference": Schedule(reference.plan),
}

EXPERIMENTAL = ("cudnn", "kernel")  # the rows that importing `jrnn.experimental` adds


def check_backend(backend: Any, argument: str = "backend") -> None:
    """Raises ``ValueError`` if a name is not that of a schedule, or if the schedule's module has not been imported."""
    if backend in SCHEDULES:
        return
    if backend in EXPERIMENTAL:
        raise ValueError(
            f"{argument}: {backend!r} is experimental, since it was never run on its device; "
            "import jrnn.experimental to add it"
        )
    raise ValueError(f"{argument}: expected None or one of {sorted(SCHEDULES)}, got {backend!r}")


def choose(task: Task, backend: str | None = None) -> tuple[str, Plan]:
    """The schedule that runs a task, and its plan. Raises if a named schedule cannot run the task; never falls back."""
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
                passed_over += [f"not {name}: {found.reason}"] if found.reason else []
        elif schedule.automatic:
            return name, replace(found, reason="; ".join([found.reason, *passed_over]))
        else:
            passed_over.append(f"{name} would serve, but runs only where asked for by name: {found.reason}")
    raise ValueError(f"cell: no schedule can run {cell!r}: {'; '.join(passed_over)}")
