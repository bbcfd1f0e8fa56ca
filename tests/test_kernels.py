"""The persistent kernels: equal to the reference in values and gradients, and refused by name where they cannot run.

Here they run in Pallas' interpreters and are lowered for the devices they are meant for; ``pytest -m gpu`` runs them.
"""

import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import schedules
from jrnn.cells.base import compute_params
from jrnn.schedules import kernels, reference
from tests.cases import Leaky, StepOnly


class Odd(jrnn.AffineCell):
    """A user's cell: two fields, a vector of its own, a gate that needs v apart, and functions that few cells use."""

    gate_names: ClassVar[tuple[str, ...]] = ("a", "b")
    state_type: ClassVar[Any] = jrnn.LSTMState

    def init_theta(self, key):
        return {"s": jnp.ones(self.hidden)}

    def gates(self, theta, u, v, state):
        a = jax.nn.softplus(u[0] + v[0]) - jnp.expm1(-jnp.abs(state.c))
        c = jnp.sqrt(1 + a * a) * jnp.where(u[1] > 0, 0.3, -0.2) + jax.nn.relu(theta["s"] * v[1])
        return jrnn.LSTMState(jnp.tanh(c) + 0.1 * jax.nn.gelu(state.h), jnp.clip(c, -1.5, 1.5))


CELLS = {
    "elman": jrnn.elman(5), "lstm": jrnn.lstm(5), "gru": jrnn.gru(5), "peephole_lstm": jrnn.peephole_lstm(5),
    "coupled_lstm": jrnn.coupled_lstm(5), "mgu": jrnn.mgu(5), "leaky": Leaky(5), "odd": Odd(5),
}  # fmt: skip
# Float32 factors keep about 16 bits in the kernels for Hopper.
TOLERANCE = {"hopper": 1e-4, "tpu": 1e-5}


def row(device, interpret=True):
    target = kernels.Target(device, interpret)
    serves, run = (functools.partial(f, target=target) for f in (kernels.serves, kernels.run))
    return schedules.Schedule(serves, run, automatic=False)


@pytest.fixture(autouse=True, scope="module")
def rows():
    """The kernels as schedules by the names of their devices: interpreted, and as they would be compiled."""
    added = {device: row(device) for device in TOLERANCE}
    added |= {f"{device}_compiled": row(device, interpret=False) for device in TOLERANCE}
    schedules.SCHEDULES.update(added)
    yield
    for name in added:
        del schedules.SCHEDULES[name]


def trial(cell, time=3, count=3, features=2, seed=0, dtype=jnp.float32):
    """Parameters and a state without zeros, inputs, a mask with holes, resets anywhere."""
    keys = iter(jax.random.split(jax.random.key(seed), 20))

    def noisy(tree):
        return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape, a.dtype), tree)

    params = noisy(cell.init(next(keys), features))
    xs = jax.random.normal(next(keys), (time, count, features), dtype)
    mask, resets = (jax.random.bernoulli(next(keys), p, (time, count)) for p in (0.7, 0.3))
    return (params, xs, noisy(cell.initial_state(params, (count,)))), {"mask": mask, "resets": resets}


def outcome(cell, backend, args, **options):
    """What `jrnn.unroll` returns, and the gradients of a function of all of it by everything that has one."""

    def loss(params, xs, state):
        out = jrnn.unroll(cell, params, xs, state, backend=backend, **options)
        return sum(jnp.sin((1 + i) * a.astype(jnp.float32)).sum() for i, a in enumerate(jax.tree.leaves(out))), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)
    return out, gradients


def assert_close(got, expected, tolerance):
    def close(path, a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = max(1.0, float(jnp.abs(b).max())) if b.size else 1.0
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance * scale, rtol=0, err_msg=str(path)
        )

    jax.tree_util.tree_map_with_path(close, got, expected)


# The steps are the same for all devices: a few cells show that another one is given the right things.
PAIRS = [("hopper", name) for name in CELLS] + [("tpu", name) for name in ("lstm", "odd")]


@pytest.mark.parametrize(("device", "name"), PAIRS)
def test_equal_the_reference_in_values_and_gradients(device, name):
    args, options = trial(CELLS[name])
    options["reverse"] = list(CELLS).index(name) % 2 == 1
    got, expected = (outcome(CELLS[name], backend, args, **options) for backend in (device, "reference"))
    assert_close(got, expected, TOLERANCE[device])


@pytest.mark.parametrize("device", TOLERANCE)
def test_several_tiles_of_sequences_and_of_units(device):
    cell = jrnn.elman(130 if device == "tpu" else 70)
    args, _ = trial(cell, time=2, count=17)
    got, expected = (outcome(cell, backend, args) for backend in (device, "reference"))
    assert_close(got, expected, TOLERANCE[device])


@pytest.mark.parametrize(
    ("device", "dtype"), [("hopper", jnp.bfloat16), ("hopper", jnp.float16), ("tpu", jnp.bfloat16)]
)
def test_16_bit_inputs_keep_float32_sums_and_state(device, dtype):
    cell = jrnn.mgu(4)
    args, _ = trial(cell, time=2, dtype=dtype)
    got, expected = (outcome(cell, backend, args) for backend in (device, "hoisted"))
    assert_close(got, expected, 3 * float(jnp.finfo(dtype).eps))


# What follows turns on what is around the kernels, the same for all devices: the faster interpreter will do.
@pytest.mark.parametrize("backend", ["tpu"])
def test_vmap_over_inputs_or_weights_equals_a_loop(backend):
    cell = jrnn.gru(3)
    (params, xs, _), _ = trial(cell, time=3, count=4)
    xs = xs.reshape(3, 2, 2, 2)
    several = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)

    @jax.jit
    def gradients(params, xs):
        def loss(params, xs):
            last, ys = jrnn.unroll(cell, params, xs, backend=backend)
            return jnp.sin(ys).sum() + jnp.cos(last.h).sum()

        return jax.grad(loss, argnums=(0, 1))(params, xs)

    for axes in ((None, 1), (0, None)):
        got = jax.jit(jax.vmap(gradients, axes))(several if axes[0] == 0 else params, xs)
        weights = [jax.tree.map(operator.itemgetter(i), several) if axes[0] == 0 else params for i in range(2)]
        loop = [gradients(weights[i], xs[:, i] if axes[1] else xs) for i in range(2)]
        assert_close(got, jax.tree.map(lambda *parts: jnp.stack(parts), *loop), 1e-5)


@pytest.mark.parametrize("backend", ["tpu"])
def test_derivatives_of_gradients_are_right_and_jvp_is_refused(backend):
    cell = jrnn.gru(3)
    (params, xs, state), options = trial(cell, time=2, count=2)

    def norm(backend, params):
        def loss(params):
            return jnp.sin(jrnn.unroll(cell, params, xs, state, backend=backend, **options)[1]).sum()

        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(params)))

    got, expected = (jax.jit(jax.grad(functools.partial(norm, b)))(params) for b in (backend, "reference"))
    assert_close(got, expected, 1e-5)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(lambda params: jrnn.unroll(cell, params, xs, backend=backend)[1], (params,), (params,))


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
    got, expected = (jrnn.unroll(cell, params, xs[:, 0], backend=b) for b in (backend, "reference"))
    assert_close(got, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of sequences that are padding themselves
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


REFUSALS = {
    "no_device": ("kernel", jrnn.lstm(4), {}, "needs a Hopper GPU or a TPU, and this process computes on cpu"),
    "own_step": ("hopper", StepOnly(0.5), {}, "this cell has its own step"),
    "two_products": ("hopper", jrnn.gru(4, "before"), {}, "this cell has its own step"),
    "random": ("hopper", jrnn.zoneout(jrnn.lstm(4), h=0.1), {"key": jax.random.key(0)}, "has no randomness"),
    "across_units": ("hopper", Across(4), {}, "not elementwise"),
    "operation": ("hopper", Beyond(4), {}, "lacks: .*sinh"),
    "shared_memory": (
        "hopper", jrnn.lstm(192), {}, "4 gates of 192 units .* float32 need 689152 bytes .* has 232448",
    ),
    "warpgroups": ("hopper", jrnn.elman(600), {}, "600 units .* need 10 warpgroups, and a block has at most 8"),
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
    params = cell.init(jax.random.key(0), 3)
    with jax.default_matmul_precision("highest"), pytest.raises(ValueError, match="more than the 16 bits"):
        jrnn.unroll(cell, params, jnp.ones((2, 3), jnp.float32), backend="hopper")


LOWERED = {"gru": jrnn.gru(50), "elman": jrnn.elman(200), "odd": Odd(64)}


@pytest.mark.parametrize("device", TOLERANCE)
@pytest.mark.parametrize("name", LOWERED)
def test_lower_for_their_devices_without_one(name, device):
    cell = LOWERED[name]
    args, options = trial(cell, count=18, dtype=jnp.bfloat16 if name == "elman" else jnp.float32)
    step = jax.jit(functools.partial(outcome, cell, f"{device}_compiled", **options))
    text = step.trace(args).lower(lowering_platforms=("cuda" if device == "hopper" else "tpu",)).as_text()
    assert text.count("@mosaic_gpu" if device == "hopper" else "@tpu_custom_call") == 2


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
    assert tested == kernels.OPERATIONS


# --- on a GPU ----------------------------------------------------------------------------------------------------


def assert_as_exact_as_hoisted(cell, backend, dtype, time, count, features=64, **options):
    """The error against float32 throughout, from equal numbers, is at most a few times that of the hoisted schedule.

    What float32 is allowed beyond that are the 16 bits of each factor that a kernel takes.
    """
    args, flags = trial(cell, time, count, features, dtype=dtype)
    options = {**flags, **options}
    with jax.default_matmul_precision("highest"):
        rounded = jax.tree.map(lambda a: a.astype(jnp.float32), (compute_params(args[0], dtype), *args[1:]))
        exact = outcome(cell, "reference", rounded, **options)

    def error(backend):
        def worst(a, b):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return float(jnp.abs(a - b).max() / jnp.maximum(1, jnp.abs(b).max()))

        return max(jax.tree.leaves(jax.tree.map(worst, outcome(cell, backend, args, **options), exact)))

    allowed = 4 * error("hoisted") + (1e-3 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps))
    assert error(backend) <= allowed


ON_GPU = {
    "elman": (jrnn.elman(256), jnp.bfloat16), "lstm": (jrnn.lstm(128), jnp.bfloat16),
    "lstm_float16": (jrnn.lstm(128), jnp.float16), "lstm_float32": (jrnn.lstm(64), jnp.float32),
    "gru": (jrnn.gru(128), jnp.bfloat16), "gru_float32": (jrnn.gru(64), jnp.float32),
    "peephole_lstm": (jrnn.peephole_lstm(100), jnp.bfloat16), "coupled_lstm": (jrnn.coupled_lstm(128), jnp.bfloat16),
    "mgu": (jrnn.mgu(192), jnp.bfloat16), "odd": (Odd(120), jnp.bfloat16), "odd_float32": (Odd(50), jnp.float32),
}  # fmt: skip


@pytest.fixture
def hopper():
    if kernels.present() != kernels.Target("hopper"):
        pytest.skip(f"needs a Hopper GPU, and JAX found {kernels.describe(kernels.default_device())}")


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_as_exact_as_hoisted(name, reverse, hopper):
    cell, dtype = ON_GPU[name]
    assert_as_exact_as_hoisted(cell, "kernel", dtype, time=128, count=40, reverse=reverse)


@pytest.mark.gpu
@pytest.mark.parametrize(("time", "count"), [(1024, 16), (16, 3000), (1, 1)])
def test_on_a_gpu_for_long_sequences_and_large_batches(time, count, hopper):
    assert_as_exact_as_hoisted(jrnn.gru(96), "kernel", jnp.bfloat16, time, count)


@pytest.mark.gpu
def test_on_a_gpu_twice_is_the_same_bit_for_bit(hopper):
    cell = jrnn.lstm(128)
    args, options = trial(cell, time=512, count=64, features=32, dtype=jnp.bfloat16)
    first, second = (outcome(cell, "kernel", args, **options) for _ in range(2))
    assert all(map(jnp.array_equal, jax.tree.leaves(first[0]), jax.tree.leaves(second[0])))


# --- rows that are not chosen ------------------------------------------------------------------------------------


def test_a_schedule_that_is_not_automatic_runs_only_where_asked_for(monkeypatch):
    def refuse(cell, params, xs, steps):
        return False, "never"

    row = schedules.Schedule(lambda *_: (True, "could"), reference.run, automatic=False)
    table = {"asked": row, "silent": row._replace(serves=refuse), **schedules.SCHEDULES}
    monkeypatch.setattr(schedules, "SCHEDULES", table)
    cell = jrnn.gru(2)
    params, xs, steps = cell.init(jax.random.key(0), 3), jnp.ones((4, 1, 3)), schedules.Steps()
    name, reason = schedules.choose(cell, params, xs, steps)
    assert name == "hoisted"
    assert "asked would serve, but runs only where asked for by name: could" in reason
    assert "silent" not in reason
    assert schedules.choose(cell, params, xs, steps, "asked") == ("asked", "could")
