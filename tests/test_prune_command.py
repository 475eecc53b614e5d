"""`sparsekern prune`: recipes, runs that are stopped and go on, what they write and what they refuse."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern import cli, pruning
from sparsekern.pruning import recipe as recipes
from sparsekern.pruning import training

SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
RECIPE = {
    "seed": 7,
    "stages": [
        {"do": "train", "epochs": 3, "optimizer": SGD, "schedule": {"name": "StepLR", "step_size": 2}},
        {"do": "prune", "pattern": "2:4", "filter": "^(0|3)$"},
        {"do": "retrain", "lr_factor": 0.5},
        {"do": "finalize"},
        {"do": "sparsify"},
    ],
}  # fmt: skip
BATCHES = 5  # of an epoch
RUINOUS = {"name": "StepLR", "step_size": 3, "gamma": 50.0}  # good for three epochs


# ---- a user's module ----


def build():
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 16), nn.Dropout(0.3), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip


class Noisy(Dataset):
    """Points by which of three sums is largest, with noise of numpy's and Python's; stops the process on request."""

    stop = ("", 0)  # how, and at which sample from here on

    def __init__(self, n, noise):
        generator = torch.Generator().manual_seed(n)
        self.x = torch.randn(n, 12, generator=generator)
        self.y = self.x.view(n, 3, 4).sum(2).argmax(1)
        self.noise = noise

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        if self.noise:
            how, left = Noisy.stop
            Noisy.stop = (how, left - 1)
            if how and left == 0:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
        noise = np.random.standard_normal(12).astype(np.float32) * random.random()  # noqa: NPY002
        return self.x[i] + self.noise * torch.from_numpy(noise), self.y[i]


def loaders():
    if "STOP_AT" in os.environ:
        Noisy.stop = ("kill", int(os.environ["STOP_AT"]))
    own = torch.Generator().manual_seed(5)
    train = DataLoader(Noisy(16 * BATCHES, 0.1), 16, shuffle=True, generator=own)
    return train, DataLoader(Noisy(40, 0.0), 40)


def shuffled_by_the_global_generator():
    found = loaders()
    return {"train": DataLoader(found[0].dataset, 16, shuffle=True), "test": found[1]}


def batches():
    """No loaders: lists of batches do as well."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 12, generator=generator)
    y = x.view(4, 8, 3, 4).sum(3).argmax(2)
    found = list(zip(x, y, strict=True))
    return found, found[:2]


def no_model():
    return "a model"


def fails():
    return {}["weights"]


def one_loader():
    return loaders()[0]


def iterators():
    return iter(batches()[0]), batches()[1]


def triples():
    x = torch.zeros(2, 12)
    return [(x, x, x)], [(x, x, x)]


def no_batches():
    return [], []


def infinite_loss(output, target):
    return F.cross_entropy(output, target) * float("inf")


def squares(output, target):
    return (output - F.one_hot(target, 3)).square().mean()


# ---- helpers ----


@pytest.fixture(autouse=True)
def _repeatable(one_thread):
    Noisy.stop = ("", 0)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """They take longer than all the rest."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def pictures():
    """With them after all."""


@pytest.fixture
def here(monkeypatch):
    """So that this module can be named as a factory's."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


def run(recipe, out, data=loaders, **settings):
    return pruning.run_recipe(recipe, build, data, out, **settings)


def same(a: Path, b: Path) -> bool:
    """The weights byte for byte, and every number of the report but times."""
    reports = []
    for folder in (a, b):
        report = json.loads((folder / "report.json").read_text())
        for stage in report["stages"]:
            del stage["seconds"]
        reports.append(report)
    files = ("model.safetensors", "dense.safetensors")
    return reports[0] == reports[1] and all(
        (a / file).read_bytes() == (b / file).read_bytes() for file in files
    )


def command(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["prune", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def write(folder: Path, recipe: dict) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def short(**changed):
    """One epoch, pruning, one epoch."""
    train = {"do": "train", "epochs": 2, "optimizer": SGD} | changed
    return {"stages": [train, {"do": "prune", "pattern": "2:4"}, {"do": "retrain"}]}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """With several, MKL's gradients of weights depend on where in memory they lie."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    run(RECIPE, out)
    return out


# ---- recipes ----


def test_retraining_is_as_training_was_but_for_what_it_replaces():
    stages = recipes.read(RECIPE).stages
    assert stages[2].epochs == 3
    assert stages[2].schedule == stages[0].schedule
    assert stages[2].optimizer.options == {"lr": 0.05, "momentum": 0.9}
    assert stages[0].optimizer.options == {"lr": 0.1, "momentum": 0.9}
    default = {"do": "train", "epochs": 1, "optimizer": {"name": "adamw"}}
    (_, again) = recipes.read({"stages": [default, {"do": "retrain", "lr_factor": 0.1}]}).stages
    assert again.optimizer.name == "AdamW"
    assert again.optimizer.options["lr"] == pytest.approx(1e-4)


def test_iterating_prunes_and_retrains_by_turns_from_the_first_training():
    stages = recipes.read("iterative").stages
    assert [recipes.title(s) for s in stages] == [
        "train", *["prune", "retrain"] * 3, "finalize", "sparsify",
    ]  # fmt: skip
    assert [s.pattern for s in stages[1:6:2]] == ["density=0.5", "density=0.25", "density=0.12"]
    assert {s.optimizer.options["lr"] for s in stages[2:7:2]} == {1e-4}


TOML = """
seed = 7
[[stages]]
do = "train"
epochs = 3
optimizer = {momentum = 0.9, lr = 0.1, name = "sgd"}
schedule = {name = "StepLR", step_size = 2}
[[stages]]
do = "prune"
pattern = "2:4"
filter = "^(0|3)$"
[[stages]]
do = "retrain"
lr_factor = 0.5
[[stages]]
do = "finalize"
[[stages]]
do = "sparsify"
"""


def test_toml_and_json_say_the_same(tmp_path):
    toml = tmp_path / "recipe.toml"
    toml.write_text(TOML)
    forms = [write(tmp_path, RECIPE), RECIPE]
    if sys.version_info >= (3, 11):
        forms.append(toml)
    digests = {recipes.read(form).digest() for form in forms}
    assert len(digests) == 1
    assert recipes.read(RECIPE | {"seed": 8}).digest() not in digests


def test_a_python_without_toml_takes_json(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    (tmp_path / "recipe.toml").write_text(TOML)
    with pytest.raises(
        pruning.RecipeError, match=r"TOML needs Python 3.11; the same tables as .json"
    ):
        recipes.read(tmp_path / "recipe.toml")


def stage(**changed):
    """A training stage with some keys changed, or left out where None."""
    table = {"do": "train", "epochs": 1, "optimizer": SGD} | changed
    return {"stages": [{k: v for k, v in table.items() if v is not None}]}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({}, "the recipe: stages is missing"),
        ({"stages": []}, "stages is empty"),
        ({"stages": [], "epoch": 3}, "unknown key epoch; it takes stages, seed, loss"),
        ({"stages": {}}, "stages is {}; it takes a list"),
        ({"stages": [], "seed": -1}, "seed is -1; it takes 0 to 2147483647"),
        ({"stages": [], "loss": "mse"}, "loss is 'mse'; it takes cross_entropy or package.module:function"),
        ({"stages": ["train"]}, "stage 1: it is 'train'; it takes do = one of train, prune, retrain"),
        ({"stages": [{"do": "permute"}]}, "stage 1: do is 'permute'; it takes do = one of train, prune"),
        (stage(epoch=3), "stage 1 (train): unknown key epoch; it takes do, epochs, optimizer, schedule, keep"),
        (stage(epochs=None), "stage 1 (train): epochs is missing"),
        (stage(epochs=1.5), "epochs is 1.5; it takes a whole number"),
        (stage(epochs=True), "epochs is True; it takes a whole number"),
        (stage(epochs=-1), "epochs is -1; it takes 0 or more"),
        (stage(keep="worst"), "keep is 'worst'; it takes last or best"),
        (stage(optimizer="SGD"), "optimizer is 'SGD'; it takes a table"),
        (stage(optimizer={"name": "LBFGS"}), "optimizer: name is 'LBFGS'; it takes one of"),
        (stage(optimizer=SGD | {"beta": 1}), "SGD has no option beta; it takes lr, momentum"),
        (stage(optimizer=SGD | {"lr": -1.0}), "optimizer SGD: Invalid learning rate: -1.0"),
        (stage(optimizer=SGD | {"lr": "fast"}), "optimizer SGD:"),
        (stage(schedule={"name": "LambdaLR"}), "schedule: name is 'LambdaLR'; it takes one of ConstantLR"),
        (stage(schedule={"name": "StepLR"}), "schedule StepLR:"),
        (stage(schedule={"name": "StepLR", "step_size": 1, "each": "day"}), "each is 'day'; it takes epoch or step"),
        (stage(schedule={"name": "ReduceLROnPlateau", "each": "step"}), "steps each epoch, on test loss"),
        (stage(schedule=True), "schedule is true"),
        ({"stages": [{"do": "prune"}]}, "stage 1 (prune): pattern is missing"),
        ({"stages": [{"do": "prune", "pattern": "5:4"}]}, "stage 1 (prune): pattern N:M takes 1 <= N < M"),
        ({"stages": [{"do": "prune", "pattern": {"fc": "half"}}]}, "pattern is 'half'"),
        ({"stages": [{"do": "prune", "pattern": {"fc": 2}}]}, "pattern is 2; it takes a string"),
        ({"stages": [{"do": "prune", "pattern": "2:4", "filter": "("}]}, "is no regular expression"),
        ({"stages": [{"do": "retrain"}]}, "epochs, optimizer is missing, and no train stage comes before"),
        ({"stages": [*stage()["stages"], {"do": "retrain", "lr_factor": 0}]}, "lr_factor is 0; it takes"),
        ({"stages": [*stage()["stages"], {"do": "iterate", "patterns": []}]}, "patterns is empty"),
        ({"stages": [{"do": "finalize"}, *stage()["stages"]]}, "train cannot come after finalize"),
        ({"stages": [{"do": "sparsify"}, {"do": "finalize"}]}, "finalize cannot come after sparsify"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_named(tmp_path, recipe, words):
    result = command(write(tmp_path, recipe), "--plan", code=2)
    (line,) = result.stderr.strip().splitlines()
    assert words in line
    assert "recipe.json" in line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.toml", None, "none.toml: No such file"),
        ("recipe.yaml", "", "is no recipe; it takes 2:4, iterative, or a .toml or .json file"),
        ("recipe.json", "{", "recipe.json: Expecting property name"),
        ("recipe.json", "[]", "holds a list; it takes a table"),
        ("recipe.json", b"\xff\xfe", "recipe.json:"),
    ],
)
def test_what_is_no_recipe_is_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in command(tmp_path / name, "--plan", code=2).stderr


# ---- a run ----


def test_a_run_trains_prunes_retrains_and_packs(here, pictures, tmp_path):
    recipe, out = write(tmp_path, RECIPE), tmp_path / "new" / "out"
    flags = ["--model", "test_prune_command:build", "--data", "test_prune_command:loaders"]
    result = command(recipe, *flags, "--out", out)
    assert "retrain" in result.output
    assert "2 of 3 layers are 2:4 and compute packed here" in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["model"] == "test_prune_command:build"
    assert report["recipe"]["seed"] == 7
    done = " ".join(s["do"] for s in report["stages"])
    assert done == "start train prune retrain finalize sparsify"
    assert len(report["history"]) == 6
    assert [e["lr"] for e in report["history"]] == pytest.approx(
        [0.1, 0.1, 0.01, 0.05, 0.05, 0.005]
    )
    density = [s["density"] for s in report["stages"]]
    assert density[1] == 1.0
    assert density[2] == density[3] == (0.5 * (12 * 32 + 32 * 16) + 48) / (12 * 32 + 32 * 16 + 48)
    assert report["stages"][3]["test"]["loss"] < report["stages"][0]["test"]["loss"]
    assert report["stages"][5]["test"]["loss"] == pytest.approx(
        report["stages"][3]["test"]["loss"], rel=1e-5
    )
    assert [layer["pattern"] for layer in report["verification"]["layers"]] == ["2:4", "2:4", "dense"]  # fmt: skip
    assert 0.4 < report["verification"]["layers"][0]["kept"] < 1
    for picture in ("curves.png", "layers.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    # The file loads into the network packed, and answers as the report says.
    model = build()
    sk.sparsify_(model, lambda layer, name: name in ("0", "3"))
    model.load_state_dict(load_file(out / "model.safetensors"))
    x = loaders()[1].dataset
    wrong = (model.eval()(x.x).argmax(1) != x.y).float().mean()
    assert wrong == pytest.approx(report["stages"][-1]["test"]["error"])
    assert not (load_file(out / "dense.safetensors")["0.weight"] == 0).any()


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(whole, tmp_path):
    run(RECIPE, tmp_path / "again")
    assert same(whole, tmp_path / "again")
    run(RECIPE | {"seed": 8}, tmp_path / "other")
    assert (whole / "model.safetensors").read_bytes() != (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()


def test_without_finalize_the_file_has_plain_keys_and_zeros(tmp_path):
    run(short(), tmp_path, batches, keep_dense=False)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == build().state_dict().keys()
    assert sk.is_24(state["0.weight"])
    assert not (tmp_path / "dense.safetensors").exists()


def test_a_loss_of_ones_own_has_no_error_where_there_are_no_classes(here, tmp_path):
    def regression():
        x = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(0))
        found = list(zip(x, x[..., :3], strict=True))
        return found, found

    recipe = short() | {"loss": "test_prune_command:squares"}
    assert run(recipe, tmp_path / "classes", batches).stages[-1].test.error is not None
    result = run(short(), tmp_path / "none", regression, loss=F.mse_loss)
    assert result.stages[-1].test.error is None
    assert result.stages[-1].test.loss < result.stages[0].test.loss


def test_the_best_epoch_is_kept_where_the_recipe_says_so(tmp_path):
    result = run(short(epochs=4, schedule=RUINOUS, keep="best"), tmp_path, batches)
    for index, row in ((0, 1), (2, 3)):
        scores = [e.test for e in result.history if e.stage == index]
        assert result.stages[row].test == min(scores)
        assert min(scores) != scores[-1]  # else this shows nothing
    again = training.evaluate(result.model, batches()[1], F.cross_entropy, torch.device("cpu"))
    assert again == result.stages[-1].test


def test_pruning_alone_takes_a_trained_network(tmp_path):
    alone = {"stages": [{"do": "prune", "pattern": {"0": "1:4", "3": "density=0.1"}}]}
    result = run(alone, tmp_path, batches)
    patterns = [layer.pattern for layer in result.verification.layers]
    assert patterns[0] == "1:4"
    assert result.verification.layers[1].density == pytest.approx(0.1, abs=0.001)
    assert patterns[2] == "dense"


# ---- stopped, and gone on ----


@pytest.mark.parametrize("at", [0, 3, 16 * BATCHES, 16 * BATCHES * 3 + 5, 16 * BATCHES * 5 + 40])
def test_a_run_stopped_by_the_keyboard_goes_on_bit_for_bit(whole, tmp_path, at):
    Noisy.stop = ("keyboard", at)
    with pytest.raises(pruning.Interrupted, match=r"the same command") as stopped:
        run(RECIPE, tmp_path)
    assert "last.safetensors" in str(stopped.value)
    last = load_file(tmp_path / "last.safetensors")
    assert last.keys() == build().state_dict().keys()
    pruned = at >= 16 * BATCHES * 3
    assert sk.is_24(last["0.weight"]) is pruned
    Noisy.stop = ("", 0)
    run(RECIPE, tmp_path)
    assert same(whole, tmp_path)


def test_a_stopped_run_leaves_its_best_weights(tmp_path):
    recipe = short(epochs=5, schedule=RUINOUS)
    Noisy.stop = ("keyboard", 16 * BATCHES * 9 + 3)
    with pytest.raises(pruning.Interrupted, match=r"best.safetensors"):
        run(recipe, tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    scores = [e["test"] for e in checkpoint["history"] if e["stage"] == 2]
    best = min(scores, key=lambda s: (s["error"], s["loss"]))
    assert best != scores[-1]  # else this shows nothing
    model = build()
    model.load_state_dict(load_file(tmp_path / "best.safetensors"))
    score = training.evaluate(model.eval(), loaders()[1], F.cross_entropy, torch.device("cpu"))
    assert vars(score) == best
    assert sk.is_24(model[0].weight.detach())


def test_ctrl_c_at_the_command_says_how_to_go_on(here, tmp_path):
    flags = [
        "--model",
        "test_prune_command:build",
        "--data",
        "test_prune_command:loaders",
        "--out",
        tmp_path,
    ]
    Noisy.stop = ("keyboard", 16 * BATCHES + 1)
    assert sys.modules["test_prune_command"].Noisy is Noisy
    result = command(write(tmp_path, RECIPE), *flags, code=130)
    assert "the same command goes on from" in result.output
    result = command(write(tmp_path, RECIPE), *flags)
    assert "going on from" in result.output
    assert "0 of 5 stages done, epoch 1" in result.output


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    outs = [tmp_path / "whole", tmp_path / "killed"]
    recipe = write(tmp_path, short(epochs=3))
    arguments = [
        sys.executable,
        "-m",
        "sparsekern",
        "prune",
        str(recipe),
        "--device",
        "cpu",
        "--no-dense",
    ]
    arguments += [
        "--model",
        "test_prune_command:build",
        "--data",
        "test_prune_command:loaders",
        "--out",
    ]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(sk.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    stop = {"STOP_AT": str(16 * BATCHES * 4 + 17)}
    killed = subprocess.run(
        [*arguments, str(outs[1])], env=environment | stop, capture_output=True, timeout=200
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (outs[1] / "model.safetensors").exists()
    for out, words in zip(outs, ("", "going on from"), strict=True):
        named = ["--model", "test_prune_command:build", "--data", "test_prune_command:loaders"]
        sys.path.insert(0, str(Path(__file__).parent))
        result = command(recipe, "--device", "cpu", "--no-dense", *named, "--out", out)
        sys.path.pop(0)
        assert words in result.output
    assert (outs[0] / "model.safetensors").read_bytes() == (
        outs[1] / "model.safetensors"
    ).read_bytes()


SCHEDULES = {
    "ConstantLR": {},
    "CosineAnnealingLR": {},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "ExponentialLR": {"gamma": 0.7},
    "LinearLR": {"start_factor": 0.2, "total_iters": 3},
    "MultiStepLR": {"milestones": [1, 3]},
    "OneCycleLR": {"max_lr": 0.2, "each": "step"},
    "PolynomialLR": {"each": "step"},
    "ReduceLROnPlateau": {"patience": 0},
    "StepLR": {"step_size": 1, "gamma": 0.5},
}


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(name, "StepLR") for name in recipes.OPTIMIZERS if name != "Muon"] + [("SGD", name) for name in recipes.SCHEDULES],
)  # fmt: skip
def test_every_optimizer_and_schedule_goes_on_bit_for_bit(tmp_path, optimizer, schedule):
    recipe = short(
        epochs=3, optimizer={"name": optimizer}, schedule={"name": schedule} | SCHEDULES[schedule]
    )
    recipe["stages"].pop()
    recipe["stages"].reverse()  # masks are held from the start
    data = shuffled_by_the_global_generator
    run(recipe, tmp_path / "whole", data)
    Noisy.stop = ("keyboard", 16 * BATCHES * 2 + 9)
    with pytest.raises(pruning.Interrupted):
        run(recipe, tmp_path / "stopped", data)
    Noisy.stop = ("", 0)
    run(recipe, tmp_path / "stopped", data)
    assert same(tmp_path / "whole", tmp_path / "stopped")


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(whole, tmp_path, monkeypatch):
    save, calls = torch.save, iter(range(10))

    def broken(state, path):
        if next(calls) == 2:
            Path(path).write_bytes(b"half of a checkp")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(pruning.Interrupted):
        run(RECIPE, tmp_path)
    monkeypatch.undo()
    run(RECIPE, tmp_path)
    assert same(whole, tmp_path)


def test_a_finished_run_is_reported_again(whole):
    before = (whole / "model.safetensors").read_bytes()
    Noisy.stop = ("keyboard", 0)  # nothing is trained
    run(RECIPE, whole)
    assert (whole / "model.safetensors").read_bytes() == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_checkpoints_that_do_not_fit_are_refused_and_restart_begins_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    run(short(), out, batches)
    file = out / "checkpoint.pt"
    good = torch.load(file, weights_only=True)

    def refused(words, recipe=None, data=batches):
        with pytest.raises(pruning.TrainingError, match=words) as error:
            run(recipe or short(), out, data)
        assert "--restart" in str(error.value)

    refused("holds a run of another recipe, model or data", recipe=short(epochs=3))
    refused("holds a run of another recipe, model or data", data=loaders)
    wrong_state = good["model"] | {"9.weight": torch.zeros(3)}
    wrong_mask = {k: v.float() if k.endswith("mask") else v for k, v in good["model"].items()}
    nowhere = good["model"] | {"9.parametrizations.weight.0.mask": torch.ones(1, dtype=torch.bool)}
    for changed, words in (
        ({"format": 0}, "is no checkpoint of this version"),
        ({"stage": 9}, "does not fit: ValueError: stage is 9 of 3"),
        ({"stage": 2, "epoch": 2}, "does not fit: ValueError: epoch is 2 in stage 2"),
        ({"epoch": 1}, "does not fit: IndexError"),
        ({"model": wrong_state}, "does not fit"),
        ({"model": wrong_mask}, r"hold: mask must be torch.bool"),
        ({"model": nowhere}, "does not fit"),
        ({"generators": {}}, "does not fit: KeyError"),
    ):
        torch.save(good | changed, file)
        refused(words)
    torch.save(good | {"model": Evil()}, file)
    refused("cannot be read")
    assert not (tmp_path / "executed").exists()
    file.write_bytes(b"")
    refused("cannot be read")
    assert run(short(), out, batches, restart=True).history


# ---- what else is refused ----


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("nets", "loaders", "'nets' is no factory; it takes package.module:function"),
        ("nosuchmodule:build", "loaders", "cannot import nosuchmodule:build"),
        (":nothing", "loaders", "has no attribute 'nothing'"),
        (":BATCHES", "loaders", "is a int; it takes a function"),
        (":no_model", "loaders", "no_model() returned str; it takes an nn.Module"),
        (":fails", "loaders", "fails() raised KeyError: 'weights' (test_prune_command.py, line"),
        (":build", ":fails", "fails() raised KeyError: 'weights'"),
        (":build", ":one_loader", "the data is a DataLoader whose train is a NoneType"),
        (":build", ":iterators", "the train data is an iterator, which ends after one epoch"),
        (
            ":build",
            ":triples",
            "the data gave a tuple of 3 as batch; it takes pairs (input, target)",
        ),
        (":build", ":no_batches", "the test data has no batches"),
    ],
)
def test_bad_functions_are_named(here, tmp_path, model, data, words):
    names = [
        ("test_prune_command" if name.startswith(":") else "") + name for name in (model, data)
    ]
    flags = ["--model", names[0], "--data", names[1], "--out", tmp_path / "out"]
    line = command(write(tmp_path, short()), *flags, code=2).stderr
    assert words in " ".join(line.split())


def test_options_that_are_missing_are_named():
    words = "--data and --out is missing; --plan does without"
    assert words in command("2:4", "--model", "a:b", code=2).stderr


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(pruning.TrainingError, match=r"file cannot be made"):
        run(short(), tmp_path / "file")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    words = r"the loss is inf in stage 1 \(train\), epoch 1/2, batch 1"
    with pytest.raises(pruning.TrainingError, match=words):
        run(short(), tmp_path, batches, loss=infinite_loss)


def test_pruning_that_does_nothing_is_an_error(tmp_path):
    nothing = {"stages": [{"do": "prune", "pattern": "2:4", "filter": "^fc"}]}
    words = r"stage 1 \(prune\): no layer can be pruned: 0: filter_fn said no"
    with pytest.raises(pruning.TrainingError, match=words):
        run(nothing, tmp_path, batches)
    unknown = {"stages": [{"do": "prune", "pattern": {"fc": "2:4"}}]}
    with pytest.raises(pruning.TrainingError, match=r"names fc; the model has 0, 3, 6"):
        run(unknown, tmp_path, batches)


def test_an_optimizer_that_does_not_take_the_parameters_is_named(tmp_path):
    with pytest.raises(pruning.TrainingError, match=r"stage 1 \(train\): .*2D"):
        run(short(optimizer={"name": "Muon"}), tmp_path, batches)


# ---- the plan ----


def test_the_plan_says_what_would_be_done_and_writes_nothing(here, tmp_path):
    flags = ["--model", "test_prune_command:build", "--data", "test_prune_command:loaders"]
    out = tmp_path / "out"
    output = command(write(tmp_path, RECIPE), *flags, "--plan", "--out", out).output
    assert (
        "3. retrain: 3 epochs of SGD(lr=0.05, momentum=0.9), StepLR(step_size=2) each epoch"
        in output
    )
    assert "6 epochs in all, seed 7" in output
    assert "5 batches to train on, 1 to test; the first of these: loss 1." in output
    assert "dense: filter_fn said no" in output
    assert not out.exists()
    assert "48 epochs in all, seed 3" in command("iterative", "--plan", "--seed", 3).output


def test_progress_shows_loss_and_error(tmp_path):
    console = Console(record=True, force_terminal=True, width=160, file=io.StringIO())
    run(short(), tmp_path, batches, console=console)
    text = console.export_text()
    assert "retrain" in text
    assert "error" in text
