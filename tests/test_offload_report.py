"""`sparsekern offload-report`, and the benchmark of what the offload costs: words, numbers, files and errors."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sparsekern import cli
from sparsekern.offload import report

ROOT = Path(__file__).parents[1]


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["offload-report", *map(str, arguments)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def factory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))
    x = torch.randn(256, 64)
    return model, lambda: model(x).square().mean()


def model_alone():
    return factory()[0]


def noisy():
    """Gradients that differ each time, as a device's atomic sums may."""
    model, step = factory()
    calls = iter(range(100))
    return model, lambda: step() * (1 + 0.1 * next(calls))


@pytest.fixture
def here(monkeypatch):
    """So that this module can be named as a factory's."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


def test_a_net_is_reported_in_words_numbers_and_pictures(tmp_path):
    arguments = ("transformer-relu2", "--batch", 4, "--steps", 2, "--min-bytes", 65536)
    output = run(*arguments, "--out", tmp_path / "new").output
    assert "bit for bit the same" in output
    assert "blocks.0.acti" in output
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert found["gradients_identical"] is found["reproducible"] is True
    assert len(found["seconds_without"]) == len(found["seconds_with"]) == 2
    assert found["peak_bytes"]["device"] < found["peak_bytes"]["without"]
    # A step ends with nothing held, and each curve is what the peaks were taken from.
    assert found["curve"][-1][1:] == [0, 0, 0]
    assert max(row[1] for row in found["curve"]) == found["peak_bytes"]["without"]
    assert found["stats"]["total"]["packed"]["zvc"] > 0
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_factory_of_ones_own(here):
    result = run("test_offload_report:factory", "--steps", 1, "--json", "--min-bytes", 1024)
    found = json.loads(result.stdout)
    assert found["model"] == "Sequential"
    # The ReLU's output, 1 MiB, saved by it and by the layer after it; x, which does not compress, is left.
    assert found["stats"]["modules"]["1"]["packed"] == {"zvc": 1}
    assert found["stats"]["modules"]["2"]["shared"] == 1
    assert found["peak_bytes"]["without"] == 4 * 256 * (1024 + 64 + 64)


def test_gradients_that_differ_without_it_are_not_held_against_it(here):
    assert "not compared" in " ".join(run("test_offload_report:noisy", "--steps", 1).output.split())


def test_gradients_that_differ_fail(here, monkeypatch):
    def wrong(*arguments):
        good = decode(*arguments)
        return good + 1

    from sparsekern.offload import codec

    decode = codec.decode
    monkeypatch.setattr(codec, "decode", wrong)
    assert (
        "GRADIENTS DIFFER"
        in run("test_offload_report:factory", "--steps", 1, "--min-bytes", 1024, code=1).output
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a net"),
        (("nosuchnet",), "no net 'nosuchnet'; it takes one of alexnet"),
        (("nosuchmodule:factory",), "cannot import nosuchmodule:factory"),
        (("test_offload_report:nothing",), "cannot import test_offload_report:nothing"),
        (("test_offload_report:model_alone",), "it takes (model, step)"),
        (("cnn", "--to", "disk"), "to is 'disk'; it takes one of auto, cpu, device"),
        (("cnn", "--min-ratio", 0.5), "min_ratio is 0.5; it takes a number above 1"),
        (("cnn", "--dtype", "int4"), "--dtype is int4; it takes one of fp32, bf16, fp16"),
        (("cnn", "--device", "nosuch"), "--device nosuch:"),
        (("alexnet", "--size", 8), "size is 8"),
    ],
)
def test_bad_input_is_named(here, arguments, words):
    result = run(*arguments, code=2)
    assert words in " ".join(result.stderr.split())


def test_the_nets_are_listed():
    assert "vgg16" in run("--list").output


def test_the_state_of_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    x = torch.randn(16, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report._gradients(model, lambda: model(x).sum(), contextlib.nullcontext(), torch.device("cpu"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_benchmark_of_the_cost_writes_its_table(tmp_path):
    out = tmp_path / "cost.md"
    command = [sys.executable, "-m", "benchmarks.offload.cost", "--quick", "--turns", "2"]
    command += ["--net", "cnn", "--threads", "1", "--out", str(out), "--data", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "synthetic" in done.stderr
    rows = [line for line in out.read_text().splitlines() if line.startswith("| cnn")]
    assert [row.split("|")[2].strip() for row in rows] == ["auto", "device", "cpu", "save_on_cpu"]
