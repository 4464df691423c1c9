"""Training steps that fastdiff is timed against, and fastdiff's own, each built from the same weights and batches.

A contestant is built in the process that times it. All of them do the mathematics of their group: "batchtopk" is
BatchTopK by f·s with L2-norm loss, AuxK bookkeeping, clip at 1 where the clip says so, Adam; "topk" is TopK with a
squared error, no AuxK, no clip, Adam, which is what sparsify's trainer does with `optimizer="adam"`.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmark.data import Synthetic
from fastdiff.benchmark.dense import DenseTrainer
from fastdiff.benchmark.shapes import Shape
from fastdiff.benchmark.steps import Steps, fused_steps, step_config

OURS, DENSE, SPARSIFY = "fastdiff", "dense", "sparsify"


@dataclass(frozen=True)
class Contestant:
    """One way to take a step."""

    name: str
    side: str  # OURS, DENSE or SPARSIFY
    group: str  # "batchtopk" or "topk"
    clip: str  # "exact", "previous" or "none"
    make: Callable[[Synthetic, Shape], Steps]
    samples: int = 10
    warmup: int = 5


def fastdiff(name: str, clip: str, *, group: str = "batchtopk", **options: Any) -> Contestant:
    if group == "topk":
        options |= {"activation": "topk", "loss": "mse", "auxk_coef": 0.0}
    if clip == "none":
        options |= {"clip": 0.0}
    else:
        options |= {"clip_mode": clip}

    def make(data: Synthetic, shape: Shape) -> Steps:
        if group == "topk":
            data.crosscoder.activation = "topk"
        return fused_steps(data, step_config(shape, **options))

    return Contestant(name, OURS, group, clip, make)


def dense(name: str, *, matmul: str = "highest", samples: int = 10, warmup: int = 5, **options: Any) -> Contestant:
    """A dense step; `matmul` is torch's float32 matmul precision."""

    def make(data: Synthetic, shape: Shape) -> Steps:
        torch.set_float32_matmul_precision(matmul)
        config = step_config(shape)
        trainer = DenseTrainer(data.crosscoder, config, **options)
        trainer.tokens_since_fired[data.dead] = config.dead_tokens
        _forget(data)
        return trainer

    return Contestant(name, DENSE, "batchtopk", "exact", make, samples, warmup)


class SparsifySteps:
    """sparsify's SparseCoder on the models side by side: its forward and backward pass, its loss, torch's Adam.

    The decoder is not normalised after every step, which its trainer would do too: fastdiff's is not either. On CUDA
    Adam is the fused one, faster than what its trainer takes.
    """

    def __init__(self, data: Synthetic, shape: Shape):
        coder, config = load_sparsify(data.crosscoder.b_enc.device)
        settings = config(num_latents=shape.dict_size, k=shape.k, normalize_decoder=False)
        device = data.crosscoder.b_enc.device
        self.sae = coder(shape.width, settings, device=device)
        with torch.no_grad():
            self.sae.encoder.weight.copy_(data.crosscoder.W_enc.flatten(1))
            self.sae.encoder.bias.copy_(data.crosscoder.b_enc)
            self.sae.W_dec.copy_(data.crosscoder.W_dec.flatten(1))
        _forget(data)
        self._device = device
        self._adam = torch.optim.Adam(self.sae.parameters(), lr=1e-6, fused=True if device.type == "cuda" else None)

    def step(self, batch: Tensor) -> None:
        # its trainer gets them in the model's precision and its weights are float32
        out = self.sae(batch.flatten(1).float())
        out.fvu.backward()
        self._adam.step()
        self._adam.zero_grad()

    def window(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _forget(data: Synthetic) -> None:
    """Free the weights a contestant has copied, which are no memory of its own."""
    for parameter in data.crosscoder.parameters():
        parameter.data = parameter.data.new_empty(0)


def sparsify_is_there() -> bool:
    """Whether its wheel can be imported; see bench/gpu.sh for how to carry it to a machine without network."""
    return importlib.util.find_spec("sparsify") is not None


def load_sparsify(device: torch.device) -> tuple[Any, Any]:
    """SparseCoder and its configuration, without the package's __init__, which wants datasets and schedulefree."""
    if device.type != "cuda":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    if "sparsify.sparse_coder" not in sys.modules:
        spec = importlib.util.find_spec("sparsify")
        assert spec is not None and spec.origin is not None
        package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("sparsify", None, is_package=True))
        package.__path__ = [str(Path(spec.origin).parent)]
        sys.modules["sparsify"] = package
    # it prints which decoder it takes
    with redirect_stdout(StringIO()):
        coder = importlib.import_module("sparsify.sparse_coder").SparseCoder
        config = importlib.import_module("sparsify.config").SparseCoderConfig
    return coder, config


SPARSIFY_STEP = Contestant(SPARSIFY, SPARSIFY, "topk", "none", SparsifySteps)

# in the order of importance: what time does not allow is left out from the end
ON_CUDA = [
    fastdiff("fastdiff", "exact"),
    fastdiff("fastdiff", "previous"),
    dense("dense bf16, torch.compile, fused Adam", autocast=torch.bfloat16, published=False, compiled=True, fused=True,
          reads_loss=False),
    dense("dense fp32 high", matmul="high", published=False),
    fastdiff("fastdiff TopK, MSE", "none", group="topk"),
    SPARSIFY_STEP,
    dense("dense fp32 highest", published=False, samples=2, warmup=1),
    dense("dense bf16, eager", autocast=torch.bfloat16, published=False),
    dense("dense fp32 high, as published", matmul="high"),
    fastdiff("fastdiff, bf16 moments", "previous", moments="bfloat16"),
]  # fmt: skip
ON_CPU = [
    fastdiff("fastdiff", "exact", precision="float32"),
    fastdiff("fastdiff, bf16 encoder", "exact", precision="bfloat16"),
    dense("dense fp32, as published"),
    dense("dense fp32, fewest passes", published=False),
    fastdiff("fastdiff TopK, MSE", "none", group="topk", precision="float32"),
    SPARSIFY_STEP,
]
