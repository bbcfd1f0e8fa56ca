"""Models in files: architecture and weights in one file (`save`, `load`), and compiled programs (`export`)."""

from jrnn.files.model import load, save
from jrnn.files.program import export

__all__ = ["export", "load", "save"]
