"""What the tests of every framework hold its converters to: exact round trips, and outputs as the framework's own."""

import jax
import jax.numpy as jnp
import numpy as np

import jrnn

T, B, F, H, VOCAB = 6, 3, 3, 4, 7
LENGTHS = np.array([4, 6, 1])  # ragged, and not sorted


def random_params(model, dtype="float32", seed=3):
    """Parameters of the right shapes, all of them random, biases too; quicker than `init`, which orthogonalises."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: model.init(key, F), jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape).astype(jnp.dtype(dtype))), shapes)


def inputs(model, dtype="float32"):
    rng = np.random.default_rng(5)
    if model.event_ndim == 0:
        return rng.integers(1, VOCAB, size=(T, B))
    return rng.normal(size=(T, B, F)).astype(jnp.dtype(dtype))


def assert_same(actual, expected):
    """Equal models, and parameters equal to the bit, in shape and in dtype."""
    (model, params), (expected_model, expected_params) = actual, expected
    assert model == expected_model
    assert jax.tree.structure(params) == jax.tree.structure(expected_params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_outputs(model, params, expected, lengths=LENGTHS, tolerance=1e-5):
    """`jrnn.unroll` gives the outputs expected at all valid steps, and zero in padding."""
    lengths = np.full(B, T) if lengths is None else lengths  # always an array, so that both compile once
    ys = np.asarray(jrnn.unroll(model, params, inputs(model), lengths=lengths)[1])
    valid = np.arange(T)[:, None] < lengths
    np.testing.assert_allclose(ys[valid], np.asarray(expected)[valid], rtol=tolerance, atol=tolerance)
    assert not ys[~valid].any()
