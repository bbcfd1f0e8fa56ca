"""Models in files: every row of the table comes back equal; a file that is not whole, or not ours, is an error."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import random
import stat
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from jrnn.cells.base import Layer
from jrnn.files import layers as described
from jrnn.files import tensors
from tests import cases
from tests.cases import CASES, Case, difference, softsign

pytestmark = pytest.mark.usefixtures("quick_compilation")

OWN = [
    value for value in vars(cases).values()
    if isinstance(value, type) and issubclass(value, Layer) and value.__module__ == cases.__name__
] + [softsign, difference]  # fmt: skip

ROWS = (
    *CASES,
    Case("initialisers", jrnn.lstm(4, input_init=jrnn.initializers.uniform(0.1), bias_init=jrnn.initializers.zeros)),
    Case("functions", jrnn.stack(jrnn.elman(4, jnp.sin), jrnn.activation(jax.nn.softplus), jrnn.gru(2))),
    Case("merge", jrnn.bidirectional(jrnn.elman(4), merge=jnp.maximum)),
    Case("chrono", jrnn.sru(4, forget_bias=jrnn.initializers.chrono(40))),
    Case("infinite", jrnn.lstm(4, forget_bias=float("inf"))),
)


def bits(tree):
    """Dtypes, shapes and bits, in the tree."""
    return jax.tree.map(lambda a: (str(a.dtype), a.shape, np.asarray(a).tobytes()), tree)


def rewritten(path, change=None, texts=None):
    """The file with its header (a dict) changed."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if texts is not None:
        header["__metadata__"].update(texts)
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.fixture
def saved(tmp_path):
    """A small file, its model and its parameters."""
    model = jrnn.stack(jrnn.bidirectional(jrnn.gru(2)), jrnn.dropout(0.2), jrnn.dense(3))
    params = model.init(jax.random.key(0), 3)
    path = tmp_path / "model.safetensors"
    jrnn.save(path, model, params)
    return path, model, params


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ROWS])
def test_every_row_comes_back(case, tmp_path):
    params = case.layer.init(jax.random.key(0), case.in_features)
    jrnn.save(tmp_path / "file", case.layer, params)
    model, loaded = jrnn.load(tmp_path / "file", layers=OWN)
    assert model == case.layer
    assert hash(model) == hash(case.layer)
    assert type(model) is type(case.layer)
    assert bits(loaded) == bits(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_every_layer_of_jrnn_has_a_name_of_its_own():
    known = described.known_layers()
    found, pending = [], [Layer]
    while pending:
        pending += (below := pending.pop().__subclasses__())
        found += [layer for layer in below if described._in_jrnn(layer) or layer is known.get(f"jrnn.{layer.__name__}")]
    assert {known[f"jrnn.{layer.__name__}"] for layer in found} == set(found)
    names = {type(case.layer).__name__ for case in CASES if type(case.layer).__module__.startswith("jrnn.")}
    assert {f"jrnn.{name}" for name in names} <= set(known)


def test_names_are_readable_and_the_official_package_reads_them(saved):
    path, _, params = saved
    safetensors = pytest.importorskip("safetensors.numpy", reason="the official reader")
    read = safetensors.load_file(path)
    expected = {"0.forward.w_ih": params[0]["forward"]["w_ih"], "2.b": params[2]["b"]}
    assert {"0.backward.b_hn", "0.forward.w_hh", "2.w", *expected} <= set(read)
    assert len(read) == len(jax.tree.leaves(params))
    for name, value in expected.items():
        assert (read[name] == np.asarray(value)).all()
    with pytest.importorskip("safetensors").safe_open(path, "np") as file:
        assert json.loads(file.metadata()["layers"])["layer"] == "jrnn.Stack"
    # Written by the official package, in an order of its own, the file is the same to us.
    with pytest.importorskip("safetensors").safe_open(path, "np") as file:
        safetensors.save_file(read, path, file.metadata())
    assert bits(jrnn.load(path)[1]) == bits(params)


@dataclasses.dataclass(frozen=True)
class Given(Layer):
    """A layer with any parameters at all."""

    shapes: tuple[Any, ...] = ()

    def init(self, key, in_features):
        raise ValueError("these are given")


DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16",
          "float32", "float64", "float8_e5m2", "float8_e4m3fn", "complex64", "complex128"]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path, x64):
    dtype = jnp.dtype(dtype)
    noise = np.random.default_rng(0).bytes(6 * dtype.itemsize)
    raw = np.frombuffer(noise, np.uint8) % 2 if dtype.kind == "b" else noise
    array = np.frombuffer(bytes(raw[: 6 * dtype.itemsize]), dtype).reshape(3, 2)
    special = np.array([0.0, -0.0, np.inf, np.nan]).astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else array[:0]
    params = {
        "a": jnp.asarray(array),
        "b.c": (jnp.asarray(special), jnp.zeros((0, 3), dtype)),
        "d": jnp.ones((), dtype),
    }
    jrnn.save(tmp_path / "file", Given(), params)
    _, loaded = jrnn.load(tmp_path / "file", layers=[Given])
    assert bits(loaded) == bits(params)
    if importlib.util.find_spec("safetensors") and "float8" not in str(dtype):  # which its NumPy reader lacks
        import safetensors.numpy

        assert len(safetensors.numpy.load_file(tmp_path / "file")) == 4


TREES = {
    "one array": jnp.ones(2),
    "nothing": {},
    "empty parts": ({}, (), {"a": ()}),
    "names that look alike": {"a.b": jnp.ones(1), "a": {"b": jnp.ones(2), "0": (jnp.ones(3),)}, "a%2Eb": jnp.ones(4)},
    "names of the format": {"__metadata__": jnp.ones(1), "params": jnp.ones(2), "": jnp.ones(3)},
    "letters": {"ä": {"日本": jnp.ones(1), '"\\\n': jnp.ones(2)}},
    "in an order of its own": {"z": jnp.ones(1), "a": jnp.ones(2)},
}


@pytest.mark.parametrize("name", TREES)
def test_every_tree_comes_back(name, tmp_path):
    jrnn.save(tmp_path / "file", Given(), TREES[name])
    _, loaded = jrnn.load(tmp_path / "file", layers=[Given])
    assert bits(loaded) == bits(TREES[name])
    assert jax.tree.structure(loaded) == jax.tree.structure(TREES[name])
    if isinstance(loaded, dict):
        assert list(loaded) == list(TREES[name])


def test_a_cast_model_and_numpy_arrays_and_other_mappings_are_saved(tmp_path):
    cell = jrnn.gru(3)
    params = {name: np.asarray(value, jnp.bfloat16) for name, value in cell.init(jax.random.key(0), 2).items()}
    jrnn.save(str(tmp_path / "file"), cell, types.MappingProxyType(params))
    assert bits(jrnn.load(tmp_path / "file")[1]) == bits(params)


# --- writing -----------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(saved, monkeypatch):
    path, model, params = saved
    before = path.read_bytes()
    zeros = jax.tree.map(jnp.zeros_like, params)

    def full(*args):
        raise OSError("no space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="no space"):
                jrnn.save(path, model, zeros)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
    path.chmod(0o640)
    jrnn.save(path, model, zeros)
    assert bits(jrnn.load(path)[1]) == bits(zeros)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == [path.name]


def test_what_a_link_points_to_is_replaced_and_a_new_file_has_the_usual_permissions(saved, tmp_path):
    path, model, params = saved
    link = tmp_path / "link"
    link.symlink_to(path)
    jrnn.save(link, model, jax.tree.map(jnp.zeros_like, params))
    assert link.is_symlink()
    assert not np.asarray(jrnn.load(path)[1][2]["w"]).any()
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(IsADirectoryError, match="path: expected a file"):
        jrnn.save(tmp_path, model, params)
    with pytest.raises(FileNotFoundError, match="path: expected a directory"):
        jrnn.save(tmp_path / "no" / "file", model, params)


@dataclasses.dataclass(frozen=True)
class Holding(Given):
    value: Any = None


def local():
    def function(x):
        return x

    return function


REFUSED_FIELDS = {
    "an array": (1, np.ones(2)),
    "a NumPy number": np.float32(0.5),
    "a dtype": np.dtype("float32"),
    "a partial function": jax.tree_util.Partial(jnp.sin),
    "a local function": local(),
    "a lambda": lambda x: x,
    "a set": frozenset({1}),
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_a_field_that_text_cannot_hold_is_refused_by_name(name, tmp_path):
    with pytest.raises(TypeError, match=r"model\.layers\[1\]\.value.*: expected"):
        jrnn.save(tmp_path / "file", jrnn.stack(jrnn.dense(2), Holding(value=REFUSED_FIELDS[name])), ({}, {}))
    assert not os.listdir(tmp_path)


def test_two_classes_under_one_name_are_refused(tmp_path):
    def made():
        @dataclasses.dataclass(frozen=True)
        class Local(Given):
            pass

        return Local()

    with pytest.raises(TypeError, match=r"one class or function called .*Local, got two"):
        jrnn.save(tmp_path / "file", jrnn.stack(made(), made()), ({}, {}))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (None, r"dicts and tuples of arrays, got NoneType at 1\.a"),
        ([jnp.ones(2)], "got list at"),
        (0.5, "got float at"),
        (jrnn.HiddenState(jnp.ones(2)), "got HiddenState at"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "the shape of one"),
        (jax.random.key(0), r"numbers, got key<fry> at 1\.a"),
        (jnp.ones(2, jnp.int4), "dtypes of the safetensors format, got int4"),
        ({1: jnp.ones(2)}, "strings as the keys of dicts, got 1"),
    ],
)
def test_a_leaf_that_the_file_cannot_hold_is_refused_by_name(leaf, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        jrnn.save(tmp_path / "file", Given(), ({}, {"a": leaf}))
    assert not os.listdir(tmp_path)


def test_saving_inside_jit_is_refused(tmp_path):
    def run(params):
        jrnn.save(tmp_path / "file", jrnn.gru(2), params)

    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(run)(jrnn.gru(2).init(jax.random.key(0), 3))


def test_parameters_of_another_model_are_refused_by_name(tmp_path):
    path, params = tmp_path / "file", jrnn.gru(4).init(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"params: expected the parameters of lstm.*b_hn \(4,\) is surplus; w_ih has"):
        jrnn.save(path, jrnn.lstm(4), params)
    with pytest.raises(ValueError, match=r"b_hn \(4,\) is missing"):
        jrnn.save(path, jrnn.gru(4), {name: value for name, value in params.items() if name != "b_hn"})
    with pytest.raises(ValueError, match=r"w_hh has the shape \(4, 12\), not \(5, 15\)"):
        jrnn.save(path, jrnn.gru(5), params)
    with pytest.raises(ValueError, match="other dicts or tuples"):
        jrnn.save(path, jrnn.stack(jrnn.dropout(0.1)), {})
    with pytest.raises(ValueError, match=r"in_features: .* does not take 'three'"):
        jrnn.save(path, jrnn.gru(4), params, in_features="three")
    with pytest.raises(TypeError, match="model: expected a layer"):
        jrnn.save(path, params, jrnn.gru(4))
    assert not os.listdir(tmp_path)


# --- reading -----------------------------------------------------------------------------------------------------


def test_own_layers_are_given_and_never_imported(tmp_path):
    cell = jrnn.stack(cases.Leaky(4), jrnn.elman(3, softsign))
    jrnn.save(tmp_path / "file", cell, cell.init(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"layers\[0\]: unknown layer 'tests.cases.Leaky'.*layers=\[Leaky\]"):
        jrnn.load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"layers\[1\].activation: unknown function 'tests.cases.softsign'"):
        jrnn.load(tmp_path / "file", layers=[cases.Leaky])
    moved = {"tests.cases.Leaky": cases.Leaky, "tests.cases.softsign": softsign}
    assert jrnn.load(tmp_path / "file", layers=moved)[0] == cell
    with pytest.raises(ValueError, match="unknown layer"):
        jrnn.load(tmp_path / "file", layers={"tests.cases.Leaky": dict, "tests.cases.softsign": softsign})
    for wrong in (cases.Leaky(4), "Leaky", [cases.Leaky(4)], {"a": 1}):
        with pytest.raises(TypeError, match="layers: expected"):
            jrnn.load(tmp_path / "file", layers=wrong)


@pytest.mark.parametrize(
    "name",
    ["os.system", "jax.numpy.load", "jrnn.native.clear_cache", "builtins.eval", "jrnn.cells.lstm.jax", "jax.nn.os"],
)
def test_functions_that_are_no_activations_are_unknown(name):
    data = {"layer": "jrnn.Activate", "fields": {"function": {"function": name}}}
    with pytest.raises(ValueError, match=f"model.function: unknown function '{name}'"):
        described.decode(data, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layer": "jrnn.LSTM", "fields": {}}, "expected the field 'hidden'"),
        ({"layer": "jrnn.LSTM", "fields": {"hidden": 4, "width": 3}}, "got 'width'; the file is of another version"),
        ({"layer": "jrnn.LSTM", "fields": {"hidden": -4}}, "does not take the fields in the file: hidden: expected"),
        ({"layer": "jrnn.LSTM", "fields": {"hidden": "4"}}, "does not take the fields in the file: hidden: expected"),
        ({"layer": "jrnn.TransformerXL", "fields": {}}, "unknown layer 'jrnn.TransformerXL'.*newer jrnn"),
        ({"layer": "jrnn.initializers.orthogonal", "fields": {}}, "unknown layer"),
        ({"value": "jrnn.initializers.orthogonal", "fields": {}}, "model: expected a layer"),
        ({"value": "jrnn.cells.lstm.LSTM", "fields": {"hidden": 1}}, "unknown initialiser"),
        ({"layer": "jrnn.LSTM"}, "expected a description"),
        ({"layer": 3, "fields": {}}, "expected a description"),
        ({"float": "12"}, "expected a description"),
        ({}, "expected a description"),
        ([], "model: expected a layer"),
        (None, "model: expected a layer"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        described.decode(data, {})


def drop(name):
    return lambda header: header.pop(name)


def rename(header):
    header["2.c"] = header.pop("2.b")


def retouch(header):
    header["__metadata__"]["layers"] = header["__metadata__"]["layers"].replace("0.2", "0.3")


def squeeze(header):
    header["2.b"]["shape"] = [3, 1]


CHANGES = {
    "a hole in the data": (drop("2.b"), {}, "2.w: expected its data to begin at byte"),
    "a renamed parameter": (rename, {}, r"missing parameters \['2.b'\]"),
    "a misshapen parameter": (squeeze, {}, r"2.b has the shape \(3, 1\), not \(3,\)"),
    "a newer version": (None, {"jrnn.format": "2", "jrnn.version": "9.0"}, "version 1 .* got version 2, .* jrnn 9.0"),
    "no model": (drop("__metadata__"), {}, "expected a file of jrnn.save"),
    "another writer": (lambda header: header.update(__metadata__={"format": "pt"}), {}, "expected a file of jrnn.save"),
    "no tree": (lambda header: header["__metadata__"].pop("params"), {}, "expected params in the file's metadata"),
    "another model": (None, {"layers": '{"layer":"jrnn.GRU","fields":{"hidden":2}}'}, "parameters of gru"),
    "another rate": (retouch, {}, "digest differs"),
    "a wrong digest": (None, {"sha256": "0" * 64}, "digest differs"),
    "a tree of numbers": (None, {"params": "[1]"}, "params: expected a tree"),
    "a tree that is none": (None, {"params": "[{"}, "params: expected JSON"),
    "a deep tree": (None, {"params": "[" * 100_000}, "params: expected JSON|nested too deeply"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused(name, saved):
    path, *_ = saved
    change, texts, message = CHANGES[name]
    rewritten(path, change, texts)
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        jrnn.load(path)


def test_a_surplus_or_missing_parameter_is_refused_by_name(saved):
    path, *_ = saved
    arrays, texts = tensors.decode(path.read_bytes())
    path.write_bytes(b"".join(tensors.encode(arrays | {"3.w": np.ones(2, np.float32)}, texts)))
    with pytest.raises(ValueError, match=r"surplus parameters \['3.w'\]"):
        jrnn.load(path)
    path.write_bytes(b"".join(tensors.encode({name: a for name, a in arrays.items() if name != "2.w"}, texts)))
    with pytest.raises(ValueError, match=r"missing parameters \['2.w'\]"):
        jrnn.load(path)


def test_parameters_that_the_class_of_today_does_not_have_are_refused_by_name(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own(Layer):
        def init(self, key, in_features):
            return {"w": jnp.ones((in_features, 4))}

    jrnn.save(tmp_path / "file", Own(), {"w": jnp.ones((3, 4))})
    Own.init = lambda self, key, in_features: {"w": jnp.ones((in_features, 5)), "b": jnp.ones(5)}
    with pytest.raises(ValueError, match=r"b \(5,\) is missing; w has the shape \(3, 4\), not \(3, 5\)"):
        jrnn.load(tmp_path / "file", layers=[Own])


def test_double_precision_is_not_rounded_in_silence(tmp_path):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(jnp.float64), jrnn.gru(2).init(jax.random.key(0), 3))
        jrnn.save(tmp_path / "file", jrnn.gru(2), params)
        assert bits(jrnn.load(tmp_path / "file")[1]) == bits(params)
    with pytest.raises(ValueError, match="b is float64, which JAX would round while jax_enable_x64 is off"):
        jrnn.load(tmp_path / "file")


def test_a_file_cut_short_anywhere_is_refused(saved):
    path, *_ = saved
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for end in {*range(0, header + 1, 7), *range(header, len(data), 5), *range(20), header - 1, header, len(data) - 1}:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="path: "):
            jrnn.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="bytes of data"):
        jrnn.load(path)


def test_a_flipped_byte_is_found_wherever_it_is(saved):
    path, model, params = saved
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    harmless = 0
    for at in [*range(8), *rng.sample(range(8, header), 150), *rng.sample(range(header, len(data)), 50)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            again, loaded = jrnn.load(path)
        except ValueError:
            continue
        harmless += 1  # a space of the padding that became another space
        assert again == model
        assert bits(loaded) == bits(params)
    assert harmless <= 2


HEADERS = [
    "{}", "[]", "null", '{"a":1}', '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
    '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    '{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', '{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    '{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
    '{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}}',
    '{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}',
    '{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}', '{"__metadata__":{"jrnn.format":1}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} {}',
    '{"a":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}', "{\x00}", '{"__metadata__":NaN}',
    '{"a":{"dtype":"F32","shape":[1' + "0" * 5000 + '],"data_offsets":[0,8]}}',
]  # fmt: skip


@pytest.mark.parametrize("text", HEADERS)
def test_a_header_of_nonsense_is_refused(text, tmp_path):
    data = text.encode()
    (tmp_path / "file").write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))
    with pytest.raises(ValueError, match="path: "):
        jrnn.load(tmp_path / "file")


def test_other_files_are_refused(tmp_path):
    import pickle

    for data in (b"", b"PK\x03\x04" + bytes(50), pickle.dumps({"a": 1}), bytes(1000), b"\xff" * 1000):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ValueError, match=r"path: .*expected"):
            jrnn.load(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        jrnn.load(tmp_path / "none")


def test_the_best_parameters_of_a_run_go_into_a_file(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="checkpoints need Orbax")
    from jrnn.training import fit, load_params, make_step

    model = jrnn.stack(jrnn.gru(2), jrnn.dense(1))

    def loss_fn(params, batch, key):
        return jrnn.losses.mse(jrnn.unroll(model, params, batch)[1], batch)

    params, data = model.init(jax.random.key(0), 1), [jnp.ones((3, 2, 1))]
    step = make_step(loss_fn, jrnn.optimizer("adam", 1e-2))
    result = fit(step, params, data, epochs=2, validation=data, checkpoint=tmp_path / "runs", progress=False)
    best = load_params(tmp_path / "runs", jax.eval_shape(lambda: model.init(jax.random.key(0), 1)))
    jrnn.save(tmp_path / "file", model, best)
    assert bits(jrnn.load(tmp_path / "file")[1]) == bits(result.params)


# --- programs ----------------------------------------------------------------------------------------------------

FRESH = """
import importlib.abc, pathlib, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jrnn":
            raise ImportError("jrnn is not installed here")
sys.meta_path.insert(0, Blocked())
import jax, jax.export, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")
folder = pathlib.Path(sys.argv[1])
given = np.load(folder / "given.npz")
xs, lengths = given["xs"], given["lengths"]
program = jax.export.deserialize(bytearray((folder / "model.bin").read_bytes()))
state, ys = program.call(xs, lengths=lengths)
again = program.call(xs[:4, :1], lengths=np.minimum(lengths[:1], 4))[1]
program = jax.export.deserialize(bytearray((folder / "step.bin").read_bytes()))
batch = xs.shape[1]
shapes = jax.tree.unflatten(program.in_tree, program.in_avals)[0][0]
held = jax.tree.map(lambda s: jnp.full((batch, *s.shape[1:]), jnp.nan, s.dtype), shapes)
resets, steps = jnp.ones(batch, bool), []
for x in xs:
    held, y = program.call(held, x, resets)
    resets = jnp.zeros(batch, bool)
    steps.append(y)
assert "jrnn" not in sys.modules
np.savez(folder / "made.npz", ys=ys, c=state[0]["c"], again=again, steps=np.stack(steps), held=held[0]["c"])
"""


def test_programs_run_in_a_process_without_jrnn(tmp_path):
    pytest.importorskip("flatbuffers", reason='what `pip install "jrnn[export]"` brings')
    model = jrnn.stack(jrnn.learned_state(jrnn.lstm(4)), jrnn.residual(jrnn.gru(4)), jrnn.dropout(0.5), jrnn.dense(2))
    params = model.init(jax.random.key(0), 3)
    params[0]["initial"]["c"] = jnp.arange(4.0)
    xs = jax.random.normal(jax.random.key(1), (7, 3, 3))
    lengths = jnp.array([7, 0, 4], jnp.int32)
    jrnn.export(tmp_path / "model.bin", model, params, jnp.ones((2, 2, 3)), arguments=("lengths",))
    jrnn.export(tmp_path / "step.bin", model, params, jnp.ones((2, 3)), step=True)
    np.savez(tmp_path / "given.npz", xs=xs, lengths=lengths)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=300)
    with np.load(tmp_path / "made.npz") as file:
        made = dict(file)
    state, ys = jrnn.unroll(model, params, xs, lengths=lengths)
    np.testing.assert_allclose(made["ys"], ys, atol=1e-5)
    np.testing.assert_allclose(made["c"], state[0].c, atol=1e-5)
    np.testing.assert_allclose(made["again"], ys[:4, :1], atol=1e-5)
    state, ys = jrnn.unroll(model, params, xs)
    np.testing.assert_allclose(made["steps"], ys, atol=1e-5)
    np.testing.assert_allclose(made["held"], state[0].c, atol=1e-5)


def exported(path, *args, **options):
    jrnn.export(path, *args, **options)
    return jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes()))


@pytest.mark.parametrize(
    ("model", "shape", "arguments"),
    [
        (jrnn.bidirectional(jrnn.lstm(3), jrnn.elman(2)), (2, 2, 3), ("resets", "mask")),
        (jrnn.stack(jrnn.embed(5, 3), jrnn.gru(3)), (2, 2), ("lengths",)),
        (jrnn.tdnn(3, window=2), (2, 3), ("state",)),
        (cases.StepLSTM(3), (2, 2, 2, 3), ("state", "resets")),
        (cases.Counting(), (2, 2, 3), ()),
    ],
)
def test_every_argument_and_any_batch(model, shape, arguments, tmp_path):
    pytest.importorskip("flatbuffers")
    ids = model.event_ndim == 0
    params = model.init(jax.random.key(0), None if ids else 3)
    xs = jnp.zeros(shape, jnp.int32) if ids else jnp.ones(shape)
    program = exported(tmp_path / "file", model, params, xs, bake=False, arguments=arguments)
    batch = tuple(range(3, 3 + len(shape) - 1 - model.event_ndim))
    key = jax.random.key(2)
    if ids:
        xs = jax.random.randint(key, (6, *batch), 0, 5)
    else:
        xs = jax.random.normal(key, (6, *batch, 3))
    flags = jax.random.bernoulli(key, 0.5, (6, *batch))
    state = jax.tree.map(lambda a: a + jnp.ones((), a.dtype), model.initial_state(params, batch))
    given = {"lengths": jnp.full(batch, 4, jnp.int32), "mask": flags, "resets": flags, "state": state}
    given = {name: given[name] for name in arguments}
    last, ys = jrnn.unroll(model, params, xs, **given)
    if "state" in given:
        given["state"] = state._asdict() if hasattr(state, "_asdict") else state
    got, outputs = program.call(params, xs, **given)
    np.testing.assert_allclose(outputs, ys, atol=1e-5)
    plain = [value for value in jax.tree.leaves(got, is_leaf=lambda v: hasattr(v, "_asdict"))]
    assert not any(hasattr(value, "_asdict") for value in plain)
    assert sorted(np.asarray(a).sum() for a in plain) == pytest.approx(
        sorted(np.asarray(a).sum() for a in jax.tree.leaves(last)), abs=1e-4
    )


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    cell = jrnn.gru(2)
    params, xs = cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3))
    both, both_params, stepped = jrnn.bidirectional(cell), {"forward": params, "backward": params}, {"step": True}
    refusals = [
        (TypeError, "model: expected a layer", (params, params, xs), {}),
        (TypeError, "model: expected one that has a step", (both, both_params, xs[0]), stepped),
        (TypeError, "arguments: expected a tuple of names", (cell, params, xs), {"arguments": "lengths"}),
        (ValueError, "arguments: expected names out of .*, got 'key'", (cell, params, xs), {"arguments": ("key",)}),
        (ValueError, "arguments: expected none with", (cell, params, xs[0]), stepped | {"arguments": ("mask",)}),
        (ValueError, r"xs: expected \(T, \*B, F\)", (cell, params, xs[0, 0]), {}),
        (ValueError, "xs: expected 3 features", (cell, params, jnp.ones((5, 2, 4))), {}),
    ]  # fmt: skip
    for kind, message, args, options in refusals:
        with pytest.raises(kind, match=message):
            jrnn.export(tmp_path / "file", *args, **options)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r'pip install "jrnn\[export\]"'):
        jrnn.export(tmp_path / "file", cell, params, xs)
    assert not os.listdir(tmp_path)


@dataclasses.dataclass(frozen=True)
class Wide(Layer):
    """A layer whose parameters' sizes are multiples of in_features, and a number more."""

    def init(self, key, in_features):
        return {"w": jnp.ones((3 * in_features, 2)), "v": jnp.ones(in_features + 4)}


def test_in_features_are_found_where_no_size_equals_them(tmp_path):
    jrnn.save(tmp_path / "file", Wide(), Wide().init(jax.random.key(0), 17))
    assert json.loads(tensors.decode((tmp_path / "file").read_bytes())[1]["in_features"]) == 17
    jrnn.load(tmp_path / "file", layers=[Wide])
    with pytest.raises(ValueError, match=r"parameters of Wide\(\), got others: "):
        jrnn.save(tmp_path / "file", Wide(), {"w": jnp.ones((51, 2)), "v": jnp.ones(22)})
