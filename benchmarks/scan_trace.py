"""What tracing `jrnn.scan` costs beside tracing `jax.lax.scan`, for bodies that were never seen before.

``python -m benchmarks.scan_trace [repetitions]`` prints, for bodies of the table in ``tests/bodies.py``, the medians of
the milliseconds of processor time that a trace takes, forward and with gradients. Each repetition has sizes of its own,
and what was kept of gates that were written in C++ is forgotten before it. The first
repetition is not counted: it loads what is loaded once in a process.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

import jrnn
from jrnn.schedules.native import emit
from tests.bodies import BODIES

NAMES = (
    "elman", "concatenated_lstm", "four_products_lstm", "linen_lstm", "linen_optimized_lstm", "linen_gru", "haiku_lstm",
    "equinox_gru", "reset_gru", "held", "no_product",
)  # fmt: skip
TIME, BATCH, FEATURES = 100, 32, 64
SCANS = {"jax.lax.scan": jax.lax.scan, "jrnn.scan": jrnn.scan}


def traced(body, scan, hidden, gradients):
    """Seconds of processor time of one trace."""
    weights, carry, step = body.make(jax.random.key(0), FEATURES, hidden, (BATCH,))
    xs = jax.ShapeDtypeStruct((TIME, BATCH, FEATURES), jnp.float32)

    def loss(weights, carry, xs):
        outs = scan(lambda carry, x: step(weights, carry, x), carry, xs)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outs) if jnp.issubdtype(leaf.dtype, jnp.floating))

    function = jax.jit(jax.grad(loss) if gradients else loss)
    emit._of_program.cache_clear()
    start = time.process_time()
    function.trace(weights, carry, xs)
    return time.process_time() - start


def main(repetitions: int) -> None:
    hidden = 128
    print(f"{'':24}{'forward':>24}{'with gradients':>36}")
    for body in BODIES:
        if body.missing or body.name not in NAMES:
            continue
        row = f"{body.name:24}"
        for gradients in (False, True):
            found = {name: [] for name in SCANS}
            for i in range(repetitions + 1):
                for name, scan in SCANS.items():
                    hidden += 8
                    seconds = traced(body, scan, hidden, gradients)
                    if i:
                        found[name].append(seconds * 1e3)
            plain, ours = (statistics.median(times) for times in found.values())
            row += f"{plain:10.1f} -> {ours:6.1f} ms, {ours / plain:5.2f} x"
        print(row, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
