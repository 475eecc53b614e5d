"""A stream that is being captured, imitated on CPU tensors: what CUDA would refuse is refused, and what was captured is
replayed.

Inside :class:`Capture` every CPU tensor stands for one of a device. The host may launch kernels and torch's operators;
it may not read a tensor, wait, make a tensor of host memory, measure or open a file. Triton's interpreter and the
machine of the CUDA back end stand for the device: what they do is no matter of the host.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sparsekern import ops
from sparsekern.backends import triton


class Refused(RuntimeError):
    """What a stream under capture refuses."""


# Python's own ways from a tensor to the host and back; some read memory without an operator of torch.
_READS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
    *("__array__", "__repr__", "__format__", "__contains__", "__dlpack__", "__reduce_ex__"),
}  # fmt: skip
_MAKES = {
    *("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "from_dlpack"),
    *("pin_memory", "is_pinned", "share_memory_", "load", "save"),
}
_WAITS = (
    "torch.cuda.synchronize",
    "torch.cuda.Stream.synchronize",
    "torch.cuda.Stream.query",
    "torch.cuda.Event.synchronize",
    "torch.cuda.Event.query",
    "torch.cuda.Event.elapsed_time",
    "torch.accelerator.synchronize",
    "torch.cuda.caching_allocator_alloc",
    "triton.testing.do_bench",
    "triton.testing.do_bench_cudagraph",
    "sparsekern.backends.triton.autotune._seconds",
)
# What the interpreter of Python tells of itself: files, other processes, libraries, memory not from torch.
_EVENTS = {"open", "os.listdir", "os.scandir", "subprocess.Popen", "ctypes.dlopen", "mmap.__new__"}
# Operators whose result the host has to know. Indexing is among torch's, but only a mask makes it so.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_NAMES = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
_NAMES |= {"_pin_memory", "pin_memory", "is_pinned", "lift_fresh", "lift_fresh_copy"}
_INDEX = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}

_host: list = []  # the capture whose host code runs now, if any


def _audit(event: str, args: tuple) -> None:
    if _host and event in _EVENTS:
        raise Refused(f"{event}: {args[0] if args else ''}")


sys.addaudithook(_audit)  # stays for good


def _refuse(name: str) -> Callable:
    def refuse(*_, **__):
        raise Refused(name)

    return refuse


@contextlib.contextmanager
def on_the_device():
    """What runs in here is the device's, not the host's."""
    host, _host[:] = list(_host), []
    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            yield
    finally:
        _host[:] = host


class _Python(TorchFunctionMode):
    """Refuses by the names of Python; a tensor says that it is on a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "__get__" and func == Tensor.is_cuda.__get__:
            return True
        to_cpu = name == "to" and any(_is_cpu(a) for a in (*args[1:], *(kwargs or {}).values()))
        if name in _READS or name in _MAKES or to_cpu or (kwargs or {}).get("pin_memory"):
            raise Refused(f"Tensor.{name}" if name in _READS or to_cpu else f"torch.{name}")
        return func(*args, **(kwargs or {}))


def _is_cpu(a) -> bool:
    return isinstance(a, str | torch.device) and torch.device(a).type == "cpu"


class Capture(TorchDispatchMode):
    """Captures what runs inside; :meth:`replay` repeats it on the same memory.

    Ops of sparsekern go to `backend`; with `strict` unset nothing is refused, as in the calls that warm up.
    """

    def __init__(self, backend: ModuleType = triton, strict: bool = True) -> None:
        super().__init__()
        self.backend, self.strict = backend, strict
        self.launches = 0
        self._work: list[Callable[[], None]] = []

    def __enter__(self) -> Capture:
        # Here: this file can be read where Triton is not installed.
        from triton.runtime import interpreter

        self._patches = contextlib.ExitStack()
        enter = self._patches.enter_context
        launch = interpreter.GridExecutor.__call__

        def launched(executor, *args, **kwargs):
            self._launched(lambda: launch(executor, *args, **kwargs))

        enter(mock.patch.object(interpreter.GridExecutor, "__call__", launched))
        enter(mock.patch("torch.cuda.is_current_stream_capturing", return_value=True))
        if self.strict:
            for name in _WAITS:
                enter(mock.patch(name, _refuse(name)))
            enter(_Python())
            _host.append(self)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.strict:
            _host.remove(self)
        self._patches.close()

    def _launched(self, launch: Callable[[], None]) -> None:
        self.launches += 1
        self._work.append(launch)
        with on_the_device():
            launch()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "sparsekern":
            with self._again():
                ops.OPS[name].check(*args)
                return getattr(self.backend, name)(*args)
        if self.strict:
            self._check(func, name, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self._again(python=False):  # the operators it is made of; they are called from C++
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if not name.startswith(("empty", "new_empty")):
            self._work.append(lambda: _repeat(func, args, kwargs, out))
        return out

    @contextlib.contextmanager
    def _again(self, python: bool = True):
        """Modes are off while one of them is asked."""
        with contextlib.ExitStack() as modes:
            if self.strict and python:
                modes.enter_context(_Python())
            TorchDispatchMode.__enter__(self)
            try:
                yield
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)

    @staticmethod
    def _check(func, name: str, args: tuple, kwargs: dict) -> None:
        if name in _INDEX:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            refused = bool(masks)
        elif name == "repeat_interleave":
            refused = kwargs.get("output_size") is None
        else:
            refused = name in _NAMES or not _TAGS.isdisjoint(func.tags)
        # CPU tensors are the device's here, so that one which is asked for by name is the host's.
        refused |= name in ("_to_copy", "copy") and _is_cpu(kwargs.get("device"))
        refused |= bool(kwargs.get("pin_memory"))
        if refused:
            raise Refused(f"aten::{name}")

    def replay(self) -> None:
        """The work again, in order, on whatever the memory holds now."""
        with torch.no_grad():
            for work in self._work:
                work()


def _repeat(func, args, kwargs, out) -> None:
    again = func(*args, **kwargs)
    pairs = zip(again, out, strict=True) if isinstance(out, tuple | list) else [(again, out)]
    for new, old in pairs:
        if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
            old.detach().copy_(new)
