"""Limits and slopes of activations, and the bound on a step's Jacobian that follows from its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jrnn import activations
from jrnn.cells.elman import Elman, IndRNN, Jordan
from jrnn.compose.regularise import DropConnect, LearnedState, Variational

# The limits of each activation, and whether it reaches them. If it does, saturation is counted without an epsilon.
_LIMITS: dict[str, tuple[tuple[float, float], bool]] = {
    "elu": ((-1.0, np.inf), False),
    "linear": ((-np.inf, np.inf), False),
    "relu": ((0.0, np.inf), True),
    "sigmoid": ((0.0, 1.0), False),
    "softplus": ((0.0, np.inf), False),
    "tanh": ((-1.0, 1.0), False),
}

# The largest absolute slope of each activation; those of silu and gelu (its tanh form) rounded up.
_SLOPES: dict[str, float] = {
    "elu": 1.0,
    "gelu": 1.1291,
    "linear": 1.0,
    "relu": 1.0,
    "sigmoid": 0.25,
    "silu": 1.0999,
    "softplus": 1.0,
    "tanh": 1.0,
}


def _known(table: dict[str, Any], function: Any) -> Any:
    return next((value for name, value in table.items() if activations.resolve(name) is function), None)


def limits_of(cell: Any, gate: str, function: Any, given: Mapping[str, Any]) -> tuple[tuple[float, float], bool]:
    if gate in given:
        try:
            low, high = (float(limit) for limit in given[gate])
        except (TypeError, ValueError):
            low = high = np.nan
        if not low < high:
            raise ValueError(f"limits: expected (lower, upper) for gate {gate!r}, got {given[gate]!r}")
        return (low, high), False
    known = _known(_LIMITS, function)
    if known is None:
        raise ValueError(
            f"limits: the activation {function!r} of gate {gate!r} in {cell!r} has no known limits; pass "
            f"limits={{{gate!r}: (lower, upper)}}, with an infinity where it has none"
        )
    return known


def weight_factor(cell: Any, params: Any, slope: float | None, key: Any) -> tuple[float | None, str]:
    """An upper bound on the norm of a step's Jacobian for any input, from the weights alone, and how it was derived.

    With slopes of at most c, and ``|U|`` the largest singular value (the largest absolute weight in IndRNN)::

        Elman, IndRNN   h' = f(x W + h U + b)                    |dh'/dh| = |diag(f') U^T| <= c_f |U|
        Jordan          h' = f(x W + y U + b), y' = g(h' V + d)  |dy'/dy| <= c_f |U| c_g |V|
    """
    while isinstance(cell, LearnedState) or (key is None and isinstance(cell, Variational | DropConnect)):
        cell, params = cell.cell, cell.inner(params)  # without a key, these wrappers do not change the step
    if slope is not None and (isinstance(slope, bool) or not isinstance(slope, int | float) or not slope > 0):
        raise ValueError(f"slope: expected the activation's largest absolute slope, a positive float, got {slope!r}")
    if not isinstance(cell, Elman | IndRNN | Jordan):
        return None, (
            f"none known for {type(cell).__name__}: its step's Jacobian is not bounded by the weights alone (it has "
            "terms that grow with the state) or depends on what is drawn; bound is measured"
        )
    slopes = [slope if slope is not None else _known(_SLOPES, activations.resolve(cell.activation))]
    if isinstance(cell, Jordan):
        slopes.append(_known(_SLOPES, activations.resolve(cell.out_activation)))
    if None in slopes:
        return None, "none: the largest slope of the activation is not known; pass slope="
    names = ("w_hh", "w_ho") if isinstance(cell, Jordan) else ("w_hh",)
    weights = [np.asarray(params[name], np.float64) for name in names]
    norms = [np.abs(w).max() if w.ndim == 1 else np.linalg.norm(w, 2) for w in weights]
    factor = float(np.prod(norms) * np.prod(np.array(slopes, float)))
    what = "largest absolute" if isinstance(cell, IndRNN) else "largest singular value of"
    return factor, (
        f"({' * '.join(f'{what} {name} {norm:.4g}' for name, norm in zip(names, norms, strict=True))} * largest slope "
        f"{float(np.prod(np.array(slopes, float))):.4g}) to the power of the valid steps from k to t"
    )
