"""The papers' table: formats against codecs written out, the model against sums done by hand, and quick runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsekern.offload.nets import NETS, SquaredReLU, transformer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the benchmarks are never installed
codecs, capturing, virtualised, predictions, results, paper = (
    importlib.import_module(f"benchmarks.offload.{name}")
    for name in ("codecs", "capture", "virtualised", "predictions", "results", "paper")
)
Layer, Machine = virtualised.Layer, virtualised.Machine


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


# ---- the nets ----

THIN = {
    "alexnet": {"width": 0.1, "hidden": 16},
    "vgg16": {"width": 0.1, "hidden": 16},
    "squeezenet": {"width": 0.2},
    "resnet18": {"width": 0.1},
    "cnn": {},
} | {f"transformer-{a}": {"width": 16, "heads": 2, "layers": 1} for a in ("relu", "relu2", "gelu")}


def test_every_net_is_tried():
    assert set(THIN) == set(NETS) == set(paper.RUNS) == set(paper.QUICK)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_net_has_gradients_everywhere(name, dtype):
    torch.manual_seed(0)
    net = NETS[name]
    model = net.build(**THIN[name]).to(dtype)
    inputs, targets = net.batch(4, dtype=dtype)
    net.loss(model, inputs, targets).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) > 0.9 * len([*model.parameters()])


@pytest.mark.parametrize("name", ["cnn", "resnet18", "transformer-relu2"])
def test_synthetic_batches_can_be_learned(name):
    torch.manual_seed(0)
    net, sizes = NETS[name], THIN[name]
    model, generator = net.build(**sizes), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = net.loss(model, *net.batch(16, generator=generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_batches_are_those_of_the_generator():
    for net in NETS.values():
        first, again = net.batch(2), net.batch(2)
        other = net.batch(2, generator=torch.Generator().manual_seed(1))
        assert all(map(torch.equal, first, again))
        assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("name", "parameters", "gflop"),
    # Of the publications, as far as they give them: 61 M, 138 M, 1.2 M, 11.7 M parameters; 0.71, 15.5, 0.35, 1.8 G
    # multiply-adds a 224-pixel image.
    [
        ("alexnet", 61_100_840, 1.43),
        ("vgg16", 138_357_544, 30.9),
        ("squeezenet", 1_235_496, 0.70),
        ("resnet18", 11_689_512, 3.63),
    ],
)
def test_nets_have_their_published_size(name, parameters, gflop):
    with torch.device("meta"):
        model = NETS[name].build(size=224, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    full = predictions.full_layers(name)
    assert sum(layer.flops for layer in full) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_nets_refuse_sizes_that_leave_nothing():
    with pytest.raises(ValueError, match="vgg16: size is 31; it takes 32 pixels or more"):
        NETS["vgg16"].build(size=31)
    with pytest.raises(ValueError, match="activation is 'silu'; it takes one of relu, relu2, gelu"):
        transformer(activation="silu")
    with pytest.raises(ValueError, match="width is 10; it takes a multiple of heads, 4"):
        transformer(width=10)


def test_squared_relu_saves_one_tensor():
    x = torch.randn(8, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()), lambda t: t):
        SquaredReLU()(x)
    assert len(set(seen)) == 1


# ---- the formats ----


def tokens(values: list[int]) -> tuple[list[tuple[bool, list[int]]], int]:
    """The tokens one by one, as the format's text has it: (elements follow, elements); and bytes, 4 an element."""
    found: list[tuple[bool, list[int]]] = []
    for v in values:
        follow = v != 0
        if found and found[-1][0] == follow and len(found[-1][1]) < 128:
            found[-1][1].append(v)
        else:
            found.append((follow, [v]))
    return found, sum(1 + 4 * len(run) * follow for follow, run in found)


def records(values: list[int]) -> tuple[list[tuple[int, int]], int]:
    """The records of fixed width one by one, (zeros before, element); and bytes of 4-byte elements."""
    found, zeros = [], 0
    for v in values:
        if v != 0:
            found.append((zeros, v))
            zeros = 0
        elif zeros == 31:
            found.append((31, 0))
            zeros = 0
        else:
            zeros += 1
    if zeros:
        found.append((zeros - 1, 0))
    return found, math.ceil(len(found) * (5 + 32) / 8)


# Runs as long as the formats' limits, and one off them.
runs = st.tuples(st.sampled_from([1, 2, 31, 32, 33, 127, 128, 129, 300]), st.sampled_from([0, 7]))


@given(st.lists(runs, max_size=8))
def test_run_lengths_are_those_of_codecs_written_out(drawn):
    values = [v for length, v in drawn for _ in range(length)]
    x = torch.tensor(values, dtype=torch.int32)
    found, nbytes = tokens(values)
    assert [v for _, run in found for v in run] == values
    assert codecs.token_bytes(x) == nbytes
    found, nbytes = records(values)
    decoded = [v for zeros, element in found for v in [0] * zeros + [element]]
    assert decoded == values
    assert codecs.fixed_bytes(x) == nbytes


def test_run_lengths_by_hand():
    x = torch.tensor([0.0, 0.0, 0.0, 5.0, 6.0, 0.0])
    assert codecs.token_bytes(x) == 1 + (1 + 2 * 4) + 1
    assert codecs.fixed_bytes(x) == 14  # three records of 37 bits: 111 bits
    assert codecs.fixed_bytes(x.bfloat16()) == 8  # of 21 bits: 63 bits
    assert codecs.fixed_bytes(torch.zeros(64)) == 10  # two records
    assert codecs.token_bytes(torch.zeros(256)) == 2
    assert codecs.token_bytes(torch.tensor([-0.0])) == 5  # bits, not values


def test_layouts_of_a_map():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    assert codecs.in_layout(x, "NHWC").flatten()[:3].tolist() == [0, 20, 40]
    assert torch.equal(codecs.in_layout(x, "NCHW"), x)
    y = x.view(6, 4, 5)  # [N, T, C]
    assert codecs.in_layout(y, "NCHW").flatten()[:4].tolist() == [0, 5, 10, 15]
    assert torch.equal(codecs.in_layout(y, "NHWC"), y)
    # From channels_last too, whose strides are not those of its shape.
    assert torch.equal(
        codecs.in_layout(x.to(memory_format=torch.channels_last), "NCHW").flatten(), x.flatten()
    )


def test_runs_along_the_channels_are_seen_in_nhwc_alone():
    x = torch.zeros(1, 64, 8, 8)
    x[:, :, ::2, ::2] = 1.0  # every channel of a place, or none
    found = codecs.measured(x)
    assert found["tokens NHWC"] < found["tokens NCHW"]
    assert found["zvc NHWC"] == found["zvc NCHW"] == 16 * 64 * 4 + 64 * 8 * 8 // 8 + 8
    assert found["zvc, no offsets"] == found["zvc NCHW"] - 8
    assert found["zvc bf16"] == 16 * 64 * 2 + 64 * 8 * 8 // 8 + 8


def test_zlib_sees_its_part_and_is_scaled(monkeypatch):
    x = torch.randn(1 << 12)
    whole = codecs.zlib_bytes(x)
    assert whole == len(zlib.compress(x.numpy().tobytes(), 6))
    monkeypatch.setattr(codecs, "ZLIB_BYTES", 1 << 13)
    assert codecs.zlib_bytes(x) == 2 * len(zlib.compress(x[: 1 << 11].numpy().tobytes(), 6))


# ---- what is captured ----


def test_capture_of_a_small_net():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    x = torch.randn(5, 1, 4, 4)
    with capturing.capture(model) as found:
        loss = model(x).sum()
    assert [(m.layer, m.kind, list(m.tensor.shape)) for m in found.maps] == [
        ("0", "conv", [5, 1, 4, 4]),
        ("2", "pool", [5, 2, 4, 4]),
        ("4", "dense", [5, 8]),
    ]
    # The convolution keeps the image; the ReLU its output, and the pool the same after it; the pool places; the dense
    # layer what it reads. Weights are nobody's, though both products keep theirs.
    kept = [(s.layer, s.tensor.dtype, s.tensor.numel()) for s in found.saved]
    assert kept == [
        ("0", torch.float32, 80),
        ("2", torch.float32, 160),
        ("2", torch.int64, 40),
        ("4", torch.float32, 40),
    ]
    assert found.parameter_bytes == 4 * (18 + 24)
    assert found.packed_bytes == 4 * (80 + 2 * 160 + 40 + 18 + 24) + 8 * 40
    assert found.traffic["1"] == 2 * 4 * 160
    loss.backward()
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_capture_counts_a_storage_whole_and_once():
    model = transformer(size=8, width=16, heads=2, layers=1)
    with capturing.capture(model) as found:
        model(torch.zeros(3, 8, dtype=torch.int64))
    # Attention keeps queries, keys and values: three views of one storage.
    kept = [s.tensor.numel() for s in found.saved if s.layer == "blocks.0.attention"]
    assert 3 * 8 * 3 * 16 in kept
    assert len({s.tensor.data_ptr() for s in found.saved}) == len(found.saved)


def test_capture_changes_no_gradient():
    torch.manual_seed(0)
    net = NETS["resnet18"]
    model = net.build(width=0.1).double()
    inputs, targets = net.batch(2, dtype=torch.float64)
    gradients = []
    for captured in (False, True):
        model.zero_grad()
        if captured:
            with capturing.capture(model):
                loss = net.loss(model, inputs, targets)
        else:
            loss = net.loss(model, inputs, targets)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_operations_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    found = capturing.forward_flops(model, torch.randn(2, 3, 4, 4))
    assert found == {"0": 2 * (2 * 4 * 16) * 27, "3": 2 * 2 * 64 * 5}
    model = transformer(size=8, width=16, heads=2, layers=1)
    found = capturing.forward_flops(model, torch.zeros(3, 8, dtype=torch.int64))
    assert (
        found["blocks.0.attention"] == 2 * 2 * 3 * 8 * 8 * 16
    )  # scores, and their product with the values
    assert found["blocks.0.attention.qkv"] == 2 * 24 * 16 * 48


def test_saved_bytes_of_floats_and_of_places():
    layer = [
        capturing.Saved("pool", torch.cat([torch.zeros(4096), torch.ones(4096)])),
        capturing.Saved("pool", torch.ones(4096)),
        capturing.Saved("pool", torch.arange(200)),
        capturing.Saved("pool", torch.tensor([True, False])),
    ]
    (found,) = paper.saved_bytes(layer)
    half = 4096 * 4 + 8192 // 8 + 2 * 8
    assert found == results.SavedBytes(
        "pool", 3 * 16384, half + 16384, 4096 * 2 + 1024 + 16 + 8192, 2 * 16384, 1602, 202
    )
    assert found.ratio(4) == 3 * 16384 / (half + 16384)
    assert found.ratio(2) == 3 * 8192 / found.floats_zvc_bf16


# ---- the model ----


def test_nothing_to_gain_where_compute_hides_every_transfer():
    layers = [Layer(str(i), forward=2.0, backward=4.0, nbytes=1.0, ratio=4.0) for i in range(5)]
    machine = Machine("", 1.0, 1.0, link=1.0)
    steps = [
        virtualised.without_offload(layers),
        virtualised.raw_offload(layers, machine),
        virtualised.compressed_offload(layers, machine),
    ]
    assert [s.seconds for s in steps] == [30.0] * 3
    assert [s.device_bytes for s in steps] == [5.0, 2.0, 2.0]
    assert [s.host_bytes for s in steps] == [0.0, 4.0, 1.0]


def test_the_ratio_is_gained_where_the_link_is_all_there_is():
    layers = [Layer(str(i), 0.0, 0.0, nbytes=6.0, ratio=2.5) for i in range(4)]
    machine = Machine("", 1.0, 1.0, link=2.0)
    raw = virtualised.raw_offload(layers, machine)
    assert raw.seconds == 2 * 3 * 3.0  # three maps of four move, both ways
    assert raw.seconds / virtualised.compressed_offload(layers, machine).seconds == pytest.approx(
        2.5
    )


def test_a_step_by_hand():
    """Three layers and a loss that saves nothing; transfers of 4, 2 and, as the last map stays, none."""
    layers = [
        Layer("a", 1.0, 2.0, nbytes=4.0, ratio=4.0),
        Layer("b", 3.0, 6.0, nbytes=2.0, ratio=1.0),
        Layer("c", 1.0, 2.0, nbytes=8.0, ratio=2.0),
        Layer("loss", 0.5, 1.0),
    ]
    machine = Machine("", 1.0, 1.0, link=1.0)
    raw = virtualised.raw_offload(layers, machine)
    # Forward: max(1, 4) + max(3, 2) + 1 + 0.5. Backward: b's map comes back behind the loss, max(1, 2); c alone, 2,
    # for nothing is fetched past b's; then a's behind b, max(6, 4); a alone, 2.
    assert (raw.forward, raw.backward) == (4 + 3 + 1 + 0.5, 2 + 2 + 6 + 2)
    # While b runs forward: its own 2 and c's 8; so while c runs backward.
    assert (raw.device_bytes, raw.host_bytes) == (10.0, 6.0)
    packed = virtualised.compressed_offload(layers, machine)
    # a's map takes 1 second now, as long as a itself.
    assert (packed.forward, packed.backward) == (1 + 3 + 1 + 0.5, 2 + 2 + 6 + 2)
    assert (packed.device_bytes, packed.host_bytes) == (10.0, 3.0)


def test_an_engine_in_the_copy_is_a_floor_and_a_kernel_is_paid_for():
    layers = [Layer("a", 1.0, 1.0, nbytes=8.0, ratio=4.0), Layer("b", 1.0, 1.0, nbytes=1.0)]
    dma = Machine("", 1.0, 1.0, link=1.0, engine=2.0)  # 8 / 2 = 4 seconds, above 8 / 4 / 1 = 2
    step = virtualised.compressed_offload(layers, dma)
    assert (step.forward, step.backward) == (4 + 1, 4 + 1)
    kernel = Machine(
        "", 1.0, 1.0, link=1.0, engine=8.0, kind="kernel"
    )  # 1 second, then 2 of copying
    step = virtualised.compressed_offload(layers, kernel)
    assert (step.forward, step.backward) == (1 + 2 + 1, 2 + 1 + 1)
    # a's 8, its 2 compressed, and b's 1 that is being written.
    assert step.device_bytes == 11.0
    # What does not shrink pays for no kernel.
    raw = virtualised.raw_offload(layers, kernel)
    assert (raw.forward, raw.backward, raw.device_bytes) == (8 + 1, 8 + 1, 9.0)


def test_compression_never_predicts_a_slower_step_than_raw_from_an_engine_without_limit():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        numbers = torch.rand(12, 4, generator=generator).tolist()
        layers = [Layer("", f, 2 * f, x, 0.9 + 3 * r) for f, x, r, _ in numbers]
        machine = Machine("", 1.0, 1.0, link=1.0)
        none, raw, packed = (
            virtualised.without_offload(layers),
            virtualised.raw_offload(layers, machine),
            virtualised.compressed_offload(layers, machine),
        )
        assert none.seconds <= packed.seconds <= raw.seconds
        assert raw.device_bytes == packed.device_bytes <= none.device_bytes


def test_one_layer_that_saves_stays():
    layers = [Layer("a", 1.0, 2.0, 5.0, 2.0), Layer("b", 1.0, 2.0)]
    step = virtualised.raw_offload(layers, Machine("", 1.0, 1.0, link=1e-9))
    assert (step.seconds, step.device_bytes, step.host_bytes) == (6.0, 5.0, 0.0)
    assert virtualised.without_offload([]).seconds == 0


def test_a_layer_by_the_roofline():
    machine = Machine("", flops=10.0, memory=2.0, link=1.0)
    layer = virtualised.timed("a", flops=40, traffic=2, nbytes=3, ratio=2.0, machine=machine)
    assert layer == Layer("a", 4.0, 8.0, 3, 2.0)
    assert virtualised.timed("a", 0, 6, 0, 1.0, machine).forward == 3.0


# ---- the run ----


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


COMMAND = [sys.executable, "-m", "benchmarks.offload", "--threads", "1"]
QUICK = [*COMMAND, "--quick", "--synthetic"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quick run of every net: what it printed, its Markdown, its JSON read back, and its folder."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("paper") / "table.md"
    done = subprocess.run(
        [*QUICK, "--out", str(out)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.Results.from_json(json.loads(out.with_suffix(".json").read_text()))
    return done.stdout, out.read_text(), found, out.parent


def test_every_net_is_measured(run):
    _, _, found, _ = run
    assert set(found.trained) == set(NETS)
    for net, t in found.trained.items():
        assert t.complete, net
        assert [r.step for r in t.records] == paper.measured_at(t.steps)
        assert all(math.isfinite(loss) for loss in t.losses)
        assert bool(t.photograph) == t.is_convolutional
        for m in (m for r in t.records for m in r.maps):
            n = math.prod(m.shape)
            assert m.nbytes == 4 * n
            # Zeros are what ZVC leaves out: a mask, the others, and 8 bytes a tile.
            nonzero = round(m.density * n)
            assert m.formats["zvc, no offsets"] == 4 * nonzero + -(-n // 8)
            assert m.formats["zvc NCHW"] == m.formats["zvc NHWC"]
            assert m.formats["zvc NCHW"] == m.formats["zvc, no offsets"] + 8 * -(-n // 4096)


def test_activations_are_as_sparse_as_they_should_be(run):
    _, _, found, _ = run
    for net, dense in (("relu", False), ("relu2", False), ("gelu", True)):
        maps = found.trained[f"transformer-{net}"].records[0].maps
        (down, *_) = [m for m in maps if m.layer == "blocks.0.down"]
        assert (down.density == 1.0) == dense
        assert dense or 0.4 < down.density < 0.6
    for net in ("alexnet", "vgg16", "squeezenet", "resnet18"):
        first, *others = found.trained[net].records[0].maps
        assert first.density == 1.0  # the image
        assert 0.3 < fmean(m.density for m in others if m.kind == "conv") < 0.8, net


def test_predictions_are_of_full_size(run):
    _, _, found, _ = run
    nets = set(predictions.FULL)
    assert {p.net for p in found.predictions} == nets
    assert len(found.predictions) == len(nets) * len(predictions.MACHINES)
    for p in found.predictions:
        none, raw, packed = p.seconds
        assert none <= raw
        assert none <= packed
        if p.machine == predictions.PAPER.name:
            assert packed <= raw
    (vgg,) = [
        p for p in found.predictions if (p.net, p.machine) == ("vgg16", predictions.PAPER.name)
    ]
    assert vgg.device_bytes[0] / 2**20 == pytest.approx(
        58.2, rel=0.02
    )  # MiB an image, without places


def test_tables_are_well_formed_and_the_paper_is_answered(run):
    printed, text, found, _ = run
    for title in (
        "Ratio by format and layout",
        "Training",
        "All that training keeps",
        "Predicted steps",
    ):
        assert f"## {title}" in text
        assert title in printed
    for table in text.split("\n## ")[2:]:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count(" | ") for line in lines}) == 1
    for reason in (
        "Size",
        "First layers",
        "Length",
        "Data",
        "Batch normalisation",
        "Activation",
        "bf16",
        "Layout",
        "Speed",
        "Machines of today",
    ):
        assert f"* **{reason}.**" in text
    for fact in ("date", "torch", "revision", "seed"):
        assert str(found.facts[fact]) in text.partition("\n## ")[0]


def test_pictures_are_written_and_named_in_the_text(run):
    _, text, _, folder = run
    for name in ("table-layers.png", "table-nets.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    out = tmp_path / "table.md"
    process = subprocess.Popen(
        [*COMMAND, "--synthetic", "--net", "vgg16", "cnn", "--out", str(out)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    line = process.stderr.readline()  # one per measured step
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, line + rest
    assert "0/2 vgg16: 1 of 100 steps" in line
    assert "Traceback" not in rest
    found = results.Results.from_json(json.loads(out.with_suffix(".json").read_text()))
    assert found.interrupted == "0 of 2 nets"
    assert found.trained["vgg16"].records[0].maps
    assert not found.trained["vgg16"].complete
    assert "**Interrupted** after 0 of 2 nets" in out.read_text()


class InterruptedData:
    """Batches that end in Ctrl-C after so many."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def batches(self, net: str, batch: int, seed: int):
        def give():
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return NETS[net].batch(batch)

        return "interrupted", give


def test_a_run_goes_on_where_it_was_interrupted():
    runs = {net: paper.QUICK[net] for net in ("cnn", "transformer-relu", "transformer-gelu")}
    found = results.Results({})
    paper.train_all(runs, InterruptedData(runs["cnn"].steps + 2), 0, found)
    assert found.interrupted == "1 of 3 nets"
    first, second = found.trained["cnn"], found.trained["transformer-relu"]
    assert first.complete
    assert len(second.losses) == 2
    assert not second.complete

    again = results.Results.from_json(json.loads(json.dumps(dataclasses.asdict(found))))
    assert again == found
    again.interrupted = ""
    paper.train_all(runs, paper.Data(None), 0, again)
    assert again.interrupted == ""
    assert again.trained["cnn"] == first
    assert [t.data for t in again.trained.values()] == ["interrupted", "synthetic", "synthetic"]
    assert all(t.complete for t in again.trained.values())


@pytest.mark.data
def test_digits_are_fed_as_images_are(mnist_path):
    data = paper.Data(mnist_path.parent)
    source, batches = data.batches("alexnet", 8, seed=0)
    images, labels = batches()
    assert source == "MNIST"
    assert images.shape == (8, 3, 64, 64)
    assert labels.shape == (8,)
    assert not (images == 0).any()
    assert torch.equal(batches()[0], images) is False
    assert torch.equal(data.batches("alexnet", 8, seed=0)[1]()[0], images)


def test_text_batches_are_shifted_by_one():
    inputs, targets = paper.text_batches("abcd" * 50, 16, 4, seed=0)()
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(targets, (inputs + 1) % 4)


def test_measurements_double_in_distance():
    assert paper.measured_at(300) == [0, 9, 19, 37, 75, 150, 299]
    assert paper.measured_at(3) == [0, 1, 2]
    assert paper.measured_at(1) == [0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "there is no mnist.npz and no tinyshakespeare.txt"),
        (["--synthetic", "--threads", "0"], "takes numbers from 1 on"),
        (["--synthetic", "--out", "nowhere/table.md"], "there is no such folder"),
        (["--synthetic", "--resume", "nowhere.json"], "there is no such file"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as exit_:
        paper.parsed()
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
