"""Named arrays from files: safetensors, `.npz`, pickles of NumPy arrays (read without unpickling) and PyTorch's own."""

from __future__ import annotations

import os
import pickletools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jrnn.interop._common import require

PYTORCH = "the CPU build is enough: pip install torch --index-url https://download.pytorch.org/whl/cpu"


def read_arrays(source: Any) -> dict[str, np.ndarray]:
    """The arrays of a file or of a mapping, by name. Nothing of the file is executed.

    Args:
      source: a mapping of names to arrays (a PyTorch ``state_dict``, say), or the path of a file: ``.safetensors``,
        ``.npz``, ``.pkl`` or ``.pickle`` with a dict of NumPy arrays, anything else as `torch.save` writes it.

    Returns:
      NumPy arrays in the dtypes of the source.

    Raises:
      ImportError: the file's format needs a package that is not installed.
      TypeError: a mapping of something else.
      ValueError: a file that is not of its format, or that holds more than arrays.
    """
    if isinstance(source, Mapping):
        return {str(name): _array(name, value) for name, value in source.items()}
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a path or a mapping of names to arrays, got {type(source).__name__}")
    path = os.fspath(source)
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix == ".safetensors":
            return _safetensors(path)
        if suffix == ".npz":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
                return dict(found)
        if suffix in (".pkl", ".pickle"):
            with open(path, "rb") as file:
                return unpickle_arrays(file.read())
        torch = require("torch", PYTORCH)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"source: expected a whole {suffix or 'PyTorch'} file of arrays at {path!r}: {error}"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"source: expected a state_dict in {path!r}, got {type(found).__name__}")
    return read_arrays(found)


def _safetensors(path: str) -> dict[str, np.ndarray]:
    safetensors = require("safetensors", 'install it with pip install "jrnn[safetensors]"')
    # Through NumPy's names of dtypes, with bfloat16 as ml_dtypes has it.
    numpy = require("safetensors.numpy", 'install it with pip install "jrnn[safetensors]"')
    del safetensors
    return numpy.load_file(path)


def _array(name: Any, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            return value.float().numpy().astype("bfloat16")
        return value.numpy()
    if isinstance(value, Mapping):
        raise TypeError(f"source: expected arrays by name, got a mapping under {name!r}; pass source[{name!r}]")
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"source: expected an array under {name!r}, got {type(value).__name__}")
    return np.asarray(value)


# --- pickles of NumPy arrays

_MARK = object()
# The names that pickles of NumPy arrays need, by what they stand for here.
_NAMES = {
    **{f"numpy.{core}.multiarray _reconstruct": "reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": "frombuffer" for core in ("core", "_core")},
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    **{f"{builtins} bytes": "bytes" for builtins in ("builtins", "__builtin__")},
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class _Array:
    """An array under construction: NumPy's `_reconstruct` makes it, its state (shape, dtype, bytes) fills it."""

    value: np.ndarray | None = None


class _Dtype:
    def __init__(self, name: str) -> None:
        self.name, self.order = name, "="


def unpickle_arrays(data: bytes) -> dict[str, np.ndarray]:
    """A pickled dict of NumPy arrays, by a reader that knows nothing but dicts, strings, numbers and such arrays.

    A pickle is a program for a small stack machine, and what makes it dangerous is that it may import and call
    anything. This reader imports and calls nothing: the three names that NumPy's arrays need stand for themselves, and
    every other name, and every instruction that such pickles do not need, is a ValueError.

    >>> import pickle
    >>> unpickle_arrays(pickle.dumps({"w": np.arange(3.0)}))["w"]
    array([0., 1., 2.])
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_global(argument if name == "GLOBAL" else " ".join(_pop(stack, 2)), position))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_pop(stack, int(name[-1]))))
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "REDUCE":
            stack.append(_reduce(*_pop(stack, 2)))
        elif name == "BUILD":
            (state,) = _pop(stack, 1)
            _build(stack[-1], state)
        elif name in ("SETITEM", "SETITEMS"):
            items = _pop(stack, 2) if name == "SETITEM" else _since_mark(stack)
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "STOP":
            break
        else:
            raise ValueError(f"source: expected a pickled dict of NumPy arrays, got {name} at byte {position}")
    found = stack[-1] if stack else None
    if not isinstance(found, dict) or not all(isinstance(value, _Array) for value in found.values()):
        raise ValueError(f"source: expected a pickled dict of NumPy arrays, got {type(found).__name__}")
    return {str(name): value.value for name, value in found.items()}


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("source: expected a whole pickle, got one whose instructions do not fit together")
    items = stack[-count:]
    del stack[-count:]
    return items


def _since_mark(stack: list[Any]) -> list[Any]:
    at = max(i for i, value in enumerate(stack) if value is _MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _global(name: str, position: int | None) -> str:
    if name not in _NAMES:
        raise ValueError(f"source: expected NumPy arrays only, got the name {name!r} at byte {position}")
    return _NAMES[name]


def _reduce(function: Any, arguments: Any) -> Any:
    if function == "reconstruct":
        return _Array()
    if function == "dtype" and isinstance(arguments[0], str):
        return _Dtype(arguments[0])
    if function == "encode" and isinstance(arguments[0], str) and arguments[1:] == ("latin1",):
        return arguments[0].encode("latin1")
    if function == "bytes" and arguments == ():
        return b""
    if function == "frombuffer":
        data, dtype, shape, order = arguments
        made = _Array()
        _build(made, (1, shape, dtype, order == "F", bytes(data)))
        return made
    raise ValueError(f"source: expected NumPy arrays only, got a call of {function!r}")


def _build(target: Any, state: Any) -> None:
    if isinstance(target, _Dtype):
        target.order = state[1]
    elif isinstance(target, _Array):
        _, shape, dtype, fortran, data = state
        kind = np.dtype(dtype.name)
        if kind.hasobject or not isinstance(data, bytes):
            raise ValueError(f"source: expected arrays of numbers, got one of {kind}")
        array = np.frombuffer(data, kind.newbyteorder(dtype.order) if dtype.order in "<>" else kind)
        target.value = array.reshape(shape, order="F" if fortran else "C").astype(kind)
    else:
        raise ValueError("source: expected NumPy arrays only, got the state of something else")
