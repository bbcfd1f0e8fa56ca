"""The entry point: checks the arguments, walks the model, and chooses a schedule for each cell."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn import sequence
from jrnn._core.checks import as_tree, describe, is_traced, prng_key, readable, same_form
from jrnn._core.devices import batch_spec, one_step, placed, placed_as, varying_as
from jrnn.cells.base import Layer, check_layer, features_of
from jrnn.cells.form import LinearForm
from jrnn.run.step import plan_linear, read_step
from jrnn.schedules import Plan, Refusal, Steps, Task, check_backend, choose
from jrnn.schedules.steps import SEQUENCE, check_remat, check_step, restarts, select, zeroed

__all__ = ["choose_backend", "draw", "unroll"]


def unroll(
    cell: Layer,
    params: Any,
    xs: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    backend: str | None = None,
    remat: int | str | None = None,
    unroll: int = 1,
    start: Any = 0,
) -> tuple[Any, jax.Array]:
    """Runs a cell, a layer or a whole model over time.

    T time, B batch axes (any number, or none), F input features, H output features.

    A step is valid where ``t < lengths`` and ``mask`` is true. At an invalid step the state is held and ``y`` is zero.
    The inputs of invalid steps, NaN included, affect no output, no state and no gradient. ``resets[t]`` replaces the
    state by the initial state before ``xs[t]`` is consumed; no value and no gradient passes a reset. A reset at an
    invalid step is ignored.

    Under ``jax.jit``, close over the cell, ``jax.jit(lambda params, xs: jrnn.unroll(cell, params, xs))``, or name it
    static, ``jax.jit(jrnn.unroll, static_argnums=0)``: it is not an array, and JAX raises a ``TypeError`` for one that
    is passed as if it were. Give ``reverse``, ``backend``, ``remat`` and ``unroll`` in the same way, as
    ``static_argnames``.

    Batches may be sharded over the devices of a mesh. Where the mesh axes are Explicit (`jax.set_mesh`), the state, the
    lengths, the mask and the resets are resharded along the batch axes as the inputs are, and the results are sharded
    in the same way.

    Args:
      cell: a layer: a cell, `jrnn.dense`, `jrnn.stack`, … or one of your own.
      params: its parameters, from ``cell.init``. Where ``cell.init`` returns a dict, any other mapping is accepted too,
        such as a Flax ``FrozenDict`` or an ``nnx.State``.
      xs: ``(T, *B, F)`` floats in the parameters' dtype or in a 16-bit float. With 16-bit inputs the factors of matrix
        products are rounded to that dtype (in the native loop only the inputs and the weights are), and sums and states
        stay float32. For models that begin with `jrnn.embed`, ``(T, *B)`` integers.
      state: the state before the first step; None for ``cell.initial_state(params, batch_shape)``.
      lengths: ``(*B,)`` integers in [0, T]: the first ``lengths`` steps of each sequence are valid. The range is
        checked where the host can read the values at once: in NumPy arrays, in lists, and in arrays on a CPU that are
        not traced. Elsewhere a negative length counts as 0 and a length above T as T.
      mask: ``(T, *B)`` booleans, true at valid steps.
      resets: ``(T, *B)`` booleans (see `jrnn.sequence.resets_from_done`).
      reverse: run from the last valid step to the first; outputs stay in input order.
      key: a PRNG key, which turns on dropout, zoneout and other randomness. None runs deterministically, without
        dropout. A model without randomness takes a key too, which changes nothing.
      backend: None chooses (see `choose_backend`). A schedule that is named raises an error if it cannot serve:

        - "reference", a plain scan of the cell's step
        - "hoisted", scans from which everything that does not need the state is taken out
        - "native", the loop in C++, compiled on this machine and kept in ``~/.cache/jrnn``
        - "chunkwise", many steps at once, for cells whose state is a matrix
        - "associative", all steps at once, for cells that are linear in their state (see `jrnn.linear_scan`)
        - "newton", all steps at once by Newton's method, for any cell with real states; sequences on which it does not
          converge run by a scan
        - "kernel" (one Pallas kernel for the loop) and "cudnn" (NVIDIA's LSTM), once `jrnn.experimental` is imported

      remat: a number of steps n: store only the state before every n-th step of a recurrent layer as a residual, and
        recompute the rest in the backward pass, n steps at a time. "sqrt" sets n to sqrt(T).
      unroll: how many steps to compile into one loop body, where the loop is a scan; "native" and "cudnn" ignore it.
      start: the absolute time of ``xs[0]``, an integer. Randomness is keyed by absolute time. For a run in chunks, pass
        the number of steps already run: then the chunks draw the same masks as one run over the whole.

    Returns:
      ``(state, ys)``: the state after the last valid step of each sequence, and ``ys (T, *B, H)``. Where the step of a
      cell of your own returns a pytree, ``ys`` is one too, and each leaf has a time axis before its batch axes.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it. Raised before the loop is traced.

    A program exported by `jax.export` can be serialised, states included. The process that deserialises it has to
    import jrnn first.

    >>> cell = jrnn.lstm(4)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> xs = jax.random.normal(jax.random.key(1), (6, 2, 3))
    >>> state, ys = jrnn.unroll(cell, params, xs, lengths=jnp.array([6, 2]))
    >>> ys.shape, bool((ys[2:, 1] == 0).all()), bool((state.h[1] == ys[1, 1]).all())
    ((6, 2, 4), True, True)
    >>> run = jax.jit(jrnn.unroll, static_argnums=0, static_argnames="reverse")
    >>> run(cell, params, xs, reverse=True)[1].shape
    (6, 2, 4)
    >>> first, _ = jrnn.unroll(cell, params, xs[:4])                      # chunks equal the whole
    >>> _, ys = jrnn.unroll(cell, params, xs[4:], first, start=4)
    >>> bool(jnp.allclose(ys, jrnn.unroll(cell, params, xs)[1][4:], atol=1e-6))
    True
    """
    check_layer(cell, "cell", params)
    try:
        hash(cell)
    except TypeError as error:
        raise TypeError(
            f"cell: expected a hashable layer, a frozen dataclass of numbers, strings, tuples and functions, "
            f"got {cell!r} ({error}); keep arrays in params and lists as tuples"
        ) from error
    given = xs, mask  # for checks of values: inside jit, converting NumPy arrays makes them tracers
    xs, batch_shape = _check_xs(cell, xs)
    lengths = _check_lengths(lengths, xs.shape[0], batch_shape)
    mask = _check_flags(mask, "mask", (xs.shape[0], *batch_shape))
    resets = _check_flags(resets, "resets", (xs.shape[0], *batch_shape))
    key = _used_key(cell, key)
    _check_options(reverse, backend, remat, unroll, start)
    cell.check_values(given[0], lengths, given[1])
    # Each argument in one dtype, so that equal shapes compile once.
    start = start.astype(jnp.uint32) if is_traced(start) else np.uint32(start)
    params, xs, state = jax.tree.map(_strongly_typed, (as_tree(params), xs, state))
    return _unroll(
        cell, params, xs, state, lengths, mask, resets, key, start,
        reverse=bool(reverse), backend=backend, remat=remat, unroll=unroll,
    )  # fmt: skip


def choose_backend(model: Layer, params: Any, xs: Any, *, key: jax.Array | None = None) -> tuple[str, str]:
    """The schedule that ``unroll(model, params, xs, key=key)`` would run, and the reason: ``(name, reason)``.

    For a model of several cells the reason has a part for each different one, and the name joins different names with
    "+". Lengths, masks, resets and ``remat`` do not change the choice. The call may compile the native loop.

    Only shapes and dtypes matter: ``params``, ``xs`` and ``key`` may be made of ``jax.ShapeDtypeStruct``, which
    `jax.eval_shape` returns.

    >>> cell = jrnn.gru(4)
    >>> name, reason = jrnn.choose_backend(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> name
    'hoisted'
    """
    check_layer(model, "model", params)
    xs, batch_shape = _check_xs(model, xs, structs=True)
    key = _used_key(model, key)
    chosen: list[tuple[Any, str, str]] = []

    def walk(params: Any, xs: Any, key: Any) -> Any:
        run = Run(Steps(key=key), batch_shape, chosen=chosen)
        state = model.initial_state(params, batch_shape)
        return run(model, _drawn(model, params, xs, key, batch_shape), xs, state)

    jax.eval_shape(walk, as_tree(params), xs, key)
    if not chosen:
        return "reference", "no layer is recurrent: each is applied to all steps at once"
    chosen = list(dict.fromkeys(chosen))  # equal cells, such as the directions of a bidirectional layer, once
    if len(chosen) == 1:
        return chosen[0][1:]
    names = dict.fromkeys(name for _, name, _ in chosen)
    return "+".join(names), "\n".join(f"{cell!r}: {name}: {reason}" for cell, name, reason in chosen)


# Jitted, so that two eager calls with equal arguments compile once. A layer is a value: static, hashed and compared.
@functools.partial(jax.jit, static_argnums=0, static_argnames=("reverse", "backend", "remat", "unroll"))
def _unroll(
    cell: Layer,
    params: Any,
    xs: jax.Array,
    state: Any,
    lengths: jax.Array | None,
    mask: jax.Array | None,
    resets: jax.Array | None,
    key: jax.Array | None,
    start: Any,
    *,
    reverse: bool,
    backend: str | None,
    remat: int | str | None,
    unroll: int,
) -> tuple[Any, jax.Array]:
    cell.check(params, xs)
    batch_shape = xs.shape[1 : xs.ndim - cell.event_ndim]
    initial = jax.eval_shape(lambda params: cell.initial_state(params, batch_shape), params)
    if state is None:
        state = cell.initial_state(params, batch_shape)
    else:
        _check_state(cell, state, initial)
    if spec := batch_spec(len(batch_shape), sequences=(xs, mask, resets), states=(state, lengths)):
        lengths = placed(lengths, spec, 0)
        xs, mask, resets = placed((xs, mask, resets), spec, 1)
    valid = sequence.valid_steps(lengths, mask, xs.shape[0], batch_shape)
    if valid is not None:
        # Zero before the cell sees it: a NaN that is only hidden afterwards still has a NaN gradient.
        xs = zeroed(valid, xs)
        resets = None if resets is None else resets & valid
    params = _drawn(cell, params, xs, key, batch_shape)
    run = Run(Steps(valid, resets, reverse, key, start, (), remat, unroll), batch_shape, backend)
    return run(cell, params, xs, state)


def _drawn(cell: Layer, params: Any, xs: Any, key: Any, batch_shape: tuple[int, ...]) -> Any:
    """Parameters that include the masks drawn once per sequence."""
    if key is None:
        return params
    return cell.draw(params, jax.random.fold_in(key, SEQUENCE), batch_shape, features_of(cell, xs.shape))


def draw(layer: Layer, params: Any, key: jax.Array | None, x: Any) -> Any:
    """Parameters for the single steps of one sequence, with the masks in them that `unroll` draws once per sequence.

    Run a loop over `Layer.step` or `stepper` with these parameters and, at step t of the sequence, the key
    ``jax.random.fold_in(key, t)``. It gives the outputs and states of ``unroll(layer, params, xs, key=key)``: the masks
    of variational dropout and DropConnect are the same at all steps, and each step has the same masks of dropout and
    zoneout.

    B batch axes (any number, or none), F input features.

    Args:
      layer: a layer that has a step.
      params: its parameters, from ``layer.init``.
      key: a PRNG key, the same for the whole sequence; None for a run without dropout, which draws nothing.
      x: the input of any one step, ``(*B, F)`` or ids ``(*B,)``; only its shape is used.

    Returns:
      A pytree to pass as the ``params`` of `Layer.step` and of `stepper`, and nowhere else. For a new sequence, draw
      from the original parameters again.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it.

    >>> model = jrnn.stack(jrnn.variational(jrnn.gru(4), inputs=0.2), jrnn.dropout(0.5))
    >>> params, xs, key = model.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)), jax.random.key(1)
    >>> step, state = jrnn.stepper(model), model.initial_state(params, (2,))
    >>> drawn = jrnn.draw(model, params, key, xs[0])
    >>> for t, x in enumerate(xs):
    ...     state, y = step(drawn, state, x, jax.random.fold_in(key, t))
    >>> bool(jnp.allclose(y, jrnn.unroll(model, params, xs, key=key)[1][-1], atol=1e-6))
    True
    """
    check_layer(layer, "layer", params)
    key = _used_key(layer, key)
    x = jnp.asarray(x)
    layer.check(params, x)
    return _drawn(layer, params, x, key, x.shape[: x.ndim - layer.event_ndim])


@dataclass(frozen=True)
class Run:
    """One run over time; a layer's `walk` runs its parts through it (see `Layer.walk`)."""

    steps: Steps
    batch_shape: tuple[int, ...]
    backend: str | None = None
    chosen: list[tuple[Any, str, str]] = field(default_factory=list)

    def __call__(self, layer: Layer, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        """Runs a layer over all steps."""
        layer.check(params, xs)
        return layer.walk(self, params, xs, state)

    def scan(self, cell: Layer, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        """Runs a recurrent layer over all steps, on the schedule that is chosen for it."""
        # A cell that is known to have no randomness gets no key, even where other layers of the model use one.
        without = self.steps.key is None or cell.uses_key is False
        steps = self.steps.without_key() if without else self.steps
        # The type of a loop's carry is fixed and may include a sharding, which is that of the inputs or of a new state.
        state = placed(state, batch_spec(len(self.batch_shape), sequences=xs), 0)
        state = placed_as(state, check_step(cell, params, one_step(xs), state, steps.key))
        task = Task.of(cell, params, xs, state, steps)
        form, name, plan = self._plan(task)
        self.chosen.append((cell, name, plan.reason))
        state = varying_as(state, params, xs, steps.valid, steps.resets, steps.key)
        task = replace(task, form=form, state=state, restart=restarts(cell, params, xs, state, steps))
        if steps.valid is None or not xs.shape[0]:
            return plan(task)
        # A state that no valid step consumes stays out of the loop: if it were held over invalid steps, a NaN in it
        # would be multiplied by the zero gradients of those steps.
        met, any_valid = steps.meets(), steps.valid.any(0)
        restart = placed_as(cell.initial_state(params, self.batch_shape), state)
        last, ys = plan(replace(task, state=select(met, state, restart)))
        return select(any_valid, last, state), ys

    def _plan(self, task: Task) -> tuple[Any, str, Plan]:
        """The form to run, the name of the schedule that runs it, and the plan."""
        note = ""
        if self._reads(task):
            step = read_step(task)
            if isinstance(step, Refusal):
                note = f"; its step is not recognised as that of an affine cell: {step.reason}"
            else:
                found = step.plan(replace(task, form=step), self.backend)
                if not isinstance(found, Refusal):
                    return step, *found
                note = f"; {found.reason}"
        elif self._gates(task):
            planned = plan_linear(task, self.backend)
            if not isinstance(planned, Refusal):
                return planned[0], "native", planned[1]
            note = f"; not native: {planned.reason}"
        try:
            name, plan = choose(task, self.backend)
        except ValueError as error:
            raise ValueError(f"{error}{note}") from None
        return task.form, name, replace(plan, reason=plan.reason + note)

    def _reads(self, task: Task) -> bool:
        """Whether to read the cell's step: it declares no form, and the backend could use one."""
        some = isinstance(task.xs.shape[0], int) and task.xs.shape[0] > 0
        return some and self.backend in (None, "associative", "hoisted", "native") and task.form is None

    def _gates(self, task: Task) -> bool:
        """Whether to read the coefficients of a declared linear form as gates, for the native loop."""
        some = isinstance(task.xs.shape[0], int) and 0 not in task.xs.shape[:-1]
        return some and self.backend in (None, "native") and isinstance(task.form, LinearForm)

    def child(self, index: int) -> Run:
        """The run of one part of a layer, with its own randomness."""
        return replace(self, steps=self.steps.child(index))

    def opposite(self) -> Run:
        """The same run from the other end of the sequence."""
        return replace(self, steps=self.steps.opposite())

    def step_keys(self, length: int) -> jax.Array | None:
        """A key for each step, or None in a deterministic run."""
        times = self.steps.times(length)
        return None if times is None else jax.vmap(self.steps.key_at)(times)

    def zero_invalid(self, ys: Any) -> Any:
        """Outputs with zeros at invalid steps."""
        valid = self.steps.valid
        return ys if valid is None else zeroed(valid, ys)


# --- checks ------------------------------------------------------------------------------------------------------


_TIME_MAJOR = (
    "sequences are time-major: transpose batch-major ones, as in xs = jnp.swapaxes(xs, 0, 1), and their masks with them"
)


def _check_xs(cell: Layer, xs: Any, structs: bool = False) -> tuple[Any, tuple[int, ...]]:
    """The inputs as an array, and their batch shape. With ``structs``, a ``jax.ShapeDtypeStruct`` is accepted too."""
    if not (structs and isinstance(xs, jax.ShapeDtypeStruct)):
        try:
            xs = jnp.asarray(xs)
        except (TypeError, ValueError) as error:
            remedy = "give numbers, in an array"
            if isinstance(xs, list | tuple):
                remedy = "pad ragged sequences with jrnn.sequence.pad"
            elif isinstance(xs, jax.ShapeDtypeStruct):
                remedy = "to evaluate shapes alone, call it through jax.eval_shape"
            raise TypeError(f"xs: expected an array (T, *B, F), got {type(xs).__name__}; {remedy}") from error
    if xs.ndim < 1 + cell.event_ndim:
        shape = "(T, *B, F)" if cell.event_ndim else "(T, *B)"
        remedy = "give a univariate series its axis of one feature with xs[..., None]"
        if cell.event_ndim > 1:
            shape = f"(T, *B, {', '.join('DHW'[4 - cell.event_ndim :])}, F)"
            remedy = f"then the {cell.event_ndim - 1} axes of space, and features are the last"
        raise ValueError(
            f"xs: expected {shape} for {cell!r}, got shape {xs.shape}; time is the first axis and batch axes follow "
            f"it; {remedy}"
        )
    return xs, xs.shape[1 : xs.ndim - cell.event_ndim]


def _check_lengths(lengths: Any, time: int, batch_shape: tuple[int, ...]) -> Any:
    if lengths is None:
        return None
    known = readable(lengths)
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths) if known else jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}; convert them with .astype(int)")
    if lengths.shape != batch_shape:
        raise ValueError(
            f"lengths: expected the batch shape {batch_shape} of xs, got shape {lengths.shape}; {_TIME_MAJOR}"
        )
    if known and lengths.size:
        values = np.asarray(lengths)
        if values.min() < 0 or values.max() > time:
            raise ValueError(
                f"lengths: expected values in [0, {time}], the time axis of xs, got values from {values.min()} to "
                f"{values.max()}; {_TIME_MAJOR}"
            )
    return lengths.astype(np.int32)


def _check_flags(flags: Any, argument: str, shape: tuple[int, ...]) -> Any:
    if flags is None:
        return None
    flags = jnp.asarray(flags)
    if flags.dtype != jnp.bool_:
        raise TypeError(f"{argument}: expected booleans, got {flags.dtype}; convert with .astype(bool) or compare")
    if flags.shape != shape:
        raise ValueError(f"{argument}: expected shape {shape}, time and batch of xs, got {flags.shape}; {_TIME_MAJOR}")
    return flags


def _used_key(cell: Layer, key: Any) -> Any:
    """The key, checked; None where the model has no randomness, so that a key does not compile it once more."""
    if key is None:
        return None
    prng_key(key)
    return None if cell.uses_key is False else key


def _check_options(reverse: Any, backend: Any, remat: Any, unroll: Any, start: Any) -> None:
    if not isinstance(reverse, bool | np.bool_):
        raise TypeError(f"reverse: expected True or False, got {reverse!r}; it must be known before tracing")
    if backend is not None:
        check_backend(backend)
    check_remat(remat)
    if isinstance(unroll, bool) or not isinstance(unroll, int) or unroll < 1:
        raise ValueError(f"unroll: expected a positive int, got {unroll!r}")
    if jnp.shape(start) != () or not jnp.issubdtype(jnp.result_type(start), jnp.integer):
        raise TypeError(f"start: expected an integer, the absolute time of xs[0], got {start!r}")
    if readable(start) and not 0 <= int(start) < SEQUENCE:
        raise ValueError(f"start: expected a time in [0, {SEQUENCE}), got {start}")


def _strongly_typed(leaf: Any) -> Any:
    """The same array without a weak type, which would make it a different type for ``jax.jit``."""
    if isinstance(leaf, int | float | complex):
        return np.asarray(leaf, jnp.result_type(leaf))
    return lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


def _check_state(cell: Layer, state: Any, expected: Any) -> None:
    if not same_form(state, expected):
        raise ValueError(
            f"state: expected {describe(expected)} for {cell!r} and this batch, got {describe(state)}; start from "
            "None, from cell.initial_state(params, batch_shape), or from the state of an earlier call"
        )
