"""Property tests: any 2:4 matrix, any bytes, any corruption; a lie is refused, never a crash."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern import ops, reference, selftest
from sparsekern.backends import cpu

WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LEGAL = (4, 8, 9, 12, 13, 14)
FORMATS = sorted(ops.FORMAT_DTYPES, key=str)
PRODUCTS = [torch.float32, torch.float16, torch.bfloat16]


def examples(count: int, **options):
    # The fixtures set the instruction set once for all examples of a test, as they should.
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        **options,
    )


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(WORD[t.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))


def tensor_of(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    data = data[: len(data) // dtype.itemsize * dtype.itemsize]
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


# ---- 2:4 ----


@st.composite
def packed_weights(draw):
    """values of any bits and legal meta of a weight [N, K]."""
    N, groups = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(FORMATS))
    size = N * groups * 2 * dtype.itemsize
    values = tensor_of(draw(st.binary(min_size=size, max_size=size)), dtype)
    count = N * groups
    nibbles = torch.tensor(
        draw(st.lists(st.sampled_from(LEGAL), min_size=count, max_size=count))
    ).reshape(N, groups)
    nibbles = F.pad(nibbles, (0, groups % 2), value=4)
    meta = (nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)
    return values.reshape(N, 2 * groups), meta


@examples(80)
@given(weight=packed_weights())
def test_any_2_of_4_matrix_packs_and_unpacks_to_itself(backend, weight):
    sk.check_24(*weight)
    dense = backend.unpack_24(*weight)
    values, meta = backend.pack_24(dense)
    sk.check_24(values, meta)
    # -0.0 is a zero of the 2:4 format and comes back as +0.0; all else comes back bit for bit.
    want = bits(dense)
    if dense.dtype.is_floating_point:
        want = torch.where(dense == 0, 0, want)
    assert same_bits(backend.unpack_24(values, meta), want.view(dense.dtype))
    assert sk.is_24(dense)


@examples(80)
@given(data=st.binary(min_size=8, max_size=2000), dtype=st.sampled_from(FORMATS))
def test_pruning_is_idempotent_and_keeps_the_two_largest(backend, data, dtype):
    weight = tensor_of(data, dtype)
    weight = weight[: weight.numel() // 4 * 4].reshape(1, -1)
    pruned = backend.prune_24(weight)
    assert same_bits(backend.prune_24(pruned), pruned)
    assert sk.is_24(pruned)
    assert bool(((bits(pruned) == bits(weight)) | (bits(pruned) == 0)).all())
    size = weight.abs() if dtype.is_floating_point else weight.long().abs()
    size = size.double().nan_to_num(nan=torch.inf).reshape(-1, 4)
    gone = torch.where(bits(pruned).reshape(-1, 4) == 0, size, 0).amax(-1)
    kept = torch.where(bits(pruned).reshape(-1, 4) != 0, size, torch.inf).amin(-1)
    assert bool((gone <= kept).all())


@examples(60)
@given(
    M=st.integers(0, 70),
    N=st.integers(0, 110),
    groups=st.integers(0, 70),
    dtype=st.sampled_from(PRODUCTS),
    activation=st.sampled_from(["none", "relu", "relu2"]),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_linear_of_any_shape_is_exact_on_integers(
    backend, M, N, groups, dtype, activation, bias, seed
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    x, b = draw(M, 4 * groups), draw(N) if bias else None
    values, meta = reference.pack_24(draw(N, 4 * groups))
    dense = reference.unpack_24(values.double(), meta)
    z = F.linear(x.double(), dense, None if b is None else b.double())
    want = {"none": z, "relu": z.relu(), "relu2": z.relu() ** 2}[activation].to(dtype)
    got = backend.linear_24(x, values, meta, b, activation)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@examples(40, derandomize=True)  # a bound on errors holds for most draws, not for all there are
@given(
    M=st.integers(16, 200),
    N=st.integers(40, 110),
    groups=st.integers(1, 300),
    dtype=st.sampled_from(PRODUCTS),
    seed=st.integers(0, 9),
)
def test_linear_of_any_shape_errs_at_most_twice_as_much_as_torch(
    backend, M, N, groups, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, 4 * groups, generator=generator).to(dtype)
    values, meta = reference.pack_24(torch.randn(N, 4 * groups, generator=generator).to(dtype))
    args = x, values, meta, None, "none"
    assert selftest.check_product("linear_24", args, backend.linear_24(*args), exact=False) is None


@examples(100)
@given(data=st.binary(min_size=6, max_size=400), groups=st.integers(1, 12))
def test_check_takes_legal_nibbles_and_nothing_else(data, groups):
    width = (groups + 1) // 2
    N = len(data) // width
    meta = tensor_of(data[: N * width], torch.uint8).reshape(N, width)
    values = torch.zeros(N, 2 * groups)
    wrong = [
        (row, g)
        for row in range(N)
        for g in range(2 * width)
        if data[row * width + g // 2] >> 4 * (g % 2) & 15 not in (LEGAL if g < groups else (4,))
    ]
    if wrong:
        row, group = wrong[0]
        with pytest.raises(ValueError, match=f"check_24: meta row {row}, group {group} is"):
            sk.check_24(values, meta)
    else:
        sk.check_24(values, meta)


@examples(60)
@given(
    M=st.sampled_from([1, 2, 5, 12, 40]),
    N=st.integers(1, 60),
    groups=st.integers(1, 60),
    dtype=st.sampled_from(PRODUCTS),
    data=st.binary(min_size=1, max_size=64),
)
def test_illegal_meta_reads_nothing_outside_its_group(backend, M, N, groups, dtype, data):
    # What comes out is unspecified, but it is made of the 1s in x and values and never of the NaNs
    # around them.
    K, width = 4 * groups, (groups + 1) // 2
    meta = tensor_of(data * (-(-N * width // len(data))), torch.uint8)[: N * width]
    meta = meta.reshape(N, width)
    x = torch.full((M + 2, K), torch.nan, dtype=dtype)
    x[1:-1] = 1
    values = torch.full((N + 2, K // 2), torch.nan, dtype=dtype)
    values[1:-1] = 1
    y = backend.linear_24(x[1:-1], values[1:-1], meta)
    assert (y.shape, y.dtype) == ((M, N), dtype)
    assert bool(((y >= 0) & (y <= 2 * groups)).all())
    dense = backend.unpack_24(values[1:-1], meta)
    assert dense.shape == (N, K)
    assert bool(((dense == 0) | (dense == 1)).all())
    gathered = backend.gather_24(torch.ones(N, K, dtype=dtype), meta)
    assert bool((gathered == 1).all())
    pruned = sk.pack_24(dense)  # whatever it was, it decodes to a 2:4 weight
    assert same_bits(sk.unpack_24(*pruned), dense)


# ---- zero-value compression ----


@st.composite
def sparse_tensors(draw):
    """A few tiles of bits, mostly zero, of any dtype."""
    dtype = draw(st.sampled_from(sorted(ops.ZVC_DTYPES, key=str)))
    n = draw(st.one_of(st.integers(0, 80), st.integers(4080, 4110), st.integers(0, 13000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0, 0.001, 0.1, 0.5, 1]))
    data = torch.randint(256, (n, dtype.itemsize), generator=generator, dtype=torch.uint8)
    data[torch.rand(n, generator=generator) >= density] = 0
    data = data.flatten()
    for byte in draw(st.binary(max_size=8)):  # and some bytes anywhere
        if n:
            data[byte * 7919 % data.numel()] = byte
    return tensor_of(data.numpy().tobytes(), dtype)


@examples(80)
@given(x=sparse_tensors())
def test_any_bytes_survive_zero_value_compression(backend, x):
    stream = backend.pack_zvc(x)
    for got, want in zip(stream, reference.pack_zvc(x), strict=True):
        assert same_bits(got, want)
    assert same_bits(backend.unpack_zvc(*stream, [x.numel()]), x)


@st.composite
def corrupted_streams(draw):
    """A stream after up to three edits of mask, values or offsets, and a size that may lie too."""
    x = draw(sparse_tensors())
    stream, size = list(reference.pack_zvc(x)), x.numel()
    for _ in range(draw(st.integers(1, 3))):
        which = draw(st.sampled_from([0, 0, 1, 2, 2]))
        t = stream[which].clone()
        n = t.numel()
        at = draw(st.integers(0, max(n - 1, 0)))
        edit = draw(st.sampled_from(["bit", "swap", "truncate", "extend", "shift", "wild", "size"]))
        if edit == "size":
            size = max(0, size + draw(st.sampled_from([-4096, -8, -1, 1, 7, 8, 4096, 2**31])))
        elif edit == "truncate":
            t = t[:at]
        elif edit == "extend":
            t = torch.cat([t, t[: draw(st.integers(0, 8))], t.new_zeros(draw(st.integers(0, 2)))])
        elif n == 0:
            continue
        elif edit == "bit":
            word = bits(t).view(torch.uint8)
            byte = draw(st.integers(0, word.numel() - 1))
            word[byte] ^= 1 << draw(st.integers(0, 7))
            t = word.view(t.dtype)
        elif edit == "swap":
            words, other = bits(t), draw(st.integers(0, n - 1))
            words[[at, other]] = words[[other, at]]
            t = words.view(t.dtype)
        elif which == 2 and edit == "shift":
            t[at] += draw(st.sampled_from([-4096, -1, 1, 2, 4096]))
        elif which == 2 and edit == "wild":
            t[at] = draw(st.integers(-(2**63), 2**63 - 1))
        stream[which] = t
    return (*stream, [size])


def decode(function, stream):
    """The tensor, or the words of the ValueError; any other exception is a failure."""
    try:
        ops.OPS["unpack_zvc"].check(*stream)
        return function(*stream)
    except ValueError as error:
        message = str(error)
    assert message.startswith("unpack_zvc: ")
    return None


@examples(250)
@given(stream=corrupted_streams())
def test_a_corrupted_stream_is_refused_or_decodes_as_the_reference_does(isa, stream):
    want = decode(reference.unpack_zvc, stream)
    got = decode(cpu.unpack_zvc, stream)
    assert (got is None) == (want is None)
    if want is not None:
        assert got.shape == tuple(stream[-1])
        assert same_bits(got, want)


def test_the_corruptions_reach_both_outcomes():
    outcomes = set()

    @examples(100, derandomize=True)
    @given(stream=corrupted_streams())
    def look(stream):
        outcomes.add(decode(reference.unpack_zvc, stream) is None)

    look()
    assert outcomes == {True, False}
