"""The reference, pinned by answers worked out by hand: it never judges itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sparsekern import reference

NAN, INF = math.nan, math.inf

# Nibbles i0 | i1 << 2:   (0,1) 4    (0,2) 8    (1,2) 9    (0,3) 12    (1,3) 13    (2,3) 14
#
# One group for each of the 16 patterns of zeros. With more than two non-zeros the two largest stay;
# with fewer, the non-zeros stay first and then the lowest free positions are named.
PATTERNS = [
    # group        values  nibble
    ([0, 0, 0, 0], [0, 0], 4),  # none kept, 0 and 1 are the lowest free
    ([1, 0, 0, 0], [1, 0], 4),  # 0 kept, 1 free
    ([0, 2, 0, 0], [0, 2], 4),  # 1 kept, 0 free: the freed slot comes first
    ([0, 0, 3, 0], [0, 3], 8),  # 2 kept, 0 free
    ([0, 0, 0, 4], [0, 4], 12),  # 3 kept, 0 free
    ([1, 2, 0, 0], [1, 2], 4),
    ([1, 0, 3, 0], [1, 3], 8),
    ([1, 0, 0, 4], [1, 4], 12),
    ([0, 2, 3, 0], [2, 3], 9),
    ([0, 2, 0, 4], [2, 4], 13),
    ([0, 0, 3, 4], [3, 4], 14),
    ([1, 2, 3, 0], [2, 3], 9),
    ([1, 2, 0, 4], [2, 4], 13),
    ([1, 0, 3, 4], [3, 4], 14),
    ([0, 2, 3, 4], [3, 4], 14),
    ([1, 2, 3, 4], [3, 4], 14),
]


def pack_one(group, dtype=torch.float32):
    """values and nibble of one group; the high half of its byte must be the empty 4."""
    values, meta = reference.pack_24(torch.tensor([group], dtype=dtype))
    assert meta.shape == (1, 1)
    assert meta.dtype is torch.uint8
    assert int(meta) >> 4 == 4
    return values[0].tolist(), int(meta) & 15


# ---- 2:4 ----


@pytest.mark.parametrize(("group", "values", "nibble"), PATTERNS)
def test_each_pattern_of_zeros_packs_as_drawn(group, values, nibble):
    assert pack_one(group) == (values, nibble)
    assert pack_one(group, torch.int8) == (values, nibble)


def test_the_patterns_above_are_all_there_are():
    drawn = {tuple(v != 0 for v in group) for group, _, _ in PATTERNS}
    assert drawn == set(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize(
    ("group", "values", "nibble"),
    [
        ([4, 3, 2, 1], [4, 3], 4),
        ([1, 1, 1, 1], [1, 1], 4),  # all tie: 0 and 1
        ([1, -2, 2, -2], [-2, 2], 9),  # three tie: 1 and 2, not 3
        ([-3, 3, 1, 3], [-3, 3], 4),  # the sign does not break a tie
        ([5, 1, -1, 0], [5, 1], 4),
        ([0, 1, -7, 1], [1, -7], 9),
    ],
)
def test_a_tie_keeps_the_lower_index(group, values, nibble):
    assert pack_one(group) == (values, nibble)


def test_a_freed_slot_and_a_kept_negative_zero_hold_positive_zero():
    #        kept: 1, then the lowest free 0 (a -0.0)    none kept, all -0.0
    weight = torch.tensor([[-0.0, 5.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0]])
    values, meta = reference.pack_24(weight)
    assert values.tolist() == [[0.0, 5.0, 0.0, 0.0]]
    assert not values.signbit().any()
    assert meta.tolist() == [[4 | 4 << 4]]
    assert not reference.prune_24(weight).signbit().any()
    assert not reference.prune_24_transposable(weight.expand(4, 8)).signbit().any()


def test_a_nan_counts_as_largest():
    assert pack_one([INF, 1.0, NAN, INF])[1] == 8  # 2, and of the two infinities 0
    assert pack_one([1.0, INF, -NAN, 2.0])[1] == 9
    assert pack_one([NAN, NAN, NAN, INF])[1] == 4


def test_nan_payloads_and_denormals_order_by_their_bits_and_survive():
    #                        smallest NaN  larger       largest, negative   infinity
    bits = torch.tensor([[0x7F800001, 0x7FC00002, 0xFFC00003 - 2**32, 0x7F800000]]).int()
    values, meta = reference.pack_24(bits.view(torch.float32))
    assert values.view(torch.int32).tolist() == [[0x7FC00002, 0xFFC00003 - 2**32]]
    assert int(meta) & 15 == 9
    #                 denormals 1, -3, 2 and a zero, as bf16
    bits = torch.tensor([[0x0001, 0x8003 - 2**16, 0x0002, 0x0000]]).short()
    values, meta = reference.pack_24(bits.view(torch.bfloat16))
    assert values.view(torch.int16).tolist() == [[0x8003 - 2**16, 0x0002]]
    assert int(meta) & 15 == 9


def test_int8_compares_magnitudes_up_to_128_and_uint8_up_to_255():
    assert pack_one([-127, 127, 0, -128], torch.int8) == ([-127, -128], 12)
    assert pack_one([1, 127, 127, -128], torch.int8) == ([127, -128], 13)
    assert pack_one([127, 128, 255, 3], torch.uint8) == ([128, 255], 9)


# Three groups and two rows:   . 2 . 4 | 1 . . 4 | . . 3 4        8 7 . . | . . . . | . 6 5 .
# nibbles                         13        12       14             4         4         9
# bytes, even group low        13 | 12 << 4 = 205   14 | 4 << 4     4 | 4 << 4   9 | 4 << 4
DENSE = torch.tensor([[0, 2, 0, 4, 1, 0, 0, 4, 0, 0, 3, 4], [8, 7, 0, 0, 0, 0, 0, 0, 0, 6, 5, 0]])
VALUES = torch.tensor([[2, 4, 1, 4, 3, 4], [8, 7, 0, 0, 6, 5]])
META = torch.tensor([[205, 78], [68, 73]], dtype=torch.uint8)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.float64, torch.int8], ids=str
)
def test_even_groups_sit_in_the_low_half_and_an_odd_last_group_leaves_the_high_half_4(dtype):
    values, meta = reference.pack_24(DENSE.to(dtype))
    assert values.dtype is dtype
    assert values.tolist() == VALUES.tolist()
    assert meta.tolist() == META.tolist()
    assert reference.unpack_24(VALUES.to(dtype), META).tolist() == DENSE.tolist()


def test_gather_reads_the_kept_positions():
    dense = torch.tensor([[10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]]).float()
    gathered = reference.gather_24(dense, META[:1])
    #                            13: 1, 3   12: 0, 3   14: 2, 3
    assert gathered.tolist() == [[11, 13, 20, 23, 32, 33]]


def test_prune_keeps_two_of_four_in_any_leading_shape():
    weight = torch.tensor([[[1.0, -3.0, 2.0, 0.5]], [[0.0, -1.0, 1.0, 1.0]]])
    assert reference.prune_24(weight).tolist() == [[[0, -3, 2, 0]], [[0, -1, 1, 0]]]
    assert reference.prune_24(weight[0, 0]).tolist() == [0, -3, 2, 0]


# ---- transposable masks ----


def test_there_are_90_masks_with_two_in_every_row_and_column():
    masks = reference.transposable_masks()
    assert masks.shape == (90, 4, 4)
    # All 2^16 masks, filtered: nothing shared with how the list is built.
    every = torch.tensor(list(itertools.product([False, True], repeat=16))).reshape(-1, 4, 4)
    legal = every[((every.sum(1) == 2) & (every.sum(2) == 2)).flatten(1).all(1)]
    assert {tuple(m.flatten().tolist()) for m in masks} == {
        tuple(m.flatten().tolist()) for m in legal
    }


def test_a_tile_keeps_the_mask_of_the_largest_sum():
    # The largest pairs of each row are 4+3, 1+3, 3+4, 10+5: column 0 would keep three. Giving up
    # 1 for .6 in row 1 costs least (.4), and every column then keeps two.
    tile = torch.tensor([[4, 3, 2, 1], [-1, -3, 0.6, 0.5], [1, 2, 3, 4], [10, 2, -1, 5]])
    kept = torch.tensor([[4, 3, 0, 0], [0, -3, 0.6, 0], [0, 0, 3, 4], [10, 0, 0, 5]])
    assert torch.equal(reference.prune_24_transposable(tile), kept)


def test_equal_tiles_keep_the_first_mask_and_a_nan_is_kept():
    # Row pairs in the order 01, 02, 03, 12, 13, 23: the first stack with two in each column.
    first = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert reference.prune_24_transposable(torch.ones(4, 4)).tolist() == first
    tile = torch.ones(4, 4)
    tile[0, 3] = NAN
    assert reference.prune_24_transposable(tile)[0].isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_random_tiles_keep_as_much_as_any_mask_could(dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(80, 100, generator=generator, dtype=torch.float64).to(dtype)
    pruned = reference.prune_24_transposable(weight)
    assert torch.equal(pruned, torch.where(pruned != 0, weight, 0))
    tiles = [t.double().abs().reshape(20, 4, 25, 4).transpose(1, 2) for t in (weight, pruned)]
    kept = tiles[1] != 0
    assert bool((kept.sum(-1) == 2).all())
    assert bool((kept.sum(-2) == 2).all())
    pairs = list(itertools.combinations(range(4), 2))
    best = torch.zeros(20, 25, dtype=torch.float64)
    for rows in itertools.product(pairs, repeat=4):
        if all(sum(c in row for row in rows) == 2 for c in range(4)):
            score = sum(tiles[0][..., r, c] for r, row in enumerate(rows) for c in row)
            best = torch.maximum(best, score)
    rounding = 1e-14 if dtype is torch.float64 else 1e-6
    assert bool((tiles[1].sum((-1, -2)) >= best * (1 - rounding)).all())


# ---- products ----

# W = [ 0 5 0 7 | 1 2 0 0 ]      nibbles 13, 4    byte 13 | 4 << 4 = 77
#     [ 0 -1 1 0 | 0 0 3 0 ]             9, 14          9 | 14 << 4 = 233
# The slot of nibble 14 that names column 3 is a freed one.
W_VALUES = torch.tensor([[5.0, 7, 1, 2], [-1, 1, 3, 0]])
W_META = torch.tensor([[77], [233]], dtype=torch.uint8)
X = torch.tensor([[1.0, 10, 100, 1000, 2, 20, 200, 2000]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_of_a_product_worked_out_by_hand(dtype):
    x, values = X.to(dtype), W_VALUES.to(dtype)
    # 5*10 + 7*1000 + 1*2 + 2*20 = 7092        -1*10 + 1*100 + 3*200 = 690
    assert reference.linear_24(x, values, W_META).tolist() == [[7092, 690]]
    bias = torch.tensor([1, -700], dtype=dtype)
    assert reference.linear_24(x, values, W_META, bias).tolist() == [[7093, -10]]
    assert reference.linear_24(x, values, W_META, bias, "relu").tolist() == [[7093, 0]]
    assert reference.linear_24(x / 10, values, W_META, -bias, "relu2").tolist() == [
        [708.2**2, 769**2] if dtype is torch.float64 else pytest.approx([708.2**2, 769**2])
    ]


@pytest.mark.parametrize(
    ("activation", "at_1", "at_minus_1"),
    [
        ("relu2", 1, 0),
        ("gelu", 0.8413447460685429, -0.15865525393145707),  # z Φ(z)
        ("silu", 0.7310585786300049, -0.2689414213699951),  # z / (1 + e^-z)
    ],
)
def test_activations_have_their_textbook_values(activation, at_1, at_minus_1):
    values, meta = torch.tensor([[1.0, 0.0]], dtype=torch.float64), W_META[:1] * 0 + 68
    for sign, want in ((1, at_1), (-1, at_minus_1)):
        x = torch.tensor([[sign, 0, 9, 9]], dtype=torch.float64)
        y = reference.linear_24(x, values, meta, None, activation)
        assert float(y) == pytest.approx(want, abs=1e-15)


def test_half_precision_rounds_once_after_the_activation():
    # z = 1 + 2^-11 lies between the halves 1 and 1 + 2^-10; its square, 1 + 2^-10 + 2^-22, rounds
    # to the upper one. Rounding z first would give 1.
    x = torch.tensor([[1, 2**-11, 0, 0]], dtype=torch.float16)
    values, meta = torch.tensor([[1, 1]], dtype=torch.float16), W_META[:1] * 0 + 68
    assert reference.linear_24(x, values, meta, None, "relu2").tolist() == [[1 + 2**-10]]


def test_the_gradients_of_linear_worked_out_by_hand():
    dy = torch.tensor([[1.0, 2.0]])
    #    1 * [0 5 0 7 1 2 0 0] + 2 * [0 -1 1 0 0 0 3 0]
    assert reference.linear_24_dx(dy, W_VALUES, W_META).tolist() == [[0, 3, 2, 7, 1, 2, 6, 0]]
    #    1 * x at 1, 3, 4, 5                 2 * x at 1, 2, 6, 7
    want = [[10, 1000, 2, 20], [20, 200, 400, 4000]]
    assert reference.linear_24_dvalues(dy, X, W_META).tolist() == want


def test_prepacking_is_the_bytes_of_values_then_those_of_meta():
    packed = reference.prepack_24(torch.tensor([[5.0, 0.0]]), W_META[:1])
    assert packed.tolist() == [0x00, 0x00, 0xA0, 0x40, 0, 0, 0, 0, 77]  # 5.0 is 0x40a00000
    values, meta = reference.unprepack_24(packed, 1, 4, torch.float32)
    assert values.tolist() == [[5, 0]]
    assert meta.tolist() == [[77]]
    wide = reference.prepack_24(W_VALUES, W_META)
    assert reference.linear_24_prepacked(X, wide, 2).tolist() == [[7092, 690]]


# ---- zero-value compression ----


def test_zvc_of_one_byte_of_mask_as_drawn():
    #   a 0 0 b 0 0 c 0      bits 0, 3, 6
    mask, values, offsets = reference.pack_zvc(torch.tensor([7, 0, 0, 8, 0, 0, 9, 0]))
    assert mask.tolist() == [1 + 8 + 64]
    assert values.tolist() == [7, 8, 9]
    assert offsets.tolist() == [0]


# 4100 elements: a tile of 4096 and one of 4.
#   element   0   3   9   4095 | 4096   4099
#   byte      0   0   1   511  | 512    512       bit = element % 8
#   value     10  -3  9   5    | 6      -7
#   tile 0 starts at value 0, tile 1 at value 4
TILED = {0: 10, 3: -3, 9: 9, 4095: 5, 4096: 6, 4099: -7}
MASK = {0: 1 | 8, 1: 2, 511: 128, 512: 1 | 8}


def tiled() -> torch.Tensor:
    x = torch.zeros(4100, dtype=torch.int16)
    for at, value in TILED.items():
        x[at] = value
    return x


def test_zvc_across_a_tile_border_as_drawn():
    mask, values, offsets = reference.pack_zvc(tiled().reshape(41, 100))
    assert mask.shape == (513,)
    assert {i: b for i, b in enumerate(mask.tolist()) if b} == MASK
    assert values.tolist() == [10, -3, 9, 5, 6, -7]
    assert offsets.tolist() == [0, 4]
    assert torch.equal(reference.unpack_zvc(mask, values, offsets, [41, 100]).flatten(), tiled())


def test_zvc_tiles_may_lie_in_any_order():
    mask = torch.zeros(513, dtype=torch.uint8)
    for at, byte in MASK.items():
        mask[at] = byte
    values = torch.tensor([6, -7, 10, -3, 9, 5], dtype=torch.int16)  # tile 1, then tile 0
    offsets = torch.tensor([2, 0])
    assert torch.equal(reference.unpack_zvc(mask, values, offsets, [4100]), tiled())


@pytest.mark.parametrize("room", [0, 3, 5, 6, 8])
def test_zvc_into_given_room_counts_all_and_writes_what_fits(room):
    mask, offsets = torch.full((513,), 255, dtype=torch.uint8), torch.full((2,), -1)
    values, count = torch.full((room,), 99, dtype=torch.int16), torch.tensor([-1])
    reference.pack_zvc_out(tiled(), mask, values, offsets, count)
    assert count.tolist() == [6]
    assert values.tolist() == [10, -3, 9, 5, 6, -7, 99, 99][:room]
    assert offsets.tolist() == [0, 4]
    assert {i: b for i, b in enumerate(mask.tolist()) if b} == MASK


def test_zvc_drops_only_all_zero_bits():
    x = torch.tensor([0.0, -0.0, NAN, 1e-45])
    mask, values, _ = reference.pack_zvc(x)
    assert mask.tolist() == [2 + 4 + 8]
    assert values.view(torch.int32).tolist() == x.view(torch.int32)[1:].tolist()
