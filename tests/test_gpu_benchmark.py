"""The one command for a GPU: that a part which fails hides none of the others, and that its numbers are right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the benchmarks are never installed
gpu, timing, offload = (
    importlib.import_module(f"benchmarks.gpu.{name}") for name in ("__main__", "timing", "offload")
)

GOOD = [sys.executable, "-c", "print('fine')"]
BAD = [sys.executable, "-c", "print('it broke'); raise SystemExit(7)"]
SLOW = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]


def test_a_part_that_fails_or_hangs_hides_no_other(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 2)
    todo = [
        gpu.Part("bad", BAD, 0.1),
        gpu.Part("slow", SLOW, 0.1),
        gpu.Part("absent", GOOD, 0.1, "no-such-program"),
        gpu.Part("nothing", ["no-such-program"], 0.1),
        gpu.Part("good", GOOD, 0.6),
    ]
    said = []
    outcomes = gpu.run(todo, 20, said.append)
    assert [o.status for o in outcomes] == ["FAILED (7)", "timed out", "left out", "FAILED", "ok"]
    assert [o.tail for o in outcomes][:3] == ["it broke", "begun", "no no-such-program here"]
    text = gpu.report(outcomes, "cpu")
    assert "## bad: FAILED (7)" in text
    assert "it broke" in text
    assert text.index("## Summary") > text.index("## slow: timed out")
    assert "| good    | ok " in text


def test_time_left_over_goes_to_those_that_follow(monkeypatch):
    limits = []
    monkeypatch.setattr(
        gpu, "_run", lambda part, limit: limits.append(limit) or gpu.Outcome(part, "ok")
    )
    gpu.run(
        [gpu.Part("a", GOOD, 0.5), gpu.Part("b", GOOD, 0.25), gpu.Part("c", GOOD, 0.25)], 100, str
    )
    # Nothing took any time: half of all, half of all that is left, all that is left.
    assert limits == [pytest.approx(50, abs=1), pytest.approx(50, abs=1), pytest.approx(100, abs=1)]


def test_rows_say_which_side_is_faster():
    rows = timing.rows(
        {"op": "x"},
        {"theirs": [2.0, 4.0, 6.0], "ours": [1.0, 2.0, 3.0]},
        "theirs",
        {"ours": 10**6},
        2 * 10**9,
    )
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert rows[1]["GB/s"] == pytest.approx(0.5)  # 1 MB in 2 ms
    assert rows[1]["TFLOP/s"] == pytest.approx(1.0)
    assert "GB/s" not in rows[0]


def test_overlap_counts_time_under_any_kernel_once():
    kernels = [(0.0, 4.0), (2.0, 6.0), (10.0, 12.0)]
    assert offload.shared_time([(5.0, 11.0)], kernels) == 2.0
    assert offload.shared_time([(1.0, 3.0)], kernels) == 2.0
    assert offload.shared_time([(7.0, 9.0)], kernels) == 0.0


def test_every_measurement_runs_on_tiny_sizes(tmp_path):
    out = tmp_path / "report.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    command += ["--minutes", "2", "--only", "linear", "memory", "offload", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=250
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = out.read_text()
    for words in (
        "## linear",
        "## memory",
        "## offload",
        "linear_24",
        "pack_zvc_out",
        "save_on_cpu",
    ):
        assert words in text
    assert "cuBLAS" in text  # the baseline's name, whatever serves it


def test_a_wrong_kernel_fails_the_part(monkeypatch, capsys):
    from sparsekern import selftest

    monkeypatch.setattr(selftest, "known_answers", lambda *_: "off by one")
    with pytest.raises(SystemExit, match="off by one"):
        gpu.answers(torch.device("cpu"), 1, True)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_an_unknown_part_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--only", "nosuch"])
    assert gpu.main() == 2
    assert "it takes build, selftest, tests" in capsys.readouterr().err


def test_a_part_hands_its_numbers_over(tmp_path):
    file = tmp_path / "found.json"
    options = gpu.parsed(["--part", "answers", "--device", "cpu", "--json", str(file)])
    gpu.do("answers", options)
    assert json.loads(file.read_text()) == {"rows": [], "missing": {}}
