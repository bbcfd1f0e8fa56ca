"""Records the activations of a cell's gates while its step runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import activations
from jrnn.cells.affine import AffineCell
from jrnn.cells.gru import ResetBeforeGRU
from jrnn.cells.lstm import ProjectionLSTM
from jrnn.compose.regularise import Wrapper
from jrnn.diagnose.arrays import is_float


class Call(NamedTuple):
    function: Any
    argument: jax.Array
    value: jax.Array


@dataclass(frozen=True, eq=False)
class _Listener:
    """An activation that records its calls."""

    function: Any
    heard: list[Call]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.function(x)
        self.heard.append(Call(self.function, x, y))
        return y


@dataclass(frozen=True)
class _ListeningProjection(ProjectionLSTM):
    """A projection LSTM with the gates of the given LSTM."""

    gated: Any = field(kw_only=True)

    @property
    def _lstm(self) -> Any:
        return self.gated


def listening(cell: Any, heard: list[Call]) -> Any:
    """The same cell with activations that record their calls."""
    if isinstance(cell, Wrapper):
        return replace(cell, cell=listening(cell.cell, heard))  # type: ignore[type-var]
    if isinstance(cell, ProjectionLSTM):
        values = {f.name: getattr(cell, f.name) for f in fields(cell)}
        return _ListeningProjection(**values, gated=listening(cell._lstm, heard))
    names = [f.name for f in fields(cell) if f.name.endswith("activation")] if is_dataclass(cell) else []
    if not names:
        return cell
    return replace(cell, **{name: _Listener(activations.resolve(getattr(cell, name)), heard) for name in names})


def gate_names(cell: Any) -> tuple[str, ...]:
    while isinstance(cell, Wrapper):
        cell = cell.cell
    if isinstance(cell, ProjectionLSTM):
        cell = cell._lstm
    elif isinstance(cell, ResetBeforeGRU):
        cell = cell._gru
    return cell.gate_names if isinstance(cell, AffineCell) else ("h",)


def find_gates(
    cell: Any, names: tuple[str, ...], params: Any, states: Any, ps: Any, calls: Any
) -> tuple[list[int], tuple[Any, ...]]:
    """The index of each gate's call among all calls of activations, and the functions that were called.

    The call of a gate is the one whose argument a has da/dp = 1 with respect to the gate's part p of the projection.
    """

    def random(tree: Any) -> Any:  # a point at which no other derivative is 1 by chance, as in saturated data
        key = jax.random.key(0)
        leaves, structure = jax.tree.flatten(tree)
        drawn = [
            jax.random.normal(jax.random.fold_in(key, i), a.shape[1:], a.dtype)
            if is_float(a)
            else jnp.zeros(a.shape[1:], a.dtype)
            for i, a in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, drawn)

    state, (parts, structure) = random(states), jax.tree.flatten(random(ps))
    functions: list[Any] = []

    def arguments(parts: list[jax.Array]) -> list[jax.Array]:
        heard = calls(params, state, jax.tree.unflatten(structure, parts), None)
        functions[:] = [call.function for call in heard]
        return [call.argument for call in heard]

    found = []
    for j, name in enumerate(names if len(parts) == len(names) else ()):
        tangents = [jnp.full_like(part, 1.0 if i == j else 0.0) for i, part in enumerate(parts)]
        moves = jax.jvp(arguments, (parts,), (tangents,))[1]
        matches = [i for i, m in enumerate(moves) if m.shape == parts[j].shape and bool((m == 1).all())]
        if not matches:
            raise TypeError(
                f"layer: found no activation of gate {name!r} in {cell!r}, got {len(moves)} calls of recorded "
                "activations; take the gates' functions from dataclass fields named activation or gate_activation "
                "(jrnn.activations.resolve), and add each gate's projection to their argument unscaled"
            )
        found.append(matches[0])
    if len(found) != len(names):
        raise TypeError(
            f"layer: expected a projection with one array for each gate {list(names)}, got {len(parts)} arrays from "
            f"{cell!r}; make the cell a jrnn.AffineCell"
        )
    return found, tuple(functions[i] for i in found)
