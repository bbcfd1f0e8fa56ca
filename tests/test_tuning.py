"""Timing one's own shapes. Nothing here asserts on a time."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jrnn
import jrnn.experimental  # adds a schedule that refuses here
from jrnn.run.tuning import Timing, Tuning, tune
from jrnn.schedules import SCHEDULES, Plan, Schedule, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

CELL = jrnn.lstm(4)


def arguments(cell=CELL, features=3):
    return cell, cell.init(jax.random.key(0), features), jnp.ones((5, 2, features))


def test_every_schedule_has_a_row(monkeypatch, capsys):
    for name in set(SCHEDULES) - {"hoisted", "cudnn", "reference"}:
        monkeypatch.delitem(SCHEDULES, name)
    found = tune(*arguments(jrnn.elman(3)), lengths=jnp.array([5, 2]), repeats=2)
    assert [row.backend for row in found.rows] == list(SCHEDULES)
    rows = {row.backend: row for row in found.rows}
    for name in ("hoisted", "reference"):
        assert rows[name].forward_ms > 0
        assert rows[name].train_ms > 0
        assert rows[name].reason is None
    assert rows["cudnn"] == Timing("cudnn", None, None, rows["cudnn"].reason)
    assert rows["cudnn"].reason.startswith("cuDNN has the plain LSTM alone")
    assert {found.forward, found.train} <= {row.backend for row in found.rows if row.train_ms is not None}
    assert (found.default, found.device) == ("hoisted", jax.devices()[0].device_kind)
    assert capsys.readouterr().out == f"{found}\n"


@pytest.mark.smoke
def test_models_and_integers(capsys):
    model = jrnn.stack(jrnn.embed(5, 3), jrnn.dropout(0.5), jrnn.elman(2))
    params, ids = model.init(jax.random.key(0), None), jnp.zeros((4, 2), jnp.int32)
    found = tune(model, params, ids, key=jax.random.key(1), backends=("reference",), repeats=1, quiet=True)
    assert found.train == found.forward == "reference"
    assert capsys.readouterr().out == ""


def test_a_schedule_that_fails_is_a_row(monkeypatch):
    def run(options, task):
        raise MemoryError("RESOURCE_EXHAUSTED\nand more")

    def no_gradient(options, task):
        def refuse(*_):
            raise NotImplementedError("no derivative")

        core = jax.custom_vjp(lambda task: reference.run(None, task))
        core.defvjp(refuse, refuse)
        return core(task)

    for name, function in {"hoisted": run, "cudnn": no_gradient}.items():
        row = Schedule(lambda _, function=function: Plan(function, "could"), automatic=False)
        monkeypatch.setitem(SCHEDULES, name, row)
    jax.clear_caches()
    found = tune(*arguments(jrnn.elman(3)), backends=("hoisted", "cudnn", "reference"), repeats=1, quiet=True)
    jax.clear_caches()
    rows = {row.backend: row for row in found.rows}
    assert rows["hoisted"] == Timing("hoisted", None, None, "failed: MemoryError: RESOURCE_EXHAUSTED")
    assert rows["cudnn"].forward_ms is not None
    assert rows["cudnn"].train_ms is None
    assert rows["cudnn"].reason == "no gradients: NotImplementedError: no derivative"
    assert found.train == "reference"


@pytest.mark.smoke
def test_the_choice_and_the_table():
    rows = (
        Timing("kernel", 1.0, None, "no gradients"),
        Timing("hoisted", 2.0, 5.0),
        Timing("reference", 3.25, 5.0),
        Timing("cudnn", None, None, "no GPU"),
    )
    found = Tuning("Some GPU", "hoisted", rows)
    assert (found.forward, found.train) == ("kernel", "hoisted")  # of equals the first
    assert str(found).splitlines() == [
        "backend    forward ms  forward+backward ms",
        "kernel              1                    -  no gradients",
        "hoisted             2                    5",
        "reference        3.25                    5",
        "cudnn               -                    -  no GPU",
        "fastest on Some GPU: forward kernel, forward+backward hoisted; backend=None runs hoisted",
    ]
    assert Tuning("cpu", "hoisted", rows[3:]).train is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.device = "another"


def test_bad_arguments():
    cell, params, xs = arguments()
    with pytest.raises(ValueError, match="repeats: expected a positive int, got 0"):
        tune(cell, params, xs, repeats=0)
    with pytest.raises(ValueError, match="seconds: expected a positive number"):
        tune(cell, params, xs, seconds=0.0)
    with pytest.raises(ValueError, match=r"backends: expected None or one of .*'hoisted'.*got"):
        tune(cell, params, xs, backends=("fast",))
    with pytest.raises(ValueError, match="lengths: expected values"):
        tune(cell, params, xs, lengths=jnp.array([9, 1]))
    with pytest.raises(TypeError, match="model: expected a layer"):
        tune("lstm", params, xs)


def test_equal_cells_have_one_reason():
    model = jrnn.stack(jrnn.bidirectional(jrnn.gru(4)), jrnn.dense(2))
    structs = jax.eval_shape(lambda: (model.init(jax.random.key(0), 3), jnp.ones((5, 2, 3))))
    name, reason = jrnn.choose_backend(model, *structs)
    assert name == "hoisted"
    assert "\n" not in reason


def test_shapes_are_enough_to_choose_by():
    model = jrnn.stack(jrnn.embed(5, 3), jrnn.dropout(0.1), jrnn.bidirectional(jrnn.gru(8)))
    arrays = (model.init(jax.random.key(0), None), jnp.zeros((6, 2), jnp.int32))
    structs = jax.eval_shape(lambda: arrays)
    assert jrnn.choose_backend(model, *structs) == jrnn.choose_backend(model, *arrays)
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert jrnn.choose_backend(model, *structs, key=key) == jrnn.choose_backend(model, *arrays, key=jax.random.key(0))
    with pytest.raises(TypeError, match="xs: expected integer ids"):
        jrnn.choose_backend(model, structs[0], jax.ShapeDtypeStruct((6, 2), jnp.float32))
