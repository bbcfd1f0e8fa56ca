"""The compiled loop, ``backend="native"``: the cache of its libraries, and programs that are kept in files.

A C++ compiler makes a library of the loop once for this machine, and a small one for each cell. They are kept in
`cache_directory`, which holds at most 64 MiB (the libraries that were used longest ago are deleted first) and can be
emptied by `clear_cache`.

A program can be kept in a file in two ways:

- ``jax.export`` keeps what runs anywhere, in plain JAX, without the compiled loop. Its ``serialize`` needs the package
  ``flatbuffers``, which ``pip install "jrnn[export]"`` installs.
- ``jax.experimental.serialize_executable`` keeps the machine code of one program for machines like this one, and calls
  the compiled loop by name. A new process must call `register` before it runs such a program.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from jrnn.schedules.native.cache import cache_directory, clear_cache

__all__ = ["cache_directory", "clear_cache", "register"]

_TARGET = re.compile(r"\bjrnn_[0-9a-f]+_[0-9]+_(?:forward|backward)\b")


def register(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Makes the compiled functions that a program calls known to XLA in this process.

    XLA finds them by name. They are registered when a program is traced, so a process that takes an executable from a
    file and traces nothing has to call this first; else XLA raises "No FFI handler registered for …". This traces and
    lowers the program and compiles nothing of it but the cells' C++, where the cache does not have that.

    Args:
      function: the function that was compiled and kept, jitted or not.
      *args, **kwargs: its arguments, or `jax.ShapeDtypeStruct` in place of arrays, as it was compiled for.

    Raises:
      ValueError: the program calls no compiled function here; `jrnn.choose_backend` says why a model does not.

    >>> from jax.experimental import serialize_executable
    >>> cell = jrnn.lstm(64)
    >>> params, xs = cell.init(jax.random.key(0), 64), jnp.ones((50, 4, 64))
    >>> run = jax.jit(lambda params, xs: jrnn.unroll(cell, params, xs)[1])
    >>> kept = serialize_executable.serialize(run.lower(params, xs).compile())
    >>> # In another process, which has `kept` from a file:
    >>> if jrnn.choose_backend(cell, params, xs)[0] == "native":
    ...     jrnn.native.register(run, params, xs)
    >>> loaded = serialize_executable.deserialize_and_load(*kept)
    >>> loaded(params, xs).shape
    (50, 4, 64)
    """
    lower = getattr(function, "lower", None) or jax.jit(function).lower
    if not _TARGET.search(lower(*args, **kwargs).as_text()):
        raise ValueError(
            f"function: expected one that calls the compiled loop (backend='native'), got {function!r}, which calls "
            "none here; jrnn.choose_backend(model, params, xs) says why a model does not"
        )
