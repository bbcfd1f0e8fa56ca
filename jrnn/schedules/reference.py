"""The plain scan of the cell's own step. It serves every cell, and the other schedules are tested against it."""

from __future__ import annotations

from typing import Any

from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import scan


def plan(task: Task) -> Plan | Refusal:
    return Plan(run, "a plain scan of the cell's step serves every cell")


def run(options: Any, task: Task) -> tuple[Any, Any]:
    return scan(task.params, task.xs, task.state, task.restart, task.steps, lambda params, xs: xs, task.cell.step)
