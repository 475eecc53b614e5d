"""The two LeNets of Han et al. (arXiv 1506.02626), what the paper says of each layer, and how they train here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from sparsekern.pruning import plan

from .train import Stage

ROUNDS = 3


@dataclass(frozen=True)
class PaperRow:
    """A row of table 2 or 3; shares in percent."""

    weights: int
    flop: int
    act: int
    kept: int
    flop_kept: int


@dataclass(frozen=True)
class Layer:
    """One layer: of which module, its density here, and multiply-adds per weight, as a convolution has many.

    Attributes:
        output: name of the module that gives what the next layer reads. The paper's totals of Act% fit
            maps after pooling, so that is where they are counted.
    """

    name: str
    module: str
    output: str
    density: float
    places: int
    paper: PaperRow


@dataclass(frozen=True)
class Net:
    """A LeNet, its rows of the paper and its training.

    Attributes:
        before, after: top-1 error in percent, table 1.
        rate: of the first training by SGD; retraining has a tenth, as in section 4.1.
        retrain_l2: the penalty while it retrains. LeNet-300-100, seed 0, 20 epochs of retraining: 2e-3 ends at
            2.08%, 5e-4 at 1.62%, none at 1.51%. A twelfth of the weights has less to be held back from.
    """

    name: str
    title: str
    table: int
    before: float
    after: float
    layers: tuple[Layer, ...]
    total: PaperRow
    epochs: int
    rate: float
    retrain_l2: float

    def build(self) -> nn.Sequential:
        return lenet_300_100() if self.name == "lenet-300-100" else lenet_5()

    def inputs(self, images: Tensor) -> Tensor:
        return images if self.name == "lenet-300-100" else images.view(-1, 1, 28, 28)


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Sequential:
    """Caffe's LeNet with a ReLU after each convolution, without which no map has the paper's zeros.

    The ReLU stands behind the pool: the same function, on a quarter of the elements.
    """
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


# Densities are a little under the paper's, whose rounded ones give less than 12x.
NETS = {
    "lenet-300-100": Net(
        "lenet-300-100",
        "LeNet-300-100",
        2,
        1.64,
        1.59,
        (
            Layer("fc1", "0", "1", 0.079, 1, PaperRow(235_000, 470_000, 38, 8, 8)),
            Layer("fc2", "2", "3", 0.088, 1, PaperRow(30_000, 60_000, 65, 9, 4)),
            Layer("fc3", "4", "4", 0.26, 1, PaperRow(1_000, 2_000, 100, 26, 17)),
        ),
        PaperRow(266_000, 532_000, 46, 8, 8),
        epochs=30,
        rate=0.1,
        retrain_l2=0.0,
    ),
    "lenet-5": Net(
        "lenet-5",
        "LeNet-5",
        3,
        0.80,
        0.77,
        (
            Layer("conv1", "0", "2", 0.66, 576, PaperRow(500, 576_000, 82, 66, 66)),
            Layer("conv2", "3", "5", 0.12, 64, PaperRow(25_000, 3_200_000, 72, 12, 10)),
            Layer("fc1", "7", "8", 0.077, 1, PaperRow(400_000, 800_000, 55, 8, 6)),
            Layer("fc2", "9", "9", 0.19, 1, PaperRow(5_000, 10_000, 100, 19, 10)),
        ),
        PaperRow(431_000, 4_586_000, 77, 8, 16),
        epochs=8,
        rate=0.03,
        retrain_l2=5e-4,
    ),
}


def stages(net: Net, quick: bool = False) -> tuple[Stage, ...]:
    """Train, then in each round prune and retrain.

    Where there are both, dense layers and convolutions take turns, and after the last round twice more.
    """
    layers = {layer.module: f"density={layer.density}" for layer in net.layers}
    conv = {layer.module for layer in net.layers if layer.name.startswith("conv")}
    rate, l2 = net.rate / 10, net.retrain_l2
    found = [Stage("dense", net.epochs, net.rate)]
    for i, patterns in enumerate(plan(layers, ROUNDS), 1):
        last = i == ROUNDS
        texts = {name: str(pattern) for name, pattern in patterns.items()}
        if not conv:
            found.append(Stage(f"round {i}", 15 if last else 5, rate, texts, l2=l2))
            continue
        for kind, other, epochs in (("fc", "conv", 3 if last else 2), ("conv", "fc", 1 + last)):
            own = {name: text for name, text in texts.items() if (name in conv) == (kind == "conv")}
            found.append(Stage(f"round {i}, {kind}", epochs, rate, own, other, l2=l2))
    if conv:
        # At a tenth, as the rounds have it, this ended at 0.96% of LeNet-5, seed 0; by half as many
        # epochs and one turn only, at 0.86 on average.
        for turn, fc, cv in (("again", 12, 6), ("last", 8, 4)):
            found.append(Stage(f"{turn}, fc", fc, net.rate / 3, frozen="conv", l2=0.0))
            found.append(Stage(f"{turn}, conv", cv, net.rate / 3, frozen="fc", l2=0.0))
    return tuple(replace(stage, epochs=1) if quick else stage for stage in found)
