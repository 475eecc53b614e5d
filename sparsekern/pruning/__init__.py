"""The way to sparse weights: train, prune, retrain."""

from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .permutation import kept_magnitude, search_permutation
from .permute import Permuted, PermuteReport, permute
from .prune import Pruned, PruneReport, prune

__all__ = [
    "NM",
    "Density",
    "Held",
    "Layer",
    "Mask",
    "Pattern",
    "PermuteReport",
    "Permuted",
    "PruneReport",
    "Pruned",
    "Quality",
    "Transposable",
    "finalize",
    "hold",
    "kept_magnitude",
    "layers",
    "mask_of",
    "masks",
    "parse",
    "permute",
    "prune",
    "search_permutation",
    "sparsify",
]
