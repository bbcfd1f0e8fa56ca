"""What may be assumed of a cell's gates: what it promises, or else what can be read from the traced gates."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jrnn._check import same_form

# Operations that act on each element by itself, in whatever order the axes of their operands stand.
# fmt: off
_ELEMENTWISE = frozenset((
    "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
    "neg", "nextafter", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
))
# fmt: on
# Operations that only call another program, by the name of the parameter that holds it.
CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}

# Sizes under which the gates are traced, so that an axis is known by its size.
_BATCH, _HIDDEN = 3, 5


def called(eqn: Any) -> tuple[Any, Any] | None:
    """The program that an operation does nothing but call, and its constants; None if it does something itself."""
    inner = eqn.params.get(CALLS.get(eqn.primitive.name))
    return None if inner is None else (getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))


def elementwise(cell: Any, theta: Any, state: Any) -> bool:
    """Whether unit j of each new field depends on unit j of u, v and state alone, and theta is vectors."""
    if cell.elementwise is False or any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(theta)):
        return False
    forms = _forms(theta, state)
    return _turns(cell, *forms) and (cell.elementwise is True or _read(cell, *forms)[0])


def sums(cell: Any, theta: Any, state: Any) -> tuple[bool, ...]:
    """For each gate, whether it uses only ``u + v``."""
    if cell.additive is not None or any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(theta)):
        return tuple(cell.sums)
    return _read(cell, *_forms(theta, state))[1]


def _forms(theta: Any, state: Any) -> Any:
    leaves, tree = jax.tree.flatten((theta, state))
    return tree, tuple(str(leaf.dtype) for leaf in leaves), len(jax.tree.leaves(theta))


def _arguments(cell: Any, tree: Any, dtypes: tuple[str, ...], count: int, turned: bool) -> Any:
    """``(u, v, theta, state)`` by shape, features last or ``turned``: units first, as `layout.Units` gives them."""
    vector, matrix = ((_HIDDEN, 1), (_HIDDEN, _BATCH)) if turned else ((_HIDDEN,), (_BATCH, _HIDDEN))
    shapes = [vector if i < count else matrix for i in range(len(dtypes))]
    theta, state = tree.unflatten([jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)])
    part = (jax.ShapeDtypeStruct(matrix, dtypes[-1]),) * len(cell.sums)
    return part, part, theta, state


@functools.lru_cache(maxsize=256)
def _turns(cell: Any, tree: Any, dtypes: tuple[str, ...], count: int) -> bool:
    """Whether the gates can be called with units first: not where they name an axis, or write out a shape."""
    *parts, state = _arguments(cell, tree, dtypes, count, turned=True)
    try:
        new = jax.eval_shape(lambda u, v, theta, state: cell.combine(theta, u, v, state, None), *parts, state)
    except Exception:  # then they stay as they are, and the run itself says what is wrong, if anything is
        return False
    return same_form(new, state)


@functools.lru_cache(maxsize=256)
def _read(cell: Any, tree: Any, dtypes: tuple[str, ...], count: int) -> tuple[bool, tuple[bool, ...]]:
    gates = len(cell.sums)
    arguments = _arguments(cell, tree, dtypes, count, turned=False)
    try:
        traced = jax.make_jaxpr(lambda u, v, theta, state: cell.combine(theta, u, v, state, None))(*arguments)
    except Exception:  # gates that need their real sizes
        return False, tuple(cell.sums)
    jaxpr = traced.jaxpr
    us, vs = jaxpr.invars[:gates], jaxpr.invars[gates : 2 * gates]
    return _is_elementwise(jaxpr), tuple(_is_summed(jaxpr, u, v) for u, v in zip(us, vs, strict=True))


def _is_elementwise(jaxpr: Any) -> bool:
    if any(var.aval.ndim for var in jaxpr.constvars):
        return False
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if (program := called(eqn)) is not None:
            # Of custom_vjp, the derivative could be anything.
            if name == "custom_vjp_call" or not _is_elementwise(program[0]):
                return False
        elif name == "broadcast_in_dim":
            # Of a scalar, or of features to sequences.
            (shape, dims), ndim = (eqn.params[n] for n in ("shape", "broadcast_dimensions")), eqn.invars[0].aval.ndim
            if dims != tuple(range(len(shape) - ndim, len(shape))) or (ndim and shape[-1] != _HIDDEN):
                return False
        elif name == "reshape":
            # As numpy's rules add axes in front: (H) to (1, H).
            old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            if new[len(new) - len(old) :] != old or (old and old[-1] != _HIDDEN):
                return False
        elif name not in _ELEMENTWISE:
            return False
    return True


def _is_summed(jaxpr: Any, u: Any, v: Any) -> bool:
    """Whether u and v are each used once, as the two terms of one sum."""
    users = [eqn for eqn in jaxpr.eqns if any(atom is u or atom is v for atom in eqn.invars)]
    if any(atom is u or atom is v for atom in jaxpr.outvars):
        return False
    if len(users) != 1 or users[0].primitive.name != "add":
        return False
    return all(any(atom is part for atom in users[0].invars) for part in (u, v))
