"""A literal implementation of the sequence contract: a Python loop over ``cell.step``, and its gradients by hand.

With g the cotangent of the state after step t, v whether step t is valid and r whether it is reset, the loop and its
pullback are::

    s'  = r ? initial : s            g', dx, dparams += pullback of step at (v ? g : 0, v ? dy : 0)
    s,y = v ? step(s', x) : (s', 0)  dinitial += r ? g' : 0          g = (v ? 0 : g) + (r ? 0 : g')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._interpret import call
from jrnn.cells.base import Layer, features_of
from jrnn.compose.combine import Bidirectional, Highway, Residual, Stack, stepless
from jrnn.testing.trials import Trial, has_gradient, inexact, only_inexact, results, with_gradients

_ONCE = 0xFFFFFFFF  # the time that is folded into the key of draws once per sequence


@dataclass(frozen=True)
class _Step:
    cell: Layer

    def __call__(self, params: Any, state: Any, x: Any, key: Any, cotangents: Any) -> dict[str, Any]:
        def forward(params: Any, x: Any, state: Any) -> Any:
            return self.cell.step(params, state, x, key)

        return with_gradients(forward, (params, x, state), cotangents)


@dataclass(frozen=True)
class Init:
    cell: Layer
    in_features: Any

    def __call__(self, key: Any) -> Any:
        return self.cell.init(key, self.in_features)


@dataclass(frozen=True)
class Initial:
    cell: Layer
    batch: tuple[int, ...]

    def __call__(self, params: Any, cotangents: Any) -> Any:
        floats, rebuild = inexact(params)
        if cotangents is None:
            return self.cell.initial_state(params, self.batch)
        pull = jax.vjp(lambda p: inexact(self.cell.initial_state(rebuild(p), self.batch))[0], floats)[1]
        return only_inexact(params, pull(list(cotangents))[0])


@dataclass(frozen=True)
class Draw:
    cell: Layer
    batch: tuple[int, ...]
    in_features: Any

    def __call__(self, params: Any, key: Any, cotangents: Any) -> Any:
        once = jax.random.fold_in(key, _ONCE)
        floats, rebuild = inexact(params)
        if cotangents is None:
            return self.cell.draw(params, once, self.batch, self.in_features)
        pull = jax.vjp(lambda p: inexact(self.cell.draw(rebuild(p), once, self.batch, self.in_features))[0], floats)[1]
        return only_inexact(params, pull(list(cotangents))[0])


@dataclass(frozen=True)
class _Keys:
    """A key for each step. If a layer has no step of its own, the index of its part is folded in, too."""

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
    """The output of a combinator without a step, from its input and the outputs of its parts; and its gradients."""

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
        """The flow in the other direction, where a reset at t becomes one at the last valid step before t."""
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


def zero_tree(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), tree)


def add_trees(a: Any, b: Any) -> Any:
    return jax.tree.map(np.add, a, b)


def _fold_steps(layer: Layer, params: Any, xs: Any, state: Any, flow: _Flow) -> Any:
    """A fold over ``layer.step`` in Python, and its pullback, which is backpropagation through time."""
    time, batch = len(xs), flow.valid.shape[1:]
    initial = call(Initial(layer, batch), params, None)
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
        params_bar = zero_tree(inexact(params)[0])
        initial_bar = zero_tree(inexact(initial)[0])
        xs_bar: list[Any] = [None] * time
        for t, before in reversed(tape):
            nothing = zero_tree(state_bar)
            y_bar = _pick(flow.valid[t], ys_bar[t], np.zeros_like(ys_bar[t]))
            new_bar = _pick(flow.valid[t], state_bar, nothing)
            out = call(_Step(layer), params, before, xs[t], keys[t], (*new_bar, y_bar))
            before_bar = jax.tree.leaves(out["gradient of state"])
            params_bar = add_trees(params_bar, jax.tree.leaves(out["gradient of params"]))
            initial_bar = add_trees(initial_bar, _pick(flow.resets[t], before_bar, nothing))
            held = _pick(flow.valid[t], nothing, state_bar)
            state_bar = add_trees(held, _pick(flow.resets[t], nothing, before_bar))
            xs_bar[t] = out["gradient of xs"]
        first = call(Initial(layer, batch), params, tuple(initial_bar))
        params_bar = add_trees(params_bar, jax.tree.leaves(first))
        xs_gradient = None if not has_gradient(xs) else np.stack(xs_bar) if time else np.zeros_like(xs)
        return only_inexact(params, params_bar), xs_gradient, only_inexact(state, state_bar)

    return state, np.stack(ys) if time else None, pull


# The combinators that `_fold_layers` implements itself, without running their `walk`.
_READ = (Stack.walk, Bidirectional.walk, Residual.walk, Highway.walk)


class _Walking:
    """A run over time, in the interface that a combinator's `walk` expects. ``part`` runs the parts."""

    def __init__(self, flow: _Flow, part: Callable[..., Any]) -> None:
        self.flow, self.part = flow, part

    def __call__(self, layer: Layer, params: Any, xs: Any, state: Any) -> Any:
        return self.part(_fold_layers, self.flow, layer, params, xs, state)

    def scan(self, layer: Layer, params: Any, xs: Any, state: Any) -> Any:
        return self.part(_fold_steps, self.flow, layer, params, xs, state)

    def child(self, index: int) -> _Walking:
        return _Walking(self.flow.child(index), self.part)

    def opposite(self) -> _Walking:
        return _Walking(self.flow.opposite(), self.part)

    def step_keys(self, length: int) -> Any:
        flow = self.flow
        return None if flow.key is None else jnp.stack(call(_Keys(length, flow.path), flow.key, flow.start))

    def zero_invalid(self, ys: Any) -> Any:
        valid = self.flow.valid
        return jax.tree.map(lambda y: jnp.where(valid.reshape(valid.shape + (1,) * (y.ndim - valid.ndim)), y, 0), ys)


def _fold_walk(layer: Any, params: Any, xs: Any, state: Any, flow: _Flow) -> Any:
    """The fold for a combinator of which only the `walk` is known.

    The walk is run once, with each part folded. For the pullback, the walk is seen as a function from the results of
    the parts to their arguments and to the final results. The gradient of a part's result comes from everything that
    is computed from it, so the pullbacks of the parts are called from the last to the first.
    """
    ends: list[Any] = []
    pulls: list[Any] = []

    def fold_part(how: Any, flow: _Flow, *args: Any) -> Any:
        last, ys, pull = how(args[0], *jax.tree.map(_as_numpy, args[1:]), flow)
        ends.append((last, ys))
        pulls.append(pull)
        return last, ys

    last, ys = jax.tree.map(_as_numpy, layer.walk(_Walking(flow, fold_part), params, xs, state))
    ys = _pick(flow.valid, ys, np.zeros_like(ys))
    point, rebuild = inexact((params, xs, state, ends))

    def around(point: Any) -> tuple[list[list[Any]], list[Any]]:
        """The float leaves of the arguments of each part, and those of the results of the layer."""
        params, xs, state, ends = rebuild(point)
        arguments: list[list[Any]] = []
        left = iter(ends)

        def given(how: Any, flow: _Flow, part: Any, *args: Any) -> Any:
            arguments.append(inexact(args)[0])
            return next(left)

        out = layer.walk(_Walking(flow, given), params, xs, state)
        return arguments, inexact(out)[0]

    def pull_walk(state_bar: list[Any], ys_bar: Any) -> Any:
        (arguments, out), back = jax.vjp(around, point)
        counts = [len(inexact(end)[0]) for end in ends]
        own = len(point) - sum(counts)
        ys_bar = _pick(flow.valid, ys_bar, np.zeros_like(ys_bar))
        (bars,) = back((zero_tree(arguments), [*state_bar, ys_bar]))
        bars = list(map(np.asarray, bars))
        for i in reversed(range(len(ends))):
            first = own + sum(counts[:i])
            *part_bar, part_ys = bars[first : first + counts[i]]
            part = jax.tree.leaves(pulls[i](part_bar, part_ys))
            cotangents = [part if i == j else zero_tree(given) for j, given in enumerate(arguments)]
            bars = add_trees(bars, list(back((cotangents, zero_tree(out)))[0]))
        params_bar, xs_bar, start_bar = only_inexact((params, xs, state), bars[:own])
        return params_bar, xs_bar, start_bar

    return last, ys, pull_walk


def _as_numpy(leaf: Any) -> Any:
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


def _fold_layers(layer: Any, params: Any, xs: Any, state: Any, flow: _Flow) -> Any:
    """The fold for any layer. A layer without a step consists of layers that have one."""
    if not stepless(layer):
        return _fold_steps(layer, params, xs, state, flow)
    if type(layer).walk not in _READ:
        return _fold_walk(layer, params, xs, state, flow)
    if isinstance(layer, Stack):
        states, pulls = [], []
        for i, part in enumerate(layer.layers):
            new, xs, pull = _fold_layers(part, params[i], xs, state[i], flow.child(i))
            states.append(new)
            pulls.append(pull)

        def pull_stack(state_bar: list[Any], ys_bar: Any) -> Any:
            bars = []
            for new, pull in zip(reversed(states), reversed(pulls), strict=True):
                count = len(inexact(new)[0])
                part = state_bar[len(state_bar) - count :]
                state_bar = state_bar[: len(state_bar) - count]
                params_bar, ys_bar, start_bar = pull(part, ys_bar)
                bars.append((params_bar, start_bar))
            return tuple(p for p, _ in reversed(bars)), ys_bar, tuple(s for _, s in reversed(bars))

        return tuple(states), xs, pull_stack
    if isinstance(layer, Bidirectional):
        # The leaves of a dict are in the order of its names: backward before forward.
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
        xs_bar = xs_bar if has_gradient(xs) else None  # integers have no gradient
        params_bar, start_bar = {}, {}
        for name in sorted(runs):
            count = len(inexact(runs[name][0])[0])
            part, state_bar = state_bar[:count], state_bar[count:]
            params_bar[name], more, start_bar[name] = runs[name][2](part, outs_bar[names.index(name)])
            xs_bar = None if xs_bar is None else add_trees(xs_bar, more)
        if isinstance(layer, Bidirectional):
            return params_bar, xs_bar, start_bar
        inner_bar = {**own_bar, **params_bar} if isinstance(layer, Highway) else params_bar["layer"]
        return inner_bar, xs_bar, start_bar["layer"]

    ends = {name: runs[name][0] for name in runs}
    return (ends if isinstance(layer, Bidirectional) else ends["layer"]), ys, pull_parts


def fold(cell: Layer, trial: Trial, *, reverse: bool = False) -> dict[str, Any]:
    """A literal implementation of the sequence contract: a NumPy loop over ``cell.step``, with gradients by hand.

    Steps run in the order of processing. An invalid step changes nothing, and a reset there is ignored. At a valid
    step, a reset first replaces the state; then the step runs with the key of its absolute time. A layer without a step
    consists of parts that have one. In a bidirectional layer's backward part, a reset at t is the boundary before t.

    Args:
      cell: a cell or layer.
      trial: its arguments. Inputs at padding should be finite here.
      reverse: as for `jrnn.unroll`.

    Returns:
      A dict of NumPy trees: ``state``, ``ys``, and with ``trial.cotangents`` the gradients.

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
    draw = Draw(cell, batch, in_features)
    params = trial.params if trial.key is None else call(draw, trial.params, trial.key, None)
    state = call(Initial(cell, batch), trial.params, None) if trial.state is None else trial.state
    flow = _Flow(valid, resets, reverse, trial.key, trial.start)
    last, ys, pull = _fold_layers(cell, params, xs, state, flow)
    if trial.cotangents is None:
        return {"state": last, "ys": ys}
    params_bar, xs_bar, state_bar = pull(list(trial.cotangents[:-1]), trial.cotangents[-1])
    if trial.key is not None:
        params_bar = call(draw, trial.params, trial.key, tuple(jax.tree.leaves(params_bar)))
    if trial.state is None:
        first = call(Initial(cell, batch), trial.params, tuple(jax.tree.leaves(state_bar)))
        params_bar, state_bar = add_trees(params_bar, first), None
    return results(last, ys, params_bar, xs_bar, state_bar)
