"""Every differentiable operator of torch: its gradients are the same, bit for bit, inside the context and outside.

The samples come from ``op_db``, the operator database of torch's own tests.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from sparsekern.offload import ActivationOffload, context

SAMPLES = 3  # of each operator and dtype, each contiguous and not
PARTS = 4  # tests that share the operators of a dtype

# torch saves rrelu's noise before the kernel writes it, so every hook that copies gets what the memory held
# before: https://github.com/pytorch/pytorch/issues/193671. The last test here fails once that is mended.
SAVED_BEFORE_WRITTEN = {"nn.functional.rrelu"}

# An operator that does not take this sample, or has no gradient for it.
REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError)


def zvc() -> ActivationOffload:
    """All but booleans and small integers by zvc and in place, also what that makes larger."""
    return ActivationOffload("device", 0, None, 1e-9, 2, ())


def host() -> ActivationOffload:
    return ActivationOffload("cpu", 0, None, 1.25, 2, ())


def auto() -> ActivationOffload:
    return ActivationOffload("auto", 0, None, 1.25, 2, ())


def named(op) -> str:
    return f"{op.name}.{op.variant_test_name}".rstrip(".")


def operators(dtype: torch.dtype, part: int) -> list:
    return [
        op
        for op in op_db
        if op.supports_autograd
        and dtype in op.supported_backward_dtypes("cpu")
        and op.name not in SAVED_BEFORE_WRITTEN
    ][part::PARTS]


def samples(op, dtype: torch.dtype, count: int):
    return islice(op.sample_inputs_func(op, "cpu", dtype, True), count)


def tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def same_seed() -> None:
    torch.random.default_generator.manual_seed(0)  # torch.manual_seed looks at every device's


def leaf(t: Tensor) -> Tensor:
    """The memory that `t` looks at, flat."""
    if t.layout is not torch.strided:
        return t.detach().clone().requires_grad_()
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.detach().as_strided((span if t.numel() else 0,), (1,)).clone().requires_grad_()


def gradients(function, sample, offload=None) -> list[Tensor | None]:
    """Of a weighted sum of all outputs, for each input that requires one; twice through one graph.

    What the operator gets are no leaves, as those would be left alone, with the strides of the sample's.
    """
    same_seed()
    leaves = []

    def computed(t):
        if not isinstance(t, Tensor) or not t.requires_grad:
            return t
        leaves.append(leaf(t))
        copy = leaves[-1] * 1
        return copy.as_strided(t.shape, t.stride()) if t.layout is torch.strided else copy

    with offload or contextlib.nullcontext():
        inputs = tree_map(computed, (sample.input, sample.args, sample.kwargs))
        outputs = function(inputs[0], *inputs[1], **inputs[2])
    outputs = [t for t in tensors(outputs) if t.requires_grad]
    if not outputs:
        return []
    weights = [
        torch.randn_like(t) if t.layout is torch.strided else torch.ones_like(t) for t in outputs
    ]
    return [
        gradient
        for _ in range(2)
        for gradient in torch.autograd.grad(
            outputs, leaves, weights, retain_graph=True, allow_unused=True
        )
    ]


def bits(t: Tensor) -> Tensor:
    return t.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """In every bit; a NaN is a NaN."""
    if a is None or b is None:
        return a is b
    if (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(bits(a), bits(b)):
        return True
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
    number = ~a.isnan()
    return torch.equal(number, ~b.isnan()) and torch.equal(bits(a[number]), bits(b[number]))


class Sweep:
    """Compares, and keeps count of what there was to compare."""

    def __init__(self, *contexts):
        self.contexts = contexts
        self.wrong: list[str] = []
        self.compared = 0
        self.operators: set[str] = set()
        self.packed: Counter = Counter()

    def compare(self, op, function, sample) -> None:
        try:
            want = gradients(function, sample)
        except REFUSALS:
            return
        for make in self.contexts:
            offload = make()
            got = gradients(function, sample, offload)
            if len(got) != len(want) or not all(map(same, got, want)):
                self.wrong.append(f"{named(op)}, {make.__name__}: {sample}")
            if any(offload.stats.ledger.now.values()):
                self.wrong.append(f"{named(op)}, {make.__name__}: {offload.stats.ledger.now} left")
            self.compared += 1
            self.packed += offload.stats.total.packed
        self.operators.add(named(op))


def assert_at_least(counted: Counter, **least: int) -> None:
    """So that a sweep that tests nothing fails."""
    assert {k: counted[k] for k in least if counted[k] < least[k]} == {}


@pytest.fixture(autouse=True)
def _quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated operators, experimental layouts
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def decoded(monkeypatch):
    """What is packed is decoded for backward, although the originals are alive."""
    monkeypatch.setattr(context, "revive", lambda *_: None)


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128], ids=str
)
def test_decoded(dtype, part):
    sweep = Sweep(zvc, host)
    for op in operators(dtype, part):
        for sample in samples(op, dtype, SAMPLES):
            sweep.compare(op, op, sample)
            if all(t.layout is torch.strided for t in tensors(sample.input)):
                sweep.compare(op, op, sample.noncontiguous())
    assert not sweep.wrong
    assert len(sweep.operators) >= 75
    assert_at_least(sweep.packed, zvc=300, raw=300, narrow=60, bits=10)


@pytest.mark.parametrize("part", range(PARTS))
def test_shared_with_the_original(part):
    """The original is alive in backward, and is what backward gets."""
    sweep = Sweep(zvc, auto)
    for op in operators(torch.float32, part):
        for sample in samples(op, torch.float32, SAMPLES):
            sweep.compare(op, op, sample)
    assert not sweep.wrong
    assert len(sweep.operators) >= 125
    assert_at_least(sweep.packed, zvc=200, narrow=60, bits=8)


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("part", range(PARTS))
def test_in_place_on_a_view(part):
    sweep = Sweep(zvc, host)
    for op in operators(torch.float64, part):
        if op.inplace_variant is not None:
            for sample in samples(op, torch.float64, SAMPLES):
                if not sample.broadcasts_input:
                    sweep.compare(op, op.inplace_variant, sample)
    assert not sweep.wrong
    assert len(sweep.operators) >= 25
    assert_at_least(sweep.packed, zvc=50, raw=50, narrow=15)


def numeric(op, sample, second: bool) -> None:
    """gradcheck of one operator, or gradgradcheck.

    Raises:
        Exception: it fails.
    """
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]

    def function(*leaves):
        same_seed()
        arguments = list(flat)
        for i, t in zip(places, leaves, strict=True):
            arguments[i] = t * 1
        first, rest, named = tree_unflatten(arguments, spec)
        return sample.output_process_fn_grad(
            op.gradcheck_wrapper(op.get_op(), first, *rest, **named)
        )

    check = gradgradcheck if second else gradcheck
    check(
        function,
        [flat[i].detach().clone().requires_grad_() for i in places],
        fast_mode=True,
        nondet_tol=op.gradcheck_nondet_tol,
        check_batched_grad=op.check_batched_grad and not second,
    )


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradcheck_and_gradgradcheck(dtype, part):
    """They pass inside wherever they pass outside."""
    passed, wrong, packed = Counter(), [], Counter()
    for op in operators(dtype, part):
        for sample in samples(op, dtype, 1):
            for second in (False, True) if op.supports_gradgrad else (False,):
                offload = zvc()
                try:
                    with offload:
                        numeric(op, sample, second)
                    passed["gradgradcheck" if second else "gradcheck"] += 1
                except Exception as error:
                    with contextlib.suppress(Exception):
                        numeric(op, sample, second)
                        wrong.append(f"{named(op)}: {error}")
                packed += offload.stats.total.packed
    assert not wrong
    assert_at_least(passed, gradcheck=75, gradgradcheck=75)
    assert_at_least(packed, zvc=3000, narrow=200, bits=150)


def test_rrelu_is_saved_before_it_is_written():
    """With any hooks that copy; if this fails, torch is mended and rrelu can join the sweep."""
    noise = torch.full((100,), torch.nan)
    copies = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: copies.append(t.clone()) or t, lambda t: t
    ):
        x = torch.randn(100, requires_grad=True) * 1
        torch.ops.aten.rrelu_with_noise(x, noise, training=True)
    assert not noise.isnan().any()
    assert any(t.isnan().all() for t in copies)
