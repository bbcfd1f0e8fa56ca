"""The package as a whole: what it exports, what importing it costs, and that calling it twice compiles once."""

import inspect
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from tests.conftest import count_compilations


@pytest.mark.parametrize("name", jrnn.__all__)
def test_every_public_name_is_documented(name):
    if name == "flax":
        pytest.importorskip("flax", reason="Flax is not installed")
    value = getattr(jrnn, name)
    documented = value.__doc__ and value.__doc__.strip()
    assert documented
    if inspect.isfunction(value):
        assert ">>> " in value.__doc__, f"{name} has no example"


def test_a_script_beside_the_clone_imports_the_package(tmp_path):
    """Python prefers a folder ``jrnn`` beside the script to an import hook, as setuptools may install for ``-e``."""
    (tmp_path / "jrnn").mkdir()
    (tmp_path / "script.py").write_text("import jrnn\njrnn.lstm(2)\n")
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True)


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


def test_no_name_hides_a_module():
    code = """
import importlib, pkgutil, sys, jrnn
for module in pkgutil.walk_packages(jrnn.__path__, "jrnn."):
    importlib.import_module(module.name)
for name, module in list(sys.modules.items()):
    parent, _, last = name.rpartition(".")
    assert not name.startswith("jrnn.") or getattr(sys.modules[parent], last) is module, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.nightly
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


def test_a_key_changes_nothing_where_nothing_is_random():
    """Training code passes a key to any model: one without randomness gives the same, and compiles no second time."""
    model, key = jrnn.stack(jrnn.lstm(3), jrnn.bidirectional(jrnn.gru(2))), jax.random.key(1)
    params, xs, lengths = model.init(jax.random.key(0), 5), jnp.ones((4, 2, 5)), jnp.array([4, 1])
    expected = jrnn.unroll(model, params, xs, lengths=lengths)
    traces = jrnn_traces()
    got = jrnn.unroll(model, params, xs, lengths=lengths, key=key)
    assert jrnn_traces() == traces
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jrnn.choose_backend(model, params, xs, key=key) == jrnn.choose_backend(model, params, xs)
    assert jrnn.draw(model.layers[0], params[0], key, xs[0]) is params[0]


def jrnn_traces():
    from jrnn.run.unrolling import _unroll

    return _unroll._cache_size()


def test_dtypes_that_mean_the_same_compile_once():
    """Whatever kind of integer ``start`` is, and whether or not an array's dtype came from a Python number."""

    def weak(tree):
        return jax.tree.map(lambda a: jnp.full(a.shape, 0.5), tree)

    cell = jrnn.variational(jrnn.lstm(3), inputs=0.5)
    params = cell.init(jax.random.key(0), 5)
    xs, state, key = jnp.ones((4, 2, 5)), cell.initial_state(params, (2,)), jax.random.key(1)
    trees = [weak(tree) for tree in (params, xs, state)]
    assert all(leaf.weak_type for leaf in jax.tree.leaves(trees))
    starts = (7, np.int64(7), np.uint32(7), np.uint8(7), jnp.int32(7), jnp.asarray(7))
    expected, _ = jrnn.unroll(cell, params, xs, state, key=key, start=7)
    # Casts are programs too, but small ones.
    cast = [jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), tree) for tree in trees]
    traces = jrnn_traces()
    with count_compilations() as counter:
        for start in starts:
            got, _ = jrnn.unroll(cell, params, xs, state, key=key, start=start)
            assert (np.asarray(got.h) == np.asarray(expected.h)).all()
        for i, tree in enumerate(trees):
            last, _ = jrnn.unroll(cell, *(tree if i == j else a for j, a in enumerate(cast)), key=key)
            assert not last.h.weak_type
        jrnn.unroll(cell, *trees, key=key)
    assert jrnn_traces() == traces
    assert counter["compilations"] == 0
    # Traced, they are cast too.
    shape = jax.eval_shape(lambda *trees: jrnn.unroll(cell, *trees, key=key, start=trees[1].size), *trees)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(shape))
    jax.jit(lambda start: jrnn.unroll(cell, *trees, key=key, start=start))(7)
    assert jrnn_traces() <= traces + 2


@pytest.mark.smoke
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
