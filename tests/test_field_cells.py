"""The cells of the field against their equations, in NumPy (values) and JAX (gradients), in float64.

An oracle is ``(xp, p, x, *state) -> (state, y)`` for one unbatched step, straight from the paper or from the
docstring; `xp` is `numpy` or `jax.numpy`. Exponential gates are written without their stabiliser.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jrnn
from jrnn.cells import delta
from jrnn.initializers import reservoir, spectral_radius
from tests.conftest import in_loops
from tests.test_cells import fold, sigmoid

GOLDEN = pathlib.Path(__file__).parent / "golden_cells.json"


# --- oracles -----------------------------------------------------------------------------------------------------


def convolve(xp, x, w):
    """Every place sums over the taps of the kernel, zeros around the edge."""
    space = x.shape[:-1]
    pads = [((n - 1) // 2, n - 1 - (n - 1) // 2) for n in w.shape[:-2]]
    x = xp.pad(x, [*pads, (0, 0)])
    taps = np.ndindex(*w.shape[:-2])
    return sum(x[tuple(slice(t, t + n) for t, n in zip(tap, space, strict=True))] @ w[tap] for tap in taps)


def conv_lstm(xp, p, x, h, c):
    z = convolve(xp, x, p["w_ih"]) + convolve(xp, h, p["w_hh"]) + p["b"]
    n = h.shape[-1]
    i, f, g, o = (z[..., k * n : (k + 1) * n] for k in range(4))
    c = sigmoid(xp, f) * c + sigmoid(xp, i) * xp.tanh(g)
    h = sigmoid(xp, o) * xp.tanh(c)
    return (h, c), h


def conv_gru(reset):
    def step(xp, p, x, h):
        n = h.shape[-1]
        blocks = [slice(k * n, (k + 1) * n) for k in range(3)]
        u = [convolve(xp, x, p["w_ih"][..., s]) + p["b"][s] for s in blocks]
        r, z = (sigmoid(xp, u[k] + convolve(xp, h, p["w_hh"][..., blocks[k]])) for k in (0, 1))
        if reset == "after":
            new = xp.tanh(u[2] + r * (convolve(xp, h, p["w_hh"][..., blocks[2]]) + p["b_hn"]))
        else:
            new = xp.tanh(u[2] + convolve(xp, r * h, p["w_hh"][..., blocks[2]]))
        h = (1 - z) * new + z * h
        return (h,), h

    return step


def cornn(xp, p, x, h, z):
    n = h.shape[0]
    force = xp.tanh(x @ p["w_ih"] + h @ p["w_hh"][:n] + z @ p["w_hh"][n:] + p["b"])
    z = z + 0.1 * (force - 2.0 * h - 3.0 * z)
    h = h + 0.1 * z
    return (h, z), h


def lem(xp, p, x, h, z):
    n = h.shape[0]
    u = x @ p["w_ih"] + p["b"]
    v = h @ p["w_hh"]
    s = 0.7 * sigmoid(xp, u[:n] + v[:n])
    r = 0.7 * sigmoid(xp, u[n : 2 * n] + v[n : 2 * n])
    z = (1 - s) * z + s * xp.tanh(u[2 * n : 3 * n] + v[2 * n :])
    h = (1 - r) * h + r * xp.tanh(u[3 * n :] + z @ p["w_zh"])
    return (h, z), h


def antisymmetric(xp, p, x, h):
    a = p["w_hh"] - p["w_hh"].T - 0.01 * np.eye(h.shape[0])
    h = h + 0.1 * xp.tanh(x @ p["w_ih"] + h @ a + p["b"])
    return (h,), h


def gated_antisymmetric(xp, p, x, h):
    n = h.shape[0]
    a = p["w_hh"] - p["w_hh"].T - 0.2 * np.eye(n)
    u = x @ p["w_ih"] + p["b"]
    h = h + 0.5 * sigmoid(xp, u[:n] + h @ a) * xp.tanh(u[n:] + h @ a)
    return (h,), h


def exponential(xp, a):
    """By its series, of ``a / 2^10``, squared ten times."""
    a = a / 2**10
    term = total = np.eye(a.shape[0])
    for k in range(1, 12):
        term = term @ a / k
        total = total + term
    for _ in range(10):
        total = total @ total
    return total


def orthogonal(xp, p, x, h):
    z = x @ p["w_ih"] + h @ exponential(xp, p["w_hh"] - p["w_hh"].T) + p["b"]
    h = xp.sign(z) * xp.maximum(xp.abs(z) + p["b_mod"], 0)
    return (h,), h


def cayley(xp, p, x, h):
    a, eye = p["w_hh"] - p["w_hh"].T, np.eye(h.shape[0])
    h = xp.tanh(x @ p["w_ih"] + h @ (xp.linalg.inv(eye + a) @ (eye - a)) + p["b"])
    return (h,), h


def clockwork(xp, p, x, h, clock):
    """Two groups of two units with the periods 3 and 1, the slow one first."""
    slow, fast = h[:2], h[2:]
    u = x @ p["w_ih"] + p["b"]
    new_slow = xp.tanh(u[:2] + slow @ p["w_hh"][:2, :2])  # fed by itself alone
    new_fast = xp.tanh(u[2:] + slow @ p["w_hh"][:2, 2:] + fast @ p["w_hh"][2:, 2:])
    h = xp.concatenate([xp.where(clock % 3 == 0, new_slow, slow), new_fast])
    return (h, (clock + 1) % 3), h


def narx(xp, p, x, outputs, pending):
    """Delays 1 and 3, a window of two inputs."""
    z = x @ p["w_ih"][0] + pending[0] + xp.concatenate([outputs[0], outputs[2]]) @ p["w_hh"] + p["b"]
    y = xp.tanh(z) @ p["w_ho"] + p["b_o"]
    return (xp.stack([y, outputs[0], outputs[1]]), (x @ p["w_ih"][1])[None]), y


def echo_state(xp, p, x, h):
    h = 0.7 * h + 0.3 * xp.tanh(x @ p["w_ih"] + h @ p["w_hh"] + p["b"])
    return (h,), h


def slstm(xp, p, x, h, c, n, m):
    """Two heads of two units. The memory in the open: its scale is exp(m)."""
    c, n = c * xp.exp(m), n * xp.exp(m)
    u = x @ p["w_ih"] + p["b"]
    v = [xp.concatenate([h[2 * k : 2 * k + 2] @ p["w_hh"][k][:, 2 * g : 2 * g + 2] for k in (0, 1)]) for g in range(4)]
    i, f, z, o = (u[4 * g : 4 * g + 4] + v[g] for g in range(4))
    m = xp.where(n == 0, i, xp.maximum(xp.log(sigmoid(xp, f)) + m, i))
    c = sigmoid(xp, f) * c + xp.exp(i) * xp.tanh(z)
    n = sigmoid(xp, f) * n + xp.exp(i)
    h = sigmoid(xp, o) * c / n
    return (h, c / xp.exp(m), n / xp.exp(m), m), h


def mlstm(xp, p, x, c, n, m):
    """Two heads of two units. The memory in the open: its scale is exp(m)."""
    u = x @ p["w_ih"] + p["b"]
    cs, ns, ms, ys = [], [], [], []
    for k in range(2):
        q, key, v, o = (u[4 * j + 2 * k : 4 * j + 2 * k + 2] for j in range(4))
        i, f = u[16 + k], sigmoid(xp, u[18 + k])
        key = key / np.sqrt(2)
        memory = f * c[k] * xp.exp(m[k]) + xp.exp(i) * xp.outer(key, v)
        norm = f * n[k] * xp.exp(m[k]) + xp.exp(i) * key
        ys.append(sigmoid(xp, o) * (q @ memory) / xp.maximum(xp.abs(norm @ q), 1.0))
        ms.append(xp.maximum(xp.log(f) + m[k], i))
        cs.append(memory / xp.exp(ms[-1]))
        ns.append(norm / xp.exp(ms[-1]))
    return (xp.stack(cs), xp.stack(ns), xp.stack(ms)), xp.concatenate(ys)


def softplus(xp, z):
    return xp.log(1 + xp.exp(z))


def ssd(xp, p, x, s):
    """Two heads of two features, three states for each."""
    u = x @ p["w_ih"]
    states, ys = [], []
    for k in range(2):
        value, b, c = u[2 * k : 2 * k + 2], u[4:7], u[7:10]
        dt = softplus(xp, u[10 + k] + p["b_dt"][k])
        a = xp.exp(-xp.exp(p["a_log"][k]) * dt)
        states.append(a * s[k] + dt * xp.outer(b, value))
        ys.append(c @ states[-1] + p["d"][k] * value)
    return (xp.stack(states),), xp.concatenate(ys)


def gated_delta_net(xp, p, x, s):
    """Two heads with keys of three features and values of two."""
    u = x @ p["w_ih"]
    states, ys = [], []
    for k in range(2):
        q, key, value = u[3 * k : 3 * k + 3], u[6 + 3 * k : 9 + 3 * k], u[12 + 2 * k : 14 + 2 * k]
        q = q / xp.sqrt(q @ q + 1e-6) / np.sqrt(3)
        key = key / xp.sqrt(key @ key + 1e-6)
        beta = sigmoid(xp, u[16 + k])
        a = xp.exp(-xp.exp(p["a_log"][k]) * softplus(xp, u[18 + k] + p["b_dt"][k]))
        states.append(a * (np.eye(3) - beta * xp.outer(key, key)) @ s[k] + beta * xp.outer(key, value))
        ys.append(q @ states[-1])
    return (xp.stack(states),), xp.concatenate(ys)


def block_gru(norm):
    def step(xp, p, x, h):
        """Two blocks of two units."""
        v = [xp.concatenate([h[:2] @ p["w_hh"][0][:, s], h[2:] @ p["w_hh"][1][:, s]]) for s in THIRDS]
        z = x @ p["w_ih"] + p["b"] + xp.concatenate(v)
        z = z - xp.mean(z) if norm == "layer" else z
        z = z / xp.sqrt(xp.mean(z * z) + 1e-4) * p["scale"] + p["shift"]
        update = sigmoid(xp, z[8:] - 1)
        h = update * xp.tanh(sigmoid(xp, z[:4]) * z[4:8]) + (1 - update) * h
        return (h,), h

    return step


THIRDS = [slice(0, 2), slice(2, 4), slice(4, 6)]


CELLS = {
    "conv_lstm_1": (jrnn.conv_lstm(2, (3,)), (4, 3), conv_lstm),
    "conv_lstm_2": (jrnn.conv_lstm(2, (3, 2)), (3, 4, 2), conv_lstm),
    "conv_lstm_3": (jrnn.conv_lstm(2, (1, 3, 2)), (2, 3, 2, 1), conv_lstm),
    "conv_gru_1": (jrnn.conv_gru(2, (2,)), (4, 3), conv_gru("after")),
    "conv_gru_2": (jrnn.conv_gru(2, 3, "before"), (3, 4, 2), conv_gru("before")),
    "conv_gru_3": (jrnn.conv_gru(2, (2, 1, 3)), (2, 2, 3, 1), conv_gru("after")),
    "cornn": (jrnn.cornn(4, dt=0.1, gamma=2.0, epsilon=3.0), 3, cornn),
    "lem": (jrnn.lem(4, dt=0.7), 3, lem),
    "antisymmetric": (jrnn.antisymmetric(4), 3, antisymmetric),
    "antisymmetric_gated": (
        jrnn.antisymmetric(4, gated=True, step_size=0.5, diffusion=0.2), 3, gated_antisymmetric,
    ),
    "orthogonal_rnn": (jrnn.orthogonal_rnn(4), 3, orthogonal),
    "orthogonal_rnn_cayley": (jrnn.orthogonal_rnn(4, activation="tanh", map="cayley"), 3, cayley),
    "clockwork": (jrnn.clockwork(4, periods=(3, 1)), 3, clockwork),
    "narx": (jrnn.narx(4, 2, delays=(1, 3), window=2), 3, narx),
    "echo_state": (jrnn.echo_state(4, leak=0.3, density=0.5), 3, echo_state),
    "slstm": (jrnn.slstm(4, heads=2), 3, slstm),
    "mlstm": (jrnn.mlstm(4, heads=2), 3, mlstm),
    "ssd": (jrnn.ssd(4, heads=2, state=3), 3, ssd),
    "gated_delta_net": (jrnn.gated_delta_net(4, heads=2, key_features=3), 3, gated_delta_net),
    "block_gru": (jrnn.block_gru(4, blocks=2), 3, block_gru("rms")),
    "block_gru_layer": (jrnn.block_gru(4, blocks=2, norm="layer"), 3, block_gru("layer")),
}  # fmt: skip
# Parameters without a gradient: those of a reservoir, the size of a map, weights that a Clockwork network lacks.
FIXED = {"echo_state": ("w_ih", "w_hh", "b")}
T = 5


@pytest.fixture
def case(request, x64):
    """A cell, its oracle, and random float64 parameters (biases and small vectors too), state and inputs."""
    name = request.param
    cell, features, step = CELLS[name]
    rng = np.random.default_rng(0)
    params = cell.init(jax.random.key(0), features)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * rng.normal(size=p.shape), params)

    def start(leaf):
        return rng.normal(size=leaf.shape) if leaf.dtype != jnp.int32 else np.asarray(leaf) + 1

    state = jax.tree.map(start, cell.initial_state(params, ()))
    if name == "slstm":
        state = state._replace(n=np.abs(state.n))
    xs = rng.normal(size=(T, *(features if isinstance(features, tuple) else (features,))))
    return name, cell, step, params, state, xs


every_cell = pytest.mark.parametrize("case", CELLS, indirect=True)


@every_cell
@pytest.mark.parametrize("backend", [None, "reference"])
def test_values_equal_the_equations_in_numpy(case, backend):
    _, cell, step, params, state, xs = case
    for start in (state, jax.tree.map(np.asarray, cell.initial_state(params, ()))):
        expected_state, expected = fold(np, step, params, tuple(start), xs)
        got_state, got = jrnn.unroll(cell, params, xs, start, backend=backend)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, atol=1e-12)
        for a, b in zip(got_state, expected_state, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
@every_cell
def test_every_gradient_equals_that_of_the_equations(case):
    name, cell, step, params, state, xs = case
    rng = np.random.default_rng(1)
    weights = rng.normal(size=jax.eval_shape(lambda: jrnn.unroll(cell, params, xs, state))[1].shape)
    counts = [isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 for leaf in state]
    ends = [rng.normal(size=leaf.shape) for leaf in state]

    def loss(run):
        def total(params, floats, xs):
            given = iter(floats)
            last, ys = run(
                params, type(state)(*(next(given) if c else s for c, s in zip(counts, state, strict=True))), xs
            )
            return jnp.sum(ys * weights) + sum(jnp.sum(s * w) for s, w, c in zip(last, ends, counts, strict=True) if c)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))

    args = (jax.tree.map(jnp.asarray, params), [jnp.asarray(s) for s, c in zip(state, counts, strict=True) if c], xs)
    got = loss(lambda p, s, x: jrnn.unroll(cell, p, x, s))(*args)
    expected = loss(lambda p, s, x: fold(jnp, step, p, tuple(s), x))(*args)
    for leaf in FIXED.get(name, ()):
        assert float(jnp.abs(expected[0][leaf]).max()) > 0
        expected[0][leaf] = jnp.zeros_like(expected[0][leaf])
    expected[0].pop("space", None), got[0].pop("space", None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        assert np.abs(leaf).max() > 0 or path[-1] in map(jax.tree_util.DictKey, FIXED.get(name, ())), path


@every_cell
@pytest.mark.sampled(3)
def test_float32_is_the_default_and_near_float64(case):
    _, cell, step, params, state, xs = case
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else None), (params, state, xs))
    last, ys = jrnn.unroll(cell, single[0], single[2], single[1])
    assert {a.dtype for a in jax.tree.leaves((last, ys))} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    np.testing.assert_allclose(ys, fold(np, step, params, tuple(state), xs)[1], atol=1e-4)
    assert {a.dtype for a in jax.tree.leaves(cell.init(jax.random.key(0), CELLS[case[0]][1]))} == {jnp.dtype("float32")}


# --- convolutional cells -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras, under NumPy 2
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_equals_keras(ndim):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    layer = getattr(keras.layers, f"ConvLSTM{ndim}D")(
        3, (3, 2, 3)[:ndim], padding="same", recurrent_activation="sigmoid", return_sequences=True, return_state=True
    )
    xs = np.asarray(np.random.default_rng(0).normal(size=(2, 4, *(5, 4, 3)[:ndim], 2)), np.float32)
    layer.build(xs.shape)
    rng = np.random.default_rng(1)
    weights = [np.asarray(0.5 * rng.normal(size=w.shape), np.float32) for w in layer.weights]
    layer.set_weights(weights)
    expected, h, c = layer(xs)
    cell = jrnn.conv_lstm(3, (3, 2, 3)[:ndim])
    params = {**cell.init(jax.random.key(0), xs.shape[2:]), **dict(zip(("w_ih", "w_hh", "b"), weights, strict=True))}
    state, ys = jrnn.unroll(cell, params, np.swapaxes(xs, 0, 1))
    np.testing.assert_allclose(np.swapaxes(ys, 0, 1), expected, atol=2e-6)
    np.testing.assert_allclose(state.h, h, atol=2e-6)
    np.testing.assert_allclose(state.c, c, atol=2e-6)


def test_a_network_of_maps():
    model = jrnn.stack(jrnn.conv_lstm(3, 3), jrnn.dropout(0.5), jrnn.bidirectional(jrnn.conv_gru(2, 3)), jrnn.dense(1))
    with pytest.raises(TypeError, match="in_features"):
        model.init(jax.random.key(0), (4, 5, 2))
    model = jrnn.stack(jrnn.conv_lstm(3, 3), jrnn.dropout(0.5), jrnn.bidirectional(jrnn.conv_gru(2, 3)))
    params = model.init(jax.random.key(0), (4, 5, 2))
    assert model.out_features((4, 5, 2)) == (4, 5, 4)
    xs = jax.random.normal(jax.random.key(1), (6, 2, 3, 4, 5, 2))
    lengths = jnp.array([[6, 0, 3], [1, 2, 6]])
    ys = jrnn.unroll(model, params, xs, lengths=lengths, key=jax.random.key(2))[1]
    assert ys.shape == (6, 2, 3, 4, 5, 4)
    flat = jrnn.unroll(model, params, xs[:, 1, 1])[1]
    np.testing.assert_allclose(jrnn.unroll(model, params, xs)[1][:, 1, 1], flat, atol=1e-6)


convolutional = pytest.mark.parametrize("name", [name for name in CELLS if name.startswith("conv")])


def convolutional_gradients(name, backend):
    """A loss of a convolutional cell with its gradients, of parameters and inputs in float64; and these."""
    cell, features, _ = CELLS[name]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), cell.init(jax.random.key(0), features))
    xs = rng.normal(size=(T, 3, *features))
    marks = {"lengths": np.array([T, 0, 3]), "resets": rng.random((T, 3)) < 0.3}

    def loss(params, xs):
        state, ys = jrnn.unroll(cell, params, xs, **marks, reverse="gru" in name, backend=backend)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in (ys, *state))

    return jax.value_and_grad(loss, (0, 1)), (params, xs)


@convolutional
def test_the_gradient_of_a_kernel_is_one_convolution_after_the_loop(name, x64):
    """A step has the convolutions of the state and their transposes, and none for a kernel, as the plain scan has."""
    cell = CELLS[name][0]
    products = 2 if getattr(cell, "reset", "") == "before" else 1
    counts = []
    for backend in (None, "reference"):
        gradients, arguments = convolutional_gradients(name, backend)
        counts.append(len(in_loops(jax.make_jaxpr(gradients)(*arguments), "conv_general_dilated")))
    assert counts[0] == 2 * products < counts[1]
    assert jrnn.choose_backend(cell, *arguments)[0] == "hoisted"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@convolutional
def test_convolutions_outside_the_loop_equal_those_of_a_plain_scan(name, x64):
    results = []
    for backend in (None, "reference"):
        gradients, arguments = convolutional_gradients(name, backend)
        results.append(jax.jit(gradients)(*arguments))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), *results)


def test_the_weights_of_a_map_serve_maps_of_any_size():
    cell = jrnn.conv_lstm(2, (3,))
    params = cell.init(jax.random.key(0), (4, 1))
    xs = jax.random.normal(jax.random.key(1), (3, 9, 1))
    with pytest.raises(ValueError, match=r"xs: expected \(4,\) places.*put jnp.zeros of that size"):
        jrnn.unroll(cell, params, xs)
    wide = jrnn.unroll(cell, {**params, "space": jnp.zeros(9)}, xs)[1]
    again = jrnn.unroll(cell, cell.init(jax.random.key(0), (9, 1)), xs)[1]
    np.testing.assert_array_equal(wide, again)


# --- orthogonal, reservoirs and readouts -------------------------------------------------------------------------


@pytest.mark.parametrize("map", ["exponential", "cayley"])
def test_an_orthogonal_matrix_stays_so_under_training(map):
    cell = jrnn.orthogonal_rnn(8, map=map)
    params = cell.init(jax.random.key(0), 2)
    first = cell.recurrent_weights(params)
    xs = jax.random.normal(jax.random.key(1), (10, 4, 2))

    @jax.jit
    def train(params):
        loss = lambda p: jnp.mean((jrnn.unroll(cell, p, xs)[1][-1] - 1) ** 2)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))

    for _ in range(20):
        params = train(params)
    q = cell.recurrent_weights(params)
    assert float(jnp.abs(q - first).max()) > 0.05
    np.testing.assert_allclose(q @ q.T, np.eye(8), atol=1e-5)
    linear = jrnn.orthogonal_rnn(8, activation="linear", map=map)
    state = jrnn.HiddenState(jnp.ones(8))
    silent = {**params, "w_ih": jnp.zeros((2, 8)), "b": jnp.zeros(8)}
    silent.pop("b_mod")
    length = jnp.linalg.norm(jrnn.unroll(linear, silent, jnp.zeros((200, 2)), state)[0].h)
    np.testing.assert_allclose(length, 8**0.5, rtol=1e-4)


def test_rotations_are_by_their_angles(x64):
    s = jrnn.initializers.rotations()(jax.random.key(0), (6, 6), jnp.float64)
    angles = np.sort(np.abs(np.asarray(s)[(0, 2, 4), (1, 3, 5)]))
    assert np.count_nonzero(s) == 3
    turned = np.angle(np.linalg.eigvals(jax.scipy.linalg.expm(s - s.T)))
    np.testing.assert_allclose(np.sort(np.abs(turned))[::2], angles, atol=1e-12)


@pytest.mark.parametrize(
    ("units", "density", "radius"), [(1, 1.0, 0.5), (5, 0.01, 1.2), (60, 0.1, 0.9), (40, 1.0, 2.0)]
)
@pytest.mark.sampled(3)
def test_spectral_radius_of_a_reservoir(units, density, radius):
    for seed in range(3):
        w = np.asarray(reservoir(radius, density)(jax.random.key(seed), (units, units)), np.float64)
        assert ((w != 0).sum(0) == max(1, round(density * units))).all()
        np.testing.assert_allclose(np.abs(np.linalg.eigvals(w)).max(), radius, rtol=1e-4)
    np.testing.assert_allclose(spectral_radius(jnp.array([[0.5, 100.0], [0.0, 0.25]])), 0.5, rtol=1e-4)


def mackey_glass(count, tau=17, substeps=10):
    """Runge-Kutta of order four for ``x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x``, one value a unit of time."""
    step, delay = 1.0 / substeps, tau * substeps
    x = np.full(count * substeps + delay + 1, 1.2)
    for t in range(delay, len(x) - 1):
        ends = x[t - delay], x[t - delay + 1]
        late = (ends[0], sum(ends) / 2, sum(ends) / 2, ends[1])
        slope = lambda y, d: 0.2 * d / (1 + d**10) - 0.1 * y
        k1 = slope(x[t], late[0])
        k2 = slope(x[t] + step / 2 * k1, late[1])
        k3 = slope(x[t] + step / 2 * k2, late[2])
        k4 = slope(x[t] + step * k3, late[3])
        x[t + 1] = x[t] + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x[delay + 1 :: substeps]


def test_an_echo_state_network_on_mackey_glass():
    """Six steps ahead, on steps that the readout was not solved on: the normalised error is below 1%."""
    series = np.asarray(mackey_glass(2500)[300:, None] - 0.93, np.float32)
    cell = jrnn.echo_state(200, spectral_radius=0.95, leak=0.5, bias_scale=0.2)
    params = cell.init(jax.random.key(0), 1)
    _, states = jrnn.unroll(cell, params, series[:-6])
    targets, train = series[6:], 1500
    readout = jrnn.ridge(states[:train], targets[:train], 1e-7, washout=100)
    error = jrnn.unroll(jrnn.dense(1), readout, states[train:])[1] - targets[train:]
    nrmse = float(jnp.sqrt(jnp.mean(error**2)) / np.std(targets[train:]))
    assert nrmse < 0.01, nrmse


def test_ridge_equals_the_normal_equations(x64):
    rng = np.random.default_rng(0)
    states, targets = rng.normal(size=(9, 2, 3)), rng.normal(size=(9, 2, 2))
    lengths, mask = np.array([9, 6]), rng.random((9, 2)) < 0.8
    counted = mask & (np.arange(9)[:, None] < lengths) & (np.arange(9)[:, None] >= 2)
    x, y = states[counted], targets[counted]
    centred = x - x.mean(0)
    w = np.linalg.solve(centred.T @ centred + 0.3 * np.eye(3), centred.T @ (y - y.mean(0)))
    dirty = np.where(counted[..., None], states, np.nan), np.where(counted[..., None], targets, np.inf)
    got = jrnn.ridge(*dirty, 0.3, washout=2, lengths=lengths, mask=mask)
    np.testing.assert_allclose(got["w"], w, atol=1e-12)
    np.testing.assert_allclose(got["b"], y.mean(0) - x.mean(0) @ w, atol=1e-12)


# --- matrices for a state ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlstm", "ssd", "gated_delta_net"])
@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_steps_equal_single_steps(name, reverse, x64):
    """Over two chunks and a part of one, with resets, lengths and a state; every gradient."""
    cell, features, _ = CELLS[name]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), cell.init(jax.random.key(0), features))
    xs = jnp.asarray(rng.normal(size=(150, 3, features)))
    state = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), cell.initial_state(params, (3,)))
    flags = {"lengths": np.array([150, 101, 3]), "resets": rng.random((150, 3)) < 0.02, "reverse": reverse}
    assert jrnn.choose_backend(cell, params, xs)[0] == "chunkwise"

    def loss(params, xs, state, backend):
        last, ys = jrnn.unroll(cell, params, xs, state, backend=backend, **flags)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(jnp.cos(s)) for s in last)

    results = [
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)(params, xs, state, backend)
        for backend in ("chunkwise", "reference")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), *results)


@pytest.mark.parametrize("cell", [jrnn.slstm(2), jrnn.mlstm(2)], ids=repr)
@pytest.mark.parametrize("size", [-300.0, 300.0])
@pytest.mark.sampled(3)
def test_exponential_gates_do_not_overflow(cell, size):
    params = cell.init(jax.random.key(0), 1)
    params = {**params, "b": params["b"] + size}
    xs = jax.random.normal(jax.random.key(1), (70, 2, 1)) * 50

    def total(params, xs):
        return jnp.sum(jrnn.unroll(cell, params, xs, resets=jnp.zeros((70, 2), bool).at[40].set(True))[1] ** 2)

    for leaf in jax.tree.leaves(jax.value_and_grad(total, argnums=(0, 1))(params, xs)):
        assert jnp.isfinite(leaf).all()


def test_only_cells_with_a_form_for_it_run_in_chunks():
    params = jrnn.gru(3).init(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=r"backend: 'chunkwise' cannot run gru.*does not define how to run many steps"):
        jrnn.unroll(jrnn.gru(3), params, jnp.ones((4, 2)), backend="chunkwise")
    assert "chunkwise" not in jrnn.choose_backend(jrnn.gru(3), params, jnp.ones((4, 2)))[1]


# --- golden values -----------------------------------------------------------------------------------------------


def wave(*shape, scale=1.0, shift=0.0):
    """Numbers between -scale and scale, the same in every library."""
    return scale * np.sin(1.7 * np.arange(np.prod(shape)) + shift).reshape(shape)


def golden(name):
    return {key: np.asarray(value) for key, value in json.loads(GOLDEN.read_text())[name].items()}


def run_golden(name, cell, params, xs, state=None):
    last, ys = jrnn.unroll(cell, jax.tree.map(jnp.asarray, params), jnp.asarray(xs), state)
    np.testing.assert_allclose(ys, golden(name)["ys"], atol=1e-12)
    return last


def test_cornn_gives_what_its_authors_code_gives(x64):
    """`coRNNCell` of tk-rusch/coRNN, whose weights are those of [x, z, h]."""
    w, b = wave(3, 2 + 3 + 3), wave(3, shift=0.5)
    params = {"w_ih": w[:, :2].T, "w_hh": np.concatenate([w[:, 5:].T, w[:, 2:5].T]), "b": b}
    last = run_golden("cornn", jrnn.cornn(3), params, wave(20, 2, 2, shift=0.3))
    np.testing.assert_allclose(last.z, golden("cornn")["z"], atol=1e-12)


def test_lem_gives_what_its_authors_code_gives(x64):
    """`LEMCell` of tk-rusch/LEM, whose gates come in the order r, s, h, z, each product with a bias of its own."""
    w, b = wave(12, 2), wave(12, shift=0.5)
    v, c = wave(9, 3, shift=0.7), wave(9, shift=0.9)
    t, d = wave(3, 3, shift=1.1), wave(3, shift=1.3)
    order = np.concatenate([np.arange(3, 6), np.arange(3), np.arange(9, 12), np.arange(6, 9)])
    turn = np.concatenate([np.arange(3, 6), np.arange(3), np.arange(6, 9)])
    bias = b[order] + np.concatenate([c[turn], d])
    params = {"w_ih": w[order].T, "w_hh": v[turn].T, "w_zh": t.T, "b": bias}
    last = run_golden("lem", jrnn.lem(3, dt=0.9), params, wave(20, 2, 2, shift=0.3))
    np.testing.assert_allclose(last.z, golden("lem")["z"], atol=1e-12)


def test_slstm_gives_what_its_authors_code_gives(x64):
    """`slstm_forward_pointwise` of NX-AI/xlstm, with one head."""
    params = {"w_ih": wave(2, 12), "w_hh": wave(1, 3, 12, shift=0.5), "b": wave(12, scale=2.0, shift=0.7)}
    last = run_golden("slstm", jrnn.slstm(3), params, wave(20, 2, 2, shift=0.3))
    for name, value in zip("hcnm", last, strict=True):
        np.testing.assert_allclose(value, golden("slstm")[name], atol=1e-12)


def test_mlstm_gives_what_its_authors_code_gives(x64):
    """`parallel_stabilized_simple` of NX-AI/xlstm without its epsilon, on what the cell projects."""
    params = {"w_ih": wave(2, 4 * 6 + 4), "b": wave(4 * 6 + 4, scale=2.0, shift=0.7)}
    run_golden("mlstm", jrnn.mlstm(6, heads=2), params, wave(20, 2, 2, shift=0.3))


def test_ssd_gives_what_its_authors_code_gives(x64):
    """`ssd_minimal_discrete` of state-spaces/mamba, on what the cell projects."""
    params = {"w_ih": wave(2, 6 + 4 + 4 + 2), "b_dt": wave(2), "a_log": wave(2, shift=0.2), "d": np.zeros(2)}
    last = run_golden("ssd", jrnn.ssd(6, heads=2, state=4), params, wave(20, 2, 2, shift=0.3))
    np.testing.assert_allclose(last.s, golden("ssd")["s"], atol=1e-12)


def test_gated_delta_net_gives_what_its_authors_code_gives(x64):
    """`naive_recurrent_gated_delta_rule` of flash-linear-attention, on what the cell projects."""
    params = {"w_ih": wave(2, 8 + 8 + 6 + 4), "b_dt": wave(2), "a_log": wave(2, shift=0.2)}
    cell = jrnn.gated_delta_net(6, heads=2, key_features=4)
    last = run_golden("gated_delta_net", cell, params, wave(20, 2, 2, shift=0.3))
    np.testing.assert_allclose(last.s, golden("gated_delta_net")["s"], atol=1e-12)


# --- stacks with connections to all layers -----------------------------------------------------------------------


def test_skip_connects_everything():
    model = jrnn.skip(jrnn.gru(4), jrnn.elman(3), jrnn.lstm(2))
    params = model.init(jax.random.key(0), 5)
    xs = jax.random.normal(jax.random.key(1), (6, 2, 5))
    a = jrnn.unroll(jrnn.gru(4), params[0], xs)[1]
    b = jrnn.unroll(jrnn.elman(3), params[1], jnp.concatenate([xs, a], -1))[1]
    c = jrnn.unroll(jrnn.lstm(2), params[2], jnp.concatenate([xs, b], -1))[1]
    np.testing.assert_allclose(jrnn.unroll(model, params, xs)[1], jnp.concatenate([a, b, c], -1), atol=1e-6)
    assert model.out_features(5) == 9


# --- bad input ---------------------------------------------------------------------------------------------------


def complex_inputs(cell, features):
    def run():
        shape = features if isinstance(features, tuple) else (features,)
        jrnn.unroll(cell, cell.init(jax.random.key(0), features), jnp.ones((5, 2, *shape), jnp.complex64))

    return run


BAD = {
    "heads_mlstm": (lambda: jrnn.mlstm(6, heads=4), ValueError, "heads: .*number that divides hidden=6, got 4"),
    "heads_slstm": (lambda: jrnn.slstm(6, heads=4), ValueError, "heads: .*number that divides hidden=6, got 4"),
    "heads_ssd": (lambda: jrnn.ssd(6, heads=0), ValueError, "heads: expected a positive int, got 0"),
    "heads_delta": (lambda: jrnn.gated_delta_net(6, heads=2.0), TypeError, "heads: expected a positive int, got 2.0"),
    "blocks": (lambda: jrnn.block_gru(6, blocks=4), ValueError, "blocks: expected a number that divides hidden=6"),
    "norm": (lambda: jrnn.block_gru(8, norm="batch"), ValueError, 'norm: expected "rms" or "layer"'),
    "radius_negative": (
        lambda: jrnn.echo_state(5, spectral_radius=-0.5), ValueError, "spectral_radius: .*float above 0.0, got -0.5",
    ),
    "radius_nan": (lambda: jrnn.echo_state(5, spectral_radius=float("nan")), ValueError, "spectral_radius: .*got nan"),
    "radius_text": (lambda: jrnn.echo_state(5, spectral_radius="0.9"), TypeError, "spectral_radius: expected a finite"),
    "leak": (lambda: jrnn.echo_state(5, leak=1.5), ValueError, r"leak: expected a rate in \(0, 1\], got 1.5"),
    "density": (lambda: jrnn.echo_state(5, density=1.5), ValueError, r"density: expected a share.*got 1.5"),
    "period_zero": (lambda: jrnn.clockwork(4, periods=(1, 0)), ValueError, "periods: expected a positive int, got 0"),
    "period_number": (lambda: jrnn.clockwork(4, periods=2), TypeError, "periods: expected a tuple"),
    "periods_count": (
        lambda: jrnn.clockwork(4, periods=(1, 2, 4)), ValueError, "periods: expected a number of periods that divides",
    ),
    "periods_long": (
        lambda: jrnn.clockwork(2, periods=(2**17 - 1, 2**19 - 1)), ValueError, "periods: expected .* below 2",
    ),
    "delay_zero": (lambda: jrnn.narx(4, 2, delays=0), ValueError, "delays: expected a positive int, got 0"),
    "delay_twice": (lambda: jrnn.narx(4, 2, delays=(1, 1)), ValueError, "delays: expected different delays"),
    "dt": (lambda: jrnn.cornn(4, dt=0.0), ValueError, "dt: expected a finite float above 0.0, got 0.0"),
    "dt_lem": (lambda: jrnn.lem(4, dt=-1), ValueError, "dt: expected a finite float above 0.0, got -1"),
    "step_size": (lambda: jrnn.antisymmetric(4, step_size=True), TypeError, "step_size: expected a finite float"),
    "map": (lambda: jrnn.orthogonal_rnn(4, map="polar"), ValueError, 'map: expected "exponential" or "cayley"'),
    "kernel_axes": (lambda: jrnn.conv_lstm(4, (3,) * 4), ValueError, "kernel: expected a size for each of 1, 2 or 3"),
    "kernel_text": (lambda: jrnn.conv_gru(4, "same"), TypeError, "kernel: expected a positive int for a square"),
    "kernel_zero": (lambda: jrnn.conv_gru(4, (3, 0)), ValueError, "kernel: expected a positive int, got 0"),
    "reset": (lambda: jrnn.conv_gru(4, 3, "during"), ValueError, 'reset: expected "after" or "before"'),
    "conv_features": (
        lambda: jrnn.conv_lstm(4, 3).init(jax.random.key(0), 3), ValueError, r"in_features: .*tuple \(H, W, C\)",
    ),
    "conv_xs": (
        lambda: jrnn.unroll(jrnn.conv_lstm(4, 3), {}, jnp.ones((5, 3, 2))), ValueError, r"xs: .*\(T, \*B, H, W, F\)",
    ),
    "conv_channels": (
        lambda: jrnn.unroll(CONV, CONV.init(jax.random.key(0), (4, 4, 2)), jnp.ones((5, 4, 4, 3))),
        ValueError, "xs: expected 2 features",
    ),
    "conv_params": (lambda: jrnn.unroll(CONV, {"w_hh": 1}, jnp.ones((5, 4, 4, 3))), ValueError, "params: expected"),
    "skip_embed": (lambda: jrnn.skip(jrnn.embed(4, 3)), ValueError, r"layers\[0\]: expected a layer whose input has"),
    "skip_bidirectional": (
        lambda: jrnn.skip(jrnn.bidirectional(jrnn.gru(3))), ValueError, r"layers\[0\]: .*layer that has a step",
    ),
    "alpha": (lambda: jrnn.ridge(jnp.ones((5, 2)), jnp.ones((5, 1)), 0.0), ValueError, "alpha: expected a finite"),
    "washout": (
        lambda: jrnn.ridge(jnp.ones((5, 2)), jnp.ones((5, 1)), 1.0, washout=5), ValueError, "washout: expected fewer",
    ),
    "targets": (
        lambda: jrnn.ridge(jnp.ones((5, 2)), jnp.ones((4, 1)), 1.0), ValueError, "targets: expected the time and batch",
    ),
    "targets_integers": (
        lambda: jrnn.ridge(jnp.ones((5, 2)), jnp.ones((5, 1), int), 1.0), TypeError, "targets: expected floats",
    ),
    **{
        f"complex_{name}": (complex_inputs(cell, features), TypeError, "xs: expected floats, got complex64")
        for name, (cell, features, _) in CELLS.items()
    },
}  # fmt: skip
CONV = jrnn.conv_lstm(2, 3)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_chunks_of_the_delta_rule_call_no_solver():
    """A CPU solves triangular systems one at a time, in calls of LAPACK whose threads wait for each other."""
    cell = jrnn.gated_delta_net(4, heads=2)
    params, xs = cell.init(jax.random.key(0), 3), jnp.ones((9, 2, 3))
    program = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(jrnn.unroll(cell, p, xs, backend="chunkwise")[1])))(params)
    assert "triangular_solve" not in str(program)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_inverse_of_a_triangular_matrix_and_its_derivatives(x64, size):
    below = jnp.tril(jax.random.normal(jax.random.key(0), (3, size, size)), -1)
    np.testing.assert_allclose(delta._inverse(below), np.linalg.inv(np.eye(size) + below), rtol=1e-12, atol=1e-12)
    lower = lambda a: delta._inverse(jnp.tril(a, -1))
    check_grads(lower, (below,), order=2, rtol=1e-5, atol=1e-5)
