"""Reads the step of a cell that declares no form, so that `jrnn.unroll` can run it on a faster schedule."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from jrnn._core.devices import one_step
from jrnn.jaxprs import affine, apart, blocks, linear
from jrnn.jaxprs.flat import Program
from jrnn.run.apart import Apart
from jrnn.run.body import Body
from jrnn.run.recurrence import Recurrences
from jrnn.schedules import Plan, Refusal, Steps, Task
from jrnn.schedules.associative import windows
from jrnn.schedules.parts import trace

__all__ = ["ReadStep", "Schedule", "cell_of", "plan_linear", "read", "read_step", "schedule"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("consts",), meta_fields=("body", "ys"))
@dataclass(frozen=True, eq=False)
class ReadStep:
    """The form of a step that was read: its body, the tree of its outputs, and its constants."""

    body: Body | Recurrences | Apart
    ys: Any
    consts: Any

    def plan(self, task: Task, backend: str | None) -> tuple[str, Plan] | Refusal:
        """The schedule that runs the step, and its plan."""
        linear = isinstance(cell_of(self.body), Recurrences)
        read = "its step was read: " if linear else "its step was read as that of an affine cell; "
        found = schedule(self.body, task.xs, task.steps, backend)
        if isinstance(found, Refusal):
            return Refusal(f"{read}{found.reason}")
        return found.name, Plan(_run, f"{read}{found.reason}", found.plan, of_form=True, recomputes=True)


class Schedule(NamedTuple):
    """The schedule that runs a step that was read: its name, the reason, and the plan of an affine cell, or None."""

    name: str
    reason: str
    plan: Plan | None


def cell_of(body: Body | Recurrences | Apart) -> Body | Recurrences:
    """The cell in a step that was read."""
    return body.cell if isinstance(body, Apart) else body


def schedule(body: Body | Recurrences | Apart, xs: Any, steps: Steps, backend: str | None) -> Schedule | Refusal:
    """The schedule that runs a step that was read. A named backend is the only one considered."""
    cell, before = cell_of(body), ""
    if isinstance(body, Apart):
        xs, before = body.inputs(xs), f"{body.form.description}; "
    if isinstance(cell, Recurrences):
        note = ""
        if backend in (None, "native"):
            plan = cell.plan(xs, steps, backend)
            if isinstance(plan, Plan):
                return Schedule("native", f"{before}it is linear in its state; {plan.reason}", plan)
            note = f"; {plan.reason}" if backend else ""
        reason = cell.serves(xs, backend)
        if isinstance(reason, Refusal):
            return Refusal(before + reason.reason + note)
        return Schedule("associative", before + reason, None)
    if backend == "associative":
        return Refusal(f"{before}it is not linear in its state")
    found = cell.plan(cell.shapes(xs, steps), backend)
    if isinstance(found, Refusal):
        return Refusal(before + found.reason)
    name, plan = found
    return Schedule(name, before + plan.reason, plan)


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
    return _checked(ReadStep(body, ys, consts), contract)


def _checked(step: ReadStep, contract: bool) -> ReadStep | Refusal:
    """The step, unless the run has masks or resets and the step does what these change."""
    form = cell_of(step.body).form
    flagged = form.resets or (isinstance(form, affine.Affine) and (form.mask or form.ends))
    if contract and (flagged or not all(is_new for _, is_new in form.after.values())):
        return Refusal(
            "its step replaces its state, or outputs the state before the step, which masks and resets change"
        )
    return step


def read_linear(task: Task) -> ReadStep | Refusal:
    """The step of a declared linear form, with gates in the place of its coefficients; or why it has none."""
    cell, params, steps = task.form.cell, task.form.params, task.steps

    def step(h: Any, x: Any) -> tuple[Any, Any]:
        a, b = cell.coefficients_of(params, x)
        h = a * h + b
        return h, cell.readout(params, h, x)

    *batch, features = task.xs.shape[1:]
    x = jax.ShapeDtypeStruct((*batch, cell.window * features), task.xs.dtype)
    try:
        program, ys, consts = trace(step, task.state[0], x, task.params)
    except blocks.Refusal as refusal:
        return Refusal(str(refusal))
    found = _alone(program, len(consts), 1)
    if found is None:
        return Refusal("its coefficients are no elementwise functions of products of its input")
    body = replace(found, linear=True)
    return _checked(ReadStep(body, ys, consts), steps.valid is not None or steps.resets is not None)


def plan_linear(task: Task, backend: str | None) -> tuple[ReadStep, Plan] | Refusal:
    """The step of a declared linear form, and the plan by which the native loop runs it."""
    step = read_linear(task)
    if isinstance(step, Refusal):
        return step
    cell = task.form.cell
    x = jax.ShapeDtypeStruct((*task.xs.shape[:-1], cell.window * task.xs.shape[-1]), task.xs.dtype)
    found = schedule(step.body, x, task.steps, backend)
    if isinstance(found, Refusal):
        return found
    reason = f"the cell is linear in its state; {found.reason}"
    return step, Plan(_run_linear, reason, (cell, found.plan), of_form=True, recomputes=True)


def read(program: Program, consts: int, carry: int) -> Body | Recurrences | Apart:
    """Reads a step ``(consts, carry, x) -> (carry, y)`` as that of an affine cell, or else as linear in its state.

    A step that is neither is read again without the part of it that needs no state of the cell.

    Raises:
      blocks.Refusal: it is none of these, with the reasons.
    """
    try:
        return _whole(program, consts, carry)
    except blocks.Refusal as refusal:
        try:
            form = apart.split(program, consts, carry)
        except blocks.Refusal:
            raise refusal from None
        try:
            return Apart(form, _whole(form.rest, consts, len(form.others)))
        except blocks.Refusal as other:
            raise blocks.Refusal(f"{other}, where {form.description}") from None


def _whole(program: Program, consts: int, carry: int) -> Body | Recurrences:
    try:
        return Body(affine.read(program, consts, carry))
    except blocks.Refusal as refusal:
        alone = _alone(program, consts, carry)
        try:
            read = linear.read(program, consts, carry)
            return Recurrences(read, None if alone is None else replace(alone, linear=True))
        except blocks.Refusal as other:
            if alone is not None:
                return alone
            raise blocks.Refusal(f"{refusal}; nor is it linear in its state: {other}") from None


def _alone(program: Program, consts: int, carry: int) -> Body | None:
    """The step as that of a cell without a recurrent product, whose gates take products of the input; or None."""
    try:
        body = Body(affine.read(program, consts, carry, coupled=False))
    except blocks.Refusal:
        return None
    return body if body.product is not None else None


def _run_linear(options: tuple[Any, Plan], task: Task) -> tuple[Any, Any]:
    (cell, plan), form, state, steps = options, task.form, task.state, task.steps
    xs, rest = windows(cell, state, task.restart, steps.reverse, task.xs, steps.valid, steps.resets)
    restart = None if task.restart is None else [task.restart[0]]
    (h,), ys = form.body.run(plan, form.consts, [state[0]], xs, steps, restart)
    return type(state)(h, *rest), jax.tree.unflatten(form.ys, ys)


def _run(plan: Plan | None, task: Task) -> tuple[Any, Any]:
    tree: Any
    leaves, tree = jax.tree.flatten(task.state)
    restart = None if task.restart is None else jax.tree.leaves(task.restart)
    form = task.form
    last, ys = form.body.run(plan, form.consts, leaves, task.xs, task.steps, restart)
    return tree.unflatten(last), jax.tree.unflatten(form.ys, ys)
