"""What JAX makes of the compiled loop: every derivative, batches, export, meshes; and where it is chosen by default."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

import jrnn
from jrnn import _interpret, testing
from jrnn.schedules import native
from jrnn.schedules.native import build, operation
from tests.cases import HiddenAndMemory, Leaky
from tests.test_native import assert_near, data, loss

pytestmark = pytest.mark.skipif(not build.available()[0], reason=build.available()[1] or "")

CELL = jrnn.mgu(5)
PARAMS, XS, STATE, MARKS = data(CELL, 6, 3, 2)
POINT = (PARAMS, XS, STATE)
ALONG = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), POINT)
MEMBERS = jnp.stack([XS, 2 * XS[::-1]])
MANY = jax.tree.map(lambda *a: jnp.stack(a), PARAMS, data(CELL, 6, 3, 2, seed=1)[0])


def last_h(params, *, of):
    return of(params, XS, STATE, outputs=True)[-1, 0]


def flat(params, xs, *, of):
    return of(params, xs, STATE)


# Each a function of a loss ``of(params, xs, state)``, differentiated, batched or run in some way of JAX's.
TRANSFORMS = {
    "jvp": lambda of: jax.jvp(of, POINT, ALONG),
    "jvp of some": lambda of: jax.jvp(lambda xs: of(PARAMS, xs, STATE), (XS,), (ALONG[1],)),
    "linearize": lambda of: jax.linearize(of, *POINT)[1](*ALONG),
    "grad": lambda of: jax.grad(of, (0, 1, 2))(*POINT),
    "grad of params": lambda of: jax.grad(of)(*POINT),
    "grad of inputs": lambda of: jax.grad(of, 1)(*POINT),
    "jvp of grad": lambda of: jax.jvp(jax.grad(of, (0, 1, 2)), POINT, ALONG),
    "grad of jvp": lambda of: jax.grad(lambda *point: jax.jvp(of, point, ALONG)[1], (0, 1, 2))(*POINT),
    "jvp of jvp": lambda of: jax.jvp(lambda *point: jax.jvp(of, point, ALONG)[1], POINT, ALONG),
    "grad of grad": lambda of: jax.vjp(jax.grad(of, (0, 1, 2)), *POINT)[1](ALONG),
    "vmap": lambda of: jax.vmap(of, (None, 0, None))(PARAMS, MEMBERS, STATE),
    "vmap on another axis": lambda of: jax.vmap(of, (None, 2, None))(PARAMS, jnp.moveaxis(MEMBERS, 0, 2), STATE),
    "vmap of grad": lambda of: jax.vmap(jax.grad(of, (0, 1, 2)), (None, 0, None))(PARAMS, MEMBERS, STATE),
    "grad of vmap": lambda of: jax.grad(lambda p, x: jax.vmap(functools.partial(flat, of=of), (None, 0))(p, x).sum())(
        PARAMS, MEMBERS
    ),
    "an ensemble": lambda of: jax.vmap(jax.value_and_grad(of, (0, 1)), (0, None, None))(MANY, XS, STATE),
    "vmap of jvp": lambda of: jax.vmap(lambda d: jax.jvp(lambda p: of(p, XS, STATE), (PARAMS,), (d,))[1])(MANY),
    "vmap of vmap": lambda of: jax.vmap(jax.vmap(of, (None, 0, None)), (0, None, None))(MANY, MEMBERS, STATE),
    "checkpoint": lambda of: jax.grad(jax.checkpoint(of), (0, 1))(*POINT),
    "in a scan": lambda of: jax.grad(lambda p: jax.lax.scan(lambda c, x: (c + of(p, x, STATE), c), 0.0, MEMBERS)[0])(
        PARAMS
    ),
}


@pytest.mark.parametrize(
    ("name", "remat"),
    [*((name, None) for name in TRANSFORMS), *((name, 2) for name in ("jvp of grad", "vmap of grad", "grad of vmap"))],
)
@pytest.mark.sampled(3)
def test_transforms(name, remat):
    got, expected = (
        jax.jit(lambda b=backend: TRANSFORMS[name](loss(CELL, b, {**MARKS, "remat": remat})))()
        for backend in ("native", "reference")
    )
    assert_near(got, expected, 1e-4)


def masked(backend, **options):
    return loss(jrnn.variational(CELL, inputs=0.3, recurrent=0.4), backend, {**MARKS, **options})


@pytest.mark.parametrize("name", ["jvp", "grad of grad", "vmap", "vmap of grad", "an ensemble"])
def test_transforms_of_a_masked_run(name):
    got, expected = (
        jax.jit(lambda b=backend: TRANSFORMS[name](masked(b, key=jax.random.key(1))))()
        for backend in ("native", "reference")
    )
    assert_near(got, expected, 1e-4)


def test_each_member_has_its_own_masks():
    keys = jax.random.split(jax.random.key(1), 3)
    got, expected = (
        jax.vmap(lambda key, b=backend: jax.grad(masked(b, key=key), (0, 1))(*POINT))(keys)
        for backend in ("native", "reference")
    )
    assert_near(got, expected, 1e-4)


def test_export_of_a_masked_run():
    gradient = jax.jit(jax.grad(masked("native", key=jax.random.key(1))))
    assert_near(jax.export.export(gradient)(*POINT).call(*POINT), gradient(*POINT))


def test_masks_that_move():
    """What was drawn is in the parameters, and may be differentiated by."""
    cell = jrnn.variational(CELL, recurrent=0.4)
    drawn = cell.draw(PARAMS, jax.random.key(1), (3,), 2)

    def of(backend):
        value = loss(cell, backend, MARKS)
        first = jax.grad(value)
        along = jax.tree.map(jnp.cos, drawn)
        return jax.jvp(lambda drawn: (value(drawn, XS, STATE), first(drawn, XS, STATE)), (drawn,), (along,))

    assert_near(of("native"), of("reference"), 1e-4)


def test_eager():
    """Without jit: by itself, and where jit is switched off."""
    of = {backend: jax.grad(loss(CELL, backend, MARKS)) for backend in ("native", "reference")}
    expected = of["reference"](*POINT)
    assert_near(of["native"](*POINT), expected, 1e-4)
    with jax.disable_jit():
        assert_near(of["native"](*POINT), expected, 1e-4)


def test_one_call_is_the_whole_loop():
    """Of a cell of one's own too: one call forward, one backward, and around them no loop and no product."""
    for cell in (jrnn.lstm(32), Leaky(32), HiddenAndMemory(32)):
        params, xs, state, marks = data(cell, 80, 4, 8)
        step = jax.jit(jax.value_and_grad(loss(cell, None, marks), (0, 1, 2)))
        text = step.lower(params, xs, state).as_text()
        assert re.findall(r"custom_call @jrnn_[0-9a-f]+_\d+_(\w+)", text) == ["forward", "backward"]
        assert "dot_general" not in text
        assert "while" not in text


def test_sequences_that_are_mapped_are_a_batch():
    """One call for all members and no loop over them, forward and backward."""

    def total(params):
        return jax.vmap(loss(CELL, "native", {}), (None, 0, None))(params, MEMBERS, STATE).sum()

    text = str(jax.make_jaxpr(jax.grad(total))(PARAMS))
    assert (text.count("jrnn_native["), "scan[" in text) == (2, False)


def test_gradient_of_inputs_is_left_out_where_nobody_asks():
    """The first layer of a model: its product with the input weights transposed is not made."""

    def shapes(argnums):
        text = jax.jit(jax.grad(loss(CELL, "native", {}), argnums)).lower(*POINT).as_text()
        (call,) = [line for line in text.splitlines() if "custom_call" in line and "_backward" in line]
        return call.split("->")[-1].count("tensor<6x3x2xf32>")

    assert (shapes(0), shapes((0, 1))) == (0, 1)


@pytest.mark.parametrize("remat", [None, 2])
def test_export(remat):
    """What is exported runs anywhere: plain JAX, equal in values and gradients."""
    gradient = jax.jit(jax.grad(loss(CELL, "native", {**MARKS, "remat": remat}), (0, 1)))
    exported = jax.export.export(gradient, platforms=("cpu", "cuda"))(*POINT)
    assert "_backward" not in exported.mlir_module()
    assert "_backward" in gradient.lower(*POINT).as_text()
    assert_near(exported.call(*POINT), gradient(*POINT))


def test_code_for_this_machine_is_never_exported_unseen():
    """Where JAX does not say what a program is lowered for, it is an error."""
    unknown = types.SimpleNamespace(module_context=types.SimpleNamespace(lowering_parameters=object()))
    with pytest.raises(RuntimeError, match="does not say whether a program is lowered for an export"):
        operation._lower(unknown, operation=None)


def test_a_jax_that_has_moved_is_told(monkeypatch):
    monkeypatch.delattr(jax.core, "ShapedArray")
    operation.available.cache_clear()
    with pytest.warns(RuntimeWarning, match="no longer has what the native loop is made of"):
        assert not operation.available()
    operation.available.cache_clear()


def test_export_for_any_batch_with_remat():
    run = lambda xs: jrnn.unroll(CELL, PARAMS, xs, backend="native", remat=2)[1]
    form = jax.ShapeDtypeStruct(jax.export.symbolic_shape("6, b, 2"), jnp.float32)
    exported = jax.export.export(jax.jit(run))(form)
    assert_near(exported.call(XS), run(XS))


def test_no_members():
    nobody = jax.vmap(loss(CELL, "native", {}), (None, 0, None))(PARAMS, MEMBERS[:0], STATE)
    assert nobody.shape == (0,)


# --- NaN that is looked for --------------------------------------------------------------------------------------


NAN = XS.at[3, 0].set(jnp.nan)


def total(params, xs, remat=None):
    return jnp.sum(jrnn.unroll(CELL, params, xs, backend="native", remat=remat)[1] ** 2)


def test_no_nan_is_returned_where_none_is_made():
    """All that is kept for a derivative is written: a row of what the gates of this cell read is padded."""
    cell, xs = jrnn.gru(64), jnp.ones((20, 8, 16))
    params = cell.init(jax.random.key(0), 16)
    run = jax.jit(lambda params: jax.vjp(lambda params: jrnn.unroll(cell, params, xs, backend="native")[1], params))
    memory = [jnp.full((20, 8, 272), jnp.nan) for _ in range(8)]
    del memory  # what is allocated next may lie there
    with jax.debug_nans(True):
        ys, back = run(params)
        back(ys)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.shape[-1:] == (272,)]
    assert len(kept) == 1
    assert (kept[0][..., 256:] == 0).all()


@pytest.mark.parametrize(
    "of",
    [total, jax.jit(total), jax.grad(total), jax.jit(jax.grad(total))],
    ids=["eager", "jit", "grad", "jit of grad"],
)
def test_a_nan_is_found_by_debug_nans(of):
    with jax.debug_nans(True):
        of(PARAMS, XS)
        with pytest.raises(FloatingPointError, match="nan"):
            of(PARAMS, NAN)


@pytest.mark.parametrize("of", [total, jax.grad(total), functools.partial(total, remat=2)])
def test_a_nan_is_found_by_checkify(of):
    """Where it is lost again too."""
    checked = jax.jit(checkify.checkify(lambda *point: jax.tree.map(jnp.nan_to_num, of(*point)), checkify.float_checks))
    assert checked(PARAMS, XS)[0].get() is None
    assert "nan generated by primitive: jrnn_native" in checked(PARAMS, NAN)[0].get()


# --- the default -------------------------------------------------------------------------------------------------


LARGE = jnp.ones((100, 16, 32))


def chosen(cell, xs):
    return jrnn.choose_backend(cell, cell.init(jax.random.key(0), xs.shape[-1]), xs)


def test_default_where_it_pays():
    assert chosen(jrnn.lstm(64), LARGE)[0] == "native"
    assert chosen(jrnn.stack(jrnn.lstm(64), jrnn.gru(64)), LARGE)[0] == "native"
    name, reason = chosen(jrnn.lstm(64), LARGE[:2, :2])
    assert name == "hoisted"
    assert "too few to compile it for" in reason
    assert "packs the weights" in chosen(jrnn.lstm(512), LARGE[:1])[1]
    assert chosen(jrnn.lstm(64), LARGE.astype(jnp.bfloat16))[0] == "native"
    assert chosen(jrnn.layer_norm_lstm(64), LARGE)[0] == "hoisted"


@pytest.mark.parametrize(("amx", "name"), [(True, "hoisted"), (False, "native")])
def test_default_in_bfloat16_is_the_processors_own_where_it_has_it(monkeypatch, amx, name):
    monkeypatch.setattr(native.build, "_processor", lambda: "flags : sse2 amx_bf16" if amx else "flags : sse2 avx512f")
    xs = LARGE.astype(jnp.bfloat16)
    assert chosen(jrnn.lstm(512), xs)[0] == name
    assert chosen(jrnn.lstm(256), xs)[0] == "native"
    assert chosen(jrnn.lstm(512), LARGE)[0] == "native"


def test_default_equals_the_plain_scan():
    cell = jrnn.mgu(64)
    params, xs, state, marks = data(cell, 64, 16, 64)
    got, expected = (jax.jit(jax.grad(loss(cell, b, marks), (0, 1, 2)))(params, xs, state) for b in (None, "reference"))
    assert_near(got, expected, 1e-4)
    assert "jrnn_native" in str(jax.make_jaxpr(loss(cell, None, marks))(params, xs, state))


@pytest.fixture
def everywhere(monkeypatch):
    """It runs by default however little there is to do."""
    monkeypatch.setattr(native, "WORK", 0)
    monkeypatch.setattr(native, "ROWS", 0)
    forget()
    yield
    forget()


def forget():
    jax.clear_caches()
    _interpret._traced.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("cell", [jrnn.lstm(3), jrnn.bidirectional(jrnn.mgu(2))], ids=repr)
def test_laws_where_it_is_the_default(cell, everywhere):
    """The sequence contract itself, with NaN in padding, on what `unroll` runs when nobody asks."""
    assert jrnn.choose_backend(cell, cell.init(jax.random.key(0), 2), jnp.ones((6, 4, 2)))[0] == "native"
    laws = (testing.check_padding, testing.check_resets, testing.check_remat, testing.check_vmap)
    testing.check_cell(cell, 2, laws=(*laws, testing.check_derivatives))


def test_default_without_a_compiler(monkeypatch):
    monkeypatch.setattr(build, "_missing", lambda: "there is no compiler")
    monkeypatch.setattr(build, "_kernels", {})
    name, reason = chosen(jrnn.lstm(64), LARGE)
    assert name == "hoisted"
    assert "not native: there is no compiler" in reason


def test_default_where_the_compiler_fails(monkeypatch):
    def load(header):
        raise RuntimeError("the C++ compiler failed: internal error")

    monkeypatch.setattr(build, "load", load)
    name, reason = chosen(jrnn.lstm(64), LARGE)
    assert name == "hoisted"
    assert "not native: the C++ compiler failed: internal error" in reason


def test_default_with_several_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    name, reason = chosen(jrnn.lstm(64), LARGE)
    assert name == "hoisted"
    assert "several devices" in reason


@pytest.mark.parametrize(
    ("layer", "backend"),
    [(jrnn.lstm(4), "reference"), (jrnn.stack(jrnn.bidirectional(jrnn.mgu(4)), jrnn.elman(3)), None)],
    ids=["cell", "model"],
)
def test_inside_shard_map(layer, backend):
    """Where arrays say over which axes of a mesh they vary, and the initial state is made inside."""
    params, xs = layer.init(jax.random.key(0), 5), jax.random.normal(jax.random.key(1), (7, 4, 5))
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def total(params, xs):
        return jnp.sum(jnp.sin(jrnn.unroll(layer, params, xs, backend=backend)[1]))

    def shard(params, xs):
        return jax.lax.psum(total(params, xs), "i")

    over = jax.shard_map(shard, mesh=mesh, in_specs=(spec(), spec(None, "i")), out_specs=spec())
    got, expected = (jax.jit(jax.value_and_grad(of, (0, 1)))(params, xs) for of in (over, total))
    assert_near(got, expected)


def test_a_mesh_is_refused():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="a mesh is set"):
        jrnn.unroll(CELL, PARAMS, XS, backend="native")
