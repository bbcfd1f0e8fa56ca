"""One step at a time: the same numbers as over a whole sequence, one compilation, a state that is given away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.schedules.native import build
from tests.cases import DrawingDecoder
from tests.conftest import count_compilations

MODELS = (
    jrnn.lstm(4),
    jrnn.gru(4, "before"),
    jrnn.learned_state(jrnn.lstm(4)),
    jrnn.variational(jrnn.zoneout(jrnn.elman(4), h=0.1), inputs=0.1),
    jrnn.stack(
        jrnn.tdnn(3, window=2), jrnn.peephole_lstm(4), jrnn.dropout(0.5), jrnn.residual(jrnn.gru(4)), jrnn.dense(2)
    ),
)


# The first is large enough for the compiled loop.
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("model", [jrnn.lstm(192), *MODELS], ids=repr)
@pytest.mark.sampled(3)
def test_steps_are_what_unroll_gives(model, batch):
    params = model.init(jax.random.key(0), 3)
    xs = jax.random.normal(jax.random.key(1), (5, *batch, 3))
    last, ys = jrnn.unroll(model, params, xs)
    step, state = jrnn.stepper(model), model.initial_state(params, batch)
    for x, y in zip(xs, ys, strict=True):
        state, got = step(params, state, x)
        np.testing.assert_allclose(got, y, atol=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    jax.block_until_ready(jax.tree.map(jnp.copy, params))  # the parameters are still there


def test_a_list_of_features_and_a_state_of_its_own_are_welcome():
    cell = jrnn.lstm(192)
    params = cell.init(jax.random.key(0), 3)
    _, y = jrnn.stepper(cell)(params, cell.initial_state(params, ()), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(
        y, cell.step(params, cell.initial_state(params, ()), jnp.array([0.1, 0.2, 0.3]))[1], atol=1e-6
    )

    @dataclasses.dataclass(frozen=True)
    class Counter(jrnn.Cell):
        def step(self, params, state, x, key=None):
            return state + 1, x

    assert jrnn.stepper(Counter())({}, jnp.zeros(()), jnp.ones(2))[0] == 1


@pytest.mark.smoke
def test_the_state_is_donated():
    cell = jrnn.lstm(4)
    params = cell.init(jax.random.key(0), 3)
    before = cell.initial_state(params, (2,))
    jrnn.stepper(cell)(params, before, jnp.ones((2, 3)))
    assert before.h.is_deleted()
    assert before.c.is_deleted()


def test_a_state_that_was_donated_is_refused_by_name():
    cell = jrnn.gru(5)
    params = cell.init(jax.random.key(0), 3)
    step, before = jrnn.stepper(cell), cell.initial_state(params, (2,))
    step(params, before, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"state: expected one that no earlier call was given.*copy what you keep"):
        step(params, before, jnp.ones((2, 3)))


def test_equal_layers_share_what_is_compiled():
    params = jrnn.gru(5).init(jax.random.key(0), 3)
    x = jnp.ones((2, 3))
    state, _ = jrnn.stepper(jrnn.gru(5))(params, jrnn.gru(5).initial_state(params, (2,)), x)
    with count_compilations() as counter:
        for _ in range(3):
            state, _ = jrnn.stepper(jrnn.gru(5))(params, state, x)
    assert counter["compilations"] == 0


@pytest.mark.smoke
def test_keys_are_per_step():
    model = jrnn.stack(jrnn.dropout(0.5), jrnn.gru(4))
    params = model.init(jax.random.key(0), 8)
    step, x = jrnn.stepper(model), jnp.ones(8)
    outs = [step(params, model.initial_state(params, ()), x, jax.random.key(i))[1] for i in (1, 1, 2)]
    assert (outs[0] == outs[1]).all()
    assert (outs[0] != outs[2]).any()


@pytest.mark.parametrize("compiled", [False, True], ids=["step", "stepper"])
@pytest.mark.parametrize(
    "model",
    [
        jrnn.variational(jrnn.zoneout(jrnn.elman(4), h=0.3), inputs=0.3),
        DrawingDecoder(jrnn.stack(jrnn.variational(jrnn.gru(3), recurrent=0.4), jrnn.dropout(0.5))),
        jrnn.stack(jrnn.embed(5, 3), jrnn.dropconnect(jrnn.gru(4), 0.4), jrnn.residual(jrnn.dropout(0.5))),
    ],
    ids=repr,
)
def test_steps_under_a_key_are_what_unroll_draws(model, compiled):
    params, key = model.init(jax.random.key(0), 3), jax.random.key(3)
    xs = jax.random.normal(jax.random.key(1), (6, 2, 3))
    if model.event_ndim == 0:
        xs = jax.random.randint(jax.random.key(1), (6, 2), 0, 5)
    last, ys = jrnn.unroll(model, params, xs, key=key)
    step = jrnn.stepper(model) if compiled else model.step
    drawn, state = jrnn.draw(model, params, key, xs[0]), model.initial_state(params, (2,))
    for t, x in enumerate(xs):
        state, y = step(drawn, state, x, jax.random.fold_in(key, t))
        np.testing.assert_allclose(y, ys[t], atol=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert jrnn.draw(model, params, None, xs[0]) is params


@pytest.mark.skipif(not build.available()[0], reason=build.available()[1] or "")
def test_a_large_step_is_compiled_whole():
    def lowered(cell):
        params = cell.init(jax.random.key(0), 3)
        return jrnn.stepper(cell).lower(params, cell.initial_state(params, ()), jnp.ones(3)).as_text()

    call = "custom_call @jrnn_"
    assert call in lowered(jrnn.lstm(192))
    assert call not in lowered(jrnn.lstm(32))
    assert call not in lowered(jrnn.layer_norm_lstm(192))


@pytest.mark.parametrize("hidden", [4, 256])
def test_what_has_no_step_says_why(hidden):
    model = jrnn.bidirectional(jrnn.gru(hidden))
    params = model.init(jax.random.key(0), 3)
    with pytest.raises(TypeError, match="whole sequences"):
        jrnn.stepper(model)(params, model.initial_state(params, ()), jnp.ones(3))
    with pytest.raises(TypeError, match="expected a layer"):
        jrnn.stepper("lstm")
