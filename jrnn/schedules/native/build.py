"""Compiles the loop once for this machine, and the gates once for each cell; registers the functions with XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from jrnn.schedules.native import cache

__all__ = ["available", "load", "load_linear"]

# Not -ffast-math, which does not preserve NaN.
FLAGS = ("-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w")
# The files of each library, and how each is optimised. All files are compiled at the same time, and the first result
# waits for them. The code that takes most of the run time is in products.cc; for the rest of the loop -O3 made no
# measurable difference, and takes three times as long to compile.
LOOP: dict[str, tuple[str, ...]] = {"bind.cc": ("-O1",), "kernel.cc": ("-Og",), "products.cc": ("-O3",)}
CELL: dict[str, tuple[str, ...]] = {"cell.cc": ("-O3",)}
LOOP_HEADERS = (
    "backward.h",
    "chunks.h",
    "ffi.h",
    "forward.h",
    "kernel.h",
    "products.h",
    "run.h",
    "threads.h",
    "vectors.h",
)
CELL_HEADERS = ("kernel.h", "vectors.h")
LINEAR: dict[str, tuple[str, ...]] = {"linear.cc": ("-O3",)}
LINEAR_HEADERS = ("ffi.h", "kernel.h", "threads.h")


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or g++ or clang++ on the path."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)


def available() -> tuple[bool, str]:
    """Whether kernels can be compiled here, and if not, why. The first call in a process loads or compiles the loop."""
    if reason := _missing():
        return False, reason
    try:
        loop = _loop(str(compiler()), cache.directories())
    except OSError as error:
        return False, str(error)
    return (False, loop) if isinstance(loop, str) else (True, "")


def _missing() -> str | None:
    """The reason why nothing can be compiled here, as far as it is known without an attempt; else None."""
    if os.environ.get("JRNN_NATIVE") == "0":
        return "switched off by JRNN_NATIVE=0"
    if platform.system() != "Linux":
        return f"it is compiled on Linux only, and this is {platform.system()}"
    if compiler() is None:
        return "it needs a C++ compiler, g++ or clang++, on the path (or named by $CXX), and there is none"
    return None


class Kernel:
    """A cell's compiled functions: their names in XLA, and the units of a block of their layout.

    The names depend on the functions and on the layout of their operands, but not on the compiler: an XLA program that
    was stored in a file finds them wherever it can run.
    """

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.unit_block: int = library.jrnn_unit_block()
        self.forward, self.backward = (f"{name}_{self.unit_block}_{which}" for which in ("forward", "backward"))


class Linear(NamedTuple):
    """The names in XLA of the linear recurrence and its gradient (``linear.cc``)."""

    forward: str
    backward: str


_lock = threading.Lock()
_linear: list[Linear] = []  # one at most, once it is registered with XLA
_kernels: dict[str, Kernel] = {}  # registered with XLA, by name, for the life of the process


def load(header: str) -> Kernel:
    """The kernel for a cell's header (see `emit.header`), compiled at its first use.

    Raises:
      RuntimeError: it cannot be compiled or loaded. The reason is found once, and is the same at every later call.
    """
    name = _kernel_name(header)
    with _lock:
        if name in _kernels:
            return _kernels[name]
        if reason := _missing():
            raise RuntimeError(reason)
        try:
            found = _libraries(header, str(compiler()), cache.directories())
        except OSError as error:
            raise RuntimeError(str(error)) from error
        if isinstance(found, str):
            raise RuntimeError(found)
        loop, cell = found
        cell.jrnn_link(loop.jrnn_enter_forward, loop.jrnn_enter_backward)
        kernel = Kernel(name, cell)
        jax.ffi.register_ffi_target(kernel.forward, jax.ffi.pycapsule(cell.jrnn_forward), platform="cpu")
        jax.ffi.register_ffi_target(kernel.backward, jax.ffi.pycapsule(cell.jrnn_backward), platform="cpu")
        return _kernels.setdefault(name, kernel)


def load_linear() -> Linear:
    """The linear recurrence, compiled at its first use.

    Raises:
      RuntimeError: it cannot be compiled or loaded. The reason is found once, and is the same at every later call.
    """
    with _lock:
        if _linear:
            return _linear[0]
        if reason := _missing():
            raise RuntimeError(reason)
        try:
            found = _linear_library(str(compiler()), cache.directories())
        except OSError as error:
            raise RuntimeError(str(error)) from error
        if isinstance(found, str):
            raise RuntimeError(f"the linear recurrence cannot be compiled: {found}")
        name = f"jrnn_{_digest(*_texts(*LINEAR, *LINEAR_HEADERS).values())}_0"
        names = Linear(f"{name}_forward", f"{name}_backward")
        jax.ffi.register_ffi_target(names.forward, jax.ffi.pycapsule(found.jrnn_linear_forward), platform="cpu")
        jax.ffi.register_ffi_target(names.backward, jax.ffi.pycapsule(found.jrnn_linear_backward), platform="cpu")
        _linear.append(names)
        return names


@functools.lru_cache(maxsize=8)
def _linear_library(path: str, directories: tuple[Path, ...]) -> ctypes.CDLL | str:
    flags = ("-pthread", f"-I{jax.ffi.include_dir()}")
    files = _texts(*LINEAR, *LINEAR_HEADERS)
    return _loaded(Library("linear", path, LINEAR, files, flags, jaxlib.__version__), directories)


@functools.lru_cache(maxsize=256)
def _kernel_name(header: str) -> str:
    return f"jrnn_{_digest(header, *_texts(*LOOP, *LOOP_HEADERS, *CELL).values())}"


@functools.lru_cache(maxsize=256)
def _libraries(header: str, path: str, directories: tuple[Path, ...]) -> tuple[ctypes.CDLL, ctypes.CDLL] | str:
    """The loop and a cell's gates, or why one of them is missing. Both are compiled at the same time."""
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_loop, path, directories)
        cell = _loaded(_cell_library(header, path), directories)
        loop = loading.result()
    if isinstance(loop, str):
        return loop
    return f"its gates could not be compiled: {cell}" if isinstance(cell, str) else (loop, cell)


@functools.lru_cache(maxsize=8)
def _loop(path: str, directories: tuple[Path, ...]) -> ctypes.CDLL | str:
    """The loop, or in one line the reason why it is missing."""
    found = _loaded(_loop_library(path), directories)
    if not isinstance(found, str):
        return found
    lines = found.splitlines()
    return f"the loop cannot be compiled: {next((line for line in lines if 'error:' in line), lines[0])}"


@dataclass(frozen=True)
class Library:
    """The sources and the compiler of a library. Its name is a digest of everything that its content depends on."""

    stem: str
    compiler: str
    sources: dict[str, tuple[str, ...]]  # the files to compile, and how each is optimised
    files: dict[str, str]
    flags: tuple[str, ...] = ()
    version: str = ""

    @property
    def name(self) -> str:
        # The processor is included because the code is compiled for it, and "sealed" because the file ends in a digest
        # of its content.
        flags = (*FLAGS, *itertools.chain(*self.sources.values()))
        depends = ("sealed", *self.files.values(), _version(self.compiler), *flags, self.version, _processor())
        return f"jrnn_{self.stem}_{_digest(*depends)}.so"


def _loop_library(path: str) -> Library:
    """The loop, and the functions that XLA calls."""
    flags = ("-pthread", f"-I{jax.ffi.include_dir()}")
    return Library("loop", path, LOOP, _texts(*LOOP, *LOOP_HEADERS), flags, jaxlib.__version__)


def _cell_library(header: str, path: str) -> Library:
    """A cell's gates."""
    return Library("cell", path, CELL, {**_texts(*CELL, *CELL_HEADERS), "cell.h": header})


def _texts(*names: str) -> dict[str, str]:
    return {name: _text(name) for name in names}


@functools.lru_cache(maxsize=16)
def _text(name: str) -> str:
    return (resources.files("jrnn.schedules.native") / name).read_text(encoding="utf-8")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _loaded(library: Library, directories: tuple[Path, ...]) -> ctypes.CDLL | str:
    """A library from the first directory that holds it or can be written to, or the reasons why there is none."""
    reasons = []
    for directory in directories:
        try:
            return _loaded_from(library, directory)
        except (OSError, RuntimeError) as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def _loaded_from(library: Library, directory: Path) -> ctypes.CDLL:
    cache.check_private(directory)
    path, fault = directory / library.name, None
    try:
        fault = cache.fault(path)
        if fault is None:
            cache.touch(path)
            return ctypes.CDLL(str(path))
    except FileNotFoundError:
        pass
    try:
        _compile(library, path)
    except (OSError, RuntimeError) as error:
        raise error if fault is None else RuntimeError(f"{path} {fault}, and cannot be made anew: {error}") from error
    if fault is not None:
        warnings.warn(f"jrnn: the compiled library {path} {fault}; it was compiled again", RuntimeWarning, stacklevel=2)
    return ctypes.CDLL(str(path))


def _compile(library: Library, target: Path) -> None:
    """Compiles a library and moves it into place as a whole. Another process may have put the same library there."""
    with cache.work(target.parent) as folder:
        for name, text in library.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        command = (library.compiler, *FLAGS, *library.flags, f"-I{folder}")
        units = library.sources.items()
        _run([(*command, *level, "-c", f"{folder / name}", "-o", f"{folder / name}.o") for name, level in units])
        made = folder / target.name
        _run([(*command, "-shared", *(f"{folder / name}.o" for name in library.sources), "-o", str(made))])
        made.write_bytes(cache.seal(made.read_bytes()))
        made.chmod(0o644)  # under every umask: a library that a group can write to is not loaded
        made.replace(target)


def _run(commands: list[tuple[str, ...]]) -> None:
    """Runs commands at the same time; raises if one fails."""
    # Messages in English, so that "error:" can be found, in any encoding.
    environment = {**os.environ, "LC_ALL": "C"}
    running = [
        subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment)
        for command in commands
    ]
    try:
        errors = [process.communicate()[1] for process in running]
    finally:
        for process in running:
            process.kill()  # has no effect on a process that has ended
    for command, process, error in zip(commands, running, errors, strict=True):
        if process.returncode:
            raise RuntimeError(f"the C++ compiler failed: {error[:4000]}\n{' '.join(command)}")


@functools.lru_cache(maxsize=8)
def _version(path: str) -> str:
    command = [path, "--version"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of matrices in bfloat16, which XLA uses."""
    return "amx_bf16" in _processor().split()


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))
