"""`jax.lax.scan` for recurrent steps: the same function, run by whatever schedule its body turns out to allow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn._device import varying_as
from jrnn.cells.traced import TracedCell
from jrnn.jaxprs import affine
from jrnn.jaxprs.flat import evaluate, flatten
from jrnn.schedules import SCHEDULES, native
from jrnn.schedules.steps import Steps, checkpointed, times_in_a_body

__all__ = ["choose_scan_backend", "scan"]

BACKENDS = ("hoisted", "native", "reference")
# From how many multiplications and additions of the recurrent product of one step on the hoisted schedule pays.
WORK = 2**17


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
    of the state are made one, and the gradients of the weights are products after the loop. Everything else is run by
    ``jax.lax.scan`` itself. `choose_scan_backend` says which, and why.

    Read are bodies whose carry is one or more float arrays of one shape ``(*B, H)``, of which one, unchanged, is
    multiplied by weights, and whose other operations on the carry are elementwise: LSTM, GRU (reset after the product),
    Elman and MGU cells of Flax, Haiku and Equinox, and cells written by hand. The outputs may be any function of the
    input and of the array that is multiplied. An array of the carry may be replaced by a constant where a flag among
    the inputs says so (``jnp.where(reset[:, None], initial, h)``).

    Args:
      f: ``(carry, x) -> (carry, y)``, as for ``jax.lax.scan``.
      init: the carry before the first step.
      xs: a pytree of arrays with a leading axis of T steps, or None.
      length: T, needed where ``xs`` has no arrays.
      reverse: run from the last step to the first; outputs stay in the order of the inputs.
      unroll: how many steps to compile into one body, where the loop is a scan.
      backend: None chooses; "reference" is ``jax.lax.scan``, "hoisted" a scan of what cannot leave the loop, and
        "native" the loop as compiled code for a CPU. One that cannot serve is an error that says why.
      remat: a number of steps n: keep the carry only before every n-th step and recompute the rest in the backward pass,
        n steps at a time; "sqrt" takes sqrt(T) of them.

    Returns:
      ``(carry, ys)``, as ``jax.lax.scan`` does.

    >>> w = jnp.eye(4) / 2
    >>> def step(h, x):
    ...     h = jnp.tanh(x + h @ w)
    ...     return h, h
    >>> h, ys = jrnn.scan(step, jnp.zeros((2, 4)), jnp.ones((5, 2, 4)))
    >>> ys.shape, jrnn.choose_scan_backend(step, jnp.zeros((2, 4)), jnp.ones((5, 2, 4)), backend="hoisted")[0]
    ((5, 2, 4), 'hoisted')
    """
    _check(backend, remat)
    chosen = _choose(f, init, xs, length, reverse, unroll, backend, remat)
    if chosen.form is None:
        return _plain(f, init, xs, length, reverse, unroll, remat)
    return _run(chosen.form, chosen.name, reverse, unroll, remat, chosen.consts, init, xs)


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
      ``(name, reason)``: "native", "hoisted" or "reference". The reason names what in the body keeps it from more.

    >>> name, reason = jrnn.choose_scan_backend(lambda c, x: (c + x, c), jnp.zeros(3), jnp.ones((5, 3)))
    >>> name, reason
    ('reference', 'the body has no affine form: it has no product of its state with weights')
    """
    _check(backend, remat)
    chosen = _choose(f, init, xs, length, reverse, unroll, backend, remat)
    return chosen.name, chosen.reason


def _check(backend: Any, remat: Any) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {list(BACKENDS)}, got {backend!r}")
    is_count = isinstance(remat, int) and not isinstance(remat, bool) and remat >= 1
    if not (remat is None or is_count or (isinstance(remat, str) and remat == "sqrt")):
        raise ValueError(f'remat: expected None, a positive number of steps or "sqrt", got {remat!r}')


class _Chosen:
    def __init__(self, name: str, reason: str, form: Any = None, consts: Any = ()) -> None:
        self.name, self.reason, self.form, self.consts = name, reason, form, consts


def _choose(
    f: Any, init: Any, xs: Any, length: Any, reverse: Any, unroll: Any, backend: str | None, remat: Any
) -> _Chosen:
    if backend == "reference":
        return _Chosen("reference", "asked for by name")
    try:
        form, consts, time = _read(f, init, xs, length)
    except affine.Refusal as refusal:
        reason = f"the body has no affine form: {refusal}"
        if backend is not None:
            raise ValueError(
                f"backend: {backend!r} cannot run this body: {reason}; pass backend=None to let jrnn choose"
            ) from None
        return _Chosen("reference", reason)
    arguments = jax.eval_shape(lambda consts, init, xs: _arguments(form, consts, init, xs)[:4], consts, init, xs)
    cell = _cell(form)
    params, inputs, _, _ = arguments
    steps = Steps(None, arguments[3], bool(reverse), remat=remat)
    if backend is not None:
        served, reason = SCHEDULES[backend].serves(cell, params, inputs, steps)
        if not served:
            raise ValueError(
                f"backend: {backend!r} cannot run this body: {reason}; pass backend=None to let jrnn choose"
            )
        return _Chosen(backend, reason, form, consts)
    pays, why = native.pays(cell, params, inputs, steps)
    if pays:
        pays, why = native.serves(cell, params, inputs, steps)
        if pays:
            return _Chosen("native", f"the body is a recurrent cell: {why}", form, consts)
    rows = 1
    for size in form.batch:
        rows *= size
    work = 2 * rows * form.units * form.units * len(form.gates.summed)
    if work < WORK:
        return _Chosen("reference", f"the body is a recurrent cell; not native: {why}; not hoisted: its steps are small")
    return _Chosen(
        "hoisted", f"the body is a recurrent cell: what needs no state leaves the loop; not native: {why}", form, consts
    )


def _read(f: Any, init: Any, xs: Any, length: Any) -> tuple[Any, Any, int]:
    """The form of a body, the values of its constants, and the number of steps."""
    leaves = jax.tree.leaves(xs)
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") and leaf.shape for leaf in leaves):
        raise affine.Refusal("its inputs are not arrays with a leading axis")
    lengths = {leaf.shape[0] for leaf in leaves} | ({length} if length is not None else set())
    if len(lengths) != 1 or not all(isinstance(n, int) for n in lengths):
        raise affine.Refusal("its number of steps is not one known number")
    (time,) = lengths
    if time == 0 or not leaves:
        raise affine.Refusal("there are no steps, or no inputs")
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(init)):
        raise affine.Refusal("its carry has leaves that are not arrays")
    operands = jax.tree.leaves((init, xs))
    if any(_placed(leaf) for leaf in operands) or not jax.sharding.get_abstract_mesh().empty:
        raise affine.Refusal("its operands lie on a mesh")
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
    try:
        closed, out = jax.make_jaxpr(f, return_shape=True)(init, x)
    except Exception as error:  # which jax.lax.scan will raise again, in its own words
        raise affine.Refusal(f"it cannot be traced ({type(error).__name__})") from error
    if closed.effects:
        raise affine.Refusal("it has effects, which stay in order")
    if not (isinstance(out, tuple) and len(out) == 2) or jax.tree.structure(out[0]) != jax.tree.structure(init):
        raise affine.Refusal("it does not return a carry like the one it was given, and an output")
    program, consts = flatten(closed)
    if any(_placed(c) for c in consts):
        raise affine.Refusal("its constants lie on a mesh")
    form = affine.read(program, len(consts), jax.tree.structure(init).num_leaves)
    return _Formed(form, jax.tree.structure(out[1])), consts, time


class _Formed:
    """A form, and the tree of the outputs."""

    def __init__(self, form: Any, ys: Any) -> None:
        self.form, self.ys = form, ys

    def __hash__(self) -> int:
        return hash((self.form, self.ys))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Formed) and (self.form, self.ys) == (other.form, other.ys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.form, name)


def _placed(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype"):
        return False
    kind = jax.typeof(leaf)
    mesh = getattr(getattr(kind, "sharding", None), "mesh", None)
    return bool(getattr(mesh, "axis_types", None)) or varying_as(leaf, leaf) is not leaf


def _plain(f: Any, init: Any, xs: Any, length: Any, reverse: Any, unroll: Any, remat: Any) -> tuple[Any, Any]:
    if remat is None:
        return lax.scan(f, init, xs, length, reverse, unroll)
    leaves = jax.tree.leaves(xs)
    time = leaves[0].shape[0] if leaves else length
    if not isinstance(time, int) or not leaves:
        return lax.scan(jax.checkpoint(f, prevent_cse=False), init, xs, length, reverse, unroll)
    steps = Steps(reverse=reverse, remat=remat)
    return checkpointed(lambda carry, xs: lax.scan(f, carry, xs, None, reverse), init, xs, time, steps)


def _cell(form: Any) -> TracedCell:
    return TracedCell(form.gates, form.units, form.hidden, form.u is not None)


def _arguments(form: Any, consts: Any, init: Any, xs: Any) -> Any:
    """``(params, inputs, state, resets, env)`` of the cell that a body was read as."""
    leaves = jax.tree.leaves(init)
    env = dict(enumerate(consts))
    env.update((form.consts + i, leaves[i]) for i in form.fixed)
    # What of these is not used costs nothing once it is compiled.
    evaluate([op for op in form.program.ops if form.kinds[op.outs[0]] == affine.INVARIANT], env)
    dtype = leaves[form.fields[0]].dtype
    hidden, batch = form.units, form.batch

    def vector(recipe: Any) -> Any:
        return _fill(jnp.zeros((), dtype) if recipe is None else affine.make(recipe, env), (hidden,))

    flags = form.resets[:1] if form.resets is not None else ()
    per_step = _for_all_steps(form, env, [*(form.inputs if form.u is None else form.u), *flags], xs)
    resets = None
    if flags:
        flag = per_step.pop()
        resets = _fill_steps(flag, (flag.shape[0], *batch))
        resets = resets if form.resets[1] else ~resets
    columns = functools.partial(_columns, env=env, hidden=hidden, dtype=dtype)
    params: dict[str, Any] = {
        "w_hh": columns(form.weights, rows=hidden),
        "theta": {str(i): vector(recipe) for i, recipe in enumerate(form.theta)},
        "restart": (),
    }
    if form.resets is not None:
        params["restart"] = tuple(
            _fill(affine.make(recipe, env), (*batch, hidden)) for recipe in form.resets[2]
        )
    if form.u is None:
        inputs = per_step[0] if len(per_step) == 1 else jnp.concatenate(per_step, -1)
        rows = [a.shape[-1] for a in per_step]
        blocks = [
            columns([gate[i] for gate in form.input_weights], rows=count) for i, count in enumerate(rows)
        ]
        params["w_ih"] = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)
        params["b"] = jnp.concatenate([vector(recipe) for recipe in form.bias])
    else:
        shape = (per_step[0].shape[0], *batch, hidden)
        inputs = jnp.concatenate([_fill_steps(a, shape) for a in per_step], -1)
    state = _cell(form).state_type(*(leaves[i] for i in form.fields))
    return params, inputs, state, resets, env


def _for_all_steps(form: Any, env: dict[int, Any], recipes: list[Any], xs: Any) -> list[Any]:
    """Recipes that may need x, for all steps at once: ``(T, ...)``."""
    recipes = [("const", None) if r is None else r for r in recipes]
    ops = affine.outside(form, affine.INPUT, recipes)

    def one(x: Any) -> list[Any]:
        inside = dict(env)
        first = form.consts + form.carry
        inside.update(enumerate(jax.tree.leaves(x), first))
        evaluate(ops, inside)
        dtype = form.program.forms[form.consts + form.fields[0]].dtype
        return [jnp.zeros((), dtype) if r[1] is None else affine.make(r, inside) for r in recipes]

    return list(jax.vmap(one)(xs))


def _fill(a: Any, shape: tuple[int, ...]) -> Any:
    return a if jnp.shape(a) == shape else jnp.broadcast_to(a, shape)


def _fill_steps(a: Any, shape: tuple[int, ...]) -> Any:
    """``(T, ...)`` broadcast to ``(T, *B, H)``: axes are missing after the first."""
    return _fill(a.reshape(a.shape[0], *(1,) * (len(shape) - a.ndim), *a.shape[1:]), shape)


def _columns(gates: Any, env: dict[int, Any], hidden: int, dtype: Any, rows: int) -> jax.Array:
    """The weights of all gates side by side: of each, pieces that are added up. Neighbours are taken in one piece."""
    parts: list[Any] = []
    runs: list[list[Any]] = []
    for pieces in gates:
        if len(pieces) == 1 and runs and runs[-1] and runs[-1][-1].weights == pieces[0].weights:
            if runs[-1][-1].stop == pieces[0].start:
                runs[-1].append(pieces[0])
                continue
        runs.append([pieces[0]] if len(pieces) == 1 else [])
        if len(pieces) != 1:
            runs[-1] = [pieces]  # a sum, or nothing
    for run in runs:
        first = run[0]
        if isinstance(first, affine.Piece):
            parts.append(_range(first.weights, first.start, run[-1].stop, env))
        elif first:
            parts.append(sum(_range(p.weights, p.start, p.stop, env) for p in first))
        else:
            parts.append(jnp.zeros((rows, hidden), dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def _range(weights: Any, start: int, stop: int, env: dict[int, Any]) -> jax.Array:
    w = affine.make(weights, env)
    return w if (start, stop) == (0, w.shape[-1]) else lax.slice_in_dim(w, start, stop, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    form: Any, name: str, reverse: bool, unroll: Any, remat: Any, consts: Any, init: Any, xs: Any
) -> tuple[Any, Any]:
    """The body over all steps, as the cell that it was read as, and what it puts out of that."""
    params, inputs, state, resets, env = _arguments(form, consts, init, xs)
    time = inputs.shape[0]
    count = time if unroll is True else max(int(unroll), 1)
    steps = Steps(None, resets, bool(reverse), remat=remat, unroll=times_in_a_body(count, time))
    last, hs = SCHEDULES[name].run(_cell(form), params, inputs, state, steps)

    leaves = list(jax.tree.leaves(init))
    for i, value in zip(form.fields, last, strict=True):
        leaves[i] = value
    return jax.tree.unflatten(jax.tree.structure(init), leaves), _outputs(form, env, state.h, hs, xs, bool(reverse))


def _outputs(form: Any, env: dict[int, Any], first: Any, hs: Any, xs: Any, reverse: bool) -> Any:
    program = form.program
    field = form.fields[form.hidden]
    new, old = program.results[field], form.consts + field
    results = program.results[form.carry :]
    given = {}
    if new in form.after:
        given[new] = hs
    if old in form.after:
        first = first[None]
        given[old] = jnp.concatenate([hs[1:], first] if reverse else [first, hs[:-1]])
    rest = [r for r in results if r not in given]
    ops = _after(form, rest, given)

    def one(given: Any, x: Any) -> list[Any]:
        inside = {**env, **given}
        inside.update(enumerate(jax.tree.leaves(x), form.consts + form.carry))
        evaluate(ops, inside)
        return [inside[r] if isinstance(r, int) else jnp.asarray(r.value) for r in rest]

    found = iter(jax.vmap(one, axis_size=hs.shape[0])(given, xs) if rest else ())
    return jax.tree.unflatten(form.ys, [given[r] if r in given else next(found) for r in results])


def _after(form: Any, wanted: Any, given: Any) -> Any:
    names = {r for r in wanted if isinstance(r, int)}
    ops = []
    for op in reversed(form.program.ops):
        found = names.intersection(op.outs) - set(given)
        if found and form.kinds[op.outs[0]] != affine.INVARIANT:
            ops.append(op)
            names.update(a for a in op.ins if isinstance(a, int))
    return tuple(reversed(ops))
