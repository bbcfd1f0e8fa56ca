"""The compiled loop, ``backend="native"``: the cache of its libraries, and programs that are stored in files.

A C++ compiler builds a library of the loop once for this machine, and a small one for each cell. They are stored in
`cache_directory`, which holds at most 64 MiB (the least recently used libraries are deleted first) and can be emptied
by `clear_cache`.

A program can be stored in a file in two ways:

- ``jax.export`` stores a program in plain JAX, without the compiled loop, which runs on any machine. Its ``serialize``
  needs the package ``flatbuffers``, which ``pip install "jrnn[export]"`` installs.
- ``jax.experimental.serialize_executable`` stores the machine code of one program for machines like this one, and calls
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
    """Registers with XLA, in this process, the compiled functions that a program calls.

    XLA finds them by name. They are registered when a program is traced. A process that loads an executable from a file
    traces nothing, so it has to call this first; otherwise XLA raises "No FFI handler registered for …". The program is
    traced and lowered but not compiled; only the cells' C++ is, unless the cache has it.

    Args:
      function: the function that was compiled and stored, jitted or not.
      args, kwargs: the arguments that it was compiled for, or `jax.ShapeDtypeStruct` in place of arrays.

    Raises:
      ValueError: the program calls no compiled function here; `jrnn.choose_backend` gives the reason for a model.

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
