"""Runs any step in parts, with the gradients of the weights of its matmuls taken out of the loop.

The parts of the step come from `jrnn.jaxprs.sites`. From the state ``s`` and the inputs ``p``, the loop computes the
products ``z_k = a_k(s, p, z_1, ..., z_{k-1}) W_k`` at its sites, and from these the new state.

The tangent of the loop is a loop too. With ``g_k`` the cotangent of ``z_k``, a site contributes::

    dz_k = da_k W_k + [a_k dW_k]            transposed:   g_k W_k^T  to a_k,   sum_t a_k^T g_k  to W_k

The bracket is one product for many steps, before their loop, since the run stores every ``a_k``. Its transpose, the
gradient of the weights, is therefore one product for many steps after their backward loop: nothing is accumulated
inside. A convolution with a kernel is such a product too, and all steps are one convolution over a batch of T*B.
Both modes and all higher derivatives follow, since the rule consists of ordinary JAX operations.

The tangent runs in chunks of steps, unless there are convolutions. Matmuls ``z_k`` are not stored but computed again
from ``a_k``, all steps of a chunk at once, and the cotangents ``g_k`` exist for one chunk at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jrnn._core.devices import knows_mesh
from jrnn._core.products import weigh
from jrnn.jaxprs.affine import default_precision
from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.flat import Op, Program, bind, contraction, evaluate, flatten, once, reading, typed
from jrnn.jaxprs.recipes import INVARIANT
from jrnn.jaxprs.sites import Sites, read
from jrnn.schedules.affine import choose_chunk, jvp_of
from jrnn.schedules.steps import Steps, checkpointed, chunked

__all__ = ["Parts", "jvp", "scan", "trace"]

ROWS = (512, 512)  # the rows of the largest product in a chunk of the derivative, at least and at most


@dataclass(frozen=True)
class Parts:
    """A step that is not a cell, split into the operations that leave the loop and those that stay in it."""

    form: Sites

    @property
    def rows(self) -> int | None:
        """The most rows that a product in the loop has; None if one is not of rows with weights, ``x @ w``."""
        ops = [self.form.loop[site.place] for site in self.form.sites]
        if not all(is_plain(self.form.program, op) for op in ops):
            return None
        return max(math.prod(self.form.program.form(op.ins[0]).shape[:-1]) for op in ops)

    def run(self, plan: None, consts: Any, carry: Any, xs: Any, steps: Steps) -> tuple[list[Any], list[Any]]:
        """The carry after the last step, and the outputs of all steps."""
        form = self.form
        env = dict(enumerate(consts))
        evaluate((op for op in form.program.ops if form.kinds[op.outs[0]] == INVARIANT), env)
        invariant = tuple(env[name] for name in form.invariant)

        def at(x: Any) -> dict[int, Any]:
            inside = env | dict(enumerate(jax.tree.leaves(x), form.consts + form.carry))
            outside(form.program, form.before, inside)
            return inside

        def before(x: Any) -> Any:
            inside = at(x)
            return tuple(inside[name] for name in form.inputs)

        def after(x: Any, emitted: Any) -> Any:
            inside = at(x) | dict(zip(form.emitted, emitted, strict=True))
            outside(form.program, form.after, inside)
            return [inside[out] if isinstance(out, int) else jnp.asarray(out.value) for out in form.outputs]

        def run(xs: Any, state: Any, steps: Steps) -> tuple[Any, Any]:
            plan = Plan(form, jax.tree.leaves(xs)[0].shape[0], steps.reverse, steps.unroll)
            last, emitted, _ = loop(plan, Inputs(invariant, jax.vmap(before)(xs), state))
            return last, jax.vmap(after)(xs, emitted)

        last, ys = checkpointed(run, xs, tuple(carry), steps)
        outs = typed(form.program, [*last, *ys])
        return outs[: form.carry], outs[form.carry :]


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any, length: Any, reverse: bool, unroll: int
) -> tuple[Any, Any]:
    """`jax.lax.scan`, run in parts if the body has matmuls of its state with weights."""
    leaves, tree = jax.tree.flatten(init)
    inputs = jax.tree.leaves(xs)
    if not inputs or not isinstance(inputs[0].shape[0], int) or not inputs[0].shape[0]:
        return lax.scan(f, init, xs, length, reverse, unroll)
    try:
        x = jax.tree.map(of_one_step, xs)
        program, ys, consts = trace(f, init, x, xs)
        parts = Parts(read(program, len(consts), len(leaves)))
    except Refusal:
        return lax.scan(f, init, xs, length, reverse, unroll)
    last, outs = parts.run(None, consts, leaves, xs, Steps(reverse=reverse, unroll=unroll))
    return jax.tree.unflatten(tree, last), jax.tree.unflatten(ys, outs)


def of_one_step(a: Any) -> Any:
    """The shape and dtype of one step's input, from the input of all steps."""
    aval = jax.typeof(a)
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype, weak_type=weak)


def trace(f: Callable[[Any, Any], Any], init: Any, x: Any, operands: Any = ()) -> tuple[Program, Any, list[Any]]:
    """A step ``(carry, x) -> (carry, y)`` as a program, the tree of its outputs, and the values of its constants.

    Args:
      f: the step.
      init, x: its arguments, as arrays or as shapes.
      operands: other arrays that the run will use.

    Raises:
      Refusal: the step cannot be run in parts, with the reason.
    """
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(init)):
        raise Refusal("its carry has leaves that are not arrays")
    if any(map(knows_mesh, jax.tree.leaves((init, x, operands)))):
        raise Refusal("its operands lie on a mesh")
    try:
        closed, out = jax.make_jaxpr(f, return_shape=True)(init, x)
    except Exception as error:  # running the step unchanged raises the same error
        raise Refusal(f"it cannot be traced ({type(error).__name__})") from error
    if closed.effects:
        raise Refusal("it has effects, which stay in order")
    trees: list[Any] = [
        jax.tree.structure(init),
        jax.tree.structure(out[0] if isinstance(out, tuple) and out else None),
    ]
    if not (isinstance(out, tuple) and len(out) == 2) or trees[0] != trees[1]:
        raise Refusal("it does not return a carry like the one it is given, and an output")
    with reading():
        program, consts = flatten(closed)
        program = once(program)
    if any(map(knows_mesh, consts)):
        raise Refusal("its constants lie on a mesh")
    leaves = jax.tree.leaves(init)
    old = program.forms[len(consts) : len(consts) + len(leaves)]
    new = [program.form(result) for result in program.results[: len(leaves)]]
    if any(a[:2] != b[:2] for a, b in zip(old, new, strict=True)):
        raise Refusal("its new carry has other shapes or dtypes than the one it is given")
    return program, jax.tree.structure(out[1]), consts


# --- the loop and its derivative ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The static part of a run. ``keep`` says whether the run returns residuals for a derivative."""

    form: Sites
    time: int
    reverse: bool
    unroll: int
    keep: bool = False


class Inputs(NamedTuple):
    """The operands that the loop has derivatives with respect to, each a tuple; ``inputs`` are ``(T, ...)``."""

    invariant: Any
    inputs: Any
    state: Any


class Kept(NamedTuple):
    """The residuals of every step: the state before it, and the vector and the product at each site.

    A vector is None if it is a leaf of that state, and a product if it is a matmul, which is computed again.
    """

    state: Any
    vectors: Any
    products: Any


def step(plan: Plan, invariant: Any, inputs: Any, state: Any, site: Any) -> tuple[Any, Any]:
    """One step: the new state and the emitted values. ``site(k, vector, weights, op)`` is the product at site k."""
    form = plan.form
    env = dict(zip(form.invariant, invariant, strict=True)) | dict(zip(form.inputs, inputs, strict=True))
    env.update(enumerate(state, form.consts))
    sites = {s.place: (k, s) for k, s in enumerate(form.sites)}
    for place, op in enumerate(form.loop):
        if place in sites:
            k, s = sites[place]
            vector, weights = s.operands(op)
            env[op.outs[0]] = site(k, env[vector], env[weights] if isinstance(weights, int) else weights.value, op)
        else:
            evaluate((op,), env)
    new = tuple(
        env[r] if isinstance(r, int) else jnp.asarray(r.value, old.dtype)
        for r, old in zip(form.new_carry, state, strict=True)
    )
    return new, tuple(env[name] for name in form.emitted)


def product(form: Sites, k: int, vector: Any, weights: Any, op: Any) -> Any:
    pair = (vector, weights) if form.sites[k].weights == 1 else (weights, vector)
    return bind(op.primitive, op.params, pair)[0]


def outside(program: Program, ops: Iterable[Op], env: dict[int, Any]) -> None:
    """Runs operations for all steps at once. The transpose of matmuls with respect to the weights is fast (`weigh`)."""
    for op in ops:
        if is_plain(program, op):
            x, w = (env[a] if isinstance(a, int) else a.value for a in op.ins)
            env[op.outs[0]] = weigh(x, w)
        else:
            evaluate((op,), env)


def is_plain(program: Program, op: Op) -> bool:
    """Whether an operation is ``x @ w``, over the last axis of x and the first of the two axes of w."""
    numbers = contraction(program, op)
    if numbers is None:
        return False
    x, w, out = (program.form(a) for a in (*op.ins, *op.outs))
    (over_x, over_w), batched = numbers
    plain = len(w.shape) == 2 and tuple(over_x) == (len(x.shape) - 1,) and tuple(over_w) == (0,) and not any(batched)
    return plain and x.dtype == w.dtype == out.dtype and default_precision(op.params.get("precision"))


def leaf_at(form: Sites, k: int) -> int | None:
    """The index of the leaf of the state that is the vector at site k, if it is one."""
    site = form.sites[k]
    at = site.operands(form.loop[site.place])[0] - form.consts
    return at if 0 <= at < form.carry else None


def kept_of(form: Sites, vectors: Any, products: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The vectors and the products that are residuals, with None for all others."""
    ops = [form.loop[site.place] for site in form.sites]
    return (
        tuple(v if leaf_at(form, k) is None else None for k, v in enumerate(vectors)),
        tuple(None if contraction(form.program, op) else z for op, z in zip(ops, products, strict=True)),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def loop(plan: Plan, given: Inputs) -> tuple[Any, Any, Any]:
    """The state after the last step, the emitted values, and the residuals, which are None without ``plan.keep``."""
    count = len(plan.form.sites)

    def body(state: Any, inputs: Any) -> tuple[Any, Any]:
        vectors: list[Any] = [None] * count
        products: list[Any] = [None] * count

        def site(k: int, vector: Any, weights: Any, op: Any) -> Any:
            vectors[k], products[k] = vector, product(plan.form, k, vector, weights, op)
            return products[k]

        new, emitted = step(plan, given.invariant, inputs, state, site)
        return new, (emitted, Kept(state, *kept_of(plan.form, vectors, products)) if plan.keep else None)

    last, (emitted, kept) = lax.scan(body, given.state, given.inputs, plan.time, plan.reverse, plan.unroll)
    return last, emitted, kept


@functools.partial(loop.defjvp, symbolic_zeros=True)
def _loop_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (given,) = primals
    last, emitted, kept = loop(replace(plan, keep=True), given)
    d = jax.tree.map(lambda t: None if _still(t) else t, tangents[0], is_leaf=_still)
    out = (last, emitted, kept if plan.keep else None)
    moved = tangent(plan, given, kept, d)
    return out, jax.tree.map(_whole, out, (*moved[:2], moved[2] if plan.keep else None))


def tangent(plan: Plan, given: Inputs, kept: Kept, d: Inputs) -> tuple[Any, Any, Kept]:
    """The tangents of the results of `loop`, for the tangents ``d`` of its inputs. A zero leaf of ``d`` is None.

    The tangent of a result that is not a float is None.
    """
    form = plan.form
    # The bracket of a site covers the tangent of its weights there. Inside the loop, only their other uses need it.
    elsewhere = form.shared()
    dinvariant = [t if name in elsewhere else None for name, t in zip(form.invariant, d.invariant, strict=True)]
    moves = dict(zip(form.invariant, d.invariant, strict=True))
    weights = dict(zip(form.invariant, given.invariant, strict=True))
    dstate = tuple(_dense(s, t) for s, t in zip(given.state, d.state, strict=True))

    def at_all_steps(k: int, vectors: Any, w: Any) -> Any:
        """The products of the vectors at site k."""
        op = form.loop[form.sites[k].place]
        if form.sites[k].weights == 1 and is_plain(form.program, op):
            return weigh(vectors, w)
        return jax.vmap(functools.partial(product, form, k, weights=w, op=op))(vectors)

    def body(dstate: Any, inputs: Any) -> tuple[Any, Any]:
        # Checkpointed, so that the transposed loop recomputes the gates instead of reading them from memory.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def moved(dstate: Any, inputs: Any) -> Any:
            p, dp, before, products, brackets = inputs

            def at(invariant: Any, p: Any, state: Any, brackets: Any, here: Any) -> Any:
                vectors: list[Any] = [None] * len(products)
                made: list[Any] = [None] * len(products)

                def site(k: int, vector: Any, weights: Any, op: Any) -> Any:
                    vectors[k] = vector
                    made[k] = _site(functools.partial(product, form, k, op=op))(
                        vector, weights, products[k], brackets[k], here
                    )
                    return made[k]

                new, emitted = step(plan, invariant, p, state, site)
                return _floats((new, emitted, tuple(vectors), tuple(made)))

            zeros = jax.tree.map(jnp.zeros_like, brackets)
            here = jnp.zeros(())
            primals = (tuple(given.invariant), p, before, zeros, here)
            return jvp_of(at, primals, (tuple(dinvariant), dp, _floats(dstate), brackets, here))[1]

        dnew, demitted, dvectors, dmade = moved(dstate, inputs)
        return dnew, (demitted, Kept(dstate, *kept_of(form, dvectors, dmade)) if plan.keep else None)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def segment(dstate: Any, steps: Any) -> Any:
        p, dp, kept = steps
        products, brackets = [], []
        for k, site in enumerate(form.sites):
            at, w = leaf_at(form, k), site.operands(form.loop[site.place])[1]
            vectors = kept.vectors[k] if at is None else kept.state[at]
            again = kept.products[k] is None
            value = weights[w] if isinstance(w, int) else w.value
            products.append(at_all_steps(k, vectors, value) if again else kept.products[k])
            brackets.append(None if moves.get(w) is None else at_all_steps(k, vectors, moves[w]))
        steps = (p, dp, kept.state, tuple(products), tuple(brackets))
        return lax.scan(body, dstate, steps, None, plan.reverse, plan.unroll)

    steps = (given.inputs, tuple(d.inputs), kept)
    last, (emitted, dkept) = chunked(segment, dstate, steps, plan.time, chunk_of(form, plan.time), plan.reverse)
    return last, emitted, dkept


def chunk_of(form: Sites, time: int) -> int:
    """The number of steps in a chunk of the derivative: enough rows for fast matmuls, or all steps of a convolution."""
    ops = [form.loop[site.place] for site in form.sites]
    if any(contraction(form.program, op) is None for op in ops):
        return time
    shapes = [form.program.forms[op.outs[0]].shape for op in ops]
    return choose_chunk(time, max(1, *(math.prod(shape[:-1]) for shape in shapes)), 1, ROWS)


def _site(multiply: Any) -> Any:
    """A site with its product ``made`` given. Its tangent is ``da W`` plus the tangent of the bracket.

    This rule is meant for the jvp in `tangent` alone. There ``here`` always has a tangent, so that JAX applies the rule
    even if nothing else has one: a derivative of higher order then differentiates the result of the rule.
    """

    @jax.custom_jvp
    def site(vector: Any, weights: Any, made: Any, bracket: Any, here: Any) -> Any:
        return made

    @site.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        dz = multiply(tangents[0], weights=primals[1])
        return primals[2], dz if primals[3] is None else dz + tangents[3]

    return site


def jvp(function: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`jax.jvp` for a rule with symbolic zeros, of a function whose operands and results may be integers."""
    d = jax.tree.map(lambda t: None if _still(t) else t, tangents, is_leaf=_still)
    out, dout = jvp_of(function, primals, d)
    return out, jax.tree.map(_whole, out, dout)


# --- leaves without a tangent ------------------------------------------------------------------------------------


def _is_float(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.inexact)


def _still(t: Any) -> bool:
    return isinstance(t, SymbolicZero) or (hasattr(t, "dtype") and t.dtype == jax.dtypes.float0)


def _floats(tree: Any) -> Any:
    """The tree with None in place of every leaf that is not a float."""
    return jax.tree.map(lambda a: a if _is_float(a) else None, tree)


def _dense(primal: Any, t: Any) -> Any:
    """A tangent, as zeros if it is None; None for a primal that is not a float."""
    return None if not _is_float(primal) else jnp.zeros_like(primal) if t is None else t


def _whole(out: Any, t: Any) -> Any:
    """A tangent of the type that JAX expects, for a result that may not be a float."""
    return np.zeros(jnp.shape(out), jax.dtypes.float0) if not _is_float(out) else t
