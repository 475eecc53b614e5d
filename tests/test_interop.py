"""Other people's formats: bytes worked out by hand, then against those who made them, both ways and bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.sparse import _semi_structured_conversions as pytorch

import sparsekern as sk
from sparsekern import interop, pruning
from sparsekern.interop import bitmask, cutlass
from sparsekern.interop.packed import Packed, first_dense_group, pack, unpack

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]


def same(a, b) -> bool:
    """Bit for bit, dtype and shape."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def sparse_weight(N: int, K: int, dtype=torch.float32, seed=0, density=0.8):
    """2:4, with groups that keep two, one and none, in small numbers that every dtype holds."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(1, 8, (N, K), generator=generator)
    if dtype is not torch.uint8:
        weight *= 1 - 2 * torch.randint(0, 2, (N, K), generator=generator)
    weight *= torch.rand(N, K, generator=generator) < density
    weight = torch.nn.functional.pad(weight.float(), (0, -K % 4))
    return sk.prune_24(weight)[:, :K].to(dtype).contiguous()


def random_packed(N: int, K: int, dtype=torch.float16, seed=0):
    """Legal values and meta of any bits: NaN payloads, infinities, negative zeros in kept slots."""
    generator = torch.Generator().manual_seed(seed)
    size = N * K // 2 * dtype.itemsize
    content = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    values = content.view(dtype).view(N, K // 2)
    legal = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
    nibbles = legal[torch.randint(0, 6, (N, (K + 7) // 8 * 2), generator=generator)]
    nibbles[:, K // 4 :] = 4
    return values, nibbles[:, 0::2] | nibbles[:, 1::2] << 4


# ---- packed weights of any dtype and width ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 3, 4, 7, 12, 30, 64])
def test_a_sparse_weight_packs_and_unpacks_at_any_width(dtype, K):
    weight = sparse_weight(5, K, dtype)
    assert first_dense_group(weight) is None
    packed = pack(weight)
    assert packed.shape == (5, K)
    assert packed.values.dtype is dtype
    assert same(unpack(packed), weight)


def test_eight_bit_floats_are_pruned_by_magnitude_and_a_negative_zero_is_a_zero():
    weight = torch.tensor([[-0.0, 1.0, -8.0, 2.0], [-0.0, -0.0, 3.0, 0.0]]).to(torch.float8_e4m3fn)
    assert first_dense_group(weight) == (0, 0)
    assert first_dense_group(weight[1:]) is None
    want = torch.tensor([[0.0, 0.0, -8.0, 2.0], [0.0, 0.0, 3.0, 0.0]]).to(torch.float8_e4m3fn)
    assert same(unpack(pack(weight)), want)


def test_what_is_kept_past_the_last_column_is_refused():
    packed = pack(torch.ones(1, 4))
    with pytest.raises(ValueError, match="past column 1"):
        unpack(Packed(packed.values, packed.meta, 1))


# ---- sparse-24-bitmask ----

# Groups that keep 0,3 / 1,2 / 0,1: nibbles 12, 9, 4 and an odd group's 4; halves 9, 6, 3.
DENSE = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0, 5, 6, 0, 0]])
META = torch.tensor([[0x9C, 0x44]], dtype=torch.uint8)
BITMASK = torch.tensor([[0x69, 0x03]], dtype=torch.uint8)
VALUES = torch.tensor([[1.0, 2, 3, 4, 5, 6]])


def test_bitmask_by_hand():
    values, meta = sk.pack_24(DENSE)
    assert same(values, VALUES)
    assert same(meta, META)
    shape, compressed, bits = interop.to_bitmask(values, meta)
    assert same(shape, torch.tensor([[1], [12]]))
    assert same(compressed, VALUES)
    assert same(bits, BITMASK)
    values, meta = interop.from_bitmask(shape, compressed, bits)
    assert same(values, VALUES)
    assert same(meta, META)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 4), (3, 8), (2, 12), (7, 20), (16, 64), (0, 8), (3, 0)])
def test_bitmask_both_ways_bit_for_bit(dtype, N, K):
    values, meta = random_packed(N, K, dtype)
    again = interop.from_bitmask(*interop.to_bitmask(values, meta))
    assert same(again[0], values)
    assert same(again[1], meta)
    for got, want in zip(interop.to_bitmask(*again), interop.to_bitmask(values, meta), strict=True):
        assert same(got, want)


def test_a_bitmask_over_the_end_of_rows_is_read_dense():
    # Two rows of six: groups of the flattened weight are columns 0-3, 4-5 with the next row's 0-1, 2-5.
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    bits = torch.tensor([[0b000011], [0b100111]], dtype=torch.uint8)
    compressed = torch.tensor([[1.0, 2, 3], [4, 5, -0.0]])
    want = torch.zeros(2, 6)
    want[mask] = compressed.flatten()
    shape = torch.tensor([[2], [6]])
    assert same(bitmask.read(shape, compressed, bits), want)
    with pytest.raises(ValueError, match="multiples of 4"):
        interop.from_bitmask(shape, compressed, bits)


def test_a_bitmask_of_three_and_one_is_read_dense():
    bits = torch.tensor([[0b0001_0111]], dtype=torch.uint8)
    shape, compressed = torch.tensor([1, 8]), torch.tensor([[1.0, 2, 3, 4]])
    assert bitmask.read(shape, compressed, bits).tolist() == [[1, 2, 3, 0, 4, 0, 0, 0]]
    with pytest.raises(ValueError, match="row 0, group 0 does not keep exactly two"):
        interop.from_bitmask(shape, compressed, bits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": torch.tensor([1, 12, 1])}, "two integers"),
        ({"shape": torch.tensor([1.0, 12.0])}, "two integers"),
        ({"shape": torch.tensor([1 << 40, 12])}, "bitmask has shape"),
        ({"shape": torch.tensor([1, 1 << 62])}, "bitmask has shape"),
        ({"shape": torch.tensor([-1, 12])}, "bitmask has shape"),
        ({"shape": torch.tensor([1, -12])}, "bitmask has shape"),
        ({"shape": torch.tensor([1, 16])}, "compressed has shape"),
        ({"compressed": VALUES[:, :-1]}, "compressed has shape"),
        ({"compressed": VALUES[0]}, "compressed has shape"),
        ({"compressed": VALUES.long()}, "dtype"),
        ({"bitmask": BITMASK.int()}, "uint8"),
        ({"bitmask": BITMASK[:, :1]}, "bitmask has shape"),
        ({"bitmask": torch.tensor([[0x69, 0x01]], dtype=torch.uint8)}, "keeps 5 elements"),
        ({"bitmask": torch.tensor([[0x69, 0x07]], dtype=torch.uint8)}, "keeps 7 elements"),
        ({"bitmask": torch.tensor([[0x69, 0x21]], dtype=torch.uint8)}, "past column 12"),
    ],
)
def test_a_bitmask_that_lies_is_refused(change, message):
    parts = {"shape": torch.tensor([[1], [12]]), "compressed": VALUES, "bitmask": BITMASK}
    with pytest.raises((ValueError, TypeError), match=message):
        bitmask.read(**{**parts, **change})


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("N", "K"), [(1, 4), (3, 12), (8, 64), (5, 20), (2, 6), (4, 30)])
def test_bitmask_against_compressed_tensors(dtype, N, K):
    from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
        Sparse24BitMaskTensor,
    )

    def decompress(shape, compressed, bits):
        # They cannot assign 8-bit floats by mask on a CPU: as bytes.
        compressed = compressed.view(torch.uint8) if dtype.itemsize == 1 else compressed
        back = Sparse24BitMaskTensor.from_compressed_data(shape, compressed, bits).decompress()
        return back.view(dtype)

    weight = sparse_weight(N, K, dtype)
    theirs = Sparse24BitMaskTensor.from_dense(weight).dict("x.weight")
    assert list(theirs) == ["x.shape", "x.compressed", "x.bitmask"]
    read = bitmask.read(*theirs.values())
    if K % 4:  # their groups reach over the ends of rows, and drop what is too much there
        assert same(read, decompress(*theirs.values()))
        return
    assert same(unpack(read), weight)
    for ours, of_them in zip(
        interop.to_bitmask(read.values, read.meta), theirs.values(), strict=True
    ):
        assert same(ours, of_them)
    packed = pack(weight)
    assert same(decompress(*interop.to_bitmask(packed.values, packed.meta)), weight)


# ---- PyTorch's CUTLASS layout ----


def test_cutlass_metadata_by_hand():
    values, meta = random_packed(32, 32)
    packed, reordered = interop.to_cutlass(values, meta)
    assert same(packed, values)
    logical = meta.view(torch.int16)
    # (row, column) in the order of memory, from the drawing in cutlass.py.
    first = [(0, 0), (8, 0), (0, 1), (8, 1), (16, 0), (24, 0), (16, 1), (24, 1), (1, 0), (9, 0)]
    assert reordered.flatten()[:10].tolist() == [int(logical[at]) for at in first]


def test_cutlass_fp32_is_one_of_two_by_hand():
    # Pairs that keep the second, the first, none, the first: nibbles 14, 4, 4, 4.
    weight = torch.zeros(32, 16)
    weight[0, [1, 2, 6]] = torch.tensor([5.0, 6.0, 7.0])
    packed, meta = interop.to_cutlass(*sk.pack_24(weight))
    assert packed[0].tolist() == [5, 6, 0, 7, 0, 0, 0, 0]
    assert int(meta.flatten()[0]) == 0x444E
    values, back = interop.from_cutlass(packed, meta)
    assert same(sk.unpack_24(values, back), weight)


CUTLASS = [
    (torch.float16, 64, 96),
    (torch.bfloat16, 32, 32),
    (torch.int8, 48, 128),
    (torch.float32, 96, 48),
]


def one_of_two(weight):
    pairs = weight.view(weight.shape[0], -1, 2)
    second = pairs[..., 1].masked_fill(pairs[..., 0] != 0, 0)
    return torch.stack([pairs[..., 0], second], -1).view_as(weight)


@pytest.mark.parametrize(("dtype", "N", "K"), CUTLASS)
def test_cutlass_against_pytorch(dtype, N, K):
    weight = sparse_weight(N, K, dtype)
    weight = one_of_two(weight) if dtype is torch.float32 else weight
    theirs = pytorch.sparse_semi_structured_from_dense_cutlass(weight)
    read = interop.from_cutlass(*theirs)
    assert same(sk.unpack_24(*read), weight)
    for ours, of_them in zip(interop.to_cutlass(*read), theirs, strict=True):
        assert same(ours, of_them)
    ours = interop.to_cutlass(*sk.pack_24(weight))
    assert same(pytorch.sparse_semi_structured_to_dense_cutlass(*ours), weight)


@pytest.mark.parametrize(("dtype", "N", "K"), CUTLASS[:3])
def test_cutlass_both_ways_bit_for_bit(dtype, N, K):
    values, meta = random_packed(N, K, dtype)
    again = interop.from_cutlass(*interop.to_cutlass(values, meta))
    assert same(again[0], values)
    assert same(again[1], meta)


def test_cutlass_has_no_place_for_some():
    weight = torch.zeros(32, 16)
    weight[3, 2:4] = 1
    with pytest.raises(ValueError, match=r"row 3, pair 1 \(columns 2 and 3\) has two non-zeros"):
        interop.to_cutlass(*sk.pack_24(weight))
    with pytest.raises(ValueError, match="rows in multiples of 32"):
        interop.to_cutlass(*random_packed(16, 32))
    with pytest.raises(ValueError, match="columns in multiples of 32"):
        interop.to_cutlass(*random_packed(32, 16))
    with pytest.raises(TypeError, match="float64"):
        interop.to_cutlass(*random_packed(32, 32, torch.float64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, m: (p, m.int()), TypeError, "meta has dtype"),
        (lambda p, m: (p.double(), m), TypeError, "packed has dtype"),
        (lambda p, m: (p[0], m), ValueError, "packed has shape"),
        (lambda p, m: (p[:16], m), ValueError, "rows in multiples"),
        (lambda p, m: (p, m[:, :1]), ValueError, "meta has shape"),
        (lambda p, m: (p, m * 0), ValueError, "nibble"),
        (lambda p, m: (p.float(), torch.full((32, 4), 0x444D, dtype=torch.int16)), ValueError, "4 or 14"),
    ],
)  # fmt: skip
def test_a_cutlass_layer_that_lies_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        interop.from_cutlass(*change(*interop.to_cutlass(*random_packed(32, 32))))


# ---- Sparse-Marlin ----


def test_marlin_words_by_hand():
    values = torch.zeros(64, 16, dtype=torch.int8)
    # The first word's eight nibbles, (row n, kept element k) from the drawing in marlin.py.
    for i, at in enumerate([(0, 0), (0, 8), (4, 0), (4, 8), (0, 1), (0, 9), (4, 1), (4, 9)]):
        values[at] = i - 8
    meta = torch.full((64, 4), 0x44, dtype=torch.uint8)
    scale = torch.arange(64.0).half().view(64, 1)
    packed, scales, reordered = interop.to_marlin(values, meta, scale, 4)
    assert int(packed[0, 0]) == 0x76543210
    assert int(packed[0, 1]) & 0xFFFFFFFF == 0x88888888
    assert scales.tolist() == [list(range(64))]
    assert (reordered == 0x4444).all()
    scales = interop.to_marlin(values, meta, torch.cat([scale, scale + 64], 1), 4)[1]
    assert scales[1, :9].tolist() == [64, 68, 65, 69, 66, 70, 67, 71, 72]


def test_marlin_metadata_by_hand():
    meta = random_packed(64, 64)[1]
    reordered = interop.to_marlin(
        torch.zeros(64, 32, dtype=torch.int8), meta, torch.ones(64, 1).half(), 4
    )[2]
    logical = meta.view(torch.int16)
    first = [(0, 0), (4, 0), (0, 1), (4, 1), (1, 0), (5, 0), (1, 1), (5, 1), (8, 0), (12, 0)]
    assert reordered.flatten()[:10].tolist() == [int(logical[at]) for at in first]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("N", "K", "G"), [(64, 32, 1), (128, 512, 4), (192, 96, 1), (64, 256, 2)])
def test_marlin_both_ways_bit_for_bit(bits, N, K, G):
    limit = 1 << (bits - 1)
    values = torch.randint(-limit, limit, (N, K // 2), dtype=torch.int8)
    meta, scale = random_packed(N, K)[1], torch.rand(N, G).half()
    theirs = interop.to_marlin(values, meta, scale, bits)
    again = interop.from_marlin(*theirs)
    for got, want in zip(again, (values, meta, scale), strict=True):
        assert same(got, want)
    for got, want in zip(interop.to_marlin(*again, bits), theirs, strict=True):
        assert same(got, want)


def test_marlin_dequantised():
    values = torch.tensor([[1, -2, 3, 7], [-8, 0, 1, 1]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2], [1, 0.1]]).half()
    want = [[0.5, -1, 6, 14], [-8, 0, scale[1, 1].item(), scale[1, 1].item()]]
    assert interop.dequantize(values, scale).tolist() == want


@pytest.mark.compressed_tensors
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("G", [1, 4])
def test_marlin_against_compressed_tensors(bits, G):
    from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import (
        Marlin24Compressor,
    )
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    N, K, limit = 128, 512, 1 << (bits - 1)
    quantised = sk.prune_24(torch.randint(1 - limit, limit, (N, K), dtype=torch.int8))
    scale = (torch.rand(N, G) + 0.5).half()
    weight = (quantised.view(N, G, -1).half() * scale.unsqueeze(-1)).view(N, K)
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=True,
        strategy="channel" if G == 1 else "group",
        group_size=None if G == 1 else K // G,
    )
    state = {
        "x.weight": weight,
        "x.weight_scale": scale,
        "x.weight_zero_point": torch.zeros(N, G, dtype=torch.int8),
    }
    theirs = Marlin24Compressor().compress(
        state, {"x": QuantizationScheme(targets=["Linear"], weights=args)}
    )
    theirs = [theirs[f"x.{part}"] for part in ("weight_packed", "scale_packed", "meta")]
    values, meta, scales = interop.from_marlin(*theirs)
    assert same(sk.unpack_24(values, meta), quantised)
    assert same(scales, scale)
    assert same(sk.unpack_24(interop.dequantize(values, scales), meta), weight)
    for ours, of_them in zip(interop.to_marlin(values, meta, scales, bits), theirs, strict=True):
        assert same(ours, of_them)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w, s, m: (w.long(), s, m), TypeError, "weight_packed"),
        (lambda w, s, m: (w, s.float(), m), TypeError, "scale_packed"),
        (lambda w, s, m: (w, s[0], m), ValueError, "scale_packed"),
        (lambda w, s, m: (w, s[:, :0], m), ValueError, "scale_packed"),
        (lambda w, s, m: (w, s[:, :1], m), ValueError, "weight_packed"),
        (lambda w, s, m: (w[:, :-1], s, m), ValueError, "weight_packed"),
        (lambda w, s, m: (w, s.repeat(3, 1), m), ValueError, "weight_packed"),
        (lambda w, s, m: (w, s, m[:, :-1]), ValueError, "meta has shape"),
        (lambda w, s, m: (w, s, m * 0), ValueError, "nibble"),
    ],
)
def test_a_marlin_layer_that_lies_is_refused(change, error, message):
    values = torch.zeros(64, 16, dtype=torch.int8)
    parts = interop.to_marlin(values, random_packed(64, 32)[1], torch.ones(64, 1).half(), 4)
    with pytest.raises(error, match=message):
        interop.from_marlin(*change(*parts))


def test_what_marlin_cannot_hold_is_refused():
    values, meta = torch.full((64, 16), 8, dtype=torch.int8), random_packed(64, 32)[1]
    one = torch.ones(64, 1).half()
    with pytest.raises(ValueError, match="8 to 8; 4 bits take -8 to 7"):
        interop.to_marlin(values, meta, one, 4)
    with pytest.raises(ValueError, match="bits is 3"):
        interop.to_marlin(values, meta, one, 3)
    with pytest.raises(ValueError, match="rows in multiples of 64"):
        interop.to_marlin(values[:32], meta[:32], one[:32], 8)
    with pytest.raises(ValueError, match="scale has shape"):
        interop.to_marlin(values, meta, one.repeat(1, 3), 8)
    with pytest.raises(TypeError, match="values has dtype"):
        interop.to_marlin(values.half(), meta, one, 8)


# ---- all of them, on bytes that mean nothing ----


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_parts_are_read_or_refused(data):
    dtypes = [
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.int8,
        torch.float32,
    ]

    def tensor():
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 16, 32, 64]), max_size=3))
        dtype = data.draw(st.sampled_from(dtypes))
        content = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        return content.view(dtype).view(shape)

    for read, count in ((bitmask.read, 3), (cutlass.from_cutlass, 2), (interop.from_marlin, 3)):
        try:
            read(*(tensor() for _ in range(count)))
        except (ValueError, TypeError):
            continue


# ---- masks ----


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def masks_of(model):
    return {held.name: held.mask for held in pruning.masks(model)}


def torch_ao(model):
    from torch.ao.pruning import WeightNormSparsifier

    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    return sparsifier


def test_masks_of_torch_ao_pruning():
    theirs, ours = net(), net()
    sparsifier = torch_ao(theirs)
    weights = interop.plain_state_dict(theirs.state_dict())
    assert weights.keys() == ours.state_dict().keys()
    nn.init.zeros_(ours[0].weight)
    ours.load_state_dict(weights)
    assert interop.load_masks(ours, sparsifier.state_dict()) == ["0.weight", "2.weight"]
    assert same(ours[0].weight, theirs[0].weight + 0.0)
    x = torch.randn(4, 16)
    assert torch.equal(ours(x), theirs(x))
    assert sk.is_24(ours[0].weight)


def test_squashed_masks_of_torch_ao_pruning_are_the_pattern_of_the_weights():
    theirs, ours = net(), net()
    torch_ao(theirs).squash_mask()
    with pytest.raises(ValueError, match="no mask"):
        interop.load_masks(ours, theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    report = pruning.prune(ours, "2:4")
    assert [layer.kept for layer in report] == [1.0, 1.0]
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_masks_of_asp():
    model, mask = net(), torch.rand(32, 16) < 0.5
    state = net().state_dict()
    state |= {"0.__weight_mma_mask": mask, "0.__weight_mma_pruned_p": torch.zeros(32, 16)}
    model.load_state_dict(interop.plain_state_dict(state))
    assert interop.load_masks(model, state) == ["0.weight"]
    assert same(masks_of(model)["0.weight"], mask)


def test_masks_of_torch_nn_utils_prune():
    from torch.nn.utils import prune

    theirs, ours = net(), net()
    prune.random_unstructured(theirs[0], "weight", 0.5)
    prune.random_unstructured(theirs[2], "bias", 0.5)
    state = theirs.state_dict() | {"attention_mask": torch.ones(3, 3)}
    assert "attention_mask" in interop.plain_state_dict(state)
    ours.load_state_dict(interop.plain_state_dict(theirs.state_dict()))
    assert interop.load_masks(ours, state) == ["0.weight", "2.bias"]
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(ours[2].bias, theirs[2].bias)


def test_masks_of_this_library():
    theirs, ours = net(), net()
    pruning.prune(theirs, "2:4")
    assert interop.load_masks(ours, theirs.state_dict()) == ["0.weight", "2.weight"]
    assert torch.equal(ours[2].weight, theirs[2].weight)
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no mask"),
        ({"attention_mask": torch.ones(2)}, "no mask"),
        ({"9.__weight_mma_mask": torch.ones(2)}, "which the model has not"),
        ({"1.__weight_mma_mask": torch.ones(2)}, "which the model has not"),
        ({"0.__forward_mma_mask": torch.ones(2)}, "which the model has not"),
        ({"0.__weight_mma_mask": torch.ones(16, 32)}, r"\(16, 32\); 0.weight has \(32, 16\)"),
        ({"0.__weight_mma_mask": torch.full((32, 16), 0.5)}, "other than 0 and 1"),
        ({"0.__weight_mma_mask": torch.full((32, 16), float("nan"))}, "other than 0 and 1"),
        ({"state": {"0.weight": {}}}, "no mask"),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_leave_the_model_alone(state, message):
    model = net()
    if "state" not in state and state:
        state = {"2.__weight_mma_mask": torch.ones(8, 32), **state}
    if "no mask" in message:
        state.pop("2.__weight_mma_mask", None)
    with pytest.raises(ValueError, match=message):
        interop.load_masks(model, state)
    assert not masks_of(model)
