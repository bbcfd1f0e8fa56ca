"""`jrnn.flax.linen` against Flax's own modules: variables, values, gradients; and right where those are wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrnn

nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

from jrnn.flax import _loop, linen  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, H = 5, 4


class OwnCell(nn.Module):
    """A user's own, which is no RNNCellBase: a readout, its input beside its state, a carry in a dict."""

    features: int = H

    @nn.compact
    def __call__(self, carry, x):
        h = jnp.tanh(nn.Dense(self.features)(jnp.concatenate([x, carry["h"]], -1)))
        return {"h": h}, nn.Dense(2)(h)

    @nn.nowrap
    def initialize_carry(self, key, shape):
        return {"h": jax.random.normal(key, (*shape[:-1], self.features))}

    @property
    def num_feature_axes(self):
        return 1


class Normalised(OwnCell):
    """One that is not read as an affine cell."""

    @nn.compact
    def __call__(self, carry, x):
        h = nn.Dense(self.features)(nn.LayerNorm()(carry["h"]) + nn.Dense(self.features)(x))
        return {"h": h}, {"h": h, "mean": h.mean(-1)}


CELLS = {
    "lstm": nn.LSTMCell(H),
    "optimized_lstm": nn.OptimizedLSTMCell(H),
    "gru": nn.GRUCell(H),
    "simple": nn.SimpleCell(H),
    "residual": nn.SimpleCell(H, residual=True),
    "mgu": nn.MGUCell(H),
    "conv_lstm": nn.ConvLSTMCell(2, (3,)),
    "own": OwnCell(),
    "normalised": Normalised(),
}
OPTIONS = {
    "plain": {},
    "reverse": {"reverse": True, "unroll": 2},
    "keep_order": {"reverse": True, "keep_order": True},
    "time_major": {"time_major": True},
}


def features(cell):
    return (3, 2) if isinstance(cell, nn.ConvLSTMCell) else (3,)


def inputs_of(cell, batch=(3,), time_major=False, seed=1):
    shape = (T, *batch) if time_major else (*batch, T)
    return jax.random.normal(jax.random.key(seed), (*shape, *features(cell)))


def close(a, b, tolerance=2e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def weighed(tree):
    """A scalar that depends on each element in its own way."""
    return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape))
               for leaf in jax.tree.leaves(tree))  # fmt: skip


def run(module, variables, xs, initial_carry=None, **options):
    """Results and every gradient."""

    def loss(variables, xs, carry):
        out = module.apply(variables, xs, initial_carry=carry, return_carry=True, **options)
        return weighed(out), out

    places = (0, 1) if initial_carry is None else (0, 1, 2)
    return jax.jit(jax.value_and_grad(loss, places, has_aux=True))(variables, xs, initial_carry)


# --- RNN where Flax is right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_variables_are_those_of_flax(name):
    cell = CELLS[name]
    ours, theirs = linen.RNN(cell), nn.RNN(cell)
    xs, key = inputs_of(cell), jax.random.key(3)
    equal(ours.init(key, xs), theirs.init(key, xs))
    both = [m.Bidirectional(m.RNN(cell), m.RNN(cell.clone())) for m in (linen, nn)]
    equal(*(m.init(key, xs) for m in both))

    class Model(nn.Module):
        rnn: type

        @nn.compact
        def __call__(self, xs):
            return self.rnn(cell.clone())(xs).sum() if name != "normalised" else self.rnn(cell.clone())(xs)

    equal(Model(linen.RNN).init(key, xs), Model(nn.RNN).init(key, xs))


@pytest.mark.parametrize(
    ("name", "options"), [(name, "plain") for name in CELLS] + [("own", name) for name in OPTIONS if name != "plain"]
)
def test_results_and_gradients_are_those_of_flax(name, options):
    cell, options = CELLS[name], OPTIONS[options]
    batch = (2, 2) if options.get("time_major") else (3,)
    xs = inputs_of(cell, batch, options.get("time_major", False))
    ours, theirs = linen.RNN(cell, **options), nn.RNN(cell, **options)
    variables = theirs.init(jax.random.key(0), xs)
    carry = jax.tree.map(lambda a: a + 0.3, cell.initialize_carry(jax.random.key(5), (*batch, *features(cell))))
    close(run(ours, variables, xs, carry), run(theirs, variables, xs, carry))
    if name == "gru":
        lengths = jnp.full(batch, T)
        close(run(ours, variables, xs, seq_lengths=lengths), run(theirs, variables, xs))


def test_arguments_of_a_call_win_over_those_of_the_constructor():
    cell = CELLS["gru"]
    xs = inputs_of(cell, time_major=True)
    options = {"time_major": True, "reverse": True, "keep_order": True, "return_carry": True}
    ours, theirs = linen.RNN(cell), nn.RNN(cell)
    variables = theirs.init(jax.random.key(0), xs)
    close(ours.apply(variables, xs, **options), theirs.apply(variables, xs, **options))
    other = linen.RNN(cell, **options)
    off = dict.fromkeys(options, False)
    close(other.apply(variables, xs, **off), theirs.apply(variables, xs, **off))
    key = jax.random.key(9)
    ours, theirs = linen.RNN(CELLS["own"]), nn.RNN(CELLS["own"])
    variables = theirs.init(jax.random.key(0), xs)
    close(ours.apply(variables, xs, init_key=key), theirs.apply(variables, xs, init_key=key))


def test_both_directions():
    cell = CELLS["own"]
    xs = inputs_of(cell)
    ours, theirs = (m.Bidirectional(m.RNN(cell), m.RNN(cell.clone()), return_carry=True) for m in (linen, nn))
    variables = theirs.init(jax.random.key(0), xs)
    carry, _ = theirs.apply(variables, xs)
    close(run(ours, variables, xs, carry), run(theirs, variables, xs, carry))


def test_no_batch_axes_and_no_steps():
    cell = CELLS["lstm"]
    ours, theirs = linen.RNN(cell, return_carry=True), nn.RNN(cell, return_carry=True)
    xs = inputs_of(cell, ())
    variables = theirs.init(jax.random.key(0), xs)
    close(ours.apply(variables, xs), theirs.apply(variables, xs))
    close(ours.apply(variables, xs, seq_lengths=np.array(T)), theirs.apply(variables, xs))
    none = jnp.zeros((2, 0, 3))
    for options in ({}, {"seq_lengths": jnp.zeros(2, int)}, {"seq_lengths": jnp.zeros(2, int), "reverse": True}):
        carry, ys = ours.apply(variables, none, **options)
        assert ys.shape == (2, 0, H)
        assert not np.any(carry[0])


@pytest.mark.parametrize("name", ["gru", "own"])
def test_bfloat16(name):
    cell = CELLS[name].clone(dtype=jnp.bfloat16) if name == "gru" else CELLS[name]
    xs = inputs_of(cell).astype(jnp.bfloat16 if name == "gru" else jnp.float32)
    ours, theirs = linen.RNN(cell), nn.RNN(cell)
    with jax.numpy_dtype_promotion("standard"):  # Flax's GRU multiplies its float32 carry by bfloat16 gates
        variables = theirs.init(jax.random.key(0), xs)
        a, b = ours.apply(variables, xs), theirs.apply(variables, xs)
    assert a.dtype == b.dtype
    close(a.astype(jnp.float32), b.astype(jnp.float32), 0.02)


def test_jit_vmap_and_second_derivatives():
    cell = CELLS["gru"]
    xs = inputs_of(cell)
    ours, theirs = linen.RNN(cell), nn.RNN(cell)
    variables = theirs.init(jax.random.key(0), xs)
    close(jax.jit(ours.apply)(variables, xs), theirs.apply(variables, xs))
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), variables)
    close(*(jax.vmap(m.apply, (0, None))(stacked, xs) for m in (ours, theirs)))

    def curvature(module):
        loss = lambda x: jnp.sum(jnp.sin(module.apply(variables, x)))
        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(xs)

    close(curvature(ours), curvature(theirs), 1e-4)


def test_what_runs_the_loop(monkeypatch):
    """jrnn's scan where a cell only reads its parameters, Flax's where it draws, writes or initialises."""
    calls = []
    monkeypatch.setattr(_loop, "scan", lambda *args, **options: calls.append(1) or jrnn.scan(*args, **options))
    cell = CELLS["lstm"]
    xs, rnn = inputs_of(cell), linen.RNN(cell, split_rngs={"params": False, "dropout": True})
    variables = rnn.init(jax.random.key(0), xs)
    assert not calls
    for options in ({}, {"mutable": ["batch_stats"]}):
        rnn.apply(variables, xs, **options)
        assert calls.pop()
    rnn.apply(variables, xs, rngs={"dropout": jax.random.key(1)})
    rnn.apply(variables, xs, mutable=True)
    assert not calls


# --- what modules do besides -------------------------------------------------------------------------------------


class Dropped(nn.RNNCellBase):
    """A cell with dropout, keys of its own, a counter it carries, a value it sows, and one it scans over."""

    deterministic: bool = False

    @nn.compact
    def __call__(self, carry, x):
        steps = self.variable("counter", "steps", lambda: jnp.zeros((), jnp.int32))
        gain = self.variable("gains", "gain", lambda: jnp.ones(()))
        h, y = nn.GRUCell(H)(carry, nn.Dropout(0.5)(x, deterministic=self.deterministic))
        if not self.deterministic:
            h = h + 0.1 * jax.random.normal(self.make_rng("dropout"), h.shape)
        if not self.is_initializing():
            steps.value += 1
        self.sow("intermediates", "norm", jnp.sum(h**2))
        return h, y * gain.value * (1 + steps.value.astype(y.dtype))

    @nn.nowrap
    def initialize_carry(self, key, shape):
        return jnp.zeros((*shape[:-1], H))

    @property
    def num_feature_axes(self):
        return 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_keys_collections_and_what_is_sown(reverse, deterministic):
    cell = Dropped(deterministic)
    options = {
        "variable_axes": {"intermediates": 0, "gains": 0},
        "variable_carry": "counter",
        "split_rngs": {"params": False, "dropout": True},
        "reverse": reverse,
        "return_carry": True,
    }
    ours, theirs = linen.RNN(cell, **options), nn.RNN(cell, **options)
    xs = inputs_of(cell)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    of_a_step = cell.init(rngs, jnp.zeros((3, H)), xs[:, 0])
    variables = {name: {"cell": of_a_step[name]} for name in ("params", "counter")}
    variables["gains"] = {"cell": {"gain": jnp.arange(1.0, T + 1)}}
    for mutable in (["intermediates", "counter"], ["intermediates", "counter", "params"]):
        apply = {"rngs": {"dropout": jax.random.key(2)}, "mutable": mutable}
        equal(ours.apply(variables, xs, **apply), theirs.apply(variables, xs, **apply))


def test_keys_that_are_the_same_at_each_step():
    class Noisy(nn.GRUCell):
        @nn.compact
        def __call__(self, carry, x):
            return super().__call__(carry + jax.random.normal(self.make_rng("noise"), carry.shape), x)

    options = {"split_rngs": {"params": False, "noise": False}}
    ours, theirs = linen.RNN(Noisy(H), **options), nn.RNN(Noisy(H), **options)
    xs, rngs = inputs_of(CELLS["gru"]), {"params": jax.random.key(0), "noise": jax.random.key(1)}
    variables = theirs.init(rngs, xs)
    equal(ours.init(rngs, xs), variables)
    close(ours.apply(variables, xs, rngs=rngs), theirs.apply(variables, xs, rngs=rngs))


def test_an_error_of_the_cell_is_flax_s():
    class Draws(nn.GRUCell):
        @nn.compact
        def __call__(self, carry, x):
            return super().__call__(carry + jax.random.normal(self.make_rng("noise"), carry.shape), x)

    xs = inputs_of(CELLS["gru"])
    variables = nn.RNN(nn.GRUCell(H)).init(jax.random.key(0), xs)
    for module in (linen, nn):
        with pytest.raises(nn.module.errors.InvalidRngError):
            module.RNN(Draws(H)).apply(variables, xs, rngs={"noise": jax.random.key(1)})


def test_partitioning_metadata_survives():
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    cell = nn.GRUCell(H, kernel_init=kernel)
    ours, theirs = linen.RNN(cell), nn.RNN(cell)
    xs = inputs_of(cell)
    variables = theirs.init(jax.random.key(0), xs)
    equal(ours.init(jax.random.key(0), xs), variables)
    assert isinstance(variables["params"]["cell"]["ir"]["kernel"], nn.Partitioned)
    close(run(ours, variables, xs), run(theirs, variables, xs))


def test_a_cell_that_two_modules_share():
    class Model(nn.Module):
        rnn: type
        both: type

        def setup(self):
            self.cell = nn.LSTMCell(H)
            self.dense = nn.Dense(3)
            self.one = self.rnn(self.cell)
            self.two = self.both(self.rnn(self.cell), self.rnn(self.cell))

        def __call__(self, xs):
            return self.one(self.dense(xs)), self.two(xs)

    xs = inputs_of(CELLS["lstm"])
    ours, theirs = Model(linen.RNN, linen.Bidirectional), Model(nn.RNN, nn.Bidirectional)
    variables = theirs.init(jax.random.key(0), xs)
    equal(ours.init(jax.random.key(0), xs), variables)
    gradients = [jax.grad(lambda v, m=m: weighed(m.apply(v, xs)))(variables) for m in (ours, theirs)]
    close(*gradients)


# --- RNN where Flax is not right ---------------------------------------------------------------------------------


def step_by_step(cell, variables, xs, lengths, carry, reverse, keep_order):
    """Each sequence by itself, its steps in Python: results ``(carry, outputs)``, batch first."""
    batch = lengths.shape
    apply = lambda carry, x: cell.apply({"params": variables["params"]["cell"]}, carry, x)
    blank = jax.tree.map(
        lambda y: jnp.zeros(y.shape, y.dtype),
        jax.eval_shape(apply, jax.tree.map(lambda c: c[0, 0], carry), xs[0, 0, 0])[1],
    )
    carries, outputs = [], []
    for place in np.ndindex(batch):
        state, n = jax.tree.map(lambda a, place=place: a[place], carry), int(lengths[place])
        ys = [blank] * T
        for k in range(n):
            t = n - 1 - k if reverse else k
            state, ys[t if keep_order else k] = apply(state, xs[place][t])
        carries.append(state)
        outputs.append(jax.tree.map(lambda *y: jnp.stack(y), *ys))
    whole = lambda trees: jax.tree.map(lambda *a: jnp.stack(a).reshape(*batch, *a[0].shape), *trees)
    return whole(carries), whole(outputs)


@pytest.mark.parametrize(
    ("name", "reverse"),
    [
        ("lstm", (False, False)),
        ("own", (True, False)),
        ("conv_lstm", (True, True)),
        ("normalised", (True, False)),
        ("normalised", (False, False)),
    ],
)
@pytest.mark.sampled(3)
def test_ragged_sequences_of_two_batch_axes(name, reverse):
    cell = CELLS[name]
    lengths = np.array([[3, 0, T], [1, 4, 2]])
    xs = inputs_of(cell, (2, 3))
    padding = ~(np.arange(T) < lengths[..., None])
    xs = jnp.where(padding.reshape(*padding.shape, *(1,) * len(features(cell))), jnp.nan, xs)
    carry = jax.tree.map(lambda a: a + 0.3, cell.initialize_carry(jax.random.key(5), (2, 3, *features(cell))))
    options = dict(zip(("reverse", "keep_order"), reverse, strict=True))
    rnn = linen.RNN(cell, **options, return_carry=True)
    variables = nn.RNN(cell).init(jax.random.key(0), jnp.zeros((1, T, *features(cell))))

    def ours(variables, xs, carry):
        out = rnn.apply(variables, xs, initial_carry=carry, seq_lengths=lengths)
        return weighed(out), out

    def theirs(variables, xs, carry):
        out = step_by_step(cell, variables, xs, lengths, carry, **options)
        return weighed(out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(variables, xs, carry)
    (_, expected), right = jax.jit(jax.value_and_grad(theirs, (0, 1, 2), has_aux=True))(variables, xs, carry)
    close(out, expected)
    close(gradients, right)
    assert not np.any(np.asarray(gradients[1])[padding])


def test_ragged_sequences_where_flax_runs_the_loop():
    cell, lengths = CELLS["gru"], np.array([3, 0, T])
    xs = jnp.where((np.arange(T) < lengths[:, None])[..., None], inputs_of(cell), jnp.nan)
    plain = linen.RNN(cell, return_carry=True)
    keyed = linen.RNN(cell, return_carry=True, split_rngs={"params": False, "dropout": True})
    variables = plain.init(jax.random.key(0), xs)
    rngs = {"dropout": jax.random.key(1)}
    for options in ({}, {"reverse": True}, {"reverse": True, "keep_order": True}):
        options = options | {"seq_lengths": lengths}
        expected = plain.apply(variables, xs, **options)
        close(keyed.apply(variables, xs, **options, rngs=rngs), expected)
        close(plain.init_with_output(jax.random.key(0), xs, **options)[0], expected)
        loss = lambda v, options=options: weighed(keyed.apply(v, xs, **options, rngs=rngs))
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(jax.grad(loss)(variables)))


def test_a_carry_that_no_step_meets_may_be_nan():
    cell, lengths = CELLS["lstm"], np.array([0, 2])
    xs, rnn = inputs_of(cell, (2,)), linen.RNN(cell, return_carry=True)
    variables = rnn.init(jax.random.key(0), xs)
    carry = tuple(jnp.zeros((2, H)).at[0].set(jnp.nan) for _ in range(2))

    def loss(variables):
        last, ys = rnn.apply(variables, xs, initial_carry=carry, seq_lengths=lengths)
        return weighed((jax.tree.map(lambda a: a[1], last), ys)), (last, ys)

    (_, (last, ys)), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
    assert np.all(np.isnan(last[0][0]))
    assert np.all(np.isfinite(ys))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_parts_of_a_carry_without_batch_axes():
    class Counting(nn.GRUCell):
        @nn.compact
        def __call__(self, carry, x):
            h, y = super().__call__(carry[0], x)
            return (h, carry[1] + 1), y

        @nn.nowrap
        def initialize_carry(self, key, shape):
            return super().initialize_carry(key, shape), jnp.zeros((), jnp.int32)

    rnn, xs = linen.RNN(Counting(H)), inputs_of(CELLS["gru"])
    variables = rnn.init(jax.random.key(0), xs)
    lengths = np.array([2, 0, T])
    ys = rnn.apply(variables, xs, seq_lengths=lengths)
    close(ys, linen.RNN(nn.GRUCell(H)).apply(variables, xs, seq_lengths=lengths))
    with pytest.raises(ValueError, match=r"initial_carry: expected arrays whose first axes are the batch axes \(3,\)"):
        rnn.apply(variables, xs, seq_lengths=lengths, return_carry=True)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (np.array([1.0, 2.0, 3.0]), TypeError, "seq_lengths: expected integers, got float"),
        (np.array([1, 2]), ValueError, r"seq_lengths: expected the shape \(3,\)"),
        (np.array([1, 2, T + 1]), ValueError, f"seq_lengths: expected values from 0 to {T}"),
        (np.array([1, -1, 2]), ValueError, "seq_lengths: expected values from 0"),
    ],
)
def test_bad_lengths_are_errors(lengths, error, message):
    rnn, xs = linen.RNN(CELLS["gru"]), inputs_of(CELLS["gru"])
    variables = rnn.init(jax.random.key(0), xs)
    with pytest.raises(error, match=message):
        rnn.apply(variables, xs, seq_lengths=lengths)


# --- ScannedRNN --------------------------------------------------------------------------------------------------


def wrapped(cell):
    """The class as it stands in code bases of reinforcement learning, for a cell."""
    options = {f: getattr(cell, f) for f in ("features",)}

    class ScannedRNN(nn.Module):
        @functools.partial(nn.scan, variable_broadcast="params", in_axes=0, out_axes=0, split_rngs={"params": False})
        @nn.compact
        def __call__(self, carry, x):
            inputs, resets = x
            fresh = type(cell)(**options, parent=None).initialize_carry(jax.random.key(0), inputs.shape)
            carry = jax.tree.map(
                lambda new, old: jnp.where(resets.reshape(*resets.shape, *(1,) * (old.ndim - resets.ndim)), new, old),
                fresh,
                carry,
            )
            return type(cell)(**options)(carry, inputs)

    return ScannedRNN()


def episodes(batch, F=3):
    xs = jax.random.normal(jax.random.key(1), (T, *batch, F))
    return xs, jax.random.bernoulli(jax.random.key(2), 0.4, (T, *batch))


@pytest.mark.parametrize(("name", "batch"), [("gru", (4,)), ("gru", (2, 3)), ("lstm", (4,)), ("own", (4,))])
def test_scanned_rnn_is_the_wrapped_class(name, batch):
    cell = CELLS[name]
    ours, theirs = linen.ScannedRNN(cell), wrapped(cell)
    xs, resets = episodes(batch)
    carry = ours.initialize_carry(batch)
    equal(carry, cell.initialize_carry(jax.random.key(0), (*batch, H)))
    variables = theirs.init(jax.random.key(0), carry, (xs, resets))
    equal(ours.init(jax.random.key(0), carry, (xs, resets)), variables)
    carry = jax.tree.map(lambda a: a + 0.5, carry)

    def results(module):
        def loss(variables, carry, xs):
            out = module.apply(variables, carry, (xs, resets))
            return weighed(out), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(variables, carry, xs)

    close(results(ours), results(theirs))
    numbers = resets.astype(jnp.float32)
    close(ours.apply(variables, carry, (xs, numbers)), ours.apply(variables, carry, (xs, resets)))


def test_scanned_rnn_inside_a_model():
    class Model(nn.Module):
        ours: bool

        @nn.compact
        def __call__(self, carry, x):
            xs, resets = x
            xs = nn.relu(nn.Dense(H)(xs))
            rnn = linen.ScannedRNN(nn.GRUCell(H, parent=None)) if self.ours else Wrapped()
            carry, ys = rnn(carry, (xs, resets))
            return carry, nn.Dense(2)(ys)

    Wrapped = type(wrapped(CELLS["gru"]))
    carry, x = linen.ScannedRNN.initialize_carry(4, H), episodes((4,))
    ours, theirs = Model(True), Model(False)
    variables = theirs.init(jax.random.key(0), carry, x)
    assert sorted(variables["params"]) == ["Dense_0", "Dense_1", "ScannedRNN_0"]
    equal(ours.init(jax.random.key(0), carry, x), variables)
    close(jax.jit(ours.apply)(variables, carry, x), theirs.apply(variables, carry, x))


def test_nothing_passes_a_reset():
    rnn = linen.ScannedRNN(nn.LSTMCell(H))
    xs, resets = episodes((2,))
    resets = jnp.zeros_like(resets).at[3].set(True)
    carry = rnn.initialize_carry(2)
    variables = rnn.init(jax.random.key(0), carry, (xs, resets))
    _, ys = rnn.apply(variables, carry, (xs.at[:3].set(jnp.nan), resets))
    _, alone = rnn.apply(variables, carry, (xs[3:], resets[3:]))
    close(ys[3:], alone)
    after = lambda carry, xs: jnp.sum(rnn.apply(variables, carry, (xs, resets))[1][3:] ** 2)
    d_carry, d_xs = jax.grad(after, (0, 1))(carry, xs)
    assert not any(np.any(g) for g in jax.tree.leaves((d_carry, d_xs[:3])))
    assert np.all(d_xs[3:] != 0)


def test_scanned_rnn_names_what_does_not_fit():
    rnn = linen.ScannedRNN(nn.GRUCell(H))
    xs, resets = episodes((4,))
    carry = rnn.initialize_carry(4)
    variables = rnn.init(jax.random.key(0), carry, (xs, resets))
    with pytest.raises(ValueError, match=r"carry: expected float32\[4,4\]"):
        rnn.apply(variables, rnn.initialize_carry(3), (xs, resets))
    with pytest.raises(TypeError, match="x: expected the pair"):
        rnn.apply(variables, carry, xs)
    with pytest.raises(ValueError, match=r"x: expected inputs \(T, \*B, F\) and resets"):
        rnn.apply(variables, carry, (xs, resets.T))
    with pytest.raises(TypeError, match="hidden_size: expected the number of units"):
        linen.ScannedRNN.initialize_carry(4)


# --- Recurrent ---------------------------------------------------------------------------------------------------


MODEL = jrnn.stack(jrnn.lstm(H), jrnn.dropout(0.5), jrnn.residual(jrnn.gru(H)), jrnn.dense(2))


def own_params(model, weights, F):
    from jrnn.flax import _model

    return _model.from_dicts(weights, jax.eval_shape(lambda: model.init(jax.random.key(0), F)), "weights")


def test_recurrent_is_unroll():
    module = linen.Recurrent(MODEL, deterministic=True)
    xs = jax.random.normal(jax.random.key(1), (2, 3, T, 3))
    lengths, flags = np.array([[3, 0, T], [1, 4, 2]]), jax.random.bernoulli(jax.random.key(2), 0.7, (2, 2, 3, T))
    variables = module.init(jax.random.key(0), xs)
    assert sorted(variables) == ["params"]
    params = own_params(MODEL, variables["params"]["weights"], 3)
    assert jax.tree.structure(params) == jax.tree.structure(MODEL.init(jax.random.key(0), 3))
    options = {"lengths": lengths, "mask": flags[0], "resets": flags[1]}
    state, ys = module.apply(variables, xs, **options, method="unroll")
    time_major = {name: value if name == "lengths" else jnp.moveaxis(value, -1, 0) for name, value in options.items()}
    expected = jrnn.unroll(MODEL, params, jnp.moveaxis(xs, 2, 0), **time_major)
    equal((state, jnp.moveaxis(ys, 2, 0)), expected)
    equal(module.apply(variables, xs, **options), ys)
    equal(module.apply(variables, xs, **options, state=state), module.apply(variables, xs, **options, state=state))
    other = linen.Recurrent(MODEL, deterministic=True, time_major=True, reverse=True)
    ys = other.apply(variables, jnp.moveaxis(xs, 2, 0), **time_major)
    equal(ys, jrnn.unroll(MODEL, params, jnp.moveaxis(xs, 2, 0), **time_major, reverse=True)[1])


def test_recurrent_of_ids():
    model = jrnn.stack(jrnn.embed(7, 3), jrnn.gru(H))
    module, ids = linen.Recurrent(model), jnp.arange(10).reshape(2, 5) % 7
    ys, variables = module.init_with_output(jax.random.key(0), ids)
    equal(ys, jrnn.unroll(model, own_params(model, variables["params"]["weights"], None), ids.T)[1].swapaxes(0, 1))


def test_recurrent_with_dropout_under_jit_and_grad():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs, train):
            ys = linen.Recurrent(MODEL)(nn.Dense(3)(xs), deterministic=not train)
            return nn.Dense(1)(ys)

    model, xs = Model(), jax.random.normal(jax.random.key(1), (2, T, 3))
    variables = model.init(jax.random.key(0), xs, train=False)

    @jax.jit
    def loss(variables, key):
        return jnp.mean(model.apply(variables, xs, train=True, rngs={"dropout": key}) ** 2)

    value, gradients = jax.value_and_grad(loss)(variables, jax.random.key(1))
    assert value == loss(variables, jax.random.key(1)) != loss(variables, jax.random.key(2))
    assert all(np.any(g) for g in jax.tree.leaves(gradients))
    with pytest.raises(nn.module.errors.InvalidRngError):
        model.apply(variables, xs, train=True)
    with pytest.raises(ValueError, match="deterministic: expected True or False"):
        linen.Recurrent(MODEL).init(jax.random.key(0), xs)


def test_recurrent_carries_its_state():
    module = linen.Recurrent(MODEL, deterministic=True, stateful=True)
    xs = jax.random.normal(jax.random.key(1), (2, T, 3))
    variables = module.init(jax.random.key(0), xs)
    assert sorted(variables) == ["carry", "params"]
    whole = module.apply(variables, xs)
    equal(module.apply(variables, xs), whole)  # nothing was mutable
    parts = []
    step = jax.jit(lambda variables, xs: module.apply(variables, xs, mutable="carry"))
    current = variables
    for part in (xs[:, :2], xs[:, 2:3], xs[:, 3:]):
        ys, changed = step(current, part)
        current = {**current, **changed}
        parts.append(ys)
    close(jnp.concatenate(parts, 1), whole)
    serialization = pytest.importorskip("flax.serialization")
    equal(serialization.from_bytes(current, serialization.to_bytes(current)), current)
    with pytest.raises(ValueError, match="state: expected"):
        module.apply(variables, jnp.concatenate([xs, xs]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": np.array([1, 2, 3])}, ValueError, r"lengths: expected the shape \(2,\)"),
        ({"lengths": np.array([1, 9])}, ValueError, f"lengths: expected values from 0 to {T}"),
        ({"mask": np.ones((T, 2), bool)}, ValueError, rf"mask: expected shape \(2, {T}\)"),
        ({"resets": np.ones((T, 2), bool)}, ValueError, rf"resets: expected shape \(2, {T}\)"),
    ],
)
def test_recurrent_names_what_does_not_fit(options, error, message):
    module, xs = linen.Recurrent(jrnn.gru(H)), jnp.ones((2, T, 3))
    variables = module.init(jax.random.key(0), xs)
    with pytest.raises(error, match=message):
        module.apply(variables, xs, **options)


def test_recurrent_refuses_what_is_no_model_or_no_weights():
    xs = jnp.ones((2, T, 3))
    with pytest.raises(TypeError, match="model: expected a jrnn layer"):
        linen.Recurrent(nn.GRUCell(H)).init(jax.random.key(0), xs)
    variables = linen.Recurrent(jrnn.gru(H)).init(jax.random.key(0), xs)
    with pytest.raises(ValueError, match=r"weights: expected entries \['b', 'b_hn'"):
        linen.Recurrent(jrnn.gru(H)).apply({"params": {"weights": {"w_ih": jnp.ones((3, 12))}}}, xs)
    with pytest.raises(ValueError, match="xs: expected"):
        linen.Recurrent(jrnn.gru(H)).apply(variables, jnp.ones(3))
