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


def install(tmp_path: Path, *options: str, **env: str) -> Path:
    """Copy the sources that git tracks and pip-install them into a folder of their own."""
    source, target = tmp_path / "source", tmp_path / "target"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--target",
        str(target),
        *options,
        str(source),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, env=os.environ | {"PATH": path} | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return target


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
def test_an_isolated_install_builds_the_core_without_torch(tmp_path):
    target = install(tmp_path)
    assert list((target / "sparsekern").glob("_cpu*.so"))
    assert not (target / "tests").exists()
    assert not (target / "benchmarks").exists()
    done = probe(target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds_and_the_reference_serves(tmp_path):
    target = install(tmp_path, "--no-build-isolation", CXX=str(tmp_path / "no-such-compiler"))
    assert not list((target / "sparsekern").glob("_cpu*"))
    done = probe(target)
    assert done.returncode == 0, done.stderr
    assert "installed without its compiled core" in done.stdout
    assert "a slower back end serves" in done.stderr  # said, once per op, not silent
    assert done.stderr.count("unpack_zvc:") == 1


@pytest.mark.slow
def test_a_core_that_does_not_compile_is_an_error(tmp_path):
    source = tmp_path / "broken"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    (source / "csrc" / "cpu" / "dispatch.cpp").write_text("this is not C++")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            str(tmp_path / "target"),
            str(source),
        ],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "dispatch.cpp" in done.stdout + done.stderr
