"""`jrnn.linear_scan` against the recurrence written out in NumPy, in values and every derivative, on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jrnn
from jrnn.schedules.linear import BACKENDS, choose_linear
from tests.conftest import count_compilations

every_backend = pytest.mark.parametrize("backend", [None, *BACKENDS])


def order(time, reverse):
    return range(time)[::-1] if reverse else range(time)


def recurrence(a, b, h0, resets, reverse):
    """h of every step."""
    h, hs = h0, np.zeros_like(b)
    for t in order(len(b), reverse):
        h = a[t] * np.where(resets[t][..., None], 0, h) + b[t]
        hs[t] = h
    return hs


def gradients(a, hs, h0, resets, g, reverse):
    """Of a, b and h0, by backpropagation written out; for complex numbers without a conjugate, as in JAX."""
    l, da, db = np.zeros_like(h0), np.zeros_like(hs), np.zeros_like(hs)
    steps = list(order(len(hs), reverse))
    for i, t in reversed(list(enumerate(steps))):
        db[t] = g[t] + l
        before = hs[steps[i - 1]] if i else h0
        da[t] = np.where(resets[t][..., None], 0, before) * db[t]
        l = np.where(resets[t][..., None], 0, a[t] * db[t])
    return da, db, l


def draw(rng, shape, dtype):
    value = rng.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        value = value + 1j * rng.normal(size=shape)
    return value.astype(dtype)


def data(shape, dtype="float64", resets=0.2, seed=0):
    rng = np.random.default_rng(seed)
    a, b, h0, g = (draw(rng, s, np.dtype(dtype)) for s in (shape, shape, shape[1:], shape))
    flags = rng.random(shape[:-1]) < resets
    return 0.9 * a / np.maximum(1, np.abs(a)), b, h0, g, flags


# Widths round those of vectors and cache lines, and T round the rounds of an associative scan.
FEW = [(1, 2, 3), (2, 1), (7, 2, 5), (8, 2, 2, 3)]
SHAPES = [*FEW, (7, 1), (33, 2, 2, 17), (5, 3, 67), (3, 2, 150)]
WHERE = [(name, shape) for name in BACKENDS for shape in (SHAPES if name == "native" else FEW)]


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(("backend", "shape"), WHERE, ids=str)
@pytest.mark.sampled(3)
def test_values_and_gradients_equal_numpy(x64, quick_compilation, backend, shape, dtype):
    for reverse in (False, True):
        for rate in (0.0, 0.4):
            a, b, h0, g, flags = data(shape, dtype, rate)
            expected = recurrence(a, b, h0, flags, reverse)

            def scan(a, b, h0, flags=flags, rate=rate, reverse=reverse):
                resets = flags if rate else None
                return jrnn.linear_scan(a, b, h0, resets=resets, reverse=reverse, backend=backend)

            hs, transpose = jax.vjp(scan, a, b, h0)
            np.testing.assert_allclose(hs, expected, atol=1e-12)
            wanted = gradients(a, expected, h0, flags, g, reverse)
            for got, each in zip(transpose(jnp.asarray(g)), wanted, strict=True):
                np.testing.assert_allclose(got, each, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.sampled(3)
def test_derivatives_of_every_kind(x64, quick_compilation, backend, dtype):
    a, b, h0, _, flags = data((5, 2, 3), dtype)

    def scan(a, b, h0):
        return jrnn.linear_scan(a, b, h0, resets=flags, backend=backend)

    check_grads(scan, (a, b, h0), order=2, modes=("fwd", "rev"))
    # A coefficient that is the same at every step, and one for all features.
    check_grads(lambda a, b: scan(a, b, h0), (a[0, 0], b), order=2, modes=("rev",))
    check_grads(lambda a, b: scan(a, b, h0), (a[:, :, :1], b), order=1, modes=("fwd", "rev"))
    # Linear in b and h0: transposed, and transposed again.
    twice = jax.linear_transpose(jax.linear_transpose(lambda b, h0: scan(a, b, h0), b, h0), jnp.asarray(b))
    np.testing.assert_allclose(twice((jnp.asarray(b), jnp.asarray(h0)))[0], scan(a, b, h0), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_equals_a_loop(x64, quick_compilation, backend):
    a, b, h0, _, flags = data((6, 4, 2, 3))

    def loss(a, b, h0, flags):
        return jnp.sum(jnp.sin(jrnn.linear_scan(a, b, h0, resets=flags, backend=backend)))

    both = jax.value_and_grad(loss, argnums=(0, 1, 2))
    for axes in ((1, 1, 0, 1), (None, 1, 0, None), (1, None, None, None), (None, None, None, 1)):
        each = zip((a, b, h0, flags), axes, (1, 1, 0, 1), strict=True)
        whole = [np.take(x, 0, place) if axis is None else x for x, axis, place in each]
        got = jax.vmap(both, axes)(*whole)
        for i in range(4):
            one = [x if axis is None else np.take(x, i, axis) for x, axis in zip(whole, axes, strict=True)]
            jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-12), got, both(*one))


@pytest.mark.parametrize("backend", ["sequential", "native"])
@pytest.mark.parametrize("reverse", [False, True])
def test_broadcasting_is_that_of_numpy(x64, quick_compilation, backend, reverse):
    rng = np.random.default_rng(0)
    shapes = [((), (4, 2, 3)), ((3,), (4, 2, 3)), ((2, 1), (4, 2, 3)), ((1, 2, 3), (4, 2, 3)), ((4, 1, 1), (4, 2, 3)),
              ((4, 2, 3), (3,)), ((4, 2, 3), ()), ((4, 2, 1), (4, 1, 3)), ((4, 1), (4, 3)), ((1,), (4,))]  # fmt: skip
    for a_shape, b_shape in shapes:
        a, b = rng.uniform(0.5, 0.9, a_shape), rng.normal(size=b_shape)
        whole = np.broadcast_arrays(a, b)
        g = rng.normal(size=whole[0].shape)
        none = np.zeros(whole[0].shape[:-1], bool) if whole[0].ndim > 1 else np.zeros((4, 1), bool)[:, 0]
        if whole[0].ndim == 1:
            expected = recurrence(*(x[:, None].copy() for x in whole), np.zeros(1), none, reverse)[:, 0]
        else:
            expected = recurrence(*(x.copy() for x in whole), np.zeros(whole[0].shape[1:]), none, reverse)

        def scan(a, b):
            return jrnn.linear_scan(a, b, reverse=reverse, backend=backend)

        hs, transpose = jax.vjp(scan, a, b)
        np.testing.assert_allclose(hs, expected, atol=1e-12)
        slow = jax.vjp(lambda a, b: jrnn.linear_scan(*jnp.broadcast_arrays(a, b), backend="sequential"), a, b)[1]
        if not reverse:
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), transpose(g), slow(g))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("shape", [(1100, 4, 512), (1100, 3, 701), (70_000, 2, 31)], ids=str)
def test_native_on_several_threads_and_past_the_caches(shape, dtype):
    """Threads that share columns, and sequences that lie across two of them; results written past the caches."""
    a, b, h0, g, flags = data(shape, dtype, resets=0.01)
    found = []
    for backend in ("native", "sequential"):
        scan = jax.jit(lambda a, b, h0, backend=backend: jrnn.linear_scan(a, b, h0, resets=flags, backend=backend))
        hs, transpose = jax.vjp(scan, a, b, h0)
        found.append((hs, transpose(jnp.asarray(g))))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), *found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_passes_a_reset(quick_compilation, backend, reverse):
    a, b, h0, _, _ = data((6, 2, 3), "float32", 0)
    flags = np.zeros((6, 2), bool)
    cut = 2 if reverse else 3
    flags[cut, 0] = True
    b[5 if reverse else 0, 0] = np.nan  # of the first sequence, before its reset
    after = slice(None, cut + 1) if reverse else slice(cut, None)

    def scan(a, b, h0):
        return jrnn.linear_scan(a, b, h0, resets=flags, reverse=reverse, backend=backend)

    hs = np.asarray(scan(a, b, h0))
    assert np.isnan(hs[:, 0]).any(-1).sum() == 6 - len(hs[after])
    assert np.isfinite(hs[:, 1]).all()
    da, db, dh0 = jax.grad(lambda *args: scan(*args)[after, 0].sum(), argnums=(0, 1, 2))(a, b, h0)
    assert np.isfinite(da[after]).all()
    assert np.isfinite(db).all()
    assert (np.asarray(dh0) == 0).all()
    rest = np.ones(6, bool)
    rest[after] = False
    assert (np.asarray(db)[rest] == 0).all()
    # What comes after a reset is NaN, its coefficient too.
    a, b, h0, _, _ = data((6, 2, 3), "float32", 0)
    a[cut, 0] = b[cut, 0] = np.nan
    found = jax.grad(lambda *args: scan(*args)[rest].sum(), argnums=(0, 1, 2))(a, b, h0)
    assert all(np.isfinite(d[rest] if d.ndim == 3 else d).all() for d in found)
    b[cut, 0] = 2.0
    assert (np.asarray(scan(a, b, h0))[cut, 0] == 2).all()


@every_backend
def test_no_steps_and_no_sequences(backend):
    for shape in ((0, 2, 3), (4, 0, 3), (4, 2, 0), (0,)):
        hs, transpose = jax.vjp(
            lambda a, b, h0: jrnn.linear_scan(a, b, h0, backend=backend), jnp.ones(shape), jnp.ones(shape),
            jnp.ones(shape[1:]),
        )  # fmt: skip
        assert hs.shape == shape
        assert [d.shape for d in transpose(hs)] == [shape, shape, shape[1:]]


def test_only_a_and_h_are_kept_for_the_gradient():
    """No intermediate level of the associative scan, and nothing twice."""
    a, b = jnp.full((64, 2, 8), 0.5), jnp.ones((64, 2, 8))
    for backend in BACKENDS:
        traced = jax.make_jaxpr(lambda a, b, backend=backend: jax.vjp(
            lambda a, b: jrnn.linear_scan(a, b, backend=backend), a, b))(a, b)  # fmt: skip
        kept = {id(var): var.aval for var in traced.jaxpr.outvars if hasattr(var, "aval")}
        assert sum(aval.size for aval in kept.values() if aval.dtype == jnp.float32) <= 2 * a.size + 2 * 16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_numbers_are_summed_in_float32(dtype):
    b = jnp.full((1000, 2), 0.1, dtype)
    hs = jrnn.linear_scan(1.0, b)
    assert hs.dtype == dtype
    np.testing.assert_allclose(hs[-1].astype(jnp.float32), 1000 * float(b[0, 0]), rtol=0.01)


def test_dtypes():
    one, i = jnp.ones(3), jnp.full(3, 1j)
    assert jrnn.linear_scan(one, i).dtype == jnp.complex64
    assert jrnn.linear_scan(i, one).dtype == jnp.complex64
    assert jrnn.linear_scan(1, one).dtype == jnp.float32
    assert jax.grad(lambda a: jrnn.linear_scan(a, i).imag.sum())(one).dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((4, 3), (4, 2)), ValueError, "a: expected a shape that broadcasts against that of b"),
        (((), ()), ValueError, "b: expected time as the first axis"),
        (((4, 3), (4, 3), dict(h0=jnp.ones(4))), ValueError, r"h0: expected the shape \(3,\)"),
        (((4, 3), (4, 3), dict(resets=jnp.ones(4))), TypeError, "resets: expected booleans"),
        (((4, 3), (4, 3), dict(resets=jnp.ones(3, bool))), ValueError, "resets: expected the first axes"),
        (((4, 3), (4, 3), dict(resets=True)), ValueError, "resets: expected the first axes"),
        (((4, 3), (4, 3), dict(reverse=1)), TypeError, "reverse: expected True or False"),
        (((4, 3), (4, 3), dict(backend="parallel")), ValueError, "backend: expected None or one of"),
        (((4, 3), jnp.ones((4, 3), int)), TypeError, "b: expected floats or complex numbers, got int"),
        (((4, 3), jnp.ones((4, 3), jnp.bfloat16)), TypeError, "a: expected one precision .* a float32, b bfloat16"),
        (((4, 3), "x"), TypeError, "b: expected an array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(arguments, error, message):
    a, b, *rest = (jnp.ones(x) if isinstance(x, tuple) else x for x in arguments)
    with pytest.raises(error, match=message):
        jrnn.linear_scan(a, b, **(rest[0] if rest else {}))


def test_native_asked_for_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("JRNN_NATIVE", "0")
    monkeypatch.setattr("jrnn.schedules.native.build._linear", [])
    with pytest.raises(ValueError, match=r"backend: 'native' cannot run this recurrence: .*switched off"):
        jrnn.linear_scan(jnp.ones(4), jnp.ones(4), backend="native")
    assert jrnn.linear_scan(jnp.ones(4), jnp.ones(4))[-1] == 4


def test_what_is_chosen():
    assert choose_linear((10, 2), jnp.float32)[0] == "sequential"
    assert choose_linear((10_000, 2), jnp.float32)[0] == "native"


def test_a_second_call_compiles_nothing():
    a, b = jnp.full((5, 3), 0.5), jnp.ones((5, 3))
    jrnn.linear_scan(a, b)
    other = jnp.ones((5, 3))
    with count_compilations() as counter:
        jrnn.linear_scan(a, other)
    assert counter["compilations"] == 0


def test_it_exports_for_any_length():
    T, B = jax.export.symbolic_shape("T, B")
    shape = jax.ShapeDtypeStruct((T, B, 3), jnp.float32)
    exported = jax.export.export(jax.jit(lambda a, b: jrnn.linear_scan(a, b)))(shape, shape)
    a, b, _, _, _ = data((9, 2, 3), "float32", 0)
    np.testing.assert_allclose(exported.call(a, b), jrnn.linear_scan(a, b), atol=1e-6)
    with pytest.raises(ValueError, match="T is a symbol"):
        jax.export.export(jax.jit(lambda a, b: jrnn.linear_scan(a, b, backend="associative")))(shape, shape)


def test_it_exports_without_compiled_code():
    a, b, _, _, _ = data((9, 2, 3), "float32", 0)
    program = jax.jit(lambda a, b: jrnn.linear_scan(a, b, backend="native"))
    exported = jax.export.export(program)(a, b)
    assert "jrnn_" not in exported.mlir_module().replace("jrnn_native", "")
    np.testing.assert_allclose(exported.call(a, b), jrnn.linear_scan(a, b), atol=1e-6)
