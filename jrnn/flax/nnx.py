"""Modules for Flax's nnx: `RNN`, `Bidirectional` and `Recurrent`.

Where ``flax.nnx.RNN`` is used, only the import changes::

    import jrnn.flax.nnx as rnn

    lstm = rnn.RNN(nnx.OptimizedLSTMCell(32, 128, rngs=rngs))     # in the place of nnx.RNN
    outputs = lstm(inputs)                                        # the same numbers, faster
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jrnn.cells.base import Layer
from jrnn.flax import _loop, _model
from jrnn.schedules.parts import of_one_step

__all__ = ["RNN", "Bidirectional", "Recurrent", "RecurrentState"]


# --- Flax's RNN --------------------------------------------------------------------------------------------------


class RNN(nnx.RNN):
    """``flax.nnx.RNN`` on `jrnn.scan`: the same module, faster.

    Constructor, call, state, rng streams and their counts, carries and the order of outputs are those of
    ``flax.nnx.RNN``, of which this is a subclass, for any cell. Where the cell's step is read as that of a recurrent
    cell (all of Flax's, and many of one's own, see `jrnn.scan`), the products with the inputs are taken out of the loop
    over time, and the loop runs as compiled code where that pays.

    Flax's own ``nnx.scan`` runs the loop where a step changes the cell's variables or its graph, as dropout and other
    users of rng streams do, where ``state_axes`` scans over some of them, and where ``broadcast_rngs`` is given.

    With ``seq_lengths`` some results differ from Flax's, since those are wrong or depend on the padding: outputs are
    zero at padded steps, a sequence of length 0 keeps its initial carry, any number of batch axes is right, and the
    values in the padding, NaN included, change no result and no gradient.

    Args:
      cell: a ``flax.nnx.RNNCellBase``, or any module called ``(carry, x) -> (carry, y)`` with
        ``initialize_carry(input_shape, rngs)`` and ``num_feature_axes``.
      time_major: whether the inputs are ``(T, *B, *features)``, and not ``(*B, T, *features)``.
      return_carry: whether to return ``(carry, outputs)``, and not the outputs alone.
      reverse: run from the last step to the first.
      keep_order: with ``reverse``, leave the outputs in the order of the inputs.
      unroll: how many steps to compile into one body, where the loop is a scan.
      state_axes, broadcast_rngs: as for ``flax.nnx.RNN``.
      rngs: where the keys for ``initialize_carry`` come from.

    >>> from flax import nnx
    >>> import jrnn.flax.nnx
    >>> cell = nnx.LSTMCell(32, 64, rngs=nnx.Rngs(0))
    >>> rnn, x = jrnn.flax.nnx.RNN(cell), jnp.ones((10, 50, 32))                     # (B, T, F)
    >>> rnn(x, seq_lengths=jnp.full(10, 20)).shape
    (10, 50, 64)
    >>> bool(jnp.allclose(rnn(x), nnx.RNN(cell)(x), atol=1e-5))
    True
    """

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any | None = None,
        seq_lengths: Any | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Runs the cell over the inputs.

        Args:
          inputs: ``(*B, T, *features)``, or ``(T, *B, *features)`` with ``time_major``; there are as many feature axes
            as the ``num_feature_axes`` of the cell, and any number of batch axes.
          initial_carry: where to start; None for the cell's ``initialize_carry(input_shape, rngs)``.
          seq_lengths: ``(*B,)`` integers in [0, T]: how many of each sequence's first steps are no padding.
          return_carry, time_major, reverse, keep_order: None for what the constructor was given.
          rngs: None for what the constructor was given.

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
        rngs = self.rngs if rngs is None else rngs
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs.carry.fork()

        inputs = jnp.asarray(inputs)
        feature_axes = self.cell.num_feature_axes
        time_axis = _loop.time_axis(inputs, feature_axes, time_major)
        carry = initial_carry
        if carry is None:
            carry = self.cell.initialize_carry(inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :], rngs)

        xs, lengths, valid = _loop.with_padding(jnp.moveaxis(inputs, time_axis, 0), seq_lengths, feature_axes)
        if lengths is not None and return_carry:
            _loop.check_carry(carry, lengths.shape)

        step = self._pure_step(carry, xs)
        if step is not None:
            carry, ys = _loop.run(step, carry, xs, valid, reverse, self.unroll)
            ys = _loop.flipped(ys, lengths) if reverse and not keep_order else ys
        else:
            # Variables that change do so in the order in which the steps run.
            carry, ys = self._scan(carry, _loop.flipped(xs, lengths) if reverse else xs, valid)
            ys = _loop.flipped(ys, lengths) if reverse and keep_order else ys
        outputs = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), ys)
        return (carry, outputs) if return_carry else outputs

    def _pure_step(self, carry: Any, xs: Any) -> Any:
        """The cell's step as a function of carry and input; None where it may do more than that."""
        axes = dict(self.state_axes.items()).values()
        if self.broadcast_rngs is not None or not all(axis is None or axis is nnx.Carry for axis in axes):
            return None
        if not xs.shape[0]:
            return None
        graphdef, state = nnx.compat.split(self.cell)
        arrays = jax.tree.leaves(state)
        if not all(isinstance(a, jax.Array) for a in arrays):
            return None

        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            return nnx.merge(graphdef, state, copy=True)(carry, x)

        changes = []

        def watched(carry: Any, x: Any) -> tuple[Any, Any]:
            cell = nnx.merge(graphdef, state, copy=True)
            out = cell(carry, x)
            left = nnx.compat.split(cell)
            after = jax.tree.leaves(left[1])
            same = left[0] == graphdef and len(after) == len(arrays)
            changes.append(not same or any(a is not b for a, b in zip(after, arrays, strict=True)))
            return out

        try:
            jax.eval_shape(watched, carry, of_one_step(xs))
        except Exception:  # which Flax's scan raises again, in its own words
            return None
        return None if any(changes) else step

    def _scan(self, carry: Any, xs: Any, valid: Any) -> tuple[Any, Any]:
        """The loop as Flax runs it."""
        axes: dict[Any, Any] = {nnx.All(nnx.RngState, self.broadcast_rngs): None, **dict(self.state_axes.items())}
        state_axes = nnx.StateAxes(axes)

        # One split, squeezed, gives new keys to the streams that are broadcast, each time that the module is called.
        @nnx.split_rngs(splits=1, only=self.broadcast_rngs, squeeze=True)
        @nnx.compat.scan(in_axes=(state_axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0), unroll=self.unroll)
        def scan(cell: Any, carry: Any, inputs: Any) -> tuple[Any, Any]:
            x, valid = inputs
            new, y = cell(carry, x)
            return (new, y) if valid is None else (_loop.held(valid, new, carry), _loop.zero_padding(valid, y))

        return scan(self.cell, carry, (xs, valid))


class Bidirectional(nnx.Bidirectional):
    """``flax.nnx.Bidirectional``: runs over the inputs in both directions and merges the outputs.

    The same module as Flax's, of which this is a subclass. It runs the two RNNs that it is given: with `RNN` of this
    module it is faster, and right where the sequences are ragged.

    Args:
      forward_rnn, backward_rnn: two `RNN` modules.
      merge_fn: ``(forward, backward) -> merged`` of their outputs; by default these are concatenated.
      time_major, return_carry: as of `RNN`; the carry is a pair.
      rngs: where the keys for the carries come from.

    >>> from flax import nnx
    >>> from jrnn.flax.nnx import RNN, Bidirectional
    >>> rngs = nnx.Rngs(0)
    >>> layer = Bidirectional(RNN(nnx.GRUCell(3, 4, rngs=rngs)), RNN(nnx.GRUCell(3, 4, rngs=rngs)))
    >>> layer(jnp.ones((2, 5, 3))).shape
    (2, 5, 8)
    """


# --- a jrnn model as a module ------------------------------------------------------------------------------------


class RecurrentState(nnx.Variable):
    """A part of the state that `Recurrent` carries from call to call.

    >>> from jrnn.flax.nnx import RecurrentState
    >>> RecurrentState(jnp.zeros(3)).get_value().shape
    (3,)
    """


class Recurrent(nnx.Module):
    """A jrnn model as an nnx module: a cell, a stack, or any other layer.

    Its parameters are ``nnx.Param`` variables at the paths ``("weights", ...)``: those that ``model.init`` makes, with
    dicts in the place of tuples (``"0"``, ``"1"``, ... are the layers of a stack).

    Args:
      model: a jrnn layer, such as ``jrnn.lstm(128)``.
      in_features: F, as for ``model.init``; None for a model that begins with `jrnn.embed`.
      time_major: whether sequences are ``(T, *B, F)``, and not ``(*B, T, F)``.
      reverse: run from the last valid step to the first; outputs stay in the order of the inputs.
      deterministic: whether to run without dropout and its like, as ``train()`` and ``eval()`` set it.
      rng_collection: the stream of PRNG keys that dropout and its like draw from.
      backend, remat: as for `jrnn.unroll`.
      rngs: ``nnx.Rngs``; the parameters draw from its stream "params".

    >>> from flax import nnx
    >>> from jrnn.flax.nnx import Recurrent
    >>> model = Recurrent(jrnn.stack(jrnn.gru(8), jrnn.dropout(0.5), jrnn.dense(2)), 3, rngs=nnx.Rngs(0))
    >>> xs = jnp.ones((4, 16, 3))                                                      # (B, T, F)
    >>> model(xs, lengths=jnp.array([16, 9, 0, 2])).shape
    (4, 16, 2)
    >>> model.eval()
    >>> model.init_state(4)                                                 # from here on it carries its state
    >>> ys = jnp.concatenate([model(xs[:, :10]), model(xs[:, 10:])], axis=1)
    >>> model.init_state(4)
    >>> bool(jnp.allclose(ys, model(xs), atol=1e-6))
    True
    """

    def __init__(
        self,
        model: Layer,
        in_features: Any,
        *,
        time_major: bool = False,
        reverse: bool = False,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        backend: str | None = None,
        remat: int | str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        _model.check_layer(model)
        self.model = model
        self.in_features = in_features
        self.time_major = time_major
        self.reverse = reverse
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        self.backend = backend
        self.remat = remat
        weights = _model.as_dicts(model.init(rngs.params(), in_features))
        self.weights = nnx.data(jax.tree.map(nnx.Param, weights))
        self.state = nnx.data(None)
        draws = model.uses_key is not False and (rng_collection in rngs or "default" in rngs)
        self.rngs = rngs[rng_collection].fork() if draws else nnx.data(None)

    def params(self) -> Any:
        """The parameters as `jrnn.unroll` takes them."""
        like = jax.eval_shape(lambda: self.model.init(jax.random.key(0), self.in_features))
        return _model.from_dicts(_values(self.weights), like, "weights")

    def init_state(self, batch_size: int | tuple[int, ...] | None) -> None:
        """Carries the state from call to call, from the initial state of ``batch_size`` sequences on. None ends it."""
        if batch_size is None:
            self.state = nnx.data(None)
            return
        batch_shape = tuple(batch_size) if isinstance(batch_size, tuple | list) else (batch_size,)
        state = self.model.initial_state(self.params(), batch_shape)
        self.state = nnx.data(jax.tree.map(RecurrentState, _model.as_dicts(state)))

    def __call__(
        self,
        xs: Any,
        *,
        state: Any = None,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """The outputs of all steps; arguments as for `unroll`."""
        return self.unroll(
            xs, state=state, lengths=lengths, mask=mask, resets=resets, deterministic=deterministic, rngs=rngs
        )[1]

    def unroll(
        self,
        xs: Any,
        *,
        state: Any = None,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> tuple[Any, Any]:
        """The state after the last valid step of each sequence, and the outputs of all steps.

        Args:
          xs: ``(*B, T, F)``, or ``(*B, T)`` ids for a model that begins with `jrnn.embed`.
          state: the state before the first step; None for the state that is carried, if there is one, or else for the
            initial state.
          lengths: ``(*B,)`` integers: the first ``lengths`` steps of each sequence are valid.
          mask: ``(*B, T)`` booleans, true at valid steps.
          resets: ``(*B, T)`` booleans, true where the state is replaced by the initial state before the step.
          deterministic: whether to run without randomness; None for the attribute of that name.
          rngs: the source of the key for dropout and other randomness; None for that of the constructor.

        Returns:
          ``(state, ys)``, ``ys (*B, T, H)``, with zeros at steps that are not valid (see `jrnn.unroll`).

        Raises:
          ValueError, TypeError: if an argument does not fit; the message names it.
        """
        model, params, xs = self.model, self.params(), jnp.asarray(xs)
        if state is None and self.state is not None:
            sequence = xs.shape[: xs.ndim - model.event_ndim]
            batch_shape = sequence[1:] if self.time_major else sequence[:-1]
            like = jax.eval_shape(lambda: model.initial_state(params, batch_shape))
            state = _model.from_dicts(_values(self.state), like, "state")
        last, ys = _model.run(
            model,
            params,
            xs,
            state,
            lengths=lengths,
            mask=mask,
            resets=resets,
            key=self._key(deterministic, rngs),
            time_major=self.time_major,
            reverse=self.reverse,
            backend=self.backend,
            remat=self.remat,
        )
        if self.state is not None:
            set_to = lambda variable, value: variable.set_value(value)
            jax.tree.map(set_to, self.state, _model.as_dicts(last), is_leaf=_is_variable)
        return last, ys

    def _key(self, deterministic: bool | None, rngs: Any) -> Any:
        if self.model.uses_key is False or (self.deterministic if deterministic is None else deterministic):
            return None
        rngs = self.rngs if rngs is None else rngs
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs[self.rng_collection]
        if rngs is None:
            if self.model.uses_key is None:
                return None  # it is not known to draw anything
            raise ValueError(
                f"rngs: expected a stream {self.rng_collection!r}, which {self.model!r} draws from, got None; give it "
                f"to the constructor, as in nnx.Rngs(0, {self.rng_collection}=1), or call eval() to run without dropout"
            )
        return rngs()


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda variable: variable.get_value(), tree, is_leaf=_is_variable)
