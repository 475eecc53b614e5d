"""What floating point makes of the 2:4 products, against torch's dense product with the pruned weight.

Accuracy at depth; denormals, infinities, NaN and zeros of both signs; the same bits from every run, number of threads
and layout. What torch's own dense product does with denormals, as measured with torch 2.13 on x86-64:

* fp32 and fp16 keep them. fp16 sums in fp32, where its denormals are normal numbers.
* bf16 loses them, among inputs and among results, on a CPU with AVX512-BF16: `vdpbf16ps` flushes whatever the mode.
* `torch.set_flush_denormal(True)` sets the mode of the calling thread alone. A worker of the OpenMP pool has the mode
  that the thread which started it had at that moment. So with two threads, fp32 results are flushed all over if the
  mode was set before the pool came up, and only where the caller itself computed if it was set after.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import sparsekern as sk
from sparsekern import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z) ** 2,
    "gelu": F.gelu,
    "silu": F.silu,
}
WORD = {2: torch.int16, 4: torch.int32}


def bits(t: torch.Tensor) -> torch.Tensor:
    """Integers, which no mode of the floating-point unit touches."""
    return t.contiguous().view(WORD[t.element_size()])


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weight(N: int, K: int, dtype: torch.dtype, seed: int = 1):
    """values, meta and the dense form of a pruned weight."""
    dense = reference.prune_24(normal(N, K, dtype=dtype, seed=seed))
    return *reference.pack_24(dense), dense


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- accuracy ----


@pytest.mark.parametrize("K", [64, 1000, 4096])
@pytest.mark.parametrize("M", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_stay_within_twice_those_of_torch(isa, dtype, M, K):
    N = 97 if M > 4 else 997  # enough outputs for a root mean square to settle
    x, (values, meta, dense) = normal(M, K, dtype=dtype), weight(N, K, dtype)
    want = x.double() @ dense.double().T
    ours = (sk.linear_24(x, values, meta).double() - want).abs()
    torchs = (F.linear(x, dense).double() - want).abs()
    rms = [float(e.square().mean().sqrt()) for e in (ours, torchs)]
    # The largest of a thousand or more errors is a noisy figure: three times torch's.
    assert rms[0] <= 2 * rms[1], f"root mean square {rms[0]:.3g}, torch's {rms[1]:.3g}"
    assert ours.max() <= 3 * torchs.max(), f"largest {ours.max():.3g}, torch's {torchs.max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_of_the_gradients_stay_within_twice_those_of_torch(isa, dtype):
    for M, N, K in [(1, 1024, 516), (16, 1024, 516), (256, 300, 132), (1000, 96, 68)]:
        dy, x = normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=2)
        values, meta, dense = weight(N, K, dtype)
        wide = dy.double(), x.double(), dense.double()
        for got, torchs, want in [
            (torch.ops.sparsekern.linear_24_dx(dy, values, meta), dy @ dense, wide[0] @ wide[2]),
            (
                torch.ops.sparsekern.linear_24_dvalues(dy, x, meta),
                reference.gather_24(dy.T @ x, meta),
                reference.gather_24(wide[0].T @ wide[1], meta),
            ),
        ]:
            ours, theirs = ((t.double() - want).square().mean().sqrt() for t in (got, torchs))
            # A sum of one product is exact in torch's fp32; a rounding is as good.
            least = torch.finfo(dtype).eps / 4 * want.square().mean().sqrt()
            assert ours <= 2 * max(theirs, least), f"{ours:.3g}, torch's {theirs:.3g}"


# ---- denormals ----


def tiny(dtype: torch.dtype, M: int, N: int = 200, K: int = 64):
    """Products whose results are denormal in dtype, and products of denormal weights with normal results."""
    least = torch.finfo(dtype).smallest_normal
    values, meta, _ = weight(N, K, dtype)
    x = normal(M, K, dtype=dtype).clamp(-2, 2)
    scale = math.sqrt(least) / 8 if dtype is not torch.float16 else 2.0**-9
    yield "results", x * scale, values * scale, meta
    # Spelt by their bits, as arithmetic may flush them: magnitudes of 1 to 100 units.
    unit = torch.randint(1, 101, (N, K // 2), generator=torch.Generator().manual_seed(3))
    small = unit.to(WORD[dtype.itemsize]).view(dtype)
    # A denormal of bf16 is one of fp32, too.
    yield "weights", x * (2.0**14 if dtype is torch.float16 else 2.0**100), small, meta


def exact(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """In float64, where denormals of all three are normal numbers."""
    return x.double() @ reference.unpack_24(values.double(), meta).T


@pytest.mark.parametrize("M", [1, 3, 16, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_denormals_are_kept(isa, dtype, M):
    least = torch.finfo(dtype).smallest_normal
    unit = least * torch.finfo(dtype).eps
    with threads(2):
        for what, x, values, meta in tiny(dtype, M):
            want, got = exact(x, values, meta), sk.linear_24(x, values, meta).double()
            if what == "results":
                assert (want.abs() < least).double().mean() > 0.9
                error = (got - want).abs().max() / unit
                # fp32 rounds each of its partial sums to whole units; fp16 does not until the end.
                assert error <= (8 if dtype is torch.float32 else 0.501), f"{error} units"
            else:
                assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
            assert (got != 0).double().mean() > 0.9


@pytest.mark.parametrize("M", [1, 3, 16, 300])
def test_denormals_of_bfloat16_are_kept_or_lost_as_in_torch(isa, M):
    with threads(2):
        for what, x, values, meta in tiny(torch.bfloat16, M):
            want = exact(x, values, meta)
            dense = reference.unpack_24(values, meta)
            ours, torchs = sk.linear_24(x, values, meta), F.linear(x, dense)
            assert bool(ours.isfinite().all())
            ours, torchs = ((t.double() - want).square().mean().sqrt() for t in (ours, torchs))
            least = torch.finfo(torch.bfloat16).eps / 2 * want.square().mean().sqrt()
            assert ours <= 2 * max(torchs, least), f"{what}: {ours:.3g}, torch's {torchs:.3g}"


FLUSH = """
import sys, torch
import sparsekern as sk
sys.path.insert(0, sys.argv[1])
from test_numerics import DTYPES, bits, exact, tiny
F = torch.nn.functional
when, threads = sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)  # no pool yet
K = 64
cases = [(what, d, x, v, m, sk.linear_24(x, v, m), exact(x, v, m), sk.unpack_24(v, m))
         for d in DTYPES[:2] for M in (1, 3, 16, 300) for what, x, v, m in tiny(d, M, 1030, K)]
torch.set_num_threads(threads)
if when == "after":  # the pool comes up, in the usual mode
    torch.randn(512, 512) @ torch.randn(512, 512)
    sk.linear_24(*cases[3][2:5])
assert torch.set_flush_denormal(True)
flushes = 0
for what, dtype, x, values, meta, kept, want, dense in cases:
    name = f"{dtype}, denormal {what}, M = {len(x)}"
    got, torchs = sk.linear_24(x, values, meta), F.linear(x, dense)
    if dtype is torch.float16:  # its denormals are normal numbers of fp32
        assert torch.equal(bits(got), bits(kept)), name
        continue
    least, eps = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps
    if when == "before" or threads == 1:
        lost = want.abs() < least / 2
        flushes += not bits(torchs)[lost].any()  # MKL's kernels do on some CPUs, not for every M on others
        assert not bits(got)[lost].any(), name
    # Each as it should be, or flushed, wherever it was computed.
    error = (got.double() - want).abs()
    rounding = 8 * least * eps + 1e-4 * want.abs().max()
    assert ((error <= rounding) | (bits(got) == 0) | (error <= K * least)).all(), name

assert flushes or when == "after", "torch flushes nothing"
assert torch.set_flush_denormal(False)
torch.set_num_threads(1)
for what, dtype, x, values, meta, kept, *_ in cases:
    assert torch.equal(bits(sk.linear_24(x, values, meta)), bits(kept)), f"{what} afterwards"
print("as torch does")
"""


@pytest.mark.parametrize(("when", "count"), [("before", 1), ("before", 2), ("after", 2)])
def test_flushed_denormals_are_flushed_as_in_torch(isa, when, count):
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush denormals")
    env = os.environ | {"SPARSEKERN_CPU_ISA": isa}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", FLUSH, here, when, str(count)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "as torch does\n"), done.stdout + done.stderr


# ---- infinities, NaN, zeros of both signs ----

SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e4, -1e4, -100.0, 1e-4]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_special_numbers_are_those_of_torch(isa, dtype, activation):
    # Against torch's float64: its fp32 and bf16 gelu, which oneDNN computes, makes a NaN of infinity.
    # Row n of the weight is 1 and 0 or 0 and 1, so that y[m, n] is x[m, 0] or x[m, 1]; where the zero
    # meets an infinity, a NaN, as in a dense product.
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 20, dtype=dtype)
    meta = torch.full((40, 1), 0x44, dtype=torch.uint8)
    dense = reference.unpack_24(values, meta)
    f, eps, tiny = ACTIVATIONS[activation], torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for M in (1, 3, 16, 40):
        for special in SPECIAL:
            x = torch.ones(M, 4, dtype=dtype)
            x[M // 2, 1] = special
            want = f(F.linear(x.double(), dense.double())).to(dtype).double()
            theirs = f(F.linear(x, dense)).double()
            got = sk.linear_24(x, values, meta, None, activation).double()
            name = f"{activation}({special}), M = {M}"
            assert torch.equal(got.isinf(), want.isinf()), name
            # torch's gelu and silu have a NaN where the limit is zero: either will do.
            limit = got == 0 if special == -math.inf else torch.zeros_like(got, dtype=torch.bool)
            assert torch.equal(got.isnan() | limit, want.isnan() | limit), name
            finite = want.isfinite() & ~limit
            error, torchs = ((t - want)[finite].abs() for t in (got, theirs))
            assert (error <= torch.maximum(2 * torchs, eps * want[finite].abs() + tiny)).all(), name


def unspoilt(got: torch.Tensor, want: torch.Tensor, isa: str) -> bool:
    """The same bits, or where AMX leaves what is not finite to AVX-512, another rounding."""
    if isa == "amx" and got.dtype is torch.float16:
        return torch.allclose(got.float(), want.float(), rtol=2**-10, atol=2**-10)
    return torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_its_own_results_and_no_other(isa, dtype, bad):
    values, meta, _ = weight(131, 68, dtype)
    for M in (2, 3, 4, 11, 16, 33, 64, 300):
        x = normal(M, 68, dtype=dtype)
        want = sk.linear_24(x, values, meta)
        spoilt = x.clone()
        rows = [0, M // 2, M - 1]
        spoilt[rows] = bad
        got = sk.linear_24(spoilt, values, meta)
        assert not got[rows].isfinite().any()
        others = [m for m in range(M) if m not in rows]
        assert unspoilt(got[others], want[others], isa), f"M = {M}"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_finite_spoils_its_own_column_and_no_other(isa, dtype, bad):
    values, meta, _ = weight(131, 68, dtype)
    for M in (1, 3, 4, 16, 33, 300):
        x = normal(M, 68, dtype=dtype)
        want = sk.linear_24(x, values, meta)
        for n, slot in ((0, 0), (64, 17), (130, 33)):
            spoilt = values.clone()
            spoilt[n, slot] = bad
            got = sk.linear_24(x, spoilt, meta)
            assert not got[:, n].isfinite().any()
            got[:, n] = want[:, n]
            assert unspoilt(got, want, isa), f"M = {M}, column {n}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_either_sign_count_as_zero(isa, dtype):
    values, meta, _ = weight(67, 68, dtype)
    minus = torch.full((67,), -0.0, dtype=dtype)
    for M in (1, 3, 16, 40):
        x = normal(M, 68, dtype=dtype)
        for zero in (0.0, -0.0):
            for y in (
                sk.linear_24(torch.full_like(x, zero), values, meta, minus),
                sk.linear_24(x, torch.full_like(values, zero), meta),
                sk.linear_24(torch.full_like(x, zero), torch.full_like(values, -0.0), meta, minus),
            ):
                assert bool((y == 0).all())
        # A bias of -0.0 changes no sum.
        with_bias, without = sk.linear_24(x, values, meta, minus), sk.linear_24(x, values, meta)
        assert torch.equal(with_bias, without)


# ---- the same bits ----

# M of every kernel; N odd; K with a tail of every vector; enough work for two threads and more.
SHAPES = [(1, 2053, 516), (1, 1031, 1004), (2, 1031, 268), (3, 1031, 516), (4, 517, 1028)]
SHAPES += [(5, 1031, 260), (11, 515, 132), (12, 259, 516), (16, 515, 100), (17, 131, 516)]
SHAPES += [(33, 131, 260), (64, 67, 268), (65, 131, 84), (128, 33, 300), (300, 67, 132)]
SHAPES += [(513, 51, 68), (1025, 17, 52)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_run_or_the_number_of_threads(isa, dtype):
    for M, N, K in SHAPES:
        x, dy = normal(M, K, dtype=dtype), normal(M, N, dtype=dtype, seed=2)
        values, meta, _ = weight(N, K, dtype)
        bias = normal(N, dtype=dtype, seed=3)
        calls = {
            "linear_24": lambda x=x, v=values, m=meta, b=bias: sk.linear_24(x, v, m, b, "gelu"),
            "linear_24_dx": lambda y=dy, v=values, m=meta: torch.ops.sparsekern.linear_24_dx(
                y, v, m
            ),
            "linear_24_dvalues": lambda y=dy, x=x, m=meta: torch.ops.sparsekern.linear_24_dvalues(
                y, x, m
            ),
        }
        for name, call in calls.items():
            with threads(1):
                want = bits(call())
            for count in (1, 2, 3, 2):
                with threads(count):
                    same = torch.equal(bits(call()), want)
                assert same, f"{name}, M, N, K = {M, N, K} on {count} threads"


def elsewhere(t: torch.Tensor, offset: int) -> torch.Tensor:
    """A contiguous copy that starts `offset` elements into its storage."""
    return t.new_empty(t.numel() + offset)[offset:].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_where_or_how_tensors_lie(isa, dtype):
    for M, N, K in [
        (1, 131, 68),
        (3, 67, 516),
        (4, 65, 100),
        (16, 131, 36),
        (33, 49, 260),
        (300, 35, 84),
    ]:
        x, bias, (values, meta, _) = (
            normal(M, K, dtype=dtype),
            normal(N, dtype=dtype, seed=2),
            weight(N, K, dtype),
        )
        want = bits(sk.linear_24(x, values, meta, bias))
        for offset in (1, 3, 17):
            moved = [elsewhere(t, offset) for t in (x, values, meta, bias)]
            assert torch.equal(bits(sk.linear_24(*moved)), want), f"{M, N, K}, offset {offset}"
        layouts = {
            "column-major": x.T.contiguous().T,
            "every third column": x.new_empty(M, 3 * K)[:, 1::3].copy_(x),
            "sliced rows": x.new_empty(2 * M, K + 5)[::2, 3:-2].copy_(x),
            "column-major with a gap": x.new_empty(K, M + 3)[:, 2:-1].T.copy_(x),
        }
        for name, view in layouts.items():
            assert torch.equal(view, x)
            assert torch.equal(bits(sk.linear_24(view, values, meta, bias)), want), (
                f"{M, N, K}, {name}"
            )
        batched = x.expand(2, M, K).permute(1, 0, 2)  # [M, 2, K] with a stride of zero
        both = sk.linear_24(batched, values, meta, bias)
        alone = sk.linear_24(batched.contiguous(), values, meta, bias)
        assert torch.equal(bits(both), bits(alone)), f"{M, N, K}, permuted and expanded"
