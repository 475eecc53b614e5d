"""Activation offload: what autograd saves for backward, compressed or moved out of the way until it is needed.

``context`` has the hooks, ``identity`` which memory a tensor is, ``policy`` what becomes of it, ``codec`` how
it is written down, ``transfer`` how bytes get to the host and back on a device with streams.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .context import TO, ActivationOffload, spare_bytes
from .host import available_bytes
from .stats import ModuleStats, Stats

__all__ = ["ActivationOffload", "ModuleStats", "Stats", "offload_activations"]


def offload_activations(
    to: str = "auto",
    *,
    min_bytes: int = 256 << 10,
    max_host_bytes: int | None = None,
    min_ratio: float = 1.25,
    prefetch: int = 2,
    keep: Tensor | nn.Module | Iterable[Tensor | nn.Module] = (),
) -> ActivationOffload:
    """Hold what autograd saves for backward in fewer bytes, or on the host, while a forward pass runs inside.

    Gradients are bit for bit what they are without it. Each tensor is looked at once: what has zeros is
    stored as a bit mask and its non-zero elements (:func:`sparsekern.pack_zvc`), booleans as bits, integers
    of small range in fewer bytes, and what does not compress is moved as it is or left alone. Several saved
    tensors that look at the same memory share one packed object. Parameters and buffers are never moved,
    nor are leaves that require a gradient: the graph holds them anyway.

    ============  =====================================  ===========================================
    ``to``        compresses                             does not compress
    ============  =====================================  ===========================================
    ``"cpu"``     compressed, to the host                to the host as it is
    ``"device"``  compressed, stays where it is          left alone
    ``"auto"``    in place where that frees more bytes   to the host; left alone if it is on the
                  per second, else to the host           host already
    ============  =====================================  ===========================================

    On tensors of the CPU the same machinery runs from host to host: "cpu" then copies, for tests.

    The in-place check that torch gives up where hooks are set is made here, with torch's message. Works with
    ``retain_graph``, double backward, both kinds of checkpointing (outside the checkpoint), autocast,
    ``torch.compile``, several threads and devices. ``torch.func`` transforms refuse saved-tensor hooks.
    Writing to a saved tensor's memory behind autograd's back (``.data``, a raw kernel) is as wrong as without.

    Make one and enter it every step, and ``stats`` gathers; made anew every step it works the same.

    Args:
        to: "auto", "cpu" or "device".
        min_bytes: tensors of fewer bytes are left alone.
        max_host_bytes: cap on bytes held on the host. Beyond it what comes stays on the device. By default
            three quarters of what the machine has available now. Pinned memory comes first; where the
            system refuses it, pageable memory; then the device keeps it.
        min_ratio: bytes before over bytes after, from which compressing is worth it; more than 1.
        prefetch: how many packed objects backward brings back ahead of their use, on devices with streams.
        keep: tensors and modules whose memory is to be left alone. Those of modules that run inside the
            context are known without it.

    Returns:
        An :class:`ActivationOffload`, a context manager with ``stats``.

    Raises:
        ValueError: an argument outside its range.

    Source: Rhu et al. 2018, "Compressing DMA Engine" (arXiv 1705.01626); the hooks are
    ``torch.autograd.graph.saved_tensors_hooks``.

    >>> import torch, sparsekern as sk
    >>> model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))
    >>> with sk.offload_activations(min_bytes=1024) as offload:
    ...     loss = model(torch.randn(32, 64)).square().mean()
    >>> loss.backward()
    >>> offload.stats.total.packed["zvc"]
    1
    """
    if to not in TO:
        raise ValueError(f"offload_activations: to is {to!r}; it takes one of {', '.join(TO)}")
    for name, value, least in (
        ("min_bytes", min_bytes, 0),
        ("prefetch", prefetch, 0),
        ("max_host_bytes", max_host_bytes, 0),
    ):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(
                f"offload_activations: {name} is {value!r}; it takes an int of at least {least}"
            )
    if not (isinstance(min_ratio, (int, float)) and min_ratio > 1):
        raise ValueError(
            f"offload_activations: min_ratio is {min_ratio!r}; it takes a number above 1"
        )
    keep = (keep,) if isinstance(keep, (Tensor, nn.Module)) else tuple(keep)
    for item in keep:
        if not isinstance(item, (Tensor, nn.Module)):
            raise ValueError(
                f"offload_activations: keep holds {item!r}; it takes tensors and modules"
            )
    if max_host_bytes is None:
        available = available_bytes()
        # What earlier contexts left in the pools is available too.
        max_host_bytes = None if available is None else (available + spare_bytes()) // 4 * 3
    return ActivationOffload(to, min_bytes, max_host_bytes, min_ratio, prefetch, keep)
