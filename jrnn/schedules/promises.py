"""The properties of a cell's gates that schedules rely on: declared by the cell, or read from the traced gates.

Gates that were read from a user's step consist of elementwise operations already, and are not traced again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn._core.checks import same_form
from jrnn.cells.form import ReadGates
from jrnn.jaxprs.flat import Program, flatten
from jrnn.jaxprs.per_unit import PerUnit, Unread


def elementwise(cell: Any, theta: Any, state: Any) -> bool:
    """Whether the gates act on each unit separately, in any order of the axes, and theta consists of vectors.

    If the gates and their derivative can be read, their trace decides, unless the cell declares
    ``elementwise=False``. If they cannot be read, the cell's declaration decides.
    """
    if cell.elementwise is False or any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(theta)):
        return False
    return isinstance(cell.combine, ReadGates) or _is_elementwise(cell, Forms.of(theta, state))


def sums(cell: Any, theta: Any, state: Any) -> tuple[bool, ...]:
    """For each gate, whether it uses u and v only in the sum ``u + v``: as promised, or else as read."""
    if None not in cell.sums or any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(theta)):
        return tuple(map(bool, cell.sums))
    read = _sums(cell, Forms.of(theta, state))
    return tuple(found if promised is None else promised for found, promised in zip(read, cell.sums, strict=True))


# --- the gates at given shapes -----------------------------------------------------------------------------------


class Forms(NamedTuple):
    """The structure of ``(theta, state)``, the dtypes of its leaves, the number of leaves of theta, the batch shape
    and H."""

    tree: Any
    dtypes: tuple[str, ...]
    thetas: int
    batch: tuple[Any, ...]
    hidden: int

    @classmethod
    def of(cls, theta: Any, state: Any) -> Forms:
        leaves, tree = jax.tree.flatten((theta, state))
        *batch, hidden = leaves[-1].shape
        return cls(tree, tuple(str(leaf.dtype) for leaf in leaves), len(jax.tree.leaves(theta)), tuple(batch), hidden)

    def arguments(self, parts: int, batch: tuple[Any, ...], turned: bool = False) -> tuple[Any, list[tuple[Any, ...]]]:
        """``((parts, theta, state), axes)`` for `PerUnit.read`. ``turned`` puts units first, as in `layout.Units`."""
        vector: tuple[Any, Any] = ((self.hidden,), ("units",))
        full: tuple[Any, Any] = ((*batch, self.hidden), (*range(len(batch)), "units"))
        if turned:
            vector, full = ((self.hidden, 1), ("units", None)), ((self.hidden, *batch), ("units", *range(len(batch))))
        kinds = [vector if i < self.thetas else full for i in range(len(self.dtypes))]
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for (shape, _), dtype in zip(kinds, self.dtypes, strict=True)]
        part = (jax.ShapeDtypeStruct(full[0], self.dtypes[-1]),) * parts
        return (part, *self.tree.unflatten(leaves)), [full[1]] * parts + [axes for _, axes in kinds]

    def batches(self) -> list[tuple[int, ...]]:
        """Batch shapes to read the gates at. At least one has an axis longer than 1, and no axis of size H."""
        if not all(isinstance(size, int) and size > 0 for size in self.batch):  # symbols, or no sequence
            return [(3,)]
        tells = max(self.batch, default=1) > 1 and self.hidden not in self.batch
        return [self.batch] if tells else [self.batch, (3,) if self.hidden != 3 else (4,)]


def program(
    unit: PerUnit, gates: Any, parts: int, forms: Forms, batch: tuple[int, ...], turned: bool = False
) -> tuple[int, ...]:
    """The places of the results of ``gates(parts, theta, state)`` and of its transpose, read at a batch shape.

    The results of the gates are the new state. The transpose maps its cotangent to those of parts, theta and state.
    """
    arguments, axes = forms.arguments(parts, batch, turned)
    states = len(forms.dtypes) - forms.thetas

    def both(parts: Any, theta: Any, state: Any, dnew: Any) -> Any:
        new, transpose = jax.vjp(gates, parts, theta, state)
        return new, transpose(dnew)

    return unit.read(both, (*arguments, arguments[-1]), [*axes, *axes[-states:]])


@functools.lru_cache(maxsize=256)
def _is_elementwise(cell: Any, forms: Forms) -> bool:
    count, unit = len(cell.sums), PerUnit()

    def gates(parts: Any, theta: Any, state: Any) -> Any:
        return cell.combine(theta, parts[:count], parts[count:], state, None)

    try:
        found = program(unit, gates, 2 * count, forms, forms.batches()[0])
    except Unread:
        return cell.elementwise is True and _turns(cell, forms)
    try:
        return program(unit, gates, 2 * count, forms, (3,), turned=True) == found
    except Unread:  # the gates refer to an axis by its number
        return False


def _turns(cell: Any, forms: Forms) -> bool:
    """Whether the gates can be called with units first. They cannot if they name an axis or write out a shape."""
    gates = len(cell.sums)
    (parts, theta, state), _ = forms.arguments(2 * gates, (3,), turned=True)
    try:
        new = jax.eval_shape(lambda *a: cell.combine(a[1], a[0][:gates], a[0][gates:], a[2], None), parts, theta, state)
    except Exception:  # the gates keep their layout, and the run itself raises the error, if there is one
        return False
    return same_form(new, state)


@functools.lru_cache(maxsize=256)
def _sums(cell: Any, forms: Forms) -> tuple[bool, ...]:
    gates = len(cell.sums)
    (parts, theta, state), _ = forms.arguments(2 * gates, forms.batches()[0])
    try:
        traced = jax.make_jaxpr(lambda *a: cell.combine(a[1], a[0][:gates], a[0][gates:], a[2], None))(
            parts, theta, state
        )
        program, consts = flatten(traced)
    except Exception:  # the run itself raises the error
        return (False,) * gates
    first = len(consts)
    return tuple(_is_summed(program, first + i, first + gates + i) for i in range(gates))


def _is_summed(program: Program, u: int, v: int) -> bool:
    """Whether two variables are each used exactly once, as the two terms of the same sum."""
    if u in program.results or v in program.results:
        return False
    users = [op for op in program.ops if u in op.ins or v in op.ins]
    return len(users) == 1 and users[0].name == "add" and {u, v} <= set(users[0].ins)
