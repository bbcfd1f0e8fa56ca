"""Compiles the kernel for a cell with the C++ compiler of this machine, once, and makes it known to XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import jax
import jaxlib

__all__ = ["available", "cache_directory", "load"]

# Not -ffast-math: a NaN must stay one.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w")


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or g++ or clang++ on the path."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)


def available() -> tuple[bool, str]:
    """Whether kernels can be compiled here, and why not."""
    if platform.system() != "Linux":
        return False, f"it is compiled on Linux only, and this is {platform.system()}"
    if compiler() is None:
        return False, "it needs a C++ compiler, g++ or clang++, on the path (or named by $CXX), and there is none"
    return True, ""


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$JRNN_CACHE_DIR``, or ``jrnn`` in the user's cache directory."""
    if named := os.environ.get("JRNN_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jrnn"


class Kernel:
    """A compiled kernel: the names of its functions in XLA, and the units of a block of its layout."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.forward, self.backward = f"{name}_forward", f"{name}_backward"
        self.unit_block: int = library.jrnn_unit_block()


@functools.lru_cache(maxsize=256)
def load(header: str) -> Kernel:
    """The kernel for a cell's header (see `emit.header`), compiled unless it was before.

    Raises:
      RuntimeError: where the compiler fails, with its own words.
    """
    path = _compiled(header)
    library = ctypes.cdll.LoadLibrary(str(path))
    kernel = Kernel(path.stem, library)
    jax.ffi.register_ffi_target(kernel.forward, jax.ffi.pycapsule(library.jrnn_forward), platform="cpu")
    jax.ffi.register_ffi_target(kernel.backward, jax.ffi.pycapsule(library.jrnn_backward), platform="cpu")
    return kernel


def _compiled(header: str) -> Path:
    """The shared library for a header: of the kernel, and of what XLA calls, which all kernels share."""
    bind = _make("bind.o", "bind.cc", ("-c", f"-I{jax.ffi.include_dir()}"), jaxlib.__version__)
    return _make("kernel.so", "kernel.cc", ("-shared", str(bind), "-pthread"), jaxlib.__version__, header)


def _make(name: str, source: str, flags: tuple[str, ...], version: str, header: str = "") -> Path:
    """One run of the compiler, unless its result is there: named by all that it depends on."""
    sources = {name: (resources.files("jrnn.schedules.native") / name).read_text() for name in ("kernel.h", source)}
    sources["cell.h"] = header
    # The processor too: the code is for the one it is compiled on.
    parts = (*sources.values(), _version(compiler() or ""), *FLAGS, version, _processor())
    stem, suffix = name.split(".")
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = cache_directory() / f"jrnn_{stem}_{digest}.{suffix}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        for file, text in sources.items():
            (Path(work) / file).write_text(text)
        made = Path(work) / target.name
        command = [str(compiler()), *FLAGS, f"-I{work}", f"{work}/{source}", *flags, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the C++ compiler failed: {' '.join(command)}\n{done.stderr[-4000:]}")
        # Another process may have made it meanwhile: the same, put in place whole.
        os.replace(made, target)
    return target


@functools.lru_cache(maxsize=8)
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))
