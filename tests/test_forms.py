"""The form of a step: a value, which wrappers map, and which is never that of a step that somebody overrode."""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import pytest

import jrnn
from jrnn.compose.regularise import Wrapper, Zoneout
from tests.cases import CASES, Doubled, Leaky


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
