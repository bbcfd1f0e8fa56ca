"""The comparison of two pytrees, which reports where they differ."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def compare(got: Any, expected: Any, tolerance: float, about: str) -> None:
    """Raises AssertionError if two pytrees differ, with the leaf, the index and the difference.

    Leaves must agree in shape, in dtype and in which elements are NaN. All other elements must agree to
    ``tolerance * (1 + largest expected magnitude)``. A tolerance of 0 requires equality.

    >>> jrnn.testing.compare({"h": jnp.ones(2)}, {"h": jnp.ones(2)}, 0.0, "equal")
    >>> jrnn.testing.compare({"h": jnp.ones(2)}, {"h": jnp.array([1.0, 2.0])}, 1e-6, "a law")
    Traceback (most recent call last):
    AssertionError: a law: ['h'] differs by 1 at (1,): got 1.0, expected 2.0, tolerance 3e-06
    """
    structure: Any = jax.tree.structure(got)
    wanted: Any = jax.tree.structure(expected)
    if structure != wanted:
        raise AssertionError(f"{about}: expected the structure {wanted}, got {structure}")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path) or "the value"
        a, b = np.asarray(a), np.asarray(b)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{about}: {name}: expected {b.dtype}{b.shape}, got {a.dtype}{a.shape}")
        if not a.size:
            continue
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        a64, b64 = a.astype(wide), b.astype(wide)
        with np.errstate(all="ignore"):
            error = np.where((a64 == b64) | (np.isnan(a64) & np.isnan(b64)), 0.0, np.abs(a64 - b64))
        error = np.where(np.isnan(error), np.inf, error)
        finite = np.abs(b64[np.isfinite(b64)])
        allowed = tolerance * (1.0 + (finite.max() if finite.size else 0.0))
        if error.max() > allowed:
            at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{about}: {name} differs by {error.max():.3g} at {at}: got {a[at]}, expected {b[at]}, "
                f"tolerance {allowed:.3g}"
            )
