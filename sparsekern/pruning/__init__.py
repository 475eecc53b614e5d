"""The way to sparse weights: train, prune, retrain."""

from .dead import DeadNeurons, DeadReport, dead_neurons, remove_dead_neurons
from .dropout import AdjustedDropout, DropoutReport, Dropouts, retrain_rate
from .masks import Held, Mask, finalize, hold, mask_of, masks, sparsify
from .patterns import NM, Density, Layer, Pattern, Quality, Transposable, layers, parse
from .prune import Pruned, PruneReport, prune
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
    "Layer",
    "Mask",
    "Pattern",
    "PruneReport",
    "Pruned",
    "Quality",
    "Relative",
    "Round",
    "Sensitivity",
    "StorageReport",
    "Stored",
    "Transposable",
    "dead_neurons",
    "decode_relative",
    "encode_relative",
    "finalize",
    "frozen",
    "geometric",
    "hold",
    "l1_penalty",
    "layers",
    "load_relative",
    "mask_of",
    "masks",
    "parse",
    "plan",
    "prune",
    "remove_dead_neurons",
    "retrain_rate",
    "rounds",
    "save_relative",
    "sensitivity",
    "sparsify",
]
