"""The persistent kernels: equal to the reference in values and gradients, and refused by name where they cannot run."""

import jax
import jax.numpy as jnp

import jrnn
from jrnn import schedules
from jrnn.schedules import reference


def test_a_schedule_that_is_not_automatic_runs_only_where_asked_for(monkeypatch):
    def refuse(cell, params, xs, steps):
        return False, "never"

    row = schedules.Schedule(lambda *_: (True, "could"), reference.run, automatic=False)
    table = {"asked": row, "silent": row._replace(serves=refuse), **schedules.SCHEDULES}
    monkeypatch.setattr(schedules, "SCHEDULES", table)
    cell = jrnn.gru(2)
    params, xs, steps = cell.init(jax.random.key(0), 3), jnp.ones((4, 1, 3)), schedules.Steps()
    name, reason = schedules.choose(cell, params, xs, steps)
    assert name == "hoisted"
    assert "asked would serve, but runs only where asked for by name: could" in reason
    assert "silent" not in reason
    assert schedules.choose(cell, params, xs, steps, "asked") == ("asked", "could")
