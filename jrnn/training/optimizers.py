"""Optimisers and learning-rate schedules by name: ordinary Optax transformations and functions, nothing hidden."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrnn._core.checks import non_negative_int, positive_int

Schedule = Callable[[Any], Any]

OPTIMIZERS = ("adam", "rmsprop", "sgd", "adamw")
SCHEDULES = ("constant", "exponential", "linear", "warmup_cosine")


def optimizer(
    name: str,
    learning_rate: float | Schedule,
    *,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """An Optax optimiser: clip the gradient's global norm, decay the weights, then the named rule.

    ``g = g * min(1, clip_norm / |g|)`` over all parameters together (Pascanu, Mikolov and Bengio 2013, "On the
    difficulty of training recurrent neural networks"), before anything else sees the gradient.

    ``weight_decay`` is decoupled for "adamw", ``p -= learning_rate * weight_decay * p`` (Loshchilov and Hutter 2019).
    For the others it is the classical L2 penalty: ``weight_decay * p`` is added to the gradient after clipping, so
    that a clipped gradient does not weaken the penalty, and before the rule. "adamw" with no decay is "adam". Decay
    acts on every parameter, biases included; to choose parameters, wrap the transformation in ``optax.masked`` or add
    a penalty to the loss.

    For parameters of float16 and bfloat16, everything is computed and the optimiser's state is kept in float32. The
    updates have the dtype of the gradients.

    Equal calls return the same object, so a jitted step that has the optimiser as a static argument compiles once.

    Args:
      name: "adam" (Kingma and Ba 2015), "rmsprop" (Hinton 2012), "sgd" (no momentum) or "adamw".
      learning_rate: a positive number, or an Optax schedule (a function of the step count), see `schedule`.
      clip_norm: the largest global norm let through, or None for no clipping.
      weight_decay: zero or more.

    Scalar arrays are taken too, so that ``optax.inject_hyperparams(jrnn.optimizer)`` works.

    Raises:
      ValueError, TypeError: an unknown name, or a number that is out of range or not a number.

    >>> import jax.numpy as jnp
    >>> tx = optimizer("sgd", 0.1, clip_norm=1.0)
    >>> params = {"w": jnp.zeros(2)}
    >>> updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
    >>> [round(float(u), 3) for u in updates["w"]]
    [-0.06, -0.08]
    >>> optimizer("adam", 1e-3) is optimizer("adam", 1e-3)
    True
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name: expected one of {list(OPTIMIZERS)}, got {name!r}")
    if not callable(learning_rate):
        learning_rate = _number(learning_rate, "learning_rate")
    if clip_norm is not None:
        clip_norm = _number(clip_norm, "clip_norm")
    weight_decay = _number(weight_decay, "weight_decay", positive=False)
    try:
        hash((learning_rate, clip_norm, weight_decay))
    except TypeError:  # arrays and traced values: nothing to remember the transformation by
        return _optimizer.__wrapped__(name, learning_rate, clip_norm, weight_decay)
    return _optimizer(name, learning_rate, clip_norm, weight_decay)


@functools.lru_cache(maxsize=256)
def _optimizer(name: str, learning_rate: Any, clip_norm: Any, weight_decay: Any) -> optax.GradientTransformation:
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if name == "adamw":
        parts.append(optax.adamw(learning_rate, weight_decay=weight_decay))
    else:
        if not (isinstance(weight_decay, float) and weight_decay == 0.0):
            parts.append(optax.add_decayed_weights(weight_decay))
        rule = {"adam": optax.adam, "rmsprop": optax.rmsprop, "sgd": optax.sgd}[name]
        parts.append(rule(learning_rate))
    init, update = in_float32(optax.chain(*parts))
    return optax.GradientTransformationExtraArgs(init, standard_promotion(update))


def in_float32(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner` for float16 and bfloat16 parameters: it sees parameters and gradients as float32 and keeps its state so.

    In float16 the 1e-8 that Adam and RMSprop add to a denominator is 0, and the square of a gradient above 255 is
    infinite; in bfloat16 a moving average with a decay of 0.999 never moves. Updates have the dtype of the gradients.
    """

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(_widened, params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        wide, params = jax.tree.map(_widened, (updates, params))
        wide, state = inner.update(wide, state, params, **extra_args)
        return jax.tree.map(lambda new, old: new.astype(jnp.result_type(old)), wide, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def is_narrow(leaf: Any) -> bool:
    """Whether a leaf has a floating-point type of fewer bits than float32."""
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _widened(leaf: Any) -> Any:
    return jnp.asarray(leaf, jnp.float32) if is_narrow(leaf) else leaf


def standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """Optax counts in integers and multiplies by floats, which needs JAX's standard promotion rules."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


def schedule(
    name: str,
    learning_rate: float,
    *,
    steps: int | None = None,
    warmup_steps: int | None = None,
    rate: float | None = None,
    end: float | None = None,
) -> Schedule:
    """A learning-rate schedule by name: an Optax schedule, a function of the number of updates ``t``.

    * "constant": ``learning_rate``.
    * "exponential": ``learning_rate * rate ** (t / steps)``, never beyond ``end`` if that is given.
    * "linear": from ``learning_rate`` to ``end`` (default 0) over ``steps`` updates, then ``end``.
    * "warmup_cosine": linearly from 0 to ``learning_rate`` over ``warmup_steps`` (0: no warm-up), then along a half
      cosine to ``end`` (default 0), reached at ``steps`` (the warm-up counted in) and kept (Loshchilov and Hutter
      2017).

    Equal calls return the same function, so the optimisers made from it are the same too.

    Raises:
      ValueError, TypeError: an unknown name, an option that the schedule needs and did not get, one that it does not
        use, or a number out of range.

    >>> halves = schedule("exponential", 0.1, steps=100, rate=0.5)
    >>> [round(float(halves(t)), 4) for t in (0, 100, 200)]
    [0.1, 0.05, 0.025]
    >>> up_and_down = schedule("warmup_cosine", 1e-3, steps=1000, warmup_steps=100)
    >>> [round(float(up_and_down(t)), 6) for t in (0, 100, 1000)]
    [0.0, 0.001, 0.0]
    """
    needed: dict[str, tuple[str, ...]] = {
        "constant": (),
        "exponential": ("steps", "rate"),
        "linear": ("steps",),
        "warmup_cosine": ("steps", "warmup_steps"),
    }
    if name not in needed:
        raise ValueError(f"name: expected one of {list(SCHEDULES)}, got {name!r}")
    options: dict[str, Any] = {"steps": steps, "warmup_steps": warmup_steps, "rate": rate, "end": end}
    given = {option: value for option, value in options.items() if value is not None}
    missing = [option for option in needed[name] if option not in given]
    if missing:
        raise ValueError(f"{missing[0]}: the {name!r} schedule needs it, got None")
    unused = [option for option in given if option not in (*needed[name], "end") or name == "constant"]
    if unused:
        raise ValueError(f"{unused[0]}: the {name!r} schedule does not use it; leave it out")
    _number(learning_rate, "learning_rate")
    for option, value in given.items():
        if option == "steps":
            positive_int(value, option)
        elif option == "warmup_steps":
            non_negative_int(value, option)
        else:
            _number(value, option, positive=option == "rate")
    if name == "warmup_cosine" and given["warmup_steps"] >= given["steps"]:
        raise ValueError(
            f"warmup_steps: expected fewer than steps={steps} (which counts the warm-up in), got {warmup_steps}"
        )
    return _schedule(name, float(learning_rate), **given)


@functools.lru_cache(maxsize=256)
def _schedule(
    name: str,
    learning_rate: float,
    steps: int = 1,
    warmup_steps: int = 1,
    rate: float = 1.0,
    end: float | None = None,
) -> Schedule:
    if name == "constant":
        return optax.constant_schedule(learning_rate)
    if name == "exponential":
        return standard_promotion(optax.exponential_decay(learning_rate, steps, rate, end_value=end))
    if name == "linear":
        return standard_promotion(optax.linear_schedule(learning_rate, end or 0.0, steps))
    return standard_promotion(optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps, end or 0.0))


def _number(value: Any, argument: str, *, positive: bool = True) -> Any:
    """A finite float above zero, or at least zero; a scalar array passes as it is: it may be traced."""
    if isinstance(value, jax.Array | np.ndarray) and value.shape == ():
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    value = float(value)
    if not math.isfinite(value) or value < 0.0 or (positive and value == 0.0):
        raise ValueError(
            f"{argument}: expected a finite number {'above' if positive else 'of at least'} 0, got {value:g}"
        )
    return value
