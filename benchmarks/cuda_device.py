"""The CUDA back end on a device: self-test, then speed against the library a user would call instead.

    python -m benchmarks.cuda_device [--rounds 20]

Both sides run in the same loop, in turn, on the current stream; times are medians of CUDA events with the spread from
the first to the third quartile. Before every call of up to 64 rows a buffer larger than the L2 is written, so that
weights come from memory. cuBLAS is ``torch.nn.functional.linear``; cuSPARSELt, where torch has it, runs the best
algorithm that ``torch._cslt_sparse_mm_search`` finds. Prints Markdown; nothing is written to disk. For races and stray
accesses:

    compute-sanitizer --tool racecheck sparsekern selftest
    compute-sanitizer --tool memcheck sparsekern selftest
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import sparsekern as sk
from sparsekern import backends

from .cuda_model import LAYERS

FLUSH_BYTES = 256 << 20


def time_in_turn(
    calls: dict[str, Callable[[], object]], rounds: int, flush: torch.Tensor | None
) -> dict[str, tuple[float, float, float]]:
    """Microseconds of each call: median, first and third quartile."""
    events = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            if flush is not None:
                flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    quartiles = torch.tensor([0.5, 0.25, 0.75])
    return {
        name: tuple(
            (1000 * torch.tensor([s.elapsed_time(e) for s, e in pairs]))
            .quantile(quartiles)
            .tolist()
        )
        for name, pairs in events.items()
    }


def cusparselt(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object] | None:
    """y transposed, as cuSPARSELt gives it, by its best algorithm; None where torch has none."""
    try:
        compressed = torch._cslt_compress(weight)
        best = torch._cslt_sparse_mm_search(compressed, x.t())
        return partial(torch._cslt_sparse_mm, compressed, x.t(), alg_id=int(best))
    except RuntimeError:
        return None


def row(*cells) -> None:
    print("| " + " | ".join(str(c) for c in cells) + " |")


def shown(times: tuple[float, float, float]) -> str:
    return f"{times[0]:.1f} ({times[1]:.1f}–{times[2]:.1f})"


def linears(rounds: int) -> None:
    print("\n## linear_24, bf16, µs: median (quartiles)\n")
    row("layer", "M", "cuBLAS", "cuSPARSELt", "linear_24", "prepacked", "cuBLAS / best")
    row(*["---"] * 7)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for model, layers in LAYERS.items():
        for layer, (N, K) in layers.items():
            weight = sk.prune_24(torch.randn(N, K, device="cuda", dtype=torch.bfloat16))
            values, meta = sk.pack_24(weight)
            packed = sk.prepack_24(values, meta)
            for M in (1, 8, 16, 32, 64, 512, 4096, 8192):
                x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
                calls = {
                    "cuBLAS": partial(F.linear, x, weight),
                    "linear_24": partial(sk.linear_24, x, values, meta),
                    "prepacked": partial(sk.linear_24_prepacked, x, packed, N),
                }
                if peer := cusparselt(weight, x):
                    calls["cuSPARSELt"] = peer
                times = time_in_turn(calls, rounds, flush if M <= 64 else None)
                best = min(times["linear_24"][0], times["prepacked"][0])
                cells = [shown(times[n]) if n in times else "–" for n in ("cuBLAS", "cuSPARSELt")]
                cells += [shown(times[n]) for n in ("linear_24", "prepacked")]
                row(f"{model} {layer}", M, *cells, f"{times['cuBLAS'][0] / best:.2f}")


def formats(rounds: int) -> None:
    print("\n## Formats, 256 MiB of bf16, TB/s of input: median\n")
    row("op", "zeros", "TB/s", "share of copy_")
    row(*["---"] * 4)
    n = 128 << 20
    weight = torch.randn(n // 4096, 4096, device="cuda", dtype=torch.bfloat16)
    copy = torch.empty_like(weight)
    for op in (sk.prune_24, torch.ops.sparsekern.pack_24.default):
        times = time_in_turn(
            {"op": partial(op, weight), "copy": partial(copy.copy_, weight)}, rounds, None
        )
        rate = weight.nbytes / times["op"][0] / 1e6
        row(op, "–", f"{rate:.2f}", f"{times['copy'][0] / times['op'][0]:.2f}")
    mask = torch.empty(n // 8, dtype=torch.uint8, device="cuda")
    offsets = torch.empty(n // 4096, dtype=torch.int64, device="cuda")
    count = torch.empty(1, dtype=torch.int64, device="cuda")
    for zeros in (0.5, 0.9):
        x = torch.where(torch.rand(n, device="cuda") < zeros, 0, weight.view(-1))
        values = torch.empty_like(x)
        compress = torch.ops.sparsekern.pack_zvc_out
        calls = {
            "op": partial(compress, x, mask, values, offsets, count),
            "copy": partial(values.copy_, x),
        }
        times = time_in_turn(calls, rounds, None)
        rate = x.nbytes / times["op"][0] / 1e6
        row("pack_zvc_out", zeros, f"{rate:.2f}", f"{times['copy'][0] / times['op'][0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    for op in ("linear_24", "pack_24", "pack_zvc"):
        served = backends.resolve(op, torch.bfloat16, device).__module__
        print(f"{op}: {served} on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    linears(arguments.rounds)
    formats(arguments.rounds)


if __name__ == "__main__":
    main()
