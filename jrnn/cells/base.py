"""The kinds of cell: what one step is, as frozen data with pure functions.

`Layer` is anything `jrnn.unroll` can run over a sequence. `Cell` is a recurrent layer, known by its step, of which it
may declare more (see `jrnn.cells.form`). A promise a cell leaves out means "don't know", never "no".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn._core.checks import brief, describe, same_form
from jrnn._core.products import weigh
from jrnn._core.text import call, field_arguments

__all__ = ["Cell", "Drawn", "Emitted", "HiddenState", "Layer"]

_State = TypeVar("_State")


def exported(state: type[_State]) -> type[_State]:
    """Makes a state known to `jax.export`, so that a program that takes or returns it can be serialised.

    The name under which files know it is the public one: it stays where a module is moved.
    """
    return jax.export.register_namedtuple_serialization(state, serialized_name=f"jrnn.{state.__name__}")


@exported
class HiddenState(NamedTuple):
    """State of a cell that carries its hidden state alone: ``h`` is ``(*B, H)``.

    >>> HiddenState(h=1.0)
    HiddenState(h=1.0)
    """

    h: jax.Array


class Drawn(NamedTuple):
    """Parameters together with the arrays that were drawn once for a sequence (see `Layer.draw`).

    >>> Drawn(params={"w": 1.0}, noise={}).params
    {'w': 1.0}
    """

    params: Any
    noise: Any


class Emitted(NamedTuple):
    """The outputs of a layer of `jrnn.emit_state`: those of the layer inside it, ``y``, and its states, ``state``.

    >>> Emitted(y=1.0, state=2.0).y
    1.0
    """

    y: Any
    state: Any


# --- numerics ----------------------------------------------------------------------------------------------------


def is_low(dtype: Any) -> bool:
    """Whether a dtype is a 16-bit (or smaller) float: products in it, everything else in float32."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def is_complex(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.complexfloating)


def stable(dtype: Any) -> Any:
    """The dtype in which states are kept and sums are taken: at least float32."""
    return jnp.dtype(jnp.float32) if is_low(dtype) else jnp.dtype(dtype)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x @ w`` over the last axis of x, in the narrower of the two dtypes, accumulated in at least float32.

    Where one of the two is complex, both are taken as complex numbers of at least 32 bits each part.

    Args:
      x: ``(*B, F)``.
      w: ``(F, H)``.

    Returns:
      ``(*B, H)``, float32 for 16-bit factors, complex where a factor is.

    >>> jrnn.product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))).dtype
    dtype('float32')
    """
    if is_complex(x) or is_complex(w):
        dtype = np.promote_types(stable(x.dtype), stable(w.dtype))
        x, w = x.astype(dtype), w.astype(dtype)
    if x.dtype != w.dtype:
        if is_low(w.dtype):
            x = x.astype(w.dtype)
        elif is_low(x.dtype):
            w = w.astype(x.dtype)
    if x.dtype == w.dtype and not is_low(x.dtype):
        return weigh(x, w)
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=stable(x.dtype))


def vector(v: jax.Array, like: jax.Array) -> jax.Array:
    """A vector ``(H,)`` for arithmetic with ``like (*B, H)``: in its dtype, and with axes of size one for ``*B``.

    The axes are written out for users who set ``jax_numpy_rank_promotion`` to "raise".
    """
    return lax.broadcast_to_rank(v.astype(like.dtype), like.ndim)


def compute_params(params: Any, dtype: Any) -> Any:
    """Weights (leaves named ``w`` or ``w_...``) in a 16-bit input's dtype, so that every product runs in it."""
    if not is_low(dtype):
        return params

    def cast(path: Any, leaf: Any) -> Any:
        name = getattr(path[-1], "key", None) if path else None
        is_weight = isinstance(name, str) and (name == "w" or name.startswith("w_"))
        return leaf.astype(dtype) if is_weight and jnp.ndim(leaf) >= 2 and not is_complex(leaf) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def check_features(x: jax.Array, w: jax.Array, argument: str, owner: Any, axis: int = 0) -> None:
    """Raises if inputs do not fit the weight that consumes them, by feature count or by dtype."""
    if x.shape[-1:] != (w.shape[axis],):
        remedy = f"initialise with in_features={x.shape[-1] if x.ndim else 1} or reshape the input"
        if w.shape[axis] == 1:
            remedy = f"give a univariate series its axis of one feature with {argument}[..., None], or {remedy}"
        raise ValueError(
            f"{argument}: expected {w.shape[axis]} features on the last axis, as the parameters of {owner!r} have, "
            f"got shape {x.shape}; {remedy}"
        )
    if not (jnp.issubdtype(x.dtype, jnp.floating) or (is_complex(x) and is_complex(w))):
        raise TypeError(
            f"{argument}: expected floats, got {x.dtype}; embed integer ids with jrnn.embed, or convert them"
        )
    if _real(x.dtype) != _real(w.dtype) and not is_low(x.dtype):
        raise TypeError(
            f"{argument}: expected {_real(w.dtype)} like the parameters (or a 16-bit float), got {x.dtype}; convert "
            "one of the two, jrnn never promotes silently"
        )
    if is_low(x.dtype) and jnp.issubdtype(w.dtype, jnp.inexact) and jnp.finfo(w.dtype).bits > 32:
        raise TypeError(
            f"{argument}: expected float64 like the parameters, got {x.dtype}; 16-bit inputs choose 16-bit products, "
            "which float64 parameters have no use for: convert the inputs to float64, or the parameters to float32"
        )


def _real(dtype: Any) -> Any:
    """The dtype of the real part, for floats the dtype itself."""
    return jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(dtype)


# --- layers ------------------------------------------------------------------------------------------------------


def features_of(layer: Any, shape: tuple[int, ...]) -> Any:
    """The ``in_features`` of inputs of a shape: a tuple where a step has several axes, None where it has none."""
    if layer.event_ndim < 2:
        return shape[-1] if layer.event_ndim else None
    return tuple(shape[len(shape) - layer.event_ndim :])


def event_shape(features: Any) -> tuple[int, ...]:
    """The axes of one step of one sequence, for ``in_features`` or `Layer.out_features`."""
    return features if isinstance(features, tuple) else (features,)


class Layer:
    """Anything that `jrnn.unroll` can run: cells, layers without recurrence, and combinators of them.

    A layer is a frozen dataclass: hashable, equal by value, not a pytree. Its parameters and states are pytrees that
    its methods take and return.

    Promises (class attributes, None means "don't know"):
      - ``uses_key``: whether a key changes what the layer does. Where it is False, `unroll` drops the key it is given.
      - ``event_ndim``: how many trailing axes of an input belong to one step of one sequence (features: 1; an image
        of features: 3, and ``in_features`` is the tuple of the three).

    >>> isinstance(jrnn.lstm(4), jrnn.Layer) and isinstance(jrnn.dense(4), jrnn.Layer)
    True
    """

    uses_key: Any = None
    event_ndim: Any = 1

    _constructor: ClassVar[str | None] = None  # the public function that makes layers of this very class

    def __repr__(self) -> str:
        """The layer as one would write it, with the options that differ from their defaults."""
        name = type(self).__dict__.get("_constructor")
        if name is None:
            return call(type(self).__name__, *field_arguments(self))
        return call(name, *self._constructor_arguments())

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and options of the constructor, where they are not simply the fields."""
        return field_arguments(self)

    def init(self, key: jax.Array, in_features: Any) -> Any:
        """Parameters for inputs of ``in_features`` features: nested dicts and tuples of arrays."""
        raise NotImplementedError(f"{type(self).__name__} must define init(key, in_features)")

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        """State before the first step; every leaf has the shape ``(*B, ...)``."""
        raise NotImplementedError(f"{type(self).__name__} must define initial_state(params, batch_shape)")

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        """One step: ``(state, x (*B, F)) -> (state, y)``.

        With a key, what `unroll` draws once per sequence (the masks of variational dropout and DropConnect) is drawn
        anew by every call, unless the parameters come from `jrnn.draw`. A loop over steps that is to draw what
        ``unroll(..., key=key)`` draws takes its parameters from ``jrnn.draw(cell, params, key, x)``, once per sequence,
        and gives step t the key ``jax.random.fold_in(key, t)``.

        Raises:
          ValueError: if the state does not have the batch axes of ``x``, as for a whole sequence given as one step.

        >>> cell = jrnn.variational(jrnn.gru(4), inputs=0.2, recurrent=0.3)
        >>> params, xs, key = cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)), jax.random.key(1)
        >>> drawn, state = jrnn.draw(cell, params, key, xs[0]), cell.initial_state(params, (2,))
        >>> for t, x in enumerate(xs):
        ...     state, y = cell.step(drawn, state, x, jax.random.fold_in(key, t))
        >>> bool(jnp.allclose(y, jrnn.unroll(cell, params, xs, key=key)[1][-1], atol=1e-6))
        True
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(params, state, x, key=None)")

    def form(self, params: Any) -> Any:
        """The form of the step with these parameters (see `jrnn.cells.form`); None where it is not declared."""
        return None

    def out_features(self, in_features: Any) -> Any:
        """Features of ``y`` for inputs of ``in_features`` features. By default they are found by `jax.eval_shape`."""
        params = jax.eval_shape(lambda key: self.init(key, in_features), jax.random.key(0))
        if self.event_ndim == 0:
            x = jax.ShapeDtypeStruct((), jnp.int32)
        else:
            floats = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            x = jax.ShapeDtypeStruct(event_shape(in_features), floats[0] if floats else jnp.result_type(float))
        if type(self).walk is not Layer.walk:  # a combinator, which may have no step: run over one step
            from jrnn.run.unrolling import unroll

            xs = jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
            ys = jax.eval_shape(lambda p, xs: unroll(self, p, xs), params, xs)[1]
            return ys.shape[1:] if isinstance(in_features, tuple) else ys.shape[-1]
        state = jax.eval_shape(lambda p: self.initial_state(p, ()), params)
        y = jax.eval_shape(lambda p, s, x: self.step(p, s, x), params, state, x)[1]
        return y.shape if isinstance(in_features, tuple) else y.shape[-1]

    def children(self) -> tuple[Layer, ...]:
        """The layers that this layer is made of: the layers among its dataclass fields, and in tuples there, in order.

        >>> jrnn.stack(jrnn.gru(4), jrnn.dense(2)).children()
        (gru(4), dense(2))
        """
        if not dataclasses.is_dataclass(self):
            return ()
        return tuple(_layers_in(tuple(getattr(self, f.name) for f in dataclasses.fields(self))))

    @property
    def causal(self) -> bool:
        """Whether an output needs no later step: by default, whether this holds of each of the `children`.

        A `Cell` is causal, since its step sees nothing later. A layer of your own that runs a part in the opposite
        direction (``run.opposite()`` in its `walk`) declares ``causal = False``. A layer that is not causal has no
        step, and is refused where a sequence is cut into chunks.

        >>> jrnn.stack(jrnn.gru(4), jrnn.dense(2)).causal, jrnn.stack(jrnn.bidirectional(jrnn.gru(4))).causal
        (True, False)
        """
        return all(child.causal for child in self.children())

    @property
    def draws_once(self) -> bool:
        """Whether `draw` may draw something: True if a layer defines it and is not known to use no key."""
        return self.uses_key is not False and type(self).draw is not Layer.draw

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        """Parameters that include the masks, or other random arrays, that are drawn once per sequence.

        Most layers draw nothing. A layer of your own that holds one that does (`jrnn.variational`, `jrnn.dropconnect`,
        or a stack with one of them) defines this method: it returns its parameters, with those of each part replaced
        by what the ``draw`` of that part returns. Otherwise each step would draw anew, so `jrnn.unroll` refuses a key.

        >>> @dataclasses.dataclass(frozen=True)
        ... class Decoder(jrnn.Cell):
        ...     cell: jrnn.Cell
        ...     def init(self, key, in_features):
        ...         return {"cell": self.cell.init(key, in_features), "bias": jnp.zeros(in_features)}
        ...     def initial_state(self, params, batch_shape):
        ...         return self.cell.initial_state(params["cell"], batch_shape)
        ...     def draw(self, params, key, batch_shape, in_features):
        ...         return {**params, "cell": self.cell.draw(params["cell"], key, batch_shape, in_features)}
        ...     def step(self, params, state, x, key=None):
        ...         return self.cell.step(params["cell"], state, x + params["bias"], key)
        >>> decoder = Decoder(jrnn.variational(jrnn.gru(4), inputs=0.5))
        >>> params = decoder.init(jax.random.key(0), 3)
        >>> jrnn.unroll(decoder, params, jnp.ones((5, 3)), key=jax.random.key(1))[1].shape
        (5, 4)
        """
        for child in self.children():
            if child.draws_once and self.uses_key is not False:
                raise TypeError(
                    f"cell: expected {type(self).__name__} to define draw(params, key, batch_shape, in_features), "
                    f"since its part {child!r} draws something once per sequence, got no such method, so that every "
                    "step would draw anew; return params with those of the part replaced by what the part's own draw "
                    "returns (see jrnn.Layer.draw), or params unchanged if each step runs the part over a sequence of "
                    "its own"
                )
        return params

    def check(self, params: Any, x: Any) -> None:
        """Raises if an input of one or more steps does not fit the parameters."""
        w = params.get("w_ih") if isinstance(params, Mapping) else None
        if w is not None and jnp.ndim(w) == 2:
            check_features(x, w, "xs", self)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        """Raises if values that can be read before the run are invalid, such as ids outside a vocabulary."""

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        """Runs the layer over all steps: ``(state, xs (T, *B, F)) -> (state, ys (T, *B, H))``.

        By default this is a loop over `step`. A combinator of your own, a layer made of layers, defines it instead:

        - ``run(layer, params, xs, state)`` runs a part of it over all steps.
        - ``run.child(i)`` is the run of its i-th part, with randomness of its own; needed where it has several.
        - ``run.opposite()`` is the run in the opposite direction (see `causal`).
        - ``run.zero_invalid(ys)`` sets outputs to zero at invalid steps; needed where the combinator does not map zeros
          to zeros.

        `jrnn.unroll`, `jrnn.testing.check_cell`, `jrnn.diagnose` and truncated backpropagation follow it. The parts are
        found by `children`. A ``step`` beside it serves `jrnn.stepper`.

        >>> @dataclasses.dataclass(frozen=True)
        ... class Scaled(jrnn.Layer):
        ...     layer: jrnn.Layer
        ...     def init(self, key, in_features):
        ...         return {"layer": self.layer.init(key, in_features), "scale": jnp.array(0.5)}
        ...     def initial_state(self, params, batch_shape):
        ...         return self.layer.initial_state(params["layer"], batch_shape)
        ...     def walk(self, run, params, xs, state):
        ...         state, ys = run(self.layer, params["layer"], xs, state)
        ...         return state, params["scale"] * ys
        >>> model = Scaled(jrnn.bidirectional(jrnn.gru(4)))
        >>> jrnn.unroll(model, model.init(jax.random.key(0), 3), jnp.ones((5, 3)))[1].shape
        (5, 8)
        """
        return run.scan(self, params, xs, state)


def check_layer(layer: Any, argument: str, params: Any = None) -> None:
    """Raises if an argument is no layer; ``params`` is the argument that follows it."""
    if isinstance(layer, Layer):
        return
    remedy = ""
    if isinstance(params, Layer):
        remedy = f"; {params!r} came where the parameters belong: the layer comes first, then its parameters"
    raise TypeError(
        f"{argument}: expected a layer, such as jrnn.lstm(128) or a subclass of jrnn.Cell, got {brief(layer)}{remedy}"
    )


def _layers_in(values: tuple[Any, ...]) -> Iterator[Layer]:
    for value in values:
        if isinstance(value, Layer):
            yield value
        elif isinstance(value, tuple):
            yield from _layers_in(value)


# Compiled under a name of its own, by which `jrnn.schedules.steps.check_step` finds it in a traced step.
@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def draw_in_step(layer: Layer, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
    """``layer.draw``, called by a single step for parameters into which nothing was drawn."""
    return layer.draw(params, key, batch_shape, in_features)


def check_state(layer: Layer, params: Any, state: Any, x: jax.Array) -> None:
    """Raises if a state is not one for the batch axes of ``x``, one step's input: the two would broadcast."""
    batch_shape = x.shape[: x.ndim - layer.event_ndim]
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    expected, form = _initial_form(layer, batch_shape, *_form(params), x64)
    # The first comparison costs a fraction of the second, which also takes NumPy's float64 for JAX's float32.
    if expected is not None and _form(state) != form and not same_form(state, expected):
        raise ValueError(
            f"state: expected {describe(expected)} for {layer!r} and x of shape {x.shape}, got {describe(state)}; a "
            f"step takes one input (*B, F) and a state with the same batch axes, as initial_state(params, "
            f"{batch_shape}) gives it; run whole sequences through jrnn.unroll"
        )


def _form(tree: Any) -> tuple[Any, Any]:
    """Structure, shapes and dtypes of a pytree, hashable."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for leaf in leaves]
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@functools.lru_cache(maxsize=1024)
def _initial_form(layer: Layer, batch_shape: tuple[int, ...], treedef: Any, leaves: Any, x64: bool) -> tuple[Any, Any]:
    """An initial state as shapes and dtypes, and its `_form`; None and None for a layer that does not define one."""
    del x64  # part of the key: the default dtypes depend on it
    params = treedef.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    try:
        state = jax.eval_shape(lambda params: layer.initial_state(params, batch_shape), params)
    except NotImplementedError:
        return None, None
    return state, _form(state)


class Cell(Layer):
    """A recurrent layer, which is defined by its step.

    A cell of your own is a frozen dataclass with ``init``, ``initial_state`` and one of

    - ``step(params, state, x, key=None) -> (state, y)``, or
    - ``project(params, xs)``, the part of the step that does not need the state, and
      ``update(params, state, p, key=None) -> (state, y)``, the rest of it, where ``p`` is one step of the result of
      ``project``. The library then calls ``project`` once for all T steps.

    Take matrix products with `jrnn.product`, and name the leaves of weights ``w_...``, so that bfloat16 inputs work.

    At steps that are not valid the cell is still called, with zeros for ``x`` and with the state that is held, and its
    results are discarded. Its step must have finite values and derivatives there, or gradients become NaN. (For the
    same reason an input that is NaN at a *valid* step makes the gradients of parameters NaN, with or without a reset.)

    States may be any pytree. To serialise a program that takes or returns a state of your own type (`jax.export`),
    register the type with ``jax.export.register_namedtuple_serialization``. The states of jrnn's cells are registered.

    The class attribute ``emits = "h"`` declares that ``y`` is the field ``h`` of the new state, which zoneout needs to
    know. It may name another field, or several: with ``emits = ("h", "c")``, ``y`` is these fields side by side along
    the features.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Leaky(jrnn.Cell):
    ...     decay: float
    ...     def init(self, key, in_features):
    ...         return {}
    ...     def initial_state(self, params, batch_shape):
    ...         return jnp.zeros((*batch_shape, 1))
    ...     def step(self, params, state, x, key=None):
    ...         state = self.decay * state + x
    ...         return state, state
    >>> state, ys = jrnn.unroll(Leaky(0.5), {}, jnp.ones((3, 1)))
    >>> ys[:, 0]
    Array([1.  , 1.5 , 1.75], dtype=float32)
    """

    emits: Any = None
    causal = True

    def project(self, params: Any, xs: jax.Array) -> Any:
        """The part of the step that does not need the state, for one step or for all T; by default ``xs`` itself."""
        return xs

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        """The rest of the step, given one step of what `project` returned."""
        return self.step(params, state, p, key)

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        """One step: ``(state, x (*B, F)) -> (state, y)``, `project` then `update`."""
        if not self.hoistable:
            raise NotImplementedError(f"{type(self).__name__} must define step, or project and update")
        x = jnp.asarray(x)
        self.check(params, x)
        check_state(self, params, state, x)
        params = compute_params(params, x.dtype)
        state, y = self.update(params, state, self.project(params, x), key)
        return state, emitted(y, x)

    def chunk(self, params: Any, state: Any, p: Any, valid: Any, resets: Any) -> tuple[Any, jax.Array]:
        """Many steps at once: ``(state, p (C, *B, ...)) -> (state, ys (C, *B, ...))``, for ``backend="chunkwise"``.

        A cell that has a form for that, and whose initial state is zero, defines it. ``p`` is what `project` made of
        the steps, ``valid`` and ``resets`` are ``(C, *B)`` booleans or None: an invalid step leaves the state as it
        is (its output does not matter), and a reset sets it to zero before its step.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to run many steps at once")

    @property
    def hoistable(self) -> bool:
        """Whether the cell declares a projection that can be taken out of the loop over time."""
        return type(self).update is not Cell.update


def emitted_fields(cell: Any) -> tuple[str, ...]:
    """The fields of its new state that a cell puts out, in order (see `Cell`)."""
    return (cell.emits,) if isinstance(cell.emits, str) else tuple(cell.emits)


def output(cell: Any, state: Any) -> jax.Array:
    """``y`` of a cell that says which fields of its new state it emits: these, side by side along the features."""
    check_emits(cell, getattr(state, "_fields", ()))
    return side_by_side([getattr(state, name) for name in emitted_fields(cell)])


def side_by_side(fields: Any) -> jax.Array:
    return fields[0] if len(fields) == 1 else jnp.concatenate(fields, -1)


def emitted(y: Any, x: jax.Array) -> Any:
    """Outputs leave in the dtype in which 16-bit inputs came, unless complex, so that the next layer computes in it."""
    if not is_low(x.dtype):
        return y
    if isinstance(y, Emitted):  # states keep their dtype
        return Emitted(emitted(y.y, x), y.state)
    return jax.tree.map(lambda a: a.astype(x.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, y)


def check_emits(cell: Any, fields: tuple[str, ...]) -> None:
    """Raises if what a cell emits is not one or several different fields of its state."""
    names = emitted_fields(cell) if isinstance(cell.emits, str | tuple) else ()
    if not names or len(set(names)) < len(names) or not set(names) <= set(fields):
        raise ValueError(
            f"emits: expected one of the fields {fields} of the state, or a tuple of different ones, got {cell.emits!r}"
        )


def check_projection(cell: Any, params: Any, width: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises if parameters are not ``w_ih (F, width)``, and the others of the given names and shapes."""
    check_named(cell, params, shapes)
    got = jnp.shape(params["w_ih"]) if "w_ih" in params else None
    if got is None or len(got) != 2 or got[1] != width:
        raise ValueError(
            f"params: expected w_ih (F, {width}) for {cell!r}, got {'none' if got is None else got}; "
            f"make them with {cell!r}.init(key, in_features)"
        )


def check_named(cell: Any, params: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises if parameters are no mapping, lack one of the given names, or have it in another shape."""
    got = (
        {name: jnp.shape(params[name]) for name in shapes if name in params}
        if isinstance(params, Mapping)
        else describe(params)
    )
    if got != shapes:
        raise ValueError(
            f"params: expected {shapes} among the parameters of {cell!r}, got {got}; "
            f"make them with {cell!r}.init(key, in_features)"
        )
