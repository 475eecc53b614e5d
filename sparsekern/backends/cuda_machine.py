"""Who carries out launches on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .cuda_launch import Device, Launch


class Machine:
    """One device and a way to launch on it."""

    device: Device

    def run(self, launch: Launch) -> None:
        raise NotImplementedError


_machines: dict[torch.device, Machine] = {}


def machine(device: torch.device) -> Machine:
    return _machines[device]


def unavailable(device: torch.device) -> str | None:
    return None if device in _machines else "not built"


@contextlib.contextmanager
def instead(device: torch.device, machine: Machine) -> Iterator[None]:
    """`machine` launches for `device` meanwhile. For tests."""
    before = _machines.get(device)
    _machines[device] = machine
    try:
        yield
    finally:
        if before is None:
            del _machines[device]
        else:
            _machines[device] = before
