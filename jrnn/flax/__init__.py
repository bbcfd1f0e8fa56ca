"""Modules for larger Flax models: `jrnn.flax.linen` and `jrnn.flax.nnx`, each imported where it is used.

Both have ``RNN`` and ``Bidirectional`` in the place of Flax's own, with the same constructors, parameters and results,
and ``Recurrent``, a jrnn model as a module. `jrnn.flax.linen` also has ``ScannedRNN``, the recurrent module of
reinforcement-learning code bases.

Where `RNN` and `Bidirectional` differ from Flax's, with ``seq_lengths``:

- Outputs are zero at padded steps; Flax's are whatever the cell makes of the padding.
- A sequence of length 0 keeps its initial carry; Flax returns the carry after the last padded step.
- Any number of batch axes is right; with two, the carries that Flax returns have a wrong shape.
- NaN and infinity in the padding change nothing; in Flax they make the gradients NaN.
- Lengths outside of [0, T], or of another shape or dtype, are an error where they are known.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jrnn.flax.linen as linen
    import jrnn.flax.nnx as nnx

__all__ = ["linen", "nnx"]

if importlib.util.find_spec("flax") is None:
    raise ImportError('jrnn.flax needs Flax, which is not installed: pip install "jrnn[flax]"')


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"jrnn.flax.{name}")
    raise AttributeError(f"module 'jrnn.flax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
