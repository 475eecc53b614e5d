"""What the documents say holds: their code, their tables, their links."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import sparsekern as sk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES]
# A block of Python, and the text block right behind it, which is what it prints.
CODE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", flags=re.S | re.M)


def test_the_table_is_what_the_back_ends_declare():
    rewritten = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["rewritten"]
    assert rewritten(README) == README, "run `make readme`"


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    (first, _), (second, _), (third, _) = CODE.findall(README)
    monkeypatch.chdir(tmp_path)
    names = {}  # the second goes on where the first ends
    exec(compile(first, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("2 of 2 layers swapped") for line in lines)
    ratio, same = lines[-1].split()
    assert float(ratio) > 1
    assert same == "True"

    exec(compile(second, "README.md", "exec"), names)
    assert "1 zvc" in capsys.readouterr().out
    assert names["mlp"][0].weight.grad is not None

    exec(compile(third, "README.md", "exec"), names)
    assert [type(layer).__name__ for layer in names["packed"]] == [
        "SparseLinear",
        "ReLU",
        "SparseLinear",
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if CODE.search((ROOT / p).read_text())])
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sk.nn.choices.forget()
    names = {}  # one block goes on where the last one ends
    with torch.random.fork_rng():
        for code, output in CODE.findall((ROOT / page).read_text()):
            exec(compile(code, page, "exec"), names)
            printed = capsys.readouterr().out
            assert not output or printed == output, code
    sk.nn.choices.forget()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    prose = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", prose):
        assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def test_commands_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    missing = [
        name for name in sk.__all__ if not re.search(rf"sparsekern\.{name}$", reference, flags=re.M)
    ]
    assert not missing


def test_the_table_of_the_products_is_that_of_the_core():
    rows = re.findall(
        r"^\| `(\w+)` \| ([\w, ]+) \| (\w+) \| (\w+) \| (\w+) \|$",
        (ROOT / "docs" / "kernels.md").read_text(),
        flags=re.M,
    )
    said = {(tier, dtype): limits for tier, dtypes, *limits in rows for dtype in dtypes.split(", ")}
    found, names = {}, {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
    for source in (ROOT / "csrc" / "cpu").glob("linear_24_*.cpp"):
        for dtype, numbers in re.findall(
            r"linear_24_kernels<\w+, DType::(\w+), \w+, \w+>\((.*?)\)", source.read_text()
        ):
            key = source.stem.removeprefix("linear_24_"), names[dtype]
            found[key] = numbers.replace("INT64_MAX", "any").split(", ")
    assert said == found
