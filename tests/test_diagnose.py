"""Diagnosis against direct computation: gradients and Jacobians of steps folded by hand, gates from their equations."""

import dataclasses
import functools
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn import diagnose
from jrnn.initializers import normal, orthogonal

pytestmark = pytest.mark.usefixtures("quick_compilation")

H, F, T, B = 3, 2, 6, 2

CELLS = {
    "elman": jrnn.elman(H),
    "elman_relu": jrnn.elman(H, "relu"),
    "jordan": jrnn.jordan(H, 2, "tanh", out_activation="sigmoid"),
    "indrnn": jrnn.indrnn(H, "tanh"),
    "lstm": jrnn.lstm(H),
    "peephole_lstm": jrnn.peephole_lstm(H),
    "coupled_lstm": jrnn.coupled_lstm(H),
    "layer_norm_lstm": jrnn.layer_norm_lstm(H),
    "projection_lstm": jrnn.projection_lstm(H, 2),
    "gru_after": jrnn.gru(H),
    "gru_before": jrnn.gru(H, "before"),
    "layer_norm_gru": jrnn.layer_norm_gru(H),
    "mgu": jrnn.mgu(H),
    "ugrnn": jrnn.ugrnn(H),
    "zoneout": jrnn.zoneout(jrnn.lstm(H), h=0.2, c=0.3),
    "learned_state": jrnn.learned_state(jrnn.projection_lstm(H, 2)),
    "variational": jrnn.variational(jrnn.gru(H), inputs=0.3, recurrent=0.3),
    "dropconnect": jrnn.dropconnect(jrnn.gru(H, "before"), 0.3),
}
# What state and step are like. The others differ in their equations, which gates are held against one by one.
KINDS = ("elman", "elman_relu", "jordan", "indrnn", "lstm", "projection_lstm", "gru_before", "zoneout", "learned_state")
KINDS += ("variational", "dropconnect")
GATED = {name: cell for name, cell in CELLS.items() if name not in ("elman_relu", "jordan")}


@dataclasses.dataclass(frozen=True)
class Leaky(jrnn.Cell):
    """A cell of a user's own, by its step alone: its state is a bare array, and also its output."""

    decay: float = 0.5

    def init(self, key, in_features):
        return {"w": jax.random.normal(key, (in_features, in_features))}

    def initial_state(self, params, batch_shape):
        return jnp.zeros((*batch_shape, params["w"].shape[0]), params["w"].dtype)

    def step(self, params, state, x, key=None):
        state = jnp.tanh(self.decay * state + x @ params["w"])
        return state, state


@dataclasses.dataclass(frozen=True)
class Separate(Leaky):
    """One whose output is computed from the state, not read from it, and which counts its steps in an integer."""

    def initial_state(self, params, batch_shape):
        return super().initial_state(params, batch_shape), jnp.zeros(batch_shape, jnp.int32)

    def step(self, params, state, x, key=None):
        memory, _ = super().step(params, state[0], x)
        return (memory, state[1] + 1), 2 * memory


def setup(model, in_features=F, time=T, batch=(B,), dtype=None, scale=1.0):
    dtype = dtype or (jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    params = jax.tree.map(lambda p: p.astype(dtype), model.init(jax.random.key(0), in_features))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))  # nothing is left at zero
    leaves = [p + 0.3 * jax.random.normal(k, p.shape, dtype) for p, k in zip(leaves, keys, strict=True)]
    xs = scale * jax.random.normal(jax.random.key(2), (time, *batch, in_features), dtype)
    return jax.tree.unflatten(structure, leaves), xs


def loss(state, ys):
    weights = jnp.cos(jnp.arange(ys.size, dtype=ys.dtype)).reshape(ys.shape)
    return jnp.sum(weights * ys * ys) + sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(state))


def folded(cell, params, xs, first, state):
    """The steps from ``first`` on, by hand: ``(final state, outputs, states)``."""
    ys, states = [], []
    for t in range(first, xs.shape[0]):
        state, y = cell.step(params, state, xs[t])
        ys.append(y)
        states.append(state)
    return state, ys, states


def gradients_by_hand(cell, params, xs, state):
    """dL/d(state after step t) for each t, one jax.grad each."""

    @jax.jit
    def every(params, xs, state):
        _, ys, states = folded(cell, params, xs, 0, state)
        out = []
        for t in range(xs.shape[0]):

            def after(s, t=t):
                final, later, _ = folded(cell, params, xs, t + 1, s)
                return loss(final, jnp.stack([*ys[:t], s if not hasattr(s, "h") else s.h, *later]))

            out.append(jax.grad(after)(states[t]))
        return out

    return every(params, xs, state)


def flat(state, batch=1):
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.concatenate([leaf.reshape(*leaf.shape[:batch], -1) for leaf in leaves], -1)


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.sampled(3)
def test_gradient_norms_equal_a_gradient_for_each_step(name):
    cell = CELLS[name]
    params, xs = setup(cell, time=3)
    result = diagnose.gradient_norms(cell, params, xs, loss)
    state = cell.initial_state(params, (B,))
    for t, expected in enumerate(gradients_by_hand(cell, params, xs, state)):
        for field in state._fields:
            by_hand = np.linalg.norm(getattr(expected, field), axis=-1)
            np.testing.assert_allclose(result.norms[field][t], by_hand, rtol=1e-10)

    value, first = jax.jit(jax.value_and_grad(lambda s: loss(*jrnn.unroll(cell, params, xs, s))))(state)
    for field in state._fields:
        np.testing.assert_allclose(
            result.initial[field], np.linalg.norm(getattr(first, field), axis=-1), rtol=1e-10, atol=1e-14
        )
    assert set(result.norms) == set(result.rms) == set(result.initial) == set(state._fields)
    np.testing.assert_allclose(result.loss, value, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradient_norms_equal_finite_differences():
    cell = jrnn.lstm(H)
    params, xs = setup(cell)
    result = diagnose.gradient_norms(cell, params, xs, loss)
    t, step = 2, 1e-6
    _, ys, states = folded(cell, params, xs, 0, cell.initial_state(params, (B,)))

    @jax.jit
    def after(c):
        final, later, _ = folded(cell, params, xs, t + 1, states[t]._replace(c=c))
        return loss(final, jnp.stack([*ys[: t + 1], *later]))

    slopes = np.zeros((B, H))
    for index in np.ndindex(B, H):
        nudge = jnp.zeros((B, H)).at[index].set(step)
        slopes[index] = (after(states[t].c + nudge) - after(states[t].c - nudge)) / (2 * step)
    np.testing.assert_allclose(result.norms["c"][t], np.linalg.norm(slopes, axis=-1), rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_gradient_norms_of_cells_of_ones_own():
    params, xs = setup(Leaky())
    result = diagnose.gradient_norms(Leaky(), params, xs, loss)
    for t, expected in enumerate(gradients_by_hand(Leaky(), params, xs, jnp.zeros((B, F)))):
        np.testing.assert_allclose(result.norms["state"][t], np.linalg.norm(expected, axis=-1), rtol=1e-10)

    # An output that is not a part of the state does not follow it; integers in a state have no gradient.
    result = diagnose.gradient_norms(Separate(), params, xs, lambda state, ys: jnp.sum(ys[-1]))
    assert list(result.norms) == ["0"]
    assert (result.norms["0"][-1] == 0).all()
    assert (result.norms["0"][:-1] > 0).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cell", [jrnn.lstm(H), jrnn.elman(H)], ids=["lstm", "elman"])
def test_padding_is_not_measured_and_changes_nothing(cell):
    params, xs = setup(cell, batch=(4,))
    lengths = np.array([6, 3, 1, 0])
    padding = np.arange(T)[:, None] >= lengths
    poisoned = jnp.where(padding[..., None], jnp.nan, xs)
    result = diagnose.gradient_norms(cell, params, poisoned, loss, lengths=lengths)
    np.testing.assert_array_equal(result.valid, ~padding)
    for field, norms in result.norms.items():
        assert np.isnan(norms[padding]).all()
        assert np.isfinite(norms[~padding]).all()
        rms = [np.sqrt(np.mean(norms[t][~padding[t]] ** 2)) for t in range(T)]
        np.testing.assert_allclose(result.rms[field], rms, rtol=1e-12)
        for i, length in [(1, 3)]:
            # The loss weighs outputs by their place, so that a shorter run needs the same places.
            def alone(state, ys, i=i):
                whole = jnp.zeros((T, 4, H)).at[: ys.shape[0], i].set(ys[:, 0])
                return loss(state, whole)

            single = diagnose.gradient_norms(cell, params, xs[:length, i : i + 1], alone)
            np.testing.assert_allclose(norms[:length, i], single.norms[field][:, 0], rtol=1e-10)
            np.testing.assert_allclose(result.initial[field][i], single.initial[field][0], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_nothing_passes_a_reset():
    cell = jrnn.gru(H)
    params, xs = setup(cell)
    resets = jnp.zeros((T, B), bool).at[3, 0].set(True)
    result = diagnose.gradient_norms(cell, params, xs, lambda state, ys: jnp.sum(ys[-1]), resets=resets)
    assert (result.norms["h"][:3, 0] == 0).all()
    assert result.initial["h"][0] == 0
    assert (result.norms["h"][3:, 0] > 0).all()
    assert (result.norms["h"][:, 1] > 0).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reverse", [False, True])
def test_reverse_and_bidirectional(reverse):
    cell = jrnn.lstm(H)
    params, xs = setup(cell)
    there = diagnose.gradient_norms(cell, params, xs, lambda state, ys: jnp.sum(ys[2] ** 2), reverse=reverse)
    back = diagnose.gradient_norms(cell, params, xs[::-1], lambda state, ys: jnp.sum(ys[-3] ** 2), reverse=not reverse)
    np.testing.assert_allclose(there.norms["c"], back.norms["c"][::-1], rtol=1e-12)

    model = jrnn.stack(jrnn.dense(F), jrnn.bidirectional(cell))
    both = model.init(jax.random.key(0), F)
    both = (jax.tree.map(lambda p: p.astype(float), both[0]), {"forward": params, "backward": params})
    inner = jrnn.unroll(model.layers[0], both[0], xs)[1]
    for side, runs_back in ("forward", False), ("backward", True):
        part = slice(0, H) if side == "forward" else slice(H, None)
        alone = diagnose.gradient_norms(cell, params, inner, lambda state, ys: jnp.sum(ys[2] ** 2), reverse=runs_back)
        whole = diagnose.gradient_norms(
            model, both, xs, lambda state, ys, part=part: jnp.sum(ys[2][:, part] ** 2), layer=(1, side)
        )
        np.testing.assert_allclose(whole.norms["h"], alone.norms["h"], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_layers_of_a_stack_are_chosen_by_index():
    below, cell, above = jrnn.residual(jrnn.gru(F)), jrnn.lstm(H), jrnn.highway(jrnn.elman(H))
    model = jrnn.stack(below, cell, jrnn.dropout(0.5), above, jrnn.dense(1))
    params, xs = setup(model)
    inner = jrnn.unroll(below, params[0], xs)[1]
    rest = jrnn.stack(*model.layers[2:])

    def through(state, ys):
        return loss(*jrnn.unroll(rest, params[2:], ys))

    def whole(state, ys):
        return loss(state[2:], ys)

    expected = diagnose.gradient_norms(cell, params[1], inner, through)
    result = diagnose.gradient_norms(model, params, xs, whole, layer=1)
    np.testing.assert_allclose(result.norms["c"], expected.norms["c"], rtol=1e-10)
    np.testing.assert_allclose(result.norms["h"], expected.norms["h"], rtol=1e-10)
    assert diagnose.gradient_norms(model, params, xs, whole, layer=0).norms["h"].shape == (T, B)
    last = diagnose.gradient_norms(model, params, xs, whole, layer=-2)
    first = jax.grad(lambda s: whole(*jrnn.unroll(model, params, xs, s)))(model.initial_state(params, (B,)))
    np.testing.assert_allclose(last.initial["h"], np.linalg.norm(first[3].h, axis=-1), rtol=1e-10)

    products = diagnose.jacobian_products(model, params, xs, layer=1)
    alone = diagnose.jacobian_products(cell, params[1], inner)
    np.testing.assert_allclose(products.singular_values, alone.singular_values, rtol=1e-9, atol=1e-14)
    gates = diagnose.gate_saturation(model, params, xs, layer=1)
    np.testing.assert_allclose(
        gates.values["f"], diagnose.gate_saturation(cell, params[1], inner).values["f"], rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["zoneout", "variational", "dropconnect"])
def test_randomness_is_that_of_unroll(name):
    cell, key = CELLS[name], jax.random.key(7)
    params, xs = setup(cell)
    result = diagnose.gradient_norms(cell, params, xs, loss, key=key)
    state = cell.initial_state(params, (B,))
    value, first = jax.jit(jax.value_and_grad(lambda s: loss(*jrnn.unroll(cell, params, xs, s, key=key))))(state)
    np.testing.assert_allclose(result.initial["h"], np.linalg.norm(first.h, axis=-1), rtol=1e-10)
    np.testing.assert_allclose(result.loss, value, rtol=1e-12)

    whole = jax.jit(jax.jacobian(lambda s: jrnn.unroll(cell, params, xs, s, key=key)[0]))(state)
    size = sum(leaf.shape[-1] for leaf in state)
    matrix = np.block([[np.asarray(column) for column in row] for row in ([c[0] for c in r] for r in _own(whole))])
    products = diagnose.jacobian_products(cell, params, xs, key=key)
    expected = np.linalg.svd(matrix, compute_uv=False)
    assert expected.shape == (size,)
    np.testing.assert_allclose(products.singular_values[-1, 0], expected, rtol=1e-9, atol=1e-14)
    assert products.weight_bound is None


def _own(jacobian):
    """The blocks that a sequence has with itself: rows new fields, columns old ones, each ``(B, out, in)``."""
    return [[jnp.einsum("bibj->bij", getattr(row, f)) for f in row._fields] for row in jacobian]


def test_vanishing_norms_do_not_underflow():
    cell = jrnn.elman(H, "linear", recurrent_init=orthogonal(0.1))
    params = cell.init(jax.random.key(0), F)
    xs = jnp.ones((36, B, F))
    result = diagnose.gradient_norms(cell, params, xs, lambda state, ys: jnp.sum(ys[-1]))
    # 1e-35 is a float32, its square is not.
    np.testing.assert_allclose(result.norms["h"][0], 3**0.5 * 1e-35, rtol=1e-4)


@pytest.mark.parametrize(("time", "batch"), [(0, (2,)), (4, (0,)), (4, ()), (3, (2, 2))])
@pytest.mark.sampled(3)
def test_any_batch_and_no_steps(time, batch):
    cell = jrnn.lstm(H)
    params, xs = setup(cell, time=time, batch=batch)
    norms = diagnose.gradient_norms(cell, params, xs, lambda state, ys: jnp.sum(state.h))
    assert norms.norms["h"].shape == (time, *batch)
    assert norms.rms["c"].shape == (time,)
    products = diagnose.jacobian_products(cell, params, xs)
    assert products.singular_values.shape == (time + 1, *batch, 2 * H)
    gates = diagnose.gate_saturation(cell, params, xs)
    assert gates.values["f"].shape == (time, *batch, H)
    assert gates.low["f"].shape == (time,)
    if time and 0 not in batch:
        assert 0 <= gates.fraction["f"] <= 1
    else:
        assert np.isnan(gates.fraction["f"])


# --- Jacobians ---------------------------------------------------------------------------------------------------


def steps_by_hand(cell, params, xs, state):
    """J_t of one sequence for every t, by reverse mode: ``(T, N, N)``, the state's floats joined."""
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)]

    @jax.jit
    def jacobian(state, x):
        leaves, structure = jax.tree.flatten(state)
        sizes = [leaf.size for leaf, f in zip(leaves, floating, strict=True) if f]

        def step(v):
            parts = iter(jnp.split(v, np.cumsum(sizes)[:-1]))
            old = [next(parts).reshape(leaf.shape) if f else leaf for leaf, f in zip(leaves, floating, strict=True)]
            return flat(cell.step(params, jax.tree.unflatten(structure, old), x)[0], 0)

        return jax.jacrev(step)(flat(state, 0)), cell.step(params, state, x)[0]

    found = []
    for x in xs:
        matrix, state = jacobian(state, x)
        found.append(matrix)
    return np.stack(found)


def singular(steps):
    """Singular values of a product of step Jacobians, the first step rightmost."""
    product = np.eye(steps.shape[-1])
    for step in steps:
        product = step @ product
    return np.linalg.svd(product, compute_uv=False)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [*KINDS, "leaky", "separate", "tdnn"])
@pytest.mark.sampled(3)
def test_jacobian_products_equal_the_jacobian_of_the_steps_folded(name):
    cell = {**CELLS, "leaky": Leaky(), "separate": Separate(), "tdnn": jrnn.tdnn(2, window=3)}[name]
    params, xs = setup(cell)
    forward = diagnose.jacobian_products(cell, params, xs)
    later = diagnose.jacobian_products(cell, params, xs, start=1, lags=3)
    back = diagnose.jacobian_products(cell, params, xs, end=T - 2)
    assert [len(r.lags) for r in (forward, later, back)] == [T + 1, 4, T]
    for i in range(B):
        steps = steps_by_hand(cell, params, xs[:, i], cell.initial_state(params, ()))
        for result, first in ((forward, 0), (later, 2), (back, None)):
            for lag in result.lags:
                chosen = steps[T - 1 - lag : T - 1] if first is None else steps[first : first + lag]
                np.testing.assert_allclose(result.singular_values[lag, i], singular(chosen), rtol=1e-9, atol=1e-13)
    for result in (forward, later, back):
        np.testing.assert_array_equal(result.norms, result.singular_values[..., 0])
        np.testing.assert_array_equal(result.norms[0], 1.0)
        np.testing.assert_allclose(result.bound[1], result.norms[1], rtol=1e-12)
        assert (result.norms <= result.bound * (1 + 1e-12)).all()
        assert sum(result.fields.values()) == result.singular_values.shape[-1]
        bounded = isinstance(cell, type(jrnn.elman(1)) | type(jrnn.jordan(1, 1)) | type(jrnn.indrnn(1)))
        assert (result.weight_bound is not None) == bounded
        if bounded:
            assert (result.bound <= result.weight_bound * (1 + 1e-12)).all()
    assert "none known" in forward.weight_bound_reason or bounded


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "elu", "gelu", "linear", "silu", "softplus"])
@pytest.mark.sampled(3)
def test_elman_obeys_the_bound_of_its_weights(activation):
    cell = jrnn.elman(5, activation, recurrent_init=normal(0.5))
    params, xs = setup(cell, time=20, batch=(8,))
    result = diagnose.jacobian_products(cell, params, xs)
    slopes = np.abs(jax.vmap(jax.grad(jrnn.activations.resolve(activation)))(jnp.linspace(-30, 30, 60001)))
    factor = np.linalg.norm(params["w_hh"], 2) * slopes.max()
    assert (result.norms <= result.weight_bound * (1 + 1e-12)).all()
    # The slope is the largest there is, and not larger than it needs to be.
    assert (result.weight_bound[1] >= factor * (1 - 1e-12)).all()
    np.testing.assert_allclose(result.weight_bound[:, 0], factor ** np.arange(21), rtol=2e-3)


def test_the_bound_is_tight_for_a_linear_orthogonal_network():
    cell = jrnn.elman(5, "linear", recurrent_init=orthogonal(10.0))
    params, xs = cell.init(jax.random.key(0), F), jnp.ones((60, B, F))
    result = diagnose.jacobian_products(cell, params, xs)
    # 1e60 is no float32: products are taken in float64. All singular values are equal.
    np.testing.assert_allclose(result.singular_values[-1], 1e60, rtol=1e-4)
    np.testing.assert_allclose(result.weight_bound[-1], 1e60, rtol=1e-4)
    np.testing.assert_allclose(result.bound, result.weight_bound, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_weight_bound_looks_through_what_leaves_the_step_as_it_is():
    cell = jrnn.elman(H)
    params, xs = setup(cell)
    expected = diagnose.jacobian_products(cell, params, xs).weight_bound
    learned = {"cell": params, "initial": {"h": jnp.ones(H)}}
    for model, p in [
        (jrnn.learned_state(cell), learned),
        (jrnn.variational(cell, recurrent=0.5), params),
        (jrnn.dropconnect(cell, 0.5), params),
    ]:
        np.testing.assert_array_equal(diagnose.jacobian_products(model, p, xs).weight_bound, expected)
    dropped = jrnn.variational(cell, recurrent=0.5)
    assert diagnose.jacobian_products(dropped, params, xs, key=jax.random.key(0)).weight_bound is None
    unknown = jrnn.elman(H, jnp.arctan)
    result = diagnose.jacobian_products(unknown, params, xs)
    assert result.weight_bound is None
    assert "slope=" in result.weight_bound_reason
    given = diagnose.jacobian_products(unknown, params, xs, slope=1.0)
    np.testing.assert_allclose(given.weight_bound, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_jacobians_under_lengths_masks_and_resets():
    cell = jrnn.elman(H)
    params, xs = setup(cell, batch=(4,))
    lengths = np.array([6, 3, 0, 6])
    mask = np.ones((T, 4), bool)
    mask[2, 3] = False  # a hole: the state is held
    resets = np.zeros((T, 4), bool)
    resets[4, 0] = True
    invalid = ~(mask & (np.arange(T)[:, None] < lengths))
    xs = jnp.where(invalid[..., None], jnp.nan, xs)
    options = dict(lengths=lengths, mask=mask, resets=resets)
    result = diagnose.jacobian_products(cell, params, xs, **options)
    np.testing.assert_array_equal(np.isnan(result.norms[1:]), invalid)
    assert (result.norms[0] == 1).all()
    for values in (result.bound, result.weight_bound, result.singular_values[..., -1]):
        np.testing.assert_array_equal(np.isnan(values), np.isnan(result.norms))
    assert (result.norms[1:5, 0] > 0).all()
    assert (result.norms[5:, 0] == 0).all()
    steps = xs[jnp.array([0, 1, 3, 4, 5])]  # the hole left out
    expected = singular(steps_by_hand(cell, params, steps[:, 3], cell.initial_state(params, ())))
    np.testing.assert_allclose(result.singular_values[6, 3], expected, rtol=1e-10)
    factor = result.weight_bound[1, 0]
    np.testing.assert_allclose(result.weight_bound[:, 3], factor ** np.array([0, 1, 2, np.nan, 3, 4, 5]), rtol=1e-12)

    back = diagnose.jacobian_products(cell, params, xs, end=5, **options)
    np.testing.assert_array_equal(np.isnan(back.norms[:, 3]), [False, False, False, True, False, False, False])
    assert np.isnan(back.norms[:, 1:3]).all()
    np.testing.assert_allclose(back.norms[6, 3], result.norms[6, 3], rtol=1e-12)
    assert (back.norms[2:, 0] == 0).all()


@pytest.mark.usefixtures("x64")
def test_jacobians_in_reverse():
    cell = jrnn.gru(H)
    params, xs = setup(cell)
    forward = diagnose.jacobian_products(cell, params, xs[::-1], start=1)
    back = diagnose.jacobian_products(cell, params, xs, start=T - 2, reverse=True)
    np.testing.assert_allclose(back.singular_values, forward.singular_values, rtol=1e-12)
    to_end = diagnose.jacobian_products(cell, params, xs, end=0, reverse=True)
    np.testing.assert_allclose(
        to_end.norms, diagnose.jacobian_products(cell, params, xs[::-1], end=T - 1).norms, rtol=1e-12
    )


def test_a_network_that_has_diverged_is_reported_as_nan():
    cell = jrnn.elman(H, "linear")
    params, xs = setup(cell)
    params = {**params, "w_hh": jnp.full((H, H), jnp.nan)}
    result = diagnose.jacobian_products(jrnn.gru(H), _nan(setup(jrnn.gru(H))[0]), xs)
    assert np.isnan(result.norms[1:]).all()
    assert np.isnan(diagnose.gradient_norms(cell, params, xs, loss).norms["h"][:-1]).all()


def _nan(params):
    return {**params, "w_hh": jnp.full_like(params["w_hh"], jnp.nan)}


# --- gates -------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm_layer(x, scale, epsilon=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale


def gates_by_hand(name, p, x, state):
    """The gates of one step in NumPy, from the equations."""
    h = np.asarray(state.h)
    c = np.asarray(state.c) if hasattr(state, "c") else None
    p = {k: np.asarray(v) for k, v in p.items()}
    u = x @ p["w_ih"] + p["b"]
    v = h * p["w_hh"] if p["w_hh"].ndim == 1 else h @ p["w_hh"]
    if name.startswith("layer_norm"):
        u = norm_layer(x @ p["w_ih"], p["scale_ih"]) + p["b"]
        v = norm_layer(v, p["scale_hh"])
    u, v = ([z[:, i : i + H] for i in range(0, z.shape[1], H)] for z in (u, v))
    if name in ("elman", "indrnn"):
        return {"h": np.tanh(u[0] + v[0])}
    if name in ("lstm", "layer_norm_lstm", "projection_lstm"):
        i, f, g, o = (a + b for a, b in zip(u, v, strict=True))
        return {"i": sigmoid(i), "f": sigmoid(f), "g": np.tanh(g), "o": sigmoid(o)}
    if name == "peephole_lstm":
        i, f, g, o = (a + b for a, b in zip(u, v, strict=True))
        i, f, g = sigmoid(i + p["p_i"] * c), sigmoid(f + p["p_f"] * c), np.tanh(g)
        return {"i": i, "f": f, "g": g, "o": sigmoid(o + p["p_o"] * (f * c + i * g))}
    if name == "coupled_lstm":
        f, g, o = (a + b for a, b in zip(u, v, strict=True))
        return {"f": sigmoid(f), "g": np.tanh(g), "o": sigmoid(o)}
    if name in ("gru_after", "layer_norm_gru"):
        r = sigmoid(u[0] + v[0])
        return {"r": r, "z": sigmoid(u[1] + v[1]), "n": np.tanh(u[2] + r * (v[2] + p["b_hn"]))}
    if name == "gru_before":
        r = sigmoid(u[0] + v[0])
        return {"r": r, "z": sigmoid(u[1] + v[1]), "n": np.tanh(u[2] + (r * h) @ p["w_hh"][:, 2 * H :])}
    if name == "mgu":
        f = sigmoid(u[0] + v[0])
        return {"f": f, "n": np.tanh(u[1] + f * (v[1] + p["b_hn"]))}
    assert name == "ugrnn"
    return {"g": sigmoid(u[0] + v[0]), "n": np.tanh(u[1] + v[1])}


INNER = {"zoneout": "lstm", "learned_state": "projection_lstm", "variational": "gru_after", "dropconnect": "gru_before"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", GATED)
@pytest.mark.sampled(3)
def test_gates_equal_their_equations(name):
    cell, epsilon = CELLS[name], 0.2
    params, xs = setup(cell, time=20, scale=3.0)
    result = diagnose.gate_saturation(cell, params, xs, epsilon=epsilon)
    inner = params["cell"] if name == "learned_state" else params
    state, expected = cell.initial_state(params, (B,)), []
    step = jax.jit(cell.step)
    for x in xs:
        expected.append(gates_by_hand(INNER.get(name, name), inner, np.asarray(x), state))
        state, _ = step(params, state, x)
    assert list(result.fraction) == list(expected[0])
    for gate in expected[0]:
        values = np.stack([e[gate] for e in expected])
        np.testing.assert_allclose(result.values[gate], values, rtol=1e-10, atol=1e-12)
        candidate = gate == "n" or gate == "h" or (gate == "g" and name != "ugrnn")
        assert result.limits[gate] == ((-1, 1) if candidate else (0, 1))
        low = values < (-1 if candidate else 0) + epsilon
        high = values > 1 - epsilon
        np.testing.assert_allclose(result.low[gate], low.mean((1, 2)), rtol=1e-12)
        np.testing.assert_allclose(result.high[gate], high.mean((1, 2)), rtol=1e-12)
        np.testing.assert_allclose(result.units[gate], (low | high).mean((0, 1)), rtol=1e-12)
        np.testing.assert_allclose(result.fraction[gate], (low | high).mean(), rtol=1e-12)
        assert 0 < result.fraction[gate] < 1


@pytest.mark.usefixtures("x64")
def test_gates_with_randomness_are_those_of_the_run():
    cell, key = jrnn.zoneout(jrnn.variational(jrnn.ugrnn(H), inputs=0.4, recurrent=0.4), h=0.3), jax.random.key(3)
    params, xs = setup(cell)
    gates = diagnose.gate_saturation(cell, params, xs, key=key).values
    _, ys = jrnn.unroll(cell, params, xs, key=key)
    before = np.concatenate([np.zeros((1, B, H)), ys[:-1]])
    new = gates["g"] * before + (1 - gates["g"]) * gates["n"]
    kept = np.asarray(ys) == before
    np.testing.assert_allclose(np.where(kept, before, new), ys, rtol=1e-10, atol=1e-13)
    assert 0.1 < kept.mean() < 0.5


def test_saturation_counts_valid_steps_alone():
    cell = jrnn.lstm(H, forget_bias=20.0)
    params, xs = cell.init(jax.random.key(0), F), jnp.ones((T, 3, F))
    lengths = np.array([4, 1, 0])
    xs = jnp.where((np.arange(T)[:, None] < lengths)[..., None], xs, jnp.nan)
    result = diagnose.gate_saturation(cell, params, xs, lengths=lengths)
    assert result.fraction["f"] == 1
    np.testing.assert_array_equal(result.high["f"], [1, 1, 1, 1, np.nan, np.nan])
    np.testing.assert_array_equal(result.low["f"], [0, 0, 0, 0, np.nan, np.nan])
    np.testing.assert_array_equal(result.units["f"], 1)
    np.testing.assert_array_equal(np.isnan(result.values["f"][..., 0]), np.arange(T)[:, None] >= lengths)


@pytest.mark.smoke
def test_limits_by_activation():
    xs = jnp.array([[-1.0], [2.0], [0.05]])
    params = {"w_ih": jnp.ones((1, 1)), "w_hh": jnp.zeros((1, 1)), "b": jnp.zeros(1)}
    relu = diagnose.gate_saturation(jrnn.elman(1, "relu"), params, xs)  # a relu is saturated where it is 0
    np.testing.assert_array_equal(relu.low["h"], [1, 0, 0])
    np.testing.assert_array_equal(relu.high["h"], 0)
    assert diagnose.gate_saturation(jrnn.elman(1, "linear"), params, xs).fraction["h"] == 0
    with pytest.raises(ValueError, match=r"limits: the activation .* of gate 'h' .* pass limits=\{'h': \(lower"):
        diagnose.gate_saturation(jrnn.elman(1, jnp.arctan), params, xs)
    given = diagnose.gate_saturation(
        jrnn.elman(1, jnp.arctan), params, xs, limits={"h": (-np.pi / 2, np.pi / 2)}, epsilon=0.49
    )
    np.testing.assert_array_equal(given.high["h"], [0, 1, 0])
    assert given.limits == {"h": (-np.pi / 2, np.pi / 2)}


# --- the largest Lyapunov exponent -------------------------------------------------------------------------------


def exponent_by_qr(steps):
    """The largest exponent of step Jacobians ``(T, N, N)``, by QR factorisations of the carried frame."""
    frame, growth = np.eye(steps.shape[-1]), []
    for step in steps:
        frame, r = np.linalg.qr(step @ frame)
        growth.append(np.log(np.abs(np.diag(r))))
    return np.mean(growth, 0).max()


@dataclasses.dataclass(frozen=True)
class Tent(jrnn.Cell):
    """A map whose exponent is known: log(slope) for every orbit, whatever the inputs, which are ignored."""

    slope: float

    def init(self, key, in_features):
        return {}

    def initial_state(self, params, batch_shape):
        return jnp.full((*batch_shape, 1), 0.3)

    def step(self, params, state, x, key=None):
        state = self.slope * jnp.minimum(state, 1 - state)
        return state, state


def test_the_exponent_of_a_linear_cell_is_that_of_its_largest_eigenvalue():
    cell = jrnn.elman(3, "linear")
    params = {**cell.init(jax.random.key(0), F), "w_hh": jnp.diag(jnp.array([0.9, -0.6, 1e-5]))}
    xs = jax.random.normal(jax.random.key(1), (80, B, F))
    result = diagnose.lyapunov(cell, params, xs, burn_in=40)
    np.testing.assert_allclose(result.exponent, np.log(0.9), atol=1e-6)
    np.testing.assert_allclose(result.growth[-1], np.log(0.9), atol=1e-6)
    assert result.counted.sum() == 40 * B
    # A complex state: the eigenvalues of an LRU, all on one circle.
    cell = jrnn.lru(3, 4)
    params = cell.init(jax.random.key(0), F)
    params = {**params, "nu_log": jnp.full(4, np.log(0.25), jnp.float32)}
    np.testing.assert_allclose(diagnose.lyapunov(cell, params, xs).exponent, -0.25, atol=1e-5)


def test_the_exponent_of_a_rotation_is_zero_and_of_a_known_map_is_its_logarithm():
    xs = jnp.ones((60, B, F))
    cell = jrnn.elman(5, "linear", recurrent_init=orthogonal(1.0))
    result = diagnose.lyapunov(cell, cell.init(jax.random.key(0), F), xs)
    np.testing.assert_allclose(result.growth, 0.0, atol=1e-6)
    cell = jrnn.elman(5, "linear", recurrent_init=orthogonal(1e-30))  # products of more than one are no float32
    result = diagnose.lyapunov(cell, cell.init(jax.random.key(0), F), xs)
    np.testing.assert_allclose(result.exponent, -30 * np.log(10), rtol=1e-5)
    for slope in (1.7, 0.5):
        np.testing.assert_allclose(diagnose.lyapunov(Tent(slope), {}, xs).exponent, np.log(slope), rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gru_after", "lstm", "separate", "leaky"])
@pytest.mark.sampled(3)
def test_the_exponent_equals_that_of_qr_factorisations(name):
    cell = {**CELLS, "separate": Separate(), "leaky": Leaky()}[name]
    params, xs = setup(cell, time=300, scale=0.3)
    result = diagnose.lyapunov(cell, params, xs, burn_in=60)
    other = diagnose.lyapunov(cell, params, xs, burn_in=60, seed=1)
    for i in range(B):
        steps = steps_by_hand(cell, params, xs[:, i], cell.initial_state(params, ()))
        np.testing.assert_allclose(result.exponent[i], exponent_by_qr(steps[60:]), atol=0.02)
        # After many steps all vectors have one direction, and grow as the product of the Jacobians makes them.
        np.testing.assert_allclose(result.growth[-100:, i], other.growth[-100:, i], atol=1e-6)
        vector = functools.reduce(lambda v, step: step @ v, steps[:200], np.ones(steps.shape[-1]))
        after = functools.reduce(lambda v, step: step @ v, steps[200:], vector)
        expected = np.log(np.linalg.norm(after) / np.linalg.norm(vector))
        np.testing.assert_allclose(result.growth[200:, i].sum(), expected, atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reverse", [False, True])
def test_exponents_under_lengths_masks_and_resets(reverse):
    cell = jrnn.gru(H)
    time = 12
    params, xs = setup(cell, time=time, batch=(4,))
    lengths = np.array([12, 6, 0, 12])
    mask = np.ones((time, 4), bool)
    mask[5, 3] = False
    resets = np.zeros((time, 4), bool)
    resets[5 if reverse else 6, 0] = True  # between two halves
    valid = mask & (np.arange(time)[:, None] < lengths)
    xs = jnp.where(valid[..., None], xs, jnp.nan)
    result = diagnose.lyapunov(cell, params, xs, lengths=lengths, mask=mask, resets=resets, reverse=reverse, burn_in=2)
    np.testing.assert_array_equal(np.isnan(result.growth), ~valid)
    assert np.isnan(result.exponent[2])
    assert np.isfinite(np.delete(result.exponent, 2)).all()
    np.testing.assert_array_equal(result.counted.sum(0), [8, 4, 0, 9])
    np.testing.assert_allclose(result.exponent[3], result.growth[:, 3][result.counted[:, 3]].mean(), rtol=1e-12)

    def alone(i, kept):
        return diagnose.lyapunov(cell, params, xs[jnp.array(kept), i], reverse=reverse).growth

    whole = list(range(time))
    for i, kept in [(1, whole[:6]), (0, whole[:6]), (0, whole[6:]), (3, [t for t in whole if t != 5])]:
        np.testing.assert_allclose(result.growth[kept, i], alone(i, kept), rtol=1e-10)


def test_exponents_of_what_forgets_diverges_or_has_no_steps():
    params, xs = setup(jrnn.tdnn(2, window=3), time=6)
    result = diagnose.lyapunov(jrnn.tdnn(2, window=3), params, xs)
    assert (result.exponent == -np.inf).all()  # a window has forgotten everything after as many steps
    cell = jrnn.elman(H, jnp.square, recurrent_init=orthogonal(1e20))
    assert np.isnan(diagnose.lyapunov(cell, *setup(cell)).exponent).all()
    cell = jrnn.elman(H)
    for time, batch in [(0, (2,)), (4, (0,)), (3, (2, 2))]:
        result = diagnose.lyapunov(cell, *setup(cell, time=time, batch=batch))
        assert result.exponent.shape == batch
        assert result.growth.shape == result.counted.shape == (time, *batch)
        assert np.isfinite(result.exponent).all() == (time > 0)


@pytest.mark.usefixtures("x64")
def test_exponents_of_layers_in_their_place():
    model = jrnn.stack(jrnn.elman(4), jrnn.bidirectional(jrnn.gru(H)), jrnn.dense(2))
    params, xs = setup(model)
    _, below = jrnn.unroll(jrnn.elman(4), params[0], xs)
    result = diagnose.lyapunov(model, params, xs, layer=(1, "backward"))
    expected = diagnose.lyapunov(jrnn.gru(H), params[1]["backward"], below, reverse=True)
    np.testing.assert_allclose(result.growth, expected.growth, rtol=1e-10)
    assert result.reverse
    dropped = jrnn.variational(jrnn.gru(H), recurrent=0.5)
    params, xs = setup(dropped)
    result = diagnose.lyapunov(dropped, params, xs, key=jax.random.key(0))
    assert (result.growth != diagnose.lyapunov(dropped, params, xs).growth).any()


# --- Newton's method ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "stable"), [(0.5, True), (4.0, False)])
def test_newton_converges_where_the_exponent_is_negative_and_says_where_it_does_not(gain, stable):
    xs = 0.3 * jax.random.normal(jax.random.key(1), (120, 3, F))
    options = dict(lengths=np.array([120, 90, 0]), reverse=stable)
    cell = jrnn.elman(16, recurrent_init=orthogonal(gain))
    params = cell.init(jax.random.key(0), F)
    result = diagnose.newton(cell, params, xs, **options)
    assert ((diagnose.lyapunov(cell, params, xs, **options).exponent[:2] < 0) == stable).all()
    assert result.converged.tolist() == [stable, stable, True]
    assert ((result.residual <= result.tolerance) == result.converged).all()
    assert (result.iterations < 15) if stable else (result.iterations == result.limit)
    assert result.jacobians == "whole"
    # Either way the result of `unroll` is that of the scan.
    runs = [jrnn.unroll(cell, params, xs, **options, backend=backend)[1] for backend in ("newton", "reference")]
    np.testing.assert_allclose(*runs, atol=1e-5)


def test_newton_on_layers_in_their_place_and_on_no_steps():
    model = jrnn.stack(jrnn.lstm(4), jrnn.bidirectional(jrnn.elman(20)), jrnn.dense(2))
    params, xs = setup(model)
    _, below = jrnn.unroll(jrnn.lstm(4), params[0], xs)
    result = diagnose.newton(model, params, xs, layer=(1, "backward"))
    alone = diagnose.newton(jrnn.elman(20), params[1]["backward"], below, reverse=True)
    assert result.jacobians == alone.jacobians == "diagonal"
    assert result.converged.all()
    assert result.iterations == alone.iterations
    for time, batch in [(0, (2,)), (4, (0,)), (4, ())]:
        result = diagnose.newton(jrnn.elman(H), *setup(jrnn.elman(H), time=time, batch=batch))
        assert result.converged.shape == result.residual.shape == batch
        assert result.converged.all()
        assert (result.iterations == 0) == (0 in (time, *batch))


def test_newton_of_a_run_that_is_not_finite():
    """A NaN in a valid input is no solution; one in a state that no step consumes is not met."""
    cell = jrnn.elman(H)
    params, xs = setup(cell)
    result = diagnose.newton(cell, params, xs.at[2, 0].set(jnp.nan))
    assert result.converged.tolist() == [False, True]
    assert np.isnan(result.residual[0])
    state = jax.tree.map(lambda a: a.at[0].set(jnp.nan), cell.initial_state(params, (B,)))
    assert diagnose.newton(cell, params, xs, state=state, lengths=np.array([0, T])).converged.all()
    assert not diagnose.newton(cell, params, xs, state=state).converged.all()


# --- errors ------------------------------------------------------------------------------------------------------


class Deaf(jrnn.AffineCell):
    """A gated cell whose functions are no fields, so that nobody can listen."""

    gate_names: ClassVar = ("z", "n")

    def gates(self, theta, u, v, state):
        z, n = jax.nn.sigmoid(u[0] + v[0]), jnp.tanh(u[1] + v[1])
        return state._replace(h=z * state.h + (1 - z) * n)


def test_errors_say_what_to_do():
    cell = jrnn.lstm(H)
    params, xs = setup(cell)
    both = jrnn.bidirectional(cell)
    both_params = both.init(jax.random.key(0), F)
    two = jrnn.stack(cell, jrnn.dense(2), cell)
    two_params = two.init(jax.random.key(0), F)

    for measure in (diagnose.jacobian_products, diagnose.gate_saturation, diagnose.lyapunov, diagnose.newton):
        with pytest.raises(ValueError, match=r'layer: expected "forward" or "backward".*layer=\(0, "forward"\)'):
            measure(both, both_params, xs)
        with pytest.raises(ValueError, match=r"layer: expected an index into the stack, one of \[0, 2\], got None"):
            measure(two, two_params, xs)
        with pytest.raises(ValueError, match=r"layer: expected a recurrent layer, got .*Dense|dense"):
            measure(two, two_params, xs, layer=1)
        with pytest.raises(ValueError, match=r"layer: expected an index into the 3 layers of a stack, got 3"):
            measure(two, two_params, xs, layer=3)
        with pytest.raises(ValueError, match=r"layer: .*has no layers to choose from"):
            measure(cell, params, xs, layer=0)
        with pytest.raises(ValueError, match="lengths: expected values"):
            measure(cell, params, xs, lengths=np.array([7, 1]))
        with pytest.raises(ValueError, match="xs: expected 2 features"):
            measure(cell, params, jnp.ones((T, B, F + 1)))
        with pytest.raises(TypeError, match="cell: expected a layer"):
            measure("lstm", params, xs)
    with pytest.raises(ValueError, match=r'layer: expected "forward" or "backward"'):
        diagnose.gradient_norms(both, both_params, xs, loss)
    with pytest.raises(ValueError, match=r"loss: .* one float, got float32 of shape \(2, 3\)"):
        diagnose.gradient_norms(cell, params, xs, lambda state, ys: ys[-1])
    with pytest.raises(ValueError, match="start, end: expected at most one"):
        diagnose.jacobian_products(cell, params, xs, start=0, end=1)
    for name in ("start", "end"):
        for value in (T, -1, 1.0, True):
            with pytest.raises(ValueError, match=rf"{name}: expected a step, an int in \[0, 6\)"):
                diagnose.jacobian_products(cell, params, xs, **{name: value})
    with pytest.raises(ValueError, match="lags: expected a count"):
        diagnose.jacobian_products(cell, params, xs, lags=-1)
    with pytest.raises(ValueError, match="slope: expected"):
        diagnose.jacobian_products(cell, params, xs, slope=-1.0)
    for value in (T, -1, 1.0, True):
        with pytest.raises(ValueError, match=r"burn_in: expected a count of steps, an int in \[0, 6\)"):
            diagnose.lyapunov(cell, params, xs, burn_in=value)
    with pytest.raises(TypeError, match=r"seed: expected an int, got 1\.0"):
        diagnose.lyapunov(cell, params, xs, seed=1.0)
    counting = Separate()
    with pytest.raises(ValueError, match=r"backend: 'newton' cannot run .*: it solves for a state of real numbers"):
        diagnose.newton(counting, counting.init(jax.random.key(0), F), xs)
    dropped = jrnn.zoneout(cell, h=0.2)
    with pytest.raises(ValueError, match=r"backend: 'newton' cannot run .*may draw random numbers at each step"):
        diagnose.newton(dropped, params, xs, key=jax.random.key(0))
    for value in (0, 0.5, "a"):
        with pytest.raises(ValueError, match=r"epsilon: expected a float in \(0, 0.5\)"):
            diagnose.gate_saturation(cell, params, xs, epsilon=value)
    with pytest.raises(ValueError, match=r"limits: expected gates among \['i', 'f', 'g', 'o'\], got \['z'\]"):
        diagnose.gate_saturation(cell, params, xs, limits={"z": (0, 1)})
    for value in (1, (1, 0), ("a", 1)):
        with pytest.raises(ValueError, match=r"limits: expected \(lower, upper\) for gate 'f'"):
            diagnose.gate_saturation(cell, params, xs, limits={"f": value})
    with pytest.raises(TypeError, match=r"layer: found no activation of gate 'z' in .*Deaf.*take the gates' functions"):
        diagnose.gate_saturation(Deaf(H), Deaf(H).init(jax.random.key(0), F), xs)
    with pytest.raises(TypeError, match="layer: expected a cell that declares its input projection"):
        diagnose.gate_saturation(Leaky(), {"w": jnp.ones((F, F))}, xs)


# --- plots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,)])
def test_plots_draw_on_the_axes_they_are_given(batch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    cell = jrnn.elman(H)
    params, xs = setup(cell, batch=batch)
    lengths = np.full(batch, 4)
    figure, axes = pyplot.subplots(1, 4)
    norms = diagnose.gradient_norms(cell, params, xs, lambda state, ys: jnp.sum(ys[3]), lengths=lengths)
    assert diagnose.plot_gradient_norms(norms, axes[0]) is axes[0]
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), norms.rms["h"])
    products = diagnose.jacobian_products(cell, params, xs, lengths=lengths)
    assert diagnose.plot_jacobian_products(products, axes[1]) is axes[1]
    assert len(axes[1].lines) == H + 2
    gates = diagnose.gate_saturation(cell, params, xs, lengths=lengths)
    assert diagnose.plot_gate_saturation(gates, axes[2]) is axes[2]
    heights = sum(patch.get_height() for patch in axes[2].patches)
    np.testing.assert_allclose(heights, gates.fraction["h"])
    growth = diagnose.lyapunov(cell, params, xs, lengths=lengths, burn_in=1)
    assert diagnose.plot_lyapunov(growth, axes[3]) is axes[3]
    median = axes[3].lines[-2].get_ydata()
    np.testing.assert_allclose(median[3], np.median(growth.exponent))
    np.testing.assert_array_equal(np.isnan(median), [True, False, False, False, True, True])
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title() for ax in axes)
    figure.canvas.draw()
    pyplot.close(figure)
    pyplot.close(diagnose.plot_gradient_norms(norms).figure)


def test_matplotlib_is_imported_by_plots_alone_and_missed_by_name(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    params, xs = setup(jrnn.elman(H))
    result = diagnose.gradient_norms(jrnn.elman(H), params, xs, loss)
    with pytest.raises(ImportError, match=r"jrnn\[plot\]"):
        diagnose.plot_gradient_norms(result)
