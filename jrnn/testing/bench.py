"""The bench that a law runs on: a cell, parameters without zeros, and seeded trials."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._interpret import call
from jrnn.cells.base import Layer, event_shape
from jrnn.run.unrolling import unroll
from jrnn.testing.comparison import compare
from jrnn.testing.oracle import Init, Initial, fold
from jrnn.testing.trials import BATCH, TIME, Run, Trial, has_gradient, inexact


class Bench:
    """Everything that a law needs: a cell, parameters without zeros, and trials with seeded random numbers."""

    def __init__(self, law: str, cell: Any, in_features: Any, dtype: Any, seed: int, jit: bool, params: Any) -> None:
        if not isinstance(cell, Layer):
            raise TypeError(f"cell: expected a layer, such as a subclass of jrnn.Cell, got {cell!r}")
        if np.dtype(dtype) not in (np.dtype("float32"), np.dtype("float64")):
            raise ValueError(f'dtype: expected "float32" or "float64", got {dtype!r}')
        self.law, self.cell, self.in_features, self.seed, self.jit = law, cell, in_features, seed, jit
        self.dtype = np.dtype(dtype)
        self.tolerance = 3e-5 if self.dtype == np.float32 else 1e-11
        self.rng = np.random.default_rng(seed)
        self.params = jax.tree.map(self._cast, _initialised(cell, in_features, seed, jnp.result_type(float)))
        # Parameters of zero, such as biases, peepholes and learned states, would hide errors in their factors.
        self.params = self.noisy(self.params) if params is None else jax.tree.map(self._cast, params)
        self.may_draw = cell.uses_key is not False

    def _cast(self, leaf: Any) -> Any:
        leaf = np.array(leaf)
        if not has_gradient(leaf):
            return leaf
        return leaf.astype(np.result_type(self.dtype, np.complex64) if np.iscomplexobj(leaf) else self.dtype)

    def normal(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Standard normal numbers. For a complex dtype, both parts are."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        values = self.rng.normal(size=shape)
        if dtype.kind == "c":
            values = values + 1j * self.rng.normal(size=shape)
        return np.asarray(values, dtype)

    def noisy(self, tree: Any, scale: float = 0.2) -> Any:
        def leaf(a: Any) -> Any:
            a = np.asarray(a)
            return a + np.asarray(scale, a.dtype) * self.normal(a.shape, a.dtype) if has_gradient(a) else a

        return jax.tree.map(leaf, tree)

    def inputs(self, shape: tuple[int, ...]) -> Any:
        if self.cell.event_ndim == 0:
            return self.rng.integers(0, _vocabulary(self.cell), shape, np.int32)
        return self.normal((*shape, *event_shape(self.in_features)))

    def initial(self, batch: tuple[int, ...]) -> Any:
        return call(Initial(self.cell, batch), self.params, None)

    def trial(self, batch: Any = (BATCH,), time: Any = TIME, key: Any = None, **fields: Any) -> Trial:
        """A trial with ragged lengths (including 0 and T), a mask with holes, random resets and a random state."""
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
        return tuple(self.normal(a.shape, a.dtype) for a in inexact(out)[0])

    def draws(self) -> Iterator[Any]:
        """The keys to run with: None, and a key if the layer may use one."""
        yield None
        if self.may_draw:
            yield jax.random.key(self.seed + 7)

    def last_draw(self) -> Iterator[Any]:
        """A key if the layer may use one, else None."""
        *_, key = self.draws()
        yield key

    def run(self, trial: Trial, **options: Any) -> Any:
        return call(Run(self.cell, **options), trial, jit=self.jit)

    def fold(self, trial: Trial, reverse: bool = False) -> Any:
        return fold(self.cell, trial, reverse=reverse)

    def compare(self, got: Any, expected: Any, about: str, exact: bool = False, scale: float = 1.0) -> None:
        compare(got, expected, 0.0 if exact else self.tolerance * scale, f"{self.law}: {self.cell!r}: {about}")


@functools.lru_cache(maxsize=8)
def _initialised(cell: Layer, in_features: Any, seed: int, precision: Any) -> Any:
    del precision  # part of the key: the parameters depend on whether float64 is on
    return call(Init(cell, in_features), jax.random.key(seed))


def _vocabulary(layer: Any) -> int:
    if hasattr(layer, "vocab"):
        return layer.vocab
    return next((_vocabulary(child) for child in layer.children() if child.event_ndim == 0), 2)
