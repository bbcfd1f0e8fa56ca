"""The form of a step: a value, which wrappers map, and which is never that of a step that somebody overrode."""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import pytest

import jrnn
from jrnn import testing
from jrnn.compose.regularise import Wrapper, Zoneout
from tests.cases import CASES, Doubled, Leaky
from tests.conftest import in_loops


@dataclasses.dataclass(frozen=True)
class Damp:
    combine: Any

    def __call__(self, theta, u, v, state, key):
        new = self.combine(theta, u, v, state, key)
        return new._replace(h=0.5 * new.h)


@dataclasses.dataclass(frozen=True)
class Damped(Wrapper):
    """A user's wrapper with an update of its own, and the form of it."""

    cell: Any

    def update(self, params, state, p, key=None):
        state, y = super().update(params, state, p, key)
        return state._replace(h=0.5 * state.h), 0.5 * y

    def map_form(self, form, params):
        gates = dataclasses.replace(form.gates, combine=Damp(form.gates.combine))
        return dataclasses.replace(form, gates=gates)


class Undamped(Damped):
    """An update on top of one that is known."""

    def update(self, params, state, p, key=None):
        state, y = super().update(params, state, p, key)
        return state._replace(h=2 * state.h), 2 * y


class OwnProjection(Zoneout):
    def project(self, params, xs):
        return super().project(params, 2 * xs)


class OwnStep(Leaky):
    def step(self, params, state, x, key=None):
        state, y = super().step(params, state, x, key)
        return state, -y


KNOWN = [Damped(jrnn.zoneout(jrnn.gru(4), h=0.1))]
UNKNOWN = [
    Doubled(jrnn.lstm(4)),
    Undamped(jrnn.gru(4)),
    OwnProjection(jrnn.gru(4), (("h", 0.1),)),
    jrnn.zoneout(OwnStep(4), h=0.1),
]


def params_of(cell):
    return cell.init(jax.random.key(0), 3)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("cell", KNOWN + UNKNOWN, ids=repr)
def test_a_step_runs_as_it_is_written(cell):
    """Whether or not its form is known."""
    assert (cell.form(params_of(cell)) is None) == (cell in UNKNOWN)
    xs = jax.random.normal(jax.random.key(1), (6, 2, 3))

    def loss(params, backend):
        last, ys = jrnn.unroll(cell, params, xs, backend=backend)
        return jnp.sum(jnp.sin(ys)) + sum(map(jnp.sum, last)), ys

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    chex.assert_trees_all_close(run(params_of(cell), "hoisted"), run(params_of(cell), "reference"), atol=1e-5)


@dataclasses.dataclass(frozen=True)
class ResetFirst(jrnn.Cell):
    """A GRU with the reset before the product, and the sum of its outputs, as nothing but a step."""

    hidden: int
    uses_key: ClassVar[Any] = False

    def init(self, key, in_features):
        shapes = {"x": (in_features, 3 * self.hidden), "h": (self.hidden, 2 * self.hidden), "n": (self.hidden,) * 2}
        keys = jax.random.split(key, 3)
        return {n: jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}

    def initial_state(self, params, batch_shape):
        return {"h": jnp.zeros((*batch_shape, self.hidden), params["h"].dtype), "total": jnp.zeros(batch_shape)}

    def step(self, params, state, x, key=None):
        h = state["h"]
        u, n = jnp.split(x @ params["x"], [2 * self.hidden], -1)
        r, z = jnp.split(jax.nn.sigmoid(u + h @ params["h"]), 2, -1)
        h = z * h + (1 - z) * jnp.tanh(n + (r * h) @ params["n"])
        return {"h": h, "total": state["total"] + h.sum(-1).astype(jnp.float32)}, h * 1.5


class Summing(ResetFirst):
    """A cell with the sum of its outputs, which is known as that of an affine cell, and as what runs after it."""

    def step(self, params, state, x, key=None):
        h = jnp.tanh(x @ params["x"][:, : self.hidden] + state["h"] @ params["n"])
        return {"h": h, "total": state["total"] + h.sum(-1)}, h


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("cell", [ResetFirst(4), Summing(4)], ids=["reset_first", "summing"])
def test_a_step_that_declares_nothing_runs_hoisted(cell):
    """One product of the state stays in the loop for each that the step has; nothing of the input does."""
    testing.check_cell(cell, 3, laws=(testing.check_backends, testing.check_padding, testing.check_resets))
    run = lambda params, xs: jrnn.unroll(cell, params, xs, backend="hoisted")
    closed = jax.make_jaxpr(run)(params_of(cell), jnp.ones((6, 2, 3)))
    assert len(in_loops(closed, "dot_general", "weigh")) == (1 if isinstance(cell, Summing) else 2)


def test_a_step_without_a_product_of_the_state_is_refused():
    cell = type("Adding", (ResetFirst,), {"step": lambda self, params, state, x, key=None: (state, state["h"])})(4)
    with pytest.raises(ValueError, match="the cell defines only its step, and no part of it can be taken out"):
        jrnn.unroll(cell, params_of(cell), jnp.ones((6, 2, 3)), backend="hoisted")


def test_forms_of_equal_cells_are_equal_in_their_trees():
    for case in CASES:
        if case.name in ("lstm", "layer_norm_gru", "variational", "learned_and_wrapped", "emits_all_wrapped"):
            twin = dataclasses.replace(case.layer)
            first, second = (
                jax.tree.structure(jax.eval_shape(lambda c=c: c.form(params_of(c)))) for c in (case.layer, twin)
            )
            assert first == second, case.name
            assert hash(first) == hash(second), case.name
    zoned = [jrnn.zoneout(jrnn.gru(4), h=rate) for rate in (0.1, 0.2)]
    first, second = (jax.tree.structure(cell.form(params_of(cell))) for cell in zoned)
    assert first != second


def test_a_form_is_mapped_over_weights():
    params = jax.vmap(lambda key: jrnn.gru(4).init(key, 3))(jax.random.split(jax.random.key(0), 5))
    form = jax.jit(jax.vmap(jrnn.gru(4).form))(params)
    assert form.w_hh.shape == (5, 4, 12)
    us = jax.vmap(lambda form, x: form.project(x), (0, None))(form, jnp.ones((2, 3)))
    assert [u.shape for u in us] == [(5, 2, 4)] * 3


class Recorded(jrnn.AffineCell):
    gate_names: ClassVar[tuple[str, ...]] = ("count", "n")

    def gates(self, theta, u, v, state):
        first, second = u
        assert u._fields == v._fields == self.gate_names
        assert (u.count, u.n) == (first, second) == (u[0], u[1])
        return state._replace(h=jnp.tanh(u.count + v.count) * jnp.tanh(u.n + v.n))


@pytest.mark.parametrize("backend", ["hoisted", "reference"])
def test_gates_are_named_in_every_schedule(backend):
    cell = Recorded(4)
    jax.grad(lambda params: jnp.sum(jrnn.unroll(cell, params, jnp.ones((3, 2, 3)), backend=backend)[1]))(
        params_of(cell)
    )


@pytest.mark.parametrize("names", [("z", "z"), ("a b",), ("lambda",), ("_z",), ("1",)])
def test_names_that_are_no_names(names):
    cell = type("Badly", (Leaky,), {"gate_names": names})
    with pytest.raises(ValueError, match=r"gate_names: expected a tuple of different names.*got"):
        cell(4)
