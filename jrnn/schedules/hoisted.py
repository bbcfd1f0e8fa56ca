"""A scan of the part of the step that needs the state. The projections of all T inputs are computed before it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.devices import one_step
from jrnn.cells.base import compute_params
from jrnn.jaxprs import sites
from jrnn.jaxprs.blocks import Refusal as Unread
from jrnn.schedules import affine, parts
from jrnn.schedules.plan import Plan, Refusal, Task
from jrnn.schedules.steps import scan


def pays(task: Task) -> Refusal | None:
    """The reason why the schedule is not chosen by default: for a step that declares nothing, it may be slower."""
    if task.affine is None and not getattr(task.cell, "hoistable", False):
        return Refusal("the cell defines only its step, and declares no part of it that does not need the state")
    return None


def plan(task: Task) -> Plan | Refusal:
    reason = "the cell declares its input projection, which is taken out of the loop over time"
    if task.affine is not None:
        return Plan(affine.run, reason, of_form=True)
    if getattr(task.cell, "hoistable", False):
        return Plan(run, reason)
    key = task.steps.key_at(jnp.asarray(0))
    try:
        step = lambda state, x: task.cell.step(task.params, state, x, key)
        program, _, consts = parts.trace(step, task.state, one_step(task.xs), task.params)
        sites.read(program, len(consts), len(jax.tree.leaves(task.state)))
    except Unread as unread:
        return Refusal(f"the cell defines only its step, and no part of it can be taken out of the loop: {unread}")
    return Plan(run_step, "what the state does not need, and the gradients of the weights, leave the loop")


def run(options: Any, task: Task) -> tuple[Any, Any]:
    cell, params = task.cell, compute_params(task.params, task.xs.dtype)
    return scan(params, task.xs, task.state, task.restart, task.steps, cell.project, cell.update, parts.scan)


def run_step(options: Any, task: Task) -> tuple[Any, Any]:
    own = lambda params, xs: xs
    return scan(task.params, task.xs, task.state, task.restart, task.steps, own, task.cell.step, parts.scan)
