"""`sparsekern bench` and `sparsekern tune`: what they measure, write, compare and refuse. No times are looked at."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern import bench, choices
from sparsekern.bench import clock, compare, report, session, shapes, tune
from sparsekern.bench.clock import Budget, Clock, Spread
from sparsekern.bench.results import Peer, Results, Row
from sparsekern.cli import app

pytestmark = pytest.mark.compiled

CPU = torch.device("cpu")


def options(*suites: str, **changed) -> session.Options:
    own = {
        "shapes": tuple(shapes.parse(["16x64x64", "1x128x64"], [1])),
        "against": ("csr", "zlib", "conversion", "save_on_cpu"),
        "minutes": 0.05,
        "rounds": 3,
        "check": True,
        "quick": True,
    }
    return session.Options(suites=suites, **(own | changed))


@pytest.fixture(scope="module")
def results():
    return bench.run(options("linear_24", "pack_24", "zvc", "offload"), "sparsekern bench")


# ---- the clock ----


class Time:
    """A clock that calls set forward, with some noise: seconds per call by name."""

    def __init__(self, seed: int = 0, **seconds: float):
        self.at, self.seconds, self.random = 0.0, seconds, random.Random(seed)

    def now(self) -> float:
        return self.at

    def sides(self) -> dict:
        def call(name: str) -> None:
            self.at += self.seconds[name] * self.random.uniform(0.98, 1.02)

        return {name: lambda i, name=name: call(name) for name in self.seconds}

    def measure(self, rounds: int = 15) -> dict[str, list[float]]:
        return Clock(CPU, self.now).interleave(self.sides(), Budget(rounds, 1e9))


def test_samples_are_milliseconds_of_one_call():
    samples = Time(a=2e-3, b=5e-6, c=1.0).measure()
    for name, ms in (("a", 2.0), ("b", 5e-3), ("c", 1e3)):
        assert len(samples[name]) == 15
        assert all(abs(s / ms - 1) < 0.021 for s in samples[name])


def test_a_budget_ends_the_rounds_but_not_before_the_least():
    time = Time(a=1.0, b=1.0)
    samples = Clock(CPU, time.now).interleave(time.sides(), Budget(15, seconds=0.5, least=3))
    assert [len(s) for s in samples.values()] == [3, 3]


def test_every_call_gets_its_turn():
    seen = []
    clock_ = Clock(CPU, iter(range(10**6)).__next__)  # a second per look
    clock_.interleave({"a": seen.append}, Budget(4, 1e9))
    assert seen == list(range(len(seen)))
    assert len(seen) >= 5


def test_the_interval_of_the_median():
    # 15 values: the 4th and the 12th of the order, as tables of the sign test have it.
    assert (Spread.of([float(i) for i in range(15)])).low == 3.0
    assert (Spread.of([float(i) for i in range(15)])).high == 11.0
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0, 1)
    few = Spread.of([3.0, 1.0, 2.0])
    assert (few.low, few.median, few.high) == (1.0, 2.0, 3.0)
    # It covers the true median in about 95 of 100 samples.
    draw = random.Random(1)
    inside = 0
    for _ in range(2000):
        s = Spread.of([draw.gauss(0, 1) for _ in range(15)])
        inside += s.low <= 0 <= s.high
    assert inside > 1900


# ---- two runs ----


def run_of(seed: int, **seconds: float) -> Results:
    samples = Time(seed, **seconds).measure()
    row = Row(
        "linear_24", "linear_24", {"M": 1, "N": 8, "K": 8}, "1 x 8 x 8", "fp32", "cpu", 1, "cpu"
    )
    return Results({}, "", [row.timed(samples, "ours", [n for n in seconds if n != "ours"])])


def test_two_runs_of_the_same_build_do_not_differ():
    for seed in range(6):
        then, now = run_of(seed, ours=1e-3, torch=2e-3), run_of(100 + seed, ours=1e-3, torch=2e-3)
        changes, alone = compare.compare(then, now)
        assert [c.verdict for c in changes] == ["no difference"]
        assert alone == []


@pytest.mark.parametrize("peer", [{"torch": 2e-3}, {}])
def test_a_tenth_is_found(peer):
    for seed in range(6):
        then, now = run_of(seed, ours=1e-3, **peer), run_of(100 + seed, ours=1.1e-3, **peer)
        (change,) = compare.compare(then, now)[0]
        assert change.verdict == "slower"
        assert 0.88 < change.ratio < 0.94
        (back,) = compare.compare(now, then)[0]
        assert back.verdict == "faster"


def test_a_slower_machine_is_no_slower_build():
    then, now = run_of(1, ours=1e-3, torch=2e-3), run_of(2, ours=1.5e-3, torch=3e-3)
    (change,) = compare.compare(then, now)[0]
    assert (change.verdict, change.against) == ("no difference", "torch")


def test_rows_of_one_run_alone_are_named():
    then, now = run_of(1, ours=1e-3), run_of(2, ours=1e-3)
    now.rows[0] = replace(now.rows[0], case={"M": 2, "N": 8, "K": 8})
    changes, alone = compare.compare(then, now)
    assert changes == []
    assert [line.partition(":")[0] for line in alone] == ["only then", "only now"]


# ---- what is measured ----


def test_every_suite_has_its_rows(results):
    assert results.failed == []
    assert results.interrupted == ""
    ops = {suite: {row.op for row in results.rows if row.suite == suite} for suite in bench.SUITES}
    assert ops["linear_24"] == {"linear_24", "linear_24_prepacked"}
    assert ops["pack_24"] == {"prune_24", "pack_24", "unpack_24", "prune_24_transposable"}
    assert ops["zvc"] == {"pack_zvc_out", "unpack_zvc"}
    assert ops["offload"] == {"offload_activations"}
    assert len({row.key for row in results.rows}) == len(results.rows)


def test_every_row_is_checked_and_right(results):
    for row in results.rows:
        assert row.wrong == ""
        assert (row.error is not None) != (row.exact is not None)
        assert row.error is None or 0 <= row.error <= 2
        assert row.exact in (None, True)
        assert row.ms.p10 <= row.ms.median <= row.ms.p90
        assert row.suite == "offload" or row.share > 0


def test_peers_are_measured_or_named_as_missing(results):
    for row in results.rows:
        assert row.peers
        for peer in row.peers.values():
            assert bool(peer.missing) == (peer.ratio is None)
    fp32 = next(row for row in results.rows if row.op == "linear_24")
    assert list(fp32.peers) == ["torch", "csr"]
    assert (
        "is for cuda"
        in bench.run(options("linear_24", against=("cutlass",))).rows[0].peers["cutlass"].missing
    )
    zvc = next(row for row in results.rows if row.op == "pack_zvc_out")
    assert zvc.peers["zlib"].compression > 1
    assert {row.op: list(row.peers) for row in results.rows if row.suite == "pack_24"} == {
        "prune_24": ["clone"],
        "pack_24": ["clone", "conversion"],
        "unpack_24": ["clone"],
        "prune_24_transposable": ["clone"],
    }


@pytest.mark.parametrize(
    ("op", "suite"),
    [
        ("linear_24", "linear_24"),
        ("linear_24_prepacked", "linear_24"),
        ("prune_24", "pack_24"),
        ("pack_24", "pack_24"),
        ("unpack_24", "pack_24"),
        ("prune_24_transposable", "pack_24"),
        ("unpack_zvc", "zvc"),
        ("pack_zvc_out", "zvc"),
    ],
)
def test_a_wrong_kernel_fails_loudly(op, suite, monkeypatch):
    owner = sk if suite == "linear_24" else torch.ops.sparsekern
    right = getattr(owner, op)

    def wrong(*args):
        out = right(*args)
        damaged = (
            args[2] if op == "pack_zvc_out" else out if isinstance(out, torch.Tensor) else out[0]
        )
        damaged.view(-1)[:1].add_(1)
        return out

    monkeypatch.setattr(owner, op, wrong)
    found = bench.run(options(suite, shapes=(shapes.Shape(16, 64, 64),), dtypes=("fp32",)))
    assert found.failed == []
    assert op in {row.op for row in found.wrong}


def test_one_broken_case_does_not_cost_the_others(monkeypatch):
    def broken(*_, shape, **__):
        if shape.M == 1:
            raise RuntimeError("no such luck\nwith details")
        return [Row("x", "linear_24", {}, "", "fp32", "cpu", 1, "cpu")]

    monkeypatch.setattr(bench.linear, "_measure", broken)
    found = bench.run(options("linear_24", dtypes=("fp32",)))
    assert [row.op for row in found.rows] == ["x"]
    assert found.failed == ["linear_24 fp32 1 x 128 x 64 , threads: 1: RuntimeError: no such luck"]


def test_ctrl_c_keeps_what_was_measured(monkeypatch):
    seen = []

    def interrupted(*_, shape, **__):
        seen.append(shape)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return [Row("x", "linear_24", {}, "", "fp32", "cpu", 1, "cpu")]

    monkeypatch.setattr(bench.linear, "_measure", interrupted)
    found = bench.run(options("linear_24"))
    assert found.interrupted == "1 of 4 cases"
    assert len(found.rows) == 1
    assert any("Interrupted after 1 of 4" in line for line in report.head(replace_machine(found)))


def replace_machine(found: Results) -> Results:
    found.machine |= session.machine(CPU)
    return found


# ---- what is written ----


def test_json_comes_back_as_it_was(results):
    assert Results.from_json(results.to_json()) == results


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("rows"),
        lambda found: found.update(version=99),
        lambda found: found["rows"][0].pop("op"),
        lambda found: found["rows"][0].update(ms={"median": 1}),
        lambda found: found["rows"][0]["ms"].update(median="fast"),
        lambda found: found["rows"][0].update(peers=[1]),
        lambda found: found.update(ceilings=[{"kind": 1}]),
        lambda found: found.update(rows="none"),
    ],
)
def test_files_that_are_no_results_are_refused(results, damage):
    found = json.loads(results.to_json())
    damage(found)
    with pytest.raises(ValueError, match=r"old\.json is no result of sparsekern bench"):
        Results.from_json(json.dumps(found), "old.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"version": 1}', "\x00"])
def test_text_that_is_no_result_is_refused(text):
    with pytest.raises(ValueError, match="is no result of sparsekern bench"):
        Results.from_json(text)


def test_csv_has_a_line_per_row_and_peer(results):
    lines = list(csv.DictReader(results.to_csv().splitlines()))
    assert len(lines) == sum(len(row.peers) for row in results.rows)
    first = lines[0]
    assert (first["op"], first["peer"]) == ("linear_24", "torch")
    assert float(first["ratio"]) == results.rows[0].peers["torch"].ratio.median


def test_markdown_tables_are_well_formed(results):
    text = report.markdown(results)
    assert text.count("\n## ") == len(bench.SUITES)
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count(" | ") for line in lines}) == 1


def test_losses_are_named_as_plainly_as_wins():
    found = run_of(1, ours=2e-3, torch=1e-3)
    assert len(report.losses(found.rows)) == 1
    assert "of torch's speed" in report.losses(found.rows)[0]
    assert report.losses(run_of(1, ours=1e-3, torch=2e-3).rows) == []
    found.rows[0].peers = {"torch": Peer(missing="not here")}
    assert report.losses(found.rows) == []


# ---- shapes ----


def test_models_and_shapes_by_number():
    assert [str(s) for s in shapes.parse(["bert/up", "3x8x12"], [1, 16])] == [
        "1 x 3072 x 768",
        "16 x 3072 x 768",
        "3 x 8 x 12",
    ]
    assert len(shapes.parse(["llama3-8b", "llama3-8b/o"], [1])) == 4  # nothing twice


@pytest.mark.parametrize(
    "text", ["", "gpt", "1x2", "0x4x4", "1x4x6", "bert/nose", "1x4x99999999", "1x4x4x4"]
)
def test_shapes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="--shapes"):
        shapes.parse([text], [1])


# ---- the command ----

SHORT = ["--quick", "--minutes", "0.05", "--rounds", "2", "--dtype", "fp32", "--device", "cpu"]
QUICK = ["bench", *SHORT, "--shapes", "16x64x64"]


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_writes_what_was_asked_for(tmp_path):
    pytest.importorskip("matplotlib")
    names = {flag: tmp_path / f"out.{flag}" for flag in ("json", "csv", "markdown", "plot")}
    names["plot"] = tmp_path / "out.png"
    written = [w for flag, path in names.items() for w in (f"--{flag}", path)]
    done = invoke(*QUICK, "linear_24", "--against", "none", "--check", *written)
    assert done.exit_code == 0, done.output
    assert "Products" in done.output
    assert "torch / ours" in done.output
    assert names["plot"].read_bytes().startswith(b"\x89PNG")
    found = Results.read(names["json"])
    assert {row.op for row in found.rows} == {"linear_24", "linear_24_prepacked"}
    assert names["markdown"].read_text().startswith("# ")
    again = invoke(*QUICK, "linear_24", "--against", "none", "--compare", names["json"])
    assert again.exit_code == 0, again.output
    assert "Then and now" in again.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frob"], "'frob' is no suite; it takes linear_24"),
        (["--against", "mkl"], "--against has 'mkl'; it takes all, none or some of"),
        (["--dtype", "fp8"], "--dtype has 'fp8'; it takes fp32, bf16, fp16"),
        (["--threads", "0"], "--threads is '0'"),
        (["--tokens", "x"], "--tokens is 'x'"),
        (["--device", "xla"], "--device is xla"),
        (["--shapes", "1x2x3"], "--shapes: 1x2x3"),
        (["--json", "nowhere/x.json"], "there is no such folder"),
        (["--compare", "nowhere.json"], "nowhere.json cannot be read"),
        (["zvc", "--plot", "x.png"], "--plot draws products"),
    ],
)
def test_what_cannot_be_is_refused_before_measuring(arguments, words):
    done = invoke("bench", "--quick", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_a_wrong_result_fails_the_command(monkeypatch):
    monkeypatch.setattr("sparsekern.bench.linear.error_ratio", lambda *_: 3.0)
    done = invoke(*QUICK, "linear_24", "--against", "none", "--check")
    assert done.exit_code == 1
    assert "WRONG" in done.output


# ---- tune, and what SparseLinear does with it ----


@pytest.fixture
def no_choices(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices.forget()
    yield tmp_path
    choices.forget()


def choose(
    N: int, K: int, dtype: torch.dtype = torch.float32, op: str = "linear_24", **ratios: float
) -> None:
    entries = {M.removeprefix("M"): ratio for M, ratio in ratios.items()}
    choices.write({choices.device_name(CPU): {choices.product(op, N, K, dtype): entries}})


def test_tune_measures_and_writes_what_a_layer_reads(no_choices):
    done = invoke("tune", "16x64x64,64x64x64", *SHORT)
    assert done.exit_code == 0, done.output
    assert "are slower than torch's dense product" in done.output
    measured = choices.measured("linear_24", 64, 64, torch.float32, CPU)
    assert set(measured) == {16, 64}
    assert all(ratio > 0 for ratio in measured.values())


def tuned(ratio: float, dense: float = 1.5) -> tune.Tuned:
    spread = [Spread(r, r, r, r, r, 5) for r in (ratio, dense)]
    return tune.Tuned("linear_24", shapes.Shape(16, 64, 64), "fp32", 1, *spread)


def test_expanding_has_to_be_worth_it():
    assert not tuned(1.04).expands
    assert tuned(1.06).expands
    assert not tuned(1, dense=1.0).slower_than_dense
    assert tuned(1, dense=0.9).slower_than_dense


def test_numbers_of_tokens_share_a_bucket():
    assert [choices.bucket(M) for M in (0, 1, 2, 3, 4, 5, 1000, 1024, 1025, 10**6)] == [
        1, 1, 2, 4, 4, 8, 1024, 1024, 2048, 8192,
    ]  # fmt: skip


def test_of_a_bucket_the_least_in_favour_of_expanding_counts():
    o = replace(options(), threads=(1,))
    s = session.Session(o, Clock(CPU), Results({}, ""))
    some = [tuned(2.0), replace(tuned(1.2), shape=shapes.Shape(15, 64, 64))]
    (products,) = tune.table_of(s, some).values()
    assert products == {"linear_24 float32 64 x 64": {"16": 1.2}}


@pytest.fixture
def calls(monkeypatch):
    """Names of the products that a layer calls."""
    from sparsekern import nn

    seen = []
    for name in ("_linear_24", "_linear_24_prepacked"):
        right = getattr(nn, name)
        monkeypatch.setattr(
            nn, name, lambda *a, right=right, name=name: (seen.append(name), right(*a))[1]
        )
    return seen


@pytest.mark.parametrize("prepacked", [False, True])
def test_a_layer_expands_where_that_was_measured_faster(no_choices, calls, prepacked):
    layer = sk.SparseLinear(62, 48)  # padded to 64
    if prepacked:
        layer.prepack()
    op = "linear_24_prepacked" if prepacked else "linear_24"
    choose(48, 64, op=op, M16=2.0, M1024=1.01)
    x = torch.randn(2, 8, 62)
    with torch.no_grad():
        expanded = layer(x)
        assert calls == []
        few = layer(x[0])
        assert calls == [f"_{op}"]
    torch.testing.assert_close(expanded[0], few)
    assert expanded.shape == (2, 8, 48)
    assert "the weight is expanded" in layer.explain(16)
    assert f"{op}, the packed product" in layer.explain(1000)
    assert "worth it from 1.05 on" in layer.explain(1000)
    assert "not measured here (sparsekern tune 3x48x64)" in layer.explain(3)


def test_training_and_compilation_stay_packed(no_choices, calls):
    layer = sk.SparseLinear(64, 48)
    choose(48, 64, M16=2.0)
    layer(torch.randn(16, 64)).sum().backward()
    assert calls == ["_linear_24"]
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        compiled(torch.randn(16, 64))


def test_other_cases_stay_packed(no_choices, calls):
    choose(48, 64, M16=2.0)
    with torch.no_grad():
        sk.SparseLinear(64, 48, dtype=torch.bfloat16)(torch.randn(16, 64).bfloat16())
        sk.SparseLinear(64, 52)(torch.randn(16, 64))
        sk.SparseLinear(64, 48)(torch.randn(17, 64))
    assert calls == ["_linear_24"] * 3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with torch.no_grad():
            sk.SparseLinear(64, 48)(torch.randn(16, 64))
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 4


def test_autocast_and_expansion_agree(no_choices):
    layer, x = sk.SparseLinear(64, 48), torch.randn(16, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = layer(x)
        choose(48, 64, M16=2.0)
        expanded = layer(x)
    assert packed.dtype is expanded.dtype is torch.bfloat16
    torch.testing.assert_close(packed, expanded, rtol=2e-2, atol=2e-2)


def test_writers_add_and_keep_what_is_there(no_choices):
    choose(48, 64, M16=2.0)
    choose(48, 64, M32=3.0)
    choose(40, 64, M16=1.0)
    assert choices.measured("linear_24", 48, 64, torch.float32, CPU) == {16: 2.0, 32: 3.0}
    assert choices.measured("linear_24", 40, 64, torch.float32, CPU) == {16: 1.0}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 2, "choices": {}}', '{"version": 1}', '{"version": 1, "choices": []}',
     '{"version": 1, "choices": {"x": 3}}'],
)  # fmt: skip
def test_a_damaged_table_counts_as_empty(no_choices, text):
    choices.path().parent.mkdir(parents=True)
    choices.path().write_text(text)
    choices.forget()
    assert choices.measured("linear_24", 48, 64, torch.float32, CPU) == {}
    choose(48, 64, M16=2.0)  # and is replaced
    assert choices.expands("linear_24", 16, 48, 64, torch.float32, CPU)


def test_numbers_that_are_none_are_left_out(no_choices):
    device = choices.device_name(CPU)
    entries = {"16": "fast", "32": True, "64": -1, "x": 2.0, "128": 1e400, "256": 2.0}
    choices.path().parent.mkdir(parents=True)
    product = choices.product("linear_24", 48, 64, torch.float32)
    choices.path().write_text(json.dumps({"version": 1, "choices": {device: {product: entries}}}))
    choices.forget()
    assert choices.measured("linear_24", 48, 64, torch.float32, CPU) == {256: 2.0}


def test_the_shipped_table_can_be_read():
    content = json.loads(choices.SHIPPED.read_text())
    assert content["version"] == choices.VERSION
    assert choices.read(choices.SHIPPED) == content["choices"]


def test_the_flush_of_a_gpu_is_larger_than_its_cache():
    assert clock.FLUSH_BYTES >= 2 * 50 << 20  # an H100's
