"""Names that every docstring's example may use without importing them."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# Modules whose library may not be installed: their examples are not collected then.
collect_ignore = [] if importlib.util.find_spec("flax") else ["jrnn/flax"]


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    import jrnn

    names = {"dataclasses": dataclasses, "jax": jax, "jnp": jnp, "jrnn": jrnn, "np": np, "optax": optax}
    doctest_namespace.update(names)


@pytest.fixture
def quick_compilation(monkeypatch):
    """XLA with few of its optimisations, here and in processes started from here.

    For examples, and for tests of what is computed around compiled programs, or of their mathematics: they spend their
    time compiling. The programs themselves are tested as users have them where ``JRNN_TEST_OPTIMIZED`` is set: see
    `tests.conftest.compile_quickly`.
    """
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _doctests_compile_quickly(request):
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("quick_compilation")
