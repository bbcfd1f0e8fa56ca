"""Named arrays in the safetensors format, which holds no code: eight bytes of length, a JSON header, the data.

Written and read with NumPy alone. The official package ``safetensors`` reads what is written here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["DTYPES", "decode", "encode", "named", "parse", "raw", "write_atomically"]

# The format's names. What it has no name for (complex128, int4) is stored as something else, or refused.
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3": jnp.float8_e4m3fn,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # as in the official package


def encode(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Iterator[bytes]:
    """The bytes of a file, in parts. Wide dtypes come first, so that every array is aligned."""
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name in names:
        array = arrays[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield raw(arrays[name])


def named(dtype: np.dtype) -> bool:
    """Whether the format has a name for a dtype."""
    return dtype in _NAMES


def raw(array: np.ndarray) -> bytes:
    """The elements of an array as the format stores them: row-major, little-endian."""
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


def decode(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file; a ValueError that says what is wrong with it where it is not whole."""
    if len(data) < 8:
        raise ValueError(f"expected a safetensors file, got {len(data)} bytes, fewer than its first field has")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, _LONGEST_HEADER) or data[8:9] != b"{":
        raise ValueError(
            f"expected a safetensors file, got {len(data)} bytes that do not begin with a JSON header and its length; "
            "the file was cut short, or is of another kind"
        )
    header = parse(data[8 : 8 + length], "header")
    if not isinstance(header, dict):
        raise ValueError(f"expected a header that is a JSON object, got a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("expected a header whose __metadata__ maps names to strings")
    body = memoryview(data)[8 + length :]
    arrays, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (first, last) = _entry(name, entry)
        if last > len(body):
            raise ValueError(
                f"{name}: expected its data to end at byte {last} of {len(body)} in the file, which was cut short"
            )
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: expected {shape} of {dtype} to fill its {last - first} bytes, which it does not")
        if first == last:
            arrays[name] = np.empty(shape, dtype)
        else:
            little = np.frombuffer(body[first:last], dtype.newbyteorder("<"))
            arrays[name] = little.astype(dtype, copy=False).reshape(shape)
        spans.append((first, last, name))
    at = 0
    for first, last, name in sorted(spans):
        if first != at:
            raise ValueError(f"{name}: expected its data to begin at byte {at}, after what precedes it, got {first}")
        at = last
    if at != len(body):
        raise ValueError(f"expected {at} bytes of data, as the header says, got {len(body)}")
    return arrays, metadata


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected an entry of dtype, shape and data_offsets in the header, got {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: expected one of the dtypes {', '.join(DTYPES)}, got {dtype!r}")
    if not _counts(shape) or len(shape) > 64:
        raise ValueError(f"{name}: expected a shape, got {shape!r}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name}: expected where its data begins and ends, got {offsets!r}")
    return np.dtype(DTYPES[dtype]), tuple(shape), tuple(offsets)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def parse(text: bytes | str, what: str) -> Any:
    """What JSON says, in whose objects no name may occur twice."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected JSON, got something else: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name occurs twice among {[name for name, _ in pairs]}")
    return found


def write_atomically(path: str | os.PathLike[str], parts: Iterator[bytes]) -> None:
    """Writes a file so that after a crash at any moment the path holds what it held before, or all that is new."""
    target = os.path.realpath(os.fspath(path))  # what a link points to is replaced, not the link
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise IsADirectoryError(f"path: expected a file, got the directory {os.fspath(path)}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path: expected a directory to write to, found none at {folder}; make it first")
    temporary = os.path.join(folder, f".{os.path.basename(target)[:200]}.{secrets.token_hex(4)}.tmp")
    # With the permissions that any new file has.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            os.chmod(temporary, os.stat(target).st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name is on the disk only when the directory is
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
