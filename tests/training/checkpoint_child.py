"""A run that somebody kills: ``python checkpoint_child.py DIRECTORY``. Also imported, for the run nobody kills."""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.training import fit, make_step, optimizer, schedule

STEPS = 40
EPOCH = 7


def loss_fn(params, batch, key):
    xs, ys = batch
    hidden = jnp.tanh(xs @ params["w"])
    if key is not None:
        hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape).astype(hidden.dtype)
    loss = jnp.mean((hidden @ params["v"] - ys) ** 2)
    return loss, {"root": jnp.sqrt(loss)}


def data(epoch):
    """Another shuffle in each epoch; one batch of each has a NaN."""
    rng = np.random.default_rng(epoch)
    for i in range(EPOCH):
        xs = rng.normal(size=(8, 5)).astype(np.float32)
        yield np.where(i == 3, np.float32(np.nan), xs), xs[:, :1]


def run(directory, steps=STEPS, **options):
    rate = schedule("warmup_cosine", 0.05, steps=STEPS, warmup_steps=5)
    step = make_step(loss_fn, optimizer("adamw", rate, clip_norm=0.5, weight_decay=0.01))
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 16)).astype(np.float32), "v": rng.normal(size=(16, 1)).astype(np.float32)}
    validation = [(xs, ys) for xs, ys in data(10**6) if np.isfinite(xs).all()]
    return fit(
        step, params, data, key=jax.random.key(7), steps=steps, validation=validation, validate_every=5, log_every=3,
        checkpoint=directory, **{"checkpoint_every": 1, **options},
    )  # fmt: skip


def digest(result):
    """Every bit of a result."""
    state = result.state._replace(key=jax.random.key_data(result.state.key))
    leaves = jax.tree.leaves((state, result.params))
    bits = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    return json.dumps([bits, result.history, result.best, result.stopped], sort_keys=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(digest(run(sys.argv[1])))
