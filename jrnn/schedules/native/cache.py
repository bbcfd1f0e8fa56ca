"""The directory of compiled libraries: where it is, which libraries may be loaded from it, and how it stays small.

A library is code that this process will run. So it is loaded only from a directory and a file that nobody but the user
(or root) can write to, and only if it is complete: the file ends in a SHA-256 digest of its content, after everything
that the loader reads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_directory", "check_private", "clear_cache", "directories", "fault", "seal", "tidy", "touch", "work"]

# The bytes of libraries that a directory may hold. A cell takes about 17 thousand, the loop about 110 thousand.
LIMIT = 64 * 2**20
# The age, in seconds, from which on the folder of a compilation is taken as left by a killed process. A compilation
# takes seconds, and keeps changing its folder.
ABANDONED = 3600.0
LIBRARIES, FOLDERS = "jrnn_*.so", "jrnn_tmp_"


def cache_directory() -> Path:
    """The directory in which the next compiled library will be kept; it is made if it does not exist.

    The environment variable ``JRNN_CACHE_DIR`` names it. A relative path is taken from the working directory at its
    first use, and stays there if the process changes its working directory later. Where the variable is not set, the
    directory is ``jrnn`` in the user's cache directory (``$XDG_CACHE_HOME`` or ``~/.cache``); where that cannot be
    written to, or there is no home directory, it is ``jrnn-<user id>`` in the directory of temporary files.

    Raises:
      OSError: no directory can be used: none can be made or written to, or other users can write to it.

    >>> jrnn.native.cache_directory().is_dir()
    True
    """
    reasons = []
    for directory in directories():
        try:
            check_private(directory)
            if os.access(directory, os.W_OK | os.X_OK):
                return directory
            reasons.append(f"{directory} cannot be written to")
        except OSError as error:
            reasons.append(str(error))
    raise OSError(f"no directory can hold compiled libraries: {'; '.join(reasons)}; name another by JRNN_CACHE_DIR")


def clear_cache() -> None:
    """Deletes all libraries that were compiled for ``backend="native"``, and the remains of killed compilations.

    Libraries that a process has loaded keep working there. The next process that needs one compiles it again.

    Raises:
      OSError: a library cannot be deleted.

    >>> jrnn.native.clear_cache()  # doctest: +SKIP
    """
    for directory in directories():
        if directory.is_dir() and directory.stat().st_uid in _trusted():
            for library in directory.glob(LIBRARIES):
                library.unlink(missing_ok=True)
            tidy(directory)


def directories() -> tuple[Path, ...]:
    """The directory that the user named; else the one in the user's cache directory, and one to fall back to."""
    if named := os.environ.get("JRNN_CACHE_DIR"):
        return (_absolute(named),)
    found = []
    # A path that is not absolute is invalid by the XDG specification; "~" stays as it is where there is no home.
    caches = map(os.path.expanduser, filter(None, (os.environ.get("XDG_CACHE_HOME"), "~/.cache")))
    if caches_of_user := next(filter(os.path.isabs, caches), None):
        found.append(Path(caches_of_user) / "jrnn")
    with contextlib.suppress(FileNotFoundError):  # no directory for temporary files
        found.append(Path(tempfile.gettempdir()) / f"jrnn-{os.geteuid()}")
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _absolute(named: str) -> Path:
    """The directory, resolved once for each name, so that it stays the same when the working directory changes."""
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"JRNN_CACHE_DIR is {named!r}, and there is no such home directory; name an absolute path"
        ) from error


def _trusted() -> tuple[int, int]:
    return os.geteuid(), 0


def check_private(directory: Path) -> None:
    """Makes a directory if it does not exist; raises OSError if it cannot be made or other users can write to it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for found in (directory.lstat(), directory.stat()):  # of a link, the owner of the link too
        if found.st_uid not in _trusted():
            raise PermissionError(f"{directory} belongs to another user, who could put libraries into it")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{directory} can be written to by its group or by others, who could put libraries into it; "
            f"run chmod go-w {directory}"
        )


def seal(content: bytes) -> bytes:
    """A library with its digest at the end."""
    return content + hashlib.sha256(content).digest()


def fault(path: Path) -> str | None:
    """The reason why a library must not be loaded, or None if it may be loaded.

    Raises:
      FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            whole = file.read()
    except PermissionError:
        return "cannot be read"
    if found.st_uid not in _trusted():
        return "belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written to by its group or by others"
    size = hashlib.sha256().digest_size
    return None if whole == seal(whole[:-size]) else "is damaged"


def touch(path: Path) -> None:
    """Sets a library's time of last use, if it can be written."""
    with contextlib.suppress(OSError):
        os.utime(path)


@contextlib.contextmanager
def work(directory: Path) -> Iterator[Path]:
    """A folder for a compilation, deleted at its end, as are the remains of killed compilations."""
    with tempfile.TemporaryDirectory(prefix=FOLDERS, dir=directory, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
    tidy(directory)


def tidy(directory: Path) -> None:
    """Deletes folders of killed compilations, and the least recently used libraries beyond LIMIT.

    Other processes may do the same at the same time, or compile. Files that cannot be deleted are left.
    """
    for folder in directory.glob(f"{FOLDERS}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.lstat().st_mtime > ABANDONED:
                shutil.rmtree(folder)
    found = []
    for library in directory.glob(LIBRARIES):
        with contextlib.suppress(OSError):
            found.append((library.stat().st_mtime, library.stat().st_size, library))
    total = 0
    for _, size, library in sorted(found, reverse=True):
        total += size
        if total > LIMIT:
            with contextlib.suppress(OSError):
                library.unlink()
