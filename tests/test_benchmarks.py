"""The CPU benchmark runs, writes what it should in the form it should, and judges rightly. No times are looked at."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK = [sys.executable, "-m", "benchmarks.cpu", "--quick", "--rounds", "3"]
SECTIONS = {"linear", "sweep", "peers", "backward", "formats", "zvc", "codecs"}

pytestmark = pytest.mark.compiled


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quick run of everything: what it printed, its Markdown and its JSON."""
    folder = tmp_path_factory.mktemp("bench")
    out, data, picture = folder / "table.md", folder / "rows.json", folder / "ratios.png"
    command = [*QUICK, "--out", str(out), "--json", str(data), "--plot", str(picture)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return done.stdout, out.read_text(), json.loads(data.read_text())


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.cpu.report")


@pytest.mark.slow
def test_every_section_is_measured(run):
    _, _, found = run
    rows = found["rows"]
    assert {row["section"] for row in rows} == SECTIONS
    assert found["failed"] == []
    assert found["interrupted"] == ""
    assert {row["op"] for row in rows if row["section"] == "backward"} == {
        "linear_24_dx",
        "linear_24_dvalues",
    }
    assert {row["op"] for row in rows if row["section"] == "linear"} == {
        "linear_24",
        "linear_24_prepacked",
    }
    for row in rows:
        assert row["threads"] in (1, 2)
        if row["ratio"] is None:
            assert row["section"] in ("peers", "codecs"), row
            assert row["note"], "a peer that was not measured says why"
        else:
            assert 0 < row["ratio"]["p10"] <= row["ratio"]["median"] <= row["ratio"]["p90"]
            assert 1 <= row["rounds"] <= (5 if row["section"] == "codecs" else 3)


def test_results_are_right(run):
    _, _, found = run
    for row in found["rows"]:
        if row["section"] in ("linear", "backward"):
            assert 0 <= row["error"] < 20, row
        if row["section"] in ("formats", "zvc"):
            assert row["exact"] is True, row
        if row["section"] == "codecs":
            assert row["exact"] is (None if row["note"] else True), row


def test_the_machine_and_its_ceilings_are_stated(run):
    _, text, found = run
    head = text.partition("\n## ")[0]
    for key in ("cpu", "torch", "python", "tier", "command", "revision"):
        assert found["machine"][key] in head
    assert {c["dtype"] for c in found["ceilings"]} == {"fp32", "bf16", "fp16"}
    assert set(found["bandwidth"]) == {"1", "2"}
    assert "governor" in head
    assert "cores taken by others" in head


def test_markdown_tables_are_well_formed(run):
    printed, text, _ = run
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert len(titles) == len(SECTIONS)
    for title, table in zip(titles, text.split("\n## ")[1:], strict=True):
        assert title in printed
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len(lines) > 2, title
        assert len({line.count(" | ") for line in lines}) == 1, title


def spread(report, value):
    return report.Spread.of([value])


def test_verdicts(report):
    assert report.verdict(1.75, 1.5, 1.75) == ">= stretch"
    assert report.verdict(1.74, 1.5, 1.75) == ">= must"
    assert report.verdict(1.49, 1.5, 1.75) == "below"
    assert report.verdict(1.0, 1.0, None) == ">= must"
    assert report.verdict(9.0, None, None) == ""


@pytest.mark.parametrize(
    ("op", "tier", "dtype", "M", "N", "want"),
    [
        ("linear_24", "avx512", "fp32", 1024, 4096, (1.5, 1.75)),
        ("linear_24_prepacked", "avx512", "fp32", 1024, 4096, (1.7, 2.0)),
        ("linear_24_prepacked", "avx512", "bf16", 1024, 4096, (1.35, 1.55)),  # linear_24's
        ("linear_24_prepacked", "avx2", "fp32", 1024, 4096, (1.4, 1.7)),
        ("linear_24", "avx2", "fp32", 1024, 4096, (None, None)),
        ("linear_24", "portable", "fp32", 1024, 4096, (None, None)),
        ("linear_24", "avx512", "fp16", 64, 14336, (3.0, 4.5)),
        ("linear_24", "avx512", "fp16", 64, 4096, (None, None)),
    ],
)
def test_targets_of_products(report, op, tier, dtype, M, N, want):
    case = {"M": M, "N": N, "K": 4096}
    row = report.Row("linear", op, dtype, case, 1, tier, "F.linear")
    row.ratio = spread(report, 1.6)
    assert report.targets(row) == want
    assert report.judge(row).verdict == report.verdict(1.6, *want)


def test_targets_of_compression_hold_at_their_size(report):
    row = report.Row(
        "zvc", "unpack_zvc", "4 B", {"bytes": 4, "zeros": 0.9}, 1, "avx512", "clone, memory reused"
    )
    row.more["input_bytes"] = 64 << 20
    assert report.targets(row) == (1.5, 1.9)
    row.baseline = "clone"
    assert report.targets(row) == (None, None)
    row.baseline, row.more["input_bytes"] = "clone, memory reused", 64 << 10
    assert report.targets(row) == (None, None)


def test_the_summary_names_what_is_below(report):
    case = {"M": 1, "N": 14336, "K": 4096}
    rows = [
        report.Row("linear", "linear_24", dtype, case, 1, "avx512", "F.linear")
        for dtype in ("fp32", "bf16")
    ]
    for row in rows:
        row.ratio = spread(report, 2.0)  # fp32's stretch, bf16's must
    assert "1 >= stretch, 1 >= must" in report.summary([report.judge(row) for row in rows])
    rows[1].ratio = spread(report, 1.9)
    text = report.summary([report.judge(row) for row in rows])
    assert "`linear_24` bf16 1 x 14336 x 4096" in text
    assert "fp32" not in text


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    out, data = tmp_path / "table.md", tmp_path / "rows.json"
    command = [*QUICK, "--section", "linear", "zvc", "--rounds", "1000000"]
    command += ["--seconds", "2", "--out", str(out), "--json", str(data)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = []
    for line in process.stderr:  # one per cell that is done
        lines.append(line)
        if " 1/" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130, "".join(lines) + rest
    found = json.loads(data.read_text())
    assert found["interrupted"].startswith("1 of ")
    assert [row["op"] for row in found["rows"]] == ["linear_24", "linear_24_prepacked"]
    assert "**Interrupted** after 1 of" in out.read_text()
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--isa", "mmx"], "--isa is mmx; this machine takes one of"),
        (["--threads", "0"], "take numbers from 1 on"),
        (["--out", "nowhere/table.md"], "there is no such folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    done = subprocess.run(
        [*QUICK, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert words in done.stderr
