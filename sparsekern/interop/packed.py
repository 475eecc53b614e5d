"""A packed weight as a file holds it: any dtype a file may have, any number of columns, nothing taken on trust."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..nn import padded
from ..reference import _meta_positions

# Of the 8-bit floats those where a zero is 0x00 or 0x80 and magnitudes are ordered as their bits.
FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
DTYPES = ops.FORMAT_DTYPES | FLOAT8


@dataclass(frozen=True)
class Packed:
    """``values [N, K/2]``, ``meta [N, ceil(K/8)]``, K being `in_features` rounded up to a multiple of 4."""

    values: Tensor
    meta: Tensor
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight."""
        return self.values.shape[0], self.in_features


def words(values: Tensor) -> Tensor:
    """8-bit floats as bytes, which is what the ops move; anything else as it is."""
    return values.view(torch.uint8) if values.dtype in FLOAT8 else values


def first_dense_group(weight: Tensor) -> tuple[int, int] | None:
    """(row, group of four columns) of the first with more than two non-zeros, or None."""
    magnitude = words(weight) & 0x7F if weight.dtype in FLOAT8 else weight
    return ops._first_dense_group(padded(magnitude))


def pack(weight: Tensor) -> Packed:
    """Keep the two largest of each four, as :func:`sparsekern.pack_24`; any number of columns, 8-bit floats too."""
    K = weight.shape[1]
    if weight.dtype not in FLOAT8:
        return Packed(*ops.pack_24(padded(weight), prune=True), K)
    content = padded(words(weight))
    magnitude = content & 0x7F
    meta = ops.pack_24(magnitude, prune=True)[1]
    content = content * (magnitude != 0)  # -0.0 as +0.0, as the op does it
    values = torch.ops.sparsekern.gather_24(content, meta)
    return Packed(values.view(weight.dtype), meta, K)


def unpack(packed: Packed) -> Tensor:
    """The dense weight ``[N, in_features]``.

    Raises:
        ValueError: something is kept in a column past `in_features`.
    """
    dense = ops.unpack_24(words(packed.values), packed.meta)
    if bool((dense[:, packed.in_features :] != 0).any()):
        raise ValueError(
            f"values keeps something past column {packed.in_features}, where the weight ends"
        )
    return dense[:, : packed.in_features].contiguous().view(packed.values.dtype)


def check(values: Tensor, meta: Tensor) -> None:
    """:func:`sparsekern.check_24` for 8-bit floats too."""
    ops.check_24(words(values), meta)


def positions(meta: Tensor, groups: int) -> Tensor:
    """meta ``[N, ceil(groups/2)]`` to the kept positions ``[N, groups, 2]``, int64."""
    return _meta_positions(meta, groups)


def nibbles_to_meta(nibbles: Tensor) -> Tensor:
    """uint8 nibbles ``[N, groups]`` to meta ``[N, ceil(groups/2)]``."""
    if nibbles.shape[1] % 2:
        nibbles = F.pad(nibbles, (0, 1), value=4)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous()
