"""The two hooks between autograd and the packed objects.

What a saved tensor becomes::

    autograd saves t ── _pack ─┬─ Kept    t itself: a parameter, small, dense, not ours to move
                               └─ Saved   its shape, strides and version, and a
                                    └─ Packed  one region of memory, written down once,
                                         └─ Part, Part, …  on the device or on the host

    backward needs t ── _unpack ─ the version check ─┬─ the original, if somebody still holds it
                                                     └─ decoded, and viewed as t was

Nothing is looked up at the end of a step and nothing has to be cleared: autograd holds what the pack hook
returned, and when autograd lets go, everything down to the host block is freed by reference count.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import codec, names, policy
from .identity import (
    Owned,
    Region,
    Version,
    flat,
    leaf_or_its_copy,
    region,
    revive,
    storage_key,
    unexpanded,
)
from .lock import LOCK
from .stats import Stats
from .streams import streams_of
from .transfer import Answer, Part, Room, Transfer

TO = ("auto", "cpu", "device")
LOOK_BACK = 64  # packed objects, to find the next ones to prefetch
WARM = 2  # decodings of shared packed objects that are kept for their next use


class Kept:
    """A saved tensor left alone, and its version. Counts its memory, once per storage, unless it is a parameter's."""

    __slots__ = ("_offload", "tensor", "version")

    def __init__(self, t: Tensor, offload: ActivationOffload | None):
        # Detached: an output that was kept as it is would hold the graph that holds it.
        self.tensor = t.detach()
        self.version = None if t.is_inference() else Version(t, self.tensor)
        self._offload = offload
        if offload is not None:
            offload._keep(self.tensor, +1)

    def __del__(self):
        if getattr(self, "_offload", None) is not None:
            self._offload._keep(self.tensor, -1)


class Entry:
    """What is counted and listed of a packed object, for as long as that lives.

    An object of its own: one that has a finalizer and is known by weak references can be taken up by
    another thread while its finalizer runs.
    """

    __slots__ = ("_held", "_index", "_key", "_offload", "_plain")

    def __init__(self, offload: ActivationOffload, index: int, key: int, plain: int):
        self._offload, self._index, self._key, self._plain = offload, index, key, plain
        self._held = False
        offload.stats.ledger.add(plain=plain)

    def hold(self, held: bool) -> None:
        change, self._held = held - self._held, held
        if change:
            self._offload.stats.ledger.add(device=change * self._plain)

    def __del__(self):
        self.hold(False)
        self._offload.stats.ledger.add(plain=-self._plain)
        self._offload._forget(self._index, self._key)


class Packed:
    """One region of one storage, written down. Shared by every saved tensor that looks at it."""

    __slots__ = (
        "__weakref__",
        "_cache",
        "_entry",
        "_lock",
        "begun",
        "codec",
        "dtype",
        "held",
        "host",
        "index",
        "key",
        "layout",
        "nonzeros",
        "offload",
        "outcome",
        "parts",
        "plain",
        "region",
        "room",
        "shared",
        "site",
        "source",
        "stream",
        "transfer",
        "version",
        "warm",
    )

    def __init__(
        self,
        offload,
        transfer: Transfer,
        t: Tensor,
        version: Version,
        at: Region,
        nbytes: int,
        site,
    ):
        self.offload = offload
        self.transfer = transfer
        self.stream = transfer.streams.current()
        self.region = at
        self.layout = (t.shape, t.stride()) if at.gathered else None
        self.dtype = t.dtype
        self.version = version
        self.key = storage_key(t)
        self.source = StorageWeakRef(t.untyped_storage())
        self.site = site  # (module, policy.Site)
        self.codec = ""
        self.parts: list[Part] = []
        self.nonzeros: int | None = None
        self.room: Room | None = None  # of an encoding whose outcome is on its way
        self.begun: codec.Begun | None = None
        self.outcome: Answer | None = None
        self.held: Tensor | None = None  # the elements themselves, as long as nothing else has them
        self.host = False
        self.index = next(offload._indices)
        self.plain = nbytes
        self.shared = False  # whether several saved tensors look at it
        self.warm: Tensor | None = None  # its decoding, for the next of them
        self._cache: tuple[StorageWeakRef, int, Version, object] | None = None
        self._lock = threading.RLock()
        self._entry = Entry(offload, self.index, self.key, nbytes)

    @property
    def numel(self) -> int:
        return self.plain // self.dtype.itemsize

    def hold(self, source: Tensor | None) -> None:
        """Keep the elements themselves on the device, or stop doing so."""
        self.held = source
        self._entry.hold(source is not None)

    def covers(self, t: Tensor, at: Region) -> bool:
        """Whether this is the memory that `t` looks at, as it is now."""
        return (
            self.dtype is t.dtype
            and self.version.expected == t._version
            and self.version.unchanged()
            and (
                (self.region == at and self.layout == (t.shape, t.stride()))
                if self.region.gathered
                else self.region.lo <= at.lo and at.hi <= self.region.hi
            )
        )

    def elements(self) -> Tensor:
        """The region's elements, one-dimensional: decoded, unless an earlier decoding is in use and as it was.

        Raises:
            ValueError: the parts are corrupt.
        """
        with self._lock:
            held = self.held  # once: another thread may be about to give it up
            if held is not None:
                return self.transfer.lend(held, self.stream)
            current = self.transfer.streams.current()
            if self._cache is not None:
                ref, offset, version, stream = self._cache
                # Another stream is not ordered behind the decoding.
                if stream == current:
                    alive = revive(ref, version.alias, (self.numel,), (1,), offset)
                    if alive is not None and version.unchanged():
                        return version.watched(alive)
            # What decodes to new memory may read the host's own where it lies.
            in_place = self.codec != "raw" and not self.transfer.streams.asynchronous
            parts = [p.here() if in_place else p.get() for p in self.parts]
            out = codec.decode(self.codec, parts, self.numel, self.dtype, self.nonzeros)
            # Whoever gets it may write to it, or make it a gradient that others are added to.
            storage = StorageWeakRef(out.untyped_storage())
            self._cache = storage, out.storage_offset(), Version(out), current
            if self.shared:
                self.warm = out
                self.offload._warmed(self)
            return out

    def prefetch(self) -> bool:
        """Start to bring the parts back, where there is something to bring."""
        if self._cache is not None:
            return False  # decoded once: most likely the op at hand saved it too (a second backward fetches late)
        if not self.host or self.held is not None or not self.source.expired():
            return False
        for part in self.parts:
            part.fetch()
        return True


class Saved:
    """How one saved tensor looks at a packed object."""

    __slots__ = ("offset", "original", "packed", "size", "stride", "version")

    def __init__(self, packed: Packed, t: Tensor, version: Version):
        self.packed = packed
        self.size = t.shape
        self.stride = t.stride()
        self.offset = t.storage_offset()
        self.version = version

    def tensor(self) -> Tensor:
        """The tensor with its size, strides and bits."""
        self.version.check()
        packed, like = self.packed, self.version.alias
        if packed.version.unchanged():
            original = revive(packed.source, like, self.size, self.stride, self.offset)
            if original is not None:
                # Held: a gradient that is this very tensor is then copied for its leaf, not handed over.
                packed.transfer.lend(original, packed.stream)
                self.original = self.version.watched(original)
                return self.original
        elements = packed.elements()
        if not packed.region.gathered:
            at = elements.storage_offset() + self.offset - packed.region.lo
            return elements.as_strided(self.size, self.stride, at)
        span = packed.region.numel
        out = elements.new_empty(span).as_strided(self.size, self.stride, 0)
        part = unexpanded(out)
        part.copy_(elements.view(part.shape))
        return out


class ActivationOffload:
    """What ``sk.offload_activations`` gives: enter it around each forward pass.

    Attributes:
        stats: a :class:`~sparsekern.offload.stats.Stats`.
    """

    def __init__(
        self,
        to: str,
        min_bytes: int,
        max_host_bytes: int | None,
        min_ratio: float,
        prefetch: int,
        keep: Iterable[Tensor | nn.Module],
    ):
        self.stats = Stats(max_host_bytes)
        self._policy = policy.Policy(to, min_bytes, min_ratio)
        self._prefetch = prefetch
        self._owned = Owned()
        for item in keep:
            self._own(item)
        self._indices = itertools.count()
        self._transfers: dict[torch.device, Transfer] = {}
        self._packed: dict[int, dict[int, weakref.ref[Packed]]] = {}  # by storage key, then index
        self._by_index: dict[int, weakref.ref[Packed]] = {}
        self._pending: deque[weakref.ref[Packed]] = deque()
        self._recent: deque[weakref.ref[Packed]] = deque(maxlen=4)
        self._kept: dict[int, tuple[int, int]] = {}  # storage key to (kept tensors, counted bytes)
        self._warm: deque[weakref.ref[Packed]] = deque()
        self._settling = threading.Lock()
        self._local = threading.local()
        self._elsewhere = names.Trace(self._enter_model)
        self._warned: set[str] = set()

    # ---- the context ----

    def __enter__(self) -> ActivationOffload:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self.stats.start_step()
        self._stack().append((hooks, names.start(self._enter_model)))
        return self

    def __exit__(self, *error) -> None:
        hooks, trace = self._stack().pop()
        names.stop(trace)
        hooks.__exit__(*error)
        self._settle()

    def trim(self) -> None:
        """Return host memory that nothing is in to the system. It is kept for the next step otherwise."""
        for transfer in self._transfers.values():
            transfer.sweep()
            transfer.pool.trim()

    def _stack(self) -> list:
        """Entered how often in this thread: hooks belong to a thread."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _trace(self) -> names.Trace:
        """Where this thread is.

        Autograd takes the hooks along into threads of its own, which never entered: those in which
        backward runs on a device (create_graph) or goes on when it is nested deeply (checkpoints).
        """
        stack = self._stack()
        return stack[-1][1] if stack else self._elsewhere

    def _own(self, item: Tensor | nn.Module) -> None:
        if isinstance(item, nn.Module):
            self._owned.add(itertools.chain(item.parameters(), item.buffers()))
        else:
            self._owned.add((item,))

    def _enter_model(self, model: nn.Module) -> None:
        """The outermost module of a forward pass: nothing of it is to be moved, and its sites are remembered."""
        self._own(model)
        self._policy.sites = policy.sites_of(model)

    def _transfer(self, device: torch.device) -> Transfer:
        transfer = self._transfers.get(device)
        if transfer is None:
            transfer = self._transfers[device] = _transfer_of(device)
        return transfer

    # ---- forward ----

    def _pack(self, t: Tensor) -> Kept | Saved:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                return self._pack_tensor(t)
        finally:
            self.stats.pack_seconds += time.perf_counter() - start

    def _pack_tensor(self, t: Tensor) -> Kept | Saved:
        module, _ = site_key = self._trace().site()
        reason = _foreign(t)
        if not reason and (t in self._owned or leaf_or_its_copy(t)):
            self.stats.count(module, seen=1, kept="param")
            return Kept(t, None)
        if not reason and t.nbytes < self._policy.min_bytes:
            reason = "small"
        if reason:
            return self._leave(t, module, reason)
        transfer = self._transfer(t.device)
        if transfer.streams.capturing():
            return self._leave(t, module, "graph capture")
        at, version = region(t), Version(t)
        packed = self._find(t, at)
        if packed is not None:
            self.stats.count(module, seen=1, shared=1)
            packed.shared = True
            return Saved(packed, t, version)
        source = flat(t.detach(), at)
        site = self._policy.site(site_key)
        plan = self._policy.plan(source, site, transfer.streams, transfer.ask)
        if plan.codec is None:
            return self._leave(t, module, plan.reason)
        packed = Packed(self, transfer, t, version, at, source.nbytes, (module, site))
        packed.host = plan.host
        if not self._encode(packed, source, plan):
            return self._leave(t, module, "no gain")
        with LOCK:
            self._packed.setdefault(packed.key, {})[packed.index] = weakref.ref(packed)
            self._by_index[packed.index] = weakref.ref(packed)
        self._settle()
        self.stats.count(module, seen=1)
        return Saved(packed, t, version)

    def _leave(self, t: Tensor, module: str, reason: str) -> Kept:
        self.stats.count(module, seen=1, kept=reason)
        return Kept(t, self)

    def _find(self, t: Tensor, at: Region) -> Packed | None:
        with LOCK:
            # First the references, at once: what is looked at may be the last of a packed object, which
            # takes itself out of there.
            refs = tuple(self._packed.get(storage_key(t), {}).values())
        candidates = [ref() for ref in refs]
        return next((p for p in candidates if p is not None and p.covers(t, at)), None)

    def _encode(self, packed: Packed, source: Tensor, plan: policy.Plan) -> bool:
        """Write it down as planned. False if that gained nothing."""
        transfer = packed.transfer
        if plan.codec == "raw":
            return self._finish(packed, codec.Encoded("raw", (source,)), source)
        packed.room = Room(transfer, source.device)
        packed.begun = codec.begin(
            plan.codec, source, packed.room.empty, room=plan.room, dtype=plan.narrow
        )
        packed.outcome = transfer.ask(packed.begun.outcome)
        if transfer.streams.asynchronous:
            packed.hold(source)
            self._pending.append(weakref.ref(packed))
            return True
        return self._outcome(packed, source)

    def _finish(self, packed: Packed, encoded: codec.Encoded, source: Tensor) -> bool:
        """Give a packed object its parts, and move them where they belong.

        False where they came out no smaller, or raw ones found no room on the host: the tensor is to be
        left alone.
        """
        module, site = packed.site
        ledger, transfer = self.stats.ledger, packed.transfer
        if encoded.nonzeros is not None:
            units = codec.bit_view(source).numel()
            site.saw(encoded.nonzeros / units)
            self.stats.count(module, elements=units, nonzeros=encoded.nonzeros)
        after = sum(p.nbytes for p in encoded.parts)
        if encoded.codec != "raw" and after * self._policy.min_ratio > packed.plain:
            if not packed.host:
                return False
            encoded = codec.Encoded("raw", (source,))
        shared = self._same_mask(encoded, transfer)
        if encoded.codec == "raw":
            parts = [Part(source, transfer.now(), transfer, ledger)]
        else:
            own = range(len(shared), len(encoded.parts))
            parts = [packed.room.part(i, encoded.parts[i], ledger) for i in own]
        if packed.host:
            for part in parts:
                refusal = part.move_out()
                if refusal:
                    self._retreat(refusal)
                    if encoded.codec == "raw":
                        return False
                elif transfer.streams.asynchronous and not part.pinned:
                    self._retreat(
                        "pinned host memory was refused: copies to pageable memory are slower"
                    )
        packed.codec, packed.nonzeros = encoded.codec, encoded.nonzeros
        packed.parts = [*shared, *parts]
        if encoded.codec == "zvc" and not transfer.streams.asynchronous:
            self._recent.append(weakref.ref(packed))
        self.stats.count(
            module,
            packed=encoded.codec,
            bytes_before=packed.plain,
            bytes_after=sum(p.nbytes for p in parts),
        )
        return True

    def _same_mask(self, encoded: codec.Encoded, transfer: Transfer) -> list[Part]:
        """Mask and offsets of a tensor packed just before that has its zeros at the same places: x and x·x.

        Only where comparing them costs nothing to wait for.
        """
        if encoded.codec != "zvc" or transfer.streams.asynchronous:
            return []
        mask = encoded.parts[0]
        for ref in tuple(self._recent):  # other threads add to it
            other = ref()
            if (
                other is not None
                and other.transfer is transfer
                and other.nonzeros == encoded.nonzeros
                and other.parts[0].nbytes == mask.nbytes
                and torch.equal(other.parts[0].here(), mask)
            ):
                return other.parts[:2]
        return []

    def _retreat(self, why: str) -> None:
        with LOCK:
            self.stats.retreats[why] += 1
            if why in self._warned:
                return
            self._warned.add(why)
        warnings.warn(
            f"offload_activations: {why}; stats.retreats counts how often",
            RuntimeWarning,
            stacklevel=4,
        )

    def _settle(self) -> None:
        """Finish encodings whose outcome has arrived; wait for the oldest while too much is held for them."""
        if not self._settling.acquire(blocking=False):
            return  # another thread is at it
        try:
            while self._pending:
                packed = self._pending[0]()
                if packed is not None:
                    if packed.transfer.streams.capturing():
                        return
                    waiting = (ref() for ref in tuple(self._pending))
                    held = sum(p.plain for p in waiting if p is not None)
                    if not packed.outcome.ready() and held <= packed.transfer.ahead:
                        return
                # Off the list first: an error leaves this one as it is, held, and the others to come.
                self._pending.popleft()
                if packed is not None:
                    self._outcome(packed, packed.held)
        finally:
            self._settling.release()

    def _outcome(self, packed: Packed, source: Tensor) -> bool:
        """Take what came out, or see that the elements themselves stay. False for the latter."""
        waits, start = not packed.outcome.ready(), time.perf_counter()
        nonzeros, wrong = packed.outcome.values()
        if waits:
            self.stats.wait_seconds += time.perf_counter() - start
        with packed.transfer.streams.on(packed.stream):  # whose memory all of it is
            return self._conclude(packed, source, nonzeros, wrong)

    def _conclude(self, packed: Packed, source: Tensor, nonzeros: int, wrong: int) -> bool:
        module, site = packed.site
        encoded = codec.finish(packed.begun, nonzeros, wrong)
        if encoded is None:
            # The site's memory was wrong: this tensor goes raw, the next one knows better.
            site.looked = False
            if packed.begun.encoded.codec == "zvc":
                site.saw(nonzeros / codec.bit_view(source).numel())
            if packed.host:
                encoded = codec.Encoded("raw", (source,))
        done = encoded is not None and self._finish(packed, encoded, source)
        packed.begun = packed.outcome = packed.room = None
        if done:
            packed.hold(None)
        elif packed.transfer.streams.asynchronous:
            self.stats.count(module, kept="no gain")
        return done

    # ---- backward ----

    def _unpack(self, saved: Kept | Saved) -> Tensor:
        start = time.perf_counter()
        try:
            if isinstance(saved, Kept):
                if saved.version is not None:
                    saved.version.check()
                return saved.tensor
            with torch.no_grad():
                out = saved.tensor()
                self._look_ahead(saved.packed)
                return out
        finally:
            self.stats.unpack_seconds += time.perf_counter() - start

    def _look_ahead(self, packed: Packed) -> None:
        """Backward goes the way back: start on what was packed before this."""
        if not packed.transfer.streams.asynchronous:
            return
        packed.transfer.sweep()
        self._settle()
        left = self._prefetch
        for index in range(packed.index - 1, max(packed.index - 1 - LOOK_BACK, -1), -1):
            if not left:
                return
            ref = self._by_index.get(index)
            before = None if ref is None else ref()
            if before is None or before.transfer is not packed.transfer:
                continue
            try:
                left -= before.prefetch()
            except torch.OutOfMemoryError:
                return  # by the time that it is needed more may be free

    def _warmed(self, packed: Packed) -> None:
        """What an op gives is often saved by it and by the next: then both come one after the other in backward.

        The decoding stays for the second, or until others have come. With their last saved tensor, packed
        object and decoding are gone anyway.
        """
        self._warm.append(weakref.ref(packed))
        while len(self._warm) > WARM:
            cold = self._warm.popleft()()
            if cold is not None and cold is not packed:
                cold.warm = None

    # ---- called by what is dying ----

    def _keep(self, t: Tensor, change: int) -> None:
        if t.layout is not torch.strided or type(t) is not Tensor:
            return
        key = storage_key(t)
        with LOCK:
            # The bytes are remembered, as a storage may be resized in between.
            before, nbytes = self._kept.pop(key, (0, t.untyped_storage().nbytes()))
            after = before + change
            if after:
                self._kept[key] = after, nbytes
        if not before or not after:
            self.stats.ledger.add(plain=change * nbytes, device=change * nbytes)

    def _forget(self, index: int, key: int) -> None:
        with LOCK:
            self._by_index.pop(index, None)
            of_storage = self._packed.get(key, {})
            of_storage.pop(index, None)
            if not of_storage:
                self._packed.pop(key, None)


def _foreign(t: Tensor) -> str:
    """Why a saved tensor is not ours to write down, or ""."""
    if type(t) is not Tensor and type(t) is not nn.Parameter:
        return "subclass"
    if t.layout is not torch.strided or t.is_quantized or t.is_nested:
        return "layout"
    if t.device.type == "meta" or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return "no memory"
    if t.is_inference():
        return "inference"
    if t.is_conj() or t.is_neg():
        return "conjugate view"
    if t.element_size() not in (1, 2, 4, 8, 16):
        return "element size"
    return "" if t.numel() else "small"


_transfers: dict[torch.device, Transfer] = {}  # pinned memory is slow to get and is kept


def _transfer_of(device: torch.device) -> Transfer:
    with LOCK:
        if device not in _transfers:
            _transfers[device] = Transfer(streams_of(device))
        return _transfers[device]


def spare_bytes() -> int:
    """Host memory that the pools hold and nothing is in."""
    return sum(t.pool.reserved - t.pool.used for t in tuple(_transfers.values()))


@contextlib.contextmanager
def transfers(**replaced: Transfer):
    """For tests: other transfers, by device type, for contexts made inside."""
    with LOCK:
        before = dict(_transfers)
        _transfers.update({torch.device(name): t for name, t in replaced.items()})
    try:
        yield
    finally:
        with LOCK:
            _transfers.clear()
            _transfers.update(before)
