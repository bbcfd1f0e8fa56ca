"""Checkpoints: what comes back is what went in, and a run that was killed is the run that was not."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrnn.training import Checkpointer, TrainState, fit, load_params, make_step, optimizer

pytest.importorskip("orbax.checkpoint")

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import checkpoint_child as child  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEP = make_step(lambda p, b, k: jnp.mean((b @ p["w"] - 1.0) ** 2), optimizer("adam", 0.1))
PARAMS = {"w": jnp.ones((3, 2))}
DATA = [np.full((4, 3), i, np.float32) for i in range(4)]


def bits(tree):
    def leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return (str(x.dtype), np.asarray(jax.random.key_data(x)).tobytes())
        return (str(x.dtype), x.shape, np.asarray(x).tobytes())

    return jax.tree.map(leaf, tree)


def everything():
    """One leaf of every kind that training states hold."""
    params = {"w": jnp.arange(6.0).reshape(2, 3), "none": None, "empty": {}, "pair": (jnp.ones(2, jnp.bfloat16), ())}
    return {
        "params": params,
        "adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)).init(params),
        "typed": jax.random.key(3),
        "typed_rbg": jax.random.key(3, impl="rbg"),
        "legacy": jax.random.PRNGKey(4),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "scalar": jnp.int32(7),
        "no_elements": jnp.zeros((0, 3), jnp.bfloat16),
        "half": jnp.float16(1.5),
        "flag": jnp.array([True, False]),
    }


@pytest.mark.smoke
def test_what_comes_back_is_what_went_in(tmp_path):
    tree = everything()
    with Checkpointer(tmp_path / "a" / "b") as store:
        store.save(5, tree, info={"position": [1, 2], "value": float("inf")})
        for like in (tree, jax.eval_shape(lambda: tree)):
            back = store.restore(like)
            assert jax.tree.structure(back.tree) == jax.tree.structure(tree)
            assert bits(back.tree) == bits(tree)
            assert (back.step, back.info) == (5, {"position": [1, 2], "value": float("inf")})
    jax.random.split(back.tree["typed"])
    jax.random.split(back.tree["legacy"])


def test_double_precision(tmp_path, x64):
    tree = {"w": jnp.array([1 / 3], jnp.float64), "i": np.int64(2**40)}
    with Checkpointer(tmp_path) as store:
        store.save(1, tree)
        back = store.restore(tree).tree
    assert float(back["w"][0]) == 1 / 3
    assert int(back["i"]) == 2**40


def test_keeps_the_best_and_the_last(tmp_path):
    with Checkpointer(tmp_path, keep=2) as store:
        values = [3.0, 1.0, None, 1.0, float("nan"), 2.0]
        kept = []
        for step, value in enumerate(values):
            store.save(step, {"x": jnp.float32(step)}, value=value)
            kept.append(store.steps())
        assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5]]
        assert store.best_step() == 1
        assert float(store.restore({"x": jnp.float32(0)}, store.best_step()).tree["x"]) == 1.0
    with Checkpointer(tmp_path, keep=2) as store:
        store.save(6, {"x": jnp.float32(6)}, value=0.5)
        assert (store.steps(), store.best_step(), store.latest_step()) == ([5, 6], 6, 6)


def test_no_value_no_best(tmp_path):
    with Checkpointer(tmp_path, keep=1) as store:
        assert (store.steps(), store.latest_step(), store.best_step()) == ([], None, None)
        for step in range(3):
            store.save(step, {"x": jnp.float32(step)})
        assert (store.steps(), store.best_step()) == ([2], None)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"w": jnp.ones((2, 4)), "b": jnp.ones(3)}, r"w: float32\[2,3\] in the checkpoint, float32\[2,4\]"),
        ({"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}, r"b: float32\[3\].*, bfloat16\[3\] in the model"),
        ({"w": jnp.ones((2, 3))}, r"b: float32\[3\] in the checkpoint, absent from the model"),
        ({"w": jnp.ones((2, 3)), "b": jnp.ones(3), "c": {"d": jnp.ones(())}}, r"c/d: absent from the checkpoint"),
        ({"w": jnp.ones((2, 3)), "b": jax.random.key(0)}, r"b: float32\[3\] in the checkpoint, key<fry>\[\]"),
        ({str(i): jnp.ones(1) for i in range(20)}, "and 14 more"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path, other, match):
    with Checkpointer(tmp_path) as store:
        store.save(3, {"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
        with pytest.raises(ValueError, match=r"checkpoint 3 in .* is of another model") as caught:
            store.restore(other)
        caught.match(match)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="keep: expected a positive int"):
        Checkpointer(tmp_path, keep=0)
    with Checkpointer(tmp_path) as store:
        with pytest.raises(FileNotFoundError, match="directory: expected a checkpoint"):
            store.restore({})
        store.save(3, {"x": jnp.ones(1)})
        with pytest.raises(FileNotFoundError, match=r"step: expected one of \[3\].*got 4"):
            store.restore({}, 4)
        with pytest.raises(ValueError, match="step: expected one after 3"):
            store.save(3, {"x": jnp.ones(1)})


def test_a_process_that_ends_at_once_ends_in_silence(tmp_path):
    """Nothing runs on in a thread that the end of the process would surprise."""
    script = f"import jrnn.training; jrnn.training.Checkpointer({str(tmp_path / 'new')!r})"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=HERE.parent.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout + run.stderr == ""


def test_only_a_writer_removes_what_was_cut_short(tmp_path):
    """To one who reads, a write that another process has not finished looks like one that was cut short."""
    with Checkpointer(tmp_path) as store:
        store.save(1, {"x": jnp.ones(1)})
        unfinished = tmp_path / "2.orbax-checkpoint-tmp-3"
        (unfinished / "tree").mkdir(parents=True)
    with Checkpointer(tmp_path) as store:
        store.restore({"x": jnp.ones(1)})
        assert unfinished.exists()
        store.save(2, {"x": jnp.ones(1)})
    assert not unfinished.exists()


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "jrnn\[checkpoint\]"'):
        Checkpointer(tmp_path)
    fit(STEP, PARAMS, DATA, epochs=1)


def interrupted(directory, at):
    """A run that stops in the middle of an epoch, as if by a crash right after a save."""

    class Crash(Exception):
        pass

    def data(epoch):
        for i, batch in enumerate(original(epoch)):
            if epoch * child.EPOCH + i == at + 1:  # one batch is fetched ahead
                raise Crash
            yield batch

    original, child.data = child.data, data
    try:
        with pytest.raises(Crash):
            child.run(directory, checkpoint_every=2)
    finally:
        child.data = original


def test_resuming_gives_the_run_that_was_never_interrupted(tmp_path):
    whole = child.run(tmp_path / "whole", checkpoint_every=2)
    assert whole.best is not None
    assert whole.history["skipped"] == [4, 11, 18, 25, 32, 39]
    for at in (5, 6, 13, 14, 21):
        interrupted(tmp_path / f"parts{at}", at)
        with Checkpointer(tmp_path / f"parts{at}") as store:
            assert 0 < store.latest_step() <= at + 1
        resumed = child.run(tmp_path / f"parts{at}", checkpoint_every=2)
        assert child.digest(resumed) == child.digest(whole), f"interrupted after step {at}"


def test_resuming_in_stages_and_after_the_end(tmp_path):
    whole = child.run(tmp_path / "whole", checkpoint_every=5)
    for steps in (10, 25, 40):
        staged = child.run(tmp_path / "staged", steps=steps, checkpoint_every=5)
    # A stage ends with a record of its own, so only the arrays are the same.
    assert bits(staged.state) == bits(whole.state)
    assert bits(staged.params) == bits(whole.params)
    again = child.run(tmp_path / "whole", checkpoint_every=5, resume=True)
    assert child.digest(again) == child.digest(whole)


def test_early_stopping_survives(tmp_path):
    step = make_step(lambda p, b, k: p if b is None else (p + 3.0) ** 2, optax.sgd(1.0))

    def run(directory, epochs):
        # The validations are 4, 1, 0, 1, 4, 9; only the second is better by more than 2.
        options = {"validation": [0], "patience": 4, "min_delta": 2.0}
        return fit(step, 0.0, [None], epochs=epochs, checkpoint=directory, **options)

    whole = run(tmp_path / "whole", 9)
    assert (whole.stopped, float(whole.params), whole.best["step"]) == ("patience", -3.0, 3)
    run(tmp_path / "parts", 4)
    for _ in range(2):
        resumed = run(tmp_path / "parts", 9)
        assert resumed.history == whole.history
        assert bits((resumed.params, resumed.state)) == bits((whole.params, whole.state))
        assert (resumed.best, resumed.stopped) == (whole.best, whole.stopped)
    with Checkpointer(tmp_path / "parts") as store:
        assert store.best_step() == 3


def test_the_best_is_the_highest_when_more_is_better(tmp_path):
    step = make_step(lambda p, b, k: p if b is None else 9.0 - (p + 3.0) ** 2, optax.sgd(1.0))
    options = {"validation": [0], "mode": "max"}
    result = fit(step, 0.0, [None], epochs=7, checkpoint=tmp_path, **options)
    with Checkpointer(tmp_path) as store:
        assert (result.best, store.best_step(), store.steps()) == ({"step": 3, "value": 9.0}, 3, [3, 5, 6, 7])


@pytest.mark.parametrize("key", [None, jax.random.PRNGKey(1), jax.random.key(1)], ids=["none", "legacy", "typed"])
def test_kinds_of_key(tmp_path, key):
    def run(directory, epochs):
        return fit(STEP, PARAMS, DATA, key=key, epochs=epochs, checkpoint=directory)

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4)
    assert bits(resumed.state) == bits(whole.state)
    assert (resumed.state.key is None) == (key is None)


def test_a_checkpointer_of_ones_own_stays_open(tmp_path):
    with Checkpointer(tmp_path, keep=1) as store:
        fit(STEP, PARAMS, DATA, epochs=2, checkpoint=store)
        assert store.steps() == [8]
        state = store.restore({"state": STEP.init(PARAMS), "carry": (), "best": ()}).tree["state"]
        assert isinstance(state, TrainState)
        assert int(state.step) == 8


def wandering(validation=(0,), steps=6, **options):
    """A run whose best parameters are those of step 3 and whose last ones are those of step 6."""
    step = make_step(lambda p, b, k: p["x"][0] if b is None else (p["x"][0] + 3.0) ** 2, optax.sgd(1.0))
    start = {"x": [jnp.float32(0.0)], "none": None, "empty": jnp.zeros((0, 2))}
    return fit(step, start, [None], steps=steps, validation=validation, **options)


@pytest.mark.parametrize("template", ["arrays", "shapes"])
def test_parameters_alone(tmp_path, template):
    result = wandering(checkpoint=tmp_path)
    like = result.params if template == "arrays" else jax.eval_shape(lambda: result.params)
    before = files(tmp_path)
    with Checkpointer(tmp_path) as store:
        for where in (tmp_path, str(tmp_path), store):
            assert bits(load_params(where, like)) == bits(result.params)
            assert bits(load_params(where, like, "last")) == bits(result.state.params)
        assert store.steps() == [3, 4, 5, 6]
    assert files(tmp_path) == before
    assert (float(result.params["x"][0]), float(result.state.params["x"][0])) == (-3.0, -6.0)


def test_parameters_alone_need_no_optimizer_and_no_validation(tmp_path):
    result = fit(STEP, PARAMS, DATA, epochs=1, checkpoint=tmp_path)
    assert bits(load_params(tmp_path, PARAMS, "last")) == bits(result.params)
    with pytest.raises(ValueError, match=r'which: the run in .* no best parameters.*which="last"'):
        load_params(tmp_path, PARAMS)
    scalar = fit(make_step(lambda p, b, k: p**2, optax.sgd(0.1)), 1.0, [0], steps=1, checkpoint=tmp_path / "scalar")
    assert bits(load_params(tmp_path / "scalar", 1.0, "last")) == bits(scalar.params)


@pytest.mark.parametrize(
    ("like", "match"),
    [
        ({"w": jnp.ones((3, 4))}, r"state/params/w: float32\[3,2\] in the checkpoint, float32\[3,4\] in the model"),
        ({"w": jnp.ones((3, 2), jnp.bfloat16)}, r"bfloat16\[3,2\] in the model"),
        ({}, "state/params/w: .* absent from the model"),
        ({"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, "state/params/b: absent from the checkpoint"),
    ],
)
def test_parameters_of_another_model(tmp_path, like, match):
    fit(STEP, PARAMS, DATA, steps=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=match):
        load_params(tmp_path, like, "last")


def test_parameters_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a directory that fit has saved to"):
        load_params(tmp_path / "misspelt", PARAMS)
    assert not (tmp_path / "misspelt").exists()
    with pytest.raises(FileNotFoundError, match="directory: expected a checkpoint"):
        load_params(tmp_path, PARAMS)
    with pytest.raises(ValueError, match="which: expected"):
        load_params(tmp_path, PARAMS, "latest")
    with Checkpointer(tmp_path) as store:
        store.save(1, PARAMS)
        with pytest.raises(ValueError, match=r"checkpoint: expected one that fit has saved in .*got \['w'\]"):
            load_params(store, PARAMS)


def test_resume_on_request(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: expected a checkpoint"):
        fit(STEP, PARAMS, DATA, epochs=1, checkpoint=tmp_path, resume=True)
    fit(STEP, PARAMS, DATA, epochs=1, checkpoint=tmp_path, resume=False)
    with pytest.raises(ValueError, match=r"resume: False starts a new run, but .* at step 4"):
        fit(STEP, PARAMS, DATA, epochs=1, checkpoint=tmp_path, resume=False)


def test_resuming_another_model_or_other_data(tmp_path):
    fit(STEP, PARAMS, DATA, steps=3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"state/params/w: float32\[3,2\] in the checkpoint, float32\[3,5\]"):
        fit(STEP, {"w": jnp.ones((3, 5))}, DATA, steps=5, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="state/opt_state"):
        fit(make_step(STEP.loss_fn, optimizer("sgd", 0.1)), PARAMS, DATA, steps=5, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="before batch 3 of epoch 0, but that epoch has only 2"):
        fit(STEP, PARAMS, DATA[:2], steps=5, checkpoint=tmp_path)
    with Checkpointer(tmp_path / "own") as store:
        store.save(1, {"x": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"x: .* absent from the model"):
        fit(STEP, PARAMS, DATA, steps=5, checkpoint=tmp_path / "own")


def files(directory):
    return sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())


def test_a_removal_cut_short_does_no_harm(tmp_path):
    """Killed while it removed an old checkpoint: whatever is left of that one, the others serve."""
    tree = {"x": jnp.arange(3.0)}
    with Checkpointer(tmp_path / "whole", keep=2) as store:
        for step in (1, 2, 3):
            store.save(step, tree, value=float(step))
    count = len(files(tmp_path / "whole" / "2"))
    for order in (1, -1):
        for left in range(0, count, 3):
            directory = tmp_path / f"cut{order}{left}"
            shutil.copytree(tmp_path / "whole", directory)
            for path in files(directory / "2")[::order][left:]:
                path.unlink()
            with Checkpointer(directory, keep=1) as store:
                assert store.restore(tree).step == 3
                store.best_step()
                store.save(4, tree, value=0.0)
                assert bits(store.restore(tree).tree) == bits(tree)
                assert store.steps() == [4]


def kill_in_the_middle_of_a_write(directory, after, delay):
    """Starts the run and kills it -9 while step `after` or a later one is being written."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "checkpoint_child.py"), str(directory)],
        cwd=HERE.parent.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        while process.poll() is None:
            names = os.listdir(directory) if directory.exists() else []
            if any("tmp" in name and int(name.split(".")[0]) >= after for name in names):
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_write(tmp_path):
    whole = child.digest(child.run(tmp_path / "whole"))
    directory, torn = tmp_path / "killed", 0
    for after, delay in ((3, 0.0), (14, 0.01), (27, 0.03)):
        kill_in_the_middle_of_a_write(directory, after, delay)
        torn += any("tmp" in name for name in os.listdir(directory))
    assert torn >= 1, "none of the kills fell into a write"
    assert child.digest(child.run(directory, resume=True)) == whole
    assert json.loads(whole)[3] == "steps"
    assert not any("tmp" in name for name in os.listdir(directory)), "torn writes are removed"
