"""`jax.lax.scan` for recurrent steps: the same function, run by the fastest schedule that its body allows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn import schedules
from jrnn.jaxprs import flat, sites
from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.flat import Program
from jrnn.run.apart import Loop
from jrnn.run.recurrence import Recurrences
from jrnn.run.step import Read, cells, read, schedule
from jrnn.schedules.parts import Parts, jvp, of_one_step, trace
from jrnn.schedules.steps import Steps, check_remat, checkpointed, times_in_a_body

__all__ = ["choose_scan_backend", "scan"]

BACKENDS = ("associative", "hoisted", "native", "reference")


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    backend: str | None = None,
    remat: int | str | None = None,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, but faster if the body is a recurrent step.

    The body is traced and analysed. If it is a recurrent cell, in whatever form it is written, the loop runs as
    `jrnn.unroll` runs its own cells:

    - everything that does not need the state is computed for all steps at once, before or after the loop,
    - the matmuls of the state become one matmul a step, and
    - each weight gradient is one matmul after the loop.

    A body without a matmul of the state, whose next carry is an elementwise function of the carry and of matmuls of the
    input, runs in the native loop as well, where that serves.

    A body that is linear in its state, ``a * state + b`` element by element with ``a`` and ``b`` functions of only the
    input, otherwise runs as a `linear_scan`. By default it does so only if `linear_scan` is compiled code, and if the
    coefficients do not take much more memory than the inputs and outputs.

    Any other body is run by ``jax.lax.scan`` itself. `choose_scan_backend` returns which of these happens, and why.

    A body is recognised as a cell if

    - its carry consists of float32 or float64 arrays of one shape ``(*B, H)``, and of arrays that no step changes,
    - one of these arrays is multiplied by weights as it is,
    - every other use of the carry in the next carry is elementwise, and
    - its outputs can be computed from the inputs and the carry, before or after the step, by operations that can run
      for all steps at once.

    The input may be multiplied by its weights in the body, or for all steps before the scan: ``jnp.tanh(xw + h @ u)``.

    Leaves of the carry that do not depend on the cell's state, such as a counter, a random key or the input before, may
    stand beside it, in any shape and dtype. They run first, as a ``jax.lax.scan`` of their own. What the cell needs of
    them is then an input of its steps. Leaves that the cell does not depend on, such as a sum over its outputs, run
    after it in the same way, and so does a second layer, as a cell of its own. Branches and loops run before the cell
    if they do not depend on its state, and after it if its state does not depend on them.

    The LSTM, GRU (reset after the product), MGU and Elman cells of Flax, Haiku and Equinox are of this kind, and so are
    most cells written by hand. A flag among the inputs may replace the carry by constants, before the step or after it
    (``jnp.where(reset[:, None], initial, h)``), or hold it (``jnp.where(valid[:, None], new_h, h)``).

    A body that is not a cell but has a product of a carry-dependent value with weights (a matmul, or a convolution with
    a kernel) can run in parts: only the part that the next carry needs stays in the loop, and the gradients of those
    weights are one product each after it. By default a body with matmuls of at most 8 sequences runs so where it is
    differentiated, and as ``jax.lax.scan`` where it is not. With ``backend="hoisted"`` every such body runs in parts,
    which is faster for some bodies and slower for others.

    Args:
      f: ``(carry, x) -> (carry, y)``, as for ``jax.lax.scan``.
      init: the carry before the first step.
      xs: a pytree of arrays with a leading axis of T steps, or None.
      length: T, needed if ``xs`` has no arrays.
      reverse: run from the last step to the first; outputs stay in the order of the inputs.
      unroll: the number of steps to compile into one body, if the loop is a scan.
      backend: None chooses. "reference" is ``jax.lax.scan``, "hoisted" a scan of the part that cannot leave the loop,
        "native" the loop as compiled code for a CPU, and "associative" a `linear_scan`. A backend that cannot
        serve raises an error with the reason.
      remat: a number of steps n: store the carry only before every n-th step, and recompute the rest in the backward
        pass, n steps at a time. "sqrt" sets n to sqrt(T).

    Returns:
      ``(carry, ys)``, as ``jax.lax.scan`` does.

    Raises:
      The errors of ``jax.lax.scan`` for the same arguments; ``ValueError`` for a ``backend`` that cannot serve.

    >>> w = jnp.eye(4) / 2
    >>> def step(h, x):
    ...     h = jnp.tanh(x + h @ w)
    ...     return h, h
    >>> h, ys = jrnn.scan(step, jnp.zeros((2, 4)), jnp.ones((5, 2, 4)))
    >>> ys.shape
    (5, 2, 4)
    """
    init = _arrays(init)
    chosen = _choose(f, init, xs, length, reverse, backend, remat)
    if chosen.body is None or unroll < 0:  # jax.lax.scan raises the error
        return _plain(f, init, xs, length, reverse, unroll, remat)
    xs = _with_steps(xs, length)
    carry, ys = _run(chosen.body, chosen.plan, bool(reverse), unroll, remat, chosen.consts, init, xs)
    return carry, jax.tree.unflatten(chosen.ys, ys)


def choose_scan_backend(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    backend: str | None = None,
    remat: int | str | None = None,
) -> tuple[str, str]:
    """The schedule that `scan` would run for these arguments, and the reason.

    Args:
      f, init, xs, length, reverse, unroll, backend, remat: as for `scan`.

    Returns:
      ``(name, reason)``: "native", "hoisted", "associative" or "reference". The reason names the part of the
      body that rules out a faster schedule.

    >>> name, reason = jrnn.choose_scan_backend(lambda c, x: (jnp.sin(c + x), c), jnp.zeros(3), jnp.ones((5, 3)))
    >>> name
    'reference'
    >>> reason.split(": ")[-1]
    "its next state depends on 'sin' of its state, which is not linear"
    """
    chosen = _choose(f, _arrays(init), xs, length, reverse, backend, remat)
    return chosen.name, chosen.reason


# --- choosing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """The schedule of a body, and the body as it was read, with its constants and the tree of its outputs.

    ``body`` is None if `jax.lax.scan` runs the function unchanged.
    """

    name: str
    reason: str
    body: Read | Parts | InParts | None = None
    consts: Any = ()
    ys: Any = None
    plan: Any = None


def _choose(
    f: Any, init: Any, xs: Any, length: Any, reverse: Any, backend: str | None, remat: int | str | None
) -> _Choice:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {list(BACKENDS)}, got {backend!r}")
    check_remat(remat)
    if backend == "reference":
        return _Choice("reference", "it was asked for by name")
    steps = Steps(reverse=bool(reverse), remat=remat)
    try:
        program, ys, consts = _trace(f, init, xs, length)
        xs = _with_steps(xs, length)
        carry = jax.tree.leaves(init)
        try:
            body = read(program, len(consts), len(carry))
        except Refusal as refusal:
            return _in_parts(program, ys, consts, len(carry), refusal, backend)
    except Refusal as refusal:
        reason = f"the body is not recognised as a recurrent cell: {refusal}"
        if backend is not None:
            raise ValueError(_cannot(backend, reason)) from None
        return _Choice("reference", reason)
    linear = isinstance(cells(body)[0], Recurrences)
    is_read = "the body is read: " if linear else "the body is a recurrent cell: "
    found = schedule(body, xs, steps, backend)
    if isinstance(found, schedules.Refusal):
        if backend is not None:
            raise ValueError(_cannot(backend, found.reason))
        return _Choice("reference", is_read + found.reason)
    return _Choice(found.name, is_read + found.reason, body, consts, ys, found.plan)


# The most sequences in a step for which a body that is no cell is differentiated in parts by default. Up to here that
# was faster for every body that was measured (on AVX-512 CPUs); from about 32 on it was slower for some.
SEQUENCES = 8


def _in_parts(
    program: Program, ys: Any, consts: list[Any], carry: int, refusal: Refusal, backend: str | None
) -> _Choice:
    """The choice for a body that is no cell, for the reason in ``refusal``, which is raised if it runs as it is."""
    if backend not in (None, "hoisted"):
        raise refusal
    try:
        parts = Parts(sites.read(program, len(consts), carry))
    except Refusal as other:
        raise (refusal if backend is None else other) from None
    count = len(parts.form.sites)
    stays = "one product of its state stays" if count == 1 else f"{count} products of its state stay"
    stays = f"{stays} in the loop, and the gradients of the weights leave it"
    reason = f"the body is not recognised as a recurrent cell: {refusal}"
    if backend is not None:
        return _Choice("hoisted", f"{reason}; {stays}", parts, consts, ys)
    if parts.rows is None or parts.rows > SEQUENCES:
        raise refusal
    reason = f"{reason}; it runs as jax.lax.scan, but where it is differentiated, {stays}"
    return _Choice("hoisted", reason, InParts(program, parts), consts, ys)


@dataclass(frozen=True)
class InParts:
    """A body that is no cell, as a scan. It is differentiated in parts."""

    program: Program
    parts: Parts = field(compare=False)

    def run(self, plan: None, consts: Any, carry: Any, xs: Any, steps: Steps) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps."""

        @jax.custom_jvp
        def run(consts: Any, carry: Any, xs: Any) -> tuple[list[Any], list[Any]]:
            last, ys = Loop(self.program).run(None, consts, carry, xs, steps)
            outs = flat.typed(self.program, [*last, *ys])
            return outs[: len(last)], outs[len(last) :]

        def in_parts(consts: Any, carry: Any, xs: Any) -> tuple[list[Any], list[Any]]:
            return self.parts.run(None, consts, carry, xs, steps)

        run.defjvp(functools.partial(jvp, in_parts), symbolic_zeros=True)
        return run(list(consts), list(carry), xs)


def _arrays(init: Any) -> Any:
    """The carry with Python numbers converted to arrays. ``jax.lax.scan`` raises its own errors for other leaves."""
    number = lambda leaf: isinstance(leaf, bool | int | float | complex)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if number(leaf) else leaf, init)


def _cannot(backend: str, reason: str) -> str:
    return f"backend: {backend!r} cannot run this body: {reason}; pass backend=None to let jrnn choose"


def _trace(f: Any, init: Any, xs: Any, length: Any) -> tuple[Program, Any, list[Any]]:
    """A body as a program, the tree of its outputs, and the values of its constants."""
    leaves = jax.tree.leaves(xs)
    if not all(getattr(leaf, "shape", ()) for leaf in leaves):
        raise Refusal("its inputs are not arrays with a leading axis")
    lengths = {leaf.shape[0] for leaf in leaves} | ({length} if length is not None else set())
    if len(lengths) != 1 or not all(isinstance(n, int) and n > 0 for n in lengths):
        raise Refusal("its steps are not one known number, or there is none")
    body = f if leaves else lambda carry, _: f(carry, xs)
    return trace(body, init, jax.tree.map(of_one_step, _with_steps(xs, length)), xs)


def _with_steps(xs: Any, length: Any) -> Any:
    """The inputs, or an array of this many steps without elements if they have no arrays."""
    return xs if jax.tree.leaves(xs) else jnp.zeros((length, 0))


# --- running -----------------------------------------------------------------------------------------------------


def _plain(f: Any, init: Any, xs: Any, length: Any, reverse: Any, unroll: Any, remat: Any) -> tuple[Any, Any]:
    leaves = jax.tree.leaves(xs)
    if remat is None or not leaves or not isinstance(leaves[0].shape[0], int):
        return lax.scan(f, init, xs, length, reverse, unroll)
    steps = Steps(reverse=bool(reverse), remat=remat)
    return checkpointed(lambda xs, carry, steps: lax.scan(f, carry, xs, None, steps.reverse), xs, init, steps)


# Jitted with the body as a static argument, so that a second eager call with an equal body compiles nothing.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    body: Read | Parts | InParts,
    plan: Any,
    reverse: bool,
    unroll: Any,
    remat: Any,
    consts: Any,
    init: Any,
    xs: Any,
) -> Any:
    time = jax.tree.leaves(xs)[0].shape[0]
    steps = Steps(reverse=reverse, remat=remat, unroll=times_in_a_body(time if unroll is True else unroll, time))
    tree: Any
    leaves, tree = jax.tree.flatten(init)
    last, ys = body.run(plan, consts, leaves, xs, steps)
    return tree.unflatten(last), ys
