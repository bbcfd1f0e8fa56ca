"""Where JAX computes: on which device, and over which axes of a mesh."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["default_device", "is_placed", "varying_as"]


def default_device() -> Any:
    """The device that ``jax.default_device`` or a platform's name chose, or else the first."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def varying_as(tree: Any, *like: Any) -> Any:
    """Inside `jax.shard_map`, a tree said to vary over every axis of the mesh that the leaves of ``like`` vary over.

    What a loop carries must, if what it meets does. Elsewhere the tree as it is.
    """
    wanted: frozenset[str] = frozenset().union(*map(_axes, jax.tree.leaves(like)))
    if not wanted:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, tuple(wanted - _axes(leaf)), to="varying"), tree)


def is_placed(leaf: Any) -> bool:
    """Whether an array's type says where it lies: on a mesh with explicit axes, or inside `jax.shard_map`."""
    if not hasattr(leaf, "dtype"):
        return False
    mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
    return bool(getattr(mesh, "axis_types", None)) or bool(_axes(leaf))


def _axes(leaf: Any) -> frozenset[str]:
    kind = jax.typeof(leaf)
    return (
        getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", None) or frozenset()
    )
