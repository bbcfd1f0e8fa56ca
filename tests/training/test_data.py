"""Data sets as batches, evaluation and prediction over them, loggers, callbacks and ^C."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrnn import training
from jrnn.training import fitting
from tests.training import checkpoint_child

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEP = training.make_step(lambda w, batch, key: jnp.mean((batch - w) ** 2), training.optimizer("sgd", 0.1))
DATA = [np.full(2, float(i), np.float32) for i in range(4)]


def test_batches_are_the_data_in_another_order():
    rng = np.random.default_rng(0)
    xs, lengths, labels = rng.normal(size=(5, 11, 2)), np.arange(11), np.arange(11) * 10
    data = training.batches({"xs": xs, "rest": (lengths, labels)}, 4, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        seen = list(data(epoch))
        assert [len(batch["rest"][0]) for batch in seen] == [4, 4, 3]
        order = np.concatenate([batch["rest"][0] for batch in seen])
        np.testing.assert_array_equal(np.concatenate([batch["rest"][1] for batch in seen]), order * 10)
        np.testing.assert_array_equal(np.concatenate([batch["xs"] for batch in seen], 1), xs[:, order])
        assert sorted(order) == list(range(11))
        orders.append(order.tolist())
    assert orders[0] == orders[2] != orders[1]
    whole = list(training.batches((xs, labels), 4, drop_last=True)(0))
    np.testing.assert_array_equal(np.concatenate([b for _, b in whole]), labels[:8])
    (only,) = training.batches({"a": np.zeros((3, 2)), "b": np.zeros((2, 3))}, 3, axis={"a": 0, "b": 1})(0)
    assert (only["a"].shape, only["b"].shape) == ((3, 2), (2, 3))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: training.batches((np.zeros((5, 4, 1)), np.zeros(3)), 2), "equally many sequences"),
        (lambda: training.batches((), 2), "at least one array"),
        (lambda: training.batches(np.zeros((2, 3, 1)), 4, drop_last=True), "at least 4 sequences, got 3"),
        (lambda: training.batches(np.zeros((2, 3, 1)), 0), "size"),
        (lambda: training.evaluate(STEP, jnp.array(0.0), []), "at least one batch"),
        (lambda: training.evaluate(STEP, jnp.array(0.0), DATA, weight=lambda b: 0.0), "positive sum"),
        (lambda: training.predict(lambda p, b: b, 0.0, []), "at least one batch"),
        (lambda: training.predict(lambda p, b: b, 0.0, [np.zeros((2, 3)), np.zeros((2, 4))]), "differ in axis 0"),
    ],
)
def test_bad_data_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_evaluation_and_prediction_are_those_of_the_batches():
    data = [np.array([1.0, 3.0], np.float32), np.array([5.0], np.float32)]
    w = jnp.array(2.0)
    assert training.evaluate(STEP, w, data)["loss"] == pytest.approx((1.0 + 9.0) / 2)
    assert training.evaluate(STEP, w, data, weight=len)["loss"] == pytest.approx((2 * 1.0 + 9.0) / 3)
    got = training.predict(lambda w, batch: {"y": w * batch}, w, training.prefetch(data))
    np.testing.assert_array_equal(got["y"], [2.0, 6.0, 10.0])
    assert isinstance(got["y"], np.ndarray)


def test_prefetching_takes_ahead_and_no_further():
    taken = []

    def source():
        for i in range(5):
            taken.append(i)
            yield np.array(i)

    stream = training.prefetch(source(), 2)
    assert int(next(stream)) == 0
    assert taken == [0, 1, 2]
    assert [int(b) for b in stream] == [1, 2, 3, 4]
    assert isinstance(next(training.prefetch(DATA)), jax.Array)


def test_prefetching_puts_batches_where_it_is_told():
    mesh = jax.make_mesh((1,), ("data",))
    by_batch = [jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "data"), ("data",))]
    batches = [(np.full((3, 2, 1), i), np.full(2, i)) for i in range(3)]
    stream = training.prefetch(batches, device=tuple(by_batch))
    for expected, got in zip(batches, stream, strict=True):
        assert [leaf.sharding for leaf in got] == by_batch
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_logger_gets_what_the_history_holds(tmp_path):
    path = tmp_path / "run.csv"
    options = {"validation": DATA[:1], "log_every": 3, "progress": False}
    logger = training.CSVLogger(path)
    result = training.fit(STEP, jnp.array(0.0), DATA, epochs=2, logger=logger, checkpoint=tmp_path / "c", **options)
    more = training.fit(
        STEP, jnp.array(0.0), DATA, epochs=3, logger=training.CSVLogger(path), checkpoint=tmp_path / "c", **options
    )
    assert result.history["train"]["step"] == more.history["train"]["step"][: len(result.history["train"]["step"])]
    lines = [line.split(",") for line in path.read_text().splitlines()]
    assert lines[0] == ["step", "name", "value"]
    for kind in ("train", "validation"):
        for name in ("loss", "epoch"):
            got = [(int(s), float(v)) for s, n, v in lines[1:] if n == f"{kind}/{name}"]
            columns = more.history[kind]
            assert got == list(zip(columns["step"], map(float, columns[name]), strict=True))


def test_callbacks_see_each_record_and_may_end_the_run(tmp_path):
    reports = []
    silent = lambda report: reports.append((report.step, report.epoch, float(report.params)))
    enough = lambda report: report.history["train"]["step"][-1] >= 6
    result = training.fit(
        STEP, jnp.array(0.0), DATA, epochs=5, log_every=2, progress=False, callbacks=[enough, silent],
        checkpoint=tmp_path,
    )  # fmt: skip
    assert result.stopped == "callback"
    assert [step for step, _, _ in reports] == [2, 4, 6]
    assert [epoch for _, epoch, _ in reports] == [0, 0, 1]
    assert reports[-1][2] == float(result.params)
    assert float(training.load_params(tmp_path, jnp.array(0.0), "last")) == float(result.params)


@pytest.fixture
def interruptible():
    """Python's own handler of ^C, which the processes of pytest-xdist do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_interrupt_ends_the_run_whole_and_it_can_be_resumed(tmp_path):
    def interrupt(report):
        if report.step == 4:
            signal.raise_signal(signal.SIGINT)

    options = {"epochs": 4, "log_every": 2, "progress": False}
    whole = training.fit(STEP, jnp.array(0.0), DATA, **options)
    cut = training.fit(STEP, jnp.array(0.0), DATA, callbacks=[interrupt], checkpoint=tmp_path, **options)
    assert cut.stopped == "interrupt"
    assert int(cut.state.step) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = training.fit(STEP, jnp.array(0.0), DATA, checkpoint=tmp_path, **options)
    assert float(resumed.params) == float(whole.params)
    assert resumed.history == whole.history

    def twice(report):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.fit(STEP, jnp.array(0.0), DATA, callbacks=[twice], **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("patience", [None, 2])
def test_interrupts_between_records_change_nothing_in_the_run_that_goes_on(tmp_path, monkeypatch, patience):
    """Five ^C in one run, at and between records, validations and regular checkpoints."""
    options = {"checkpoint_every": 4, "patience": patience, "min_delta": 2.0}
    whole = checkpoint_child.run(tmp_path / "whole", **options)
    assert whole.stopped == ("steps" if patience is None else "patience")
    batches, cuts = checkpoint_child.data, []

    def data(epoch):
        for i, batch in enumerate(batches(epoch)):
            step = epoch * checkpoint_child.EPOCH + i  # the batch that is fetched while this step is the last
            if step in (1, 4, 5, 8, 11) and step not in cuts:
                cuts.append(step)
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(checkpoint_child, "data", data)
    for at in (1, 4, 5, 8, 11):
        cut = checkpoint_child.run(tmp_path / "cut", **options)
        assert (cut.stopped, int(cut.state.step)) == ("interrupt", at)
        assert cut.history["train"]["step"][-1] == at
    resumed = checkpoint_child.run(tmp_path / "cut", **options)
    assert checkpoint_child.digest(resumed) == checkpoint_child.digest(whole)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_numbers_are_shown_still_saves_its_last_step(tmp_path, monkeypatch):
    def show(self, last):
        if self.run.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fitting._Lines, "show", show)
    result = training.fit(STEP, jnp.array(0.0), DATA, epochs=4, log_every=2, checkpoint=tmp_path)
    assert (result.stopped, int(result.state.step)) == ("interrupt", 3)
    assert result.history["train"]["step"] == [2, 3]
    with training.Checkpointer(tmp_path) as store:
        assert store.latest_step() == 3


@pytest.mark.parametrize("answer", [True, np.bool_(True), jnp.array(True)])
def test_any_kind_of_true_from_a_callback_ends_the_run(answer):
    result = training.fit(STEP, jnp.array(0.0), DATA, epochs=2, log_every=1, callbacks=[lambda report: answer])
    assert (result.stopped, int(result.state.step)) == ("callback", 1)


def test_a_callback_that_answers_a_number_is_named():
    with pytest.raises(TypeError, match=r"callbacks: expected True, .* got 0.5"):
        training.fit(STEP, jnp.array(0.0), DATA, epochs=1, callbacks=[lambda report: 0.5])


def test_validation_may_be_a_function_of_the_epoch_and_weigh_its_batches():
    data = np.arange(6.0, dtype=np.float32)
    step = training.make_step(lambda params, batch, key: jnp.mean(batch - params), optax.sgd(0.0))
    validation = training.batches(data, 4, axis=0)
    options = dict(epochs=1, progress=False, validation=validation)
    plain = training.fit(step, 0.0, validation, **options)
    weighted = training.fit(step, 0.0, validation, validation_weight=len, **options)
    assert plain.history["validation"]["loss"] == [(1.5 + 4.5) / 2]
    assert weighted.history["validation"]["loss"] == [2.5]
    assert training.evaluate(step, 0.0, validation, weight=len)["loss"] == 2.5
    np.testing.assert_array_equal(training.predict(lambda params, batch: batch + params, 1.0, validation), data + 1)


def test_where_there_is_no_bar_a_run_of_many_epochs_prints_few_lines(capsys):
    training.fit(STEP, jnp.array(0.0), DATA, epochs=100, log_every=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch {n}/100" for n in range(5, 101, 5)]


@pytest.mark.parametrize(("options", "match"), [({"callbacks": [3]}, "callbacks:"), ({"logger": "x"}, "logger:")])
def test_what_is_no_callback_or_logger_is_named(options, match):
    with pytest.raises(TypeError, match=match):
        training.fit(STEP, jnp.array(0.0), DATA, epochs=1, **options)
