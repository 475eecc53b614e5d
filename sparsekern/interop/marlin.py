"""The layout of Sparse-Marlin: 2:4 weights of 4 or 8 bits with fp16 scales, as checkpoints hold it.

compressed-tensors calls it marlin-24 and the tensors of a layer ``x``, a weight ``[N, K]`` in G groups of columns, by
the first names; vLLM's ``gptq_marlin_24`` by the second::

    x.weight_packed   x.B_24     int32 [K/32, N·bits/2]   kept elements + 2^(bits-1), 32/bits in a word, lowest first
    x.scale_packed    x.s        fp16  [G, N]             G = 1, or K/128 with their columns reordered
    x.meta            x.B_meta   int16 [K/32, 2N]         our nibbles, four in an element, reordered

The kept elements, transposed to ``q[K/2, N]``, go to memory by the bits of their row k and column n::

    row      k5…     k3  k2k1  k0           memory, slowest first
    column   n6…     n5n4  n3  n2  n1n0     k4… n6… n5n4 n3 k2k1 n1n0 then of 4 bits k0 n2 k3, of 8 bits n2 k0 k3

The logical meta ``[N, K/16]``, by the bits of its row r and column c: ``c1… r6… r1 r5r4r3 r0 c0 r2``. Grouped scales:
of each eight columns, 0 4 1 5 2 6 3 7. (With G = 2 compressed-tensors leaves them in order, unlike the kernels' own
packers; read and written here is what the kernels take.)

Source: compressed-tensors 0.12.2 ``compressors/sparse_quantized_compressors/marlin_24.py``; IST-DASLab/Sparse-Marlin
``marlin/__init__.py``; vLLM ``model_executor/layers/quantization/gptq_marlin_24.py``. N and K are multiples of 128
there; the layout itself takes N in multiples of 64 and K of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import check


def to_marlin(
    values: Tensor, meta: Tensor, scale: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A quantised packed weight as `weight_packed`, `scale_packed`, `meta` of Sparse-Marlin.

    The weight is ``unpack_24(values, meta) * scale``, with symmetric quantisation: 0 is 0.

    Args:
        values: int8 ``[N, K/2]``, from -2^(bits-1) to 2^(bits-1) - 1.
        meta: uint8 ``[N, K/8]``.
        scale: fp16 ``[N, G]``, for K/G columns each.
        bits: 4 or 8.

    Returns:
        ``weight_packed`` int32 ``[K/32, N * bits / 2]``, ``scale_packed`` fp16 ``[G, N]``, ``meta`` int16
        ``[K/32, 2N]``.

    Raises:
        ValueError: not a legal packed weight, a value out of range, or a shape the layout has no place for.
        TypeError: a dtype.
    """
    check(values, meta)
    if bits not in (4, 8):
        raise ValueError(f"to_marlin: bits is {bits}; it takes 4 or 8")
    for name, t, dtype in (("values", values, torch.int8), ("scale", scale, torch.float16)):
        if t.dtype is not dtype:
            raise TypeError(f"to_marlin: {name} has dtype {t.dtype}; it takes {dtype}")
    N, K = values.shape[0], 2 * values.shape[1]
    if not N or not K or N % 64 or K % 32:
        raise ValueError(
            f"to_marlin: the weight has shape {(N, K)}; it takes rows in multiples of 64, columns of 32"
        )
    if scale.dim() != 2 or scale.shape[0] != N or not scale.shape[1] or K % (4 * scale.shape[1]):
        raise ValueError(
            f"to_marlin: scale has shape {tuple(scale.shape)}; it takes [{N}, G], G groups of columns in fours"
        )
    limit = 1 << (bits - 1)
    least, most = (int(t) for t in values.aminmax())
    if least < -limit or most >= limit:
        raise ValueError(
            f"to_marlin: values go from {least} to {most}; {bits} bits take {-limit} to {limit - 1}"
        )
    memory = (
        _rows_and_columns(values.t().int() + limit).permute(_ORDER[bits]).reshape(-1, 32 // bits)
    )
    word = (memory.long() << torch.arange(0, 32, bits, device=values.device)).sum(-1)
    word = torch.where(word >= 1 << 31, word - (1 << 32), word).int()
    element = meta.contiguous().view(torch.int16)
    element = element.view(N // 64, 8, 2, 2, 2, K // 32, 2).permute(_META_ORDER)
    scales = scale.t()
    if scale.shape[1] > 1:
        scales = scales.reshape(-1, N // 8, 2, 4).transpose(2, 3)
    return (
        word.view(K // 32, N * bits // 2),
        scales.reshape(-1, N).contiguous(),
        element.reshape(K // 32, 2 * N),
    )


def from_marlin(
    weight_packed: Tensor, scale_packed: Tensor, meta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`to_marlin`: a quantised packed weight.

    Returns:
        ``values`` int8 ``[N, K/2]``, ``meta`` uint8 ``[N, K/8]``, ``scale`` fp16 ``[N, G]``; see :func:`dequantize`.

    Raises:
        ValueError: the three do not belong together, or hold an illegal nibble.
        TypeError: a dtype.
    """
    takes = {"weight_packed": torch.int32, "scale_packed": torch.float16, "meta": torch.int16}
    for (name, dtype), t in zip(takes.items(), (weight_packed, scale_packed, meta), strict=True):
        if t.dtype is not dtype:
            raise TypeError(f"from_marlin: {name} has dtype {t.dtype}; it takes {dtype}")
        if t.dim() != 2 or not t.numel():
            raise ValueError(
                f"from_marlin: {name} has shape {tuple(t.shape)}; it takes two dimensions, not empty"
            )
    (G, N), K = scale_packed.shape, 32 * weight_packed.shape[0]
    bits = 2 * weight_packed.shape[1] // N
    if N % 64 or bits not in (4, 8) or weight_packed.shape[1] != N * bits // 2 or K % (4 * G):
        raise ValueError(
            f"from_marlin: weight_packed has shape {tuple(weight_packed.shape)} and scale_packed {(G, N)}; "
            "they take [K/32, N * bits / 2] and [G, N], N a multiple of 64, bits 4 or 8"
        )
    if tuple(meta.shape) != (K // 32, 2 * N):
        raise ValueError(
            f"from_marlin: meta has shape {tuple(meta.shape)}; for N = {N}, K = {K} it takes {(K // 32, 2 * N)}"
        )
    memory = weight_packed.contiguous().view(-1, 1) >> torch.arange(
        0, 32, bits, dtype=torch.int32, device=meta.device
    )
    memory = (memory & ((1 << bits) - 1)) - (1 << (bits - 1))
    values = _restored(memory, (K // 32, 2, 4, 2, N // 64, 4, 2, 2, 4), _ORDER[bits])
    values = values.reshape(K // 2, N).t().to(torch.int8).contiguous()
    logical = _restored(meta.contiguous(), (N // 64, 8, 2, 2, 2, K // 32, 2), _META_ORDER)
    logical = logical.reshape(N, K // 16).view(torch.uint8)
    check(values, logical)
    scales = scale_packed
    if G > 1:
        scales = scales.reshape(-1, N // 8, 4, 2).transpose(2, 3).reshape(G, N)
    return values, logical, scales.t().contiguous()


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """int8 ``[N, K/2]`` times fp16 ``[N, G]``: the packed values in fp16, rounded once."""
    N, G = scale.shape
    return (values.view(N, G, -1).to(scale.dtype) * scale.unsqueeze(-1)).view(values.shape)


def _rows_and_columns(q: Tensor) -> Tensor:
    """q [K/2, N] by the bits k4… k3 k2k1 k0, n6… n5n4 n3 n2 n1n0."""
    return q.reshape(q.shape[0] // 16, 2, 4, 2, q.shape[1] // 64, 4, 2, 2, 4)


def _restored(memory: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The tensor of that shape that, permuted to `order`, is in memory."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return memory.view([shape[axis] for axis in order]).permute(inverse)


# Of the axes of _rows_and_columns, memory's, slowest first.
_ORDER = {4: (0, 4, 5, 6, 2, 8, 3, 7, 1), 8: (0, 4, 5, 6, 2, 8, 7, 3, 1)}
# Of r6…, r5r4r3, r2, r1, r0, c1…, c0.
_META_ORDER = (5, 0, 3, 1, 4, 6, 2)
