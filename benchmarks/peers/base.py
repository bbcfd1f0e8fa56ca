"""What a peer is, and what all peers written in JAX share."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from benchmarks.grid import Point

PRODUCT = 1536  # rows and columns of the factors whose product gives the floor's rate in the rounds


@dataclasses.dataclass
class Prepared:
    """A peer's work, ready to be timed.

    ``call`` does it once and returns when it is done. ``answer()`` is what it computes: ``ys (T, B, H)``, or for
    training ``value`` and the gradients ``xs (T, B, F)`` and ``params`` in jrnn's names and order.
    """

    call: Callable[[], Any]
    answer: Callable[[], dict[str, Any]]
    trace_ms: float | None = None
    compile_ms: float | None = None
    temp_bytes: int | None = None


class Peer:
    """A library, or a way of writing the same thing.

    ``form`` says in one line how it is used. ``equations`` names, for cells whose equations differ from jrnn's
    default, those it is held against (see `benchmarks.data.EQUATIONS`). ``lengths`` says whether ragged lengths mean
    anything to it; where they do not, it runs the padded whole, and its results are marked. ``resets`` says whether
    it takes part where episodes begin anew (see `benchmarks.data.resets`).
    """

    form: ClassVar[str]
    cells: ClassVar[tuple[str, ...]] = ("lstm", "gru", "elman")
    equations: ClassVar[dict[str, str]] = {}
    lengths: ClassVar[bool] = False
    resets: ClassVar[bool] = False
    checked: ClassVar[bool] = True

    def refuses(self, point: Point) -> str | None:
        """Why the peer takes no part in a point; None where it does."""
        if point.ragged and point.bidirectional and not self.lengths:
            return "knows no lengths, without which the backward direction would begin in padding"
        if point.resets and not self.resets:
            return "knows no resets"
        return None if point.cell in self.cells else f"has no {point.cell} cell"

    def note(self, point: Point) -> str:
        """What a reader must know about this peer at this point."""
        notes = [f"equations: {self.equations[point.cell]}"] if point.cell in self.equations else []
        if point.ragged and not self.lengths:
            notes.append("runs the padded whole")
        return "; ".join(notes)

    def equations_of(self, point: Point) -> str:
        return self.equations.get(point.cell, point.cell)

    def prepare(self, point: Point, data: dict[str, Any]) -> Prepared:
        """Makes the work ready. ``data`` is `benchmarks.data.make`'s, less what the peer's equations lack."""
        raise NotImplementedError


class JaxPeer(Peer):
    """A peer in JAX: gives conversion and application; compiling, gradients and steps are done here.

    ``batch_major`` says in which layout it wants its inputs: that is how it gets them, the transposition is not timed.
    """

    batch_major: ClassVar[bool] = False
    step_options: ClassVar[dict[str, Any]] = {"donate_argnums": (1,)}  # the state, as a stream would

    def convert(self, point: Point, params: Any) -> Any:
        """The peer's own parameters; differentiable, so that gradients can be compared in jrnn's names."""
        raise NotImplementedError

    def apply(self, point: Point, own: Any, xs: Any, lengths: Any) -> Any:
        """Outputs of all steps; ``lengths`` is None unless the point is ragged."""
        raise NotImplementedError

    def initial(self, point: Point, own: Any) -> Any:
        """The state before the first single step."""
        raise NotImplementedError

    def step(self, point: Point, own: Any, state: Any, x: Any) -> tuple[Any, Any]:
        """One step: the new state, and the output."""
        raise NotImplementedError

    def prepare(self, point: Point, data: dict[str, Any]) -> Prepared:
        with products(point.precision):
            return self._prepare(point, data)

    def _prepare(self, point: Point, data: dict[str, Any]) -> Prepared:
        import jax

        params = jax.tree.map(jax.numpy.asarray, data["params"])
        own = self.convert(point, params)
        if point.work == "step":
            return self._prepare_step(point, own, data)
        xs = self._layout(data["xs"]).astype(point.dtype)
        lengths = (jax.numpy.asarray(data["lengths"]),) if point.ragged else ()
        if point.work == "forward":
            run = lambda own, xs, *lengths: self.apply(point, own, xs, *(lengths or (None,)))
            args = (own, xs, *lengths)
        else:
            run = self._training(point)
            args = (own, xs, self._layout(data["weights"]), *lengths)
        prepared, compiled = compile_ahead(run, args)
        prepared.call = lambda: jax.block_until_ready(compiled(*args))
        prepared.answer = lambda: self._answer(point, params, compiled(*args))
        return prepared

    def _training(self, point: Point) -> Callable[..., Any]:
        import jax
        import jax.numpy as jnp

        def loss(own: Any, xs: Any, weights: Any, *lengths: Any) -> Any:
            ys = self.apply(point, own, xs, *(lengths or (None,)))
            return jnp.sum(ys.astype(jnp.float32) * weights)

        return jax.value_and_grad(loss, argnums=(0, 1))

    def _answer(self, point: Point, params: Any, result: Any) -> dict[str, Any]:
        import jax

        if point.work == "forward":
            return {"ys": self._from_layout(result)}
        value, (d_own, d_xs) = result
        (d_params,) = jax.vjp(lambda params: self.convert(point, params), params)[1](d_own)
        return {
            "value": float(value),
            "xs": self._from_layout(d_xs),
            "params": jax.tree.map(lambda a: np.asarray(a.astype("float32")), d_params),
        }

    def _prepare_step(self, point: Point, own: Any, data: dict[str, Any]) -> Prepared:
        import jax

        xs = [jax.numpy.asarray(x) for x in data["xs"]]
        run = lambda own, state, x: self.step(point, own, state, x)
        # Copied, since it is donated: what `initial` gave may be shared.
        state = jax.tree.map(jax.numpy.array, self.initial(point, own))
        prepared, compiled = compile_ahead(run, (own, state, xs[0]), **self.step_options)
        held = [state]

        def call() -> Any:
            held[0], y = compiled(own, held[0], xs[0])
            return jax.block_until_ready(y)

        def answer() -> dict[str, Any]:
            state, ys = jax.tree.map(jax.numpy.array, self.initial(point, own)), []
            for x in xs:
                state, y = compiled(own, state, x)
                ys.append(np.asarray(y))
            return {"ys": np.stack(ys)}

        prepared.call, prepared.answer = call, answer
        return prepared

    def _layout(self, array: Any) -> Any:
        import jax.numpy as jnp

        return jnp.array(np.ascontiguousarray(array.swapaxes(0, 1)) if self.batch_major else array)

    def _from_layout(self, array: Any) -> np.ndarray:
        array = np.asarray(array.astype("float32"))
        return array.swapaxes(0, 1) if self.batch_major else array


def products(precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """How JAX takes float32 products on a GPU: "exact", or "tf32", which is what it does by default there."""
    import jax

    setting = {"exact": "highest", "tf32": "tensorfloat32"}.get(precision or "")
    return jax.default_matmul_precision(setting) if setting else contextlib.nullcontext()


def compile_ahead(run: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> tuple[Prepared, Any]:
    """Traces and compiles, timing each; the compiled function is what gets timed."""
    import jax

    start = time.perf_counter()
    traced = jax.jit(run, **options).trace(*args)
    trace_ms = 1e3 * (time.perf_counter() - start)
    start = time.perf_counter()
    compiled = traced.lower().compile()
    compile_ms = 1e3 * (time.perf_counter() - start)
    memory = compiled.memory_analysis()
    temp_bytes = None if memory is None else int(memory.temp_size_in_bytes)
    nothing: Callable[[], Any] = lambda: None
    return Prepared(nothing, nothing, trace_ms, compile_ms, temp_bytes), compiled


def gate(array: Any, index: int, hidden: int) -> Any:
    """The part of one gate in an array whose last axis holds all gates."""
    return array[..., index * hidden : (index + 1) * hidden]


def reorder(array: Any, order: tuple[int, ...], hidden: int) -> Any:
    """The gates along the last axis in another order."""
    import jax.numpy as jnp

    return jnp.concatenate([gate(array, index, hidden) for index in order], axis=-1)
