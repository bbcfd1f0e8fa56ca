"""The loop of an affine cell as a compiled function for the CPU: every product, the gates and all gradients in one.

XLA runs about ten operations for each step of a loop, on arrays that go through memory. Here one C++ function runs the
whole loop (`kernel.cc`) and calls the gates of the cell, which are compiled for it (`emit.py`, `cell.cc`). XLA calls
the function as one operation (`calls.py`). Without a recurrent product no unit depends on another, and threads do not
wait for each other at each step. The machine's C++ compiler compiles the loop once, and the gates once for each cell
(`build.py`, `cache.py`). On a CPU this schedule is the default wherever it serves and pays.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.devices import default_device
from jrnn.cells.base import is_low, side_by_side
from jrnn.cells.form import AffineForm, LinearForm
from jrnn.schedules import promises
from jrnn.schedules.native import build, emit, operation
from jrnn.schedules.native.calls import Flags, Inputs, Options, loop
from jrnn.schedules.native.chunks import Chunks
from jrnn.schedules.plan import Plan, Refusal, Task

__all__ = ["pays", "plan"]

# The least sizes for which the schedule is chosen by default: WORK floating-point operations, to be worth a
# compilation, and ROWS steps over all sequences, to be worth packing the weights, which every call does anew. A call of
# few steps and few sequences reads the weights in place (`forward.h`): there STEP operations are enough.
WORK, ROWS, STEP = 2**20, 32, 2**18
FEW_STEPS, FEW_SEQUENCES, WHOLE_BLOCKS = 4, 3, 32
# The schedule computes in float32. From so many units on, the forward pass is much faster on a processor that has
# instructions for products in bfloat16. With 256 units it is level, and gradients are slower (see docs/benchmarks.md).
BFLOAT16_HIDDEN = 512


def pays(task: Task) -> Refusal | None:
    """The reason why the schedule is not chosen by default; None if it is chosen, provided that it serves."""
    if isinstance(task.form, LinearForm):  # its coefficients were read as gates, and refused, before
        return Refusal("")
    if task.affine is None:
        return Refusal("the cell is not affine")
    if jax.device_count() > 1:
        return Refusal("XLA can divide a scan among several devices, and not a call of compiled code")
    if not all(isinstance(size, int) for size in task.xs.shape):
        return Refusal("its sizes are symbols")
    rows, features = math.prod(task.xs.shape[:-1]), task.xs.shape[-1]
    hidden, coupled = task.affine.hidden, task.affine.coupled
    if task.xs.dtype == jnp.bfloat16 and coupled and hidden >= BFLOAT16_HIDDEN and build.multiplies_bfloat16():
        return Refusal("it computes in float32, and XLA's forward pass in bfloat16 is faster on this processor")
    features = 0 if task.affine.given else features
    work = 2 * rows * (features + hidden * coupled) * hidden * task.affine.count
    few = task.xs.shape[0] <= FEW_STEPS and math.prod(task.batch) <= FEW_SEQUENCES and hidden % WHOLE_BLOCKS == 0
    if few and work >= STEP:
        return None
    if work < WORK:
        return Refusal(f"{work:.2g} floating-point operations are too few to compile it for (from {WORK:.2g} on)")
    if rows < ROWS:
        return Refusal(f"it packs the weights in each call, which does not pay for {rows} steps (from {ROWS} on)")
    return None


def plan(task: Task) -> Plan | Refusal:
    form, state = task.affine, task.state
    if form is None:
        return Refusal("it runs affine cells (jrnn.AffineCell), whose step is two products and a function of gates")
    if not jax.sharding.get_abstract_mesh().empty:
        return Refusal("a mesh is set, and it does not support arrays that lie on one")
    if task.steps.key is not None and form.gates.draws:
        return Refusal("it draws no random numbers, and the cell draws some at each step (zoneout)")
    if form.projection is not None:
        return Refusal("the cell makes its input projection itself")
    exact, rounded = (form.theta, state, form.mask), (form.inputs, form.w_hh, task.xs)
    if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(exact)) or any(
        leaf.dtype != jnp.float32 and not is_low(leaf.dtype) for leaf in jax.tree.leaves(rounded)
    ):
        return Refusal("it computes in float32 only")
    if not hasattr(state, "_fields") or "h" not in state._fields:
        return Refusal("its state is no NamedTuple with a field h")
    for leaf in jax.tree.leaves(form.theta):
        if leaf.shape != (form.hidden,):
            return Refusal(
                f"one of its parameters beside the weights has the shape {leaf.shape}, and is no vector (H,)"
            )
    if any(leaf.shape != state.h.shape for leaf in state):
        return Refusal("the fields of its state differ in shape")
    try:
        sums, header = read_gates(form, state)
    except emit.Unserved as error:
        return Refusal(str(error))
    if default_device().platform != "cpu":
        return Refusal(f"it runs on a CPU, and the default device is {default_device().platform}")
    if not operation.available():
        return Refusal("this version of JAX no longer has the internals that its operation is made of")
    try:
        build.load(header)
    except RuntimeError as error:
        return Refusal(str(error))
    length, count = task.steps.chunk(task.xs.shape[0]), math.prod(task.batch)
    chunks = None if length is None else Chunks.of(task.xs.shape[0], count, length)
    options = Options(form.emits, sums, header, task.steps.reverse, chunks)
    return Plan(
        run, "the whole loop is one compiled function for this CPU", options, of_form=True, flat=True, recomputes=True
    )


def read_gates(form: AffineForm, state: Any) -> tuple[tuple[bool, ...], str]:
    """For each gate, whether it uses only ``u + v``; and the gates in C++."""
    sums = promises.sums(form.gates, form.theta, state)
    return sums, emit.header(form.gates, promises.Forms.of(form.theta, state), sums)


def run(options: Options, task: Task) -> tuple[Any, jax.Array]:
    """Runs the compiled loop. 16-bit inputs and weights are converted to float32, which is exact and here faster."""
    form = task.form
    inputs, w_hh, xs = jax.tree.map(_float32, (form.inputs, form.w_hh, form.entering(task.xs)))
    form = replace(form, inputs=inputs, w_hh=w_hh, input_mask=None, mask=None)
    flags = Flags(task.steps.valid, task.steps.resets, task.form.mask)
    last, outs = loop(options, Inputs(xs, form, task.state, task.restart), flags)
    return last, side_by_side(outs)


def _float32(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float32)
