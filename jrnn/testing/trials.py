"""The functions that the laws run: `jrnn.unroll` with its gradients, as functions of a `Trial`, compared by value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.cells.base import Layer
from jrnn.run.unrolling import unroll

TIME = 6
BATCH = 4


class Trial(NamedTuple):
    """The arguments of one unroll, with the cotangents of its state and outputs.

    ``xs`` are ``(T, *B, F)`` or integers ``(T, *B)``. ``lengths (*B,)``, ``mask`` and ``resets (T, *B)`` may be None.
    ``cotangents`` is a tuple with one for each float leaf of the state, then that of ``ys``; None for values only.

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
        """The valid steps and the resets at valid steps, NumPy booleans ``(T, *B)``."""
        time = self.xs.shape[0]
        valid = np.ones((time, *batch), bool)
        if self.lengths is not None:
            valid &= np.arange(time).reshape(time, *[1] * len(batch)) < np.asarray(self.lengths)
        if self.mask is not None:
            valid &= np.asarray(self.mask)
        resets = np.zeros_like(valid) if self.resets is None else np.asarray(self.resets) & valid
        return valid, resets


@dataclass(frozen=True)
class Run:
    """`unroll` with its gradients, as a function of a trial. Compares by value, so that traced programs are reused."""

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

        return with_gradients(forward, (trial.params, trial.xs, trial.state), trial.cotangents)


@dataclass(frozen=True)
class Vmap:
    """A run that is vmapped over the batch axis of a trial. If there are keys, each sequence has its own."""

    run: Run

    def __call__(self, trial: Trial) -> dict[str, Any]:
        cotangents = (0,) * (len(trial.cotangents) - 1) + (1,)
        axes = Trial(None, 1, 0, 0, 1, 1, 0, None, cotangents)
        flat = Trial(*(None if value is None else axis for value, axis in zip(trial, axes, strict=True)))
        out = {"state": 0, "ys": 1, "gradient of params": 0, "gradient of xs": 1, "gradient of state": 0}
        result = jax.vmap(self.run, in_axes=(flat,), out_axes=out)(trial)
        return {**result, "gradient of params": jax.tree.map(lambda g: g.sum(0), result["gradient of params"])}


@dataclass(frozen=True)
class Second:
    """Derivatives of a nonlinear loss of state and outputs along a vector: grad, jvp, jvp of grad and grad of grad.

    The loss is real. JAX's gradient with respect to a complex number z is the g for which the loss changes by the real
    part of ``g * dz``.
    """

    run: Run

    def __call__(self, trial: Trial, along: Any) -> dict[str, Any]:
        run, flags = self.run, {"lengths": trial.lengths, "mask": trial.mask, "resets": trial.resets}
        point, rebuild = inexact((trial.params, trial.xs, trial.state))

        def loss(*point: Any) -> Any:
            out = unroll(run.cell, *rebuild(point), **flags, key=trial.key, start=trial.start, reverse=run.reverse)
            return sum(jnp.sum(c * jnp.sin(y)).real for c, y in zip(trial.cotangents, inexact(out)[0], strict=True))

        def gradient(*point: Any) -> Any:
            return jax.grad(loss, tuple(range(len(point))))(*point)

        _, slope = jax.jvp(loss, tuple(point), tuple(along))
        first, forward = jax.jvp(gradient, tuple(point), tuple(along))
        backward = jax.vjp(gradient, *point)[1](tuple(along))
        return {"gradient": first, "jvp": slope, "jvp of grad": forward, "grad of grad": backward}


def has_gradient(leaf: Any) -> bool:
    """Whether a leaf consists of floats or complex numbers."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def inexact(tree: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """The float and complex leaves, which have gradients, and a function that rebuilds the tree with other leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if has_gradient(leaf)]

    def rebuild(floats: Any) -> Any:
        replaced = dict(zip(where, floats, strict=True))
        return jax.tree.unflatten(treedef, [replaced.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in where], rebuild


def only_inexact(tree: Any, floats: Any) -> Any:
    """A tree with the given float and complex leaves, and None for the others, which have no gradient."""
    leaves, treedef = jax.tree.flatten(tree)
    remaining = iter(floats)
    return jax.tree.unflatten(treedef, [next(remaining) if has_gradient(leaf) else None for leaf in leaves])


def with_gradients(forward: Callable[..., Any], args: tuple[Any, Any, Any], cotangents: Any) -> dict[str, Any]:
    if cotangents is None:
        state, ys = forward(*args)
        return {"state": state, "ys": ys}
    floats, rebuild = inexact(args)

    def outputs(floats: Any) -> Any:
        out = forward(*rebuild(floats))
        return inexact(out)[0], out

    _, pull, (state, ys) = jax.vjp(outputs, floats, has_aux=True)
    (gradients,) = pull(list(cotangents))
    params, xs, start = only_inexact(args, gradients)
    return results(state, ys, params, xs, start)


def results(state: Any, ys: Any, params: Any, xs: Any, start: Any) -> dict[str, Any]:
    return {
        "state": state, "ys": ys, "gradient of params": params, "gradient of xs": xs, "gradient of state": start,
    }  # fmt: skip
