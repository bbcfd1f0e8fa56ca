"""The persistent kernels: equal to the reference in values and gradients, and refused by name where they cannot run.

Here they run in Pallas' interpreters and are lowered for the devices they are meant for; ``pytest -m gpu`` runs them.
An interpreted kernel takes seconds to compile, once for every warpgroup if there are several: few tests, of few units.
"""

import dataclasses
import functools
import operator
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import jrnn
from jrnn import _interpret, schedules
from jrnn.cells.base import compute_params
from jrnn.experimental import kernels
from jrnn.experimental.kernels.plan import Chip, choose
from jrnn.jaxprs.primitives import TABLE
from jrnn.schedules import reference
from tests.cases import StepOnly


class Odd(jrnn.AffineCell):
    """A user's cell: two fields, a vector of its own, a gate that needs v apart, and functions that few cells use."""

    gate_names: ClassVar[tuple[str, ...]] = ("a", "b")
    state_type: ClassVar[Any] = jrnn.LSTMState

    def init_theta(self, key):
        return {"s": jnp.ones(self.hidden)}

    def gates(self, theta, u, v, state):
        a = jax.nn.softplus(u[0] + v[0]) - jnp.expm1(-jnp.abs(state.c))
        c = jnp.sqrt(1 + a * a) * jnp.where(u[1] > 0, 0.3, -0.2) + jax.nn.relu(theta["s"] * v[1])
        return jrnn.LSTMState(jax.checkpoint(jnp.tanh)(c) + 0.1 * jax.nn.gelu(state.h), jnp.clip(c, -1.5, 1.5))


CELLS = {
    "elman": jrnn.elman(5), "lstm": jrnn.lstm(5), "gru": jrnn.gru(5), "peephole_lstm": jrnn.peephole_lstm(5),
    "coupled_lstm": jrnn.coupled_lstm(5), "odd": Odd(5),
}  # fmt: skip
# Float32 factors keep about 16 bits in the kernels for Hopper.
TOLERANCE = {"hopper": 1e-4, "tpu": 1e-5}


# GPUs on which little is shared by several blocks: see `CHOSEN`.
SMALL = {"cluster": Chip(132, 94_000), "grid": Chip(3, 15_000), "parts": Chip(3, 57_000)}


def row(device, interpret=True, chip=None):
    target = kernels.Target(device, interpret, chip or Chip())
    return schedules.Schedule(functools.partial(kernels.plan, target=target), automatic=False)


# The kernels as schedules by the names of their devices: interpreted, and as they would be compiled.
ROWS = {
    **{device: row(device) for device in TOLERANCE},
    **{f"{device}_compiled": row(device, interpret=False) for device in TOLERANCE},
    **{name: row("hopper", chip=chip) for name, chip in SMALL.items()},
}


@pytest.fixture(autouse=True, scope="module")
def rows(request):
    schedules.SCHEDULES.update(ROWS)
    # Here compiling takes longer than running, but not on a GPU.
    jax.config.update("jax_disable_most_optimizations", request.config.option.markexpr != "gpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    for name in ROWS:
        del schedules.SCHEDULES[name]


def trial(cell, time=3, count=3, features=2, seed=0, dtype=jnp.float32):
    """Parameters and a state without zeros, inputs, a mask with holes, resets anywhere but in the first sequence."""
    keys = iter(jax.random.split(jax.random.key(seed), 20))

    def noisy(tree):
        return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape, a.dtype), tree)

    params = noisy(cell.init(next(keys), features))
    xs = jax.random.normal(next(keys), (time, count, features), dtype)
    mask, resets = (jax.random.bernoulli(next(keys), p, (time, count)) for p in (0.7, 0.3))
    whole = jnp.arange(count) == 0  # or a few steps might all start anew, and use no recurrent weight
    flags = {"mask": mask | whole, "resets": resets & ~whole}
    return (params, xs, noisy(cell.initial_state(params, (count,)))), flags


def gradients(cell, backend, **options):
    """The gradients of a function of all that `jrnn.unroll` returns by everything that has one, and what it returns."""

    def loss(params, xs, state):
        out = jrnn.unroll(cell, params, xs, state, backend=backend, **options)
        return sum(jnp.sin((1 + i) * a.astype(jnp.float32)).sum() for i, a in enumerate(jax.tree.leaves(out))), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def outcome(cell, backend, args, **options):
    run = gradients(cell, backend, **options)
    grads, out = _interpret.call(run, *args) if backend == "reference" else jax.jit(run)(*args)
    return out, grads


def assert_close(got, expected, tolerance):
    def close(path, a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = max(1.0, float(jnp.abs(b).max())) if b.size else 1.0
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance * scale, rtol=0, err_msg=str(path)
        )

    jax.tree_util.tree_map_with_path(close, got, expected)


# The steps are the same for all devices: each cell is given the right things by one of them, and a few by both; what
# the minimal gated unit is given is tested in 16 bits.
PAIRS = [("hopper", name) for name in CELLS] + [
    ("tpu", name) for name in ("lstm", "peephole_lstm", "coupled_lstm", "odd")
]

QUICK = (("hopper", "lstm"), ("tpu", "lstm"))  # the interpreters take seconds for each


@pytest.mark.parametrize(
    ("device", "name"), [pytest.param(*pair, marks=[pytest.mark.nightly] * (pair not in QUICK)) for pair in PAIRS]
)
def test_equal_the_reference_in_values_and_gradients(device, name):
    args, options = trial(CELLS[name])
    options["reverse"] = list(CELLS).index(name) % 2 == 1
    got, expected = (outcome(CELLS[name], backend, args, **options) for backend in (device, "reference"))
    assert_close(got, expected, TOLERANCE[device])


@pytest.mark.nightly
@pytest.mark.parametrize(("device", "hidden", "count"), [("hopper", 5, 17), ("tpu", 130, 3), ("tpu", 5, 17)])
def test_several_tiles_of_sequences_and_of_units(device, hidden, count):
    cell = jrnn.elman(hidden)
    args, _ = trial(cell, time=2, count=count)
    got, expected = (outcome(cell, backend, args) for backend in (device, "reference"))
    assert_close(got, expected, TOLERANCE[device])


# Several warpgroups in one block; in a cluster; in a grid that takes two tiles one after the other, each in parts; in
# one with as many parts as tiles of units.
SHARED = {
    "hopper": (jrnn.elman(70), 2, jnp.float32),
    "cluster": (jrnn.mgu(72), 2, jnp.float32),
    "grid": (jrnn.gru(40), 18, jnp.bfloat16),
    "parts": (jrnn.elman(150), 2, jnp.float32),
}


def shared(name):
    schedules.SCHEDULES.update(ROWS)
    cell, count, dtype = SHARED[name]
    args, options = trial(cell, time=3, count=count, dtype=dtype)
    other, tolerance = ("reference", 1e-4) if dtype == jnp.float32 else ("hoisted", 3 * float(jnp.finfo(dtype).eps))
    got, expected = (outcome(cell, backend, args, **options) for backend in (name, other))
    assert_close(got, expected, tolerance)
    assert all(jnp.abs(g).max() > 0.1 for g in jax.tree.leaves(expected[1][0]))


@pytest.mark.nightly
@pytest.mark.parametrize("name", SHARED)
def test_warpgroups_and_blocks_that_share_the_weights_equal_the_reference(name):
    if name != "hopper" and not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter of this JAX does not know the barriers of a cluster")
    # Each warpgroup is a thread here, and those that wait for each other must not wait for a processor: one that JAX
    # dispatched to its pool would (jax #25861), so they run in a process without.
    settings = {
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict", "NPROC": "32",
    }  # fmt: skip
    command = [sys.executable, "-c", f"from tests.experimental.test_kernels import shared; shared({name!r})"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


# (hidden, sequences, gates, pieces, GPU), and then blocks, warpgroups, width, rounds and parts, if any.
CHOSEN = {
    "block": ((128, 64, 4, 1, Chip()), (1, 8, 16, 1, 1), "take 197632 of the 232448 bytes .* of one block"),
    "wide": ((32, 2113, 1, 1, Chip()), (1, 1, 32, 1, 1), "of one block"),
    "cluster": ((384, 64, 4, 1, Chip()), (8, 3, 16, 1, 1), "take 209920 of .* of each block of a cluster of 8"),
    "grid": ((768, 64, 4, 1, Chip()), (48, 1, 16, 2, 1), "take 201728 of .* of each of 48 blocks"),
    "parts": ((1024, 16, 4, 1, Chip()), (64, 1, 16, 1, 3), "of each of 64 blocks"),
    "most_parts": ((768, 16, 4, 2, Chip()), (48, 1, 16, 1, 16), "take 226304 of .* of each of 48 blocks"),
    "small_cluster": ((72, 2, 2, 2, SMALL["cluster"]), (2, 2, 16, 1, 1), "of each block of a cluster of 2"),
    "small_grid": ((40, 18, 3, 1, SMALL["grid"]), (3, 1, 16, 2, 3), "of each of 3 blocks"),
    "small_parts": ((150, 2, 1, 2, SMALL["parts"]), (3, 1, 16, 1, 12), "of each of 3 blocks"),
    "memory": ((1024, 16, 4, 2, Chip()), None, "need 300032 bytes .* in each of 64 blocks, and a block has 232448"),
    "blocks": ((768, 16, 4, 1, Chip(40)), None, "need 48 blocks, and 40 run at once"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_as_few_blocks_share_the_weights_as_have_room_for_them(name):
    arguments, expected, reason = CHOSEN[name]
    cut, said = choose(*arguments)
    assert re.search(reason, said)
    assert (cut and (cut.blocks, cut.warpgroups, cut.width, cut.rounds, cut.parts)) == expected
    if cut is not None:
        assert cut.hidden <= cut.units
        assert cut.groups * cut.blocks <= cut.chip.blocks or not cut.grid
        assert cut.tiles * cut.width >= cut.sequences


@pytest.mark.parametrize(
    ("device", "dtype"), [("hopper", jnp.bfloat16), ("hopper", jnp.float16), ("tpu", jnp.bfloat16)]
)
def test_16_bit_inputs_keep_float32_sums_and_state(device, dtype):
    cell = jrnn.mgu(4)
    args, _ = trial(cell, time=2, dtype=dtype)
    got, expected = (outcome(cell, backend, args) for backend in (device, "hoisted"))
    assert_close(got, expected, 3 * float(jnp.finfo(dtype).eps))


# What follows turns on what is around the kernels, the same for all devices: the faster interpreter will do.
@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["tpu"])
def test_vmap_over_inputs_or_weights_equals_a_loop(backend):
    cell = jrnn.elman(3)
    (params, xs, _), _ = trial(cell, time=2, count=4)
    xs = xs.reshape(2, 2, 2, 2)
    several = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)

    def gradients(backend, params, xs):
        def loss(params, xs):
            last, ys = jrnn.unroll(cell, params, xs, backend=backend)
            return jnp.sin(ys).sum() + jnp.cos(last.h).sum()

        return jax.grad(loss, argnums=(0, 1))(params, xs)

    def both(params, several, xs):
        one = functools.partial(gradients, backend)
        return jax.vmap(one, (None, 1))(params, xs), jax.vmap(one, (0, None))(several, xs)

    reference = functools.partial(_interpret.call, functools.partial(gradients, "reference"))
    loops = (
        [reference(params, xs[:, i]) for i in range(2)],
        [reference(jax.tree.map(operator.itemgetter(i), several), xs) for i in range(2)],
    )
    for got, loop in zip(jax.jit(both)(params, several, xs), loops, strict=True):
        assert_close(got, jax.tree.map(lambda *parts: jnp.stack(parts), *loop), 1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["tpu"])
def test_derivatives_of_gradients_are_right_and_jvp_is_refused(backend):
    cell = jrnn.elman(3)
    (params, xs, state), options = trial(cell, time=2, count=2)

    def norm(backend, params):
        def loss(params):
            return jnp.sin(jrnn.unroll(cell, params, xs, state, backend=backend, **options)[1]).sum()

        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(params)))

    got = jax.jit(jax.grad(functools.partial(norm, backend)))(params)
    assert_close(got, _interpret.call(jax.grad(functools.partial(norm, "reference")), params), 1e-5)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(lambda params: jrnn.unroll(cell, params, xs, backend=backend)[1], (params,), (params,))


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["tpu"])
def test_chunks_that_are_made_again_and_nothing_to_run(backend):
    cell = jrnn.elman(3)
    args, options = trial(cell, time=5)
    expected = outcome(cell, "reference", args, **options)
    assert_close(outcome(cell, backend, args, remat=2, **options), expected, 1e-5)
    for time, count in ((0, 3), (4, 0)):
        args, _ = trial(cell, time=time, count=count)
        got, expected = (outcome(cell, backend, args) for backend in (backend, "reference"))
        assert_close(got, expected, 0)
    (params, xs, _), _ = trial(cell)
    alone = functools.partial(jrnn.unroll, cell)
    expected = _interpret.call(functools.partial(alone, backend="reference"), params, xs[:, 0])
    assert_close(jax.jit(functools.partial(alone, backend=backend))(params, xs[:, 0]), expected, 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of sequences that are padding themselves
@pytest.mark.nightly
@pytest.mark.parametrize("device", TOLERANCE)
def test_what_stands_in_the_padding_of_a_tile_reaches_nothing(device):
    class Root(jrnn.AffineCell):
        """Gates that are infinite, and their derivatives not numbers, where all they read is zero."""

        def gates(self, theta, u, v, state):
            return state._replace(h=0.1 * jax.lax.rsqrt(jnp.abs(u[0] + 0.1 * v[0])))

    cell = Root(3)
    (params, xs, state), _ = trial(cell, time=3)
    args = ({**params, "b": params["b"] + 3}, xs, state)
    got, expected = (outcome(cell, backend, args) for backend in (device, "reference"))
    assert_close(got, expected, TOLERANCE[device])


class Beyond(jrnn.AffineCell):
    def gates(self, theta, u, v, state):
        return state._replace(h=jnp.sinh(u[0] + v[0]))


class Across(jrnn.AffineCell):
    def gates(self, theta, u, v, state):
        return state._replace(h=jax.nn.softmax(u[0] + v[0]))


@jax.custom_vjp
def mixing(x):
    return jnp.tanh(x)


mixing.defvjp(lambda x: (jnp.tanh(x), None), lambda _, d: (jnp.broadcast_to(d.sum(-1, keepdims=True), d.shape),))


class AcrossBackwards(jrnn.AffineCell):
    def gates(self, theta, u, v, state):
        return state._replace(h=mixing(u[0] + v[0]))


REFUSALS = {
    "no_device": ("kernel", jrnn.lstm(4), {}, "needs a Hopper GPU or a TPU, and this process computes on cpu"),
    "own_step": ("hopper", StepOnly(0.5), {}, "this cell has its own step"),
    "two_products": ("hopper", jrnn.gru(4, "before"), {}, "this cell has its own step"),
    "random": ("hopper", jrnn.zoneout(jrnn.lstm(4), h=0.1), {"key": jax.random.key(0)}, "has no randomness"),
    "across_units": ("hopper", Across(4), {}, "not elementwise"),
    "across_units_backwards": ("hopper", AcrossBackwards(4), {}, "not elementwise"),
    "operation": ("hopper", Beyond(4), {}, "lacks: .*sinh"),
    "shared_memory": (
        "hopper", jrnn.lstm(1024), {}, "4 gates of 1024 units in float32 need 300032 bytes .* has 232448",
    ),
    "blocks": ("hopper", jrnn.lstm(3000), {}, "3000 units .* need 188 blocks, and 132 run at once"),
    "vmem": ("tpu", jrnn.lstm(1024), {}, "4 gates of 1024 units .* need .* bytes of VMEM, and a kernel has 16777216"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_run_is_refused_by_name(name):
    backend, cell, options, message = REFUSALS[name]
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run .*{message}"):
        jax.eval_shape(lambda p: jrnn.unroll(cell, p, jnp.ones((2, 2, 3)), backend=backend, **options), params)


def test_more_precision_than_the_kernels_have_is_refused(x64):
    cell = jrnn.lstm(4)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), cell.init(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="this run is in float64"):
        jrnn.unroll(cell, params, jnp.ones((2, 3)), backend="hopper")


# What may be asked of float32 products: little enough for both devices, for a GPU, for neither.
PRECISIONS = {
    **dict.fromkeys((None, "default", "bfloat16", "BF16_BF16_BF16", "BF16_BF16_F32"), ("hopper", "tpu")),
    **dict.fromkeys(("high", "tensorfloat32", "BF16_BF16_F32_X3", "TF32_TF32_F32", "F16_F16_F32"), ("hopper",)),
    **dict.fromkeys(("highest", "float32", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "TF32_TF32_F32_X3"), ()),
    **dict.fromkeys(("F32_F32_F32", "F64_F64_F64"), ()),
}


def task_of(cell, params, xs):
    return schedules.Task.of(cell, params, xs, cell.initial_state(params, xs.shape[1:-1]), schedules.Steps())


@pytest.mark.parametrize("device", TOLERANCE)
@pytest.mark.parametrize("asked", PRECISIONS)
def test_more_precision_than_the_kernels_keep_of_float32_is_refused(asked, device):
    cell = jrnn.lstm(4)
    target = kernels.Target(device)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 3))
    with jax.default_matmul_precision(asked):
        for dtype, expected in ((jnp.float32, device in PRECISIONS[asked]), (jnp.bfloat16, True)):
            xs = jax.ShapeDtypeStruct((2, 1, 3), dtype)
            found = kernels.plan(jax.eval_shape(functools.partial(task_of, cell), params, xs), target)
            assert isinstance(found, schedules.Plan) == expected
            assert expected or f"asks for {asked}, and a kernel keeps" in found.reason


# In one block, in a cluster and in a grid that receives in parts, with little shared memory to spare; and the grids of
# the size that is timed first.
LOWERED = {
    "block": ("hopper", jrnn.gru(50), jnp.float32), "cluster": ("hopper", jrnn.lstm(384), jnp.float16),
    "grid": ("hopper", Odd(1500), jnp.bfloat16), "lstm_768": ("hopper", jrnn.lstm(768), jnp.bfloat16),
    "lstm_768_float32": ("hopper", jrnn.lstm(768), jnp.float32), "gru": ("tpu", jrnn.gru(50), jnp.float32),
    "odd": ("tpu", Odd(64), jnp.bfloat16),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOWERED)
def test_lower_for_their_devices_without_one(name):
    device, cell, dtype = LOWERED[name]
    args, options = jax.eval_shape(functools.partial(trial, cell, count=18, dtype=dtype))
    step = jax.jit(lambda args, options: outcome(cell, f"{device}_compiled", args, **options))
    text = step.trace(args, options).lower(lowering_platforms=("cuda" if device == "hopper" else "tpu",)).as_text()
    assert text.count("@mosaic_gpu" if device == "hopper" else "@tpu_custom_call") == 2


@pytest.mark.nightly
def test_every_operation_that_is_let_through_lowers_for_cuda():
    one = {
        "abs": jnp.abs, "cos": jnp.cos, "exp": jnp.exp, "exp2": jnp.exp2, "log": jnp.log,
        "logistic": jax.nn.sigmoid, "neg": jnp.negative, "rsqrt": jax.lax.rsqrt, "sign": jnp.sign, "sin": jnp.sin,
        "square": jnp.square, "tanh": jnp.tanh, "clamp": lambda x: jnp.clip(x, -1, 1),
    }  # fmt: skip
    two = {name: getattr(jax.lax, name) for name in ("add", "div", "max", "min", "mul", "sub")}
    flags = {name: getattr(jax.lax, name) for name in ("eq", "ge", "gt", "le", "lt", "ne")}
    bits = {name: getattr(jnp, f"logical_{name}") for name in ("and", "or", "xor")}

    class All(jrnn.AffineCell):
        def gates(self, theta, u, v, state):
            x, h = u[0] + v[0], state.h
            for f in one.values():
                h = h + f(x)
            for f in two.values():
                h = h + f(x, state.h) ** 3
            for f in flags.values():
                h = jnp.where(f(x, h), h, x)
            for f in bits.values():
                h = jnp.where(f(x > 0, h > 0), h, x)
            return state._replace(h=h)

    cell = All(64)
    args, _ = trial(cell)
    step = jax.jit(functools.partial(outcome, cell, "hopper_compiled"))
    assert step.trace(args).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2
    tested = {*one, *two, *flags, *bits, "broadcast_in_dim", "convert_element_type", "select_n"}
    assert tested == {row.name for row in TABLE.values() if row.pallas is True}


# --- on a GPU ----------------------------------------------------------------------------------------------------


def assert_as_exact_as_hoisted(cell, backend, dtype, time, count, features=64, **options):
    """The error against float32 throughout, from equal numbers, is at most a few times that of the hoisted schedule.

    What float32 is allowed beyond that are the 16 bits of each factor that a kernel takes.
    """
    args, flags = jax.jit(functools.partial(trial, cell, time, count, features, dtype=dtype))()
    options = {**flags, **options}
    with jax.default_matmul_precision("highest"):
        rounded = jax.tree.map(lambda a: a.astype(jnp.float32), (compute_params(args[0], dtype), *args[1:]))
        # Compiled: what costs nothing on tiny arrays would take minutes of a processor here.
        grads, out = jax.jit(gradients(cell, "reference", **options))(*rounded)
        exact = (out, grads)

    def error(backend):
        def worst(a, b):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return float(jnp.abs(a - b).max() / jnp.maximum(1, jnp.abs(b).max()))

        return max(jax.tree.leaves(jax.tree.map(worst, outcome(cell, backend, args, **options), exact)))

    allowed = 4 * error("hoisted") + (1e-3 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps))
    assert error(backend) <= allowed


@pytest.mark.nightly
def test_what_kernels_are_held_against_on_a_gpu_tells_right_from_wrong(monkeypatch):
    def run(options, task):
        params = {**task.params, "b": task.params["b"] + 0.1}
        return reference.run(options, dataclasses.replace(task, params=params))

    wrong = schedules.Schedule(lambda _: schedules.Plan(run, "could"), automatic=False)
    monkeypatch.setitem(schedules.SCHEDULES, "wrong", wrong)
    held = functools.partial(assert_as_exact_as_hoisted, jrnn.elman(3), time=2, count=2, features=2)
    held("reference", jnp.bfloat16)
    with pytest.raises(AssertionError):
        held("wrong", jnp.float32)


# What is timed first is tested first.
ON_GPU = {
    "grid": (jrnn.lstm(768), jnp.bfloat16), "grid_float16": (jrnn.lstm(768), jnp.float16),
    "grid_float32": (jrnn.lstm(768), jnp.float32), "grid_gru": (jrnn.gru(768), jnp.bfloat16),
    "elman": (jrnn.elman(256), jnp.bfloat16), "lstm": (jrnn.lstm(128), jnp.bfloat16),
    "lstm_float16": (jrnn.lstm(128), jnp.float16), "lstm_float32": (jrnn.lstm(64), jnp.float32),
    "gru": (jrnn.gru(128), jnp.bfloat16), "gru_float32": (jrnn.gru(64), jnp.float32),
    "peephole_lstm": (jrnn.peephole_lstm(100), jnp.bfloat16), "coupled_lstm": (jrnn.coupled_lstm(128), jnp.bfloat16),
    "mgu": (jrnn.mgu(192), jnp.bfloat16), "odd": (Odd(120), jnp.bfloat16), "odd_float32": (Odd(50), jnp.float32),
    "cluster_of_2": (jrnn.gru(160), jnp.bfloat16), "cluster_of_4": (jrnn.lstm(256), jnp.bfloat16),
    "cluster_of_8": (jrnn.lstm(384), jnp.float16), "cluster_float32": (jrnn.lstm(256), jnp.float32),
    "grid_in_parts": (jrnn.lstm(1024), jnp.bfloat16), "grid_gru_float32": (jrnn.gru(512), jnp.float32),
}  # fmt: skip


@pytest.fixture
def hopper():
    if (kernels.present() or kernels.Target("")).device != "hopper":
        pytest.skip(f"needs a Hopper GPU, and JAX found {kernels.describe(kernels.default_device())}")


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_as_exact_as_hoisted(name, reverse, hopper):
    cell, dtype = ON_GPU[name]
    assert_as_exact_as_hoisted(cell, "kernel", dtype, time=128, count=40, reverse=reverse)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [96, 256, 512], ids=["block", "cluster", "grid"])
@pytest.mark.parametrize(("time", "count"), [(1024, 16), (16, 3000), (1, 1)])
def test_on_a_gpu_for_long_sequences_and_large_batches(time, count, hidden, hopper):
    assert_as_exact_as_hoisted(jrnn.gru(hidden), "kernel", jnp.bfloat16, time, count)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 256, 768], ids=["block", "cluster", "grid"])
def test_on_a_gpu_twice_is_the_same_bit_for_bit(hidden, hopper):
    cell = jrnn.lstm(hidden)
    args, options = jax.jit(functools.partial(trial, cell, 512, 64, 32, dtype=jnp.bfloat16))()
    run = jax.jit(gradients(cell, "kernel", **options))
    # Of the gradients those that no other product made: XLA's own sums may come in any order.
    first, second = (jax.tree.leaves((out, grads[2])) for grads, out in (run(*args), run(*args)))
    assert all(map(jnp.array_equal, first, second))


# --- rows that are not chosen ------------------------------------------------------------------------------------


def test_a_schedule_that_is_not_automatic_runs_only_where_asked_for(monkeypatch):
    row = schedules.Schedule(lambda _: schedules.Plan(reference.run, "could"), automatic=False)
    silent = schedules.Schedule(lambda _: schedules.Refusal("never"), automatic=False)
    monkeypatch.setattr(schedules, "SCHEDULES", {"asked": row, "silent": silent, **schedules.SCHEDULES})
    cell = jrnn.gru(2)
    task = task_of(cell, cell.init(jax.random.key(0), 3), jnp.ones((4, 1, 3)))
    name, plan = schedules.choose(task)
    assert name == "hoisted"
    assert "asked would serve, but runs only where asked for by name: could" in plan.reason
    assert "silent" not in plan.reason
    name, plan = schedules.choose(task, "asked")
    assert (name, plan.run, plan.reason) == ("asked", reference.run, "could")
