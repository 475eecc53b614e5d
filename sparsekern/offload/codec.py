"""How the elements of a region are written down, losslessly and on bits.

=========  ==========================================  =======================================
codec      parts                                       for
=========  ==========================================  =======================================
``raw``    the elements                                what does not compress
``zvc``    mask, offsets, values (``sk.pack_zvc``)     zeros: after ReLU, squared ReLU, dropout
``bits``   mask, offsets                               bool: a bit an element (dropout's masks)
``narrow`` the elements in fewer bytes                 integers of small range (max-pool indices)
=========  ==========================================  =======================================

A device with streams does not tell the host at once how much came out. So :func:`begin` writes into room of
the expected size and leaves the outcome where the tensor is; when the host has it, :func:`finish` cuts the
parts to size, or says that the guess was wrong and the original is still needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_NARROW = {
    torch.int64: (torch.uint8, torch.int16, torch.int32),
    torch.int32: (torch.uint8, torch.int16),
    torch.int16: (torch.uint8,),
}
_TILE = 4096


@dataclass(frozen=True)
class Encoded:
    """`parts` of a codec. `nonzeros` counts the elements with a bit set where the codec knows it."""

    codec: str
    parts: tuple[Tensor, ...]
    nonzeros: int | None = None


def bit_view(flat: Tensor) -> Tensor:
    """The same bytes as integers of the element's size; elements of 16 bytes become two of 8."""
    return flat.view(_INTEGER_OF_SIZE[flat.element_size()])


def density(flat: Tensor, sample: int = 1 << 16) -> Tensor:
    """Share of elements with a bit set, from at most about `sample` of them, spread evenly. 0-dim, on the device."""
    bits = bit_view(flat)
    n = bits.numel()
    if n > sample:
        # Runs, so that cache lines are used whole; an odd number of them, so that the rows of an image
        # or of a matrix are met at different places.
        runs = 127
        bits = bits[: n // runs * runs].view(runs, -1)[:, : sample // runs]
    return bits.count_nonzero() / max(bits.numel(), 1)


def narrow_type(flat: Tensor) -> torch.dtype | None:
    """The smallest integer type that holds every element, if it is smaller than the tensor's. Blocks the host."""
    types = _NARROW.get(flat.dtype)
    if types is None or not flat.numel():
        return None
    low, high = (int(v) for v in torch.aminmax(flat))
    for dtype in types:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return dtype
    return None


@dataclass(frozen=True)
class Begun:
    """An encoding whose outcome is still on the device.

    `outcome` is int64 [2]: how many elements have a bit set, and how many the codec cannot write. `room`
    is how many values there was room for.
    """

    encoded: Encoded
    outcome: Tensor
    room: int


def begin(
    codec: str,
    flat: Tensor,
    empty: Callable[[int, torch.dtype], Tensor],
    *,
    room: int = 0,
    dtype: torch.dtype | None = None,
) -> Begun:
    """Encode without asking the device anything.

    Args:
        codec: "zvc", "bits" or "narrow".
        flat: [n], contiguous.
        empty: makes the parts, in their order: elements and dtype to an uninitialised array.
        room: for zvc, elements that there is to be room for.
        dtype: for narrow, the type to write.
    """
    outcome = torch.zeros(2, dtype=torch.int64, device=flat.device)
    if codec == "narrow":
        small = empty(flat.numel(), dtype).copy_(flat)
        outcome[1] = (small != flat).sum()
        return Begun(Encoded("narrow", (small,)), outcome, 0)
    source = bit_view(flat)
    n = source.numel()
    mask = empty((n + 7) // 8, torch.uint8)
    offsets = empty((n + _TILE - 1) // _TILE, torch.int64)
    values = source.new_empty(0) if codec == "bits" else empty(min(room, n), source.dtype)
    torch.ops.sparsekern.pack_zvc_out(source, mask, values, offsets, outcome[:1])
    if codec == "bits":
        # A view of other memory may hold bytes that are neither False nor True.
        outcome[1] = (source > 1).sum()
        return Begun(Encoded("bits", (mask, offsets)), outcome, n)
    return Begun(Encoded("zvc", (mask, offsets, values)), outcome, values.numel())


def finish(begun: Begun, nonzeros: int, wrong: int) -> Encoded | None:
    """The encoding with its values cut to what there are, or None if it does not hold the tensor."""
    if wrong or nonzeros > begun.room:
        return None
    if begun.encoded.codec == "zvc":
        mask, offsets, values = begun.encoded.parts
        return Encoded("zvc", (mask, offsets, values[:nonzeros]), nonzeros)
    return replace(begun.encoded, nonzeros=nonzeros if begun.encoded.codec == "bits" else None)


# ---- back ----


def decode(
    codec: str, parts: list[Tensor], numel: int, dtype: torch.dtype, nonzeros: int | None
) -> Tensor:
    """The elements, one-dimensional.

    Raises:
        ValueError: the parts do not fit together or not this size.
    """
    if codec == "zvc":
        mask, offsets, values = parts
        n = numel * dtype.itemsize // values.element_size()
        flat = torch.ops.sparsekern.unpack_zvc(mask, values, offsets, [n]).view(dtype)
    elif codec == "bits":
        mask, offsets = parts
        ones = torch.ones(nonzeros, dtype=torch.uint8, device=mask.device)
        flat = torch.ops.sparsekern.unpack_zvc(mask, ones, offsets, [numel]).view(dtype)
    else:
        flat = parts[0].to(dtype)
    if flat.numel() != numel:
        raise ValueError(
            f"offload_activations: a packed object of codec {codec} holds {flat.numel()} elements; it takes {numel}"
        )
    return flat
