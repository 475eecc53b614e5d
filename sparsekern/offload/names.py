"""Where in the model a tensor was saved: the module that was running, and how many it had saved before.

While an offload is active, two hooks on all modules keep a stack of the calls in flight, per thread.
Compiled code does not see them.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

_local = threading.local()
_lock = threading.Lock()
_active = 0
# The places of the two hooks in torch's tables. They are the same every time: what is compiled inside
# is compiled again for other ones.
_ENTER = RemovableHandle(torch_module._global_forward_pre_hooks).id
_LEAVE = RemovableHandle(torch_module._global_forward_hooks).id
# torch.compile warns that such hooks also fire for the module that wraps the compiled one; for these that
# is welcome.
_WELCOME = ".*when there are global hooks on modules"

SITES = 4096  # of one call that are told apart: a context may stay entered for all of a training


@dataclass(slots=True)
class Call:
    """One call of a module: its qualified name and how many tensors were saved in it so far."""

    module: nn.Module
    name: str
    saved: int = 0


@dataclass(slots=True, eq=False)
class Trace:
    """The calls in flight in one thread within one active offload."""

    on_root: object  # called with each outermost module
    outside: Call = field(default_factory=lambda: Call(None, ""))  # code that is in no module
    calls: list[Call] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def site(self) -> tuple[str, int]:
        """Names the place of the next saved tensor: (module, its how-manieth)."""
        call = self.calls[-1] if self.calls else self.outside
        call.saved += 1
        return call.name, (call.saved - 1) % SITES


def start(on_root) -> Trace:
    """Begin to follow this thread's module calls, until :func:`stop`."""
    global _active
    trace = Trace(on_root)
    _traces().append(trace)
    with _lock:
        _active += 1
        if _active == 1:
            # Once: every new filter makes Python show again what it has shown before.
            if not any(m is not None and m.pattern == _WELCOME for _, m, *_ in warnings.filters):
                warnings.filterwarnings("ignore", message=_WELCOME)
            torch_module._global_forward_pre_hooks[_ENTER] = _enter
            torch_module._global_forward_hooks[_LEAVE] = _leave
            torch_module._global_forward_hooks_always_called[_LEAVE] = True
    return trace


def stop(trace: Trace) -> None:
    global _active
    _traces().remove(trace)
    with _lock:
        _active -= 1
        if _active == 0:
            del torch_module._global_forward_pre_hooks[_ENTER]
            del torch_module._global_forward_hooks[_LEAVE]
            del torch_module._global_forward_hooks_always_called[_LEAVE]


def _traces() -> list[Trace]:
    if not hasattr(_local, "traces"):
        _local.traces = []
    return _local.traces


def _enter(module: nn.Module, _) -> None:
    if torch.compiler.is_compiling():
        return
    traces = _traces()
    if not traces:
        return
    trace = traces[-1]
    if not trace.calls:
        trace.names = _names_of(module)
        trace.on_root(module)
    trace.calls.append(Call(module, trace.names.get(id(module), type(module).__name__)))


def _leave(module: nn.Module, _, __) -> None:
    if torch.compiler.is_compiling():
        return
    traces = _traces()
    if not traces:
        return
    calls = traces[-1].calls
    # A call whose own hook failed leaves no second mark: drop what it left above this one.
    while calls:
        if calls.pop().module is module:
            break


def _names_of(root: nn.Module) -> dict[int, str]:
    """id to qualified name of each submodule; the root is called by its class."""
    return {
        id(m): (name or type(m).__name__).removeprefix("_orig_mod.")
        for name, m in root.named_modules()
    }
