"""The device on which JAX computes, and the mesh axes over which arrays are sharded."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["batch_spec", "default_device", "is_placed", "knows_mesh", "one_step", "placed", "placed_as", "varying_as"]


def default_device() -> Any:
    """The device that ``jax.default_device`` names, directly or by its platform; else the first device."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def varying_as(tree: Any, *like: Any) -> Any:
    """Inside `jax.shard_map`, marks a tree as varying over every mesh axis that the leaves of ``like`` vary over.

    A loop's carry must vary over an axis if its inputs do. Outside of `jax.shard_map`, the tree is returned unchanged.
    """
    wanted: frozenset[str] = frozenset().union(*map(_axes, jax.tree.leaves(like)))
    if not wanted:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, tuple(wanted - _axes(leaf)), to="varying"), tree)


# --- meshes with Explicit axes, for which the sharding of an array is a part of its type -------------------------


def is_placed(a: Any) -> bool:
    """Whether an array's type includes its sharding over a mesh."""
    mesh = getattr(getattr(jax.typeof(a), "sharding", None), "mesh", None)
    return any(kind != jax.sharding.AxisType.Auto for kind in getattr(mesh, "axis_types", None) or ())


def batch_spec(ndim: int, *, states: Any = (), sequences: Any = ()) -> tuple[Any, ...] | None:
    """The mesh axes over which the batch axes of ``states (*B, ...)`` and ``sequences (T, *B, ...)`` are sharded.

    None if no batch axis is sharded. If arrays differ, the first one that is sharded along a batch axis decides for
    this axis.
    """
    leaves = [(leaf, 1) for leaf in jax.tree.leaves(sequences)] + [(leaf, 0) for leaf in jax.tree.leaves(states)]
    specs = [tuple(_spec(leaf)[lead : lead + ndim]) for leaf, lead in leaves if is_placed(leaf)]
    found = [next((axis for axis in axes if axis is not None), None) for axes in zip(*specs, strict=True)]
    return tuple(found) if any(axis is not None for axis in found) else None


def placed(tree: Any, batch: tuple[Any, ...] | None, lead: int) -> Any:
    """A tree of leaves ``(*B, ...)``, or ``(T, *B, ...)`` with a ``lead`` of 1, sharded over the given mesh axes."""
    if batch is None:
        return tree
    return jax.tree.map(lambda a: _moved(a, (*_spec(a)[:lead], *batch, *_spec(a)[lead + len(batch) :])), tree)


def placed_as(tree: Any, like: Any) -> Any:
    """A tree whose leaves are sharded as those of ``like``, which are arrays or of type `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda a, b: _moved(a, _spec(b)) if is_placed(b) else a, tree, like)


def one_step(xs: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of one step of ``xs (T, ...)``."""
    sharding = NamedSharding(jax.typeof(xs).sharding.mesh, PartitionSpec(*_spec(xs)[1:])) if is_placed(xs) else None
    return jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype, sharding=sharding)


def _spec(a: Any) -> tuple[Any, ...]:
    """The mesh axis, or axes, of each axis of an array; None for an axis that is not sharded."""
    spec = tuple(jax.typeof(a).sharding.spec)
    return spec + (None,) * (a.ndim - len(spec))


def _moved(a: Any, spec: tuple[Any, ...]) -> Any:
    if spec == _spec(a):
        return a
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError(
            f"xs: expected the mesh of arrays that lie over Explicit mesh axes, here {spec}, to be set, got none; call "
            f"jrnn inside `with jax.set_mesh(mesh):`"
        )
    return jax.sharding.reshard(a, PartitionSpec(*spec))


def knows_mesh(leaf: Any) -> bool:
    """Whether an array's type refers to a mesh: one with Explicit axes, or that of a `jax.shard_map`."""
    return hasattr(leaf, "dtype") and (is_placed(leaf) or bool(_axes(leaf)))


def _axes(leaf: Any) -> frozenset[str]:
    kind = jax.typeof(leaf)
    return (
        getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", None) or frozenset()
    )
