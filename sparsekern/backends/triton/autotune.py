"""Which configuration a kernel launches with: the built-in choice, or what `tune` measured on this device.

Nothing is measured unless :func:`tune` is called, so no call of an op ever pays for it and a CUDA graph can capture
any of them. Winners are kept in ``$XDG_CACHE_HOME/sparsekern/triton.json`` (``~/.cache`` where that is not set)::

    {"version": 1, "choices": {"linear_24, M 16, N 4096, K 4096, bfloat16, NVIDIA H100 80GB HBM3, 9.0, triton 3.6.0":
                               ["many", 16, 64, 128, 4, 3]}}

An entry that names no configuration of today is passed over; how the file is read and written is told in tuned.py.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ... import tuned

VERSION = 1
log = logging.getLogger("sparsekern")


class Config(NamedTuple):
    """The tile of a program, its warps and pipeline stages, and which of an op's kernels it is for."""

    kernel: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Family(NamedTuple):
    """An op that has a choice: its launcher, the built-in configuration and those to try.

    ``built_in(M, N, K, dtype, sms)`` with `sms` multiprocessors, ``candidates(M, dtype)``.
    """

    launch: Callable
    built_in: Callable[[int, int, int, torch.dtype, int], Config]
    candidates: Callable[[int, torch.dtype], list[Config]]


class _Key(NamedTuple):
    op: str
    M: int  # a bucket
    N: int
    K: int
    dtype: torch.dtype
    device: torch.device


FAMILIES: dict[str, Family] = {}  # by op; each file of products adds its own
_chosen: dict[_Key, Config] = {}  # what this process launches with
_stored: dict[str, list] | None = None  # the file, once read


def path() -> Path:
    """The file that keeps what was tuned."""
    return tuned.path("triton.json")


def bucket(M: int) -> int:
    """Rows that share a choice: up to four each by itself, then powers of two, from 8192 on all."""
    return M if M <= 4 else min(triton.next_power_of_2(M), 8192)


def config(op: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The tuned configuration, or the built-in one."""
    key = _Key(op, bucket(M), N, K, dtype, device)
    chosen = _chosen.get(key)
    if chosen is None:
        global _stored
        if _stored is None:
            _stored = _read(path())
        entry = _stored.get(_name(key))
        known = (c for c in FAMILIES[op].candidates(key.M, dtype) if list(c) == entry)
        chosen = next(known, None) or FAMILIES[op].built_in(key.M, N, K, dtype, sms(device))
        _chosen[key] = chosen
    return chosen


@functools.cache
def sms(device: torch.device) -> int:
    """Multiprocessors; for the interpreter as many as an H100 has."""
    if device.type == "cpu":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def parameters(config: Config) -> dict:
    """What a launch passes on. Triton 3.10 will no longer fuse multiplications with additions by itself."""
    chosen = {k: v for k, v in config._asdict().items() if k != "kernel"}
    return chosen | {"enable_fp_fusion": True}


def tune(op: str, *args) -> Config:
    """Measure every candidate of `op` on these arguments; keep the fastest, for this process and on disk.

    The choice then serves every call with the same dtype, N and K on this device whose M falls into the same bucket.
    Times are medians with a cold L2 cache. Takes seconds, most of them to compile.

    Args:
        op: ``linear_24``, ``linear_24_dx`` or ``linear_24_dvalues``.
        args: the arguments of the op.

    Returns:
        The configuration that won.

    Raises:
        ValueError: an op that has no choice.
        RuntimeError: while a CUDA graph is captured, or no candidate fits the device.

    On a GPU::

        sparsekern.backends.triton.tune("linear_24", x, values, meta)
    """
    if op not in FAMILIES:
        raise ValueError(f"tune: op is {op!r}; it takes one of {', '.join(FAMILIES)}")
    first, second = args[:2]
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: the stream is being captured; tune before the capture")
    M = first.shape[:-1].numel()
    N, K = second.shape[0], 2 * second.shape[1]  # values
    if op == "linear_24_dvalues":
        N, K = first.shape[-1], second.shape[-1]  # of dy and x
    key = _Key(op, bucket(M), N, K, first.dtype, first.device)
    before, times = _chosen.get(key), {}
    try:
        for candidate in FAMILIES[op].candidates(key.M, key.dtype):
            _chosen[key] = candidate
            try:
                times[candidate] = _seconds(FAMILIES[op].launch, args)
            except triton.OutOfResources:
                continue  # it does not fit this device
    finally:
        _chosen.pop(key)
        if before is not None:
            _chosen[key] = before
    if not times:
        raise RuntimeError(f"tune: no configuration of {op} fits {_device_name(first.device)}")
    best = _chosen[key] = min(times, key=times.get)
    try:
        _write(_name(key), best)
    except OSError as error:
        log.warning(
            "tune: %s cannot be written (%s); the choice ends with this process", path(), error
        )
    return best


def _seconds(launch: Callable, args: tuple) -> float:
    """The median time of a call: on a GPU behind a flush of the cache, in the interpreter by the clock."""
    if args[0].is_cuda:
        return triton.testing.do_bench(lambda: launch(*args), return_mode="median") / 1e3
    times = []
    for _ in range(3):
        start = time.perf_counter()
        launch(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _device_name(device: torch.device) -> str:
    from ...info import cuda_name  # here: it draws tables too, which takes time to load

    return "interpreter" if device.type == "cpu" else cuda_name(device)


def _name(key: _Key) -> str:
    """The key in words that mean the same to another process."""
    dtype = str(key.dtype).removeprefix("torch.")
    problem = f"{key.op}, M {key.M}, N {key.N}, K {key.K}, {dtype}"
    return f"{problem}, {_device_name(key.device)}, triton {triton.__version__}"


def _read(file: Path) -> dict[str, list]:
    return tuned.read(file, VERSION)


def _write(name: str, chosen: Config) -> None:
    tuned.update(path(), VERSION, lambda choices: choices | {name: list(chosen)})
