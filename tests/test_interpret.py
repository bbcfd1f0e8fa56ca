"""The interpreter of the laws gives what JAX gives, randomness to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrnn._interpret import call


def drawn(key, data):
    keys = jax.random.split(jax.random.fold_in(key, data), (2, 3))
    bits = [jax.random.bits(keys[0, 1], (3,), f"uint{width}") for width in (8, 16, 32)]
    each = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys[1])
    several = jax.random.bernoulli(
        jax.random.wrap_key_data(jax.random.key_data(keys[1, 2]), impl=jax.random.key_impl(key)), 0.3, (2, 5)
    )
    steps = jax.lax.scan(lambda key, i: (jax.random.fold_in(key, i), jax.random.uniform(key)), key, jnp.arange(3))
    return keys, bits, each, several, steps, jax.random.permutation(keys[0, 0], 7)


def ordered(xs):
    return jax.lax.cummax(xs, 0), jax.lax.cummin(xs, 1, reverse=True), jnp.argmax(xs, 1), (xs > 2).any(0), xs.all(1)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (drawn, lambda: (jax.random.key(3), np.uint32(9))),
        (drawn, lambda: (jax.random.key(3, impl="rbg"), np.uint32(9))),
        (ordered, lambda: (jnp.arange(12.0).reshape(3, 4) % 5,)),
    ],
    ids=["keys", "keys_of_another_kind", "order"],
)
@pytest.mark.parametrize("precise", [False, True], ids=["float32", "float64"])
def test_interpreted_is_what_jax_gives(function, arguments, precise):
    with jax.enable_x64(precise):
        got, wanted = call(function, *arguments()), function(*arguments())
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_allclose(a, b, rtol=2e-6)
