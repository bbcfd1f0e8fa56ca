"""The recurrent PPO example: its maze needs memory, its rollouts are what training reproduces, it learns, it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def example():
    return load_example("recurrent_ppo")


def walk(example, maze, actions, corridor):
    """Features before each action, rewards, and what was done last."""
    seen, rewards = [], []
    for action in actions:
        seen.append(np.asarray(example.look(maze, corridor)).tolist())
        maze, reward, done, right = example.act(maze, action, corridor)
        rewards.append(round(float(reward), 3))
    return seen, rewards, bool(done), bool(right), maze


def test_the_sign_is_seen_at_the_foot_alone_and_decides_at_the_junction(example):
    for sign in (example.UP, example.DOWN):
        maze = example.Maze(jnp.int32(sign), jnp.int32(0), jnp.int32(0))
        actions = [example.FORWARD, example.UP, example.FORWARD, example.FORWARD, sign]
        seen, rewards, done, right, _ = walk(example, maze, actions, 2)
        foot = [float(sign == example.UP), float(sign == example.DOWN), 0.0, 0.0]
        assert seen == [foot, [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
        assert rewards == [0, -0.1, 0, -0.1, 1]
        assert (done, right) == (True, True)
        _, rewards, done, right, _ = walk(example, maze, [example.FORWARD] * 2 + [1 - sign], 2)
        assert (rewards[-1], done, right) == (-0.1, True, False)
    _, _, done, right, _ = walk(example, maze, [example.UP] * 8, 2)
    assert (done, right) == (True, False)  # four times the corridor is enough
    signs = jax.vmap(example.enter)(jax.random.split(jax.random.key(0), 1000)).sign
    assert 400 < signs.sum() < 600


def test_a_rollout_is_what_training_computes(example):
    model = jrnn.stack(jrnn.gru(4), jrnn.dense(example.ACTIONS + 1))
    params = model.init(jax.random.key(0), example.FEATURES)
    mazes = jax.vmap(example.enter)(jax.random.split(jax.random.key(1), example.ENVIRONMENTS))
    state = model.initial_state(params, (example.ENVIRONMENTS,))
    actor = example.Actor(mazes, state, jnp.ones(example.ENVIRONMENTS, bool))
    collect = jax.jit(lambda actor, key: example.collect(model, 2, params, actor, key))
    middle, first = collect(actor, jax.random.key(2))
    _, second = collect(middle, jax.random.key(3))
    assert first.done.any()
    jrnn.rl.check_resets(first.resets, first.done, np.ones(example.ENVIRONMENTS, bool))
    jrnn.rl.check_resets(second.resets, second.done, first.done[-1])
    for begin, rollout in ((state, first), (middle.state, second)):
        _, ys = jrnn.unroll(model, params, rollout.x, begin, resets=rollout.resets)
        log_probs, value = example.heads(ys)
        np.testing.assert_allclose(value, rollout.value, atol=1e-5)
        np.testing.assert_allclose(example.chosen(log_probs, rollout.action), rollout.log_prob, atol=1e-5)


def test_advantages_are_those_of_the_formula(example):
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 6, 2)).astype(np.float32)
    done = rng.random((6, 2)) < 0.3
    last = rng.normal(size=2).astype(np.float32)
    names = dict.fromkeys(example.Rollout._fields, jnp.zeros((6, 2)))
    rollout = example.Rollout(**names | {"reward": reward, "value": value, "done": done})
    after = np.concatenate([value[1:], last[None]])
    error = reward + example.DISCOUNT * after * ~done - value
    expected = np.zeros((6, 2))
    for t in range(6):
        weight = np.ones(2)
        for later in range(t, 6):
            expected[t] += weight * error[later]
            weight = weight * example.DISCOUNT * example.LAMBDA * ~done[later]
    np.testing.assert_allclose(example.advantages(rollout, last), expected, atol=1e-5)


def test_a_short_run_learns_what_needs_memory(example, monkeypatch):
    monkeypatch.setattr(example, "LEARNING_RATE", 5e-3)
    model = jrnn.stack(jrnn.gru(8), jrnn.dense(example.ACTIONS + 1))
    _, (success, _) = example.train(model, 1, 20, jax.random.key(0))
    assert success[:3].mean() < 0.6
    assert success[-3:].mean() > 0.9


def test_the_script_tests_prints_and_draws(example, monkeypatch, tmp_path, capsys):
    """With a policy that walks and turns up."""

    def train(model, corridor, updates, key):
        b = jnp.array([1.0, -1.0, 0.0, 0.0])
        w = jnp.zeros((example.FEATURES, example.ACTIONS + 1)).at[:3, example.FORWARD].set(5.0)
        return {"w": w, "b": b}, (np.linspace(0.5, 0.6, updates), np.zeros(updates))

    monkeypatch.setattr(example, "train", train)
    monkeypatch.setattr(example, "POLICIES", {"GRU": jrnn.dense(example.ACTIONS + 1), "no memory": jrnn.dense(4)})
    picture = tmp_path / "picture.png"
    example.main(["--quick", "--corridor", "3", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "12,288 steps for each of 1 seed(s)" in printed
    assert "no memory: right turns in the last 10 updates 55.0%" in printed
    assert "three updates are far too few" in printed
    found = [float(line.split(":")[1].split("%")[0]) for line in printed.splitlines() if "afterwards" in line]
    assert len(found) == 8
    assert all(35 < share < 65 for share in found)


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--updates", "0"], ["--corridor", "0"]])
def test_bad_options_are_refused(example, options, capsys):
    with pytest.raises(SystemExit):
        example.main(options)
    assert options[0] in capsys.readouterr().err
