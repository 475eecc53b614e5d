"""What the Triton kernels move and multiply, against the least that would do: a judgement without a GPU.

    python -m benchmarks.triton_model [--sms 132] [--dtype bfloat16] [--rows 1 2 4 8 16 64 256]

Everything is counted from the launches that ``linear_24`` would make (:func:`benchmarks.triton_cubins.record`):
grid, tile, parts of K. Per decode shape of Llama-3-8B and Qwen2.5-7B:

* least: values, meta, x and y once each;
* bytes: what goes to and from memory. The weight once per group of eight tiles of rows (their programs are
  neighbours, so that the second to eighth find it in the L2 cache), x once, scratch of split sums written and read,
  y once;
* L2: bytes between the L2 cache and the multiprocessors over the least: every tile's own reads;
* operations: multiplications made over those that 2:4 needs (N · K / 2 per row);
* programs: how many there are for each multiprocessor.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.triton_cubins import Launch, record
from sparsekern.backends import triton as backend

# (N, K): query/key/value in one, output, gate and up in one, down.
MODELS = {
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "Qwen2.5-7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
}


class Cost(NamedTuple):
    """Bytes from and to memory, bytes through the L2 cache, multiplications. As the kernels do it, and the least."""

    memory: int
    l2: int
    products: int
    least_bytes: int
    least_products: int
    programs: int


def cost(launches: list[Launch], M: int, N: int, K: int, dtype: torch.dtype) -> Cost:
    """What one linear_24 of these launches costs."""
    size = dtype.itemsize
    weight = N * (K // 2 * size + math.ceil(K / 8))
    x, y = M * K * size, M * N * size
    product, *rest = launches
    arguments = product.arguments
    if product.name == "_linear_24_few":
        tiles_m, rows = 1, M
        products = M * N * (K // 2)  # of kept values alone
    else:
        tiles_m = math.ceil(M / arguments["BLOCK_M"])
        rows = tiles_m * arguments["BLOCK_M"]
        products = rows * math.ceil(N / arguments["BLOCK_N"]) * arguments["BLOCK_N"] * K
    tiles_n = math.ceil(N / arguments["BLOCK_N"])
    splits = product.grid[1]
    scratch = 2 * splits * M * N * 4 if rest else 0  # written, then read by _sum_splits
    memory = weight * math.ceil(tiles_m / 8) + x + scratch + y
    l2 = weight * tiles_m + x * tiles_n + scratch + y
    return Cost(memory, l2, products, weight + x + y, M * N * (K // 2), product.programs)


def of(M: int, N: int, K: int, dtype: torch.dtype, sms: int) -> tuple[str, Cost]:
    """The kernel that serves y[M, N] = x[M, K] · Wᵀ on a device with `sms` multiprocessors, and its cost."""
    x, values = torch.empty(M, K, dtype=dtype), torch.empty(N, K // 2, dtype=dtype)
    meta = torch.empty(N, math.ceil(K / 8), dtype=torch.uint8)
    with mock.patch.object(backend.autotune, "sms", return_value=sms):
        backend.autotune._chosen.clear()  # what another number of multiprocessors chose
        launches = record(backend.linear_24, x, values, meta)
    config = {k: v for k, v in launches[0].arguments.items() if k.startswith("BLOCK")}
    tile = "x".join(
        str(v) for _, v in sorted(config.items(), key=lambda kv: "MNK".index(kv[0][-1]))
    )
    name = launches[0].name.removeprefix("_linear_24_")
    return f"{name} {tile}, {launches[0].grid[1]} parts", cost(launches, M, N, K, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sms", type=int, default=132, help="multiprocessors; an H100 has 132")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for model, shapes in MODELS.items():
        table = Table(title=f"{model}, {options.dtype}, {options.sms} multiprocessors")
        columns = "M", "N", "K", "kernel, tile", "least MB", "bytes", "L2", "operations", "programs"
        for column in columns:
            table.add_column(column, justify="left" if "kernel" in column else "right")
        for N, K in shapes:
            for M in options.rows:
                kernel, c = of(M, N, K, dtype, options.sms)
                table.add_row(
                    str(M),
                    str(N),
                    str(K),
                    kernel,
                    f"{c.least_bytes / 1e6:.1f}",
                    f"{c.memory / c.least_bytes:.3f}",
                    f"{c.l2 / c.least_bytes:.2f}",
                    f"{c.products / c.least_products:.2f}",
                    f"{c.programs / options.sms:.1f}",
                )
            table.add_section()
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
