"""PyTorch on an NVIDIA GPU: `nn.LSTM`, `nn.GRU`, `nn.RNN`, which run cuDNN's."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from benchmarks.grid import Point
from benchmarks.peers.base import Prepared
from benchmarks.peers.torch import Torch

# A run on a CPU tries out everything but the device (see `benchmarks.gpu`).
DEVICE = "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "cuda"


def finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class TorchCuda(Torch):
    form = (
        "nn.LSTM, nn.GRU, nn.RNN (cuDNN), time-major, parameters in the inputs' dtype, TF32 in cuDNN and in products "
        "where the point says so; inference_mode for forward; packed sequences for ragged lengths"
    )

    def refuses(self, point: Point) -> str | None:
        if DEVICE == "cuda" and not torch.cuda.is_available():
            return "the installed torch has no CUDA"
        return "single steps are timed in JAX" if point.work == "step" else super().refuses(point)

    def prepare(self, point: Point, data: dict[str, Any]) -> Prepared:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = point.precision == "tf32"
        module = self.module(point)
        self.load(module, data["params"])
        module = module.to(DEVICE)
        if DEVICE == "cuda":
            module.flatten_parameters()
        xs = torch.tensor(data["xs"]).to(DEVICE, getattr(torch, point.dtype))
        run = self._runner(point, module, data)
        if point.work == "forward":

            @torch.inference_mode()
            def call() -> Any:
                ys = run(xs)
                finish()
                return ys

            return Prepared(call, lambda: {"ys": call().float().cpu().numpy()})
        xs.requires_grad_()
        weights = torch.tensor(data["weights"]).to(DEVICE)
        leaves = [xs, *module.parameters()]

        def train() -> Any:
            for leaf in leaves:
                leaf.grad = None
            loss = (run(xs).float() * weights).sum()
            loss.backward()
            finish()
            return loss

        def answer() -> dict[str, Any]:
            value = float(train().detach())
            assert xs.grad is not None
            found = {"value": value, "xs": np.asarray(xs.grad.float().cpu())}
            grads = [None if p.grad is None else p.grad.float().cpu() for p in module.parameters()]
            twin = self.module(point).float()
            for parameter, grad in zip(twin.parameters(), grads, strict=True):
                parameter.grad = grad
            return found | {"params": self.gradients(twin, data["params"])}

        return Prepared(train, answer)
