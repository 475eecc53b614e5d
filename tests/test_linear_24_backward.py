"""The gradients of linear_24 against float64: every kernel's edges, any strides, any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsekern as sk
from sparsekern import reference
from sparsekern.backends import cpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 100, 257]
NS, KS = [1, 2, 3, 15, 16, 17, 48, 65], [4, 8, 12, 20, 64, 100, 260]


class Draw:
    """Normal deviates, or small integers whose sums are exact in every dtype."""

    def __init__(self, dtype: torch.dtype, exact: bool) -> None:
        self.dtype, self.exact = dtype, exact
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        if self.exact:
            return torch.randint(-2, 3, shape, generator=self.generator).to(self.dtype)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def weight(self, N: int, K: int) -> tuple[torch.Tensor, ...]:
        """values, meta, the dense weight and the mask of what it keeps."""
        score = torch.rand(N, K // 4, 4, generator=self.generator).argsort(-1).reshape(N, K)
        dense = torch.where(score < 2, self(N, K), 0)
        values, meta = reference.pack_24(dense)
        return values, meta, dense, reference.unpack_24(torch.ones_like(values), meta) == 1


def wanted(dy, x, dense, kept):
    """dx and dvalues in float64."""
    dy, x = dy.double().reshape(-1, dy.shape[-1]), x.double().reshape(-1, x.shape[-1])
    return dy @ dense.double(), (dy.mT @ x)[kept].reshape(len(dense), -1)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact_at_every_edge(isa, dtype, M):
    draw = Draw(dtype, exact=True)
    for i, N in enumerate(NS):
        for K in KS[(i + M) % 2 :: 2]:
            dy, x, (values, meta, dense, kept) = draw(M, N), draw(M, K), draw.weight(N, K)
            dx, dvalues = wanted(dy, x, dense, kept)
            got = cpu.linear_24_dx(dy, values, meta)
            torch.testing.assert_close(got, dx.to(dtype), rtol=0, atol=0)
            got = cpu.linear_24_dvalues(dy, x, meta)
            torch.testing.assert_close(got, dvalues.to(dtype), rtol=0, atol=0)


def errors(got, torchs, want):
    """Root mean squares: ours, torch's own, and a quarter of a rounding of what is wanted."""
    rms = [float((t.double() - want).square().mean().sqrt()) for t in (got, torchs)]
    return *rms, torch.finfo(got.dtype).eps / 4 * float(want.square().mean().sqrt())


# Long sums in one block and in many; narrow panels and wide ones, several passes over M.
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 4100, 132),
        (7, 4100, 132),
        (16, 2050, 68),
        (40, 2050, 132),
        (300, 515, 68),
        (1100, 131, 260),
        (4100, 18, 36),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_err_at_most_twice_as_much_as_torch(isa, dtype, M, N, K):
    draw = Draw(dtype, exact=False)
    dy, x, (values, meta, dense, kept) = draw(M, N), draw(M, K), draw.weight(N, K)
    dx, dvalues = wanted(dy, x, dense, kept)
    ours, torchs, rounding = errors(cpu.linear_24_dx(dy, values, meta), dy @ dense, dx)
    assert ours <= 2 * max(torchs, rounding)
    torchs = (dy.mT @ x)[kept].reshape(dvalues.shape)
    ours, torchs, rounding = errors(cpu.linear_24_dvalues(dy, x, meta), torchs, dvalues)
    assert ours <= 2 * max(torchs, rounding)


LAYOUTS = {
    "transposed": lambda d, M, n: d(n, M).T,
    "sliced rows": lambda d, M, n: d(2 * M + 1, n)[1::2],
    "sliced columns": lambda d, M, n: d(M, n + 5)[:, 3 : n + 3],
    "every other column": lambda d, M, n: d(M, 2 * n)[:, ::2],
    "expanded row": lambda d, M, n: d(1, n).expand(M, n),
    "expanded column": lambda d, M, n: d(M, 1).expand(M, n),
    "one number": lambda d, M, n: d(1, 1).expand(M, n),
    "offset storage": lambda d, M, n: d(M * n + 1)[1:].view(M, n),
    "3-D": lambda d, M, n: d(1, M, n),
    "permuted 3-D": lambda d, M, n: d(M, 1, n).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_dy_and_x_do_not_matter(isa, dtype, layout):
    draw = Draw(dtype, exact=True)
    for M in (1, 5, 37, 140):
        for N, K in [(3, 20), (33, 36), (70, 132)]:
            values, meta, dense, kept = draw.weight(N, K)
            dy, x = LAYOUTS[layout](draw, M, N), LAYOUTS[layout](draw, M, K)
            dx, dvalues = wanted(dy, x, dense, kept)
            got = cpu.linear_24_dx(dy, values, meta)
            assert got.is_contiguous()
            assert got.shape == (*dy.shape[:-1], K)
            torch.testing.assert_close(got.view(M, K), dx.to(dtype), rtol=0, atol=0)
            for a, b in [(dy, x), (dy.contiguous(), x), (dy, x.contiguous())]:
                got = cpu.linear_24_dvalues(a, b, meta)
                torch.testing.assert_close(got, dvalues.to(dtype), rtol=0, atol=0)


def test_values_and_meta_of_any_strides_are_taken(isa):
    draw = Draw(torch.bfloat16, exact=True)
    values, meta, dense, kept = draw.weight(17, 36)
    dy, x = draw(19, 17), draw(19, 36)
    dx, dvalues = wanted(dy, x, dense, kept)
    v, m = (torch.stack([t, t], -1)[..., 0] for t in (values, meta))
    assert not v.is_contiguous()
    assert not m.is_contiguous()
    torch.testing.assert_close(cpu.linear_24_dx(dy, v, m), dx.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(cpu.linear_24_dvalues(dy, x, m), dvalues.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("M", [1, 4, 16, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bits_on_any_number_of_threads(isa, dtype, M):
    draw = Draw(dtype, exact=False)
    N, K = 390, 708
    dy, x, (values, meta, *_) = draw(M, N), draw(M, K), draw.weight(N, K)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            results.append((cpu.linear_24_dx(dy, values, meta), cpu.linear_24_dvalues(dy, x, meta)))
    finally:
        torch.set_num_threads(before)
    for dx, dvalues in results[1:]:
        assert torch.equal(dx, results[0][0])
        assert torch.equal(dvalues, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_summed_is_zero(backend, dtype):
    values, meta, *_ = Draw(dtype, exact=True).weight(6, 20)
    empty = torch.empty(0, 20, dtype=dtype)
    got = backend.linear_24_dvalues(torch.empty(0, 6, dtype=dtype), empty, meta)
    assert torch.equal(got, torch.zeros(6, 10, dtype=dtype))
    for M in (1, 40):
        got = backend.linear_24_dx(torch.empty(M, 0, dtype=dtype), values[:0], meta[:0])
        assert torch.equal(got, torch.zeros(M, 20, dtype=dtype))


def test_infinities_and_nans_reach_what_keeps_them(backend):
    for dtype in DTYPES:
        for M in (1, 7, 40):
            draw = Draw(dtype, exact=True)
            values, meta, dense, kept = draw.weight(10, 36)
            values[3, 2], values[4, 5], values[9, 0] = torch.inf, -torch.inf, torch.nan
            dense = reference.unpack_24(values, meta)
            dy, x = draw(M, 10).abs() + 1, draw(M, 36)
            want = (dy.double() @ dense.double()).to(dtype)
            got = backend.linear_24_dx(dy, values, meta)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            x[M // 2, 8:12] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf])
            want = (dy.double().mT @ x.double()).to(dtype)[kept].reshape(10, 18)
            got = backend.linear_24_dvalues(dy, x, meta)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_halves_overflow_and_round_as_torch_rounds(backend):
    meta = torch.full((1, 1), 0x44, dtype=torch.uint8)
    for M in (1, 40):
        values = torch.tensor([[60000.0, 2.0**-14]], dtype=torch.float16)
        dy = torch.full((M, 1), 2.0, dtype=torch.float16)
        got = backend.linear_24_dx(dy, values, meta)
        assert got.tolist() == [[torch.inf, 2.0**-13, 0, 0]] * M
        # 1 + 2^-8 lies halfway between two bf16, and so does 1 + 3 * 2^-8: ties go to even.
        values = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16).repeat(2, 1)
        for part, want in ((2.0**-8, 1.0), (3 * 2.0**-8, 1 + 2.0**-6)):
            dy = torch.tensor([[1.0, part]], dtype=torch.bfloat16).repeat(M, 1)
            got = backend.linear_24_dx(dy, values, meta.repeat(2, 1))
            assert got.tolist() == [[want, want, 0, 0]] * M


@pytest.mark.parametrize("M", [1, 3, 33])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_autograd_gives_what_a_dense_layer_gives(isa, activation, M):
    draw = Draw(torch.float32, exact=False)
    values, meta, dense, kept = draw.weight(50, 68)
    x, bias, weights = draw(2, M, 68), draw(50), draw(2, M, 50)
    x.requires_grad_(), bias.requires_grad_(), values.requires_grad_()
    y = sk.linear_24(x, values, meta, bias, activation)
    got = torch.autograd.grad((y * weights).sum(), (x, values, bias))
    x, bias, dense = (t.detach().double().requires_grad_() for t in (x, bias, dense))
    activate = {"none": lambda z: z, "relu": torch.relu, "gelu": F.gelu}[activation]
    y = activate(F.linear(x, dense, bias))
    dx, ddense, dbias = torch.autograd.grad((y * weights).sum(), (x, dense, bias))
    for ours, want in zip(got, (dx, ddense[kept].reshape(50, 34), dbias), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-4)


def test_sum_backward_whose_gradient_is_one_expanded_number(isa):
    draw = Draw(torch.float32, exact=True)
    values, meta, dense, kept = draw.weight(20, 36)
    x = draw(9, 36).requires_grad_()
    values.requires_grad_()
    sk.linear_24(x, values, meta).sum().backward()
    dx, dvalues = wanted(torch.ones(9, 20), x.detach(), dense, kept)
    torch.testing.assert_close(x.grad.double(), dx, rtol=0, atol=0)
    torch.testing.assert_close(values.grad.double(), dvalues, rtol=0, atol=0)
