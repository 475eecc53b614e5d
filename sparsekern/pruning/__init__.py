"""The way to sparse weights: train, prune, retrain."""

from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .prune import Pruned, PruneReport, prune
from .retrain import CONV, FC, frozen, l1_penalty
from .schedule import Round, geometric, plan, rounds

__all__ = [
    "CONV",
    "FC",
    "NM",
    "Density",
    "Held",
    "Layer",
    "Mask",
    "Pattern",
    "PruneReport",
    "Pruned",
    "Quality",
    "Round",
    "Transposable",
    "finalize",
    "frozen",
    "geometric",
    "hold",
    "l1_penalty",
    "layers",
    "mask_of",
    "masks",
    "parse",
    "plan",
    "prune",
    "rounds",
    "sparsify",
]
