"""Reads the step of a cell that declares no form, so that `jrnn.unroll` can run it on a faster schedule."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from jrnn._core.devices import one_step
from jrnn.jaxprs import affine, apart, blocks, linear
from jrnn.jaxprs.flat import Program
from jrnn.run.apart import Apart, Loop
from jrnn.run.body import Body
from jrnn.run.recurrence import Recurrences
from jrnn.schedules import Plan, Refusal, Steps, Task
from jrnn.schedules.associative import windows
from jrnn.schedules.parts import trace

__all__ = ["Read", "ReadStep", "Schedule", "cells", "plan_linear", "read", "read_step", "schedule"]

Read = Body | Recurrences | Apart


@functools.partial(jax.tree_util.register_dataclass, data_fields=("consts",), meta_fields=("body", "ys"))
@dataclass(frozen=True, eq=False)
class ReadStep:
    """The form of a step that was read: its body, the tree of its outputs, and its constants."""

    body: Read
    ys: Any
    consts: Any

    def plan(self, task: Task, backend: str | None) -> tuple[str, Plan] | Refusal:
        """The schedule that runs the step, and its plan."""
        linear = isinstance(cells(self.body)[0], Recurrences)
        read = "its step was read: " if linear else "its step was read as that of an affine cell; "
        found = schedule(self.body, task.xs, task.steps, backend)
        if isinstance(found, Refusal):
            return Refusal(f"{read}{found.reason}")
        return found.name, Plan(_run, f"{read}{found.reason}", found.plan, of_form=True, recomputes=True)


class Schedule(NamedTuple):
    """The schedule that runs a step that was read: its name, the reason, and the plan.

    The plan of an affine cell, or of a linear step in the native loop, is a `Plan`. That of a step in two parts is a
    pair of plans. It is None for a step that runs as `linear_scan`, and for a part that runs as a scan.
    """

    name: str
    reason: str
    plan: Any


def cells(body: Read | Loop) -> list[Body | Recurrences]:
    """The cells in a step that was read."""
    if isinstance(body, Apart):
        return [*cells(body.first), *cells(body.rest)]
    return [] if isinstance(body, Loop) else [body]


def schedule(body: Read, xs: Any, steps: Steps, backend: str | None) -> Schedule | Refusal:
    """The schedule that runs a step that was read. A named backend is the only one considered."""
    if isinstance(body, Apart):
        return _of_parts(body, xs, steps, backend)
    if isinstance(body, Recurrences):
        note = ""
        if backend in (None, "native"):
            plan = body.plan(xs, steps, backend)
            if isinstance(plan, Plan):
                return Schedule("native", f"it is linear in its state; {plan.reason}", plan)
            note = f"; {plan.reason}" if backend else ""
        reason = body.serves(xs, backend)
        if isinstance(reason, Refusal):
            return Refusal(reason.reason + note)
        return Schedule("associative", reason, None)
    if backend == "associative":
        return Refusal("it is not linear in its state")
    found = body.plan(body.shapes(xs, steps), backend)
    return found if isinstance(found, Refusal) else Schedule(found[0], found[1].reason, found[1])


def _of_parts(body: Apart, xs: Any, steps: Steps, backend: str | None) -> Schedule | Refusal:
    """The schedule of a step in two parts, which has the name of that of its first cell."""
    plans: list[Any] = []
    names: list[str] = []
    reasons = [body.form.description]
    for part, given in ((body.first, xs), (body.rest, body.inputs(xs))):
        found = None if isinstance(part, Loop) else schedule(part, given, steps, backend)
        if isinstance(found, Refusal):
            return Refusal("; ".join([*reasons, found.reason]))
        plans.append(found and found.plan)
        if found is not None:
            names.append(found.name)
            reasons.append(found.reason)
    return Schedule(names[0], "; ".join(reasons), tuple(plans))


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
    forms = [cell.form for cell in cells(step.body)]
    flagged = any(form.resets or (isinstance(form, affine.Affine) and (form.mask or form.ends)) for form in forms)
    if contract and (flagged or not all(is_new for form in forms for _, is_new in form.after.values())):
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


def read(program: Program, consts: int, carry: int) -> Read:
    """Reads a step ``(consts, carry, x) -> (carry, y)`` as that of an affine cell, or else as linear in its state.

    A step that is neither is read again without the part of it that needs no state of a cell, and then without the part
    that its first cell does not need.

    Raises:
      blocks.Refusal: it is none of these, with the reasons.
    """
    try:
        return _cell(program, consts, carry)
    except blocks.Refusal as refusal:
        reason = refusal
    try:
        form = apart.before(program, consts, carry)
    except blocks.Refusal:
        return _first_cell(program, consts, carry, reason)
    rest = form.rest, consts + len(form.fixed), len(form.others)
    try:
        try:
            return Apart(form, Loop(form.first), _cell(*rest))
        except blocks.Refusal as other:
            return Apart(form, Loop(form.first), _first_cell(*rest, other))
    except blocks.Refusal as other:
        raise blocks.Refusal(f"{other}, where {form.description}") from None


def _first_cell(program: Program, consts: int, carry: int, reason: blocks.Refusal) -> Apart:
    """Reads a step as a cell, and what the cell does not need: more cells of its kind, or else a scan.

    Raises:
      blocks.Refusal: ``reason``, if it is not such a step.
    """
    try:
        form = apart.behind(program, consts, carry)
        consts += len(form.fixed)
        first = _cell(form.first, consts, len(form.own))
    except blocks.Refusal:
        raise reason from None
    try:
        rest = read(form.rest, consts, len(form.others))
        alike = all(type(cell) is type(first) for cell in cells(rest))
    except blocks.Refusal:
        alike = False
    return Apart(form, first, rest if alike else Loop(form.rest))


def _cell(program: Program, consts: int, carry: int) -> Body | Recurrences:
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
    return body if body.product is not None and body.product[0] else None


def _run_linear(options: tuple[Any, Plan], task: Task) -> tuple[Any, Any]:
    (cell, plan), form, state, steps = options, task.form, task.state, task.steps
    xs, rest = windows(cell, state, task.restart, steps.reverse, task.xs, steps.valid, steps.resets)
    restart = None if task.restart is None else [task.restart[0]]
    (h,), ys = form.body.run(plan, form.consts, [state[0]], xs, steps, restart)
    return type(state)(h, *rest), jax.tree.unflatten(form.ys, ys)


def _run(plan: Any, task: Task) -> tuple[Any, Any]:
    tree: Any
    leaves, tree = jax.tree.flatten(task.state)
    restart = None if task.restart is None else jax.tree.leaves(task.restart)
    form = task.form
    last, ys = form.body.run(plan, form.consts, leaves, task.xs, task.steps, restart)
    return tree.unflatten(last), jax.tree.unflatten(form.ys, ys)
