"""`jrnn.flax.nnx` against Flax's own modules: state, streams and their counts, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn

nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

import jrnn.flax.nnx as modules  # noqa: E402
from jrnn.flax import _loop  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, F, H = 5, 3, 4


class OwnCell(nnx.Module):
    """A user's own: the input beside the state, a readout, a carry in a dict."""

    def __init__(self, in_features, hidden, rngs):
        self.hidden = hidden
        self.dense = nnx.Linear(in_features + hidden, hidden, rngs=rngs)
        self.readout = nnx.Linear(hidden, 2, rngs=rngs)

    def __call__(self, carry, x):
        h = jnp.tanh(self.dense(jnp.concatenate([x, carry["h"]], -1)))
        return {"h": h}, self.readout(h)

    def initialize_carry(self, shape, rngs=None):
        return {"h": jax.random.normal(rngs(), (*shape[:-1], self.hidden))}

    @property
    def num_feature_axes(self):
        return 1


class Convolved(nnx.Module):
    """A cell of images, with more than one feature axis."""

    def __init__(self, in_features, hidden, rngs):
        self.hidden = hidden
        self.conv = nnx.Conv(in_features + hidden, 2 * hidden, (3,), rngs=rngs)

    def __call__(self, carry, x):
        a, b = jnp.split(self.conv(jnp.concatenate([x, carry], -1)), 2, -1)
        h = jax.nn.sigmoid(a) * carry + jnp.tanh(b)
        return h, h

    def initialize_carry(self, shape, rngs=None):
        return jnp.zeros((*shape[:-1], self.hidden))

    @property
    def num_feature_axes(self):
        return 2


class Dropped(nnx.GRUCell):
    """A cell that draws at each step, counts its steps and sows."""

    def __init__(self, in_features, hidden, rngs, collection="dropout"):
        super().__init__(in_features, hidden, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rng_collection=collection, rngs=rngs)
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, carry, x):
        self.steps[...] += 1
        return super().__call__(carry, self.drop(x))


CELLS = {
    "lstm": lambda rngs: nnx.LSTMCell(F, H, rngs=rngs),
    "optimized_lstm": lambda rngs: nnx.OptimizedLSTMCell(F, H, rngs=rngs),
    "gru": lambda rngs: nnx.GRUCell(F, H, rngs=rngs),
    "simple": lambda rngs: nnx.SimpleCell(F, H, rngs=rngs),
    "own": lambda rngs: OwnCell(F, H, rngs),
    "convolved": lambda rngs: Convolved(F, H, rngs),
    "dropped": lambda rngs: Dropped(F, H, rngs),
}
OPTIONS = {
    "plain": {},
    "reverse": {"reverse": True, "unroll": 2},
    "keep_order": {"reverse": True, "keep_order": True},
    "time_major": {"time_major": True},
}


def features(name):
    return (6, F) if name == "convolved" else (F,)


def inputs_of(name, batch=(3,), time_major=False):
    shape = (T, *batch) if time_major else (*batch, T)
    return jax.random.normal(jax.random.key(1), (*shape, *features(name)))


def close(a, b, tolerance=2e-5):
    a, b = (
        nnx.to_pure_dict(a) if isinstance(a, nnx.State) else a,
        nnx.to_pure_dict(b) if isinstance(b, nnx.State) else b,
    )
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def same_state(a, b):
    a, b = (nnx.to_pure_dict(nnx.state(module)) for module in (a, b))
    data = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b)), a, b)


def pair(name, **options):
    """Ours and Flax's of the same seed."""
    return tuple(m.RNN(CELLS[name](nnx.Rngs(0, dropout=1)), **options) for m in (modules, nnx))


def weighed(tree):
    return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape))
               for leaf in jax.tree.leaves(tree))  # fmt: skip


def gradients(module, xs, **options):
    def loss(module, xs):
        out = module(xs, return_carry=True, **options)
        return weighed(out), out

    (_, out), (d_module, d_xs) = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))(module, xs)
    return out, nnx.to_pure_dict(d_module), d_xs


# --- RNN where Flax is right -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, "plain") for name in CELLS] + [("dropped", "reverse"), ("own", "keep_order")] + [("gru", "time_major")],
)
@pytest.mark.sampled(3)
def test_results_gradients_and_state_are_those_of_flax(name, options):
    options = OPTIONS[options]
    ours, theirs = pair(name, **options)
    same_state(ours, theirs)
    xs = inputs_of(name, (2, 2) if options.get("time_major") else (3,), options.get("time_major", False))
    for _ in range(2):  # streams go on from where they were
        close(gradients(ours, xs), gradients(theirs, xs))
        same_state(ours, theirs)


def test_arguments_of_a_call_win_over_those_of_the_constructor():
    ours, theirs = pair("own")
    xs = inputs_of("own", time_major=True)
    options = {"time_major": True, "reverse": True, "keep_order": True, "return_carry": True}
    close(ours(xs, **options), theirs(xs, **options))
    rngs = [nnx.Rngs(carry=7), nnx.Rngs(carry=7)]
    close(ours(xs, rngs=rngs[0], **options), theirs(xs, rngs=rngs[1], **options))
    same_state(*rngs)
    carry = {"h": jnp.ones((3, H))}
    close(ours(xs, initial_carry=carry, **options), theirs(xs, initial_carry=carry, **options))
    same_state(ours, theirs)


def test_keys_that_are_the_same_at_each_step():
    cells = [Dropped(F, H, nnx.Rngs(0, recurrent_dropout=1), "recurrent_dropout") for _ in range(2)]
    ours, theirs = (
        m.RNN(cell, broadcast_rngs="recurrent_dropout") for m, cell in zip((modules, nnx), cells, strict=True)
    )
    for _ in range(2):
        close(ours(inputs_of("gru")), theirs(inputs_of("gru")))
        same_state(ours, theirs)


@pytest.mark.parametrize("axes", [{nnx.Param: None, ...: nnx.Carry}, {nnx.BatchStat: 0, ...: nnx.Carry}])
def test_state_axes(axes):
    ours, theirs = pair("dropped", state_axes=nnx.StateAxes(axes))
    if axes.get(nnx.BatchStat) == 0:
        for module in (ours, theirs):
            module.cell.steps = nnx.BatchStat(jnp.arange(T, dtype=jnp.int32))
    close(ours(inputs_of("gru")), theirs(inputs_of("gru")))
    same_state(ours, theirs)


def test_both_directions():
    def make(m):
        rngs = nnx.Rngs(0)
        return m.Bidirectional(m.RNN(CELLS["gru"](rngs)), m.RNN(CELLS["gru"](rngs)))

    ours, theirs = make(modules), make(nnx)
    same_state(ours, theirs)
    xs = inputs_of("gru")
    close(gradients(ours, xs), gradients(theirs, xs))
    same_state(ours, theirs)


def test_split_merge_jit_vmap_and_training():
    optax = pytest.importorskip("optax")
    ours, theirs = pair("lstm")
    xs = inputs_of("lstm")
    graphdef, state = nnx.split(ours)
    close(nnx.merge(graphdef, state)(xs), theirs(xs))
    close(jax.jit(lambda state, xs: nnx.merge(graphdef, state)(xs))(state, xs), theirs(xs))
    close(nnx.jit(lambda module, xs: module(xs))(ours, xs), theirs(xs))
    close(jax.vmap(lambda xs: nnx.merge(graphdef, state, copy=True)(xs))(xs), theirs(xs))
    losses = []
    for module in pair("lstm"):
        optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def train(module, optimizer):
            loss, d = nnx.value_and_grad(lambda module: jnp.mean((module(xs) - 0.5) ** 2))(module)
            optimizer.update(module, d)
            return loss

        losses.append([float(train(module, optimizer)) for _ in range(3)])
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert losses[0][2] < losses[0][0]


def test_what_runs_the_loop(monkeypatch):
    """jrnn's scan where a step leaves the cell as it was, Flax's where it changes it."""
    calls = []
    monkeypatch.setattr(_loop, "scan", lambda *args, **options: calls.append(1) or jrnn.scan(*args, **options))
    for name in CELLS:
        module, _ = pair(name)
        module(inputs_of(name))
        assert bool(calls) == (name != "dropped")
        calls.clear()


def test_a_cell_that_sows_keeps_what_flax_keeps():
    class Sowing(nnx.GRUCell):
        def __call__(self, carry, x):
            self.count = getattr(self, "count", 0) + 1
            return super().__call__(carry, x)

    def outcome(m):
        module = m.RNN(Sowing(F, H, rngs=nnx.Rngs(0)))
        try:
            return jax.tree.leaves(module(inputs_of("gru")))[0], getattr(module.cell, "count", None)
        except Exception as error:
            return type(error), None

    ours, theirs = outcome(modules), outcome(nnx)
    assert ours[1] == theirs[1]
    close(ours[0], theirs[0]) if isinstance(ours[0], jax.Array) else None
    assert isinstance(ours[0], jax.Array) == isinstance(theirs[0], jax.Array)


# --- RNN where Flax is not right ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [(False, False), (True, False), (True, True)], ids=["forward", "reverse", "kept"])
@pytest.mark.parametrize("name", ["lstm", "own", "convolved"])
@pytest.mark.sampled(3)
def test_ragged_sequences_of_two_batch_axes(name, reverse):
    reverse, keep_order = reverse
    module, _ = pair(name, reverse=reverse, keep_order=keep_order)
    lengths = np.array([[3, 0, T], [1, 4, 2]])
    padding = ~(np.arange(T) < lengths[..., None])
    clean = inputs_of(name, (2, 3))
    xs = jnp.where(padding.reshape(*padding.shape, *(1,) * len(features(name))), jnp.nan, clean)
    carry = module.cell.initialize_carry((2, 3, *features(name)), nnx.RngStream(3, tag="carry"))
    carry = jax.tree.map(lambda a: a + 0.3, carry)
    graphdef, state = nnx.split(module)
    differentiated = lambda f: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True, allow_int=True))

    def ours(state, xs):
        out = nnx.merge(graphdef, state)(xs, initial_carry=carry, seq_lengths=lengths, return_carry=True)
        return weighed(out), out

    def alone(state, xs):
        """Each sequence cut to its length and run by itself."""
        module = nnx.merge(graphdef, state)
        carries, outputs = [], []
        for place in np.ndindex(lengths.shape):
            last, n = jax.tree.map(lambda a, place=place: a[place][None], carry), lengths[place]
            y = jnp.zeros((0, *features(name)[:-1], {"own": 2}.get(name, H)))
            if n:
                last, y = module(xs[place][None, :n], initial_carry=last, return_carry=True)
                y = y[0]
            carries.append(jax.tree.map(lambda a: a[0], last))
            outputs.append(jnp.pad(y, [(0, T - len(y))] + [(0, 0)] * (y.ndim - 1)))
        whole = lambda trees: jax.tree.map(lambda *a: jnp.stack(a).reshape(2, 3, *a[0].shape), *trees)
        out = whole(carries), whole(outputs)
        return weighed(out), out

    (_, out), (d_state, d_xs) = differentiated(ours)(state, xs)
    (_, expected), (right, d_right) = differentiated(alone)(state, clean)
    close(out, expected)
    close(d_xs, d_right)
    floats = lambda tree: [a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0]
    close(floats(d_state), floats(right))
    assert not np.any(np.asarray(d_xs)[padding])


def test_ragged_sequences_where_flax_runs_the_loop():
    module, _ = pair("dropped")
    module.eval()
    plain, _ = pair("gru")
    lengths = np.array([3, 0, T])
    xs = jnp.where((np.arange(T) < lengths[:, None])[..., None], inputs_of("gru"), jnp.nan)
    for options in ({}, {"reverse": True}, {"reverse": True, "keep_order": True}):
        options = {**options, "seq_lengths": lengths, "return_carry": True}
        close(module(xs, **options), plain(xs, **options))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients(module, xs, seq_lengths=lengths)[1]))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (np.array([1.0, 2.0, 3.0]), TypeError, "seq_lengths: expected integers, got float"),
        (np.array([1, 2]), ValueError, r"seq_lengths: expected the shape \(3,\)"),
        (np.array([1, 2, T + 1]), ValueError, f"seq_lengths: expected values from 0 to {T}"),
    ],
)
def test_bad_lengths_are_errors(lengths, error, message):
    module, _ = pair("gru")
    with pytest.raises(error, match=message):
        module(inputs_of("gru"), seq_lengths=lengths)


# --- Recurrent ---------------------------------------------------------------------------------------------------


MODEL = jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5), jrnn.residual(jrnn.gru(H)), jrnn.dense(2))


def test_recurrent_is_unroll():
    module = modules.Recurrent(MODEL, F, rngs=nnx.Rngs(0))
    module.eval()
    key = nnx.Rngs(0).params()
    jax.tree.map(np.testing.assert_array_equal, module.params(), MODEL.init(key, F))
    xs = jax.random.normal(jax.random.key(1), (2, 3, T, F))
    lengths, flags = np.array([[3, 0, T], [1, 4, 2]]), jax.random.bernoulli(jax.random.key(2), 0.7, (2, 2, 3, T))
    state, ys = module.unroll(xs, lengths=lengths, mask=flags[0], resets=flags[1])
    mask, resets = jnp.moveaxis(flags, -1, 1)
    expected = jrnn.unroll(MODEL, module.params(), jnp.moveaxis(xs, 2, 0), lengths=lengths, mask=mask, resets=resets)
    close((state, jnp.moveaxis(ys, 2, 0)), expected)
    close(module(xs, lengths=lengths, mask=flags[0], resets=flags[1]), ys)
    other = modules.Recurrent(MODEL, F, time_major=True, reverse=True, deterministic=True, rngs=nnx.Rngs(0))
    expected = jrnn.unroll(MODEL, module.params(), jnp.moveaxis(xs, 2, 0), lengths=lengths, reverse=True)
    close(other(jnp.moveaxis(xs, 2, 0), lengths=lengths), expected[1])


def test_recurrent_with_dropout_is_trained_under_jit():
    optax = pytest.importorskip("optax")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rnn = modules.Recurrent(MODEL, F, rngs=rngs)
            self.dense = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, xs):
            return self.dense(self.rnn(xs))

    model, xs = Model(nnx.Rngs(0, dropout=1)), jax.random.normal(jax.random.key(1), (2, T, F))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        d = nnx.grad(lambda model: jnp.mean((model(xs) - 0.5) ** 2))(model)
        optimizer.update(model, d)
        return d

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    d = nnx.to_pure_dict(train(model, optimizer))
    assert sorted(d["rnn"]["weights"]["0"]) == ["b", "w_hh", "w_ih"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(d))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert all(jax.tree.leaves(changed))
    assert int(model.rnn.rngs.count[...]) == 1
    assert np.any(model(xs) != model(xs))
    model.eval()
    np.testing.assert_array_equal(model(xs), model(xs))
    np.testing.assert_array_equal(
        model.rnn(xs, deterministic=False, rngs=nnx.Rngs(dropout=3)),
        model.rnn(xs, deterministic=False, rngs=nnx.Rngs(dropout=3)),
    )
    bare = modules.Recurrent(MODEL, F, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="rngs: expected a stream 'dropout'"):
        bare(xs)


def test_recurrent_carries_its_state():
    module = modules.Recurrent(MODEL, F, deterministic=True, rngs=nnx.Rngs(0))
    xs = jax.random.normal(jax.random.key(1), (2, T, F))
    whole = module(xs)
    np.testing.assert_array_equal(module(xs), whole)  # nothing is carried yet
    module.init_state(2)
    step = nnx.jit(lambda module, xs: module(xs))
    close(jnp.concatenate([step(module, xs[:, :2]), step(module, xs[:, 2:3]), step(module, xs[:, 3:])], 1), whole)
    assert all(isinstance(v, modules.RecurrentState) for _, v in nnx.to_flat_state(nnx.state(module.state)))
    module.init_state((2,))
    close(module(xs), whole)
    with pytest.raises(ValueError, match="state: expected"):
        module(jnp.concatenate([xs, xs]))
    module.init_state(None)
    close(module(xs), whole)


def test_recurrent_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="model: expected a jrnn layer"):
        modules.Recurrent(nnx.GRUCell, F, rngs=nnx.Rngs(0))
