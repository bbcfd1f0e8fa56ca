"""The walker: turns a traced function into one list of operations, a value that is hashed and compared by content.

Jaxprs nest: `jit`, `checkpoint` and similar operations call other jaxprs. Here such calls are inlined, so that a reader
sees matmuls and gates in one list. Variables are numbered, so that two traces of the same function are equal. A
function with a derivative of its own (``jax.custom_jvp``) stays one operation that includes this derivative, unless the
reader needs only its values.

No other module looks into a jaxpr. If a version of JAX has jaxprs or parameters of operations that are unknown here,
the step is refused, as any step that cannot be read, and there is a warning.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jrnn.jaxprs.primitives import primitive

__all__ = [
    "Const",
    "Op",
    "Program",
    "Refusal",
    "Shaped",
    "Unreadable",
    "bind",
    "broadcast",
    "calls",
    "contraction",
    "evaluate",
    "flatten",
    "mappable",
    "once",
    "run",
]
__all__ += ["reading", "run_elementwise", "typed"]


class Refusal(Exception):
    """The reason why a step is not read."""


class Unreadable(Refusal):
    """A jaxpr, or an operation in it, is unknown to this version of jrnn."""


class Shaped(tuple):
    """``(shape, dtype, weak_type)`` of a value."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self[0]

    @property
    def dtype(self) -> Any:
        return self[1]

    @property
    def weak(self) -> bool:
        return self[2]


@dataclass(frozen=True, eq=False)
class Const:
    """A literal operand: a scalar in the program itself."""

    value: Any
    form: Shaped

    @functools.cached_property
    def key(self) -> Any:
        return (str(self.form.dtype), self.form.shape, np.asarray(self.value).tobytes())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Const) and self.key == other.key


@dataclass(frozen=True)
class Op:
    """One operation. Its operands are numbers of variables, or constants.

    ``inner`` and ``derivative`` are set for an elementwise function with a derivative of its own. ``inner`` is its
    program, and ``derivative`` the program ``(primals, tangents) -> (results, their tangents)``. If the derivative
    calls the function again, the derivative of that call is `ITSELF`. ``effects`` says whether there are side effects.
    """

    primitive: Any
    params: dict[str, Any]
    ins: tuple[int | Const, ...]
    outs: tuple[int, ...]
    inner: Program | None = None
    derivative: Any = None
    effects: bool = False

    @property
    def name(self) -> str:
        return self.primitive.name

    @functools.cached_property
    def mappable(self) -> bool:
        """Whether the operation, and every operation in its inner programs, can run for all steps at once."""
        if not primitive(self.name).mappable:
            return False
        return all(primitive(eqn.primitive.name).mappable for eqn in _equations(self.params))

    @functools.cached_property
    def body(self) -> tuple[Program, list[Any]]:
        """For a loop, the program of its body with all calls inlined, and the values of its constants."""
        return flatten(self.params["jaxpr"], opened=True)

    @functools.cached_property
    def branches(self) -> list[tuple[Program, list[Any]]]:
        """For a condition, the programs of its branches with all calls inlined, each with its constants."""
        return [flatten(branch, opened=True) for branch in self.params["branches"]]

    @functools.cached_property
    def signature(self) -> Any:
        """A value that identifies the operation apart from its operands: equal for equal operations."""
        if self.derivative is not None:
            return (self.name, self.inner, self.derivative)
        return (self.name, *_frozen(self.params))

    @property
    def key(self) -> Any:
        return (self.signature, tuple(i if isinstance(i, int) else i.key for i in self.ins), self.outs)


@dataclass(frozen=True, eq=False)
class Program:
    """Operations on numbered variables, of which the first ``inputs`` are given.

    ``forms`` has the shape and dtype of each variable; ``results`` are variables or constants.
    """

    inputs: int
    ops: tuple[Op, ...]
    results: tuple[int | Const, ...]
    forms: tuple[Shaped, ...] = field(repr=False)

    @functools.cached_property
    def key(self) -> Any:
        results = tuple(r if isinstance(r, int) else r.key for r in self.results)
        return (self.inputs, tuple(op.key for op in self.ops), results, self.forms)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, Program) and hash(self) == hash(other) and self.key == other.key)

    @functools.cached_property
    def elementwise(self) -> bool:
        """Whether each element of the results depends only on the elements at the same position, up to broadcasting."""
        return all(is_elementwise(op) for op in self.ops)

    def form(self, atom: int | Const) -> Shaped:
        return self.forms[atom] if isinstance(atom, int) else atom.form


def once(program: Program) -> Program:
    """The program in which an operation that occurs twice, with the same operands, is computed once."""
    earlier: dict[int, int] = {}
    made: dict[Any, tuple[int, ...]] = {}
    ops = []
    new = lambda atoms: tuple(earlier.get(a, a) if isinstance(a, int) else a for a in atoms)
    for op in program.ops:
        ins = new(op.ins)
        outs = op.outs if op.effects else made.setdefault((op.signature, ins), op.outs)
        if outs == op.outs:
            ops.append(op if ins == op.ins else replace(op, ins=ins))
        earlier.update(zip(op.outs, outs, strict=True))
    return Program(program.inputs, tuple(ops), new(program.results), program.forms)


RANDOM = ("random_bits", "random_fold_in", "random_split")


def mappable(program: Program, op: Op) -> bool:
    """Whether an operation of a program can run for all steps at once, with the same result.

    Random numbers can if they are drawn from threefry keys. Other generators give different numbers under `jax.vmap`.
    """
    if op.name in RANDOM:
        return str(program.form(op.ins[0]).dtype) == "key<fry>"
    return op.mappable


def contraction(program: Program, op: Op) -> Any:
    """The dimension numbers of a matmul, be it JAX's or jrnn's own (`jrnn._core.products`); None if it is none."""
    if op.name == "weigh":
        return ((len(program.form(op.ins[0]).shape) - 1,), (0,)), ((), ())
    return op.params["dimension_numbers"] if op.name == "dot_general" else None


def is_elementwise(op: Op) -> bool:
    if op.name == "custom_jvp_call":
        return op.derivative is not None
    # Only of scalars: broadcasting any other array depends on the axis.
    if op.name == "broadcast_in_dim":
        return not op.params["broadcast_dimensions"]
    return primitive(op.name).elementwise


# --- from a jaxpr ------------------------------------------------------------------------------------------------


ITSELF = "itself"
DEEPEST = 3  # the largest nesting depth of functions with a derivative of their own


def flatten(closed: Any, *, opened: bool = False) -> tuple[Program, list[Any]]:
    """The program of a closed jaxpr, and the values of its constants, which are the first inputs of the program.

    Args:
      closed: the result of `jax.make_jaxpr`.
      opened: also inline functions that have their own derivative or batching rule, for a reader that needs only
        their values.

    Raises:
      Unreadable: the jaxpr lacks attributes that are expected here.
    """
    try:
        consts = list(closed.consts)
        return _flatten(closed.jaxpr, consts, opened=opened), consts
    except _UNKNOWN as error:
        raise _unreadable(error) from error


# The errors from accessing something that does not exist.
_UNKNOWN = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def _unreadable(error: Exception) -> Unreadable:
    reason = f"{type(error).__name__}: {error}"
    return Unreadable(f"jrnn does not know the programs of JAX {jax.__version__} well enough to read it ({reason})")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """A context for reading a step that can also run unchanged: an unknown program is a warning and a `Refusal`."""
    try:
        yield
    except (Unreadable, *_UNKNOWN) as error:
        found = error if isinstance(error, Unreadable) else _unreadable(error)
        warnings.warn(
            f"a step is run as jax.lax.scan runs it, not faster: {found}; a newer jrnn may know them, and results are "
            "not affected",
            RuntimeWarning,
            stacklevel=3,
        )
        raise found from error


def _flatten(
    jaxpr: Any, consts: list[Any], within: tuple[Program | None, ...] = (), *, opened: bool = False
) -> Program:
    """The program of a jaxpr. ``consts`` are the values of its constants; those of the jaxprs it calls are appended.

    ``within`` has an entry for each enclosing function with a derivative of its own, the innermost last. The entry is
    the program of the function if the jaxpr is its derivative, and None if the jaxpr is the function itself.
    """
    forms: list[Shaped] = []
    ops: list[Op] = []
    env: dict[Any, int | Const] = {}
    more: list[tuple[Any, int]] = []  # the constants of called jaxprs, and their variables

    def number(aval: Any) -> int:
        forms.append(_form(aval))
        return len(forms) - 1

    def read(atom: Any) -> int | Const:
        return _const(atom) if hasattr(atom, "val") else env[atom]  # only literals have a val

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            ins = tuple(map(read, eqn.invars))
            row = primitive(eqn.primitive.name)
            inner = eqn.params.get(row.calls) if row.transparent or opened else None
            if inner is not None:
                called, own = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
                for var, value in zip(called.constvars, own, strict=True):
                    env[var] = number(var.aval)
                    more.append((value, env[var]))  # type: ignore[arg-type]
                # Operands that the called program does not take (residuals of its derivative) come first.
                env.update(zip(called.invars, ins[len(ins) - len(called.invars) :], strict=True))
                walk(called)
                found = [read(atom) for atom in called.outvars]
                env.update(zip(eqn.outvars, found, strict=True))
                continue
            outs = tuple(number(var.aval) for var in eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
            program, derivative = (None, None) if opened else _own_derivative(eqn, within)
            ops.append(Op(eqn.primitive, dict(eqn.params), ins, outs, program, derivative, bool(eqn.effects)))

    for var in [*jaxpr.constvars, *jaxpr.invars]:
        env[var] = number(var.aval)
    inputs = len(forms)
    walk(jaxpr)
    results = tuple(map(read, jaxpr.outvars))
    if not more:
        return Program(inputs, tuple(ops), results, tuple(forms))
    # The constants of called jaxprs are inputs too, after the jaxpr's own constants.
    first = len(jaxpr.constvars)
    consts.extend(value for value, _ in more)
    order = [*range(first), *(at for _, at in more), *range(first, inputs)]
    inside = {at for _, at in more}
    order += [at for at in range(inputs, len(forms)) if at not in inside]
    place = {old: new for new, old in enumerate(order)}

    def moved(atoms: Iterable[int | Const]) -> tuple[int | Const, ...]:
        return tuple(place[a] if isinstance(a, int) else a for a in atoms)

    def renamed(op: Op) -> Op:
        return replace(op, ins=moved(op.ins), outs=moved(op.outs))  # type: ignore[arg-type]

    return Program(inputs + len(more), tuple(map(renamed, ops)), moved(results), tuple(forms[i] for i in order))


def _own_derivative(eqn: Any, within: tuple[Program | None, ...]) -> tuple[Program | None, Any]:
    """The programs of a ``jax.custom_jvp`` function and of its derivative, if both are elementwise."""
    if len(within) == DEEPEST:  # derivatives may call such functions recursively, without end
        return None, None
    if eqn.primitive.name != "custom_jvp_call" or eqn.params["call_jaxpr"].consts:
        return None, None
    if not all(np.issubdtype(var.aval.dtype, np.floating) for var in eqn.invars):
        return None, None
    inner = _flatten(eqn.params["call_jaxpr"].jaxpr, [], (*within, None))
    if within and inner == within[-1]:
        return inner, ITSELF
    derivative = _derivative(eqn, inner, within) if inner.elementwise else None
    return (inner, derivative) if derivative is not None else (None, None)


def _derivative(eqn: Any, inner: Program, within: tuple[Program | None, ...]) -> Program | None:
    forms = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]

    def tangents(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        return jax.jvp(lambda *args: bind(eqn.primitive, eqn.params, args), primals, tangents)

    traced = jax.make_jaxpr(tangents)(forms, forms)
    consts: list[Any] = list(traced.consts)
    derivative = _flatten(traced.jaxpr, consts, (*within, inner))
    return derivative if derivative.elementwise and not consts else None


def _const(atom: Any) -> Const:
    form = _form(atom.aval)
    try:
        return Const(np.asarray(atom.val, form.dtype), form)
    except TypeError:  # a dtype that only JAX has
        return Const(atom.val, form)


def _form(aval: Any) -> Shaped:
    if not hasattr(aval, "shape"):
        return Shaped(((), aval, False))
    return Shaped((tuple(aval.shape), aval.dtype, bool(getattr(aval, "weak_type", False))))


def _frozen(value: Any) -> Any:
    """Parameters as a hashable value. An object that cannot be compared by value is equal only to itself."""
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_frozen, value))
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        return (_flatten(value.jaxpr, list(value.consts)), tuple(_Same(c) for c in value.consts))
    if hasattr(value, "eqns") and hasattr(value, "invars"):
        return _flatten(value, [])
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if callable(value) and not isinstance(value, type):
        return _Same(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


def calls(closed: Any, name: str) -> bool:
    """Whether a traced program, or one inside it, calls the jitted function of the given name."""
    return any(eqn.params.get("name") == name for eqn in _equations(closed))


def _equations(value: Any) -> Iterator[Any]:
    """The equations of a jaxpr, or of all jaxprs in a container, and of those that they call."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _equations(item)
        return
    for eqn in getattr(getattr(value, "jaxpr", value), "eqns", ()):
        yield eqn
        yield from _equations(eqn.params)


class _Same:
    """A wrapper that compares by identity. It keeps the object alive, so that its address is not reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.value is other.value


# --- running -----------------------------------------------------------------------------------------------------


def bind(primitive: Any, params: dict[str, Any], args: Any) -> tuple[Any, ...]:
    """Applies a primitive. The call is traced, differentiated or run like any other in JAX."""
    out = primitive.bind(*args, **primitive.get_bind_params(params))
    return tuple(out) if primitive.multiple_results else (out,)


def run(program: Program, args: Iterable[Any], apply: Callable[[Op, list[Any]], Iterable[Any]]) -> list[Any]:
    """The results of a program, each operation of which is run by ``apply(op, values)``."""
    env: dict[int, Any] = dict(enumerate(args))
    for op in program.ops:
        values = [env[a] if isinstance(a, int) else a.value for a in op.ins]
        env.update(zip(op.outs, apply(op, values), strict=True))
    return [env[r] if isinstance(r, int) else r.value for r in program.results]


def evaluate(ops: Iterable[Op], env: dict[int, Any]) -> None:
    """Runs operations in order on the values of variables in ``env``, and adds their results to it."""
    for op in ops:
        args = [env[a] if isinstance(a, int) else a.value for a in op.ins]
        env.update(zip(op.outs, bind(op.primitive, op.params, args), strict=True))


def typed(program: Program, results: Iterable[Any]) -> list[Any]:
    """The results of a program, with the weak types of the function that it was traced from."""
    out = []
    for value, result in zip(results, program.results, strict=True):
        form = program.form(result)
        if jax.typeof(value).weak_type != form.weak:
            convert = jax.lax.convert_element_type_p
            value = convert.bind(value, new_dtype=form.dtype, weak_type=form.weak, sharding=None)
        out.append(value)
    return out


def run_elementwise(program: Program, *args: Any, itself: Any = None) -> list[Any]:
    """Runs an elementwise program on arrays of any shapes that broadcast against each other."""
    return run(program, args, lambda op, values: apply_elementwise(op, values, itself))


def apply_elementwise(op: Op, args: Sequence[Any], itself: Any = None) -> Sequence[Any]:
    """One elementwise operation on arrays of any shapes that broadcast against each other."""
    if op.name == "broadcast_in_dim":
        return (args[0],)
    if op.derivative is not None:
        return itself(*args) if op.derivative is ITSELF else _with_derivative(op.inner, op.derivative)(*args)
    shape = np.broadcast_shapes(*map(np.shape, args))
    return bind(op.primitive, op.params, [broadcast(a, shape) for a in args])


def broadcast(a: Any, shape: tuple[int, ...]) -> Any:
    """An array broadcast to a shape, with missing axes added in front. Explicit, so that ranks are not promoted."""
    own = np.shape(a)
    if own == shape:
        return a
    return jax.lax.broadcast_in_dim(a, shape, tuple(range(len(shape) - len(own), len(shape))))


def _with_derivative(inner: Any, derivative: Program) -> Any:
    """The function that runs a program, with its derivative given by another program."""

    @jax.custom_jvp
    def function(*args: Any) -> Any:
        return tuple(run_elementwise(inner, *args))

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        outs = run_elementwise(derivative, *primals, *tangents, itself=function)
        half = len(outs) // 2
        shapes = [np.shape(o) for o in outs[:half]]
        return tuple(outs[:half]), tuple(broadcast(t, s) for t, s in zip(outs[half:], shapes, strict=True))

    return function
