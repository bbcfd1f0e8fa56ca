"""Runs a model one step at a time, for inputs that arrive while it runs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import same_form
from jrnn._core.devices import batch_spec, placed
from jrnn.cells.base import Layer, check_layer, check_state
from jrnn.compose.combine import stepless
from jrnn.run.unrolling import choose_backend, unroll

__all__ = ["stepper"]


def stepper(layer: Layer) -> Any:
    """The layer's step, compiled, with its state donated: ``step(params, state, x, key=None) -> (state, y)``.

    A call costs the overhead of any jitted function plus the arithmetic of the step. Applied to the steps of a sequence
    one after another, it returns the outputs and the state of `jrnn.unroll`, if every step is valid and none is reset.
    For a run with a key, pass the parameters from `jrnn.draw` and, at step t, the key ``jax.random.fold_in(key, t)``.

    B batch axes (any number, or none), F input features, H output features.

    Args:
      layer: a layer that has a step. A bidirectional layer has none, since its backward direction needs later steps.

    Returns:
      A jitted function with the usual attributes (``lower``, ``trace``), the same object for equal layers. Its ``x`` is
      ``(*B, F)`` (integers ``(*B,)`` for models that begin with `jrnn.embed`) and its ``y`` is ``(*B, H)``. The state
      argument is donated: its buffers are reused, so continue with the state that is returned, and copy a state that
      you want to keep. On a mesh whose axes are Explicit, shard the first state as ``x`` is sharded, by
      ``jax.device_put(state, PartitionSpec("data"))``, or its buffers cannot be reused.

    Raises:
      TypeError: the layer has no step.
      ValueError: raised by a call, if its state lacks the batch axes of ``x`` (as for a whole sequence given as one
        step), or was donated to an earlier call.

    >>> cell = jrnn.gru(4)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> step, state = jrnn.stepper(cell), cell.initial_state(params, ())
    >>> for x in jnp.ones((5, 3)):
    ...     state, y = step(params, state, x)
    >>> bool(jnp.allclose(y, jrnn.unroll(cell, params, jnp.ones((5, 3)))[1][-1], atol=1e-6))
    True
    """
    check_layer(layer, "layer")
    if stepless(layer):
        raise TypeError(
            f"layer: expected a layer that has a step, got {layer!r}; a bidirectional layer has no step, since its "
            "backward direction needs the steps that follow: run whole sequences through jrnn.unroll, or stream with "
            "the forward layer alone"
        )
    return _stepper(layer)


class _Stepper:
    """A jitted step with an error for donated states. All other attributes are those of the jitted function."""

    def __init__(self, layer: Layer, compiled: Any) -> None:
        self._layer, self._compiled = layer, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._compiled(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            state = args[1] if len(args) > 1 else kwargs.get("state")
            if any(map(_is_deleted, jax.tree.leaves(state))):
                raise ValueError(
                    "state: expected one that no earlier call was given, got arrays whose buffers were donated: a "
                    "stepper reuses the state that it is given; go on with the state that the last call returned, or "
                    "copy what you keep by jax.tree.map(jnp.copy, state) before the call"
                ) from error
            raise

    def __getattr__(self, name: str) -> Any:
        if name == "_compiled":  # not set yet while the object is copied or unpickled
            raise AttributeError(name)
        return getattr(self._compiled, name)

    def __repr__(self) -> str:
        return f"stepper({self._layer!r})"


def _is_deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


# Cached by value, so that a loop that calls `stepper` repeatedly compiles once. The layer is not an argument of the
# jitted function, which would hash and compare it at every call.
@functools.lru_cache(maxsize=256)
def _stepper(layer: Layer) -> Any:
    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, state: Any, x: Any, key: Any = None) -> tuple[Any, jax.Array]:
        x = jnp.asarray(x)
        check_state(layer, params, state, x)
        state = placed(state, batch_spec(x.ndim - layer.event_ndim, states=x), 0)
        if key is None and _is_compiled_whole(layer, params, state, x):
            state, ys = unroll(layer, params, x[None], state)
            return state, ys[0]
        return layer.step(params, state, x, key)

    return _Stepper(layer, step)


def _is_compiled_whole(layer: Layer, params: Any, state: Any, x: jax.Array) -> bool:
    """Whether the native loop runs the step, as a sequence of one step; it is faster than XLA for large matmuls."""
    # Raises if the arguments do not fit.
    new, _ = jax.eval_shape(layer.step, params, state, x)
    if type(layer).initial_state is Layer.initial_state or not same_form(new, state):
        return False  # the step has no state, or changes its form
    return choose_backend(layer, params, x[None])[0] == "native"
