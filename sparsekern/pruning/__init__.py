"""The way to sparse weights: train, prune, retrain."""

from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .oneshot import prune_oneshot
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .prune import Pruned, PruneReport, prune
from .recipe import RecipeError
from .training import Interrupted, TrainingError, run_recipe
from .verify import Verification, VerifiedLayer, verify
from .straight_through import StraightThrough, freeze_masks, straight_through

__all__ = [
    "NM",
    "Density",
    "Held",
    "Interrupted",
    "Layer",
    "Mask",
    "Pattern",
    "PruneReport",
    "Pruned",
    "Quality",
    "RecipeError",
    "TrainingError",
    "StraightThrough",
    "Transposable",
    "Verification",
    "VerifiedLayer",
    "finalize",
    "freeze_masks",
    "hold",
    "layers",
    "mask_of",
    "masks",
    "parse",
    "prune",
    "prune_oneshot",
    "run_recipe",
    "sparsify",
    "straight_through",
    "verify",
]
