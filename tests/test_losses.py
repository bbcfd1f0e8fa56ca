"""Losses and metrics against NumPy over the valid elements alone, and what masked-out elements must not do."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrnn import losses

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAN = float("nan")
QUANTILES = np.array([0.1, 0.5, 0.8])
MASK = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], bool)  # (T, B) = (4, 3)


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def ids(*shape, classes=5, seed=1):
    return np.random.default_rng(seed).integers(0, classes, shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# What each function is of predictions and targets that all count: one row of the table is one function to test.
CASES = {
    "mse": (losses.mse, data(4, 3, 5), data(4, 3, 5, seed=1), lambda p, t: ((p - t) ** 2).mean()),
    "mse without features": (losses.mse, data(4, 3), data(4, 3, seed=1), lambda p, t: ((p - t) ** 2).mean()),
    "mae": (losses.mae, data(4, 3, 5), data(4, 3, 5, seed=1), lambda p, t: np.abs(p - t).mean()),
    "pinball": (
        lambda p, t, mask=None: losses.pinball(p, t, QUANTILES, mask),
        data(4, 3, 2, 3),
        data(4, 3, 2, seed=1),
        lambda p, t: np.maximum(QUANTILES * (t[..., None] - p), (QUANTILES - 1) * (t[..., None] - p)).mean(),
    ),
    "cross_entropy of ids": (
        losses.cross_entropy,
        data(4, 3, 5),
        ids(4, 3),
        lambda p, t: -np.log(softmax(p)[np.arange(len(t)), t]).mean(),
    ),
    "cross_entropy of ids with features": (
        losses.cross_entropy,
        data(4, 3, 2, 5),
        ids(4, 3, 2),
        lambda p, t: -np.log(np.take_along_axis(softmax(p), t[..., None], -1)).mean(),
    ),
    "cross_entropy of probabilities": (
        losses.cross_entropy,
        data(4, 3, 5),
        softmax(data(4, 3, 5, seed=1)),
        lambda p, t: -(t * np.log(softmax(p))).sum(-1).mean(),
    ),
    "smoothed cross_entropy": (
        lambda p, t, mask=None: losses.cross_entropy(p, t, mask, label_smoothing=0.2),
        data(4, 3, 5),
        ids(4, 3),
        lambda p, t: -((0.8 * np.eye(5)[t] + 0.2 / 5) * np.log(softmax(p))).sum(-1).mean(),
    ),
    "smoothed cross_entropy of probabilities": (
        lambda p, t, mask=None: losses.cross_entropy(p, t, mask, label_smoothing=0.2),
        data(4, 3, 5),
        softmax(data(4, 3, 5, seed=1)),
        lambda p, t: -((0.8 * t + 0.2 / 5) * np.log(softmax(p))).sum(-1).mean(),
    ),
    "binary_cross_entropy": (
        losses.binary_cross_entropy,
        data(4, 3, 2),
        ids(4, 3, 2, classes=2),
        lambda p, t: -(t * np.log(sigmoid(p)) + (1 - t) * np.log(1 - sigmoid(p))).mean(),
    ),
    "binary_cross_entropy of probabilities": (
        losses.binary_cross_entropy,
        data(4, 3),
        sigmoid(data(4, 3, seed=1)),
        lambda p, t: -(t * np.log(sigmoid(p)) + (1 - t) * np.log(1 - sigmoid(p))).mean(),
    ),
    "accuracy": (losses.accuracy, data(4, 3, 2), ids(4, 3, classes=2), lambda p, t: (p.argmax(-1) == t).mean()),
    "accuracy of probabilities": (
        losses.accuracy,
        data(4, 3, 2),
        softmax(data(4, 3, 2, seed=1)),
        lambda p, t: (p.argmax(-1) == t.argmax(-1)).mean(),
    ),
    "perplexity": (
        losses.perplexity,
        data(4, 3, 5),
        ids(4, 3),
        lambda p, t: np.exp(-np.log(softmax(p)[np.arange(len(t)), t]).mean()),
    ),
    "bits_per_character": (
        losses.bits_per_character,
        data(4, 3, 5),
        ids(4, 3),
        lambda p, t: -np.log2(softmax(p)[np.arange(len(t)), t]).mean(),
    ),
}
each = pytest.mark.parametrize("name", CASES)


@each
def test_mean_over_valid_elements(name):
    loss, predictions, targets, oracle = CASES[name]
    rows = lambda a: a.reshape(12, *a.shape[2:])
    everything = np.ones((4, 3), bool)
    for mask in (MASK, None):
        chosen = (everything if mask is None else mask).reshape(12)
        expected = oracle(rows(predictions)[chosen].astype(np.float64), rows(targets)[chosen])
        for function in (loss, jax.jit(loss)):
            actual = function(predictions, targets, mask)
            assert actual.shape == ()
            assert actual.dtype == np.float32
            np.testing.assert_allclose(actual, expected, rtol=2e-6)
    np.testing.assert_allclose(loss(predictions, targets, everything), loss(predictions, targets), rtol=1e-6)


@each
@pytest.mark.parametrize("poison", [NAN, np.inf, -np.inf, 1e30])
@pytest.mark.sampled(3)
def test_masked_out_elements_change_no_value_and_no_gradient(name, poison):
    loss, predictions, targets, _ = CASES[name]
    spread = lambda a: MASK.reshape(MASK.shape + (1,) * (a.ndim - 2))
    bad_predictions = np.where(spread(predictions), predictions, np.float32(poison))
    if np.issubdtype(targets.dtype, np.integer):
        bad_targets = np.where(spread(targets), targets, -100)
        argnums = (0,)
    else:
        bad_targets = np.where(spread(targets), targets, np.float32(poison))
        argnums = (0, 1)
    value, gradients = jax.value_and_grad(loss, argnums)(predictions, targets, MASK)
    for run in (jax.value_and_grad(loss, argnums), jax.jit(jax.value_and_grad(loss, argnums))):
        actual, actuals = run(bad_predictions, bad_targets, MASK)
        np.testing.assert_allclose(actual, value, rtol=1e-6)
        for a, b in zip(actuals, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
            assert not np.asarray(a)[~MASK].any()


@each
def test_nothing_valid_is_zero_with_zero_gradients(name):
    loss, predictions, targets, _ = CASES[name]
    nothing = 1.0 if name == "perplexity" else 0.0
    value, gradient = jax.value_and_grad(loss)(np.full_like(predictions, NAN), targets, np.zeros((4, 3), bool))
    assert value == nothing
    assert not np.asarray(gradient).any()
    assert loss(predictions[:0], targets[:0]) == nothing
    assert loss(predictions[:0], targets[:0], MASK[:0]) == nothing


@each
@pytest.mark.sampled(3)
def test_gradient_is_the_slope(name, x64):
    loss, predictions, targets, _ = CASES[name]
    predictions = predictions.astype(np.float64)
    if not np.issubdtype(targets.dtype, np.integer):
        targets = targets.astype(np.float64)
    direction = np.random.default_rng(7).normal(size=predictions.shape)
    step = 1e-6
    slope = (
        loss(predictions + step * direction, targets, MASK) - loss(predictions - step * direction, targets, MASK)
    ) / (2 * step)
    gradient = jax.grad(loss)(predictions, targets, MASK)
    assert gradient.dtype == np.float64
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)


@each
def test_no_silent_broadcast(name):
    loss, predictions, targets, _ = CASES[name]
    second = "targets" if name.startswith(("mse", "mae", "pinball")) else "labels"
    for wrong in (targets[..., None], targets[0], targets[:, :1], targets.swapaxes(0, 1)):
        with pytest.raises(ValueError, match=f"{second}: expected shape"):
            loss(predictions, wrong)
    for wrong in (MASK.T, MASK[0], MASK[..., None], MASK[:, :1]):
        with pytest.raises(ValueError, match="mask: expected the leading axes"):
            loss(predictions, targets, wrong)
    with pytest.raises(TypeError, match="mask: expected booleans, got float32"):
        loss(predictions, targets, MASK.astype(np.float32))
    first = "predictions" if second == "targets" else "logits"
    with pytest.raises(TypeError, match=f"{first}: expected floats, got int32"):
        loss(predictions.astype(np.int32), targets)


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_narrow_predictions_are_summed_in_float32(name, dtype):
    loss, predictions, targets, _ = CASES[name]
    narrow = predictions.astype(dtype)
    actual, gradient = jax.value_and_grad(loss)(narrow, targets, MASK)
    assert actual.dtype == np.float32
    assert gradient.dtype == dtype
    np.testing.assert_allclose(actual, loss(narrow.astype(np.float32), targets, MASK), rtol=1e-6)


def test_a_long_mean_in_bfloat16_is_right():
    ones = jnp.ones((5000,), jnp.bfloat16)
    assert losses.mse(ones, jnp.zeros_like(ones)) == 1.0
    assert losses.mse(ones, np.zeros(5000, np.float32)) == 1.0  # mixed dtypes, under strict promotion


def test_double_precision_is_kept(x64):
    assert losses.mse(np.ones(3), np.zeros(3)).dtype == np.float64
    assert losses.mse(np.ones(3, np.float32), np.zeros(3)).dtype == np.float64
    assert losses.cross_entropy(np.ones((3, 2)), np.zeros(3, int), np.ones(3, bool)).dtype == np.float64


def test_the_best_constant_prediction_is_the_quantile():
    targets, constants = data(401), np.linspace(-2, 2, 41, dtype=np.float32)
    loss = jax.jit(lambda c, q: losses.pinball(jnp.full((401, 1), c), targets, q), static_argnums=1)
    for q in QUANTILES:
        best = constants[np.argmin([loss(c, (q,)) for c in constants])]
        assert abs(best - np.quantile(targets, q)) < 0.11, q


def test_the_slope_of_an_exact_quantile_is_the_mean_of_both_sides():
    predictions = np.array([[1.0, 2.0, 0.5]], np.float32)
    gradient = jax.grad(losses.pinball)(predictions, np.ones(1, np.float32), (0.1, 0.9, 0.9))
    np.testing.assert_allclose(3 * gradient, [[(0.9 - 0.1) / 2, 0.1, -0.9]], rtol=1e-6)


@pytest.mark.parametrize("quantiles", [(), (0.0, 0.5), (1.0,), 0.5, (float("nan"),)])
def test_quantiles_out_of_range(quantiles):
    with pytest.raises(ValueError, match="quantiles: expected a sequence of numbers above 0 and below 1"):
        losses.pinball(data(4, 1), data(4), quantiles)


def test_as_many_predictions_as_quantiles():
    with pytest.raises(ValueError, match=r"predictions: expected one prediction for each of 2 quantiles .*\(4, 3\)"):
        losses.pinball(data(4, 3), data(4), (0.1, 0.9))


@pytest.mark.smoke
def test_elements_count_and_not_sequences():
    # Sequence 0 has three steps of error 1, sequence 1 one step of error 5: 8 / 4, not (1 + 5) / 2.
    mask = np.array([[1, 1], [1, 0], [1, 0]], bool)
    assert losses.mae(np.array([[1.0, 5.0]] * 3), np.zeros((3, 2)), mask) == 2.0


def test_cross_entropy_never_takes_a_wrong_label_for_another():
    logits, labels = data(3, 5), np.array([0, -1, 2])
    with pytest.raises(ValueError, match=r"labels: expected class ids from 0 to C - 1 = 4, got -1 at index \(1,\)"):
        losses.cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="got 5"):
        losses.cross_entropy(logits, np.array([0, 1, 5]))
    assert jnp.isfinite(losses.cross_entropy(logits, labels, np.array([True, False, True])))


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [*((dtype, 5) for dtype in ("int8", "int16", "int32", "uint8", "uint16", "uint32")), ("int8", 300), ("uint8", 300)],
)
def test_unseen_labels_out_of_range_give_nan(dtype, classes):
    """Where labels cannot be seen, the answer is not a number rather than a wrong one, for every type of integer."""
    limits, logits = np.iinfo(dtype), data(3, classes)
    functions = (losses.cross_entropy, losses.accuracy, losses.perplexity, losses.bits_per_character)
    run = jax.jit(lambda labels: jnp.stack([f(logits, labels) for f in functions]))
    for label in (-1 % 2**32, limits.min, limits.max, min(classes, limits.max), 4):
        label = np.array(label).astype(dtype)
        right = 0 <= label < classes  # 8 bits cannot count to 300
        assert (np.isnan(run(np.array([0, label, 2], dtype))) == (not right)).all(), label


def test_unseen_labels_out_of_range_count_where_the_mask_is_true():
    labels, mask = np.array([0, -1, 2]), np.array([True, False, True])
    for loss in (losses.cross_entropy, losses.accuracy):
        assert jnp.isfinite(jax.jit(loss)(data(3, 5), labels, mask))
        assert jnp.isnan(jax.jit(loss)(data(3, 5), labels, ~mask))


def test_unseen_labels_out_of_range_of_64_bits_give_nan(x64):
    for dtype, label in ((np.int64, -(2**40)), (np.int64, 2**32 + 1), (np.uint64, 2**64 - 1), (np.uint64, 2**32)):
        labels = np.array([0, label, 2], dtype)
        for loss in (losses.cross_entropy, losses.accuracy):
            assert jnp.isnan(jax.jit(loss)(data(3, 5), labels))


def test_cross_entropy_where_classes_are_ruled_out():
    logits = jnp.array([[0.0, 0.0, -jnp.inf]])
    for labels in (np.array([0]), np.array([[1.0, 0.0, 0.0]], np.float32)):
        value, gradient = jax.value_and_grad(losses.cross_entropy)(logits, labels)
        np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
        np.testing.assert_allclose(gradient, [[-0.5, 0.5, 0.0]], rtol=1e-6)


def test_cross_entropy_errors():
    logits = data(4, 3, 5)
    with pytest.raises(ValueError, match="probabilities of the classes must be floats"):
        losses.cross_entropy(logits, np.eye(5, dtype=int)[ids(4, 3)])
    with pytest.raises(ValueError, match="class ids must be integers"):
        losses.cross_entropy(logits, ids(4, 3).astype(np.float32))
    with pytest.raises(TypeError, match="labels: expected integer class ids or float"):
        losses.cross_entropy(logits, np.ones((4, 3), bool))
    with pytest.raises(ValueError, match=r"label_smoothing: expected a number from 0 to 1, got 1\.5"):
        losses.cross_entropy(logits, ids(4, 3), label_smoothing=1.5)
    with pytest.raises(ValueError, match="logits: expected shape"):
        losses.cross_entropy(np.float32(1), np.int32(0))


@pytest.mark.smoke
def test_binary_labels_of_any_type():
    logits, labels = data(4, 3), ids(4, 3, classes=2)
    expected = losses.binary_cross_entropy(logits, labels)
    for dtype in (bool, np.uint8, np.float32):
        np.testing.assert_allclose(losses.binary_cross_entropy(logits, labels.astype(dtype)), expected, rtol=1e-6)


def test_binary_cross_entropy_of_large_logits():
    value, gradient = jax.value_and_grad(losses.binary_cross_entropy)(
        np.array([1e4, -1e4], np.float32), np.array([0, 0])
    )
    assert value == 5000
    np.testing.assert_array_equal(gradient, [0.5, 0.0])


@pytest.mark.smoke
def test_accuracy_of_nan_is_wrong_and_of_ties_the_first():
    logits = np.array([[NAN, 1.0], [1.0, 1.0], [1.0, 1.0]], np.float32)
    assert losses.accuracy(logits, np.array([0, 0, 1])) == np.float32(1 / 3)


# --- CTC


def collapse(path, blank):
    return tuple(k for k, _ in itertools.groupby(path) if k != blank)


def ctc_by_enumeration(logits, length, labels, label_length, blank):
    with np.errstate(divide="ignore"):
        logp = np.log(softmax(logits.astype(np.float64)))
    total = sum(
        np.exp(sum(logp[t, k] for t, k in enumerate(path)))
        for path in itertools.product(range(logits.shape[-1]), repeat=length)
        if collapse(path, blank) == tuple(labels[:label_length])
    )
    return -np.log(total) if total else np.inf


LENGTHS = np.array([4, 5, 3, 0, 2, 5])
LABEL_LENGTHS = np.array([2, 3, 0, 0, 2, 2])
LABELS = np.array([[1, 2, 1, 1, 2, 3], [1, 2, 1, 1, 1, 3], [1, 1, 1, 1, 1, 3]])  # repetitions, also into padding


@pytest.mark.parametrize("blank", [0, 3])
def test_ctc_sums_over_all_alignments(blank):
    logits = data(5, 6, 4)
    labels = LABELS if blank == 0 else LABELS - 1
    expected = [ctc_by_enumeration(logits[:, b], LENGTHS[b], labels[:, b], LABEL_LENGTHS[b], blank) for b in range(6)]
    assert np.isfinite(expected).all()
    for b in (0, 4):  # no batch axis
        one = losses.ctc(logits[:, b], LENGTHS[b], labels[:, b], LABEL_LENGTHS[b], blank=blank)
        np.testing.assert_allclose(one, expected[b], rtol=1e-5, atol=1e-6)
    for run in (losses.ctc, jax.jit(losses.ctc, static_argnames="blank")):
        actual = run(logits, LENGTHS, labels, LABEL_LENGTHS, blank=blank)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, np.mean(expected), rtol=1e-5)
        mask = np.array([1, 0, 1, 1, 0, 1], bool)
        actual = run(logits, LENGTHS, labels, LABEL_LENGTHS, mask, blank=blank)
        np.testing.assert_allclose(actual, np.mean(np.array(expected)[mask]), rtol=1e-5)


@pytest.mark.smoke
def test_ctc_equals_optax_directly():
    logits = data(5, 6, 4)
    pads = lambda n, lengths: (np.arange(n)[None] >= lengths[:, None]).astype(np.float32)
    expected = optax.ctc_loss(logits.swapaxes(0, 1), pads(5, LENGTHS), LABELS.T, pads(3, LABEL_LENGTHS))
    np.testing.assert_allclose(losses.ctc(logits, LENGTHS, LABELS, LABEL_LENGTHS), expected.mean(), rtol=1e-6)


@pytest.mark.parametrize("poison", [NAN, np.inf, -np.inf])
def test_ctc_padding_changes_no_value_and_no_gradient(poison):
    logits = data(5, 6, 4)
    counted = np.array([1, 1, 1, 1, 0, 1], bool)
    padding = ~((np.arange(5)[:, None] < LENGTHS) & counted)
    loss = jax.value_and_grad(losses.ctc)
    value, gradient = loss(logits, LENGTHS, LABELS, LABEL_LENGTHS, counted)
    label_padding = ~((np.arange(3)[:, None] < LABEL_LENGTHS) & counted)
    actual, actual_gradient = loss(
        np.where(padding[..., None], np.float32(poison), logits),
        LENGTHS,
        np.where(label_padding, -100, LABELS),
        LABEL_LENGTHS,
        counted,
    )
    np.testing.assert_allclose(actual, value, rtol=1e-6)
    np.testing.assert_allclose(actual_gradient, gradient, rtol=1e-5, atol=1e-8)
    assert not np.asarray(actual_gradient)[padding].any()
    assert np.asarray(gradient).any()


def test_ctc_gradient_is_the_slope_in_double_precision(x64):
    logits, direction = data(5, 6, 4).astype(np.float64), np.random.default_rng(5).normal(size=(5, 6, 4))
    loss = jax.jit(lambda x: losses.ctc(x, LENGTHS, LABELS, LABEL_LENGTHS))
    gradient = jax.grad(loss)(logits)
    assert loss(logits).dtype == gradient.dtype == np.float64
    slope = (loss(logits + 1e-6 * direction) - loss(logits - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7)
    assert losses.ctc(logits.astype(np.float32), LENGTHS, LABELS, LABEL_LENGTHS).dtype == np.float32
    expected = [ctc_by_enumeration(logits[:, b], LENGTHS[b], LABELS[:, b], LABEL_LENGTHS[b], 0) for b in range(6)]
    np.testing.assert_allclose(loss(logits), np.mean(expected), rtol=1e-10)


def test_ctc_too_short_is_infinite_with_zero_gradients_of_its_own():
    # Two equal labels need three steps, with a blank between them.
    logits, labels = data(3, 2, 3), np.array([[1, 1], [1, 2]])
    loss = lambda x, mask=None: losses.ctc(x, np.array([2, 2]), labels, np.array([2, 2]), mask)
    value, gradient = jax.value_and_grad(loss)(logits)
    assert value == np.inf
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[:, 0].any()
    assert np.isfinite(loss(logits, np.array([False, True])))
    assert np.isfinite(losses.ctc(logits[:, 0], np.array(3), labels[:, 0], np.array(2)))


def ctc_gradient(logits, lengths, labels, label_lengths):
    """The loss and its gradient, in the dtype of the logits; one sequence."""
    return jax.value_and_grad(losses.ctc)(logits, np.array(lengths), np.array(labels, int), np.array(label_lengths))


@pytest.mark.parametrize("scale", [1.0, 30.0, 3e3, 4e4])
def test_ctc_equals_torch_in_values_and_gradients(scale, x64):
    """Lengths, repetitions, empty labels, as long as can be, and logits that rule the labels nearly out."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(0)
    lengths, label_lengths = np.array([8, 8, 5, 1, 8, 3, 8, 5]), np.array([3, 4, 3, 1, 0, 2, 1, 3])
    labels = rng.integers(1, 5, (4, 8))
    labels[:, 1], labels[:3, 2] = 2, [3, 3, 1]  # repetitions: one step more between equal neighbours
    logits = rng.normal(size=(8, 8, 5)) + scale * np.eye(5)[0] * (rng.random((8, 8, 1)) < 0.7)
    logits[:, 0] = scale * np.eye(5)[0]
    theirs = torch.tensor(logits, requires_grad=True)
    values = torch.nn.functional.ctc_loss(
        theirs.log_softmax(-1), torch.tensor(labels.T), torch.tensor(lengths), torch.tensor(label_lengths),
        reduction="none",
    )  # fmt: skip
    assert np.isfinite(values.detach().numpy()).all()
    values.mean().backward()
    for mask in (None, *np.eye(8, dtype=bool)):
        expected = values.detach().numpy()[slice(None) if mask is None else mask].mean()
        np.testing.assert_allclose(losses.ctc(logits, lengths, labels, label_lengths, mask), expected, rtol=1e-12)
    gradient = jax.grad(losses.ctc)(logits, lengths, labels, label_lengths)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-9, atol=1e-10)


def test_ctc_where_the_blank_is_favoured_by_far():
    """Each of the three labels costs 4e4, and there are 56 ways to place them: -log(56 exp(-12e4))."""
    logits = np.zeros((8, 5), np.float32)
    logits[:, 0] = 4e4
    value, gradient = ctc_gradient(logits, 8, [1, 2, 3], 3)
    np.testing.assert_allclose(value, 12e4 - np.log(56), rtol=1e-7)
    # By symmetry, step t is label n in as many ways as there are to place the labels before and after it.
    ways = lambda n, k: math.comb(n, k)
    used = np.array([[ways(t, n) * ways(7 - t, 2 - n) / 56 for n in range(3)] for t in range(8)])
    np.testing.assert_allclose(gradient[:, 1:4], -used, atol=0.02)  # 12e4 has few digits left in float32


@pytest.mark.parametrize("ruled_out", [-np.inf, -1e30, np.finfo(np.float32).min])
def test_ctc_of_a_class_that_is_ruled_out(ruled_out):
    """A class that no label uses may have no probability: the loss is that without the class."""
    logits, labels = data(6, 5), [1, 2, 3]
    logits[:, 4] = ruled_out
    value, gradient = ctc_gradient(logits, 6, labels, 3)
    expected, expected_gradient = ctc_gradient(logits[:, :4], 6, labels, 3)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :4], expected_gradient, rtol=1e-5, atol=1e-7)
    assert not np.asarray(gradient[:, 4]).any()


def test_ctc_where_classes_are_ruled_out_at_some_steps():
    """Whatever is ruled out, the blank included, the other alignments count and gradients stay finite."""
    rng = np.random.default_rng(3)
    logits, labels = data(5, 40, 4), rng.integers(1, 4, (2, 40))
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[..., 3] = np.where(np.isinf(logits).all(-1), 0.0, logits[..., 3])
    label_lengths = rng.integers(0, 3, 40)
    expected = np.array([ctc_by_enumeration(logits[:, b], 5, labels[:, b], label_lengths[b], 0) for b in range(40)])
    possible = np.isfinite(expected)
    assert 5 < possible.sum() < 35
    loss = jax.value_and_grad(losses.ctc)
    value, gradient = loss(logits, np.full(40, 5), labels, label_lengths, possible)
    np.testing.assert_allclose(value, expected[possible].mean(), rtol=1e-5)
    value, all_gradients = loss(logits, np.full(40, 5), labels, label_lengths)
    assert value == np.inf
    scaled = np.asarray(gradient) * possible.mean(dtype=np.float32)
    np.testing.assert_allclose(all_gradients, scaled, rtol=1e-5, atol=1e-7)
    assert not np.asarray(all_gradients)[:, ~possible].any()
    assert np.isfinite(all_gradients).all()


def test_ctc_of_unseen_labels_out_of_range_is_nan():
    run = jax.jit(losses.ctc)
    for dtype in (np.int32, np.uint32, np.int8):
        for wrong in (np.array(-1).astype(dtype), dtype(4), dtype(0)):  # 0 is the blank
            labels = np.array([[1, 1], [wrong, 2]], dtype)
            loss = lambda *more, labels=labels: run(data(5, 2, 4), np.array([5, 5]), labels, *more)
            assert jnp.isnan(loss(np.array([2, 2])))
            assert jnp.isfinite(loss(np.array([1, 2])))
            assert jnp.isfinite(loss(np.array([2, 2]), np.array([False, True])))
    assert jnp.isnan(run(np.full((3, 1, 4), NAN), np.array([3]), np.array([[1]]), np.array([1])))


def test_ctc_of_empty_things():
    for time, most, batch in ((0, 0, 2), (3, 0, 2), (0, 2, 2), (3, 2, 0)):
        zeros = np.zeros(batch, int)
        value = losses.ctc(data(time, batch, 3), zeros, np.zeros((most, batch), int), zeros)
        assert value == 0
    assert losses.ctc(data(3, 2, 3), np.array([3, 3]), LABELS[:, :2], np.array([2, 2]), np.zeros(2, bool)) == 0


def test_ctc_any_batch_axes():
    actual = losses.ctc(
        data(5, 6, 4).reshape(5, 2, 3, 4),
        LENGTHS.reshape(2, 3),
        LABELS.reshape(3, 2, 3),
        LABEL_LENGTHS.reshape(2, 3),
    )
    np.testing.assert_allclose(actual, losses.ctc(data(5, 6, 4), LENGTHS, LABELS, LABEL_LENGTHS), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": data(4)}, ValueError, "logits: expected shape"),
        ({"logits": np.ones((5, 6, 4), int)}, TypeError, "logits: expected floats"),
        ({"lengths": LENGTHS + 1}, ValueError, "lengths: expected values from 0 to T = 5"),
        ({"lengths": LENGTHS[:5]}, ValueError, "lengths: expected shape"),
        ({"lengths": LENGTHS.astype(np.float32)}, TypeError, "lengths: expected integers"),
        ({"labels": LABELS.T}, ValueError, r"labels: expected shape \(N, \*B\) with \*B = \(6,\), got \(6, 3\)"),
        ({"labels": LABELS + 1}, ValueError, "labels: expected class ids from 0 to C - 1 = 3, got 4"),
        ({"labels": LABELS - 1}, ValueError, "labels: expected none to be the blank, 0"),
        ({"label_lengths": LABEL_LENGTHS + 1}, ValueError, "label_lengths: expected values from 0 to N = 3"),
        ({"mask": np.ones(5, bool)}, ValueError, "mask: expected shape"),
        ({"mask": np.ones(6)}, TypeError, "mask: expected booleans"),
        ({"blank": 4}, ValueError, "blank: expected a class id from 0 to C - 1 = 3"),
    ],
)
def test_ctc_errors(change, error, match):
    arguments = {"logits": data(5, 6, 4), "lengths": LENGTHS, "labels": LABELS, "label_lengths": LABEL_LENGTHS}
    with pytest.raises(error, match=match):
        losses.ctc(**{**arguments, **change})


# --- penalties

PARAMS = (
    {"w_ih": data(2, 4), "w_hh": data(1, 4, seed=1), "b": data(4, seed=2)},
    {
        "forward": {
            "w_ih": data(2, 3, seed=3),
            "w_hh": data(1, 3, seed=4),
            "b": data(3, seed=5),
            "b_hn": data(1, seed=6),
        },
        "backward": {"w_ih": data(2, 3, seed=7), "w_hh": data(1, 3, seed=8), "b": data(3, seed=9), "b_hn": data(1)},
    },
    {"w": data(2, 2, seed=11), "b": data(2, seed=12)},
)


def path_of(path):
    return tuple(getattr(k, "key", getattr(k, "idx", None)) for k in path)


@pytest.mark.parametrize(
    ("select", "chosen"),
    [
        (None, lambda path: True),
        ("recurrent", lambda path: path[-1] == "w_hh"),
        ("input", lambda path: path[-1] == "w_ih"),
        ("bias", lambda path: path[-1] in ("b", "b_hn")),
        ("w", lambda path: path[-1] == "w"),
        (("recurrent", "w"), lambda path: path[-1] in ("w_hh", "w")),
        (lambda path: path[0] == 1 and "forward" in path, lambda path: path[:2] == (1, "forward")),
    ],
)
@pytest.mark.parametrize(("penalty", "each_weight"), [(losses.l1, np.abs), (losses.l2, np.square)])
def test_penalties_of_chosen_parameters(select, chosen, penalty, each_weight):
    expected, slopes = 0.0, []
    leaves = jax.tree_util.tree_flatten_with_path(PARAMS)[0]
    for path, leaf in leaves:
        here = chosen(path_of(path))
        expected += each_weight(leaf).sum() if here else 0.0
        slopes.append((np.sign(leaf) if penalty is losses.l1 else 2 * leaf) * here)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: penalty(p, select)))(PARAMS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for actual, slope in zip(jax.tree.leaves(gradient), slopes, strict=True):
        np.testing.assert_allclose(actual, slope, rtol=1e-6)


def test_penalty_errors_and_edges(x64):
    with pytest.raises(
        ValueError, match=r"select: expected at least one leaf to match 'w_hx'; the leaves are named .*w_hh"
    ):
        losses.l2(PARAMS, "w_hx")
    with pytest.raises(ValueError, match="select: expected at least one leaf"):
        losses.l2(PARAMS, lambda path: False)
    for wrong in (3, (1, 2)):
        with pytest.raises(TypeError, match="select: expected None, a name"):
            losses.l1(PARAMS, wrong)
    assert losses.l1(()) == 0
    assert jax.grad(losses.l1)(np.zeros(2, np.float32)).tolist() == [0, 0]
    assert jax.grad(losses.mae)(np.ones(2, np.float32), np.ones(2)).tolist() == [0, 0]
    assert losses.l2({"a": jnp.ones(1000, jnp.bfloat16), "n": np.arange(3)}) == 1000
    assert losses.l2(np.ones(3)).dtype == np.float64
    assert losses.l2(np.ones(3, np.float32)).dtype == np.float32
