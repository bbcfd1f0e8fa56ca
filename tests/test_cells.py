"""Every cell against its equations, written out step by step in plain NumPy (values) and JAX (gradients), in float64.

An oracle is ``(xp, p, x, *state) -> (state, y)`` for one unbatched step, straight from the paper or from the
docstring, gate by gate; `xp` is `numpy` or `jax.numpy`.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from tests import cases
from tests.cases import CASES

F, H, T = 3, 4, 4


def sigmoid(xp, z):
    return 1 / (1 + xp.exp(-z))


def parts(p, x, h, count):
    """x W + b and h U for each gate."""
    width = p["b"].shape[0] // count
    blocks = [slice(i * width, (i + 1) * width) for i in range(count)]
    return [x @ p["w_ih"][:, s] + p["b"][s] for s in blocks], [h @ p["w_hh"][:, s] for s in blocks]


def elman(function):
    def step(xp, p, x, h):
        h = function(xp, x @ p["w_ih"] + h @ p["w_hh"] + p["b"])
        return (h,), h

    return step


def jordan(xp, p, x, y):
    z = xp.tanh(x @ p["w_ih"] + y @ p["w_hh"] + p["b"])
    y = z @ p["w_ho"] + p["b_o"]
    return (y,), y


def lstm(xp, p, x, h, c):
    u, v = parts(p, x, h, 4)
    i, f, o = (sigmoid(xp, u[k] + v[k]) for k in (0, 1, 3))
    c = f * c + i * xp.tanh(u[2] + v[2])
    h = o * xp.tanh(c)
    return (h, c), h


def peephole(xp, p, x, h, c):
    u, v = parts(p, x, h, 4)
    i = sigmoid(xp, u[0] + v[0] + p["p_i"] * c)
    f = sigmoid(xp, u[1] + v[1] + p["p_f"] * c)
    c = f * c + i * xp.tanh(u[2] + v[2])
    h = sigmoid(xp, u[3] + v[3] + p["p_o"] * c) * xp.tanh(c)
    return (h, c), h


def coupled(xp, p, x, h, c):
    u, v = parts(p, x, h, 3)
    f, o = sigmoid(xp, u[0] + v[0]), sigmoid(xp, u[2] + v[2])
    c = f * c + (1 - f) * xp.tanh(u[1] + v[1])
    h = o * xp.tanh(c)
    return (h, c), h


def projection(xp, p, x, h, c):
    (h, c), _ = lstm(xp, p, x, h, c)
    h = h @ p["w_hr"]
    return (h, c), h


def normal(xp, z):
    return (z - xp.mean(z)) / xp.sqrt(xp.var(z) + 1e-5)


def layer_norm_lstm(xp, p, x, h, c):
    z = normal(xp, x @ p["w_ih"]) * p["scale_ih"] + normal(xp, h @ p["w_hh"]) * p["scale_hh"] + p["b"]
    i, f, g, o = (z[k * H : (k + 1) * H] for k in range(4))
    c = sigmoid(xp, f) * c + sigmoid(xp, i) * xp.tanh(g)
    h = sigmoid(xp, o) * xp.tanh(normal(xp, c) * p["scale_c"] + p["shift_c"])
    return (h, c), h


def gru_after(xp, p, x, h):
    u, v = parts(p, x, h, 3)
    r, z = sigmoid(xp, u[0] + v[0]), sigmoid(xp, u[1] + v[1])
    n = xp.tanh(u[2] + r * (v[2] + p["b_hn"]))
    h = (1 - z) * n + z * h
    return (h,), h


def gru_before(xp, p, x, h):
    u, v = parts(p, x, h, 3)
    r, z = sigmoid(xp, u[0] + v[0]), sigmoid(xp, u[1] + v[1])
    n = xp.tanh(u[2] + (r * h) @ p["w_hh"][:, 2 * H :])
    h = (1 - z) * n + z * h
    return (h,), h


def layer_norm_gru(xp, p, x, h):
    u = normal(xp, x @ p["w_ih"]) * p["scale_ih"] + p["b"]
    v = normal(xp, h @ p["w_hh"]) * p["scale_hh"]
    r, z = sigmoid(xp, u[:H] + v[:H]), sigmoid(xp, u[H : 2 * H] + v[H : 2 * H])
    n = xp.tanh(u[2 * H :] + r * (v[2 * H :] + p["b_hn"]))
    h = (1 - z) * n + z * h
    return (h,), h


def mgu(xp, p, x, h):
    u, v = parts(p, x, h, 2)
    f = sigmoid(xp, u[0] + v[0])
    h = (1 - f) * h + f * xp.tanh(u[1] + f * (v[1] + p["b_hn"]))
    return (h,), h


def ugrnn(xp, p, x, h):
    u, v = parts(p, x, h, 2)
    g = sigmoid(xp, u[0] + v[0])
    h = g * h + (1 - g) * xp.tanh(u[1] + v[1])
    return (h,), h


def indrnn(xp, p, x, h):
    h = xp.tanh(x @ p["w_ih"] + p["w_hh"] * h + p["b"])
    return (h,), h


CELLS = {
    "elman": (jrnn.elman(H), elman(lambda xp, z: xp.tanh(z))),
    "elman_relu": (jrnn.elman(H, "relu"), elman(lambda xp, z: xp.maximum(z, 0))),
    "elman_sigmoid": (jrnn.elman(H, "sigmoid"), elman(sigmoid)),
    "elman_function": (jrnn.elman(H, jnp.arctan), elman(lambda xp, z: xp.arctan(z))),
    "jordan": (jrnn.jordan(H, 2), jordan),
    "lstm": (jrnn.lstm(H), lstm),
    "peephole_lstm": (jrnn.peephole_lstm(H), peephole),
    "coupled_lstm": (jrnn.coupled_lstm(H), coupled),
    "projection_lstm": (jrnn.projection_lstm(H, 2), projection),
    "layer_norm_lstm": (jrnn.layer_norm_lstm(H), layer_norm_lstm),
    "gru_after": (jrnn.gru(H), gru_after),
    "gru_before": (jrnn.gru(H, reset="before"), gru_before),
    "layer_norm_gru": (jrnn.layer_norm_gru(H), layer_norm_gru),
    "mgu": (jrnn.mgu(H), mgu),
    "ugrnn": (jrnn.ugrnn(H), ugrnn),
    "indrnn": (jrnn.indrnn(H, "tanh"), indrnn),
}


def fold(xp, step, p, state, xs):
    ys = []
    for x in xs:
        state, y = step(xp, p, x, *state)
        ys.append(y)
    return state, xp.stack(ys)


@pytest.fixture
def case(request, x64):
    """A cell, its oracle, and random float64 parameters (biases and small vectors too), state and inputs."""
    cell, step = CELLS[request.param]
    rng = np.random.default_rng(0)
    params = cell.init(jax.random.key(0), F)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * rng.normal(size=p.shape), params)
    state = jax.tree.map(lambda s: rng.normal(size=s.shape), cell.initial_state(params, ()))
    return cell, step, params, state, rng.normal(size=(T, F))


every_cell = pytest.mark.parametrize("case", CELLS, indirect=True)


@every_cell
@pytest.mark.parametrize("backend", [None, "reference", "hoisted"])
def test_values_equal_the_equations_in_numpy(case, backend):
    cell, step, params, state, xs = case
    expected_state, expected = fold(np, step, params, tuple(state), xs)
    got_state, got = jrnn.unroll(cell, params, xs, state, backend=backend)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, atol=1e-12)
    for a, b in zip(got_state, expected_state, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
@every_cell
@pytest.mark.parametrize("backend", [None, "reference"])
def test_every_gradient_equals_that_of_the_equations(case, backend):
    cell, step, params, state, xs = case
    rng = np.random.default_rng(1)
    _, ys = jax.eval_shape(lambda: jrnn.unroll(cell, params, xs, state))
    weights = rng.normal(size=ys.shape)
    ends = [rng.normal(size=s.shape) for s in state]

    def loss(result):
        last, ys = result
        return jnp.sum(ys * weights) + sum(jnp.sum(s * w) for s, w in zip(last, ends, strict=True))

    args = (params, jax.tree.map(jnp.asarray, state), jnp.asarray(xs))
    got = jax.jit(jax.grad(lambda p, s, x: loss(jrnn.unroll(cell, p, x, s, backend=backend)), argnums=(0, 1, 2)))(*args)
    expected = jax.jit(jax.grad(lambda p, s, x: loss(fold(jnp, step, p, tuple(s), x)), argnums=(0, 1, 2)))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected)), "a gradient nobody tests"


@every_cell
def test_float32_is_the_default_and_near_float64(case):
    cell, step, params, state, xs = case
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, state, xs))
    last, ys = jrnn.unroll(cell, single[0], single[2], single[1])
    assert {a.dtype for a in jax.tree.leaves((last, ys))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(ys, fold(np, step, params, tuple(state), xs)[1], atol=2e-5)
    assert {a.dtype for a in jax.tree.leaves(cell.init(jax.random.key(0), F))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", CELLS)
def test_equal_calls_give_equal_cells(name):
    cell, _ = CELLS[name]
    twin = dataclasses.replace(cell)
    assert twin == cell
    assert hash(twin) == hash(cell)
    assert len(set(c for c, _ in CELLS.values())) == len(CELLS)


@pytest.mark.parametrize(("window", "dilation"), [(1, 1), (3, 1), (3, 2), (2, 3)])
def test_tdnn_is_a_causal_convolution(x64, window, dilation):
    layer = jrnn.tdnn(H, window, dilation=dilation, activation="tanh")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), layer.init(jax.random.key(0), F))
    xs = rng.normal(size=(T, 2, F))
    expected = np.zeros((T, 2, H)) + params["b"]
    for t in range(T):
        for k in range(window):
            if t - k * dilation >= 0:
                expected[t] += xs[t - k * dilation] @ params["w"][k]
    np.testing.assert_allclose(jrnn.unroll(layer, params, xs)[1], np.tanh(expected), atol=1e-12)


@pytest.mark.parametrize("cell", [jrnn.lstm(H), jrnn.peephole_lstm(H), jrnn.coupled_lstm(H), jrnn.layer_norm_lstm(H)])
@pytest.mark.parametrize("forget_bias", [0.0, 2.5])
def test_forget_bias_is_an_initialiser_of_the_forget_gate_alone(cell, forget_bias):
    b = dataclasses.replace(cell, forget_bias=forget_bias).init(jax.random.key(0), F)["b"]
    gates = dict(zip(cell.gate_names, np.split(np.asarray(b), len(cell.gate_names)), strict=True))
    assert (gates.pop("f") == forget_bias).all()
    assert all((gate == 0).all() for gate in gates.values())


def test_initialisers_by_name():
    params = jrnn.lstm(H, recurrent_init="orthogonal").init(jax.random.key(0), F)
    for block in np.split(np.asarray(params["w_hh"]), 4, axis=1):
        np.testing.assert_allclose(block @ block.T, np.eye(H), atol=1e-5)
    irnn = jrnn.elman(H, "relu", recurrent_init="identity").init(jax.random.key(0), F)
    np.testing.assert_array_equal(irnn["w_hh"], np.eye(H))
    torchlike = jrnn.gru(H, input_init="uniform", recurrent_init="uniform", bias_init="uniform")
    for leaf in jax.tree.leaves(torchlike.init(jax.random.key(0), F)):
        assert 0 < np.abs(leaf).max() <= H**-0.5
    glorot = jrnn.elman(64).init(jax.random.key(0), 32)["w_ih"]
    assert abs(float(jnp.std(glorot)) - (2 / 96) ** 0.5) < 0.01
    scaled = jrnn.elman(H, recurrent_init=jrnn.initializers.orthogonal(1.5)).init(jax.random.key(0), F)["w_hh"]
    np.testing.assert_allclose(np.linalg.svd(scaled)[1], 1.5, atol=1e-5)
    with pytest.raises(ValueError, match=r"recurrent_init: expected one of .*orthogonal.* got 'orthonormal'"):
        jrnn.lstm(H, recurrent_init="orthonormal")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        jrnn.elman(H),
        jrnn.jordan(H, 3),
        jrnn.peephole_lstm(H),
        jrnn.projection_lstm(H, 3),
        jrnn.layer_norm_lstm(H),
        jrnn.gru(H, "before"),
        jrnn.indrnn(H, "tanh"),
        jrnn.learned_state(jrnn.variational(jrnn.mgu(H), inputs=0.5)),
    ],
    ids=repr,
)
@pytest.mark.sampled(3)
def test_no_input_features(cell):
    """An autonomous network equals one whose only input is zero, in values and gradients."""
    params = jax.tree.map(lambda a: a + 0.3, cell.init(jax.random.key(0), 0))
    one = jax.tree.map(lambda a: jnp.ones((1, a.shape[1])) if a.ndim == 2 and a.shape[0] == 0 else a, params)

    def total(params, features):
        _, ys = jrnn.unroll(cell, params, jnp.zeros((T, 2, features)), key=jax.random.key(1) if cell.uses_key else None)
        return jnp.sum(jnp.sin(ys))

    (value, got), (expected, wanted) = (jax.value_and_grad(total)(p, n) for p, n in ((params, 0), (one, 1)))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b if a.size else np.zeros_like(a), rtol=1e-4, atol=1e-6)


# --- repr --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_repr_is_an_expression(case):
    names = {name: getattr(jrnn, name) for name in jrnn.__all__}
    assert eval(repr(case.layer), {**names, **vars(cases)}) == case.layer


@pytest.mark.parametrize(
    "text",
    [
        "lstm(4)",
        "lstm(4, recurrent_init=initializers.orthogonal(scale=0.5), forget_bias=0.0)",
        "gru(4, reset='before', bias_init=initializers.zeros, activation='relu')",
        "elman(4, activation=activations.linear)",
        "min_gru(4, forget_bias=initializers.chrono(steps=40))",
        "stack(gru(4), residual(dense(4)), dropout(0.1))",
        "bidirectional(lstm(4), gru(3), merge='sum')",
        "bidirectional(lstm(4))",
        "zoneout(variational(lstm(4), recurrent=0.2), c=0.5)",
        "learned_state(dropconnect(indrnn(4), 0.5))",
        "highway(tdnn(4, 3, dilation=2), gate_bias=-2.0)",
        "stack(embed(5, 3), layer_norm(), activation('relu'), layer_norm(epsilon=0.1))",
    ],
)
@pytest.mark.smoke
def test_repr(text):
    assert repr(eval(text, {name: getattr(jrnn, name) for name in jrnn.__all__})) == text


def test_repr_of_a_subclass_has_its_name():
    assert repr(cases.HiddenAndMemory(4, forget_bias=0.0)) == "HiddenAndMemory(4, forget_bias=0.0)"
    assert repr(cases.Leaky(4)) == "Leaky(4)"
    assert repr(cases.Doubled(jrnn.lstm(4))).endswith("Doubled(cell=lstm(4))")  # a dataclass' own


@pytest.mark.smoke
def test_misspelt_options_are_refused():
    with pytest.raises(TypeError, match="forget_bais"):
        jrnn.lstm(4, forget_bais=1.0)
    for name in jrnn.__all__:
        value = getattr(jrnn, name)
        if inspect.isfunction(value):
            kinds = [parameter.kind for parameter in inspect.signature(value).parameters.values()]
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name
