"""The laws of the sequence contract as functions that check any cell or layer, including your own::

    jrnn.testing.check_cell(MyCell(8), in_features=3)

This call checks all laws that apply. It raises an AssertionError that names the law, the leaf that differs, and by how
much. Each law is also a separate function, and `LAWS` lists them.

The results of `jrnn.unroll` are compared with those of `fold`, a literal implementation of the contract: a Python loop
over ``cell.step`` with NumPy, and backpropagation through time written out by hand. So every law covers the values and
all gradients with respect to parameters, inputs and the initial state, for ragged lengths, masks, resets, both
directions, and with a key.

Shapes are tiny, and compiling a program takes a thousand times longer than running it once. Unless ``jit=True``, the
traced program is therefore interpreted, one operation after another. `check_jit` always compiles.

T time, B batch axes (any number, or none), F input features, H output features.
"""

from __future__ import annotations

from jrnn.testing.comparison import compare
from jrnn.testing.laws import (
    LAWS,
    check_backends,
    check_cell,
    check_chunks,
    check_compiles_once,
    check_derivatives,
    check_draws,
    check_hashing,
    check_jit,
    check_padding,
    check_remat,
    check_resets,
    check_reverse,
    check_state_dtype,
    check_step_equals_unroll,
    check_vmap,
    check_zero_length,
)
from jrnn.testing.oracle import fold
from jrnn.testing.trials import Trial

__all__ = [
    "LAWS",
    "Trial",
    "check_backends",
    "check_cell",
    "check_chunks",
    "check_compiles_once",
    "check_derivatives",
    "check_draws",
    "check_hashing",
    "check_jit",
    "check_padding",
    "check_remat",
    "check_resets",
    "check_reverse",
    "check_state_dtype",
    "check_step_equals_unroll",
    "check_vmap",
    "check_zero_length",
    "compare",
    "fold",
]
