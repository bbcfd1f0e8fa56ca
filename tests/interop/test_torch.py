"""Parity with PyTorch: every output, state and gradient of its recurrent modules, and exact round trips of weights."""

import itertools
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.interop import from_torch, to_torch

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, F, H, P = 7, 4, 3, 5, 2
LENGTHS = np.array([4, 7, 1, 5])  # not sorted
KINDS = {
    "tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "projected lstm": (nn.LSTM, {"proj_size": P}),
    "gru": (nn.GRU, {}),
}
CELLS = {
    "tanh": (nn.RNNCell, {"nonlinearity": "tanh"}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _torch_settings():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind, dtype=torch.float32, **options):
    build, more = KINDS[kind]
    return build(F, H, dtype=dtype, **more, **options)


def random_params(model, dtype="float32"):
    """Parameters of the right shapes, all of them random, biases too; quicker than `init`, which orthogonalises."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda key: model.init(key, F), jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape).astype(jnp.dtype(dtype))), shapes)


def close(actual, expected, dtype):
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=tolerance, atol=tolerance)


def draw(rng, shape, dtype):
    return rng.normal(size=shape).astype(str(dtype).removeprefix("torch."))


def as_states(model, leaves):
    """PyTorch's (h_0, c_0), each (layers * directions, B, ...), as the state of the model."""
    index = itertools.count()

    def of(layer):
        if isinstance(layer, type(jrnn.stack(jrnn.dropout(0.5)))):
            return tuple(of(part) for part in layer.layers)
        if isinstance(layer, type(jrnn.dropout(0.5))):
            return ()
        if isinstance(layer, type(jrnn.bidirectional(jrnn.gru(1)))):
            return {"forward": of(layer.forward), "backward": of(layer.backward)}
        i = next(index)
        state = jrnn.LSTMState if len(leaves) == 2 else jrnn.HiddenState
        return state(*(leaf[i] for leaf in leaves))

    return of(model)


def from_states(state, fields):
    """A model's state as PyTorch's (h_n, c_n)."""
    found = []

    def visit(part):
        if isinstance(part, dict):
            visit(part["forward"])
            visit(part["backward"])
        elif hasattr(part, "_fields"):
            found.append(part)
        else:
            for entry in part:
                visit(entry)

    visit(state)
    return [np.stack([getattr(part, field) for part in found]) for field in fields]


def by_suffix(module, params):
    """Each cell's parameters (or gradients) with the suffix of their names in PyTorch."""
    layers = [p for p in (params if isinstance(params, tuple) else (params,)) if p]
    for i, layer in enumerate(layers):
        if module.bidirectional:
            yield f"_l{i}", layer["forward"]
            yield f"_l{i}_reverse", layer["backward"]
        else:
            yield f"_l{i}", layer


def check_gradients(module, leaves, suffix, dtype):
    """dL/dparams as PyTorch has them: its two biases have one gradient each, and ours one for their sum."""
    of = lambda name: getattr(module, name + suffix).grad.numpy()
    close(leaves["w_ih"], of("weight_ih").T, dtype)
    close(leaves["w_hh"], of("weight_hh").T, dtype)
    if "w_hr" in leaves:
        close(leaves["w_hr"], of("weight_hr").T, dtype)
    close(leaves["b"], of("bias_ih"), dtype)
    if "b_hn" in leaves:
        hidden = leaves["b_hn"].shape[0]
        close(leaves["b"][: 2 * hidden], of("bias_hh")[: 2 * hidden], dtype)
        close(leaves["b_hn"], of("bias_hh")[2 * hidden :], dtype)
    else:
        close(leaves["b"], of("bias_hh"), dtype)


def check_parity(kind, layers, bidirectional, lengths, dtype):
    rng = np.random.default_rng(1)
    module = make(kind, dtype, num_layers=layers, bidirectional=bidirectional)
    model, params = from_torch(module)
    directions = 2 if bidirectional else 1
    out = P if kind == "projected lstm" else H
    xs = draw(rng, (T, B, F), dtype)
    states = [draw(rng, (layers * directions, B, out), dtype)]
    if "lstm" in kind:
        states.append(draw(rng, (layers * directions, B, H), dtype))
    # L is a random linear functional of all outputs and final states.
    weights = [draw(rng, (T, B, directions * out), dtype), *(draw(rng, s.shape, dtype) for s in states)]

    x = torch.tensor(xs, requires_grad=True)
    initial = [torch.tensor(s, requires_grad=True) for s in states]
    packed = x if lengths is None else nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    y, final = module(packed, tuple(initial) if len(initial) == 2 else initial[0])
    if lengths is not None:
        y, _ = nn.utils.rnn.pad_packed_sequence(y, total_length=T)
    final = list(final) if len(initial) == 2 else [final]
    loss = sum((torch.tensor(w) * part).sum() for w, part in zip(weights, [y, *final], strict=True))
    loss.backward()

    def run(params, xs, leaves):
        state, ys = jrnn.unroll(model, params, xs, as_states(model, leaves), lengths=lengths)
        wanted = as_states(model, [jnp.asarray(w) for w in weights[1:]])
        value = (weights[0] * ys).sum()
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(state), strict=True):
            value += (a * b).sum()
        return value, (state, ys)

    if lengths is not None:
        # What stands in our padding must not matter; PyTorch's packing never reads it.
        xs = np.where((np.arange(T)[:, None] < lengths)[..., None], xs, np.array(np.nan, xs.dtype))
    gradient = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))
    (value, (state, ys)), (d_params, d_xs, d_states) = gradient(params, xs, [jnp.asarray(s) for s in states])

    assert ys.dtype == xs.dtype
    np.testing.assert_allclose(value, loss.item(), rtol=TOLERANCE[dtype] * 10, atol=TOLERANCE[dtype] * 10)
    close(ys, y.detach(), dtype)
    for actual, expected in zip(from_states(state, ("h", "c")[: len(states)]), final, strict=True):
        close(actual, expected.detach(), dtype)
    close(d_xs, x.grad, dtype)
    for actual, expected in zip(d_states, initial, strict=True):
        close(actual, expected.grad, dtype)
    for suffix, leaves in by_suffix(module, d_params):
        check_gradients(module, leaves, suffix, dtype)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_ragged_sequences_in_float64(x64, kind, layers, bidirectional):
    check_parity(kind, layers, bidirectional, LENGTHS, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_full_sequences_in_float64(x64, kind):
    check_parity(kind, 3, False, None, torch.float64)


@pytest.mark.parametrize(("layers", "bidirectional", "lengths"), [(1, False, None), (2, True, LENGTHS)])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_in_float32(kind, layers, bidirectional, lengths):
    check_parity(kind, layers, bidirectional, lengths, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", CELLS)
def test_parity_of_cells(kind, dtype):
    with jax.enable_x64(dtype == torch.float64):
        rng = np.random.default_rng(2)
        build, options = CELLS[kind]
        module = build(F, H, dtype=dtype, **options)
        cell, params = from_torch(module)
        fields = 2 if kind == "lstm" else 1
        inputs = [draw(rng, (B, F), dtype), *(draw(rng, (B, H), dtype) for _ in range(fields))]
        weights = [draw(rng, (B, H), dtype) for _ in range(fields)]

        x, *state = (torch.tensor(a, requires_grad=True) for a in inputs)
        new = module(x, tuple(state) if fields == 2 else state[0])
        new = new if fields == 2 else (new,)
        sum((torch.tensor(w) * part).sum() for w, part in zip(weights, new, strict=True)).backward()

        def loss(params, x, *state):
            new, y = cell.step(params, type(cell.initial_state(params, ()))(*state), x)
            assert (y == new.h).all()
            return sum((w * part).sum() for w, part in zip(weights, new, strict=True)), new

        grads, actual = jax.grad(loss, tuple(range(2 + fields)), has_aux=True)(params, *map(jnp.asarray, inputs))
        for a, b in zip(actual, new, strict=True):
            close(a, b.detach(), dtype)
        for a, b in zip(grads[1:], (x, *state), strict=True):
            close(a, b.grad, dtype)
        check_gradients(module, grads[0], "", dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bias_is_a_bias_of_zero(kind):
    module = make(kind, bias=False, num_layers=2)
    model, params = from_torch(module)
    for layer in params:
        for name in layer.keys() & {"b", "b_hn"}:
            assert not np.asarray(layer[name]).any()
    xs = draw(np.random.default_rng(0), (T, B, F), torch.float32)
    close(jrnn.unroll(model, params, xs)[1], module(torch.tensor(xs))[0].detach(), torch.float32)
    build, options = CELLS["gru"]
    assert not np.asarray(from_torch(build(F, H, bias=False, **options))[1]["b"]).any()


def test_batch_first_changes_the_layout_of_data_only():
    module = make("lstm", batch_first=True, bidirectional=True)
    model, params = from_torch(module)
    xs = draw(np.random.default_rng(0), (B, T, F), torch.float32)
    ys = jrnn.unroll(model, params, xs.swapaxes(0, 1))[1]
    close(ys.swapaxes(0, 1), module(torch.tensor(xs))[0].detach(), torch.float32)


# --- the structure of models


@pytest.mark.parametrize(
    ("module", "model"),
    [
        (nn.RNN(F, H, nonlinearity="relu"), jrnn.elman(H, "relu")),
        (nn.LSTM(F, H), jrnn.lstm(H)),
        (nn.LSTM(F, H, proj_size=P), jrnn.projection_lstm(H, P)),
        (nn.GRU(F, H, bidirectional=True), jrnn.bidirectional(jrnn.gru(H))),
        (nn.GRU(F, H, num_layers=2), jrnn.stack(jrnn.gru(H), jrnn.gru(H))),
        (
            nn.LSTM(F, H, num_layers=3, dropout=0.25),
            jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.25), jrnn.lstm(H), jrnn.dropout(0.25), jrnn.lstm(H)),
        ),
        (
            nn.LSTM(F, H, num_layers=2, dropout=0.5, bidirectional=True, proj_size=P),
            jrnn.stack(
                jrnn.bidirectional(jrnn.projection_lstm(H, P)),
                jrnn.dropout(0.5),
                jrnn.bidirectional(jrnn.projection_lstm(H, P)),
            ),
        ),
    ],
    ids=str,
)
def test_models_there_and_back(module, model):
    converted, params = from_torch(module)
    assert converted == model
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shapes(params) == shapes(jax.eval_shape(lambda key: model.init(key, F), jax.random.key(0)))
    back = to_torch(converted, params)
    assert type(back) is type(module)
    for name in ("input_size", "hidden_size", "num_layers", "bidirectional", "dropout", "proj_size", "batch_first"):
        assert getattr(back, name) == getattr(module, name), name
    assert getattr(back, "nonlinearity", None) == getattr(module, "nonlinearity", None)
    # Exact both ways: PyTorch's outputs to the bit, and our parameters to the bit.
    again, params_again = from_torch(back)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    xs = torch.randn(T, B, F)
    close(back.eval()(xs)[0].detach(), module.eval()(xs)[0].detach(), torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dtypes_are_kept_both_ways(x64, dtype):
    model = jrnn.stack(jrnn.bidirectional(jrnn.gru(H)), jrnn.bidirectional(jrnn.gru(H)))
    params = random_params(model, dtype)
    module = to_torch(model, params)
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    assert not module.bias_hh_l0[: 2 * H].any()
    converted, back = from_torch(module)
    assert converted == model
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert {a.dtype for a in jax.tree.leaves(back)} == {jnp.dtype(dtype)}


def test_to_torch_computes_what_the_model_does():
    model = jrnn.stack(jrnn.bidirectional(jrnn.lstm(H)), jrnn.dropout(0.3), jrnn.bidirectional(jrnn.lstm(H)))
    params = random_params(model)
    xs = draw(np.random.default_rng(1), (T, B, F), torch.float32)
    module = to_torch(model, params)
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    close(module.eval()(torch.tensor(xs))[0].detach(), jrnn.unroll(model, params, xs)[1], torch.float32)
    # A stack in a stack is the same model to PyTorch.
    nested = jrnn.stack(jrnn.stack(*model.layers[:2]), model.layers[2])
    again = to_torch(nested, (params[:2], params[2]))
    assert all((a == b).all() for a, b in zip(again.parameters(), module.parameters(), strict=True))


def test_a_key_switches_the_dropout_between_layers_on():
    model, params = from_torch(make("lstm", num_layers=2, dropout=0.5))
    xs = np.ones((T, B, F), np.float32)
    plain = jrnn.unroll(model, params, xs)[1]
    dropped = jrnn.unroll(model, params, xs, key=jax.random.key(0))[1]
    assert not np.allclose(plain, dropped)


def test_parameters_are_copies():
    module = make("gru")
    _, params = from_torch(module)
    before = np.array(params["w_ih"])
    with torch.no_grad():
        module.weight_ih_l0.zero_()
    np.testing.assert_array_equal(params["w_ih"], before)
    back = to_torch(jrnn.gru(H), params)
    with torch.no_grad():
        back.weight_ih_l0.zero_()
    np.testing.assert_array_equal(params["w_ih"], before)


def test_to_torch_leaves_the_global_generator_alone():
    model = jrnn.stack(jrnn.gru(H), jrnn.gru(H))
    params = random_params(model)
    state = torch.get_rng_state()
    to_torch(model, params)
    assert (torch.get_rng_state() == state).all()


# --- errors


class Doubled(nn.LSTM):
    def forward(self, *arguments):
        y, state = super().forward(*arguments)
        return 2 * y, state


def test_from_torch_errors():
    for other in (nn.Linear(2, 2), nn.Sequential(nn.LSTM(2, 2)), "lstm"):
        with pytest.raises(TypeError, match=r"module: expected torch\.nn\.RNN, LSTM, GRU"):
            from_torch(other)
    with pytest.raises(TypeError, match=r"module: .*Doubled, a subclass with a forward of its own"):
        from_torch(Doubled(2, 2))
    with pytest.raises(ValueError, match="module: expected float32 parameters while jax_enable_x64 is off"):
        from_torch(nn.GRU(F, H, dtype=torch.float64))
    with pytest.raises(ValueError, match="module: expected dropout below 1"):
        from_torch(nn.GRU(F, H, num_layers=2, dropout=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of a dropout that does nothing
        assert from_torch(nn.GRU(F, H, dropout=1.0))[0] == jrnn.gru(H)


@pytest.mark.parametrize(
    "model",
    [
        jrnn.gru(H, "before"),
        jrnn.elman(H, "sigmoid"),
        jrnn.peephole_lstm(H),
        jrnn.layer_norm_gru(H),
        jrnn.lstm(H, activation="relu"),
        jrnn.gru(H, gate_activation="tanh"),
        jrnn.projection_lstm(H, H),
        jrnn.dense(H),
        jrnn.residual(jrnn.gru(F)),
        jrnn.stack(jrnn.lstm(H), jrnn.dense(2)),
        jrnn.stack(jrnn.lstm(H), jrnn.gru(H)),
        jrnn.stack(jrnn.lstm(H), jrnn.lstm(H + 1)),
        jrnn.stack(jrnn.elman(H), jrnn.elman(H, "relu")),
        jrnn.stack(jrnn.bidirectional(jrnn.lstm(H)), jrnn.lstm(H)),
        jrnn.bidirectional(jrnn.lstm(H), jrnn.gru(H)),
        jrnn.bidirectional(jrnn.lstm(H), merge="sum"),
        jrnn.stack(jrnn.dropout(0.5), jrnn.lstm(H)),
        jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5)),
        jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5), jrnn.lstm(H), jrnn.lstm(H)),
        jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5), jrnn.lstm(H), jrnn.dropout(0.2), jrnn.lstm(H)),
        jrnn.dropout(0.5),
    ],
    ids=repr,
)
def test_to_torch_refuses_what_pytorch_lacks(model):
    with pytest.raises(TypeError, match="model: expected"):
        to_torch(model, random_params(model))


def test_to_torch_takes_an_activation_by_name_or_as_a_function():
    cell = jrnn.elman(H, jnp.tanh)
    assert to_torch(cell, random_params(cell)).nonlinearity == "tanh"


def test_to_torch_checks_parameters():
    cell = jrnn.gru(H)
    params = random_params(cell)
    with pytest.raises(ValueError, match="params: expected w_hh of shape"):
        to_torch(jrnn.gru(H + 1), {**params, "w_ih": np.zeros((F, 3 * H + 3), np.float32)})
    with pytest.raises(ValueError, match="params: expected a dict with 'b_hn'"):
        to_torch(cell, {name: value for name, value in params.items() if name != "b_hn"})
    with pytest.raises(ValueError, match="params: expected a dict with 'w_ih'"):
        to_torch(cell, (params,))
    with pytest.raises(ValueError, match="params: expected a tuple with one entry for each of 2 layers"):
        to_torch(jrnn.stack(cell, cell), (params,))
    with pytest.raises(ValueError, match="params: expected w_ih of shape"):
        to_torch(jrnn.stack(cell, cell), (params, params))
    with pytest.raises(ValueError, match='params: expected "forward" and "backward"'):
        to_torch(jrnn.bidirectional(cell), params)
    with pytest.raises(ValueError, match="params: expected one dtype"):
        to_torch(cell, {**params, "b": params["b"].astype(jnp.bfloat16)})


def test_without_pytorch_the_error_says_what_to_install():
    code = """
import sys
sys.modules["torch"] = None
import jrnn
for call in (lambda: jrnn.interop.from_torch(None), lambda: jrnn.interop.to_torch(jrnn.gru(2), {})):
    try:
        call()
    except ImportError as error:
        assert "pip install torch" in str(error), error
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
