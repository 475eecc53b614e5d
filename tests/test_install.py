"""The package installs as documented: isolated, without torch at build time, and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
# an editable install of this project in the same environment would supply what is missing here
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import torch, sparsekern
from sparsekern import backends
assert sparsekern.__file__.startswith(sys.argv[1]), sparsekern.__file__
x = torch.relu(torch.randn(3, 8))
layer = sparsekern.SparseLinear(8, 4)
torch.testing.assert_close(layer(x), layer.to_linear()(x))
assert torch.equal(sparsekern.pack_zvc(x).unpack(), x)
print(backends.load("cpu").unavailable(torch.device("cpu")))
"""


def sources(tmp_path: Path) -> Path:
    """A copy of what git tracks, as it is in the work tree."""
    copy = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def install(source: Path, target: Path, *options: str, **env: str) -> None:
    """pip-install into a folder of its own."""
    done = pip_install(source, target, *options, **env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def pip_install(source: Path, target: Path, *options: str, **env: str):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*command, *options, str(source)],
        env=os.environ | {"PATH": path} | env,
        capture_output=True,
        text=True,
    )


def probe(target: Path) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPARSEKERN_")}
    return subprocess.run(
        [sys.executable, "-c", PROBE, str(target)],
        env=env,
        cwd=target,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_an_isolated_install_builds_the_core_without_torch_and_can_be_repeated(tmp_path):
    source, target = sources(tmp_path), tmp_path / "target"
    install(source, tmp_path / "first")
    install(source, target)  # what the first build left behind must not be in the way
    assert list((target / "sparsekern").glob("_cpu*.so"))
    assert not (target / "tests").exists()
    assert not (target / "benchmarks").exists()
    done = probe(target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"


@pytest.mark.slow
def test_a_source_distribution_installs(tmp_path):
    source, target = sources(tmp_path), tmp_path / "target"
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = (source / "dist").glob("*.tar.gz")
    install(archive, target, "--no-build-isolation")
    assert list((target / "sparsekern").glob("_cpu*.so"))


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds_and_the_reference_serves(tmp_path):
    target = tmp_path / "target"
    missing = str(tmp_path / "no-such-compiler")
    install(sources(tmp_path), target, "--no-build-isolation", CXX=missing)
    assert not list((target / "sparsekern").glob("_cpu*"))
    done = probe(target)
    assert done.returncode == 0, done.stderr
    assert "installed without its compiled core" in done.stdout
    assert "a slower back end serves" in done.stderr  # said, once per op, not silent
    assert done.stderr.count("unpack_zvc:") == 1


@pytest.mark.slow
def test_a_core_that_does_not_compile_is_an_error(tmp_path):
    source = sources(tmp_path)
    (source / "csrc" / "cpu" / "dispatch.cpp").write_text("this is not C++")
    done = pip_install(source, tmp_path / "target", "--no-build-isolation")
    assert done.returncode != 0
    assert "dispatch.cpp" in done.stdout + done.stderr
