"""The way to sparse weights: train, prune, retrain."""

from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .oneshot import prune_oneshot
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .permutation import kept_magnitude, search_permutation
from .permute import Permuted, PermuteReport, permute
from .prune import Pruned, PruneReport, prune
from .recipe import RecipeError
from .straight_through import StraightThrough, freeze_masks, straight_through
from .training import Interrupted, TrainingError, run_recipe
from .verify import Verification, VerifiedLayer, verify

__all__ = [
    "NM",
    "Density",
    "Held",
    "Interrupted",
    "Layer",
    "Mask",
    "Pattern",
    "PermuteReport",
    "Permuted",
    "PruneReport",
    "Pruned",
    "Quality",
    "RecipeError",
    "StraightThrough",
    "TrainingError",
    "Transposable",
    "Verification",
    "VerifiedLayer",
    "finalize",
    "freeze_masks",
    "hold",
    "kept_magnitude",
    "layers",
    "mask_of",
    "masks",
    "parse",
    "permute",
    "prune",
    "prune_oneshot",
    "run_recipe",
    "search_permutation",
    "sparsify",
    "straight_through",
    "verify",
]
