"""Other people's formats of 2:4 weights and of masks, in and out.

A packed weight here is ``values`` and ``meta``, as everywhere in the library. Every conversion moves bytes:
what comes back is what went in, NaN payloads and negative zeros included.
"""

from .bitmask import from_bitmask, to_bitmask
from .convert import ConvertedLayer, ConvertReport, convert
from .cutlass import from_cutlass, to_cutlass
from .marlin import dequantize, from_marlin, to_marlin
from .masks import load_masks, plain_state_dict

__all__ = [
    "ConvertReport",
    "ConvertedLayer",
    "convert",
    "dequantize",
    "from_bitmask",
    "from_cutlass",
    "from_marlin",
    "load_masks",
    "plain_state_dict",
    "to_bitmask",
    "to_cutlass",
    "to_marlin",
]
