"""The attention cell: its equations by hand, and what padding may not change. Its laws are rows of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from tests.conftest import in_loops

SCORES = {
    "dot": {"score": "dot"},
    "general": {"score": "general"},
    "additive": {"score": "additive", "features": 5},
    "multihead": {"score": "multihead", "features": 8, "heads": 2},
}
T, S, B, F, M = 2, 5, 3, 3, 4
pytestmark = pytest.mark.usefixtures("quick_compilation")


def built(options, hidden=4):
    cell = jrnn.attention(jrnn.gru(hidden), M, **options)
    params = cell.init(jax.random.key(0), F)
    if "b" in params:
        params["b"] = params["b"] + 0.3
    xs = jax.random.normal(jax.random.key(1), (T, B, F))
    memory = jax.random.normal(jax.random.key(2), (S, B, M))
    return cell, params, xs, memory, np.array([5, 2, 3])


def by_hand(cell, params, xs, memory, lengths):
    """One sequence at a time, one step after another, in plain jnp."""
    outputs, weights = [], []
    for b in range(xs.shape[1]):
        m = memory[: int(lengths[b]), b]
        state, context = cell.cell.initial_state(params["cell"], ()), jnp.zeros(M)
        ys, ws = [], []
        for x in xs[:, b]:
            state, h = cell.cell.step(params["cell"], state, jnp.concatenate([x, context]))
            query, values = h @ params["w_query"] if "w_query" in params else h, m
            if cell.score == "additive":
                e = jnp.tanh(query[None] + m @ params["w_keys"] + params["b"][None]) @ params["v"]
                a = jax.nn.softmax(e)[:, None]
            elif cell.score == "multihead":
                keys, values = m @ params["w_keys"], m @ params["w_values"]
                e = jnp.stack([k @ q for k, q in zip(jnp.split(keys, 2, -1), jnp.split(query, 2), strict=True)], -1)
                a = jax.nn.softmax(e / 2.0, axis=0)  # the square root of 8 features in 2 heads
            else:
                a = jax.nn.softmax(m @ query)[:, None]
            parts = zip(a.T, jnp.split(values, a.shape[1], -1), strict=True)
            context = jnp.concatenate([w @ v for w, v in parts])
            ys.append(jnp.concatenate([h, context]))
            ws.append(jnp.pad(a, ((0, S - len(m)), (0, 0))))
        outputs.append(jnp.stack(ys))
        weights.append(jnp.stack(ws))
    return jnp.stack(outputs, 1), jnp.stack(weights, 2)


@pytest.mark.slow
@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
def test_it_is_its_equations_with_every_gradient(options):
    cell, params, xs, memory, lengths = built(options)

    def ours(params, xs, memory):
        p = jrnn.remember(cell, params, memory, lengths=lengths)
        ys = jrnn.unroll(cell, p, xs)[1]
        return ys, cell.weights(p, ys)

    theirs = lambda params, xs, memory: by_hand(cell, params, xs, memory, lengths)

    def both(function):
        def loss(*args):
            values = function(*args)
            return sum(jnp.sum(jnp.sin(a)) for a in values), values

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, xs, memory)

    (got, values), (expected, wanted) = both(ours), both(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), values, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), got, expected)
    assert (np.asarray(got[2])[2:, 1] == 0).all()


@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
@pytest.mark.sampled(3)
def test_what_stands_in_the_padding_of_a_memory_changes_nothing(options):
    cell, params, xs, memory, lengths = built(options)
    mask = jnp.arange(S)[:, None] < lengths[None]

    def value(params, memory, **valid):
        return jnp.sum(jnp.sin(jrnn.unroll(cell, jrnn.remember(cell, params, memory, **valid), xs)[1]))

    expected = jax.value_and_grad(value, (0, 1))(params, memory, lengths=lengths)
    for bad in (jnp.nan, jnp.inf, 1e30):
        broken = jnp.where(mask[..., None], memory, bad)
        for valid in ({"lengths": lengths}, {"mask": mask}):
            got = jax.value_and_grad(value, (0, 1))(params, broken, **valid)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
def test_its_products_leave_the_loop(options):
    """The products of x do, and all gradients of weights: left are those of the state, and their transposes."""
    cell, params, xs, memory, lengths = built(options)
    marks = {"lengths": np.array([2, 1, 2]), "resets": np.array([[False] * B, [True, False, False]])}

    def gradients(backend):
        def loss(params, xs, memory):
            remembered = jrnn.remember(cell, params, memory, lengths=lengths)
            state, ys = jrnn.unroll(cell, remembered, xs, **marks, backend=backend)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((state, ys)))

        return jax.value_and_grad(loss, (0, 1, 2))

    got, expected = (gradients(backend)(params, xs, memory) for backend in (None, "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    assert jrnn.choose_backend(cell, jrnn.remember(cell, params, memory), xs)[0] == "hoisted"
    products = in_loops(jax.make_jaxpr(gradients(None))(params, xs, memory), "dot_general", "weigh")
    assert len(products) == 2 * (2 + ("w_query" in params))
    assert max(eqn.invars[0].aval.size for eqn in products) <= B * 12  # the cotangent of the three gates


@pytest.mark.parametrize("score", ["dot", "multihead"])
def test_memory_of_a_gradient(score):
    """A step stores its inputs' product, the state before it and the query, and not the products of the state."""
    width, batch = 32, 16
    cell = jrnn.attention(jrnn.gru(width), width, score=score)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), 8))
    memory = jax.ShapeDtypeStruct((6, batch, width), jnp.float32)

    def loss(params, xs, memory):
        return jnp.sum(jnp.sin(jrnn.unroll(cell, jrnn.remember(cell, params, memory), xs, backend="hoisted")[1]))

    def size(time):
        xs = jax.ShapeDtypeStruct((time, batch, 8), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shapes, xs, memory).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 4

    # The product and its cotangent, three gates each; the state and the outputs, two fields each; the query.
    assert (size(384) - size(192)) / (192 * batch) < 12 * width


def test_a_memory_without_a_valid_step_gives_a_context_of_zero():
    cell, params, xs, memory, _ = built({})
    p = jrnn.remember(cell, params, memory, lengths=jnp.array([0, 5, 5]))
    ys = jrnn.unroll(cell, p, xs)[1]
    assert (ys[:, 0, -M:] == 0).all()
    gradient = jax.grad(
        lambda m: jnp.sum(jrnn.unroll(cell, jrnn.remember(cell, params, m, lengths=jnp.array([0, 5, 5])), xs)[1])
    )
    assert bool(jnp.isfinite(gradient(memory)).all())


def test_it_runs_in_stacks_in_steps_and_under_vmap():
    layers = jrnn.stack(jrnn.embed(6, F), jrnn.attention(jrnn.gru(4), M), jrnn.dense(6))
    params = layers.init(jax.random.key(0), None)
    memory, ids = jax.random.normal(jax.random.key(2), (S, B, M)), jnp.array([[0, 1, 2], [3, 4, 5]])
    p = jrnn.remember(layers, params, memory)
    _, ys = jrnn.unroll(layers, p, ids)
    step, state = jrnn.stepper(layers), layers.initial_state(p, (B,))
    for t in range(2):
        state, y = step(p, state, ids[t])
        np.testing.assert_allclose(y, ys[t], atol=1e-6)
    one = jax.vmap(lambda m, ids: jrnn.unroll(layers, jrnn.remember(layers, params, m), ids)[1], 1, 1)
    np.testing.assert_allclose(one(memory, ids), ys, atol=1e-6)
    decoded = jrnn.decoding.beam(
        lambda state, token: layers.step(p, state, token), layers.initial_state(p, (B,)), ids[0], 3, width=2
    )
    assert decoded.tokens.shape == (3, B, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: jrnn.attention(jrnn.bidirectional(jrnn.gru(2)), 4), TypeError, "cell: expected a layer that takes"),
        (lambda: jrnn.attention(jrnn.gru(2), 4, score="cosine"), ValueError, "score: expected one of"),
        (lambda: jrnn.attention(jrnn.gru(2), 4, heads=2), ValueError, "heads: expected 1"),
        (lambda: jrnn.attention(jrnn.gru(2), 5, score="multihead", heads=2), ValueError, "a multiple of the 2 heads"),
        (lambda: jrnn.attention(jrnn.gru(2), 4, score="dot", features=3), ValueError, "features: expected None"),
        (lambda: jrnn.attention(jrnn.gru(2), 4, score="dot").init(jax.random.key(0), 3), ValueError, "dot product"),
        (lambda: jrnn.remember(jrnn.gru(2), {}, jnp.zeros((3, 4))), ValueError, "model: expected jrnn.attention"),
        (
            lambda: jrnn.remember(jrnn.attention(jrnn.gru(2), 4), {"cell": {}}, jnp.zeros((3, 5))),
            ValueError,
            "memory: expected",
        ),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_missing_or_misshapen_memory_is_named():
    cell, params, xs, memory, _ = built({})
    with pytest.raises(ValueError, match=r"expected parameters with a memory.*jrnn.remember"):
        jrnn.unroll(cell, params, xs)
    with pytest.raises(ValueError, match="memory: expected the batch axes"):
        jrnn.unroll(cell, jrnn.remember(cell, params, memory[:, :2]), xs)
