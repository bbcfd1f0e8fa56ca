"""Modules for Flax's linen: `RNN`, `Bidirectional`, `ScannedRNN` and `Recurrent`.

Where ``flax.linen.RNN`` is used, only the import changes::

    import jrnn.flax.linen as rnn

    lstm = rnn.RNN(nn.OptimizedLSTMCell(128))          # in the place of nn.RNN
    variables = lstm.init(jax.random.key(0), inputs)   # the same tree and values as Flax's
    outputs = lstm.apply(variables, inputs)            # the same numbers, faster
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import lift
from flax.core.scope import in_filter, intersect_filters, is_filter_empty
from flax.linen import transforms

from jrnn._core.checks import describe, same_form
from jrnn.flax import _loop, _model
from jrnn.schedules.steps import select

__all__ = ["RNN", "Bidirectional", "Recurrent", "ScannedRNN"]


# --- Flax's RNN --------------------------------------------------------------------------------------------------


class RNN(nn.RNN):
    """``flax.linen.RNN`` on `jrnn.scan`: the same module, faster.

    Constructor, call, parameter tree, initial values, carries and the order of outputs are those of
    ``flax.linen.RNN``, of which this is a subclass, for any cell: variables of one are variables of the other. Where
    the cell's step is read as that of a recurrent cell (all of Flax's cells but ``ConvLSTMCell``, and many of one's
    own, see `jrnn.scan`), the products with the inputs are taken out of the loop over time, and the loop runs as
    compiled code where that pays.

    Flax's own ``nn.scan`` runs the loop where the cell does more than that: where it initialises or changes
    variables, reads variables that are scanned over (``variable_axes``) or carried (``variable_carry``), or is given
    PRNG keys (``split_rngs``), as for dropout.

    With ``seq_lengths`` some results differ from Flax's, since those are wrong or depend on the padding: outputs are
    zero at padded steps, a sequence of length 0 keeps its initial carry, any number of batch axes is right, and the
    values in the padding, NaN included, change no result and no gradient.

    Args:
      cell: a ``flax.linen.RNNCellBase``, or any module called ``(carry, x) -> (carry, y)`` with
        ``initialize_carry(key, input_shape)`` and ``num_feature_axes``.
      time_major: whether the inputs are ``(T, *B, *features)``, and not ``(*B, T, *features)``.
      return_carry: whether to return ``(carry, outputs)``, and not the outputs alone.
      reverse: run from the last step to the first.
      keep_order: with ``reverse``, leave the outputs in the order of the inputs.
      unroll: how many steps to compile into one body, where the loop is a scan.
      variable_axes, variable_broadcast, variable_carry, split_rngs: as for ``flax.linen.scan``.

    >>> import flax.linen as nn
    >>> import jrnn.flax.linen
    >>> x = jnp.ones((10, 50, 32))                                       # (B, T, F)
    >>> rnn = jrnn.flax.linen.RNN(nn.LSTMCell(64))
    >>> variables = rnn.init(jax.random.key(0), x)
    >>> rnn.apply(variables, x, seq_lengths=jnp.full(10, 20)).shape
    (10, 50, 64)
    >>> bool(jnp.allclose(rnn.apply(variables, x), nn.RNN(nn.LSTMCell(64)).apply(variables, x), atol=1e-5))
    True
    """

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: Any | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Runs the cell over the inputs.

        Args:
          inputs: ``(*B, T, *features)``, or ``(T, *B, *features)`` with ``time_major``; there are as many feature axes
            as the ``num_feature_axes`` of the cell, and any number of batch axes.
          initial_carry: where to start; None for the cell's ``initialize_carry(init_key, input_shape)``.
          init_key: a PRNG key, by default ``jax.random.key(0)``.
          seq_lengths: ``(*B,)`` integers in [0, T]: how many of each sequence's first steps are no padding.
          return_carry, time_major, reverse, keep_order: None for what the constructor was given.

        Returns:
          Outputs, of which each array has its time axis where the inputs have it, or ``(carry, outputs)`` with
          ``return_carry``. With ``reverse`` the outputs are in reverse order, padding at the end, unless
          ``keep_order``.

        Raises:
          ValueError, TypeError: if ``seq_lengths`` are no integers, or have another shape or values outside of
            [0, T].
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order

        inputs = jnp.asarray(inputs)
        feature_axes = self.cell.num_feature_axes
        time_axis = _loop.time_axis(inputs, feature_axes, time_major)
        carry = initial_carry
        if carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            shape = inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :]
            carry = self.cell.initialize_carry(key, shape)

        xs, lengths, valid = _loop.with_padding(jnp.moveaxis(inputs, time_axis, 0), seq_lengths, feature_axes)
        if lengths is not None and return_carry:
            _loop.check_carry(carry, lengths.shape)
        scan = transforms.lift_transform(
            _lifted_scan,
            _step,
            variable_axes=self.variable_axes,
            variable_broadcast=self.variable_broadcast,
            variable_carry=self.variable_carry,
            split_rngs=self.split_rngs,
            unroll=self.unroll,
            reverse=reverse,
            keep_order=keep_order,
            lengths=lengths,
        )
        carry, ys = scan(self.cell, carry, xs, valid)
        outputs = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), ys)
        return (carry, outputs) if return_carry else outputs


class Bidirectional(nn.Bidirectional):
    """``flax.linen.Bidirectional``: runs over the inputs in both directions and merges the outputs.

    The same module as Flax's, of which this is a subclass. It runs the two RNNs that it is given: with `RNN` of this
    module it is faster, and right where the sequences are ragged.

    Args:
      forward_rnn, backward_rnn: two `RNN` modules.
      merge_fn: ``(forward, backward) -> merged`` of their outputs; by default these are concatenated.
      time_major, return_carry: as of `RNN`; the carry is a pair.

    >>> import flax.linen as nn
    >>> from jrnn.flax.linen import RNN, Bidirectional
    >>> layer = Bidirectional(RNN(nn.GRUCell(4)), RNN(nn.GRUCell(4)))
    >>> outputs, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))
    >>> outputs.shape, sorted(variables["params"])
    ((2, 5, 8), ['backward_rnn', 'forward_rnn'])
    """


def _step(cell: Any, carry: Any, inputs: Any) -> tuple[Any, Any]:
    x, valid = inputs
    new, y = cell(carry, x)
    return (new, y) if valid is None else (_loop.held(valid, new, carry), _loop.zero_padding(valid, y))


def _lifted_scan(
    fn: Callable[..., Any],
    *,
    variable_axes: Mapping[Any, Any],
    variable_broadcast: Any,
    variable_carry: Any,
    split_rngs: Mapping[Any, bool],
    unroll: int,
    reverse: bool = False,
    keep_order: bool = True,
    lengths: jax.Array | None = None,
) -> Callable[..., Any]:
    """A lifted scan ``(scopes, carry, xs, valid) -> (carry, ys)`` of ``fn(scopes, carry, (x, valid))``.

    By `jrnn.scan` where the function reads broadcast variables and nothing else of its scopes; otherwise by Flax's
    scan.
    """

    def inner(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, carry: Any, xs: Any, valid: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            scopes = scope_fn(variables, rngs)
            out = fn(scopes, carry, (x, None))
            repack_fn(scopes)  # which closes the scopes; they have no variables that could have changed
            return out

        return _loop.run(step, carry, xs, valid, reverse, unroll), ()

    pure = lift.pack(inner, (variable_broadcast,), (), (), name="scan")
    general = lift.scan(
        fn,
        variable_axes=variable_axes,
        variable_broadcast=variable_broadcast,
        variable_carry=variable_carry,
        split_rngs=split_rngs,
        unroll=unroll,
    )
    lifted = (variable_broadcast, variable_carry, *variable_axes)

    def run(scopes: Any, carry: Any, xs: Any, valid: Any) -> Any:
        if all(_only_reads(scope, lifted, variable_broadcast, split_rngs) for scope in jax.tree.leaves(scopes)):
            carry, ys = pure(scopes, carry, xs, valid)
            return carry, _loop.flipped(ys, lengths) if reverse and not keep_order else ys
        # Keys and scanned variables belong to steps in the order in which they run.
        carry, ys = general(scopes, carry, (_loop.flipped(xs, lengths) if reverse else xs, valid))
        return carry, _loop.flipped(ys, lengths) if reverse and keep_order else ys

    return run


def _only_reads(scope: Any, lifted: Any, broadcast: Any, split_rngs: Any) -> bool:
    """Whether all that the body of a lifted scan finds in a scope are broadcast variables that it can't change."""
    if any(in_filter(names, name) for names in split_rngs for name in scope.rngs):
        return False
    if not all(is_filter_empty(intersect_filters(scope.mutable, names)) for names in lifted):
        return False
    others = [name for name in scope.variables() if not in_filter(broadcast, name)]
    return not any(in_filter(names, name) for names in lifted for name in others)


# --- the recurrent module of reinforcement learning --------------------------------------------------------------


class _InitializeCarry:
    """``ScannedRNN.initialize_carry``, of the class and of an instance."""

    nowrap = True  # Flax wraps what it finds in a module's class, to call it in the module's scope

    def __get__(self, module: Any, owner: Any) -> Callable[..., Any]:
        return functools.partial(_initialize_carry, None if module is None else module.cell)


def _initialize_carry(cell: Any, batch_size: Any, hidden_size: Any = None) -> Any:
    """The carry of a ``cell``, or of a ``GRUCell`` where it is None, as an environment begins."""
    batch_shape = tuple(batch_size) if isinstance(batch_size, tuple | list) else (batch_size,)
    if cell is None:
        if hidden_size is None:
            raise TypeError(
                "hidden_size: expected the number of units, since the class knows no cell; give it, as in "
                "ScannedRNN.initialize_carry(batch_size, hidden_size), or call it on a module: "
                "ScannedRNN(cell).initialize_carry(batch_size)"
            )
        cell = nn.GRUCell(hidden_size, parent=None)
    units = getattr(cell, "features", 1) if hidden_size is None else hidden_size
    features = tuple(units) if isinstance(units, tuple | list) else (units,)
    return cell.initialize_carry(jax.random.key(0), (*batch_shape, *features))


class ScannedRNN(nn.Module):
    """The recurrent module that code bases of reinforcement learning carry a copy of, on `jrnn.scan`.

    It takes the place of the class that wraps a cell in ``nn.scan`` and replaces the carry where an episode begins
    (purejaxrl, JaxMARL, Mava, Stoix). The call and the parameter tree are the same, ``ScannedRNN_0/GRUCell_0/...``
    for a ``GRUCell``, and so are initial values from the same seed: checkpoints load. Resets run inside the fast loop.

    Args:
      cell: any Flax cell, such as ``nn.GRUCell(features=128)``. Its parameters belong to this module, whoever else
        holds the cell. Inside of another module's compact method, give it ``parent=None``, or it takes a name there.

    >>> import flax.linen as nn
    >>> from jrnn.flax.linen import ScannedRNN
    >>> rnn = ScannedRNN(nn.GRUCell(features=8))
    >>> inputs, resets = jnp.ones((16, 4, 3)), jnp.zeros((16, 4), bool)
    >>> carry = rnn.initialize_carry(4)
    >>> variables = rnn.init(jax.random.key(0), carry, (inputs, resets))
    >>> carry, ys = rnn.apply(variables, carry, (inputs, resets))
    >>> carry.shape, ys.shape, list(variables["params"])
    ((4, 8), (16, 4, 8), ['GRUCell_0'])
    """

    cell: Any

    initialize_carry = _InitializeCarry()
    """``initialize_carry(batch_size, hidden_size=None)``: the carry of so many environments, a number or a tuple.

    Called on the class, ``ScannedRNN.initialize_carry(batch_size, hidden_size)``, it is that of a ``GRUCell``.
    """

    @nn.compact
    def __call__(self, carry: Any, x: Any) -> tuple[Any, Any]:
        """Runs the cell over the inputs, and restarts it where ``resets`` say so.

        Args:
          carry: before the first step, from `initialize_carry` or an earlier call.
          x: ``(inputs, resets)``: ``(T, *B, *features)``, and ``(T, *B)`` booleans, or numbers that are not zero where
            they mean True. ``resets[t]`` replaces the carry by the initial one before ``inputs[t]`` is consumed: it
            says that ``inputs[t]`` is the first observation of an episode (see `jrnn.sequence.resets_from_done`).

        Returns:
          ``(carry, ys)``: the carry after the last step, and the outputs ``(T, *B, ...)``.

        Raises:
          ValueError, TypeError: if ``carry`` is not one of the cell's for this batch, or ``x`` is no such pair.
        """
        inputs, resets = _pair(x)
        cell = self.cell.clone(parent=self, name=f"{type(self.cell).__name__}_0", _deep_clone=True, _reset_names=True)
        restart = cell.initialize_carry(jax.random.key(0), inputs.shape[1:])
        if not same_form(restart, carry):
            raise ValueError(
                f"carry: expected {describe(restart)} for {inputs.shape[1:]} inputs at each step, got "
                f"{describe(carry)}; make it with ScannedRNN(cell).initialize_carry(batch_size)"
            )

        def step(cell: Any, carry: Any, inputs: Any) -> tuple[Any, Any]:
            (x, resets), _ = inputs
            return cell(select(resets, restart, carry), x)

        scan = transforms.lift_transform(
            _lifted_scan,
            step,
            variable_axes={},
            variable_broadcast="params",
            variable_carry=False,
            split_rngs={"params": False},
            unroll=1,
        )
        return scan(cell, carry, (inputs, resets), None)


def _pair(x: Any) -> tuple[jax.Array, jax.Array]:
    """Inputs and resets, the latter as booleans."""
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"x: expected the pair (inputs, resets), got {describe(x)}; call rnn(carry, (inputs, resets))")
    inputs, resets = map(jnp.asarray, x)
    if resets.ndim < 1 or resets.shape != inputs.shape[: resets.ndim] or resets.ndim >= inputs.ndim:
        raise ValueError(
            f"x: expected inputs (T, *B, F) and resets (T, *B), got shapes {inputs.shape} and {resets.shape}; time is "
            "the first axis of both, and resets have no feature axis"
        )
    return inputs, resets if resets.dtype == jnp.bool_ else resets != 0


# --- a jrnn model as a module ------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A jrnn model as a linen module: a cell, a stack, or any other layer.

    Its parameters are one entry, ``variables["params"]["weights"]``: those that ``model.init`` makes, with dicts in the
    place of tuples (``"0"``, ``"1"``, ... are the layers of a stack).

    Args:
      model: a jrnn layer, such as ``jrnn.lstm(128)``.
      time_major: whether sequences are ``(T, *B, F)``, and not ``(*B, T, F)``.
      reverse: run from the last valid step to the first; outputs stay in the order of the inputs.
      deterministic: whether to run without dropout and other randomness. It may be given in the call instead. If the
        model is known to use a key, it must be given in one of the two.
      rng_collection: the stream of PRNG keys for dropout and other randomness.
      stateful: keep the state after the last step of a call in the collection "carry", and start the next call from
        there. It is updated where "carry" is mutable; with ``init`` it is the initial state.
      backend, remat: as for `jrnn.unroll`.

    >>> from jrnn.flax.linen import Recurrent
    >>> model = Recurrent(jrnn.stack(jrnn.gru(8), jrnn.dropout(0.5), jrnn.dense(2)))
    >>> xs = jnp.ones((4, 16, 3))                                                      # (B, T, F)
    >>> variables = model.init(jax.random.key(0), xs, deterministic=True)
    >>> rngs = {"dropout": jax.random.key(1)}
    >>> model.apply(variables, xs, lengths=jnp.array([16, 9, 0, 2]), deterministic=False, rngs=rngs).shape
    (4, 16, 2)
    >>> stream = Recurrent(jrnn.lstm(8), stateful=True)
    >>> variables = stream.init(jax.random.key(0), xs)
    >>> ys, changed = stream.apply(variables, xs[:, :10], mutable="carry")
    >>> rest, _ = stream.apply({**variables, **changed}, xs[:, 10:], mutable="carry")
    >>> whole = stream.apply(variables, xs)
    >>> bool(jnp.allclose(jnp.concatenate([ys, rest], axis=1), whole, atol=1e-6))
    True
    """

    model: Any
    time_major: bool = False
    reverse: bool = False
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    stateful: bool = False
    backend: str | None = None
    remat: int | str | None = None

    def __call__(
        self,
        xs: Any,
        *,
        state: Any = None,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        deterministic: bool | None = None,
    ) -> Any:
        """The outputs of all steps; arguments as for `unroll`."""
        return self.unroll(xs, state=state, lengths=lengths, mask=mask, resets=resets, deterministic=deterministic)[1]

    @nn.compact
    def unroll(
        self,
        xs: Any,
        *,
        state: Any = None,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        deterministic: bool | None = None,
    ) -> tuple[Any, Any]:
        """The state after the last valid step of each sequence, and the outputs of all steps.

        Args:
          xs: ``(*B, T, F)``, or ``(*B, T)`` ids for a model that begins with `jrnn.embed`.
          state: the state before the first step; None for the state that a stateful module holds, or else for the
            initial state of the model.
          lengths: ``(*B,)`` integers: the first ``lengths`` steps of each sequence are valid.
          mask: ``(*B, T)`` booleans, true at valid steps.
          resets: ``(*B, T)`` booleans, true where the state is replaced by the initial state before the step.
          deterministic: as for the constructor, whose value is used if this is None.

        Returns:
          ``(state, ys)``, ``ys (*B, T, H)``, with zeros at steps that are not valid (see `jrnn.unroll`).

        Raises:
          ValueError, TypeError: if an argument does not fit; the message names it.
        """
        model = self.model
        _model.check_layer(model)
        xs = jnp.asarray(xs)
        features = _model.in_features(model, xs)
        like = jax.eval_shape(lambda: model.init(jax.random.key(0), features))
        if self.has_variable("params", "weights"):  # names what is missing, where Flax compares shapes alone
            _model.from_dicts(self.get_variable("params", "weights"), like, "weights")
        weights = self.param("weights", lambda key: _model.as_dicts(model.init(key, features)))
        params = _model.from_dicts(weights, like, "weights")

        stored = None
        if self.stateful:
            batch_shape = tuple(n for i, n in enumerate(xs.shape[: xs.ndim - model.event_ndim]) if i != self._time(xs))
            initial = lambda: model.initial_state(params, batch_shape)
            stored = self.variable("carry", "state", lambda: _model.as_dicts(initial()))
            if state is None:
                state = _model.from_dicts(stored.value, jax.eval_shape(initial), "state")
        last, ys = _model.run(
            model,
            params,
            xs,
            state,
            lengths=lengths,
            mask=mask,
            resets=resets,
            key=self._key(deterministic),
            time_major=self.time_major,
            reverse=self.reverse,
            backend=self.backend,
            remat=self.remat,
        )
        if stored is not None and not self.is_initializing() and self.is_mutable_collection("carry"):
            stored.value = _model.as_dicts(last)
        return last, ys

    def _time(self, xs: Any) -> int:
        return 0 if self.time_major else xs.ndim - self.model.event_ndim - 1

    def _key(self, deterministic: bool | None) -> Any:
        given = self.deterministic if deterministic is None else deterministic
        if self.model.uses_key is False:
            return None
        if given is None:
            if self.model.uses_key:
                raise ValueError(
                    f"deterministic: expected True or False, since {self.model!r} has dropout or its like, got None; "
                    "pass deterministic=not training in the call, or to the constructor"
                )
            return None
        return None if given else self.make_rng(self.rng_collection)
