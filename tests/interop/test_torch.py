"""Parity with PyTorch: every output, state and gradient of its recurrent modules, and exact round trips of weights."""

import itertools
import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.interop import from_torch, load_torch, to_torch
from jrnn.interop._arrays import unpickle_arrays

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
@pytest.mark.sampled(3)
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
    for other in (nn.Conv1d(2, 2, 1), nn.ModuleList([nn.LSTM(2, 2)]), "lstm"):
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
    ("model", "reason"),
    [
        (jrnn.gru(H, "before"), "applies its reset gate after the product"),
        (jrnn.elman(H, "sigmoid"), r"torch\.nn\.RNN has tanh and relu only"),
        (jrnn.peephole_lstm(H), r"torch\.nn has no module with the equations of PeepholeLSTM"),
        (jrnn.layer_norm_gru(H), "LayerNormGRU"),
        (jrnn.lstm(H, activation="relu"), r"torch\.nn\.LSTM has tanh and sigmoid only"),
        (jrnn.gru(H, gate_activation="tanh"), r"torch\.nn\.GRU has tanh and sigmoid only"),
        (jrnn.projection_lstm(H, H), "a proj_size below its hidden_size"),
        (jrnn.residual(jrnn.gru(F)), "Residual"),
        (jrnn.bidirectional(jrnn.lstm(H), jrnn.gru(H)), "two directions that are alike"),
        (jrnn.bidirectional(jrnn.lstm(H), merge="sum"), 'merged by "concat"'),
        (jrnn.bidirectional(jrnn.stack(jrnn.lstm(H), jrnn.lstm(H))), "Stack"),
        (jrnn.stack(jrnn.lstm(F), jrnn.residual(jrnn.gru(F))), r"model\.layers\[1\]: .*Residual"),
        (jrnn.stack(jrnn.gru(H), jrnn.stack(jrnn.mgu(H))), r"model\.layers\[1\]\.layers\[0\]: .*MGU"),
        (jrnn.activation(jnp.sin), "an activation that torch.nn has"),
    ],
    ids=repr,
)
def test_to_torch_refuses_what_pytorch_lacks(model, reason):
    with pytest.raises(TypeError, match=reason):
        to_torch(model, random_params(model))


def test_to_torch_takes_an_activation_by_name_or_as_a_function():
    cell = jrnn.elman(H, jnp.tanh)
    assert to_torch(cell, random_params(cell)).nonlinearity == "tanh"


def test_to_torch_checks_parameters():
    cell = jrnn.gru(H)
    params = random_params(cell)
    with pytest.raises(ValueError, match="params: expected b of shape"):
        to_torch(jrnn.gru(H + 1), {**params, "w_ih": np.zeros((F, 3 * H + 3), np.float32)})
    with pytest.raises(ValueError, match="params: expected a dict with 'b_hn'"):
        to_torch(cell, {name: value for name, value in params.items() if name != "b_hn"})
    with pytest.raises(ValueError, match="params: expected a dict with the parameters of gru"):
        to_torch(cell, (params,))
    with pytest.raises(ValueError, match="params: expected a tuple with one entry for each of 2 layers"):
        to_torch(jrnn.stack(cell, cell), (params,))
    with pytest.raises(ValueError, match=r"params\[1\]: expected w_ih of shape"):
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


# --- modules that are not recurrent, and Sequential

VOCAB = 9
ACTIVATIONS = [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.SiLU(), nn.ELU(), nn.Softplus(), nn.GELU(), nn.GELU("tanh")]
ACTIVATIONS += [nn.Identity(), nn.LeakyReLU(), nn.ReLU6(), nn.SELU(), nn.Softsign(), nn.LogSigmoid(), nn.Hardsigmoid()]
ACTIVATIONS += [nn.Hardswish(), nn.Hardtanh(), nn.Softmax(-1), nn.LogSoftmax(-1)]
MODULES = {
    "linear": nn.Linear(F, 2),
    "linear without bias": nn.Linear(F, 2, bias=False),
    "embedding": nn.Embedding(VOCAB, F, padding_idx=0),
    "layer norm": nn.LayerNorm(F, eps=1e-3),
    "layer norm without bias": nn.LayerNorm(F, bias=False),
    "layer norm without both": nn.LayerNorm(F, elementwise_affine=False),
    **{repr(module): nn.Sequential(nn.Linear(F, 4), module) for module in ACTIVATIONS},
    "nested": nn.Sequential(nn.Embedding(VOCAB, F), nn.Sequential(nn.Dropout(0.25), nn.Linear(F, F)), nn.GRU(F, H)),
}
CHAINS = {
    "tagger": jrnn.stack(
        jrnn.embed(VOCAB, F),
        jrnn.bidirectional(jrnn.lstm(H)),
        jrnn.dropout(0.25),
        jrnn.dense(2),
        jrnn.activation("relu"),
    ),
    "loaded": jrnn.stack(
        jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5), jrnn.lstm(H)),
        jrnn.layer_norm(),
        jrnn.gru(H),
        jrnn.lstm(H),
        jrnn.dense(2),
    ),
    "dropout at the ends": jrnn.stack(jrnn.dropout(0.5), jrnn.lstm(H), jrnn.dropout(0.25)),
    "two rates": jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5), jrnn.lstm(H), jrnn.dropout(0.25), jrnn.lstm(H)),
    "two widths": jrnn.stack(jrnn.lstm(H), jrnn.lstm(H + 1)),
    "two directions": jrnn.stack(jrnn.bidirectional(jrnn.lstm(H)), jrnn.elman(H, "relu")),
    "dense": jrnn.dense(2),
    "dropout": jrnn.dropout(0.5),
}


def sequence(model):
    rng = np.random.default_rng(0)
    return rng.integers(0, VOCAB, (T, B)) if model.event_ndim == 0 else draw(rng, (T, B, F), torch.float32)


@pytest.mark.parametrize("name", MODULES)
def test_modules_between(name):
    module = MODULES[name].eval()
    model, params = from_torch(module)
    expected = module(torch.tensor(sequence(model)))
    expected = expected[0] if isinstance(expected, tuple) else expected
    close(jrnn.unroll(model, params, sequence(model))[1], expected.detach(), torch.float32)
    again, params_again = from_torch(to_torch(model, params))
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.sampled(3)
def test_stacks_there_and_back(name):
    model = CHAINS[name]
    params = random_params(model)
    module = to_torch(model, params)
    converted, back = from_torch(module)
    assert converted == model
    jax.tree.map(np.testing.assert_array_equal, back, params)
    xs = sequence(model)
    close(jrnn.unroll(model, params, xs)[1], module.eval()(torch.tensor(xs)).detach(), torch.float32)
    # Ragged: each sequence by itself, at its own length.
    ys = jrnn.unroll(model, params, xs, lengths=LENGTHS)[1]
    for b, length in enumerate(LENGTHS):
        close(ys[:length, b], module(torch.tensor(xs[:length, b : b + 1])).detach()[:, 0], torch.float32)
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is type(module)
    jax.tree.map(np.testing.assert_array_equal, load_torch(model, module.state_dict()), params)


def test_gradients_of_a_stack():
    model = CHAINS["tagger"]
    params = random_params(model)
    module = to_torch(model, params).eval()
    xs = sequence(model)
    weights = draw(np.random.default_rng(1), (T, B, 2), torch.float32)
    (torch.tensor(weights) * module(torch.tensor(xs))).sum().backward()
    actual = jax.grad(lambda params: (weights * jrnn.unroll(model, params, xs)[1]).sum())(params)
    close(actual[0]["w"], module[0].weight.grad, torch.float32)
    close(actual[1]["backward"]["w_hh"], module[1].weight_hh_l0_reverse.grad.T, torch.float32)
    close(actual[3]["w"], module[3].weight.grad.T, torch.float32)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(3, 2, max_norm=1.0), r"module: expected nn\.Embedding without max_norm, got 1\.0"),
        (nn.Sequential(nn.ReLU(), nn.ELU(0.5)), r"module\[1\]: expected nn\.ELU with alpha=1\.0, got 0\.5"),
        (nn.LayerNorm((2, 3)), r"over the last axis, got normalized_shape=\(2, 3\)"),
        (nn.Sequential(), "expected modules in nn.Sequential, got none"),
        (nn.Sequential(nn.LSTM(2, 2), nn.LSTM(2, 2, batch_first=True)), "expected batch_first alike"),
        (nn.Sequential(nn.Softmax(0)), r"nn\.Softmax with dim=-1, got 0"),
    ],
    ids=str,
)
def test_from_torch_names_the_option_that_it_refuses(module, message):
    with pytest.raises(TypeError, match=message):
        from_torch(module)


# --- state_dicts and files of them


class Tagger(nn.Module):
    """A model of somebody's own, whose modules are not in the order in which they run."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(2 * H, 2 * H), nn.ReLU(), nn.Linear(2 * H, 2 * H))
        self.rnn = nn.LSTM(F, H, num_layers=2, bidirectional=True, dropout=0.5, batch_first=True)
        self.embedding = nn.Embedding(VOCAB, F)

    def forward(self, ids):
        return self.head(self.rnn(self.embedding(ids))[0])


TAGGER = jrnn.stack(
    jrnn.embed(VOCAB, F),
    jrnn.bidirectional(jrnn.lstm(H)),
    jrnn.dropout(0.5),
    jrnn.bidirectional(jrnn.lstm(H)),
    jrnn.dense(2 * H),
    jrnn.activation("relu"),
    jrnn.dense(2 * H),
)


def as_file(kind, found, path):
    arrays = {name: value.numpy() for name, value in found.items()}
    if kind == "pt":
        torch.save(found, path)
    elif kind == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    elif kind == "npz":
        np.savez(path, **arrays)
    else:
        path.write_bytes(pickle.dumps(arrays, protocol=3))


@pytest.mark.parametrize("kind", ["mapping", "pt", "safetensors", "npz", "pkl"])
def test_load_torch_by_the_models_structure(tmp_path, kind):
    module = Tagger().eval()
    source = module.state_dict()
    if kind != "mapping":
        path = tmp_path / f"weights.{kind}"
        as_file(kind, source, path)
        source = path
    params = load_torch(TAGGER, source)
    assert jax.tree.structure(params) == jax.tree.structure(random_params(TAGGER))
    ids = sequence(TAGGER)
    close(jrnn.unroll(TAGGER, params, ids)[1], module(torch.tensor(ids.T)).detach().transpose(0, 1), torch.float32)
    named = load_torch(TAGGER, source, names=("embedding", "rnn", "head.0", "head.2"))
    jax.tree.map(np.testing.assert_array_equal, named, params)


@pytest.mark.parametrize("kind", CELLS)
def test_load_torch_cells(kind):
    build, options = CELLS[kind]
    module = build(F, H, **options)
    cell, params = from_torch(module)
    jax.tree.map(np.testing.assert_array_equal, load_torch(cell, module.state_dict()), params)


def test_load_torch_bfloat16(tmp_path):
    cell = jrnn.projection_lstm(H, P)
    params = random_params(cell, "bfloat16")
    found = to_torch(cell, params).state_dict()
    torch.save(found, tmp_path / "weights.pt")
    for source in (found, tmp_path / "weights.pt"):
        jax.tree.map(np.testing.assert_array_equal, load_torch(cell, source), params)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(found, tmp_path / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_torch(cell, tmp_path / "weights.safetensors"), params)


def test_load_torch_names_what_does_not_fit():
    found = Tagger().state_dict()
    without = lambda *names: {name: value for name, value in found.items() if name not in names}
    with pytest.raises(ValueError, match=r"rnn\.weight_hh_l1_reverse is missing"):
        load_torch(TAGGER, without("rnn.weight_hh_l1_reverse"))
    with pytest.raises(ValueError, match=r"head\.2\.bias is missing"):
        load_torch(TAGGER, without("head.2.bias"))
    params = load_torch(TAGGER, without("head.2.bias"), strict=False)
    assert not params[-1]["b"].any()
    with pytest.raises(ValueError, match=r"rnn\.weight_hh_l0 has shape \(3, 3\) instead of \(20, 5\)"):
        load_torch(TAGGER, {**found, "rnn.weight_hh_l0": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"'bn\.running_mean', 'bn\.weight' besides"):
        load_torch(TAGGER, {**found, "bn.running_mean": torch.zeros(3), "bn.weight": torch.zeros(3)})
    load_torch(TAGGER, {**found, "bn.running_mean": torch.zeros(3)}, strict=False)
    with pytest.raises(ValueError, match=r"names: expected names of modules in the source, .*got 'lstm'"):
        load_torch(TAGGER, found, names=("embedding", "lstm"))
    with pytest.raises(ValueError, match=r"names: expected modules for 5 layers"):
        load_torch(TAGGER, found, names=("embedding", "rnn"))
    with pytest.raises(ValueError, match=r"head\.0 has shape|head\.0\.weight has shape"):
        load_torch(
            jrnn.stack(*TAGGER.layers[:4], jrnn.dense(3)), found, names=("embedding", "rnn", "head.0"), strict=False
        )
    with pytest.raises(TypeError, match="PeepholeLSTM"):
        load_torch(jrnn.peephole_lstm(H), found)
    with pytest.raises(TypeError, match="expected a path or a mapping"):
        load_torch(TAGGER, 3)
    with pytest.raises(TypeError, match="got a mapping under 'state_dict'; pass source"):
        load_torch(TAGGER, {"state_dict": found})


def test_load_torch_does_not_guess():
    twins = nn.ModuleDict({"decoder": nn.GRU(H, H), "encoder": nn.GRU(H, H)})
    model = jrnn.stack(jrnn.gru(H), jrnn.gru(H))
    with pytest.raises(ValueError, match=r"one way, got \('decoder', 'encoder'\) or \('encoder', 'decoder'\)"):
        load_torch(model, twins.state_dict())
    first, second = load_torch(model, twins.state_dict(), names=("encoder", "decoder"))
    np.testing.assert_array_equal(first["w_hh"], twins["encoder"].weight_hh_l0.detach().T)
    np.testing.assert_array_equal(second["w_hh"], twins["decoder"].weight_hh_l0.detach().T)
    with pytest.raises(ValueError, match=r"one way, got \('0',\) or \('1',\)"):
        load_torch(jrnn.gru(H), nn.ModuleList([nn.GRU(H, H), nn.GRU(H, H)]).state_dict(), strict=False)


def test_files_that_are_not_whole(tmp_path):
    cell = jrnn.gru(H)
    found = to_torch(cell, random_params(cell)).state_dict()
    for kind in ("pt", "safetensors", "npz", "pkl"):
        path = tmp_path / f"weights.{kind}"
        as_file(kind, found, path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match=f"source: expected .*{kind}"):
            load_torch(cell, path)
    with pytest.raises(OSError):
        load_torch(cell, tmp_path / "nowhere.npz")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content",
    [Evil(), {"w": Evil()}, {"w": np.array([Evil()], dtype=object)}, {"w": 1.0}, [np.zeros(3)], {"w": "text"}],
)
def test_pickles_of_anything_but_arrays_are_refused_and_not_executed(tmp_path, capsys, content):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(ValueError, match="source: expected"):
        load_torch(jrnn.gru(H), path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays(protocol):
    arrays = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))}
    arrays |= {
        "empty": np.zeros((0, 2)),
        "scalar": np.array(3.0),
        "big": np.arange(3, dtype=">f4"),
        "ids": np.arange(3),
    }
    found = unpickle_arrays(pickle.dumps(arrays, protocol))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype.newbyteorder("=")
