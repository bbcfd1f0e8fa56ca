"""Helpers of reinforcement learning: one step is unroll's, replayed windows are the rollout's, mistakes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import rl
from jrnn.compose.combine import stepless
from tests.cases import CASES, Case, rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, B = 7, 3
# Where a step and unroll could differ is tested for every row by the laws.
STEPPING = [pytest.param(case, id=case.name) for case in CASES if case.full and not stepless(case.layer)]
ALL = rows(pytest.mark.nightly)


def rollout(case: Case, time=T, batch=(B,)):
    """Parameters, inputs, done flags and resets."""
    keys = jax.random.split(jax.random.key(3), 4)
    params = case.layer.init(keys[0], case.in_features)
    shape = (time, *batch)
    if case.layer.event_ndim == 0:
        xs = jax.random.randint(keys[1], shape, 0, 5)
    else:
        event = case.in_features if isinstance(case.in_features, tuple) else (case.in_features,)
        xs = jax.random.normal(keys[1], (*shape, *event))
    done = jax.random.bernoulli(keys[2], 0.3, shape)
    return params, xs, done, jrnn.sequence.resets_from_done(done)[0]


def near(got, expected, atol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), got, expected)


@pytest.mark.parametrize("case", STEPPING)
@pytest.mark.sampled(3)
def test_steps_with_resets_are_unroll(case):
    params, xs, _, resets = rollout(case)
    model = case.layer
    state, ys, every = model.initial_state(params, (B,)), [], []
    step = jax.jit(lambda state, x, r: rl.step(model, params, state, x, r))
    for x, r in zip(xs, resets, strict=True):
        state, y = step(state, x, r)
        ys.append(y)
        every.append(state)
    last, expected = jrnn.unroll(model, params, xs, resets=resets)
    near(state, last)
    near(jnp.stack(ys), expected)
    rl.check_rollout(model, params, xs, jnp.stack(ys), resets=resets)
    # And the states of all steps are those that the loop went through.
    last, (ys, states) = jrnn.unroll(jrnn.emit_state(model), params, xs, resets=resets)
    near(last, state)
    near(ys, expected)
    near(states, jax.tree.map(lambda *a: jnp.stack(a), *every))


@pytest.mark.parametrize("case", ALL)
@pytest.mark.sampled(3)
def test_a_layer_that_emits_its_state_runs_as_it_does_without(case):
    params, xs, _, resets = rollout(case)
    model, key = case.layer, None if case.layer.uses_key is False else jax.random.key(5)
    options = {"resets": resets, "lengths": jnp.array([T, 0, 4], jnp.int32), "key": key}

    def run(layer, params):
        return jrnn.unroll(layer, params, xs, **options)

    last, expected = run(model, params)
    state, (ys, states) = run(jrnn.emit_state(model), params)
    near(state, last)
    near(ys, expected)
    for leaf, final in zip(jax.tree.leaves(states), jax.tree.leaves(last), strict=True):
        assert leaf.shape == (T, *final.shape)
        assert leaf.dtype == final.dtype
        assert not np.asarray(leaf)[:, 1].any()  # no step of it is valid
    ends = [states["forward"], states["backward"]] if isinstance(states, dict) and "forward" in states else [states]
    if not stepless(model):
        near(jax.tree.map(lambda a: a[-1, 0], ends[0]), jax.tree.map(lambda a: a[0], last))
        near(jax.tree.map(lambda a: a[3, 2], ends[0]), jax.tree.map(lambda a: a[2], last))


def test_gradients_pass_through_emitted_states():
    cell, xs = jrnn.lstm(3), jax.random.normal(jax.random.key(1), (5, 2, 3))
    params = cell.init(jax.random.key(0), 3)

    class Both(type(cell)):
        emits = ("h", "c")

    def loss(params, layer):
        _, ys = jrnn.unroll(layer, params, xs)
        return jnp.sin(jnp.concatenate([ys.state.h, ys.state.c], -1) if isinstance(ys, jrnn.Emitted) else ys).sum()

    near(jax.grad(loss)(params, jrnn.emit_state(cell)), jax.grad(loss)(params, Both(3)))


def test_emitted_states_are_read_and_run_fast():
    cell = jrnn.lstm(64)
    params = cell.init(jax.random.key(0), 64)
    xs = jnp.ones((20, 16, 64))
    plain, _ = jrnn.choose_backend(cell, params, xs)
    name, reason = jrnn.choose_backend(jrnn.emit_state(cell), params, xs)
    assert name == plain, reason
    both = jrnn.stack(cell, cell, jrnn.dense(3))
    params = both.init(jax.random.key(0), 64)
    assert jrnn.choose_backend(jrnn.emit_state(both), params, xs)[0] == plain


def test_narrow_inputs_leave_states_wide():
    model = jrnn.stack(jrnn.gru(3), jrnn.dense(2))
    params, xs = model.init(jax.random.key(0), 3), jnp.ones((5, 2, 3), jnp.bfloat16)
    for backend in (None, "reference", "hoisted"):
        _, (ys, states) = jrnn.unroll(jrnn.emit_state(model), params, xs, backend=backend)
        assert ys.dtype == jnp.bfloat16
        assert states[0].h.dtype == jnp.float32


WINDOWED = [
    case for case in CASES if case.name in ("lstm", "stack", "counting", "stack_embed", "tdnn", "learned_state")
]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in WINDOWED])
@pytest.mark.sampled(3)
def test_replayed_windows_are_the_rollout(case, every):
    model, time = case.layer, 14
    params, xs, _, resets = rollout(case, time)
    first = model.initial_state(params, (B,))
    _, (ys, states) = jrnn.unroll(jrnn.emit_state(model), params, xs, resets=resets)
    stored = jax.tree.map(lambda a: a[::every], rl.states_before(first, states))
    data = {"xs": xs, "ys": ys, "resets": resets}
    windows = jax.jit(lambda key: rl.sample(key, data, stored, 5, 40, every=every))(jax.random.key(0))
    state, got = rl.replay(model, params, windows.data["xs"], windows.state, burn_in=2, resets=windows.data["resets"])
    near(got, windows.data["ys"][2:])
    assert set(np.asarray(windows.times).tolist()) == set(range(0, time - 5 + 1, every))
    assert set(np.asarray(windows.sequences).tolist()) == set(range(B))
    ends = jax.tree.map(lambda a: a[windows.times + 4, windows.sequences], states)
    near(state, ends)
    rl.check_rollout(
        model, params, windows.data["xs"], windows.data["ys"], windows.state, resets=windows.data["resets"]
    )


def test_windows_lie_within_their_sequences_and_are_equally_probable():
    data, states = {"t": jnp.broadcast_to(jnp.arange(10.0)[:, None], (10, 4))}, {}
    lengths = jnp.array([10, 2, 4, 0], jnp.int32)
    windows = rl.sample(jax.random.key(0), data, states, 3, 4000, lengths=lengths)
    pairs, counts = np.unique(np.stack([windows.sequences, windows.times], -1), axis=0, return_counts=True)
    assert pairs.tolist() == [[0, t] for t in range(8)] + [[2, 0], [2, 1]]
    assert (abs(counts - 400) < 5 * 19).all()  # five standard deviations of a binomial of 4000 and 1/10
    assert (np.asarray(windows.data["t"]) == np.asarray(windows.times) + np.arange(3.0)[:, None]).all()


def test_a_burn_in_has_no_gradients_and_what_follows_has_those_of_its_own_steps():
    model = jrnn.stack(jrnn.learned_state(jrnn.lstm(3)), jrnn.dense(2))
    params = model.init(jax.random.key(0), 3)
    xs = jax.random.normal(jax.random.key(1), (8, 2, 3))
    resets = jnp.zeros((8, 2), bool).at[2, 0].set(True).at[6, 1].set(True)
    state = jax.tree.map(lambda a: a + 0.5, model.initial_state(params, (2,)))

    def burnt(params, xs, state):
        return jnp.sin(rl.replay(model, params, xs, state, burn_in=4, resets=resets)[1]).sum()

    def rest(params, xs, state):
        held, _ = jrnn.unroll(model, frozen, others[:4], begin, resets=resets[:4])
        return jnp.sin(jrnn.unroll(model, params, xs[4:], held, resets=resets[4:])[1]).sum()

    frozen, others, begin = params, xs, state
    got = jax.grad(burnt, argnums=(0, 1, 2))(params, xs, state)
    near(got, jax.grad(rest, argnums=(0, 1, 2))(params, xs, state))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((got[1][:4], got[2])))
    zeros = jax.grad(lambda *args: rl.burn_in(model, *args)[0].h.sum(), argnums=(0, 1, 2))(params, xs, state)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zeros))
    near(rl.replay(model, params, xs, state, burn_in=0)[1], jrnn.unroll(model, params, xs, state)[1])
    assert rl.replay(model, params, xs, state, burn_in=8)[1].shape == (0, 2, 2)


def test_a_burn_in_draws_what_the_whole_run_draws():
    model = jrnn.stack(jrnn.variational(jrnn.gru(3), inputs=0.3, recurrent=0.3), jrnn.dropout(0.5))
    params, xs, key = model.init(jax.random.key(0), 3), jnp.ones((8, 2, 3)), jax.random.key(2)
    mask = jnp.ones((8, 2), bool).at[3, 0].set(False).at[6, 1].set(False)
    _, ys = jrnn.unroll(model, params, xs, key=key, mask=mask, start=5)
    near(rl.replay(model, params, xs, burn_in=4, key=key, mask=mask, start=5)[1], ys[4:])


def test_resets_that_are_not_aligned_with_done_are_named():
    done = np.zeros((8, 2), bool)
    done[[2, 5], 0] = done[[0, 4], 1] = True
    resets, _ = jrnn.sequence.resets_from_done(done)
    rl.check_resets(resets, done)
    rl.check_resets(resets.at[0].set(True), done)  # not known without previous
    rl.check_resets(resets, done, np.zeros(2, bool))
    follow = jrnn.sequence.resets_from_done(done, np.array([True, False]))[0]
    rl.check_resets(follow, done, np.array([True, False]))
    late = np.concatenate([np.zeros((2, 2), bool), done[:-2]])
    for wrong, message in [
        (done, r"at step \d of sequence \(\d,\); these are done itself"),
        (late, "one step late"),
        (np.asarray(resets) & (np.arange(8) != 3)[:, None], r"expected True .* got False at step 3 of sequence \(0,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            rl.check_resets(wrong, done)
    with pytest.raises(ValueError, match="at step 0"):
        rl.check_resets(resets, done, np.array([True, False]))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(rl.check_resets)(resets, done)
    with pytest.raises(TypeError, match="done: expected booleans"):
        rl.check_resets(resets, done.astype(np.float32))
    with pytest.raises(ValueError, match="the shape of done"):
        rl.check_resets(resets[:4], done)


def test_a_rollout_that_training_does_not_reproduce_is_named():
    cell = jrnn.gru(3)
    params, xs, _, _ = rollout(Case("gru", cell), 8)
    state = jax.tree.map(lambda a: a + 0.5, cell.initial_state(params, (B,)))
    resets = jnp.zeros((8, B), bool).at[5, 1].set(True)
    _, ys = jrnn.unroll(cell, params, xs, state, resets=resets)
    rl.check_rollout(cell, params, xs, ys, state, resets=resets)
    late = jnp.roll(resets, 1, axis=0)
    with pytest.raises(ValueError, match=r"at step 5, sequence \(1,\).*resets are true at step 6: are they aligned"):
        rl.check_rollout(cell, params, xs, ys, state, resets=late)
    with pytest.raises(ValueError, match=r"at step 0.*is the state the one from before"):
        rl.check_rollout(cell, params, xs, ys, resets=resets)
    with pytest.raises(ValueError, match="ys: expected shape"):
        rl.check_rollout(cell, params, xs, ys[..., :2], state, resets=resets)
    with pytest.raises(ValueError, match="got nan"):
        rl.check_rollout(cell, params, xs, ys.at[3].set(jnp.nan), state, resets=resets)


CELL = jrnn.gru(2)
PARAMS = CELL.init(jax.random.key(0), 3)
STATE = CELL.initial_state(PARAMS, (2,))
X, DATA = jnp.ones((2, 3)), {"x": jnp.ones((6, 2, 3))}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: rl.step(PARAMS, CELL, STATE, X), TypeError, "model: expected a layer"),
        (lambda: rl.step(jrnn.bidirectional(CELL), {}, {}, X), TypeError, "model: expected a layer that has a step"),
        (lambda: rl.step(CELL, PARAMS, STATE, X, jnp.ones(3, bool)), ValueError, r"resets: expected shape \(2,\)"),
        (lambda: rl.step(CELL, PARAMS, STATE, X, jnp.ones(2)), TypeError, "resets: expected booleans"),
        (lambda: rl.step(CELL, PARAMS, STATE.h, X, jnp.ones(2, bool)), ValueError, "state: expected HiddenState"),
        (lambda: rl.step(CELL, PARAMS, jax.tree.map(lambda a: a[0], STATE), X), ValueError, "state: expected"),
        (lambda: rl.states_before(STATE, X), ValueError, "states: expected a tree like first"),
        (lambda: rl.sample(jax.random.key(0), DATA, {}, 7, 1), ValueError, "length: expected at most T = 6"),
        (lambda: rl.sample(jax.random.key(0), DATA, {}, 0, 1), ValueError, "length: expected a positive int"),
        (lambda: rl.sample(jax.random.key(0), DATA, X, 2, 1), ValueError, r"states: expected arrays \(6, 2, ...\)"),
        (lambda: rl.sample(jax.random.key(0), {"x": X[0]}, {}, 2, 1), ValueError, "data: expected a tree of arrays"),
        (
            lambda: rl.sample(jax.random.key(0), DATA, {}, 3, 1, lengths=np.array([2, 0])),
            ValueError,
            "lengths: expected one of at least 3",
        ),
        (
            lambda: rl.windows_at(DATA, {}, np.array([4]), np.array([0]), 3),
            ValueError,
            "times: expected values from 0 to",
        ),
        (
            lambda: rl.windows_at(DATA, {}, np.array([1]), np.array([0]), 3, every=2),
            ValueError,
            "times: expected multiples of every = 2",
        ),
        (
            lambda: rl.windows_at(DATA, {}, np.array([1]), np.array([2]), 3),
            ValueError,
            "sequences: expected values from",
        ),
        (lambda: rl.replay(CELL, PARAMS, DATA["x"], burn_in=7), ValueError, "burn_in: expected at most T"),
        (lambda: rl.replay(CELL, PARAMS, DATA["x"], burn_in=2.0), TypeError, "burn_in: expected a non-negative int"),
        (lambda: jrnn.emit_state(jnp.tanh), TypeError, "layer: expected a layer"),
    ],
)
def test_mistakes_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
