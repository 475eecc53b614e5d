"""How work is ordered on a device: the few operations of streams and events that offloading needs.

Everything else in this package is written against :class:`Streams`, so its ordering can be tested on a
CPU by a stand-in that runs copies as late as it is allowed to.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """The streams of one device. Work on a stream runs in order; between streams only events order it."""

    asynchronous: bool  # False: everything has happened when a call returns

    def current(self) -> Any:
        """The stream that compute is on now. Asked again at every use: it changes."""

    def on(self, stream) -> contextlib.AbstractContextManager:
        """Compute is on that stream inside, in this thread."""

    def side(self, direction: str) -> Any:
        """The stream that copies "out" of the device or "in"."""

    def capturing(self) -> bool:
        """Whether the current stream's work is only recorded, for a graph: nothing may be asked or waited for."""

    def record(self, stream) -> Any:
        """An event that happens when all work now on the stream is done."""

    def wait(self, stream, event) -> None:
        """What comes on the stream from now on waits for the event. Does not block the host."""

    def done(self, event) -> bool:
        """Whether the event has happened."""

    def synchronize(self, event) -> None:
        """Block the host until the event has happened."""

    def copy(self, to: Tensor, source: Tensor, stream) -> None:
        """Put a copy of equal bytes on the stream. Both must live until an event after it has happened."""

    def used_on(self, t: Tensor, stream) -> None:
        """Memory of `t` is in use on a stream it was not allocated on; it may be reused only after that."""

    def pin(self, t: Tensor) -> bool:
        """Lock host memory for asynchronous copies; False where that is refused."""

    def unpin(self, t: Tensor) -> None:
        """Undo :meth:`pin`."""


class Immediate:
    """The CPU: no streams, a copy is done when it returns."""

    asynchronous = False

    def current(self) -> None:
        return None

    def on(self, stream) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def side(self, direction: str) -> None:
        return None

    def capturing(self) -> bool:
        return False

    def record(self, stream) -> None:
        return None

    def wait(self, stream, event) -> None:
        pass

    def done(self, event) -> bool:
        return True

    def synchronize(self, event) -> None:
        pass

    def copy(self, to: Tensor, source: Tensor, stream) -> None:
        to.copy_(source)

    def used_on(self, t: Tensor, stream) -> None:
        pass

    def pin(self, t: Tensor) -> bool:
        return False

    def unpin(self, t: Tensor) -> None:
        pass


class Accelerator:
    """A device with streams, through torch's own device-independent API."""

    asynchronous = True

    def __init__(self, device: torch.device):
        self.device = device
        self._sides: dict[str, torch.Stream] = {}

    def current(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def on(self, stream: torch.Stream) -> contextlib.AbstractContextManager:
        # An object of its own: what to return to is kept on the object that is entered, so that two
        # threads inside the same one would return to each other's stream.
        return torch.Stream(
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )

    def side(self, direction: str) -> torch.Stream:
        stream = self._sides.get(direction)
        if stream is None:
            stream = self._sides[direction] = torch.Stream(device=self.device)
        return stream

    def capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def record(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(device=self.device)
        event.record(stream)
        return event

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        stream.wait_event(event)

    def done(self, event: torch.Event) -> bool:
        return event.query()

    def synchronize(self, event: torch.Event) -> None:
        event.synchronize()

    def copy(self, to: Tensor, source: Tensor, stream: torch.Stream) -> None:
        with self.on(stream):
            to.copy_(source, non_blocking=True)

    def used_on(self, t: Tensor, stream: torch.Stream) -> None:
        t.record_stream(stream)

    def pin(self, t: Tensor) -> bool:
        # Registered, not allocated pinned: torch's allocator would round up to a power of two.
        if self.device.type != "cuda" or torch.version.hip is not None:
            return False
        portable = 1  # cudaHostRegisterPortable: whichever device is current here
        if int(torch.cuda.cudart().cudaHostRegister(t.data_ptr(), t.nbytes, portable)) == 0:
            return True
        # The runtime remembers the refusal, and the next launch in this thread would raise it as its
        # own error (torch has no binding of cudaGetLastError, vllm#50070). So here is one.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)
        return False

    def unpin(self, t: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(t.data_ptr())


def streams_of(device: torch.device) -> Streams:
    return Immediate() if device.type == "cpu" else Accelerator(device)
