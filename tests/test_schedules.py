"""How the hoisted schedule lays out its loops: every layout obeys the laws, and the loops hold what they should."""

import contextlib
import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import _interpret, testing
from jrnn._core import products as core_products
from jrnn.run.unrolling import _unroll
from jrnn.schedules import affine, parts, plan, promises
from jrnn.schedules.layout import Rows, Units
from jrnn.schedules.steps import Steps
from tests.cases import CASES, Leaky, ProjectAndUpdate

LAYOUTS = {
    "units": affine.Limits(sequences=1, units=0, parts=10**9, backward=0, read=0, width=1, rows=(8, 8)),
    "units_in_parts": affine.Limits(sequences=1, units=0, parts=0, parts_sequences=2, backward=0, read=99),
    "units_forward": affine.Limits(sequences=1, units=0, parts=0, parts_sequences=2, read=0, width=1, rows=(4, 4)),
    "rows_kept": affine.Limits(sequences=10**9, read=0, width=1, rows=(16, 16)),
}
# Each cell in some layouts, each layout with most cells.
CELLS = {
    "lstm": LAYOUTS,
    "gru_after": LAYOUTS,
    "peephole_lstm": ("units", "rows_kept"),
    "leaky": ("units_in_parts", "units_forward"),
    "variational": ("units_in_parts", "rows_kept"),
    "zoneout": ("units", "units_forward"),
    "emits_all": ("units_in_parts", "units_forward"),
}
# What turns on the layout; the other laws are about what stands before it.
LAWS = (
    testing.check_step_equals_unroll,
    testing.check_padding,
    testing.check_resets,
    testing.check_reverse,
    testing.check_derivatives,
    testing.check_vmap,
    testing.check_remat,
    testing.check_zero_length,
    testing.check_state_dtype,
)


@contextlib.contextmanager
def limits(chosen):
    """Other limits, for programs that are traced anew."""
    usual = affine.LIMITS
    forget()
    affine.LIMITS = chosen
    try:
        yield
    finally:
        affine.LIMITS = usual
        forget()


def forget():
    """What was traced under other limits; not what was compiled of JAX's own operations."""
    for function in (_unroll, plan._run):
        function.clear_cache()
    _interpret._traced.cache_clear()


def test_other_limits_give_other_programs():
    """Or the laws below would run what was traced before."""
    cell, xs = jrnn.lstm(4), jnp.ones((5, 4, 3))
    params = cell.init(jax.random.key(0), 3)

    def program():
        bodies = loops(jax.make_jaxpr(lambda params, xs: jrnn.unroll(cell, params, xs))(params, xs).jaxpr)
        return [[eqn.primitive.name for eqn in body.eqns] for body in bodies]

    usual = program()
    for layout in LAYOUTS.values():
        with limits(layout):
            assert program() != usual
        assert program() == usual


@pytest.mark.usefixtures("quick_compilation")  # interpreted, but for single operations
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(
            case, layout, id=f"{case.name}-{layout}", marks=() if case.name == "gru_after" else pytest.mark.slow
        )
        for case in CASES
        for layout in CELLS.get(case.name, ())
    ],
)
@pytest.mark.sampled(3)
def test_laws_in_every_layout(case, layout):
    with limits(LAYOUTS[layout]):
        testing.check_cell(case.layer, case.in_features, dtype="float64", laws=LAWS)


def plan_of(cell, time, batch, features):
    params = jax.eval_shape(lambda key: cell.init(key, features), jax.random.key(0))
    state = jax.eval_shape(lambda params: cell.initial_state(params, batch), params)
    xs = jax.ShapeDtypeStruct((time, *batch, features), jnp.float32)
    return affine.choose_options(affine.Inputs(cell.form(params), xs, state, None), Steps())


@pytest.mark.smoke
def test_what_is_chosen():
    assert plan_of(jrnn.lstm(256), 100, (32,), 64).forward == Units(2)
    assert plan_of(jrnn.lstm(256), 100, (4, 8), 64).forward == Units(2)
    assert plan_of(jrnn.lstm(256), 100, (33,), 64).forward == Units(1)
    assert plan_of(jrnn.lstm(128), 100, (33,), 64).forward == Rows()
    assert plan_of(jrnn.lstm(256), 100, (), 64).forward == Rows()
    assert plan_of(jrnn.lstm(1024), 35, (32,), 64).backward == Units()
    assert plan_of(jrnn.lstm(256), 100, (32,), 64).backward == Rows()
    assert plan_of(jrnn.lstm(128), 128, (16,), 32).read
    assert not plan_of(jrnn.lstm(64), 128, (16,), 64).read


@pytest.mark.parametrize(("time", "count", "width"), [(100, 32, 1024), (35, 32, 4096), (1, 1, 4), (0, 3, 4), (7, 0, 4)])
def test_chunks_hold_all_steps(time, count, width):
    chunk = affine.choose_chunk(time, count, width)
    assert 1 <= chunk <= max(time, 1)


@dataclasses.dataclass(frozen=True, repr=False)
class Mixing(jrnn.AffineCell):
    """Units see each other."""

    def gates(self, theta, u, v, state):
        return state._replace(h=jnp.cumsum(jnp.tanh(u[0] + v[0]), -1))


@dataclasses.dataclass(frozen=True, repr=False)
class Normalised(jrnn.AffineCell):
    def gates(self, theta, u, v, state):
        z = u[0] + v[0]
        return state._replace(h=z - z.mean(-1, keepdims=True))


@dataclasses.dataclass(frozen=True, repr=False)
class Written(jrnn.AffineCell):
    """Elementwise, but a vector is made that stands right only where features are last."""

    def gates(self, theta, u, v, state):
        return state._replace(h=jnp.tanh(u[0] + v[0]) * jnp.arange(self.hidden, dtype=u[0].dtype))


@dataclasses.dataclass(frozen=True, repr=False)
class Sized(jrnn.AffineCell):
    """A number is made of the shape; the promise is that of an elementwise cell."""

    number: Any = math.prod
    elementwise: ClassVar[Any] = True

    def gates(self, theta, u, v, state):
        z = u[0] + v[0]
        return state._replace(h=jnp.tanh(z) / jnp.asarray(self.number(z), z.dtype))


@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(jrnn.AffineCell):
    """Elementwise with a vector, of which v is used twice."""

    gate_names: ClassVar[tuple[str, ...]] = ("a", "b")

    def init_theta(self, key):
        return {"scale": jnp.ones(self.hidden)}

    def gates(self, theta, u, v, state):
        a = jnp.tanh(theta["scale"] * (u[0] + v[0]))
        return state._replace(h=a * jax.nn.sigmoid(u[1] + v[1]) + 0.1 * v[1])


def read(cell):
    params = cell.init(jax.random.key(0), 3)
    form, state = cell.form(params), cell.initial_state(params, (2,))
    return tuple(f(form.gates, form.theta, state) for f in (promises.elementwise, promises.sums))


@pytest.mark.parametrize(
    ("cell", "elementwise", "sums"),
    [
        (Mixing(4), False, (True,)),
        (Normalised(4), False, (True,)),
        (Written(4), False, (True,)),
        (Sized(4, lambda z: z.size), False, (True,)),
        (Sized(4, lambda z: z.shape[-1]), False, (True,)),
        (Sized(4, lambda z: z.shape[0]), False, (True,)),
        (Sized(4, lambda z: len(z.shape)), True, (True,)),  # all layouts have as many axes
        (Scaled(4), True, (True, False)),
        (Leaky(4), True, (True, True)),
    ],
    ids=lambda value: getattr(type(value), "__name__", None),
)
def test_what_is_read_from_gates(cell, elementwise, sums):
    assert read(cell) == (elementwise, sums)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_in_gates_are_those_of_the_plain_scan(layout):
    """Where another layout would show in a number that the gates make, they are run in the plain one."""
    cell = Sized(4, lambda z: z.shape[-1] + 10 * z.shape[0])
    params, xs = cell.init(jax.random.key(0), 3), jnp.ones((5, 6, 3))
    run = lambda backend: jax.value_and_grad(lambda p: jnp.sum(jrnn.unroll(cell, p, xs, backend=backend)[1]))(params)
    with limits(LAYOUTS[layout]):
        chex.assert_trees_all_close(run("hoisted"), run("reference"), rtol=1e-5)


@pytest.mark.parametrize(
    "cell",
    [jrnn.elman(4), jrnn.lstm(4), jrnn.gru(4), jrnn.mgu(4), jrnn.ugrnn(4), jrnn.peephole_lstm(4), jrnn.coupled_lstm(4)],
)
def test_what_is_read_agrees_with_what_is_promised(cell):
    silent = type("Silent", (type(cell),), {"elementwise": None, "additive": None})
    twin = silent(**{field.name: getattr(cell, field.name) for field in dataclasses.fields(cell)})
    assert read(twin) == read(cell)
    assert read(twin)[0]


@pytest.mark.parametrize("primitive", [True, False], ids=["primitive", "fallback"])
def test_the_product_is_a_product(primitive, monkeypatch, x64):
    """Values and all derivatives, where JAX has primitives of one's own and where it has not."""
    if not primitive:
        monkeypatch.setattr(core_products, "_weigh_p", None)
    x, w = jax.random.normal(jax.random.key(0), (5, 4, 3)), jax.random.normal(jax.random.key(1), (3, 2))

    def results(product):
        def loss(x, w):
            return jnp.sum(jnp.sin(product(x, w)))

        each = jax.vmap(jax.grad(loss, (0, 1)), (1, None))
        slope = jax.jvp(jax.grad(loss, (0, 1)), (x, w), (x, w))
        return loss(x, w), each(x, w), slope, jax.hessian(loss, 1)(x, w)

    chex.assert_trees_all_close(results(core_products.weigh), results(jnp.matmul), rtol=1e-12)


def test_the_product_over_devices():
    """Inside `shard_map`, where arrays say how they vary over devices."""
    mesh, spec = jax.make_mesh((1,), ("i",), (jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    x, w = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (3, 2))
    over = jax.shard_map(core_products.weigh, mesh=mesh, in_specs=(spec("i"), spec()), out_specs=spec("i"))
    got, want = (jax.grad(lambda w, f=f: jnp.sum(jnp.sin(f(x, w))))(w) for f in (over, jnp.matmul))
    chex.assert_trees_all_close(got, want, rtol=1e-5)


# --- what is inside the loops ------------------------------------------------------------------------------------


def loops(jaxpr):
    """The bodies of all innermost loops."""
    for eqn in jaxpr.eqns:
        inner = [sub for value in eqn.params.values() for sub in programs(value)]
        if eqn.primitive.name == "scan" and not any(True for sub in inner for _ in loops(sub)):
            yield inner[0]
        for sub in inner:
            yield from loops(sub)


def programs(value):
    if isinstance(value, list | tuple):
        return [sub for item in value for sub in programs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def products(jaxpr):
    """Multiplications in matrix products, one number for each product."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "weigh"):
            x, w = (atom.aval for atom in eqn.invars)
            contracted = eqn.params["dimension_numbers"][0][1] if eqn.params else (0,)
            free = [size for axis, size in enumerate(w.shape) if axis not in contracted]
            yield int(x.size * jnp.prod(jnp.array(free)))
        for value in eqn.params.values():
            for sub in programs(value):
                yield from products(sub)


@pytest.mark.parametrize(
    "cell", [jrnn.elman(8), jrnn.lstm(8), jrnn.gru(8), jrnn.lstm(256), jrnn.gru(1024), Leaky(8), Leaky(512)], ids=repr
)
def test_one_recurrent_product_a_step(cell):
    """Forward and backward loops hold the recurrent product and no other; large batches in two halves."""
    params = jax.eval_shape(lambda key: cell.init(key, 16), jax.random.key(0))
    xs = jax.ShapeDtypeStruct((64, 32, 16), jnp.float32)

    def loss(params, xs):
        return jnp.sum(jrnn.unroll(cell, params, xs, backend="hoisted")[1])

    forward = [list(products(body)) for body in loops(jax.make_jaxpr(loss)(params, xs).jaxpr)]
    both = [list(products(body)) for body in loops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, xs).jaxpr)]
    whole = 32 * params["w_hh"].size
    parts = plan_of(cell, 64, (32,), 16).forward
    parts = parts.parts if isinstance(parts, Units) else 1
    assert forward == [[whole // parts] * parts]
    assert sorted(filter(None, both)) == sorted([[whole // parts] * parts, [whole]])


@pytest.mark.parametrize(
    ("layers", "key"),
    [
        ((jrnn.lstm(8),), False),
        ((jrnn.zoneout(jrnn.gru(8), h=0.1), jrnn.dropout(0.2)), True),
        ((jrnn.bidirectional(jrnn.elman(4)),), False),
        ((jrnn.residual(jrnn.stack(jrnn.gru(8), jrnn.dropout(0.2))),), True),
        ((jrnn.jordan(8, 8),), False),
    ],
    ids=repr,
)
def test_equal_layers_share_their_loops(layers, key):
    """The program has as many loops for eight equal layers as for three, the first of which may have other inputs."""
    xs = jax.ShapeDtypeStruct((12, 2, 8), jnp.float32)

    def loops_of(depth):
        model = jrnn.stack(*layers * depth)
        params = jax.eval_shape(lambda key: model.init(key, 8), jax.random.key(0))

        def loss(params, xs):
            options = {"key": jax.random.key(0), "remat": 5} if key else {"lengths": jnp.array([12, 7])}
            return jnp.sum(jrnn.unroll(model, params, xs, **options)[1])

        programs = (jax.jit(loss), jax.jit(jax.grad(loss)), jax.jit(jax.grad(loss, (0, 1))))
        return [program.lower(params, xs).as_text().count("stablehlo.while") for program in programs]

    few = loops_of(3)
    assert min(few) > 0
    assert loops_of(8) == few


def test_a_key_of_other_layers_changes_no_layout():
    """A cell that is known to use no key is laid out as it is without one."""
    cell, xs = jrnn.lstm(256), jax.ShapeDtypeStruct((8, 32, 16), jnp.float32)
    model = jrnn.stack(cell, jrnn.dropout(0.2))
    params = jax.eval_shape(lambda key: model.init(key, 16), jax.random.key(0))

    def run(key, params, xs):
        return jrnn.unroll(model, params, xs, key=key, backend="hoisted")[1]

    (body, *_), (keyed, *_) = (
        list(loops(jax.make_jaxpr(functools.partial(run, key))(params, xs).jaxpr)) for key in (None, jax.random.key(0))
    )
    assert list(products(keyed)) == list(products(body)) == [16 * 256 * 1024] * 2


# --- what is kept for the backward pass --------------------------------------------------------------------------


def temporary_bytes(cell, time, batch, features, backend="hoisted", **options):
    params = jax.eval_shape(lambda key: cell.init(key, features), jax.random.key(0))
    xs = jax.ShapeDtypeStruct((time, batch, features), jnp.float32)

    def loss(params, xs):
        return jnp.sum(jrnn.unroll(cell, params, xs, backend=backend, **options)[1] ** 2)

    return jax.jit(jax.grad(loss)).lower(params, xs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("cell", "features", "floats"),
    [
        # States before each step, what the gates read (where F + H >= 160), outputs and their cotangents.
        (jrnn.elman(128), 32, 1 + 1 + 2),
        (jrnn.gru(128), 32, 1 + 4 + 2),
        (jrnn.lstm(128), 32, 2 + 4 + 2),
        # With little to multiply by, what the gates read is made again.
        (jrnn.elman(64), 16, 1 + 2),
        (jrnn.lstm(64), 16, 2 + 2),
        (jrnn.gru(64), 16, 1 + 2),
    ],
    ids=lambda value: repr(value) if isinstance(value, jrnn.Layer) else None,
)
def test_memory_of_a_training_step(cell, features, floats):
    """A training step holds at most so many times H floats for each step of each sequence, as the README says."""
    batch, unit = 8, 4 * cell.hidden
    rows = affine.choose_chunk(10**6, batch, 4 * cell.hidden)
    short, long = (temporary_bytes(cell, count * rows, batch, features) for count in (4, 8))
    assert (long - short) / (4 * rows * batch) <= floats * unit


def test_layouts_that_were_measured_on_a_cpu_are_left_to_it(monkeypatch):
    cell = jrnn.lstm(1024)
    form = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(lambda key: cell.init(key, 8), jax.random.key(0))
    state = cell.state_type(form(64, 1024), form(64, 1024))
    inputs = affine.Inputs(cell.form(params), form(5, 64, 8), state, None)
    for platform, layouts in {"cpu": (Units(2), Units()), "gpu": (Rows(), Rows())}.items():
        monkeypatch.setattr(affine, "default_device", lambda platform=platform: SimpleNamespace(platform=platform))
        plan = affine.choose_options(inputs, Steps())
        assert (plan.forward, plan.backward) == layouts


@pytest.mark.parametrize("backend", ["hoisted", None])
def test_memory_with_remat(backend):
    """With remat="sqrt" memory grows as the square root of T, and as ``ys``."""
    cell = jrnn.lstm(256)
    whole = temporary_bytes(cell, 10_000, 1, 64, backend)
    assert temporary_bytes(cell, 10_000, 1, 64, backend, remat="sqrt") < 0.35 * whole
    assert temporary_bytes(cell, 100_000, 1, 64, backend, remat="sqrt") < 300e6


@pytest.mark.parametrize("shape", ["7, b, 3", "t, b, 3"])
def test_export_for_any_size(shape):
    """One exported program for any batch and any time, by symbols for sizes."""
    model = jrnn.stack(jrnn.lstm(4), jrnn.bidirectional(jrnn.mgu(3)))
    params, xs = model.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (7, 5, 3))
    run = jax.jit(lambda params, xs: jrnn.unroll(model, params, xs)[1])
    form = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    exported = jax.export.export(run)(params, form)
    np.testing.assert_allclose(exported.call(params, xs), run(params, xs), rtol=0, atol=1e-6)


class Carry(NamedTuple):
    h: jax.Array


class Owned(jrnn.AffineCell):
    """A user's cell with a state type of its own."""

    gate_names = ("h",)
    state_type = Carry

    def gates(self, theta, u, v, state):
        return Carry(jnp.tanh(u[0] + v[0]))


@pytest.mark.smoke
def test_a_reset_restores_a_state_of_weights_that_are_not_rounded():
    """The initial state of this cell has the dtype of a weight, which 16-bit inputs round for products."""
    cell, flags = ProjectAndUpdate(4), {"resets": np.arange(12).reshape(6, 2) % 3 == 0}
    params, xs = cell.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (6, 2, 3), jnp.bfloat16)
    state, ys = jrnn.unroll(cell, params, xs, backend="hoisted", **flags)
    assert state.h.dtype == jnp.float32
    expected = jrnn.unroll(cell, params, xs, backend="reference", **flags)
    chex.assert_trees_all_close((state, ys), expected, atol=2e-2)


def test_states_of_all_cells_are_known_to_export():
    """Seen without serialising, for which flatbuffers is needed: JAX refuses to register a type twice."""

    def named(tree):
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            yield type(tree)
        for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else ():
            yield from named(part)

    def states(case):
        layer = case.layer
        return jax.eval_shape(lambda: layer.initial_state(layer.init(jax.random.key(0), case.in_features), ()))

    kinds = {kind for case in CASES for kind in named(states(case))}
    assert {jrnn.LSTMState, jrnn.HiddenState, jrnn.TDNNState} <= kinds
    for kind in kinds:
        with pytest.raises(ValueError, match="Duplicate serialization registration"):
            jax.export.register_namedtuple_serialization(kind, serialized_name=f"tests.{kind.__name__}")


def test_an_exported_program_that_returns_states_can_be_serialised():
    model = jrnn.stack(
        jrnn.bidirectional(jrnn.lstm(4), jrnn.projection_lstm(4, 2)),
        jrnn.learned_state(jrnn.gru(3)),
        jrnn.zoneout(jrnn.mgu(3), h=0.1),
        jrnn.tdnn(3, window=2),
        jrnn.jordan(3, 2),
    )
    params, xs = model.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (7, 5, 3))
    run = jax.jit(lambda params, xs, state: jrnn.unroll(model, params, xs, state))
    exported = jax.export.export(run)(params, xs, model.initial_state(params, (5,)))
    pytest.importorskip("flatbuffers", reason="jax.export serialises by flatbuffers")
    again = jax.export.deserialize(exported.serialize())
    state, _ = again.call(params, xs, model.initial_state(params, (5,)))
    state, ys = again.call(params, xs, state)  # what comes back goes in again
    expected = run(params, xs, run(params, xs, None)[0])
    assert jax.tree.structure(state) == jax.tree.structure(expected[0])
    chex.assert_trees_all_close((state, ys), expected, atol=1e-6)


def test_a_state_type_of_ones_own_is_registered_with_jax():
    cell, xs = Owned(4), jnp.ones((5, 2, 3))
    params = cell.init(jax.random.key(0), 3)
    exported = jax.export.export(jax.jit(lambda params, xs: jrnn.unroll(cell, params, xs)))(params, xs)
    pytest.importorskip("flatbuffers", reason="jax.export serialises by flatbuffers")
    with pytest.raises(ValueError, match="Carry"):
        exported.serialize()
    jax.export.register_namedtuple_serialization(Carry, serialized_name="tests.Carry")
    state, _ = jax.export.deserialize(exported.serialize()).call(params, xs)
    assert isinstance(state, Carry)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", [jrnn.conv_gru(2, (3,)), jrnn.attention(jrnn.gru(3), 2), jrnn.cornn(4)], ids=str)
@pytest.mark.sampled(3)
def test_parts_in_chunks(cell, reverse, monkeypatch):
    """The derivative of a step in parts runs in chunks, of which one is shorter; its own derivative too."""
    monkeypatch.setattr(parts, "ROWS", (4, 4))
    shape: Any = (4, 2) if cell.event_ndim > 1 else 2
    weights = cell.init(jax.random.key(0), shape)
    xs = jax.random.normal(jax.random.key(1), (7, 2, 4, 2) if cell.event_ndim > 1 else (7, 2, 2))
    memory = jax.random.normal(jax.random.key(2), (3, 2, 2))
    resets = jax.random.bernoulli(jax.random.key(3), 0.3, (7, 2))

    def gradient(backend):
        def loss(weights, xs):
            params = jrnn.remember(cell, weights, memory) if "w_query" in weights else weights
            state, ys = jrnn.unroll(cell, params, xs, resets=resets, reverse=reverse, backend=backend)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((state, ys)))

        return jax.grad(loss, (0, 1))

    tangents = jax.tree.map(jnp.cos, (weights, xs))
    for take in (lambda f: f(weights, xs), lambda f: jax.jvp(f, (weights, xs), tangents)):
        got, expected = (take(gradient(backend)) for backend in ("hoisted", "reference"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
