"""The way to sparse weights: train, prune, retrain."""

from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .prune import Pruned, PruneReport, prune
from .verify import Verification, VerifiedLayer, verify

__all__ = [
    "NM",
    "Density",
    "Held",
    "Layer",
    "Mask",
    "Pattern",
    "PruneReport",
    "Pruned",
    "Quality",
    "Transposable",
    "Verification",
    "VerifiedLayer",
    "finalize",
    "hold",
    "layers",
    "mask_of",
    "masks",
    "parse",
    "prune",
    "sparsify",
    "verify",
]
