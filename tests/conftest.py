"""What every test runs under: strict promotion, warnings as errors (see pyproject), float32 unless asked."""

import contextlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_platforms", "cpu")


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
