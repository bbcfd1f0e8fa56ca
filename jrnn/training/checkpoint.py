"""Checkpoints on disk through Orbax: written atomically, the best and the last few kept."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn._core.checks import positive_int

_DIFFERENCES_SHOWN = 8


class Checkpoint(NamedTuple):
    """The result of `Checkpointer.restore`.

    Attributes:
      step: the step it was saved under.
      tree: the arrays, in the structure, and with the sharding, of the tree asked for.
      info: the plain data saved beside them.

    >>> Checkpoint(3, {}, None).step
    3
    """

    step: int
    tree: Any
    info: Any


class Checkpointer:
    """A directory of checkpoints: one for each step saved, holding a pytree of arrays and some plain data.

    Laws:
      * A save is atomic: after a crash at any moment, ``kill -9`` included, the directory holds every checkpoint that
        was complete before, and never half of one.
      * The last `keep` checkpoints are kept, and the best: the earliest of lowest `value`. Older ones are removed.
      * A restored tree equals the saved one, bit for bit; dtypes never change. Typed keys (``jax.random.key``) and
        old-style ones both survive.
      * Saving is synchronous: once `save` returns, the arrays may be donated.

    One process writes to a directory at a time. Needs the extra ``checkpoint``. Use it as a context manager, or call
    `close`.

    Args:
      directory: the directory; it is made if it does not exist.
      keep: how many of the last checkpoints to keep, beside the best.

    Raises:
      ImportError: without Orbax, naming the extra to install.

    >>> import tempfile
    >>> tree = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
    >>> with tempfile.TemporaryDirectory() as directory, Checkpointer(directory, keep=1) as checkpointer:
    ...     checkpointer.save(10, tree, info={"epoch": 1}, value=0.5)
    ...     checkpointer.save(20, tree, info={"epoch": 2}, value=0.7)
    ...     checkpointer.save(30, tree, info={"epoch": 3}, value=0.6)
    ...     restored = checkpointer.restore(tree)
    ...     print(checkpointer.steps(), checkpointer.best_step(), restored.step, restored.info)
    [10, 30] 10 30 {'epoch': 3}
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        positive_int(keep, "keep")
        ocp = _orbax()
        path = os.fspath(directory)
        self.directory = path if "://" in path else os.path.abspath(os.path.expanduser(path))
        self.keep = keep
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_LastAndBest(keep),
                best_fn=_value,
                best_mode="min",
                # A save in the background would read buffers that the next step has been given to overwrite.
                enable_async_checkpointing=False,
            ),
        )
        self._swept = False

    def save(self, step: int, tree: Any, *, info: Any = None, value: float | None = None) -> None:
        """Writes a checkpoint and removes the ones no longer kept.

        Args:
          step: its number; above that of every checkpoint so far.
          tree: a pytree of arrays.
          info: anything JSON can hold.
          value: how good it is, lower is better; None (or a number that is not finite) for unknown.
        """
        ocp = _orbax()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step: expected one after {latest}, the latest in {self.directory}, got {step}")
        self._sweep()
        tree = jax.tree.map(jnp.asarray, tree)
        record = {"leaves": [[name, *kind] for name, kind in describe_leaves(tree).items()], "info": info}
        self._manager.save(
            step,
            args=ocp.args.Composite(tree=ocp.args.PyTreeSave(_without_empty(tree)), info=ocp.args.JsonSave(record)),
            metrics={"value": value if value is not None and math.isfinite(value) else None},
        )

    def restore(self, like: Any, step: int | None = None) -> Checkpoint:
        """Reads a checkpoint back. For the parameters alone of a run of `fit`, see `load_params`.

        Args:
          like: a pytree with the structure, shapes and dtypes to expect: arrays or ``jax.ShapeDtypeStruct``.
          step: the step of the checkpoint; None for the latest.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint is of another model; the message names the differences.
        """
        step = self._find(step)
        compare_leaves(self.leaves(step), describe_leaves(like), f"checkpoint {step} in {self.directory}")
        return Checkpoint(step, self._read(step, like), self._record(step)["info"])

    def leaves(self, step: int | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array of a checkpoint, by path, such as ``state/params/w_hh``."""
        leaves = self._record(self._find(step))["leaves"]
        return {name: (tuple(shape), dtype) for name, shape, dtype in leaves}

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The latest step that has a checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The earliest step of lowest value, or None where no checkpoint has a value."""
        steps = self.steps()
        best = _lowest([_value(self._manager.metrics(step)) for step in steps])
        return None if best is None else steps[best]

    def close(self) -> None:
        """Releases the directory."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"directory: expected a checkpoint in {self.directory}, found none")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"step: expected one of {steps}, the checkpoints in {self.directory}, got {step}")
        return steps[-1] if step is None else step

    def _read(self, step: int, like: Any) -> Any:
        """The arrays of `like`, which may be a part of the tree that the checkpoint holds."""
        ocp = _orbax()
        like = jax.tree.map(_abstract, like)
        wanted = _without_empty(like)
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        restored = iter(jax.tree.leaves(self._manager.restore(step, args=ocp.args.Composite(tree=arguments))["tree"]))
        fill = lambda leaf: next(restored) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
        return jax.tree.map(fill, like)

    def _sweep(self) -> None:
        """Removes what writes that were cut short have left.

        Orbax can do so too, in a thread that it starts with the manager and that prints a traceback where the process
        ends first. And only a writer may: what another process is writing at the moment looks the same.
        """
        if self._swept:
            return
        ocp = _orbax()
        for path in self._manager.directory.iterdir():
            if ocp.utils.is_tmp_checkpoint(path):
                path.rmtree()
        self._swept = True

    def _record(self, step: int) -> Any:
        ocp = _orbax()
        return self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]


class _LastAndBest:
    """Which checkpoints Orbax preserves: the last few and the best."""

    def __init__(self, keep: int):
        self.keep = keep

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        best = _lowest([_value(checkpoint.metrics) for checkpoint in checkpoints])
        return [i >= len(checkpoints) - self.keep or i == best for i in range(len(checkpoints))]


def _value(metrics: Any) -> float:
    value = None if metrics is None else metrics["value"]
    return math.inf if value is None else value


def _lowest(values: list[float]) -> int | None:
    """Where the first of the lowest values stands; infinity stands for unknown."""
    return values.index(min(values)) if min(values, default=math.inf) < math.inf else None


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError('checkpoints need Orbax, which is not installed: pip install "jrnn[checkpoint]"') from error
    return ocp


def describe_leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each leaf by its path, such as ``state/params/w_hh``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (jnp.shape(leaf), str(jnp.result_type(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _without_empty(tree: Any) -> Any:
    """Orbax refuses arrays without elements: their shape, in the record, says all about them."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def compare_leaves(saved: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    def text(leaves: dict[str, Any], name: str) -> str:
        shape, dtype = leaves[name]
        return f"{dtype}[{','.join(map(str, shape))}]"

    differences = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            differences.append(f"{name}: {text(saved, name)} in the checkpoint, absent from the model")
        elif name not in saved:
            differences.append(f"{name}: absent from the checkpoint, {text(wanted, name)} in the model")
        elif saved[name] != wanted[name]:
            differences.append(f"{name}: {text(saved, name)} in the checkpoint, {text(wanted, name)} in the model")
    if not differences:
        return
    shown = differences[:_DIFFERENCES_SHOWN]
    more = len(differences) - len(shown)
    raise ValueError(
        f"{what} is of another model, optimiser or precision:\n  "
        + "\n  ".join(shown)
        + (f"\n  and {more} more" if more else "")
        + "\nRestore it with what it was saved from, or choose another directory."
    )
