"""Activation offload on a GPU: step time, the allocator's peak, and how much of the copies compute hides."""

from __future__ import annotations

import contextlib
import statistics
import time

import torch

import sparsekern as sk
from sparsekern.offload.nets import NETS

WAYS = ("without", "auto", "device", "cpu", "save_on_cpu")


def measure(device: torch.device, seconds: float, quick: bool) -> dict:
    """A squared-ReLU transformer and VGG-16 in bf16: rows of every way, in turn on one model."""
    nets = (
        {"transformer-relu2": (4, {"width": 32, "heads": 2, "layers": 1})}
        if quick
        else {
            "transformer-relu2": (16, {"size": 1024, "width": 2048, "heads": 16, "layers": 12}),
            "vgg16": (64, {"size": 224}),
        }
    )
    found = []
    for name, (batch, sizes) in nets.items():
        found += _net(name, batch, sizes, device, seconds / len(nets))
    return {"rows": found, "missing": {}}


def _net(name: str, batch: int, sizes: dict, device: torch.device, seconds: float) -> list[dict]:
    torch.manual_seed(0)
    model = NETS[name].build(**sizes).to(device, torch.bfloat16)
    inputs, targets = NETS[name].batch(batch, device, torch.bfloat16, size=sizes.get("size"))
    offloads = {way: sk.offload_activations(way) for way in ("auto", "device", "cpu")}
    pin = device.type == "cuda"
    contexts = {
        "without": contextlib.nullcontext,
        **{way: lambda o=o: o for way, o in offloads.items()},
        "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(pin_memory=pin),
    }

    def step(way: str) -> tuple[float, int]:
        model.zero_grad(set_to_none=True)
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        with contexts[way]():
            loss = NETS[name].loss(model, inputs, targets)
        loss.backward()
        _synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return (time.perf_counter() - start) * 1e3, peak

    for way in WAYS:
        step(way), step(way)
    times, peaks = {way: [] for way in WAYS}, {}
    start = time.perf_counter()
    while len(times["without"]) < 3 or (
        len(times["without"]) < 20 and time.perf_counter() - start < seconds
    ):
        for way in WAYS:
            ms, peaks[way] = step(way)
            times[way].append(ms)
    found = []
    for way in WAYS:
        over = [a / b for a, b in zip(times[way], times["without"], strict=True)]
        row = {"op": "offload", "net": name, "side": way, "ms": statistics.median(times[way])}
        row |= {"times": statistics.median(over), "peak MB": peaks[way] / 1e6}
        if way in offloads:
            stats = offloads[way].stats
            row |= {"ratio packed": stats.total.ratio, "retreats": dict(stats.retreats)}
            row["wait ms"] = stats.wait_seconds / len(stats.steps) * 1e3
        if way != "without" and device.type == "cuda":
            row |= overlap(lambda way=way: step(way))
        found.append(row)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def overlap(step) -> dict:
    """Of the time that copies between device and host take in one step, the share during which a kernel runs."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    copies, kernels = [], []
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA:
            continue
        span = (event.time_range.start, event.time_range.end)
        if "Memcpy" in event.name and ("DtoH" in event.name or "HtoD" in event.name):
            copies.append(span)
        elif "Mem" not in event.name:
            kernels.append(span)
    total = sum(b - a for a, b in copies)
    return {
        "copy ms": total / 1e3,
        "hidden": shared_time(copies, kernels) / total if total else None,
    }


def shared_time(copies: list[tuple[float, float]], kernels: list[tuple[float, float]]) -> float:
    """How much of the copies' time lies within the union of the kernels'."""
    merged: list[list[float]] = []
    for a, b in sorted(kernels):
        if merged and a <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], b)
        else:
            merged.append([a, b])
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in copies for c, d in merged)
