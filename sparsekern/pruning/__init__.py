"""The way to sparse weights: train, prune, retrain."""

from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .oneshot import prune_oneshot
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .prune import Pruned, PruneReport, prune
from .straight_through import StraightThrough, freeze_masks, straight_through

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
    "StraightThrough",
    "Transposable",
    "finalize",
    "freeze_masks",
    "hold",
    "layers",
    "mask_of",
    "masks",
    "parse",
    "prune",
    "prune_oneshot",
    "sparsify",
    "straight_through",
]
