"""Times the schedules on your own shapes, to compare the fastest with the one that `jrnn.unroll` chooses by default."""

from __future__ import annotations

import functools
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import as_tree
from jrnn._core.devices import default_device
from jrnn.cells.base import Layer
from jrnn.run.unrolling import choose_backend, unroll
from jrnn.schedules import SCHEDULES, check_backend

__all__ = ["Timing", "Tuning", "tune"]

_ROUND_S = 0.01  # shorter calls are repeated until the clock has this much to measure
_WORK = ("forward", "train")


@dataclass(frozen=True)
class Timing:
    """A schedule's row: median milliseconds of the forward pass, and of the forward and backward pass.

    A time is None if the schedule refused or failed. ``reason`` says why, and is None if both times were measured.

    >>> Timing("hoisted", 1.0, 3.0).train_ms
    3.0
    """

    backend: str
    forward_ms: float | None
    train_ms: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Tuning:
    """The measurements of `tune`; ``str()`` of it is a table.

    ``device`` is the device, ``default`` the schedule that ``backend=None`` runs, and ``rows`` has a `Timing` for each
    schedule.

    >>> rows = (Timing("hoisted", 2.0, 5.0), Timing("reference", 1.0, 6.0))
    >>> found = Tuning("cpu", "hoisted", rows)
    >>> found.train, found.forward
    ('hoisted', 'reference')
    """

    device: str
    default: str
    rows: tuple[Timing, ...]

    @property
    def forward(self) -> str | None:
        """The schedule with the fastest forward pass, to pass as ``backend=``; None if none was timed."""
        return self._fastest("forward_ms")

    @property
    def train(self) -> str | None:
        """The schedule with the fastest forward and backward pass; None if none has gradients."""
        return self._fastest("train_ms")

    def _fastest(self, which: str) -> str | None:
        timed = [(getattr(row, which), i) for i, row in enumerate(self.rows) if getattr(row, which) is not None]
        return self.rows[min(timed)[1]].backend if timed else None

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("backend", "forward ms", "forward+backward ms", "")]
        for row in self.rows:
            times = ["-" if ms is None else f"{ms:.4g}" for ms in (row.forward_ms, row.train_ms)]
            lines.append((row.backend, *times, row.reason or ""))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines]
        choice = f"fastest on {self.device}: forward {self.forward}, forward+backward {self.train}"
        return "\n".join([*table, f"{choice}; backend=None runs {self.default}"])


def tune(
    model: Layer,
    params: Any,
    xs: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    remat: int | str | None = None,
    unroll: int = 1,
    backends: tuple[str, ...] | None = None,
    repeats: int = 7,
    seconds: float = 2.0,
    quiet: bool = False,
) -> Tuning:
    """Times every schedule that serves on these arguments, prints the table and the choice, and returns them.

    Each schedule is compiled, forward and forward+backward (gradients of a random weighting of the outputs with respect
    to parameters and floating-point inputs), and timed warm. The schedules take turns, so that a slow moment of the
    machine affects all of them. A schedule that refuses or fails has a row with the reason. Nothing is stored: pass the
    choice to `unroll` as ``backend=``.

    Args:
      model, params, xs, state, lengths, mask, resets, reverse, key, remat, unroll: as for `jrnn.unroll`; the values of
        ``xs`` hardly matter, but its shape ``(T, *B, F)`` and its dtype do.
      backends: names of the schedules to time; None for all.
      repeats: the largest number of turns.
      seconds: the time after which no further turn begins; two turns are always made. Compilation is not counted.
      quiet: print nothing.

    Returns:
      A `Tuning`: ``train`` and ``forward`` name the fastest schedules, ``default`` the one that ``backend=None`` runs.

    Raises:
      ValueError, TypeError: the errors of `jrnn.unroll` for the same arguments.

    >>> from jrnn.run.tuning import tune
    >>> cell = jrnn.elman(2)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> found = tune(cell, params, jnp.ones((5, 2, 3)), backends=("hoisted",), quiet=True)
    >>> found.train, found.forward, found.default
    ('hoisted', 'hoisted', 'hoisted')
    >>> state, ys = jrnn.unroll(cell, params, jnp.ones((5, 2, 3)), backend=found.train)
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats: expected a positive int, got {repeats!r}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds!r}")
    names = list(SCHEDULES) if backends is None else list(backends)
    if not names:
        raise ValueError(f"backends: expected None or some of {sorted(SCHEDULES)}, got {backends!r}")
    for name in names:
        check_backend(name, "backends")
    default, _ = choose_backend(model, params, xs, key=key)
    flags = {"lengths": lengths, "mask": mask, "resets": resets, "key": key}
    options = {"reverse": reverse, "remat": remat, "unroll": unroll}
    args = (as_tree(params), jnp.asarray(xs), state, flags)
    run = functools.partial(_forward, model, tuple(options.items()))
    # Raises the errors of `unroll` for these arguments; the flags are not traced, so that their values are checked.
    check = lambda params, xs, state: run("reference", params, xs, state, flags)
    out = jax.eval_shape(check, *args[:3])
    weights = jax.tree.map(lambda y: jax.random.normal(jax.random.key(0), y.shape).astype(y.dtype), out[1])

    calls: dict[tuple[str, str], Any] = {}
    reasons: dict[str, str] = {}
    for name in names:
        for work in _WORK:
            function = functools.partial(run, name)
            if work == "train":
                function = functools.partial(_gradients, function, weights)
            try:
                compiled = jax.jit(function).lower(*args).compile()
                jax.block_until_ready(compiled(*args))
            except Exception as error:  # any error of a compiler or a device goes into the row
                reasons[name] = _words(error, work)
                break
            calls[name, work] = functools.partial(compiled, *args)
    samples = _interleaved(calls, repeats, seconds)
    rows = []
    for name in names:
        forward, train = (samples.get((name, work)) for work in _WORK)
        rows.append(Timing(name, forward, train, reasons.get(name)))
    found = Tuning(default_device().device_kind, default, tuple(rows))
    if not quiet:
        print(found)
    return found


def _forward(model: Layer, options: Any, name: str, params: Any, xs: Any, state: Any, flags: Any) -> Any:
    return unroll(model, params, xs, state, **flags, **dict(options), backend=name)


def _gradients(function: Any, weights: Any, params: Any, xs: Any, state: Any, flags: Any) -> Any:
    floats = jnp.issubdtype(xs.dtype, jnp.floating)

    def loss(params: Any, xs: Any) -> Any:
        ys = function(params, xs, state, flags)[1]
        pairs = zip(jax.tree.leaves(ys), jax.tree.leaves(weights), strict=True)
        floating = [(y, w) for y, w in pairs if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum(jnp.sum(y * w, dtype=jnp.result_type(float)) for y, w in floating)

    return jax.grad(loss, (0, 1) if floats else 0, allow_int=not floats)(params, xs)


def _interleaved(calls: dict[Any, Any], repeats: int, seconds: float) -> dict[Any, float]:
    """The median milliseconds of each call, which is sampled once in every turn."""
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    counts: dict[Any, int] = {}
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn > 1 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            if name not in counts:
                counts[name] = max(1, math.ceil(_ROUND_S / max(_seconds(call, 1), 1e-7)))
            samples[name].append(1e3 * _seconds(call, counts[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def _seconds(call: Any, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / count


def _words(error: Exception, work: str) -> str:
    text = str(error).strip()
    if isinstance(error, ValueError) and text.startswith("backend:"):
        return text.split(": ", 2)[-1].split("; pass backend=None")[0]
    return f"{'no gradients' if work == 'train' else 'failed'}: {type(error).__name__}: {text.splitlines()[0][:200]}"
