"""The 2:4 formats: every back end, instruction set and dtype, bit for bit; and against PyTorch's own conversions."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import sparsekern as sk
from sparsekern import backends, ops, reference
from sparsekern.backends import cpu

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
]
LEGAL = (4, 8, 9, 12, 13, 14)
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Every tail and odd count of groups; the last two are large enough for several threads.
SHAPES = [(0, 8), (3, 0), (0, 0), (1, 4), (1, 8), (5, 12), (3, 20), (7, 36), (2, 68)]
LARGE = [(64, 1028), (1, 70000)]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(WORD[t.element_size()])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Same dtype, shape and bits, so that NaNs compare and -0.0 differs from 0.0."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    g, w = bits(got), bits(want)
    if not torch.equal(g, w):
        at = tuple((g != w).nonzero()[0].tolist())
        raise AssertionError(f"element {at} is {got[at]} ({g[at]:#x}), not {want[at]} ({w[at]:#x})")


# ---- what there is to pack ----


def palette(dtype: torch.dtype) -> torch.Tensor:
    """Awkward elements: zeros of both signs, NaNs with payloads, infinities, denormals, extremes."""
    if dtype in (torch.int8, torch.uint8):
        return torch.tensor([0, 0, 1, 127, 128, 129, 255], dtype=torch.uint8).view(dtype)
    info, word = torch.finfo(dtype), WORD[dtype.itemsize]
    values = torch.tensor([0, 0, 1, -1, info.max, info.tiny, torch.inf, -torch.inf], dtype=dtype)
    inf = bits(values)[6]
    sign = torch.iinfo(word).min
    odd = [sign, 1, 2, sign + 3, inf + 1, inf + 2, sign + inf + 5, torch.iinfo(word).max]
    return torch.cat([values, torch.tensor([int(o) for o in odd], dtype=word).view(dtype)])


def fill(kind: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    n = torch.Size(shape).numel()
    if kind == "all zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "specials":
        choice = palette(dtype)
        return choice[torch.randint(len(choice), shape, generator=generator)]
    if kind == "random bits":
        raw = torch.randint(256, (n * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return raw.view(dtype).reshape(shape)
    weight = torch.randint(1, 100, shape, generator=generator).to(dtype)
    if kind == "no zeros":
        return weight
    assert kind == "2:4"
    score = torch.rand(n // 4, 4, generator=generator).argsort(-1).reshape(shape)
    return torch.where(score < 2, weight, 0)


FILLS = ["all zeros", "no zeros", "2:4", "specials", "random bits"]


# ---- an oracle in plain Python, for every back end, the reference included ----


def as_words(t: torch.Tensor) -> list[list[int]]:
    unsigned = (1 << 8 * t.element_size()) - 1
    return [[w & unsigned for w in row] for row in bits(t).tolist()]


def as_tensor(words: list[list[int]], dtype: torch.dtype, *shape: int) -> torch.Tensor:
    half, wrap = 1 << (8 * dtype.itemsize - 1), 1 << 8 * dtype.itemsize
    if dtype.itemsize > 1:  # the words of one byte are uint8 as they are
        words = [[w - wrap if w >= half else w for w in row] for row in words]
    return torch.tensor(words, dtype=WORD[dtype.itemsize]).reshape(shape).view(dtype)


def pack_in_python(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def magnitude(word: int) -> int:
        if weight.dtype is torch.uint8:
            return word
        if weight.dtype is torch.int8:
            return min(word, 256 - word)
        return word & (1 << 8 * weight.element_size() - 1) - 1

    N, K = weight.shape
    values, meta = [], []
    for row in as_words(weight):
        kept, nibbles = [], []
        for k in range(0, K, 4):
            i0, i1 = sorted(sorted(range(4), key=lambda i: (-magnitude(row[k + i]), i))[:2])
            kept += [row[k + i] if magnitude(row[k + i]) else 0 for i in (i0, i1)]
            nibbles.append(i0 + 4 * i1)
        nibbles += [4] * (len(nibbles) % 2)
        values.append(kept)
        meta.append([a + 16 * b for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)])
    return (
        as_tensor(values, weight.dtype, N, K // 2),
        torch.tensor(meta, dtype=torch.uint8).reshape(N, -(-K // 8)),
    )


def positions_in_python(meta: torch.Tensor, groups: int) -> list[list[tuple[int, int]]]:
    nibbles = [[n for byte in row for n in (byte & 15, byte >> 4)] for row in meta.tolist()]
    return [[(n & 3, n >> 2) for n in row[:groups]] for row in nibbles]


def unpack_in_python(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    N, half = values.shape
    dense = []
    at = positions_in_python(meta, half // 2)
    for row, pairs in zip(as_words(values), at, strict=True):
        line = [0] * (2 * half)
        for g, (i0, i1) in enumerate(pairs):
            line[4 * g + i0], line[4 * g + i1] = row[2 * g], row[2 * g + 1]
        dense.append(line)
    return as_tensor(dense, values.dtype, N, 2 * half)


def gather_in_python(dense: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    N, K = dense.shape
    at = positions_in_python(meta, K // 4)
    values = [
        [row[4 * g + i] for g, pair in enumerate(pairs) for i in pair]
        for row, pairs in zip(as_words(dense), at, strict=True)
    ]
    return as_tensor(values, dense.dtype, N, K // 2)


# ---- every back end ----


@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_back_end_packs_prunes_and_unpacks_as_the_format_says(backend, dtype, kind):
    for shape in SHAPES:
        weight = fill(kind, dtype, *shape)
        values, meta = pack_in_python(weight)
        dense = unpack_in_python(values, meta)
        for got, want in zip(backend.pack_24(weight), (values, meta), strict=True):
            assert_same_bits(got, want)
        assert_same_bits(backend.unpack_24(values, meta), dense)
        assert_same_bits(backend.prune_24(weight), dense)
        assert_same_bits(backend.gather_24(weight, meta), gather_in_python(weight, meta))
        if kind == "2:4":
            assert_same_bits(dense, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_weights_on_several_threads_give_the_bits_of_the_reference(isa, dtype):
    for shape, kind in itertools.product(LARGE, ("specials", "random bits", "2:4")):
        weight = fill(kind, dtype, *shape)
        values, meta = reference.pack_24(weight)
        for got, want in zip(cpu.pack_24(weight), (values, meta), strict=True):
            assert_same_bits(got, want)
        assert_same_bits(cpu.unpack_24(values, meta), reference.unpack_24(values, meta))
        assert_same_bits(cpu.prune_24(weight), reference.prune_24(weight))
        assert_same_bits(cpu.gather_24(weight, meta), reference.gather_24(weight, meta))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_back_end_prunes_tiles_to_the_bits_of_the_reference(backend, full, dtype):
    shapes, kinds = ([*SHAPES, (16, 1028)], FILLS) if full else (SHAPES, FILLS[3:])
    for (N, K), kind in itertools.product(shapes, kinds):
        weight = fill(kind, dtype, 4 * N, K)
        pruned = backend.prune_24_transposable(weight)
        assert_same_bits(pruned, reference.prune_24_transposable(weight))
        kept = (pruned != 0).reshape(N, 4, K // 4, 4)
        assert bool((kept.sum(1) <= 2).all())
        assert bool((kept.sum(3) <= 2).all())


LAYOUTS = {
    "transposed": lambda b: b.T,
    "sliced rows and columns": lambda b: b[4:12, 3:15],
    "every other column": lambda b: b[:, ::2],
    "every third row": lambda b: b[1::3],
    "expanded row": lambda b: b[1:2, 4:].expand(8, -1),
    "expanded column": lambda b: b[:, :1].expand(-1, 12),
    "storage offset": lambda b: b.flatten()[1:97].reshape(8, 12),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_storage_offset_give_the_same_bits(backend, layout):
    for dtype in DTYPES:
        weight = LAYOUTS[layout](fill("random bits", dtype, 16, 24))
        weight = weight[: weight.shape[0] // 4 * 4]
        flat = weight.clone(memory_format=torch.contiguous_format)
        values, meta = pack_in_python(flat)
        assert_same_bits(backend.pack_24(weight)[0], values)
        assert_same_bits(backend.pack_24(weight)[1], meta)
        assert_same_bits(backend.prune_24(weight), unpack_in_python(values, meta))
        assert_same_bits(backend.gather_24(weight, meta), gather_in_python(flat, meta))
        tiles = backend.prune_24_transposable(weight)
        assert_same_bits(tiles, reference.prune_24_transposable(flat))
        for out in (*backend.pack_24(weight), backend.prune_24(weight), tiles):
            assert out.is_contiguous()


def test_values_and_meta_of_any_strides_unpack_to_the_same_bits(backend):
    for dtype in DTYPES:
        values, meta = pack_in_python(fill("random bits", dtype, 6, 36))
        want = unpack_in_python(values, meta)
        gappy = [torch.stack([t, t], -1)[..., 0] for t in (values, meta)]
        columns = [t.T.contiguous().T for t in (values, meta)]
        offset = [torch.cat([t[:1], t])[1:] for t in (values, meta)]
        for v, m in (gappy, columns, offset):
            assert_same_bits(backend.unpack_24(v, m), want)
            assert_same_bits(backend.gather_24(want, m), values)


def test_prune_takes_any_leading_shape(backend):
    weight = fill("random bits", torch.float32, 30, 12)
    want = unpack_in_python(*pack_in_python(weight))
    for lead in ((30,), (5, 6), (3, 2, 5)):
        assert_same_bits(backend.prune_24(weight.reshape(*lead, 12)), want.reshape(*lead, 12))
    assert_same_bits(backend.prune_24(weight[3]), want[3])
    permuted = weight.reshape(5, 6, 12).transpose(0, 1)
    assert_same_bits(backend.prune_24(permuted), want.reshape(5, 6, 12).transpose(0, 1))
    for shape in ((2, 0, 8), (2, 3, 0), (0,)):
        assert backend.prune_24(torch.ones(shape)).shape == shape


# ---- the kernels of every tier: patterns, lengths, places in memory, threads ----


def every_group(dtype: torch.dtype) -> torch.Tensor:
    """All sequences of four out of seven elements: every order and tie of magnitudes, under every sign."""
    if dtype is torch.uint8:
        choice = torch.tensor([0, 1, 2, 3, 127, 128, 255], dtype=dtype)
    elif dtype is torch.int8:
        choice = torch.tensor([0, 1, -1, 2, -2, 127, -128], dtype=dtype)
    else:
        choice = torch.tensor([0.0, -0.0, 1, -1, 2, -2, 3], dtype=dtype)
    return torch.cartesian_prod(*[choice] * 4).reshape(49, -1)


def every_special_group(dtype: torch.dtype) -> torch.Tensor:
    """The same out of zeros, denormals, infinities and NaNs with payloads."""
    choice = palette(dtype)
    keep = [0, 2, 4, 6, 8, 9, 11, 12, 14] if dtype.is_floating_point else range(7)
    choice = choice[list(keep)]
    return torch.cartesian_prod(*[choice] * 4).reshape(len(keep) ** 2, -1)


@pytest.mark.parametrize("groups", [every_group, every_special_group])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_and_tie_of_four_packs_as_the_format_says(isa, dtype, groups):
    weight = groups(dtype)
    values, meta = pack_in_python(weight)
    got = cpu.pack_24(weight)
    assert_same_bits(got[0], values)
    assert_same_bits(got[1], meta)
    assert_same_bits(cpu.prune_24(weight), unpack_in_python(values, meta))
    assert_same_bits(cpu.unpack_24(values, meta), unpack_in_python(values, meta))
    assert_same_bits(cpu.gather_24(weight, meta), gather_in_python(weight, meta))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_length_from_4_to_200_give_the_bits_of_the_reference(isa, dtype):
    for K in range(4, 201, 4):
        weight = fill("random bits" if K % 8 else "specials", dtype, 4, K)
        values, meta = reference.pack_24(weight)
        for got, want in zip(cpu.pack_24(weight), (values, meta), strict=True):
            assert_same_bits(got, want)
        assert_same_bits(cpu.prune_24(weight), reference.prune_24(weight))
        assert_same_bits(cpu.unpack_24(values, meta), reference.unpack_24(values, meta))
        assert_same_bits(cpu.gather_24(weight, meta), reference.gather_24(weight, meta))
        tiles = reference.prune_24_transposable(weight)
        assert_same_bits(cpu.prune_24_transposable(weight), tiles)


class Guarded:
    """Contiguous storage for a tensor, one element past an aligned address, between bytes that must not change."""

    PAD = 64

    def __init__(self, like: torch.Tensor, copy: bool) -> None:
        size = like.nbytes
        self.all = torch.full((size + 2 * self.PAD + like.itemsize,), 0xA5, dtype=torch.uint8)
        start = self.PAD + like.itemsize
        self.tensor = self.all[start : start + size].view(like.dtype).view(like.shape)
        self.outside = torch.cat([self.all[:start], self.all[start + size :]])
        self.start, self.end = start, start + size
        if copy:
            self.tensor.copy_(like)

    def address(self) -> int:
        return self.tensor.data_ptr()

    def check(self, want: torch.Tensor) -> None:
        assert_same_bits(self.tensor, want)
        assert torch.equal(torch.cat([self.all[: self.start], self.all[self.end :]]), self.outside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_write_their_output_and_nothing_around_it_at_any_address(isa, dtype):
    code = cpu._DTYPE[dtype]
    for N, K in [(4, 4), (4, 12), (4, 60), (4, 64), (8, 68), (4, 72), (4, 132), (12, 200)]:
        weight = fill("random bits", dtype, N, K)
        values, meta = reference.pack_24(weight)
        dense, tiles = reference.prune_24(weight), reference.prune_24_transposable(weight)
        w, v, m = (Guarded(t, copy=True) for t in (weight, values, meta))
        shape = (N, K, code, 1)

        out = Guarded(weight, copy=False)
        cpu._cpu.prune_24(w.address(), out.address(), *shape)
        out.check(dense)

        out = Guarded(weight, copy=False)
        cpu._cpu.prune_24_transposable(w.address(), out.address(), *shape)
        out.check(tiles)

        out, packed = Guarded(values, copy=False), Guarded(meta, copy=False)
        cpu._cpu.pack_24(w.address(), out.address(), packed.address(), *shape)
        out.check(values)
        packed.check(meta)

        out = Guarded(weight, copy=False)
        cpu._cpu.unpack_24(v.address(), m.address(), out.address(), *shape)
        out.check(dense)

        out = Guarded(values, copy=False)
        cpu._cpu.gather_24(w.address(), m.address(), out.address(), *shape)
        out.check(reference.gather_24(weight, meta))
        for guarded, same in ((w, weight), (v, values), (m, meta)):
            guarded.check(same)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 70004), (132, 1028), (8, 65536), (2048, 60)])
def test_any_number_of_threads_gives_the_same_bits(isa, threads, shape):
    weight = fill("specials", torch.bfloat16, *shape)
    values, meta = reference.pack_24(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed, pruned = cpu.pack_24(weight), cpu.prune_24(weight)
        dense, gathered = cpu.unpack_24(values, meta), cpu.gather_24(weight, meta)
        tiles = cpu.prune_24_transposable(weight)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(packed[0], values)
    assert_same_bits(packed[1], meta)
    assert_same_bits(pruned, reference.prune_24(weight))
    assert_same_bits(dense, reference.unpack_24(values, meta))
    assert_same_bits(gathered, reference.gather_24(weight, meta))
    assert_same_bits(tiles, reference.prune_24_transposable(weight))


@functools.cache
def binary_tiles() -> tuple[torch.Tensor, torch.Tensor]:
    """All 65536 tiles of zeros and ones, where nearly every mask ties with another, and what becomes of them."""
    bit = torch.arange(65536).unsqueeze(-1) >> torch.arange(16) & 1
    tiles = bit.reshape(256, 256, 4, 4).permute(0, 2, 1, 3).reshape(1024, 1024)
    return tiles, reference.prune_24_transposable(tiles.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_binary_tiles_take_the_first_of_equal_masks(backend, full, dtype):
    rows = slice(None) if full else slice(3, None, 16)
    tiles, pruned = (t.reshape(256, 4, 1024)[rows].reshape(-1, 1024) for t in binary_tiles())
    assert_same_bits(backend.prune_24_transposable(tiles.to(dtype)), pruned.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_whose_sums_round_or_overflow_take_the_mask_of_the_reference(backend, dtype):
    generator = torch.Generator().manual_seed(24)
    weight = torch.randint(-3, 4, (64, 1024), generator=generator).to(torch.float64)
    if dtype.is_floating_point:
        # Ones lost beside 2^24 (2^53 in fp64), and sums past the largest finite number.
        large = (
            2.0**53 if dtype is torch.float64 else 2.0**15 if dtype is torch.float16 else 2.0**24
        )
        scale = torch.tensor([1.0, 1.0, 1 + 2.0**-9, large, 1 / large], dtype=torch.float64)
        weight *= scale[torch.randint(5, weight.shape, generator=generator)]
        rows = torch.finfo(dtype).max / 4 * torch.randint(1, 4, (8, 1024), generator=generator)
        weight = torch.cat([weight, rows])
    weight = weight.to(dtype) if dtype is not torch.uint8 else weight.abs().to(dtype)
    assert_same_bits(backend.prune_24_transposable(weight), reference.prune_24_transposable(weight))


# ---- the public functions ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_functions_and_the_ops_give_the_bits_of_the_format(isa, dtype):
    weight = fill("specials", dtype, 8, 36)
    values, meta = pack_in_python(weight)
    dense = unpack_in_python(values, meta)
    ops = torch.ops.sparsekern
    for v, m in (sk.pack_24(weight, prune=True), sk.pack_24(dense), ops.pack_24(weight)):
        assert_same_bits(v, values)
        assert_same_bits(m, meta)
    for d in (sk.unpack_24(values, meta), ops.unpack_24(values, meta), sk.prune_24(weight)):
        assert_same_bits(d, dense)
    tiles = reference.prune_24_transposable(weight)
    assert_same_bits(sk.prune_24_transposable(weight), tiles)
    assert_same_bits(ops.gather_24(weight, meta), gather_in_python(weight, meta))
    sk.check_24(values, meta)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_weights_go_through_every_public_function(isa, shape):
    N, K = shape
    weight = torch.zeros(shape)
    assert sk.is_24(weight)
    values, meta = sk.pack_24(weight)
    assert (values.shape, meta.shape) == ((N, K // 2), (N, K // 8))
    sk.check_24(values, meta)
    assert sk.unpack_24(values, meta).shape == shape
    assert sk.prune_24(weight).shape == shape
    assert sk.prune_24_transposable(torch.zeros(4 * N, K)).shape == (4 * N, K)
    back = sk.unprepack_24(sk.prepack_24(values, meta), N, K, torch.float32)
    assert [t.shape for t in back] == [values.shape, meta.shape]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_prepacked_weights_come_back_bit_for_bit_from_any_strides(isa, dtype):
    for N, K in [(1, 4), (3, 20), (16, 64)]:
        values, meta = pack_in_python(fill("random bits", dtype, N, K))
        packed = sk.prepack_24(values, meta)
        assert packed.shape == (values.nbytes + meta.nbytes,)
        gappy = torch.stack([packed, packed], -1)[:, 0]
        later = torch.cat([packed.new_zeros(8), packed])[8:]
        for p in (packed, gappy, later):
            for got, want in zip(sk.unprepack_24(p, N, K, dtype), (values, meta), strict=True):
                assert_same_bits(got, want)


# ---- PyTorch's own conversions ----

PEERS = [
    (torch.float16, (32, 32)),
    (torch.float16, (96, 128)),
    (torch.bfloat16, (64, 64)),
    (torch.bfloat16, (32, 256)),
    (torch.int8, (16, 64)),
    (torch.int8, (32, 128)),
    (torch.int8, (64, 320)),
]


def undo_reorder(meta: torch.Tensor) -> torch.Tensor:
    """CUTLASS's reordered metadata to the logical order: rows of little-endian nibbles."""
    offsets = _calculate_meta_reordering_scatter_offsets(*meta.shape, meta.dtype, "cpu")
    return meta.view(-1).gather(0, offsets).view(meta.shape)


def redo_reorder(logical: torch.Tensor) -> torch.Tensor:
    offsets = _calculate_meta_reordering_scatter_offsets(*logical.shape, logical.dtype, "cpu")
    return torch.empty_like(logical).view(-1).scatter(0, offsets, logical.view(-1)).view_as(logical)


@pytest.mark.parametrize(("dtype", "shape"), PEERS)
def test_exact_2_of_4_weights_pack_to_the_bytes_of_pytorch(backend, dtype, shape):
    weight = fill("2:4", dtype, *shape)
    assert bool(((weight != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all())
    packed, reordered = sparse_semi_structured_from_dense_cutlass(weight)
    values, meta = backend.pack_24(weight)
    assert_same_bits(values, packed)
    # Eight groups to an int32 (int8), four to an int16, lowest nibble first: our bytes as they are.
    N, K = shape
    word = torch.int32 if dtype is torch.int8 else torch.int16
    assert_same_bits(meta.view(word), undo_reorder(reordered))
    assert meta.view(word).shape == (N, K // 8 // word.itemsize)
    assert_same_bits(redo_reorder(meta.view(word)), reordered)


@pytest.mark.parametrize(("dtype", "shape"), PEERS)
def test_we_and_pytorch_decode_each_others_weights_of_any_2_of_4_pattern(backend, dtype, shape):
    # Fewer than two non-zeros in a group: the peers name other free positions, so decode.
    weight = fill("2:4", dtype, *shape)
    weight = torch.where(fill("random bits", torch.uint8, *shape) < 110, 0, weight)
    patterns = {tuple(g) for g in (weight != 0).reshape(-1, 4).tolist()}
    assert len(patterns) == 11  # all with at most two non-zeros
    packed, reordered = sparse_semi_structured_from_dense_cutlass(weight)
    theirs = undo_reorder(reordered).view(torch.uint8)
    assert_same_bits(backend.unpack_24(packed, theirs), weight)
    sk.check_24(packed, theirs)
    values, meta = backend.pack_24(weight)
    ours = redo_reorder(meta.view(reordered.dtype))
    assert_same_bits(sparse_semi_structured_to_dense_cutlass(values, ours), weight)


# ---- what is refused, and in which words ----


def test_pack_names_the_first_row_and_group_that_is_not_2_4(isa):
    weight = fill("2:4", torch.float32, 6, 24)
    weight[3, 8:12] = torch.tensor([1.0, 0.0, -2.0, 3.0])
    weight[5, 0:4] = 1
    with pytest.raises(
        ValueError, match=r"pack_24: weight .*row 3, group 2 \(columns 8 to 11\)"
    ) as e:
        sk.pack_24(weight)
    assert "[1.0, 0.0, -2.0, 3.0]" in str(e.value)
    assert "prune=True" in str(e.value)
    weight[3, 8] = 0
    with pytest.raises(ValueError, match="row 5, group 0"):
        sk.pack_24(weight)
    weight[5, 0:4] = torch.tensor([torch.nan, -0.0, 0, torch.inf])
    sk.pack_24(weight)


def test_is_24_says_whether_two_of_four_are_zero(isa):
    weight = fill("2:4", torch.float16, 4, 12)
    assert sk.is_24(weight)
    assert sk.is_24(weight.reshape(2, 2, 12))
    assert sk.is_24(weight[0])
    weight[3, 8:] = 1
    assert not sk.is_24(weight)
    assert not sk.is_24(weight.reshape(2, 2, 12))
    assert not sk.is_24(torch.zeros(4, 6))
    assert not sk.is_24(torch.tensor(0.0))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
def test_the_first_dense_group_of_a_large_weight_is_found_wherever_it_is(dtype):
    for N, K in [(3, 400000), (5000, 300), (1, 4)]:
        weight = torch.zeros(N, K, dtype=dtype)
        weight.view(-1, 4)[:, 1::2] = 1
        assert sk.is_24(weight)
        assert sk.is_24(-weight if dtype.is_signed else weight)
        for at in {0, N * K // 8, N * K // 4 - 1}:
            spoilt = weight.clone()
            spoilt.view(-1, 4)[at:][:1000, 0] = 1
            assert ops._first_dense_group(spoilt) == divmod(at, K // 4)
            assert ops._first_dense_group(spoilt.T.contiguous().T) == divmod(at, K // 4)
    weight = torch.tensor([torch.nan, -0.0, 0, torch.inf] * 2)
    assert sk.is_24(weight)
    weight[5] = 1e-45
    assert not sk.is_24(weight)


@pytest.mark.parametrize("nibble", sorted({*range(16)} - {*LEGAL}))
def test_check_names_the_place_of_an_illegal_nibble(nibble):
    values = torch.zeros(3, 10)
    for row, group in [(0, 0), (2, 3), (1, 4)]:
        meta = torch.full((3, 3), 0x4E, dtype=torch.uint8)
        half = 4 * (group % 2)
        meta[row, group // 2] = meta[row, group // 2] & ~(15 << half) | nibble << half
        place = f"check_24: meta row {row}, group {group} is the nibble {nibble};"
        with pytest.raises(ValueError, match=place):
            sk.check_24(values, meta)


@pytest.mark.parametrize("nibble", range(16))
def test_check_takes_every_legal_nibble_and_only_4_after_an_odd_last_group(nibble):
    values, meta = torch.zeros(1, 6), torch.tensor([[0x94, 0x4D]], dtype=torch.uint8)
    sk.check_24(values, meta)
    meta[0, 1] = 13 | nibble << 4
    if nibble == 4:
        sk.check_24(values, meta)
    else:
        with pytest.raises(ValueError, match=f"row 0, group 3 is the nibble {nibble}; it takes 4 "):
            sk.check_24(values, meta)
    meta[0] = torch.tensor([0x44, 0x40 | nibble])
    if nibble in LEGAL:
        sk.check_24(values, meta)
    else:
        with pytest.raises(ValueError, match=r"row 0, group 2 is .* 4, 8, 9, 12, 13 or 14"):
            sk.check_24(values, meta)


V, M8 = torch.zeros(2, 8), torch.full((2, 2), 0x44, dtype=torch.uint8)
X = torch.zeros(3, 16)
P = torch.zeros(2 * 8 * 4 + 4, dtype=torch.uint8)
OPS = torch.ops.sparsekern

# What is called, what it raises, and the words that must be in the message: op, argument, what it
# got, what it takes.
REFUSED = [
    (lambda: sk.prune_24(torch.zeros(2, 6)), ValueError, "prune_24 weight (2, 6) multiple of 4"),
    (lambda: sk.prune_24(torch.tensor(1.0)), ValueError, "prune_24 weight () multiple of 4"),
    (lambda: sk.prune_24(torch.zeros(4).int()), TypeError, "prune_24 weight int32 float16"),
    (lambda: sk.pack_24(torch.zeros(2, 6)), ValueError, "pack_24 weight (2, 6) multiple of 4"),
    (lambda: sk.pack_24(torch.zeros(8)), ValueError, "pack_24 weight (8,) two dimensions [N, K]"),
    (lambda: sk.pack_24(torch.zeros(8), True), ValueError, "pack_24 weight (8,) [N, K]"),
    (lambda: sk.pack_24(V.long()), TypeError, "pack_24 weight int64 bfloat16 int8"),
    (lambda: sk.pack_24(V.bool(), True), TypeError, "pack_24 weight bool uint8"),
    (lambda: sk.prune_24_transposable(torch.zeros(6, 8)), ValueError, "transposable (6, 8) both 4"),
    (lambda: sk.prune_24_transposable(torch.zeros(4, 4, 4)), ValueError, "weight (4, 4, 4) [N, K]"),
    (lambda: sk.prune_24_transposable(V.int()), TypeError, "prune_24_transposable weight int32"),
    (lambda: sk.unpack_24(V, M8.int()), TypeError, "unpack_24 meta int32 uint8"),
    (lambda: sk.unpack_24(V, M8[:1]), ValueError, "unpack_24 meta (1, 2) N = 2, K = 16 (2, 2)"),
    (lambda: sk.unpack_24(V, M8[:, :1]), ValueError, "unpack_24 meta (2, 1) (2, 2)"),
    (lambda: sk.unpack_24(V[:, :7], M8), ValueError, "unpack_24 values (2, 7) [N, K/2]"),
    (lambda: sk.unpack_24(V[0], M8), ValueError, "unpack_24 values (8,) [N, K/2]"),
    (lambda: sk.unpack_24(V.short(), M8), TypeError, "unpack_24 values int16 float32"),
    (lambda: sk.unpack_24(V, M8.to("meta")), ValueError, "unpack_24 meta is on meta values, cpu"),
    (lambda: sk.check_24(V, M8[:1]), ValueError, "check_24 meta (1, 2) (2, 2)"),
    (lambda: sk.check_24(V.long(), M8), TypeError, "check_24 values int64"),
    (lambda: OPS.gather_24(X, M8), ValueError, "gather_24 meta (2, 2) (3, 2)"),
    (lambda: OPS.gather_24(X[:, :6], M8), ValueError, "gather_24 dense (3, 6) multiple of 4"),
    (lambda: sk.linear_24(X[:, :8], V, M8), ValueError, "linear_24 x (3, 8) [..., 16]"),
    (lambda: sk.linear_24(torch.tensor(1.0), V, M8), ValueError, "linear_24 x () [..., 16]"),
    (lambda: sk.linear_24(X.half(), V, M8), TypeError, "linear_24 x float16 values, torch.float32"),
    (lambda: sk.linear_24(X.char(), V.char(), M8), TypeError, "linear_24 values int8 bfloat16"),
    (lambda: sk.linear_24(X, V, M8[:, :1]), ValueError, "linear_24 meta (2, 1) (2, 2)"),
    (lambda: sk.linear_24(X, V, M8, X[0]), ValueError, "linear_24 bias (16,) (2,)"),
    (lambda: sk.linear_24(X, V, M8, X[:2, :1]), ValueError, "linear_24 bias (2, 1) (2,)"),
    (lambda: sk.linear_24(X, V, M8, X[0, :2].half()), TypeError, "linear_24 bias float16 float32"),
    (lambda: sk.linear_24(X, V, M8, None, "tanh"), ValueError, "linear_24 activation 'tanh' relu2"),
    (lambda: OPS.linear_24_dx(X, V, M8), ValueError, "linear_24_dx dy (3, 16) [..., 2]"),
    (
        lambda: OPS.linear_24_dvalues(X, X[:2], M8),
        ValueError,
        "linear_24_dvalues dy (3, 16) (2, 16)",
    ),
    (lambda: OPS.linear_24_dvalues(X, X.half(), M8), TypeError, "linear_24_dvalues x float16 dy"),
    (lambda: sk.prepack_24(V.char(), M8), TypeError, "prepack_24 values int8 float32"),
    (lambda: sk.unprepack_24(P[1:], 2, 16, V.dtype), ValueError, "unprepack_24 packed (67,) (68,)"),
    (lambda: sk.unprepack_24(P, 2, 15, V.dtype), ValueError, "unprepack_24 K = 15 multiple of 4"),
    (lambda: sk.unprepack_24(P, -1, 16, V.dtype), ValueError, "unprepack_24 N = -1 N >= 0"),
    (
        lambda: sk.unprepack_24(P.char(), 2, 16, V.dtype),
        TypeError,
        "unprepack_24 packed int8 uint8",
    ),
    (lambda: sk.unprepack_24(P, 2, 16, torch.int8), TypeError, "unprepack_24 dtype int8 float64"),
    (
        lambda: sk.unprepack_24(torch.cat([P, P])[4:72], 2, 16, V.dtype),
        ValueError,
        "unprepack_24 packed 4 bytes multiples of 8",
    ),
    (
        lambda: sk.linear_24_prepacked(X, P, 3),
        ValueError,
        "linear_24_prepacked packed (68,) (102,)",
    ),
    (lambda: sk.linear_24_prepacked(X.int(), P, 2), TypeError, "linear_24_prepacked x int32"),
    (lambda: sk.linear_24_prepacked(X, P, 2, X[0]), ValueError, "linear_24_prepacked bias (16,)"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_refusal_names_the_op_the_argument_what_it_got_and_what_it_takes(call, error, words):
    with pytest.raises(error) as e:
        call()
    message = str(e.value)
    assert [word for word in words.split(" ") if word not in message] == []
    assert message.index(":") > 0
    assert backends.Fallback not in type(e.value).__mro__
