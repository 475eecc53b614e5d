"""offload_activations changes where saved tensors are, and nothing else: gradients, strides, errors stay."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sparsekern.offload import context
from sparsekern.offload.transfer import Part

TO = ["cpu", "device", "auto"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=TO)
def offload(request, offloads):
    return offloads(request.param)


def bits(t: Tensor) -> Tensor:
    return t.detach().resolve_conj().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert torch.equal(bits(got), bits(want))


def gradients(scenario, offload=None) -> list[Tensor]:
    """`scenario()` gives a loss and the leaves whose gradients are wanted."""
    torch.manual_seed(0)
    with offload or contextlib.nullcontext():
        loss, leaves = scenario()
    loss.backward()
    return [t.grad for t in leaves]


def check(scenario, offload) -> None:
    """With it the same gradients as without, and not because nothing was packed."""
    want, got = gradients(scenario), gradients(scenario, offload)
    assert any(g.count_nonzero() for g in want)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)
    assert offload.stats.total.packed.total()


class Block(nn.Module):
    """A transformer's block with squared ReLU."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = self.up(x).relu()
        return x + F.dropout(self.down(h * h), 0.1)


class Transformer(nn.Module):
    def __init__(self, layers: int = 2, wrap=None):
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.wrap = wrap or (lambda block, x: block(x))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.wrap(block, x)
        return F.cross_entropy((x @ self.embedding.weight.T).flatten(0, 1), tokens.flatten())


def tokens(device) -> Tensor:
    return torch.randint(64, (4, 16), device=device)


def transformer(device, wrap=None):
    model = Transformer(wrap=wrap).to(device)
    return model(tokens(device)), list(model.parameters())


def convolutional(device):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Conv2d(16, 8, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 10),
    ).to(device, memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    return F.cross_entropy(model(images), torch.arange(4, device=device)), list(model.parameters())


def recurrent(device):
    model = nn.GRU(8, 16, num_layers=2, dropout=0.2).to(device)
    return model(torch.randn(5, 3, 8, device=device))[0].square().sum(), list(model.parameters())


def autocast(device):
    model = Transformer().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        return model(tokens(device)), list(model.parameters())


@pytest.mark.parametrize("scenario", [transformer, convolutional, recurrent, autocast])
def test_models(scenario, offload, device):
    check(lambda: scenario(device), offload)


# ---- every layout and dtype ----


class Save(torch.autograd.Function):
    """Saves tensors of any kind. They are read back by `grad_fn.saved_tensors`, outside any backward."""

    @staticmethod
    def forward(ctx, x, *saved):
        ctx.save_for_backward(*saved)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient, *[None] * len(ctx.saved_tensors))


def save(*tensors: Tensor) -> Tensor:
    """A function's output: the graph that holds the tensors."""
    return Save.apply(torch.zeros(1, requires_grad=True), *tensors)


MEMORY = 6144  # elements
LAYOUTS = {
    "contiguous": lambda m: m.view(24, 32, 8),
    "channels last": lambda m: m.view(2, 16, 12, 16).permute(0, 3, 1, 2),
    "transposed": lambda m: m.view(64, 96).t(),
    "attention's heads": lambda m: m.view(2, 48, 4, 16).transpose(1, 2),
    "expanded": lambda m: m[:512].view(1, 512).expand(7, 512),
    "expanded inside": lambda m: m[:640].view(64, 1, 10).expand(64, 5, 10),
    "expanded, with gaps": lambda m: m.view(64, 1, 96)[..., 5:8].expand(64, 5, 3),
    "rows": lambda m: m.view(64, 96)[3:40],
    "columns": lambda m: m.view(64, 96)[:, 5:9],
    "more than half of the columns": lambda m: m.view(64, 96)[:, 5:90],
    "every third": lambda m: m[1::3],
    "overlapping": lambda m: m.as_strided((50, 20), (10, 1), 7),
    "overlapping, with gaps": lambda m: m.as_strided((2, 3, 2), (1, 1, 1000), 11),
    "unused strides": lambda m: m.as_strided((1, 64, 1), (999, 1, 0), 3),
    "one element": lambda m: m[7:8],
    "no dimension": lambda m: m[8],
    "no element": lambda m: m.view(64, 96)[:, 96:],
}
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.complex32,
    torch.int64,
    torch.uint64,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def memory(dtype: torch.dtype, device) -> Tensor:
    """Random bits, also those of NaN, denormals and -0, and half of the elements zero; a bool's are 0 or 1."""
    nonzero = torch.rand(MEMORY) < 0.5
    if dtype is torch.bool:
        return nonzero.to(device)
    random = torch.randint(256, (MEMORY, dtype.itemsize), dtype=torch.uint8)
    return (random * nonzero[:, None]).flatten().view(dtype).to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout, offload, device):
    torch.manual_seed(0)
    for dtype in DTYPES:
        saved = LAYOUTS[layout](memory(dtype, device))
        want, like = saved.clone(), (saved.shape, saved.dtype, saved.stride(), saved.device)
        with offload:
            graph = save(saved)
        dead = weakref.ref(saved)
        del saved
        assert dead() is None  # what comes back is no longer the tensor that was saved
        for _ in range(2):
            (got,) = graph.grad_fn.saved_tensors
            assert (got.shape, got.dtype, got.stride(), got.device) == like
            assert_same_bits(got, want)
            del got
    total = offload.stats.total
    assert total.seen == len(DTYPES)
    if offload._policy.to == "cpu":  # nothing is too dense for the host
        assert total.packed.total() == (len(DTYPES) if want.numel() else 0)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, [0x8000, 0x7C01, 0xFC00, 0x0001]),
        (torch.bfloat16, [0x8000, 0x7F81, 0xFF80, 0x0001]),
        (torch.float32, [0x80000000, 0x7F800001, 0xFF800000, 0x00000001]),
        (torch.float64, [0x8000000000000000, 0x7FF0000000000001, 0xFFF0000000000000, 1]),
    ],
    ids=str,
)
def test_negative_zero_and_nan_and_infinity_and_denormal(dtype, words, offload):
    """Each among many zeros, so that all are zero-value compressed."""
    special = torch.tensor(words, dtype=torch.uint64).to(
        {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[dtype.itemsize]
    )
    saved = torch.zeros(4096, dtype=dtype)
    saved[::1024] = special.view(dtype)
    want = bits(saved).clone()
    with offload:
        graph = save(saved)
    del saved
    assert offload.stats.total.packed == {"zvc": 1}
    (got,) = graph.grad_fn.saved_tensors
    assert torch.equal(bits(got), want)
    assert offload.stats.total.nonzeros == 4


def test_booleans_of_other_memory(offload):
    """A byte that is neither 0 nor 1, seen as bool, comes back as it was."""
    saved = torch.tensor([0, 1, 2, 255] * 1000, dtype=torch.uint8)
    want = saved.clone()
    with offload:
        graph = save(saved.view(torch.bool))
    del saved
    assert torch.equal(graph.grad_fn.saved_tensors[0].view(torch.uint8), want)


# ---- what is saved is as it was, or an error ----


def written_input(x):
    h = x * 2
    return (h * h).sum(), h.add_


def written_output(x):
    h = x.exp()
    return h.sum(), h.add_


def written_leaf(x):
    def write(value):
        with torch.no_grad():
            x.add_(value)

    return (x * x).sum(), write


def written_constant(x):
    weight = torch.randn(x.shape[1], 7)
    return (x @ weight).sum(), weight.add_


def written_view(x):
    h = x * 2
    return (h.view(-1) * h.view(-1)).sum(), h[0].add_


def written_through_a_view_of_the_output(x):
    h = x.tanh()
    return h.sum(), h[1:].mul_


def written_to_what_two_share(x):
    h = x * 2
    return (h.sin() + h.cos() + h.t().square().t()).sum(), h.add_


def written_indices(x):
    index = torch.arange(x.shape[1]).repeat(x.shape[0], 1)
    return x.gather(1, index).sum(), index.mul_


def written_in_a_function(x):
    h = x * 2
    return (Save.apply(x, h) + x).sum(), h.mul_


WRITES = [
    written_input,
    written_output,
    written_leaf,
    written_constant,
    written_view,
    written_through_a_view_of_the_output,
    written_to_what_two_share,
    written_indices,
    written_in_a_function,
]


def message(program, offload=None) -> str:
    torch.manual_seed(0)
    x = torch.randn(40, 50, requires_grad=True) if program is written_leaf else None
    with offload or contextlib.nullcontext():
        x = torch.randn(40, 50, requires_grad=True) * 1 if x is None else x
        loss, write = program(x)
    write(2)
    with pytest.raises(RuntimeError) as raised:
        loss.backward()
    return str(raised.value)


@pytest.mark.parametrize("anomaly", [False, True])
@pytest.mark.parametrize("min_bytes", [0, 1 << 30], ids=["packed", "kept"])
@pytest.mark.parametrize("program", WRITES)
@pytest.mark.filterwarnings("ignore:.*Error detected in:UserWarning")  # of the anomaly mode
def test_writing_to_what_is_saved_is_found_out(program, min_bytes, anomaly, offloads):
    """With torch's words; of an input they name the writer, which a hook does not see, here who made it."""
    with torch.autograd.set_detect_anomaly(anomaly, check_nan=False):
        # Older torch calls the writer by its node, ExpBackward0; newer, and what is said here, by its op, Exp.
        want = re.sub(r"(which is output \d of \w+?)Backward\d*,", r"\1,", message(program))
        assert "modified by an inplace operation" in want
        for to in TO:
            got = message(program, offloads(to, min_bytes=min_bytes))
            if program in (written_output, written_leaf, written_constant, written_indices):
                assert got == want
            made_by = r", which is output \d of \w+,"
            assert re.sub(made_by, "", got) == re.sub(made_by, "", want)


def test_writing_before_and_beside_is_allowed(offload, device):
    def scenario():
        x = torch.randn(40, 50, device=device, requires_grad=True)
        h = (x * 2).relu_().mul(1)
        h[1:].mul_(3)
        y = h * h
        other = h.clone()
        other.zero_()
        return (y * h.detach()).sum(), [x]

    check(scenario, offload)


class Writes(torch.autograd.Function):
    """Its backward writes to what it saved, as nothing should."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.mul_(2)


def test_backward_that_writes_to_what_it_saved(offload):
    """Never an answer that is wrong: another node that saved the same gets it as it was, or raises."""

    def scenario(keep=None):
        x = torch.randn(1000, requires_grad=True)
        h = (x * 1).relu()
        if keep is not None:
            keep.append(h)
        return (h.square() + Writes.apply(h)).sum(), [x]

    torch.manual_seed(0)
    with offload:
        loss, (x,) = scenario()
    loss.backward()
    torch.testing.assert_close(x.grad, 4 * x.detach().relu())

    alive: list[Tensor] = []
    with offload:
        loss, _ = scenario(alive)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Returns(torch.autograd.Function):
    """Its backward gives the very tensor it saved as a gradient, or a view of it."""

    @staticmethod
    def forward(ctx, x, saved, view):
        ctx.save_for_backward(saved)
        ctx.view = view
        return x * saved

    @staticmethod
    def backward(ctx, _):
        (saved,) = ctx.saved_tensors
        return saved.view_as(saved) if ctx.view else saved, None, None


@pytest.mark.parametrize("view", [False, True])
def test_backward_that_returns_what_it_saved(view, offload, device):
    """Others are added to the gradient, in place where torch may, while a later node needs the same tensor."""

    def scenario():
        x = torch.randn(1000, device=device, requires_grad=True)
        h = (x * 1).relu()
        last = h * h
        added = h * 3
        first = Returns.apply(h, h, view)
        return first.sum() + (added.sum() + last.sum()), [x]

    check(scenario, offload)


@pytest.mark.parametrize("alive", [True, False], ids=["alive", "decoded"])
def test_gradients_do_not_take_over_what_is_saved(alive, offload):
    """Three backwards through one graph add up to a gradient; the caller's tensor stays as it was."""
    x = torch.zeros(1000, requires_grad=True)
    saved = torch.randn(1000).relu()
    want = saved.clone()
    with offload:
        loss = Returns.apply(x, saved, False).sum()
    if not alive:
        del saved
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert torch.equal(x.grad, times * want)
    if alive:
        x.grad.zero_()
        assert torch.equal(saved, want)


class WritesAndReturns(Writes):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return x.mul_(2)


def test_a_gradient_that_was_made_of_what_is_saved(offload):
    """It is in use, as a gradient, when the next node asks for what they share."""
    torch.manual_seed(0)
    x = torch.randn(1000, requires_grad=True)
    with offload:
        h = (x * 1).relu()
        y = h * h
        loss = WritesAndReturns.apply(h).sum() + y.sum()
        del h, y
    loss.backward()
    assert torch.equal(x.grad, 4 * x.detach().relu())


# ---- several backwards, several forwards ----


def polynomial(device):
    x = torch.randn(64, 50, device=device, requires_grad=True)
    h = (x * 1).relu()
    return x, (h * h * h).sum() + (h.exp() * h).sum()


def test_a_retained_graph(offload, device):
    torch.manual_seed(0)
    x, loss = polynomial(device)
    (want,) = torch.autograd.grad(loss, x)
    torch.manual_seed(0)
    with offload:
        x, loss = polynomial(device)
    for _ in range(3):
        (got,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert_same_bits(got, want)


@pytest.mark.parametrize("inside", [False, True])
def test_second_and_third_derivatives(inside, offload, device):
    def derivatives(offload):
        torch.manual_seed(0)
        with contextlib.ExitStack() as stack:
            if offload is not None:
                stack.enter_context(offload)
            x, y = polynomial(device)
            if not inside:
                stack.close()
            for _ in range(3):
                (gradient,) = torch.autograd.grad(y, x, create_graph=True)
                y = gradient.square().sum()
        return gradient

    assert_same_bits(derivatives(offload), derivatives(None))


def test_reading_what_a_node_saved(offload):
    x = torch.randn(64, 50, requires_grad=True) * 1
    with offload:
        y = x.exp()
        z = x.square()
    want_y, want_x = y.detach().clone(), x.detach().clone()
    nodes = y.grad_fn, z.grad_fn
    del x, y, z
    for _ in range(2):
        assert torch.equal(nodes[0]._saved_result, want_y)
        assert torch.equal(nodes[1]._saved_self, want_x)
    del nodes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_forwards_before_their_backwards(order, offload, device):
    """As pipelines do."""
    model = Transformer().to(device)
    inputs = [tokens(device) for _ in order]

    def run(offload):
        model.zero_grad()
        losses = []
        for i, batch in enumerate(inputs):
            torch.manual_seed(i)
            with offload or contextlib.nullcontext():
                losses.append(model(batch))
        for i in order:
            losses[i].backward()
            losses[i] = None
        return [p.grad for p in model.parameters()]

    for got, want in zip(run(offload), run(None), strict=True):
        assert_same_bits(got, want)


# ---- one memory, one packed object ----


def test_views_share_one_packed_object(offloads):
    offload = offloads()
    memory = torch.randn(40, 100)
    with offload:
        graph = save(memory, memory.view(-1), memory.t(), memory[3:7], memory.expand(5, 40, 100))
    del memory
    total = offload.stats.total
    assert (total.seen, total.shared, total.packed) == (5, 4, {"raw": 1})
    assert total.bytes_before == offload.stats.ledger.now["plain"] == 16000
    whole, flat, transposed, rows, expanded = graph.grad_fn.saved_tensors
    assert flat.data_ptr() == whole.data_ptr() == expanded.data_ptr()  # decoded once
    for got, want in ((flat, whole.view(-1)), (transposed, whole.t()), (rows, whole[3:7])):
        assert_same_bits(got, want)
        assert got.stride() == want.stride()


def test_equal_shapes_of_other_strides_are_other_tensors(offloads):
    """A square matrix and its transpose, one memory."""
    offload = offloads()
    matrix = torch.randn(50, 50)
    with offload:
        graph = save(matrix, matrix.t())
    want = matrix.clone()
    del matrix
    straight, transposed = graph.grad_fn.saved_tensors
    assert torch.equal(straight, want)
    assert torch.equal(transposed, want.t())


def test_one_memory_as_two_dtypes(offloads):
    offload = offloads()
    memory = torch.randn(500)
    with offload:
        graph = save(memory, memory.view(torch.int32))
    want = memory.clone()
    del memory
    assert offload.stats.total.shared == 0
    floats, integers = graph.grad_fn.saved_tensors
    assert torch.equal(floats, want)
    assert torch.equal(integers, want.view(torch.int32))


def test_columns_are_gathered(offloads):
    offload = offloads()
    memory = torch.randn(100, 10)
    with offload:
        few, most = save(memory[:, :7]), save(memory[:, :8])
    # 7 of 10 columns alone; 8 of 10 with what is between, up to the last element: 99 * 10 + 8
    assert offload.stats.total.bytes_before == 4 * (100 * 7 + 998)
    want = memory.clone()
    del memory
    for graph, n in ((few, 7), (most, 8)):
        (got,) = graph.grad_fn.saved_tensors
        assert torch.equal(got, want[:, :n])
        assert got.stride() == (10, 1)


def test_the_halves_of_a_gated_unit_are_not_held_twice(offloads):
    def scenario():
        x = torch.randn(64, 200, requires_grad=True)
        gate, value = (x * 1).chunk(2, -1)
        return (F.silu(gate) * value).sum(), [x]

    offload = offloads()
    check(scenario, offload)
    # x · 1, and silu's output
    assert offload.stats.peak_bytes["plain"] == 4 * 64 * (200 + 100)


def test_columns_of_what_is_packed_are_not_packed_again(offloads):
    offload = offloads()
    memory = torch.randn(100, 10)
    with offload:
        graph = save(memory, memory[:, 2:4])
    want = memory.clone()
    del memory
    assert offload.stats.total.shared == 1
    whole, columns = graph.grad_fn.saved_tensors
    assert torch.equal(whole, want)
    assert torch.equal(columns, want[:, 2:4])
    assert columns.stride() == (10, 1)


def test_an_address_that_is_used_again(offloads):
    """Freed memory is handed out again at once: other values, another packed object."""
    offload = offloads()
    x = torch.randn(5000, requires_grad=True)
    addresses, loss = set(), 0.0
    with offload:
        for i in range(20):
            h = x * i
            addresses.add(h.data_ptr())
            loss = loss + h.square().sum()
            del h
    assert len(addresses) < 20
    assert offload.stats.total.shared == 0
    loss.backward()
    torch.testing.assert_close(x.grad, x.detach() * sum(2 * i * i for i in range(20)))


def test_memory_that_was_written_to_is_another(offloads):
    """Saved, written to, saved again: two packed objects."""
    offload = offloads()
    memory = torch.randn(1000)
    first = memory.clone()
    with offload:
        before = save(memory)
        memory.mul_(2)
        after = save(memory)
    assert offload.stats.total.shared == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.grad_fn.saved_tensors  # noqa: B018
    del memory
    assert torch.equal(after.grad_fn.saved_tensors[0], 2 * first)
    del before, after


def test_memory_with_two_counters(offloads):
    """Of `.data`, what is written is not seen by the tensor it came from. As little may one's bytes serve the other."""
    offload = offloads()
    memory = torch.randn(1000)
    other = memory.data
    with offload:
        graph = save(memory)
        other.add_(1)
        graph = graph, save(other)
    want = other.clone()
    del memory, other
    assert torch.equal(graph[1].grad_fn.saved_tensors[0], want)


def test_the_original_serves_while_somebody_holds_it(offload):
    memory = torch.randn(1000).relu()
    with offload:
        graph = save(memory)
    (got,) = graph.grad_fn.saved_tensors
    assert got.data_ptr() == memory.data_ptr()


# ---- parameters and buffers ----


def parameters_of(offload) -> int:
    return offload.stats.total.kept["param"]


def test_weights_are_left_alone_as_views_too(offload, device):
    """F.linear saves `weight.t()`, a tensor that is no Parameter."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 40), nn.Linear(40, 5)).to(device)
    batch = torch.randn(8, 20, device=device)
    with offload:
        model(batch).sum().backward()
    total = offload.stats.total
    assert total.kept["param"] == 2  # the first layer has no use for its own
    assert total.seen == 5
    assert offload.stats.peak_bytes["plain"] == 4 * 8 * (20 + 30 + 40)


def test_frozen_weights_with_adapters(offloads):
    """The base is frozen, low-rank matrices beside it are trained."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(64, 64).requires_grad_(False)
            self.down = nn.Linear(64, 4, bias=False)
            self.up = nn.Linear(4, 64, bias=False)

        def forward(self, x):
            return (self.base(x) + self.up(self.down(x))).relu()

    def scenario():
        model = nn.Sequential(Adapted(), Adapted())
        trained = [p for p in model.parameters() if p.requires_grad]
        return model(torch.randn(16, 64)).sum(), trained

    offload = offloads()
    check(scenario, offload)
    weights = 64 * 64 * 4
    assert parameters_of(offload) == 4  # the first module's up; the second's base, down and up
    assert offload.stats.peak_bytes["plain"] < weights
    assert offload.stats.total.bytes_before < weights


def test_autocast_copies_of_weights_are_left_alone(offloads, device):
    offload = offloads()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(device)
    with offload, torch.autocast(device.type, torch.bfloat16):
        loss = model(torch.randn(16, 64, device=device)).square().mean()
    assert parameters_of(offload) == 1
    assert offload.stats.peak_bytes["plain"] < 64 * 64 * 4
    loss.backward()


def test_tied_weights_and_buffers(offload):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 20)
            self.out = nn.Linear(20, 50, bias=False)
            self.out.weight = self.embedding.weight
            self.register_buffer("scale", torch.rand(6, 20))

        def forward(self, index):
            return self.out(self.embedding(index) * self.scale)

    model = Tied()
    with offload:
        loss = model(torch.arange(6)).sum()
    assert parameters_of(offload) == 2  # the scale, and the weight as out's
    assert offload.stats.peak_bytes["plain"] == 6 * 8 + 6 * 20 * 4  # indices, input of out
    loss.backward()


@pytest.mark.parametrize("as_list", [False, True])
def test_keep(as_list, offloads):
    """What no module that runs inside owns can be named."""
    constant, module = torch.rand(100, 10), nn.BatchNorm1d(10)
    keep = [constant, module] if as_list else constant
    offload = offloads(keep=keep)
    with offload:
        loss = (torch.randn(100, 10, requires_grad=True) * constant).sum()
    assert offload.stats.total.kept == {"param": 1}
    loss.backward()


def test_leaves_are_left_alone(offload):
    """The graph holds them anyway, for their gradients."""
    x = torch.randn(100, 10, requires_grad=True)
    with offload:
        loss = (x.t() @ x).sum() + x.exp().sum()
    assert offload.stats.total.seen - parameters_of(offload) == 1  # exp's output
    loss.backward()


def test_lazy_modules(offload):
    def scenario():
        model = nn.Sequential(nn.LazyLinear(30), nn.ReLU(), nn.LazyLinear(5))
        return model(torch.randn(8, 20)).sum(), list(model.parameters())

    check(scenario, offload)


def test_parameters_given_by_functional_call(offload):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(8, 20, requires_grad=True)
    with offload:
        loss = torch.func.functional_call(model, frozen, x * 1).sum()
    assert parameters_of(offload) == 2
    loss.backward()


@pytest.fixture(scope="module")
def mesh():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_fully_sharded(dtype, mesh, offload):
    """Parameters exist as shards, and are gathered for a block's forward and freed after it."""
    policy = MixedPrecisionPolicy(param_dtype=dtype)

    def scenario():
        model = nn.Sequential(
            *(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(3))
        )
        model[1].requires_grad_(False)
        for block in model:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model(torch.randn(4, 16)).square().mean(), list(model.parameters())

    want, got = gradients(scenario), gradients(scenario, offload)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert_same_bits(g.to_local(), w.to_local())
    assert parameters_of(offload) == 5  # all but the first linear layer's
    assert offload.stats.peak_bytes["plain"] < 16 * 64 * 4


def test_distributed_tensors(mesh, offload):
    def scenario():
        model = nn.Linear(16, 16)
        for name, p in model.named_parameters():
            sharded = distribute_tensor(p.detach(), mesh, [Replicate()])
            setattr(model, name, nn.Parameter(sharded))
        x = distribute_tensor(torch.randn(4, 16), mesh, [Shard(0)])
        return model(x).relu().square().sum().to_local(), list(model.parameters())

    want, got = gradients(scenario), gradients(scenario, offload)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g.to_local(), w.to_local())
    assert offload.stats.total.kept["subclass"] == 3


# ---- what is not a plain tensor is passed through ----


def conjugate():
    x = torch.randn(30, 30, dtype=torch.complex64, requires_grad=True)
    return ((x * 1).conj() @ (x * 2)).abs().sum(), [x]


def sparse():
    x = torch.randn(20, 20, requires_grad=True)
    coo, csr = (x * 1).to_sparse(), (x * 1).to_sparse_csr()
    return (torch.sparse.mm(coo, x) + csr @ x).square().sum(), [x]


def onednn():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    return (x * 1).to_mkldnn().relu().to_dense().square().sum(), [x]


def nested(layout):
    def scenario():
        x = torch.nested.nested_tensor(
            [torch.randn(2, 5), torch.randn(4, 5)], layout=layout, requires_grad=True
        )
        h = torch.relu(x * 1)
        return torch.nested.to_padded_tensor(h * h, 0.0).sum(), [x]

    return scenario


def inference():
    with torch.inference_mode():
        constant = torch.rand(20)
    x = torch.randn(20, requires_grad=True)
    with torch.no_grad():
        product = constant * 1
    return (x * product).sum(), [x]


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:.*beta state:UserWarning")
@pytest.mark.parametrize(
    "scenario",
    [conjugate, sparse, onednn, inference, nested(torch.strided), nested(torch.jagged)],
    ids=["conjugate", "sparse", "onednn", "inference", "nested", "jagged"],
)
def test_other_tensors(scenario, offload):
    want, got = gradients(scenario), gradients(scenario, offload)
    for g, w in zip(got, want, strict=True):
        if g.is_nested:
            g, w = (torch.nested.to_padded_tensor(t, 0.0) for t in (g, w))
        assert_same_bits(g, w)
    assert offload.stats.total.seen


def test_transforms_are_refused_by_torch(offload):
    """Saved-tensor hooks and torch.func do not go together; torch says so."""
    with offload, pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: x.square().sum())(torch.randn(5))


# ---- contexts in contexts ----


def test_a_context_of_no_hooks_opts_out(offloads):
    offload = offloads()
    x = torch.randn(100, requires_grad=True) * 1
    with offload:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            inner = x.exp()
        outer = x.sin()
    assert offload.stats.total.seen == 1
    (inner + outer).sum().backward()


def test_an_offload_in_an_offload(offloads, device):
    """The innermost gets the tensors, and the modules that run inside it."""
    outer, inner = offloads("cpu"), offloads("device")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 30), nn.Linear(30, 40), nn.Linear(40, 10)
            self.inside = contextlib.nullcontext()

        def forward(self, x):
            h = self.a(x).relu()
            with self.inside:
                h = self.b(h).relu()
            return self.c(h)

    def scenario(inside=None):
        model = Model().to(device)
        model.inside = inside or model.inside
        return model(torch.randn(8, 20, device=device)).sum(), list(model.parameters())

    want, got = gradients(scenario), gradients(lambda: scenario(inner), outer)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)
    assert set(outer.stats.modules) == {"Model", "a", "c"}
    assert set(inner.stats.modules) == {"", "Linear"}


def test_an_offload_entered_again_inside_itself(offload, device):
    def scenario():
        with offload:
            model = nn.Linear(20, 30).to(device)
            h = model(torch.randn(8, 20, device=device)).relu()
        return h.square().sum(), list(model.parameters())

    want, got = gradients(lambda: scenario()), gradients(scenario, offload)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


def test_backward_inside(offload, device):
    def scenario():
        model = Transformer().to(device)
        model(tokens(device)).backward()
        first = [p.grad.clone().requires_grad_() for p in model.parameters()]
        return sum(t.sum() for t in first) + model(tokens(device)), [*first, *model.parameters()]

    check(scenario, offload)


# ---- recomputation ----

CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(
            lambda _, op, *args, **kwargs: (
                CheckpointPolicy.MUST_SAVE
                if op is torch.ops.aten.addmm.default
                else CheckpointPolicy.PREFER_RECOMPUTE
            )
        ),
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(kind, offload, device):
    def wrap(block, x):
        return checkpoint(block, x, **CHECKPOINTS[kind])

    check(lambda: transformer(device, wrap), offload)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointed_blocks_save_their_inputs_only(kind, offloads):
    offload = offloads()
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32)) for _ in range(5))
    )
    x = torch.randn(8, 32, requires_grad=True) * 1
    with offload:
        for block in model:
            x = checkpoint(block, x, **CHECKPOINTS[kind])
        loss = x.sum()
    total = offload.stats.total
    # With each, torch 2.11 saves an empty tensor of its own too.
    extra = sum(total.kept.values())
    assert extra in (0, 5)
    assert (total.seen - extra, total.packed) == (5, {"raw": 5})
    assert offload.stats.ledger.now == {
        "plain": 5 * 8 * 32 * 4,
        "device": 0,
        "host": 5 * 8 * 32 * 4,
    }
    loss.backward()


def test_recomputation_that_saves_a_view_of_the_input(offload, device):
    """The view outlives the node whose saved tensor it looks at."""

    def block(x):
        return torch.tanh(x.view(-1, 10).t() @ x.view(-1, 10)) * x.view(-1)[:100].view(10, 10)

    def scenario():
        x = torch.randn(40, 50, device=device, requires_grad=True)
        return checkpoint(block, (x * 1).relu(), use_reentrant=False).sum(), [x]

    check(scenario, offload)


def test_reentrant_checkpoints_sixty_deep(offload):
    """From a depth of sixty on, backward goes on in a thread of its own, with the hooks but without the context."""

    def deep(x, depth):
        if not depth:
            return (x * 2).sin()
        return checkpoint(lambda y: deep(y * 1.01, depth - 1), x, use_reentrant=True)

    def gradient(offload):
        torch.manual_seed(0)
        x = torch.randn(64, requires_grad=True)
        with offload or contextlib.nullcontext():
            deep(x, 70).sum().backward()
        return x.grad

    assert_same_bits(gradient(offload), gradient(None))
    assert offload.stats.total.seen > 70


# ---- compiled ----


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        h = self.up(x).relu()
        return F.dropout(self.norm(self.down(h * h)), 0.1)


@pytest.mark.parametrize(
    ("backend", "in_place"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compiled_models(backend, in_place, offloads, device):
    """Once, whatever the number of steps."""
    offload = offloads()
    compiler = CompileCounterWithBackend(backend)

    def steps(offload):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Compiled().to(device)
        if in_place:
            model.compile(backend=compiler, fullgraph=True)
            run = model
        else:
            run = torch.compile(model, backend=compiler, fullgraph=True)
        for _ in range(10):
            with offload or contextlib.nullcontext():
                loss = run(torch.randn(32, 16, device=device)).square().sum()
            loss.backward()
        return [p.grad for p in model.parameters()]

    got = steps(offload)
    assert compiler.frame_count == 1
    want = steps(None)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)
    assert offload.stats.total.packed["zvc"] >= 10
    torch._dynamo.reset()


# ---- threads ----


def thread_of(offload, seed: int, rounds: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(rounds):
        x = torch.randn(1 << 14, generator=generator).requires_grad_()
        # Each time as many zeros, elsewhere: masks are compared.
        kept = (torch.randperm(1 << 14, generator=generator) < 1 << 12).float()
        with offload or contextlib.nullcontext():
            h = x * kept
            loss = (h.sin() * h.square()).sum()
            del h
        loss.backward()
        results.append(x.grad)
    return results


@pytest.mark.parametrize("shared", [False, True], ids=["a context each", "one context"])
def test_threads(shared, offloads, monkeypatch):
    here = Part.here

    def here_after_others(part):
        time.sleep(1e-3)
        return here(part)

    monkeypatch.setattr(Part, "here", here_after_others)
    made = [offloads("device")] * 4 if shared else [offloads("device") for _ in range(4)]
    want = [thread_of(None, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(thread_of, made, range(4)))
    for g, w in zip(got, want, strict=True):
        for a, b in zip(g, w, strict=True):
            assert_same_bits(a, b)
    assert sum(o.stats.total.packed["zvc"] for o in set(made)) >= 4 * 10


def test_a_thread_that_entered_nothing_saves_as_ever(offloads):
    offload = offloads()
    x = torch.randn(100, requires_grad=True) * 1
    with offload:
        other = threading.Thread(target=lambda: x.exp())
        other.start()
        other.join()
    assert offload.stats.total.seen == 0
    assert not context.names._active


def test_a_graph_made_in_one_thread_and_walked_in_another(offload):
    def scenario():
        x = torch.randn(100, requires_grad=True)
        return (x * 1).relu().square().sum(), [x]

    torch.manual_seed(0)
    with offload:
        loss, (x,) = scenario()
    other = threading.Thread(target=loss.backward)
    other.start()
    other.join()
    assert_same_bits(x.grad, gradients(scenario)[0])
