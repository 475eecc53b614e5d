"""Zero-value compression: every back end, instruction set and dtype, bit for bit; lies are found out."""

from __future__ import annotations

import ctypes
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import sparsekern as sk
from sparsekern import ops, reference
from sparsekern.backends import cpu

DTYPES = sorted(ops.ZVC_DTYPES, key=str)
ONE_PER_SIZE = [torch.uint8, torch.bfloat16, torch.float32, torch.int64]
DENSITIES = [0, 1e-4, 0.03, 0.5, 1]
SIZES = [0, 1, 31, 32, 33, 4095, 4096, 4097, 12295]
LARGE = 1_000_007
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(WORD[t.element_size()])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    g, w = bits(got).flatten(), bits(want).flatten()
    if not torch.equal(g, w):
        at = int((g != w).nonzero()[0])
        raise AssertionError(f"element {at} is {int(g[at]):#x}, not {int(w[at]):#x}")


def random(dtype: torch.dtype, n: int, density: float, seed: int = 0) -> torch.Tensor:
    """n elements of random bits, about `density` of them not all zero."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, (1 << 8 * dtype.itemsize) - 1, n, dtype=np.uint64, endpoint=True)
    words[rng.random(n) >= density] = 0
    word = "u1" if dtype.itemsize == 1 else f"i{dtype.itemsize}"
    return torch.from_numpy(words.astype(word)).view(dtype)


def pack_in_numpy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    words = bits(x).flatten().numpy()
    nonzero = words != 0
    starts = np.arange(0, len(words), 4096)
    counts = np.add.reduceat(nonzero, starts, dtype=np.int64) if len(words) else starts
    return (
        torch.from_numpy(np.packbits(nonzero, bitorder="little")),
        torch.from_numpy(words[nonzero]).view(x.dtype),
        torch.from_numpy(np.cumsum(counts) - counts),
    )


def checked(backend, op: str, *args):
    """An op of a back end, behind the check that serves them all."""
    ops.OPS[op].check(*args)
    return getattr(backend, op)(*args)


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ---- the same bytes everywhere, and back ----


def check_round_trip(backend, x: torch.Tensor) -> None:
    want = pack_in_numpy(x)
    for got, wanted in zip(checked(backend, "pack_zvc", x), want, strict=True):
        assert_same_bits(got, wanted)
    assert_same_bits(checked(backend, "unpack_zvc", *want, list(x.shape)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_back_end_packs_to_the_same_bytes_and_back(backend, full, dtype):
    for n in SIZES:
        for density in DENSITIES if full else (0.5, 1):
            check_round_trip(backend, random(dtype, n, density, seed=n))


@pytest.mark.parametrize("dtype", ONE_PER_SIZE, ids=str)
def test_a_million_elements_on_any_number_of_threads_give_the_same_bytes(
    backend, full, threads, dtype
):
    for density in DENSITIES if full else (0.5,):
        check_round_trip(backend, random(dtype, LARGE if full else LARGE // 40, density))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
def test_only_all_zero_bits_are_a_zero(backend, dtype):
    # Every byte for 8-bit floats; else -0.0, denormals, infinity, NaNs with payloads of both signs.
    word = WORD[dtype.itemsize]
    if dtype.itemsize == 1:
        x = torch.arange(256, dtype=torch.uint8).view(dtype)
    else:
        sign, inf = torch.iinfo(word).min, int(bits(torch.tensor(torch.inf, dtype=dtype)))
        odd = [0, sign, 1, sign + 1, inf, sign + inf, inf + 1, sign + inf + 2, -1, sign - 1 & -sign]
        x = torch.tensor([o if o < -sign else o + 2 * sign for o in odd], dtype=word).view(dtype)
    words = bits(x)
    # Again and again, at another lane each time.
    x = torch.cat([words, words.flip(0), words.new_zeros(11), words]).repeat(9).view(dtype)
    _, values, _ = backend.pack_zvc(x)
    assert values.numel() == int((bits(x) != 0).sum())
    check_round_trip(backend, x)


def test_bytes_of_bools_that_are_not_0_or_1_survive(backend):
    check_round_trip(backend, torch.arange(256, dtype=torch.uint8).view(torch.bool))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,), (2, 3, 5, 7), (4096, 2)])
def test_any_shape_comes_back(backend, shape):
    n = torch.Size(shape).numel()
    check_round_trip(backend, random(torch.float16, n, 0.5).reshape(shape))
    check_round_trip(backend, torch.zeros(shape))


LAYOUTS = {
    # name: view, and whether its strides come back
    "contiguous": (lambda b: b, True),
    "channels_last": (lambda b: b.contiguous(memory_format=torch.channels_last), True),
    "transposed": (lambda b: b.transpose(0, 3), True),
    "any order": (lambda b: b.permute(2, 0, 3, 1), True),
    "row of a stack": (lambda b: b[3:4], True),
    "storage offset": (lambda b: b.flatten()[7:], True),
    "sliced": (lambda b: b[:, 1:, 2:, ::3], False),
    "expanded": (lambda b: b[:1, :, :, :1].expand(5, -1, -1, 9), False),
    "0-d": (lambda b: b[1, 2, 3, 4], True),
    "empty": (lambda b: b[:0].transpose(0, 1), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layouts_come_back_with_their_strides_and_others_contiguous(isa, layout):
    view, keeps = LAYOUTS[layout]
    for dtype in DTYPES:
        x = view(random(dtype, 6 * 8 * 10 * 12, 0.4).reshape(6, 8, 10, 12))
        packed = sk.pack_zvc(x)
        back = packed.unpack()
        assert_same_bits(back, x)
        assert back.stride() == (x.stride() if keeps else x.contiguous().stride())
        nonzero = int((bits(x) != 0).sum())
        assert packed.values.numel() == nonzero
        if keeps:  # read in storage order, not copied into another first
            stored = bits(x.as_strided((x.numel(),), (1,), x.storage_offset()))
            assert_same_bits(packed.values, stored[stored != 0].view(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ops_take_any_layout_in_logical_order(backend, layout):
    x = LAYOUTS[layout][0](random(torch.float32, 6 * 8 * 10 * 12, 0.4).reshape(6, 8, 10, 12))
    check_round_trip(backend, x)
    mask, values, offsets = pack_in_numpy(x)
    spread = [torch.stack([t, t], -1)[:, 0] for t in (mask, values, offsets)]
    assert_same_bits(checked(backend, "unpack_zvc", *spread, list(x.shape)), x)


def test_conjugate_and_negative_views_are_stored_as_what_they_show(isa):
    z = random(torch.complex64, 100, 0.5)
    for view in (z.conj(), z.conj().imag):
        plain = view.resolve_conj().resolve_neg().contiguous()
        assert_same_bits(sk.pack_zvc(view).unpack(), plain)
        stream = torch.ops.sparsekern.pack_zvc(view)
        assert_same_bits(sk.unpack_zvc(*stream, [100]), plain)


# ---- blocks, turns and addresses of the compiled kernels ----


def skewed(dtype: torch.dtype, n: int) -> torch.Tensor:
    """Stretches without zeros, of zeros only, and of both: threads come to their turns early and late."""
    x = random(dtype, n, 0.5, seed=n)
    for start in range(0, n, 30_000):
        x[start : start + 9_000] = 0
        x[start + 11_000 : start + 20_000] = random(
            dtype, len(x[start + 11_000 : start + 20_000]), 1
        )
    return x


@pytest.mark.parametrize("dtype", ONE_PER_SIZE, ids=str)
def test_the_bytes_around_borders_of_tiles_and_blocks_are_those_of_one_thread(isa, threads, dtype):
    tile, block = 4096, (256 << 10) // dtype.itemsize
    for n in (
        16 * tile,
        40 * tile + 1,
        5 * block - 1,
        5 * block,
        5 * block + 1,
        24 * block + tile + 63,
    ):
        check_round_trip(cpu, skewed(dtype, n))


def test_callers_at_once_each_get_their_own_bytes(isa, threads):
    tensors = [skewed(dtype, 300_000 + i) for i in range(3) for dtype in ONE_PER_SIZE]
    wanted = [pack_in_numpy(x) for x in tensors]

    def pack(i: int) -> None:
        for got, want in zip(cpu.pack_zvc(tensors[i]), wanted[i], strict=True):
            assert_same_bits(got, want)
        assert_same_bits(cpu.unpack_zvc(*wanted[i], [tensors[i].numel()]), tensors[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pack, [*range(len(tensors))] * 3))


def at_address(data: bytes, skew: int) -> tuple[ctypes.Array, int]:
    """A buffer and an address in it, `skew` bytes past a cache line, where `data` lies between canaries."""
    buffer = (ctypes.c_uint8 * (len(data) + 256)).from_buffer_copy(b"\x4d" * (len(data) + 256))
    address = ctypes.addressof(buffer)
    address += -address % 64 + 64 + skew
    ctypes.memmove(address, data, len(data))
    return buffer, address


def around(buffer: ctypes.Array, address: int, length: int) -> tuple[bytes, bytes]:
    """What lies at the address, and what lies around it."""
    start, everything = address - ctypes.addressof(buffer), bytes(buffer)
    return everything[start : start + length], everything[:start] + everything[start + length :]


@pytest.mark.parametrize("dtype", ONE_PER_SIZE, ids=str)
@pytest.mark.parametrize("skew", [0, 1, 4, 31, 63])
def test_any_address_of_bytes_will_do_and_nothing_outside_is_written(isa, dtype, skew):
    size = dtype.itemsize
    for n, threads in ((1, 1), (200, 1), (4096 * 3 + 77, 1), (4096 * 33 + 77, 3)):
        x = random(dtype, n, 0.6)
        mask, values, offsets = (t.view(torch.uint8).numpy().tobytes() for t in pack_in_numpy(x))
        data, count = x.view(torch.uint8).numpy().tobytes(), len(values) // size
        for room in (count, count // 2):
            source = at_address(data, skew)
            got = [at_address(bytes(length), s) for length, s in
                   ((len(mask), skew), (room * size, skew), (len(offsets), 0))]  # fmt: skip
            (_, m), (_, v), (_, o) = got
            assert cpu._cpu.zvc_compress(source[1], n, size, m, v, room, o, threads) == count
            for at, want in zip(got, (mask, values[: room * size], offsets), strict=True):
                inside, outside = around(*at, len(want))
                assert inside == want
                assert set(outside) == {0x4D}
        back = at_address(bytes(len(data)), skew)
        assert cpu._cpu.zvc_expand(m, v, room, o, n, size, back[1], threads) != ""  # half of values
        v = at_address(values, 63 - skew)
        assert cpu._cpu.zvc_expand(m, v[1], count, o, n, size, back[1], threads) == ""
        inside, outside = around(*back, len(data))
        assert inside == data
        assert set(outside) == {0x4D}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_past_the_cache_where_lines_are_streamed(isa, dtype):
    n = cpu._cpu.cache_bytes() // dtype.itemsize + 5 * 4096 + 77
    if n * dtype.itemsize > 200 << 20:
        n = (200 << 20) // dtype.itemsize + 77
    x = torch.randint(1, 100, (n,), dtype=torch.uint8).to(dtype)
    x[torch.rand(n) < 0.5] = 0
    nonzero = x != 0
    wanted, count = x[nonzero], int(nonzero.sum())
    mask = torch.from_numpy(np.packbits(nonzero.numpy(), bitorder="little"))
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        offsets, got = (
            torch.empty(-(-n // 4096), dtype=torch.int64),
            torch.empty(1, dtype=torch.int64),
        )
        for room in (count, count - 1001):
            values = torch.full((room + 130,), 77, dtype=dtype)
            out = values[65:-65]
            got_mask = torch.empty_like(mask)
            cpu.pack_zvc_out(x, got_mask, out, offsets, got)
            assert int(got) == count
            assert torch.equal(got_mask, mask)
            assert torch.equal(out, wanted[:room])
            assert bool((values[:65] == 77).all() & (values[-65:] == 77).all())
        back = torch.full((n + 130,), 77, dtype=dtype)
        address = back.data_ptr() + 65 * dtype.itemsize
        assert cpu._cpu.zvc_expand(mask.data_ptr(), wanted.data_ptr(), count, offsets.data_ptr(), n,
                                   dtype.itemsize, address, threads) == ""  # fmt: skip
        assert torch.equal(back[65:-65], x)
        assert bool((back[:65] == 77).all() & (back[-65:] == 77).all())
    torch.set_num_threads(before)


@pytest.mark.parametrize("mapped", [False, True], ids=["small", "mapped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_hold_storage_for_themselves_and_no_more(backend, full, monkeypatch, mapped, dtype):
    if mapped:
        monkeypatch.setattr(cpu, "_ALWAYS_NEW_BYTES", 1)
    n = 50_003 if full else 5_003
    for density in (0, 0.3, 1):
        x = random(dtype, n, density)
        mask, values, offsets = backend.pack_zvc(x)
        assert_same_bits(values, pack_in_numpy(x)[1])
        assert values.untyped_storage().nbytes() == values.numel() * dtype.itemsize
        assert_same_bits(backend.unpack_zvc(mask, values, offsets, [n]), x)
        saved = io.BytesIO()
        torch.save(values, saved)
        assert saved.tell() < values.nbytes + 4096
        saved.seek(0)
        assert_same_bits(torch.load(saved), values)
        if values.numel():
            values.view(torch.uint8).fill_(1)  # its memory can be written to


def test_values_of_a_large_tensor_outlive_it_and_return_their_memory(isa):
    x = torch.zeros(cpu._ALWAYS_NEW_BYTES // 4 + 1)
    x[::3] = 1.5
    packed = sk.pack_zvc(x)
    assert packed.values.untyped_storage().nbytes() == -(-x.numel() // 3) * 4
    view = packed.values[5:10]
    del packed
    assert view.tolist() == [1.5] * 5


# ---- into room that the caller gives ----


@pytest.mark.parametrize("dtype", ONE_PER_SIZE, ids=str)
def test_nothing_is_written_past_the_room_and_the_count_is_always_right(
    backend, full, threads, dtype
):
    x = random(dtype, (20 if full else 8) * 4096 + 77, 0.3)
    mask, values, offsets = pack_in_numpy(x)
    stored = values.numel()
    rooms = (0, 1, 63, int(offsets[7]), int(offsets[7]) + 5, stored - 1, stored, stored + 1)
    for room in rooms if full else rooms[2::3]:
        # Each output lies between canaries, at an odd place.
        buffers = [torch.full((t + 128,), 77, dtype=d) for t, d in
                   ((mask.numel(), torch.uint8), (room, WORD[dtype.itemsize]),
                    (offsets.numel(), torch.int64), (1, torch.int64))]  # fmt: skip
        out = [b[63:-65] for b in buffers]
        out[1] = out[1].view(dtype)
        assert checked(backend, "pack_zvc_out", x, *out) is None
        assert out[3].tolist() == [stored]
        assert_same_bits(out[0], mask)
        assert_same_bits(out[2], offsets)
        assert_same_bits(out[1][:stored], values[:room])
        assert bool((bits(out[1])[stored:] == 77).all())
        for buffer in buffers:
            assert bool((buffer[:63] == 77).all())
            assert bool((buffer[-65:] == 77).all())


def test_the_op_writes_into_its_arguments(isa):
    x = random(torch.float32, 5000, 0.5)
    want = pack_in_numpy(x)
    mask, offsets = torch.empty(625, dtype=torch.uint8), torch.empty(2, dtype=torch.int64)
    values, count = torch.empty(5000), torch.empty(1, dtype=torch.int64)
    torch.ops.sparsekern.pack_zvc_out(x, mask, values, offsets, count)
    for got, wanted in zip((mask, values[: int(count)], offsets), want, strict=True):
        assert_same_bits(got, wanted)


# ---- decoding: tiles in any order, and no lie ----


@pytest.mark.parametrize("dtype", ONE_PER_SIZE, ids=str)
@pytest.mark.parametrize("density", [0.0003, 0.5])
def test_tiles_may_lie_in_any_order(backend, full, dtype, density):
    x = random(dtype, (50 if full else 9) * 4096 + 9, density)
    mask, values, offsets = pack_in_numpy(x)
    ends = [*offsets[1:].tolist(), values.numel()]
    pieces = [values[a:b] for a, b in zip(offsets.tolist(), ends, strict=True)]
    order = np.random.default_rng(1).permutation(len(pieces))
    shuffled, moved, at = [], offsets.clone(), 0
    for tile in order:
        moved[tile], at = at, at + len(pieces[tile])
        shuffled.append(pieces[tile])
    stream = mask, torch.cat(shuffled), moved
    assert not torch.equal(moved, offsets)
    assert_same_bits(checked(backend, "unpack_zvc", *stream, [x.numel()]), x)


def test_an_empty_tile_may_point_anywhere_within_the_values(backend):
    x = torch.zeros(3 * 4096)
    x[0] = x[-1] = 1.0
    mask, values, _ = pack_in_numpy(x)
    for middle in (0, 1, 2):
        offsets = torch.tensor([0, middle, 1])
        assert torch.equal(checked(backend, "unpack_zvc", mask, values, offsets, [3 * 4096]), x)
    for outside in (-1, 3):
        with pytest.raises(ValueError, match="unpack_zvc: offsets"):
            checked(backend, "unpack_zvc", mask, values, torch.tensor([0, outside, 1]), [3 * 4096])


N = 3 * 4096 + 5  # the last byte of mask holds five bits


def edit(at, value):
    def apply(t):
        t = t.clone()
        t[at] = value
        return t

    return apply


# (what lies, how mask, values, offsets, size change, the words in the message)
SAME = lambda t: t  # noqa: E731
LIES = {
    "a mask bit past the last element": (
        lambda m: m | edit(-1, 32)(m * 0),
        SAME,
        SAME,
        [N],
        "mask",
    ),
    "the last mask bit": (lambda m: m | edit(-1, 128)(m * 0), SAME, SAME, [N], "mask"),
    "one more marked": (lambda m: m | edit(5, 255)(m * 0), SAME, SAME, [N], "mask marks"),
    "none marked": (lambda m: m * 0, SAME, SAME, [N], "mask marks 0"),
    "one value less": (SAME, lambda v: v[:-1], SAME, [N], "values"),
    "one value more": (SAME, lambda v: torch.cat([v, v[:1]]), SAME, [N], "values"),
    "no values": (SAME, lambda v: v[:0], SAME, [N], "values holds 0"),
    "a negative offset": (SAME, SAME, edit(0, -1), [N], "offsets"),
    "the most negative offset": (SAME, SAME, edit(2, -(2**63)), [N], "offsets"),
    "an offset one too far": (SAME, SAME, lambda o: edit(3, int(o[3]) + 1)(o), [N], "offsets"),
    "an offset far too far": (SAME, SAME, edit(1, 2**63 - 1), [N], "offsets"),
    "an offset that overflows in bytes": (SAME, SAME, edit(1, 2**61), [N], "offsets"),
    "overlapping tiles": (SAME, SAME, lambda o: edit(1, int(o[1]) - 1)(o), [N], "overlap"),
    "two tiles in one place": (SAME, SAME, lambda o: edit(1, 0)(o), [N], "overlap"),
    "a gap": (SAME, SAME, lambda o: edit(1, int(o[1]) + 1)(o), [N], "gap"),
    "a short mask": (lambda m: m[:-1], SAME, SAME, [N], "mask"),
    "a long mask": (lambda m: torch.cat([m, m[:1] * 0]), SAME, SAME, [N], "mask"),
    "short offsets": (SAME, SAME, lambda o: o[:-1], [N], "offsets"),
    "long offsets": (SAME, SAME, lambda o: torch.cat([o, o[:1]]), [N], "offsets"),
    "a smaller size": (SAME, SAME, SAME, [N - 8], "mask"),
    "a size that ends before the last mark": (lambda m: m | 128, SAME, SAME, [N - 1], "mask"),
    "a larger size": (SAME, SAME, SAME, [N + 8], "mask"),
    "a size of nothing": (SAME, SAME, SAME, [N, 0], "mask"),
    "a negative size": (SAME, SAME, SAME, [-N], "size"),
    "two negative sizes": (SAME, SAME, SAME, [-1, -N], "size"),
    "a size past 2^31": (SAME, SAME, SAME, [2**31 + 4097], "mask"),
    "a size past 2^32 that wraps": (SAME, SAME, SAME, [2**32 + N], "mask"),
    "a size past 2^63": (SAME, SAME, SAME, [2**62, 2**62, 16], "mask"),
    "a mask of two dimensions": (lambda m: m[None], SAME, SAME, [N], "mask"),
    "values of two dimensions": (SAME, lambda v: v[None], SAME, [N], "values"),
    "offsets of two dimensions": (SAME, SAME, lambda o: o[None], [N], "offsets"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_stream_that_lies_is_a_value_error(backend, lie):
    on_mask, on_values, on_offsets, size, words = LIES[lie]
    mask, values, offsets = pack_in_numpy(random(torch.float32, N, 0.5))
    stream = on_mask(mask), on_values(values), on_offsets(offsets)
    changed = any(a is not b for a, b in zip(stream, (mask, values, offsets), strict=True))
    assert changed or size != [N]
    with pytest.raises(ValueError, match=f"^unpack_zvc: .*{words}"):
        checked(backend, "unpack_zvc", *stream, size)


def test_the_public_functions_find_the_lies_too(isa):
    packed = sk.pack_zvc(random(torch.float32, N, 0.5))
    mask, values, offsets = packed.mask, packed.values, packed.offsets
    with pytest.raises(ValueError, match="unpack_zvc: mask has bits set past the last element"):
        sk.unpack_zvc(edit(-1, 255)(mask), values, offsets, [N])
    with pytest.raises(ValueError, match="unpack_zvc: mask marks"):
        torch.ops.sparsekern.unpack_zvc(mask, values[1:], offsets, [N])
    with pytest.raises(ValueError, match="unpack_zvc: offsets"):
        sk.PackedZVC(mask, values, offsets - 1, packed.shape, packed.stride).unpack()
    with pytest.raises(ValueError, match="unpack_zvc: mask has shape"):
        sk.PackedZVC(mask, values, offsets, torch.Size([N + 8]), (1,)).unpack()


B = torch.zeros(625, dtype=torch.uint8)
O = torch.zeros(2, dtype=torch.int64)  # noqa: E741
C = O[:1]
X = torch.zeros(5000)
OPS = torch.ops.sparsekern
REFUSED = [
    (lambda: sk.pack_zvc(X.to(torch.complex128)), TypeError, "pack_zvc x complex128 float8_e5m2"),
    (lambda: OPS.pack_zvc(X.to_sparse()), TypeError, "pack_zvc x sparse_coo strided"),
    (lambda: sk.unpack_zvc(B.char(), X[:0], O, [5000]), TypeError, "unpack_zvc mask int8 uint8"),
    (lambda: sk.unpack_zvc(B, X[:0], O.int(), [5000]), TypeError, "unpack_zvc offsets int32 int64"),
    (
        lambda: sk.unpack_zvc(B, X[:0].cdouble(), O, [5000]),
        TypeError,
        "unpack_zvc values complex128",
    ),
    (
        lambda: sk.unpack_zvc(B, X[:0].to("meta"), O, [5000]),
        ValueError,
        "unpack_zvc mask cpu values, meta",
    ),
    (lambda: OPS.pack_zvc_out(X, B[1:], X, O, C), ValueError, "pack_zvc_out mask (624,) (625,)"),
    (lambda: OPS.pack_zvc_out(X, B, X, C, C), ValueError, "pack_zvc_out offsets (1,) (2,)"),
    (lambda: OPS.pack_zvc_out(X, B, X, O, O), ValueError, "pack_zvc_out count (2,) (1,)"),
    (
        lambda: OPS.pack_zvc_out(X, B, X.half(), O, C),
        TypeError,
        "pack_zvc_out values float16 float32",
    ),
    (lambda: OPS.pack_zvc_out(X, B, X[None], O, C), ValueError, "pack_zvc_out values (1, 5000)"),
    (
        lambda: OPS.pack_zvc_out(X, B, X[::2], O, C),
        ValueError,
        "pack_zvc_out values (2,) contiguous",
    ),
    (lambda: OPS.pack_zvc_out(X, B.int(), X, O, C), TypeError, "pack_zvc_out mask int32 uint8"),
    (lambda: OPS.pack_zvc_out(X, B, X, O.int(), C), TypeError, "pack_zvc_out offsets int32 int64"),
    (lambda: OPS.pack_zvc_out(X, B, X, O, C.int()), TypeError, "pack_zvc_out count int32 int64"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_refusal_names_the_op_the_argument_what_it_got_and_what_it_takes(call, error, words):
    with pytest.raises(error) as e:
        call()
    assert [word for word in words.split(" ") if word not in str(e.value)] == []


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu.isas()[:1] if cpu._missing is None else [], indirect=True)
def test_more_than_2_to_the_31_elements(isa):
    n = 2**31 + 4097  # the last tile, of one element, starts past 2^31
    x = torch.zeros(n, dtype=torch.uint8)
    marked = torch.cat([torch.arange(0, n, 100_003), torch.tensor([2**31 - 1, 2**31, n - 1])])
    x[marked] = (marked % 255 + 1).to(torch.uint8)
    mask, values, offsets = torch.ops.sparsekern.pack_zvc(x)
    assert (mask.numel(), offsets.numel()) == (2**28 + 513, 2**19 + 2)
    at = marked.unique()
    assert torch.equal(values, (at % 255 + 1).to(torch.uint8))
    assert int(offsets[-1]) == at.numel() - 1
    assert mask[-1] == 1
    back = sk.unpack_zvc(mask, values, offsets, [n])
    for start in range(0, n, 2**28):  # no copy of the whole
        assert torch.equal(back[start : start + 2**28], x[start : start + 2**28])


# ---- what pack_zvc returns ----


def test_a_packed_tensor_knows_its_size_and_ratio(isa):
    x = torch.zeros(3, 4096)
    x[0, :1000] = 1
    packed = sk.pack_zvc(x)
    assert packed.nbytes == 3 * 512 + 1000 * 4 + 3 * 8
    assert packed.ratio == pytest.approx(3 * 4096 * 4 / packed.nbytes)
    assert (packed.shape, packed.stride) == (x.shape, (4096, 1))
    assert (packed.dtype, packed.device) == (torch.float32, torch.device("cpu"))
    assert repr(packed) == (
        "PackedZVC(shape=(3, 4096), dtype=torch.float32, device=cpu, nbytes=5560, ratio=8.84)"
    )
    assert sk.pack_zvc(x[:0]).ratio == 1.0
    assert sk.pack_zvc(torch.ones(4096)).ratio < 1


def test_a_packed_tensor_moves_and_keeps_its_layout(isa):
    x = random(torch.float16, 24, 0.5).reshape(4, 6).t()
    packed = sk.pack_zvc(x)
    there = packed.to("meta")
    assert {t.device.type for t in (there.mask, there.values, there.offsets)} == {"meta"}
    assert (there.shape, there.stride, there.dtype) == (x.shape, x.stride(), x.dtype)
    here = packed.to("cpu", non_blocking=True)
    assert_same_bits(here.unpack(), x)
    assert here.unpack().stride() == (1, 6)
    assert not sk.pack_zvc(torch.ones(3, requires_grad=True)).unpack().requires_grad


def test_the_reference_and_the_kernels_agree_on_the_tile():
    assert ops.ZVC_TILE == reference.ZVC_TILE == 4096
    assert cpu.SERVES["pack_zvc"] == ops.ZVC_DTYPES
