"""The tables of the pruning papers: quick runs, what they keep and go on from, and what they write."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are never installed
mishra, oneshot, record = (
    importlib.import_module(f"benchmarks.pruning.{name}")
    for name in ("mishra", "oneshot", "record")
)


@pytest.fixture(autouse=True)
def one_thread():
    """The commands set it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a benchmark on a few made-up digits or characters; gives its exit code."""
    rng = np.random.default_rng(0)
    digits = {
        f"{part}_{split}": rng.integers(0, top, (n, *shape), dtype=np.uint8)
        for split, n in (("train", 64), ("test", 200))
        for part, top, shape in (("x", 256, (28, 28)), ("y", 10, ()))
    }
    np.savez(tmp_path / "mnist.npz", **digits)
    (tmp_path / "tinyshakespeare.txt").write_text(
        "To be, or not to be: that is the question.\n" * 60
    )

    def run(module, file, *more):
        name = module.__name__.rpartition(".")[2]
        paths = ["--data", tmp_path / file, "--work", tmp_path / name, "--out", tmp_path / "out.md"]
        arguments = [name, "--quick", "--seeds", 2, *paths, *more]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        return module.main()

    return run


def rows(text, title):
    """Of the table under a heading, as lists of cells."""
    table = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][
        2:
    ]


def test_the_recipe_beside_its_controls(command, tmp_path):
    assert command(mishra, "mnist.npz", "--net", "lenet-300-100") == 0
    text = (tmp_path / "out.md").read_text()
    assert [row[0] for row in rows(text, "lenet-300-100")] == list(mishra.VARIANTS)
    kept = [
        json.loads((tmp_path / f"mishra/lenet-300-100-{s}.json").read_text())["result"]
        for s in (0, 1)
    ]
    for variant, _, mean, by_seed in rows(text, "lenet-300-100"):
        values = [k[variant] for k in kept]
        assert mean == record.spread(values)
        assert by_seed == ", ".join(f"{v:.2f}" for v in values)
        assert all(0 <= v <= 100 for v in values)
    assert rows(text, "The paper's rows")[0] == ["ResNet-50", "ImageNet", "top-1", "76.1", "76.2", "+0.1"]  # fmt: skip
    assert "**Quick**" in text


def test_the_cnn_has_the_parameters_it_says():
    assert sum(p.numel() for p in mishra.cnn().parameters()) == 390_410


def test_perplexity_beside_the_paper(command, tmp_path):
    assert command(oneshot, "tinyshakespeare.txt") == 0
    text = (tmp_path / "out.md").read_text()
    found = rows(text, "Perplexity")
    assert [tuple(row[:2]) for row in found[1:]] == [
        (pattern, method) for pattern in oneshot.PAPER for method in oneshot.METHODS
    ]
    assert found[0][5:] == ["5.12", "1.00"]
    assert found[1][5:] == ["54.59", "10.66"]
    assert text.count("in the paper") == 3


def test_finished_seeds_are_not_measured_again(command, tmp_path, monkeypatch):
    measured = []

    def measure(net, run, digits, seed, advance):
        measured.append(seed)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {variant: 1.0 + seed for variant in mishra.VARIANTS}

    monkeypatch.setattr(mishra, "measure", measure)
    arguments = (mishra, "mnist.npz", "--net", "lenet-300-100")
    assert command(*arguments) == 130
    assert "**Interrupted**" in (tmp_path / "out.md").read_text()
    assert command(*arguments) == 0
    assert measured == [0, 1, 1]
    text = (tmp_path / "out.md").read_text()
    assert "**Interrupted**" not in text
    assert rows(text, "lenet-300-100")[0][2:] == ["1.50 ± 0.71", "1.00, 2.00"]
    # Under other settings they are.
    monkeypatch.setattr(mishra, "QUICK", {"lenet-300-100": mishra.Run(1, 32, 64)})
    assert command(*arguments) == 0
    assert measured == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("module", ["mishra", "oneshot"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
        (["--seeds", "0"], "--seeds is 0; it takes numbers from 1 on"),
        (["--threads", "0"], "--threads is 0; it takes numbers from 1 on"),
        (["--out", "nowhere/a.md"], "--out nowhere/a.md: there is no such folder"),
    ],
)
def test_bad_options_are_refused(module, arguments, message, command, capsys):
    file = {"mishra": "mnist.npz", "oneshot": "tinyshakespeare.txt"}[module]
    with pytest.raises(SystemExit) as stopped:
        command({"mishra": mishra, "oneshot": oneshot}[module], file, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_spread_is_of_a_sample():
    assert record.spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert record.spread([1.0]) == "1.00"
    assert record.spread([0.5, 0.5], sign="+") == "+0.50 ± 0.00"


def test_perplexity_of_a_uniform_guess_is_the_number_of_symbols():
    class Uniform(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 7)

    held_out = torch.randint(7, (11, 6))
    assert math.isclose(oneshot.perplexity(Uniform(), held_out), 7, rel_tol=1e-6)
