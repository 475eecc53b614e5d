"""The command line: what it prints, its exit codes, and that `info` says what the dispatcher does."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from sparsekern import backends, info, ops, samples, selftest
from sparsekern.backends import cpu
from sparsekern.cli import app

runner = CliRunner()


def invoke(*arguments: str):
    # Wide enough that no table folds a word that a test looks for.
    return runner.invoke(app, arguments, env={"COLUMNS": "250"})


FEW = {name: ops.OPS[name] for name in ("prune_24", "pack_24", "prepack_24", "unpack_zvc")}


@pytest.fixture
def few_samples(monkeypatch):
    """The self-test on few ops and shapes: what is tested here is the command, not the kernels."""
    monkeypatch.setattr(ops, "OPS", FEW)
    monkeypatch.setattr(samples, "SHAPES", samples.QUICK_SHAPES)
    monkeypatch.setattr(samples, "LENGTHS", [4097])


def cpu_tiers() -> list[str]:
    return [] if cpu.unavailable(torch.device("cpu")) else cpu.isas()


def refused(result) -> str:
    """The one line of a refusal: exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


# ---- the frame ----


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("info", "selftest", "demo", "verify", "prune"):
        assert command in result.output


@pytest.mark.parametrize("command", ["info", "selftest", "demo"])
def test_help_of_a_command(command):
    assert invoke(command, "--help").exit_code == 0


def test_version():
    assert invoke("--version").output.strip() == f"sparsekern {version('sparsekern')}"


def test_python_m():
    command = [sys.executable, "-m", "sparsekern", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"sparsekern {version('sparsekern')}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("info", "--nothing"),
        ("selftest", "--seed", "x"),
        ("selftest", "--seed", "-1"),
        ("demo", "--device", "tpu"),
        ("demo", "--epochs", "0"),
        ("demo", "--hidden", "1000000"),
    ],
)
def test_bad_options_exit_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# ---- info ----


def test_info_shows_every_op():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for word in ("compiled core", "SPARSEKERN_BACKEND", torch.__version__, *ops.OPS):
        assert word in result.output


def test_info_json():
    found = json.loads(invoke("info", "--json").output)
    assert found["versions"]["sparsekern"] == version("sparsekern")
    assert found["devices"][0]["device"] == "cpu"
    assert set(found["environment"]) == set(selftest.environment())
    assert [r["op"] for r in found["ops"] if r["device"] == "cpu"] == list(ops.OPS)


@pytest.mark.parametrize("op", ops.OPS)
def test_info_says_what_the_dispatcher_does(op):
    row = info._served(op, torch.device("cpu"))
    told = {d: s["backend"] for s in row["serves"] for d in s["dtypes"]}
    names = {backends.load(name).__name__: name for name in backends.TABLE["cpu"]}
    for dtype in ops.OPS[op].dtypes:
        function = backends.resolve(op, dtype, torch.device("cpu"))
        assert told.pop(str(dtype).removeprefix("torch.")) == names[function.__module__]
    assert not told


def test_info_without_the_compiled_core(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda device: "no compiler was there")
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert "missing: no compiler was there" in result.output
    assert "cpu is unavailable: no compiler was there" in result.output
    assert info.REFERENCE_COST[:40] in result.output
    found = json.loads(invoke("info", "--json").output)
    assert not found["core"]["present"]
    assert all([s["backend"] for s in r["serves"]] == ["reference"] for r in found["ops"])
    assert any(m["what"] == "the compiled CPU core" for m in found["missing"])


def test_info_tells_of_a_kernel_that_failed_its_self_test(monkeypatch):
    monkeypatch.setattr(
        backends,
        "_self_test",
        lambda name, op, dtype, device: "wrong bits" if op == "pack_24" else None,
    )
    row = info._served("pack_24", torch.device("cpu"))
    assert [s["backend"] for s in row["serves"]] == ["reference"]
    assert any(
        "wrong bits" in p["reason"] or "unavailable" in p["reason"] for p in row["passed_over"]
    )


def test_info_tells_of_a_back_end_left_out_by_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    result = invoke("info")
    assert "cpu left out by SPARSEKERN_BACKEND=reference" in result.output


def test_info_refuses_an_unknown_back_end(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "abacus")
    assert "SPARSEKERN_BACKEND is 'abacus'" in refused(invoke("info"))


def test_info_tells_which_cuda_kernel_and_why():
    shown = invoke("info", "--kernels", "4096x14336").output
    assert "linear_24 in the CUDA back end, N = 4096, K = 14336" in shown
    assert "SPARSEKERN_BACKEND=cuda" in shown
    rows = json.loads(invoke("info", "--json", "--kernels", "4096x14336").output)["cuda_kernels"]
    found = {(row["dtype"], row["M"]): (row["kernel"].split("<")[0], row["why"]) for row in rows}
    assert found["bf16", 16][0] == "linear_24_decode_sm80"
    assert found["bf16", 512] == ("linear_24_sm80", "more than 64 tokens: sparse tensor cores")
    assert found["fp32", 1][0] == "linear_24_decode_fma"
    assert found["fp32", 512][0] == "linear_24_fma"
    assert "may not use tf32" in found["fp32", 512][1]


@pytest.mark.parametrize("text", ["4096", "4096x", "0x64", "64x6", "axb", "64x64x64"])
def test_info_refuses_a_weight_that_is_none(text):
    assert "it takes NxK" in refused(invoke("info", "--kernels", text))


def test_info_refuses_json_and_markdown_together():
    assert "exclude each other" in refused(invoke("info", "--json", "--markdown"))


def test_markdown_is_the_declarations():
    printed = invoke("info", "--markdown").output
    assert printed.strip() == info.markdown_table()
    lines = printed.strip().splitlines()
    assert len(lines) == 2 + len(ops.OPS)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert lines[0].startswith("| op | `cpu` (cpu) |")
    assert lines[0].endswith("`reference` (any device) |")


def test_markdown_does_not_depend_on_the_machine(monkeypatch):
    before = info.markdown_table()
    monkeypatch.setattr(cpu, "unavailable", lambda device: "no compiler was there")
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    assert info.markdown_table() == before


def test_dtypes_in_few_words():
    assert info._compact({torch.bfloat16, torch.float32}) == "fp32, bf16"
    assert info._compact(["float64", "int16"]) == "fp64, int16"
    assert info._compact(ops.ZVC_DTYPES) == "all of 1, 2, 4, 8 bytes"
    assert info._compact(()) == "–"


# ---- selftest ----


def test_selftest_passes(few_samples):
    result = invoke("selftest", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert f"{len(FEW) * (len(cpu_tiers()) + 1)} passed, 0 failed" in result.output
    for op in FEW:
        assert op in result.output


def test_selftest_json(few_samples):
    result = invoke("selftest", "--json")
    found = json.loads(result.output)
    assert result.exit_code == 0
    assert found["failed"] == 0
    assert found["passed"] == len(found["results"]) > 0
    assert all(r["ok"] and r["cases"] > 0 for r in found["results"])


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_selftest_exits_with_1_when_a_back_end_is_wrong(few_samples, monkeypatch, flags):
    reference = backends.load("reference")
    # On every back end, so that the test also says something where there is no compiled core.
    for backend in (cpu, reference):
        monkeypatch.setattr(backend, "unpack_zvc", lambda *args: 1 / 0)
    result = invoke("selftest", *flags)
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.output
    if flags:
        assert json.loads(result.output)["failed"] > 0
    else:
        assert "FAILED" in result.output
