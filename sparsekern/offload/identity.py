"""Which memory a saved tensor is, and whether anybody wrote to it since.

::

    storage   |----lo============hi------|      a Region: elements lo..hi of one storage
                   ^ offset      t.as_strided(size, stride, offset) looks at it

Two tensors that look at the same region share one packed object. An address alone proves nothing, as
freed addresses are handed out again; a weak reference to the storage keeps its identity from being
reused for as long as we hold it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .lock import LOCK


@dataclass(frozen=True, slots=True)
class Region:
    """What a strided tensor looks at: elements `lo` to `hi` of a storage, in elements of its dtype."""

    lo: int
    hi: int
    gathered: (
        bool  # too little of it is used: a packed object holds the elements in order, without gaps
    )

    @property
    def numel(self) -> int:
        return self.hi - self.lo


def region(t: Tensor) -> Region:
    """The span of `t` in its storage. Dimensions of stride 0 count once (an expanded tensor costs its origin).

    A view that uses less than three quarters of its span is to be gathered instead: of the two halves of a
    gated unit's projection, rows side by side, each spans nearly both.
    """
    used = 1
    last = 0
    for n, s in zip(t.shape, t.stride(), strict=True):
        if s:
            used *= n
            last += (n - 1) * s
    lo = t.storage_offset()
    return Region(lo, lo + last + 1, gathered=4 * used < 3 * (last + 1))


def flat(t: Tensor, at: Region) -> Tensor:
    """The elements of the region, one-dimensional; a copy only if they are to be gathered."""
    if at.gathered:
        return unexpanded(t).contiguous().view(-1)
    return t.as_strided((at.numel,), (1,), at.lo)


def unexpanded(t: Tensor) -> Tensor:
    """`t` with one element where the stride is 0."""
    size = [n if s else 1 for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(size, t.stride(), t.storage_offset())


class Version:
    """Watches the version counter of a tensor.

    A detached alias shares the counter; pointed at other, empty memory, it still does, so that watching
    does not keep the tensor's memory.

    Args:
        t: the tensor.
        alias: a detached alias that is kept anyway; without it, one without memory is made.
    """

    __slots__ = ("_producer", "_shape", "alias", "expected")

    def __init__(self, t: Tensor, alias: Tensor | None = None):
        self.alias = t.detach() if alias is None else alias
        self.expected = self.alias._version
        self._shape = () if t.is_nested else t.shape
        producer = t.grad_fn
        self._producer = "" if producer is None else f"output {t.output_nr} of {producer.name()}"
        if alias is None:
            self.alias.data = self.alias.new_empty(0)

    def unchanged(self) -> bool:
        return self.alias._version == self.expected

    def watched(self, t: Tensor) -> Tensor:
        """The same memory, with the counter that is watched."""
        alias = self.alias.detach()
        alias.data = t
        return alias

    def check(self) -> None:
        """As torch does where no hooks are set, with its words: hooks switch its own check off.

        Raises:
            RuntimeError: the tensor was modified in place after it was saved.
        """
        if self.unchanged():
            return
        hint = (
            "the backtrace further above shows the operation that failed to compute its gradient. The variable in "
            "question was changed in there or anywhere later. Good luck!"
            if torch.is_anomaly_enabled()
            else "enable anomaly detection to find the operation that failed to compute its gradient, with "
            "torch.autograd.set_detect_anomaly(True, check_nan=False)."
        )
        # "output 0 of MulBackward0" is "output 0 of Mul" to newer torch
        producer = re.sub(r"Backward\d*$", "", self._producer)
        of = f", which is {producer}," if producer else ""
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{self.alias.type()} {list(self._shape)}]{of} is at version {self.alias._version}; "
            f"expected version {self.expected} instead. Hint: {hint}"
        )


def storage_key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def revive(
    storage: StorageWeakRef,
    like: Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
) -> Tensor | None:
    """A tensor on that storage if anybody still holds it, else None. `like` gives dtype and device."""
    alive = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    return None if alive is None else like.new_empty(0).set_(alive, offset, size, stride)


def plain(t: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own inside a wrapper (DTensor's local shard and the like), or `t` itself."""
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:
            inner = getattr(t, name)
            if isinstance(inner, Tensor):  # a DTensor also names its device mesh
                yield from plain(inner)
    else:
        yield t


class Owned:
    """Storages that live on whatever autograd does: parameters and buffers. Moving them would gain nothing."""

    def __init__(self) -> None:
        self._holders: dict[int, weakref.ref[Tensor]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        with LOCK:
            for t in tensors:
                for p in plain(t):
                    # The parameters of lazy modules have no memory yet.
                    if p.layout is torch.strided and p.device.type != "meta" and not is_lazy(p):
                        self._holders[storage_key(p)] = weakref.ref(p)
            if len(self._holders) > 10_000:
                dead = [k for k, ref in self._holders.items() if ref() is None]
                for k in dead:
                    del self._holders[k]

    def __contains__(self, t: Tensor) -> bool:
        key = storage_key(t)
        holder = self._holders.get(key)
        holder = None if holder is None else holder()
        # Alive and on this storage still: two storages alive at one time have two addresses.
        return holder is not None and storage_key(holder) == key


def leaf_or_its_copy(t: Tensor) -> bool:
    """Whether `t` is a leaf that gathers gradients, a view of one, or the copy of one in another dtype (autocast's).

    The graph holds such a leaf anyway, so packing it would only add to it.
    """
    base = t if t._base is None else t._base
    if isinstance(base, torch.nn.Parameter) or (base.is_leaf and base.requires_grad):
        return True
    producer = base.grad_fn
    if producer is None or producer.name() != "ToCopyBackward0":
        return False
    origin = producer.next_functions[0][0]
    return origin is not None and hasattr(origin, "variable")
