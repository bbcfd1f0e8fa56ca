"""`jrnn.scan` against `jax.lax.scan`, on every body of the table: values, every gradient, and what transforms them."""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import batching, mlir

import jrnn
from jrnn.jaxprs import affine, flat
from jrnn.jaxprs.flat import flatten
from jrnn.jaxprs.primitives import TABLE
from jrnn.schedules.native import emit
from tests.bodies import BODIES, elman, held, inner_cond, params, relu_readout, reset_lstm, still_input
from tests.conftest import count_compilations, in_loops

T, F, H = 5, 3, 4
READ = params([body for body in BODIES if body.products is not None])
REFUSED = params([body for body in BODIES if body.products is None])
ALL = params(BODIES)
# Second derivatives and batches take long to compile: on one body of each kind, and of the others now and then.
KINDS = {
    "elman", "concatenated_lstm", "transposed_gru", "reset_gru", "reset_lstm", "masked", "masked_reset_lstm",
    "relu_readout", "checkpointed", "random_mask", "memory_readout", "linen_lstm", "linen_gru", "haiku_lstm",
    "equinox_lstm", "reset_before",
}  # fmt: skip
interpreted = pytest.mark.usefixtures("quick_compilation")


def built(body, batch=None, time=T):
    batch = body.batches[0] if batch is None else batch
    weights, carry, step = body.make(jax.random.key(1), F, H, batch)
    xs = jax.random.normal(jax.random.key(2), (time, *batch, body.given * H or F))
    return weights, carry, step, xs


def run(scan, step, **options):
    return lambda weights, carry, xs: scan(lambda c, x: step(weights, c, x), carry, xs, **options)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def of_floats(function, *args):
    """A function of the float leaves of its arguments, to the float leaves of its results; and those leaves."""
    leaves, tree = jax.tree.flatten(args)
    places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def of(*floats):
        filled = list(leaves)
        for i, value in zip(places, floats, strict=True):
            filled[i] = value
        return [leaf for leaf in jax.tree.leaves(function(*tree.unflatten(filled))) if is_float(leaf)]

    return of, [leaves[i] for i in places]


def gradient_of(function):
    """The gradients of a sum of everything that comes out."""
    return lambda *args: jax.grad(lambda args: sum(jnp.sum(jnp.sin(leaf)) for leaf in function(*args)), allow_int=True)(
        args
    )


def gradients(function, *args):
    """The same, by every float that goes in."""
    of, leaves = of_floats(function, *args)
    return gradient_of(of)(*leaves)


def close(got, expected, tolerance=3e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def values_and_gradients(function, *args):
    """In one program, which is compiled once."""
    return jax.jit(lambda *args: (function(*args), gradients(function, *args)))(*args)


@interpreted
@pytest.mark.parametrize("body", READ)
def test_values_and_gradients(body):
    for i, batch in enumerate(body.batches):
        weights, carry, step, xs = built(body, batch)
        reverse = i % 2 == 1 or (len(body.batches) == 1 and "gru" in body.name)
        got, expected = (
            run(jrnn.scan, step, reverse=reverse, backend="hoisted"),
            run(jax.lax.scan, step, reverse=reverse),
        )
        close(values_and_gradients(got, weights, carry, xs), values_and_gradients(expected, weights, carry, xs))


@pytest.mark.parametrize("body", READ)
def test_native(body):
    weights, carry, step, xs = built(body)
    got = run(jrnn.scan, step, backend="native")
    if body.native or body.reason:
        with pytest.raises(ValueError, match=body.native or body.reason):
            got(weights, carry, xs)
        return
    expected = run(jax.lax.scan, step)
    close(values_and_gradients(got, weights, carry, xs), values_and_gradients(expected, weights, carry, xs))


@pytest.mark.parametrize(
    ("name", "time", "sequences", "units", "remat"),
    [
        ("given_gru", 3, 2, 32, None),
        ("given_lstm", 7, 20, 40, None),
        ("given_lstm", 9, 2, 70, 2),
        ("given", 4, 1, 32, 2),
    ],
)
def test_native_with_given_inputs(name, time, sequences, units, remat):
    """Few steps read the weights in place; several blocks of units, the last one short; residuals in chunks."""
    body = BODIES[[body.name for body in BODIES].index(name)]
    weights, carry, step = body.make(jax.random.key(1), F, units, (sequences,))
    weights = jax.tree.map(lambda w: w / 8, weights)
    xs = jax.random.normal(jax.random.key(2), (time, sequences, body.given * units))
    got, expected = run(jrnn.scan, step, backend="native", remat=remat), run(jax.lax.scan, step)
    close(values_and_gradients(got, weights, carry, xs), values_and_gradients(expected, weights, carry, xs))
    several = (jax.tree.map(lambda w: w[None], weights), carry, jnp.stack([xs, jnp.sin(xs)]))
    mapped = [jax.vmap(jax.vmap(function, (None, None, 0)), (0, None, None)) for function in (got, expected)]
    close(*(jax.jit(function)(*several) for function in mapped))


@pytest.mark.parametrize("backend", ["hoisted", "native"])
@pytest.mark.parametrize("name", ["without_input", "unmoved"])
def test_a_number_of_steps_in_the_place_of_inputs(name, backend):
    weights, carry, step, _ = built(BODIES[[body.name for body in BODIES].index(name)])
    scans = (functools.partial(jrnn.scan, backend=backend), jax.lax.scan)
    of = lambda scan: lambda weights, carry: scan(lambda c, x: step(weights, c, x), carry, None, T)
    got, expected = map(of, scans)
    close(values_and_gradients(got, weights, carry), values_and_gradients(expected, weights, carry))


@interpreted
@pytest.mark.parametrize("body", REFUSED)
def test_what_is_not_read_runs_as_it_is(body):
    weights, carry, step, xs = built(body)
    name, reason = jrnn.choose_scan_backend(lambda c, x: step(weights, c, x), carry, xs)
    assert name == "reference"
    assert body.reason in reason
    with pytest.raises(ValueError, match="backend: 'hoisted' cannot run this body"):
        jrnn.scan(lambda c, x: step(weights, c, x), carry, xs, backend="hoisted")
    got, expected = run(jrnn.scan, step), run(jax.lax.scan, step)
    close(got(weights, carry, xs), expected(weights, carry, xs), 0)


@interpreted
@pytest.mark.parametrize("body", params(body for body in BODIES if body.products and body.reason))
def test_a_few_sequences_are_differentiated_in_parts(body):
    weights, carry, step, xs = built(body)
    name, reason = jrnn.choose_scan_backend(lambda c, x: step(weights, c, x), carry, xs)
    assert name == ("reference" if body.name == "convolutional" else "hoisted")
    assert body.reason in reason
    got, plain = run(jrnn.scan, step), run(jax.lax.scan, step)
    close(values_and_gradients(got, weights, carry, xs), values_and_gradients(plain, weights, carry, xs))
    forward = [products_in_loops(jax.make_jaxpr(function)(weights, carry, xs)) for function in (got, plain)]
    assert forward[0] == forward[1]
    if name == "hoisted":
        backward = jax.make_jaxpr(lambda *args: gradients(got, *args))(weights, carry, xs)
        assert products_in_loops(backward) <= 2 * body.products


def test_many_sequences_run_as_they_are():
    weights, carry, step, xs = built(BODIES[[body.name for body in BODIES].index("reset_before")], (9,))
    assert jrnn.choose_scan_backend(lambda c, x: step(weights, c, x), carry, xs)[0] == "reference"


@interpreted
@pytest.mark.parametrize("name", ["reset_before", "random_steps"])
def test_transformations_of_a_body_that_is_differentiated_in_parts(name):
    weights, carry, step, xs = built(BODIES[[body.name for body in BODIES].index(name)], time=3)
    got, expected = run(jrnn.scan, step), run(jax.lax.scan, step)
    of, leaves = of_floats(got, weights, carry, xs)
    plain, _ = of_floats(expected, weights, carry, xs)
    moving = [jnp.cos(leaf) for leaf in leaves]

    @functools.partial(jax.jit, static_argnums=0)
    def transformed(of):
        mapped = jax.vmap(lambda first: gradient_of(of)(first, *leaves[1:]))(jnp.stack([leaves[0], leaves[0] / 2]))
        return jax.jvp(of, leaves, moving)[1], jax.jvp(gradient_of(of), leaves, moving)[1], mapped

    close(transformed(of), transformed(plain), 2e-4)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(*row.values, id=row.id, marks=[*row.marks, *[pytest.mark.nightly] * (row.id not in KINDS)])
        for row in READ
    ],
)
def test_transformations(body):
    """Forward mode, both orders of second derivatives, and batches over everything."""
    weights, carry, step, xs = built(body, time=3)
    got, expected = run(jrnn.scan, step, backend="hoisted"), run(jax.lax.scan, step)
    args = (weights, carry, xs)
    _, leaves = of_floats(got, *args)
    moving = [jnp.cos(leaf) for leaf in leaves]
    several = jax.tree.map(lambda a: jnp.stack([a, a * 0.5 if is_float(a) else a]), args)

    @functools.partial(jax.jit, static_argnums=0)
    def transformed(function):
        of, _ = of_floats(function, *args)
        forward = jax.jvp(of, leaves, moving)[1]
        second = jax.jvp(gradient_of(of), leaves, moving)[1]
        everything = jax.vmap(function)(*several)
        return forward, second, everything, jax.vmap(function, (None, 0, 0))(weights, *several[1:])

    close(transformed(got), transformed(expected), 2e-4)


def products_in_loops(closed):
    return len(in_loops(closed, "dot_general", "weigh", "conv_general_dilated"))


@pytest.mark.parametrize("body", READ)
def test_one_product_in_the_loop(body):
    weights, carry, step, xs = built(body)
    got = run(jrnn.scan, step, backend="hoisted")
    assert products_in_loops(jax.make_jaxpr(got)(weights, carry, xs)) == body.products
    backward = jax.make_jaxpr(lambda *args: gradients(got, *args))(weights, carry, xs)
    assert products_in_loops(backward) <= 2 * body.products


def test_of_a_product_of_the_input_and_the_state_side_by_side_only_the_state_is_in_the_loop():
    weights, carry, step, xs = built(next(body for body in BODIES if body.name == "joined_reset_before"))
    closed = jax.make_jaxpr(run(jrnn.scan, step, backend="hoisted"))(weights, carry, xs)
    rows = [eqn.invars[1].aval.shape[0] for eqn in in_loops(closed, "dot_general", "weigh")]
    assert rows == [H, 2 * H]


@interpreted
@pytest.mark.parametrize("body", READ)
def test_equal_bodies_are_equal(body):
    """Two traces of the same step are one program: a call in eager mode compiles once."""
    weights, carry, step, xs = built(body)
    programs = [flatten(jax.make_jaxpr(lambda c, x: step(weights, c, x))(carry, xs[0]))[0] for _ in range(2)]
    assert programs[0] == programs[1]
    assert hash(programs[0]) == hash(programs[1])
    jrnn.scan(lambda c, x: step(weights, c, x), carry, xs, backend="hoisted")
    with count_compilations() as counter:
        jrnn.scan(lambda c, x: step(weights, c, x), carry, xs, backend="hoisted")
    assert counter["compilations"] == 0


@pytest.mark.parametrize(("name", "again"), [("masked_outputs", False), ("held", True)])
def test_outputs_before_a_mask_are_those_after_it_where_the_mask_selects_them(name, again):
    weights, carry, step, xs = built(BODIES[[body.name for body in BODIES].index(name)])
    closed = jax.make_jaxpr(functools.partial(step, weights))(carry, xs[0])
    form = affine.read(flatten(closed)[0], len(closed.consts), len(jax.tree.leaves(carry)))
    assert form.mask is not None
    assert all(is_new for _, is_new in form.after.values()) is not again


def test_other_gates_are_another_program():
    weights, carry, _step, xs = built(BODIES[0])

    def program(function):
        return flatten(jax.make_jaxpr(lambda h, x: function(x @ weights["x"] + h @ weights["h"]))(carry, xs[0]))[0]

    @jax.custom_jvp
    def other_relu(x):
        return jax.nn.relu(x)

    other_relu.defjvp(lambda primals, tangents: (other_relu(*primals), 2.0 * tangents[0]))
    found = [program(f) for f in (jnp.tanh, jnp.sin, jax.nn.relu, other_relu, lambda z: z * 2.0, lambda z: z * 3.0)]
    assert len(set(found)) == len(found)


@interpreted
@pytest.mark.parametrize("body", params(body for body in BODIES if body.name in ("sliced_lstm", "reset_gru", "held")))
def test_float64(x64, body):
    weights, carry, step, xs = jax.tree.map(
        lambda a: a.astype(jnp.float64) if hasattr(a, "dtype") and is_float(a) else a, built(body)
    )
    got, expected = run(jrnn.scan, step, backend="hoisted"), run(jax.lax.scan, step)
    close(values_and_gradients(got, weights, carry, xs), values_and_gradients(expected, weights, carry, xs), 1e-11)


@interpreted
@pytest.mark.parametrize(
    ("remat", "backend", "make"),
    [(2, "hoisted", reset_lstm), ("sqrt", "hoisted", held), (9, "hoisted", relu_readout), (3, "reference", elman)],
)
def test_remat(remat, backend, make):
    weights, carry, step = make(jax.random.key(1), F, H, (4,))
    xs = jax.random.normal(jax.random.key(2), (7, 4, F))
    got, expected = run(jrnn.scan, step, remat=remat, backend=backend), run(jax.lax.scan, step)
    close(values_and_gradients(got, weights, carry, xs), values_and_gradients(expected, weights, carry, xs))


def test_a_reset_lets_no_nan_pass():
    weights, carry, step = reset_lstm(jax.random.key(1), F, H, (4,))
    xs = jax.random.normal(jax.random.key(2), (T, 4, F)).at[0, :, 1].set(-1.0)  # every sequence starts anew
    got = run(jrnn.scan, step, backend="hoisted")
    bad = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), carry)
    close(got(weights, bad, xs), got(weights, carry, xs), 0)


def raised(function, *args):
    """The type of an exception, and the first line of its message."""
    try:
        function(*args)
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    return None


@pytest.mark.smoke
def test_arguments_and_errors_are_those_of_lax_scan():
    def count(carry, _):
        return carry + 1, carry

    for options in ({"xs": None, "length": 4}, {"xs": jnp.arange(4)}, {"xs": {"a": jnp.ones((4, 2)), "b": None}}):
        close(jrnn.scan(count, 0.0, **options), jax.lax.scan(count, 0.0, **options), 0)
    close(jrnn.scan(count, jnp.float32(0), jnp.ones((0, 2))), jax.lax.scan(count, jnp.float32(0), jnp.ones((0, 2))), 0)
    for arguments in (
        (lambda c, x: (c, x, x), 0.0, jnp.ones(3)),
        (lambda c, x: (c.astype(jnp.int32), x), jnp.float32(0), jnp.ones(3)),
        (count, 0.0, {"a": jnp.ones(3), "b": jnp.ones(4)}),
        (count, 0.0, None),
        (lambda c, x: undefined, 0.0, jnp.ones(3)),  # noqa: F821
    ):
        assert raised(jrnn.scan, *arguments) == raised(jax.lax.scan, *arguments)
    weights, carry, step, xs = built(BODIES[0])
    args = (lambda c, x: step(weights, c, x), carry, xs, None, False, -1)
    assert raised(functools.partial(jrnn.scan, backend="hoisted"), *args) == raised(jax.lax.scan, *args) is not None


@interpreted
@pytest.mark.parametrize("make", [elman, held])
def test_weak_types_are_those_of_lax_scan(make):
    """A weakly typed array takes the dtype of what it meets, in the step as in what is made of the results."""
    weights, carry, step = make(jax.random.key(1), F, H, (4,))

    def body(carry, x):
        h, _ = carry
        new, y = step(weights, h, x.astype(h.dtype))
        return (new, jnp.full_like(h, 0.5)), (h, y, x * jnp.bfloat16(2), 2 * x, 1.0)

    args = (body, (jnp.full(carry.shape, 0.1), carry), jnp.full((T, 4, F), 0.5))
    got, expected = jrnn.scan(*args, backend="hoisted"), jax.lax.scan(*args)
    close(got, expected)
    assert jax.tree.map(lambda a: a.weak_type, got) == jax.tree.map(lambda a: a.weak_type, expected)
    assert expected[1][2].dtype == jnp.bfloat16


@interpreted
def test_mixed_second_derivatives_of_a_product_that_does_not_move():
    weights, h, step = still_input(jax.random.key(1), F, H, (4,))
    xs = jax.random.normal(jax.random.key(2), (3, 4, F))

    def mixed(scan):
        def loss(x, w):
            return jnp.sum(jnp.sin(scan(lambda h, x: step(w, h + x[..., :1], x), h, x)[0]))

        return jax.jacfwd(jax.grad(loss), 1)(xs, weights)

    close(mixed(functools.partial(jrnn.scan, backend="hoisted")), mixed(jax.lax.scan))


@interpreted
def test_a_branch_inside_a_function_stays_a_branch():
    weights, carry, step, xs = built(BODIES[0]._replace(make=inner_cond))
    got, expected = run(jrnn.scan, step, backend="hoisted"), run(jax.lax.scan, step)
    close(values_and_gradients(got, weights, carry, xs), values_and_gradients(expected, weights, carry, xs))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def derivative_of_sin(order, z):
    """The derivative of sin of this order, whose rule names the next order, as some of JAX's do."""
    return jnp.sin(z + order * jnp.pi / 2)


@derivative_of_sin.defjvp
def _next_derivative(order, primals, tangents):
    return derivative_of_sin(order, *primals), derivative_of_sin(order + 1, *primals) * tangents[0]


ENDLESS = [lambda z: derivative_of_sin(0, z), lambda z: functools.reduce(lambda z, _: jnp.sin(z), range(1500), z)]


@pytest.mark.parametrize("gate", ENDLESS, ids=["derivatives", "chain"])
def test_what_has_no_end_is_refused(gate):
    """A derivative that calls another function with a derivative of its own, and so on; and a very long chain."""
    weights, carry, _step, xs = built(BODIES[0], (9,))
    body = lambda h, x: (gate(x @ weights["x"] + h @ weights["h"]), None)
    name, reason = jrnn.choose_scan_backend(body, carry, xs)
    assert name == "reference"
    assert "not recognised as a recurrent cell" in reason


@interpreted
def test_numbers_in_a_carry_are_arrays():
    w = jax.random.normal(jax.random.key(0), (4, 4)) / 2

    def body(carry, x):
        h, count, scale = carry
        return (jnp.tanh(x + jnp.roll(h, 1, -1) @ w) * scale, count + 1, scale), (h, count)

    init, xs = (jnp.zeros((2, 4)), 0, 0.5), jnp.ones((5, 2, 4))
    expected = jax.lax.scan(body, init, xs)
    for backend in (None, "hoisted"):
        got = jrnn.scan(body, init, xs, backend=backend)
        assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_options_are_checked():
    with pytest.raises(ValueError, match="backend: expected None or one of"):
        jrnn.scan(lambda c, x: (c, x), 0.0, jnp.ones(3), backend="fast")
    with pytest.raises(ValueError, match="remat: expected None, a positive number"):
        jrnn.scan(lambda c, x: (c, x), 0.0, jnp.ones(3), remat=0)


@interpreted
def test_inside_other_loops():
    weights, carry, step = elman(jax.random.key(1), F, H, (4,))
    xs = jax.random.normal(jax.random.key(2), (3, T, 4, F))

    def outer(scan):
        def body(carry, xs):
            return scan(lambda c, x: step(weights, c, x), carry, xs)

        return jax.jit(lambda carry, xs: jax.lax.scan(body, carry, xs))

    got = outer(lambda *args: jrnn.scan(*args, backend="hoisted"))(carry, xs)
    close(got, outer(jax.lax.scan)(carry, xs))


@pytest.mark.smoke
def test_choice_follows_the_size():
    weights, carry, step = elman(jax.random.key(1), 64, 64, (16,))
    name, reason = jrnn.choose_scan_backend(lambda c, x: step(weights, c, x), carry, jnp.ones((128, 16, 64)))
    assert name in ("native", "hoisted")  # native where there is a compiler
    assert "recurrent cell" in reason
    weights, carry, step, xs = built(BODIES[0])
    assert jrnn.choose_scan_backend(lambda c, x: step(weights, c, x), carry, xs)[0] == "reference"


@pytest.mark.parametrize(
    ("name", "expected", "why"),
    [
        ("counter", "native", r"runs first as a scan \(int32\[\] of its carry\)"),
        ("other_generator", "native", r"\(key<rbg>\[\] of its carry, 'cond', 'random_bits', 'random_split'\)"),
        ("masked_outputs", "native", "one compiled function"),
        ("held", "reference", "its outputs need a matmul of its state that the loop does not put out"),
        ("dropped", "reference", "some of its gates take no product of its state"),
        ("given_lstm", "native", "one compiled function"),
        ("masked_by_leaf", "native", "one compiled function"),
        ("unmoved", "native", "one compiled function"),
        (
            "total",
            "native",
            r"runs after it \(float32\[16\] and float32\[\] and int32\[\] of its carry, 'cond', 'while'\)",
        ),
        ("two_layers", "native", r"runs after it \(float32\[16, 128\] and float32\[16, 128\] and float32\[16\] of its"),
        ("random_steps", "reference", "not of one shape and dtype"),
    ],
)
def test_the_reason_tells_what_runs_first_and_what_does_not_pay(name, expected, why):
    body = BODIES[[body.name for body in BODIES].index(name)]
    weights, carry, step = body.make(jax.random.key(1), 64, 128, (16,))
    xs = jnp.ones((128, 16, body.given * 128 or 64))
    chosen, reason = jrnn.choose_scan_backend(lambda c, x: step(weights, c, x), carry, xs)
    assert chosen in (expected, "hoisted" if expected == "native" else expected)  # native where there is a compiler
    assert re.search(why, reason) or (chosen == "hoisted" and "compiled" in why)


@interpreted
@pytest.mark.parametrize("where", ["flat._const", "affine._Reader._product"])
def test_programs_of_another_jax_run_as_they_are(where, monkeypatch):
    """With a warning: where a part of a program is not as it is known."""

    def moved(*_):
        raise KeyError("dimension_numbers")

    module, *names = where.split(".")
    owner = functools.reduce(getattr, names[:-1], {"flat": flat, "affine": affine}[module])
    monkeypatch.setattr(owner, names[-1], moved)
    weights, carry, step, xs = built(BODIES[[body.name for body in BODIES].index("stopped")])
    with pytest.warns(RuntimeWarning, match="a step is run as jax.lax.scan runs it, not faster: jrnn does not know"):
        got = run(jrnn.scan, step)(weights, carry, xs)
    close(got, run(jax.lax.scan, step)(weights, carry, xs), 0)


def test_a_step_is_traced_once(monkeypatch):
    """Its gates are written in C++ from the operations that were found in it."""
    weights, carry, step, xs = built(BODIES[[body.name for body in BODIES].index("concatenated_lstm")])
    trace, traced = jax.make_jaxpr, []
    scan = functools.partial(run(jrnn.scan, step, backend="native"), weights)
    jax.eval_shape(scan, carry, xs)
    monkeypatch.setattr(jax, "make_jaxpr", lambda f, **options: traced.append(f) or trace(f, **options))
    emit._of_program.cache_clear()
    jax.eval_shape(scan, carry, xs[:3])
    assert len(traced) == 1


def test_what_the_table_does_not_know_stays_in_the_loop():
    unheard_of = jax.extend.core.Primitive("unheard_of")
    unheard_of.def_impl(lambda x: x)
    unheard_of.def_abstract_eval(lambda x: x)
    batching.primitive_batchers[unheard_of] = lambda args, axes: (unheard_of.bind(*args), axes[0])
    mlir.register_lowering(unheard_of, lambda context, x: [x])
    weights, carry, step, xs = built(BODIES[0])
    for of, chosen, stays in (
        (lambda c, x: (c, unheard_of.bind(x)), "reference", "runs first as a scan ('unheard_of')"),
        (lambda c, x: (unheard_of.bind(c), x), "hoisted", "depends on 'unheard_of' of its state"),
    ):
        name, reason = jrnn.choose_scan_backend(lambda c, x, of=of: step(weights, *of(c, x)), carry, xs)
        assert name == chosen
        assert stays in reason
    got = jrnn.scan(lambda c, x: step(weights, c, unheard_of.bind(x)), carry, xs, backend="hoisted")
    close(got, jrnn.scan(functools.partial(step, weights), carry, xs, backend="reference"))


def test_every_operation_that_rearranges_is_followed():
    rearranging = [row.name for row in TABLE.values() if row.rearranges]
    assert not [name for name in rearranging if not hasattr(affine._Reader, f"_{name}")]
