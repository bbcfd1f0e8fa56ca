"""What every test runs under: strict promotion, warnings as errors (see pyproject), float32 unless asked.

Everything runs on the CPU; ``pytest -m gpu`` runs the tests that are marked so, on an NVIDIA GPU. Tests marked
``nightly`` run only under ``pytest -m nightly``, or where they are named by ``file.py::test``. pyproject.toml describes
the markers.
"""

import collections
import contextlib
import gc
import importlib.util
import os
import pathlib
import sys
import tempfile

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    if config.option.markexpr == "gpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU
    else:
        jax.config.update("jax_platforms", "cpu")
    if "JRNN_TEST_OPTIMIZED" not in os.environ:
        compile_quickly()
    # Kernels compiled by the tests are theirs, shared by the processes that run them.
    if "JRNN_CACHE_DIR" not in os.environ:
        os.environ["JRNN_CACHE_DIR"] = _kernels(config)


# Flags of XLA, as users have them. Jax 0.11 does not know the second, and XLA stops at a flag that it does not know.
OPTIMIZED = {"xla_backend_optimization_level": 3} | (
    {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
)


def compile_quickly():
    """Lets XLA skip the optimization of machine code, which takes half of the time of many tests; few results change.

    ``JRNN_TEST_OPTIMIZED=1`` keeps it, and so does a test that compiles with ``OPTIMIZED``. XLA reads the variable when
    JAX makes its first device, which is later than this.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = [f"--{name}={'false' if value is True else 0}" for name, value in OPTIMIZED.items()]
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in flags if flag not in given)])


def _kernels(config):
    """A directory that the next run finds again, or one for this run where pytest is told to keep no cache."""
    if config.pluginmanager.hasplugin("cacheprovider"):
        directory = config.cache.mkdir("kernels")
        directory.chmod(0o700)  # whatever the umask is: one that a group can write to is refused
        return str(directory)
    temporary = tempfile.TemporaryDirectory(prefix="jrnn-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(temporary.cleanup)
    return temporary.name


def pytest_collection_modifyitems(config, items):
    sample(items)
    leave_out_nightly(config, items)
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    reason = "runs on an NVIDIA GPU, with pytest -m gpu"
    if config.option.markexpr == "gpu":
        found = jax.default_backend()
        reason = None if found == "gpu" else f"needs an NVIDIA GPU and jax's CUDA plugin; JAX found a {found}"
    for item in marked if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session):
    """Makes Python look for cyclic garbage less often: JAX keeps what it traced, so the heap grows with every test.

    To look through all of it took a seventh of the time of the tests of the laws.
    """
    del session
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 40)


def pytest_runtest_teardown(item, nextitem):
    """Frees the programs compiled so far where they are many.

    A program takes several memory mappings, of which Linux gives a process 65,530; a process at that bound dies inside
    LLVM without a message.
    """
    del item
    if nextitem is not None and _mappings() > 30_000:
        jax.clear_caches()
        gc.collect()


def _mappings():
    """The number of memory mappings of this process, or 0 where the system does not say."""
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def sample(items):
    """Marks as nightly all but one of every n cases of a test that is ``sampled(n)``.

    The one is the first. ``JRNN_TEST_SAMPLE=1`` takes the second, and so on.
    """
    seen = collections.Counter()
    taken = int(os.environ.get("JRNN_TEST_SAMPLE", 0))
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None or item.get_closest_marker("nightly") is not None:
            continue
        test = item.nodeid.partition("[")[0]
        if (seen[test] - taken) % marker.args[0]:
            item.add_marker(pytest.mark.nightly)
        seen[test] += 1


def leave_out_nightly(config, items):
    expression = config.option.markexpr
    if "nightly" in expression or expression == "gpu" or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("nightly") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("nightly") is None]


def load_example(name):
    """A module made of ``examples/name.py``, which finds ``examples/shared.py`` as it does when it is run."""
    script = pathlib.Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", script)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(script.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    return module


@pytest.fixture
def x64():
    """Double precision for one test: oracles are compared to rounding, not to a loose tolerance."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def count_compilations():
    """Counts XLA compilations inside the block: a second call with equal arguments must add none."""
    counter = {"compilations": 0}

    def listen(event, duration, **kwargs):
        del duration, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            counter["compilations"] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counter
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def in_loops(closed, *names):
    """The equations of the named primitives that stand in the bodies of loops, of a closed jaxpr."""

    def found(jaxpr, inside):
        for eqn in jaxpr.eqns:
            if inside and eqn.primitive.name in names:
                yield eqn
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from found(inner, inside or eqn.primitive.name == "scan")

    return list(found(closed.jaxpr, False))
