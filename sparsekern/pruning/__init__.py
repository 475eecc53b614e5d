"""The way to sparse weights: train, prune, retrain."""

from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .prune import Pruned, PruneReport, prune
from .recipe import RecipeError
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
    "PruneReport",
    "Pruned",
    "Quality",
    "RecipeError",
    "TrainingError",
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
    "run_recipe",
    "sparsify",
    "verify",
]
