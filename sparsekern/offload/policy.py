"""What becomes of each tensor: left alone, or written down by which codec, here or on the host.

One place in the model saves much the same kind of tensor every step, so each site remembers what its
tensors were like. Nothing is guessed where a wrong guess could lose bits: a codec that turns out not to
hold a tensor is given up and the tensor is moved raw or left alone.

``to="auto"`` takes, of what is possible, what costs the least time per byte freed. With a codec of C
bytes/s (there and back) and a link of P bytes/s each way, a tensor of compression ratio r costs

* in place, ``zvc`` on the device:  2/C per byte, frees 1 - 1/r of it
* to the host, ``raw``:             2/P per byte, frees all of it

so compressing in place is the better one from ``r = 1 / (1 - P/C)`` on; below, the tensor goes to the
host, compressed if that makes it smaller.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import codec
from .lock import LOCK
from .streams import Streams

RECHECK = 16  # a site found dense is looked at again after so many tensors
ROOM = 1.125  # of the values expected from the site's last tensors


@dataclass(slots=True)
class Site:
    """What is known of the tensors saved at one place of a model."""

    density: float | None = None  # share of elements with a bit set
    narrow: torch.dtype | None = None
    looked: bool = False  # whether `narrow` says anything
    since: int = 0  # tensors since the last look
    asked: object = None  # a density on its way from the device

    def saw(self, density: float) -> None:
        """Between two steps densities move slowly, but they may rise at once: trust the higher one."""
        before = density if self.density is None else self.density
        self.density = max(density, (before + density) / 2)


@dataclass(frozen=True, slots=True)
class Plan:
    """`codec` None leaves the tensor alone for `reason`. `room` (elements) and `narrow` are for codec.begin."""

    codec: str | None
    host: bool = False
    reason: str = ""
    room: int = 0
    narrow: torch.dtype | None = None


@dataclass(frozen=True)
class Rates:
    """Bytes per second: the link, the slower way; the codec, there and back together."""

    link: float
    codec: float

    @property
    def in_place_from(self) -> float:
        """The compression ratio from which compressing in place costs less per byte freed than moving."""
        return 1 / (1 - self.link / self.codec) if self.codec > self.link else float("inf")


def measure(streams: Streams, device: torch.device, nbytes: int = 32 << 20) -> Rates:
    """Copy, pack and unpack once each, after a warm-up. Takes some tens of milliseconds and blocks the host."""
    half = torch.zeros(nbytes // 4, dtype=torch.int32, device=device)
    half[::2] = 1
    host = torch.empty(nbytes // 4, dtype=torch.int32)
    pinned = streams.pin(host)

    def timed(work) -> float:
        work()
        streams.synchronize(streams.record(streams.current()))
        start = time.perf_counter()
        work()
        streams.synchronize(streams.record(streams.current()))
        return time.perf_counter() - start

    try:
        out = timed(lambda: streams.copy(host, half, streams.current()))
        back = timed(lambda: streams.copy(half, host, streams.current()))
    finally:
        if pinned:
            streams.unpin(host)
    mask, values, offsets = torch.ops.sparsekern.pack_zvc(half)
    parts = [mask.clone(), torch.empty_like(half), offsets.clone(), offsets.new_empty(1)]
    codes = timed(lambda: torch.ops.sparsekern.pack_zvc_out(half, *parts))
    codes += timed(lambda: torch.ops.sparsekern.unpack_zvc(mask, values, offsets, [half.numel()]))
    return Rates(link=nbytes / max(out, back), codec=nbytes / codes)


@dataclass
class Policy:
    """The settings of one context, and what its sites remember.

    Args:
        to: "cpu", "device" or "auto".
        min_bytes: smaller tensors are left alone.
        min_ratio: bytes before over after, from which compressing is worth it.
    """

    to: str
    min_bytes: int
    min_ratio: float
    sites: dict = field(default_factory=dict)
    rates: Rates | None = None

    def site(self, key) -> Site:
        site = self.sites.get(key)
        if site is None:
            site = self.sites[key] = Site()
        return site

    def plan(self, flat: Tensor, site: Site, streams: Streams, ask) -> Plan:
        """Decide for one tensor. `ask(scalar)` sends a device scalar to the host without waiting for it."""
        if flat.nbytes < self.min_bytes:
            return Plan(None, reason="small")
        later = streams.asynchronous
        host = self.to == "cpu" or (self.to == "auto" and later)
        otherwise = Plan("raw", host=True) if host else Plan(None, reason="dense")
        if flat.dtype is torch.bool:
            return Plan("bits", self.to == "cpu", room=flat.numel())
        if flat.dtype in codec._NARROW:
            if not site.looked or not later:
                site.narrow, site.looked = codec.narrow_type(flat), True
            if site.narrow is not None:
                return Plan("narrow", host, narrow=site.narrow)
        density = self._density(flat, site, later, ask)
        bits = 8 * min(flat.element_size(), 8)
        ratio = 1 / (density + 1 / bits)
        if ratio < self.min_ratio:
            return otherwise
        if self.to == "auto" and later:
            if self.rates is None:
                self.rates = _rates(streams, flat.device)
            host = ratio < self.rates.in_place_from
        room = units = codec.bit_view(flat).numel()
        if later:
            room = min(units, int(density * ROOM * units) + 4096)
        return Plan("zvc", host, room=room)

    def _density(self, flat: Tensor, site: Site, later: bool, ask) -> float:
        asked = site.asked  # once: another thread may be at this site
        if asked is not None and asked.ready():
            site.saw(asked.values()[0] / 1e6)
            site.asked = None
        if site.density is None:
            site.density = float(codec.density(flat))
            return site.density
        site.since += 1
        if site.since >= RECHECK and site.asked is None:
            site.since = 0
            if later:
                site.asked = ask((codec.density(flat) * 1e6).long().view(1))
            else:
                site.density = float(codec.density(flat))
        return site.density


_measured: dict[torch.device, Rates] = {}
_of_model: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()


def _rates(streams: Streams, device: torch.device) -> Rates:
    with LOCK:
        if device not in _measured:
            _measured[device] = measure(streams, device)
        return _measured[device]


def sites_of(model: torch.nn.Module) -> dict:
    """The memory of a model's sites: it outlives a context, so that one may be made anew every step."""
    with LOCK:
        return _of_model.setdefault(model, {})
