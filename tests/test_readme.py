"""The words in README.md hold: its table, its example, its links."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def test_the_table_is_what_the_back_ends_declare():
    rewritten = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["rewritten"]
    assert rewritten(README) == README, "run `make readme`"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    first, second = re.findall(r"```python\n(.*?)```", README, flags=re.S)
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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    prose = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), f"{name} links to {target}"


def test_commands_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(
        re.findall(r"\bmake ([a-z]+)\b", README + (ROOT / "CONTRIBUTING.md").read_text())
    ):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
