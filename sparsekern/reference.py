"""The meaning of every op, in plain torch: any device, any dtype, no speed.

This file is the specification that the compiled kernels are tested against, and what serves where
none of them can. It is pinned in turn by hand-written answers (``tests/test_reference.py``) and by
PyTorch's own 2:4 conversions.

2:4, one group of four (see ``csrc/layout.h`` for the drawing)::

    dense    a  b  c  d      |b| and |d| are the two largest
    keep     .  b  .  d      positions i0 = 1, i1 = 3
    values   b  d            meta nibble  i0 | i1 << 2 = 0b1101 = 13
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

ZVC_TILE = 4096

# The integer type that holds the bits of an element of 1, 2, 4 or 8 bytes. Formats move elements as
# integers: torch.where, gather and scatter take fp16 and bf16 through fp32, which alters NaNs. Signed
# where torch's unsigned types lack comparisons and shifts; only equality, and order after clearing
# the sign, are used.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """x as integers of the same size."""
    return x.view(_BITS[x.element_size()])


def _magnitude(x: Tensor) -> Tensor:
    """|x| as int64, ordered: the bits without the sign for floats (a NaN exceeds infinity), the value for integers."""
    if x.dtype.is_floating_point:
        sign_cleared = torch.iinfo(_BITS[x.element_size()]).max
        return (bits(x) & sign_cleared).to(torch.int64)
    return x.to(torch.int64).abs()


def _positions(weight: Tensor) -> Tensor:
    """[..., K] to [..., K/4, 2]: the two kept positions of each group, ascending; a tie keeps the lower index."""
    magnitude = _magnitude(weight).unflatten(-1, (-1, 4))
    top = magnitude.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return top.sort(dim=-1).values


def _canonical(x: Tensor) -> Tensor:
    """Every zero as +0.0, so that the bytes do not depend on which zero a group named."""
    return _where(_magnitude(x) != 0, x)


def _where(keep: Tensor, x: Tensor) -> Tensor:
    """x where `keep`, else zero; contiguous."""
    words = bits(x)
    return torch.where(keep, words, torch.zeros_like(words)).contiguous().view(x.dtype)


def _meta_positions(meta: Tensor, groups: int) -> Tensor:
    """meta [N, ceil(K/8)] to positions int64 [N, K/4, 2]."""
    shifts = torch.arange(0, 8, 2, device=meta.device, dtype=torch.uint8)
    fields = (meta.unsqueeze(-1) >> shifts) & 3  # four two-bit fields a byte, lowest first
    return fields.reshape(meta.shape[0], 2 * meta.shape[1], 2)[:, :groups].to(torch.int64)


def rows_of(x: Tensor) -> Tensor:
    """[..., K] as [M, K], without a copy where the strides allow; M and K may be zero."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _gather(dense: Tensor, positions: Tensor) -> Tensor:
    """dense [N, K] at positions [N, K/4, 2]: [N, K/2]."""
    N, K = dense.shape
    kept = bits(dense).unflatten(-1, (-1, 4)).gather(-1, positions)
    return kept.reshape(N, K // 2).view(dense.dtype)


# ---- 2:4 formats ----


def prune_24(weight: Tensor) -> Tensor:
    return unpack_24(*pack_24(rows_of(weight))).reshape(weight.shape)


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    positions = _positions(weight)
    values = _canonical(_gather(weight, positions))
    nibbles = (positions[..., 0] | positions[..., 1] << 2).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = F.pad(nibbles, (0, 1), value=4)  # an odd last group leaves the high half (0, 1)
    return values, (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous()


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    N, half = values.shape
    words = bits(values)
    dense = words.new_zeros(N, half // 2, 4)
    dense.scatter_(-1, _meta_positions(meta, half // 2), words.unflatten(-1, (-1, 2)))
    return dense.reshape(N, 2 * half).view(values.dtype)


def gather_24(dense: Tensor, meta: Tensor) -> Tensor:
    return _gather(dense, _meta_positions(meta, dense.shape[1] // 4))


def transposable_masks() -> Tensor:
    """The 90 masks bool [90, 4, 4] with two kept in every row and column, in lexicographic order of their rows."""
    pairs = torch.zeros(6, 4, dtype=torch.bool)
    for row, kept in zip(pairs, itertools.combinations(range(4), 2), strict=True):
        row[list(kept)] = True
    stacks = torch.tensor(list(itertools.product(range(6), repeat=4)))
    masks = pairs[stacks]
    return masks[(masks.sum(1) == 2).all(-1)]


def prune_24_transposable(weight: Tensor) -> Tensor:
    N, K = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    size = weight.to(dtype).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    tiles = size.reshape(N // 4, 4, K // 4, 4).permute(0, 2, 1, 3)  # [N/4, K/4, 4, 4]
    masks = transposable_masks().to(weight.device)
    # The sums are spelt out so that every back end rounds them alike: pairs, then rows 0+1 and 2+3,
    # then both.
    index = masks.nonzero()[:, 2].reshape(90, 4, 2)
    rows = [tiles[..., r, index[:, r, 0]] + tiles[..., r, index[:, r, 1]] for r in range(4)]
    score = (rows[0] + rows[1]) + (rows[2] + rows[3])  # [N/4, K/4, 90]
    keep = (
        masks[score.argmax(-1)].permute(0, 2, 1, 3).reshape(N, K)
    )  # argmax takes the first of equals
    return _where(keep, _canonical(weight))


# ---- 2:4 products ----


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(z)
    if activation == "relu2":
        return F.relu(z).square()
    if activation == "gelu":
        return F.gelu(z)
    if activation == "silu":
        return F.silu(z)
    return z


def linear_24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    weight = unpack_24(values, meta)
    if x.dtype in (torch.float16, torch.bfloat16) and activation != "none":
        # One rounding, at the end: the activation sees the fp32 sum, as in the fused kernels.
        z = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return _activate(z, activation).to(x.dtype)
    return _activate(F.linear(x, weight, bias), activation)


def linear_24_dx(dy: Tensor, values: Tensor, meta: Tensor) -> Tensor:
    return dy @ unpack_24(values, meta)


def linear_24_dvalues(dy: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    return gather_24(rows_of(dy).mT @ rows_of(x), meta)


# Prepacking is the identity here: the bytes of values, then those of meta.


def split_packed(packed: Tensor, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two parts of an identity-prepacked weight, as views of it if it is contiguous."""
    packed = packed.contiguous()
    cut = N * (K // 2) * dtype.itemsize
    return packed[:cut].view(dtype).view(N, K // 2), packed[cut:].view(N, -(-K // 8))


def prepack_24(values: Tensor, meta: Tensor) -> Tensor:
    return torch.cat([values.contiguous().view(torch.uint8).flatten(), meta.flatten()])


def unprepack_24(packed: Tensor, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, meta = split_packed(packed, N, K, dtype)
    return values.clone(), meta.clone()


def linear_24_prepacked(
    x: Tensor, packed: Tensor, N: int, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    values, meta = split_packed(packed, N, x.shape[-1], x.dtype)
    return linear_24(x, values, meta, bias, activation)


# ---- zero-value compression ----


def pack_zvc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    words = bits(x.contiguous()).flatten()
    nonzero = words != 0
    tiles = F.pad(nonzero, (0, -x.numel() % ZVC_TILE)).reshape(-1, ZVC_TILE)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    mask = (tiles.reshape(-1, 8) * weights).sum(-1, dtype=torch.uint8)[: -(-x.numel() // 8)]
    counts = tiles.sum(-1)
    return mask, words[nonzero].view(x.dtype), counts.cumsum(0) - counts


def pack_zvc_out(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, count: Tensor) -> None:
    packed_mask, packed_values, packed_offsets = pack_zvc(x)
    mask.copy_(packed_mask)
    offsets.copy_(packed_offsets)
    count.fill_(packed_values.numel())
    room = min(values.numel(), packed_values.numel())
    values[:room].copy_(packed_values[:room])


def unpack_zvc(mask: Tensor, values: Tensor, offsets: Tensor, size: list[int]) -> Tensor:
    n = 1
    for length in size:
        n *= length
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    marked = ((mask.unsqueeze(-1) >> shifts) & 1).bool().flatten()
    if marked[n:].any():
        raise ValueError("unpack_zvc: mask has bits set past the last element")
    marked = F.pad(marked[:n], (0, -n % ZVC_TILE)).reshape(-1, ZVC_TILE)
    counts = marked.sum(-1)
    if (total := int(counts.sum())) != values.numel():
        raise ValueError(
            f"unpack_zvc: mask marks {total} non-zero elements, values holds {values.numel()}"
        )
    if bool(((offsets < 0) | (offsets > values.numel() - counts)).any()):
        raise ValueError(f"unpack_zvc: offsets point outside the {values.numel()} values there are")
    # Tiles may come in any order, as long as together they cover values exactly once.
    start, order = offsets[counts > 0].sort()
    length = counts[counts > 0][order]
    if bool((start != length.cumsum(0) - length).any()):
        raise ValueError("unpack_zvc: offsets overlap or leave a gap")
    rank = marked.cumsum(-1) - 1
    place = (offsets.unsqueeze(-1) + rank)[
        marked
    ]  # where in values each marked element, in order, is found
    words = bits(values)
    out = words.new_zeros(n)
    out[marked.flatten()[:n]] = words[place]
    return out.view(values.dtype).reshape(size)
