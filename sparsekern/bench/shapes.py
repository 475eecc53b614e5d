"""The layers of known models, and what --shapes takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

# (N, K) of the linear layers of one block: attention's projections fused, feed-forward up fused with its gate. From
# the models' published configurations.
MODELS = {
    "llama3-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "qwen2.5-7b": {
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    },
    "bert": {"qkv": (2304, 768), "o": (768, 768), "up": (3072, 768), "down": (768, 3072)},
}
LARGEST = 1 << 20  # of M, N and K


@dataclass(frozen=True)
class Shape:
    """``x[M, K] · weight[N, K]ᵀ``; `label` says which layer of which model, "" for a shape by its numbers."""

    M: int
    N: int
    K: int
    label: str = ""

    def __str__(self) -> str:
        return f"{self.M} x {self.N} x {self.K}"


def parse(texts: list[str], tokens: list[int]) -> list[Shape]:
    """``llama3-8b``, ``llama3-8b/down`` or ``MxNxK``; a model's layers at every number of `tokens`.

    Raises:
        ValueError: what is neither, or a size out of range.
    """
    found: list[Shape] = []
    for text in texts:
        model, _, layer = text.partition("/")
        if model in MODELS:
            layers = MODELS[model]
            if layer and layer not in layers:
                raise ValueError(
                    f"--shapes: {model} has no layer {layer!r}; it has {', '.join(layers)}"
                )
            for name in [layer] if layer else layers:
                found += [Shape(M, *layers[name], f"{model}/{name}") for M in tokens]
        elif sizes := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text):
            M, N, K = map(int, sizes.groups())
            if not all(1 <= size <= LARGEST for size in (M, N, K)) or K % 4:
                raise ValueError(
                    f"--shapes: {text}: sizes are 1 to {LARGEST}, and K a multiple of 4"
                )
            found.append(Shape(M, N, K))
        else:
            raise ValueError(
                f"--shapes: {text!r} is neither MxNxK nor one of {', '.join(MODELS)}, "
                "nor a layer of them as in bert/up"
            )
    return list(dict.fromkeys(found))
