"""Weights from and to other frameworks.

Each ``from_...`` makes a jrnn model and its parameters, ``(model, params)``, of a model of another library. Each
``to_...`` does the reverse. The results agree with those of the other library to rounding. What has no equal in the
other library is refused, with an error that names it. `load_torch` reads the weights for a jrnn model from a file.

A framework is imported only when a function for it is called.
"""

from jrnn.interop.equinox import from_equinox, to_equinox
from jrnn.interop.flax import from_flax, to_flax
from jrnn.interop.haiku import from_haiku, to_haiku
from jrnn.interop.keras import from_keras, to_keras
from jrnn.interop.onnx import from_onnx, to_onnx
from jrnn.interop.torch import from_torch, load_torch, to_torch

__all__ = [
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_onnx",
    "from_torch",
    "load_torch",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_onnx",
    "to_torch",
]
