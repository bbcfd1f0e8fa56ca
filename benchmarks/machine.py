"""What a measurement depends on: hardware and versions, and how fast this machine multiplies matrices."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "dm-haiku", "equinox", "keras", "torch")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
ROOT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """CPU model, number of cores and vector instructions, as far as the system says."""
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
        model = found.group(1).strip() if found else model
        found = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
        flags = set(found.group(1).split()) if found else flags
    return {
        "cpu": model,
        "machine": platform.machine(),
        "cores": cores(),
        "flags": {name: name in flags for name in FLAGS},
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Python, jrnn and the peers' files with a hash of their source, and every package that is installed."""
    found = {
        "python": platform.python_version(),
        "jrnn": f"{_version('jrnn')} (source {source_hash(ROOT / 'jrnn')})",
        "peers": f"as used in source {source_hash(ROOT / 'benchmarks' / 'peers')}",
    }
    for name in PACKAGES:
        if (version := _version(name)) is not None:
            found[name] = version
    return found


def source_hash(folder: Path) -> str:
    """Eight digits that change with any change to the modules of a folder, C++ included."""
    digest = hashlib.sha256()
    for path in sorted(path for ending in ("py", "cc", "h") for path in folder.rglob(f"*.{ending}")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def environment(settings: dict[str, Any]) -> dict[str, Any]:
    """All of it, and how much is measured: two results compare where these are equal."""
    return {"hardware": hardware(), "versions": versions(), "settings": settings}


def fingerprint(environment: dict[str, Any]) -> str:
    """A short name for an environment."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]


def slug() -> str:
    """A folder's name for this machine."""
    found = hardware()
    return re.sub(r"[^a-z0-9]+", "-", f"{found['cpu']} {found['cores']} cores".lower()).strip("-")


def slug_of(words: str, quick: bool = False) -> str:
    """A folder's name from words."""
    return ("quick-" if quick else "") + re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def matmul_rate(size: int = 2048, repeats: int = 12) -> float:
    """Floating-point operations per second of a large float32 product, the best of several: the floor's rate."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), jnp.float32)
    compiled = jax.jit(jnp.matmul).lower(a, a).compile()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(a, a))
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def rates(size: int = 8192, repeats: int = 5) -> dict[str, float]:
    """What this process's JAX device can do: operations per second of a large product in each arithmetic, and ``copy``.

    Each is the best of several runs of calls that are waited for together. ``copy`` counts bytes read and written.
    """
    import jax
    import jax.numpy as jnp

    def best(function: Any, *args: Any) -> float:
        compiled = jax.jit(function).lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready([compiled(*args) for _ in range(4)])
            times.append((time.perf_counter() - start) / 4)
        return min(times)

    a = jax.random.normal(jax.random.key(0), (size, size))
    found: dict[str, float] = {}
    for name, setting in {"exact": "highest", "tf32": "tensorfloat32"}.items():
        with jax.default_matmul_precision(setting):
            found[name] = 2.0 * size**3 / best(jnp.matmul, a, a)
    for name in ("bfloat16", "float16"):
        found[name] = 2.0 * size**3 / best(jnp.matmul, a.astype(name), a.astype(name))
    large = jnp.zeros(4 * size**2, jnp.float32)
    found["copy"] = 2.0 * large.nbytes / best(lambda x: x + 1, large)
    return found


def gpu() -> dict[str, Any]:
    """The GPU's name, memory and driver, as far as the system says, and the versions of its libraries."""
    found: dict[str, Any] = {}
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        found |= dict(zip(("name", "memory", "driver"), text.strip().split("\n")[0].split(", "), strict=False))
    except (OSError, subprocess.SubprocessError):
        pass
    plugins = [
        f"{name}-cuda{version}-{part}" for name in ("jax",) for version in (12, 13) for part in ("plugin", "pjrt")
    ]
    for name in (*plugins, "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        if (version := _version(name)) is not None:
            found[name] = version
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
