"""jrnn itself: the schedule it chooses, the reference schedule, and a cell written by a user."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import jrnn
import jrnn.experimental  # adds the schedules "kernel" and "cudnn"
from benchmarks import data
from benchmarks.grid import STEPS, Point
from benchmarks.peers.base import JaxPeer, products


class Jrnn(JaxPeer):
    """What a user gets who chooses nothing."""

    form = "jrnn.unroll under jit, time-major, the schedule it chooses by itself; jrnn.stepper for single steps"
    lengths = True
    resets = True
    backend: ClassVar[str | None] = None
    remat: ClassVar[str | None] = None
    steps_in_a_body: ClassVar[int] = 1

    def cell(self, point: Point) -> Any:
        return data.make_cell(point.cell, point.hidden)

    def convert(self, point: Point, params: Any) -> Any:
        return data.model_params(point, params)

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        model = data.make_model(self.cell(point), point)
        options = {"backend": self.backend, "remat": self.remat, "unroll": self.steps_in_a_body}
        return jrnn.unroll(model, own, xs, lengths=lengths, resets=data.resets(point), **options)[1]

    def initial(self, point: Point, own: Any) -> Any:
        return self.cell(point).initial_state(own, (point.batch,))

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        return jrnn.stepper(self.cell(point))(own, state, x)


class Reference(Jrnn):
    """The plain scan of the cell's step, against which every other schedule is tested."""

    form = 'jrnn.unroll(backend="reference") under jit: a plain scan of cell.step'
    backend = "reference"

    def refuses(self, point: Point) -> str | None:
        return "a single step has no schedule" if point.work == "step" else super().refuses(point)


class OwnLSTM(jrnn.AffineCell):
    """The LSTM's equations, as a user would write them."""

    gate_names = ("i", "f", "g", "o")
    state_type = jrnn.LSTMState

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        i, f, g, o = (a + b for a, b in zip(u, v, strict=True))
        c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jrnn.LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


class Own:
    """Of a peer: runs the user's cell, in the section that is for it."""

    def cell(self, point: Point) -> Any:
        return OwnLSTM(point.hidden)

    def refuses(self, point: Point) -> str | None:
        return super().refuses(point) if point.section == "own cell" else "takes part in its own section"


class OwnCell(Own, Jrnn):
    """A user's AffineCell with the equations of the built-in one."""

    form = "a user's AffineCell with the LSTM's equations (eight lines), run as jrnn above"


@dataclasses.dataclass(frozen=True)
class StepLSTM(jrnn.Cell):
    """The LSTM's equations as nothing but a step, with the parameters of the built-in one."""

    hidden: int

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        zeros = jnp.zeros((*batch_shape, self.hidden))
        return jrnn.LSTMState(zeros, zeros)

    def step(self, params: Any, state: Any, x: Any, key: Any = None) -> Any:
        weights = jnp.concatenate([params["w_ih"], params["w_hh"]])
        z = jnp.concatenate([x, state.h], -1) @ weights + params["b"]
        i, f, g, o = jnp.split(z, 4, -1)
        c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return jrnn.LSTMState(h, c), h


class OwnStep(Jrnn):
    """A user's cell that says nothing but its step."""

    form = "a user's Cell with a step alone ([x, h] in one product), run as jrnn above"
    cells: ClassVar[tuple[str, ...]] = ("lstm",)

    def cell(self, point: Point) -> Any:
        return StepLSTM(point.hidden)

    def refuses(self, point: Point) -> str | None:
        return super().refuses(point) if point.section == STEPS else "takes part in its own section"


class Named(Jrnn):
    """One schedule by name, wherever it serves."""

    def refuses(self, point: Point) -> str | None:
        if point.work == "step":
            return "a single step has no schedule"
        model = data.make_model(self.cell(point), point)
        own = jax.eval_shape(lambda key: model.init(key, point.features), jax.random.key(0))
        xs = jax.ShapeDtypeStruct((point.time, point.batch, point.features), jnp.dtype(point.dtype))
        lengths = jax.ShapeDtypeStruct((point.batch,), jnp.int32) if point.ragged else None
        try:
            with products(point.precision):
                jax.eval_shape(lambda *args: self.apply(point, *args), own, xs, lengths)
        except ValueError as refusal:
            if str(refusal).startswith("backend:"):
                return str(refusal)
            raise
        return super().refuses(point)


class Hoisted(Named):
    """The schedule of scans, with settings to try out."""

    steps_in_a_body = int(os.environ.get("JRNN_BENCHMARK_UNROLL", "1"))
    form = f'jrnn.unroll(backend="hoisted", unroll={steps_in_a_body}) under jit'
    backend = "hoisted"


class OwnHoisted(Own, Hoisted):
    """The user's cell, likewise."""

    form = 'jrnn own cell, jrnn.unroll(backend="hoisted") under jit'


class Remat:
    """Of a peer: keeps the state of every sqrt(T)-th step, in the section that is for it."""

    remat = "sqrt"

    def refuses(self, point: Point) -> str | None:
        return super().refuses(point) if point.section == "memory" else "takes part in its own section"


class WithRemat(Remat, Jrnn):
    """What a user gets who chooses to keep little."""

    form = 'jrnn.unroll(remat="sqrt") under jit'


class HoistedWithRemat(Remat, Hoisted):
    """The schedule of scans, likewise."""

    form = 'jrnn.unroll(backend="hoisted", remat="sqrt") under jit'


class Cudnn(Named):
    form = 'jrnn.unroll(backend="cudnn") under jit'
    backend = "cudnn"


class Kernel(Named):
    form = 'jrnn.unroll(backend="kernel") under jit'
    backend = "kernel"


class OwnKernel(Own, Named):
    """The user's cell in the kernel."""

    form = 'jrnn own cell, jrnn.unroll(backend="kernel") under jit'
    backend = "kernel"
