"""The table of bodies that `jrnn.scan` is held to `jax.lax.scan` on: a new row is tested by every law there.

A body is made by ``make(key, F, H, batch_shape)``, which gives its weights, the carry that it starts from, and
``step(weights, carry, x) -> (carry, y)``.
"""

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jrnn


class Body(NamedTuple):
    """``products``: in a step of the loop, once it is read; None where it runs as ``jax.lax.scan``.

    ``reason``: why it is not read as a cell, if it is not. ``native``: why the compiled loop does not serve, if it
    does not. ``given``: the number of gates whose inputs x is, ``given * H`` features; 0 where x has F features.
    """

    name: str
    make: Any
    products: int | None = 1
    reason: str = ""
    batches: tuple[tuple[int, ...], ...] = ((4,),)
    peer: str = ""
    native: str = ""
    given: int = 0

    @property
    def missing(self) -> bool:
        return bool(self.peer) and importlib.util.find_spec(self.peer) is None


def weights(key, **shapes):
    keys = jax.random.split(key, len(shapes))
    return {n: 0.5 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def start(batch, hidden, count=1):
    states = tuple(0.3 * jnp.cos(jnp.arange(hidden) + i) + jnp.zeros((*batch, hidden)) for i in range(count))
    return states[0] if count == 1 else states


def lstm_gates(i, f, g, o, c):
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def elman(key, F, H, batch):
    def step(w, h, x):
        h = jnp.tanh(x @ w["x"] + h @ w["h"] + w["b"][(None,) * len(batch)])
        return h, h

    return weights(key, x=(F, H), h=(H, H), b=(H,)), start(batch, H), step


def concatenated_lstm(key, F, H, batch):
    """``[x, h]`` before one product, which is split."""

    def step(w, state, x):
        h, c = state
        z = jnp.concatenate([x, h], -1) @ w["w"] + jnp.broadcast_to(w["b"], (*batch, 4 * H))
        return lstm_gates(*jnp.split(z, 4, -1), c)

    return weights(key, w=(F + H, 4 * H), b=(4 * H,)), start(batch, H, 2), step


def library_product(key, F, H, batch):
    """Both products by `jrnn.product`, as a cell of one's own has them."""

    def step(w, h, x):
        h = jnp.tanh(jrnn.product(x, w["x"]) + jrnn.product(h, w["h"]))
        return h, jrnn.product(h, w["out"])

    return weights(key, x=(F, H), h=(H, H), out=(H, 2)), start(batch, H), step


def sliced_lstm(key, F, H, batch):
    """Gates taken by ranges, in an order of their own; the carry has c in front."""

    def step(w, state, x):
        c, h = state
        z = jax.lax.dot_general(x, w["x"], (((x.ndim - 1,), (0,)), ((), ()))) + h @ w["h"]
        f, o, i, g = (z[..., k * H : (k + 1) * H] for k in range(4))
        (h, c), y = lstm_gates(i, f + 1.0, g, o, c)
        return (c, h), y

    return weights(key, x=(F, 4 * H), h=(H, 4 * H)), start(batch, H, 2), step


def four_products_lstm(key, F, H, batch):
    def step(w, state, x):
        h, c = state
        return lstm_gates(
            *(x @ w[f"x{n}"] + (h @ w[f"h{n}"] + jnp.reshape(w[f"b{n}"], (1,) * len(batch) + (H,))) for n in "ifgo"), c
        )

    shapes = {f"{p}{n}": {"x": (F, H), "h": (H, H), "b": (H,)}[p] for n in "ifgo" for p in "xhb"}
    return weights(key, **shapes), start(batch, H, 2), step


def einsum_lstm(key, F, H, batch):
    """Gates as an axis of the weights."""

    def step(w, state, x):
        h, c = state
        z = jnp.einsum("bf,fgk->bgk", x, w["x"]) + jnp.einsum("bh,hgk->bgk", h, w["h"])
        return lstm_gates(*(z[:, k] for k in range(4)), c)

    return weights(key, x=(F, 4, H), h=(H, 4, H)), start(batch, H, 2), step


def reshaped_lstm(key, F, H, batch):
    """One product, whose columns are made an axis of gates; gates first by a transpose."""

    def step(w, state, x):
        h, c = state
        z = (x @ w["x"] + h @ w["h"]).reshape(*batch, 4, H)
        return lstm_gates(*jnp.moveaxis(z, -2, 0), c)

    return weights(key, x=(F, 4 * H), h=(H, 4 * H)), start(batch, H, 2), step


def transposed_gru(key, F, H, batch):
    """Weights first, as a vmapped layer has them."""

    def one(w, h, x):
        r, z, n = jnp.split(w["x"] @ x + w["b"], 3)
        v_r, v_z, v_n = jnp.split(w["h"] @ h, 3)
        r, z = jax.nn.sigmoid(r + v_r), jax.nn.sigmoid(z + v_z)
        n = jnp.tanh(n + r * (v_n + w["b_hn"]))
        return n + z * (h - n)

    def step(w, h, x):
        h = jax.vmap(functools.partial(one, w))(h, x)
        return h, h

    return weights(key, x=(3 * H, F), h=(3 * H, H), b=(3 * H,), b_hn=(H,)), start(batch, H), step


def reset_gru(key, F, H, batch):
    """The pattern of reinforcement learning: the state is replaced where a flag among the inputs says so."""
    w, h, plain = transposed_gru(key, F, H, batch)

    def step(w, h, x):
        flag = x[:, 0] > 0.3
        h = jnp.where(flag[:, None], jnp.full_like(h, 0.25), h)
        return plain(w, h, x)

    return w, h, step


def reset_lstm(key, F, H, batch):
    w, state, plain = concatenated_lstm(key, F, H, batch)

    def step(w, state, x):
        keep = x[..., 1] > -0.3
        state = jax.tree.map(
            lambda s, r: jnp.where(keep[..., None], s, jnp.broadcast_to(r, s.shape)), state, (w["h0"], w["c0"])
        )
        return plain(w, state, x)

    return {**w, **weights(key, h0=(H,), c0=(H,))}, state, step


def relu_readout(key, F, H, batch):
    """A derivative of its own among the gates, and a readout of old and new state in the step."""

    def step(w, h, x):
        new = jax.nn.relu(x @ w["x"] + h @ w["h"])
        return new, {"y": jnp.sin(new) @ w["out"] + x[..., :1], "before": h * 2, "input": x}

    return weights(key, x=(F, H), h=(H, H), out=(H, 2)), start(batch, H), step


def checkpointed(key, F, H, batch):
    w, h, plain = elman(key, F, H, batch)
    return w, h, jax.checkpoint(jax.jit(plain))


def projected_input(key, F, H, batch):
    """The input is added as it comes: nothing is left of a product of it."""

    def step(w, h, x):
        h = jax.nn.gelu(h @ w["h"] + x.sum(-1, keepdims=True) * w["s"][(None,) * len(batch)])
        return h, h

    return weights(key, h=(H, H), s=(H,)), start(batch, H), step


def given(key, F, H, batch):
    """The product of the input was made before the loop; the bias was not."""

    def step(w, h, u):
        h = jnp.tanh(u + h @ w["h"] + w["b"][(None,) * len(batch)])
        return h, h

    return weights(key, h=(H, H), b=(H,)), start(batch, H), step


def given_lstm(key, F, H, batch):
    def step(w, state, u):
        h, c = state
        return lstm_gates(*jnp.split(u + h @ w["h"], 4, -1), c)

    return weights(key, h=(H, 4 * H)), start(batch, H, 2), step


def given_gru(key, F, H, batch):
    """Ranges of a wider array, split before the product is added; a reset by a flag in its first column."""

    def step(w, h, x):
        u = x[..., H : 4 * H]
        h = jnp.where(x[..., :1] > 0.3, 0.0, h)
        v_r, v_z, v_n = jnp.split(h @ w["h"], 3, -1)
        u_r, u_z, u_n = jnp.split(u, 3, -1)
        r, z = jax.nn.sigmoid(u_r + v_r), jax.nn.sigmoid(u_z + v_z)
        n = jnp.tanh(u_n + r * (v_n + w["b"][(None,) * len(batch)]))
        h = n + z * (h - n)
        return h, h

    return weights(key, h=(H, 3 * H), b=(H,)), start(batch, H), step


def embedded(key, F, H, batch):
    """Rows of a table, of which the input says which."""

    def step(w, h, x):
        h = jnp.tanh(w["rows"][(3 * x[..., 0]).astype(jnp.int32)] + h @ w["h"])
        return h, h

    return weights(key, rows=(6, H), h=(H, H)), start(batch, H), step


def scaled(key, F, H, batch):
    """A negative sum, a scaled sum, and the same product in two places."""

    def step(w, h, x):
        v = h @ w["h"]
        h = jnp.tanh(x @ w["x"] - 0.5 * v) * jax.nn.sigmoid(v) + 0.1 * h
        return h, h

    return weights(key, x=(F, H), h=(H, H)), start(batch, H), step


def stopped(key, F, H, batch):
    """Gradients stopped among the gates, and a part of the state behind a barrier."""

    def step(w, h, x):
        u, v = x @ w["x"], h @ w["h"]
        h = jnp.tanh(u + jax.lax.stop_gradient(v)) + 0.3 * jnp.sin(v) + jax.lax.stop_gradient(h)
        return h, h

    return weights(key, x=(F, H), h=(H, H)), start(batch, H), step


def fixed_carry(key, F, H, batch):
    """Weights in the carry, which no step changes."""
    w, h, plain = elman(key, F, H, batch)

    def step(_, carry, x):
        h, y = plain(carry["w"], carry["h"], x)
        return {"w": carry["w"], "h": h}, (y, carry["w"]["b"])

    return {}, {"w": w, "h": h}, step


def random_mask(key, F, H, batch):
    """Randomness of the step, keyed by its input."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        kept = jax.random.bernoulli(jax.random.key(3), 0.7, (*batch, F))
        return plain(w, h, jnp.where(kept, x, 0))

    return w, h, step


def random_steps(key, F, H, batch):
    """A key in the carry, which is split at each step, and a step that is skipped where a flag of its own says so."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, carry, x):
        h, key, done = carry
        key, now = jax.random.split(key)
        x = jnp.where(jax.random.bernoulli(now, 0.7, x.shape), x, 0)
        new, y = plain(w, h, x)
        new = jax.lax.cond(x.sum() > 0, lambda h: h * 0.5, lambda h: h, new)
        new = jnp.where(done, h, new)
        return (new, key, (new.sum() > 1) & ~done), (y, key, new @ w["h"])

    return w, (h, jax.random.key(4), jnp.array(False)), step


def memory_readout(key, F, H, batch):
    """An output of the leaf of the carry that is not multiplied."""
    w, state, plain = concatenated_lstm(key, F, H, batch)

    def step(w, state, x):
        (h, c), y = plain(w, state, x)
        return (h, c), (y, jnp.sin(c) + state[1])

    return w, state, step


def reset_before(key, F, H, batch):
    def step(w, h, x):
        r, z = jnp.split(jax.nn.sigmoid(x @ w["x"] + h @ w["h"]), 2, -1)
        n = jnp.tanh(x @ w["xn"] + (r * h) @ w["hn"])
        h = (1 - z) * n + z * h
        return h, h

    return weights(key, x=(F, 2 * H), h=(H, 2 * H), xn=(F, H), hn=(H, H)), start(batch, H), step


def joined_reset_before(key, F, H, batch):
    """The input stands before the state in one product, and between two values made of the state in another."""

    def step(w, h, x):
        r, z = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, h], -1) @ w["gates"]), 2, -1)
        n = jnp.tanh(jnp.concatenate([r * h, x, h], -1) @ w["n"])
        h = (1 - z) * n + z * h
        return h, h

    return weights(key, gates=(F + H, 2 * H), n=(F + 2 * H, H)), start(batch, H), step


def own_product(key, F, H, batch):
    """The products of a step are jrnn's own."""
    w, h, _ = elman(key, F, H, batch)

    def step(w, h, x):
        z = jrnn.product(x, w["x"]) + jrnn.product(h, w["h"])
        h = jnp.tanh(z + jnp.broadcast_to(w["b"], z.shape))
        return h, h

    return w, h, step


def own_product_twice(key, F, H, batch):
    w, h, _ = elman(key, F, H, batch)

    def step(w, h, x):
        h = jnp.tanh(jrnn.product(x, w["x"]) + jrnn.product(jnp.sin(jrnn.product(h, w["h"])), w["h"]))
        return h, jrnn.product(h, w["h"])

    return w, h, step


def no_product(key, F, H, batch):
    def step(w, h, x):
        h = jnp.tanh(0.5 * h + (x @ w["x"]))
        return h, h

    return weights(key, x=(F, H)), start(batch, H), step


def counter(key, F, H, batch):
    w, h, plain = elman(key, F, H, batch)

    def step(w, carry, x):
        h, y = plain(w, carry[0], x)
        return (h, carry[1] + 1), y

    return w, (h, jnp.array(0)), step


def total(key, F, H, batch):
    """A sum over the outputs, the best of them, and a count of those that a branch and a loop have changed."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, carry, x):
        h, total, best, count = carry
        h, y = plain(w, h, x)
        logits = h @ w["h"]
        score = jax.lax.cond(logits.sum() > 0, jnp.sin, jnp.cos, logits.sum())
        count = count + jax.lax.while_loop(lambda n: n < 3, lambda n: n + 1, (score > best).astype(jnp.int32))
        return (h, total + jax.nn.logsumexp(logits, -1), jnp.maximum(best, score), count), (y, total, x * best)

    return w, (h, jnp.zeros(batch), jnp.float32(-1), jnp.array(0)), step


def sent_after(key, F, H, batch):
    """A branch on the state, which nothing feeds back, beside weights in the carry and a counter."""
    w, carry, plain = concatenated_lstm(key, F, H, batch)

    def step(w, carry, x):
        carry, scale, t = carry
        carry, y = plain(w, carry, x * scale + 0.1 * t)
        y = jax.lax.cond(y.sum() > t, lambda y: y * scale, jnp.sin, y)
        return (carry, scale, t + scale), (y, carry[1])

    return w, (carry, jnp.float32(0.5), jnp.float32(0)), step


def two_layers(key, F, H, batch):
    """The second layer is multiplied with the state of the first side by side with its own; the sum of its outputs."""
    k_one, k_two = jax.random.split(key)
    one, first, plain_one = elman(k_one, F, H, batch)
    two, second, plain_two = concatenated_lstm(k_two, H, H, batch)

    def step(w, carry, x):
        first, second, total = carry
        first, y = plain_one(w["one"], first, x)
        second, y = plain_two(w["two"], second, y)
        return (first, second, total + y.sum(-1)), (y, first)

    return {"one": one, "two": two}, (first, second, jnp.zeros(batch)), step


def random_key(key, F, H, batch):
    """A key in the carry, split at each step, for dropout of the input and of the output."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, carry, x):
        h, key = carry
        key, ours, other = jax.random.split(key, 3)
        x = jnp.where(jax.random.bernoulli(ours, 0.7, x.shape), x / 0.7, 0)
        h, _ = plain(w, h, x)
        return (h, key), (jnp.where(jax.random.bernoulli(other, 0.5, h.shape), 2 * h, 0), key)

    return w, (h, jax.random.key(4)), step


def dropped(key, F, H, batch):
    """Dropout and zoneout of the state, by a key in the carry; units of the memory that never move."""
    w, state, plain = concatenated_lstm(key, F, H, batch)

    def step(w, carry, x):
        (h, c), key = carry
        key, ours, other = jax.random.split(key, 3)
        (new, memory), _ = plain(w, (h, c), x)
        memory = jnp.where(
            jax.random.bernoulli(ours, 0.3, c.shape) | (jnp.arange(H) == 1)[(None,) * len(batch)], c, memory
        )
        new = jnp.where(jax.random.bernoulli(other, 0.7, h.shape), new / 0.7, 0)
        return ((new, memory), key), new

    return w, (state, jax.random.key(4)), step


def random_input(key, F, H, batch):
    """A key of the step, made of its input."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        key = jax.random.key(x.sum().astype(jnp.int32))
        return plain(w, h, x + jax.random.normal(key, x.shape))

    return w, h, step


def carried_flag(key, F, H, batch):
    """A flag in the carry, which replaces the state at the next step."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, carry, x):
        h, done = carry
        h, y = plain(w, jnp.where(done[..., None], 0.25, h), x)
        return (h, x[..., 0] > 0.3), (y, done)

    return w, (h, jnp.ones(batch, bool)), step


def counted_lengths(key, F, H, batch):
    """A counter in the carry, which a mask compares to the length of each sequence."""
    w, carry, plain = concatenated_lstm(key, F, H, batch)

    def step(w, carry, x):
        old, t = carry
        valid = (t < w["lengths"])[..., None]
        new, y = plain(w, old, x)
        new = jax.tree.map(lambda n, o: jnp.where(valid, n, o), new, old)
        return (new, t + 1), jnp.where(valid, y, 0.0)

    return {**w, "lengths": jnp.arange(2, 2 + math.prod(batch)).reshape(batch)}, (carry, jnp.array(0)), step


def masked_by_leaf(key, F, H, batch):
    """The flags of the mask are computed anew for each leaf, from a counter in the carry."""
    w, carry, plain = concatenated_lstm(key, F, H, batch)

    def step(w, carry, x):
        old, t = carry
        (h, c), _ = plain(w, old, x)
        h, c = (jnp.where((t < w["lengths"])[..., None], n, o) for n, o in zip((h, c), old, strict=True))
        return ((h, c), t + 1), h

    return {**w, "lengths": jnp.arange(2, 2 + math.prod(batch)).reshape(batch)}, (carry, jnp.array(0)), step


def without_input(key, F, H, batch):
    """Nothing but the state is multiplied, and what is drawn is added: a body that needs no xs."""

    def step(w, carry, _):
        h, key = carry
        key, now = jax.random.split(key)
        h = jnp.tanh(h @ w["h"] + w["b"][(None,) * len(batch)]) + 0.1 * jax.random.normal(now, h.shape)
        return (h, key), h

    return weights(key, h=(H, H), b=(H,)), (start(batch, H), jax.random.key(4)), step


def unmoved(key, F, H, batch):
    """Nothing but the state is in the step."""

    def step(w, h, _):
        h = jnp.tanh(h @ w["h"] + w["b"][(None,) * len(batch)])
        return h, h

    return weights(key, h=(H, H), b=(H,)), start(batch, H), step


def other_generator(key, F, H, batch):
    """Keys whose numbers differ from step to step if they are drawn for all steps at once; and a branch."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, carry, x):
        h, key = carry
        key, now = jax.random.split(key)
        wave = jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)
        x = x + jnp.where(jax.random.bernoulli(now, 0.7, x.shape), wave, 0)
        h, y = plain(w, h, x)
        return (h, key), (y, jax.random.uniform(now))

    return w, (h, jax.random.key(4, impl="rbg")), step


def clock(key, F, H, batch):
    """The time, which scales a gate and is multiplied by weights, beside the sum of the inputs and the one before."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, carry, x):
        t, h, (total, before) = carry
        new, _ = plain(w, h, x + before)
        waves = jnp.sin(t * (1.0 + jnp.arange(F, dtype=x.dtype))) @ w["x"]
        h = h + (new + waves[(None,) * len(batch)] - h) / (1 + t)
        return (t + 0.5, h, (total + x, x)), (h, total, t)

    return w, (jnp.float32(0), h, (jnp.ones((*batch, F)), jnp.zeros((*batch, F)))), step


def control_flow(key, F, H, batch):
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        return jax.lax.cond(x.sum() > 0, plain, lambda w, h, x: (h, h), w, h, x)

    return w, h, step


def normalised(key, F, H, batch):
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        h, y = plain(w, h, x)
        return h - h.mean(-1, keepdims=True), y

    return w, h, step


def held(key, F, H, batch):
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        new, y = plain(w, h, x)
        return jnp.where(x[..., :1] > 0, new, h), y

    return w, h, step


def masked(key, F, H, batch):
    """Sequences of their own lengths, whose carry is held where a flag among the inputs says so."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        h = jnp.where(x[..., :1] > 0, plain(w, h, x)[0], h)
        return h, (h, jnp.tanh(h) + x[..., :1])

    return w, h, step


def masked_outputs(key, F, H, batch):
    """Readouts of the state before its mask, which the flags of the mask select."""
    w, carry, plain = concatenated_lstm(key, F, H, batch)

    def step(w, carry, x):
        taken = x[..., :1] > 0
        (h, c), _ = plain(w, carry, x)
        y = jnp.where(taken, jnp.sin(c) @ w["w"][-H:], 0.0), jnp.sin(jnp.where(taken, h / 2 + c, 1.0))
        return tuple(jnp.where(taken, new, old) for new, old in zip((h, c), carry, strict=True)), y

    return w, carry, step


def ended(key, F, H, batch):
    """The state is replaced after the step, for the next, and put out as it was before and as the step met it."""
    w, carry, plain = concatenated_lstm(key, F, H, batch)

    def step(w, carry, x):
        done = x[..., 0] > 0.3
        (h, c), _ = plain(w, carry, x)
        new = tuple(jnp.where(done[..., None], s, a) for s, a in zip((jnp.tanh(w["b"][:H]), 0.0), (h, c), strict=True))
        return new, (h, new[1], carry[0])

    return w, carry, step


def masked_reset_lstm(key, F, H, batch):
    """A reset at the beginning, and a mask at the end that keeps the carry as the step met it."""
    w, carry, plain = concatenated_lstm(key, F, H, batch)

    def step(w, carry, x):
        taken, begins = x[..., :1] > 0, x[..., 1:2] > 0.5
        begin = tuple(jnp.where(begins, jnp.full_like(leaf, 0.25), leaf) for leaf in carry)
        new, _ = plain(w, begin, x)
        h, c = (jnp.where(taken, leaf, old) for leaf, old in zip(new, carry, strict=True))
        return (h, c), h

    return w, carry, step


def effect(key, F, H, batch):
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        jax.debug.callback(lambda: None)
        return plain(w, h, x)

    return w, h, step


def unit_flags(key, F, H, batch):
    """Flags of units among the gates: of each step, and the same at all steps."""
    odd = jnp.arange(H) % 2 == 0

    def step(w, h, x):
        v = h @ w["h"] + x @ w["x"]
        h = jnp.where(x @ w["x"] > 0, jnp.tanh(v), 0.3 * v)
        return jnp.where(jnp.broadcast_to(odd, h.shape), h, 0.5 * v), h

    return weights(key, x=(F, H), h=(H, H)), start(batch, H), step


def one_for_bias(key, F, H, batch):
    """A bias as a row of the weights, by a column of ones beside the input and the state."""

    def step(w, h, x):
        ones = jnp.ones((*batch, 1))
        h = jnp.tanh(jnp.concatenate([x, h, ones], -1) @ w["w"])
        return h, h

    return weights(key, w=(F + H + 1, H)), start(batch, H), step


def numbered_reset(key, F, H, batch):
    """A reset by a select that is told by a number, and not by a flag, which of two arrays to take."""
    w, h, plain = elman(key, F, H, batch)

    def step(w, h, x):
        which = jnp.broadcast_to((x[..., :1] > 0).astype(jnp.int32), h.shape)
        return plain(w, jax.lax.select_n(which, jnp.zeros_like(h), h), x)

    return w, h, step


def broadcast_bias(key, F, H, batch):
    """One bias for all gates, which are an axis of their own."""

    def step(w, state, x):
        h, c = state
        z = (x @ w["x"] + h @ w["h"]).reshape(*batch, 4, H) + w["b"][(None,) * (len(batch) + 1)]
        return lstm_gates(*(z[..., k, :] for k in range(4)), c)

    return weights(key, x=(F, 4 * H), h=(H, 4 * H), b=(H,)), start(batch, H, 2), step


def inner_cond(key, F, H, batch):
    """A branch within a function that has a derivative of its own: for all steps at once both would be taken."""
    w, h, plain = elman(key, F, H, batch)

    def branch(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jnp.log(x.sum()) * x, lambda x: x, x)

    function = jax.custom_jvp(branch)
    function.defjvp(lambda primals, tangents: jax.jvp(branch, primals, tangents))

    def step(w, h, x):
        h, _ = plain(w, h, function(x))
        return h, function(h)

    return w, h, step


def still_input(key, F, H, batch):
    """No input in the loop, and a product of what has no derivative by the state."""

    def step(w, h, x):
        new = jnp.tanh(jax.lax.stop_gradient(h) @ w["h"] + 0.5 * h)
        return new, new * x[..., :1]

    return weights(key, h=(H, H)), start(batch, H), step


def many_gates(key, F, H, batch):
    """Sums that double, which would be terms without number if they were written out."""

    def step(w, h, x):
        u, v = x @ w["x"], h @ w["h"]
        for _ in range(40):
            u, v = u + u, v + v
        h = jnp.tanh((v + u) * 2.0**-40)
        return h, h

    return weights(key, x=(F, H), h=(H, H)), start(batch, H), step


def convolutional(key, F, H, batch):
    """A convolution of the input and one of the state over the places of a map, each with a kernel."""

    def step(w, h, x):
        z = convolve(x[..., None], w["x"]) + convolve(h, w["h"])
        h = jnp.tanh(z)
        return h, h

    return weights(key, x=(3, 1, H), h=(2, H, H)), start((*batch, F), H), step


def convolve(x, w):
    return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


def linen(name, **options):
    def make(key, F, H, batch):
        import flax.linen as nn

        cell = getattr(nn, name)(H, **options)
        carry = cell.initialize_carry(key, (*batch, F))
        params = cell.init(key, carry, jnp.ones((*batch, F)))
        params = jax.tree.map(lambda a: a + 0.1, params)
        return params, carry, cell.apply

    return make


def haiku(name):
    def make(key, F, H, batch):
        import haiku as hk

        build = getattr(hk, name)
        carry = hk.transform(lambda: build(H).initial_state(*batch)).apply({}, None)
        apply = hk.without_apply_rng(hk.transform(lambda state, x: build(H)(x, state)))
        params = apply.init(key, carry, jnp.ones((*batch, F)))

        def step(params, carry, x):
            y, carry = apply.apply(params, carry, x)
            return carry, y

        return jax.tree.map(lambda a: a + 0.1, params), carry, step

    return make


def equinox(name):
    def make(key, F, H, batch):
        import equinox as eqx

        cell = getattr(eqx.nn, name)(F, H, key=key)
        params, static = eqx.partition(cell, eqx.is_array)
        count = 2 if name == "LSTMCell" else 1

        def step(params, carry, x):
            carry = jax.vmap(eqx.combine(params, static))(x, carry)
            return carry, carry[0] if count == 2 else carry

        return params, start(batch, H, count), step

    return make


NO_BATCH = ((4,), (), (2, 3))
TWO = "a product of something computed from its state"
BODIES = (
    Body("elman", elman, batches=NO_BATCH),
    Body("concatenated_lstm", concatenated_lstm, batches=NO_BATCH),
    Body("library_product", library_product, batches=NO_BATCH),
    Body("sliced_lstm", sliced_lstm, batches=((4,), ())),
    Body("four_products_lstm", four_products_lstm, batches=NO_BATCH),
    Body("einsum_lstm", einsum_lstm),
    Body("reshaped_lstm", reshaped_lstm, batches=NO_BATCH),
    Body("transposed_gru", transposed_gru),
    Body("reset_gru", reset_gru),
    Body("reset_lstm", reset_lstm, batches=NO_BATCH),
    Body("masked", masked, batches=NO_BATCH),
    Body("masked_outputs", masked_outputs, batches=NO_BATCH),
    Body("held", held, batches=NO_BATCH),
    Body("ended", ended, batches=NO_BATCH),
    Body("masked_reset_lstm", masked_reset_lstm),
    Body("relu_readout", relu_readout, batches=NO_BATCH),
    Body("checkpointed", checkpointed),
    Body("projected_input", projected_input, batches=NO_BATCH),
    Body("given", given, batches=NO_BATCH, given=1),
    Body("given_lstm", given_lstm, batches=NO_BATCH, given=4),
    Body("given_gru", given_gru, batches=NO_BATCH, given=5),
    Body("embedded", embedded, batches=NO_BATCH),
    Body("scaled", scaled),
    Body("stopped", stopped),
    Body("fixed_carry", fixed_carry),
    Body("own_product", own_product, batches=NO_BATCH),
    Body("random_mask", random_mask),
    Body("memory_readout", memory_readout),
    Body("many_gates", many_gates),
    Body("counter", counter, batches=NO_BATCH),
    Body("total", total, batches=NO_BATCH),
    Body("sent_after", sent_after),
    Body("two_layers", two_layers, 2, batches=NO_BATCH),
    Body("random_key", random_key),
    Body("random_input", random_input),
    Body("carried_flag", carried_flag, batches=NO_BATCH),
    Body("counted_lengths", counted_lengths, batches=NO_BATCH),
    Body("masked_by_leaf", masked_by_leaf, batches=NO_BATCH),
    Body("without_input", without_input),
    Body("unmoved", unmoved, batches=NO_BATCH),
    Body("other_generator", other_generator),
    Body("clock", clock, batches=NO_BATCH),
    Body("unit_flags", unit_flags),
    Body("dropped", dropped),
    Body("linen_lstm", linen("LSTMCell"), batches=NO_BATCH, peer="flax"),
    Body("linen_optimized_lstm", linen("OptimizedLSTMCell"), batches=NO_BATCH, peer="flax"),
    Body("linen_gru", linen("GRUCell"), batches=NO_BATCH, peer="flax"),
    Body("linen_mgu", linen("MGUCell"), peer="flax"),
    Body("linen_simple", linen("SimpleCell"), peer="flax"),
    Body("haiku_lstm", haiku("LSTM"), peer="haiku"),
    Body("haiku_rnn", haiku("VanillaRNN"), peer="haiku"),
    Body("equinox_lstm", equinox("LSTMCell"), peer="equinox"),
    Body("equinox_gru", equinox("GRUCell"), peer="equinox"),
    # What is not read: these run as jax.lax.scan, and say why.
    # What is no cell: products of the state stay in the loop, and the gradients of their weights leave it.
    Body("reset_before", reset_before, 2, TWO),
    Body("joined_reset_before", joined_reset_before, 2, TWO, batches=((4,), ())),
    Body("haiku_gru", haiku("GRU"), 2, TWO, peer="haiku"),
    Body("normalised", normalised, 1, "'reduce_sum'"),
    Body("random_steps", random_steps, 2, "not of one shape and dtype"),
    Body("one_for_bias", one_for_bias, 1, "with a number that is broadcast"),
    Body("numbered_reset", numbered_reset, 1, "its gates are given an array of int32"),
    Body("broadcast_bias", broadcast_bias, 1, "it broadcasts an array over groups of features"),
    Body("still_input", still_input, 1, TWO),
    Body("own_product_twice", own_product_twice, 2, TWO),
    Body("convolutional", convolutional, 1, "'conv_general_dilated' of its state"),
    # What is not read: these run as jax.lax.scan, and say why.
    Body("no_product", no_product, None, "it has no product of its state with weights"),
    Body("control_flow", control_flow, None, "'cond' of its state"),
    Body("effect", effect, None, "it has effects"),
)


def params(bodies):
    return [
        pytest.param(body, id=body.name, marks=pytest.mark.skipif(body.missing, reason=f"{body.peer} is not installed"))
        for body in bodies
    ]
