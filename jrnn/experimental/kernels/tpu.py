"""The kernels for TPUs, in Pallas: a sequential grid over time, weights resident in VMEM. Never run on a TPU.

Units last, on the lanes; sequences in tiles, on the sublanes. What is carried from step to step is an output whose
block stays the same over time, so that it is written back to memory once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jrnn.experimental.kernels import body
from jrnn.experimental.kernels.options import Settings, Steps

# What is kept of float32, and the values of jax_default_matmul_precision that ask for no more.
KEPT, PRECISIONS = "8 bits", (None, "default", "bfloat16", "BF16_BF16_BF16", "BF16_BF16_F32")
# Units fill whole vectors of so many lanes, and sequences tiles of so many rows.
LANES, WIDTH = 128, 16
# Bytes that a kernel may take of VMEM unless the compiler is told otherwise.
VMEM = 16 * 1024 * 1024


class Shape(NamedTuple):
    """How a run is cut up: ``hidden`` units in whole lanes, ``sequences`` as ``tiles`` of ``WIDTH``."""

    hidden: int
    sequences: int

    @property
    def units(self) -> int:
        return -(-self.hidden // LANES) * LANES

    @property
    def tiles(self) -> int:
        return -(-self.sequences // WIDTH)

    @property
    def rows(self) -> int:
        return self.tiles * WIDTH


def fits(plan: Settings, count: int, w_hh: Any) -> tuple[bool, str]:
    """Whether VMEM can hold the weights, and a step of everything else, each in the two buffers of the pipeline."""
    cut = Shape(plan.hidden, count)
    fields = plan.states
    arrays = 2 * plan.parts + 6 * fields + 4
    need = 2 * cut.units * (plan.gates * cut.units * w_hh.dtype.itemsize + 4 * WIDTH * arrays)
    size = f"{plan.gates} gates of {cut.hidden} units (in lanes: {cut.units}) in {w_hh.dtype}"
    if need > VMEM:
        return False, f"{size} need {need} bytes of VMEM, and a kernel has {VMEM}"
    return True, f"{size} take {need} of the {VMEM} bytes of VMEM"


def forward(plan: Settings, shared: Any, steps: Steps, states: Any) -> tuple[Any, Any]:
    """``(hs, met), last``: see `body.scan_forward`, which is the same in ordinary JAX."""
    w_hh, theta = shared
    cut = Shape(plan.hidden, steps.read.shape[1])
    time = steps.read.shape[0]
    fields, tree = jax.tree.flatten(states[0])
    once = {
        "w": weights(plan, cut, w_hh, transposed=False),
        "theta": jax.tree.map(lambda a: wide(cut, a), theta),
    }
    first = {"state": [whole(cut, f) for f in fields], "restart": [whole(cut, f) for f in jax.tree.leaves(states[1])]}
    each = {"read": split(cut, steps.read, plan.gates), **flags(cut, steps)}
    every = jax.ShapeDtypeStruct((time, 1, cut.rows, cut.units), jnp.float32)
    one = jax.ShapeDtypeStruct((cut.rows, cut.units), jnp.float32)
    out_each = {"hs": every, "met": [every] * len(fields) * plan.keep}

    def run(is_first: Any, once: Any, first: Any, each: Any, out_each: Any, carried: Any) -> None:
        @pl.when(is_first)
        def _() -> None:
            for ref, given in zip(carried, first["state"], strict=True):
                ref[...] = given[...]

        restart = jax.tree.unflatten(tree, [ref[...] for ref in first["restart"]]) if first["restart"] else None
        state = jax.tree.unflatten(tree, [ref[...] for ref in carried])

        def multiply(h: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(dot(cut, h, once["w"][gate]) for gate in range(plan.gates))

        theta = jax.tree.map(lambda ref: spread(ref[...], state.h), once["theta"])
        met, new = body.forward(plan, theta, state, restart, step(each, plan.gates, state.h), multiply)
        out_each["hs"][0, 0] = new.h
        for ref, field in zip(out_each["met"], jax.tree.leaves(met), strict=False):
            ref[0, 0] = field
        for ref, field in zip(carried, jax.tree.leaves(new), strict=True):
            ref[...] = field

    outs, last = launch(plan, cut, plan.reverse, run, once, first, each, out_each, [one] * len(fields), time)
    met = jax.tree.unflatten(tree, [rows(cut, f)[:, 0] for f in outs["met"]]) if plan.keep else None
    return (rows(cut, outs["hs"])[:, 0], met), jax.tree.unflatten(tree, [rows(cut, f) for f in last])


def backward(plan: Settings, shared: Any, steps: Any, states: Any) -> tuple[Any, Any]:
    """``dread, (dstate, drestart, dtheta)``: see `body.scan_backward`, which is the same in ordinary JAX."""
    w_hh, theta = shared
    steps, met, dhs = steps
    cut = Shape(plan.hidden, steps.read.shape[1])
    time = steps.read.shape[0]
    fields, tree = jax.tree.flatten(states[0])
    leaves, theta_tree = jax.tree.flatten(theta)
    once = {"w": weights(plan, cut, w_hh, transposed=True), "theta": [wide(cut, leaf) for leaf in leaves]}
    first = [whole(cut, f) for f in fields]
    each = {
        "read": split(cut, steps.read, plan.parts), "dhs": whole(cut, dhs)[:, None],
        "met": [whole(cut, f)[:, None] for f in jax.tree.leaves(met)], **flags(cut, steps),
    }  # fmt: skip
    one = jax.ShapeDtypeStruct((cut.rows, cut.units), jnp.float32)
    out_each = jax.ShapeDtypeStruct((time, plan.parts, cut.rows, cut.units), jnp.float32)

    def run(is_first: Any, once: Any, first: Any, each: Any, out_each: Any, carried: Any) -> None:
        @pl.when(is_first)
        def _() -> None:
            for i, ref in enumerate(carried):
                ref[...] = first[i][...] if i < len(fields) else jnp.zeros(ref.shape, ref.dtype)

        carry = [ref[...] for ref in carried]
        dh = each["dhs"][0, 0]

        def multiply(dv: Any) -> jax.Array:
            return sum((dot(cut, d, once["w"][gate]) for gate, d in enumerate(dv)), jnp.zeros_like(dh))

        theta = jax.tree.unflatten(theta_tree, [spread(ref[...], dh) for ref in once["theta"]])
        before = jax.tree.unflatten(tree, [ref[0, 0] for ref in each["met"]])
        dnew = jax.tree.unflatten(tree, carry[: len(fields)])
        moved = body.backward(plan, theta, before, dnew, dh, step(each, plan.parts, dh), multiply)
        for part, value in enumerate(moved[1]):
            out_each[0, part] = value
        drestart = [jnp.zeros_like(dh)] * len(fields) if moved[3] is None else jax.tree.leaves(moved[3])
        added = [*drestart, *jax.tree.leaves(moved[0])]
        sums = [a + b for a, b in zip(carry[len(fields) :], added, strict=True)]
        for ref, value in zip(carried, [*jax.tree.leaves(moved[2]), *sums], strict=True):
            ref[...] = value

    ones = [one] * (2 * len(fields) + len(leaves))
    dread, last = launch(plan, cut, not plan.reverse, run, once, first, each, out_each, ones, time)
    dread = jnp.concatenate(list(jnp.moveaxis(rows(cut, dread), 1, 0)), -1)
    last = [rows(cut, f) for f in last]
    dstate, drestart, dtheta = last[: len(fields)], last[len(fields) : 2 * len(fields)], last[2 * len(fields) :]
    return dread, (
        jax.tree.unflatten(tree, dstate),
        jax.tree.unflatten(tree, drestart),
        jax.tree.unflatten(theta_tree, dtheta),
    )


def launch(
    plan: Settings, cut: Shape, reverse: bool, run: Any, once: Any, first: Any, each: Any, out_each: Any, carried: Any,
    time: int,
) -> Any:  # fmt: skip
    """Runs ``run`` for every tile of sequences and, within it, for one step after another.

    ``once`` are inputs that are the same for all tiles and steps, ``first`` has a value for each tile, and ``each`` and
    ``out_each`` have one for each step. ``carried`` is passed from step to step in each tile.
    """
    args = (once, first, each, out_each, carried)
    tree = jax.tree.structure(args)
    count = len(jax.tree.leaves((once, first, each)))

    def at(t: Any) -> Any:
        return time - 1 - t if reverse else t

    def same(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec(a.shape, lambda i, t: (0,) * len(a.shape))

    def of_tile(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec((WIDTH, *a.shape[1:]), lambda i, t: (i, 0))

    def of_step(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, a.shape[1], WIDTH, *a.shape[3:]), lambda i, t: (at(t), 0, i, 0))

    specs = [
        jax.tree.map(spec, arg) for spec, arg in zip((same, of_tile, of_step, of_step, of_tile), args, strict=True)
    ]

    def kernel(*refs: Any) -> None:
        run(pl.program_id(1) == 0, *jax.tree.unflatten(tree, refs))

    outs = pl.pallas_call(
        kernel,
        grid=(cut.tiles, time),
        in_specs=jax.tree.leaves(specs[:3]),
        out_specs=jax.tree.leaves(specs[3:]),
        out_shape=jax.tree.leaves((out_each, carried)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=plan.interpret,
    )(*jax.tree.leaves(args)[:count])
    return jax.tree.unflatten(jax.tree.structure((out_each, carried)), outs)


def dot(cut: Shape, a: jax.Array, w: jax.Array) -> jax.Array:
    if cut.units != cut.hidden:
        # What stands in padding is finite here, or it would meet the zero weights of the padding.
        a = jnp.where(jax.lax.broadcasted_iota(jnp.int32, a.shape, 1) < cut.hidden, a, jnp.zeros_like(a))
    precision = jax.lax.Precision.DEFAULT  # whatever is asked for of float32
    return jnp.dot(a.astype(w.dtype), w, precision=precision, preferred_element_type=jnp.float32)


def step(each: Any, parts: int, like: jax.Array) -> Steps:
    """The inputs of a step."""

    def flag(name: str) -> Any:
        return spread(each[name][0, 0], like) > 0 if name in each else None

    return Steps(tuple(each["read"][0, part] for part in range(parts)), flag("valid"), flag("resets"))


def spread(a: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(a, like.shape)


# --- what lies where ---------------------------------------------------------------------------------------------


def weights(plan: Settings, cut: Shape, w_hh: jax.Array, transposed: bool) -> jax.Array:
    """``(H, G*H)`` as ``(G, units, units)``, rows being what is summed over."""
    w = w_hh.reshape(cut.hidden, plan.gates, cut.hidden).transpose((1, 2, 0) if transposed else (1, 0, 2))
    more = cut.units - cut.hidden
    return jnp.pad(w, ((0, 0), (0, more), (0, more)))


def whole(cut: Shape, a: jax.Array) -> jax.Array:
    """``(…, N, H)`` padded to whole tiles and lanes."""
    more = ((0, cut.rows - cut.sequences), (0, cut.units - cut.hidden))
    return jnp.pad(a, (*((0, 0) for _ in a.shape[:-2]), *more))


def rows(cut: Shape, a: jax.Array) -> jax.Array:
    """The inverse of `whole`."""
    return a[..., : cut.sequences, : cut.hidden]


def split(cut: Shape, a: jax.Array, parts: int) -> jax.Array:
    """``(T, N, P*H)`` as ``(T, P, rows, units)``."""
    return whole(cut, jnp.swapaxes(a.reshape(*a.shape[:2], parts, cut.hidden), 1, 2))


def wide(cut: Shape, a: jax.Array) -> jax.Array:
    """``(H,)`` as ``(1, units)``."""
    return jnp.pad(a, (0, cut.units - cut.hidden))[None]


def flags(cut: Shape, steps: Steps) -> dict[str, jax.Array]:
    """``(T, N)`` booleans as ``(T, 1, rows, 1)`` floats."""

    def lay(flag: jax.Array) -> jax.Array:
        return jnp.pad(flag, ((0, 0), (0, cut.rows - cut.sequences))).astype(jnp.float32)[:, None, :, None]

    return {name: lay(f) for name, f in (("valid", steps.valid), ("resets", steps.resets)) if f is not None}
