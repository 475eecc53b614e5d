"""verify(): the pattern that a layer really has, its numbers, and `sparsekern verify`."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern import cli, pruning
from sparsekern.pruning import verify


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def broken():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model


def only(model, **settings):
    """What verify finds of a model of one layer."""
    (layer,) = verify(nn.Sequential(model), **settings).layers
    return layer


@pytest.fixture
def here(monkeypatch):
    """So that this module can be named as a factory's."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


def command(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["verify", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


# ---- patterns ----


@pytest.mark.parametrize("shape", [(16, 32), (16, 32, 3, 3)])
@pytest.mark.parametrize(
    "pattern", ["1:4", "2:8", "2:4", "4:8", "2:4-transposable", "density=0.6", "density=1"]
)
def test_the_pattern_that_was_pruned_is_found(shape, pattern):
    torch.manual_seed(1)
    layer = nn.Linear(32, 16) if len(shape) == 2 else nn.Conv2d(32, 16, 3)
    model = nn.Sequential(layer)
    pruning.prune(model, pattern)
    named = {"density=0.6": "unstructured", "density=1": "dense"}.get(pattern, pattern)
    for held in (True, False):
        found = verify(model).layers[0]
        assert found.pattern == named
        assert found.held is held
        pruning.finalize(model)
    assert found.shape == shape


@pytest.mark.parametrize(
    ("row", "pattern"),
    [
        ([1, 0, 0, 0, 1, 0, 0, 0], "1:4"),
        ([1, 0, 0, 0, 0, 0, 1, 0], "1:4"),
        ([1, 1, 0, 0, 0, 0, 0, 0], "2:8"),
        ([1, 1, 0, 0, 0, 1, 0, 0], "2:4"),
        ([1, 1, 0, 0, 1, 1, 0, 0], "2:4"),
        ([1, 1, 1, 0, 1, 0, 0, 0], "4:8"),
        ([1, 1, 1, 0, 1, 1, 0, 0], "unstructured"),
        ([1, 1, 0, 1, 1, 0], "4:8"),  # a last group is filled up
        ([1, 1, 0, 0, 1, 1], "2:4"),
        ([1] * 8, "dense"),
    ],
)
def test_the_strictest_pattern_by_hand(row, pattern):
    layer = nn.Linear(len(row), 3)
    layer.weight = nn.Parameter(torch.tensor([row] * 3).float())
    found = only(layer)
    assert found.pattern == pattern
    assert found.density == sum(row) / len(row)


def test_both_ways_takes_groups_both_ways():
    layer = nn.Linear(8, 2)
    layer.weight = nn.Parameter(sk.prune_24(torch.ones(2, 8)))
    assert only(layer).pattern == "2:4"  # a column has two rows, and no group


def test_a_few_zeros_make_no_pattern():
    layer = nn.Linear(100, 100)
    with torch.no_grad():
        layer.weight[0, :99] = 0
    assert only(layer).pattern == "dense"
    with torch.no_grad():
        layer.weight[1, :2] = 0
    assert only(layer).pattern == "unstructured"


def test_the_first_group_at_fault_is_named_in_the_shape_of_the_weight():
    linear = nn.Linear(18, 8)
    conv = nn.Conv2d(8, 4, (2, 3))
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[5, 12:16] = torch.tensor([1.0, 0, 2, 3])
        linear.weight[6] = 1
        conv.weight.zero_()
        conv.weight[2, 4:8, 1, 0] = 1
    assert only(linear).why == "row 5, group 3 (columns 12 to 15) has 3 non-zeros"
    words = "output 2, kernel (1, 0), group 1 (input channels 4 to 7) has 4 non-zeros"
    assert only(conv).why == words


# ---- what packs ----


class Layers(nn.Module):
    """All that makes sparsify leave a 2:4 layer dense."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.odd = nn.Linear(18, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.embedding = nn.Embedding(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.embedding.weight
        self.conv = nn.Conv1d(16, 16, 3)
        self.dense = nn.Linear(16, 16)
        self.bf16 = nn.Linear(16, 16).to(torch.bfloat16)


def pruned_layers():
    torch.manual_seed(0)
    model = Layers()
    with torch.no_grad():
        for module in (model.plain, model.attention.out_proj, model.tied, model.bf16):
            module.weight.copy_(sk.prune_24(module.weight))
        model.odd.weight[:, 2:] = 0
    pruning.prune(model, {"conv": "2:4"})
    return model


def test_it_packs_what_sparsify_packs_and_says_why_not_else():
    model = pruned_layers()
    before = copy.deepcopy(model.state_dict())
    found = {layer.name: layer for layer in verify(model).layers}
    packed, _ = pruning.sparsify(model)
    is_packed = {n for n, m in packed.named_modules() if isinstance(m, sk.SparseLinear)}
    assert {name for name, layer in found.items() if layer.packs} == is_packed
    assert is_packed == {"plain", "odd", "bf16"}
    assert found["attention.out_proj"].why == "nn.MultiheadAttention reads its weight directly"
    assert found["tied"].why == "its weight is shared with another module"
    assert found["conv"].why == "2:4, but convolutions compute dense here"
    assert found["dense"].why.startswith("row 0, group 0")
    # Nothing was changed, nothing is held that was not.
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert type(model.plain) is nn.Linear


def test_bytes_are_those_of_the_packed_layer():
    model = pruned_layers()
    found = verify(model)
    packed, _ = pruning.sparsify(model)
    for layer in found.layers:
        if layer.packs:
            module = packed.get_submodule(layer.name)
            assert layer.bytes_packed == module.values.nbytes + module.meta.nbytes
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["plain"].bytes_packed / by_name["plain"].bytes_dense == 17 / 32
    assert by_name["bf16"].bytes_packed / by_name["bf16"].bytes_dense == 9 / 16
    saved = sum(layer.bytes_dense - layer.bytes_packed for layer in found.layers if layer.packs)
    assert found.bytes_dense - found.bytes_here == saved


def test_a_packed_model_and_files_are_verified_alike():
    model = net()
    dense = copy.deepcopy(model.state_dict())
    pruning.prune(model)
    packed, _ = pruning.sparsify(model)
    packed[0].prepack()
    want = [(x.name, x.pattern, x.density, x.kept) for x in verify(model, dense).layers]
    assert [x[1] for x in want] == ["2:4", "2:4"]
    for form in (
        packed,
        model.state_dict(),
        packed.state_dict(),
        pruning.finalize(model).state_dict(),
    ):
        found = verify(form, dense)
        assert [(x.name, x.pattern, x.density, x.kept) for x in found.layers] == want
        assert found.ok
        assert found.bytes_here < found.bytes_dense
    assert [x.packed for x in verify(packed).layers] == [True, True]


# ---- against a reference ----


def test_kept_is_the_share_of_the_references_magnitude():
    dense = nn.Sequential(nn.Linear(4, 1))
    dense[0].weight.data = torch.tensor([[1.0, -2, 3, 4]])
    model = copy.deepcopy(dense)
    model[0].weight.data = torch.tensor([[0.0, 0, 9, -1]])  # retrained since
    for reference in (dense, dense.state_dict()):
        assert verify(model, reference).layers[0].kept == 0.7
    assert verify(model).layers[0].kept is None
    more = nn.Sequential(copy.deepcopy(model[0]), nn.Linear(1, 1))
    assert [layer.kept for layer in verify(more, dense).layers] == [0.7, None]


def test_a_reference_of_another_model_is_refused():
    with pytest.raises(
        ValueError, match=r"verify: reference has none of the layers 0, 2; it has fc"
    ):
        verify(net(), nn.ModuleDict({"fc": nn.Linear(2, 2)}))
    with pytest.raises(
        ValueError, match=r"reference has 0 of shape \(3, 2\), the model \(32, 16\)"
    ):
        verify(net(), nn.Sequential(nn.Linear(2, 3)))


# ---- what cannot be right ----


class AddOne(nn.Module):
    def forward(self, weight):
        return weight + 1


def test_a_mask_that_does_not_hold_is_a_problem():
    model = net()
    pruning.prune(model)
    assert verify(model).ok
    nn.utils.parametrize.register_parametrization(model[0], "weight", AddOne())
    found = verify(model)
    assert not found.ok
    assert found.layers[0].problems == ["256 weights that the mask drops are not zero"]
    assert found.layers[1].problems == []
    assert "PROBLEM" in str(found)


def test_masks_of_a_wrong_kind_are_a_problem():
    model = net()
    pruning.prune(model)
    pruning.mask_of(model[2]).mask = torch.ones(1, 32, dtype=torch.bool)
    assert verify(model).layers[1].problems == [
        "the mask is torch.bool of shape (1, 32), not torch.bool of the weight's"
    ]


def test_weights_that_are_not_finite_are_a_problem():
    model = broken()
    model[0].weight.data[1, :2] = float("inf")
    assert verify(model).layers[0].problems == ["3 weights are infinite or NaN"]


def test_packed_positions_that_are_illegal_are_a_problem():
    model = net()
    sk.sparsify_(model)
    model[2].meta[3, 1] = 0
    (problem,) = verify(model).layers[1].problems
    assert "meta row 3, group 2 is the nibble 0" in problem


def test_a_layer_without_a_weight_is_refused():
    with pytest.raises(ValueError, match=r"verify: layer 0 is not initialised yet"):
        verify(nn.Sequential(nn.LazyLinear(4)))


# ---- speed, permutation, the forms of the report ----


def test_speed_is_measured_on_request_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    pruning.prune(model, {"0": "2:4", "1": "2:4"})
    assert [layer.speeds for layer in verify(model).layers] == [[], [], []]
    found = verify(model, measure=True, tokens=(1, 5))
    assert [[s.M for s in layer.speeds] for layer in found.layers] == [[1, 5], [1, 5], []]
    speed = found.layers[0].speeds[1]
    assert speed.ratio == speed.dense / speed.prepacked > 0
    assert found.layers[0].speeds is found.layers[1].speeds  # the same shape once
    assert "M=5" in str(found)
    assert "M=5" not in str(verify(model))


def test_the_report_as_table_json_and_picture(tmp_path):
    model = net()
    dense = copy.deepcopy(model)
    pruning.prune(model, {"0": "2:4", "2": "density=0.3"})
    curves = {"0": [(1.0, 0.98), (0.5, 0.97)], "2": [(0.3, 0.9), (1.0, 0.98)]}
    found = verify(model, dense, permutation={"0": (0.75, 0.8)}, sensitivity=curves)
    text = str(found)
    for words in (
        "2:4, held",
        "+5.0 points",
        "unstructured, held",
        "1 of 2 layers are 2:4",
        "2: row ",
    ):
        assert words in text
    loaded = json.loads(found.to_json())
    assert loaded["layers"][0]["permutation"] == [0.75, 0.8]
    assert loaded["sensitivity"]["0"] == [[1.0, 0.98], [0.5, 0.97]]
    assert loaded["density"] == pytest.approx((256 + 77) / 768)
    found.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    figure = found.draw()
    assert len(figure.axes) == 5  # two by layer, and the curves
    assert [line.get_label() for line in figure.axes[4].lines] == ["0", "2"]
    for picture, weight in zip(found._pictures, (model[0].weight, model[2].weight), strict=True):
        assert picture.after.sum() == weight.count_nonzero()
        assert picture.before.sum() == weight.numel()
    assert torch.equal(found._pictures[0].bands, (model[0].weight[:24] != 0).float())


def test_a_picture_without_matplotlib_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsekern\[prune\]'"):
        verify(net()).draw()


# ---- the command ----


def test_the_command_takes_functions_and_files(here, tmp_path):
    model = net()
    pruning.prune(model, {"0": "2:4"})
    pruning.finalize(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(net().state_dict(), tmp_path / "dense.pt")
    flags = [
        "--reference",
        tmp_path / "dense.pt",
        "--plot",
        tmp_path / "p.png",
        "-m",
        "1,2",
        "--measure",
    ]
    output = command(tmp_path / "model.safetensors", *flags).output
    assert "2:4" in output
    assert "1 of 2 layers are 2:4" in output
    assert "M=2" in output
    assert (tmp_path / "p.png").exists()
    found = json.loads(command("test_pruning_verify:net", "--json").stdout)
    assert [layer["pattern"] for layer in found["layers"]] == ["dense", "dense"]
    assert found["layers"][0]["kind"] == "Linear"


def test_the_command_fails_where_something_cannot_be_right(here):
    result = command("test_pruning_verify:broken", code=1)
    assert "0: PROBLEM: 1 weights are infinite or NaN" in result.output


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_bad_input_is_named(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "empty.safetensors").touch()
    torch.save([1], tmp_path / "list.pt")
    torch.save({"0.weight": Evil()}, tmp_path / "evil.pt")
    for arguments, words in (
        (("nothing",), "nothing: no such file; it takes one, or package.module:function"),
        (("nosuchmodule:net",), "cannot import nosuchmodule:net"),
        (("test_pruning_verify:command",), "command() raised"),
        (("test_pruning_verify:Evil",), "Evil() returned Evil; it takes an nn.Module"),
        (("empty.pt",), "empty.pt cannot be read"),
        (("empty.safetensors",), "empty.safetensors cannot be read"),
        (("evil.pt",), "evil.pt cannot be read"),
        (("list.pt",), "list.pt holds a list; it takes a state_dict"),
        (("test_pruning_verify:net", "-m", "1,x"), "--tokens is 1,x; it takes whole numbers"),
        (("test_pruning_verify:net", "-m", "0"), "--tokens is 0; it takes whole numbers"),
        (("test_pruning_verify:net", "--plot", "no/such/folder.png"), "No such file"),
    ):
        result = command(*arguments, code=2)
        (line,) = result.stderr.strip().splitlines()
        assert words in line
    assert not (tmp_path / "executed").exists()
