"""The loop: it is the steps in turn; validation, early stopping, records, bad data, progress."""

import math
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrnn.training import NonFiniteError, fit, make_step, optimizer
from tests.conftest import count_compilations


def loss_fn(params, batch, key):
    noise = 0.0 if key is None else 0.1 * jax.random.normal(key, ())
    loss = jnp.mean((batch @ params["w"] + params["b"] - 1.0 + noise) ** 2)
    return loss, {"error": jnp.sqrt(loss), "vector": jnp.ones(3)}


STEP = make_step(loss_fn, optimizer("adam", 0.05, clip_norm=1.0))


def params():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)}


def batches(n, seed=0):
    return list(np.random.default_rng(seed).normal(size=(n, 4, 3)).astype(np.float32))


def by_hand(data, key=None, step=STEP):
    """Batches one by one, every number read at once."""
    state, rows = step.init(params(), key), []
    for batch in data:
        state, metrics = step(state, batch)
        rows.append((float(metrics.loss), float(metrics.grad_norm)))
    return state, rows


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Loader:
    """Batches that can be iterated anew, without a length."""

    def __init__(self, items):
        self.items, self.passes = items, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.items)


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_epochs_are_the_steps_in_turn(log_every):
    data, key = batches(5), jax.random.key(0)
    result = fit(STEP, params(), data, key=key, epochs=3, log_every=log_every)
    state, rows = by_hand(data * 3, key)
    assert_same(result.params, state.params)
    assert_same(result.state.opt_state, state.opt_state)
    assert int(result.state.step) == 15
    assert result.stopped == "epochs"
    assert result.best is None
    train = result.history["train"]
    ends = sorted({*range(log_every, 16, log_every), 15})
    assert train["step"] == ends
    assert train["epoch"] == [(end - 1) // 5 for end in ends]
    for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        losses, norms = zip(*rows[begin:end], strict=True)
        assert train["loss"][i] == math.fsum(losses) / len(losses)
        assert train["grad_norm"][i] == math.fsum(norms) / len(norms)
    assert sorted(train) == ["epoch", "error", "grad_norm", "loss", "step"], "scalars only"


@pytest.mark.parametrize("kind", ["list", "loader", "function", "generator"])
def test_steps_over_any_iterable(kind):
    items = batches(4)
    data = {
        "list": items,
        "loader": Loader(items),
        "function": lambda epoch: iter(items),
        "generator": (item for item in items * 3),
    }[kind]
    result = fit(STEP, params(), data, steps=10)
    assert_same(result.params, by_hand((items * 3)[:10])[0].params)
    assert result.stopped == "steps"


def test_a_generator_loses_nothing_beyond_the_steps():
    source = iter(range(100))
    step = make_step(lambda p, b, k: p * b, optax.sgd(0.1))
    fit(step, 1.0, (jnp.float32(i) for i in source), steps=7)
    assert next(source) == 7


def test_a_generator_serves_one_epoch():
    data = batches(4)
    assert_same(fit(STEP, params(), iter(data), epochs=1).params, by_hand(data)[0].params)


def test_a_function_gets_the_number_of_the_epoch():
    seen = []

    def data(epoch):
        seen.append(epoch)
        return batches(2, seed=epoch)

    result = fit(STEP, params(), data, epochs=3)
    assert seen == [0, 1, 2]
    assert_same(result.params, by_hand(batches(2, 0) + batches(2, 1) + batches(2, 2))[0].params)


def test_the_users_parameters_are_not_touched():
    mine = params()
    fit(STEP, mine, batches(2), epochs=1)
    assert_same(mine, params())


def test_validation_is_the_mean_over_batches_without_a_key():
    data, validation = batches(4), batches(3, seed=9)
    result = fit(STEP, params(), data, key=jax.random.key(0), epochs=2, validation=validation)
    assert result.history["validation"]["step"] == [4, 8]
    assert result.history["validation"]["epoch"] == [0, 1]
    expected = [float(loss_fn(result.state.params, batch, None)[0]) for batch in validation]
    np.testing.assert_allclose(result.history["validation"]["loss"][-1], np.mean(expected), rtol=1e-6)
    assert sorted(result.history["validation"]) == ["epoch", "error", "loss", "step"]


def test_validation_every_few_steps_and_at_the_last():
    result = fit(STEP, params(), batches(4), steps=11, validation=batches(1), validate_every=3)
    assert result.history["validation"]["step"] == [3, 6, 9, 11]


def waypoints(losses):
    """A step that moves one parameter by 1 each time, and a validation loss by table."""
    table = jnp.asarray(losses, jnp.float32)
    step = make_step(lambda p, b, k: p if b is None else p * 0.0 + table[jnp.int32(-p)], optax.sgd(1.0))
    return step, jnp.float32(0.0), [None] * 1, [0]


@pytest.mark.smoke
def test_early_stopping_restores_the_best():
    step, start, data, validation = waypoints([9, 5, 3, 4, 2, 6, 7, 8, 1])
    result = fit(step, start, data, epochs=8, validation=validation, patience=3)
    assert result.stopped == "patience"
    assert result.best == {"step": 4, "value": 2.0}
    assert float(result.params) == -4.0
    assert float(result.state.params) == -7.0
    assert result.history["validation"]["loss"] == [5, 3, 4, 2, 6, 7, 8]


def test_best_is_restored_without_patience_too():
    step, start, data, validation = waypoints([9, 5, 3, 4, 7])
    result = fit(step, start, data, epochs=4, validation=validation)
    assert (result.stopped, float(result.params), float(result.state.params)) == ("epochs", -2.0, -4.0)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_min_delta_is_for_patience_alone(mode):
    """What is best does not depend on it; nor do several small gains count for less than one large one."""
    sign = 1 if mode == "min" else -1
    options = {"patience": 2, "min_delta": 0.5, "mode": mode}
    step, start, data, validation = waypoints([sign * x for x in (9, 5.0, 4.9, 4.8, 4.7)])
    result = fit(step, start, data, epochs=4, validation=validation, **options)
    assert result.stopped == "patience"
    assert result.best == {"step": 3, "value": np.float32(sign * 4.8)}
    assert float(result.params) == -3.0
    assert result.history["validation"]["loss"][-1] == result.best["value"]
    step, start, data, validation = waypoints([sign * x for x in (9, 5.0, 4.7, 4.4, 4.1, 3.8, 3.7, 3.6)])
    result = fit(step, start, data, epochs=7, validation=validation, **options)
    assert (result.stopped, int(result.state.step), result.best["step"]) == ("epochs", 7, 7)


def test_mode_and_nan():
    step, start, data, validation = waypoints([0, 1, math.nan, 3, 2])
    result = fit(step, start, data, epochs=4, validation=validation, mode="max")
    assert result.best == {"step": 3, "value": 3.0}
    for never in (math.nan, math.inf):
        step, start, data, validation = waypoints([0, never, never, 3])
        result = fit(step, start, data, epochs=3, validation=validation, patience=2)
        assert (result.stopped, result.best) == ("patience", None)


def test_monitor_another_metric():
    result = fit(STEP, params(), batches(2), epochs=2, validation=batches(1), monitor="error")
    assert result.best["value"] == min(result.history["validation"]["error"])


def with_bad(n, bad):
    data = batches(n)
    for i in bad:
        data[i] = np.full_like(data[i], np.nan)
    return data


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_stops_after_n_in_a_row_that_are_not_finite(log_every):
    data = with_bad(12, [1, 4, 5, 6, 7])
    with pytest.raises(NonFiniteError, match=r"step 7: .*3 step\(s\) in a row") as caught:
        fit(STEP, params(), data, epochs=1, max_nonfinite=3, log_every=log_every)
    error = caught.value
    assert (error.step, error.in_row, error.leaves) == (7, 3, ["b", "w"])
    assert math.isnan(error.loss)
    assert "clip_norm" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_steps_that_are_not_finite_are_counted_and_leave_no_trace():
    bad = [1, 4, 5]
    result = fit(STEP, params(), with_bad(8, bad), epochs=1, max_nonfinite=3, log_every=4)
    assert result.history["skipped"] == [2, 5, 6]
    assert int(result.state.skipped) == 3
    good = [batch for i, batch in enumerate(batches(8)) if i not in bad]
    state, rows = by_hand(good)
    assert_same(result.params, state.params)
    assert result.history["train"]["loss"] == [
        math.fsum(loss for loss, _ in part) / len(part) for part in (rows[:3], rows[3:])
    ]


def test_never_stops_without_a_limit():
    result = fit(STEP, params(), with_bad(4, range(4)), epochs=1, max_nonfinite=None)
    assert_same(result.params, params())
    assert math.isnan(result.history["train"]["loss"][0])


def test_names_the_leaves_that_are_not_finite():
    step = make_step(lambda p, b, k: jnp.sqrt(p["cell"]["w_hh"] * b) + p["b"] ** 2, optax.sgd(0.1))
    with pytest.raises(NonFiniteError, match="not finite in: cell/w_hh") as caught:
        fit(step, {"cell": {"w_hh": 0.0}, "b": 1.0}, [1.0], steps=3, max_nonfinite=2)
    assert caught.value.leaves == ["cell/w_hh"]
    assert caught.value.loss == 1.0


def test_names_the_culprits_and_not_what_clipping_spoils():
    step = make_step(lambda p, b, k: jnp.sqrt(p["a"] * b) + p["b"] ** 2, optimizer("sgd", 0.1, clip_norm=1.0))
    with pytest.raises(NonFiniteError, match=r"gradients not finite in: a\. The") as caught:
        fit(step, {"a": 0.0, "b": 1.0}, [1.0], steps=2, max_nonfinite=2)
    assert caught.value.leaves == ["a"]


def test_names_the_leaves_whose_updates_are_not_finite():
    divide = optax.stateless(lambda grads, params: jax.tree.map(lambda g: g / g, grads))
    step = make_step(lambda p, b, k: p["a"] * b + p["b"], divide)
    with pytest.raises(NonFiniteError, match=r"Loss 1, gradient norm 1, updates not finite in: a\. The") as caught:
        fit(step, {"a": 1.0, "b": 1.0}, [0.0], steps=2, max_nonfinite=2)
    assert caught.value.leaves == ["a"]
    step = make_step(lambda p, b, k: p.astype(jnp.float32) * b, optax.adam(0.1, eps=1e-3))  # squares overflow
    with pytest.raises(NonFiniteError, match=r"Loss 512, .*, the optimizer's state would not be finite\. The"):
        fit(step, jnp.float16(1.0), [512.0], steps=4, max_nonfinite=2)


@pytest.mark.smoke
def test_history_is_plain_data():
    import json

    result = fit(STEP, params(), batches(3), epochs=2, validation=batches(1))
    assert json.loads(json.dumps(result.history)) == result.history
    assert json.dumps(result.best)


def test_compiles_nothing_new_the_second_time():
    fit(STEP, params(), batches(3), key=jax.random.key(0), epochs=1, validation=batches(1))
    with count_compilations() as counter:
        fit(STEP, params(), batches(3), key=jax.random.key(1), epochs=2, validation=batches(1))
    assert counter["compilations"] == 0


def test_progress_bar_shows_epoch_loss_norm_validation_and_rate(capsys):
    result = fit(STEP, params(), batches(3), epochs=2, validation=batches(1), progress=True, log_every=2)
    shown = capsys.readouterr().err
    validation = f"validation loss={result.history['validation']['loss'][-1]:.4g}"
    for text in ("epoch 2/2", "loss=", "grad_norm=", validation, "step/s", "6/6"):
        assert text in shown
    fit(STEP, params(), batches(3), steps=2, progress=True)
    shown = capsys.readouterr().err
    assert "epoch 1: " in shown
    assert "validation" not in shown


def test_one_line_an_epoch_where_there_is_no_terminal(capsys):
    options = {"validation": batches(1), "monitor": "error", "log_every": 2}
    result = fit(STEP, params(), batches(5), epochs=3, **options)
    train, validation = result.history["train"], result.history["validation"]
    at = [train["step"].index(step) for step in (5, 10, 15)]
    assert capsys.readouterr().err.splitlines() == [
        f"epoch {n + 1}/3: step {5 * n + 5}, loss {train['loss'][i]:.4g}, grad_norm {train['grad_norm'][i]:.4g}, "
        f"validation error {validation['error'][n]:.4g}"
        for n, i in enumerate(at)
    ]
    silent = fit(STEP, params(), batches(5), epochs=3, progress=False, **options)
    assert capsys.readouterr().err == ""
    assert silent.history == result.history, "the records do not depend on who looks"


def test_lines_wait_for_the_records_and_end_with_the_run(capsys):
    result = fit(STEP, params(), batches(2), steps=13, log_every=5)
    assert result.history["train"]["step"] == [5, 10, 13]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", ")[0] for line in lines] == ["epoch 3: step 5", "epoch 5: step 10", "epoch 7: step 13"]
    fit(STEP, params(), batches(9), steps=8, log_every=2)
    assert [line.partition(", ")[0] for line in capsys.readouterr().err.splitlines()] == ["epoch 1: step 8"]


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r'pip install "jrnn\[progress\]"'):
        fit(STEP, params(), batches(1), epochs=1, progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delitem(sys.modules, "tqdm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fit(STEP, params(), batches(1), epochs=1)
    assert "epoch 1/1: step 1, loss" in capsys.readouterr().err


def one_empty_epoch(epoch):
    return batches(2) if epoch == 0 else []


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        ([], {"epochs": 1}, ValueError, "data: expected at least one batch, got none"),
        (iter([]), {"epochs": 1}, ValueError, "data: expected at least one batch, but epoch 0 has none"),
        (Loader([]), {"steps": 1}, ValueError, "data: expected at least one batch"),
        (one_empty_epoch, {"epochs": 2}, ValueError, "epoch 1 has none"),
        (iter(batches(2)), {"epochs": 2}, ValueError, "one-shot iterator cannot be iterated for epochs=2"),
        (iter(batches(2)), {"steps": 3}, ValueError, "one-shot iterator ran out"),
        (3, {"epochs": 1}, TypeError, "data: expected an iterable"),
        (batches(1), {}, ValueError, "exactly one of the two, got epochs=None and steps=None"),
        (batches(1), {"epochs": 1, "steps": 1}, ValueError, "exactly one of the two"),
        (batches(1), {"epochs": 0}, ValueError, "epochs: expected a positive int"),
        (batches(1), {"steps": 1.0}, TypeError, "steps: expected a positive int"),
        (batches(1), {"epochs": 1, "log_every": None}, TypeError, "log_every"),
        (batches(1), {"epochs": 1, "max_nonfinite": 0}, ValueError, "max_nonfinite"),
        (batches(1), {"epochs": 1, "patience": 2}, ValueError, "validation: patience"),
        (batches(1), {"epochs": 1, "validation": []}, ValueError, "validation: expected at least one batch"),
        (batches(1), {"epochs": 1, "validation": iter([])}, TypeError, "validation: expected batches"),
        (batches(1), {"epochs": 1, "validation": batches(1), "monitor": "f1"}, ValueError, "monitor: expected one of"),
        (batches(1), {"epochs": 1, "mode": "low"}, ValueError, "mode"),
        (batches(1), {"epochs": 1, "min_delta": -1.0}, ValueError, "min_delta"),
        (batches(1), {"epochs": 1, "checkpoint_every": 2}, ValueError, "checkpoint: checkpoint_every"),
        (batches(1), {"epochs": 1, "resume": True}, ValueError, "checkpoint: .*resume"),
    ],
)
def test_errors(data, options, error, match):
    with pytest.raises(error, match=match):
        fit(STEP, params(), data, **options)


def test_error_on_a_step_of_another_kind():
    with pytest.raises(TypeError, match=r"step: expected make_step"):
        fit(loss_fn, params(), batches(1), epochs=1)
