"""Names that every docstring's example may use without importing them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    import jrnn

    names = {"dataclasses": dataclasses, "jax": jax, "jnp": jnp, "jrnn": jrnn, "np": np, "optax": optax}
    doctest_namespace.update(names)
