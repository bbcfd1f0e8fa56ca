"""The table that is the output layer too: its equations and gradients, files, memories, decoding, and its errors.

The laws run over its row in tests/cases.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import decoding

V, F, T, B = 7, 3, 5, 2


@pytest.fixture
def model():
    return jrnn.tied(jrnn.embed(V, F, table_init="uniform"), jrnn.stack(jrnn.gru(4), jrnn.dense(F)))


def by_hand(model, params, ids, lengths):
    """The same with two tables, which are given apart."""
    embedding, output, rest = params
    state, ys = jrnn.unroll(model.layer, rest["layer"], embedding[ids], lengths=lengths)
    valid = jnp.arange(len(ids))[:, None] < lengths[None]
    logits = jnp.einsum("tbf,vf->tbv", ys, output) + jnp.broadcast_to(rest["b"], (*ids.shape, V))
    return state, jnp.where(valid[..., None], logits, jnp.zeros((), logits.dtype))


def test_its_equations_and_gradients_from_both_uses_of_the_table(model, x64):
    params = jax.tree.map(lambda a: a.astype(jnp.float64), model.init(jax.random.key(0), None))
    params["b"] = params["b"] + jnp.arange(float(V))
    ids, lengths = jax.random.randint(jax.random.key(1), (T, B), 0, V), jnp.array([5, 3])
    state, ys = jrnn.unroll(model, params, ids, lengths=lengths)
    apart = params["embed"]["w"], params["embed"]["w"], {"layer": params["layer"], "b": params["b"]}
    expected = by_hand(model, apart, ids, lengths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), (state, ys), expected)
    assert ys.dtype == jnp.float64
    loss = lambda ys: jnp.sum(jnp.sin(ys))
    got = jax.grad(lambda p: loss(jrnn.unroll(model, p, ids, lengths=lengths)[1]))(params)
    embedding, output, rest = jax.grad(lambda p: loss(by_hand(model, p, ids, lengths)[1]))(apart)
    assert float(jnp.abs(embedding).max()) > 1e-3
    np.testing.assert_allclose(got["embed"]["w"], embedding + output, rtol=1e-9, atol=1e-12)
    rest_of_ours = {"layer": got["layer"], "b": got["b"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), rest_of_ours, rest)


def test_it_is_what_one_writes_and_survives_a_file(model, tmp_path):
    params = model.init(jax.random.key(0), None)
    assert repr(model) == "tied(embed(7, 3, table_init='uniform'), stack(gru(4), dense(3)))"
    assert eval(repr(model), vars(jrnn)) == model
    jrnn.save(tmp_path / "model", model, params)
    loaded, weights = jrnn.load(tmp_path / "model")
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_its_layer_is_given_the_memory():
    layer = jrnn.stack(jrnn.attention(jrnn.gru(4), 6), jrnn.dense(F))
    model = jrnn.tied(jrnn.embed(V, F), layer)
    params = model.init(jax.random.key(0), None)
    memory, ids = jax.random.normal(jax.random.key(1), (4, B, 6)), jnp.array([[0, 1], [2, 3], [4, 5]])
    lengths = jnp.array([4, 2])
    ready = jrnn.remember(model, params, memory, lengths=lengths)
    own = jrnn.remember(layer, params["layer"], memory, lengths=lengths)
    hidden = jrnn.unroll(layer, own, params["embed"]["w"][ids])[1]
    ys = jrnn.unroll(model, ready, ids)[1]
    np.testing.assert_allclose(ys, hidden @ params["embed"]["w"].T, atol=1e-5)
    step = lambda state, token: model.step(ready, state, token)
    found = decoding.greedy(step, model.initial_state(ready, (B,)), ids[0], 3)
    np.testing.assert_array_equal(found.tokens[0], ys[0].argmax(-1))


def test_its_states_are_put_out_at_every_step(model):
    params, ids = model.init(jax.random.key(0), None), jax.random.randint(jax.random.key(1), (T, B), 0, V)
    lengths = jnp.array([5, 3])
    last, (ys, states) = jrnn.unroll(jrnn.emit_state(model), params, ids, lengths=lengths)
    expected_last, expected = jrnn.unroll(model, params, ids, lengths=lengths)
    np.testing.assert_allclose(ys, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), last, expected_last)
    np.testing.assert_allclose(states[0].h[2], last[0].h.at[0].set(states[0].h[2, 0]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: jrnn.tied(jrnn.dense(3), jrnn.gru(3)), TypeError, r"embed: expected jrnn.embed\(vocab, features\)"),
        (lambda: jrnn.tied(jrnn.embed(5, 3), [jrnn.gru(3)]), TypeError, "layer: expected a layer"),
        (lambda: jrnn.tied(jrnn.embed(5, 3), jrnn.embed(5, 3)), ValueError, "layer: expected a layer that takes feat"),
        (
            lambda: jrnn.tied(jrnn.embed(5, 3), jrnn.gru(4)).init(jax.random.key(0), None),
            ValueError,
            r"layer: expected 3 output features.*got 4 of gru\(4\); end it with jrnn.dense\(3\)",
        ),
        (
            lambda: jrnn.unroll(jrnn.tied(jrnn.embed(5, 3), jrnn.gru(3)), {"embed": {}}, jnp.zeros((2, 2), int)),
            ValueError,
            'params: expected a dict with "embed", "layer" and "b"',
        ),
    ],
)
def test_errors_say_what_and_how(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValueError, match=r"xs: expected ids in \[0, 7\)"):
        jrnn.unroll(model, model.init(jax.random.key(0), None), jnp.array([[7, 0]]))
