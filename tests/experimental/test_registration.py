"""What is experimental is there once it was imported, and an error says so before."""

import jax.numpy as jnp
import pytest

import jrnn
import jrnn.experimental
from jrnn.run.tuning import tune
from jrnn.schedules import EXPERIMENTAL, SCHEDULES

CELL = jrnn.elman(2)
PARAMS = {"w_ih": jnp.ones((3, 2)), "w_hh": jnp.ones((2, 2)), "b": jnp.ones(2)}
XS = jnp.ones((2, 1, 3))


@pytest.mark.parametrize("name", EXPERIMENTAL)
@pytest.mark.smoke
def test_not_before_it_is_imported(name, monkeypatch):
    with pytest.raises(ValueError, match=f"backend: '{name}' cannot run"):
        jrnn.unroll(CELL, PARAMS, XS, backend=name)
    assert not SCHEDULES[name].automatic
    monkeypatch.delitem(SCHEDULES, name)
    for call, argument in (
        (lambda: jrnn.unroll(CELL, PARAMS, XS, backend=name), "backend"),
        (lambda: tune(CELL, PARAMS, XS, backends=(name,)), "backends"),
    ):
        with pytest.raises(ValueError, match=f"^{argument}: '{name}' is experimental.*import jrnn.experimental"):
            call()
