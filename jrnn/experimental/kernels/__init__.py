"""Persistent kernels: the weights stay on the chip, and the loop over time is inside.

They serve any affine cell whose gates are elementwise, a user's included: the cell's own ``gates`` is traced into the
kernel, and its derivative into the backward one. On a GPU the weights lie in one block, or are shared by the blocks of
a cluster, or by as many as it takes. They run only where ``backend="kernel"`` asks for them: they were never timed, and
never run on a GPU or a TPU, only in Pallas' interpreters.

States are float32. ``jax.grad`` runs the backward kernel, its derivatives run scans, and ``jax.jvp`` is refused by JAX.
Products are taken in the inputs' dtype if that has 16 bits (what flows back is rounded to it too: scale the loss if
that is float16). If it is float32, a GPU takes three bfloat16 products, which keep about 16 bits of each factor, and a
TPU takes one; where ``jax_default_matmul_precision`` asks for more they are refused.

Where as many blocks as it takes share the weights, they wait for each other at every step and need the GPU to
themselves: two such runs at the same time, on streams or in processes of their own, may wait for each other for ever.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn._core.devices import default_device, is_placed
from jrnn.experimental.kernels import body, rule
from jrnn.experimental.kernels.options import Chip, Settings
from jrnn.jaxprs.primitives import primitive
from jrnn.schedules import Plan, Refusal, Task, promises


class Target(NamedTuple):
    """The device that kernels are for, by the name of its module, whether Pallas' interpreter runs them instead, and
    what the GPU has, if it is one."""

    device: str
    interpret: bool = False
    chip: Chip = Chip()


def plan(task: Task, target: Target | None = None) -> Plan | Refusal:
    target = target or present()
    if target is None:
        return Refusal(
            f"a kernel needs a Hopper GPU or a TPU, and this process computes on {describe(default_device())}"
        )
    try:
        device = rule.module(target.device)
    except (ImportError, AttributeError) as error:
        return Refusal(f"the Pallas of JAX {jax.__version__} lacks what the kernel needs: {error}")
    form, state = task.affine, task.state
    if form is None:
        return Refusal("a kernel takes the library's two products and the cell's gates, and this cell has its own step")
    if form.emits != ("h",):
        return Refusal(f"a kernel puts out the field h of the state, and the cell emits {form.emits!r}")
    if any(map(is_placed, jax.tree.leaves((form, task.xs)))):
        return Refusal("the axes of a mesh are Explicit, and a kernel does not support arrays that lie over one")
    if task.steps.key is not None or form.mask is not None:
        return Refusal("a kernel has no randomness: pass key=None")
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves((form.theta, state))} - {"float32"}
    if dtypes or str(form.w_hh.dtype) not in ("float32", "bfloat16", "float16"):
        names = sorted(dtypes | {str(form.w_hh.dtype)})
        return Refusal(f"a kernel takes float32, bfloat16 and float16, and this run is in {' and '.join(names)}")
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if form.w_hh.dtype == jnp.float32 and precision not in device.PRECISIONS:
        return Refusal(
            f"jax_default_matmul_precision asks for {precision}, and a kernel keeps {device.KEPT} of float32"
        )
    if not promises.elementwise(form.gates, form.theta, state):
        return Refusal("a kernel gives each thread units of its own, and the cell's gates are not elementwise")
    sums = promises.sums(form.gates, form.theta, state)
    settings = Settings(
        form.gates.combine, form.hidden, len(state), sums, target.device, target.interpret, task.steps.reverse,
        target.chip,
    )  # fmt: skip
    used = body.operations(settings, form.theta, state)
    if beyond := sorted(name for name in used if primitive(name).pallas is not True):
        return Refusal(f"the gates, or their derivatives, use what a kernel's language lacks: {', '.join(beyond)}")
    fits, reason = device.fits(settings, math.prod(task.batch), form.w_hh)
    return Plan(run, reason, settings, of_form=True, flat=True) if fits else Refusal(reason)


def run(settings: Settings, task: Task) -> Any:
    """An affine form over all steps, by kernels."""
    form, steps = task.form, task.steps
    operands = rule.Operands(
        jnp.concatenate(form.project(task.xs), -1), form.w_hh, form.theta, task.state, task.restart
    )
    return rule.recur(settings, operands, steps.valid, steps.resets)


def present() -> Target | None:
    """The device of this process that there are kernels for."""
    device = default_device()
    if device.platform == "tpu":
        return Target("tpu")
    if device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9."):
        return Target("hopper", chip=Chip(blocks=getattr(device, "core_count", Chip().blocks)))
    return None


def describe(device: Any) -> str:
    capability = getattr(device, "compute_capability", None)
    return f"{device.device_kind} (compute capability {capability})" if capability else str(device.device_kind)
