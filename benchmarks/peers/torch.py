"""PyTorch on the CPU: `nn.LSTM` (oneDNN), `nn.GRU`, `nn.RNN`, and their cells for single steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.grid import Point
from benchmarks.peers.base import Peer, Prepared

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Torch(Peer):
    form = (
        f"nn.LSTM (oneDNN), nn.GRU, nn.RNN, time-major, {THREADS} threads; inference_mode for forward and steps; "
        "nn.LSTMCell, GRUCell, RNNCell for single steps; packed sequences for ragged lengths; in bfloat16 the "
        "parameters are bfloat16 too"
    )
    lengths = True

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)

    def module(self, point: Point) -> nn.Module:
        make = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}[point.cell]
        module = make(point.features, point.hidden, num_layers=point.layers, bidirectional=point.bidirectional)
        return module.to(getattr(torch, point.dtype))

    def load(self, module: nn.Module, params: Any) -> None:
        """jrnn's parameters, each where torch has it: transposed, the whole bias in ``bias_ih``."""
        with torch.no_grad():
            for suffix, p in _named(params):
                getattr(module, f"weight_ih{suffix}").copy_(torch.tensor(np.array(p["w_ih"]).T))
                getattr(module, f"weight_hh{suffix}").copy_(torch.tensor(np.array(p["w_hh"]).T))
                getattr(module, f"bias_ih{suffix}").copy_(torch.tensor(np.array(p["b"])))
                b_hh = getattr(module, f"bias_hh{suffix}").zero_()
                if "b_hn" in p:
                    b_hh[-len(p["b_hn"]) :] = torch.tensor(np.array(p["b_hn"]))

    def gradients(self, module: nn.Module, params: Any) -> Any:
        """The gradients in jrnn's names and order."""
        found: list[list[dict[str, np.ndarray]]] = [[] for _ in params]
        for suffix, p in _named(params):
            grad = lambda name, suffix=suffix: np.asarray(getattr(module, name + suffix).grad.float())
            d = {"w_ih": grad("weight_ih").T, "w_hh": grad("weight_hh").T, "b": grad("bias_ih")}
            if "b_hn" in p:
                d["b_hn"] = grad("bias_hh")[-len(p["b_hn"]) :]
            found[int(suffix[2])].append(d)
        return tuple(tuple(layer) for layer in found)

    def prepare(self, point: Point, data: dict[str, Any]) -> Prepared:
        module = self.module(point)
        self.load(module, data["params"])
        xs = torch.tensor(data["xs"]).to(getattr(torch, point.dtype))
        if point.work == "step":
            return self._prepare_step(self._cell_of(point, module), xs)
        run = self._runner(point, module, data)
        if point.work == "forward":

            @torch.inference_mode()
            def call() -> Any:
                return run(xs)

            return Prepared(call, lambda: {"ys": call().float().numpy()})
        xs.requires_grad_()
        weights = torch.tensor(data["weights"])
        leaves = [xs, *module.parameters()]

        def train() -> Any:
            for leaf in leaves:
                leaf.grad = None
            loss = (run(xs) * weights).sum()
            loss.backward()
            return loss

        def answer() -> dict[str, Any]:
            value = float(train().detach())
            return {
                "value": value,
                "xs": np.asarray(xs.grad.float() if xs.grad is not None else None),
                "params": self.gradients(module, data["params"]),
            }

        return Prepared(train, answer)

    def _runner(self, point: Point, module: nn.Module, data: dict[str, Any]) -> Callable[[Any], Any]:
        if not (point.ragged and self.lengths):
            return lambda xs: module(xs)[0]
        lengths = torch.tensor(data["lengths"].astype(np.int64))

        def run(xs: Any) -> Any:
            packed = pack_padded_sequence(xs, lengths, enforce_sorted=False)
            return pad_packed_sequence(module(packed)[0], total_length=point.time)[0]

        return run

    def _cell_of(self, point: Point, module: nn.Module) -> nn.Module:
        """The one-step module with the same parameters: less to go through at each call than the layer."""
        make = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "elman": nn.RNNCell}[point.cell]
        cell = make(point.features, point.hidden).to(getattr(torch, point.dtype))
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
        return cell

    def _prepare_step(self, cell: nn.Module, xs: Any) -> Prepared:
        steps: list[Any] = list(xs)
        x0, held = steps[0], [None]

        @torch.inference_mode()
        def call() -> Any:
            held[0] = cell(x0, held[0])
            return held[0]

        @torch.inference_mode()
        def answer() -> dict[str, Any]:
            state, ys = None, []
            for x in steps:
                state = cell(x, state)
                ys.append((state[0] if isinstance(state, tuple) else state).float().numpy())
            return {"ys": np.stack(ys)}

        return Prepared(call, answer)


class Padded(Torch):
    """Without packing, which oneDNN's LSTM does not take: enough where nothing runs backwards over the padding."""

    form = "the same modules over the padded whole"
    lengths = False

    def refuses(self, point: Point) -> str | None:
        return super().refuses(point) if point.ragged else "takes part where lengths are ragged"


def _named(params: Any) -> list[tuple[str, Any]]:
    """torch's suffix for each direction of each layer, and its parameters."""
    endings = ("", "_reverse")
    return [(f"_l{i}{endings[j]}", p) for i, layer in enumerate(params) for j, p in enumerate(layer)]
