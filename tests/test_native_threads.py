"""The threads of the compiled loop and the memory that it keeps: limits of the system are met, not tripped over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jrnn.schedules.native import build

pytestmark = pytest.mark.skipif(not build.available()[0], reason=build.available()[1] or "")

HERE = Path(__file__).parent


def compile_with(*arguments):
    subprocess.run([build.compiler(), "-std=c++17", "-O1", "-g", "-pthread", *arguments], check=True)


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """The program that checks ``threads.h``, under sanitizers where the compiler has them."""
    program = tmp_path_factory.mktemp("threads") / "checks"
    command = [f"-I{Path(build.__file__).parent}", str(HERE / "threads.cc"), "-o", str(program)]
    try:
        compile_with("-fsanitize=address,undefined", *command)
    except subprocess.CalledProcessError:
        compile_with(*command)
    return program


@pytest.mark.parametrize("check", ["threads", "quotas", "memory"])
def test_threads_and_memory(checks, check, tmp_path):
    """Threads that cannot be started are done without; quotas of control groups count; little memory is kept."""
    # Leaks are not looked for: threads that wait for work hold their memory until the process ends.
    options = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    subprocess.run([checks, check, tmp_path / "groups"], env=options, timeout=60, check=True)


REFUSES = """
#include <cerrno>
#include <dlfcn.h>
#include <pthread.h>
extern "C" int refuse = 0;
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                              void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const Create create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  return refuse ? EAGAIN : create(thread, attributes, run, argument);
}
"""
RUN = """
import ctypes, sys
import jax, jax.numpy as jnp, numpy as np
import jrnn
cell = jrnn.lstm(128)
params = cell.init(jax.random.key(0), 64)
xs = jax.random.normal(jax.random.key(1), (40, 16, 64))
def gradient(backend):
    return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(jrnn.unroll(cell, params, xs, backend=backend)[1]))))
expected, native = gradient("reference")(params), gradient("native").lower(params).compile()
refuse = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "refuse")
for refuse.value in (1, 0):
    for name, found in native(params).items():
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-3)
print("done")
"""


def test_a_thread_that_cannot_be_started(tmp_path):
    """The loop runs with the threads that there are, and with more of them once the system allows them."""
    (tmp_path / "refuses.cc").write_text(REFUSES)
    library = tmp_path / "refuses.so"
    compile_with("-fPIC", "-shared", str(tmp_path / "refuses.cc"), "-o", str(library), "-ldl")
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RUN, library]
    result = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert result.stdout == "done\n", result.stderr
