"""Compiled models in files, which run where jrnn is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from jrnn._core.checks import as_tree, is_traced
from jrnn.cells.base import Layer
from jrnn.compose.combine import stepless
from jrnn.files.tensors import write_atomically
from jrnn.run.unrolling import unroll
from jrnn.schedules.steps import select

__all__ = ["export"]

_ARGUMENTS = ("state", "lengths", "mask", "resets")


def export(
    path: str | os.PathLike[str],
    model: Layer,
    params: Any,
    xs: Any,
    *,
    step: bool = False,
    bake: bool = True,
    arguments: Sequence[str] = (),
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes a model as a compiled program, which runs for any batch and any length with nothing but JAX.

    The program is the model without dropout, as ``jax.export`` serialises it. Sizes of batches and the number of steps
    are symbols in it, so that one file serves all of them. States are plain nested tuples and dicts: an ``LSTMState``
    is a dict of ``h`` and ``c``. A whole sequence is run like this::

        import pathlib, jax, jax.export, jax.numpy as jnp

        program = jax.export.deserialize(bytearray(pathlib.Path("model.bin").read_bytes()))
        state, ys = program.call(xs)                                    # xs (T, *B, F), ys (T, *B, H)
        state, ys = program.call(xs, lengths=lengths)                   # exported with arguments=("lengths",)
        state, ys = program.call(params, xs)                            # exported with bake=False

    And one step of a stream, exported with ``step=True``, like this. Where ``resets`` is true, the state is replaced by
    the initial one first, so that a stream begins with any state of the right shapes and ``resets`` true::

        shapes = jax.tree.unflatten(program.in_tree, program.in_avals)[0][0]     # [0][1] with bake=False
        state = jax.tree.map(lambda s: jnp.zeros((batch, *s.shape[1:]), s.dtype), shapes)
        resets = jnp.ones(batch, bool)
        for x in stream:                                                          # x (*B, F)
            state, y = program.call(state, x, resets)
            resets = jnp.zeros(batch, bool)

    Args:
      path: the file; one that exists is replaced.
      model: a layer; with ``step=True`` one that has a step.
      params: its parameters; with ``bake=False`` their shapes are enough.
      xs: an example of the inputs, of which only the dtype and the shape are taken: ``(T, *B, F)``, or ``(T, *B)`` ids
        for models that begin with `jrnn.embed`; with ``step=True`` of one step, without T. All of T and B become
        symbols. ``jax.ShapeDtypeStruct`` does.
      step: whether to write one step, instead of a run over a sequence.
      bake: whether the parameters are constants of the program; if not, they are its first argument.
      arguments: which arguments of `jrnn.unroll` the program takes, by keyword: any of "state", "lengths", "mask" and
        "resets". A program that takes one always needs it. Not for steps.
      platforms: for which to compile, such as ``("cpu", "cuda")``; None for that of this process.

    Raises:
      ImportError: without flatbuffers, which ``pip install "jrnn[export]"`` brings.
      TypeError: ``step=True`` for a model without a step; a state that is not made of arrays in tuples and dicts.
      ValueError: inputs that do not fit the model.

    >>> import pathlib, tempfile
    >>> model = jrnn.stack(jrnn.lstm(4), jrnn.dense(2))
    >>> params, xs = model.init(jax.random.key(0), 3), jnp.ones((5, 2, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "model.bin")
    ...     jrnn.export(path, model, params, xs)
    ...     program = jax.export.deserialize(bytearray(path.read_bytes()))
    >>> state, ys = program.call(jnp.ones((7, 4, 3)))
    >>> ys.shape, state[0]["c"].shape
    ((7, 4, 2), (4, 4))
    """
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a layer, such as jrnn.lstm(128) or a subclass of jrnn.Cell, got {model!r}")
    if is_traced(params):
        raise TypeError("params: expected arrays that are known, got traced ones; call export outside jit and grad")
    names = _check_arguments(arguments, step)
    if step and stepless(model):
        raise TypeError(
            f"model: expected one that has a step, got {model!r}; a bidirectional layer needs the steps that follow: "
            "export whole sequences, with step=False"
        )
    _require_flatbuffers()
    params = as_tree(params)
    x, batch = _symbolic(model, xs, step)
    state = jax.eval_shape(lambda params: model.initial_state(params, batch), params)
    forms = {
        "state": _plain(state),
        "lengths": jax.ShapeDtypeStruct(batch, jnp.int32),
        "mask": jax.ShapeDtypeStruct((*x.shape[:1], *batch), jnp.bool_),
        "resets": jax.ShapeDtypeStruct(batch if step else (*x.shape[:1], *batch), jnp.bool_),
    }

    def run(params: Any, xs: Any, **given: Any) -> tuple[Any, Any]:
        if "state" in given:
            given["state"] = _typed(state, given["state"])
        last, ys = unroll(model, params, xs, **given)
        return _plain(last), ys

    def run_step(params: Any, old: Any, x: Any, resets: Any) -> tuple[Any, Any]:
        start = model.initial_state(params, resets.shape)
        new, y = model.step(params, select(resets, start, _typed(state, old)), x)
        return _plain(new), y

    function: Any = run_step if step else run
    args = (forms["state"], x, forms["resets"]) if step else (x,)
    kwargs = {name: forms[name] for name in names}
    if bake:
        program = jax.jit(lambda *args, **kwargs: function(params, *args, **kwargs))
    else:
        program, args = jax.jit(function), (jax.tree.map(_form, params), *args)
    exported = jax.export.export(program, platforms=None if platforms is None else tuple(platforms))(*args, **kwargs)
    write_atomically(path, iter((bytes(exported.serialize()),)))


def _check_arguments(arguments: Any, step: bool) -> tuple[str, ...]:
    if isinstance(arguments, str) or not isinstance(arguments, Iterable):
        raise TypeError(f"arguments: expected a tuple of names out of {_ARGUMENTS}, got {arguments!r}")
    names = tuple(arguments)
    if unknown := [name for name in names if name not in _ARGUMENTS]:
        raise ValueError(f"arguments: expected names out of {_ARGUMENTS}, got {unknown[0]!r}")
    if step and names:
        raise ValueError(
            f"arguments: expected none with step=True, whose program takes state, x and resets, got {names}"
        )
    return names


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'jrnn.export: writing programs needs flatbuffers, which is not installed: pip install "jrnn[export]"'
        ) from error


def _form(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _symbolic(model: Layer, xs: Any, step: bool) -> tuple[jax.ShapeDtypeStruct, tuple[Any, ...]]:
    """The inputs with symbols for the number of steps and for the sizes of batches; and the latter."""
    form = _form(xs)
    time = 0 if step else 1
    count = len(form.shape) - time - model.event_ndim
    if count < 0:
        expected = "(*B, F), one step" if step else "(T, *B, F), or ids (T, *B)"
        raise ValueError(f"xs: expected {expected}, for {model!r}, got shape {form.shape}")
    event = form.shape[time + count :]
    symbols = [*["T"][:time], *(f"B{i}" for i in range(count))]
    shape = jax.export.symbolic_shape(", ".join([*symbols, *map(str, event)])) if symbols else form.shape
    return jax.ShapeDtypeStruct(shape, form.dtype), tuple(shape[time : time + count])


def _plain(state: Any) -> Any:
    """A state as nested tuples and dicts, which a process without jrnn knows."""
    if hasattr(state, "_asdict"):
        return {name: _plain(value) for name, value in state._asdict().items()}
    if isinstance(state, Mapping):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, tuple | list):
        return tuple(map(_plain, state))
    if state is None or (hasattr(state, "shape") and hasattr(state, "dtype")):
        return state
    raise TypeError(
        f"model: expected a state of arrays in tuples, dicts and NamedTuples, got a {type(state).__name__} in it, "
        "which a process without its module does not know"
    )


def _typed(like: Any, plain: Any) -> Any:
    """The state of a model, of its plain form."""
    if hasattr(like, "_asdict"):
        return type(like)(**{name: _typed(value, plain[name]) for name, value in like._asdict().items()})
    if isinstance(like, Mapping):
        return {name: _typed(value, plain[name]) for name, value in like.items()}
    if isinstance(like, tuple | list):
        return type(like)(_typed(a, b) for a, b in zip(like, plain, strict=True))
    return plain
