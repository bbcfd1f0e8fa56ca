"""Other people's steps, unchanged, in `jax.lax.scan` and in `jrnn.scan`."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from jax import lax

import jrnn
from benchmarks.grid import STEPS, Point
from benchmarks.peers.base import JaxPeer

# Of each library, where its peer is, and which cells of it have jrnn's equations or others that are known.
LIBRARIES = {
    "hand": ("hand", "Hand"),
    "flax.linen": ("flax_linen", "Linen"),
    "haiku": ("haiku", "Haiku"),
    "equinox": ("equinox", "Equinox"),
}


class Stepped(JaxPeer):
    """A library's step as the body of a scan: the peer of that library makes the step, the parameters and the state."""

    library: ClassVar[str]
    scan: ClassVar[Any]

    def __init__(self) -> None:
        module, name = LIBRARIES[self.library]
        self.peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)()
        self.cells, self.equations = self.peer.cells, self.peer.equations  # type: ignore[misc]

    def refuses(self, point: Point) -> str | None:
        return super().refuses(point) if point.section == STEPS else "takes part in its own section"

    def convert(self, point: Point, params: Any) -> Any:
        return self.peer.convert(point, params)

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        body = lambda state, x: self.peer.step(point, own, state, x)
        return type(self).scan(body, self.peer.initial(point, own), xs)[1]


def _pair(library: str) -> tuple[type, type]:
    about = {"library": library, "form": f"the step of {library} in jax.lax.scan", "scan": staticmethod(lax.scan)}
    ours = about | {"form": f"the step of {library} in jrnn.scan", "scan": staticmethod(jrnn.scan)}
    return type("InLax", (Stepped,), about), type("InJrnn", (Stepped,), ours)


HandInLax, HandInJrnn = _pair("hand")
LinenInLax, LinenInJrnn = _pair("flax.linen")
HaikuInLax, HaikuInJrnn = _pair("haiku")
EquinoxInLax, EquinoxInJrnn = _pair("equinox")
