"""The one table of cells, layers, wrappers and their combinations; every law runs over every row.

A row is a layer and the number of its input features (None: integer ids). Widths are few, so that what is compiled
for one row serves others.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn


class Case(NamedTuple):
    """``full``: run more laws in float32, those that compile, and all of them on every Python."""

    name: str
    layer: Any
    in_features: Any = 3
    full: bool = False


def softsign(x):
    return x / (1 + jnp.abs(x))


def difference(a, b):
    return a - b


@dataclasses.dataclass(frozen=True)
class StepOnly(jrnn.Cell):
    """A user's cell: a step and nothing else, its state a plain array."""

    decay: float

    def init(self, key, in_features):
        return {"scale": jnp.ones(in_features)}

    def initial_state(self, params, batch_shape):
        return jnp.zeros((*batch_shape, *params["scale"].shape), params["scale"].dtype)

    def step(self, params, state, x, key=None):
        state = self.decay * state + jnp.tanh(params["scale"] * x)
        return state, state * state


@dataclasses.dataclass(frozen=True)
class Counting(jrnn.Cell):
    """A user's cell with an integer in its state and randomness of its own; it promises nothing about keys."""

    def init(self, key, in_features):
        return {"w": jax.random.normal(key, (in_features, in_features))}

    def initial_state(self, params, batch_shape):
        h = jnp.zeros((*batch_shape, params["w"].shape[1]), params["w"].dtype)
        return {"h": h, "steps": jnp.zeros(batch_shape, jnp.int32)}

    def step(self, params, state, x, key=None):
        h = jnp.tanh(jnp.matmul(x, params["w"]) + 0.5 * state["h"])
        if key is not None:
            h = h + 0.1 * jax.random.normal(key, h.shape, h.dtype)
        return {"h": h, "steps": state["steps"] + 1}, h * (1 + state["steps"][..., None].astype(h.dtype))


@dataclasses.dataclass(frozen=True)
class StepLSTM(jrnn.Cell):
    """A user's LSTM as nothing but a step: one product of ``[x, h]``, a readout, and the memory put out beside it."""

    hidden: int
    uses_key: ClassVar[Any] = False

    def init(self, key, in_features):
        k_w, k_out = jax.random.split(key)
        return {
            "w": 0.5 * jax.random.normal(k_w, (in_features + self.hidden, 4 * self.hidden)),
            "b": jnp.ones(4 * self.hidden),
            "out": jax.random.normal(k_out, (self.hidden, 2)),
        }

    def initial_state(self, params, batch_shape):
        zeros = jnp.zeros((*batch_shape, self.hidden), params["w"].dtype)
        return {"memory": zeros + jnp.array(0.5, zeros.dtype), "h": zeros}

    def step(self, params, state, x, key=None):
        z = jrnn.product(jnp.concatenate([x, state["h"].astype(x.dtype)], -1), params["w"])
        i, f, g, o = jnp.split(z + jnp.broadcast_to(params["b"].astype(z.dtype), z.shape), 4, -1)
        c = jax.nn.sigmoid(f) * state["memory"] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return {"memory": c, "h": h}, jnp.concatenate([jrnn.product(h, params["out"]).astype(c.dtype), c], -1)


@dataclasses.dataclass(frozen=True)
class Aging(jrnn.Cell):
    """A user's cell that knows how many steps it has taken, and the input before: a part of its state needs no h."""

    hidden: int
    uses_key: ClassVar[Any] = False

    def init(self, key, in_features):
        k_x, k_h = jax.random.split(key)
        width = (in_features, self.hidden)
        return {"x": jax.random.normal(k_x, width), "h": jax.random.normal(k_h, (self.hidden, self.hidden))}

    def initial_state(self, params, batch_shape):
        h, last = (jnp.zeros((*batch_shape, n), params["x"].dtype) for n in (self.hidden, params["x"].shape[0]))
        return {"age": jnp.zeros(batch_shape, jnp.int32), "h": h, "last": last}

    def step(self, params, state, x, key=None):
        age = state["age"][..., None].astype(state["h"].dtype)
        moved = (x - state["last"].astype(x.dtype)) / (1 + age).astype(x.dtype)
        h = jnp.tanh(jrnn.product(moved, params["x"]) + jrnn.product(state["h"].astype(x.dtype), params["h"]))
        return {"age": state["age"] + 1, "h": h, "last": x.astype(state["last"].dtype)}, h / (1 + age)


@dataclasses.dataclass(frozen=True)
class Attending(jrnn.Cell):
    """A user's cell around an attention cell, with the memory, which all sequences share, among its parameters."""

    attention: jrnn.Layer
    uses_key: ClassVar[Any] = False

    def init(self, key, in_features):
        k_attention, k_memory = jax.random.split(key)
        memory = jax.random.normal(k_memory, (3, self.attention.memory_features), jnp.float32)
        return {"attention": self.attention.init(k_attention, in_features), "memory": memory}

    def initial_state(self, params, batch_shape):
        return self.attention.initial_state(params["attention"], batch_shape)

    def step(self, params, state, x, key=None):
        return self.attention.step(jrnn.remember(self.attention, params["attention"], params["memory"]), state, x)


@dataclasses.dataclass(frozen=True)
class ProjectAndUpdate(jrnn.Cell):
    """A user's cell that declares its projection."""

    hidden: int
    uses_key: ClassVar[Any] = False
    emits: ClassVar[Any] = "h"

    def init(self, key, in_features):
        k_ih, k_hh = jax.random.split(key)
        return {
            "w_ih": jax.random.normal(k_ih, (in_features, self.hidden)),
            "w_hh": 0.5 * jax.random.normal(k_hh, (self.hidden, self.hidden)),
        }

    def initial_state(self, params, batch_shape):
        return jrnn.HiddenState(jnp.full((*batch_shape, self.hidden), 0.25, params["w_hh"].dtype))

    def project(self, params, xs):
        return {"u": jrnn.product(xs, params["w_ih"])}

    def update(self, params, state, p, key=None):
        h = jnp.sin(p["u"] + jrnn.product(state.h, params["w_hh"]))
        return jrnn.HiddenState(h), h


@dataclasses.dataclass(frozen=True)
class Rotating(jrnn.Cell):
    """A user's cell in complex numbers: weights, state and outputs. Each unit turns and decays."""

    hidden: int
    uses_key: ClassVar[Any] = False

    def init(self, key, in_features):
        k_ih, k_out = jax.random.split(key)
        return {
            "rate": jnp.linspace(0.1, 1.0, self.hidden, dtype=jnp.float32),
            "w_ih": jax.random.normal(k_ih, (in_features, self.hidden), jnp.complex64),
            "w_out": jax.random.normal(k_out, (self.hidden, self.hidden), jnp.complex64),
        }

    def initial_state(self, params, batch_shape):
        return {"z": jnp.zeros((*batch_shape, self.hidden), params["w_ih"].dtype)}

    def project(self, params, xs):
        return jrnn.product(xs, params["w_ih"])

    def update(self, params, state, p, key=None):
        z = jnp.exp(jax.lax.complex(-params["rate"], 2 * params["rate"])) * state["z"] + p
        return {"z": z}, jrnn.product(z, params["w_out"])


@dataclasses.dataclass(frozen=True)
class Decoder(jrnn.Cell):
    """A user's wrapper without `draw`, with parameters of its own beside those of the layer that it holds."""

    layer: Any

    def init(self, key, in_features):
        return {"layer": self.layer.init(key, in_features), "bias": jnp.zeros(in_features, jnp.float32)}

    def initial_state(self, params, batch_shape):
        return self.layer.initial_state(params["layer"], batch_shape)

    def step(self, params, state, x, key=None):
        return self.layer.step(params["layer"], state, x + params["bias"], key)


class DrawingDecoder(Decoder):
    """A user's wrapper that draws what the layer that it holds draws."""

    def draw(self, params, key, batch_shape, in_features):
        return {**params, "layer": self.layer.draw(params["layer"], key, batch_shape, in_features)}


class Leaky(jrnn.AffineCell):
    """A user's affine cell: two gates."""

    gate_names: ClassVar[tuple[str, ...]] = ("z", "n")

    def gates(self, theta, u, v, state):
        z, n = jax.nn.sigmoid(u.z + v.z), jnp.tanh(u.n + v.n)
        return state._replace(h=z * state.h + (1 - z) * n)


class HiddenAndMemory(jrnn.LSTM):
    """A user's LSTM that puts out its whole state."""

    emits: ClassVar[Any] = ("h", "c")


@dataclasses.dataclass(frozen=True)
class Memory(jrnn.Wrapper):
    """A user's wrapper that puts out the memory of a cell."""

    cell: Any
    emits: ClassVar[Any] = "c"


@dataclasses.dataclass(frozen=True)
class Doubled(jrnn.Wrapper):
    """A user's wrapper whose update is its own."""

    cell: Any

    def update(self, params, state, p, key=None):
        state, y = super().update(params, state, p, key)
        return state, 2 * y


@dataclasses.dataclass(frozen=True)
class Clipped(jrnn.Wrapper):
    """A user's wrapper whose projection is its own."""

    cell: Any

    def project(self, params, xs):
        return super().project(params, jnp.clip(xs, -1, 1))


def inputs(case, xs):
    """Inputs for a row: ids, or the first features of ``xs (T, B, F)``, or maps of them."""
    if case.layer.event_ndim == 0:
        return np.zeros(xs.shape[:2], np.int32)
    if case.layer.event_ndim == 1:
        return xs[..., : case.in_features]
    return np.resize(np.asarray(xs), (*xs.shape[:2], *case.in_features))


CASES = (
    # Cells.
    Case("elman", jrnn.elman(4), full=True),
    Case("elman_relu", jrnn.elman(4, "relu", recurrent_init="identity")),
    Case("elman_sigmoid", jrnn.elman(4, "sigmoid")),
    Case("elman_function", jrnn.elman(4, softsign)),
    Case("jordan", jrnn.jordan(4, 3, out_activation="tanh")),
    Case("lstm", jrnn.lstm(4), full=True),
    Case("peephole_lstm", jrnn.peephole_lstm(4)),
    Case("coupled_lstm", jrnn.coupled_lstm(4)),
    Case("projection_lstm", jrnn.projection_lstm(4, 3)),
    Case("layer_norm_lstm", jrnn.layer_norm_lstm(4)),
    Case("gru_after", jrnn.gru(4)),
    Case("gru_before", jrnn.gru(4, "before")),
    Case("layer_norm_gru", jrnn.layer_norm_gru(4)),
    Case("mgu", jrnn.mgu(4)),
    Case("ugrnn", jrnn.ugrnn(4)),
    Case("indrnn", jrnn.indrnn(4)),
    Case("indrnn_tanh", jrnn.indrnn(4, "tanh")),
    Case("tdnn", jrnn.tdnn(4, window=3)),
    Case("tdnn_dilated", jrnn.tdnn(4, window=3, dilation=2)),
    Case("tdnn_one", jrnn.tdnn(4, window=1)),
    Case("min_gru", jrnn.min_gru(4), full=True),
    Case("min_lstm", jrnn.min_lstm(4)),
    Case("sru", jrnn.sru(4)),
    Case("qrnn", jrnn.qrnn(4), full=True),
    Case("qrnn_wide", jrnn.qrnn(3, 3, pooling="ifo")),
    Case("lru", jrnn.lru(4, 3), full=True),
    Case("s5", jrnn.s5(4, 3)),
    Case("rg_lru", jrnn.rg_lru(3)),
    Case("bidirectional_qrnn", jrnn.bidirectional(jrnn.qrnn(4), jrnn.min_gru(3))),
    Case("zoneout_min_gru", jrnn.zoneout(jrnn.min_gru(4), h=0.3)),
    Case("learned_state_lru", jrnn.learned_state(jrnn.lru(4, 3))),
    Case("step_only", StepOnly(0.5), full=True),
    Case("counting", Counting(), full=True),
    Case("step_lstm", StepLSTM(4), full=True),
    Case("aging", Aging(4)),
    Case("project_and_update", ProjectAndUpdate(4)),
    Case("leaky", Leaky(4)),
    Case("no_inputs", jrnn.stack(jrnn.lstm(4), jrnn.gru(3)), 0),  # autonomous: its inputs are (T, *B, 0)
    Case("emits_all", HiddenAndMemory(4), full=True),
    Case("emits_memory", Memory(jrnn.peephole_lstm(4))),
    Case("emits_memory_of_projection", Memory(jrnn.projection_lstm(4, 3))),
    Case("emits_all_wrapped", jrnn.zoneout(jrnn.variational(HiddenAndMemory(4), recurrent=0.3), h=0.2, c=0.3)),
    Case("wrapper_with_an_update", Doubled(jrnn.lstm(4))),
    Case("wrapper_with_a_projection", Clipped(jrnn.lstm(4))),
    Case("rotating", Rotating(4), full=True),
    Case("conv_lstm", jrnn.conv_lstm(2, (2,)), (3, 2), full=True),
    Case("conv_gru", jrnn.conv_gru(2, (3, 2)), (2, 3, 1)),
    Case("cornn", jrnn.cornn(4, dt=0.5)),
    Case("lem", jrnn.lem(4)),
    Case("antisymmetric", jrnn.antisymmetric(4)),
    Case("antisymmetric_gated", jrnn.antisymmetric(4, gated=True)),
    Case("orthogonal_rnn", jrnn.orthogonal_rnn(4, map="cayley")),
    Case("clockwork", jrnn.clockwork(4, periods=(1, 3))),
    Case("narx", jrnn.narx(4, 3, delays=(1, 3), window=2)),
    Case("echo_state", jrnn.echo_state(4, leak=0.5, density=0.5, bias_scale=0.5, trainable=True)),
    Case("slstm", jrnn.slstm(4, heads=2)),
    Case("mlstm", jrnn.mlstm(4, heads=2)),
    Case("ssd", jrnn.ssd(4, heads=2, state=3)),
    Case("gated_delta_net", jrnn.gated_delta_net(4, heads=2, key_features=3)),
    Case("block_gru", jrnn.block_gru(4, blocks=2)),
    # Layers without recurrence.
    Case("dense", jrnn.dense(4), full=True),
    Case("embed", jrnn.embed(5, 4), None, full=True),
    Case("layer_norm", jrnn.layer_norm()),
    Case("activation", jrnn.activation("gelu")),
    Case("dropout", jrnn.dropout(0.4), full=True),
    # Wrappers.
    Case("variational", jrnn.variational(jrnn.lstm(4), inputs=0.3, recurrent=0.4), full=True),
    Case("variational_gru", jrnn.variational(jrnn.gru(4), recurrent=0.4)),
    Case("variational_twice", jrnn.variational(jrnn.variational(jrnn.mgu(4), inputs=0.2, recurrent=0.4), inputs=0.3)),
    Case("variational_step_only", jrnn.variational(StepOnly(0.5), inputs=0.3)),
    Case("variational_tdnn", jrnn.variational(jrnn.tdnn(4, window=2), inputs=0.3)),
    Case("zoneout", jrnn.zoneout(jrnn.lstm(4), h=0.2, c=0.5), full=True),
    Case("zoneout_gru", jrnn.zoneout(jrnn.gru(4), h=0.3)),
    Case("zoneout_project", jrnn.zoneout(ProjectAndUpdate(4), h=0.3)),
    Case("dropconnect", jrnn.dropconnect(jrnn.lstm(4), 0.4)),
    Case("dropconnect_gru_before", jrnn.dropconnect(jrnn.gru(4, "before"), 0.4)),
    Case("dropconnect_indrnn", jrnn.dropconnect(jrnn.indrnn(4), 0.4)),
    Case("learned_state", jrnn.learned_state(jrnn.lstm(4)), full=True),
    Case("learned_state_tdnn", jrnn.learned_state(jrnn.tdnn(4, window=2))),
    Case(
        "wrapped_thrice",
        jrnn.zoneout(jrnn.dropconnect(jrnn.variational(jrnn.gru(4), inputs=0.3, recurrent=0.4), 0.3), h=0.2),
    ),
    Case("learned_and_wrapped", jrnn.learned_state(jrnn.zoneout(jrnn.variational(jrnn.lstm(4), inputs=0.3), c=0.4))),
    Case("zoneout_of_learned", jrnn.zoneout(jrnn.learned_state(jrnn.variational(jrnn.gru(4), recurrent=0.3)), h=0.4)),
    Case("drawing_decoder", DrawingDecoder(jrnn.stack(jrnn.variational(jrnn.gru(4), inputs=0.3), jrnn.dropout(0.3)))),
    # Combinators.
    Case("residual", jrnn.residual(jrnn.gru(3)), full=True),
    Case("residual_of_wrapped", jrnn.residual(jrnn.variational(jrnn.gru(3), inputs=0.3))),
    Case("attention", Attending(jrnn.attention(jrnn.lstm(4), 4))),
    Case("attention_heads", Attending(jrnn.attention(jrnn.gru(4), 4, score="multihead", heads=2))),
    Case("tied", jrnn.tied(jrnn.embed(5, 3), jrnn.stack(jrnn.zoneout(jrnn.gru(4), h=0.3), jrnn.dense(3))), None),
    Case("skip", jrnn.skip(jrnn.variational(jrnn.elman(2), inputs=0.3), jrnn.gru(2))),
    Case(
        "conv_mixture",
        jrnn.stack(
            jrnn.variational(jrnn.conv_gru(2, 2, "before"), inputs=0.3),
            jrnn.residual(jrnn.conv_lstm(2, 1)),
        ),
        (2, 2, 1),
    ),
    Case("highway", jrnn.highway(jrnn.elman(3))),
    Case("highway_of_random", jrnn.highway(jrnn.stack(jrnn.dropout(0.3), jrnn.elman(3)))),
    Case("stack", jrnn.stack(jrnn.lstm(4), jrnn.gru(3), jrnn.dense(2)), full=True),
    # Equal layers at different places, each with randomness of its own.
    Case(
        "stack_random",
        jrnn.stack(
            jrnn.zoneout(jrnn.elman(3), h=0.3), jrnn.dropout(0.3), jrnn.dropout(0.3), jrnn.zoneout(jrnn.elman(3), h=0.3)
        ),
    ),
    Case("stack_nested", jrnn.stack(jrnn.stack(jrnn.elman(4), jrnn.dropout(0.3)), jrnn.stack(jrnn.dense(3)))),
    Case("stack_embed", jrnn.stack(jrnn.embed(5, 3), jrnn.layer_norm(), jrnn.gru(4)), None),
    Case("bidirectional", jrnn.bidirectional(jrnn.elman(4)), full=True),
    Case("bidirectional_different", jrnn.bidirectional(jrnn.lstm(4), jrnn.gru(3))),
    Case("bidirectional_sum", jrnn.bidirectional(jrnn.elman(4), merge="sum")),
    Case("bidirectional_mean", jrnn.bidirectional(jrnn.elman(4), merge="mean")),
    Case("bidirectional_product", jrnn.bidirectional(jrnn.elman(4), merge="product")),
    Case("bidirectional_function", jrnn.bidirectional(jrnn.elman(4), jrnn.gru(4), merge=difference)),
    Case("bidirectional_tdnn", jrnn.bidirectional(jrnn.tdnn(4, window=2), jrnn.learned_state(jrnn.elman(4)))),
    Case("bidirectional_random", jrnn.bidirectional(jrnn.zoneout(jrnn.gru(4), h=0.3), jrnn.elman(4), merge="sum")),
    Case("bidirectional_nested", jrnn.bidirectional(jrnn.elman(4), jrnn.bidirectional(jrnn.elman(2)), merge="sum")),
    Case("bidirectional_embed", jrnn.bidirectional(jrnn.stack(jrnn.embed(5, 3), jrnn.elman(3))), None),
    # Deep mixtures.
    Case(
        "deep",
        jrnn.stack(
            jrnn.bidirectional(jrnn.variational(jrnn.gru(2), inputs=0.3), jrnn.elman(2)),
            jrnn.dropout(0.3),
            jrnn.residual(jrnn.stack(jrnn.tdnn(4, window=2), jrnn.zoneout(jrnn.elman(4), h=0.2))),
            jrnn.highway(jrnn.bidirectional(jrnn.elman(4), merge="mean")),
            jrnn.dense(2),
        ),
    ),
    Case(
        "residual_of_bidirectional", jrnn.residual(jrnn.bidirectional(jrnn.dropconnect(jrnn.gru(3), 0.3), merge="sum"))
    ),
)


def rows(mark, leave_out=()):
    """All rows but those left out, by name; ``mark`` is on those that are not full."""
    kept = [case for case in CASES if case.name not in leave_out]
    return [pytest.param(case, id=case.name, marks=() if case.full else mark) for case in kept]
