"""`jax.lax.scan` for recurrent steps: the same function, run by whatever schedule its body turns out to allow."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn._device import is_placed
from jrnn.cells.traced import TracedCell
from jrnn.jaxprs import affine
from jrnn.jaxprs.blocks import Piece, Refusal
from jrnn.jaxprs.flat import Op, evaluate, flatten
from jrnn.jaxprs.recipes import INPUT, INVARIANT, Recipe, needed, spread
from jrnn.schedules import SCHEDULES, native
from jrnn.schedules.steps import Steps, checkpointed, times_in_a_body

__all__ = ["choose_scan_backend", "scan"]

BACKENDS = ("hoisted", "native", "reference")
# From how many floating-point operations of a step's recurrent product on the hoisted schedule is chosen.
WORK = 2**18


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
    """`jax.lax.scan`, faster where the body is a recurrent step.

    The body is traced and read. Where it is a recurrent cell, however it is written, the loop is run as `jrnn.unroll`
    runs its own cells: what needs no state is computed for all steps at once, before the loop or after it, the products
    of the state are made one, and the gradients of the weights are products after the loop. Every other body is run by
    ``jax.lax.scan`` itself. `choose_scan_backend` says which of the two it is, and why.

    A body is read as a cell where

    - its carry is one or more float32 or float64 arrays of one shape ``(*B, H)``, and possibly arrays that no step
      changes,
    - one of these arrays, unchanged, is multiplied by weights,
    - all else that the next carry needs of the carry is elementwise, and
    - its outputs are computed from the inputs and from the array that is multiplied, before or after the step.

    So are the LSTM, GRU (reset after the product), MGU and Elman cells of Flax, Haiku and Equinox, and cells written by
    hand. Arrays of the carry may be replaced by constants where a flag among the inputs says so:
    ``jnp.where(reset[:, None], initial, h)``.

    Args:
      f: ``(carry, x) -> (carry, y)``, as for ``jax.lax.scan``.
      init: the carry before the first step.
      xs: a pytree of arrays with a leading axis of T steps, or None.
      length: T, needed where ``xs`` has no arrays.
      reverse: run from the last step to the first; outputs stay in the order of the inputs.
      unroll: how many steps to compile into one body, where the loop is a scan.
      backend: None chooses. "reference" is ``jax.lax.scan``, "hoisted" a scan of what cannot leave the loop, and
        "native" the loop as compiled code for a CPU. A backend that cannot serve raises an error that says why.
      remat: a number of steps n: keep the carry only before every n-th step, and recompute the rest in the backward
        pass, n steps at a time. "sqrt" takes sqrt(T) of them.

    Returns:
      ``(carry, ys)``, as ``jax.lax.scan`` does.

    Raises:
      Whatever ``jax.lax.scan`` raises for these arguments; ``ValueError`` for a ``backend`` that cannot serve.

    >>> w = jnp.eye(4) / 2
    >>> def step(h, x):
    ...     h = jnp.tanh(x + h @ w)
    ...     return h, h
    >>> h, ys = jrnn.scan(step, jnp.zeros((2, 4)), jnp.ones((5, 2, 4)))
    >>> ys.shape
    (5, 2, 4)
    """
    chosen = _choose(f, init, xs, length, reverse, backend, remat)
    if chosen.body is None:
        return _plain(f, init, xs, length, reverse, unroll, remat)
    return _run(chosen.body, chosen.name, bool(reverse), unroll, remat, chosen.consts, init, xs)


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
    """What `scan` would run for these arguments, and why.

    Args:
      f, init, xs, length, reverse, unroll, backend, remat: as for `scan`.

    Returns:
      ``(name, reason)``: "native", "hoisted" or "reference". The reason says what in the body keeps it from more.

    >>> jrnn.choose_scan_backend(lambda c, x: (c + x, c), jnp.zeros(3), jnp.ones((5, 3)))
    ('reference', 'the body is not read as a recurrent cell: it has no product of its state with weights')
    """
    chosen = _choose(f, init, xs, length, reverse, backend, remat)
    return chosen.name, chosen.reason


# --- choosing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """A body that was read: its form, and the tree of its outputs."""

    form: affine.Affine
    ys: Any

    @functools.cached_property
    def cell(self) -> TracedCell:
        hidden = self.form.leaves.index(self.form.hidden)
        return TracedCell(self.form.gates, self.form.units, hidden, self.product is None)

    @functools.cached_property
    def product(self) -> Any:
        """See `Parts.input_product`."""
        return self.form.parts.input_product(self.form.kinds)


@dataclass(frozen=True)
class _Choice:
    """What runs a body: as ``body``, whose constants are ``consts``, or as it is where this is None."""

    name: str
    reason: str
    body: Body | None = None
    consts: Any = ()


def _choose(
    f: Any, init: Any, xs: Any, length: Any, reverse: Any, backend: str | None, remat: int | str | None
) -> _Choice:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {list(BACKENDS)}, got {backend!r}")
    is_count = isinstance(remat, int) and not isinstance(remat, bool) and remat >= 1
    if not (remat is None or is_count or (isinstance(remat, str) and remat == "sqrt")):
        raise ValueError(f'remat: expected None, a positive number of steps or "sqrt", got {remat!r}')
    if backend == "reference":
        return _Choice("reference", "it was asked for by name")
    try:
        body, consts = _read(f, init, xs, length)
    except Refusal as refusal:
        reason = f"the body is not read as a recurrent cell: {refusal}"
        if backend is not None:
            raise ValueError(_cannot(backend, reason)) from None
        return _Choice("reference", reason)
    params, inputs, _, resets = jax.eval_shape(functools.partial(_operands, body), consts, init, xs)
    steps = Steps(None, resets, bool(reverse), remat=remat)
    if backend is not None:
        served, reason = SCHEDULES[backend].serves(body.cell, params, inputs, steps)
        if not served:
            raise ValueError(_cannot(backend, reason))
        return _Choice(backend, reason, body, consts)
    for decide in (native.pays, native.serves):
        chosen, reason = decide(body.cell, params, inputs, steps)
        if not chosen:
            break
    if chosen:
        return _Choice("native", f"the body is a recurrent cell: {reason}", body, consts)
    form = body.form
    work = 2 * math.prod(form.batch) * form.units**2 * len(form.gates.summed)
    if work < WORK:
        small = f"{work:.2g} floating-point operations a step are too few for scans in parts (from {WORK:.2g} on)"
        return _Choice("reference", f"the body is a recurrent cell; not native: {reason}; not hoisted: {small}")
    found = "the body is a recurrent cell, and what needs no state is taken out of the loop"
    return _Choice("hoisted", f"{found}; not native: {reason}", body, consts)


def _cannot(backend: str, reason: str) -> str:
    return f"backend: {backend!r} cannot run this body: {reason}; pass backend=None to let jrnn choose"


def _read(f: Any, init: Any, xs: Any, length: Any) -> tuple[Body, list[Any]]:
    """A body as a recurrent cell, and the values of its constants."""
    leaves = jax.tree.leaves(xs)
    if not leaves or not all(getattr(leaf, "shape", ()) for leaf in leaves):
        raise Refusal("its inputs are not arrays with a leading axis")
    lengths = {leaf.shape[0] for leaf in leaves} | ({length} if length is not None else set())
    if len(lengths) != 1 or not all(isinstance(n, int) and n > 0 for n in lengths):
        raise Refusal("its steps are not one known number, or there is none")
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(init)):
        raise Refusal("its carry has leaves that are not arrays")
    if any(map(is_placed, jax.tree.leaves((init, xs)))):
        raise Refusal("its operands lie on a mesh")
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
    try:
        closed, out = jax.make_jaxpr(f, return_shape=True)(init, x)
    except Exception as error:  # jax.lax.scan raises it again, in its own words
        raise Refusal(f"it cannot be traced ({type(error).__name__})") from error
    if closed.effects:
        raise Refusal("it has effects, which stay in order")
    if not (isinstance(out, tuple) and len(out) == 2) or jax.tree.structure(out[0]) != jax.tree.structure(init):
        raise Refusal("it does not return a carry like the one it is given, and an output")
    program, consts = flatten(closed)
    if any(map(is_placed, consts)):
        raise Refusal("its constants lie on a mesh")
    form = affine.read(program, len(consts), jax.tree.structure(init).num_leaves)
    return Body(form, jax.tree.structure(out[1])), consts


# --- running -----------------------------------------------------------------------------------------------------


def _plain(f: Any, init: Any, xs: Any, length: Any, reverse: Any, unroll: Any, remat: Any) -> tuple[Any, Any]:
    leaves = jax.tree.leaves(xs)
    if remat is None or not leaves or not isinstance(leaves[0].shape[0], int):
        return lax.scan(f, init, xs, length, reverse, unroll)
    steps = Steps(reverse=bool(reverse), remat=remat)
    segment = lambda carry, xs: lax.scan(f, carry, xs, None, reverse)
    return checkpointed(segment, init, xs, leaves[0].shape[0], steps)


# A function of its own, static in the body: a second call in eager mode with an equal body compiles nothing.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    body: Body, name: str, reverse: bool, unroll: Any, remat: Any, consts: Any, init: Any, xs: Any
) -> tuple[Any, Any]:
    params, inputs, state, resets = _operands(body, consts, init, xs)
    time = inputs.shape[0]
    steps = Steps(None, resets, reverse, remat=remat, unroll=times_in_a_body(time if unroll is True else unroll, time))
    last, hs = SCHEDULES[name].run(body.cell, params, inputs, state, steps)
    leaves, tree = jax.tree.flatten(init)
    for leaf, value in zip(body.form.leaves, last, strict=True):
        leaves[leaf] = value
    return tree.unflatten(leaves), _outputs(body, _invariant(body, consts, init), state.h, hs, xs, reverse)


def _invariant(body: Body, consts: Any, init: Any) -> dict[int, Any]:
    """The variables that are the same at each step. What is not used costs nothing once it is compiled."""
    form, leaves = body.form, jax.tree.leaves(init)
    env = dict(enumerate(consts))
    env.update((form.consts + i, leaves[i]) for i in form.fixed)
    evaluate((op for op in form.program.ops if form.kinds[op.outs[0]] == INVARIANT), env)
    return env


def _at_all_steps(body: Body, env: dict[int, Any], recipes: Sequence[Recipe], xs: Any) -> list[Any]:
    """``(T, ...)`` of each recipe."""
    form = body.form
    ops = needed(form.program, form.kinds, INPUT, recipes)

    def at_one(x: Any) -> list[Any]:
        inside = env | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
        evaluate(ops, inside)
        return [recipe.make(inside) for recipe in recipes]

    return jax.vmap(at_one)(xs) if recipes else []


def _operands(body: Body, consts: Any, init: Any, xs: Any) -> tuple[Any, jax.Array, Any, Any]:
    """``(params, xs, state, resets)`` of the cell that the body is."""
    form, units = body.form, body.form.units
    env = _invariant(body, consts, init)

    def vector(recipe: Recipe | None) -> jax.Array:
        return jnp.zeros(units, form.dtype) if recipe is None else spread(recipe.make(env), (units,))

    params: dict[str, Any] = {
        "w_hh": _columns(form.parts.v, env, (units, units), form.dtype),
        "theta": {str(i): vector(recipe) for i, recipe in enumerate(form.parts.theta)},
        "restart": (),
    }
    resets = None
    if form.resets is not None:
        (flags,) = _at_all_steps(body, env, [form.resets.flags], xs)
        resets = _over_batch(flags if form.resets.on else ~flags, form.batch)
        params["restart"] = tuple(spread(value.make(env), (*form.batch, units)) for value in form.resets.values)
    if body.product is None:
        parts = form.parts.inputs()
        made = iter(_at_all_steps(body, env, [p for p in parts if p is not None], xs))
        time = jax.tree.leaves(xs)[0].shape[0]
        shape = (*form.batch, units)
        given = [jnp.zeros((time, *shape), form.dtype) if p is None else _over_batch(next(made), shape) for p in parts]
        inputs = jnp.concatenate(given, -1)
    else:
        vectors, weights, biases = body.product
        given = _at_all_steps(body, env, vectors, xs)
        inputs = given[0] if len(given) == 1 else jnp.concatenate(given, -1)
        rows = [
            _columns([gate[i] for gate in weights], env, (a.shape[-1], units), form.dtype) for i, a in enumerate(given)
        ]
        params["w_ih"] = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
        params["b"] = jnp.concatenate([vector(bias) for bias in biases])
    leaves = jax.tree.leaves(init)
    return params, inputs, body.cell.state_type(*(leaves[i] for i in form.leaves)), resets


def _over_batch(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``(T, ...)`` broadcast to ``(T, *shape)``, axes missing after the first."""
    missing = len(shape) + 1 - a.ndim
    return spread(a.reshape(a.shape[0], *(1,) * missing, *a.shape[1:]), (a.shape[0], *shape))


def _columns(gates: Sequence[Sequence[Piece]], env: dict[int, Any], shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Weights of all gates side by side, each the sum of pieces ``shape``. Neighbours are taken in one piece."""
    parts: list[list[Piece]] = []
    for pieces in gates:
        last = parts[-1] if parts else []
        alone = len(pieces) == 1 and len(last) == 1
        if alone and last[0].weights == pieces[0].weights and last[0].stop == pieces[0].start:
            parts[-1] = [last[0]._replace(stop=pieces[0].stop)]
        else:
            parts.append(list(pieces))

    def made(pieces: list[Piece]) -> Any:
        columns = [piece.weights.columns(piece.start, piece.stop).make(env) for piece in pieces]
        return functools.reduce(lax.add, columns) if columns else jnp.zeros(shape, dtype)

    return jnp.concatenate([made(pieces) for pieces in parts], -1) if len(parts) > 1 else made(parts[0])


def _outputs(body: Body, env: dict[int, Any], first: jax.Array, hs: jax.Array, xs: Any, reverse: bool) -> Any:
    """The outputs of all steps at once, from the hidden state before the first step and after each."""
    form = body.form
    given: dict[Any, jax.Array] = {}
    if form.new_hidden in form.after:
        given[form.new_hidden] = hs
    if form.old_hidden in form.after:
        first = lax.expand_dims(first, (0,))
        given[form.old_hidden] = jnp.concatenate([hs[1:], first] if reverse else [first, hs[:-1]])
    rest = [out for out in form.outputs if out not in given]
    ops = _after(form, rest, given)

    def at_one(given: Any, x: Any) -> list[Any]:
        inside = env | given | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
        evaluate(ops, inside)
        return [inside[out] if isinstance(out, int) else jnp.asarray(out.value) for out in rest]

    made = iter(jax.vmap(at_one)(given, xs) if rest else ())
    return jax.tree.unflatten(body.ys, [given[out] if out in given else next(made) for out in form.outputs])


def _after(form: affine.Affine, wanted: Any, given: Any) -> tuple[Op, ...]:
    """The operations, in order, that outputs need and that are not the same at each step."""
    names = {out for out in wanted if isinstance(out, int)}
    ops = []
    for op in reversed(form.program.ops):
        if names.intersection(op.outs) - set(given) and form.kinds[op.outs[0]] != INVARIANT:
            ops.append(op)
            names.update(a for a in op.ins if isinstance(a, int))
    return tuple(reversed(ops))
