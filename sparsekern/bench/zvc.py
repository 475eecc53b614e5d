"""Zero-value compression beside copying the same bytes, and beside general compressors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .clock import Budget, Sides, copies
from .results import Peer, Row
from .session import DTYPES, Case, Session, reused_memory

ops = torch.ops.sparsekern

NBYTES, GPU_NBYTES, QUICK_NBYTES = 64 << 20, 256 << 20, 64 << 10
ZEROS = (0.5, 0.9)
COPY, CLONE = "copy_", "clone"
CODEC_BUDGET = Budget(rounds=5, seconds=1.0, least=2)


class Buffers:
    """Inputs, their compressed forms, and room for both to write to; together past the cache."""

    def __init__(self, session: Session, dtype: torch.dtype, zeros: float):
        quick, device = session.options.quick, session.device
        self.nbytes = QUICK_NBYTES if quick else NBYTES if session.on_cpu else GPU_NBYTES
        self.count = copies(self.nbytes, session.cache_bytes) if session.on_cpu else 1
        n = self.nbytes // dtype.itemsize
        generator = torch.Generator(device).manual_seed(session.options.seed)

        def data() -> Tensor:
            x = torch.randn(n, generator=generator, device=device).to(dtype)
            return x.masked_fill_(torch.rand(n, generator=generator, device=device) < zeros, 0)

        self.x = [data() for _ in range(self.count)]
        self.packed = [ops.pack_zvc(x) for x in self.x]
        self.target = [torch.empty_like(x) for x in self.x]
        self.room = [
            (
                torch.empty_like(mask),
                torch.empty_like(x),
                torch.empty_like(offsets),
                torch.empty(1, dtype=torch.int64, device=device),
            )
            for x, (mask, _, offsets) in zip(self.x, self.packed, strict=True)
        ]
        self.packed_bytes = sum(t.nbytes for t in self.packed[0])


def cases(session: Session) -> Iterator[Case]:
    for dtype in session.options.dtypes:
        for zeros in ZEROS[:1] if session.options.quick else ZEROS:
            for threads in session.each_threads():
                label = f"zvc {dtype} {zeros:.0%} zeros, threads: {threads}"
                run = functools.partial(_measure, dtype=dtype, zeros=zeros, threads=threads)
                yield Case(label, 2.0, run)


def _measure(session: Session, budget: Budget, dtype: str, zeros: float, threads: int) -> list[Row]:
    kind = DTYPES[dtype]
    session.spare.clear()
    b = Buffers(session, kind, zeros)
    n, size = b.count, [b.x[0].numel()]
    pack: Sides = {
        "pack_zvc_out": lambda i: ops.pack_zvc_out(b.x[i % n], *b.room[i % n]),
        COPY: lambda i: b.target[i % n].copy_(b.x[i % n]),
    }
    unpack: Sides = {
        "unpack_zvc": lambda i: ops.unpack_zvc(*b.packed[i % n], size),
        CLONE: lambda i: b.x[i % n].clone(),
    }
    rows = []
    with session.threads(threads), reused_memory():
        for op, peer, sides in (("pack_zvc_out", COPY, pack), ("unpack_zvc", CLONE, unpack)):
            served = next(iter(session.backends_for(op, kind)))
            case = {"MiB": b.nbytes / 2**20, "zeros": zeros}
            label = f"{b.nbytes / 2**20:g} MiB, {zeros:.0%} zeros"
            row = session.row(
                op, "zvc", case, label, dtype, threads, (served, session.kernel(served, op, kind))
            )
            row.nbytes, row.compression = b.nbytes + b.packed_bytes, b.nbytes / b.packed_bytes
            if session.options.check:
                row.exact = _right(op, b, size)
                row.wrong = "" if row.exact else "the round trip gives other bits"
            row.timed(session.clock.interleave(sides, budget), op, [peer])
            row.bound_ms = session.bound_ms(row.nbytes, 0, dtype, threads)
            rows.append(row)
        _codecs(session, b, kind, threads, *rows)
    return rows


def _right(op: str, b: Buffers, size: list[int]) -> bool:
    packed = b.packed[0]
    if op == "pack_zvc_out":
        mask, values, offsets, count = b.room[0]
        ops.pack_zvc_out(b.x[0], *b.room[0])
        packed = mask, values[: int(count)], offsets
    again = ops.unpack_zvc(*packed, size)
    return torch.equal(again.view(torch.uint8), b.x[0].view(torch.uint8))


# ---- other compressors: (compress, decompress) of the same bytes ----


def zlib_codec(module, element: int, threads: int):
    return lambda data: module.compress(data, 1), module.decompress


def lz4_codec(module, element: int, threads: int):
    return module.compress, module.decompress


def zstd_codec(module, element: int, threads: int):
    pack = module.ZstdCompressor(level=1, threads=0 if threads == 1 else threads)
    return pack.compress, module.ZstdDecompressor().decompress


def blosc2_codec(module, element: int, threads: int):
    parameters = {
        "codec": module.Codec.LZ4,
        "clevel": 5,
        "typesize": element,
        "nthreads": threads,
        "filters": [module.Filter.BITSHUFFLE],
        "filters_meta": [0],
    }
    return (
        lambda data: module.compress2(data, **parameters),
        lambda data: module.decompress2(data, nthreads=threads),
    )


def nvcomp_codec(module, element: int, threads: int):
    codec = module.Codec(algorithm="Bitcomp")
    return lambda data: codec.encode(module.as_array(data)), codec.decode


def cub_codec(module, element: int, threads: int):
    """The non-zeros and where they are, as CuPy selects them: what ZVC stores, with indices for its mask."""
    integer = {2: module.int16, 4: module.int32}[element]

    def compress(data: Tensor):
        bits = module.from_dlpack(data).view(integer)
        where = module.flatnonzero(bits)
        return where, bits[where], bits.size

    def decompress(packed):
        out = module.zeros(packed[2], integer)
        out[packed[0]] = packed[1]
        return out

    return compress, decompress


# Name to the device type, whether it has threads, the module and how to make the two functions: zlib and Zstandard
# at level 1, Blosc2 with LZ4 behind its bit shuffle, nvCOMP's Bitcomp, CuPy's selection of what is not zero.
CODECS: dict[str, tuple[str, bool, str, Callable]] = {
    "zlib": ("cpu", False, "zlib", zlib_codec),
    "lz4": ("cpu", False, "lz4.frame", lz4_codec),
    "zstd": ("cpu", True, "zstandard", zstd_codec),
    "blosc2": ("cpu", True, "blosc2", blosc2_codec),
    "nvcomp": ("cuda", True, "nvidia.nvcomp", nvcomp_codec),
    "cupy": ("cuda", True, "cupy", cub_codec),
}


def _codecs(
    session: Session, b: Buffers, dtype: torch.dtype, threads: int, packing: Row, unpacking: Row
) -> None:
    """Adds the codecs to the rows of ours, packing's and unpacking's."""
    x = b.x[0].view(torch.uint8)
    data = x.numpy().data if session.on_cpu else x
    pack: Sides = {"ours": lambda i: ops.pack_zvc_out(b.x[0], *b.room[0])}
    unpack: Sides = {"ours": lambda i: ops.unpack_zvc(*b.packed[0], [b.x[0].numel()])}
    ratios: dict[str, float] = {}
    for name, (where, threaded, module, make) in CODECS.items():
        if not session.wants(name):
            continue
        why = ""
        if where != session.device.type:
            why = f"is for {where}"
        elif threads > 1 and not threaded:
            why = "has no threads of its own"
        else:
            try:
                found = importlib.import_module(module)
            except ImportError:
                why = f"{module.partition('.')[0]} is not installed"
        if not why:
            try:
                compress, decompress = make(found, dtype.itemsize, threads)
                packed = compress(data)
                if session.on_cpu and bytes(decompress(packed)) != bytes(data):
                    why = "its round trip gives other bits"
            except Exception as error:  # whatever a peer raises, it is named and the others go on
                why = str(error).partition("\n")[0][:80] or type(error).__name__
        if why:
            packing.peers[name] = Peer(missing=why)
            continue
        if session.on_cpu:
            ratios[name] = b.nbytes / len(packed)
        pack[name] = lambda i, compress=compress: compress(data)
        unpack[name] = lambda i, decompress=decompress, packed=packed: decompress(packed)
    if len(pack) == 1:
        return
    for row, sides in ((packing, pack), (unpacking, unpack)):
        samples = session.clock.interleave(sides, CODEC_BUDGET)
        other = Row(**{**vars(row), "peers": {}}).timed(
            samples, "ours", [n for n in sides if n != "ours"]
        )
        for name, peer in other.peers.items():
            peer.compression = ratios.get(name)
            row.peers[name] = peer
