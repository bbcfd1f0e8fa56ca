"""The package as a whole: what it exports, what importing it costs, and that calling it twice compiles once."""

import inspect
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jrnn


@pytest.mark.parametrize("name", jrnn.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(jrnn, name)
    documented = value.__doc__ and value.__doc__.strip()
    assert documented
    if inspect.isfunction(value):
        assert ">>> " in value.__doc__, f"{name} has no example"


def test_importing_jrnn_imports_nothing_heavy():
    code = """
import sys, jrnn
heavy = {"flax", "torch", "matplotlib", "orbax", "tqdm", "chex", "optax", "keras"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import jrnn.training, jrnn.diagnose, jrnn.interop  # which take what they need where it is used
early = {"matplotlib", "orbax.checkpoint", "torch", "tqdm"} & set(sys.modules)
assert not early, early
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_suite_runs_where_pytest_keeps_no_cache():
    root = pathlib.Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "JRNN_CACHE_DIR"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "--collect-only", "-q"]
    subprocess.run([*command, "tests/test_streaming.py"], cwd=root, env=environment, check=True)


def test_an_eager_call_compiles_once():
    def call():
        cell = jrnn.stack(jrnn.lstm(3), jrnn.dense(2))  # made anew: equal, not identical
        return jrnn.unroll(cell, params, jnp.ones((4, 2, 5)), lengths=jnp.array([4, 1]))

    params = jrnn.stack(jrnn.lstm(3), jrnn.dense(2)).init(jax.random.key(0), 5)
    call()
    traces = jrnn_traces()
    call()
    assert jrnn_traces() == traces


def jrnn_traces():
    from jrnn.unroll import _unroll

    return _unroll._cache_size()


def test_a_static_cell_traces_once():
    traces = []

    @jax.jit
    def run(params, xs):
        traces.append(1)
        return jrnn.unroll(jrnn.gru(3), params, xs)[1]

    params = jrnn.gru(3).init(jax.random.key(0), 5)
    for _ in range(3):
        run(params, jnp.ones((4, 2, 5)))
    assert len(traces) == 1

    static = jax.jit(lambda cell, params, xs: traces.append(1) or jrnn.unroll(cell, params, xs)[1], static_argnums=0)
    for _ in range(3):
        static(jrnn.gru(3, reset="after"), params, jnp.ones((4, 2, 5)))
    assert len(traces) == 2
