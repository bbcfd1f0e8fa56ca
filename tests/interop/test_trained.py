"""Weights that others trained and that install from packages: what their own packages compute, jrnn computes.

None of these packages is needed by jrnn. Each test skips where its package is not installed: `g2p-en` (a GRU that reads
letters and one that writes phonemes), `g2pM` (a bidirectional LSTM that tells Chinese polyphones apart) and
`silero-vad` (an LSTM that hears speech). Their modules are loaded by path, since importing them would import, or
download, what their weights do not need.
"""

import ast
import importlib.util
import pathlib
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.interop import load_torch
from jrnn.interop._arrays import read_arrays


def folder(package):
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return pathlib.Path(spec.origin).parent


def methods(path, name, **attributes):
    """An object with the methods of a class in a file, which is not imported: only the class is compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings
        tree = ast.parse(path.read_text())
    own = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    own.body = [node for node in own.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    scope = {"np": np, "pickle": pickle}
    exec(compile(ast.Module([own], []), str(path), "exec"), scope)
    made = object.__new__(scope[name])
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


# --- g2p-en

WORDS = ["activationist", "jax", "recurrent", "a", "supercalifragilistic", "zyzzyva"]


def letters(word):
    return ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"].index(word)


def test_g2p_en():
    path = folder("g2p_en")
    found = {
        k.replace("_w_", ".weight_").replace("_b_", ".bias_"): v
        for k, v in read_arrays(path / "checkpoint20.npz").items()
    }
    names = {"enc_emb": "enc_emb.weight", "dec_emb": "dec_emb.weight", "fc_w": "fc.weight", "fc_b": "fc.bias"}
    found = {names.get(name, name): array for name, array in found.items()}
    hidden, width = found["enc.weight_hh"].shape[1], found["enc.weight_ih"].shape[1]
    encoder = jrnn.stack(jrnn.embed(29, width), jrnn.gru(hidden))
    decoder = jrnn.stack(jrnn.embed(74, width), jrnn.gru(hidden), jrnn.dense(74))
    enc = load_torch(encoder, found, names=("enc_emb", "enc"), strict=False)
    dec = load_torch(decoder, found, names=("dec_emb", "dec", "fc"), strict=False)

    theirs = methods(path / "g2p.py", "G2p")
    with np.load(path / "checkpoint20.npz") as arrays:
        for name in arrays:
            setattr(theirs, name, arrays[name])
    theirs.g2idx = {letter: letters(letter) for letter in ["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]}
    theirs.idx2p = {i: i for i in range(74)}

    # All words at once, ragged; the decoder writes on from the encoder's last state, a letter at a time.
    ids = [[letters(letter) for letter in word] + [2] for word in WORDS]
    lengths = np.array([len(word) for word in ids])
    padded = np.zeros((lengths.max(), len(ids)), int)
    for i, word in enumerate(ids):
        padded[: len(word), i] = word
    (_, last), hidden = jrnn.unroll(encoder, enc, padded, lengths=lengths)
    step = jax.jit(decoder.step)
    state = ((), last, ())
    symbol, written = np.full(len(WORDS), 2), []
    for _ in range(20):
        state, logits = step(dec, state, symbol)
        symbol = np.asarray(logits.argmax(-1))
        written.append(symbol)
    for i, word in enumerate(WORDS):
        x = theirs.encode(word)
        expected = theirs.gru(x, len(word) + 1, theirs.enc_w_ih, theirs.enc_w_hh, theirs.enc_b_ih, theirs.enc_b_hh)
        np.testing.assert_allclose(hidden[: len(word) + 1, i], expected[0], rtol=1e-4, atol=1e-5)
        phonemes = [int(row[i]) for row in written]
        assert phonemes[: phonemes.index(3) if 3 in phonemes else 20] == theirs.predict(word)


# --- g2pM

SENTENCES = ["然而他红了20年以后他竟退出了大家的视线", "银行行长", "重要的事情要重复", "音乐使人快乐"]


def test_g2pm():
    path = folder("g2pM")
    theirs = methods(path / "g2pM.py", "G2pM")
    with open(path / "np_ckpt.pkl", "rb") as file:
        unpickled = pickle.load(file)  # as the package does it
    found = read_arrays(path / "np_ckpt.pkl")
    assert found.keys() == unpickled.keys()
    for name, array in unpickled.items():
        np.testing.assert_array_equal(found[name], array)
    theirs.load_variable(unpickled)
    with open(path / "char2idx.pkl", "rb") as file:
        vocabulary = pickle.load(file)

    vocab, hidden = found["embedding.weight"].shape[0], found["lstm.weight_hh_l0"].shape[1]
    classes = found["logit_layer.2.weight"].shape[0]
    model = jrnn.stack(
        jrnn.embed(vocab, 64),
        jrnn.bidirectional(jrnn.lstm(hidden)),
        jrnn.dense(found["logit_layer.0.weight"].shape[0]),
        jrnn.activation("relu"),
        jrnn.dense(classes),
    )
    params = load_torch(model, path / "np_ckpt.pkl")

    ids = [[vocabulary.get(c, vocabulary["<UNK>"]) for c in ["시", *sentence, "끝"]] for sentence in SENTENCES]
    lengths = np.array([len(row) for row in ids])
    padded = np.zeros((len(ids), lengths.max()), int)
    for i, row in enumerate(ids):
        padded[i, : len(row)] = row
    ys = jrnn.unroll(model, params, padded.T, lengths=lengths)[1]
    for target in range(1, lengths.min()):
        expected = theirs.predict(padded, np.full(len(ids), target))
        np.testing.assert_array_equal(ys[target].argmax(-1), expected)
    # The scores as well, of one sentence by itself.
    captured = []
    theirs.fc_layer = lambda hidden: captured.append(type(theirs).fc_layer(theirs, hidden)) or captured[-1]
    theirs.predict(padded[:1, : lengths[0]], np.arange(lengths[0]))
    np.testing.assert_allclose(ys[: lengths[0], 0], captured[0], rtol=1e-4, atol=1e-4)


# --- silero-vad


def conv(x, w, b=None, stride=1, pad=0):
    """A convolution over time, `(B, C, T)`."""
    y = jax.lax.conv_general_dilated(x, w, (stride,), [(pad, pad)], dimension_numbers=("NCH", "OIH", "NCH"))
    return y if b is None else y + b[:, None]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_silero_vad():
    path = folder("silero_vad") / "data"
    torch = pytest.importorskip("torch", reason="silero-vad's own model is TorchScript")
    theirs = torch.jit.load(str(path / "silero_vad.jit"), map_location="cpu").eval()
    weights = {name.removeprefix("_model."): array for name, array in read_arrays(theirs.state_dict()).items()}
    cell = jrnn.lstm(128)
    params = load_torch(cell, weights, names=("decoder.rnn",), strict=False)

    rng = np.random.default_rng(0)
    t = np.arange(16000 * 2) / 16000
    voiced = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 20)) * (np.sin(2 * np.pi * 3 * t) > 0)
    audio = (0.05 * voiced + 0.002 * rng.normal(size=t.size)).astype(np.float32)
    chunks = audio[: 512 * (audio.size // 512)].reshape(-1, 512)
    with torch.no_grad():
        expected = np.array([theirs(torch.from_numpy(chunk[None]), 16000).item() for chunk in chunks])
    assert expected.max() - expected.min() > 0.05  # it hears a difference

    # All chunks at once up to the LSTM, each after the last 64 samples of the one before it.
    context = np.concatenate([np.zeros((1, 64), np.float32), chunks[:-1, -64:]])
    x = jnp.pad(np.concatenate([context, chunks], 1), ((0, 0), (0, 64)), mode="reflect")[:, None]
    x = conv(x, weights["stft.forward_basis_buffer"], stride=128)
    x = jnp.sqrt(x[:, :129] ** 2 + x[:, 129:] ** 2)
    for i, stride in enumerate((1, 2, 2, 1)):
        w, b = (weights[f"encoder.{i}.reparam_conv.{leaf}"] for leaf in ("weight", "bias"))
        x = jax.nn.relu(conv(x, w, b, stride, 1))
    xs = x[..., 0]
    w, b = weights["decoder.decoder.2.weight"][0, :, 0], weights["decoder.decoder.2.bias"]
    head = lambda ys: jax.nn.sigmoid(jax.nn.relu(ys) @ w + b)
    ys = jrnn.unroll(cell, params, xs)[1]
    np.testing.assert_allclose(head(ys), expected, rtol=1e-3, atol=1e-5)

    # Streaming: the same, one chunk after the other.
    step, state = jrnn.stepper(cell), cell.initial_state(params, ())
    for x, y in zip(xs[:5], ys[:5], strict=True):
        state, out = step(params, state, x)
        np.testing.assert_allclose(out, y, rtol=1e-5, atol=1e-6)


def test_silero_vad_from_safetensors():
    """The package's safetensors file, whose weights are of another training than its TorchScript model's."""
    path = folder("silero_vad") / "data" / "silero_vad_16k.safetensors"
    pytest.importorskip("safetensors")
    cell, found = jrnn.lstm(128), read_arrays(path)
    params = load_torch(cell, path, names=("lstm_cell",), strict=False)
    np.testing.assert_array_equal(params["w_ih"], found["lstm_cell.weight_ih"].T)
    with pytest.raises(ValueError, match=r"'conv1\.bias', 'conv1\.weight', .* and 5 more besides"):
        load_torch(cell, path)


def test_silero_vad_by_onnx():
    path = folder("silero_vad") / "data"
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    proto = onnx.load(path / "silero_vad_16k_sequence.onnx")
    with pytest.raises(TypeError, match="source: "):
        jrnn.interop.from_onnx(proto)  # the whole of it is more than jrnn has layers for
    node = next(node for node in proto.graph.node if node.op_type == "LSTM")
    start, squeezed = node.input[0], "/recurrent/Squeeze_output_0"
    onnx.checker.check_model(proto)
    value = onnx.helper.make_tensor_value_info
    entries = [value(start, 1, ["T", 1, 128]), value("h", 1, [1, 1, 128]), value("c", 1, [1, 1, 128])]
    squeeze = next(node for node in proto.graph.node if squeezed in node.output)
    axes = next(n for n in proto.graph.node if n.op_type == "Constant" and n.output[0] == squeeze.input[1])
    constants = [tensor for tensor in proto.graph.initializer if tensor.name in node.input]
    part = onnx.helper.make_graph(
        [axes, node, squeeze], "lstm", entries, [value(squeezed, 1, ["T", 1, 128])], constants
    )
    model = onnx.helper.make_model(part, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    cell, params = jrnn.interop.from_onnx(model)
    assert cell == jrnn.lstm(128)
    xs = np.random.default_rng(0).normal(size=(20, 1, 128)).astype(np.float32)
    h, c = np.random.default_rng(1).normal(size=(2, 1, 1, 128)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {start: xs, "h": h, "c": c})
    ys = jrnn.unroll(cell, params, xs, jrnn.LSTMState(h[0], c[0]))[1]
    np.testing.assert_allclose(ys, expected, rtol=1e-4, atol=1e-5)
