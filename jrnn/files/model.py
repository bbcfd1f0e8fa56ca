"""A model and its parameters in one file: `save` and `load`.

The file is a safetensors file. Its metadata hold:

==============  ================================================================================================
`jrnn.format`   the version of this format, a number
`jrnn.version`  the jrnn that wrote the file; for people
`layers`        the model, as JSON (see `jrnn.files.layers`)
`params`        the tree of the parameters, as JSON: dicts as objects, tuples as arrays, arrays by their names
`complex`       the names of the arrays whose last axis holds real and imaginary parts, as a JSON array
`in_features`   what `init` was given, as JSON; absent where it is not known
`sha256`        a digest of all of this and of the arrays
==============  ================================================================================================
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._core.checks import is_traced
from jrnn.cells.base import Layer
from jrnn.files import layers as described
from jrnn.files import tensors

__all__ = ["load", "save"]

FORMAT = 1
_PAIRS: dict[np.dtype, Any] = {np.dtype(np.complex64): np.float32, np.dtype(np.complex128): np.float64}
_SHOWN = 8
_TEXTS = ("jrnn.format", "jrnn.version", "layers", "params", "complex", "sha256")


def save(path: str | os.PathLike[str], model: Layer, params: Any, *, in_features: Any = None) -> None:
    """Writes a model and its parameters to one file, from which `load` makes both again.

    The file is in the safetensors format, with the model described as text in its metadata: other tools can read the
    arrays, by names such as ``0.w_ih`` and ``forward.b``, and nothing in it is ever executed. It is written beside the
    path and then moved there, so that the path holds a whole file at any moment.

    Args:
      path: the file; one that exists is replaced.
      model: a layer, whose fields are numbers, strings, tuples, layers, module-level functions and initialisers. A
        class or a function of your own is written by its module and name, and given to `load`.
      params: its parameters: nested dicts and tuples of arrays of any dtype but typed PRNG keys and 4-bit integers.
      in_features: what ``model.init`` was given, for layers whose parameters' shapes do not show it; None to find it
        from these.

    Raises:
      TypeError: a field of the model or a leaf of the parameters that a file cannot hold; the message names it.
      ValueError: parameters that are not those of the model.

    >>> import os, tempfile
    >>> model = jrnn.stack(jrnn.bidirectional(jrnn.lstm(4)), jrnn.dropout(0.2), jrnn.dense(2))
    >>> params = model.init(jax.random.key(0), 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.safetensors")
    ...     jrnn.save(path, model, params)
    ...     again, loaded = jrnn.load(path)
    >>> again == model, bool(jax.tree.all(jax.tree.map(jnp.array_equal, params, loaded)))
    (True, True)
    """
    if not isinstance(model, Layer):
        raise TypeError(
            f"model: expected a layer, such as jrnn.lstm(128), got {model!r}; save takes path, model, params"
        )
    layers = described.encode(model)
    leaves: dict[str, Any] = {}
    structure = _structure(params, (), leaves)
    if is_traced(leaves):
        raise TypeError("params: expected arrays that are known, got traced ones; call save outside jit and grad")
    in_features, known = _check_params(
        model, structure, {name: np.shape(leaf) for name, leaf in leaves.items()}, in_features
    )
    arrays, pairs = {}, []
    for name, leaf in leaves.items():
        array = _host(name, leaf)
        if array.dtype in _PAIRS:
            pairs.append(name)
            array = np.stack([array.real, array.imag], -1)
        arrays[name] = array
    from jrnn import __version__

    texts = {
        "jrnn.format": str(FORMAT),
        "jrnn.version": __version__,
        "layers": _text(layers),
        "params": _text(structure),
        "complex": _text(pairs),
    }
    if known:
        texts["in_features"] = _text(in_features)
    texts["sha256"] = _digest(arrays, texts)
    tensors.write_atomically(path, tensors.encode(arrays, texts))


def load(path: str | os.PathLike[str], *, layers: Any = ()) -> tuple[Layer, Any]:
    """The model and the parameters that `save` wrote: ``model, params = jrnn.load(path)``.

    Nothing in the file is executed, and no module that it names is imported: a model with a user's layer, function
    or initialiser loads where these are given.

    Args:
      path: the file.
      layers: classes of layers, functions and initialisers of your own that the model is made of, as a list. A class
        that has moved since the file was written is found by the name that the file has for it:
        ``layers={"train.MyCell": MyCell}``.

    Returns:
      ``(model, params)``. The model equals the one saved. The parameters equal those saved, bit for bit, in the same
      tree, as arrays on the default device.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is cut short, changed, of a newer version or not one of `save`; a layer is unknown; a
        parameter is missing, surplus or of another shape than the model has; 64-bit parameters while
        ``jax_enable_x64`` is off. The message names it.

    >>> import os, tempfile
    >>> @dataclasses.dataclass(frozen=True)
    ... class Scaled(jrnn.Cell):
    ...     factor: float
    ...     def init(self, key, in_features):
    ...         return {"scale": jnp.ones(in_features)}
    ...     def initial_state(self, params, batch_shape):
    ...         return ()
    ...     def step(self, params, state, x, key=None):
    ...         return state, self.factor * params["scale"] * x
    >>> model = jrnn.stack(Scaled(0.5), jrnn.gru(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.safetensors")
    ...     jrnn.save(path, model, model.init(jax.random.key(0), 3))
    ...     jrnn.load(path, layers=[Scaled])[0] == model
    True
    """
    own = described.named(layers)
    data = pathlib.Path(path).read_bytes()
    try:
        return _load(data, own)
    except RecursionError:
        raise ValueError(f"path: {os.fspath(path)}: expected a file of jrnn.save, got one nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)}: {error}") from error


def _load(data: bytes, own: Mapping[str, Any]) -> tuple[Layer, Any]:
    arrays, texts = tensors.decode(data)
    version = texts.get("jrnn.format")
    if version is None:
        raise ValueError(
            "expected a file of jrnn.save, got a safetensors file without a model in its metadata; weights for a "
            "model that you have are read by jrnn.interop"
        )
    if version != str(FORMAT):
        raise ValueError(
            f"expected version {FORMAT} of the format, which this jrnn reads, got version {version}, written by jrnn "
            f"{texts.get('jrnn.version')}; update jrnn"
        )
    if lacking := [name for name in _TEXTS if name not in texts]:
        raise ValueError(f"expected {', '.join(lacking)} in the file's metadata, which lack it")
    structure = tensors.parse(texts["params"], "params")
    names = list(_names(structure))
    if twice := sorted(name for name, count in collections.Counter(names).items() if count > 1):
        raise ValueError(f"params: expected each array once in the tree, got {twice} more than once")
    if missing := sorted(set(names) - set(arrays)):
        raise ValueError(f"params: missing parameters {missing}, which the file's tree has and its data have not")
    if surplus := sorted(set(arrays) - set(names)):
        raise ValueError(f"params: surplus parameters {surplus}, which the file's data have and its tree has not")
    digest = _digest(arrays, {name: text for name, text in texts.items() if name != "sha256"})
    model = described.decode(tensors.parse(texts["layers"], "layers"), own)
    for name in tensors.parse(texts["complex"], "complex"):
        arrays[name] = _joined(name, arrays.get(name))
    for name, array in arrays.items():
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(
                f"params: {name} is {array.dtype}, which JAX would round while jax_enable_x64 is off; switch it on "
                '(jax.config.update("jax_enable_x64", True)), or save the parameters in 32 bits'
            )
    if "in_features" in texts:
        in_features = _tuples(tensors.parse(texts["in_features"], "in_features"))
        _check_params(model, structure, {name: array.shape for name, array in arrays.items()}, in_features, given=True)
    if digest != texts["sha256"]:  # last, since the other checks can say more
        raise ValueError(
            "expected the contents that jrnn.save wrote, got others: the digest differs, so that the file was damaged, "
            "or edited by another tool"
        )
    return model, _tree(structure, {name: jnp.array(array) for name, array in arrays.items()})


# --- the tree ----------------------------------------------------------------------------------------------------


def _structure(tree: Any, path: tuple[str, ...], leaves: dict[str, Any]) -> Any:
    """The tree with the names of its arrays in their places; ``leaves`` gets the arrays."""
    where = ".".join(path) or "params"
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"params: expected strings as the keys of dicts, got {key!r} in {where}")
        return {key: _structure(value, (*path, _part(key, path)), leaves) for key, value in tree.items()}
    if type(tree) is tuple:
        return [_structure(value, (*path, str(i)), leaves) for i, value in enumerate(tree)]
    if not (hasattr(tree, "shape") and hasattr(tree, "dtype")):
        raise TypeError(
            f"params: expected nested dicts and tuples of arrays, got {type(tree).__name__} at {where}; parameters are "
            "what model.init gives"
        )
    leaves[where] = tree
    return where


def _part(key: str, path: tuple[str, ...]) -> str:
    """A key as a part of a name: dots separate parts, and one name has a meaning of its own in the format."""
    part = key.replace("%", "%25").replace(".", "%2E")
    return part if path or part not in ("__metadata__", "params", "") else f"%{part}"


def _names(structure: Any) -> Iterator[str]:
    if isinstance(structure, str):
        yield structure
    elif isinstance(structure, dict | list):
        for entry in structure.values() if isinstance(structure, dict) else structure:
            yield from _names(entry)
    else:
        raise ValueError(f"params: expected a tree of dicts, tuples and names, got {structure!r}")


def _tree(structure: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(structure, str):
        return arrays[structure]
    if isinstance(structure, dict):
        return {key: _tree(value, arrays) for key, value in structure.items()}
    return tuple(_tree(value, arrays) for value in structure)


# --- the arrays --------------------------------------------------------------------------------------------------


def _host(name: str, leaf: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"params: expected arrays of numbers, got {leaf.dtype} at {name}; keep PRNG keys outside of the "
            "parameters, or store jax.random.key_data of them"
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"params: expected arrays that this process holds whole, got {name}, which lies on several")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"params: expected arrays, got the shape of one at {name}")
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in _PAIRS and not tensors.named(array.dtype):
        raise TypeError(f"params: expected one of the dtypes of the safetensors format, got {array.dtype} at {name}")
    return array


def _joined(name: Any, pairs: np.ndarray | None) -> np.ndarray:
    """Complex numbers of their real and imaginary parts, with every bit of both."""
    dtypes: dict[Any, np.dtype] = {np.dtype(part): whole for whole, part in _PAIRS.items()}
    if pairs is None or pairs.dtype not in dtypes or pairs.shape[-1:] != (2,):
        raise ValueError(f"complex: expected the name of an array of real and imaginary parts, got {name!r}")
    return np.ascontiguousarray(pairs).view(dtypes[pairs.dtype])[..., 0]


def _digest(arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> str:
    """Of the contents, wherever in the file they lie."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    for name in sorted(texts):
        add(name.encode())
        add(texts[name].encode())
    for name in sorted(arrays):
        add(f"{name} {arrays[name].dtype.name} {arrays[name].shape}".encode())
        add(tensors.raw(arrays[name]))
    return digest.hexdigest()


# --- parameters and model ----------------------------------------------------------------------------------------


def _check_params(
    model: Layer, structure: Any, shapes: dict[str, tuple[int, ...]], in_features: Any, given: bool = False
) -> tuple[Any, bool]:
    """Raises if parameters are not those of the model. Returns ``in_features``, and whether it is known.

    Where it is not given it is one of the numbers that the parameters' shapes have, or None, as for ids.
    """
    numbers = [size for shape in shapes.values() for size in shape]
    pending: list[Any] = [*dict.fromkeys([*numbers, None, 1])]
    if given or in_features is not None:
        pending = [in_features]
    best: list[str] | None = None
    taken: dict[int, dict[str, Any]] = {}
    refusal: Exception | None = None
    while pending:
        candidate = pending.pop(0)
        try:
            form = jax.eval_shape(lambda key, f=candidate: model.init(key, f), jax.eval_shape(jax.random.key, 0))
        except Exception as error:  # a size that the layer refuses, in whatever way
            refusal = error
            continue
        leaves: dict[str, Any] = {}
        expected = _structure(form, (), leaves)
        wanted = {name: leaf.shape for name, leaf in leaves.items()}
        found = _differences(shapes, wanted)
        if not found and expected == structure:
            return candidate, True
        found = found or ["the tree has other dicts or tuples than model.init makes"]
        best = found if best is None or len(found) < len(best) else best
        if isinstance(candidate, int) and not given:
            taken[candidate] = wanted
            if len(taken) == 2:  # where a size is a multiple of in_features, or a number more, two tell which
                pending.extend(n for n in _solutions(shapes, *taken.items()) if n not in (*taken, *pending))
    if best is None:
        if given or in_features is not None:
            raise ValueError(f"in_features: {model!r} does not take {in_features!r}: {refusal}") from refusal
        return None, False
    more = [f"and {len(best) - _SHOWN} more"] if len(best) > _SHOWN else []
    raise ValueError(
        f"params: expected the parameters of {model!r}, got others: {'; '.join(best[:_SHOWN] + more)}. Make them with "
        "model.init(key, in_features), and where their shapes do not show in_features, give it to save"
    )


def _solutions(shapes: dict[str, tuple[int, ...]], one: Any, other: Any) -> list[int]:
    """Which in_features would give a parameter the size that it has, from the sizes that two of them give."""
    (a, first), (b, second) = one, other
    found = []
    for name in first.keys() & second.keys() & shapes.keys():
        for size, x, y in zip(shapes[name], first[name], second[name], strict=False):
            if x != y and (size - x) * (b - a) % (y - x) == 0:
                found.append(a + (size - x) * (b - a) // (y - x))
    return [number for number in dict.fromkeys(found) if number >= 0]


def _differences(got: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    found = [f"{name} {expected[name]} is missing" for name in expected if name not in got]
    found += [f"{name} {got[name]} is surplus" for name in got if name not in expected]
    both = [name for name in got if name in expected and got[name] != expected[name]]
    return found + [f"{name} has the shape {got[name]}, not {expected[name]}" for name in both]


# --- text --------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
