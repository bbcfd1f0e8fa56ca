"""The kernels for Hopper GPUs, in Pallas on Mosaic GPU: the weights on the chip, in one block or shared by several.

Units first. A warpgroup has all gates of some units, as the rows of what its tensor cores multiply; what comes out
goes through shared memory to threads that each hold all gates of a unit and a sequence, so that gates act on
registers. ``h`` (backward: the gates' ``dz``) goes to everybody once a step, and one barrier is met there::

    v (G*units, n) = W^T (G*units, H) h (H, n)       dh (units, n) = sum over gates of W_g (units, H) dz_g (H, n)

A block by itself writes it to its shared memory, in two slots that take turns. Blocks that share the weights, each
with the rows of its own units, write it to global memory, in two slots too, meet, and each copies all of it to its
shared memory, in parts if that is short: in a cluster they meet at a cluster's barrier, and in a grid, whose blocks
must all run at once, at a semaphore in global memory. Two such kernels at once, on streams of their own, could wait
for each other for ever.

The tensor cores multiply 16-bit floats and add in float32. Float32 factors are split into two bfloat16 each, high and
low, and three of the four products taken (what XLA calls BF16_BF16_F32_X3): about 16 bits of each factor count.

Pallas' interpreter has no semaphores and runs the blocks of a grid one after another: there a group of a grid is a
cluster, which the interpreter of JAX 0.12 knows and that of 0.10 does not. What it cannot show is the semaphore, the
order of memory between blocks and how arrays lie in registers and shared memory: that is lowered for CUDA, and untried.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jrnn.experimental.kernels import body
from jrnn.experimental.kernels.options import ROWS, Cut, Settings, Steps, choose

# What is kept of float32, and the values of jax_default_matmul_precision that ask for no more.
KEPT = "about 16 bits"
PRECISIONS = (
    None, "default", "bfloat16", "high", "tensorfloat32", "BF16_BF16_BF16", "BF16_BF16_F32", "BF16_BF16_F32_X3",
    "F16_F16_F16", "F16_F16_F32", "TF32_TF32_F32",
)  # fmt: skip

# JAX 0.10 asks for an index apart from what it is of, 0.11 only takes one, with a warning, and 0.12 does not.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_NEEDS_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty

# Of what the gates act on, 16 units and 16 sequences at a time: each of four warps has four units.
_UNITS = plgpu.Layout.TILED(plgpu.Tiling(((16, 16), (4, 16), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def fits(plan: Settings, count: int, w_hh: Any) -> tuple[bool, str]:
    """Whether the weights fit one block, a cluster of blocks or all blocks of the GPU."""
    cut, reason = choose(plan.hidden, count, plan.gates, pieces(w_hh), plan.chip)
    return cut is not None, f"{plan.gates} gates of {plan.hidden} units in {w_hh.dtype} {reason}"


def cut_up(plan: Settings, count: int, w_hh: Any) -> Cut:
    cut, reason = choose(plan.hidden, count, plan.gates, pieces(w_hh), plan.chip)
    if cut is None:
        raise ValueError(f"backend: expected weights that fit the GPU for 'kernel', got some that {reason}")
    return cut


def pieces(w_hh: Any) -> int:
    return 2 if w_hh.dtype == jnp.float32 else 1


# --- the kernels -------------------------------------------------------------------------------------------------


def forward(plan: Settings, shared: Any, steps: Steps, states: Any) -> tuple[Any, Any]:
    """``(hs, met), last``: see `body.scan_forward`, which is the same in ordinary JAX."""
    w_hh, theta = shared
    time, count, _ = steps.read.shape
    cut = cut_up(plan, count, w_hh)
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

        def multiply(h: Any, i: Any) -> Any:
            return block.products(block.send([h], i))

        def step(i: Any, fields: Any) -> Any:
            t = time - 1 - i if plan.reverse else i
            met, new = body.forward(
                plan, theta, jax.tree.unflatten(tree, fields), restart, block.step(ins, t, plan.gates),
                lambda h: multiply(h, i),
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


def backward(plan: Settings, shared: Any, steps: Any, states: Any) -> tuple[Any, Any]:
    """``dread, (dstate, drestart, dtheta)``: see `body.scan_backward`, which is the same in ordinary JAX."""
    w_hh, theta = shared
    steps, met, dhs = steps
    time, count, _ = steps.read.shape
    cut = cut_up(plan, count, w_hh)
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

        def multiply(dv: Any, i: Any) -> Any:
            return functools.reduce(jnp.add, block.products(block.send(dv, i)))

        def step(i: Any, carry: Any) -> Any:
            t = i if plan.reverse else time - 1 - i
            dnew, drestart, dtheta = carry
            before = jax.tree.unflatten(tree, [block.read(f, t, block.tile) for f in ins["met"]])
            moved = body.backward(
                plan, theta, before, jax.tree.unflatten(tree, dnew), block.read(ins["dhs"], t, block.tile),
                block.step(ins, t, plan.parts), lambda dv: multiply(dv, i),
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
    """The references of one warpgroup of one block, for one tile of sequences.

    ``passed`` is the buffer in global memory through which blocks that share the weights exchange vectors, and ``sent``
    the buffer in shared memory that these are copied to. ``met`` is the number of steps at which the blocks have
    waited for each other before. Through ``out``, the warpgroup passes the results of its tensor cores to its threads.
    """

    plan: Settings
    cut: Cut
    tile: Any
    met: Any
    block: Any
    warpgroup: Any
    alive: Any
    w: Any
    sent: Any
    out: Any
    barrier: Any
    received: Any
    passed: Any
    semaphore: Any

    @property
    def units(self) -> Any:
        """The warpgroup's units."""
        return pl.ds((self.block * self.cut.warpgroups + self.warpgroup) * self.cut.share, self.cut.share)

    def read(self, ref: Any, *index: Any) -> jax.Array:
        """The warpgroup's units of an array in global memory."""
        return load(self.plan, ref, (*index, self.units))

    def write(self, ref: Any, value: Any, *index: Any) -> None:
        ref[(*index, self.units)] = laid_out(self.plan, value)

    def zeros(self) -> jax.Array:
        return laid_out(self.plan, jnp.zeros((self.cut.share, self.cut.width), jnp.float32))

    def step(self, ins: Any, t: Any, parts: int) -> Steps:
        """The inputs of step t."""

        def flag(name: str) -> Any:
            return load(self.plan, ins[name], (t, self.tile)) > 0 if name in ins else None

        read = tuple(self.read(ins["read"], t, self.tile, part) for part in range(parts))
        return Steps(read, flag("valid"), flag("resets"))

    def send(self, values: Any, i: Any) -> Any:
        """Writes arrays where all warpgroups can read them, waits until all have done so, and returns the slot."""
        alone, slot = self.cut.blocks == 1, lax.rem(i, 2)
        place = self.sent.at[slot] if alone else self.passed.at[self.tile, slot]
        for which, value in enumerate(values):
            # What stands in padded units is finite here, or it would meet the zero weights of the padding.
            value = value if self.alive is None else jnp.where(self.alive, value, jnp.zeros_like(value))
            for piece in range(self.cut.pieces):
                part = laid_out(self.plan, value.astype(self.sent.dtype))
                columns = pl.ds(which * self.cut.width, self.cut.width)
                store(self.plan, place.at[piece, self.units, columns], part)
                value = value - part.astype(jnp.float32)
        if alone:
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)
            return slot
        self.meet(i)
        for first in range(min(2, self.cut.parts)):
            self.receive(first, slot)
        return slot

    def receive(self, part: int, slot: Any) -> None:
        """Starts to copy a part of what all blocks sent to the block's shared memory."""

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            for piece in range(self.cut.pieces):
                here = self.sent.at[part % 2, piece, pl.ds(0, self.span(part).size)]
                there = self.passed.at[self.tile, slot, piece, self.span(part)]
                plgpu.copy_gmem_to_smem(there, here, self.received.at[part % 2])

    def span(self, part: int) -> Any:
        """The units of a part."""
        start = part * self.cut.part
        return pl.ds(start, min(self.cut.part, self.cut.units - start))

    def meet(self, i: Any) -> None:
        """Waits until all warpgroups of all blocks that share the weights have written their vectors of step i."""
        self.order_memory()
        plgpu.commit_smem()  # whose barrier lets no thread of the warpgroup signal before all others got here
        if self.semaphore is None:
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)
        else:
            # It only counts up, so that nobody can be overtaken.
            writers = self.cut.blocks * self.cut.warpgroups
            plgpu.semaphore_signal(self.semaphore, 1, memory_scope="gpu")
            plgpu.semaphore_wait(self.semaphore, writers * (self.met + i + 1), decrement=False, memory_scope="gpu")
        self.order_memory()

    def order_memory(self) -> None:
        """A memory fence: after a barrier, other blocks copy what threads wrote to global memory before it."""
        if self.plan.interpret:
            return

        @plgpu.inline_mgpu()
        def fence(_: Any) -> None:
            text = "fence.acq_rel.gpu; fence.proxy.async;"
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "", has_side_effects=True)

        fence()

    def products(self, slot: Any) -> list[jax.Array]:
        """For each gate, its weights times the array that was sent, or times its own array if several were."""
        pairs = [(0, 0)] if self.cut.pieces == 1 else [(0, 1), (1, 0), (0, 0)]
        start = self.warpgroup * self.cut.rows
        columns = self.sent.shape[-1]

        def run(*accumulators: Any) -> Any:
            for part in range(self.cut.parts):
                alone, span = self.cut.blocks == 1, self.span(part)
                if not alone:
                    plgpu.barrier_wait(self.received.at[part % 2])
                for i, accumulator in enumerate(accumulators):
                    for a, b in pairs:
                        rows = self.w.at[a, pl.ds(start + i * ROWS, ROWS), span]
                        sent = self.sent.at[slot if alone else part % 2, b, pl.ds(0, span.size)]
                        plgpu.wgmma(accumulator, rows, sent)
                plgpu.wgmma_wait(0)
                if part + 2 < self.cut.parts:
                    self.receive(part + 2, slot)
            return tuple(accumulator[...] for accumulator in accumulators)

        accumulator = plgpu.ACC((ROWS, columns), jnp.float32)
        for i, sums in enumerate(pl.run_scoped(run, *([accumulator] * (self.cut.rows // ROWS)))):
            self.out[self.warpgroup, pl.ds(i * ROWS, ROWS)] = self.own_column(sums, i)
        share = self.cut.share
        return [load(self.plan, self.out, (self.warpgroup, pl.ds(g * share, share))) for g in range(self.cut.gates)]

    def own_column(self, sums: jax.Array, i: int) -> jax.Array:
        """Of what a gate's rows were multiplied by, the gate's own."""
        width, share = self.cut.width, self.cut.share
        if sums.shape[1] == width:
            return sums
        iota = lax.broadcasted_iota if self.plan.interpret else wgmma_iota
        row = iota(jnp.int32, (ROWS, width), 0)
        own = sums[:, :width]
        for gate in range(1, self.cut.gates):
            first = gate * share - i * ROWS
            if 0 < first < ROWS:
                own = jnp.where(row >= first, sums[:, gate * width : (gate + 1) * width], own)
            elif first <= 0:
                own = sums[:, gate * width : (gate + 1) * width]
        return own


def launch(plan: Settings, cut: Cut, sent: int, run: Any, inputs: Any, outputs: Any) -> Any:
    """Runs ``run(block, inputs, outputs)`` in every warpgroup of every block for every tile of its group, once the
    block's weights are on the chip; at a step, so many arrays are sent round."""
    if cut.units != cut.hidden:
        inputs = {**inputs, "alive": vector(cut, jnp.ones(cut.hidden, jnp.float32))}
    dtype, time = inputs["w"].dtype, inputs["read"].shape[0]
    columns = sent * cut.width
    if cut.blocks > 1:
        passed = jax.ShapeDtypeStruct((cut.tiles, 2, cut.pieces, cut.units, columns), dtype)
        outputs = {**outputs, "passed": passed}
    flat, in_tree = jax.tree.flatten(inputs)
    flat_out, out_tree = jax.tree.flatten(outputs)
    swizzle = 2 * cut.width
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    one, grid = cut.blocks == 1, cut.grid and not plan.interpret

    def kernel(*refs: Any) -> None:
        w, slots, out, arrived, received, barrier = refs[len(flat) + len(flat_out) :]
        ins = jax.tree.unflatten(in_tree, refs[: len(flat)])
        outs = jax.tree.unflatten(out_tree, refs[len(flat) : len(flat) + len(flat_out)])
        group, warpgroup = lax.axis_index("group"), lax.axis_index("warpgroup")
        index = jnp.int32(0) if one else lax.axis_index("block")

        @pl.when(warpgroup == 0)
        def _() -> None:
            for piece in range(cut.pieces):
                plgpu.copy_gmem_to_smem(ins["w"].at[index, piece], w.at[piece], arrived)

        plgpu.barrier_wait(arrived)
        semaphore = pl.get_global(plgpu.SemaphoreType.REGULAR((cut.groups,))).at[group] if grid else None
        block = Block(
            plan, cut, group, 0, index, warpgroup, None, w, slots, out, barrier, received, outs.get("passed"), semaphore
        )  # fmt: skip
        if "alive" in ins:
            block = block._replace(alive=block.read(ins["alive"]) > 0)

        def tile(i: Any) -> None:
            run(block._replace(tile=i * cut.groups + group, met=i * time), ins, outs)

        if cut.rounds == 1:
            run(block, ins, outs)
        else:
            pl.loop(0, cut.rounds)(tile)

    names: dict[str, Any] = {"grid": (cut.groups,), "grid_names": ("group",)}
    if grid:
        names = {"grid": (cut.groups, cut.blocks), "grid_names": ("group", "block")}
    elif not one:
        names |= {"cluster": (cut.blocks,), "cluster_names": ("block",)}
    everybody = functools.partial(plgpu.ClusterBarrier, collective_axes=("block",))
    barrier: Callable[..., Any] = plgpu.Barrier if one or grid else everybody
    outs = plgpu.kernel(
        kernel,
        out_type=flat_out,
        scratch_types=[
            plgpu.SMEM((cut.pieces, cut.warpgroups * cut.rows, cut.units), dtype, transforms=transforms),
            plgpu.SMEM((cut.slots, cut.pieces, cut.part, columns), dtype, transforms=transforms),
            plgpu.SMEM((cut.warpgroups, cut.rows, cut.width), jnp.float32),
            plgpu.Barrier(num_arrivals=cut.pieces),
            plgpu.Barrier(num_arrivals=cut.pieces, num_barriers=2),
            barrier(num_arrivals=cut.warpgroups),
        ],
        **names,
        num_threads=cut.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpreter() if plan.interpret else None,
    )(*flat)
    return jax.tree.unflatten(out_tree, outs)


def load(plan: Settings, ref: Any, index: Any) -> jax.Array:
    if plan.interpret:  # whose loads know no layouts
        return ref[index]
    options: dict[str, Any] = {"layout": _UNITS, "optimized": False}
    return plgpu.load(ref, index, **options) if _LOAD_NEEDS_INDEX else plgpu.load(ref.at[index], **options)


def store(plan: Settings, ref: Any, value: jax.Array) -> None:
    if plan.interpret or not hasattr(plgpu, "store"):
        ref[...] = value
    else:  # which would refuse less than whole cache lines
        plgpu.store(ref, value, optimized=False)


def laid_out(plan: Settings, value: jax.Array) -> jax.Array:
    return value if plan.interpret else plgpu.layout_cast(value, _UNITS)


def wgmma_iota(dtype: Any, shape: tuple[int, ...], dimension: int) -> jax.Array:
    return plgpu.broadcasted_iota(dtype, shape, dimension, layout=plgpu.Layout.WGMMA)


def interpreter() -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    # JAX 0.10 has the interpreter, but no public name for what switches it on.
    return importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()


# --- what lies where ---------------------------------------------------------------------------------------------


def weights(cut: Cut, w_hh: jax.Array, transposed: bool) -> jax.Array:
    """``(H, G*H)`` as ``(blocks, pieces, warpgroups*rows, units)``: of each warpgroup's units all gates one after
    another are the rows, and what is summed over the columns, contiguous."""
    w = w_hh.reshape(cut.hidden, cut.gates, cut.hidden).transpose((1, 2, 0) if transposed else (1, 0, 2))
    more = cut.units - cut.hidden
    w = jnp.pad(w, ((0, 0), (0, more), (0, more)))
    w = jnp.moveaxis(w.reshape(cut.gates, cut.blocks * cut.warpgroups, cut.share, cut.units), 0, 1)
    w = w.reshape(-1, cut.gates * cut.share, cut.units)
    w = jnp.pad(w, ((0, 0), (0, cut.rows - cut.gates * cut.share), (0, 0)))
    w = w.reshape(cut.blocks, 1, cut.warpgroups * cut.rows, cut.units)
    if cut.pieces == 1:
        return w
    # Not by conversion there and back, which XLA may leave out.
    high = lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([high, w - high], axis=1).astype(jnp.bfloat16)


def tiled(cut: Cut, a: jax.Array) -> jax.Array:
    """``(…, N, H)`` as ``(…, tiles, units, width)``, padded with zeros."""
    *lead, _, _ = a.shape
    more = ((0, cut.tiles * cut.width - cut.sequences), (0, cut.units - cut.hidden))
    a = jnp.pad(a, (*((0, 0) for _ in lead), *more))
    return jnp.swapaxes(a.reshape(*lead, cut.tiles, cut.width, cut.units), -1, -2)


def untiled(cut: Cut, a: jax.Array) -> jax.Array:
    """The inverse of `tiled`."""
    *lead, _, _, _ = a.shape
    a = jnp.swapaxes(a, -1, -2).reshape(*lead, cut.tiles * cut.width, cut.units)
    return a[..., : cut.sequences, : cut.hidden]


def split(cut: Cut, a: jax.Array, parts: int) -> jax.Array:
    """``(T, N, P*H)`` as ``(T, tiles, P, units, width)``."""
    a = a.reshape(*a.shape[:2], parts, cut.hidden)
    return jnp.moveaxis(tiled(cut, jnp.moveaxis(a, 2, 0)), 0, 2)


def vector(cut: Cut, a: jax.Array) -> jax.Array:
    """``(H,)`` as ``(units, width)``: like everything else that the gates see."""
    return jnp.broadcast_to(jnp.pad(a, (0, cut.units - cut.hidden))[:, None], (cut.units, cut.width))


def flags(cut: Cut, steps: Steps) -> dict[str, jax.Array]:
    """``(T, N)`` booleans as ``(T, tiles, share, width)`` floats, the same for all units."""

    def lay(flag: jax.Array) -> jax.Array:
        flag = jnp.pad(flag, ((0, 0), (0, cut.tiles * cut.width - cut.sequences)))
        flag = flag.reshape(flag.shape[0], cut.tiles, 1, cut.width).astype(jnp.float32)
        return jnp.broadcast_to(flag, (*flag.shape[:2], cut.share, cut.width))

    return {name: lay(f) for name, f in (("valid", steps.valid), ("resets", steps.resets)) if f is not None}
