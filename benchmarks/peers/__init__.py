"""One file for each library: how it does the same work, in its best form.

`PEERS` lists them in the order of the tables. A peer whose library is not installed is reported as absent.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import NamedTuple

from benchmarks.peers import base
from benchmarks.peers.base import Peer

__all__ = ["ALL", "GPU", "PEERS", "Entry", "available", "base", "create", "is_jrnn", "version"]


class Entry(NamedTuple):
    """Where a peer is: its class, the module it needs and the distribution that has it."""

    module: str
    cls: str
    requires: str
    distribution: str


PEERS: dict[str, Entry] = {
    "jrnn": Entry("jrnn", "Jrnn", "jrnn", "jrnn"),
    "jrnn hoisted": Entry("jrnn", "Hoisted", "jrnn", "jrnn"),
    "jrnn reference": Entry("jrnn", "Reference", "jrnn", "jrnn"),
    "jrnn own cell": Entry("jrnn", "OwnCell", "jrnn", "jrnn"),
    "jrnn own cell hoisted": Entry("jrnn", "OwnHoisted", "jrnn", "jrnn"),
    "jrnn own step": Entry("jrnn", "OwnStep", "jrnn", "jrnn"),
    "jrnn remat": Entry("jrnn", "WithRemat", "jrnn", "jrnn"),
    "jrnn hoisted remat": Entry("jrnn", "HoistedWithRemat", "jrnn", "jrnn"),
    "hand": Entry("hand", "Hand", "jax", "jax"),
    "hand hoisted": Entry("hand", "HandHoisted", "jax", "jax"),
    "flax.linen": Entry("flax_linen", "Linen", "flax", "flax"),
    "flax.nnx": Entry("flax_nnx", "NNX", "flax", "flax"),
    "haiku": Entry("haiku", "Haiku", "haiku", "dm-haiku"),
    "equinox": Entry("equinox", "Equinox", "equinox", "equinox"),
    "keras": Entry("keras", "Keras", "keras", "keras"),
    "torch": Entry("torch", "Torch", "torch", "torch"),
    "torch padded": Entry("torch", "Padded", "torch", "torch"),
    "hand in lax.scan": Entry("scans", "HandInLax", "jax", "jax"),
    "hand in jrnn.scan": Entry("scans", "HandInJrnn", "jax", "jax"),
    "flax.linen in lax.scan": Entry("scans", "LinenInLax", "flax", "flax"),
    "flax.linen in jrnn.scan": Entry("scans", "LinenInJrnn", "flax", "flax"),
    "haiku in lax.scan": Entry("scans", "HaikuInLax", "haiku", "dm-haiku"),
    "haiku in jrnn.scan": Entry("scans", "HaikuInJrnn", "haiku", "dm-haiku"),
    "equinox in lax.scan": Entry("scans", "EquinoxInLax", "equinox", "equinox"),
    "equinox in jrnn.scan": Entry("scans", "EquinoxInJrnn", "equinox", "equinox"),
    "linen on flax": Entry("flax_in_place", "Linen", "flax", "flax"),
    "linen on jrnn": Entry("flax_in_place", "LinenOnJrnn", "flax", "flax"),
    "linen LSTMCell on flax": Entry("flax_in_place", "Plain", "flax", "flax"),
    "linen LSTMCell on jrnn": Entry("flax_in_place", "PlainOnJrnn", "flax", "flax"),
    "nnx on flax": Entry("flax_in_place", "NNX", "flax", "flax"),
    "nnx on jrnn": Entry("flax_in_place", "NNXOnJrnn", "flax", "flax"),
    "empty": Entry("hand", "Empty", "jax", "jax"),
    "products": Entry("hand", "Products", "jax", "jax"),
}

# Those that take part on a GPU alone, beside some of the others (see `benchmarks.gpu`).
GPU: dict[str, Entry] = {
    "jrnn cudnn": Entry("jrnn", "Cudnn", "jrnn", "jrnn"),
    "jrnn kernel": Entry("jrnn", "Kernel", "jrnn", "jrnn"),
    "jrnn own cell in kernel": Entry("jrnn", "OwnKernel", "jrnn", "jrnn"),
    "jax.experimental.rnn": Entry("experimental_rnn", "ExperimentalRNN", "jax", "jax"),
    "torch cuda": Entry("torch_cuda", "TorchCuda", "torch", "torch"),
}
ALL: dict[str, Entry] = PEERS | GPU


def available(name: str) -> bool:
    """Whether the peer's library is installed."""
    return importlib.util.find_spec(ALL[name].requires) is not None


def version(name: str) -> str:
    """The version of the peer's library."""
    try:
        return importlib.metadata.version(ALL[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def create(name: str) -> Peer:
    """The peer, with its library imported."""
    entry = ALL[name]
    return getattr(importlib.import_module(f"benchmarks.peers.{entry.module}"), entry.cls)()


def is_jrnn(name: str) -> bool:
    """Whether a peer is jrnn itself in one of its forms, or a measure of the machine: none of these is a competitor."""
    return "jrnn" in name or name in ("empty", "products")
