"""The 2:4 products against float64, in any layout; who serves them; PyTorch's own subclass on top of them."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
)

import sparsekern as sk
from sparsekern import backends, ops, reference
from sparsekern.backends import cpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z) ** 2,
    "gelu": F.gelu,
    "silu": F.silu,
}
# The few-rows kernels end at 3, 5 and 11 rows, panels are 4 to 128 rows wide, a pass is 512 rows;
# a chunk of K is 48 or 96, a block of N is 48.
ROWS = [1, 2, 3, 4, 5, 6, 11, 12, 16, 40, 130, 513]
WEIGHTS = [(1, 4), (5, 12), (47, 36), (48, 100), (49, 516), (50, 4096), (97, 188)]


class Draw:
    """Random products of a dtype: normal deviates, or small integers where sums must be exact."""

    def __init__(self, dtype: torch.dtype, exact: bool = False, seed: int = 0) -> None:
        self.dtype, self.exact = dtype, exact
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        if self.exact:
            t = torch.randint(-2, 3, shape, generator=self.generator)
        else:
            t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return t.to(self.dtype)

    def weight(self, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """values, meta, and the dense weight they stand for, made without unpacking them."""
        score = torch.rand(N, K // 4, 4, generator=self.generator).argsort(-1).reshape(N, K)
        dense = torch.where(score < 2, self(N, K), 0)
        return *reference.pack_24(dense), dense


class Errors:
    """Root mean squares over all products added: ours and torch's own, both against float64."""

    def __init__(self) -> None:
        self.count = self.ours = self.torchs = self.size = 0.0

    def add(self, got: torch.Tensor, torchs: torch.Tensor, want: torch.Tensor) -> None:
        assert (got.dtype, got.shape) == (torchs.dtype, want.shape)
        self.eps = torch.finfo(got.dtype).eps
        self.count += want.numel()
        self.ours += float((got.double() - want).square().sum())
        self.torchs += float((torchs.double() - want).square().sum())
        self.size += float(want.square().sum())

    def check(self) -> None:
        ours, torchs, size = (
            (total / self.count) ** 0.5 for total in (self.ours, self.torchs, self.size)
        )
        # Where sums are so short that torch is exact, no more than a rounding.
        assert ours <= 2 * max(torchs, self.eps / 4 * size), f"{ours:.3g}, torch's own {torchs:.3g}"
        assert size > 0.1


# ---- numbers ----


@pytest.mark.parametrize(("N", "K"), WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_errs_at_most_twice_as_much_as_torch(backend, full, dtype, N, K):
    draw = Draw(dtype)
    values, meta, dense = draw.weight(N, K)
    packed = backend.prepack_24(values, meta)
    # Few rows are drawn again until their root mean square settles.
    again = 40 if N < 10 else 2
    parts = (ROWS[:8], again), (ROWS[8:], 1)
    for rows, times in parts if full else (([1, 4, 12], again // 2), ([40, 130], 1)):
        errors, prepacked = Errors(), Errors()
        for i, M in enumerate(rows * times):
            x, bias = draw(M, K), draw(N) if i % 3 else None
            wide = (x.double(), dense.double(), None if bias is None else bias.double())
            got = backend.linear_24(x, values, meta, bias)
            errors.add(got, F.linear(x, dense, bias), F.linear(*wide))
            got = backend.linear_24_prepacked(x, packed, N, bias)
            prepacked.add(got, F.linear(x, dense, bias), F.linear(*wide))
        errors.check()
        prepacked.check()


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_err_at_most_twice_as_much_as_torch(backend, dtype, activation):
    draw, f = Draw(dtype), ACTIVATIONS[activation]
    for M, N, K in [(3, 97, 64), (2, 129, 68), (16, 50, 36), (131, 49, 100)]:
        x, bias, (values, meta, dense) = draw(M, K), draw(N), draw.weight(N, K)
        wide = F.linear(x.double(), dense.double(), bias.double())
        errors = Errors()
        got = backend.linear_24(x, values, meta, bias, activation)
        errors.add(got, f(F.linear(x, dense, bias)), f(wide))
        errors.check()
        errors = Errors()  # of another kernel, that may sum in another order
        packed = backend.prepack_24(values, meta)
        got = backend.linear_24_prepacked(x, packed, N, bias, activation)
        errors.add(got, f(F.linear(x, dense, bias)), f(wide))
        errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_small_integers_are_exact(backend, full, dtype):
    draw = Draw(dtype, exact=True)
    activations = ("none", "relu", "relu2")
    for i, M in enumerate(ROWS if full else [*range(1, 6), 16, 33, 130]):
        for j, (N, K) in enumerate(WEIGHTS):
            if K > 1000 and M > 1 and not full:
                continue
            x, bias, (values, meta, dense) = draw(M, K), draw(N), draw.weight(N, K)
            bias = bias if (i + j) % 4 else None
            activation = activations[(i + j) % 3]
            wide = (x.double(), dense.double(), None if bias is None else bias.double())
            want = ACTIVATIONS[activation](F.linear(*wide)).to(dtype)
            got = backend.linear_24(x, values, meta, bias, activation)
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradients_err_at_most_twice_as_much_as_torch(backend, dtype):
    for M, N, K in [(1, 97, 64), (11, 48, 100), (40, 5, 12), (130, 50, 1028), (513, 47, 36)]:
        draw = Draw(dtype)
        dy, x, (values, meta, dense) = draw(M, N), draw(M, K), draw.weight(N, K)
        errors = Errors()
        got = backend.linear_24_dx(dy, values, meta)
        errors.add(got, dy @ dense, dy.double() @ dense.double())
        errors.check()
        errors = Errors()
        got = backend.linear_24_dvalues(dy, x, meta)
        # Where the weight keeps an element, spelt out without the ops: ones instead of its values.
        kept = reference.unpack_24(torch.ones_like(values), meta) == 1
        torchs, want = dy.mT @ x, dy.double().mT @ x.double()
        errors.add(got, *(t[kept].reshape(N, K // 2) for t in (torchs, want)))
        errors.check()


def test_infinities_and_nans_in_kept_positions_come_out_as_in_a_dense_product(backend):
    for dtype in DTYPES:
        draw = Draw(dtype, exact=True)
        for M in (1, 7, 40):
            x, (_, _, dense) = draw(M, 68), draw.weight(50, 68)
            for row, bad in ((3, torch.inf), (7, -torch.inf), (11, torch.nan), (49, torch.inf)):
                dense[row, dense[row].nonzero()[0]] = bad
            values, meta = reference.pack_24(dense)
            want = F.linear(x.double(), dense.double()).to(dtype)
            assert bool(want.isnan().any())
            assert bool(want[:, :3].isfinite().all())
            got = backend.linear_24(x, values, meta)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_an_infinite_x_reaches_only_the_weights_that_keep_it(isa):
    # The reference multiplies densely, so there 0 * inf makes a NaN; the compiled kernels do not read it.
    for dtype in DTYPES:
        for M in (1, 2, 7, 40):
            draw = Draw(dtype, exact=True)
            x, (_, _, dense) = draw(M, 64), draw.weight(50, 64)
            dense[:, :4] = torch.tensor([0, 1, 0, 1])
            dense[7, :4] = torch.tensor([1, 1, 0, 0])
            x[:, 0] = torch.inf
            got = sk.linear_24(x, *sk.pack_24(dense))
            finite = x.clone()
            finite[:, 0] = 0
            want = F.linear(finite.double(), dense.double()).to(dtype)
            want[:, 7] = torch.inf
            if isa == "amx" and dtype is torch.bfloat16:  # its tiles multiply the zeros, too
                got = torch.where(got.isnan() & want.isfinite(), want, got)
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_round_to_nearest_and_ties_to_even(backend, dtype):
    # Each output is the sum of two elements, which fp32 holds exactly; every fourth or so is a tie.
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(2, (2, 1000), generator=generator) * 2 - 1
    power = 2.0 ** torch.randint(-3, 4, (2, 1000), generator=generator)
    a, b = (sign * (1 + torch.rand(2, 1000, generator=generator)) * power).to(dtype)
    exact = a.double() + b.double()
    assert torch.equal(exact.float().double(), exact)
    ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    ties = (exact / ulp).frac().abs() == 0.5
    assert int(ties.sum()) > 20
    meta = torch.full((1000, 1), 0x44, dtype=torch.uint8)
    for scale in (1.0, 2.0**-16):  # the second makes denormals of fp16
        values, want = torch.stack([a, b], 1), (exact * scale).to(dtype)
        for M in (1, 3, 40):
            x = torch.tensor([scale, scale, 0, 0], dtype=dtype).expand(M, 4)
            got = backend.linear_24(x, values, meta)
            torch.testing.assert_close(got, want.expand(M, -1), rtol=0, atol=0)


def test_large_halves_overflow_to_infinity_and_small_ones_stay_denormal(backend):
    values = torch.tensor([[60000.0, 60000.0], [2.0**-14, 2.0**-24]], dtype=torch.float16)
    meta = torch.full((2, 1), 0x44, dtype=torch.uint8)
    for M in (1, 2, 16, 40):
        x = torch.tensor([[1.0, 1.0, 0, 0]], dtype=torch.float16).expand(M, 4)
        got = backend.linear_24(x, values, meta)
        assert got[:, 0].tolist() == [torch.inf] * M
        assert got[:, 1].tolist() == [2.0**-14 + 2.0**-24] * M
        assert (backend.linear_24(x / 2, values, meta)[:, 0] == 60000).all()
        assert (backend.linear_24(x / 1024, values, meta)[:, 1] == 2.0**-24).all()


# ---- shapes and strides ----

LAYOUTS = {
    "column-major": lambda d, K: d(K, 13).T,
    "sliced rows": lambda d, K: d(40, K)[3:20:2],
    "sliced columns": lambda d, K: d(13, K + 9)[:, 5 : K + 5],
    "every other column": lambda d, K: d(13, 2 * K)[:, ::2],
    "expanded row": lambda d, K: d(1, K).expand(13, K),
    "expanded column": lambda d, K: d(13, 1).expand(13, K),
    "1-D": lambda d, K: d(K),
    "1-D with a stride": lambda d, K: d(K, 3)[:, 1],
    "one row": lambda d, K: d(1, K),
    "3-D": lambda d, K: d(2, 7, K),
    "4-D": lambda d, K: d(2, 3, 5, K),
    "permuted 3-D": lambda d, K: d(7, 2, K).transpose(0, 1),
    "permuted 3-D, K first": lambda d, K: d(K, 2, 7).permute(1, 2, 0),
    "sliced 3-D": lambda d, K: d(2, 9, K + 4)[:, 1:8, 2:-2],
    "zero rows": lambda d, K: d(0, K),
    "3-D with zero rows": lambda d, K: d(2, 0, K),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_of_any_layout_gives_what_and_how_torch_gives(backend, layout):
    for dtype in DTYPES:
        for N, K in [(1, 4), (50, 68)]:
            draw = Draw(dtype, exact=True)
            x, (values, meta, dense) = LAYOUTS[layout](draw, K), draw.weight(N, K)
            for bias in (None, draw(N)):
                want = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
                got = backend.linear_24(x, values, meta, bias)
                torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0)
                assert got.stride() == F.linear(x, dense, bias).stride()
                packed = backend.prepack_24(values, meta)
                assert torch.equal(backend.linear_24_prepacked(x, packed, N, bias), got)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_take_any_layout(backend, layout):
    N, K = 12, 20
    for dtype in DTYPES:
        draw = Draw(dtype, exact=True)
        dy, (values, meta, dense) = LAYOUTS[layout](draw, N), draw.weight(N, K)
        dx = (dy.double() @ dense.double()).to(dtype)
        torch.testing.assert_close(backend.linear_24_dx(dy, values, meta), dx, rtol=0, atol=0)
        x = draw(*dy.shape[:-1], K)
        full = torch.einsum("mn,mk->nk", dy.double().reshape(-1, N), x.double().reshape(-1, K))
        kept = reference.unpack_24(torch.ones_like(values), meta) == 1
        got = backend.linear_24_dvalues(dy, x, meta)
        want = full[kept].reshape(N, K // 2).to(dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_values_meta_and_bias_of_any_strides_are_taken(backend):
    draw = Draw(torch.bfloat16, exact=True)
    values, meta, dense = draw.weight(9, 36)
    x, bias = draw(5, 36), draw(9)
    want = F.linear(x.double(), dense.double(), bias.double()).bfloat16()
    spread = [torch.stack([t, t], -1)[..., 0] for t in (values, meta, bias)]
    assert not any(t.is_contiguous() for t in spread)
    torch.testing.assert_close(backend.linear_24(x, *spread), want, rtol=0, atol=0)
    later = [torch.cat([t[:1], t])[1:] for t in (values, meta, bias)]
    torch.testing.assert_close(backend.linear_24(x, *later), want, rtol=0, atol=0)
    packed = backend.prepack_24(values, meta)
    spread = torch.stack([packed, packed], -1)[:, 0]
    got = backend.linear_24_prepacked(x, spread, 9, bias)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (40,), (0,), (2, 3), (2, 0)])
@pytest.mark.parametrize(("N", "K"), [(0, 8), (3, 0), (0, 0)])
def test_empty_weights_give_the_bias_or_nothing(backend, lead, N, K):
    values, meta = torch.zeros(N, K // 2), torch.zeros(N, K // 8, dtype=torch.uint8)
    x, bias = torch.ones(*lead, K), torch.arange(N) - 1.0
    assert torch.equal(backend.linear_24(x, values, meta), torch.zeros(*lead, N))
    assert torch.equal(backend.linear_24(x, values, meta, bias), bias.expand(*lead, N))
    relu = backend.linear_24(x, values, meta, bias, "relu")
    assert torch.equal(relu, bias.relu().expand(*lead, N))
    dy = torch.ones(*lead, N)
    assert torch.equal(backend.linear_24_dx(dy, values, meta), torch.zeros(*lead, K))
    assert backend.linear_24_dvalues(dy, x, meta).shape == values.shape


def test_the_public_functions_give_what_the_back_end_gives(isa):
    draw = Draw(torch.float16)
    x, bias, (values, meta, _) = draw(2, 7, 68), draw(50), draw.weight(50, 68)
    want = cpu.linear_24(x, values, meta, bias, "gelu")
    assert torch.equal(sk.linear_24(x, values, meta, bias, "gelu"), want)
    assert torch.equal(torch.ops.sparsekern.linear_24(x, values, meta, bias, "gelu"), want)
    packed = sk.prepack_24(values, meta)
    assert torch.equal(sk.linear_24_prepacked(x, packed, 50, bias, "gelu"), want)


# ---- who serves ----

CPU = torch.device("cpu")


@pytest.fixture
def fresh(isa, monkeypatch):
    """A fresh choice of back ends, as at import, in strict mode."""
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)
    monkeypatch.setenv("SPARSEKERN_STRICT", "1")
    backends._self_test.cache_clear()
    backends._log_once.cache_clear()
    yield monkeypatch
    backends._self_test.cache_clear()
    backends._log_once.cache_clear()


@pytest.mark.parametrize("op", sorted(ops.OPS))
def test_each_dtype_is_served_compiled_or_by_contract_by_the_reference(fresh, op):
    for dtype in ops.OPS[op].dtypes:
        # float64 products, and the layout they multiply from, are the reference's: no fallback, so
        # not an error in strict mode.
        by_reference = dtype is torch.float64 and ("linear" in op or "prepack" in op)
        served = backends.resolve(op, dtype, CPU)
        assert served is getattr(reference if by_reference else cpu, op)


def test_float64_products_are_served_in_strict_mode(fresh):
    draw = Draw(torch.float64)
    x, bias, (values, meta, dense) = draw(7, 68), draw(50), draw.weight(50, 68)
    want = F.gelu(F.linear(x, dense, bias))
    torch.testing.assert_close(sk.linear_24(x, values, meta, bias, "gelu"), want)
    packed = sk.prepack_24(values, meta)
    torch.testing.assert_close(sk.linear_24_prepacked(x, packed, 50, bias, "gelu"), want)


def test_a_missing_core_is_an_error_in_strict_mode_and_a_logged_fallback_otherwise(fresh, caplog):
    fresh.setattr(cpu, "_missing", "there was no compiler")
    with pytest.raises(backends.Fallback, match=r"linear_24: .* cpu .*there was no compiler"):
        backends.resolve("linear_24", torch.float32, CPU)
    fresh.setenv("SPARSEKERN_STRICT", "0")
    with caplog.at_level(logging.WARNING, logger="sparsekern"):
        for _ in range(3):
            served = backends.resolve("linear_24", torch.float32, CPU)
            assert served is reference.linear_24
    assert len(caplog.records) == 1
    assert "linear_24" in caplog.text
    assert "there was no compiler" in caplog.text


def off_by_one(x, values, meta, bias=None, activation="none"):
    return reference.linear_24(x, values, meta, bias, activation) + 1


def crashing(*args):
    raise RuntimeError("illegal instruction")


@pytest.mark.parametrize("broken", [off_by_one, crashing])
def test_a_kernel_that_answers_wrongly_is_switched_off(fresh, broken):
    fresh.setattr(cpu, "linear_24", broken)
    with (
        pytest.warns(RuntimeWarning, match=r"linear_24 .* cpu .* wrong answer .*float32"),
        pytest.raises(backends.Fallback, match=r"linear_24: .* cpu failed its self-test"),
    ):
        backends.resolve("linear_24", torch.float32, CPU)
    fresh.setenv("SPARSEKERN_STRICT", "0")
    kernel = ops._kernel(ops.OPS["linear_24"])
    draw = Draw(torch.float32)
    x, (values, meta, dense) = draw(7, 68), draw.weight(50, 68)
    with pytest.warns(RuntimeWarning, match="is switched off"):
        y = kernel(x, values, meta)
    torch.testing.assert_close(y, F.linear(x, dense))
    assert backends.resolve("pack_24", torch.float32, CPU) is cpu.pack_24  # the others serve on


def test_the_named_back_end_serves_and_an_unknown_name_is_refused(fresh):
    fresh.setenv("SPARSEKERN_BACKEND", "reference")
    assert backends.resolve("linear_24", torch.float32, CPU) is reference.linear_24
    fresh.setenv("SPARSEKERN_BACKEND", "cpu")
    assert backends.resolve("linear_24", torch.float32, CPU) is cpu.linear_24
    fresh.setenv("SPARSEKERN_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"SPARSEKERN_BACKEND is 'abacus'; it takes one of .*cpu"):
        backends.resolve("linear_24", torch.float32, CPU)


def test_an_unknown_instruction_set_is_refused_and_the_old_one_stays(isa):
    with pytest.raises(ValueError, match=r"SPARSEKERN_CPU_ISA is 'mmx'; .*portable"):
        cpu.set_isa("mmx")
    assert cpu.isa() == isa


# ---- PyTorch's own tensor subclass, on our kernels ----


@pytest.fixture
def aten_sparse_mm():
    """CPU kernels for the two products that SparseSemiStructuredTensorCUTLASS calls; counts their calls."""
    calls = []

    def addmm(bias, packed, meta, x_t, *, alpha=1, beta=1, out_dtype=None):
        assert (alpha, beta) == (1, 1)
        calls.append(bias is not None)
        offsets = _calculate_meta_reordering_scatter_offsets(*meta.shape, meta.dtype, "cpu")
        logical = meta.view(-1).gather(0, offsets).view(meta.shape).view(torch.uint8)
        return sk.linear_24(x_t.t(), packed, logical, bias).t()

    def mm(packed, meta, x_t, *, out_dtype=None):
        return addmm(None, packed, meta, x_t)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_sparse_semi_structured_mm", mm, "CPU")
    library.impl("_sparse_semi_structured_addmm", addmm, "CPU")
    yield calls
    library._destroy()


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
@pytest.mark.parametrize("shape", [(1, 128), (7, 128), (2, 3, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pytorchs_own_subclass_runs_on_our_kernels(isa, aten_sparse_mm, dtype, shape):
    draw = Draw(dtype, exact=True)
    x, bias, (_, _, dense) = draw(*shape), draw(64), draw.weight(64, 128)
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    weight = SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)
    for b in (None, bias):
        want = F.linear(x.double(), dense.double(), None if b is None else b.double()).to(dtype)
        torch.testing.assert_close(F.linear(x, weight, b), want, rtol=0, atol=0)
    assert aten_sparse_mm == [False, True]
    # And on deviates, as closely as torch's dense product.
    draw = Draw(dtype)
    x, bias, (_, _, dense) = draw(*shape), draw(64), draw.weight(64, 128)
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    weight = SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)
    torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x, dense, bias))
