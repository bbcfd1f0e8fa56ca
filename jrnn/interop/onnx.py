"""Weights from and to ONNX: graphs of RNN, GRU and LSTM nodes, and of the nodes between them.

==================================  ==================================================================================
ONNX                                jrnn
==================================  ==================================================================================
`RNN`, one activation               `jrnn.elman`
`LSTM`, gates i, o, f, c            `jrnn.lstm`, gates i, f, g, o; with `P` `jrnn.peephole_lstm`; with
                                    `input_forget=1` `jrnn.coupled_lstm`, whose f is `1 - i` of ONNX
`GRU`, gates z, r, h                `jrnn.gru`, gates r, z, n; `linear_before_reset` 1 is reset "after", 0 "before"
`direction="bidirectional"`         `jrnn.bidirectional`, merged as the nodes after it do
`direction="reverse"`               the backward half of a `jrnn.bidirectional`
`initial_h`, `initial_c`            zeros: nothing; other constants: `jrnn.learned_state`; inputs of the graph: `state=`
`sequence_lens`                     `lengths=`, the same for all nodes
`MatMul` and `Add`, `Gemm`          `jrnn.dense`
`Gather`                            `jrnn.embed`
`LayerNormalization`                `jrnn.layer_norm`
`Dropout`                           `jrnn.dropout`
`Tanh`, `Relu`, …                   `jrnn.activation`
==================================  ==================================================================================
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from jrnn import activations
from jrnn.cells.base import Cell, Layer
from jrnn.cells.elman import Elman, elman
from jrnn.cells.gru import GRU, ResetBeforeGRU, gru
from jrnn.cells.lstm import LSTM, CoupledLSTM, PeepholeLSTM, coupled_lstm, lstm, peephole_lstm
from jrnn.compose.combine import Bidirectional, bidirectional
from jrnn.compose.regularise import LearnedState, learned_state
from jrnn.compose.timewise import (
    Activate,
    Dense,
    Dropout,
    Embed,
    LayerNorm,
    activation,
    dense,
    dropout,
    embed,
    layer_norm,
)
from jrnn.interop import _common
from jrnn.interop._common import (
    checked,
    flat_stack,
    is_reversed,
    leaves,
    lookup,
    reorder,
    require,
    reversed_layer,
    to_param,
    to_params,
    total,
)

__all__ = ["from_onnx", "to_onnx"]

_OPSET, _IR = 20, 9

# Activations inside nodes, by ONNX's names and with the defaults of their alpha and beta.
_INSIDE: dict[str, activations.Activation] = {
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Relu": "relu",
    "Softplus": "softplus",
    "Softsign": jax.nn.soft_sign,
    "Elu": "elu",
    "LeakyRelu": _common.leaky_relu,
    "HardSigmoid": _common.hard_sigmoid_fifth,
}
_SCALED = ("Elu", "LeakyRelu", "HardSigmoid")

# Activations as nodes of their own, and the attributes that their meaning depends on.
_NODES: dict[str, tuple[activations.Activation, dict[str, Any]]] = {
    "Tanh": ("tanh", {}),
    "Sigmoid": ("sigmoid", {}),
    "Relu": ("relu", {}),
    "Softplus": ("softplus", {}),
    "Softsign": (jax.nn.soft_sign, {}),
    "Elu": ("elu", {"alpha": 1.0}),
    "LeakyRelu": (_common.leaky_relu, {"alpha": 0.01}),
    "HardSigmoid": (_common.hard_sigmoid_fifth, {"alpha": 0.2, "beta": 0.5}),
    "HardSwish": (jax.nn.hard_swish, {}),
    "Gelu": (_common.gelu_erf, {"approximate": "none"}),
    "Softmax": (_common.softmax, {"axis": -1}),
    "LogSoftmax": (_common.log_softmax, {"axis": -1}),
    "Identity": ("linear", {}),
}

# How ONNX orders the gates: place i of jrnn's order is place order[i] of ONNX's.
_LSTM_ORDER, _GRU_ORDER = (0, 2, 3, 1), (1, 0, 2)
_REDUCE = {"ReduceSum": "sum", "ReduceMean": "mean", "ReduceProd": "product"}


def from_onnx(source: Any) -> tuple[Layer, Any]:
    """A jrnn model and its parameters from an ONNX graph.

    The graph is followed from its first output back to an input. It must consist of the nodes that the docstring of
    `jrnn.interop.onnx` lists, and may move axes between them (`Transpose`, `Squeeze`, `Reshape`). The data of the jrnn
    model are time-major, ``(T, B, F)``, whatever the graph's inputs and the ``layout`` of its nodes are. If no node
    merges the two directions of a bidirectional node, the model puts them side by side, ``(T, B, 2H)``.

    - If ``sequence_lens`` is an input of the graph, pass it to `jrnn.unroll` as ``lengths=``.
    - If ``initial_h`` and ``initial_c`` are inputs of the graph, pass them as ``state=``.
    - The last states, which are outputs of the nodes besides ``Y``, are returned by `jrnn.unroll`.

    Args:
      source: an `onnx.ModelProto`, its serialised bytes, or the path of a file.

    Returns:
      ``(model, params)``, for ``jrnn.unroll(model, params, xs)``. Parameters are copies in the graph's dtype.

    Raises:
      ImportError: onnx is not installed.
      TypeError: a node, or an attribute or input of one, that has no counterpart; the error names it.
      ValueError: weights of another shape, or in a dtype that jrnn has not.

    >>> import pytest; onnx = pytest.importorskip("onnx")
    >>> model = jrnn.stack(jrnn.lstm(4), jrnn.dense(2))
    >>> proto = jrnn.interop.to_onnx(model, model.init(jax.random.key(0), 3))
    >>> jrnn.interop.from_onnx(proto)[0]
    stack(lstm(4), dense(2))
    """
    onnx = _onnx()
    if isinstance(source, str | os.PathLike):
        source = onnx.load(os.fspath(source))
    elif isinstance(source, bytes):
        source = onnx.load_from_string(source)
    if not isinstance(source, onnx.ModelProto):
        raise TypeError(f"source: expected an onnx.ModelProto, bytes or a path, got {type(source).__name__}")
    return _Reader(onnx, source.graph).read()


def to_onnx(model: Layer, params: Any, *, lengths: bool = False) -> Any:
    """An ONNX model from a jrnn model and its parameters: the inverse of `from_onnx`.

    The graph takes ``xs (T, B, F)``, or integer ids ``(T, B)`` where the model begins with `jrnn.embed`, for any T
    and B, and gives ``ys (T, B, H)``. With ``lengths`` it also takes ``lengths (B,)``, int32, and its outputs at
    padding are zero; onnxruntime honours them, while the onnx package's reference evaluator ignores ``sequence_lens``.

    These layers are converted: `jrnn.elman`, `lstm`, `peephole_lstm`, `coupled_lstm` and `gru` (both resets), each
    alone, in a `jrnn.learned_state`, or in a `jrnn.bidirectional` of two cells of one kind, if ``merge`` is a name;
    `dense`, `embed`, `layer_norm`, `activation`, `dropout` (which does nothing in the graph); and stacks of all these.

    Args:
      model: the layer.
      params: its parameters, all in float32, float64 or float16. (onnxruntime's nodes on a CPU have no float64.)
      lengths: whether the graph has an input of that name.

    Returns:
      An `onnx.ModelProto`, opset 20: ``onnx.save(proto, path)``.

    Raises:
      ImportError: onnx is not installed.
      TypeError: a layer that ONNX has no node for; the error says which, and what ONNX lacks.
      ValueError: parameters that do not fit the model, or in bfloat16.

    >>> import pytest; onnx = pytest.importorskip("onnx"); from onnx.reference import ReferenceEvaluator
    >>> cell = jrnn.gru(4)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> proto = jrnn.interop.to_onnx(cell, params)
    >>> xs = np.ones((5, 2, 3), np.float32)
    >>> (ys,) = ReferenceEvaluator(proto).run(None, {"xs": xs})
    >>> np.allclose(ys, jrnn.unroll(cell, params, xs)[1], atol=1e-6)
    True
    """
    onnx = _onnx()
    return _Writer(onnx, model, checked(model, params), lengths).proto


def _onnx() -> Any:
    return require("onnx", 'install it with pip install "jrnn[onnx]"')


# --- from ONNX


class _Reader:
    """Follows a graph from its output to its input, then converts node by node."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph = onnx, graph
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.inputs = {value.name for value in graph.input} - set(self.constants)
        self.layers: list[tuple[Layer, Any]] = []
        self.time: str | None = None
        self.lengths: str | None = None
        self.recurrent = 0
        self.axes: list[str] = []
        # The axes of the tensors passed so far, the sizes of axes that the graph's input fixes, and D * H.
        self.tensors: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.width = 0
        # Directions that are not merged yet, and whether a MatMul waits for its bias.
        self.unmerged: tuple[Layer, Any] | None = None
        self.open = False

    def read(self) -> tuple[Layer, Any]:
        if not self.graph.output:
            raise TypeError("source: expected a graph with an output, got none")
        chain, start = self._chain(self.graph.output[0].name)
        self.axes = self._axes(start, chain)
        self.tensors[start] = [*self.axes]
        for node in chain:
            self._convert(node)
            self.tensors[node.output[0]] = [*self.axes]
        self._merge("concat")
        if not self.layers:
            raise TypeError("source: expected a graph with nodes that jrnn has layers for, got none")
        return flat_stack(self.layers)

    def _chain(self, name: str) -> tuple[list[Any], str]:
        chain: list[Any] = []
        while name not in self.inputs:
            node = self.producers.get(name)
            if node is None:
                raise TypeError(f"source: expected {name!r} to be computed from an input of the graph, got a constant")
            if node.op_type in ("RNN", "GRU", "LSTM") and name != node.output[0]:
                raise TypeError(
                    f"{_place(node)}: expected the sequence Y to go on, or to be the graph's first output, got "
                    f"{name!r}, the last state; jrnn.unroll returns the state beside ys"
                )
            if any(node is other for other in chain):
                raise TypeError(f"{_place(node)}: expected a graph without cycles")
            chain.append(node)
            name = self._data(node)
        return chain[::-1], name

    def _data(self, node: Any) -> str:
        """The input of a node that is the sequence; its others must be constants, or are looked at where it is read."""
        if node.domain not in ("", "ai.onnx"):
            raise TypeError(f"{_place(node)}: expected a node of ONNX itself, got domain {node.domain!r}")
        if node.op_type in ("RNN", "GRU", "LSTM", "Reshape"):
            return node.input[0]
        if node.op_type == "Where":
            return node.input[1]
        data = [name for name in node.input if name and self._constant(name) is None]
        if len(data) != 1:
            raise TypeError(
                f"{_place(node)}: expected one input that is not a constant, got {len(data)}: {data}; jrnn's stacks "
                "pass one sequence on from layer to layer"
            )
        return data[0]

    def _axes(self, start: str, chain: list[Any]) -> list[str]:
        kinds = [node.op_type for node in chain]
        value = next(value for value in self.graph.input if value.name == start)
        shape = value.type.tensor_type
        rank = len(shape.shape.dim) if shape.HasField("shape") else None
        ids = "Gather" in kinds
        if rank is None:
            rank = 2 if ids else 3
        axes = [str(i) for i in range(rank)] if ids else [*map(str, range(rank - 1)), "F"]
        for axis, dim in zip(axes, shape.shape.dim, strict=False):
            if dim.dim_value and axis != "F":
                self.sizes[axis] = dim.dim_value
        return axes

    def _constant(self, name: str) -> np.ndarray | None:
        if name not in self.constants:
            node = self.producers.get(name)
            if node is None or node.op_type not in ("Constant", "Identity"):
                return None
            if node.op_type == "Identity":
                return self._constant(node.input[0])
            (attribute,) = node.attribute
            value = self.onnx.helper.get_attribute_value(attribute)
            self.constants[name] = (
                self.onnx.numpy_helper.to_array(value) if attribute.name == "value" else np.array(value)
            )
        return self.constants[name]

    def _weights(self, node: Any, index: int, argument: str) -> np.ndarray | None:
        """A constant input of a node, None where it is left out."""
        if len(node.input) <= index or not node.input[index]:
            return None
        found = self._constant(node.input[index])
        if found is None:
            raise TypeError(f"{_place(node)}: expected a constant for {argument}, got {node.input[index]!r}")
        return found

    def _attributes(self, node: Any, **defaults: Any) -> dict[str, Any]:
        """A node's attributes over their defaults; those that are not listed are refused by name."""
        found = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        found = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
        if unknown := sorted(set(found) - set(defaults)):
            raise TypeError(f"{_place(node)}: expected attributes {sorted(defaults)}, got {unknown[0]!r} as well")
        return {**defaults, **found}

    def _add(self, layer: Layer, params: Any) -> None:
        self.layers.append((layer, params))
        self.open = False

    def _merge(self, merge: str) -> None:
        if self.unmerged is not None:
            layer, params = self.unmerged
            if isinstance(layer, Bidirectional) and not is_reversed(layer):
                layer = bidirectional(layer.forward, layer.backward, merge)
            self._add(layer, params)
        self.unmerged = None

    def _convert(self, node: Any) -> None:
        op = node.op_type
        if op in ("RNN", "GRU", "LSTM"):
            return self._recurrent(node)
        if op in ("Transpose", "Squeeze", "Reshape", *_REDUCE):
            return self._move(node)
        if "D" in self.axes:
            raise TypeError(
                f"{_place(node)}: expected Squeeze, Reshape or {', '.join(_REDUCE)} to take the axis of directions out "
                f"first, got {op}"
            )
        if op == "Gather":
            return self._gather(node)
        if op == "Where":
            return self._where(node)
        if self.axes[-1] != "F":
            raise TypeError(f"{_place(node)}: expected features on the last axis, got axes moved by a Transpose")
        if op in ("MatMul", "Gemm", "Add"):
            return self._dense(node)
        if op == "LayerNormalization":
            options = self._attributes(node, axis=-1, epsilon=1e-5, stash_type=1)
            if options["axis"] not in (-1, len(self.axes) - 1):
                raise TypeError(f"{_place(node)}: expected axis=-1, got {options['axis']}")
            scale, shift = self._weights(node, 1, "Scale"), self._weights(node, 2, "B")
            if scale is None:
                raise TypeError(f"{_place(node)}: expected Scale, got none")
            normed = {"scale": scale, "shift": np.zeros_like(scale) if shift is None else shift}
            return self._add(layer_norm(_float(options["epsilon"])), to_params(normed, _place(node)))
        if op == "Dropout":
            options = self._attributes(node, ratio=0.5, seed=None)
            ratio, training = self._weights(node, 1, "ratio"), self._weights(node, 2, "training_mode")
            if training is not None and training.item():
                raise TypeError(f"{_place(node)}: expected training_mode=False, got True")
            return self._add(dropout(_float(options["ratio"]) if ratio is None else float(ratio.item())), {})
        if op in _NODES:
            function, expected = _NODES[op]
            options = self._attributes(node, **expected)
            if op == "Gelu" and options["approximate"] == "tanh":
                return self._add(activation("gelu"), {})
            for name, value in expected.items():
                got = _float(options[name]) if isinstance(value, float) else options[name]
                if got != value and not (name == "axis" and got == len(self.axes) - 1):
                    raise TypeError(f"{_place(node)}: expected {name}={value!r}, got {got!r}")
            return None if op == "Identity" else self._add(activation(function), {})
        if op == "Cast":
            raise TypeError(
                f"{_place(node)}: expected one dtype throughout, got a Cast; convert the graph to one dtype"
            )
        raise TypeError(
            f"{_place(node)}: expected RNN, GRU, LSTM, MatMul, Add, Gemm, Gather, LayerNormalization, Dropout, an "
            f"activation or a node that moves axes, got {op}; convert the part of the graph that jrnn has layers for "
            "(onnx.utils.extract_model cuts it out)"
        )

    def _move(self, node: Any) -> None:
        op, rank = node.op_type, len(self.axes)
        if op == "Transpose":
            perm = self._attributes(node, perm=list(range(rank))[::-1])["perm"]
            self.axes = [self.axes[i] for i in perm]
            return
        both = (
            self.unmerged is not None
            and isinstance(self.unmerged[0], Bidirectional)
            and not is_reversed(self.unmerged[0])
        )
        if op == "Reshape":
            shape = self._shape(node.input[1])
            empty = self._attributes(node, allowzero=0)["allowzero"] and shape is not None and 0 in shape
            if self.axes[-2:] != ["D", "F"] or empty or not self._side_by_side(shape):
                raise TypeError(
                    f"{_place(node)}: expected a Reshape that puts directions and features side by side, and that "
                    "says so "
                    f"by zeros, sizes or Shape nodes, got axes {self.axes} and a shape that the graph gives otherwise"
                )
            self.axes = [axis for axis in self.axes if axis != "D"]
            return self._merge("concat")
        options = self._attributes(node, axes=None, keepdims=1, noop_with_empty_axes=0)
        axes = self._weights(node, 1, "axes")
        found = options["axes"] if axes is None else axes.tolist()
        found = [axis % rank for axis in found or ()]
        if found != [self.axes.index("D")] if "D" in self.axes else True:
            raise TypeError(
                f"{_place(node)}: expected {op} over the axis of directions, got axes {found} of {self.axes}"
            )
        if (op == "Squeeze") == both:
            raise TypeError(f"{_place(node)}: expected two directions to be merged and one to be squeezed, got {op}")
        if op != "Squeeze" and options["keepdims"]:
            raise TypeError(f"{_place(node)}: expected keepdims=0, got {options['keepdims']}")
        self.axes.remove("D")
        self._merge(_REDUCE.get(op, "concat"))

    def _side_by_side(self, shape: list[Any] | None) -> bool:
        """Whether a reshape to this shape keeps all axes but the last two, D and F, which become one."""
        if shape is None or len(shape) != len(self.axes) - 1:
            return False
        *leading, last = shape
        kept = [size in (0, -1, axis, self.sizes.get(axis)) for size, axis in zip(leading, self.axes, strict=False)]
        return all(kept) and last in (-1, self.width, "D*F") and shape.count(-1) < 2

    def _shape(self, name: str) -> list[Any] | None:
        """A shape as the graph gives it: sizes, and the names of axes of which it takes the size; None for others."""
        found = self._constant(name)
        if found is not None:
            return found.reshape(-1).tolist()
        node = self.producers.get(name)
        if node is None:
            return None
        if node.op_type == "Shape":
            axes = self.tensors.get(node.input[0])
            options = self._attributes(node, start=0, end=None)
            return None if axes is None else axes[options["start"] : options["end"]]
        parts = [self._shape(entry) for entry in node.input]
        first = parts[0]
        if first is None or any(part is None for part in parts):
            return None
        constants = [part or [] for part in parts[1:]]
        if node.op_type == "Concat":
            return [*first, *(size for part in constants for size in part)]
        if node.op_type == "Slice" and len(parts) < 5:
            return first[constants[0][0] : constants[1][0]]
        if node.op_type == "Gather":
            return [first[index] for index in constants[0]]
        if node.op_type == "Mul" and len(first) == len(constants[0]) == 1:
            return ["*".join(map(str, (first[0], constants[0][0])))]
        return first if node.op_type in ("Reshape", "Unsqueeze", "Squeeze", "Cast", "Identity") else None

    def _gather(self, node: Any) -> None:
        if self._attributes(node, axis=0)["axis"] != 0 or "F" in self.axes:
            raise TypeError(
                f"{_place(node)}: expected rows of a table by integer ids (axis=0, before any axis of features), got "
                f"axes {self.axes}"
            )
        table = self._weights(node, 0, "data")
        if table is None or table.ndim != 2:
            got = "none" if table is None else f"the shape {table.shape}"
            raise TypeError(f"{_place(node)}: expected a constant table (vocab, features), got {got}")
        self.axes = [*self.axes, "F"]
        self._add(embed(*map(int, table.shape)), to_params({"w": table}, _place(node)))

    def _dense(self, node: Any) -> None:
        where = _place(node)
        if node.op_type == "Add":
            constants = [c for c in map(self._constant, node.input) if c is not None]
            if not self.open or len(constants) != 1 or constants[0].shape != (self.layers[-1][0].features,):  # type: ignore[attr-defined]
                raise TypeError(f"{where}: expected the bias of the MatMul before it, got another sum")
            layer, params = self.layers.pop()
            return self._add(layer, {**params, "b": to_param(constants[0], where)})
        if self._constant(node.input[0]) is not None:
            raise TypeError(f"{where}: expected the sequence times a constant weight, got the constant on the left")
        w = self._weights(node, 1, "B")
        b = None
        if node.op_type == "Gemm":
            options = self._attributes(node, alpha=1.0, beta=1.0, transA=0, transB=0)
            for name, expected in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
                if options[name] != expected:
                    raise TypeError(f"{where}: expected {name}={expected}, got {options[name]}")
            w = w.T if options["transB"] and w is not None else w
            b = self._weights(node, 2, "C")
        if w is None or w.ndim != 2 or (b is not None and b.shape != w.shape[1:]):
            got = ", ".join("none" if array is None else str(array.shape) for array in (w, b))
            raise TypeError(f"{where}: expected constant weights (F, out) and a bias (out,), got {got}")
        bias = np.zeros_like(w[0]) if b is None else b
        self._add(dense(int(w.shape[1])), to_params({"w": w, "b": bias}, where))
        self.open = b is None

    def _where(self, node: Any) -> None:
        """Zeros at padding, as `to_onnx` writes them: ``Where(range(T)[:, None, None] < lengths[:, None], ys, 0)``."""
        less = self._made_by(self._made_by(node.input[0], "Unsqueeze"), "Less", 0, whole=True)
        zero = self._constant(node.input[2])
        steps = self._made_by(self._made_by(less.input[0], "Unsqueeze"), "Range") if less is not None else None
        if (
            less is None
            or steps is None
            or less.input[1] not in self.inputs
            or (self.recurrent and (less.input[1], self.axes[0]) != (self.lengths, self.time))
            or zero is None
            or zero.any()
        ):
            raise TypeError(
                f"{_place(node)}: expected zeros where a step is not below sequence_lens, got another Where"
            )

    def _made_by(self, name: Any, op: str, index: int = 0, whole: bool = False) -> Any:
        node = self.producers.get(name)
        if node is None or node.op_type != op:
            return None
        return node if whole else node.input[index]

    # Recurrent nodes.

    def _recurrent(self, node: Any) -> None:
        op, where = node.op_type, _place(node)
        options = self._attributes(
            node,
            activation_alpha=[],
            activation_beta=[],
            activations=None,
            clip=0.0,
            direction="forward",
            hidden_size=None,
            layout=0,
            **{"LSTM": {"input_forget": 0}, "GRU": {"linear_before_reset": 0}, "RNN": {}}[op],
        )
        if options["clip"]:
            raise TypeError(
                f"{where}: expected no clip, got {_float(options['clip'])}; jrnn's cells do not clip their gates"
            )
        if "D" in self.axes or len(self.axes) != 3 or self.axes[2] != "F":
            raise TypeError(f"{where}: expected a sequence with axes of time, batch and features, got axes {self.axes}")
        time, batch = self.axes[:2] if not options["layout"] else self.axes[1::-1]
        if self.time not in (None, time):
            raise TypeError(f"{where}: expected every node to run over the same axis, got one that runs over the other")
        self.time = time
        self._lengths(node)
        directions = 2 if options["direction"] == "bidirectional" else 1
        w, r = self._weights(node, 1, "W"), self._weights(node, 2, "R")
        gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
        if w is None or r is None or w.ndim != 3:
            got = ", ".join("none" if array is None else str(array.shape) for array in (w, r))
            raise TypeError(f"{where}: expected constants W and R of three axes, got {got}")
        hidden = int(r.shape[-1])
        b = self._weights(node, 3, "B")
        b = np.zeros((directions, 2 * gates * hidden), w.dtype) if b is None else b
        peepholes = self._weights(node, 7, "P") if op == "LSTM" else None
        shapes = [
            ("W", w, (directions, gates * hidden, w.shape[2])),
            ("R", r, (directions, gates * hidden, hidden)),
            ("B", b, (directions, 2 * gates * hidden)),
            ("P", peepholes, (directions, 3 * hidden)),
        ]
        for name, array, shape in shapes:
            if array is not None and array.shape != shape:
                raise ValueError(f"{where}: expected {name} of shape {shape}, got {array.shape}")
        if options["hidden_size"] not in (None, hidden):
            raise ValueError(f"{where}: expected hidden_size={hidden}, as R has, got {options['hidden_size']}")
        functions = self._functions(node, options, directions)
        initial = {name: self._initial(node, i, options["layout"]) for name, i in (("h", 5), ("c", 6))}
        read = []
        for d in range(directions):
            layer: Cell
            layer, arrays = _cell(
                where, op, options, functions[d], w[d], r[d], b[d], None if peepholes is None else peepholes[d]
            )
            params: Any = to_params(arrays, where)
            found = {name: value[d] for name, value in initial.items() if value is not None}
            if any(value.any() for value in found.values()):
                fields = ("h", "c") if op == "LSTM" else ("h",)
                zero = np.zeros(hidden, w.dtype)
                start = to_params({name: found.get(name, zero) for name in fields}, where)
                layer, params = learned_state(layer), {"cell": params, "initial": start}
            read.append((layer, params))
        if directions == 2:
            (forward, own), (backward, other) = read
            self.unmerged = bidirectional(forward, backward), {"forward": own, "backward": other}
        else:
            self.unmerged = reversed_layer(*read[0]) if options["direction"] == "reverse" else read[0]
        self.width = directions * hidden
        self.axes = [time, "D", batch, "F"] if not options["layout"] else [batch, time, "D", "F"]

    def _lengths(self, node: Any) -> None:
        name = node.input[4] if len(node.input) > 4 and node.input[4] else None
        if name is not None and name not in self.inputs:
            raise TypeError(
                f"{_place(node)}: expected sequence_lens to be an input of the graph, which jrnn.unroll takes as "
                f"lengths=, got {name!r}, which the graph computes or holds"
            )
        if self.recurrent and name != self.lengths:
            raise TypeError(
                f"{_place(node)}: expected the same sequence_lens at every node, got {name!r} and {self.lengths!r}"
            )
        self.lengths, self.recurrent = name, self.recurrent + 1

    def _functions(self, node: Any, options: Any, directions: int) -> list[list[activations.Activation]]:
        usual = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}[node.op_type]
        names = [n.decode() if isinstance(n, bytes) else n for n in options["activations"] or usual * directions]
        if len(names) != len(usual) * directions:
            raise TypeError(f"{_place(node)}: expected {len(usual) * directions} activations, got {names}")
        known = {name.lower(): name for name in _INSIDE}
        for name in names:
            if name.lower() not in known:
                raise TypeError(f"{_place(node)}: expected activations out of {sorted(_INSIDE)}, got {name!r}")
            for option in ("activation_alpha", "activation_beta"):
                if options[option] and known[name.lower()] in _SCALED:
                    raise TypeError(f"{_place(node)}: expected the default {option} for {name}, got {options[option]}")
        functions = [_INSIDE[known[name.lower()]] for name in names]
        return [functions[i : i + len(usual)] for i in range(0, len(functions), len(usual))]

    def _initial(self, node: Any, index: int, layout: int) -> np.ndarray | None:
        """A constant initial state ``(D, H)``; None for zeros and for an input of the graph."""
        name = node.input[index] if len(node.input) > index else ""
        if not name or name in self.inputs or self._is_zero(name):
            return None
        expand = self.producers.get(name)
        found = self._constant(name if expand is None or expand.op_type != "Expand" else expand.input[0])
        argument = "initial_h" if index == 5 else "initial_c"
        if found is None or found.ndim != 3:
            raise TypeError(
                f"{_place(node)}: expected {argument} to be a constant or an input of the graph, got {name!r}, which "
                "the graph computes"
            )
        batch = 0 if layout else 1
        first = found.take([0], axis=batch)
        if (found != first).any():
            raise TypeError(
                f"{_place(node)}: expected {argument} alike for every sequence of a batch, got different ones"
            )
        return first.squeeze(batch)

    def _is_zero(self, name: str) -> bool:
        """Whether a tensor is known to be zero whatever its shape, as exporters compute initial states."""
        found = self._constant(name)
        if found is not None:
            return not found.any()
        node = self.producers.get(name)
        if node is None:
            return False
        if node.op_type == "ConstantOfShape":
            value = next((self.onnx.numpy_helper.to_array(a.t) for a in node.attribute), np.zeros(1))
            return not value.any()
        if node.op_type == "Concat":
            return all(map(self._is_zero, node.input))
        shaped = ("Expand", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Transpose", "Tile", "Identity", "Cast")
        return node.op_type in shaped and self._is_zero(node.input[0])


def _cell(
    where: str,
    op: str,
    options: Any,
    functions: list[activations.Activation],
    w: np.ndarray,
    r: np.ndarray,
    b: np.ndarray,
    peepholes: np.ndarray | None,
) -> tuple[Cell, dict[str, np.ndarray]]:
    """One direction of a node: W (G*H, F), R (G*H, H), B (2*G*H,), P (3H,)."""
    hidden = r.shape[-1]
    first, second = np.split(b, 2)
    if op == "RNN":
        return elman(hidden, functions[0]), {"w_ih": w.T, "w_hh": r.T, "b": total(first, second)}
    if op == "GRU":
        after = bool(options["linear_before_reset"])
        cell = gru(hidden, "after" if after else "before", activation=functions[1], gate_activation=functions[0])
        arrays = {"w_ih": reorder(w.T, _GRU_ORDER), "w_hh": reorder(r.T, _GRU_ORDER)}
        if not after:
            return cell, {**arrays, "b": reorder(total(first, second), _GRU_ORDER)}
        gates = 2 * hidden
        whole = np.concatenate([total(first[:gates], second[:gates]), first[gates:]])
        return cell, {**arrays, "b": reorder(whole, _GRU_ORDER), "b_hn": second[gates:]}
    if functions[1] is not functions[2] and functions[1] != functions[2]:
        raise TypeError(f"{where}: expected one activation for the candidate and the memory, got two different ones")
    both: dict[str, Any] = {"activation": functions[1], "gate_activation": functions[0]}
    raw = {"w_ih": w.T, "w_hh": r.T, "b": total(first, second)}
    if options["input_forget"]:
        if peepholes is not None or functions[0] != "sigmoid":
            raise TypeError(f"{where}: expected input_forget=1 without peepholes and with Sigmoid gates")
        # f = 1 - i of ONNX: the sigmoid of the negated gate. Gates i, o, f, c become f, g, o.
        kept = {name: np.concatenate(np.split(a, 4, -1)[:2] + np.split(a, 4, -1)[3:], -1) for name, a in raw.items()}
        arrays = {name: reorder(array, (0, 2, 1), negate=(0,)) for name, array in kept.items()}
        return coupled_lstm(hidden, **both), arrays
    arrays = {name: reorder(array, _LSTM_ORDER) for name, array in raw.items()}
    if peepholes is None:
        return lstm(hidden, **both), arrays
    p_i, p_o, p_f = np.split(peepholes, 3)
    return peephole_lstm(hidden, **both), {**arrays, "p_i": p_i, "p_o": p_o, "p_f": p_f}


def _place(node: Any) -> str:
    return f"source: {node.op_type} node {node.name or node.output[0]!r}"


def _float(value: Any) -> float:
    """A float32 attribute as the shortest decimal number that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# --- to ONNX


class _Writer:
    def __init__(self, onnx: Any, model: Any, params: Any, lengths: bool) -> None:
        self.onnx, self.helper = onnx, onnx.helper
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.lengths = "lengths" if lengths else ""
        types = onnx.TensorProto
        names = {leaf.dtype.name for leaf in jax.tree.leaves(params)} or {"float32"}
        (self.dtype,) = names
        if self.dtype == "bfloat16":
            raise ValueError("params: expected float32, float64 or float16, got bfloat16, which ONNX's RNN nodes lack")
        kind = {"float32": types.FLOAT, "float64": types.DOUBLE, "float16": types.FLOAT16}[self.dtype]
        flat = leaves(model, params)
        ids = model.event_ndim == 0
        features = None if ids else _common.in_features(flat[0][2])
        steps: list[Any] = ["T", "B"] if ids else ["T", "B", features or "F"]
        inputs = [self.helper.make_tensor_value_info("xs", types.INT64 if ids else kind, steps)]
        if lengths:
            inputs.append(self.helper.make_tensor_value_info("lengths", types.INT32, ["B"]))
        name = "xs"
        for where, layer, own in flat:
            name = self._layer(where, layer, own, name)
        if lengths:
            name = self._masked(name)
        self.nodes.append(self.helper.make_node("Identity", [name], ["ys"]))
        graph = self.helper.make_graph(
            self.nodes,
            "jrnn",
            inputs,
            [self.helper.make_tensor_value_info("ys", kind, ["T", "B", "H"])],
            [onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opset = [self.helper.make_opsetid("", _OPSET)]
        self.proto = self.helper.make_model(graph, opset_imports=opset, ir_version=_IR, producer_name="jrnn")
        onnx.checker.check_model(self.proto)

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def _constant(self, array: Any, where: str) -> str:
        name = f"{where}_{len(self.constants)}" if where in self.constants else where
        self.constants[name] = np.array(array, order="C")
        return name

    def _integers(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64), f"integers_{'_'.join(map(str, values))}".replace("-", "m"))

    def _layer(self, where: str, layer: Any, own: Any, x: str) -> str:
        if isinstance(layer, Dense):
            x = self._node("MatMul", [x, self._constant(own["w"], f"{where}.w")])
            return self._node("Add", [x, self._constant(own["b"], f"{where}.b")])
        if isinstance(layer, Embed):
            return self._node("Gather", [self._constant(own["w"], f"{where}.w"), x], axis=0)
        if isinstance(layer, LayerNorm):
            named = [self._constant(own[name], f"{where}.{name}") for name in ("scale", "shift")]
            return self._node("LayerNormalization", [x, *named], axis=-1, epsilon=layer.epsilon)
        if isinstance(layer, Dropout):
            ratio = self._constant(np.float64(layer.rate), f"{where}.rate")
            return self._node("Dropout", [x, ratio, self._constant(np.array(False), "training_mode")])
        if isinstance(layer, Activate):
            name = lookup({name: function for name, (function, _) in _NODES.items()}, layer.function)
            if name is None and activations.resolve(layer.function) is jax.nn.gelu:
                return self._node("Gelu", [x], approximate="tanh")
            if name is None:
                raise TypeError(f"{where}: expected an activation that ONNX has a node for, got {layer!r}")
            return self._node(name, [x], **_NODES[name][1])
        if is_reversed(layer):
            y = self._recurrent(where, [(layer.backward, own["backward"])], x, "reverse")
        elif isinstance(layer, Bidirectional):
            both = [(layer.forward, own["forward"]), (layer.backward, own["backward"])]
            return self._both(where, layer, self._recurrent(where, both, x, "bidirectional"))
        else:
            y = self._recurrent(where, [(layer, own)], x, "forward")
        return self._node("Squeeze", [y, self._integers(1)])

    def _both(self, where: str, layer: Any, y: str) -> str:
        """Both directions' outputs ``(T, 2, B, H)`` as one, ``(T, B, ...)``."""
        if layer.merge == "concat":
            return self._node("Reshape", [self._node("Transpose", [y], perm=[0, 2, 1, 3]), self._integers(0, 0, -1)])
        op = next((op for op, merge in _REDUCE.items() if merge == layer.merge), None)
        if op is None:
            raise TypeError(f"{where}: expected directions merged by a name, got {layer.merge!r}, which is a function")
        return self._node(op, [y, self._integers(1)], keepdims=0)

    def _recurrent(self, where: str, cells: list[tuple[Any, Any]], x: str, direction: str) -> str:
        written = [self._write(where, cell, own) for cell, own in cells]
        ops = [(op, attributes) for op, attributes, *_ in written]
        if (
            len({op for op, _ in ops}) > 1
            or any(a != ops[0][1] for _, a in ops)
            or len({c.hidden for c in map(_inner, cells)}) > 1
        ):
            raise TypeError(
                f"{where}: expected two directions of one kind and size, as in ONNX's nodes, got {cells[0][0]!r} and "
                f"{cells[1][0]!r}; convert them one by one"
            )
        op, attributes = ops[0]
        arrays = [arrays for _, _, arrays, _, _ in written]
        named = {n: self._constant(np.stack([a[n] for a in arrays]), f"{where}.{n}") for n in arrays[0]}
        inputs = [x, named["W"], named["R"], named["B"], self.lengths]
        starts = [start for *_, start in written]
        for field in ("h", "c") if op == "LSTM" else ("h",):
            inputs.append(self._start(where, field, starts, x))
        if "P" in named:
            inputs.append(named["P"])
        functions = [name for _, _, _, names, _ in written for name in names]
        hidden = _inner(cells[0]).hidden
        while not inputs[-1]:
            inputs.pop()
        return self._node(op, inputs, hidden_size=hidden, direction=direction, activations=functions, **attributes)

    def _start(self, where: str, field: str, starts: list[Any], x: str) -> str:
        """Initial states ``(D, B, H)`` of cells that have one of their own."""
        if all(start is None for start in starts):
            return ""
        if any(start is None for start in starts):
            raise TypeError(f"{where}: expected a learned state in both directions or in none")
        batch = self._node("Slice", [self._node("Shape", [x]), self._integers(1), self._integers(2)])
        shape = self._node(
            "Concat", [self._integers(len(starts)), batch, self._integers(starts[0][field].size)], axis=0
        )
        rows = self._constant(np.stack([start[field] for start in starts])[:, None], f"{where}.{field}_0")
        return self._node("Expand", [rows, shape])

    def _write(
        self, where: str, cell: Any, own: Any
    ) -> tuple[str, dict[str, Any], dict[str, np.ndarray], list[str], Any]:
        start = None
        if isinstance(cell, LearnedState):
            cell, own, start = cell.cell, own["cell"], own["initial"]
        raw = {"W": own["w_ih"], "R": own["w_hh"], "B": own["b"]} if "w_hh" in own else {}
        kinds = {
            Elman: "RNN",
            GRU: "GRU",
            ResetBeforeGRU: "GRU",
            LSTM: "LSTM",
            PeepholeLSTM: "LSTM",
            CoupledLSTM: "LSTM",
        }
        if type(cell) not in kinds:
            raise TypeError(
                f"{where}: expected a layer that ONNX has a node for, got {cell!r}; no node of ONNX has the equations "
                f"of {type(cell).__name__} (see jrnn.interop.to_onnx for what can be converted)"
            )
        op, attributes = kinds[type(cell)], {}
        fields = ("activation",) if op == "RNN" else ("gate_activation", "activation")
        names = [lookup(_INSIDE, getattr(cell, field)) for field in fields]
        if None in names:
            raise TypeError(f"{where}: expected activations out of {sorted(_INSIDE)}, as in ONNX's nodes, got {cell!r}")
        recurrent = np.zeros_like(own["b"])
        if op == "GRU":
            attributes = {"linear_before_reset": int(type(cell) is GRU)}
            raw = {name: reorder(array, _inverse(_GRU_ORDER)) for name, array in raw.items()}
            if type(cell) is GRU:
                recurrent[-cell.hidden :] = own["b_hn"]
        elif type(cell) is CoupledLSTM:
            if names[0] != "Sigmoid":
                raise TypeError(f"{where}: expected sigmoid gates for ONNX's input_forget, got {cell!r}")
            attributes = {"input_forget": 1}
            # Gates f, g, o become i, o, f, c, where i is f negated and ONNX ignores f.
            parts = {name: np.split(array, 3, -1) for name, array in raw.items()}
            raw = {name: np.concatenate([-f, o, 0 * f, g], -1) for name, (f, g, o) in parts.items()}
            recurrent = np.zeros_like(raw["B"])
        elif op == "LSTM":
            raw = {name: reorder(array, _inverse(_LSTM_ORDER)) for name, array in raw.items()}
        if op == "LSTM":
            names = [*names, names[-1]]
        arrays = {"W": raw["W"].T, "R": raw["R"].T, "B": np.concatenate([raw["B"], recurrent])}
        if type(cell) is PeepholeLSTM:
            arrays["P"] = np.concatenate([own["p_i"], own["p_o"], own["p_f"]])
        return op, attributes, arrays, [name for name in names if name], start

    def _masked(self, y: str) -> str:
        """Zeros where a step is not below ``lengths``."""
        step = self._constant(np.int32(0), "first"), self._constant(np.int32(1), "step")
        size = self._node(
            "Squeeze", [self._node("Slice", [self._node("Shape", [y]), self._integers(0), self._integers(1)])]
        )
        steps = self._node("Range", [step[0], self._node("Cast", [size], to=self.onnx.TensorProto.INT32), step[1]])
        below = self._node("Less", [self._node("Unsqueeze", [steps, self._integers(1)]), "lengths"])
        valid = self._node("Unsqueeze", [below, self._integers(2)])
        return self._node("Where", [valid, y, self._constant(np.zeros((), self.dtype), "zero")])


def _inner(pair: tuple[Any, Any]) -> Any:
    return pair[0].cell if isinstance(pair[0], LearnedState) else pair[0]


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
