"""One step of training: a pure function of a state and a batch, jitted, its state donated."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrnn.training.optimizers import is_narrow

RESERVED = ("epoch", "grad_norm", "loss", "step")


class TrainState(NamedTuple):
    """All that changes during training. A pytree, made by ``step.init(params, key)``.

    Attributes:
      params: the parameters.
      opt_state: the optimiser's state.
      step: int32, the number of batches consumed, the ones that changed nothing included.
      key: the key of the run, which never changes: step ``n``, counted from 0, uses ``fold_in(key, n)``. With
        `tbptt_step` every chunk of a sequence uses the key of its first chunk. None for a run without randomness.
      skipped: int32, how many steps so far were not finite, and changed nothing.
      skipped_in_row: int32, how many of these came last, without a finite step since.
      carry: the recurrent state that one chunk passes to the next in truncated backpropagation; otherwise None.

    >>> TrainState._fields[:4]
    ('params', 'opt_state', 'step', 'key')
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array | None
    skipped: jax.Array
    skipped_in_row: jax.Array
    carry: Any = None


class Metrics(NamedTuple):
    """The measurements of one step, still on the device.

    Attributes:
      loss: scalar.
      grad_norm: scalar, the global norm of the gradient before any clipping.
      leaf_norms: ``(leaves,)``, the norm of each gradient in the order of ``jax.tree.leaves(params)``.
      finite: scalar bool, whether the step was finite, that is, whether it changed anything, see the laws of `Step`.
      aux: the dictionary that the loss function returned beside the loss, or an empty one.
      leaf_finite: ``(leaves,)`` bools in the same order, whether the update of each leaf and its new value were finite.

    >>> Metrics._fields
    ('loss', 'grad_norm', 'leaf_norms', 'finite', 'aux', 'leaf_finite')
    """

    loss: jax.Array
    grad_norm: jax.Array
    leaf_norms: jax.Array
    finite: jax.Array
    aux: dict[str, Any]
    leaf_finite: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """The base class of training steps; `make_step` and `tbptt_step` make the two kinds.

    Laws:
      * ``step(state, batch) -> (state, metrics)`` is pure: equal arguments give equal results, bit for bit.
      * The state given is donated: its buffers are reused and it must not be used again. ``init`` copies, so the
        user's own parameters are never touched.
      * A step is finite if its loss, gradients, updates and new parameters are, and if no number that the optimiser
        keeps in 16 bits has stopped being finite. Any other step leaves ``params``, ``opt_state`` and ``carry`` as they
        were, bit for bit; only the counters advance.
      * Steps are equal by value; equal steps share one compilation.

    >>> step = make_step(lambda params, batch, key: (params - batch) ** 2, optax.sgd(0.5))
    >>> isinstance(step, Step)
    True
    """

    optimizer: optax.GradientTransformation

    def init(self, params: Any, key: jax.Array | None = None) -> TrainState:
        """The state before the first step. Everything in it is a copy.

        Args:
          params: a pytree of floating-point arrays.
          key: a key of ``jax.random.key`` (or an old-style ``jax.random.PRNGKey``), or None: then the loss function
            gets ``key=None``, which for a jrnn model means no dropout.

        >>> step = make_step(lambda params, batch, key: (params - batch) ** 2, optax.sgd(0.5))
        >>> int(step.init(1.0).step)
        0
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise TypeError(
                    f"params: expected floating-point arrays, got {jnp.result_type(leaf)} at "
                    f"{jax.tree_util.keystr(path) or 'the root'}; keep what is not trained outside params"
                )
        if not jax.tree.leaves(params):
            raise ValueError("params: expected at least one array, got an empty tree")
        if key is not None:
            _check_key(key)
        params = jax.tree.map(_own, params)
        # Some optimisers keep the parameters themselves in their state; a buffer can be donated only once.
        opt_state = jax.tree.map(_own, self.optimizer.init(params))
        zero = functools.partial(jnp.zeros, (), jnp.int32)
        return TrainState(params, opt_state, zero(), None if key is None else _own(key), zero(), zero())

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """One update. `state` is donated: go on with the state returned."""
        if not isinstance(state, TrainState):
            raise TypeError(f"state: expected a TrainState from step.init(params, key), got {type(state).__name__}")
        return _update(self, state, batch)

    def evaluate(self, params: Any, batch: Any, carry: Any = None) -> tuple[Any, dict[str, jax.Array]]:
        """Loss and aux of one batch with ``key=None`` (no dropout): ``(carry, {"loss": ..., **aux})``.

        >>> step = make_step(lambda params, batch, key: (params - batch) ** 2, optax.sgd(0.5))
        >>> _, metrics = step.evaluate(1.0, 3.0)
        >>> float(metrics["loss"])
        4.0
        """
        return _evaluate(self, params, batch, carry)

    def key(self, state: TrainState, batch: Any) -> jax.Array | None:
        """The key of the step that consumes `batch`: ``fold_in(state.key, state.step)``."""
        del batch
        return None if state.key is None else jax.random.fold_in(state.key, state.step)

    def forward(self, params: Any, carry: Any, batch: Any, key: Any) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
        """``(loss, (carry, aux))``: the function whose gradient with respect to `params` the step takes."""
        raise NotImplementedError

    def initial_carry(self, params: Any, batch: Any) -> Any:
        """The carry before the first batch."""
        del params, batch

    def carry_structure(self, params: Any) -> Any:
        """The tree structure of the carry; its shapes depend on the batch."""
        del params
        return jax.tree.structure(None)


@dataclasses.dataclass(frozen=True)
class TrainStep(Step):
    """The step of `make_step`.

    >>> TrainStep(optimizer=optax.sgd(0.1), loss_fn=max).loss_fn is max
    True
    """

    loss_fn: Callable[..., Any]

    def forward(self, params: Any, carry: Any, batch: Any, key: Any) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
        loss, aux = split_loss(self.loss_fn(params, batch, key), "loss_fn")
        return loss, (carry, aux)


def make_step(loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation) -> TrainStep:
    """A training step around any loss function: jitted, pure, its state donated.

    Args:
      loss_fn: ``loss_fn(params, batch, key)`` returns a scalar loss, or ``(loss, aux)`` with a dictionary of arrays to
        report beside it. ``batch`` is any pytree; ``key`` is ``fold_in(state.key, state.step)``, or None when the
        state has no key and in evaluation.
      optimizer: any Optax transformation, `jrnn.optimizer` for one. It is handed the loss as ``value``, which
        ``optax.contrib.reduce_on_plateau`` wants.

    Returns:
      A `Step`: ``state = step.init(params, key)``, then ``state, metrics = step(state, batch)``. See `TrainState` and
      `Metrics`, and the laws under `Step`.

    Raises:
      TypeError: ``loss_fn`` or ``optimizer`` of the wrong kind, or a loss function that does not take the three
        arguments; at the first call, a loss that is not a floating-point
        scalar or an aux that is not a dictionary.

    >>> def loss_fn(params, batch, key):
    ...     xs, ys = batch
    ...     return jnp.mean((xs @ params["w"] - ys) ** 2)
    >>> step = make_step(loss_fn, optax.sgd(0.1))
    >>> state = step.init({"w": jnp.zeros(2)}, jax.random.key(0))
    >>> batch = jnp.eye(2), jnp.array([3.0, 4.0])
    >>> state, metrics = step(state, batch)
    >>> float(metrics.loss), float(metrics.grad_norm), bool(metrics.finite)
    (12.5, 5.0, True)
    >>> step == make_step(loss_fn, step.optimizer)
    True
    """
    check_function(
        loss_fn,
        "loss_fn",
        ("params", "batch", "key"),
        "it must take all three, key too, which is None where a state has none",
    )
    check_optimizer(optimizer)
    return TrainStep(optimizer, loss_fn)


def check_function(function: Any, name: str, arguments: tuple[str, ...], remedy: str) -> None:
    """Raises if a function cannot be called with so many positional arguments."""
    expected = f"{name}: expected a function of ({', '.join(arguments)})"
    if not callable(function):
        raise TypeError(f"{expected}, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one that is not written in Python may have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{expected}, by position, got one that takes {signature}; {remedy}") from error


def check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "optimizer: expected an Optax transformation, as from jrnn.optimizer('adam', 1e-3), got "
            f"{type(optimizer).__name__}"
        )


def split_loss(result: Any, name: str) -> tuple[jax.Array, dict[str, Any]]:
    """Loss and aux of what a loss function returned: either a loss, or a pair of a loss and a dictionary."""
    loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(aux, dict):
        raise TypeError(f"{name}: expected a loss, or (loss, dict of arrays), got aux of type {type(aux).__name__}")
    clash = sorted(set(aux) & set(RESERVED))
    if clash:
        raise ValueError(f"{name}: the aux names {list(RESERVED)} are taken, got {clash}; rename them")
    try:
        loss = jnp.asarray(loss)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a scalar loss, got {type(loss).__name__}") from error
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected a floating-point scalar loss, got {loss.dtype} of shape {loss.shape}; take a mean"
        )
    return loss, aux


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(step: Step, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
    before = state.carry
    if before is None:
        before = step.initial_carry(state.params, batch)
    differentiate = jax.value_and_grad(step.forward, has_aux=True)
    (loss, (carry, aux)), grads = differentiate(state.params, state.carry, batch, step.key(state, batch))
    leaf_norms = _leaf_norms(grads)
    grad_norm = jnp.sqrt(jnp.sum(jnp.square(leaf_norms)))

    transform = optax.with_extra_args_support(step.optimizer)
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        updates, opt_state = transform.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
    # Finite gradients are not enough: an update may divide by zero, and a sum with it may overflow.
    updated = lambda old, new, update: _stays_finite(old, new) & jnp.isfinite(update).all()
    leaf_finite = jnp.stack(jax.tree.leaves(jax.tree.map(updated, state.params, params, updates)))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & leaf_finite.all()
    for old, new in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(opt_state), strict=True):
        # A mean of squares overflows in 16 bits. In float32 the gradient norm above would have overflowed before it.
        if is_narrow(new):
            finite &= _stays_finite(old, new)
    # A select and not a product with `finite`: zero times NaN is NaN.
    params, opt_state, carry = jax.tree.map(
        functools.partial(jnp.where, finite), (params, opt_state, carry), (state.params, state.opt_state, before)
    )
    one_if_skipped = jnp.where(finite, jnp.int32(0), jnp.int32(1))
    state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + jnp.int32(1),
        key=state.key,
        skipped=state.skipped + one_if_skipped,
        skipped_in_row=(state.skipped_in_row + one_if_skipped) * one_if_skipped,
        carry=carry,
    )
    return state, Metrics(loss, grad_norm, leaf_norms, finite, aux, leaf_finite)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(step: Step, params: Any, batch: Any, carry: Any) -> tuple[Any, dict[str, jax.Array]]:
    loss, (carry, aux) = step.forward(params, carry, batch, None)
    return carry, {"loss": loss, **aux}


def _stays_finite(old: jax.Array, new: jax.Array) -> jax.Array:
    """Whether every number that was finite still is: a bias of minus infinity rules out a class, and may stay."""
    return (jnp.isfinite(new) | ~jnp.isfinite(old)).all()


def _leaf_norms(grads: Any) -> jax.Array:
    """Norms in float32 at least: the squares of a float16 gradient overflow at 256."""
    leaves = jax.tree.leaves(grads)
    dtype = jnp.float64 if any(jnp.finfo(leaf.dtype).bits == 64 for leaf in leaves) else jnp.float32
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(jnp.abs(leaf).astype(dtype)))) for leaf in leaves])


def _own(leaf: Any) -> jax.Array:
    """A copy with a definite dtype: a weakly typed leaf would change type, and recompile, after one step."""
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.copy(leaf)
    return jnp.array(leaf, dtype=dtype, copy=True)


def _check_key(key: Any) -> None:
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    legacy = hasattr(key, "dtype") and key.dtype == jnp.uint32 and key.ndim == 1
    if not (typed or legacy):
        raise TypeError(
            f"key: expected one key, as from jax.random.key(0), got {key!r}; None for a run without randomness"
        )
