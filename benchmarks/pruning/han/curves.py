"""Figure 5: error against what is pruned away, by L1 and by L2, with and without retraining, on LeNet-300-100."""

from __future__ import annotations

from .nets import NETS, Net
from .train import Plan, Stage

DENSITIES = (0.5, 0.3, 0.2, 0.12, 0.08, 0.05, 0.03, 0.02)
NET = NETS["lenet-300-100"]
PENALTIES = {"l1": {"l1": 1e-5, "l2": 0.0}, "l2": {"l1": 0.0, "l2": 5e-4}}
EPOCHS = 4


def patterns(net: Net, density: float) -> dict[str, str]:
    """Layers in the proportion of the paper's table, all together at about `density`."""
    weights = sum(layer.paper.weights for layer in net.layers)
    whole = sum(layer.paper.weights * layer.density for layer in net.layers) / weights
    return {
        layer.module: f"density={min(1.0, layer.density * density / whole):.6g}"
        for layer in net.layers
    }


def dense_l1(epochs: int) -> Plan:
    """The net trained by L1; by L2 it is the first stage of seed 0."""
    return Plan("curve-l1", 0, (Stage("dense", epochs, NET.rate, **PENALTIES["l1"]),))


def plans(quick: bool) -> list[Plan]:
    """Each density at once by each penalty, then all of them one after the other by L2."""
    epochs = 1 if quick else EPOCHS
    densities = DENSITIES[::4] if quick else DENSITIES

    def stage(density: float, penalty: str) -> Stage:
        return Stage(
            f"{density:g}",
            epochs,
            NET.rate / 10,
            patterns(NET, density),
            **PENALTIES[penalty],
        )

    at_once = [
        Plan(f"curve-{penalty}-{density:g}", 0, (stage(density, penalty),), start=penalty)
        for penalty in PENALTIES
        for density in densities
    ]
    iterative = Plan("curve-l2-iterative", 0, tuple(stage(d, "l2") for d in densities), start="l2")
    return [*at_once, iterative]
