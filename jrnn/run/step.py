"""Reads the step of a cell that declares no form, so that `jrnn.unroll` can run it on a faster schedule."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from jrnn._core.devices import one_step
from jrnn.jaxprs import affine, blocks, linear
from jrnn.jaxprs.flat import Program
from jrnn.run.body import Body
from jrnn.run.recurrence import Recurrences
from jrnn.schedules import Plan, Refusal, Task
from jrnn.schedules.parts import trace

__all__ = ["ReadStep", "read", "read_step"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("consts",), meta_fields=("body", "ys"))
@dataclass(frozen=True, eq=False)
class ReadStep:
    """The form of a step that was read: its body, the tree of its outputs, and its constants."""

    body: Body | Recurrences
    ys: Any
    consts: Any

    def plan(self, task: Task, backend: str | None) -> tuple[str, Plan] | Refusal:
        """The schedule that runs the step, and its plan."""
        if isinstance(self.body, Recurrences):
            reason = self.body.serves(task.xs, backend)
            if isinstance(reason, Refusal):
                return Refusal(f"its step was read: {reason.reason}")
            return "associative", Plan(_run, f"its step was read: {reason}", of_form=True, recomputes=True)
        read = "its step was read as that of an affine cell"
        if backend == "associative":
            return Refusal(f"{read}, which is not linear in its state")
        found = self.body.plan(self.body.shapes(task.xs, task.steps), backend)
        if isinstance(found, Refusal):
            return Refusal(f"{read}; {found.reason}")
        name, plan = found
        return name, Plan(_run, f"{read}; {plan.reason}", plan, of_form=True, recomputes=True)


def read_step(task: Task) -> ReadStep | Refusal:
    """The form of the step of a cell that declares none, or the reason why it cannot be read."""
    steps, state = task.steps, task.state
    if steps.key is not None:
        return Refusal("it may draw random numbers at its steps")
    contract = steps.valid is not None or steps.resets is not None
    try:
        step = lambda state, x: task.cell.step(task.params, state, x)
        program, ys, consts = trace(step, state, one_step(task.xs), task.params)
        body = read(program, len(consts), len(jax.tree.leaves(state)))
    except blocks.Refusal as refusal:
        return Refusal(str(refusal))
    form = body.form
    flagged = form.resets or (isinstance(form, affine.Affine) and form.mask)
    if contract and (flagged or not all(is_new for _, is_new in form.after.values())):
        return Refusal("its step replaces its state, or puts out what it was, which masks and resets change")
    return ReadStep(body, ys, consts)


def read(program: Program, consts: int, carry: int) -> Body | Recurrences:
    """Reads a step ``(consts, carry, x) -> (carry, y)`` as that of an affine cell, or else as linear in its state.

    Raises:
      blocks.Refusal: it is neither, with the reasons.
    """
    try:
        return Body(affine.read(program, consts, carry))
    except blocks.Refusal as refusal:
        try:
            return Recurrences(linear.read(program, consts, carry))
        except blocks.Refusal as other:
            raise blocks.Refusal(f"{refusal}; nor is it linear in its state: {other}") from None


def _run(plan: Plan | None, task: Task) -> tuple[Any, Any]:
    tree: Any
    leaves, tree = jax.tree.flatten(task.state)
    restart = None if task.restart is None else jax.tree.leaves(task.restart)
    form, options = task.form, () if plan is None else (plan,)
    last, ys = form.body.run(*options, form.consts, leaves, task.xs, task.steps, restart)
    return tree.unflatten(last), jax.tree.unflatten(form.ys, ys)
