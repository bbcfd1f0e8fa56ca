"""Cells around a cell: zoneout, variational dropout, DropConnect, and a learnable initial state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._core.checks import describe, rate
from jrnn._core.devices import placed_as
from jrnn.cells.affine import AffineCell
from jrnn.cells.base import (
    Cell,
    Drawn,
    Layer,
    check_state,
    compute_params,
    draw_in_step,
    emitted,
    emitted_fields,
    event_shape,
    features_of,
    output,
    stable,
    vector,
)
from jrnn.cells.form import AffineForm
from jrnn.compose.combine import fold
from jrnn.compose.timewise import drop

__all__ = ["Wrapper", "dropconnect", "learned_state", "variational", "zoneout"]


def undrawn(params: Any) -> Any:
    """Parameters without what was drawn beside them."""
    return params.params if isinstance(params, Drawn) else params


def require_drawn(cell: Any, params: Any, key: Any) -> None:
    """Raises if a part of a step is run with a key, on parameters into which nothing was drawn."""
    if key is not None and not isinstance(params, Drawn):
        raise TypeError(
            f"params: expected what the draw of {cell!r} returns, since update was given a key, got parameters into "
            "which nothing was drawn; the layer that calls update must define draw (see jrnn.Layer.draw)"
        )


class Wrapper(Cell):
    """A cell around a cell, which shares its parameters and state unless a subclass says otherwise.

    A wrapper of your own is a frozen dataclass with a field ``cell``. It overrides the methods in which it differs from
    the cell. If it declares ``emits``, its outputs are these fields of the state. If it overrides ``project`` or
    ``update``, it may also override `map_form`, so that the fast schedules run it; otherwise nothing is assumed of its
    step.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Memory(jrnn.Wrapper):
    ...     cell: jrnn.Cell
    ...     emits = "c"
    >>> cell = Memory(jrnn.lstm(4))
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
    >>> bool((ys[-1] == state.c).all())
    True

    >>> jrnn.zoneout(jrnn.lstm(4), h=0.1).cell
    lstm(4)
    """

    cell: Any

    def __post_init__(self) -> None:
        if not isinstance(self.cell, Cell):
            raise TypeError(
                f"cell: expected a cell for {type(self).__name__.lower()}, got {self.cell!r}; wrap the cells inside a "
                "stack or a bidirectional layer one by one"
            )

    @property
    def uses_key(self) -> Any:
        return self.cell.uses_key

    @property
    def event_ndim(self) -> Any:
        return self.cell.event_ndim

    @property
    def emits(self) -> Any:
        return self.cell.emits

    @property
    def hoistable(self) -> bool:
        return self.cell.hoistable

    def init(self, key: jax.Array, in_features: Any) -> Any:
        return self.cell.init(key, in_features)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        return self.cell.initial_state(self.inner(params), batch_shape)

    def out_features(self, in_features: Any) -> int:
        return self.cell.out_features(in_features) if self._emits_as_cell else Layer.out_features(self, in_features)

    def check(self, params: Any, x: Any) -> None:
        self.cell.check(self.inner(params), x)

    def inner(self, params: Any) -> Any:
        """The wrapped cell's parameters."""
        return params

    @property
    def draws_once(self) -> bool:
        return self.cell.draws_once

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        return self.cell.draw(params, key, batch_shape, in_features)

    def project(self, params: Any, xs: jax.Array) -> Any:
        return self.cell.project(self.inner(params), xs)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        state, y = self.cell.update(self.inner(params), state, p, key)
        return state, y if self._emits_as_cell else output(self, state)

    def form(self, params: Any) -> Any:
        """The form of the wrapped cell, mapped; None where the step is overridden and `map_form` is not."""
        own = next(kind for kind in type(self).__mro__ if not _MAKES_STEP.isdisjoint(vars(kind)))
        form = self.cell.form(self.inner(params)) if "map_form" in vars(own) else None
        if not isinstance(form, AffineForm):  # wrappers map no other form
            return None
        return self.map_form(form if self._emits_as_cell else replace(form, emits=emitted_fields(self)), params)

    def map_form(self, form: AffineForm, params: Any) -> AffineForm | None:
        """The form of the step, from the form of the wrapped cell (see `jrnn.cells.form`); None if it is not known.

        >>> @dataclasses.dataclass(frozen=True)
        ... class Clipped(jrnn.Wrapper):
        ...     cell: jrnn.Cell
        ...     def update(self, params, state, p, key=None):
        ...         state, y = super().update(params, state, p, key)
        ...         return state._replace(h=state.h.clip(-0.5, 0.5)), y.clip(-0.5, 0.5)
        ...     def map_form(self, form, params):
        ...         gates = dataclasses.replace(form.gates, combine=ClippedGates(form.gates.combine))
        ...         return dataclasses.replace(form, gates=gates)
        >>> @dataclasses.dataclass(frozen=True)
        ... class ClippedGates:
        ...     combine: Any
        ...     def __call__(self, theta, u, v, state, key):
        ...         state = self.combine(theta, u, v, state, key)
        ...         return state._replace(h=state.h.clip(-0.5, 0.5))
        >>> cell = Clipped(jrnn.gru(4))
        >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((5, 3))
        >>> jrnn.choose_backend(cell, params, xs)[0]
        'hoisted'
        """
        return form

    @property
    def _emits_as_cell(self) -> bool:
        return self.emits is None or self.emits == self.cell.emits

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        # Not Cell.step: a wrapped cell that defines only its step has no projection, and needs none.
        x = jnp.asarray(x)
        self.check(params, x)
        check_state(self, params, state, x)
        params = compute_params(params, x.dtype)
        if key is not None and self.draws_once and not isinstance(params, Drawn):
            batch_shape = x.shape[: x.ndim - self.event_ndim]
            params = draw_in_step(self, params, key, batch_shape, features_of(self, x.shape))
        state, y = self.update(params, state, self.project(params, x), key)
        return state, emitted(y, x)


# Of the classes that a wrapper inherits from, the first to define one of these must define the last.
_MAKES_STEP = frozenset(("step", "project", "update", "map_form"))


@dataclass(frozen=True, repr=False)
class Zoneout(Wrapper):
    """See `zoneout`."""

    cell: Cell
    rates: tuple[tuple[str, float], ...]

    _constructor = "zoneout"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.rates:
            rate(value, name)
        if self.cell.emits is None:
            raise TypeError(
                f'cell: expected a cell that promises emits = "h" (its output is the h of its new state, or whichever '
                f"fields it names), got {self.cell!r}; set that class attribute if it is true of the cell"
            )

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.cell,), {name: value for name, value in self.rates if value}

    @property
    def uses_key(self) -> Any:
        return True

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        state = super().initial_state(params, batch_shape)
        unknown = [name for name, value in self.rates if value and name not in state._fields]
        if unknown:
            raise ValueError(
                f"{unknown[0]}: expected 0, since the state of {self.cell!r} has the fields {state._fields}, got "
                f"{dict(self.rates)[unknown[0]]}"
            )
        return state

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        new, _ = self.cell.update(params, state, p, None if self.cell.uses_key is False else fold(key, 0))
        new = zone(self.rates, new, state, key)
        return new, output(self, new)

    def map_form(self, form: AffineForm, params: Any) -> AffineForm:
        gates = form.gates
        return replace(form, gates=replace(gates, combine=_Zoned(gates.combine, self.rates), draws=True))


@dataclass(frozen=True)
class _Zoned:
    """Gates whose new state is zoned."""

    combine: Any
    rates: tuple[tuple[str, float], ...]

    def __call__(self, theta: Any, u: Any, v: Any, state: Any, key: jax.Array | None) -> Any:
        return zone(self.rates, self.combine(theta, u, v, state, fold(key, 0)), state, key)


def zone(rates: tuple[tuple[str, float], ...], new: Any, old: Any, key: jax.Array | None) -> Any:
    """The new state, of which units keep the old one, at random with a key and on average without."""
    fields = {}
    for i, (name, share) in enumerate(rates):
        if not share:
            continue
        was, now = getattr(old, name), getattr(new, name)
        if key is None:
            fields[name] = share * was + (1 - share) * now
        else:
            kept = placed_as(jax.random.bernoulli(jax.random.fold_in(key, i + 1), share, now.shape), now)
            fields[name] = jnp.where(kept, was, now)
    return new._replace(**fields)


def zoneout(cell: Cell, *, h: float = 0.0, c: float = 0.0) -> Zoneout:
    """Zoneout (Krueger et al. 2017): units of the state keep their previous value at random.

    With a key, each unit of a field keeps its old value with the probability ``rate``, drawn anew at every step.
    Without a key, the new state is the mean of this, ``rate * old + (1 - rate) * new``.

    Args:
      cell: a cell whose output is one or several fields of its state, which it declares as ``emits`` (see `Cell`).
      h: the rate for the hidden state.
      c: the rate for the memory of an LSTM; for cells without a memory it must be 0.

    Parameters and states are the cell's.

    >>> cell = jrnn.zoneout(jrnn.lstm(4), h=0.05, c=0.5)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> jrnn.unroll(cell, params, jnp.ones((5, 3)), key=jax.random.key(1))[1].shape
    (5, 4)
    """
    zoned = Zoneout(cell, (("h", h), ("c", c)))
    if c and isinstance(cell, AffineCell) and "c" not in cell.state_type._fields:
        raise ValueError(
            f"c: expected 0, since the state of {cell!r} has the fields {cell.state_type._fields}, got {c}"
        )
    return zoned


@dataclass(frozen=True, repr=False)
class Variational(Wrapper):
    """See `variational`."""

    cell: Cell
    inputs: float
    recurrent: float

    _constructor = "variational"

    def __post_init__(self) -> None:
        super().__post_init__()
        rate(self.inputs, "inputs")
        rate(self.recurrent, "recurrent")
        if self.recurrent and not (isinstance(self.cell, AffineCell) and self.cell.is_affine):
            raise TypeError(
                f"cell: expected an AffineCell (lstm, gru, elman, ...) for recurrent dropout, whose recurrent product "
                f"the library owns, got {self.cell!r}; wrap the cell itself and put other wrappers outside"
            )

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rates = {"inputs": self.inputs, "recurrent": self.recurrent}
        return (self.cell,), {name: value for name, value in rates.items() if value}

    @property
    def uses_key(self) -> Any:
        return True

    def inner(self, params: Any) -> Any:
        return undrawn(params)

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        k_inputs, k_recurrent, k_cell = (jax.random.fold_in(key, i) for i in range(3))
        noise = {}
        if self.inputs:
            *space, features = event_shape(in_features)  # a feature is dropped at all places of space, or at none
            ones = jnp.ones((*batch_shape, *(1 for _ in space), features))
            noise["inputs"] = drop(k_inputs, self.inputs, ones)
        if self.recurrent:
            cell: Any = self.cell
            w_hh = jax.eval_shape(cell.recurrent_weights, params)
            ones = jnp.ones((*batch_shape, w_hh.shape[0]), stable(w_hh.dtype))
            noise["recurrent"] = drop(k_recurrent, self.recurrent, ones)
        return Drawn(self.cell.draw(params, k_cell, batch_shape, in_features), noise)

    def _mask(self, params: Any, name: str) -> Any:
        return params.noise.get(name) if isinstance(params, Drawn) else None

    def project(self, params: Any, xs: jax.Array) -> Any:
        mask = self._mask(params, "inputs")
        return super().project(params, xs if mask is None else xs * vector(mask, xs))

    @property
    def draws_once(self) -> bool:
        return True

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        require_drawn(self, params, key)
        # Only what goes through the recurrent weights is dropped: the state itself is carried whole.
        mask = self._mask(params, "recurrent")
        if mask is None:
            return super().update(params, state, p, None if self.cell.uses_key is False else key)
        cell: Any = self.cell
        form, v = cell.form(self.inner(params)), cell.recur(self.inner(params), state.h * mask)
        state = form.gates.combine(form.theta, p, v, state, key)
        return state, output(self, state)

    def map_form(self, form: AffineForm, params: Any) -> AffineForm:
        return form.masked(self._mask(params, "inputs"), self._mask(params, "recurrent"))


def variational(cell: Cell, *, inputs: float = 0.0, recurrent: float = 0.0) -> Variational:
    """Dropout with one mask for a whole sequence (Gal and Ghahramani 2016), on inputs and on the recurrent product.

    With a key, each feature of a sequence's inputs is dropped at all steps or at none, and so is each unit of ``h``
    on its way through ``w_hh``; the carried state stays whole. The masks depend on the key alone, so that a chunked
    run under one key keeps them. Without a key nothing is dropped.

    Args:
      cell: any cell; for ``recurrent`` an `AffineCell`.
      inputs: rate for the inputs.
      recurrent: rate for the recurrent product.

    Parameters and states are the cell's.

    >>> cell = jrnn.variational(jrnn.gru(4), inputs=0.2, recurrent=0.3)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> jrnn.unroll(cell, params, jnp.ones((5, 3)), key=jax.random.key(1))[1].shape
    (5, 4)
    """
    return Variational(cell, inputs, recurrent)


@dataclass(frozen=True, repr=False)
class DropConnect(Wrapper):
    """See `dropconnect`."""

    cell: Cell
    rate: float

    _constructor = "dropconnect"

    def __post_init__(self) -> None:
        super().__post_init__()
        rate(self.rate, "rate")

    @property
    def uses_key(self) -> Any:
        return True

    def inner(self, params: Any) -> Any:
        return undrawn(params)

    def init(self, key: jax.Array, in_features: Any) -> Any:
        params = super().init(key, in_features)
        self._require_weights(params)
        return params

    def check(self, params: Any, x: Any) -> None:
        self._require_weights(self.inner(params))
        super().check(params, x)

    def _require_weights(self, params: Any) -> None:
        params = undrawn(params)
        if not isinstance(params, Mapping) or "w_hh" not in params:
            raise ValueError(
                f"cell: expected a cell with recurrent weights w_hh among its parameters, got {self.cell!r}; wrap the "
                "cell itself in dropconnect, and put other wrappers outside"
            )

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        k_weights, k_cell = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        dropped = {**params, "w_hh": drop(k_weights, self.rate, params["w_hh"])}
        return Drawn(self.cell.draw(dropped, k_cell, batch_shape, in_features), {})

    @property
    def draws_once(self) -> bool:
        return True

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        require_drawn(self, params, key)
        return super().update(params, state, p, None if self.cell.uses_key is False else key)

    def map_form(self, form: AffineForm, params: Any) -> AffineForm:
        return form  # the weights are dropped in the parameters


def dropconnect(cell: Cell, rate: float) -> DropConnect:
    """DropConnect on the recurrent weights (Wan et al. 2013; Merity, Keskar and Socher 2018).

    With a key, each weight of ``w_hh`` is zero with probability ``rate`` for a whole sequence and all of its batch,
    and divided by ``1 - rate`` otherwise. Without a key nothing is dropped.

    Args:
      cell: a cell with recurrent weights ``w_hh``.
      rate: probability of dropping a weight.

    Parameters and states are the cell's.

    >>> cell = jrnn.dropconnect(jrnn.lstm(4), 0.5)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> jrnn.unroll(cell, params, jnp.ones((5, 3)), key=jax.random.key(1))[1].shape
    (5, 4)
    """
    return DropConnect(cell, rate)


@dataclass(frozen=True, repr=False)
class LearnedState(Wrapper):
    """See `learned_state`."""

    cell: Cell

    _constructor = "learned_state"

    def init(self, key: jax.Array, in_features: Any) -> dict[str, Any]:
        params = self.cell.init(key, in_features)
        state = self.cell.initial_state(params, ())
        if not hasattr(state, "_asdict"):
            raise TypeError(
                f"cell: expected a cell whose state is a NamedTuple of arrays, got {self.cell!r} with a state of type "
                f"{type(state).__name__}; let its initial_state return a NamedTuple"
            )
        return {"cell": params, "initial": state._asdict()}

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        state = self.cell.initial_state(self.inner(params), batch_shape)
        # Copied, so that donating a state never gives a parameter away.
        learned = {
            name: jnp.copy(jnp.broadcast_to(value.astype(getattr(state, name).dtype), getattr(state, name).shape))
            for name, value in undrawn(params)["initial"].items()
        }
        return type(state)(**learned)

    def check(self, params: Any, x: Any) -> None:
        own = undrawn(params)
        if not isinstance(own, Mapping) or set(own) != {"cell", "initial"}:
            raise ValueError(
                'params: expected a dict with "cell" and "initial" for a cell with a learned state, got '
                f"{describe(own)}; make them with {self!r}.init(key, in_features)"
            )
        super().check(params, x)

    def inner(self, params: Any) -> Any:
        return undrawn(params)["cell"]

    def draw(self, params: Any, key: jax.Array, batch_shape: tuple[int, ...], in_features: Any) -> Any:
        return Drawn({**params, "cell": self.cell.draw(params["cell"], key, batch_shape, in_features)}, {})


def learned_state(cell: Cell) -> LearnedState:
    """A cell whose initial state is a parameter, the same for every sequence of a batch.

    `init` sets it to the initial state of the wrapped cell. A run without ``state`` starts from it, and a reset
    restores it. It gets gradients from both.

    Args:
      cell: a cell whose state is a NamedTuple of arrays.

    Parameters: ``{"cell": …, "initial": {field: (H,)}}``; the state is the cell's.

    >>> cell = jrnn.learned_state(jrnn.lstm(4))
    >>> params = cell.init(jax.random.key(0), 3)
    >>> params["initial"]["c"].shape, cell.initial_state(params, (2,)).c.shape
    ((4,), (2, 4))
    """
    return LearnedState(cell)
