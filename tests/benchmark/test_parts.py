"""Every kernel has a part of the step, and the profile of a step adds up."""

import ast
from itertools import cycle
from pathlib import Path

import pytest
import torch

import fastdiff.kernels
from fastdiff.benchmark.data import synthetic
from fastdiff.benchmark.parts import OTHER, part_of, profile_parts
from fastdiff.benchmark.shapes import SHAPES
from fastdiff.benchmark.steps import fused_steps, step_config

KERNELS = {
    node.name: file.stem
    for file in Path(fastdiff.kernels.__file__).parent.glob("*.py")
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}


def test_there_are_kernels():
    assert {"_decode_loss_kernel", "_update_rows_kernel", "_group_max_kernel"} <= set(KERNELS)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_every_kernel_has_a_part(kernel):
    assert part_of(kernel, "cuda") != OTHER


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "encoder"),
        ("cutlass_80_tensorop_bf16_s16816gemm", "encoder"),
        ("_group_max_kernel", "selection"),
        ("_maxima_digits_kernel", "selection"),
        ("_emit_kernel", "selection"),
        ("_decode_loss_kernel", "decode"),
        ("_token_gradients_kernel", "decode"),
        ("_permute_kernel", "order"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "order"),
        ("_norm_rows_kernel", "clip"),
        ("_update_rows_kernel", "update"),
        ("_update_flat_kernel", "update"),
        ("_finish_norms_kernel", "update"),
        ("void at::native::vectorized_elementwise_kernel", OTHER),
    ],
)
def test_kernels_by_name(name, part):
    assert part_of(name, "cuda") == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", "encoder"),
        ("aten::topk", "selection"),
        ("aten::_embedding_bag_forward_only", "decode"),
        ("aten::sampled_addmm_out_sparse_csr", "decode"),
        ("aten::sort", "order"),
        ("aten::linalg_vector_norm", "clip"),
        ("aten::_fused_adam_", "update"),
        ("aten::add", OTHER),
    ],
)
def test_operations_by_name(name, part):
    assert part_of(name, "cpu") == part


def test_a_profiled_step_has_its_parts_and_no_notes(capfd):
    shape, cpu = SHAPES["tiny"], torch.device("cpu")
    data = synthetic(shape, cpu, dtype=torch.float32)
    trainer, batches = fused_steps(data, step_config(shape)), cycle(data.batches)
    found = profile_parts(lambda: trainer.step(next(batches)), cpu, n=2)
    assert {"encoder", "selection", "decode", "order", "clip", "update"} <= set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True) and min(found.values()) > 0
    assert "USDT" not in capfd.readouterr().err
