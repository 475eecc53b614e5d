"""The Triton back end: every op in kernels that Triton compiles at first use, for any GPU it reaches; no nvcc, no
CuPy.

* ``format_24.py``    2:4 and its device functions; begin here
* ``product_24.py``   the product, for few tokens and for many
* ``gradient_24.py``  its gradients
* ``zvc.py``          zero-value compression
* ``autotune.py``     which configuration is launched; ``tune`` measures, when called

With TRITON_INTERPRET=1 in the environment when it is imported, and SPARSEKERN_BACKEND=triton, it serves CPU tensors
in Triton's interpreter instead: slow, and exact enough to test the kernels on a machine without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ...ops import FORMAT_DTYPES, ZVC_DTYPES

_PRODUCTS = frozenset({torch.float32, torch.float16, torch.bfloat16})
SERVES = {
    "prune_24": FORMAT_DTYPES,
    "prune_24_transposable": FORMAT_DTYPES,
    "pack_24": FORMAT_DTYPES,
    "unpack_24": FORMAT_DTYPES,
    "gather_24": FORMAT_DTYPES,
    "linear_24": _PRODUCTS,
    "linear_24_dx": _PRODUCTS,
    "linear_24_dvalues": _PRODUCTS,
    "prepack_24": _PRODUCTS,
    "unprepack_24": _PRODUCTS,
    "linear_24_prepacked": _PRODUCTS,
    "pack_zvc": ZVC_DTYPES,
    "pack_zvc_out": ZVC_DTYPES,
    "unpack_zvc": ZVC_DTYPES,
}
OLDEST = (3, 6)


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device; this makes it that of the first argument."""

    @functools.wraps(launch)
    def op(*args):
        device = args[0].device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return op


try:
    import triton

    _version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    _missing = (
        f"Triton {triton.__version__} is installed; it takes {OLDEST[0]}.{OLDEST[1]} or later"
        if _version < OLDEST
        else None
    )
except ImportError as error:
    _missing = f"Triton is not installed ({error}); `pip install sparsekern[triton]` brings it"

if _missing is None:
    _interprets = triton.knobs.runtime.interpret  # as triton.jit reads it now

    from ...reference import prepack_24, unprepack_24  # noqa: F401, the identity here too
    from . import autotune, format_24, gradient_24, product_24, zvc

    prune_24 = _on_its_device(format_24.prune_24)
    prune_24_transposable = _on_its_device(format_24.prune_24_transposable)
    pack_24 = _on_its_device(format_24.pack_24)
    unpack_24 = _on_its_device(format_24.unpack_24)
    gather_24 = _on_its_device(format_24.gather_24)
    linear_24 = _on_its_device(product_24.linear_24)
    linear_24_dx = _on_its_device(gradient_24.linear_24_dx)
    linear_24_dvalues = _on_its_device(gradient_24.linear_24_dvalues)
    linear_24_prepacked = _on_its_device(product_24.linear_24_prepacked)
    pack_zvc = _on_its_device(zvc.pack_zvc)
    pack_zvc_out = _on_its_device(zvc.pack_zvc_out)
    unpack_zvc = _on_its_device(zvc.unpack_zvc)
    tune = autotune.tune


def unavailable(device: torch.device) -> str | None:
    if _missing is not None:
        return _missing
    if device.type == "cpu":
        needs = "on the CPU it runs in Triton's interpreter alone, with TRITON_INTERPRET=1"
        return None if _interprets else needs
    if _interprets:
        return "TRITON_INTERPRET is set, so that it serves CPU tensors alone"
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"{device} has compute capability {found[0]}.{found[1]}; it takes 8.0 or later"
    return None
