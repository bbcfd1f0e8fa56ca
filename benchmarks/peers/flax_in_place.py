"""Flax's own recurrent modules, and jrnn's in their place: the same cells, variables and calls."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

import jrnn.flax.linen
import jrnn.flax.nnx
from benchmarks import data
from benchmarks.grid import DROP_IN, Point
from benchmarks.peers import flax_linen, flax_nnx


class InPlace:
    """Of a peer: takes part in the section that is for it."""

    def refuses(self, point: Point) -> str | None:
        return super().refuses(point) if point.section == DROP_IN else "takes part in its own section"


def wrapped(make: Any) -> Any:
    """The class that code bases of reinforcement learning have, for a cell."""

    class ScannedRNN(nn.Module):
        @functools.partial(nn.scan, variable_broadcast="params", in_axes=0, out_axes=0, split_rngs={"params": False})
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            inputs, resets = x
            fresh = make(parent=None).initialize_carry(jax.random.key(0), inputs.shape)
            carry = jax.tree.map(lambda new, old: jnp.where(resets[:, None], new, old), fresh, carry)
            return make()(carry, inputs)

    return ScannedRNN()


class Linen(InPlace, flax_linen.Linen):
    form = "nn.RNN(time_major=True); with resets, the class that wraps the cell in nn.scan; apply under jit"
    resets = True

    def kind(self, point: Point) -> Any:
        return type(self.cell(point))

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        if not point.resets:
            return super().apply(point, own, xs, lengths)
        variables = {"params": {f"{self.kind(point).__name__}_0": own[0][0]}}
        inputs = (xs, jnp.asarray(data.resets(point)))
        return self.scanned(point).apply(variables, self.initial(point, own), inputs)[1]

    def scanned(self, point: Point) -> Any:
        return wrapped(functools.partial(self.kind(point), point.hidden))


class LinenOnJrnn(Linen):
    form = "the same on jrnn.flax.linen: RNN; with resets, ScannedRNN"
    modules = jrnn.flax.linen

    def scanned(self, point: Point) -> Any:
        return jrnn.flax.linen.ScannedRNN(self.cell(point))


class Plain(Linen):
    """The cell whose gates are products of their own."""

    form = "as linen on flax, of nn.LSTMCell"
    cells: ClassVar[tuple[str, ...]] = ("lstm",)

    def cell(self, point: Point) -> Any:
        return nn.LSTMCell(point.hidden)


class PlainOnJrnn(Plain, LinenOnJrnn):
    form = "as linen on jrnn, of nn.LSTMCell"


class NNX(InPlace, flax_nnx.NNX):
    pass


class NNXOnJrnn(NNX):
    form = "the same on jrnn.flax.nnx"
    modules = jrnn.flax.nnx
