"""What the compiled loop loses to other threads: PyTorch in the same process, and one busy process beside it.

``python benchmarks/neighbours.py`` writes ``benchmarks/results/neighbours-CPU.json``, with hardware and versions. Each
case runs in a process of its own. A case is the forward pass of an LSTM by jrnn and by PyTorch

- "alone": one library after the other,
- "in turns": one call of each in turn, so that each begins while the threads of the other may still be spinning,
- "in turns, passive": the same with ``OMP_WAIT_POLICY=PASSIVE``, which makes PyTorch's threads sleep instead,
- "busy": one library after the other, beside a process that keeps one core busy.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine

SHAPES = ((48, 70, 96, 200), (32, 100, 256, 256))  # (B, T, F, H)
CASES = {"alone": {}, "in turns": {}, "in turns, passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "busy": {}}
CALLS, ROUNDS = 40, 3


def run(case: str, shape: tuple[int, int, int, int]) -> dict[str, list[float]]:
    """Milliseconds of each call, by library."""
    import jax
    import numpy as np
    import torch

    import jrnn

    batch, steps, features, hidden = shape
    cell = jrnn.lstm(hidden)
    params = cell.init(jax.random.key(0), features)
    xs = np.random.default_rng(0).standard_normal((steps, batch, features)).astype(np.float32)
    forward = jax.jit(lambda params, xs: jrnn.unroll(cell, params, xs)[1])
    module, on_device, tensor = torch.nn.LSTM(features, hidden), jax.numpy.asarray(xs), torch.from_numpy(xs)

    def by_torch() -> None:
        with torch.inference_mode():
            module(tensor)

    calls = {"jrnn": lambda: jax.block_until_ready(forward(params, on_device)), "torch": by_torch}
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def call(name: str, keep: bool = True) -> None:
        start = time.perf_counter()
        calls[name]()
        if keep:
            samples[name].append(round(1e3 * (time.perf_counter() - start), 3))

    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if case == "busy" else None
    try:
        for name in calls:
            call(name, keep=False)  # which compiles
        if case.startswith("in turns"):
            for _ in range(CALLS):
                for name in calls:
                    call(name)
        else:
            for name in calls:
                time.sleep(0.5)  # until the threads of the other sleep
                for i in range(CALLS + 3):
                    call(name, keep=i >= 3)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return samples


def main() -> None:
    if len(sys.argv) == 3:  # one case, in this process
        print(json.dumps(run(sys.argv[1], tuple(map(int, sys.argv[2].split(","))))))  # type: ignore[arg-type]
        return
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        samples: dict[str, dict[str, list[float]]] = {case: {"jrnn": [], "torch": []} for case in CASES}
        for _ in range(ROUNDS):  # of all cases in turn, so that a slow moment of the machine meets each of them
            for case, variables in CASES.items():
                command = [sys.executable, __file__, case, ",".join(map(str, shape))]
                output = subprocess.run(command, env={**os.environ, **variables}, check=True, stdout=subprocess.PIPE)
                for name, found in json.loads(output.stdout.splitlines()[-1]).items():
                    samples[case][name] += found
        for case, by_library in samples.items():
            medians = {name: round(statistics.median(found), 2) for name, found in by_library.items()}
            rows.append({"shape": shape, "case": case, "median_ms": medians, "samples_ms": by_library})
            print(shape, case, medians, flush=True)
    hardware = machine.hardware()
    name = "".join(c if c.isalnum() else "-" for c in hardware["cpu"].lower()).strip("-")
    path = machine.ROOT / "benchmarks" / "results" / f"neighbours-{name}.json"
    content = {"hardware": hardware, "versions": machine.versions(), "layer": "LSTM, forward, float32", "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path.relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
