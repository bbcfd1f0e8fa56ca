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
from jrnn.cells.base import compute_params, emitted
from jrnn.experimental.kernels import body, rule
from jrnn.experimental.kernels.plan import Chip, Plan
from jrnn.jaxprs.primitives import primitive
from jrnn.schedules import promises
from jrnn.schedules.steps import Steps, checkpointed, restarts, zeroed


class Target(NamedTuple):
    """The device that kernels are for, by the name of its module, whether Pallas' interpreter runs them instead, and
    what the GPU has, if it is one."""

    device: str
    interpret: bool = False
    chip: Chip = Chip()


def serves(cell: Any, params: Any, xs: Any, steps: Steps, target: Target | None = None) -> tuple[bool, str]:
    target = target or present()
    if target is None:
        return False, f"a kernel needs a Hopper GPU or a TPU, and this process computes on {describe(default_device())}"
    try:
        device = rule.module(target.device)
    except (ImportError, AttributeError) as error:
        return False, f"the Pallas of JAX {jax.__version__} lacks what the kernel needs: {error}"
    if not getattr(cell, "is_affine", False):
        return False, "a kernel takes the library's two products and the cell's gates, and this cell has its own step"
    if cell.emits != "h":
        return False, f"a kernel puts out the field h of the state, and the cell emits {cell.emits!r}"
    if any(map(is_placed, jax.tree.leaves((params, xs)))):
        return False, "the axes of a mesh are Explicit, and a kernel knows nothing of arrays that lie over one"
    if steps.key is not None or cell.recurrent_mask(params) is not None:
        return False, "a kernel has no randomness: pass key=None"

    def parts(params: Any) -> Any:
        params = compute_params(params, xs.dtype)
        return cell.theta(params), cell.recurrent_weights(params), cell.initial_state(params, xs.shape[1:-1])

    theta, w_hh, state = jax.eval_shape(parts, params)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves((theta, state))} - {"float32"}
    if dtypes or str(w_hh.dtype) not in ("float32", "bfloat16", "float16"):
        names = sorted(dtypes | {str(w_hh.dtype)})
        return False, f"a kernel takes float32, bfloat16 and float16, and this run is in {' and '.join(names)}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if w_hh.dtype == jnp.float32 and precision not in device.PRECISIONS:
        return False, f"jax_default_matmul_precision asks for {precision}, and a kernel keeps {device.KEPT} of float32"
    if not promises.elementwise(cell, theta, state):
        return False, "a kernel gives each thread units of its own, and the cell's gates are not elementwise"
    plan = make_plan(cell, theta, state, steps, target)
    if beyond := sorted(n for n in body.operations(plan, theta, state) if primitive(n).pallas is not True):
        return False, f"the gates, or their derivatives, use what a kernel's language lacks: {', '.join(beyond)}"
    return device.fits(plan, math.prod(xs.shape[1:-1]), w_hh)


def run(cell: Any, params: Any, xs: jax.Array, state: Any, steps: Steps, target: Target | None = None) -> Any:
    """An affine cell over all steps, by kernels."""
    target = target or present()
    if target is None:
        raise ValueError(f"backend: expected a Hopper GPU or a TPU for 'kernel', got {describe(default_device())}")
    restart = restarts(cell, params, xs, state, steps)
    params = compute_params(params, xs.dtype)
    batch = xs.shape[1:-1]
    theta, w_hh = cell.theta(params), cell.recurrent_weights(params)
    plan = make_plan(cell, theta, state, steps, target)

    def rows(tree: Any, lead: int) -> Any:
        """With one axis for all sequences."""
        return jax.tree.map(lambda a: a.reshape(*a.shape[:lead], math.prod(batch), *a.shape[lead + len(batch) :]), tree)

    def segment(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        xs, valid, resets = inputs
        u = jnp.concatenate(cell.project(params, xs), -1)
        if not u.size:
            return state, jnp.zeros((*xs.shape[:-1], cell.hidden), state.h.dtype)
        operands = rule.Operands(rows(u, 1), w_hh, theta, rows(state, 0), rows(restart, 0))
        last, hs = rule.recur(plan, operands, rows(valid, 1), rows(resets, 1))
        last = jax.tree.map(lambda new, old: new.reshape(old.shape), last, state)
        hs = hs.reshape(*xs.shape[:-1], cell.hidden)
        return last, hs if valid is None else zeroed(valid, hs)

    last, ys = checkpointed(segment, state, (xs, steps.valid, steps.resets), xs.shape[0], steps)
    return last, emitted(ys, xs)


def make_plan(cell: Any, theta: Any, state: Any, steps: Steps, target: Target) -> Plan:
    sums = promises.sums(cell, theta, state)
    return Plan(cell, sums, target.device, target.interpret, steps.reverse, target.chip)


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
