"""How the elements of a region are written down, losslessly and on bits.

=========  ==========================================  =======================================
codec      parts                                       for
=========  ==========================================  =======================================
``raw``    the elements                                what does not compress
``zvc``    mask, offsets, values (``sk.pack_zvc``)     zeros: after ReLU, squared ReLU, dropout
``bits``   mask, offsets                               bool: a bit an element (dropout's masks)
``narrow`` the elements in fewer bytes                 integers of small range (max-pool indices)
=========  ==========================================  =======================================

A device with streams does not tell the host at once how much came out. There, :func:`begin` writes into
room of the expected size and leaves a *count* on the device; when the host has it, :func:`finish` cuts the
parts to size, or says that the guess was wrong and the original is still needed.
"""

from __future__ import annotations

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


# ---- at once: the host knows the size when it returns ----


def zvc(flat: Tensor) -> Encoded:
    mask, values, offsets = torch.ops.sparsekern.pack_zvc(bit_view(flat))
    return Encoded("zvc", (mask, offsets, values), values.numel())


def bits(flat: Tensor) -> Encoded:
    mask, values, offsets = torch.ops.sparsekern.pack_zvc(flat.view(torch.uint8))
    if not bool(
        (values == 1).all()
    ):  # bytes that are neither False nor True, from a view of other memory
        return Encoded("zvc", (mask, offsets, values), values.numel())
    return Encoded("bits", (mask, offsets), values.numel())


def narrow(flat: Tensor, dtype: torch.dtype) -> Encoded:
    return Encoded("narrow", (flat.to(dtype),))


# ---- in two steps: the size, or whether it worked, comes later ----


@dataclass(frozen=True)
class Begun:
    """An encoding whose outcome is still on the device.

    `outcome` is int64 [2]: how many elements have a bit set, and how many the codec cannot write. `room`
    is how many values there was room for.
    """

    encoded: Encoded
    outcome: Tensor
    room: int


def begin(codec: str, flat: Tensor, *, room: int = 0, dtype: torch.dtype | None = None) -> Begun:
    """Encode without asking the device anything.

    Args:
        codec: "zvc", "bits" or "narrow".
        room: for zvc, elements that there is to be room for.
        dtype: for narrow, the type to write.
    """
    outcome = torch.zeros(2, dtype=torch.int64, device=flat.device)
    if codec == "narrow":
        small = flat.to(dtype)
        outcome[1] = (small.to(flat.dtype) != flat).sum()
        return Begun(Encoded("narrow", (small,)), outcome, 0)
    source = bit_view(flat)
    n = source.numel()
    mask = source.new_empty((n + 7) // 8, dtype=torch.uint8)
    offsets = source.new_empty((n + _TILE - 1) // _TILE, dtype=torch.int64)
    values = source.new_empty(0 if codec == "bits" else min(room, n))
    torch.ops.sparsekern.pack_zvc_out(source, mask, values, offsets, outcome[:1])
    if codec == "bits":
        outcome[1] = (source > 1).sum()
        return Begun(Encoded("bits", (mask, offsets)), outcome, n)
    return Begun(Encoded("zvc", (mask, offsets, values)), outcome, values.numel())


def finish(begun: Begun, nonzeros: int, wrong: int) -> Encoded | None:
    """The encoding, cut to size, or None if it does not hold the tensor."""
    if wrong or nonzeros > begun.room:
        return None
    encoded = begun.encoded
    if encoded.codec != "zvc":
        return replace(encoded, nonzeros=nonzeros)
    mask, offsets, values = encoded.parts
    slack = values.numel() - nonzeros
    values = values[:nonzeros]
    if slack > (slack + nonzeros) // 8:
        values = values.clone()
    return Encoded("zvc", (mask, offsets, values), nonzeros)


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
