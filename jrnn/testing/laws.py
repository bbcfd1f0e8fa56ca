"""The laws of the sequence contract, one function for each, and `check_cell`, which checks all of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn._core.checks import describe
from jrnn._interpret import call
from jrnn.cells.base import Layer, event_shape
from jrnn.run.unrolling import choose_backend
from jrnn.schedules import SCHEDULES
from jrnn.testing.bench import Bench
from jrnn.testing.comparison import compare
from jrnn.testing.oracle import add_trees, zero_tree
from jrnn.testing.trials import BATCH, TIME, Run, Second, Trial, Vmap, has_gradient, inexact, only_inexact


def _law(function: Callable[[Bench], None]) -> Callable[..., None]:
    """Turns a law, which is a function of a bench, into a public function of a cell."""

    @functools.wraps(function)
    def check(
        cell: Layer,
        in_features: Any = 3,
        *,
        dtype: Any = "float32",
        seed: int = 0,
        jit: bool = False,
        params: Any = None,
    ) -> None:
        precision = jax.enable_x64(True) if np.dtype(dtype) == np.float64 else contextlib.nullcontext()
        with precision:
            function(Bench(function.__name__, cell, in_features, dtype, seed, jit, params))

    del check.__wrapped__
    check.__annotations__ = {
        "cell": "Layer",
        "in_features": "Any",
        "dtype": "Any",
        "seed": "int",
        "jit": "bool",
        "params": "Any",
        "return": "None",
    }
    return check


@_law
def check_step_equals_unroll(bench: Bench) -> None:
    """``unroll`` equals a fold over ``step`` in Python (see `fold`), with all optional arguments and with none.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_step_equals_unroll(jrnn.elman(2))
    """
    for key in bench.draws():
        trial = bench.trial(key=key)
        bench.compare(bench.run(trial), bench.fold(trial), f"lengths, mask and resets, {_keyed(key)}")
    nothing = {"state": None, "lengths": None, "mask": None, "resets": None, "start": 0}
    trial = bench.trial(**nothing)
    bench.compare(bench.run(trial), bench.fold(trial), "nothing given")
    if bench.cell.event_ndim:
        trial = bench.trial(batch=(), state=None, lengths=None, mask=None)
        bench.compare(bench.run(trial), bench.fold(trial), "one sequence without batch axes, resets")


def _keyed(key: Any) -> str:
    return "no key" if key is None else "with a key"


@_law
def check_draws(bench: Bench) -> None:
    """The masks that a part draws once per sequence (see `jrnn.Layer.draw`) are not drawn again at every step.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_draws(jrnn.variational(jrnn.elman(2), inputs=0.5))
    """
    *_, key = bench.draws()
    try:
        bench.trial(key=key)  # traces a run with the key, which raises if the law is broken
    except TypeError as error:
        if not str(error).startswith(("cell: ", "params: ")):
            raise
        raise AssertionError(f"{bench.law}: {bench.cell!r}: {error}") from error


@_law
def check_padding(bench: Bench) -> None:
    """The contents of padding, including NaN and infinity, change no output, no state and no gradient.

    Outputs at padding and gradients with respect to padded inputs are exactly zero. Resets at padding are ignored. A
    sequence without its invalid steps gives the same results. Arguments are those of `check_cell`; raises
    AssertionError.

    >>> jrnn.testing.check_padding(jrnn.elman(2))
    """
    for key in bench.draws():
        clean = bench.trial(key=key)
        valid, _ = clean.flags((BATCH,))
        dirty = _poisoned(clean, valid, bench.rng)
        expected = bench.fold(clean)
        for reverse in (False, True) if bench.cell.uses_key is False or key is not None else (False,):
            expected = bench.fold(clean, reverse)
            got = bench.run(dirty, reverse=reverse)
            about = f"NaN, infinity and resets in padding, {_keyed(key)}, reverse={reverse}"
            bench.compare(got, expected, about)
            for name in ("ys", "gradient of xs"):
                if got[name] is not None:
                    bench.compare(got[name][~valid], np.zeros_like(got[name][~valid]), f"{about}: {name}", exact=True)
    # Resets next to invalid steps: the boundary lies between the valid steps before and after it.
    mask, resets = np.zeros((2, TIME), bool)
    mask[[1, 3, 4]] = resets[[1, 3]] = True
    whole = bench.trial(batch=(), lengths=None, mask=mask, resets=resets, start=0, cotangents=None)
    short = whole._replace(xs=whole.xs[mask], mask=None, resets=resets[mask])
    for reverse in (False, True):
        got, expected = bench.run(whole, reverse=reverse), bench.run(short, reverse=reverse)
        got["ys"] = got["ys"][mask]
        bench.compare(got, expected, f"invalid steps cut out, reverse={reverse}")


def _poisoned(trial: Trial, valid: np.ndarray, rng: Any) -> Trial:
    bad = np.array([np.nan, np.inf, -np.inf, 1e30]) if has_gradient(trial.xs) else np.array([-1, 10**6, -(10**6), 99])
    xs = np.where(_expand(valid, trial.xs), trial.xs, rng.choice(bad, trial.xs.shape).astype(trial.xs.dtype))
    resets = None if trial.resets is None else np.where(valid, trial.resets, ~trial.resets)
    return trial._replace(xs=xs, resets=resets)


def _nan(a: np.ndarray) -> np.ndarray:
    return np.full_like(a, np.nan) if has_gradient(a) else a


def _expand(flags: np.ndarray, like: np.ndarray) -> np.ndarray:
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


@_law
def check_zero_length(bench: Bench) -> None:
    """Sequences of length 0 return the state they were given; T = 0 and an empty batch are legal.

    Outputs are zero, the gradient with respect to the state is its cotangent, and all other gradients are zero.
    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_zero_length(jrnn.elman(2))
    """
    trial = bench.trial(lengths=np.zeros(BATCH, np.int32))
    got = bench.run(_poisoned(trial, np.zeros((TIME, BATCH), bool), bench.rng))
    state_bar = only_inexact(trial.state, trial.cotangents[:-1])
    zeros = {name: zero_tree(got[name]) for name in ("ys", "gradient of params", "gradient of xs")}
    bench.compare(got, {"state": trial.state, **zeros, "gradient of state": state_bar}, "lengths 0", exact=True)
    lost = bench.run(trial._replace(state=jax.tree.map(_nan, trial.state)))
    bench.compare(
        {name: lost[name] for name in zeros} | {"gradient of state": lost["gradient of state"]},
        {**zeros, "gradient of state": state_bar}, "lengths 0 and a state of NaN", exact=True,
    )  # fmt: skip
    for key in bench.last_draw():
        trial = bench.trial(time=0, key=key, cotangents=None)
        got = bench.run(trial)
        bench.compare(got["state"], trial.state, f"T = 0, {_keyed(key)}", exact=True)
        trial = bench.trial(batch=(0,), key=key, cotangents=None)
        shapes = [(0, *leaf.shape[1:]) for leaf in jax.tree.leaves(bench.initial((1,)))]
        empty = bench.run(trial)
        if [leaf.shape for leaf in jax.tree.leaves(empty["state"])] != shapes or empty["ys"].shape[:2] != (TIME, 0):
            raise AssertionError(f"{bench.law}: {bench.cell!r}: an empty batch gave {describe(empty)}")
        if got["ys"].shape != (0, BATCH, *empty["ys"].shape[2:]):
            raise AssertionError(f"{bench.law}: {bench.cell!r}: T = 0 gave outputs of shape {got['ys'].shape}")


@_law
def check_resets(bench: Bench) -> None:
    """A reset restores the initial state before the step, and no value (NaN included) and no gradient crosses it.

    The steps after a reset equal a separate run. A state of NaN that is reset at each sequence's first step changes no
    output and no gradient. NaN inputs before a reset change no output after it. Arguments are those of `check_cell`;
    raises AssertionError.

    >>> jrnn.testing.check_resets(jrnn.elman(2))
    """
    cut = TIME // 2
    after = np.arange(TIME) >= cut
    # All arguments are given, so that the traced program of other laws is reused. A layer that is not causal gets no
    # state, since its backward direction would start from this state, after the reset.
    no_padding = {
        "state": bench.initial((BATCH,)) if bench.cell.causal else None,
        "lengths": np.full(BATCH, TIME, np.int32),
        "mask": np.ones((TIME, BATCH), bool),
    }
    for key in bench.last_draw():
        whole = bench.trial(key=key, **no_padding)
        resets = np.zeros((TIME, BATCH), bool)
        resets[cut] = True
        ys_bar = np.where(_expand(after, whole.cotangents[-1]), whole.cotangents[-1], 0)
        zero = tuple(map(np.zeros_like, whole.cotangents[:-1]))
        whole = whole._replace(resets=resets, cotangents=(*zero, ys_bar))
        got = bench.run(whole)
        # A separate run of the second part has the outputs of the whole run, and their gradients.
        last = Trial(whole.params, whole.xs[cut:], key=key, start=whole.start + cut, cotangents=(*zero, ys_bar[cut:]))
        part = bench.fold(last)
        about = f"outputs after a reset, {_keyed(key)}"
        for name in ("ys", "gradient of xs"):
            if got[name] is not None:
                bench.compare(got[name][cut:], part[name], f"{about}: {name}")
        bench.compare(got["gradient of params"], part["gradient of params"], f"{about}: gradient of params")
        if got["gradient of xs"] is not None:
            before = got["gradient of xs"][:cut]
            bench.compare(before, np.zeros_like(before), f"{about}: gradient of inputs before it", exact=True)
            # NaN before the reset changes neither the outputs after it nor the gradients of the inputs after it.
            spoilt = whole.xs.copy()
            spoilt[:cut] = np.nan
            nan = bench.run(whole._replace(xs=spoilt))
            bench.compare(nan["ys"][cut:], got["ys"][cut:], f"NaN before a reset, {_keyed(key)}: ys")
            mine, clean = nan["gradient of xs"][cut:], got["gradient of xs"][cut:]
            bench.compare(mine, clean, f"NaN before a reset, {_keyed(key)}: gradient of xs after it")
    if not bench.cell.causal:
        return  # the backward direction starts from its state after the last step, where there can be no reset
    for reverse in (False, True):
        # The first valid step of each sequence, at t = 0, 1 or 2, is reset.
        late = np.arange(BATCH) % 3
        mask = np.arange(TIME)[:, None] >= late
        resets = np.arange(TIME)[:, None] == late
        if reverse:
            mask, resets = mask[::-1].copy(), resets[::-1].copy()
        trial = bench.trial(lengths=np.full(BATCH, TIME, np.int32), mask=mask)
        clean = trial._replace(resets=resets)
        lost = clean._replace(state=jax.tree.map(_nan, clean.state))
        got, expected = bench.run(lost, reverse=reverse), bench.fold(clean, reverse)
        bench.compare(got, expected, f"a state of NaN, reset before it is used, reverse={reverse}")
        bench.compare(
            got["gradient of state"],
            zero_tree(got["gradient of state"]),
            "gradient of a state that is reset",
            exact=True,
        )


@_law
def check_reverse(bench: Bench) -> None:
    """``reverse=True`` runs from the last valid step to the first; outputs stay in input order, padding at the end.

    It equals reversing each sequence, running forward, and reversing the outputs. Arguments are those of `check_cell`;
    raises AssertionError.

    >>> jrnn.testing.check_reverse(jrnn.elman(2))
    """
    for key in bench.last_draw():
        trial = bench.trial(key=key)
        bench.compare(bench.run(trial, reverse=True), bench.fold(trial, True), f"reverse, {_keyed(key)}")
    trial = trial._replace(key=None)
    lengths = np.asarray(trial.lengths)

    def turn(values: Any) -> Any:
        out = values.copy()
        for b, n in enumerate(lengths):
            out[:n, b] = values[:n, b][::-1]
        return out

    state_bar, ys_bar = trial.cotangents[:-1], trial.cotangents[-1]
    turned = trial._replace(
        xs=turn(trial.xs), mask=turn(trial.mask), resets=turn(trial.resets), cotangents=(*state_bar, turn(ys_bar))
    )
    got, expected = bench.run(trial, reverse=True), bench.run(turned)
    expected["ys"] = turn(expected["ys"])
    if expected["gradient of xs"] is not None:
        expected["gradient of xs"] = turn(expected["gradient of xs"])
    bench.compare(got, expected, "sequences turned round")


@_law
def check_chunks(bench: Bench) -> None:
    """Two chunks, where the second starts from the state of the first, equal one run, in gradients and randomness too.

    The law does not apply to a bidirectional layer, whose backward direction needs later steps. Arguments are those of
    `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_chunks(jrnn.elman(2))
    """
    if not bench.cell.causal:
        return
    cut = TIME // 2
    for key in bench.last_draw():
        for reverse in (False, True):
            whole = bench.trial(key=key)
            state_bar, ys_bar = whole.cotangents[:-1], whole.cotangents[-1]
            head = whole._replace(
                xs=whole.xs[:cut], mask=whole.mask[:cut], resets=whole.resets[:cut],
                lengths=np.minimum(whole.lengths, cut),
            )  # fmt: skip
            tail = whole._replace(
                xs=whole.xs[cut:], mask=whole.mask[cut:], resets=whole.resets[cut:],
                lengths=np.maximum(whole.lengths - cut, 0), start=np.int32(whole.start + cut),
            )  # fmt: skip
            pieces = ((head, ys_bar[:cut]), (tail, ys_bar[cut:]))
            (first, first_bar), (second, second_bar) = pieces[::-1] if reverse else pieces
            zero = tuple(map(np.zeros_like, state_bar))
            middle = bench.run(first._replace(cotangents=(*zero, first_bar)), reverse=reverse)["state"]
            b = bench.run(second._replace(state=middle, cotangents=(*state_bar, second_bar)), reverse=reverse)
            between = tuple(jax.tree.leaves(b["gradient of state"]))
            a = bench.run(first._replace(cotangents=(*between, first_bar)), reverse=reverse)
            order = (b, a) if reverse else (a, b)
            got = {
                "state": b["state"],
                "ys": np.concatenate([part["ys"] for part in order]),
                "gradient of params": add_trees(a["gradient of params"], b["gradient of params"]),
                "gradient of xs": None,
                "gradient of state": a["gradient of state"],
            }
            if a["gradient of xs"] is not None:
                got["gradient of xs"] = np.concatenate([part["gradient of xs"] for part in order])
            bench.compare(got, bench.run(whole, reverse=reverse), f"two chunks, {_keyed(key)}, reverse={reverse}")


@_law
def check_remat(bench: Bench) -> None:
    """``remat`` changes only the memory that is used, also if T is not a multiple of the chunk.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_remat(jrnn.elman(2))
    """
    *_, key = bench.draws()
    trial = bench.trial(key=key)
    for reverse, remat in ((False, 4), (True, 4)):
        got = bench.run(trial, reverse=reverse, remat=remat)
        bench.compare(got, bench.run(trial, reverse=reverse), f"remat={remat!r}, reverse={reverse}, {_keyed(key)}")


@_law
def check_backends(bench: Bench) -> None:
    """Every backend that can run the layer equals the plain scan, and so does a loop with ``unroll=3``.

    A backend that cannot run the layer raises ValueError, which does not break the law. Arguments are those of
    `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_backends(jrnn.elman(2))
    """
    *_, key = bench.draws()
    trial = bench.trial(key=key)
    expected = bench.run(trial, backend="reference")
    bench.compare(bench.run(trial, unroll=3), expected, f"backend=None, unroll=3, {_keyed(key)}")
    chosen, _ = choose_backend(bench.cell, trial.params, trial.xs)
    for name in SCHEDULES:
        if name in ("reference", chosen):
            continue
        try:
            got = bench.run(trial, backend=name)
        except ValueError as refusal:
            if not str(refusal).startswith("backend:"):
                raise
            continue
        bench.compare(got, expected, f"backend={name!r}, {_keyed(key)}")


@_law
def check_vmap(bench: Bench) -> None:
    """``vmap`` over sequences equals a batch axis, two batch axes equal one, and ``vmap`` over keys equals a loop.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_vmap(jrnn.elman(2))
    """
    trial = bench.trial()
    batched = bench.run(trial)
    bench.compare(call(Vmap(Run(bench.cell)), trial, jit=bench.jit), batched, "vmap over the batch")
    half = BATCH // 2

    def fold_axis(axis: int) -> Callable[[Any], Any]:
        return lambda a: a.reshape(*a.shape[:axis], 2, half, *a.shape[axis + 1 :])

    first, second = fold_axis(0), fold_axis(1)
    axes = {
        "xs": second(trial.xs), "state": jax.tree.map(first, trial.state), "lengths": first(trial.lengths),
        "mask": second(trial.mask), "resets": second(trial.resets),
        "cotangents": (*map(first, trial.cotangents[:-1]), second(trial.cotangents[-1])),
    }  # fmt: skip
    expected = {
        "state": jax.tree.map(first, batched["state"]),
        "ys": second(batched["ys"]),
        "gradient of params": batched["gradient of params"],
        "gradient of xs": None if batched["gradient of xs"] is None else second(batched["gradient of xs"]),
        "gradient of state": jax.tree.map(first, batched["gradient of state"]),
    }
    bench.compare(bench.run(trial._replace(**axes)), expected, "two batch axes")
    if not bench.may_draw:
        return
    keys = jax.random.split(jax.random.key(bench.seed), BATCH)
    got = call(Vmap(Run(bench.cell)), trial._replace(key=keys), jit=bench.jit)
    for b in (0, BATCH - 1):
        one = jax.tree.map(functools.partial(np.take, indices=b, axis=0), (trial.state, trial.cotangents[:-1]))
        ys_bar = trial.cotangents[-1][:, b]
        single = bench.run(
            trial._replace(
                xs=trial.xs[:, b],
                state=one[0],
                lengths=trial.lengths[b],
                mask=trial.mask[:, b],
                resets=trial.resets[:, b],
                key=keys[b],
                cotangents=(*one[1], ys_bar),
            )
        )
        bench.compare(got["ys"][:, b], single["ys"], "vmap over keys: ys")
        state = jax.tree.map(functools.partial(np.take, indices=b, axis=0), got["state"])
        bench.compare(state, single["state"], "vmap over keys: state")
        if single["gradient of xs"] is not None:
            bench.compare(got["gradient of xs"][:, b], single["gradient of xs"], "vmap over keys: gradient of xs")


@_law
def check_jit(bench: Bench) -> None:
    """A jitted run equals an eager run, in values and in every gradient.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_jit(jrnn.elman(2))
    """
    *_, key = bench.draws()
    trial = bench.trial(key=key)
    eager = call(Run(bench.cell), trial)
    bench.compare(call(Run(bench.cell), trial, jit=True), eager, f"jit, {_keyed(key)}")


@_law
def check_derivatives(bench: Bench) -> None:
    """Derivatives of a nonlinear loss are right, with NaN in padding: grad, jvp, grad of grad and jvp of grad.

    The gradient equals that of `fold`, and the jvp equals its product with a direction. The two second derivatives
    agree with each other. In float64, they also agree with finite differences of the gradients of `fold`. Arguments are
    those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_derivatives(jrnn.elman(2), dtype="float64")
    """
    *_, key = bench.draws()
    clean = bench.trial(key=key)
    valid, _ = clean.flags((BATCH,))
    point, rebuild = inexact((clean.params, clean.xs, clean.state))
    along = tuple(bench.normal(leaf.shape, leaf.dtype) for leaf in point)
    got = call(Second(Run(bench.cell)), _poisoned(clean, valid, bench.rng), along, jit=bench.jit)

    def gradient(by: float) -> tuple[Any, ...]:
        moved = [np.asarray(p + by * v, p.dtype) for p, v in zip(point, along, strict=True)]
        params, xs, state = rebuild(moved)
        there = clean._replace(params=params, xs=xs, state=state)
        out = inexact(tuple(bench.fold(there._replace(cotangents=None))[name] for name in ("state", "ys")))[0]
        slopes = tuple(c * np.cos(y) for c, y in zip(clean.cotangents, out, strict=True))
        result = bench.fold(there._replace(cotangents=slopes))
        return tuple(jax.tree.leaves([result[f"gradient of {name}"] for name in ("params", "xs", "state")]))

    expected = gradient(0.0)
    about = f"NaN in padding, {_keyed(key)}"
    bench.compare(got["gradient"], expected, f"grad, {about}", scale=3)
    slope = np.asarray(sum(np.sum(g * v).real for g, v in zip(expected, along, strict=True)), bench.dtype)
    bench.compare(got["jvp"], slope, f"jvp, {about}", scale=30)
    bench.compare(got["jvp of grad"], got["grad of grad"], f"jvp of grad against grad of grad, {about}", scale=30)
    if bench.dtype == np.float64:
        epsilon = 1e-5
        numerical = tuple((a - b) / (2 * epsilon) for a, b in zip(gradient(epsilon), gradient(-epsilon), strict=True))
        bench.compare(
            got["jvp of grad"], numerical, f"jvp of grad against differences, {about}", scale=1e-7 / bench.tolerance
        )


@_law
def check_state_dtype(bench: Bench) -> None:
    """The state keeps the structure, shapes and dtypes of ``initial_state``, and ``y`` has the dtype of ``xs``.

    With bfloat16 and float16 inputs, the state and all gradients of parameters stay float32. With bfloat16, the results
    are close to those in float32. A cell may refuse such inputs with an error. Arguments are those of `check_cell`;
    raises AssertionError.

    >>> jrnn.testing.check_state_dtype(jrnn.elman(2))
    """

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)

    trial = bench.trial()
    expected = shapes(trial.state)
    full = bench.run(trial)
    name = f"{bench.law}: {bench.cell!r}"
    if shapes(full["state"]) != expected:
        raise AssertionError(f"{name}: expected a final state {expected}, got {shapes(full['state'])}")
    if bench.cell.event_ndim == 0:
        return
    # Complex outputs have the precision of the state, and are not rounded to the dtype of 16-bit inputs.
    is_complex = np.iscomplexobj(full["ys"])
    wanted = np.result_type(bench.dtype, np.complex64) if is_complex else bench.dtype
    if full["ys"].dtype != wanted:
        raise AssertionError(f"{name}: expected outputs in {wanted}, got {full['ys'].dtype}")
    if bench.dtype != np.float32:
        return
    for low in (jnp.float16, jnp.bfloat16):
        output = wanted if is_complex else low
        cotangents = (*trial.cotangents[:-1], np.asarray(jnp.asarray(trial.cotangents[-1]).astype(output)))
        rounded = trial._replace(xs=np.asarray(jnp.asarray(trial.xs).astype(low)), cotangents=cotangents)
        try:
            got = jax.eval_shape(Run(bench.cell), rounded._replace(cotangents=None))
        except (TypeError, ValueError):
            continue  # a cell that does not take 16-bit inputs says so
        if shapes(got["state"]) != expected:
            raise AssertionError(f"{name}: expected a state {expected} for {low.__name__}, got {shapes(got['state'])}")
        if got["ys"].dtype != output:
            raise AssertionError(
                f"{name}: expected outputs in {np.dtype(output)} for {low.__name__} inputs, got {got['ys'].dtype}"
            )
        if low == jnp.float16:
            continue
        got = bench.run(rounded)
        if shapes(got["gradient of params"]) != shapes(full["gradient of params"]):
            raise AssertionError(f"{name}: expected gradients of parameters like them for {low.__name__}")
        near = {"state": got["state"], "ys": got["ys"].astype(wanted)}
        compare(near, {"state": full["state"], "ys": full["ys"]}, 0.1, f"{name}: {low.__name__} inputs")
        near, far = got["gradient of params"], full["gradient of params"]
        compare(near, far, 0.1, f"{name}: {low.__name__} inputs: gradient of params")


@_law
def check_compiles_once(bench: Bench) -> None:
    """A second call with an equal cell and other values is neither traced nor compiled again, eager or jitted.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_compiles_once(jrnn.elman(2))
    """
    *_, key = bench.draws()
    other_key = None if key is None else jax.random.key(bench.seed + 8)
    traces = []

    def traced(cell: Layer, trial: Trial) -> Any:
        traces.append(cell)
        return Run(cell)(trial)

    jitted = jax.jit(traced, static_argnums=0)
    first, second = (
        bench.trial(key=key, cotangents=None),
        bench.trial(key=other_key, cotangents=None, start=np.int32(9)),
    )
    jitted.trace(bench.cell, first)
    jitted.trace(copy.deepcopy(bench.cell), second)
    if len(traces) != 1:
        raise AssertionError(
            f"{bench.law}: {bench.cell!r}: expected one trace for two equal cells, got {len(traces)}; does it compare "
            "by value?"
        )
    Run(bench.cell)(first)
    # Only the compilations of this thread, since other threads may compile, too.
    here, compiled = threading.get_ident(), []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == here:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        Run(copy.deepcopy(bench.cell))(second)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if compiled:
        raise AssertionError(f"{bench.law}: {bench.cell!r}: a second eager call compiled {len(compiled)} programs")


@_law
def check_hashing(bench: Bench) -> None:
    """A layer is a frozen, hashable value that equals its copies and is not a pytree; its parameters are plain pytrees.

    Arguments are those of `check_cell`; raises AssertionError.

    >>> jrnn.testing.check_hashing(jrnn.elman(2))
    """
    cell, name = bench.cell, f"{bench.law}: {bench.cell!r}"
    if not dataclasses.is_dataclass(cell) or not type(cell).__dataclass_params__.frozen:
        raise AssertionError(f"{name}: expected a frozen dataclass")
    other = copy.deepcopy(cell)
    if cell != other or hash(cell) != hash(other):
        raise AssertionError(f"{name}: expected a copy to be equal and to hash equally; are all fields values?")
    if jax.tree.leaves(cell) != [cell]:
        raise AssertionError(f"{name}: expected no pytree, since a layer is static structure")
    key = jax.random.key(bench.seed)
    params, again = cell.init(key, bench.in_features), other.init(key, bench.in_features)
    compare(again, params, 0.0, f"{name}: init with one key, twice")

    def plain(tree: Any) -> bool:
        if isinstance(tree, dict):
            return all(isinstance(k, str) for k in tree) and all(map(plain, tree.values()))
        if isinstance(tree, tuple):
            return all(map(plain, tree))
        return isinstance(tree, jax.Array | np.ndarray)

    if not plain(params):
        raise AssertionError(
            f"{name}: expected parameters of nested dicts and tuples of arrays, got {describe(params)}"
        )
    for batch in ((), (2,), (2, 3)):
        for leaf in jax.tree.leaves(bench.initial(batch)):
            if leaf.shape[: len(batch)] != batch:
                raise AssertionError(f"{name}: expected states of shape {batch} + (...), got {leaf.shape}")
    ys = bench.run(bench.trial())["ys"]
    features = event_shape(cell.out_features(bench.in_features))
    if ys.shape[ys.ndim - len(features) :] != features:
        raise AssertionError(f"{name}: expected {features} features, as out_features says, got {ys.shape}")


LAWS: tuple[Callable[..., None], ...] = (
    check_hashing,
    check_draws,
    check_step_equals_unroll,
    check_padding,
    check_zero_length,
    check_resets,
    check_reverse,
    check_chunks,
    check_remat,
    check_backends,
    check_vmap,
    check_jit,
    check_derivatives,
    check_state_dtype,
    check_compiles_once,
)


def check_cell(
    cell: Layer,
    in_features: Any = 3,
    *,
    dtype: Any = "float32",
    seed: int = 0,
    jit: bool = False,
    params: Any = None,
    laws: tuple[Callable[..., None], ...] | None = None,
) -> None:
    """Checks a cell, a layer or a whole model against every law of the sequence contract.

    Args:
      cell: anything that `jrnn.unroll` runs.
      in_features: F; None for models that begin with `jrnn.embed`.
      dtype: "float32" or "float64", the dtype of parameters, inputs and states. In float64, results must agree to
        1e-11, and float64 is enabled only for the duration of the call.
      seed: the seed of parameters, data and keys.
      jit: whether to compile every program. This is slower, and the results are the same unless a compiler is wrong.
      params: the parameters to use; None for those of ``cell.init`` with noise added, so that nothing is zero.
      laws: the laws to check; None for all of `LAWS`.

    Raises:
      AssertionError: a law does not hold; the message names the law, the leaf that differs, and by how much.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Leaky(jrnn.Cell):
    ...     decay: float
    ...     def init(self, key, in_features):
    ...         return {}
    ...     def initial_state(self, params, batch_shape):
    ...         return jnp.zeros((*batch_shape, 2))
    ...     def step(self, params, state, x, key=None):
    ...         state = self.decay * state + x
    ...         return state, jnp.tanh(state)
    >>> jrnn.testing.check_cell(Leaky(0.5), in_features=2)
    """
    for law in LAWS if laws is None else laws:
        law(cell, in_features, dtype=dtype, seed=seed, jit=jit, params=params)
