"""sparsekern: 2:4 sparse linear layers and zero-value compression for PyTorch."""

from importlib.metadata import version as _version

from . import interop, pruning
from .nn import SparseLinear, sparsify_
from .offload import offload_activations
from .ops import (
    check_24,
    is_24,
    linear_24,
    linear_24_prepacked,
    pack_24,
    prepack_24,
    prune_24,
    prune_24_transposable,
    unpack_24,
    unpack_zvc,
    unprepack_24,
)
from .zvc import PackedZVC, pack_zvc

__version__ = _version("sparsekern")

__all__ = [
    "PackedZVC",
    "SparseLinear",
    "check_24",
    "interop",
    "is_24",
    "linear_24",
    "linear_24_prepacked",
    "offload_activations",
    "pack_24",
    "pack_zvc",
    "prepack_24",
    "prune_24",
    "prune_24_transposable",
    "pruning",
    "sparsify_",
    "unpack_24",
    "unpack_zvc",
    "unprepack_24",
]
