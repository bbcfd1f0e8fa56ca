"""A scan of the part of the step that needs the state. The projections of all T inputs are computed before it."""

from __future__ import annotations

from typing import Any

from jrnn.cells.base import compute_params
from jrnn.schedules import affine, parts
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import scan


def plan(task: Task) -> Plan | Refusal:
    reason = "the cell declares its input projection, which is taken out of the loop over time"
    if task.affine is not None:
        return Plan(affine.run, reason, of_form=True)
    if getattr(task.cell, "hoistable", False):
        return Plan(run, reason)
    return Refusal("the cell defines only its step, and declares no part of it that does not need the state")


def run(options: Any, task: Task) -> tuple[Any, Any]:
    cell, params = task.cell, compute_params(task.params, task.xs.dtype)
    return scan(params, task.xs, task.state, task.restart, task.steps, cell.project, cell.update, parts.scan)
