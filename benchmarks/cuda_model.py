"""What the CUDA kernels move and compute for the layers of two language models, from their launch descriptions.

    python -m benchmarks.cuda_model [--multiprocessors 132] [--dtype float32] [--tf32] [--format]

No device and no timing: a model. Per launch of ``linear_24``:

* bytes: what crosses the memory's bus, over the least that must (weight, x and y once). Sums of splits count twice,
  written and read, though the L2 holds them.
* L2: what the blocks read and write in all, over the same least.
* operations: multiply-adds of the instructions issued, over M · N · K / 2; plain multiply-add and tf32, which
  expand W, take 2.
* waves: blocks over the blocks that run at once; occupancy: the share of multiprocessors that have one, and the
  threads on each out of 2048; shared: bytes of a block.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch

from sparsekern.backends import cuda_launch as plan

# [out, in] of the linear layers; query, key and value, and gate and up, as the single layers that inference makes.
LAYERS = {
    "Llama-3-8B": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "qkv": (6144, 4096),
        "gate, up": (14336, 4096),
        "gate+up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "Qwen2.5-7B": {
        "q, o": (3584, 3584),
        "k, v": (512, 3584),
        "qkv": (4608, 3584),
        "gate, up": (18944, 3584),
        "gate+up": (37888, 3584),
        "down": (3584, 18944),
        "head": (152064, 3584),
    },
}
ROWS = (1, 8, 16, 32, 64, 512, 4096)
REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048


@dataclass(frozen=True)
class Cost:
    kernel: str
    least: int
    memory: int
    l2: int
    operations: float  # over the least
    waves: float
    busy: float  # share of multiprocessors with a block in the first wave
    threads: int  # on a multiprocessor
    shared: int


def blocks_at_once(device: plan.Device, launch: plan.Launch) -> int:
    """On a multiprocessor: by registers, shared memory (1 KB a block is the system's) and threads."""
    registers = plan.registers(launch)
    return min(
        REGISTERS_PER_MULTIPROCESSOR // (registers * launch.block),
        device.shared_per_multiprocessor // (launch.shared + 1024),
        THREADS_PER_MULTIPROCESSOR // launch.block,
    )


def linear_24(
    device: plan.Device,
    M: int,
    N: int,
    K: int,
    prepacked: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    tf32: bool = False,
) -> Cost:
    """The launch that the back end would choose for aligned tensors."""
    size = dtype.itemsize
    prepacked &= plan.has_prepacked_layout(dtype, N, K)
    weight = {"packed": 1 << 20} if prepacked else {"values": 1 << 20, "meta": 1 << 20}
    o = plan.Operands(M, N, K, x=1 << 20, x_stride=K, x_step=1, y=1 << 20, **weight)
    weights, x, y = N * K // 2 * size + N * K // 8, size * M * K, size * M * N
    least = weights + x + y
    if plan.takes_decode(dtype, o):
        cut = plan.cut_decode(device, dtype, M, N, K)
        launch = plan.linear_24_decode(dtype, o, cut, 1 << 20)[0]
        partial = 2 * 4 * cut.splits * M * N if cut.splits > 1 else 0
        blocks = launch.grid[0]
        memory, l2 = least + partial, weights + blocks * x + y + partial
        padded = blocks * cut.features * cut.tokens * (1 if size == 2 else 2)  # expanded
        k = plan.ceil_div(K, 64) * 64
    else:
        launch = plan.linear_24_many_rows(device, dtype, o, tf32)
        fma, sparse = launch.source == "linear_24_fma", launch.source == "linear_24_sm80"
        rows, wide = (64, 64) if fma else (plan.rows_of_tile(device, o), 128)
        down, across = plan.ceil_div(M, rows), plan.ceil_div(N, wide)
        memory, l2 = least, down * weights + across * x + y
        padded, k = down * rows * across * wide * (1 if sparse else 2), plan.ceil_div(K, 64) * 64
    each = blocks_at_once(device, launch)
    blocks = launch.grid[0] * launch.grid[1]
    return Cost(
        launch.kernel,
        least,
        memory,
        l2,
        padded * k / (M * N * K),
        blocks / (each * device.multiprocessors),
        min(1.0, blocks / device.multiprocessors),
        min(each, plan.ceil_div(blocks, device.multiprocessors)) * launch.block,
        launch.shared,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multiprocessors", type=int, default=plan.H100.multiprocessors)
    parser.add_argument("--format", action="store_true", help="the format itself, not prepacked")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="of float32, as if torch might use it")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    device = replace(plan.H100, multiprocessors=arguments.multiprocessors)
    print(f"A model from the launch descriptions, {arguments.dtype}; nothing here was measured.\n")
    head = (
        "layer",
        "M",
        "N",
        "K",
        "bytes",
        "L2",
        "operations",
        "waves",
        "busy",
        "threads",
        "shared",
        "kernel",
    )
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 2) + " --- |")
    for model, layers in LAYERS.items():
        for layer, (N, K) in layers.items():
            for M in ROWS:
                c = linear_24(device, M, N, K, not arguments.format, dtype, arguments.tf32)
                print(
                    f"| {model} {layer} | {M} | {N} | {K} | {c.memory / c.least:.3f} | {c.l2 / c.least:.2f} "
                    f"| {c.operations:.2f} | {c.waves:.2f} | {c.busy:.0%} | {c.threads} | {c.shared} "
                    f"| `{c.kernel}` |"
                )


if __name__ == "__main__":
    main()
