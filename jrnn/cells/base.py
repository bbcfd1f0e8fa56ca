"""The kinds of cell: what one step is, as frozen data with pure functions.

`Layer` is anything `jrnn.unroll` can run over a sequence. `Cell` is a recurrent layer, known by its step. `AffineCell`
is a cell whose step is two matrix products and a function of gates: the library owns the products. A promise a cell
leaves out means "don't know", never "no".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn import initializers
from jrnn._check import batch_axes, describe, non_negative_int, positive_int, same_form
from jrnn._weigh import weigh

__all__ = ["AffineCell", "Cell", "Drawn", "HiddenState", "Layer"]

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
    """Parameters together with what was drawn once for a sequence (see `Layer.draw`).

    >>> Drawn(params={"w": 1.0}, noise={}).params
    {'w': 1.0}
    """

    params: Any
    noise: Any


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
    """Raises where inputs do not fit the weight that consumes them, by feature count or by dtype."""
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
      - ``uses_key``: whether a key changes what the layer does. False makes a key an error.
      - ``event_ndim``: how many trailing axes of an input belong to one step of one sequence (features: 1; an image
        of features: 3, and ``in_features`` is the tuple of the three).

    >>> isinstance(jrnn.lstm(4), jrnn.Layer) and isinstance(jrnn.dense(4), jrnn.Layer)
    True
    """

    uses_key: Any = None
    event_ndim: Any = 1

    def __repr__(self) -> str:
        """The layer as one would write it: fields that differ from their defaults."""
        shown = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

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
          ValueError: where the state does not have the batch axes of ``x``, as for a whole sequence given as one step.

        >>> cell = jrnn.variational(jrnn.gru(4), inputs=0.2, recurrent=0.3)
        >>> params, xs, key = cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)), jax.random.key(1)
        >>> drawn, state = jrnn.draw(cell, params, key, xs[0]), cell.initial_state(params, (2,))
        >>> for t, x in enumerate(xs):
        ...     state, y = cell.step(drawn, state, x, jax.random.fold_in(key, t))
        >>> bool(jnp.allclose(y, jrnn.unroll(cell, params, xs, key=key)[1][-1], atol=1e-6))
        True
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(params, state, x, key=None)")

    def out_features(self, in_features: Any) -> Any:
        """Features of ``y`` for inputs of ``in_features`` features; found by abstract evaluation unless given."""
        params = jax.eval_shape(lambda key: self.init(key, in_features), jax.random.key(0))
        state = jax.eval_shape(lambda p: self.initial_state(p, ()), params)
        floats = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        x = jax.ShapeDtypeStruct(event_shape(in_features), floats[0] if floats else jnp.result_type(float))
        y = jax.eval_shape(lambda p, s, x: self.step(p, s, x), params, state, x)[1]
        return y.shape if isinstance(in_features, tuple) else y.shape[-1]

    def children(self) -> tuple[Layer, ...]:
        """The layers that this layer is made of: the layers among its dataclass fields, and in tuples there, in order.

        >>> jrnn.stack(jrnn.gru(4), jrnn.dense(2)).children()
        (GRU(hidden=4), Dense(features=2))
        """
        if not dataclasses.is_dataclass(self):
            return ()
        return tuple(_layers_in(tuple(getattr(self, f.name) for f in dataclasses.fields(self))))

    @property
    def draws_once(self) -> bool:
        """Whether `draw` may draw something: where a layer defines it, unless the layer is known to use no key."""
        return self.uses_key is not False and type(self).draw is not Layer.draw

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        """Parameters with what is random once per sequence (masks) drawn into them.

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
        """Raises where an input of one or more steps does not fit the parameters."""
        w = params.get("w_ih") if isinstance(params, Mapping) else None
        if w is not None and jnp.ndim(w) == 2:
            check_features(x, w, "xs", self)

    def check_values(self, xs: Any, lengths: Any, mask: Any) -> None:
        """Raises where values that are known already can give no right answer (ids outside a vocabulary)."""

    def walk(self, run: Any, params: Any, xs: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        """Runs the layer over time. ``run(layer, params, xs, state)`` runs a part, ``run.scan`` loops over steps."""
        return run.scan(self, params, xs, state)


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
    """Raises where a state is not one for the batch axes of ``x``, one step's input: the two would broadcast."""
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
    """A recurrent layer, known by its step.

    A cell of your own is a frozen dataclass with ``init``, ``initial_state`` and one of

    - ``step(params, state, x, key=None) -> (state, y)``, or
    - ``project(params, xs)``, the part of the step that does not need the state, and
      ``update(params, state, p, key=None) -> (state, y)``, the rest, where ``p`` is what ``project`` made of one step.
      The library then calls ``project`` once for all T.

    Matrix products belong in ``jrnn.product`` and weights in leaves named ``w_...``, which makes bfloat16 inputs work.

    At steps that are not valid the cell is still called, with zeros for ``x`` and whatever state is held, and what it
    returns is thrown away: its step must have finite values and derivatives there, or gradients turn NaN. (For the
    same reason inputs that are NaN at *valid* steps make the gradients of parameters NaN, resets or not.)

    States may be any pytree. To serialise a program that takes or returns one of your own (`jax.export`), make its type
    known to JAX, by ``jax.export.register_namedtuple_serialization``; those of jrnn's cells are.

    Promises: ``emits = "h"`` says that ``y`` is the field ``h`` of the new state, which zoneout needs. Another field
    can be named, or several, ``emits = ("h", "c")``: then ``y`` is these fields side by side along the features.

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
    return jax.tree.map(lambda a: a.astype(x.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, y)


@dataclass(frozen=True, repr=False)
class AffineCell(Cell):
    """A cell whose step is two matrix products and a function of gates; the library owns the products.

    A subclass names its gates in ``gate_names`` and gives ``gates(theta, u, v, state) -> state``. ``u`` and ``v`` are
    tuples with one ``(*B, H)`` array per gate::

        u = x W_ih + b    for all T in one product        v = h W_hh    once a step        y = the new h

    ``y`` is another field of the new state, or several side by side, where ``emits`` names them: for example
    ``emits = "c"`` or ``emits = ("h", "c")`` in a subclass of an LSTM.

    ``theta`` holds the other parameters (vectors), which ``init_theta`` makes. States are ``state_type``, by default
    ``HiddenState(h)``, every field ``(*B, H)`` and zero at first.

    Promises: ``elementwise`` says that unit j of each new field depends on unit j of u, v and state alone, whatever the
    shapes of these are; ``additive`` says that ``gates`` uses only ``u + v``: of all gates (True), or of those named in
    a tuple.

    Args:
      hidden: H, the number of units.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih (F, G*H)``, ``w_hh (H, G*H)`` and ``b (G*H,)``,
        drawn gate by gate (see `jrnn.initializers`).

    >>> class Leaky(jrnn.AffineCell):
    ...     gate_names = ("z", "n")
    ...     def gates(self, theta, u, v, state):
    ...         z, n = jax.nn.sigmoid(u[0] + v[0]), jnp.tanh(u[1] + v[1])
    ...         return state._replace(h=z * state.h + (1 - z) * n)
    >>> cell = Leaky(8)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> state, ys = jrnn.unroll(cell, params, jnp.ones((5, 2, 3)))
    >>> ys.shape, jrnn.choose_backend(cell, params, jnp.ones((5, 2, 3)))[0]
    ((5, 2, 8), 'hoisted')
    """

    hidden: int
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    recurrent_init: initializers.Initializer = field(default="orthogonal", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    gate_names: ClassVar[tuple[str, ...]] = ("h",)
    state_type: ClassVar[Any] = HiddenState
    elementwise: ClassVar[bool | None] = None
    additive: ClassVar[bool | tuple[str, ...] | None] = None
    emits = "h"
    uses_key = False

    def __post_init__(self) -> None:
        positive_int(self.hidden, "hidden")
        if self.is_affine:
            check_emits(self, self.state_type._fields)
        for name in ("input_init", "recurrent_init", "bias_init"):
            initializers.resolve(getattr(self, name), name)

    # What a subclass gives.

    def gates(self, theta: dict[str, jax.Array], u: Any, v: Any, state: Any) -> Any:
        """The new state from the gates' input parts ``u``, recurrent parts ``v`` and the old state."""
        raise NotImplementedError(f"{type(self).__name__} must define gates(theta, u, v, state) -> state")

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        """Parameters besides ``w_ih``, ``w_hh`` and ``b``; none by default."""
        return {}

    def init_bias(self, key: jax.Array) -> jax.Array:
        """``b (G*H,)``, drawn gate by gate."""
        return self._per_gate(self.bias_init, key, (self.hidden,))

    # What follows from it.

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        """``{"w_ih": (F, G*H), "w_hh": (H, G*H), "b": (G*H,), **theta}`` in float32.

        Without input features (F = 0) the network is autonomous: its inputs, ``(T, *B, 0)``, say how many steps to run.
        """
        non_negative_int(in_features, "in_features")
        k_ih, k_hh, k_b, k_theta = jax.random.split(key, 4)
        return {
            "w_ih": self._per_gate(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": self._per_gate(self.recurrent_init, k_hh, (self.hidden, self.hidden)),
            "b": self.init_bias(k_b),
            **self.init_theta(k_theta),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        """Zeros, ``(*B, H)`` for each field of the state, in the parameters' dtype but at least float32."""
        shape, dtype = (*batch_axes(batch_shape), self.hidden), stable(params["w_hh"].dtype)
        # Arrays of their own: a state may be donated, and a buffer only once.
        return self.state_type(*(jnp.zeros(shape, dtype) for _ in self.state_type._fields))

    def out_features(self, in_features: Any) -> int:
        return self.hidden * len(emitted_fields(self)) if self.is_affine else super().out_features(in_features)

    def check(self, params: Any, x: Any) -> None:
        check_affine(self, params, (self.hidden, len(self.gate_names) * self.hidden))
        check_named(self, params, theta_shapes(self))
        check_features(x, params["w_ih"], "xs", self)

    def theta(self, params: Any) -> dict[str, jax.Array]:
        """The parameters that are not the library's two products."""
        return {name: value for name, value in params.items() if name not in ("w_ih", "w_hh", "b")}

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        """``u = x W_ih + b``, one array a gate, for one step or for all T in one product."""
        w, b = self._input_weights(params)
        u = product(xs, w)
        return self.split(u + vector(b, u))

    def recur(self, params: Any, h: jax.Array) -> tuple[jax.Array, ...]:
        """``v = h W_hh``, one array a gate."""
        return self.split(product(h, self.recurrent_weights(params)))

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        state = self.gates(self.theta(params), p, self.recur(params, state.h), state)
        return state, output(self, state)

    # What a fast schedule asks, of this cell or of a wrapper round it.

    @property
    def is_affine(self) -> bool:
        """Whether the step is the library's two products and ``gates``, nothing overridden."""
        own = type(self)
        return (own.step, own.update, own.recur) == (Cell.step, AffineCell.update, AffineCell.recur)

    @property
    def sums(self) -> tuple[bool, ...]:
        """For each gate, whether it is promised to use only ``u + v``."""
        if isinstance(self.additive, tuple):
            return tuple(name in self.additive for name in self.gate_names)
        return (self.additive is True,) * len(self.gate_names)

    def input_weights(self, params: Any) -> tuple[jax.Array, jax.Array] | None:
        """``(W_ih, b)`` of the projection of what is `entering`, None where the cell makes a projection of its own."""
        return self._input_weights(params) if type(self).project is AffineCell.project else None

    def _input_weights(self, params: Any) -> tuple[jax.Array, jax.Array]:
        return params["w_ih"], params["b"]

    def recurrent_weights(self, params: Any) -> jax.Array:
        """``W_hh (H, G*H)``, as the loop multiplies by it: a function of the parameters, made once for a sequence."""
        return params["w_hh"]

    def entering(self, params: Any, xs: jax.Array) -> jax.Array:
        """``xs`` as they go into the input product, which wrappers mask."""
        return xs

    @property
    def draws_at_steps(self) -> bool:
        """Whether `combine` may draw something from its key: what is drawn once a sequence is in the parameters."""
        return type(self).combine is not AffineCell.combine

    def recurrent_mask(self, params: Any) -> jax.Array | None:
        """What ``h`` is multiplied by on its way into the recurrent product, None for nothing."""
        return None

    def combine(self, theta: Any, u: Any, v: Any, state: Any, key: jax.Array | None) -> Any:
        """The new state: ``gates``, and what wrappers make of it."""
        return self.gates(theta, u, v, state)

    def split(self, z: jax.Array) -> tuple[jax.Array, ...]:
        """``(..., G*H)`` as one ``(..., H)`` array per gate."""
        return tuple(jnp.split(z, len(self.gate_names), axis=-1))

    def _per_gate(self, init: initializers.Initializer, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        keys = jax.random.split(key, len(self.gate_names))
        return jnp.concatenate([initializers.draw(init, k, shape) for k in keys], axis=-1)


def check_emits(cell: Any, fields: tuple[str, ...]) -> None:
    """Raises where what a cell emits is not one or several different fields of its state."""
    names = emitted_fields(cell) if isinstance(cell.emits, str | tuple) else ()
    if not names or len(set(names)) < len(names) or not set(names) <= set(fields):
        raise ValueError(
            f"emits: expected one of the fields {fields} of the state, or a tuple of different ones, got {cell.emits!r}"
        )


def check_projection(cell: Any, params: Any, width: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises where parameters are not ``w_ih (F, width)``, and the others of the given names and shapes."""
    check_named(cell, params, shapes)
    got = jnp.shape(params["w_ih"]) if "w_ih" in params else None
    if got is None or len(got) != 2 or got[1] != width:
        raise ValueError(
            f"params: expected w_ih (F, {width}) for {cell!r}, got {'none' if got is None else got}; "
            f"make them with {cell!r}.init(key, in_features)"
        )


def check_named(cell: Any, params: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises where parameters are no mapping, lack one of the given names, or have it in another shape."""
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


@functools.lru_cache(maxsize=256)
def theta_shapes(cell: Any) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in jax.eval_shape(cell.init_theta, jax.random.key(0)).items()}


def check_affine(cell: Any, params: Any, recurrent_shape: tuple[int, ...]) -> None:
    """Raises where parameters are not those of a cell with ``w_ih``, ``w_hh`` of the given shape, and ``b``."""
    remedy = f"make them with {cell!r}.init(key, in_features)"
    if not isinstance(params, Mapping):
        raise ValueError(f"params: expected a dict with w_ih, w_hh and b, got {describe(params)}; {remedy}")
    missing = {"w_ih", "w_hh", "b"} - set(params)
    if missing:
        raise ValueError(f"params: expected a dict with w_ih, w_hh and b, got one without {sorted(missing)}; {remedy}")
    shapes = {name: jnp.shape(params[name]) for name in ("w_ih", "w_hh", "b")}
    width = recurrent_shape[-1]
    if (
        shapes["w_hh"] != recurrent_shape
        or len(shapes["w_ih"]) != 2
        or shapes["w_ih"][1] != width
        or shapes["b"] != (width,)
    ):
        raise ValueError(
            f"params: expected w_ih (F, {width}), w_hh {recurrent_shape} and b ({width},) for {cell!r}, "
            f"got {shapes}; {remedy}"
        )
