"""An operation that calls compiled code on a CPU, and runs the same program in plain JAX elsewhere.

This is the only part of the native schedule that needs more than JAX's public API: a primitive of its own, with rules
for derivatives in both modes, for batching, and for the lowering on each platform. (A ``jax.custom_vjp`` has no forward
mode, and a foreign call can neither be exported nor differentiated twice.)
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Operation", "available"]


@functools.lru_cache(maxsize=1)
def available() -> bool:
    """Whether this version of JAX has all the internals that this module uses. Warns if it does not."""
    try:
        _primitive()
        from jax.interpreters import mlir

        found = hasattr(jax.core, "ShapedArray") and "for_export" in mlir.LoweringParameters.__dataclass_fields__
    except (AttributeError, ImportError):
        found = False
    if not found:
        warnings.warn(
            f"JAX {jax.__version__} no longer has what the native loop is made of; loops run as scans, which are "
            "slower on a CPU. A newer jrnn may know this version of JAX",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


@dataclass(frozen=True)
class Operation:
    """An operation on a tree of arrays, defined by its subclasses.

    ``tree`` is the structure of the operands. Operations compare by value: equal ones are compiled once.
    """

    tree: Any

    def bind(self, leaves: Any) -> Any:
        """Applies it to the operands' leaves."""
        outs = _primitive().bind(*leaves, operation=self)
        return jax.tree.unflatten(jax.tree.structure(self.forms(*self.operands(leaves))), outs)

    def operands(self, leaves: Any) -> Any:
        return jax.tree.unflatten(self.tree, leaves)

    # A subclass defines these methods, on trees of operands.

    def forms(self, *operands: Any) -> Any:
        """Shapes and dtypes of the results."""
        raise NotImplementedError

    def compiled(self, *operands: Any) -> Any:
        """The results, by compiled code for a CPU."""
        raise NotImplementedError

    def plain(self, *operands: Any) -> Any:
        """The results, by plain JAX."""
        raise NotImplementedError

    def jvp(self, operands: Any, tangents: Any) -> tuple[Any, Any]:
        """The results and their tangents. The tangent of an operand is None if it is zero."""
        raise NotImplementedError

    def transpose(self, cotangents: Any, *operands: Any) -> Any:
        """Cotangents of the last operand, in which the operation is linear; its leaves are not arrays here."""
        raise NotImplementedError(f"{type(self).__name__} is not linear")

    def sequences(self, *operands: Any) -> tuple[Any, Any] | None:
        """The axis of sequences of each operand and result, or -1; None if sequences depend on each other."""
        return None


# --- rules, on leaves --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _primitive() -> Any:
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("jrnn_native")
    primitive.multiple_results = True
    primitive.def_impl(_eager)
    primitive.def_abstract_eval(_abstract)
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, mlir.lower_fun(_plain, multiple_results=True))
    mlir.register_lowering(primitive, _lower, platform="cpu")
    _check_floats(primitive)
    return primitive


def _check_floats(primitive: Any) -> None:
    """Adds the operation to the float checks of `jax.experimental.checkify`, if JAX still has their table."""
    try:
        from jax._src.checkify import error_checks, nan_error_check
    except ImportError:
        return
    error_checks[primitive] = functools.partial(nan_error_check, primitive)


@functools.lru_cache(maxsize=256)
def _jitted(operation: Operation) -> Any:
    def call(*leaves: Any) -> Any:
        return jax.tree.leaves(operation.bind(leaves))

    # With jax_debug_nans, JAX runs a jitted function whose results contain NaN again without jit, which would call this
    # function for ever. A function with this mark is not run again: JAX raises at once.
    call._apply_primitive = True  # type: ignore[attr-defined]
    call.__qualname__ = f'jrnn_native ({type(operation).__name__} of the native loop; backend="reference" shows more)'
    return jax.jit(call)


def _eager(*leaves: Any, operation: Operation) -> Any:
    with jax.disable_jit(False):
        return _jitted(operation)(*leaves)


def _abstract(*avals: Any, operation: Operation) -> Any:
    forms = jax.tree.leaves(operation.forms(*operation.operands(avals)))
    return [jax.core.ShapedArray(form.shape, form.dtype) for form in forms]


def _plain(*leaves: Any, operation: Operation) -> Any:
    return jax.tree.leaves(operation.plain(*operation.operands(leaves)))


def _compiled(*leaves: Any, operation: Operation) -> Any:
    return jax.tree.leaves(operation.compiled(*operation.operands(leaves)))


def _lower(context: Any, *leaves: Any, operation: Operation) -> Any:
    from jax.interpreters import mlir

    # An exported program has to run in processes that do not know the compiled functions.
    try:
        exported = context.module_context.lowering_parameters.for_export
    except AttributeError as error:
        raise RuntimeError(
            f"JAX {jax.__version__} does not say whether a program is lowered for an export, which must not hold a "
            'call of code that is compiled for this machine; pass backend="hoisted", or set JRNN_NATIVE=0'
        ) from error
    return mlir.lower_fun(_plain if exported else _compiled, multiple_results=True)(
        context, *leaves, operation=operation
    )


def _jvp(primals: Any, tangents: Any, *, operation: Operation) -> Any:
    from jax.interpreters import ad

    moving = [None if type(t) is ad.Zero else t for t in tangents]
    outs, douts = operation.jvp(operation.operands(primals), operation.operands(moving))
    return jax.tree.leaves(outs), jax.tree.leaves(douts)


def _transpose(cotangents: Any, *leaves: Any, operation: Operation) -> Any:
    from jax.interpreters import ad

    linear = [ad.is_undefined_primal(leaf) for leaf in leaves]
    forms = operation.forms(
        *operation.operands([leaf.aval if u else leaf for u, leaf in zip(linear, leaves, strict=True)])
    )
    cotangents = jax.tree.unflatten(jax.tree.structure(forms), map(ad.instantiate_zeros, cotangents))
    found = jax.tree.leaves(operation.transpose(cotangents, *operation.operands(leaves)))
    return [None] * (len(leaves) - len(found)) + [
        f if u else None for u, f in zip(linear[-len(found) :], found, strict=True)
    ]


def _batch(leaves: Any, axes: Any, *, operation: Operation) -> Any:
    """Merges the mapped axis into the axis of sequences if all mapped operands have one; else runs member by member."""
    found = operation.sequences(*operation.operands(leaves))
    places, ends = ([], []) if found is None else map(jax.tree.leaves, found)
    members = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
    apart = found is None or any(axis is not None and place < 0 for axis, place in zip(axes, places, strict=True))
    if apart or members == 0:
        outs = _one_by_one(leaves, axes, operation)
        return outs, [0] * len(outs)
    outs = jax.tree.leaves(operation.bind([_fold(*each, members) for each in zip(leaves, axes, places, strict=True)]))
    return [_unfold(out, end, members) for out, end in zip(outs, ends, strict=True)], ends


def _one_by_one(leaves: Any, axes: Any, operation: Operation) -> list[Any]:
    mapped = [jnp.moveaxis(leaf, axis, 0) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]

    def member(mapped: Any) -> Any:
        rest = iter(mapped)
        whole = [leaf if axis is None else next(rest) for leaf, axis in zip(leaves, axes, strict=True)]
        return jax.tree.leaves(operation.bind(whole))

    return lax.map(member, mapped)


def _fold(leaf: jax.Array, axis: int | None, place: int, members: int) -> jax.Array:
    """The members along ``axis`` as more sequences at ``place``; a leaf without an axis is repeated for all members."""
    if place < 0:
        return leaf
    shape = leaf.shape if axis is None else leaf.shape[:axis] + leaf.shape[axis + 1 :]
    if axis is None:
        leaf = jnp.broadcast_to(jnp.expand_dims(leaf, place), (*shape[:place], members, *shape[place:]))
    else:
        leaf = jnp.moveaxis(leaf, axis, place)
    return leaf.reshape(*shape[:place], members * shape[place], *shape[place + 1 :])


def _unfold(out: jax.Array, place: int, members: int) -> jax.Array:
    shape = out.shape
    return out.reshape(*shape[:place], members, shape[place] // members, *shape[place + 1 :])
