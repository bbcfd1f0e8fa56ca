"""Persistent kernels: one kernel contains the whole loop over time, and the weights stay on the chip.

They serve any affine cell whose gates are elementwise, including a user's: the ``gates`` of the cell are traced into
the forward kernel, and their derivative into the backward kernel. On a GPU, the weights are held by one thread block,
by the blocks of a cluster, or by as many blocks as are needed. The kernels run only for ``backend="kernel"``. They were
never timed, and never run on a GPU or a TPU, only in Pallas' interpreters.

States are float32. ``jax.grad`` runs the backward kernel, derivatives of gradients run scans, and JAX refuses
``jax.jvp``. With 16-bit inputs, matmuls are computed in their dtype, and cotangents are rounded to it too (scale the
loss if it is float16). With float32 inputs, a GPU computes three bfloat16 matmuls, which keep about 16 bits of each
factor, and a TPU computes one. If ``jax_default_matmul_precision`` asks for more, the kernels are refused.

If more blocks than a cluster has share the weights, they wait for each other at every step and need the whole GPU: two
such runs at the same time, on different streams or in different processes, may wait for each other for ever.
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
    """The device of the kernels.

    ``device`` is the name of the module of its kernels. ``interpret`` says whether Pallas' interpreter runs them
    instead. ``chip`` describes the GPU, if it is one.
    """

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
    """Runs an affine form over all steps by kernels."""
    form, steps = task.form, task.steps
    operands = rule.Operands(
        jnp.concatenate(form.project(task.xs), -1), form.w_hh, form.theta, task.state, task.restart
    )
    return rule.recur(settings, operands, steps.valid, steps.resets)


def present() -> Target | None:
    """The default device, if there are kernels for it; else None."""
    device = default_device()
    if device.platform == "tpu":
        return Target("tpu")
    if device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9."):
        return Target("hopper", chip=Chip(blocks=getattr(device, "core_count", Chip().blocks)))
    return None


def describe(device: Any) -> str:
    capability = getattr(device, "compute_capability", None)
    return f"{device.device_kind} (compute capability {capability})" if capability else str(device.device_kind)
