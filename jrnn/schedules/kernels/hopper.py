"""The kernels for Hopper GPUs, in Pallas on Mosaic GPU: one block for each tile of sequences, weights on the chip.

Units first: a warpgroup owns 64 units, and all gates of a unit and a sequence lie in the same register of the same
thread, one accumulator of the tensor cores a gate, so that gates act on registers. ``h`` (backward: ``dz``) goes round
through shared memory, in two slots that take turns, with one barrier a step::

    v_g (64, n) = W_g^T (64, H) h (H, n)        dh (64, n) = sum over gates of W_g (64, H) dz_g (H, n)

The tensor cores multiply 16-bit floats and add in float32. Float32 factors are split into two bfloat16 each, high and
low, and three of the four products taken (what XLA calls BF16_BF16_F32_X3): about 16 bits of each factor count.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jrnn.schedules.kernels import body
from jrnn.schedules.kernels.plan import Plan, Steps

# Rows of a tensor core instruction, and so units of a warpgroup.
ROWS = 64
# Warpgroups of a block, at most; bytes of shared memory it may have; and what the barriers are left of them.
WARPGROUPS, SHARED_MEMORY, BARRIERS = 8, 227 * 1024, 1024
# Blocks that run at once, one a multiprocessor: from more sequences on than these take, tiles are wider.
BLOCKS = 132

_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters


class Shape(NamedTuple):
    """How a run is cut up: ``hidden`` units as ``warpgroups`` of 64, ``sequences`` as ``tiles`` of ``width``."""

    hidden: int
    sequences: int
    gates: int
    pieces: int

    @property
    def warpgroups(self) -> int:
        return -(-self.hidden // ROWS)

    @property
    def units(self) -> int:
        return ROWS * self.warpgroups

    @property
    def width(self) -> int:
        return 16 if self.sequences <= 16 * BLOCKS else 32

    @property
    def tiles(self) -> int:
        return -(-self.sequences // self.width)

    def shared_memory(self, sent: int) -> int:
        """Bytes of the weights and of two slots for what is sent round, so many arrays of it."""
        return 2 * self.pieces * self.units * (self.gates * self.units + 2 * sent * self.width) + BARRIERS


def shape(plan: Plan, count: int, w_hh: Any) -> Shape:
    return Shape(plan.cell.hidden, count, plan.gates, 2 if w_hh.dtype == jnp.float32 else 1)


def fits(plan: Plan, count: int, w_hh: Any) -> tuple[bool, str]:
    """Whether one block can hold the weights."""
    cut = shape(plan, count, w_hh)
    need = cut.shared_memory(cut.gates)
    size = f"{cut.gates} gates of {cut.hidden} units (in tiles: {cut.units}) in {w_hh.dtype}"
    if cut.warpgroups > WARPGROUPS:
        return False, f"{size} need {cut.warpgroups} warpgroups, and a block has at most {WARPGROUPS}"
    if need > SHARED_MEMORY:
        return False, f"{size} need {need} bytes of shared memory, and a block has {SHARED_MEMORY}"
    return True, f"{size} take {need} of the {SHARED_MEMORY} bytes of shared memory of a block"


# --- the kernels -------------------------------------------------------------------------------------------------


def forward(plan: Plan, shared: Any, steps: Steps, states: Any) -> tuple[Any, Any]:
    """``(hs, met), last``: see `body.scan_forward`, which is the same in ordinary JAX."""
    w_hh, theta = shared
    time, count, _ = steps.read.shape
    cut = shape(plan, count, w_hh)
    fields, tree = jax.tree.flatten(states[0])
    inputs = {
        "w": weights(cut, w_hh, transposed=True),
        "theta": jax.tree.map(functools.partial(vector, cut), theta),
        "state": [tiled(cut, f) for f in fields],
        "restart": [tiled(cut, f) for f in jax.tree.leaves(states[1])],
        "read": split(cut, steps.read, plan.gates),
        **flags(cut, steps),
    }
    one = jax.ShapeDtypeStruct((cut.tiles, cut.units, cut.width), jnp.float32)
    all_ = one.update(shape=(time, *one.shape))
    outputs = {"hs": all_, "met": [all_] * len(fields) * plan.keep, "last": [one] * len(fields)}

    def run(block: Block, ins: Any, outs: Any) -> None:
        theta = jax.tree.map(lambda ref: block.read(ref), ins["theta"])
        restart = (
            jax.tree.unflatten(tree, [block.read(f, block.tile) for f in ins["restart"]]) if ins["restart"] else None
        )

        def multiply(h: Any, slot: Any) -> Any:
            block.send([h], slot)
            return block.products([[gate] for gate in range(plan.gates)], slot)

        def step(i: Any, fields: Any) -> Any:
            t = time - 1 - i if plan.reverse else i
            met, new = body.forward(
                plan, theta, jax.tree.unflatten(tree, fields), restart, block.step(ins, t, plan.gates),
                lambda h: multiply(h, lax.rem(i, 2)),
            )  # fmt: skip
            block.write(outs["hs"], new.h, t, block.tile)
            for ref, field in zip(outs["met"], jax.tree.leaves(met), strict=False):
                block.write(ref, field, t, block.tile)
            return tuple(jax.tree.leaves(new))

        last = lax.fori_loop(0, time, step, tuple(block.read(f, block.tile) for f in ins["state"]))
        for ref, field in zip(outs["last"], last, strict=True):
            block.write(ref, field, block.tile)

    outs = launch(plan, cut, 1, run, inputs, outputs)
    met = jax.tree.unflatten(tree, [untiled(cut, f) for f in outs["met"]]) if plan.keep else None
    return (untiled(cut, outs["hs"]), met), jax.tree.unflatten(tree, [untiled(cut, f) for f in outs["last"]])


def backward(plan: Plan, shared: Any, steps: Any, states: Any) -> tuple[Any, Any]:
    """``dread, (dstate, drestart, dtheta)``: see `body.scan_backward`, which is the same in ordinary JAX."""
    w_hh, theta = shared
    steps, met, dhs = steps
    time, count, _ = steps.read.shape
    cut = shape(plan, count, w_hh)
    fields, tree = jax.tree.flatten(states[0])
    leaves, theta_tree = jax.tree.flatten(theta)
    inputs = {
        "w": weights(cut, w_hh, transposed=False),
        "theta": [vector(cut, leaf) for leaf in leaves],
        "dlast": [tiled(cut, f) for f in fields],
        "met": [tiled(cut, f) for f in jax.tree.leaves(met)],
        "dhs": tiled(cut, dhs),
        "read": split(cut, steps.read, plan.parts),
        **flags(cut, steps),
    }
    one = jax.ShapeDtypeStruct((cut.tiles, cut.units, cut.width), jnp.float32)
    outputs = {
        "dread": one.update(shape=(time, cut.tiles, plan.parts, cut.units, cut.width)),
        "dstate": [one] * len(fields), "drestart": [one] * len(fields), "dtheta": [one] * len(leaves),
    }  # fmt: skip

    def run(block: Block, ins: Any, outs: Any) -> None:
        theta = jax.tree.unflatten(theta_tree, [block.read(ref) for ref in ins["theta"]])

        def multiply(dv: Any, slot: Any) -> Any:
            block.send(dv, slot)
            (dh,) = block.products([list(range(plan.gates))], slot)
            return dh

        def step(i: Any, carry: Any) -> Any:
            t = i if plan.reverse else time - 1 - i
            dnew, drestart, dtheta = carry
            before = jax.tree.unflatten(tree, [block.read(f, t, block.tile) for f in ins["met"]])
            moved = body.backward(
                plan, theta, before, jax.tree.unflatten(tree, dnew), block.read(ins["dhs"], t, block.tile),
                block.step(ins, t, plan.parts), lambda dv: multiply(dv, lax.rem(i, 2)),
            )  # fmt: skip
            for part, value in enumerate(moved[1]):
                block.write(outs["dread"], value, t, block.tile, part)
            if moved[3] is not None:
                drestart = tuple(a + b for a, b in zip(drestart, jax.tree.leaves(moved[3]), strict=True))
            dtheta = tuple(a + b for a, b in zip(dtheta, jax.tree.leaves(moved[0]), strict=True))
            return tuple(jax.tree.leaves(moved[2])), drestart, dtheta

        dlast = tuple(block.read(f, block.tile) for f in ins["dlast"])
        zero = block.zeros()
        out = lax.fori_loop(0, time, step, (dlast, (zero,) * len(fields), (zero,) * len(leaves)))
        for name, values in zip(("dstate", "drestart", "dtheta"), out, strict=True):
            for ref, value in zip(outs[name], values, strict=True):
                block.write(ref, value, block.tile)

    outs = launch(plan, cut, plan.gates, run, inputs, outputs)
    dread = untiled(cut, jnp.moveaxis(outs["dread"], 2, 0))
    dread = jnp.concatenate(list(dread), -1)
    dstate, drestart, dtheta = ([untiled(cut, f) for f in outs[n]] for n in ("dstate", "drestart", "dtheta"))
    return dread, (
        jax.tree.unflatten(tree, dstate),
        jax.tree.unflatten(tree, drestart),
        jax.tree.unflatten(theta_tree, dtheta),
    )


class Block(NamedTuple):
    """What one warpgroup of one block works with."""

    plan: Plan
    cut: Shape
    tile: Any
    warpgroup: Any
    alive: Any
    w: Any
    sent: Any
    barrier: Any

    @property
    def units(self) -> Any:
        return pl.ds(self.warpgroup * ROWS, ROWS)

    def read(self, ref: Any, *index: Any) -> jax.Array:
        """The warpgroup's units of an array in global memory, laid out like an accumulator."""
        return load(self.plan, ref, (*index, self.units))

    def write(self, ref: Any, value: Any, *index: Any) -> None:
        ref[(*index, self.units)] = laid_out(self.plan, value)

    def zeros(self) -> jax.Array:
        return laid_out(self.plan, jnp.zeros((ROWS, self.cut.width), jnp.float32))

    def step(self, ins: Any, t: Any, parts: int) -> Steps:
        """What a step reads."""

        def flag(name: str) -> Any:
            return load(self.plan, ins[name], (t, self.tile)) > 0 if name in ins else None

        read = tuple(self.read(ins["read"], t, self.tile, part) for part in range(parts))
        return Steps(read, flag("valid"), flag("resets"))

    def send(self, values: Any, slot: Any) -> None:
        """Puts the warpgroup's units of each array where all warpgroups of the block can multiply by them."""
        for i, value in enumerate(values):
            # What stands in padded units is finite here, or it would meet the zero weights of the padding.
            value = value if self.alive is None else jnp.where(self.alive, value, jnp.zeros_like(value))
            for piece in range(self.cut.pieces):
                part = laid_out(self.plan, value.astype(self.sent.dtype))
                self.sent[slot, piece, i, self.units] = part
                value = value - part.astype(jnp.float32)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)

    def products(self, sums: Any, slot: Any) -> Any:
        """For each list of gates, the sum of their weights times what was sent: one array a gate, or one for all."""
        pairs = [(0, 0)] if self.cut.pieces == 1 else [(0, 1), (1, 0), (0, 0)]
        alone = self.sent.shape[2] == 1

        def run(*accumulators: Any) -> Any:
            for accumulator, gates in zip(accumulators, sums, strict=True):
                for gate in gates:
                    for a, b in pairs:
                        sent = self.sent.at[slot, b, 0 if alone else gate]
                        plgpu.wgmma(accumulator, self.w.at[a, gate, self.units], sent)
            plgpu.wgmma_wait(0)
            return tuple(accumulator[...] for accumulator in accumulators)

        accumulator = plgpu.ACC((ROWS, self.cut.width), jnp.float32)
        return pl.run_scoped(run, *(accumulator for _ in sums))


def launch(plan: Plan, cut: Shape, sent: int, run: Any, inputs: Any, outputs: Any) -> Any:
    """Runs ``run(block, inputs, outputs)`` in every warpgroup of every block, once its weights are on the chip."""
    if cut.units != cut.hidden:
        inputs = {**inputs, "alive": vector(cut, jnp.ones(cut.hidden, jnp.float32))}
    flat, in_tree = jax.tree.flatten(inputs)
    flat_out, out_tree = jax.tree.flatten(outputs)
    swizzle = 2 * cut.width
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    dtype = inputs["w"].dtype

    def kernel(*refs: Any) -> None:
        w, slots, arrived, barrier = refs[len(flat) + len(flat_out) :]
        ins = jax.tree.unflatten(in_tree, refs[: len(flat)])
        tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _() -> None:
            for piece in range(cut.pieces):
                for gate in range(cut.gates):
                    plgpu.copy_gmem_to_smem(ins["w"].at[piece, gate], w.at[piece, gate], arrived)

        plgpu.barrier_wait(arrived)
        block = Block(plan, cut, tile, warpgroup, None, w, slots, barrier)
        if "alive" in ins:
            block = block._replace(alive=block.read(ins["alive"]) > 0)
        run(block, ins, jax.tree.unflatten(out_tree, refs[len(flat) : len(flat) + len(flat_out)]))

    outs = plgpu.kernel(
        kernel,
        out_type=flat_out,
        scratch_types=[
            plgpu.SMEM((cut.pieces, cut.gates, cut.units, cut.units), dtype, transforms=transforms),
            plgpu.SMEM((2, cut.pieces, sent, cut.units, cut.width), dtype, transforms=transforms),
            plgpu.Barrier(num_arrivals=cut.pieces * cut.gates),
            plgpu.Barrier(num_arrivals=cut.warpgroups),
        ],
        grid=(cut.tiles,),
        grid_names=("tile",),
        num_threads=cut.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpreter() if plan.interpret else None,
    )(*flat)
    return jax.tree.unflatten(out_tree, outs)


def load(plan: Plan, ref: Any, index: Any) -> jax.Array:
    if plan.interpret:  # whose loads know no layouts
        return ref[index]
    options: dict[str, Any] = {"layout": plgpu.Layout.WGMMA, "optimized": False}
    return plgpu.load(ref, index, **options) if _LOAD_TAKES_INDEX else plgpu.load(ref.at[index], **options)


def laid_out(plan: Plan, value: jax.Array) -> jax.Array:
    return value if plan.interpret else plgpu.layout_cast(value, plgpu.Layout.WGMMA)


def interpreter() -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    # JAX 0.10 has the interpreter, but no public name for what switches it on.
    return importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()


# --- what lies where ---------------------------------------------------------------------------------------------


def weights(cut: Shape, w_hh: jax.Array, transposed: bool) -> jax.Array:
    """``(H, G*H)`` as ``(pieces, G, units, units)``: rows are what comes out, and columns, contiguous, are summed."""
    w = w_hh.reshape(cut.hidden, cut.gates, cut.hidden).transpose((1, 2, 0) if transposed else (1, 0, 2))
    more = cut.units - cut.hidden
    w = jnp.pad(w, ((0, 0), (0, more), (0, more)))
    if cut.pieces == 1:
        return w[None]
    # Not by conversion there and back, which XLA may leave out.
    high = lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([high, w - high]).astype(jnp.bfloat16)


def tiled(cut: Shape, a: jax.Array) -> jax.Array:
    """``(…, N, H)`` as ``(…, tiles, units, width)``, padded with zeros."""
    *lead, _, _ = a.shape
    more = ((0, cut.tiles * cut.width - cut.sequences), (0, cut.units - cut.hidden))
    a = jnp.pad(a, (*((0, 0) for _ in lead), *more))
    return jnp.swapaxes(a.reshape(*lead, cut.tiles, cut.width, cut.units), -1, -2)


def untiled(cut: Shape, a: jax.Array) -> jax.Array:
    """The inverse of `tiled`."""
    *lead, _, _, _ = a.shape
    a = jnp.swapaxes(a, -1, -2).reshape(*lead, cut.tiles * cut.width, cut.units)
    return a[..., : cut.sequences, : cut.hidden]


def split(cut: Shape, a: jax.Array, parts: int) -> jax.Array:
    """``(T, N, P*H)`` as ``(T, tiles, P, units, width)``."""
    a = a.reshape(*a.shape[:2], parts, cut.hidden)
    return jnp.moveaxis(tiled(cut, jnp.moveaxis(a, 2, 0)), 0, 2)


def vector(cut: Shape, a: jax.Array) -> jax.Array:
    """``(H,)`` as ``(units, width)``: like everything else that the gates see."""
    return jnp.broadcast_to(jnp.pad(a, (0, cut.units - cut.hidden))[:, None], (cut.units, cut.width))


def flags(cut: Shape, steps: Steps) -> dict[str, jax.Array]:
    """``(T, N)`` booleans as ``(T, tiles, 64, width)`` floats, the same for all units."""

    def lay(flag: jax.Array) -> jax.Array:
        flag = jnp.pad(flag, ((0, 0), (0, cut.tiles * cut.width - cut.sequences)))
        flag = flag.reshape(flag.shape[0], cut.tiles, 1, cut.width).astype(jnp.float32)
        return jnp.broadcast_to(flag, (*flag.shape[:2], ROWS, cut.width))

    return {name: lay(f) for name, f in (("valid", steps.valid), ("resets", steps.resets)) if f is not None}
