"""A training step with activation offload beside the same step without, and beside torch's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

import sparsekern as sk

from ..offload.nets import NETS
from .clock import Budget, Sides
from .results import Row
from .session import Case, Session

NAMES = ("transformer-relu2", "vgg16", "transformer-gelu")
POLICIES = ("auto", "device", "cpu")
BATCH = 8
STEPS = 3  # before measuring, so that sites have been seen
PLAIN, TORCH = "without", "save_on_cpu"


def cases(session: Session) -> Iterator[Case]:
    for net in NAMES[:1] if session.options.quick else NAMES:
        threads = session.each_threads()[-1]
        run = functools.partial(_measure, net=net, threads=threads)
        yield Case(f"offload_activations {net}, threads: {threads}", 4.0, run, trains=True)


def _measure(session: Session, budget: Budget, net: str, threads: int) -> list[Row]:
    session.spare.clear()
    torch.manual_seed(session.options.seed)
    built = NETS[net]
    sizes = {"size": 16} if session.options.quick else {}
    model = built.build(**sizes).to(session.device)
    generator = torch.Generator(session.device).manual_seed(session.options.seed)
    batch = built.make_batch(BATCH, sizes.get("size", built.size), generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(context) -> None:
        model.zero_grad(set_to_none=True)
        with context:
            loss = built.loss(model, *batch)
        loss.backward()

    offloads = {to: sk.offload_activations(to) for to in POLICIES}
    sides: Sides = {to: lambda i, o=o: step(o) for to, o in offloads.items()}
    sides[PLAIN] = lambda i: step(contextlib.nullcontext())
    if session.wants(TORCH):
        sides[TORCH] = lambda i: step(torch.autograd.graph.save_on_cpu())
    rows = []
    with session.threads(threads):
        for _ in range(STEPS):
            step(contextlib.nullcontext())
            optimiser.step()
        right = _identical(model, step, offloads) if session.options.check else None
        samples = session.clock.interleave(sides, budget)
    for to, offload in offloads.items():
        peak = offload.stats.peak_bytes
        row = session.row(
            "offload_activations",
            "offload",
            {"net": net, "to": to},
            f"{net}, to {to}",
            "fp32",
            threads,
            ("", ""),
        )
        row.compression = peak["plain"] / max(peak["device"], peak["host"], 1)
        row.exact = right
        row.wrong = "" if right in (None, True) else "gradients differ from those without"
        rows.append(row.timed(samples, to, [p for p in (PLAIN, TORCH) if p in samples]))
    return rows


def _identical(model: torch.nn.Module, step, offloads: dict) -> bool:
    def gradients(context) -> list[torch.Tensor]:
        step(context)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients(contextlib.nullcontext())
    return all(
        all(torch.equal(a, b) for a, b in zip(gradients(o), want, strict=True))
        for o in offloads.values()
    )
