"""The CUDA sources, executed on the CPU (``tests/cuda_on_cpu``): every kernel against the reference, in several orders
of its lanes, with the race checker on; and once more under the address sanitizer, in a process of its own.

The back end's glue runs too, on CPU tensors: only the machine that launches is another.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.execution import CXX, SCHEDULES, Execution, Fault, build, plant

from sparsekern import reference, selftest
from sparsekern.backends import cuda, cuda_launch, cuda_machine
from sparsekern.samples import Samples

CPU = torch.device("cpu")
ADDRESSES = (
    os.environ.get("SPARSEKERN_TEST_ADDRESSES") == "1"
)  # set by test_under_the_address_sanitizer

pytestmark = [pytest.mark.compiler, pytest.mark.cuda_sources]


@pytest.fixture(scope="module")
def execution():
    """The CPU as the machine of the CUDA back end."""
    execution = Execution(build("addresses" if ADDRESSES else "races"))
    with cuda_machine.instead(CPU, execution):
        yield execution


@pytest.fixture(params=[2] if ADDRESSES else SCHEDULES, ids=lambda s: f"schedule{s}")
def schedule(request, execution):
    execution.schedule = request.param
    return request.param


@pytest.fixture(autouse=True)
def plain(request):
    """Every test starts on the large device, first come first served."""
    if "execution" in request.fixturenames:
        execution = request.getfixturevalue("execution")
        execution.device, execution.schedule = LARGE, 0


def dtypes_of(op: str) -> list[torch.dtype]:
    return sorted(cuda.SERVES[op], key=str)


# Kernels whose lanes have nothing to do with each other, so that no order tells more than another.
ALONE = {"prune_24", "prune_24_transposable", "pack_24", "unpack_24", "gather_24"}


@pytest.mark.parametrize("op", sorted(ALONE))
def test_samples_of_lanes_alone(op, execution):
    for dtype in dtypes_of(op):
        for args in Samples(dtype, CPU).of(op):
            assert selftest.check(cuda, op, args) is None


@pytest.mark.parametrize("op", sorted(set(cuda.SERVES) - ALONE))
def test_samples(op, schedule):
    for dtype in dtypes_of(op):
        for i, args in enumerate(Samples(dtype, CPU).of(op)):
            wrong = selftest.check(cuda, op, args)
            assert wrong is None, f"{dtype}, sample {i}: {wrong}"


# ---- formats: strides, offsets, bits ----


def variants(t: torch.Tensor):
    """The same values as another tensor lays them out: strided, transposed, one element into its storage."""
    yield torch.stack([t, t], dim=-1)[..., 0]
    yield t.mT.contiguous().mT
    shifted = t.new_empty(t.numel() + 1)[1:].view(t.shape)
    yield shifted.copy_(t)


@pytest.mark.parametrize(
    "op", ["prune_24", "prune_24_transposable", "pack_24", "gather_24", "unpack_24"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_strides(op, dtype, execution):
    samples = Samples(dtype, CPU)
    for N, K in ((8, 24), (4, 20)):
        dense = samples.dense(N, K)
        values, meta = reference.pack_24(dense)
        for other in variants(values if op == "unpack_24" else dense):
            args = (other, meta) if op in ("gather_24", "unpack_24") else (other,)
            assert selftest.check(cuda, op, args) is None


@pytest.mark.parametrize("op", ["prune_24", "pack_24", "prune_24_transposable"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_any_bits(op, dtype, execution):
    """NaN payloads, infinities, denormals, both zeros."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 256, (64, 32 * dtype.itemsize), generator=generator, dtype=torch.uint8)
    weight = words.view(dtype)
    weight[::3, ::5] = -0.0
    weight[::7, ::3] = torch.inf
    assert selftest.check(cuda, op, (weight,)) is None


# ---- products ----

LARGE = cuda_launch.H100
SMALL = cuda_launch.Device(
    2, 99 << 10, 100 << 10
)  # so that larger tiles and fewer splits are chosen

# (device, M, N, K): both sides of every choice the plans make; ragged in each of M, N and K.
SHAPES = [
    (LARGE, 1, 16, 64),
    (LARGE, 8, 32, 128),
    (LARGE, 5, 48, 320),
    (LARGE, 16, 80, 1408),
    (SMALL, 9, 40, 1408),
    (SMALL, 3, 96, 2112),
    (LARGE, 33, 160, 384),
    (SMALL, 64, 144, 256),
    (SMALL, 32, 130, 640),
    (SMALL, 30, 144, 640),
    (LARGE, 64, 16, 896),
    (LARGE, 20, 48, 320),
    (SMALL, 17, 48, 1408),
    (SMALL, 40, 40, 2176),
    (SMALL, 50, 112, 1408),
    (LARGE, 100, 144, 192),
    (SMALL, 130, 272, 128),
    (SMALL, 140, 130, 336),
    (SMALL, 129, 129, 100),
    (SMALL, 257, 17, 68),
    (LARGE, 70, 9, 4),
]


# Likewise in fp32, which the decode kernel takes where K % 128 == 0.
FP32_SHAPES = [
    (LARGE, 1, 33, 128),
    (SMALL, 4, 40, 1152),
    (LARGE, 7, 70, 640),
    (SMALL, 8, 64, 896),
    (LARGE, 9, 31, 384),
    (SMALL, 16, 40, 896),
    (LARGE, 20, 16, 384),
    (SMALL, 32, 64, 640),
    (SMALL, 64, 70, 640),
    (LARGE, 40, 33, 384),
    (LARGE, 9, 31, 132),
]
BY_DTYPE = [(dtype, shape) for dtype in (torch.float16, torch.bfloat16) for shape in SHAPES]
BY_DTYPE += [(torch.float32, shape) for shape in FP32_SHAPES]


# And where tf32 is allowed.
TF32_SHAPES = [
    (LARGE, 70, 9, 4),
    (LARGE, 33, 40, 36),
    (LARGE, 100, 144, 192),
    (SMALL, 130, 272, 128),
    (SMALL, 129, 129, 100),
    (SMALL, 257, 17, 72),
]


def products(dtype, device_shape, exact=True):
    """linear_24 and linear_24_prepacked for a shape, as (op, args)."""
    _, M, N, K = device_shape
    samples = Samples(dtype, CPU, exact)
    x, (values, meta), bias = (
        samples.dense(M, K, low=-1, high=1),
        samples.packed(N, K),
        samples.dense(N),
    )
    activation = ("none", "relu", "relu2", "gelu", "silu")[(M + N) % 5]
    for bias_or_none in (bias, None):
        yield "linear_24", (x, values, meta, bias_or_none, activation)
    yield "linear_24_prepacked", (x, reference.prepack_24(values, meta), N, bias, activation)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    BY_DTYPE,
    ids=lambda p: "-".join(map(str, p[1:])) if isinstance(p, tuple) else str(p),
)
def test_products(dtype, shape, schedule, execution):
    execution.device = shape[0]
    for op, args in products(dtype, shape):
        wrong = selftest.check(cuda, op, args)
        assert wrong is None, f"{op}: {wrong}"


@contextlib.contextmanager
def fp32_precision(setting):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        yield
    finally:
        matmul.fp32_precision = before


@pytest.fixture
def tf32():
    with fp32_precision("tf32"):
        yield


@pytest.mark.parametrize("shape", TF32_SHAPES, ids=lambda s: "-".join(map(str, s[1:])))
def test_tf32_products(shape, schedule, execution, tf32):
    execution.device = shape[0]
    execution.launched.clear()
    for op, args in products(torch.float32, shape):
        wrong = selftest.check(cuda, op, args)
        assert wrong is None, f"{op}: {wrong}"
    assert {name.split("<")[0] for name in execution.launched} == {"linear_24_tf32_sm80"}


def test_the_kernel_told_is_the_kernel_launched(execution):
    """`sparsekern info --kernels` asks what the back end asks; also of what is not aligned."""
    for dtype in (torch.float32, torch.bfloat16):
        for M, K, offset in ((3, 128, 0), (3, 128, 1), (3, 132, 0), (70, 128, 0), (70, 128, 1)):
            x = Samples(dtype, CPU).dense(M, K + 3)[:, offset : offset + K]
            values, meta = Samples(dtype, CPU).packed(8, K)
            execution.launched.clear()
            cuda.linear_24(x, values, meta)
            o = cuda_launch.Operands(
                M,
                8,
                K,
                x=x.data_ptr(),
                x_stride=x.stride(0),
                x_step=1,
                values=values.data_ptr(),
                meta=meta.data_ptr(),
            )
            launch, why = cuda_launch.explain_linear_24(execution.device, dtype, o, False)
            assert launch.kernel in execution.launched
            assert why


def test_the_self_test_runs_every_family(execution):
    """First use tries the decode kernels and the others, the format itself and prepacked."""
    for dtype in (torch.float32, torch.bfloat16):
        execution.launched.clear()
        for op in ("linear_24", "linear_24_prepacked"):
            assert selftest.known_answers(cuda, op, dtype, CPU) is None
        families = {name.split("<")[0] for name in execution.launched}
        if dtype is torch.float32:
            assert {"linear_24_decode_fma", "linear_24_fma"} <= families
        else:
            assert {"linear_24_decode_sm80", "linear_24_sm80"} <= families
            for form in ("true>", "false>", "kBy4>", "kBy16>", "kPrepacked>"):
                assert any(form in name for name in execution.launched), form


def test_tf32_rounds_operands_alone(execution, tf32):
    """Random products are those of operands rounded to 10 bits, with sums in fp32."""
    _, (x, values, meta, *_) = next(products(torch.float32, (LARGE, 70, 40, 1000), exact=False))
    near = [((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in (x, values)]
    assert not torch.equal(near[0], x)
    got = cuda.linear_24(x, values, meta)
    assert selftest.check_product("linear_24", (*near, meta, None, "none"), got, False) is None


def test_tf32_is_used_where_torch_would_use_it(execution):
    x, weight = torch.ones(70, 64), Samples(torch.float32, CPU).packed(8, 64)
    for setting, want in (("ieee", False), ("tf32", True)):
        with fp32_precision(setting):
            execution.launched.clear()
            cuda.linear_24(x, *weight)
            assert any("tf32" in name for name in execution.launched) == want
            cuda.linear_24(x[:64].T.contiguous().T, *weight)  # k is strided: plain multiply-add
            assert "linear_24_fma<DType::f32>" in execution.launched


GRADIENT_SHAPES = [
    (1, 16, 64),
    (40, 48, 320),
    (130, 136, 136),
    (70, 200, 12),
    (129, 33, 260),
    (9, 34, 36),
    (33, 300, 20),
]


def gradients(dtype, shape):
    M, N, K = shape
    samples = Samples(dtype, CPU)
    x, dy = samples.dense(M, K, low=-1, high=1), samples.dense(M, N, low=-1, high=1)
    values, meta = samples.packed(N, K)
    yield "linear_24_dx", (dy, values, meta)
    yield "linear_24_dvalues", (dy, x, meta)


@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients(shape, dtype, schedule):
    for op, args in gradients(dtype, shape):
        wrong = selftest.check(cuda, op, args)
        assert wrong is None, f"{op}: {wrong}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_random_products(dtype, execution):
    """Sums that round: within twice torch's own error."""
    for shape in (
        (SMALL, 130, 130, 1024),
        (SMALL, 7, 64, 2048),
        (SMALL, 17, 32, 2048),
        (LARGE, 40, 32, 2048),
    ):
        execution.device = shape[0]
        for op, args in products(dtype, shape, exact=False):
            assert selftest.check(cuda, op, args, exact=False) is None
        _, M, N, _ = shape
        samples = Samples(dtype, CPU, exact=False)
        dy, x, (values, meta) = samples.dense(M, N), samples.dense(M, 64), samples.packed(N, 64)
        assert selftest.check(cuda, "linear_24_dx", (dy, values, meta), exact=False) is None
        assert selftest.check(cuda, "linear_24_dvalues", (dy, x, meta), exact=False) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("M", [6, 70])
def test_product_strides(M, dtype, execution):
    samples = Samples(dtype, CPU)
    N, K = 48, 128
    x, dy, (values, meta) = (
        samples.dense(M, K),
        samples.dense(M, N, low=-1, high=1),
        samples.packed(N, K),
    )
    packed = reference.prepack_24(values, meta)
    wide = torch.cat([x, x], dim=1)
    for other in [*variants(x), wide[:, :K], wide[:, 4 : 4 + K], x.expand(2, M, K), x[:0]]:
        assert selftest.check(cuda, "linear_24", (other, values, meta, None, "none")) is None
        assert selftest.check(cuda, "linear_24_prepacked", (other, packed, N, None, "none")) is None
    for other in variants(values):
        assert selftest.check(cuda, "linear_24", (x, other, meta, None, "none")) is None
        assert selftest.check(cuda, "linear_24_dx", (dy, other, meta)) is None
    for other in variants(dy):
        assert selftest.check(cuda, "linear_24_dx", (other, values, meta)) is None
        assert selftest.check(cuda, "linear_24_dvalues", (other, x, meta)) is None
        assert selftest.check(cuda, "linear_24_dvalues", (dy, next(variants(x)), meta)) is None
    shifted = packed.new_empty(packed.numel() + 8)[8:].copy_(packed)  # 8 bytes into its storage
    assert selftest.check(cuda, "linear_24_prepacked", (x, shifted, N, None, "none")) is None


def test_no_terms(execution):
    """K = 0: the bias alone."""
    for dtype in (torch.bfloat16, torch.float32):
        empty = (
            torch.empty(3, 0, dtype=dtype),
            torch.empty(5, 0, dtype=dtype),
            torch.empty(5, 0, dtype=torch.uint8),
        )
        bias = Samples(dtype, CPU).dense(5)
        assert torch.equal(cuda.linear_24(*empty, bias), bias.expand(3, 5))


def test_prepack_is_a_permutation(execution):
    """Every byte of values and every nibble of meta once: from values that are their own places."""
    for N, K in ((16, 64), (32, 320), (48, 576)):
        values = torch.arange(N * K // 2).to(torch.int16).view(torch.float16).view(N, K // 2)
        meta = Samples(torch.float16, CPU).packed(N, K)[1]
        packed = cuda.prepack_24(values, meta)
        places = packed[: values.nbytes].view(torch.int16)
        assert torch.equal(places.sort().values, values.view(torch.int16).flatten().sort().values)
        # Lane 4g + t of the first tile: row g, kept elements 8t .. 8t + 7; then row 8 + g.
        assert places[: 8 * 32].view(8, 32).tolist() == (values.view(torch.int16)[:8, :32]).tolist()
        back = cuda.unprepack_24(packed, N, K, torch.float16)
        assert torch.equal(back[0].view(torch.int16), values.view(torch.int16))
        assert torch.equal(back[1], meta)


# ---- zero-value compression ----


@pytest.fixture
def in_order():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str
)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_zvc_in_order(dtype, density, schedule, in_order):
    """Under determinism the bytes are the reference's."""
    for n in (1, 4096, 4100, 150_001 if density == 0.5 else 9000):
        x = Samples(dtype, CPU).sparse(n, density=density)
        for got, want in zip(cuda.pack_zvc(x), reference.pack_zvc(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("deterministic", [False, True])
def test_zvc_room(deterministic, schedule):
    """Nothing is written past the room, and the count is right all the same."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        for dtype in (torch.uint8, torch.bfloat16, torch.float64):
            x = Samples(dtype, CPU).sparse(20_000)
            mask, want, offsets = reference.pack_zvc(x)
            for room in (0, 1, 5001, want.numel() - 1):
                values = want.new_full((room + 64,), 77)
                count = torch.empty(1, dtype=torch.int64)
                cuda.pack_zvc_out(
                    x, torch.empty_like(mask), values[:room], torch.empty_like(offsets), count
                )
                assert int(count) == want.numel()
                assert bool((values[room:] == 77).all())
                if deterministic:
                    assert torch.equal(values[:room], want[:room])
    finally:
        torch.use_deterministic_algorithms(False)


def test_zvc_offset_and_strides(schedule):
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        x = Samples(dtype, CPU).sparse(130, 66)
        for other in variants(x):
            assert selftest.check_zvc(other.contiguous(), *cuda.pack_zvc(other)) is None
        mask, values, offsets = reference.pack_zvc(x)
        shifted = values.new_empty(values.numel() + 1)[1:].copy_(values)
        assert torch.equal(cuda.unpack_zvc(mask, shifted, offsets, list(x.shape)), x)


@pytest.mark.parametrize(
    "lie", ["before", "past", "far", "overlap", "gap", "short", "long", "mask", "tail"]
)
def test_zvc_lies(lie, execution):
    x = Samples(torch.bfloat16, CPU).sparse(20_003)
    mask, values, offsets = reference.pack_zvc(x)
    if lie == "before":
        offsets[1] = -1
    elif lie == "past":
        offsets[-1] += 1
    elif lie == "far":
        offsets[2] = 1 << 62
    elif lie == "overlap":
        offsets[3] = offsets[2]
    elif lie == "gap":
        offsets[0] += 1
    elif lie == "short":
        values = values[:-1]
    elif lie == "long":
        values = torch.cat([values, values[:1]])
    elif lie == "mask":
        mask[7] ^= 1
    elif lie == "tail":
        mask[-1] |= 0x80
    with pytest.raises(ValueError, match="unpack_zvc"):
        cuda.unpack_zvc(mask, values, offsets, [x.numel()])


def test_empty(execution):
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((0, 8), (3, 0)):
            for op in ("prune_24", "pack_24"):
                assert selftest.check(cuda, op, (torch.empty(shape, dtype=dtype),)) is None
    assert [t.numel() for t in cuda.pack_zvc(torch.empty(0))] == [0, 0, 0]


# ---- past 2^31 elements: only the last blocks are run, on tensors that hold only what these touch ----


def address(t: torch.Tensor, first: int) -> int:
    """Where the tensor would start that has `t` from its element `first` on."""
    return t.data_ptr() - first * t.element_size()


@pytest.mark.parametrize("K", [1 << 20, (1 << 20) + 4])
def test_formats_past_2_31(K, execution):
    rows, last = 4100, 4099  # 4.3e9 elements; the last row is run
    row = Samples(torch.bfloat16, CPU).dense(1, K)
    values, meta = (
        torch.empty(1, K // 2, dtype=torch.bfloat16),
        torch.empty(1, -(-K // 8), dtype=torch.uint8),
    )
    launch = cuda_launch.format_24(
        "pack_24",
        torch.bfloat16,
        rows,
        K,
        dense=address(row, last * K),
        out=address(values, last * (K // 2)),
        out_meta=address(meta, last * meta.shape[1]),
    )
    chunks = meta.shape[1]
    first = (last * chunks + 255) // 256  # the first block that has nothing of the row before
    execution.run(launch, first, launch.grid[0] - first)
    want_values, want_meta = reference.pack_24(row)
    skip = first * 256 - last * chunks
    assert torch.equal(meta[:, skip:], want_meta[:, skip:])
    assert torch.equal(values[:, 4 * skip :], want_values[:, 4 * skip :])


def test_decode_past_2_31(execution):
    """The last 32 features of 2^25 + 32; K / 2 = 64 kept elements each."""
    first, K = 1 << 25, 128
    for dtype in (torch.bfloat16, torch.float32):
        samples = Samples(dtype, CPU)
        x, (values, meta) = samples.dense(1, K, low=-1, high=1), samples.packed(32, K)
        y = torch.empty(1, 32, dtype=dtype)
        o = cuda_launch.Operands(
            1,
            first + 32,
            K,
            x=x.data_ptr(),
            x_stride=K,
            x_step=1,
            values=address(values, first * (K // 2)),
            meta=address(meta, first * (K // 8)),
            y=address(y, first),
        )
        cut = cuda_launch.cut_decode(LARGE, dtype, 1, first + 32, K)
        (launch,) = cuda_launch.linear_24_decode(dtype, o, cut, 0)
        execution.run(launch, first // 32, 1)
        assert torch.equal(y, reference.linear_24(x, values, meta))


def test_zvc_past_2_31(execution):
    tile0, tiles = (1 << 33) // 4096, 3
    n = (tile0 + tiles) * 4096 - 9
    part = n - tile0 * 4096
    x = Samples(torch.bfloat16, CPU).sparse(part)
    mask, values = torch.empty(-(-part // 8), dtype=torch.uint8), torch.empty_like(x)
    offsets, count = torch.empty(tiles, dtype=torch.int64), torch.full((1,), 1 << 33)
    common = {"mask": address(mask, tile0 * 512), "offsets": address(offsets, tile0)}
    at = {"values": address(values, 1 << 33), "x": address(x, tile0 * 4096)}
    execution.run(
        cuda_launch.pack_zvc(2, n, 1 << 40, **common, **at, count=count.data_ptr(), state=0),
        tile0,
        tiles,
    )
    assert torch.equal(mask, reference.pack_zvc(x)[0])
    assert int(count) == (1 << 33) + int((x.view(torch.int16) != 0).sum())
    back, check = torch.empty_like(x), torch.zeros(2, dtype=torch.int64)
    at["x"] = address(back, tile0 * 4096)
    execution.run(
        cuda_launch.unpack_zvc(2, n, int(count), **common, **at, check=check.data_ptr()),
        tile0,
        tiles,
    )
    assert torch.equal(back.view(torch.int16), x.view(torch.int16))
    assert int(check[1]) == 0


# ---- the instruments: a fault that is put in is found ----


def run_zvc():
    x = Samples(torch.bfloat16, CPU).sparse(9003, density=0.6)
    wrong = selftest.check_zvc(x, *cuda.pack_zvc(x))
    assert wrong is None, wrong
    assert torch.equal(cuda.unpack_zvc(*reference.pack_zvc(x), [9003]), x)


def run_products(op, shape, dtype=torch.bfloat16):
    def run():
        cuda_machine.machine(CPU).device = shape[0]
        _, args = next(products(dtype, shape))
        wrong = selftest.check(cuda, op, args)
        assert wrong is None, wrong

    return run


many_rows = run_products(
    "linear_24", (SMALL, 130, 130, 440)
)  # seven tiles: the last is where y comes to lie
few_rows = run_products("linear_24", (SMALL, 12, 64, 2176))
forty_rows = run_products("linear_24", (SMALL, 40, 40, 2176))  # three stages of x
few_rows_fp32 = run_products("linear_24", (SMALL, 12, 40, 1664), torch.float32)


def many_rows_tf32():
    with fp32_precision("tf32"):
        run_products("linear_24", (SMALL, 130, 130, 104), torch.float32)()


def run_fma():
    samples = Samples(torch.float32, CPU)
    assert (
        selftest.check(
            cuda, "linear_24", (samples.dense(5, 36), *samples.packed(9, 36), None, "none")
        )
        is None
    )


# What of a file the tests of planted faults call.
USED = {
    "linear_24_grad_sm80.cu": "bf16, kBy16",
    "zvc.cu": "uint16_t",
    "linear_24_sm80.cu": "bf16, 128, kBy4|bf16, 64, kBy16|bf16, 128, kPrepacked",
    "linear_24_decode_sm80.cu": "bf16, 16|bf16, 64, 4|reduce<DType::bf16",
    "linear_24_decode_fma.cu": "fma<4>|fma<16>",
    "linear_24_fma.cu": "linear_24_fma<DType::f32",
    "linear_24_tf32_sm80.cu": "<128, kBy16",
}


def run_gradients():
    for op, args in gradients(torch.bfloat16, (136, 136, 136)):
        assert selftest.check(cuda, op, args) is None


PLANTED = {
    "dx_no_barrier": (
        "linear_24_grad_sm80.cu",
        "__syncthreads();  // dy and W are here, for all, and the tile before is done with",
        "",
        run_gradients,
    ),
    "dvalues_no_barrier": (
        "linear_24_grad_sm80.cu",
        "__syncthreads();  // dy and x are here, for all, and the tile before is done with",
        "",
        run_gradients,
    ),
    "many_rows_no_barrier": (
        "linear_24_sm80.cu",
        "__syncthreads();  // the tile is here, for all, and the one before it is done with",
        "",
        many_rows,
    ),
    "many_rows_early_wait": (
        "linear_24_sm80.cu",
        "wait_copies<kStages - 2>();",
        "wait_copies<kStages - 1>();",
        many_rows,
    ),
    "many_rows_no_barrier_at_the_end": (
        "linear_24_sm80.cu",
        "__syncthreads();  // the stages may be written over",
        "",
        many_rows,
    ),
    "many_rows_y_too_early": (
        "linear_24_sm80.cu",
        "__syncthreads();  // y is whole",
        "",
        many_rows,
    ),
    "many_rows_selector": (
        "linear_24_sm80.cu",
        "mma_sp<D, step>(",
        "mma_sp<D, 0>(",
        many_rows,
    ),
    "many_rows_zero_metadata": ("linear_24_sm80.cu", "kEmptyNibble * 0x11u", "0u", many_rows),
    "many_rows_swizzle": (
        "linear_24_sm80.cu",
        "(c ^ (row >> 1 & 3)) * 8",
        "(c ^ (row & 4)) * 8",
        many_rows,
    ),
    "few_rows_no_barrier": (
        "linear_24_decode_sm80.cu",
        "__syncthreads();  // x is here, for all, and the stage before is done with",
        "",
        few_rows,
    ),
    "few_rows_early_wait": (
        "linear_24_decode_sm80.cu",
        "wait_copies<S::kStages - 2>();",
        "wait_copies<S::kStages - 1>();",
        few_rows,
    ),
    "forty_rows_early_wait": (
        "linear_24_decode_sm80.cu",
        "wait_copies<S::kStages - 2>();",
        "wait_copies<S::kStages - 1>();",
        forty_rows,
    ),
    "forty_rows_two_stages": (
        "linear_24_decode_sm80.cu",
        "kStages = kPart == 1 ? 3 : 2;",
        "kStages = 2;",
        forty_rows,
    ),
    "few_rows_no_barrier_at_the_end": (
        "linear_24_decode_sm80.cu",
        "__syncthreads();  // the stages may be written over",
        "",
        few_rows,
    ),
    "few_rows_zero_metadata": (
        "linear_24_decode_sm80.cu",
        "kNoMeta = 0x44444444",
        "kNoMeta = 0",
        few_rows,
    ),
    "few_rows_selector": (
        "linear_24_decode_sm80.cu",
        "mma_sp<D, 1>(",
        "mma_sp<D, 0>(",
        few_rows,
    ),
    "few_rows_fp32_no_barrier": (
        "linear_24_decode_fma.cu",
        "__syncthreads();  // the chunk is here, for all, and the one before it is done with",
        "",
        few_rows_fp32,
    ),
    "few_rows_fp32_early_wait": (
        "linear_24_decode_fma.cu",
        "wait_copies<S::kStages - 2>();",
        "wait_copies<S::kStages - 1>();",
        few_rows_fp32,
    ),
    "few_rows_fp32_no_barrier_at_the_end": (
        "linear_24_decode_fma.cu",
        "__syncthreads();  // the stages may be written over",
        "",
        few_rows_fp32,
    ),
    "few_rows_fp32_sums_too_early": (
        "linear_24_decode_fma.cu",
        "__syncthreads();  // all sums are there",
        "",
        few_rows_fp32,
    ),
    "few_rows_fp32_swizzle": (
        "linear_24_decode_fma.cu",
        "kept[i] = s.values[row][4 * (c ^ (row & 1) * 4) + i];",
        "kept[i] = s.values[row][4 * c + i];",
        few_rows_fp32,
    ),
    "many_rows_tf32_no_barrier": (
        "linear_24_tf32_sm80.cu",
        "__syncthreads();  // the tile is here, for all, and the one before it is done with",
        "",
        many_rows_tf32,
    ),
    "many_rows_tf32_no_wait": (
        "linear_24_tf32_sm80.cu",
        "wait_copies<0>();\n    __syncthreads();  // the tile",
        "__syncthreads();  // the tile",
        many_rows_tf32,
    ),
    "many_rows_tf32_w_too_early": (
        "linear_24_tf32_sm80.cu",
        "__syncthreads();  // W is whole",
        "",
        many_rows_tf32,
    ),
    "many_rows_tf32_no_barrier_at_the_end": (
        "linear_24_tf32_sm80.cu",
        "__syncthreads();  // the stages and W may be written over",
        "",
        many_rows_tf32,
    ),
    "many_rows_tf32_y_too_early": (
        "linear_24_tf32_sm80.cu",
        "__syncthreads();  // y is whole",
        "",
        many_rows_tf32,
    ),
    "many_rows_tf32_nibble": (
        "linear_24_tf32_sm80.cu",
        "s.meta[row] >> 4 * group & 15",
        "s.meta[row] >> 4 * (group ^ 1) & 15",
        many_rows_tf32,
    ),
    "fma_no_barrier": (
        "linear_24_fma.cu",
        "__syncthreads();  // and may be written over",
        "",
        run_fma,
    ),
    "pack_zvc_no_barrier": ("zvc.cu", "__syncthreads();  // the stage is full", "", run_zvc),
    "unpack_zvc_no_barrier": ("zvc.cu", "__syncthreads();  // the values are here", "", run_zvc),
    "pack_zvc_no_place": ("zvc.cu", "__syncthreads();  // the tile's place is known", "", run_zvc),
    "divergent_shuffle": (
        "zvc.cu",
        "const uint32_t before = shuffle_up(inclusive, distance);",
        "const uint32_t before = lane >= distance ? shuffle_up(inclusive, distance) : 0;",
        run_zvc,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name):
    """Faults that the race checker, the deadlock check, poison or the answer must tell, whatever the order."""
    file, before, after, run = PLANTED[name]
    execution = Execution(
        build("races", plant(name, file, before, after, USED[file]), Path(file).stem)
    )
    with cuda_machine.instead(CPU, execution):
        for execution.schedule in SCHEDULES:
            with pytest.raises((Fault, AssertionError, ValueError)):
                run()


def read_rows():
    samples = Samples(torch.bfloat16, CPU)
    cuda.linear_24(samples.dense(70, 64), *samples.packed(127, 64))


def read_few_rows_fp32():
    samples = Samples(torch.float32, CPU)
    cuda.linear_24(samples.dense(4, 128), *samples.packed(31, 128))


# Reads past the end, which only the address sanitizer sees.
PLANTED_READS = {
    "many_rows": (
        "linear_24_sm80.cu",
        "n0 + thread < a.N ? n0 + thread : a.N - 1",
        "n0 + thread <= a.N ? n0 + thread : a.N - 1",
        read_rows,
    ),
    "few_rows_fp32": (
        "linear_24_decode_fma.cu",
        "const bool inside = n < a.N && k < a.K;",
        "const bool inside = n <= a.N && k < a.K;",
        read_few_rows_fp32,
    ),
    "pack_zvc": (
        "zvc.cu",
        "if (a.vectors && at + T::kEach <= a.n) {\n      x[r].load",
        "if (a.vectors && at < a.n) {\n      x[r].load",
        run_zvc,
    ),
}


@pytest.mark.parametrize("name", PLANTED_READS)
def test_planted_read(name):
    file, before, after, _ = PLANTED_READS[name]
    folder = plant(f"read_{name}", file, before, after, USED[file])
    done = under_sanitizer(
        ["-c", f"import test_cuda_kernels as t; t.run_planted_read({name!r}, {str(folder)!r})"]
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]


def run_planted_read(name: str, folder: str) -> None:
    file, _, _, run = PLANTED_READS[name]
    with cuda_machine.instead(CPU, Execution(build("addresses", Path(folder), Path(file).stem))):
        run()


# ---- the address sanitizer ----


def under_sanitizer(arguments: list[str]) -> subprocess.CompletedProcess:
    """Python with the sanitizer's runtime loaded before it."""
    libraries = [
        subprocess.run(
            [CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    here = Path(__file__).parent
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_stack_use_after_return=0",
        "SPARSEKERN_TEST_ADDRESSES": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path[1:2]]),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=here.parent,
    )


@pytest.mark.timeout(900)
def test_under_the_address_sanitizer():
    """The tests above that run the kernels, with every buffer fenced."""
    build("addresses")
    pytest_on_this = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--cuda-sources",
        __file__,
    ]
    done = under_sanitizer([*pytest_on_this, "-k", "not planted and not sanitizer"])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"\d+ passed, \d+ deselected in", done.stdout), done.stdout[-4000:]  # no skips


def test_every_kernel_runs(execution, tf32):
    """What the tests above call leaves out no instantiation."""
    execution.launched.clear()
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # the fixture puts it back
    for op in cuda.SERVES:
        for dtype in dtypes_of(op):
            for args in Samples(dtype, CPU).of(op, quick=True):
                assert selftest.check(cuda, op, args) is None
    for dtype in (torch.float16, torch.bfloat16):
        for shape in SHAPES:
            execution.device = shape[0]
            for op, (x, *weight) in products(dtype, shape):
                if op == "linear_24_prepacked":
                    form = reference.unprepack_24(weight[0], *shape[2:], dtype)
                    weight[0] = cuda.prepack_24(*form)
                    cuda.unprepack_24(weight[0], *shape[2:], dtype)
                getattr(cuda, op)(x, *weight)
        for shape in GRADIENT_SHAPES:
            for op, args in gradients(dtype, shape):
                getattr(cuda, op)(*args)
        x, weight = Samples(dtype, CPU).dense(8, 6), Samples(dtype, CPU).packed(5, 8)
        cuda.linear_24(x.mT, *weight)
    for shape in FP32_SHAPES:
        execution.device = shape[0]
        op, args = next(products(torch.float32, shape))
        getattr(cuda, op)(*args)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for shape in TF32_SHAPES:
        execution.device = shape[0]
        op, args = next(products(torch.float32, shape))
        getattr(cuda, op)(*args)
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64):
            cuda.pack_zvc(Samples(dtype, CPU).sparse(100))
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(execution.kernels()) == execution.launched
