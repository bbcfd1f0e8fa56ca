"""ONNX: graphs that onnxruntime and the reference evaluator run, and nodes with every option, honoured or refused."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.interop import _common, from_onnx, to_onnx
from tests.interop.laws import LENGTHS, VOCAB, B, F, H, T, assert_outputs, assert_same, inputs, random_params

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
oh, nh = onnx.helper, onnx.numpy_helper
reference = pytest.importorskip("onnx.reference")

REVERSED = _common.reversed_layer(jrnn.gru(H), {})[0]
MODELS = {
    "elman": jrnn.elman(H),
    "elman relu": jrnn.elman(H, "relu"),
    "elman softsign": jrnn.elman(H, jax.nn.soft_sign),
    "lstm": jrnn.lstm(H),
    "lstm sigmoid": jrnn.lstm(H, activation="sigmoid"),
    "peephole": jrnn.peephole_lstm(H),
    "coupled": jrnn.coupled_lstm(H),
    "gru after": jrnn.gru(H),
    "gru before": jrnn.gru(H, "before"),
    "learned": jrnn.learned_state(jrnn.lstm(H)),
    "reversed": REVERSED,
    "bidirectional": jrnn.bidirectional(jrnn.lstm(H)),
    "bidirectional sum": jrnn.bidirectional(jrnn.gru(H), merge="sum"),
    "bidirectional mean": jrnn.bidirectional(jrnn.gru(H, "before"), merge="mean"),
    "bidirectional product": jrnn.bidirectional(jrnn.elman(H), merge="product"),
    "bidirectional learned": jrnn.bidirectional(jrnn.learned_state(jrnn.peephole_lstm(H))),
    "two functions": jrnn.bidirectional(jrnn.elman(H), jrnn.elman(H, "relu")),
    "dense": jrnn.dense(2),
    "stack": jrnn.stack(
        jrnn.embed(VOCAB, F),
        jrnn.bidirectional(jrnn.lstm(H)),
        jrnn.dropout(0.1),
        jrnn.layer_norm(1e-3),
        jrnn.gru(H),
        jrnn.dense(5),
        jrnn.activation("relu"),
        jrnn.dense(2),
        jrnn.activation(_common.log_softmax),
    ),
    "activations": jrnn.stack(
        jrnn.activation("gelu"), jrnn.activation(_common.gelu_erf), jrnn.activation("softplus"), jrnn.activation("elu")
    ),
}
# What the reference evaluator leaves out, and onnxruntime has.
NO_REFERENCE = ("elman relu", "elman softsign", "lstm sigmoid", "coupled", "two functions", "bidirectional learned")


def by_onnxruntime(proto, **feed):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, feed)[0]


def by_reference(proto, **feed):
    return reference.ReferenceEvaluator(proto).run(None, feed)[0]


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact(name):
    model = MODELS[name]
    params = random_params(model)
    assert_same(from_onnx(to_onnx(model, params)), (model, params))
    assert_same(from_onnx(to_onnx(model, params, lengths=True).SerializeToString()), (model, params))


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_gives_the_models_outputs(name):
    model = MODELS[name]
    params, xs = random_params(model), inputs(model)
    assert_outputs(model, params, by_onnxruntime(to_onnx(model, params), xs=xs), None)
    ragged = np.where(np.arange(T)[:, None, None] < LENGTHS[:, None], xs, np.nan) if model.event_ndim else xs
    found = by_onnxruntime(to_onnx(model, params, lengths=True), xs=ragged, lengths=LENGTHS.astype(np.int32))
    assert_outputs(model, params, found)
    assert not found[~(np.arange(T)[:, None] < LENGTHS)].any()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NO_REFERENCE])
def test_the_reference_evaluator_gives_the_models_outputs(name):
    model = MODELS[name]
    params = random_params(model)
    assert_outputs(model, params, by_reference(to_onnx(model, params), xs=inputs(model)), None)


def test_other_dtypes():
    model = jrnn.stack(jrnn.lstm(H), jrnn.dense(2))
    with jax.enable_x64(True):
        params = random_params(model, "float64")
        proto = to_onnx(model, params)
        assert_same(from_onnx(proto), (model, params))
        xs = inputs(model, "float64")
        np.testing.assert_allclose(
            jrnn.unroll(model, params, xs)[1], by_reference(proto, xs=xs), rtol=1e-12, atol=1e-12
        )
    with pytest.raises(ValueError, match="while jax_enable_x64 is off, got float64"):
        from_onnx(proto)
    params = random_params(model, "float16")
    proto = to_onnx(model, params)
    assert_same(from_onnx(proto), (model, params))
    xs = inputs(model, "float16")
    ys = np.asarray(jrnn.unroll(model, params, xs)[1], np.float32)
    np.testing.assert_allclose(ys, by_onnxruntime(proto, xs=xs).astype(np.float32), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="got bfloat16, which ONNX's RNN nodes lack"):
        to_onnx(model, random_params(model, "bfloat16"))


# --- nodes as others write them

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def graph(op, *, peepholes=False, lengths=None, states=(), dtype=np.float32, after=(), opset=17, **options):
    """A model of one node with random weights, and of the nodes ``after`` it, which end in "ys"."""
    rng = np.random.default_rng(7)
    directions = 2 if options.get("direction") == "bidirectional" else 1
    rows = GATES[op] * H
    arrays = {
        "W": rng.normal(size=(directions, rows, F)),
        "R": rng.normal(size=(directions, rows, H)),
        "B": rng.normal(size=(directions, 2 * rows)),
    }
    names = ["xs", "W", "R", "B", lengths or ""]
    for state in ("initial_h", "initial_c"):
        names.append(state if state in states else "")
    if peepholes:
        arrays["P"] = rng.normal(size=(directions, 3 * H))
        names.append("P")
    if options.pop("bias", True) is False:
        names[3] = ""
    while not names[-1]:
        names.pop()
    ends = ["ys" if not after else "y", "y_h"] + (["y_c"] if op == "LSTM" else [])
    nodes = [oh.make_node(op, names, ends, op.lower(), hidden_size=H, **options), *after]
    kind = oh.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = oh.make_tensor_value_info
    entries = [value("xs", kind, ["a", "b", F])]
    if lengths:
        entries.append(value(lengths, onnx.TensorProto.INT32, ["b"]))
    for state in states:
        if isinstance(states, dict):
            arrays[state] = states[state]
        else:
            entries.append(value(state, kind, [directions, "b", H]))
    constants = [nh.from_array(array.astype(dtype), name) for name, array in arrays.items()]
    made = oh.make_graph(nodes, "g", entries, [value("ys", kind, None)], constants)
    return oh.make_model(made, opset_imports=[oh.make_opsetid("", opset)], ir_version=8)


def flat(ys):
    """``Y (T, D, B, H)`` with the directions side by side."""
    return ys.transpose(0, 2, 1, 3).reshape(T, B, -1)


NODES = {
    "RNN": {},
    "RNN relu": {"activations": ["Relu"]},
    "RNN reverse": {"direction": "reverse"},
    "RNN both": {"direction": "bidirectional", "activations": ["Relu", "Tanh"]},
    "GRU": {},
    "GRU after": {"linear_before_reset": 1},
    "GRU no bias": {"bias": False},
    "GRU functions": {"activations": ["HardSigmoid", "Softsign"]},
    "GRU both": {"direction": "bidirectional", "linear_before_reset": 1},
    "LSTM": {},
    "LSTM reverse": {"direction": "reverse"},
    "LSTM both": {"direction": "bidirectional"},
    "LSTM peepholes": {"peepholes": True},
    "LSTM input_forget": {"input_forget": 1},
    "LSTM functions": {"activations": ["sigmoid", "relu", "relu"]},
    "LSTM states": {"states": {"initial_h": np.full((1, B, H), 0.5), "initial_c": np.full((1, B, H), -0.5)}},
    "LSTM state": {"states": {"initial_c": np.full((1, B, H), -0.5)}},
    "LSTM no state": {"states": {"initial_h": np.zeros((1, B, H))}},
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_as_onnxruntime_runs_them(name):
    proto = graph(name.split()[0], lengths="lens", **NODES[name])
    model, params = from_onnx(proto)
    found = by_onnxruntime(proto, xs=inputs(model), lens=LENGTHS.astype(np.int32))
    assert_outputs(model, params, flat(found))


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_batch_first_nodes(op, direction):
    proto = graph(op, direction=direction, layout=1)
    model, params = from_onnx(proto)
    assert_same((model, params), from_onnx(graph(op, direction=direction)))
    xs = inputs(model)
    found = by_reference(proto, xs=xs.swapaxes(0, 1))
    expected = by_onnxruntime(graph(op, direction=direction), xs=xs)
    if direction == "forward":  # with two, the reference evaluator mixes batch and directions
        np.testing.assert_allclose(found.transpose(1, 2, 0, 3), expected, rtol=1e-5, atol=1e-5)
    assert_outputs(model, params, flat(expected), None)


def test_initial_states_that_are_inputs_are_the_state_of_unroll():
    proto = graph("LSTM", states=("initial_h", "initial_c"))
    model, params = from_onnx(proto)
    assert model == jrnn.lstm(H)
    h, c = np.random.default_rng(1).normal(size=(2, 1, B, H)).astype(np.float32)
    expected = by_onnxruntime(proto, xs=inputs(model), initial_h=h, initial_c=c)
    ys = jrnn.unroll(model, params, inputs(model), jrnn.LSTMState(h[0], c[0]))[1]
    np.testing.assert_allclose(ys, expected[:, 0], rtol=1e-5, atol=1e-5)


def test_states_that_exporters_compute_are_zero():
    shape = oh.make_node("ConstantOfShape", ["three"], ["start"])
    proto = graph("GRU", states={"initial_h": np.zeros((1, B, H))})
    proto.graph.node.insert(0, shape)
    proto.graph.node[1].input[5] = "start"
    proto.graph.initializer.append(nh.from_array(np.array([1, B, H]), "three"))
    assert from_onnx(proto)[0] == jrnn.gru(H, "before")


def test_a_path(tmp_path):
    model = jrnn.gru(H)
    params = random_params(model)
    onnx.save(to_onnx(model, params), tmp_path / "model.onnx")
    assert_same(from_onnx(tmp_path / "model.onnx"), (model, params))


# How exporters of PyTorch's give the shape (T, B, 2H): by zeros, by sizes, and by nodes.
SHAPES = {"zeros": [0, 0, -1], "sizes": [T, B, 2 * H], "nodes": None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_bidirectional_node_as_exporters_write_it(batch_first, shape):
    rnn_nodes = [
        oh.make_node("Transpose", ["y"], ["t"], perm=[0, 2, 1, 3]),
        oh.make_node("Reshape", ["t", "shape"], ["r"]),
        *([oh.make_node("Transpose", ["r"], ["m"], perm=[1, 0, 2])] if batch_first else []),
        oh.make_node("MatMul", ["m" if batch_first else "r", "w"], ["p"]),
        oh.make_node("Add", ["bias", "p"], ["ys"]),
    ]
    proto = graph("LSTM", direction="bidirectional", after=rnn_nodes)
    rng = np.random.default_rng(2)
    for name, array in (("w", rng.normal(size=(2 * H, 2))), ("bias", rng.normal(size=2))):
        proto.graph.initializer.append(nh.from_array(array.astype(np.float32), name))
    if shape == "nodes":
        for i in range(4):
            proto.graph.initializer.append(nh.from_array(np.array([i + 1]), f"i{i}"))
        proto.graph.initializer.append(nh.from_array(np.array([0]), "zero"))
        nodes = [
            oh.make_node("Shape", ["t"], ["sizes"]),
            oh.make_node("Slice", ["sizes", "zero", "i1"], ["leading"]),
            oh.make_node("Slice", ["sizes", "i1", "i2"], ["d"]),
            oh.make_node("Slice", ["sizes", "i2", "i3"], ["f"]),
            oh.make_node("Mul", ["d", "f"], ["df"]),
            oh.make_node("Concat", ["leading", "df"], ["shape"], axis=0),
        ]
        for i, node in enumerate(nodes):
            proto.graph.node.insert(2 + i, node)
    else:
        proto.graph.initializer.append(nh.from_array(np.array(SHAPES[shape]), "shape"))
    if shape == "sizes":
        for i, size in enumerate((B, T) if batch_first else (T, B)):
            proto.graph.input[0].type.tensor_type.shape.dim[i].dim_value = size
    if batch_first:
        proto.graph.node.insert(0, oh.make_node("Transpose", ["xs"], ["x"], perm=[1, 0, 2]))
        proto.graph.node[1].input[0] = "x"
    model, params = from_onnx(proto)
    assert model == jrnn.stack(jrnn.bidirectional(jrnn.lstm(H)), jrnn.dense(2))
    xs = inputs(model)
    ys = by_onnxruntime(proto, xs=xs.swapaxes(0, 1) if batch_first else xs)
    assert_outputs(model, params, ys.swapaxes(0, 1) if batch_first else ys, None)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.filterwarnings("ignore")
def test_what_pytorch_exports(kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(torch.nn, kind)(F, H, num_layers=2, bidirectional=True, batch_first=True)
            self.head = torch.nn.Linear(2 * H, 2)

        def forward(self, xs):
            return torch.relu(self.head(self.rnn(xs)[0]))

    module, file = Tagger().eval(), io.BytesIO()
    xs = torch.randn(B, T, F)
    options = {"dynamic_axes": {"xs": {0: "B", 1: "T"}}, "input_names": ["xs"], "dynamo": False}
    torch.onnx.export(module, (xs,), file, **options)
    model, params = from_onnx(file.getvalue())
    assert len(model.layers) == 4
    ys = jrnn.unroll(model, params, xs.numpy().swapaxes(0, 1))[1]
    np.testing.assert_allclose(ys.swapaxes(0, 1), module(xs).detach(), rtol=1e-5, atol=1e-5)


REFUSED = {
    "clip": ("LSTM", {"clip": 3.0}, "expected no clip, got 3.0"),
    "activation": ("RNN", {"activations": ["ScaledTanh"]}, "expected activations out of .*, got 'ScaledTanh'"),
    "alpha": ("RNN", {"activations": ["Elu"], "activation_alpha": [0.5]}, "expected the default activation_alpha"),
    "two functions": ("LSTM", {"activations": ["Sigmoid", "Tanh", "Relu"]}, "one activation for the candidate"),
    "states": (
        "GRU",
        {"states": {"initial_h": np.arange(B * H).reshape(1, B, H)}},
        "expected initial_h alike for every sequence",
    ),
    "coupled": ("LSTM", {"input_forget": 1, "peepholes": True}, "input_forget=1 without peepholes"),
    "shape": (
        "GRU",
        {
            "direction": "bidirectional",
            "after": [
                oh.make_node("Transpose", ["y"], ["t"], perm=[0, 2, 1, 3]),
                oh.make_node("Reshape", ["t", "shape"], ["ys"]),
            ],
        },
        "expected a Reshape that puts directions and features side by side",
    ),
    "last state": ("GRU", {"after": [oh.make_node("Relu", ["y_h"], ["ys"])]}, "expected the sequence Y to go on"),
    "node": ("GRU", {"after": [oh.make_node("Sin", ["y"], ["ys"])]}, "take the axis of directions out"),
    "residual": (
        "GRU",
        {"after": [oh.make_node("Squeeze", ["y", "one"], ["s"]), oh.make_node("Add", ["s", "xs"], ["ys"])]},
        "expected one input that is not a constant, got 2",
    ),
    "other node": (
        "GRU",
        {"after": [oh.make_node("Squeeze", ["y", "one"], ["s"]), oh.make_node("Sin", ["s"], ["ys"])]},
        "expected RNN, GRU, LSTM.*got Sin",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_nodes_say_why(name):
    op, options, message = REFUSED[name]
    proto = graph(op, **options)
    proto.graph.initializer.append(nh.from_array(np.array([1]), "one"))
    proto.graph.initializer.append(nh.from_array(np.array([B, T, 2 * H]), "shape"))
    with pytest.raises(TypeError, match=message):
        from_onnx(proto)


def test_weights_that_do_not_fit():
    proto = graph("GRU")
    proto.graph.initializer[0].CopyFrom(nh.from_array(np.zeros((1, 2 * H, F), np.float32), "W"))
    with pytest.raises(ValueError, match=r"expected W of shape \(1, 12, 3\), got \(1, 8, 3\)"):
        from_onnx(proto)
    proto = graph("GRU", lengths="lens")
    proto.graph.initializer.append(nh.from_array(LENGTHS.astype(np.int32), "lens"))
    with pytest.raises(TypeError, match="expected sequence_lens to be an input of the graph"):
        from_onnx(proto)
    with pytest.raises(TypeError, match=r"source: expected an onnx\.ModelProto"):
        from_onnx(3)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (jrnn.projection_lstm(H, 2), "no node of ONNX has the equations of ProjectionLSTM"),
        (jrnn.mgu(H), "MGU"),
        (jrnn.lstm(H, activation="gelu"), "expected activations out of"),
        (jrnn.bidirectional(jrnn.lstm(H), jrnn.gru(H)), "expected two directions of one kind"),
        (jrnn.bidirectional(jrnn.lstm(H), merge=jnp.maximum), "expected directions merged by a name"),
        (jrnn.bidirectional(jrnn.lstm(H), jrnn.learned_state(jrnn.lstm(H))), "a learned state in both directions"),
        (jrnn.activation(jax.nn.mish), "expected an activation that ONNX has a node for"),
        (jrnn.stack(jrnn.gru(F), jrnn.residual(jrnn.gru(F))), r"model\.layers\[1\]: .*Residual"),
    ],
    ids=repr,
)
def test_refused_models_say_why(model, reason):
    with pytest.raises(TypeError, match=reason):
        to_onnx(model, random_params(model))
