"""Tasks, the plans that schedules make for them, refusals, and the work that all plans have in common."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn.cells.base import compute_params, emitted
from jrnn.cells.form import AffineForm
from jrnn.schedules.steps import Steps, checkpointed, zeroed

__all__ = ["Plan", "Refusal", "Task"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "form", "xs", "state", "restart", "steps"),
    meta_fields=("cell",),
)
@dataclass(frozen=True, eq=False)
class Task:
    """One loop over time: the argument of a schedule's ``plan``, and of the plan when it runs.

    ``cell`` and ``params`` define the cell's own step. ``form`` is the form of that step, with its weights cast to the
    dtype of matmuls, or None. A step that was read from its trace has only a form. ``restart`` is the state that a
    reset restores, or None if there are no resets. ``xs (T, *B, ...)`` are zero at invalid steps.

    Planning uses only shapes and dtypes.
    """

    cell: Any
    params: Any
    form: Any
    xs: Any
    state: Any
    restart: Any
    steps: Steps

    @classmethod
    def of(cls, cell: Any, params: Any, xs: Any, state: Any, steps: Steps) -> Task:
        """The loop over a cell, with ``restart`` left None."""
        return cls(cell, params, cell.form(compute_params(params, xs.dtype)), xs, state, None, steps)

    @property
    def affine(self) -> AffineForm | None:
        """The form if it is affine, else None."""
        return self.form if isinstance(self.form, AffineForm) else None

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch shape ``*B``; the form is affine."""
        return self.xs.shape[1:-1]


class Refusal(NamedTuple):
    """The reason why a schedule cannot run a task, or is not chosen for it."""

    reason: str


@dataclass(frozen=True)
class Plan:
    """How a task is run: ``run(options, task)`` returns the state after the last step, and ``ys``.

    The values of these ``ys`` at invalid steps are unspecified.

    ``run`` is a module-level function and ``options`` are static, so equal plans compile once. A plan with ``of_form``
    runs the form of the task; any other runs the cell's own step. A ``flat`` plan runs an affine form with one batch
    axis, at least one step and at least one sequence. A plan that ``recomputes`` implements ``steps.remat`` itself.
    """

    run: Callable[[Any, Task], tuple[Any, Any]]
    reason: str = field(compare=False)
    options: Any = None
    of_form: bool = False
    flat: bool = False
    recomputes: bool = False

    def __call__(self, task: Task) -> tuple[Any, Any]:
        """The state after the last step, and ``ys``, which are zero at invalid steps."""
        return _run(self, replace(task, cell=None, params=None) if self.of_form else replace(task, form=None))


# Jitted by itself, so that equal layers with inputs of equal shapes are traced, differentiated and lowered only once.
# XLA inlines the function, so the compiled program is the same as without it.
@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, task: Task) -> tuple[Any, Any]:
    if not plan.flat:
        last, ys = _checkpointed(plan, task)
    elif 0 in task.xs.shape[:-1]:
        outs = task.form.output(task.state)
        last, ys = task.state, jnp.zeros((*task.xs.shape[:-1], outs.shape[-1]), outs.dtype)
    else:
        last, ys = _checkpointed(plan, _flat(task))
        last = jax.tree.map(lambda a: a.reshape(*task.batch, *a.shape[1:]), last)
        ys = ys.reshape(*task.xs.shape[:-1], ys.shape[-1])
    valid = task.steps.valid
    return last, emitted(ys if valid is None else zeroed(valid, ys), task.xs)


def _checkpointed(plan: Plan, task: Task) -> tuple[Any, Any]:
    if plan.recomputes:
        return plan.run(plan.options, task)
    run = lambda xs, state, steps: plan.run(plan.options, replace(task, xs=xs, state=state, steps=steps))
    return checkpointed(run, task.xs, task.state, task.steps)


def _flat(task: Task) -> Task:
    """The task with its batch axes merged into one."""
    count, batch = math.prod(task.batch), len(task.batch)

    def rows(tree: Any, lead: int = 0) -> Any:
        return jax.tree.map(lambda a: a.reshape(*a.shape[:lead], count, *a.shape[lead + batch :]), tree)

    form, steps = task.form, task.steps
    return replace(
        task,
        form=replace(form, input_mask=rows(form.input_mask), mask=rows(form.mask)),
        xs=rows(task.xs, 1),
        state=rows(task.state),
        restart=rows(task.restart),
        steps=replace(steps, valid=rows(steps.valid, 1), resets=rows(steps.resets, 1)),
    )
