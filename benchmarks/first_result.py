"""How long the first gradient of an LSTM takes in a new process: with an empty cache of compiled code, and a warm one.

``python benchmarks/first_result.py`` prints the seconds of three processes that begin with an empty cache each, and of
three that find what the first of these left. Importing and making parameters are not counted.
"""

import os
import subprocess
import sys
import tempfile

PROGRAM = """
import time
import jax, jax.numpy as jnp
import jrnn

cell, xs = jrnn.lstm(256), jnp.ones((100, 32, 64))
params = jax.block_until_ready(cell.init(jax.random.key(0), 64))
start = time.perf_counter()
loss = lambda params: jnp.sum(jrnn.unroll(cell, params, xs)[1])
jax.block_until_ready(jax.jit(jax.grad(loss))(params))
print(f"{time.perf_counter() - start:.2f}")
"""


def seconds(cache: str) -> str:
    environment = {**os.environ, "JRNN_CACHE_DIR": cache}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    folders = [tempfile.TemporaryDirectory() for _ in range(3)]
    print("empty cache:", *(seconds(folder.name) for folder in folders))
    print("warm cache: ", *(seconds(folders[0].name) for _ in range(3)))


if __name__ == "__main__":
    main()
