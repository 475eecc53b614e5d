"""Every op of the Triton and the CUDA back ends under CUDA graph capture: imitated here, real where there is a GPU.

The imitation (``capturing.py``) refuses what a captured stream refuses, and replays what was captured on new data. So
whatever the host had decided by looking at the data would show as an error or as a wrong answer.

What cannot be captured by nature has a result that the host must know: ``LOOKS``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from capturing import Capture, Refused, on_the_device

import sparsekern as sk
from sparsekern import backends, ops, reference, selftest
from sparsekern.backends import cuda, cuda_launch, cuda_machine, triton
from sparsekern.bench.clock import captured
from sparsekern.samples import Samples

CPU = torch.device("cpu")
LOOKS = {
    "pack_zvc": lambda x: sk.pack_zvc(x),
    "torch.ops.sparsekern.pack_zvc": lambda x: torch.ops.sparsekern.pack_zvc(x),
    "is_24": lambda x: sk.is_24(x),
    "check_24": lambda x: sk.check_24(
        x[:, :2], torch.full((x.shape[0], 1), 0x44, dtype=torch.uint8)
    ),
    "pack_24(prune=False)": lambda x: sk.pack_24(x),
}
CAPTURED = sorted(set(ops.OPS) - {"pack_zvc"})


def dtypes_of(op: str) -> list[torch.dtype]:
    """One of each kind: what a launcher does depends on no more."""
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    return kinds if op.startswith("linear_24") or "prepack" in op else [*kinds, torch.uint8]


def problems(backend, op: str, dtype: torch.dtype, device: torch.device):
    """Arguments of the op, and others of the same shapes."""
    draws = (Samples(dtype, device, seed=seed).of(op, quick=True) for seed in (0, 1))
    for args, other in zip(*draws, strict=True):
        if op == "unpack_zvc":  # how many values there are is part of the shapes
            mask, values, offsets, size = args
            other = mask.clone(), values.roll(1), offsets.clone(), size
        if op == "pack_zvc_out":
            for t in (*args[1:], *other[1:]):
                t.zero_()
        if op in selftest._PREPACKED and op != "prepack_24":
            args, other = (selftest._in_layout_of(backend, op, a) for a in (args, other))
        yield args, other


def everything(args: tuple, out) -> list[torch.Tensor]:
    """All tensors that a call could have written."""
    outs = out if isinstance(out, tuple) else () if out is None else (out,)
    return [t for t in (*args, *outs) if isinstance(t, torch.Tensor)]


def cloned(args: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


def refill(args: tuple, other: tuple) -> None:
    with torch.no_grad():
        for a, o in zip(args, other, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(o)


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert selftest._same_bits(g.detach(), w.detach())


# ---- imitated, in Triton's interpreter ----


@pytest.mark.triton
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("op", CAPTURED)
def test_every_op_is_captured_and_replayed_on_new_data(op, deterministic):
    function = getattr(triton, op)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for dtype in dtypes_of(op):
            for args, other in problems(triton, op, dtype, CPU):
                function(*cloned(args))  # the first call may read what was tuned
                with Capture() as capture:
                    out = function(*args)
                want = cloned(other)
                want = everything(want, function(*want))
                refill(args, other)
                capture.replay()
                assert_same(everything(args, out), want)
                # Prepacking is the identity: torch's copies, no kernel.
                assert capture.launches or op in ("prepack_24", "unprepack_24")
    finally:
        torch.use_deterministic_algorithms(False)


def training(x, values, meta, bias, dy, activation):
    y = sk.linear_24(x, values, meta, bias, activation)
    return y, *torch.autograd.grad(y, (x, values, bias), dy)


def inference_with_gradient(x, values, meta, bias, dy, activation):
    packed = sk.prepack_24(values.detach(), meta)
    y = sk.linear_24_prepacked(x, packed, values.shape[0], bias, activation)
    return y, *torch.autograd.grad(y, (x, bias), dy)


def pruned_in_training(x, values, meta, bias, dy, activation):
    weight = sk.prune_24(sk.unpack_24(values, meta))
    kept, where = sk.pack_24(weight, prune=True)
    y = sk.linear_24(x, kept, where, bias, activation)
    return y, *torch.autograd.grad(y, (x, values, bias), dy)


def step(dtype: torch.dtype, M: int, device: torch.device, seed: int) -> tuple:
    draw = Samples(dtype, device, seed=seed)
    x, (values, meta), bias, dy = (
        draw.dense(M, 72),
        draw.packed(33, 72),
        draw.dense(33),
        draw.dense(M, 33),
    )
    return x.requires_grad_(), values.requires_grad_(), meta, bias.requires_grad_(), dy


@pytest.mark.triton
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("run", [training, inference_with_gradient, pruned_in_training])
def test_gradients_are_captured_and_replayed_on_new_data(run, activation):
    for dtype, M in ((torch.float32, 3), (torch.bfloat16, 40)):
        args, other = (step(dtype, M, CPU, seed) for seed in (0, 1))
        with Capture(strict=False):
            run(*args, activation)
            want = run(*other, activation)
        with Capture() as capture:
            out = run(*args, activation)
        refill(args, other)
        capture.replay()
        assert capture.launches >= 2
        assert_same(list(out), list(want))


@pytest.mark.triton
def test_a_layer_is_captured_in_inference_and_in_training():
    layer = sk.SparseLinear.from_linear(torch.nn.Linear(72, 33), prune=True)
    x, other = torch.randn(3, 72), torch.randn(3, 72)

    def run(x):
        with torch.no_grad():
            y = layer(x)
        return y, *torch.autograd.grad(layer(x).sum(), list(layer.parameters()))

    with Capture(strict=False):
        run(x)
        want = run(other)
    with Capture() as capture:
        out = run(x)
    x.copy_(other)
    capture.replay()
    assert_same(list(out), list(want))


# ---- the launches of the CUDA back end ----


class Noted(cuda_machine.Machine):
    """Carries out nothing."""

    device = cuda_launch.H100

    def __init__(self) -> None:
        self.launches = 0

    def run(self, launch) -> None:
        self.launches += 1


@pytest.mark.triton  # the imitation takes its interpreter along
@pytest.mark.parametrize("op", CAPTURED)
def test_launches_of_the_cuda_back_end_are_captured(op):
    for dtype in dtypes_of(op):
        for args in Samples(dtype, CPU).of(op):
            noted = Noted()
            with cuda_machine.instead(CPU, noted):
                if op in selftest._PREPACKED and op != "prepack_24":
                    args = selftest._in_layout_of(cuda, op, args)
                before = noted.launches
                with Capture(cuda):
                    getattr(cuda, op)(*args)
            moves = op in ("prepack_24", "unprepack_24") or (op.endswith("zvc") and not args[-1][0])
            empty = op == "pack_zvc_out" and not args[0].numel()
            assert noted.launches > before or moves or empty


# ---- what cannot be, and that the imitation finds it ----


@pytest.mark.triton
@pytest.mark.parametrize("name", LOOKS)
def test_what_looks_at_the_data_cannot_be_captured(name):
    x = sk.prune_24(torch.randn(8, 4)).contiguous()
    with Capture(strict=False):
        LOOKS[name](x)
    with Capture(), pytest.raises(Refused):
        LOOKS[name](x)


@pytest.mark.triton
def test_the_check_of_a_stream_would_be_refused(monkeypatch):
    stream = reference.pack_zvc(torch.ones(5000))
    with Capture():
        triton.unpack_zvc(*stream, [5000])
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
        with pytest.raises(Refused, match="tolist"):
            triton.unpack_zvc(*stream, [5000])


@pytest.mark.triton
def test_tuning_and_the_first_look_for_what_was_tuned_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    args = torch.ones(2, 8), *reference.pack_24(torch.ones(4, 8))
    with Capture(), pytest.raises(RuntimeError, match="tune: the stream is being captured"):
        triton.tune("linear_24", *args)
    with Capture(), pytest.raises(Refused, match="_seconds"):
        triton.autotune._seconds(triton.linear_24, args)
    monkeypatch.setattr(triton.autotune, "_chosen", {})
    monkeypatch.setattr(triton.autotune, "_stored", None)
    with Capture(), pytest.raises(Refused, match=r"open: .*triton\.json"):
        triton.linear_24(*args)


_mask = torch.tensor([True, False, True, False])
PLANTED = {  # what a launcher might do, and what is said about it
    "item": (lambda t: t[0].item(), "item"),
    "int": (lambda t: int(t.sum()), "__int__"),
    "float": (lambda t: float(t[0]), "__float__"),
    "if": (lambda t: 1 if t.any() else 0, "__bool__"),
    "index": (lambda t: range(9)[t.long()[0]], "__index__"),
    "tolist": (lambda t: t.tolist(), "tolist"),
    "numpy": (lambda t: t.numpy(), "numpy"),
    "print": (lambda t: f"{t[0]}", "__format__"),
    "nonzero": (lambda t: t.nonzero(), "aten::nonzero"),
    "where": (lambda t: torch.where(t > 0), "aten::nonzero"),
    "equal": (lambda t: torch.equal(t, t + 1), "aten::equal"),
    "is_nonzero": (lambda t: torch.is_nonzero(t[0]), "_local_scalar_dense|is_nonzero"),
    "masked_select": (lambda t: torch.masked_select(t, _mask), "aten::masked_select"),
    "by a mask": (lambda t: t[_mask], "aten::index"),
    "to a mask": (lambda t: t.clone().index_put_((_mask,), t[:2]), "aten::index_put_"),
    "unique": (lambda t: torch.unique(t), "aten::_unique2"),
    "repeat": (lambda t: t.repeat_interleave(t.long()), "aten::repeat_interleave"),
    "cpu": (lambda t: t.cpu(), "Tensor.cpu"),
    "to": (lambda t: t.to("cpu"), "Tensor.to"),
    "to device": (lambda t: t.to(device=CPU, dtype=torch.float64), "Tensor.to"),
    "pin": (lambda t: t.pin_memory(), "pin_memory"),
    "pinned": (lambda t: torch.empty(3, pin_memory=True), "empty"),
    "from the host": (lambda t: torch.tensor([1, 2]), "torch.tensor"),
    "from numpy": (
        lambda t: torch.from_numpy(__import__("numpy").zeros(3)),
        "from_numpy|lift_fresh",
    ),
    "wait": (lambda t: torch.cuda.synchronize(), "torch.cuda.synchronize"),
    "wait for any": (lambda t: torch.accelerator.synchronize(), "torch.accelerator.synchronize"),
    "stream": (lambda t: torch.cuda.Stream.synchronize(None), "Stream.synchronize"),
    "event": (lambda t: torch.cuda.Event.synchronize(None), "Event.synchronize"),
    "query": (lambda t: torch.cuda.Event.query(None), "Event.query"),
    "file": (lambda t: open(__file__).close(), "open: "),
    "memory": (lambda t: __import__("mmap").mmap(-1, 4096), "mmap.__new__"),
    "library": (lambda t: __import__("ctypes").CDLL(None), "ctypes.dlopen"),
    "measure": (lambda t: __import__("triton").testing.do_bench(lambda: t), "do_bench"),
}


@pytest.mark.triton
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("deep", [False, True], ids=["in a call", "in a back end"])
def test_what_a_captured_stream_refuses_is_refused(name, deep, monkeypatch):
    act, said = PLANTED[name]
    t = torch.arange(4.0)
    if deep:  # in the launcher, below torch's dispatcher
        prune = triton.prune_24
        monkeypatch.setattr(triton, "prune_24", lambda w: (act(w[:4]), prune(w))[1])
    with Capture(), pytest.raises(Refused, match=said):
        sk.prune_24(t) if deep else act(t)


@pytest.mark.triton
def test_what_the_host_decided_by_an_older_look_shows_in_the_replay():
    t = torch.ones(4)
    decided = bool(t[0] > 0)
    with Capture() as capture:
        out = t * 2 if decided else t * 3
    t.copy_(-torch.ones(4))
    capture.replay()
    assert torch.equal(out, torch.full((4,), -2.0))  # right would be -3: the captured choice stays


@pytest.mark.triton
def test_the_device_may_do_what_it_likes():
    t = torch.ones(4)
    with Capture():
        with on_the_device():
            assert t[0].item() == 1
        with pytest.raises(Refused):
            t[0].item()


# ---- real ----


def graphed(call):
    """What replays the graph of `call`, and what it returned under capture."""
    outs = []
    replay = captured(lambda i: outs.append(call()))
    return lambda: replay(0), outs[-1]


@pytest.fixture(params=["triton", "cuda"])
def on_gpu(request):
    """Each back end of a GPU."""
    backend, device = backends.load(request.param), torch.device("cuda", 0)
    if reason := backend.unavailable(device):
        pytest.skip(f"{request.param}: {reason}")
    return backend


@pytest.mark.cuda
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("op", CAPTURED)
def test_a_graph_of_every_op_replays_as_eager_calls(on_gpu, op, deterministic):
    function = getattr(on_gpu, op)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for dtype in dtypes_of(op):
            for args, other in problems(on_gpu, op, dtype, torch.device("cuda", 0)):
                replay, out = graphed(lambda args=args: function(*args))
                want = cloned(other)
                want_out = function(*want)
                refill(args, other)
                replay()
                torch.cuda.synchronize()
                if op == "pack_zvc_out" and not deterministic:  # tiles in any order
                    x, mask, values, offsets, count = args
                    assert selftest.check_zvc(x, mask, values[: int(count)], offsets) is None
                else:
                    assert_same(everything(args, out), everything(want, want_out))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("run", [training, inference_with_gradient, pruned_in_training])
def test_a_graph_of_a_step_replays_as_eager_calls(run, activation):
    device = torch.device("cuda", 0)
    if reason := triton.unavailable(device):
        pytest.skip(f"triton: {reason}")
    for dtype, M in ((torch.float32, 3), (torch.bfloat16, 40)):
        args, other = (step(dtype, M, device, seed) for seed in (0, 1))
        want = run(*other, activation)
        replay, out = graphed(lambda args=args: run(*args, activation))
        refill(args, other)
        replay()
        torch.cuda.synchronize()
        for got, expected in zip(out, want, strict=True):
            torch.testing.assert_close(got, expected)


CAPTURE_PACK_ZVC = """
import torch
from sparsekern import backends
pack_zvc, x = backends.load({name!r}).pack_zvc, torch.ones(100, device="cuda")
pack_zvc(x)
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        pack_zvc(x)
except RuntimeError:
    print("refused")
"""


@pytest.mark.cuda
def test_a_graph_of_pack_zvc_is_refused(on_gpu):
    # In a process of its own: a capture that failed may leave its mark.
    code = CAPTURE_PACK_ZVC.format(name=on_gpu.__name__.rpartition(".")[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr
