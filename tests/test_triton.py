"""The Triton back end beyond what every back end is tested for: configurations, tuning, who is served, machine code."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sparsekern import backends, ops, reference
from sparsekern.backends import triton

pytestmark = pytest.mark.triton
CPU = torch.device("cpu")
PRODUCTS = [torch.float32, torch.float16, torch.bfloat16]


def integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing chosen yet, and a cache of its own; yields the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton.autotune, "_chosen", {})
    monkeypatch.setattr(triton.autotune, "_stored", None)
    return tmp_path / "sparsekern" / "triton.json"


def forget(monkeypatch) -> None:
    """As in another process: only the file is left."""
    monkeypatch.setattr(triton.autotune, "_chosen", {})
    monkeypatch.setattr(triton.autotune, "_stored", None)


# ---- every configuration ----


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize("op", ["linear_24", "linear_24_dx", "linear_24_dvalues"])
def test_every_configuration_multiplies_integers_exactly(monkeypatch, op, dtype):
    family = triton.autotune.FAMILIES[op]
    # One row and several, tails of every tile, an odd number of groups, K that goes into parts.
    for M, N, K in [
        (1, 70, 516),
        (3, 33, 512),
        (4, 5, 12),
        (5, 33, 260),
        (18, 66, 132),
        (133, 66, 68),
    ]:
        x, dy, weight = integers(dtype, M, K), integers(dtype, M, N), integers(dtype, N, K)
        values, meta = reference.pack_24(weight)
        dense = reference.unpack_24(values, meta).double()
        args, want = {
            "linear_24": ((x, values, meta), F.linear(x.double(), dense)),
            "linear_24_dx": ((dy, values, meta), dy.double() @ dense),
            "linear_24_dvalues": (
                (dy, x, meta),
                reference.gather_24(dy.double().mT @ x.double(), meta),
            ),
        }[op]
        for config in family.candidates(M, dtype):
            monkeypatch.setattr(triton.autotune, "config", lambda *_, c=config: c)
            torch.testing.assert_close(family.launch(*args), want.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_parts_of_K_are_added_and_then_get_bias_and_activation(dtype):
    M, N, K = 2, 9, 4096
    x, bias, weight = integers(dtype, M, K), integers(dtype, N), integers(dtype, N, K)
    values, meta = reference.pack_24(weight)
    dense = reference.unpack_24(values, meta).double()
    config = triton.autotune.config("linear_24", M, N, K, dtype, CPU)
    assert triton.product_24.plan(M, N, K, dtype, triton.autotune.sms(CPU), config).splits > 1
    want = F.linear(x.double(), dense, bias.double()).relu().to(dtype)
    got = triton.linear_24(x, values, meta, bias, "relu")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_plan_covers_K_and_keeps_scratch_below_a_twelfth_of_the_weight_for_few_rows():
    plan, dtype = triton.product_24.plan, torch.bfloat16
    for M in (1, 2, 3, 4, 5, 8, 16, 64, 500):
        for N, K in [(1, 4), (8, 65536), (128, 4096), (4096, 4096), (37888, 3584), (50, 0)]:
            for config in triton.product_24.candidates(M, dtype):
                p = plan(M, N, K, dtype, 132, config)
                assert p.SPLIT_K % config.BLOCK_K == 0
                assert p.splits * p.SPLIT_K >= K
                assert K == 0 or (p.splits - 1) * p.SPLIT_K < K
                if M <= 16 and p.splits > 1:
                    assert 12 * 8 * p.splits * M * N <= N * (K + K // 8)


def test_lists_of_configurations_are_short():
    for family in triton.autotune.FAMILIES.values():
        for dtype in PRODUCTS:
            for M in (1, 4, 5, 64, 5000):
                candidates = family.candidates(M, dtype)
                assert len(set(candidates)) == len(candidates) <= 8
                for N, K in [(64, 64), (4096, 4096), (37888, 3584)]:
                    assert family.built_in(M, N, K, dtype, 132) in candidates


def test_tf32_is_used_where_torch_would_use_it(fresh):
    from benchmarks.triton_cubins import record

    def precision(dtype):
        values, meta = torch.zeros(32, 32, dtype=dtype), torch.zeros(32, 8, dtype=torch.uint8)
        (launch,) = record(triton.linear_24, torch.zeros(16, 64, dtype=dtype), values, meta)
        return launch.arguments["PRECISION"]

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, want in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            assert precision(torch.float32) == want
            assert precision(torch.bfloat16) == "ieee"
        matmul.allow_tf32 = False
        assert precision(torch.float32) == "ieee"
        matmul.allow_tf32 = True
        assert precision(torch.float32) == "tf32"
    finally:
        matmul.fp32_precision = before


# ---- compression: what is launched ----


def test_tiles_are_placed_in_one_pass_and_where_determinism_is_asked_for_in_two():
    from benchmarks.triton_cubins import record

    x, offsets = torch.zeros(5000), torch.zeros(2, dtype=torch.int64)
    count = torch.zeros(1, dtype=torch.int64)
    args = x, torch.zeros(625, dtype=torch.uint8), torch.zeros(5000), offsets, count
    assert [launch.name for launch in record(triton.pack_zvc_out, *args)] == ["_pack_zvc"]
    torch.use_deterministic_algorithms(True)
    try:
        launches = record(triton.pack_zvc_out, *args)
        assert [launch.name for launch in launches] == ["_mark", "_place"]
        x[::3] = 1.5
        triton.pack_zvc_out(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert count == 1667
    for got, want in zip(args[1:4], reference.pack_zvc(x), strict=True):
        assert torch.equal(got[: want.numel()], want)


def test_a_stream_that_lies_is_decoded_without_reading_outside_while_a_graph_is_captured(
    monkeypatch,
):
    # Under capture nothing can be asked of the device, so the kernel alone has to be safe.
    x = torch.zeros(2 * 4096)
    x[::2] = 1.0
    mask, values, offsets = reference.pack_zvc(x)
    monkeypatch.setattr(triton.zvc, "_check", lambda *_: None)
    inside = torch.full((values.numel() + 8192,), torch.nan)
    inside[4096:-4096] = values
    for lie in (offsets - 1000, offsets + 1000, offsets + 2**40, offsets - 2**40):
        out = triton.unpack_zvc(mask, inside[4096:-4096], lie, [2 * 4096])
        assert bool(((out == 0) | (out == 1)).all())


# ---- past 2^31 elements: the last tile of tensors that no test could fill ----


@pytest.fixture
def last_programs(monkeypatch):
    """Run a kernel for the last `count` programs of its grid alone, and touch no other memory."""
    from triton.runtime import interpreter

    def start_at(first: int):
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (x + first, y, z))
        )
        # It would copy every argument onto itself.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)

    return start_at


def test_tiles_past_2_to_the_31_elements_are_pruned_and_unpacked(last_programs):
    N, K = 2**23 + 16, 256
    weight, out = torch.empty(N, K, dtype=torch.uint8), torch.empty(N, K, dtype=torch.uint8)
    last_programs(N // 16 - 1)
    weight[-16:] = torch.arange(K, dtype=torch.uint8)
    weight[:16] = 7
    out[:16] = out[-16:] = 9
    config = triton.format_24._CONFIGS[0]
    triton.format_24._prune_24[(1,)](weight, out, N, K, K, 1, 0, **config)
    assert torch.equal(out[-16:], reference.prune_24(weight[-16:]))
    assert bool((out[:16] == 9).all())
    values = torch.empty(N * 2, K // 2, dtype=torch.uint8)  # 2^31 of them, too
    meta = torch.empty(N * 2, K // 8, dtype=torch.uint8)
    dense = torch.empty(N * 2, K, dtype=torch.uint8)
    values[-16:], meta[-16:] = reference.pack_24(weight[-16:])
    last_programs(N // 8 - 1)
    triton.format_24._unpack_24[(1,)](values, meta, dense, 2 * N, K, K // 2, K // 8, **config)
    assert torch.equal(dense[-16:], out[-16:])


def test_tiles_past_2_to_the_31_elements_are_compressed(last_programs):
    n = 2**31 + 4096
    x, mask = torch.empty(n, dtype=torch.uint8), torch.empty(n // 8, dtype=torch.uint8)
    offsets, count = torch.empty(n // 4096, dtype=torch.int64), torch.full((1,), 2**31)
    values, tile = torch.empty(n, dtype=torch.uint8), torch.arange(4096).byte()
    x[-4096:], x[:4096] = tile, 1
    last_programs(n // 4096 - 1)
    config = triton.zvc._CONFIGS[0]
    triton.zvc._pack_zvc[(1,)](x, mask, values, offsets, count, n, n, **config)
    assert offsets[-1] == 2**31
    assert count == 2**31 + 4080
    assert torch.equal(values[2**31 : 2**31 + 4080], tile[tile != 0])
    out = torch.empty(n, dtype=torch.uint8)
    triton.zvc._unpack_zvc[(1,)](mask, values, offsets, out, n, n, **config)
    assert torch.equal(out[-4096:], tile)


def test_rows_past_2_to_the_31_values_are_multiplied(last_programs, fresh):
    N, K = 2**23 + 64, 512
    values = torch.empty(N, K // 2, dtype=torch.bfloat16)
    meta = torch.empty(N, K // 8, dtype=torch.uint8)
    values[-64:], meta[-64:] = reference.pack_24(integers(torch.bfloat16, 64, K))
    x, y = integers(torch.bfloat16, 1, K), torch.empty(1, N, dtype=torch.bfloat16)
    last_programs(N // 64 - 1)
    triton.product_24._linear_24_few[(1,)](
        x, values, meta, None, y, N, K, K, K, 1, K // 2, K // 8, "none", True, True,
        BLOCK_M=1, BLOCK_N=64, BLOCK_K=128,
    )  # fmt: skip
    assert torch.equal(y[:, -64:], reference.linear_24(x, values[-64:], meta[-64:]))


# ---- tuning ----


def problem(M: int = 2, N: int = 9, K: int = 36, dtype=torch.float16):
    return integers(dtype, M, K), *reference.pack_24(integers(dtype, N, K))


def chosen(M: int = 2, N: int = 9, K: int = 36, dtype=torch.float16, op: str = "linear_24"):
    return triton.autotune.config(op, M, N, K, dtype, CPU)


def built_in(M: int = 2, N: int = 9, K: int = 36, dtype=torch.float16):
    return triton.product_24.built_in(M, N, K, dtype, 132)


def test_nothing_is_tuned_unless_asked(fresh):
    triton.linear_24(*problem())
    assert not fresh.exists()
    assert chosen() == built_in()


def test_tune_keeps_the_fastest_for_this_process_and_the_next(fresh, monkeypatch):
    candidates = triton.product_24.candidates(2, torch.float16)
    seconds = {c: 1.0 + i for i, c in enumerate(reversed(candidates))}
    monkeypatch.setattr(
        triton.autotune, "_seconds", lambda launch, args: seconds[chosen(len(args[0]))]
    )
    assert candidates[-1] != built_in()
    assert triton.tune("linear_24", *problem()) == candidates[-1]
    assert chosen() == candidates[-1]
    forget(monkeypatch)
    assert chosen() == candidates[-1]
    assert chosen(M=1) == built_in(1)  # another bucket
    assert chosen(N=10) == built_in()
    assert chosen(dtype=torch.bfloat16) == built_in()
    assert json.loads(fresh.read_text())["version"] == triton.autotune.VERSION
    want = reference.linear_24(*problem())
    assert torch.equal(triton.linear_24(*problem()), want)


def test_rows_in_one_bucket_share_a_choice():
    bucket = triton.autotune.bucket
    assert [bucket(M) for M in (0, 1, 2, 3, 4, 5, 8, 9, 16, 17)] == [
        0,
        1,
        2,
        3,
        4,
        8,
        8,
        16,
        16,
        32,
    ]
    assert bucket(8193) == bucket(10**9) == 8192


@pytest.mark.parametrize("op", ["linear_24", "linear_24_dx", "linear_24_dvalues"])
def test_tune_measures_every_op_that_has_a_choice(fresh, op):
    x, values, meta = problem(5)
    dy = integers(torch.float16, 5, 9)
    args = {
        "linear_24": (x, values, meta),
        "linear_24_dx": (dy, values, meta),
        "linear_24_dvalues": (dy, x, meta),
    }[op]
    best = triton.tune(op, *args)
    assert best in triton.autotune.FAMILIES[op].candidates(8, torch.float16)
    (name,) = json.loads(fresh.read_text())["choices"]
    assert name.startswith(f"{op}, M 8, N 9, K 36, float16, interpreter, triton ")


def test_what_cannot_be_tuned_is_an_error(fresh):
    with pytest.raises(ValueError, match="tune: op is 'pack_24'; it takes one of linear_24"):
        triton.tune("pack_24", torch.zeros(4, 4))
    _, values, meta = problem()
    captured = SimpleNamespace(is_cuda=True)
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="tune: the stream is being captured"),
    ):
        triton.tune("linear_24", captured, values, meta)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"version": 0, "choices": {}}',
        b'{"version": 1, "choices": []}',
        b'{"version": 1}',
    ],
)
def test_a_file_that_makes_no_sense_is_empty_and_is_replaced(fresh, content):
    fresh.parent.mkdir()
    fresh.write_bytes(content)
    assert chosen() == built_in()
    best = triton.tune("linear_24", *problem())
    assert list(json.loads(fresh.read_text())["choices"].values()) == [list(best)]


@pytest.mark.parametrize("entry", [None, 7, "few", ["few", 1, 7, 7, 1, 1], {"kernel": "few"}])
def test_an_entry_that_is_no_configuration_of_today_is_passed_over(fresh, entry):
    key = triton.autotune._Key("linear_24", 2, 9, 36, torch.float16, CPU)
    fresh.parent.mkdir()
    fresh.write_text(json.dumps({"version": 1, "choices": {triton.autotune._name(key): entry}}))
    assert chosen() == built_in()


def test_writers_at_once_lose_nothing_and_readers_see_whole_files(fresh):
    config = built_in()
    read = []

    def write(i: int) -> None:
        triton.autotune._write(f"choice {i}", config)
        read.append(len(triton.autotune._read(fresh)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    assert len(triton.autotune._read(fresh)) == 64
    assert min(read) >= 1
    assert sorted(p.name for p in fresh.parent.iterdir()) == ["triton.json", "triton.lock"]


def test_where_the_cache_cannot_be_written_the_choice_lasts_for_the_process(
    fresh, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="sparsekern"):
        best = triton.tune("linear_24", *problem())
    assert "cannot be written" in caplog.text
    assert chosen() == best


# ---- who is served ----


def test_it_serves_cuda_and_cpu_tensors_only_on_request(monkeypatch):
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)
    assert backends.order("cuda") == ("triton", "reference")
    assert "triton" not in backends.order("cpu")
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    assert backends.order("cpu")[0] == "triton"


@pytest.mark.parametrize("op", sorted(ops.OPS))
def test_each_dtype_passes_the_self_test_and_is_served_in_strict_mode(monkeypatch, op):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    monkeypatch.setenv("SPARSEKERN_STRICT", "1")
    backends._self_test.cache_clear()
    for dtype in triton.SERVES[op]:
        assert backends.resolve(op, dtype, CPU) is getattr(triton, op)
    backends._self_test.cache_clear()


EVERYTHING = """
import torch, sparsekern as sk
ops = torch.ops.sparsekern

def everything(w, x):
    values, meta = ops.pack_24(w)
    y = ops.linear_24(x, values, meta, None, "relu")
    z = ops.linear_24_prepacked(x, ops.prepack_24(values, meta), w.shape[0])
    return y, z, ops.unpack_24(values, meta), ops.prune_24(w), ops.prune_24_transposable(w)

w, x = torch.randn(8, 16), torch.randn(3, 16, requires_grad=True)
got = torch.compile(everything, fullgraph=True, backend="aot_eager")(w, x)
assert all(map(torch.equal, got, everything(w, x)))
got[0].sum().backward()
assert x.grad.shape == x.shape
assert torch.equal(sk.pack_zvc(x.detach().relu()).unpack(), x.detach().relu())
from sparsekern import backends
for op in ("pack_24", "linear_24", "pack_zvc"):
    served = backends.resolve(op, torch.float32, torch.device("cpu"))
    assert served.__module__.startswith("sparsekern.backends.triton"), served
"""


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SPARSEKERN_BACKEND": "triton", "SPARSEKERN_STRICT": "1"} | env,
        capture_output=True,
        text=True,
    )


def test_a_program_that_names_it_runs_on_it_without_one_fallback():
    done = run_python(EVERYTHING, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_without_the_interpreter_cpu_tensors_are_left_to_the_next_and_it_is_said():
    done = run_python(
        "import torch, sparsekern as sk; sk.prune_24(torch.ones(4))", TRITON_INTERPRET="0"
    )
    assert done.returncode != 0
    assert "prune_24: back end triton is unavailable: on the CPU it runs in" in done.stderr
    code = "import torch, sparsekern as sk; print(sk.prune_24(torch.ones(4)).tolist())"
    done = run_python(code, TRITON_INTERPRET="0", SPARSEKERN_STRICT="0")
    assert done.stdout.strip() == "[1.0, 1.0, 0.0, 0.0]"
    assert "a slower back end serves" in done.stderr


# ---- without a GPU: bytes, operations, machine code ----

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("sms", [72, 108, 132, 170])
@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_few_rows_move_at_most_1_1_times_the_least_bytes(fresh, dtype, sms):
    from benchmarks.triton_model import MODELS, of

    for N, K in [shape for shapes in MODELS.values() for shape in shapes]:
        for M in (1, 2, 3, 4, 5, 8, 12, 16):
            kernel, cost = of(M, N, K, dtype, sms)
            assert cost.least_bytes <= cost.memory <= 1.1 * cost.least_bytes, (kernel, M, N, K)


def test_the_model_is_printed(fresh):
    command = [sys.executable, "-m", "benchmarks.triton_model", "--rows", "1", "16", "--sms", "108"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for words in ("Llama-3-8B", "Qwen2.5-7B", "bytes", "few 1x64x128"):
        assert words in done.stdout


@pytest.mark.cubins
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_configuration_compiles_without_spills_and_few_rows_load_16_bytes(arch):
    command = [sys.executable, "-m", "benchmarks.triton_cubins", "--json", "--arch", str(arch)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    cubins = [SimpleNamespace(**json.loads(line)) for line in done.stdout.splitlines()]
    assert {c.kernel for c in cubins} == {
        *("prune_24", "prune_24_transposable", "pack_24", "unpack_24", "gather_24"),
        *("linear_24_few", "linear_24_many", "sum_splits", "linear_24_dx", "linear_24_dvalues"),
        *("pack_zvc", "mark", "place", "count", "unpack_zvc"),
    }
    for c in cubins:
        assert c.arch == arch
        assert c.spills == 0, c
        assert c.shared <= 99 * 1024, c  # what a program may have on sm_86, sm_89 and sm_120
        loads = {int(width): count for width, count in c.loads.items()}
        if c.kernel == "linear_24_few" and not c.masked:
            # Values and x 16 bytes at a time, the positions that go with them, and nothing else.
            assert set(loads) <= {1, 2, 16}, c
            assert loads[16] >= 2, c
            assert c.shared <= 1024, c
        if c.kernel in ("linear_24_many", "linear_24_dx") and not c.masked:
            assert loads[16] >= 2, c
