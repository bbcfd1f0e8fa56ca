"""The sequence contract as functions: every law, for any cell or layer, yours included.

    jrnn.testing.check_cell(MyCell(8), in_features=3)

runs all laws that apply and raises AssertionError with the law, what differed and by how much. Each law is a function
of its own as well, and `LAWS` lists them.

What `jrnn.unroll` returns is held against `fold`, which reads the contract literally: a Python loop over ``cell.step``
with NumPy, and backpropagation through time written out by hand. So every law covers values and every gradient, of
parameters, inputs and the initial state, for ragged lengths, masks, resets, both orders and with a key.

Shapes are tiny, and compiling a program costs a thousand times more than running it once. The traced program is
therefore interpreted, one operation after another, unless ``jit=True``; `check_jit` always compiles.

T time, B batch axes (any number, or none), F input features, H output features.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._check import describe
from jrnn._interpret import call
from jrnn.cells.base import Layer, event_shape, features_of
from jrnn.compose.combine import Bidirectional, Highway, Residual, Stack
from jrnn.compose.combine import stepless as _stepless
from jrnn.schedules import SCHEDULES
from jrnn.unroll import choose_backend, unroll

__all__ = [
    "LAWS",
    "Trial",
    "check_backends",
    "check_cell",
    "check_chunks",
    "check_compiles_once",
    "check_derivatives",
    "check_draws",
    "check_hashing",
    "check_jit",
    "check_padding",
    "check_remat",
    "check_resets",
    "check_reverse",
    "check_state_dtype",
    "check_step_equals_unroll",
    "check_vmap",
    "check_zero_length",
    "compare",
    "fold",
]

_TIME = 6
_BATCH = 4
_ONCE = 0xFFFFFFFF  # what is folded into a key for randomness drawn once per sequence


# --- what is run, on what ----------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """Arguments of one unroll, with cotangents of its state and outputs (None: values alone are wanted).

    ``xs (T, *B, F)`` or integers ``(T, *B)``; ``lengths (*B,)``, ``mask`` and ``resets (T, *B)`` or None;
    ``cotangents`` a tuple: one for each float leaf of the state, then that of ``ys``.

    >>> jrnn.testing.Trial({}, jnp.ones((5, 3))).resets is None
    True
    """

    params: Any
    xs: Any
    state: Any = None
    lengths: Any = None
    mask: Any = None
    resets: Any = None
    key: Any = None
    start: Any = 0
    cotangents: Any = None

    def flags(self, batch: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Valid steps and the resets among them, ``(T, *B)`` booleans, NumPy."""
        time = self.xs.shape[0]
        valid = np.ones((time, *batch), bool)
        if self.lengths is not None:
            valid &= np.arange(time).reshape(time, *[1] * len(batch)) < np.asarray(self.lengths)
        if self.mask is not None:
            valid &= np.asarray(self.mask)
        resets = np.zeros_like(valid) if self.resets is None else np.asarray(self.resets) & valid
        return valid, resets


@dataclass(frozen=True)
class _Run:
    """`unroll` with its gradients, as a function of a trial that compares by value, so that programs are reused."""

    cell: Layer
    reverse: bool = False
    backend: str | None = None
    remat: int | str | None = None
    unroll: int = 1

    def __call__(self, trial: Trial) -> dict[str, Any]:
        options: dict[str, Any] = {"reverse": self.reverse, "backend": self.backend}
        options |= {"remat": self.remat, "unroll": self.unroll}
        flags = {"lengths": trial.lengths, "mask": trial.mask, "resets": trial.resets}

        def forward(params: Any, xs: Any, state: Any) -> Any:
            return unroll(self.cell, params, xs, state, **flags, key=trial.key, start=trial.start, **options)

        return _with_gradients(forward, (trial.params, trial.xs, trial.state), trial.cotangents)


@dataclass(frozen=True)
class _Vmap:
    """The same, vmapped over the batch axis of a trial; each sequence has its own key where there is one."""

    run: _Run

    def __call__(self, trial: Trial) -> dict[str, Any]:
        cotangents = (0,) * (len(trial.cotangents) - 1) + (1,)
        axes = Trial(None, 1, 0, 0, 1, 1, 0, None, cotangents)
        flat = Trial(*(None if value is None else axis for value, axis in zip(trial, axes, strict=True)))
        out = {"state": 0, "ys": 1, "gradient of params": 0, "gradient of xs": 1, "gradient of state": 0}
        result = jax.vmap(self.run, in_axes=(flat,), out_axes=out)(trial)
        return {**result, "gradient of params": jax.tree.map(lambda g: g.sum(0), result["gradient of params"])}


@dataclass(frozen=True)
class _Second:
    """A nonlinear loss of state and outputs: gradient, jvp, jvp of gradient and gradient of gradient along a vector.

    The loss is real. Of a complex number z, JAX's gradient is the g for which the loss changes by the real part of
    ``g * dz``.
    """

    run: _Run

    def __call__(self, trial: Trial, along: Any) -> dict[str, Any]:
        run, flags = self.run, {"lengths": trial.lengths, "mask": trial.mask, "resets": trial.resets}
        point, rebuild = _floats((trial.params, trial.xs, trial.state))

        def loss(*point: Any) -> Any:
            out = unroll(run.cell, *rebuild(point), **flags, key=trial.key, start=trial.start, reverse=run.reverse)
            return sum(jnp.sum(c * jnp.sin(y)).real for c, y in zip(trial.cotangents, _floats(out)[0], strict=True))

        def gradient(*point: Any) -> Any:
            return jax.grad(loss, tuple(range(len(point))))(*point)

        _, slope = jax.jvp(loss, tuple(point), tuple(along))
        first, forward = jax.jvp(gradient, tuple(point), tuple(along))
        backward = jax.vjp(gradient, *point)[1](tuple(along))
        return {"gradient": first, "jvp": slope, "jvp of grad": forward, "grad of grad": backward}


def _has_gradient(leaf: Any) -> bool:
    """Whether a leaf is of floats or of complex numbers."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _floats(tree: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """The float and complex leaves, which have gradients, and how to put others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if _has_gradient(leaf)]

    def rebuild(floats: Any) -> Any:
        replaced = dict(zip(where, floats, strict=True))
        return jax.tree.unflatten(treedef, [replaced.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in where], rebuild


def _only_floats(tree: Any, floats: Any) -> Any:
    """A tree with the given float and complex leaves, and None for the others, which have no gradient."""
    leaves, treedef = jax.tree.flatten(tree)
    remaining = iter(floats)
    return jax.tree.unflatten(treedef, [next(remaining) if _has_gradient(leaf) else None for leaf in leaves])


def _with_gradients(forward: Callable[..., Any], args: tuple[Any, Any, Any], cotangents: Any) -> dict[str, Any]:
    if cotangents is None:
        state, ys = forward(*args)
        return {"state": state, "ys": ys}
    floats, rebuild = _floats(args)

    def outputs(floats: Any) -> Any:
        out = forward(*rebuild(floats))
        return _floats(out)[0], out

    _, pull, (state, ys) = jax.vjp(outputs, floats, has_aux=True)
    (gradients,) = pull(list(cotangents))
    params, xs, start = _only_floats(args, gradients)
    return _result(state, ys, params, xs, start)


def _result(state: Any, ys: Any, params: Any, xs: Any, start: Any) -> dict[str, Any]:
    return {
        "state": state, "ys": ys, "gradient of params": params, "gradient of xs": xs, "gradient of state": start,
    }  # fmt: skip


# --- the contract, read literally --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    cell: Layer

    def __call__(self, params: Any, state: Any, x: Any, key: Any, cotangents: Any) -> dict[str, Any]:
        def forward(params: Any, x: Any, state: Any) -> Any:
            return self.cell.step(params, state, x, key)

        return _with_gradients(forward, (params, x, state), cotangents)


@dataclass(frozen=True)
class _Init:
    cell: Layer
    in_features: Any

    def __call__(self, key: Any) -> Any:
        return self.cell.init(key, self.in_features)


@dataclass(frozen=True)
class _Initial:
    cell: Layer
    batch: tuple[int, ...]

    def __call__(self, params: Any, cotangents: Any) -> Any:
        floats, rebuild = _floats(params)
        if cotangents is None:
            return self.cell.initial_state(params, self.batch)
        pull = jax.vjp(lambda p: _floats(self.cell.initial_state(rebuild(p), self.batch))[0], floats)[1]
        return _only_floats(params, pull(list(cotangents))[0])


@dataclass(frozen=True)
class _Draw:
    cell: Layer
    batch: tuple[int, ...]
    in_features: Any

    def __call__(self, params: Any, key: Any, cotangents: Any) -> Any:
        once = jax.random.fold_in(key, _ONCE)
        floats, rebuild = _floats(params)
        if cotangents is None:
            return self.cell.draw(params, once, self.batch, self.in_features)
        pull = jax.vjp(lambda p: _floats(self.cell.draw(rebuild(p), once, self.batch, self.in_features))[0], floats)[1]
        return _only_floats(params, pull(list(cotangents))[0])


@dataclass(frozen=True)
class _Keys:
    """A key for each step; for a part of a layer that has no step of its own, with the part's index folded in."""

    time: int
    path: tuple[int, ...]

    def __call__(self, key: Any, start: Any) -> Any:
        keys = []
        for t in range(self.time):
            step = jax.random.fold_in(key, jnp.asarray(start + t, jnp.uint32))
            for index in self.path:
                step = jax.random.fold_in(step, index)
            keys.append(step)
        return keys


@dataclass(frozen=True)
class _Mix:
    """What a combinator without a step does with its input and its parts' outputs, and the gradients of that."""

    layer: Layer

    def __call__(self, params: Any, x: Any, ys: Any, cotangent: Any) -> Any:
        def mix(params: Any, x: Any, ys: Any) -> Any:
            if isinstance(self.layer, Bidirectional):
                return self.layer.merged(*ys)
            if isinstance(self.layer, Residual):
                return x + ys[0]
            gate = jax.nn.sigmoid(jnp.matmul(x, params["w"]) + jnp.broadcast_to(params["b"], x.shape))
            return gate * ys[0] + (1 - gate) * x

        y, pull = jax.vjp(mix, params, x, ys)
        return y if cotangent is None else pull(cotangent)


class _Flow(NamedTuple):
    valid: np.ndarray
    resets: np.ndarray
    reverse: bool
    key: Any
    start: Any
    path: tuple[int, ...] = ()

    def child(self, index: int) -> _Flow:
        return self._replace(path=(*self.path, index))

    def opposite(self) -> _Flow:
        """The other direction begins afresh at the last valid step before a boundary, as it meets it."""
        resets = np.zeros_like(self.resets)
        order = list(range(len(resets)))[:: -1 if self.reverse else 1]
        for b in np.ndindex(*resets.shape[1:]):
            before = None
            for t in order:
                if self.valid[(t, *b)]:
                    if self.resets[(t, *b)] and before is not None:
                        resets[(before, *b)] = True
                    before = t
        return self._replace(resets=resets, reverse=not self.reverse)


def _pick(flags: np.ndarray, new: Any, old: Any) -> Any:
    def leaf(n: Any, o: Any) -> Any:
        n, o = np.asarray(n), np.asarray(o)
        return np.where(flags.reshape(flags.shape + (1,) * (n.ndim - flags.ndim)), n, o)

    return jax.tree.map(leaf, new, old)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), tree)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(np.add, a, b)


def _fold_steps(layer: Layer, params: Any, xs: Any, state: Any, flow: _Flow) -> Any:
    """Python's fold over ``layer.step``, and the pullback by which backpropagation through time goes."""
    time, batch = len(xs), flow.valid.shape[1:]
    initial = call(_Initial(layer, batch), params, None)
    keys = [None] * time if flow.key is None else call(_Keys(time, flow.path), flow.key, flow.start)
    ys: list[Any] = [None] * time
    tape = []
    order = range(time)[:: -1 if flow.reverse else 1]
    for t in order:
        before = _pick(flow.resets[t], initial, state)
        out = call(_Step(layer), params, before, xs[t], keys[t], None)
        state = _pick(flow.valid[t], out["state"], state)
        ys[t] = _pick(flow.valid[t], out["ys"], np.zeros_like(out["ys"]))
        tape.append((t, before))

    def pull(state_bar: list[Any], ys_bar: Any) -> tuple[Any, Any, Any]:
        params_bar = _zeros(_floats(params)[0])
        initial_bar = _zeros(_floats(initial)[0])
        xs_bar: list[Any] = [None] * time
        for t, before in reversed(tape):
            nothing = _zeros(state_bar)
            y_bar = _pick(flow.valid[t], ys_bar[t], np.zeros_like(ys_bar[t]))
            new_bar = _pick(flow.valid[t], state_bar, nothing)
            out = call(_Step(layer), params, before, xs[t], keys[t], (*new_bar, y_bar))
            before_bar = jax.tree.leaves(out["gradient of state"])
            params_bar = _add(params_bar, jax.tree.leaves(out["gradient of params"]))
            initial_bar = _add(initial_bar, _pick(flow.resets[t], before_bar, nothing))
            held = _pick(flow.valid[t], nothing, state_bar)
            state_bar = _add(held, _pick(flow.resets[t], nothing, before_bar))
            xs_bar[t] = out["gradient of xs"]
        first = call(_Initial(layer, batch), params, tuple(initial_bar))
        params_bar = _add(params_bar, jax.tree.leaves(first))
        xs_gradient = None if not _has_gradient(xs) else np.stack(xs_bar) if time else np.zeros_like(xs)
        return _only_floats(params, params_bar), xs_gradient, _only_floats(state, state_bar)

    return state, np.stack(ys) if time else None, pull


def _fold_layers(layer: Any, params: Any, xs: Any, state: Any, flow: _Flow) -> Any:
    """The same for layers without a step, which are made of layers that have one."""
    if not _stepless(layer):
        return _fold_steps(layer, params, xs, state, flow)
    if isinstance(layer, Stack):
        states, pulls = [], []
        for i, part in enumerate(layer.layers):
            new, xs, pull = _fold_layers(part, params[i], xs, state[i], flow.child(i))
            states.append(new)
            pulls.append(pull)

        def pull_stack(state_bar: list[Any], ys_bar: Any) -> Any:
            bars = []
            for new, pull in zip(reversed(states), reversed(pulls), strict=True):
                count = len(_floats(new)[0])
                part = state_bar[len(state_bar) - count :]
                state_bar = state_bar[: len(state_bar) - count]
                params_bar, ys_bar, start_bar = pull(part, ys_bar)
                bars.append((params_bar, start_bar))
            return tuple(p for p, _ in reversed(bars)), ys_bar, tuple(s for _, s in reversed(bars))

        return tuple(states), xs, pull_stack
    if isinstance(layer, Bidirectional):
        # Leaves of a dict come in the order of its names: backward before forward.
        parts = {
            "backward": (layer.backward, params["backward"], state["backward"], flow.child(1).opposite()),
            "forward": (layer.forward, params["forward"], state["forward"], flow.child(0)),
        }
        own: Any = {}
    else:
        inner = params["layer"] if isinstance(layer, Highway) else params
        parts = {"layer": (layer.layer, inner, state, flow)}
        own = {"w": params["w"], "b": params["b"]} if isinstance(layer, Highway) else {}
    runs = {name: _fold_layers(part, p, xs, s, f) for name, (part, p, s, f) in parts.items()}
    names = sorted(runs, reverse=True)
    outs = tuple(runs[name][1] for name in names)
    ys = call(_Mix(layer), own, xs, outs, None)
    ys = _pick(flow.valid, ys, np.zeros_like(ys))

    def pull_parts(state_bar: list[Any], ys_bar: Any) -> Any:
        ys_bar = _pick(flow.valid, ys_bar, np.zeros_like(ys_bar))
        own_bar, xs_bar, outs_bar = call(_Mix(layer), own, xs, outs, ys_bar)
        xs_bar = xs_bar if _has_gradient(xs) else None  # integers have no gradient
        params_bar, start_bar = {}, {}
        for name in sorted(runs):
            count = len(_floats(runs[name][0])[0])
            part, state_bar = state_bar[:count], state_bar[count:]
            params_bar[name], more, start_bar[name] = runs[name][2](part, outs_bar[names.index(name)])
            xs_bar = None if xs_bar is None else _add(xs_bar, more)
        if isinstance(layer, Bidirectional):
            return params_bar, xs_bar, start_bar
        inner_bar = {**own_bar, **params_bar} if isinstance(layer, Highway) else params_bar["layer"]
        return inner_bar, xs_bar, start_bar["layer"]

    ends = {name: runs[name][0] for name in runs}
    return (ends if isinstance(layer, Bidirectional) else ends["layer"]), ys, pull_parts


def fold(cell: Layer, trial: Trial, *, reverse: bool = False) -> dict[str, Any]:
    """The sequence contract read literally: a Python loop over ``cell.step`` in NumPy, gradients by hand.

    Steps are taken in the order of processing. At a step that is not valid nothing happens, a reset included; else a
    reset replaces the state, then the step is taken under the key of its absolute time. A layer without a step is made
    of parts that have one: a bidirectional layer's backward part treats a reset at t as the boundary before it.

    Args:
      cell: a cell or layer.
      trial: its arguments. What stands in padding should be finite here.
      reverse: as for `jrnn.unroll`.

    Returns:
      a dict of NumPy trees: ``state``, ``ys``, and with ``trial.cotangents`` the gradients.

    >>> cell = jrnn.elman(4)
    >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3))
    >>> ys = jrnn.testing.fold(cell, jrnn.testing.Trial(params, xs, lengths=jnp.array([5, 2])))["ys"]
    >>> bool(jnp.allclose(ys, jrnn.unroll(cell, params, xs, lengths=jnp.array([5, 2]))[1], atol=1e-6))
    True
    """
    xs = np.asarray(trial.xs)
    batch = xs.shape[1 : xs.ndim - cell.event_ndim]
    in_features = features_of(cell, xs.shape)
    valid, resets = trial.flags(batch)
    draw = _Draw(cell, batch, in_features)
    params = trial.params if trial.key is None else call(draw, trial.params, trial.key, None)
    state = call(_Initial(cell, batch), trial.params, None) if trial.state is None else trial.state
    flow = _Flow(valid, resets, reverse, trial.key, trial.start)
    last, ys, pull = _fold_layers(cell, params, xs, state, flow)
    if trial.cotangents is None:
        return {"state": last, "ys": ys}
    params_bar, xs_bar, state_bar = pull(list(trial.cotangents[:-1]), trial.cotangents[-1])
    if trial.key is not None:
        params_bar = call(draw, trial.params, trial.key, tuple(jax.tree.leaves(params_bar)))
    if trial.state is None:
        first = call(_Initial(cell, batch), trial.params, tuple(jax.tree.leaves(state_bar)))
        params_bar, state_bar = _add(params_bar, first), None
    return _result(last, ys, params_bar, xs_bar, state_bar)


# --- trials ------------------------------------------------------------------------------------------------------


class _Bench:
    """Everything a law needs: a cell, parameters without zeros, and trials made of seeded random numbers."""

    def __init__(self, law: str, cell: Any, in_features: Any, dtype: Any, seed: int, jit: bool, params: Any) -> None:
        if not isinstance(cell, Layer):
            raise TypeError(f"cell: expected a layer, such as a subclass of jrnn.Cell, got {cell!r}")
        if np.dtype(dtype) not in (np.dtype("float32"), np.dtype("float64")):
            raise ValueError(f'dtype: expected "float32" or "float64", got {dtype!r}')
        self.law, self.cell, self.in_features, self.seed, self.jit = law, cell, in_features, seed, jit
        self.dtype = np.dtype(dtype)
        self.tolerance = 3e-5 if self.dtype == np.float32 else 1e-11
        self.rng = np.random.default_rng(seed)
        self.stepless = _stepless(cell)
        self.params = jax.tree.map(self._cast, _initialised(cell, in_features, seed, jnp.result_type(float)))
        # Zeros would hide what is multiplied by them: biases, peepholes, learned states.
        self.params = self.noisy(self.params) if params is None else jax.tree.map(self._cast, params)
        self.may_draw = cell.uses_key is not False

    def _cast(self, leaf: Any) -> Any:
        leaf = np.array(leaf)
        if not _has_gradient(leaf):
            return leaf
        return leaf.astype(np.result_type(self.dtype, np.complex64) if np.iscomplexobj(leaf) else self.dtype)

    def normal(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Standard normal numbers, of both parts where the dtype is complex."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        values = self.rng.normal(size=shape)
        if dtype.kind == "c":
            values = values + 1j * self.rng.normal(size=shape)
        return np.asarray(values, dtype)

    def noisy(self, tree: Any, scale: float = 0.2) -> Any:
        def leaf(a: Any) -> Any:
            a = np.asarray(a)
            return a + np.asarray(scale, a.dtype) * self.normal(a.shape, a.dtype) if _has_gradient(a) else a

        return jax.tree.map(leaf, tree)

    def inputs(self, shape: tuple[int, ...]) -> Any:
        if self.cell.event_ndim == 0:
            return self.rng.integers(0, _vocabulary(self.cell), shape, np.int32)
        return self.normal((*shape, *event_shape(self.in_features)))

    def initial(self, batch: tuple[int, ...]) -> Any:
        return call(_Initial(self.cell, batch), self.params, None)

    def trial(self, batch: Any = (_BATCH,), time: Any = _TIME, key: Any = None, **fields: Any) -> Trial:
        """Ragged lengths (0 and T among them), a mask with holes, resets anywhere, a state of its own."""
        lengths = np.resize(np.array([time, max(time - 2, 0), 0, max(time - 1, 0)], np.int32), batch)
        mask = self.rng.random((time, *batch)) < 0.75
        resets = self.rng.random((time, *batch)) < 0.4
        values: dict[str, Any] = {
            "params": self.params, "xs": self.inputs((time, *batch)), "state": self.noisy(self.initial(batch), 0.5),
            "lengths": lengths, "mask": mask, "resets": resets, "key": key, "start": np.int32(3),
        }  # fmt: skip
        trial = Trial(**{**values, **fields})
        return trial if "cotangents" in fields else trial._replace(cotangents=self.cotangents(trial))

    def cotangents(self, trial: Trial) -> Any:
        out = jax.eval_shape(
            lambda p, x, s, k: unroll(self.cell, p, x, s, key=k), trial.params, trial.xs, trial.state, trial.key
        )
        return tuple(self.normal(a.shape, a.dtype) for a in _floats(out)[0])

    def draws(self) -> Iterator[Any]:
        """Without a key, and with one where the layer may use it."""
        yield None
        if self.may_draw:
            yield jax.random.key(self.seed + 7)

    def last_draw(self) -> Iterator[Any]:
        """With a key where the layer may use it, without one elsewhere."""
        *_, key = self.draws()
        yield key

    def run(self, trial: Trial, **options: Any) -> Any:
        return call(_Run(self.cell, **options), trial, jit=self.jit)

    def fold(self, trial: Trial, reverse: bool = False) -> Any:
        return fold(self.cell, trial, reverse=reverse)

    def compare(self, got: Any, expected: Any, about: str, exact: bool = False, scale: float = 1.0) -> None:
        compare(got, expected, 0.0 if exact else self.tolerance * scale, f"{self.law}: {self.cell!r}: {about}")


@functools.lru_cache(maxsize=8)
def _initialised(cell: Layer, in_features: Any, seed: int, precision: Any) -> Any:
    del precision  # part of the key: what is drawn depends on whether float64 is on
    return call(_Init(cell, in_features), jax.random.key(seed))


def _vocabulary(layer: Any) -> int:
    if hasattr(layer, "vocab"):
        return layer.vocab
    return next((_vocabulary(child) for child in layer.children() if child.event_ndim == 0), 2)


def compare(got: Any, expected: Any, tolerance: float, about: str) -> None:
    """Raises AssertionError where two pytrees differ, with the leaf, the place and by how much.

    Leaves must agree in shape, in dtype, in which elements are NaN, and in the others to
    ``tolerance * (1 + largest expected magnitude)``; a tolerance of 0 asks for equality.

    >>> jrnn.testing.compare({"h": jnp.ones(2)}, {"h": jnp.ones(2)}, 0.0, "equal")
    >>> jrnn.testing.compare({"h": jnp.ones(2)}, {"h": jnp.array([1.0, 2.0])}, 1e-6, "a law")
    Traceback (most recent call last):
    AssertionError: a law: ['h'] differs by 1 at (1,): got 1.0, expected 2.0, tolerance 3e-06
    """
    structure: Any = jax.tree.structure(got)
    wanted: Any = jax.tree.structure(expected)
    if structure != wanted:
        raise AssertionError(f"{about}: expected the structure {wanted}, got {structure}")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path) or "the value"
        a, b = np.asarray(a), np.asarray(b)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{about}: {name}: expected {b.dtype}{b.shape}, got {a.dtype}{a.shape}")
        if not a.size:
            continue
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        a64, b64 = a.astype(wide), b.astype(wide)
        with np.errstate(all="ignore"):
            error = np.where((a64 == b64) | (np.isnan(a64) & np.isnan(b64)), 0.0, np.abs(a64 - b64))
        error = np.where(np.isnan(error), np.inf, error)
        finite = np.abs(b64[np.isfinite(b64)])
        allowed = tolerance * (1.0 + (finite.max() if finite.size else 0.0))
        if error.max() > allowed:
            at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{about}: {name} differs by {error.max():.3g} at {at}: got {a[at]}, expected {b[at]}, "
                f"tolerance {allowed:.3g}"
            )


# --- the laws ----------------------------------------------------------------------------------------------------


def _law(function: Callable[[_Bench], None]) -> Callable[..., None]:
    """A law of a bench as a public function of a cell."""

    @functools.wraps(function)
    def check(
        cell: Layer,
        in_features: Any = 3,
        *,
        dtype: Any = "float32",
        seed: int = 0,
        jit: bool = False,
        params: Any = None,
    ) -> None:
        precision = jax.enable_x64(True) if np.dtype(dtype) == np.float64 else contextlib.nullcontext()
        with precision:
            function(_Bench(function.__name__, cell, in_features, dtype, seed, jit, params))

    del check.__wrapped__
    check.__annotations__ = {"cell": Layer, "in_features": Any, "return": None}
    return check


@_law
def check_step_equals_unroll(bench: _Bench) -> None:
    """``unroll`` equals ``step`` folded in Python (see `fold`), with everything given and with nothing given.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_step_equals_unroll(jrnn.elman(2))
    """
    for key in bench.draws():
        trial = bench.trial(key=key)
        bench.compare(bench.run(trial), bench.fold(trial), f"lengths, mask and resets, {_keyed(key)}")
    nothing = {"state": None, "lengths": None, "mask": None, "resets": None, "start": 0}
    trial = bench.trial(**nothing)
    bench.compare(bench.run(trial), bench.fold(trial), "nothing given")
    if bench.cell.event_ndim:
        trial = bench.trial(batch=(), state=None, lengths=None, mask=None)
        bench.compare(bench.run(trial), bench.fold(trial), "one sequence without batch axes, resets")


def _keyed(key: Any) -> str:
    return "no key" if key is None else "with a key"


@_law
def check_draws(bench: _Bench) -> None:
    """What a part draws once per sequence (see `jrnn.Layer.draw`) is not drawn again at every step.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_draws(jrnn.variational(jrnn.elman(2), inputs=0.5))
    """
    *_, key = bench.draws()
    try:
        bench.trial(key=key)  # traces a run with the key, which refuses
    except TypeError as error:
        if not str(error).startswith(("cell: ", "params: ")):
            raise
        raise AssertionError(f"{bench.law}: {bench.cell!r}: {error}") from error


@_law
def check_padding(bench: _Bench) -> None:
    """What stands in padding changes nothing: outputs, states and every gradient, with NaN and infinity there.

    Outputs there and gradients of padded inputs are exactly zero, resets there are ignored, and a sequence with its
    invalid steps cut out gives the same. Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_padding(jrnn.elman(2))
    """
    for key in bench.draws():
        clean = bench.trial(key=key)
        valid, _ = clean.flags((_BATCH,))
        dirty = _poisoned(clean, valid, bench.rng)
        expected = bench.fold(clean)
        for reverse in (False, True) if bench.cell.uses_key is False or key is not None else (False,):
            expected = bench.fold(clean, reverse)
            got = bench.run(dirty, reverse=reverse)
            about = f"NaN, infinity and resets in padding, {_keyed(key)}, reverse={reverse}"
            bench.compare(got, expected, about)
            for name in ("ys", "gradient of xs"):
                if got[name] is not None:
                    bench.compare(got[name][~valid], np.zeros_like(got[name][~valid]), f"{about}: {name}", exact=True)
    # Resets behind holes: a boundary lies between the valid steps on both sides of it.
    mask, resets = np.zeros((2, _TIME), bool)
    mask[[1, 3, 4]] = resets[[1, 3]] = True
    whole = bench.trial(batch=(), lengths=None, mask=mask, resets=resets, start=0, cotangents=None)
    short = whole._replace(xs=whole.xs[mask], mask=None, resets=resets[mask])
    for reverse in (False, True):
        got, expected = bench.run(whole, reverse=reverse), bench.run(short, reverse=reverse)
        got["ys"] = got["ys"][mask]
        bench.compare(got, expected, f"invalid steps cut out, reverse={reverse}")


def _poisoned(trial: Trial, valid: np.ndarray, rng: Any) -> Trial:
    bad = np.array([np.nan, np.inf, -np.inf, 1e30]) if _has_gradient(trial.xs) else np.array([-1, 10**6, -(10**6), 99])
    xs = np.where(_expand(valid, trial.xs), trial.xs, rng.choice(bad, trial.xs.shape).astype(trial.xs.dtype))
    resets = None if trial.resets is None else np.where(valid, trial.resets, ~trial.resets)
    return trial._replace(xs=xs, resets=resets)


def _nan(a: np.ndarray) -> np.ndarray:
    return np.full_like(a, np.nan) if _has_gradient(a) else a


def _expand(flags: np.ndarray, like: np.ndarray) -> np.ndarray:
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


@_law
def check_zero_length(bench: _Bench) -> None:
    """Sequences of length 0 return the state they were given; T = 0 and an empty batch are legal.

    Outputs are zero, the gradient of the state is its cotangent, and nothing else has a gradient. Arguments are those
    of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_zero_length(jrnn.elman(2))
    """
    trial = bench.trial(lengths=np.zeros(_BATCH, np.int32))
    got = bench.run(_poisoned(trial, np.zeros((_TIME, _BATCH), bool), bench.rng))
    state_bar = _only_floats(trial.state, trial.cotangents[:-1])
    zeros = {name: _zeros(got[name]) for name in ("ys", "gradient of params", "gradient of xs")}
    bench.compare(got, {"state": trial.state, **zeros, "gradient of state": state_bar}, "lengths 0", exact=True)
    lost = bench.run(trial._replace(state=jax.tree.map(_nan, trial.state)))
    bench.compare(
        {name: lost[name] for name in zeros} | {"gradient of state": lost["gradient of state"]},
        {**zeros, "gradient of state": state_bar}, "lengths 0 and a state of NaN", exact=True,
    )  # fmt: skip
    for key in bench.last_draw():
        trial = bench.trial(time=0, key=key, cotangents=None)
        got = bench.run(trial)
        bench.compare(got["state"], trial.state, f"T = 0, {_keyed(key)}", exact=True)
        trial = bench.trial(batch=(0,), key=key, cotangents=None)
        shapes = [(0, *leaf.shape[1:]) for leaf in jax.tree.leaves(bench.initial((1,)))]
        empty = bench.run(trial)
        if [leaf.shape for leaf in jax.tree.leaves(empty["state"])] != shapes or empty["ys"].shape[:2] != (_TIME, 0):
            raise AssertionError(f"{bench.law}: {bench.cell!r}: an empty batch gave {describe(empty)}")
        if got["ys"].shape != (0, _BATCH, *empty["ys"].shape[2:]):
            raise AssertionError(f"{bench.law}: {bench.cell!r}: T = 0 gave outputs of shape {got['ys'].shape}")


@_law
def check_resets(bench: _Bench) -> None:
    """A reset restores the initial state before the step, and no value (NaN included) and no gradient crosses it.

    The parts on both sides of a reset equal runs of their own. A state of NaN, reset at each sequence's first step,
    changes no output and no gradient; NaN inputs before a reset change no output after it. Arguments are those of
    `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_resets(jrnn.elman(2))
    """
    cut = _TIME // 2
    after = np.arange(_TIME) >= cut
    # Given, so that the program of other laws serves; but a backward direction starts behind the reset.
    no_padding = {
        "state": None if bench.stepless else bench.initial((_BATCH,)),
        "lengths": np.full(_BATCH, _TIME, np.int32),
        "mask": np.ones((_TIME, _BATCH), bool),
    }
    for key in bench.last_draw():
        whole = bench.trial(key=key, **no_padding)
        resets = np.zeros((_TIME, _BATCH), bool)
        resets[cut] = True
        ys_bar = np.where(_expand(after, whole.cotangents[-1]), whole.cotangents[-1], 0)
        zero = tuple(map(np.zeros_like, whole.cotangents[:-1]))
        whole = whole._replace(resets=resets, cotangents=(*zero, ys_bar))
        got = bench.run(whole)
        # The second part by itself: its outputs, and all gradients of its outputs, are those of the whole.
        last = Trial(whole.params, whole.xs[cut:], key=key, start=whole.start + cut, cotangents=(*zero, ys_bar[cut:]))
        part = bench.fold(last)
        about = f"outputs after a reset, {_keyed(key)}"
        for name in ("ys", "gradient of xs"):
            if got[name] is not None:
                bench.compare(got[name][cut:], part[name], f"{about}: {name}")
        bench.compare(got["gradient of params"], part["gradient of params"], f"{about}: gradient of params")
        if got["gradient of xs"] is not None:
            before = got["gradient of xs"][:cut]
            bench.compare(before, np.zeros_like(before), f"{about}: gradient of inputs before it", exact=True)
            # NaN before the reset: outputs after it, and their gradients of inputs after it, are untouched.
            spoilt = whole.xs.copy()
            spoilt[:cut] = np.nan
            nan = bench.run(whole._replace(xs=spoilt))
            bench.compare(nan["ys"][cut:], got["ys"][cut:], f"NaN before a reset, {_keyed(key)}: ys")
            mine, clean = nan["gradient of xs"][cut:], got["gradient of xs"][cut:]
            bench.compare(mine, clean, f"NaN before a reset, {_keyed(key)}: gradient of xs after it")
    if bench.stepless:
        return  # the backward direction meets its state after the last step, where no reset can be
    for reverse in (False, True):
        # The first step of each sequence that is valid, its first two times or later, is reset.
        late = np.arange(_BATCH) % 3
        mask = np.arange(_TIME)[:, None] >= late
        resets = np.arange(_TIME)[:, None] == late
        if reverse:
            mask, resets = mask[::-1].copy(), resets[::-1].copy()
        trial = bench.trial(lengths=np.full(_BATCH, _TIME, np.int32), mask=mask)
        clean = trial._replace(resets=resets)
        lost = clean._replace(state=jax.tree.map(_nan, clean.state))
        got, expected = bench.run(lost, reverse=reverse), bench.fold(clean, reverse)
        bench.compare(got, expected, f"a state of NaN, reset before it is used, reverse={reverse}")
        bench.compare(
            got["gradient of state"], _zeros(got["gradient of state"]), "gradient of a state that is reset", exact=True
        )


@_law
def check_reverse(bench: _Bench) -> None:
    """``reverse=True`` runs from the last valid step to the first, outputs in input order, padding at the end.

    It equals turning each sequence round, running forward and turning the outputs back. Arguments are those of
    `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_reverse(jrnn.elman(2))
    """
    for key in bench.last_draw():
        trial = bench.trial(key=key)
        bench.compare(bench.run(trial, reverse=True), bench.fold(trial, True), f"reverse, {_keyed(key)}")
    trial = trial._replace(key=None)
    lengths = np.asarray(trial.lengths)

    def turn(values: Any) -> Any:
        out = values.copy()
        for b, n in enumerate(lengths):
            out[:n, b] = values[:n, b][::-1]
        return out

    state_bar, ys_bar = trial.cotangents[:-1], trial.cotangents[-1]
    turned = trial._replace(
        xs=turn(trial.xs), mask=turn(trial.mask), resets=turn(trial.resets), cotangents=(*state_bar, turn(ys_bar))
    )
    got, expected = bench.run(trial, reverse=True), bench.run(turned)
    expected["ys"] = turn(expected["ys"])
    if expected["gradient of xs"] is not None:
        expected["gradient of xs"] = turn(expected["gradient of xs"])
    bench.compare(got, expected, "sequences turned round")


@_law
def check_chunks(bench: _Bench) -> None:
    """Two chunks, the second from the first one's state, equal one run, gradients through both, randomness too.

    A bidirectional layer has no such law: its backward direction needs the steps that follow. Arguments are those of
    `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_chunks(jrnn.elman(2))
    """
    if bench.stepless:
        return
    cut = _TIME // 2
    for key in bench.last_draw():
        for reverse in (False, True):
            whole = bench.trial(key=key)
            state_bar, ys_bar = whole.cotangents[:-1], whole.cotangents[-1]
            head = whole._replace(
                xs=whole.xs[:cut], mask=whole.mask[:cut], resets=whole.resets[:cut],
                lengths=np.minimum(whole.lengths, cut),
            )  # fmt: skip
            tail = whole._replace(
                xs=whole.xs[cut:], mask=whole.mask[cut:], resets=whole.resets[cut:],
                lengths=np.maximum(whole.lengths - cut, 0), start=np.int32(whole.start + cut),
            )  # fmt: skip
            pieces = ((head, ys_bar[:cut]), (tail, ys_bar[cut:]))
            (first, first_bar), (second, second_bar) = pieces[::-1] if reverse else pieces
            zero = tuple(map(np.zeros_like, state_bar))
            middle = bench.run(first._replace(cotangents=(*zero, first_bar)), reverse=reverse)["state"]
            b = bench.run(second._replace(state=middle, cotangents=(*state_bar, second_bar)), reverse=reverse)
            between = tuple(jax.tree.leaves(b["gradient of state"]))
            a = bench.run(first._replace(cotangents=(*between, first_bar)), reverse=reverse)
            order = (b, a) if reverse else (a, b)
            got = {
                "state": b["state"],
                "ys": np.concatenate([part["ys"] for part in order]),
                "gradient of params": _add(a["gradient of params"], b["gradient of params"]),
                "gradient of xs": None,
                "gradient of state": a["gradient of state"],
            }
            if a["gradient of xs"] is not None:
                got["gradient of xs"] = np.concatenate([part["gradient of xs"] for part in order])
            bench.compare(got, bench.run(whole, reverse=reverse), f"two chunks, {_keyed(key)}, reverse={reverse}")


@_law
def check_remat(bench: _Bench) -> None:
    """``remat`` changes memory and nothing else, where T is no multiple of the chunk as well.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_remat(jrnn.elman(2))
    """
    *_, key = bench.draws()
    trial = bench.trial(key=key)
    for reverse, remat in ((False, 4), (True, 4)):
        got = bench.run(trial, reverse=reverse, remat=remat)
        bench.compare(got, bench.run(trial, reverse=reverse), f"remat={remat!r}, reverse={reverse}, {_keyed(key)}")


@_law
def check_backends(bench: _Bench) -> None:
    """Every backend that serves the layer equals the plain scan, and ``unroll`` of several steps a single one.

    A backend that cannot serve it refuses with ValueError, which is no failure. Arguments are those of `check_cell`;
    raises AssertionError.

    >>> jrnn.testing.check_backends(jrnn.elman(2))
    """
    *_, key = bench.draws()
    trial = bench.trial(key=key)
    expected = bench.run(trial, backend="reference")
    bench.compare(bench.run(trial, unroll=3), expected, f"backend=None, unroll=3, {_keyed(key)}")
    chosen, _ = choose_backend(bench.cell, trial.params, trial.xs)
    for name in SCHEDULES:
        if name in ("reference", chosen):
            continue
        try:
            got = bench.run(trial, backend=name)
        except ValueError as refusal:
            if not str(refusal).startswith("backend:"):
                raise
            continue
        bench.compare(got, expected, f"backend={name!r}, {_keyed(key)}")


@_law
def check_vmap(bench: _Bench) -> None:
    """``vmap`` over sequences equals a batch axis, two batch axes equal one, and ``vmap`` over keys equals a loop.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_vmap(jrnn.elman(2))
    """
    trial = bench.trial()
    batched = bench.run(trial)
    bench.compare(call(_Vmap(_Run(bench.cell)), trial, jit=bench.jit), batched, "vmap over the batch")
    half = _BATCH // 2

    def fold_axis(axis: int) -> Callable[[Any], Any]:
        return lambda a: a.reshape(*a.shape[:axis], 2, half, *a.shape[axis + 1 :])

    first, second = fold_axis(0), fold_axis(1)
    axes = {
        "xs": second(trial.xs), "state": jax.tree.map(first, trial.state), "lengths": first(trial.lengths),
        "mask": second(trial.mask), "resets": second(trial.resets),
        "cotangents": (*map(first, trial.cotangents[:-1]), second(trial.cotangents[-1])),
    }  # fmt: skip
    expected = {
        "state": jax.tree.map(first, batched["state"]),
        "ys": second(batched["ys"]),
        "gradient of params": batched["gradient of params"],
        "gradient of xs": None if batched["gradient of xs"] is None else second(batched["gradient of xs"]),
        "gradient of state": jax.tree.map(first, batched["gradient of state"]),
    }
    bench.compare(bench.run(trial._replace(**axes)), expected, "two batch axes")
    if not bench.may_draw:
        return
    keys = jax.random.split(jax.random.key(bench.seed), _BATCH)
    got = call(_Vmap(_Run(bench.cell)), trial._replace(key=keys), jit=bench.jit)
    for b in (0, _BATCH - 1):
        one = jax.tree.map(functools.partial(np.take, indices=b, axis=0), (trial.state, trial.cotangents[:-1]))
        ys_bar = trial.cotangents[-1][:, b]
        single = bench.run(
            trial._replace(
                xs=trial.xs[:, b],
                state=one[0],
                lengths=trial.lengths[b],
                mask=trial.mask[:, b],
                resets=trial.resets[:, b],
                key=keys[b],
                cotangents=(*one[1], ys_bar),
            )
        )
        bench.compare(got["ys"][:, b], single["ys"], "vmap over keys: ys")
        state = jax.tree.map(functools.partial(np.take, indices=b, axis=0), got["state"])
        bench.compare(state, single["state"], "vmap over keys: state")
        if single["gradient of xs"] is not None:
            bench.compare(got["gradient of xs"][:, b], single["gradient of xs"], "vmap over keys: gradient of xs")


@_law
def check_jit(bench: _Bench) -> None:
    """Compiled equals eager: values, and every gradient.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_jit(jrnn.elman(2))
    """
    *_, key = bench.draws()
    trial = bench.trial(key=key)
    eager = call(_Run(bench.cell), trial)
    bench.compare(call(_Run(bench.cell), trial, jit=True), eager, f"jit, {_keyed(key)}")


@_law
def check_derivatives(bench: _Bench) -> None:
    """Derivatives of a nonlinear loss are right, with NaN in padding: grad, jvp, grad of grad and jvp of grad.

    The gradient is that of `fold`, the jvp its product with a direction; the two second derivatives agree with each
    other and, in float64, with differences of the gradients of `fold`. Arguments are those of `check_cell`; raises
    AssertionError.

    >>> jrnn.testing.check_derivatives(jrnn.elman(2), dtype="float64")
    """
    *_, key = bench.draws()
    clean = bench.trial(key=key)
    valid, _ = clean.flags((_BATCH,))
    point, rebuild = _floats((clean.params, clean.xs, clean.state))
    along = tuple(bench.normal(leaf.shape, leaf.dtype) for leaf in point)
    got = call(_Second(_Run(bench.cell)), _poisoned(clean, valid, bench.rng), along, jit=bench.jit)

    def gradient(by: float) -> tuple[Any, ...]:
        moved = [np.asarray(p + by * v, p.dtype) for p, v in zip(point, along, strict=True)]
        params, xs, state = rebuild(moved)
        there = clean._replace(params=params, xs=xs, state=state)
        out = _floats(tuple(bench.fold(there._replace(cotangents=None))[name] for name in ("state", "ys")))[0]
        slopes = tuple(c * np.cos(y) for c, y in zip(clean.cotangents, out, strict=True))
        result = bench.fold(there._replace(cotangents=slopes))
        return tuple(jax.tree.leaves([result[f"gradient of {name}"] for name in ("params", "xs", "state")]))

    expected = gradient(0.0)
    about = f"NaN in padding, {_keyed(key)}"
    bench.compare(got["gradient"], expected, f"grad, {about}", scale=3)
    slope = np.asarray(sum(np.sum(g * v).real for g, v in zip(expected, along, strict=True)), bench.dtype)
    bench.compare(got["jvp"], slope, f"jvp, {about}", scale=30)
    bench.compare(got["jvp of grad"], got["grad of grad"], f"jvp of grad against grad of grad, {about}", scale=30)
    if bench.dtype == np.float64:
        epsilon = 1e-5
        numerical = tuple((a - b) / (2 * epsilon) for a, b in zip(gradient(epsilon), gradient(-epsilon), strict=True))
        bench.compare(
            got["jvp of grad"], numerical, f"jvp of grad against differences, {about}", scale=1e-7 / bench.tolerance
        )


@_law
def check_state_dtype(bench: _Bench) -> None:
    """The state keeps the structure, shapes and dtypes of ``initial_state``, and ``y`` comes in the dtype of ``xs``.

    With bfloat16 and float16 inputs the state and all gradients of parameters stay float32, and outputs are near the
    float32 ones; a cell may refuse such inputs with an error. Arguments are those of `check_cell`; raises
    AssertionError.

    >>> jrnn.testing.check_state_dtype(jrnn.elman(2))
    """

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)

    trial = bench.trial()
    expected = shapes(trial.state)
    full = bench.run(trial)
    name = f"{bench.law}: {bench.cell!r}"
    if shapes(full["state"]) != expected:
        raise AssertionError(f"{name}: expected a final state {expected}, got {shapes(full['state'])}")
    if bench.cell.event_ndim == 0:
        return
    # Complex outputs stay as wide as the state, and are not rounded to the dtype of 16-bit inputs.
    is_complex = np.iscomplexobj(full["ys"])
    wanted = np.result_type(bench.dtype, np.complex64) if is_complex else bench.dtype
    if full["ys"].dtype != wanted:
        raise AssertionError(f"{name}: expected outputs in {wanted}, got {full['ys'].dtype}")
    if bench.dtype != np.float32:
        return
    for low in (jnp.float16, jnp.bfloat16):
        output = wanted if is_complex else low
        cotangents = (*trial.cotangents[:-1], np.asarray(jnp.asarray(trial.cotangents[-1]).astype(output)))
        rounded = trial._replace(xs=np.asarray(jnp.asarray(trial.xs).astype(low)), cotangents=cotangents)
        try:
            got = jax.eval_shape(_Run(bench.cell), rounded._replace(cotangents=None))
        except (TypeError, ValueError):
            continue  # a cell that does not take 16-bit inputs says so
        if shapes(got["state"]) != expected:
            raise AssertionError(f"{name}: expected a state {expected} for {low.__name__}, got {shapes(got['state'])}")
        if got["ys"].dtype != output:
            raise AssertionError(
                f"{name}: expected outputs in {np.dtype(output)} for {low.__name__} inputs, got {got['ys'].dtype}"
            )
        if low == jnp.float16:
            continue
        got = bench.run(rounded)
        if shapes(got["gradient of params"]) != shapes(trial.params):
            raise AssertionError(f"{name}: expected gradients of parameters like them for {low.__name__}")
        near = {"state": got["state"], "ys": got["ys"].astype(wanted)}
        compare(near, {"state": full["state"], "ys": full["ys"]}, 0.1, f"{name}: {low.__name__} inputs")
        near, far = got["gradient of params"], full["gradient of params"]
        compare(near, far, 0.1, f"{name}: {low.__name__} inputs: gradient of params")


@_law
def check_compiles_once(bench: _Bench) -> None:
    """A second call with an equal cell and other values compiles nothing and traces nothing, eager or jitted.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_compiles_once(jrnn.elman(2))
    """
    *_, key = bench.draws()
    other_key = None if key is None else jax.random.key(bench.seed + 8)
    traces = []

    def traced(cell: Layer, trial: Trial) -> Any:
        traces.append(cell)
        return _Run(cell)(trial)

    jitted = jax.jit(traced, static_argnums=0)
    first, second = (
        bench.trial(key=key, cotangents=None),
        bench.trial(key=other_key, cotangents=None, start=np.int32(9)),
    )
    jitted.trace(bench.cell, first)
    jitted.trace(copy.deepcopy(bench.cell), second)
    if len(traces) != 1:
        raise AssertionError(
            f"{bench.law}: {bench.cell!r}: expected one trace for two equal cells, got {len(traces)}; does it compare "
            "by value?"
        )
    _Run(bench.cell)(first)
    # Only this thread's compilations: others may be at work.
    here, compiled = threading.get_ident(), []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == here:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        _Run(copy.deepcopy(bench.cell))(second)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if compiled:
        raise AssertionError(f"{bench.law}: {bench.cell!r}: a second eager call compiled {len(compiled)} programs")


@_law
def check_hashing(bench: _Bench) -> None:
    """A layer is a value: frozen, hashable, equal to an equal one, no pytree; its parameters are plain pytrees.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_hashing(jrnn.elman(2))
    """
    cell, name = bench.cell, f"{bench.law}: {bench.cell!r}"
    if not dataclasses.is_dataclass(cell) or not type(cell).__dataclass_params__.frozen:
        raise AssertionError(f"{name}: expected a frozen dataclass")
    other = copy.deepcopy(cell)
    if cell != other or hash(cell) != hash(other):
        raise AssertionError(f"{name}: expected a copy to be equal and to hash equally; are all fields values?")
    if jax.tree.leaves(cell) != [cell]:
        raise AssertionError(f"{name}: expected no pytree, since a layer is static structure")
    key = jax.random.key(bench.seed)
    params, again = cell.init(key, bench.in_features), other.init(key, bench.in_features)
    compare(again, params, 0.0, f"{name}: init with one key, twice")

    def plain(tree: Any) -> bool:
        if isinstance(tree, dict):
            return all(isinstance(k, str) for k in tree) and all(map(plain, tree.values()))
        if isinstance(tree, tuple):
            return all(map(plain, tree))
        return isinstance(tree, jax.Array | np.ndarray)

    if not plain(params):
        raise AssertionError(
            f"{name}: expected parameters of nested dicts and tuples of arrays, got {describe(params)}"
        )
    for batch in ((), (2,), (2, 3)):
        for leaf in jax.tree.leaves(bench.initial(batch)):
            if leaf.shape[: len(batch)] != batch:
                raise AssertionError(f"{name}: expected states of shape {batch} + (...), got {leaf.shape}")
    ys = bench.run(bench.trial())["ys"]
    features = event_shape(cell.out_features(bench.in_features))
    if ys.shape[ys.ndim - len(features) :] != features:
        raise AssertionError(f"{name}: expected {features} features, as out_features says, got {ys.shape}")


LAWS: tuple[Callable[..., None], ...] = (
    check_hashing,
    check_draws,
    check_step_equals_unroll,
    check_padding,
    check_zero_length,
    check_resets,
    check_reverse,
    check_chunks,
    check_remat,
    check_backends,
    check_vmap,
    check_jit,
    check_derivatives,
    check_state_dtype,
    check_compiles_once,
)


def check_cell(
    cell: Layer,
    in_features: Any = 3,
    *,
    dtype: Any = "float32",
    seed: int = 0,
    jit: bool = False,
    params: Any = None,
    laws: tuple[Callable[..., None], ...] | None = None,
) -> None:
    """Checks a cell, a layer or a whole model against every law of the sequence contract.

    Args:
      cell: anything that `jrnn.unroll` runs.
      in_features: F; None for models that begin with `jrnn.embed`.
      dtype: "float32" or "float64", of parameters, inputs and states; float64 compares to 1e-11. It is switched on for
        the duration of the call alone.
      seed: of parameters, data and keys.
      jit: whether to compile every program; slower, and the same unless a compiler is wrong.
      params: parameters to use; None for ``cell.init`` with noise added, so that nothing is zero.
      laws: which laws; None for all of `LAWS`.

    Raises:
      AssertionError: a law does not hold; it says which, what differed and by how much.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Leaky(jrnn.Cell):
    ...     decay: float
    ...     def init(self, key, in_features):
    ...         return {}
    ...     def initial_state(self, params, batch_shape):
    ...         return jnp.zeros((*batch_shape, 2))
    ...     def step(self, params, state, x, key=None):
    ...         state = self.decay * state + x
    ...         return state, jnp.tanh(state)
    >>> jrnn.testing.check_cell(Leaky(0.5), in_features=2)
    """
    for law in LAWS if laws is None else laws:
        law(cell, in_features, dtype=dtype, seed=seed, jit=jit, params=params)
