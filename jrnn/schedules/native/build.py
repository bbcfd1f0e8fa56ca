"""Compiles the loop, once for this machine, and each cell's gates, with its C++ compiler; makes them known to XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
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
    """Whether kernels can be compiled here, and why not; the first call in a process loads the loop, or makes it."""
    if os.environ.get("JRNN_NATIVE") == "0":
        return False, "switched off by JRNN_NATIVE=0"
    if platform.system() != "Linux":
        return False, f"it is compiled on Linux only, and this is {platform.system()}"
    path = compiler()
    if path is None:
        return False, "it needs a C++ compiler, g++ or clang++, on the path (or named by $CXX), and there is none"
    loop = _loop(path, *_directories())
    return (False, loop) if isinstance(loop, str) else (True, "")


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$JRNN_CACHE_DIR``, or ``jrnn`` in the user's cache directory."""
    return _directories()[0]


def _directories() -> tuple[Path, ...]:
    """The cache directory, and one to fall back to where none was asked for by name."""
    if named := os.environ.get("JRNN_CACHE_DIR"):
        return (Path(named),)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "jrnn", Path(tempfile.gettempdir()) / f"jrnn-{os.getuid()}"


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
    loop = _loop(compiler() or "", *_directories())
    if isinstance(loop, str):
        raise RuntimeError(loop)
    path = _compiled(header, loop.directory)
    library = ctypes.CDLL(str(path))
    library.jrnn_link(loop.library.jrnn_enter_forward, loop.library.jrnn_enter_backward)
    kernel = Kernel(path.stem, library)
    jax.ffi.register_ffi_target(kernel.forward, jax.ffi.pycapsule(library.jrnn_forward), platform="cpu")
    jax.ffi.register_ffi_target(kernel.backward, jax.ffi.pycapsule(library.jrnn_backward), platform="cpu")
    return kernel


class Loop:
    """The library of the loop, and the directory that it was found in or made in."""

    def __init__(self, library: ctypes.CDLL, directory: Path) -> None:
        self.library, self.directory = library, directory


@functools.lru_cache(maxsize=8)
def _loop(path: str, *directories: Path) -> Loop | str:
    """The loop from the first directory that can hold it, or why from none."""
    reasons = []
    for directory in directories:
        try:
            _own(directory)
            return Loop(ctypes.CDLL(str(_compiled_loop(directory))), directory)
        except (OSError, RuntimeError) as error:
            lines = str(error).splitlines()
            reasons.append(next((line for line in lines if "error:" in line), lines[0]))
    return f"the loop cannot be compiled: {'; '.join(reasons)}"


def _own(directory: Path) -> None:
    """Raises where a directory cannot be made, or where another user could put libraries into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{directory} belongs to another user, or others may write to it")


def _compiled_loop(directory: Path) -> Path:
    """The shared library of the loop, and of what XLA calls."""
    flags = ("-pthread", f"-I{jax.ffi.include_dir()}")
    headers = ("kernel.h", "threads.h", "vectors.h")
    return _make("loop", ("bind.cc", "kernel.cc"), headers, "", flags, directory, jaxlib.__version__)


def _compiled(header: str, directory: Path) -> Path:
    """The shared library of a cell's gates."""
    return _make("cell", ("cell.cc",), ("kernel.h", "vectors.h"), header, (), directory)


def _make(
    stem: str, sources: tuple[str, ...], headers: tuple[str, ...], cell: str, flags: tuple[str, ...], directory: Path,
    version: str = "",
) -> Path:  # fmt: skip
    """A shared library, compiled unless it is there: it is named by all that it depends on."""
    files = {name: (resources.files("jrnn.schedules.native") / name).read_text() for name in (*sources, *headers)}
    files["cell.h"] = cell
    # The processor too: the code is for the one it is compiled on.
    parts = (*files.values(), _version(compiler() or ""), *FLAGS, version, _processor())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = directory / f"jrnn_{stem}_{digest}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=directory) as work:
        for name, text in files.items():
            (Path(work) / name).write_text(text)
        command = (str(compiler()), *FLAGS, *flags, f"-I{work}")
        _run([(*command, "-c", f"{work}/{name}", "-o", f"{work}/{name}.o") for name in sources])
        made = f"{work}/{target.name}"
        _run([(*command, "-shared", *(f"{work}/{name}.o" for name in sources), "-o", made)])
        # Another process may have made it meanwhile: the same, put in place whole.
        os.replace(made, target)
    return target


def _run(commands: list[tuple[str, ...]]) -> None:
    """Commands at once; raises where one fails."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in running]
    for command, process, error in zip(commands, running, errors, strict=True):
        if process.returncode:
            raise RuntimeError(f"the C++ compiler failed: {error[:4000]}\n{' '.join(command)}")


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
