"""SparseGPT and Wanda on a language model that trains here: perplexity after one-shot pruning.

    python -m benchmarks.pruning.oneshot [--seeds N] [--quick] [--data tinyshakespeare.txt]

Trains a character transformer on the first nine tenths of the text, prunes copies of it by magnitude,
Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774) to 2:4, 4:8 and half of the weights, and reads
the last tenth. Ctrl-C ends it; finished seeds are kept in --work, and the same command goes on from there.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu.report import Table
from sparsekern import pruning
from sparsekern.offload.nets import transformer

from . import record

METHODS = ("magnitude", "wanda", "sparsegpt")
# Wanda's tables: LLaMA-2-7B on WikiText.
PAPER_DENSE = 5.12
PAPER = {
    "2:4": {"magnitude": 54.59, "wanda": 11.02, "sparsegpt": 10.17},
    "4:8": {"magnitude": 16.48, "wanda": 7.97, "sparsegpt": 8.12},
    "density=0.5": {"magnitude": 14.89, "wanda": 6.42, "sparsegpt": 6.51},
}


@dataclass(frozen=True)
class Run:
    """One training and what is read afterwards; `size` characters are a sequence.

    Attributes:
        samples: calibration sequences, drawn from what the net was trained on.
        read: sequences of the held-out text.
    """

    width: int = 144
    layers: int = 4
    size: int = 128
    batch: int = 8
    steps: int = 1200
    rate: float = 2e-3
    samples: int = 128
    read: int = 400


QUICK = Run(width=16, layers=2, size=16, batch=2, steps=4, samples=4, read=8)


def sequences(tokens: Tensor, size: int, n: int, generator: torch.Generator) -> Tensor:
    """``[n, size + 1]`` at random places."""
    starts = torch.randint(len(tokens) - size, (n, 1), generator=generator)
    return tokens[starts + torch.arange(size + 1)]


def loss(model: nn.Module, stretch: Tensor) -> Tensor:
    """Mean cross-entropy of the next character, over ``[n, size + 1]``."""
    return F.cross_entropy(model(stretch[:, :-1]).flatten(0, 1), stretch[:, 1:].flatten())


def train(run: Run, tokens: Tensor, symbols: int, seed: int, advance: record.Advance) -> nn.Module:
    """AdamW, its rate up over a twentieth of the steps and down to zero along a cosine."""
    torch.manual_seed(seed)
    model = transformer(run.size, symbols, run.width, run.layers, heads=4, activation="gelu")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=0.1, fused=True)
    warm = math.ceil(run.steps / 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * i / run.steps)),
    )
    for step in range(run.steps):
        found = loss(model, sequences(tokens, run.size, run.batch, generator))
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            advance(f"step {step} of {run.steps}, loss {found.item():.2f}")
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, held_out: Tensor) -> float:
    """Per character, over ``[n, size + 1]``."""
    losses = [loss(model, part).item() * len(part) for part in held_out.split(8)]
    return math.exp(sum(losses) / len(held_out))


def measure(run: Run, text: str, seed: int, advance: record.Advance) -> dict[str, float]:
    """Perplexities: of ``dense`` and of each ``PATTERN METHOD``; and the number of parameters."""
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([symbols[c] for c in text])
    cut = len(tokens) * 9 // 10
    model = train(run, tokens[:cut], len(symbols), seed, advance)
    # The same text for every seed: what differs is the net.
    n = min(run.read, (len(tokens) - cut - 1) // run.size)
    held_out = tokens[cut : cut + n * run.size + 1].unfold(0, run.size + 1, run.size)
    generator = torch.Generator().manual_seed(seed + 1)
    calibration = sequences(tokens[:cut], run.size, run.samples, generator)[:, :-1].split(8)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense": perplexity(model, held_out),
    }
    for pattern in PAPER:
        for method in METHODS:
            pruned = copy.deepcopy(model)
            pruning.prune_oneshot(pruned, calibration, method, pattern)
            found[f"{pattern} {method}"] = perplexity(pruned, held_out)
            advance(f"{pattern} {method}: {found[f'{pattern} {method}']:.2f}")
    return found


# ---- report ----


def against(seeds: list[dict[str, float]]) -> list[str]:
    """Whether the order is the papers', by pattern."""
    lines = []
    for pattern, paper in PAPER.items():

        def ranked(row: dict[str, float]) -> str:
            return " < ".join(sorted(METHODS, key=row.__getitem__))

        orders = [ranked({m: seed[f"{pattern} {m}"] for m in METHODS}) for seed in seeds]
        theirs = ranked(paper)
        lines.append(
            f"**{pattern}**, perplexity from low to high: in the paper {theirs}; here in "
            f"{sum(o == theirs for o in orders)} of {len(orders)} seeds"
            + "".join(f"; {o}" for o in sorted({*orders} - {theirs}))
            + "."
        )
    return lines


def tables(seeds: list[dict[str, float]], run: Run) -> list[Table]:
    rows = [
        [
            "dense",
            "",
            record.spread([s["dense"] for s in seeds]),
            "1.00",
            ", ".join(f"{s['dense']:.2f}" for s in seeds),
            f"{PAPER_DENSE:.2f}",
            "1.00",
        ]
    ]
    for pattern, paper in PAPER.items():
        for method in METHODS:
            values = [s[f"{pattern} {method}"] for s in seeds]
            ratios = [v / s["dense"] for v, s in zip(values, seeds, strict=True)]
            rows.append(
                [
                    pattern,
                    method,
                    record.spread(values),
                    record.spread(ratios),
                    ", ".join(f"{v:.2f}" for v in values),
                    f"{paper[method]:.2f}",
                    f"{paper[method] / PAPER_DENSE:.2f}",
                ]
            )
    words = (
        f"Here: per character, {int(seeds[0]['parameters']):,} parameters, {run.layers} blocks of width "
        f"{run.width}, AdamW, {run.steps:,} steps of {run.batch} x {run.size} characters; the linear layers "
        f"of the blocks are pruned, with {run.samples} sequences of the training text; {run.read} "
        "sequences of the last tenth are read. Mean ± standard deviation. The paper: per token, LLaMA-2-7B on WikiText."
    )
    columns = ["pattern", "method", "here", "over dense", "by seed", "paper", "over dense"]
    return [Table("Perplexity", words, columns, rows)]


def main() -> int:
    os.environ.setdefault("SPARSEKERN_STRICT", "1")
    parser = record.parser("oneshot", __doc__.partition("\n")[0], "tinyshakespeare.txt")
    options = record.checked(parser)
    torch.set_num_threads(options.threads)
    text = options.data.read_text()
    run = QUICK if options.quick else Run()
    steps = math.ceil(run.steps / 100) + len(PAPER) * len(METHODS)
    parts = {
        f"oneshot-{seed}": (
            asdict(run),
            steps,
            lambda advance, seed=seed: measure(run, text, seed, advance),
        )
        for seed in range(options.seeds)
    }
    kept, interrupted = record.measure(parts, options.work)
    seeds = [part["result"] for part in kept.values()]
    words = [
        "Anchors: Sun et al., Wanda (arXiv 2306.11695), whose figures are beside ours; Frantar and Alistarh, "
        f'"SparseGPT" (arXiv 2301.00774). Seeds 0 to {options.seeds - 1} decide weights, order '
        "and calibration."
    ]
    record.write(
        "oneshot",
        "one-shot pruning of a character transformer",
        words,
        against(seeds),
        tables(seeds, run) if seeds else [],
        options,
        kept,
        interrupted,
    )
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
