"""The CUDA sources, executed on the CPU (``tests/cuda_on_cpu``): every kernel against the reference, in several orders
of its lanes, with the race checker on; and once more under the address sanitizer, in a process of its own.

The back end's glue runs too, on CPU tensors: only the machine that launches is another.
"""

from __future__ import annotations

import os
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

pytestmark = pytest.mark.compiler


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


PLANTED = {
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
    execution = Execution(build("races", plant(name, file, before, after), Path(file).stem))
    with cuda_machine.instead(CPU, execution):
        for execution.schedule in SCHEDULES:
            with pytest.raises((Fault, AssertionError, ValueError)):
                run()


# Reads past the end, which only the address sanitizer sees.
PLANTED_READS = {
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
    folder = plant(f"read_{name}", file, before, after)
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
    pytest_on_this = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = under_sanitizer([*pytest_on_this, "-k", "not planted and not sanitizer"])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_every_kernel_ran(execution):
    """Comes last: no instantiation is left out by the tests above."""
    assert set(execution.kernels()) == execution.launched
