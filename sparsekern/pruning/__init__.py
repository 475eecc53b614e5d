"""The way to sparse weights: train, prune, retrain."""

from .dead import DeadNeurons, DeadReport, dead_neurons, remove_dead_neurons
from .dropout import AdjustedDropout, DropoutReport, Dropouts, retrain_rate
from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .oneshot import prune_oneshot
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .permutation import kept_magnitude, search_permutation
from .permute import Permuted, PermuteReport, permute
from .prune import Pruned, PruneReport, prune
from .recipe import RecipeError
from .relative import (
    Relative,
    StorageReport,
    Stored,
    decode_relative,
    encode_relative,
    load_relative,
    save_relative,
)
from .retrain import CONV, FC, frozen, l1_penalty
from .schedule import Round, geometric, plan, rounds
from .sensitivity import Sensitivity, sensitivity
from .straight_through import StraightThrough, freeze_masks, straight_through
from .training import Interrupted, TrainingError, run_recipe
from .verify import Verification, VerifiedLayer, verify

__all__ = [
    "CONV",
    "FC",
    "NM",
    "AdjustedDropout",
    "DeadNeurons",
    "DeadReport",
    "Density",
    "DropoutReport",
    "Dropouts",
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
    "Relative",
    "Round",
    "Sensitivity",
    "StorageReport",
    "Stored",
    "StraightThrough",
    "TrainingError",
    "Transposable",
    "Verification",
    "VerifiedLayer",
    "dead_neurons",
    "decode_relative",
    "encode_relative",
    "finalize",
    "freeze_masks",
    "frozen",
    "geometric",
    "hold",
    "kept_magnitude",
    "l1_penalty",
    "layers",
    "load_relative",
    "mask_of",
    "masks",
    "parse",
    "permute",
    "plan",
    "prune",
    "prune_oneshot",
    "remove_dead_neurons",
    "retrain_rate",
    "rounds",
    "run_recipe",
    "save_relative",
    "search_permutation",
    "sensitivity",
    "sparsify",
    "straight_through",
    "verify",
]
