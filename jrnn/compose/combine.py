"""Layers made of layers: stacks, both directions, residual and highway connections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import describe, module_level, positive_int, prng_key
from jrnn.cells.base import Layer, check_state, compute_params, emitted, event_shape, product, vector

__all__ = [
    "Bidirectional", "Highway", "Residual", "Skip", "Stack", "bidirectional", "highway", "residual", "skip", "stack",
]  # fmt: skip


def check_part(layer: Any, argument: str) -> None:
    if isinstance(layer, Layer):
        return
    remedy = ""
    if isinstance(layer, list | tuple):
        remedy = "; give the layers one by one, as in jrnn.stack(*layers)"
    elif callable(layer):
        remedy = (
            "; make a layer of an elementwise function with jrnn.activation(function), and call what makes a layer, as "
            "in jrnn.lstm(128)"
        )
    expected = "a layer (jrnn.lstm(...), jrnn.dense(...), a subclass of jrnn.Cell)"
    raise TypeError(f"{argument}: expected {expected}, got {layer!r}{remedy}")


class Combinator(Layer):
    """A layer made of layers, which has no randomness of its own: it draws the masks of its parts."""

    @property
    def draws_once(self) -> bool:
        return any(child.draws_once for child in self.children())


def stepless(layer: Layer) -> bool:
    """Whether a layer has no step: it needs later steps, it defines no step, or it is made of a layer without one."""
    if not layer.causal or type(layer).step is Layer.step:
        return True
    return type(layer).walk is not Layer.walk and any(map(stepless, layer.children()))


def fold(key: jax.Array | None, index: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, index)


@dataclass(frozen=True, repr=False)
class Stack(Combinator):
    """See `stack`."""

    layers: tuple[Layer, ...]

    _constructor = "stack"

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: expected at least one layer, got none")
        for i, layer in enumerate(self.layers):
            check_part(layer, f"layers[{i}]")

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.layers, {}

    @property
    def uses_key(self) -> Any:
        promises = [layer.uses_key for layer in self.layers]
        return True if True in promises else None if None in promises else False

    @property
    def event_ndim(self) -> Any:
        return self.layers[0].event_ndim

    def init(self, key: jax.Array, in_features: Any) -> tuple[Any, ...]:
        prng_key(key)
        params = []
        for i, layer in enumerate(self.layers):
            params.append(layer.init(jax.random.fold_in(key, i), in_features))
            in_features = layer.out_features(in_features)
        return tuple(params)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> tuple[Any, ...]:
        self._check_params(params)
        return tuple(layer.initial_state(p, batch_shape) for layer, p in zip(self.layers, params, strict=True))

    def out_features(self, in_features: Any) -> Any:
        for layer in self.layers:
            in_features = layer.out_features(in_features)
        return in_features

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> tuple[Any, ...]:
        drawn = []
        for i, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            drawn.append(layer.draw(p, jax.random.fold_in(key, i), batch_shape, in_features))
            in_features = layer.out_features(in_features)
        return tuple(drawn)

    def check(self, params: Any, x: Any) -> None:
        self._check_params(params)
        self.layers[0].check(params[0], x)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        self.layers[0].check_values(xs, lengths, mask)

    def _check_params(self, params: Any) -> None:
        if not isinstance(params, tuple) or len(params) != len(self.layers):
            got = f"{type(params).__name__} of {len(params)}" if hasattr(params, "__len__") else repr(params)
            raise ValueError(
                f"params: expected a tuple with one entry for each of {len(self.layers)} layers, got {got}; make them "
                f"with {self!r}.init(key, in_features)"
            )

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        self._check_params(params)
        x = jnp.asarray(x)
        check_state(self, params, state, x)
        states = []
        for i, (layer, p, s) in enumerate(zip(self.layers, params, state, strict=True)):
            s, x = layer.step(p, s, x, None if layer.uses_key is False else fold(key, i))
            states.append(s)
        return tuple(states), x

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        states = []
        for i, (layer, p, s) in enumerate(zip(self.layers, params, state, strict=True)):
            s, xs = run.child(i)(layer, p, xs, s)
            states.append(s)
        return tuple(states), xs


def stack(*layers: Layer) -> Stack:
    """Layers one above the other, of any kind and width: the inputs of each are the outputs of the one before.

    Parameters and states are tuples with one entry for each layer. Over a sequence, each layer runs over all T steps
    before the next begins.

    Args:
      *layers: at least one layer.

    >>> model = jrnn.stack(jrnn.lstm(8), jrnn.dropout(0.2), jrnn.gru(4), jrnn.dense(1))
    >>> params = model.init(jax.random.key(0), 3)
    >>> jrnn.unroll(model, params, jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 1)
    """
    return Stack(layers)


@dataclass(frozen=True, repr=False)
class Skip(Combinator):
    """See `skip`."""

    layers: tuple[Layer, ...]

    _constructor = "skip"

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.layers, {}

    def __post_init__(self) -> None:
        Stack(self.layers)
        for i, layer in enumerate(self.layers):
            if not layer.event_ndim or layer.event_ndim != self.layers[0].event_ndim:
                raise ValueError(
                    f"layers[{i}]: expected a layer whose input has features, with as many axes of space as the first "
                    f"one's, got {layer!r}; put jrnn.embed before, in a jrnn.stack"
                )
            if stepless(layer):
                raise ValueError(
                    f"layers[{i}]: expected a layer that has a step, got {layer!r}; put jrnn.bidirectional around "
                    "the whole"
                )

    @property
    def uses_key(self) -> Any:
        return Stack(self.layers).uses_key

    @property
    def event_ndim(self) -> Any:
        return self.layers[0].event_ndim

    def _features(self, in_features: Any) -> list[tuple[Any, Any]]:
        """Features of each layer's inputs and outputs."""
        found: list[tuple[Any, Any]] = []
        for layer in self.layers:
            given = _side_by_side(in_features, found[-1][1]) if found else in_features
            found.append((given, layer.out_features(given)))
        return found

    def init(self, key: jax.Array, in_features: Any) -> tuple[Any, ...]:
        return tuple(
            layer.init(jax.random.fold_in(key, i), given)
            for i, (layer, (given, _)) in enumerate(zip(self.layers, self._features(in_features), strict=True))
        )

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> tuple[Any, ...]:
        return Stack(self.layers).initial_state(params, batch_shape)

    def out_features(self, in_features: Any) -> Any:
        return functools.reduce(_side_by_side, [out for _, out in self._features(in_features)])

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> tuple[Any, ...]:
        return tuple(
            layer.draw(p, jax.random.fold_in(key, i), batch_shape, given)
            for i, (layer, p, (given, _)) in enumerate(
                zip(self.layers, params, self._features(in_features), strict=True)
            )
        )

    def check(self, params: Any, x: Any) -> None:
        Stack(self.layers).check(params, x)

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        x = jnp.asarray(x)
        Stack(self.layers)._check_params(params)
        check_state(self, params, state, x)

        def run(i: int, layer: Layer, p: Any, given: jax.Array, s: Any) -> Any:
            return layer.step(p, s, given, None if layer.uses_key is False else fold(key, i))

        return self._connected(run, params, x, state)

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        return self._connected(lambda i, *args: run.child(i)(*args), params, xs, state)

    def _connected(self, run: Any, params: Any, x: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        states: list[Any] = []
        ys: list[jax.Array] = []
        for i, (layer, p, s) in enumerate(zip(self.layers, params, state, strict=True)):
            s, y = run(i, layer, p, _concat(x, ys[-1]) if ys else x, s)
            states.append(s)
            ys.append(y)
        return tuple(states), functools.reduce(_concat, ys)


def skip(*layers: Layer) -> Skip:
    """Layers one above the other, with connections from the input to all of them, and from all to the output.

    The first layer gets the input. Each other layer gets the input and the outputs of the layer before, side by side.
    The output is the outputs of all layers, side by side (Graves 2013).

    Parameters and states are tuples with one entry for each layer.

    Args:
      *layers: at least one layer; each has a step.

    >>> model = jrnn.stack(jrnn.skip(jrnn.lstm(8), jrnn.gru(4)), jrnn.dense(1))
    >>> params = model.init(jax.random.key(0), 3)
    >>> params[0][1]["w_ih"].shape, params[1]["w"].shape
    ((11, 12), (12, 1))
    """
    return Skip(layers)


def _side_by_side(a: Any, b: Any) -> Any:
    """Features of two outputs, side by side."""
    return (*a[:-1], a[-1] + b[-1]) if isinstance(a, tuple) else a + b


def _concat(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a, b], axis=-1)


def _mean(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a + b) / 2


_MERGES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "concat": _concat,
    "mean": _mean,
    "product": jnp.multiply,
    "sum": jnp.add,
}


@dataclass(frozen=True, repr=False)
class Bidirectional(Combinator):
    """See `bidirectional`."""

    forward: Layer
    backward: Layer
    merge: str | Callable[[jax.Array, jax.Array], jax.Array] = "concat"

    causal = False

    _constructor = "bidirectional"

    def __post_init__(self) -> None:
        check_part(self.forward, "cell")
        check_part(self.backward, "backward")
        if self.forward.event_ndim != self.backward.event_ndim:
            raise ValueError(
                f"backward: expected a layer that takes the same kind of input as the forward one, {self.forward!r}, "
                f"got {self.backward!r}; put what the two share, such as jrnn.embed, before them in a jrnn.stack"
            )
        if isinstance(self.merge, str):
            if self.merge not in _MERGES:
                raise ValueError(f"merge: expected one of {sorted(_MERGES)} or a function, got {self.merge!r}")
        else:
            module_level(self.merge, "merge", sorted(_MERGES))

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (forward, backward), options = super()._constructor_arguments()
        return (forward,) if forward == backward else (forward, backward), options

    @property
    def uses_key(self) -> Any:
        return Stack((self.forward, self.backward)).uses_key

    @property
    def event_ndim(self) -> Any:
        return self.forward.event_ndim

    @property
    def merged(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return _MERGES[self.merge] if isinstance(self.merge, str) else self.merge

    def _each(self) -> tuple[tuple[int, str, Layer], ...]:
        return (0, "forward", self.forward), (1, "backward", self.backward)

    def init(self, key: jax.Array, in_features: Any) -> dict[str, Any]:
        prng_key(key)
        self.out_features(in_features)  # raises where the outputs do not fit
        return {name: layer.init(jax.random.fold_in(key, i), in_features) for i, name, layer in self._each()}

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> dict[str, Any]:
        self._check_params(params)
        return {name: layer.initial_state(params[name], batch_shape) for _, name, layer in self._each()}

    def out_features(self, in_features: Any) -> Any:
        features = [layer.out_features(in_features) for _, _, layer in self._each()]
        if self.merge != "concat" and isinstance(self.merge, str) and features[0] != features[1]:
            raise ValueError(
                f"merge: expected two layers with equally many features for {self.merge!r}, got "
                f"{features[0]} and {features[1]}; make them equal or merge by concat"
            )
        merged = jax.eval_shape(self.merged, *(jax.ShapeDtypeStruct(event_shape(f), jnp.float32) for f in features))
        return merged.shape if isinstance(features[0], tuple) else merged.shape[-1]

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> dict[str, Any]:
        return {
            name: layer.draw(params[name], jax.random.fold_in(key, i), batch_shape, in_features)
            for i, name, layer in self._each()
        }

    def check(self, params: Any, x: Any) -> None:
        self._check_params(params)
        self.forward.check(params["forward"], x)
        self.backward.check(params["backward"], x)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        self.forward.check_values(xs, lengths, mask)
        self.backward.check_values(xs, lengths, mask)

    def _check_params(self, params: Any) -> None:
        if not isinstance(params, Mapping) or set(params) != {"forward", "backward"}:
            got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
            raise ValueError(
                f'params: expected a dict with "forward" and "backward", got {got}; make them with '
                f"{self!r}.init(key, in_features)"
            )

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        raise TypeError(
            "step: a bidirectional layer has no step, since its backward direction needs the steps that follow; run "
            "whole sequences through jrnn.unroll, or stream with the forward layer alone"
        )

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        forward, ys = run.child(0)(self.forward, params["forward"], xs, state["forward"])
        backward, zs = run.child(1).opposite()(self.backward, params["backward"], xs, state["backward"])
        return {"forward": forward, "backward": backward}, run.zero_invalid(self.merged(ys, zs))


def bidirectional(
    cell: Layer, backward: Layer | None = None, merge: str | Callable[[jax.Array, jax.Array], jax.Array] = "concat"
) -> Bidirectional:
    """Two layers over the same sequence, one from each end (Schuster and Paliwal 1997).

    The backward layer runs from the last valid step to the first; outputs stay in input order. A reset at t is a
    boundary between steps t-1 and t for both directions: the backward layer begins afresh at t-1, so no output sees
    a step of another segment.

    Parameters and states are ``{"forward": …, "backward": …}``. The given ``state["backward"]`` is the state after the
    last step, where the backward run starts; the one returned is the state before the first step, where it ends. There
    is no ``step``.

    Args:
      cell: the forward layer.
      backward: the backward layer; None for one like the forward layer, with parameters of its own.
      merge: "concat", "sum", "mean", "product", or a module-level function of both outputs.

    >>> model = jrnn.bidirectional(jrnn.lstm(4), jrnn.gru(3))
    >>> jrnn.unroll(model, model.init(jax.random.key(0), 2), jnp.ones((5, 2)))[1].shape
    (5, 7)
    """
    return Bidirectional(cell, cell if backward is None else backward, merge)


@dataclass(frozen=True, repr=False)
class Residual(Combinator):
    """See `residual`."""

    layer: Layer

    _constructor = "residual"

    def __post_init__(self) -> None:
        check_part(self.layer, "layer")
        if not self.layer.event_ndim:
            raise ValueError(
                "layer: expected a layer whose input has features, which can be added to its output, got "
                f"{self.layer!r}; put jrnn.embed before it, in a jrnn.stack"
            )

    @property
    def uses_key(self) -> Any:
        return self.layer.uses_key

    @property
    def event_ndim(self) -> Any:
        return self.layer.event_ndim

    def init(self, key: jax.Array, in_features: Any) -> Any:
        for size in event_shape(in_features):
            positive_int(size, "in_features")
        self.out_features(in_features)
        return self.layer.init(key, in_features)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        return self.layer.initial_state(params, batch_shape)

    def out_features(self, in_features: Any) -> Any:
        return same_features(self.layer, in_features)

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        return self.layer.draw(params, key, batch_shape, in_features)

    def check(self, params: Any, x: Any) -> None:
        self.layer.check(params, x)

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        x = jnp.asarray(x)
        check_state(self, params, state, x)
        state, y = self.layer.step(params, state, x, key)
        return state, x + y

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        state, ys = run(self.layer, params, xs, state)
        return state, xs + ys


def same_features(layer: Layer, in_features: Any) -> Any:
    out = layer.out_features(in_features)
    if out != in_features:
        raise ValueError(
            f"layer: expected as many output as input features, to add them up, got {in_features} in and {out} out of "
            f"{layer!r}; put a jrnn.dense({event_shape(out)[-1]}) before it"
        )
    return out


def residual(layer: Layer) -> Residual:
    """A layer with a connection around it: ``y = x + layer(x)`` (He et al. 2016; in recurrent stacks Wu et al. 2016).

    Parameters and states are the layer's.

    Args:
      layer: a layer with as many output as input features.

    >>> model = jrnn.residual(jrnn.gru(3))
    >>> jrnn.unroll(model, model.init(jax.random.key(0), 3), jnp.ones((5, 3)))[1].shape
    (5, 3)
    """
    return Residual(layer)


@dataclass(frozen=True, repr=False)
class Highway(Combinator):
    """See `highway`."""

    layer: Layer
    gate_bias: float = -1.0

    _constructor = "highway"

    def __post_init__(self) -> None:
        Residual(self.layer)
        if self.layer.event_ndim != 1:
            raise ValueError(
                "layer: expected a layer whose input has features and no axes of space, since the gate is computed "
                f"from the features, got {self.layer!r}; use jrnn.residual"
            )

    @property
    def uses_key(self) -> Any:
        return self.layer.uses_key

    def init(self, key: jax.Array, in_features: Any) -> dict[str, Any]:
        positive_int(in_features, "in_features")
        prng_key(key)
        self.out_features(in_features)
        k_layer, k_w = jax.random.split(key)
        return {
            "layer": self.layer.init(k_layer, in_features),
            "w": jax.nn.initializers.glorot_uniform()(k_w, (in_features, in_features), jnp.float32),
            "b": jnp.full(in_features, self.gate_bias, jnp.float32),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        return self.layer.initial_state(params["layer"], batch_shape)

    def out_features(self, in_features: Any) -> int:
        return same_features(self.layer, in_features)

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> dict[str, Any]:
        return {**params, "layer": self.layer.draw(params["layer"], key, batch_shape, in_features)}

    def check(self, params: Any, x: Any) -> None:
        if not isinstance(params, Mapping) or set(params) != {"layer", "w", "b"}:
            raise ValueError(
                f'params: expected a dict with "layer", "w" and "b" for a highway layer, got {describe(params)}; make '
                f"them with {self!r}.init(key, in_features)"
            )
        self.layer.check(params["layer"], x)

    def _mix(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        z = product(x, compute_params(params["w"], x.dtype))
        gate = emitted(jax.nn.sigmoid(z + vector(params["b"], z)), x)
        return gate * y + (1 - gate) * x

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        x = jnp.asarray(x)
        check_state(self, params, state, x)
        state, y = self.layer.step(params["layer"], state, x, key)
        return state, self._mix(params, x, y)

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        state, ys = run(self.layer, params["layer"], xs, state)
        return state, self._mix(params, xs, ys)


def highway(layer: Layer, *, gate_bias: float = -1.0) -> Highway:
    """A layer with a gated connection around it (Srivastava, Greff and Schmidhuber 2015)::

        t = sigmoid(x w + b)    y = t * layer(x) + (1 - t) * x

    Args:
      layer: a layer with as many output as input features.
      gate_bias: the initial value of ``b``; negative, so that at first the input passes.

    Parameters: ``{"layer": …, "w": (F, F), "b": (F,)}``; the state is the layer's.

    >>> model = jrnn.highway(jrnn.gru(3))
    >>> jrnn.unroll(model, model.init(jax.random.key(0), 3), jnp.ones((5, 3)))[1].shape
    (5, 3)
    """
    return Highway(layer, gate_bias)
