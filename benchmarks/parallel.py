"""Linear recurrences and Newton's method beside scans and the bandwidth of memory: ``python benchmarks/parallel.py``.

Writes ``benchmarks/results/parallel-CPU.json`` and a table, with hardware and versions. Three measurements, each in a
process of its own, the calls of a row made in turn and their medians taken:

- "linear": `jrnn.linear_scan` beside `jax.lax.scan` and `jax.lax.associative_scan`, float32, forward and with the
  gradients of ``a``, ``b`` and ``h0``, and beside a copy of as many bytes by the same number of threads. A forward pass
  reads ``a`` and ``b`` and writes ``h``; a gradient pass (of residuals that are there) reads ``a``, ``h`` and the
  cotangent of ``h`` and writes two cotangents.
- "train": a training step of minGRU beside jrnn's own GRU.
- "newton": ``backend="newton"`` beside the schedule that jrnn chooses, for one sequence of T steps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine

LINEAR = [(4096, 8, 512), (1024, 8, 512), (1024, 64), (16_384, 64), (131_072, 64), (1_048_576, 64)]
TRAIN = [(4096, 8, 256, 256)]
STEPS = (1_000, 10_000, 100_000, 1_000_000)
NEWTON = ("gru(4)", "lem(4)", "gru(64)")
SECONDS, ROUNDS = 8.0, 15
MOST = 500  # milliseconds after which a cell is not measured on longer sequences


def in_turn(calls: dict[str, Any]) -> dict[str, float]:
    """The median time of each call, in milliseconds: one of each in turn, and the first two rounds left out."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for i in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= 2:
                samples[name].append(1e3 * (time.perf_counter() - start))
        if i >= 3 and time.perf_counter() - begin > SECONDS:
            break
    return {name: round(statistics.median(found), 3) for name, found in samples.items()}


def waiting(function: Any, *args: Any) -> Any:
    """A call of a function that ends when its results are there."""
    import jax

    return lambda: jax.block_until_ready(function(*args))


def copier(numbers: int) -> Any:
    """A call that copies so many float32 by all cores, into memory that is there."""
    import numpy as np

    threads = machine.cores()
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    source, target = np.ones(numbers, np.float32), np.zeros(numbers, np.float32)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    return lambda: list(pool.map(lambda part: np.copyto(*part), parts))


def linear() -> list[dict[str, Any]]:
    """Rows of one shape: times, and the bytes moved a second as a part of a copy's."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jrnn

    def scan(a, b, h0):
        def step(h, inputs):
            h = inputs[0] * h + inputs[1]
            return h, h

        return lax.scan(step, h0, (a, b))[1]

    def associative(a, b, h0):
        first = jnp.concatenate([(b[0] + a[0] * h0)[None], b[1:]])
        return lax.associative_scan(lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1]), (a, first))[1]

    rows = []
    for shape in LINEAR:
        numbers = math.prod(shape)
        ka, kb, kg = jax.random.split(jax.random.key(0), 3)
        a = jax.random.uniform(ka, shape, minval=0.5, maxval=0.999)
        b, g, h0 = jax.random.normal(kb, shape), jax.random.normal(kg, shape), jnp.ones(shape[1:])
        forward, gradient, whole = {}, {}, {}
        for name, f in (("jrnn", jrnn.linear_scan), ("lax.scan", scan), ("associative_scan", associative)):
            run = jax.jit(f)
            residuals = jax.jit(lambda a, b, h0, f=f: jax.vjp(f, a, b, h0)[1])(a, b, h0)
            pull = jax.jit(lambda pull, g: pull(g))
            both = jax.jit(lambda a, b, h0, g, f=f: jax.vjp(f, a, b, h0)[1](g))
            forward[name] = waiting(run, a, b, h0)
            gradient[name] = waiting(pull, residuals, g)
            whole[name] = waiting(both, a, b, h0, g)
        for kind, calls, arrays in (("forward", forward, 3), ("gradient pass", gradient, 5), ("both", whole, 8)):
            copy = copier(numbers)
            found = in_turn({**calls, "copy": copy})
            part = arrays / 2 * found["copy"] / found["jrnn"]
            row = {"shape": shape, "kind": kind, "median_ms": found, "of_copy_bandwidth": round(part, 3)}
            row["copy_GB_s"] = round(8e-6 * numbers / found["copy"], 1)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def train() -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    import jrnn

    rows = []
    for steps, batch, features, hidden in TRAIN:
        xs = jax.random.normal(jax.random.key(1), (steps, batch, features))
        calls = {}
        for cell in (jrnn.min_gru(hidden), jrnn.gru(hidden), jrnn.min_lstm(hidden), jrnn.lstm(hidden)):
            params = cell.init(jax.random.key(0), features)

            def loss(params, xs, cell=cell):
                return jnp.mean(jrnn.unroll(cell, params, xs)[1] ** 2)

            step = jax.jit(lambda p, xs, loss=loss: jax.tree.map(lambda p, g: p - g, p, jax.grad(loss)(p, xs)))
            calls[repr(cell)] = waiting(step, params, xs)
        row = {"shape": (steps, batch, features, hidden), "kind": "training step", "median_ms": in_turn(calls)}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def newton() -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    import jrnn

    rows = []
    for text in NEWTON:
        cell = eval(text, {"lem": jrnn.lem, "gru": jrnn.gru})
        params = cell.init(jax.random.key(0), 4)
        for steps in STEPS:
            if rows and rows[-1]["cell"] == text and max(rows[-1]["median_ms"].values()) > MOST:
                break
            xs = jax.random.normal(jax.random.key(1), (steps, 4))
            for kind in ("forward", "with gradients"):
                calls, outputs = {}, []
                for backend in (None, "newton"):

                    def f(params, xs, backend=backend, cell=cell):
                        return jrnn.unroll(cell, params, xs, backend=backend)[1]

                    if kind == "forward":
                        run = jax.jit(f)
                        outputs.append(run(params, xs))
                    else:
                        run = jax.jit(jax.grad(lambda p, xs, f=f: jnp.mean(f(p, xs) ** 2)))
                    name = backend or jrnn.choose_backend(cell, params, xs)[0]
                    calls[name] = waiting(run, params, xs)
                row = {"cell": text, "steps": steps, "kind": kind, "median_ms": in_turn(calls)}
                if outputs:
                    row["largest_difference"] = float(jnp.max(jnp.abs(outputs[0] - outputs[1])))
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    return rows


PARTS = {"linear": linear, "train": train, "newton": newton}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one measurement, printed and not written")
    only = parser.parse_args().only
    if only:
        print(json.dumps(PARTS[only]()))
        return
    rows = {}
    for name in PARTS:
        command = [sys.executable, __file__, "--only", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        rows[name] = json.loads(output.splitlines()[-1])
    hardware = machine.hardware()
    name = "".join(c if c.isalnum() else "-" for c in hardware["cpu"].lower()).strip("-")
    path = machine.ROOT / "benchmarks" / "results" / f"parallel-{name}.json"
    content = {"hardware": hardware, "versions": machine.versions(), "unit": "ms", **rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path.relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
