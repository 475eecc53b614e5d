"""What the launch plans promise for real layer shapes, by the model of ``benchmarks/cuda_model.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import cuda_model
from sparsekern.backends import cuda_launch

DEVICE = cuda_launch.H100
SHAPES = sorted({shape for layers in cuda_model.LAYERS.values() for shape in layers.values()})


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("prepacked", [False, True])
def test_decode(N, K, prepacked, dtype):
    """Every multiprocessor has a block (128 of 132 are called every); of large weights next to nothing is moved but
    the weight."""
    for M in (1, 2, 8, 16, 17, 32, 33, 64):
        cost = cuda_model.linear_24(DEVICE, M, N, K, prepacked, dtype)
        assert "decode" in cost.kernel
        assert cost.busy >= 0.96
        if N * K >= 16 << 20:
            assert cost.memory <= 1.05 * cost.least
        if N >= 14336:
            assert cost.memory == cost.least


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_many_rows(N, K):
    for M in (128, 512, 4096):
        cost = cuda_model.linear_24(DEVICE, M, N, K)
        assert cost.kernel.startswith("linear_24_sm80")
        assert cost.operations == 1.0
        for tf32 in (False, True):
            cost = cuda_model.linear_24(DEVICE, M, N, K, dtype=torch.float32, tf32=tf32)
            assert ("tf32" in cost.kernel) == tf32
            assert cost.operations == 2.0
            assert 2 * (cost.shared + 1024) <= 164 << 10


def test_shared_memory_fits():
    """Two blocks of the largest tiles on an A100 (164 KB, 163 a block), one on an Ada (100 KB, 99 a block); one of
    decode where its registers leave no room for another."""
    for M in (1, 16, 32, 64, 4096):
        for N in (4096, 14336, 128256):
            for prepacked in (False, True):
                cost = cuda_model.linear_24(DEVICE, M, N, 4096, prepacked)
                assert cost.shared <= 99 << 10
                if "decode_sm80<DType::bf16, 64, 4" not in cost.kernel:
                    assert 2 * (cost.shared + 1024) <= 164 << 10
    for M in (1, 8, 16, 32, 64):
        assert cuda_model.linear_24(DEVICE, M, 4096, 4096, dtype=torch.float32).shared <= 99 << 10


def test_cut_covers_k():
    """Splits cover the units of k, none is empty."""
    for N in (1, 16, 100, 512, 4096):
        for K in (4, 256, 260, 3584, 18944):
            for M in (1, 9, 32, 64):
                for dtype in (torch.bfloat16, torch.float32):
                    cut = cuda_launch.cut_decode(DEVICE, dtype, M, N, K)
                    units = -(-K // 256)
                    assert (cut.splits - 1) * cut.units < units <= cut.splits * cut.units
                    assert cut.tokens >= M


def test_arguments_are_structs():
    """Padded as C pads them: int32 at the end of a struct of 8-byte fields."""
    assert len(cuda_launch.pack("QQi", 1, 2, 3)) == 24
    assert cuda_launch.takes_x_by(16, 24, 1) == 16
    assert cuda_launch.takes_x_by(16, 4, 1) == 8
    assert cuda_launch.takes_x_by(6, 4, 1) == 2
    assert cuda_launch.takes_x_by(16, 8, 2) == 2
    assert not cuda_launch.has_prepacked_layout(torch.float32, 64, 64)
