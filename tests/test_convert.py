"""convert(): every format to every other, files that lie, and what an interrupted run leaves."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from test_interop import random_packed, same, sparse_weight
from torch import nn
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern import interop
from sparsekern.cli import app
from sparsekern.interop import container
from sparsekern.interop.checkpoint import IN_FEATURES, INDEX
from sparsekern.interop.container import Reader, Spec, Writer

runner = CliRunner()


def everything(name: str) -> bool:
    return True


def load(path) -> dict:
    """Through the library of the format, one tensor at a time."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


# ---- the container ----

EVERY_DTYPE = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.uint16,
    torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.float64, torch.int64, torch.uint64,
    torch.complex64,
]  # fmt: skip


def of_every_dtype() -> dict:
    shapes = [(3,), (), (0, 4), (2, 1, 3)]
    content = torch.arange(48, dtype=torch.uint8) % 2
    return {
        f"{dtype}-{i}".replace("torch.", ""): content[: dtype.itemsize * torch.Size(shape).numel()]
        .clone()
        .view(dtype)
        .reshape(shape)
        for dtype in EVERY_DTYPE
        for i, shape in enumerate(shapes)
    }


def test_the_container_by_hand(tmp_path):
    path = tmp_path / "x.safetensors"
    with Writer(path, {"a": Spec("U8", (3,)), "b": Spec("F16", (1, 2))}, {"k": "é"}) as writer:
        writer.write("a", torch.tensor([1, 2, 3], dtype=torch.uint8))
        writer.write("b", torch.tensor([[1.0, -2.0]]).half())
    header = (
        '{"__metadata__":{"k":"é"},"b":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},'
        '"a":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    data = bytes([0x00, 0x3C, 0x00, 0xC0, 1, 2, 3])
    assert path.read_bytes() == struct.pack("<Q", len(header)) + header + data


def test_the_container_against_the_library_both_ways(tmp_path):
    tensors = of_every_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    reader = Reader(tmp_path / "theirs.safetensors")
    assert reader.metadata == {"format": "pt"}
    assert same_tensors({name: reader.tensor(name) for name in reader.specs}, tensors)
    with Writer(tmp_path / "ours.safetensors", reader.specs, reader.metadata) as writer:
        for i, name in enumerate(tensors):  # in any order, written or copied
            if i % 2:
                writer.write(name, tensors[name])
            else:
                writer.copy(name, reader, name)
    assert same_tensors(load(tmp_path / "ours.safetensors"), tensors)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_of_nothing_and_a_dtype_that_torch_has_not_are_copied(tmp_path):
    for i, content in enumerate(
        [container_bytes({}), container_bytes({"a.weight": entry("F4", (1, 2), (0, 1))}, b"7")]
    ):
        (tmp_path / f"{i}").write_bytes(content)
        interop.convert(tmp_path / f"{i}", tmp_path / f"{i}-copy", "sparsekern")
    assert load(tmp_path / "0-copy") == {}
    reader = Reader(tmp_path / "1-copy")
    assert reader.specs == {"a.weight": Spec("F4", (1, 2))}
    assert list(reader.chunks("a.weight")) == [b"7"]
    with pytest.raises(ValueError, match="which torch has not"):
        reader.tensor("a.weight")


def test_a_writer_insists_on_what_was_announced(tmp_path):
    with (
        pytest.raises(ValueError, match="a were announced and not written"),
        Writer(tmp_path / "1", {"a": Spec("U8", (3,))}, {}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="was not announced so"),
        Writer(tmp_path / "2", {"a": Spec("U8", (3,))}, {}) as writer,
    ):
        writer.write("a", torch.zeros(4, dtype=torch.uint8))


def container_bytes(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FOUR = bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header says"),
        (b"1234567", "its header says"),
        (container_bytes({}, length=1 << 63), "its header says"),
        (container_bytes({}, length=3), "its header says"),
        (container_bytes(b" {}"), "begin with {"),
        (container_bytes(b"{"), "sound"),
        (container_bytes(b"{\xff}"), "sound"),
        (container_bytes(b'{"a":' + b"[" * 100_000), "sound"),
        (container_bytes({"a": 1}), "must have dtype"),
        (container_bytes({"a": {**entry(), "more": 1}}, FOUR), "must have dtype"),
        (container_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
        (container_bytes({"__metadata__": []}), "__metadata__"),
        (container_bytes({"a": entry("X8")}, FOUR), "dtype 'X8'"),
        (container_bytes({"a": entry(["U8"])}, FOUR), "dtype"),
        (container_bytes({"a": entry(shape=(-4,))}, FOUR), "from 0 on"),
        (container_bytes({"a": entry(shape=(-2, -2))}, FOUR), "from 0 on"),
        (container_bytes({"a": entry(shape=(4.0,))}, FOUR), "from 0 on"),
        (container_bytes({"a": entry(shape=(True, 4))}, FOUR), "from 0 on"),
        (container_bytes({"a": entry(shape=(1 << 64, 0))}, FOUR), "from 0 on"),
        (container_bytes({"a": entry(shape=[1] * 65)}, FOUR), "64 integers"),
        (container_bytes({"a": entry(shape=(1 << 62, 1 << 62))}, FOUR), "takes"),
        (container_bytes({"a": entry(shape=(5,))}, FOUR), "takes 40 bits"),
        (container_bytes({"a": entry(shape=(3,))}, FOUR), "takes 24 bits"),
        (container_bytes({"a": entry("F4", (3,), (0, 1))}, b"0"), "takes 12 bits"),
        (container_bytes({"a": entry(offsets=(4, 0))}, FOUR), "takes .begin, end"),
        (container_bytes({"a": entry(offsets=(0, 4, 4))}, FOUR), "takes .begin, end"),
        (container_bytes({"a": entry(offsets=(-4, 0))}, FOUR), "from 0 on"),
        (container_bytes({"a": entry()}, bytes(3)), "take 4 bytes, the file has 3"),
        (container_bytes({"a": entry()}, bytes(5)), "take 4 bytes, the file has 5"),
        (container_bytes({"a": entry(offsets=(1, 5))}, bytes(5)), "leaves a gap"),
        (container_bytes({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)), "overlaps"),
        (container_bytes({"a": entry(), "b": entry()}, FOUR), "overlaps"),
        (container_bytes(b'{"a":1,"a":1}'), "same name twice"),
        (container_bytes(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", FOUR), "sound"),
    ],
)
def test_a_container_that_lies_is_refused_without_taking_memory(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as refusal:
        interop.convert(path, tmp_path / "y", "dense")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(refusal.value)
    assert peak < 10 << 20
    assert os.listdir(tmp_path) == ["x.safetensors"]


# ---- every format to every other ----

PACKED_DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


def convert_through(tmp_path, tensors, *formats, **options):
    """The tensors after one conversion after another, and the last report."""
    path = tmp_path / "0.safetensors"
    save_file(tensors, path)
    for i, form in enumerate(formats, 1):
        target = tmp_path / f"{i}.safetensors"
        report = interop.convert(path, target, form, **options)
        path = target
    return load(path), report


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("form", ["sparsekern", "sparse-24-bitmask"])
def test_dense_to_packed_and_back(tmp_path, dtype, form):
    tensors = {f"{K}.weight": sparse_weight(6, K, dtype) for K in (1, 3, 4, 7, 12, 30, 64)}
    tensors |= {"64.bias": torch.randn(6), "norm.weight": torch.randn(5)}
    back, report = convert_through(tmp_path, tensors, form, "dense")
    assert same_tensors(back, tensors)
    packed = [layer.name for layer in report.layers if layer.source == form]
    fits = [K for K in (1, 12, 3, 30, 4, 64, 7) if form == "sparsekern" or K % 4 == 0]
    assert sorted(packed) == sorted(f"{K}.weight" for K in fits)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_packed_to_packed_is_bit_for_bit(tmp_path, dtype):
    tensors = {}
    for N, K in ((1, 4), (5, 12), (64, 128), (3, 20)):
        tensors[f"{N}.values"], tensors[f"{N}.meta"] = random_packed(N, K, dtype)
    through = ["sparse-24-bitmask", "sparsekern"]
    assert same_tensors(convert_through(tmp_path, tensors, *through)[0], tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_cutlass_to_packed_is_bit_for_bit(tmp_path, dtype):
    values, meta = random_packed(96, 128, dtype)
    tensors = {"values": values, "meta": meta}  # the root's
    through = ["cutlass", "sparse-24-bitmask", "cutlass", "sparsekern"]
    assert same_tensors(convert_through(tmp_path, tensors, *through)[0], tensors)
    packed, reordered = interop.to_cutlass(values, meta)
    want = {"weight.packed": packed, "weight.meta": reordered}
    assert same_tensors(load(tmp_path / "3.safetensors"), want)


def test_cutlass_leaves_dense_what_it_has_no_place_for(tmp_path):
    dense = sparse_weight(64, 64)
    dense[5, :4] = torch.tensor([-0.0, -0.0, 1.0, 2.0])
    fits = torch.zeros(32, 16)
    fits[:, ::2] = 3
    tensors = {
        "pair.weight": dense,
        "rows.weight": sparse_weight(16, 64).half(),
        "type.weight": sparse_weight(32, 64).double(),
        "fits.weight": fits,
    }
    got, report = convert_through(tmp_path, tensors, "cutlass")
    notes = {layer.name: layer.note for layer in report.layers}
    assert "has two non-zeros" in notes["pair.weight"]
    assert "rows in multiples of 32" in notes["rows.weight"]
    assert "float64" in notes["type.weight"]
    assert notes["fits.weight"] == ""
    for name in ("pair.weight", "rows.weight", "type.weight"):
        assert same(got[name], tensors[name])  # negative zeros too
    assert {"fits.weight.packed", "fits.weight.meta"} <= got.keys()
    # Packed ones that have no place become dense.
    again, report = convert_through(tmp_path / "..", tensors, "sparsekern", "cutlass", "dense", force=True)  # fmt: skip
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "names", [("weight_packed", "scale_packed", "meta"), ("B_24", "s", "B_meta")]
)
@pytest.mark.parametrize("to", ["dense", "sparsekern"])
def test_marlin_is_dequantised(tmp_path, names, to):
    values = torch.randint(-8, 8, (64, 64), dtype=torch.int8)
    meta, scale = random_packed(64, 128)[1], torch.rand(64, 1).half()
    parts = interop.to_marlin(values, meta, scale, 4)
    tensors = {f"l.{name}": t for name, t in zip(names, parts, strict=True)}
    got, report = convert_through(tmp_path, tensors, to)
    assert report.source_format == ("marlin-24" if names[0] != "B_24" else "gptq-marlin-24")
    values = values.half() * scale
    want = {"l.values": values, "l.meta": meta}
    if to == "dense":
        want = {"l.weight": sk.unpack_24(values, meta)}
    assert same_tensors(got, want)


def test_what_is_written_is_what_a_sparse_layer_saves_and_loads(tmp_path):
    model = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 12, bias=False))
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    interop.convert(
        tmp_path / "dense.safetensors", tmp_path / "sparse", "sparsekern", prune=everything
    )
    sk.sparsify_(model)
    assert same_tensors(load(tmp_path / "sparse"), dict(model.state_dict()))
    other = nn.Sequential(sk.SparseLinear(30, 8), nn.ReLU(), sk.SparseLinear(8, 12, bias=False))
    other.load_state_dict(load_file(tmp_path / "sparse"))
    assert torch.equal(other(torch.ones(2, 30)), model(torch.ones(2, 30)))
    # Saved by the model, the file does not say that the first has 30 columns: it gets 32.
    save_file(model.state_dict(), tmp_path / "saved")
    interop.convert(tmp_path / "saved", tmp_path / "back", "dense")
    assert load(tmp_path / "back")["0.weight"].shape == (8, 32)


@pytest.mark.compressed_tensors
def test_compressed_tensors_reads_what_is_written_and_the_reverse(tmp_path):
    from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
        Sparse24BitMaskCompressor,
    )
    from compressed_tensors.config import SparsityCompressionConfig

    tensors = {f"l{i}.weight": sparse_weight(16, 64, torch.bfloat16, seed=i) for i in range(3)}
    tensors["l0.bias"] = torch.randn(16)
    (tmp_path / "dense").mkdir()
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text("{}")
    interop.convert(tmp_path / "dense", tmp_path / "ours", "sparse-24-bitmask")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    config = SparsityCompressionConfig.load_from_registry(
        config["sparsity_config"]["format"], **config["sparsity_config"]
    )
    theirs = Sparse24BitMaskCompressor(config=config)
    assert same_tensors(dict(theirs.decompress(str(tmp_path / "ours"))), tensors)
    save_file(theirs.compress(tensors), tmp_path / "theirs.safetensors")
    interop.convert(tmp_path / "theirs.safetensors", tmp_path / "back", "dense")
    assert same_tensors(load(tmp_path / "back"), tensors)
    interop.convert(tmp_path / "theirs.safetensors", tmp_path / "again", "sparse-24-bitmask")
    assert same_tensors(load(tmp_path / "again"), load(tmp_path / "theirs.safetensors"))


# ---- which weights ----


def test_what_is_not_sparse_stays_and_is_reported(tmp_path):
    tensors = {
        "a.weight": sparse_weight(4, 8),
        "b.weight": torch.ones(4, 8),
        "c.weight": torch.ones(4, 2, 3, 3),
        "d.weight": torch.ones(4, 8).long(),
        "e.weight": torch.ones(0, 8),
        "norm.weight": torch.ones(4),
        "matrix": torch.ones(4, 4),
    }
    tensors["b.weight"][0, :4] = 0
    got, report = convert_through(tmp_path, tensors, "sparsekern")
    notes = {layer.name: (layer.target, layer.note) for layer in report.layers}
    assert notes == {
        "a.weight": ("sparsekern", ""),
        "b.weight": ("dense", "not 2:4: row 0, columns 4 to 7"),
        "c.weight": ("dense", "4 dimensions; a matrix has two"),
        "d.weight": ("dense", "I64 is not packed"),
        "e.weight": ("dense", "empty"),
    }
    assert (report.other_tensors, report.other_bytes) == (2, 16 + 64)
    a = report.layers[[layer.name for layer in report.layers].index("a.weight")]
    assert (a.shape, a.dtype, a.bytes_before, a.bytes_after) == ((4, 8), "F32", 128, 64 + 4)
    values, meta = sk.pack_24(tensors.pop("a.weight"))
    assert same_tensors(got, tensors | {"a.values": values, "a.meta": meta})


def test_pruning_and_selecting(tmp_path):
    tensors = {f"{name}.weight": torch.randn(8, 8) for name in ("a", "b", "head")}
    got, report = convert_through(
        tmp_path,
        tensors,
        "sparsekern",
        select=lambda name: name != "b.weight",
        prune=lambda name: "head" not in name,
    )
    values, meta = sk.pack_24(tensors["a.weight"], prune=True)
    want = {k: v for k, v in tensors.items() if k != "a.weight"}
    assert same_tensors(got, want | {"a.values": values, "a.meta": meta})
    assert [layer.name for layer in report.layers] == ["a.weight", "head.weight"]
    assert report.other_tensors == 1
    pruned, _ = convert_through(tmp_path, tensors, "dense", prune=everything, force=True)
    assert same_tensors(pruned, {k: sk.prune_24(v) for k, v in tensors.items()})


def test_layers_that_are_not_selected_keep_their_width(tmp_path):
    tensors = {f"{i}.weight": sparse_weight(4, 30) for i in range(2)}
    save_file(tensors, tmp_path / "a")
    interop.convert(tmp_path / "a", tmp_path / "b", "sparsekern")
    interop.convert(tmp_path / "b", tmp_path / "c", "dense", select=lambda name: name[0] == "0")
    assert same(load(tmp_path / "c")["0.weight"], tensors["0.weight"])
    assert json.loads(Reader(tmp_path / "c").metadata[IN_FEATURES]) == {"1": 30}
    interop.convert(tmp_path / "c", tmp_path / "d", "dense")
    assert same_tensors(load(tmp_path / "d"), tensors)


# ---- directories ----


def sharded(path, tensors: dict, shards: list[list[str]], **files: str) -> None:
    path.mkdir()
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index))
    for name, text in files.items():
        (path / name.replace("_json", ".json").replace("_bin", ".bin")).write_text(text)


def load_sharded(path) -> dict:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    tensors = {}
    for file in dict.fromkeys(weight_map.values()):
        found = load(path / file)
        assert all(weight_map[name] == file for name in found)
        tensors |= found
    assert tensors.keys() == weight_map.keys()
    return tensors


def test_a_sharded_directory_with_a_layer_over_two_files(tmp_path):
    dense = {"a.weight": sparse_weight(8, 16), "b.weight": sparse_weight(4, 30), "c": torch.ones(3)}
    shape, compressed, bits = interop.to_bitmask(*sk.pack_24(dense["a.weight"]))
    tensors = {"a.shape": shape, "a.compressed": compressed, "a.bitmask": bits, **dense}
    config = {
        "layers": 2,
        "quantization_config": {"quant_method": "compressed-tensors", "version": "0.12.2",
                                "sparsity_config": {"format": "sparse-24-bitmask"}},
    }  # fmt: skip
    sharded(
        tmp_path / "src",
        tensors,
        [["c", "a.bitmask"], ["a.compressed", "b.weight"], ["a.shape"]],
        config_json=json.dumps(config),
        tokenizer_json="{}",
        pytorch_model_bin="heavy",
    )
    (tmp_path / "src" / "folder").mkdir()
    report = interop.convert(tmp_path / "src", tmp_path / "dense", "dense")
    assert same_tensors(load_sharded(tmp_path / "dense"), dense)
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {"layers": 2}
    assert (tmp_path / "dense" / "tokenizer.json").read_text() == "{}"
    assert report.left_out == ["folder", "pytorch_model.bin"]
    index = json.loads((tmp_path / "dense" / INDEX).read_text())
    size = sum(t.nbytes for t in dense.values())
    assert index["metadata"] == {"total_size": size, "kept": "yes"}

    interop.convert(tmp_path / "dense", tmp_path / "packed", "sparsekern")
    interop.convert(tmp_path / "packed", tmp_path / "again", "dense")
    assert same_tensors(load_sharded(tmp_path / "again"), dense)

    report = interop.convert(tmp_path / "dense", tmp_path / "bits", "sparse-24-bitmask")
    got = json.loads((tmp_path / "bits" / "config.json").read_text())["quantization_config"]
    assert got == report.quantization_config
    assert got["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert got["sparsity_config"]["targets"] == ["a"]


def test_a_filter_leaves_the_configuration_true(tmp_path):
    tensors = {f"{name}.weight": sparse_weight(4, 8) for name in "ab"}
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text("{}")
    interop.convert(tmp_path / "src", tmp_path / "bits", "sparse-24-bitmask")
    for to, expected in (("dense", ["b"]), ("sparse-24-bitmask", ["a", "b"])):
        interop.convert(
            tmp_path / "bits", tmp_path / to, to, select=lambda name: name == "a.weight"
        )
        got = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
        assert sorted(got["sparsity_config"]["targets"]) == expected


def test_a_quantised_model_keeps_its_quantisation(tmp_path):
    tensors = {
        "a.weight": sparse_weight(8, 16, torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(1),
    }
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "version": "0.9",
    }
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text(json.dumps({"quantization_config": quantised}))
    interop.convert(tmp_path / "src", tmp_path / "bits", "sparse-24-bitmask")
    got = json.loads((tmp_path / "bits" / "config.json").read_text())["quantization_config"]
    assert got.pop("sparsity_config")["targets"] == ["a"]
    assert got == quantised
    interop.convert(tmp_path / "bits", tmp_path / "back", "dense")
    got = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert got == quantised
    (tmp_path / "src" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "gptq"}}'
    )
    with pytest.raises(ValueError, match="quantization_config of gptq"):
        interop.convert(tmp_path / "src", tmp_path / "no", "sparse-24-bitmask")
    assert not list(tmp_path.glob("*no*"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "no index"),
        ("[]", "no index"),
        ("{}", "no index"),
        ('{"weight_map": [1]}', "no index"),
        ('{"weight_map": {"a": 1}}', "of its own folder"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "of its own folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "of its own folder"),
        ('{"weight_map": {"a": ".."}}', "no file"),
        ('{"weight_map": {"a": ""}}', "no file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "there is no file gone"),
        ('{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}', "b in 1.safetensors; it is in none"),
        ('{"weight_map": {}}', "of its own folder"),
        ('{"weight_map": {"x": "2.safetensors"}}', "a in no file"),
        ('{"weight_map": {"a": "1.safetensors", "x": "2.safetensors"}}', "a is in 1"),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_refused(tmp_path, index, message):
    (tmp_path / "src").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "src" / "1.safetensors")
    save_file({"a": torch.ones(1), "x": torch.ones(1)}, tmp_path / "src" / "2.safetensors")
    (tmp_path / "src" / INDEX).write_text(index)
    with pytest.raises(ValueError, match=message):
        interop.convert(tmp_path / "src", tmp_path / "dst", "dense")


def test_a_directory_of_several_files_takes_an_index(tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(2):
        save_file({"a": torch.ones(1)}, tmp_path / "src" / f"{i}.safetensors")
    with pytest.raises(ValueError, match="has 2 safetensors files"):
        interop.convert(tmp_path / "src", tmp_path / "dst", "dense")


# ---- which format ----


def test_the_format_is_what_the_names_say(tmp_path):
    values, meta = random_packed(32, 32)
    shape, compressed, bits = interop.to_bitmask(values, meta)
    packed, reordered = interop.to_cutlass(values, meta)
    files = {
        "sparsekern": {"a.values": values, "a.meta": meta},
        "sparse-24-bitmask": {"a.shape": shape, "a.compressed": compressed, "a.bitmask": bits},
        "cutlass": {"a.weight.packed": packed, "a.weight.meta": reordered},
        "dense": {"a.weight": sk.unpack_24(values, meta)},
    }
    for form, tensors in files.items():
        save_file(tensors, tmp_path / form)
        report = interop.convert(tmp_path / form, tmp_path / f"{form}-dense", "dense")
        assert (report.source_format, report.guessed) == (form, True)
        assert same(load(tmp_path / f"{form}-dense")["a.weight"], files["dense"]["a.weight"])
    both = files["sparsekern"] | {f"b{name}": t.clone() for name, t in files["cutlass"].items()}
    save_file(both, tmp_path / "both")
    with pytest.raises(ValueError, match="of sparsekern and of cutlass; say which with --from"):
        interop.convert(tmp_path / "both", tmp_path / "x", "dense")
    report = interop.convert(tmp_path / "both", tmp_path / "x", "dense", source_format="cutlass")
    assert load(tmp_path / "x").keys() == {"a.values", "a.meta", "ba.weight"}
    assert not report.guessed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.meta"), "takes a.meta beside a.values"),
        (
            lambda t: t.update({"a.meta": t["a.meta"] * 0}),
            "a.weight: check_24: meta row 0, group 0",
        ),
        (lambda t: t.update({"a.meta": t["a.meta"][:1]}), "a.weight: check_24: meta has shape"),
        (lambda t: t.update({"a.meta": t["a.meta"].int()}), "a.weight: check_24: meta has dtype"),
        (
            lambda t: t.update({"a.values": t["a.values"].long()}),
            "a.weight: check_24: values has dtype",
        ),
        (lambda t: t.update({"a.weight": torch.ones(4, 4)}), "two tensors a.weight"),
    ],
)
def test_a_layer_that_lies_is_refused_and_nothing_is_written(tmp_path, change, message):
    tensors = dict(zip(("a.values", "a.meta"), random_packed(4, 16), strict=True))
    change(tensors)
    save_file(tensors, tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        interop.convert(tmp_path / "a", tmp_path / "b", "dense")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "must be JSON"),
        ("[]", "must be JSON"),
        ('{"a": "30"}', "must be JSON"),
        ('{"a": true}', "must be JSON"),
        ('{"a": 32}', "32 input features; values are for 32"),
        ('{"a": 28}', "28 input features"),
        ('{"a": -1}', "-1 input features"),
        ('{"a": 29}', "past column 29"),
    ],
)
def test_input_features_that_lie_are_refused(tmp_path, text, message):
    values, meta = sk.pack_24(torch.ones(2, 32), prune=True)
    values, meta = sk.pack_24(sk.unpack_24(values, meta).roll(2, 1))
    save_file({"a.values": values, "a.meta": meta}, tmp_path / "a", {IN_FEATURES: text})
    with pytest.raises(ValueError, match=message):
        interop.convert(tmp_path / "a", tmp_path / "b", "dense")


def test_the_unstructured_bitmask_is_refused(tmp_path):
    parts = ("shape", "compressed", "bitmask", "row_offsets")
    save_file({f"a.{part}": torch.ones(2) for part in parts}, tmp_path / "a")
    with pytest.raises(ValueError, match="not 2:4 and not read here"):
        interop.convert(tmp_path / "a", tmp_path / "b", "dense")


# ---- bytes that were changed ----


def fuzz_files() -> list[bytes]:
    values, meta = random_packed(64, 32)
    shape, compressed, bits = interop.to_bitmask(values, meta)
    packed, reordered = interop.to_cutlass(values, meta)
    marlin = interop.to_marlin(
        torch.zeros(64, 16, dtype=torch.int8), meta, torch.ones(64, 1).half(), 4
    )
    names = ("weight_packed", "scale_packed", "meta")
    return [
        save({"a.values": values, "a.meta": meta}, {IN_FEATURES: '{"a": 32}'}),
        save({"a.values": values, "a.meta": meta, "b.weight": torch.ones(2, 4)}),
        save({"a.shape": shape, "a.compressed": compressed, "a.bitmask": bits}),
        save({"a.weight.packed": packed, "a.weight.meta": reordered}),
        save({f"a.{name}": t for name, t in zip(names, marlin, strict=True)}),
    ]


FUZZ_FILES = fuzz_files()


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_changed_bytes_are_converted_or_refused(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(FUZZ_FILES)))
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of the time where it matters: the length and the header.
        last = data.draw(st.sampled_from([8, header, header, len(content)]))
        at = data.draw(st.integers(0, last - 1))
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0189-,:[]{}".eE')))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (tmp_path / "x").write_bytes(content)
    tracemalloc.start()
    try:
        interop.convert(
            tmp_path / "x",
            tmp_path / "y",
            data.draw(st.sampled_from(["dense", "sparsekern"])),
            force=True,
        )
        load(tmp_path / "y")
    except ValueError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
    assert set(os.listdir(tmp_path)) <= {"x", "y"}


# ---- where it goes ----


def test_a_target_is_not_overwritten_unless_asked(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a")
    (tmp_path / "b").write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        interop.convert(tmp_path / "a", tmp_path / "b", "dense")
    assert (tmp_path / "b").read_text() == "precious"
    interop.convert(tmp_path / "a", tmp_path / "b", "dense", force=True)
    assert load(tmp_path / "b").keys() == {"a"}


def test_a_directory_is_replaced_only_if_it_is_a_checkpoint(tmp_path):
    sharded(tmp_path / "src", {"a": torch.ones(1)}, [["a"]])
    sharded(tmp_path / "dst", {"b": torch.ones(1)}, [["b"]])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="it is not replaced"):
        interop.convert(tmp_path / "src", tmp_path / "home", "dense", force=True)
    interop.convert(tmp_path / "src", tmp_path / "dst", "dense", force=True)
    assert load_sharded(tmp_path / "dst").keys() == {"a"}
    save_file({"a": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(ValueError, match="not both"):
        interop.convert(tmp_path / "file", tmp_path / "dst", "dense", force=True)
    assert sorted(os.listdir(tmp_path)) == ["dst", "file", "home", "src"]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("src", "src", "apart from the source"),
        ("src", "src/inside", "apart from the source"),
        ("src/model.safetensors", "src", "apart from the source"),
        ("gone", "dst", "there is no"),
        ("src", "gone/dst", "there is no folder"),
    ],
)
def test_a_target_that_cannot_be_is_refused(tmp_path, source, target, message):
    (tmp_path / "src").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "src" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        interop.convert(tmp_path / source, tmp_path / target, "dense", force=True)
    assert load(tmp_path / "src" / "model.safetensors").keys() == {"a"}


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_things_as_they_were(tmp_path, monkeypatch, kind, error):
    tensors = {"a.weight": sparse_weight(4, 8), "b.weight": sparse_weight(4, 8)}
    for name in ("src", "dst"):
        if kind == "file":
            save_file(tensors, tmp_path / name)
        else:
            sharded(tmp_path / name, tensors, [["a.weight"], ["b.weight"]])
    calls = []

    def write(self, name, t):
        calls.append(name)
        if len(calls) == 3:  # in the second layer
            raise error("now")
        written(self, name, t)

    written = Writer.write
    monkeypatch.setattr(container.Writer, "write", write)
    with pytest.raises(error):
        interop.convert(tmp_path / "src", tmp_path / "dst", "sparsekern", force=True)
    assert len(calls) == 3
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    there = load(tmp_path / "dst") if kind == "file" else load_sharded(tmp_path / "dst")
    assert same_tensors(there, tensors)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    save_file({"a.weight": sparse_weight(4, 8)}, tmp_path / "src")

    def progress(done, total, layer):
        # In place, behind the same header.
        content = (tmp_path / "src").read_bytes()
        (tmp_path / "src").write_bytes(content[:-128] + save({"a": torch.ones(4, 8)})[-128:])

    with pytest.raises(ValueError, match="not 2:4 any more: the source changes"):
        interop.convert(tmp_path / "src", tmp_path / "dst", "sparsekern", progress=progress)
    assert os.listdir(tmp_path) == ["src"]


def test_progress_goes_over_every_byte_twice(tmp_path):
    seen = []
    tensors = {"a.weight": sparse_weight(4, 8), "b": torch.ones(3)}
    convert_through(tmp_path, tensors, "sparsekern", progress=lambda *now: seen.append(now))
    assert [done for done, _, _ in seen] == [128, 140, 152, 280]
    assert {total for _, total, _ in seen} == {280}


# Converts a file and says how far the process's memory went up for it, in bytes.
MEASURE = """
import sys, torch
from sparsekern import interop
torch.set_num_threads(1)
def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) << 10
source, target = sys.argv[1:]
interop.convert(source + ".warm", target + ".warm", "sparse-24-bitmask", prune=lambda name: True)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
interop.convert(source, target, "sparse-24-bitmask", prune=lambda name: True)
print(status("VmHWM") - before)
"""


def test_memory_is_that_of_a_layer_not_of_the_file(tmp_path):
    layer = torch.randn(1024, 1024).bfloat16()  # 2 MB
    save_file({f"{i}.weight": layer.clone() for i in range(48)}, tmp_path / "x")
    save_file({"0.weight": layer}, tmp_path / "x.warm")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "x"), str(tmp_path / "y")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert int(ran.stdout) < 24 << 20  # of 96 MB


# ---- the command ----


def invoke(*arguments):
    return runner.invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "250"})


def test_the_command_says_what_it_did(tmp_path):
    tensors = {
        "l.weight": torch.randn(8, 8),
        "odd.weight": torch.randn(8, 6),
        "embed.weight": torch.randn(4, 8),
        "norm": torch.ones(3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    result = invoke(
        tmp_path / "a.safetensors", tmp_path / "b", "--to", "sparse-24-bitmask", "--prune"
    )
    assert result.exit_code == 0, result.output
    assert "From dense, as its tensors' names say, to sparse-24-bitmask." in result.output
    assert "6 columns are no multiple of 4" in result.output
    assert "not 2:4: row 0, columns 0 to 3" in result.output
    assert "1 of 3 weights are sparse-24-bitmask" in result.output
    assert '"format": "sparse-24-bitmask"' in result.output
    assert same(load(tmp_path / "b")["embed.weight"], tensors["embed.weight"])
    assert not os.path.exists(tmp_path / ".b")


def test_the_command_in_json_with_filters(tmp_path):
    save_file({f"{n}.weight": torch.randn(4, 4) for n in ("a", "emb", "b")}, tmp_path / "x")
    result = invoke(
        tmp_path / "x", tmp_path / "y", "--to", "sparsekern", "--from", "dense", "--prune", "--json",
        "--keep-dense", "", "--filter", "^(a|emb)",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert (report["source_format"], report["guessed"]) == ("dense", False)
    assert [layer["name"] for layer in report["layers"]] == ["a.weight", "emb.weight"]
    assert load(tmp_path / "y").keys() == {
        "a.values", "a.meta", "emb.values", "emb.meta", "b.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "y", "--to", "dense"], "there is no"),
        (["x", "x", "--to", "dense"], "apart"),
        (["bad", "y", "--to", "dense"], "sound safetensors"),
        (["x", "y", "--to", "dense", "--filter", "("], "regular expressions"),
        (["x", "y", "--to", "dense", "--keep-dense", "("], "regular expressions"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "x")
    (tmp_path / "bad").write_text("[not] a safetensors file")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr


def test_the_help_names_the_command():
    assert "convert" in runner.invoke(app, ["--help"]).output


def test_a_format_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="to is 'marlin-24'; it takes one of dense, sparsekern"):
        interop.convert(tmp_path / "x", tmp_path / "y", "marlin-24")
    with pytest.raises(ValueError, match="source_format is 'x'"):
        interop.convert(tmp_path / "x", tmp_path / "y", "dense", source_format="x")
