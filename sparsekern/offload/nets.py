"""Networks by name, for reports and measurements on what training keeps for the backward pass.

>>> net = NETS["cnn"]
>>> model = net.build()
>>> inputs, targets = net.batch(8)
>>> net.loss(model, inputs, targets).backward()

The convolutional ones are those in which Rhu et al. (arXiv 1705.01626) looked for zeros, ResNet-18
for what batch normalisation changes, and a transformer with three activations. Each takes its sizes
as arguments. `size`, the side of the images in pixels or the tokens of a sequence, has a default for
a small machine; `full_size` is that of the publication. Plain torch, nothing to download: batches
are synthetic and can be learned.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
SYMBOLS = 65  # the characters of tinyshakespeare


@dataclass(frozen=True)
class Net:
    """A network that can be built, fed and trained without knowing which one it is.

    Attributes:
        description: one line for people.
        build: ``build(size=..., **sizes) -> nn.Module``; the other sizes are in its signature.
        size: the default `size`.
        full_size: the `size` of the publication.
        make_batch: ``make_batch(batch_size, size, generator) -> (inputs, targets)`` on the
            generator's device: float32 images or int64 tokens, and int64 targets.
    """

    description: str
    build: Callable[..., nn.Module]
    size: int
    full_size: int
    make_batch: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]

    def batch(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Synthetic inputs and targets on `device`, the inputs in `dtype` where they are not tokens.

        Without `generator`, a CPU generator of seed 0: the same batch each time.
        """
        generator = generator or torch.Generator().manual_seed(0)
        inputs, targets = self.make_batch(batch_size, size or self.size, generator)
        if inputs.is_floating_point():
            inputs = inputs.to(dtype)
        return inputs.to(device), targets.to(device)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in float32, of images or of every token."""
        scores = model(inputs)
        return F.cross_entropy(scores.flatten(0, -2).float(), targets.flatten())


# ---- batches ----


def make_images(
    batch_size: int, size: int, generator: torch.Generator, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Noise with a wave across it whose direction is the class: ``[batch_size, channels, size, size]``."""
    device = generator.device
    noise = torch.randn(batch_size, channels, size, size, generator=generator, device=device)
    classes = torch.randint(CLASSES, (batch_size,), generator=generator, device=device)
    angle = classes.view(-1, 1, 1, 1) * (math.pi / CLASSES)
    place = torch.linspace(-4 * math.pi, 4 * math.pi, size, device=device)
    wave = torch.cos(angle.cos() * place.view(-1, 1) + angle.sin() * place)
    return (noise + 2 * wave) / math.sqrt(3), classes


def make_digits(batch_size: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """:func:`make_images` of one channel."""
    return make_images(batch_size, size, generator, channels=1)


def make_tokens(batch_size: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences that count up in a stride of their own, and what comes next: ``[batch_size, size]`` each."""
    device = generator.device
    start = torch.randint(SYMBOLS, (batch_size, 1), generator=generator, device=device)
    stride = torch.randint(1, 8, (batch_size, 1), generator=generator, device=device)
    tokens = (start + stride * torch.arange(size + 1, device=device)) % SYMBOLS
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ---- convolutional networks: images [N, channels, size, size] to scores [N, classes] ----


def _check_size(name: str, size: int, least: int) -> None:
    if size < least:
        raise ValueError(f"{name}: size is {size}; it takes {least} pixels or more")


def _initialised(model: nn.Module) -> nn.Module:
    """He initialisation, without which the deep ones that have no batch normalisation do not learn."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _classifier(
    features: int, hidden: int, classes: int, dropout: float
) -> list[tuple[str, nn.Module]]:
    """Two hidden layers and the scores, as AlexNet has them and VGG after it."""
    return [
        ("flatten", nn.Flatten()),
        ("fc6", nn.Linear(features, hidden)),
        ("relu6", nn.ReLU()),
        ("drop6", nn.Dropout(dropout)),
        ("fc7", nn.Linear(hidden, hidden)),
        ("relu7", nn.ReLU()),
        ("drop7", nn.Dropout(dropout)),
        ("fc8", nn.Linear(hidden, classes)),
    ]


def alexnet(
    size: int = 64,
    channels: int = 3,
    classes: int = CLASSES,
    width: float = 1.0,
    hidden: int = 4096,
    dropout: float = 0.5,
) -> nn.Module:
    """AlexNet for one GPU, without response normalisation: five convolutions, three max-pools, three dense layers.

    `width` scales the channels of the convolutions, here and in the others.

    Source: Krizhevsky et al. 2012; the channels are those of Krizhevsky 2014 (arXiv 1404.5997).
    """
    _check_size("alexnet", size, 63)
    c1, c2, c3, c4, c5 = (_scaled(c, width) for c in (64, 192, 384, 256, 256))
    side = (size - 7) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    layers = [
        ("conv1", nn.Conv2d(channels, c1, 11, stride=4, padding=2)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(3, 2)),
        ("conv2", nn.Conv2d(c1, c2, 5, padding=2)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(3, 2)),
        ("conv3", nn.Conv2d(c2, c3, 3, padding=1)),
        ("relu3", nn.ReLU()),
        ("conv4", nn.Conv2d(c3, c4, 3, padding=1)),
        ("relu4", nn.ReLU()),
        ("conv5", nn.Conv2d(c4, c5, 3, padding=1)),
        ("relu5", nn.ReLU()),
        ("pool5", nn.MaxPool2d(3, 2)),
        *_classifier(c5 * side * side, hidden, classes, dropout),
    ]
    return _initialised(nn.Sequential(OrderedDict(layers)))


def vgg16(
    size: int = 32,
    channels: int = 3,
    classes: int = CLASSES,
    width: float = 1.0,
    hidden: int = 4096,
    dropout: float = 0.5,
) -> nn.Module:
    """VGG-16, configuration D, without batch normalisation: 13 convolutions in five blocks, three dense layers.

    Source: Simonyan and Zisserman 2014 (arXiv 1409.1556).
    """
    _check_size("vgg16", size, 32)
    layers: list[tuple[str, nn.Module]] = []
    for block, (wide, convolutions) in enumerate(
        ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1
    ):
        for i in range(1, convolutions + 1):
            out = _scaled(wide, width)
            layers.append((f"conv{block}_{i}", nn.Conv2d(channels, out, 3, padding=1)))
            layers.append((f"relu{block}_{i}", nn.ReLU()))
            channels = out
        layers.append((f"pool{block}", nn.MaxPool2d(2)))
    layers += _classifier(channels * (size // 32) ** 2, hidden, classes, dropout)
    return _initialised(nn.Sequential(OrderedDict(layers)))


class Fire(nn.Module):
    """1x1 to `squeeze` channels, then `expand` channels by 1x1 beside as many by 3x3."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.squeeze_relu = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_relu(self.squeeze(x))
        return self.expand_relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def squeezenet(
    size: int = 64,
    channels: int = 3,
    classes: int = CLASSES,
    width: float = 1.0,
    dropout: float = 0.5,
) -> nn.Module:
    """SqueezeNet 1.1: convolutions alone, eight Fire modules.

    Source: Iandola et al. 2016 (arXiv 1602.07360).
    """
    _check_size("squeezenet", size, 31)
    first = _scaled(64, width)
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(channels, first, 3, stride=2)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
    ]
    channels = first
    for i, (squeeze, expand) in enumerate(
        ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)),
        start=2,
    ):
        squeeze, expand = _scaled(squeeze, width), _scaled(expand, width)
        layers.append((f"fire{i}", Fire(channels, squeeze, expand)))
        channels = 2 * expand
        if i in (3, 5):
            layers.append((f"pool{i}", nn.MaxPool2d(3, 2, ceil_mode=True)))
    layers += [
        ("dropout", nn.Dropout(dropout)),
        ("conv10", nn.Conv2d(channels, classes, 1)),
        ("relu10", nn.ReLU()),
        ("average", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
    ]
    return _initialised(nn.Sequential(OrderedDict(layers)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation beside a shortcut, added before the last ReLU."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def resnet18(
    size: int = 64, channels: int = 3, classes: int = CLASSES, width: float = 1.0
) -> nn.Module:
    """ResNet-18: batch normalisation after every convolution, eight blocks with shortcuts.

    Source: He et al. 2015 (arXiv 1512.03385).
    """
    _check_size("resnet18", size, 32)
    first = _scaled(64, width)
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(channels, first, 7, stride=2, padding=3, bias=False)),
        ("bn1", nn.BatchNorm2d(first)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(3, 2, padding=1)),
    ]
    channels = first
    for stage, wide in enumerate((64, 128, 256, 512), start=1):
        out = _scaled(wide, width)
        for i, stride in enumerate((1 if stage == 1 else 2, 1)):
            layers.append((f"block{stage}_{i + 1}", BasicBlock(channels, out, stride)))
            channels = out
    layers += [
        ("average", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(channels, classes)),
    ]
    return _initialised(nn.Sequential(OrderedDict(layers)))


def cnn(
    size: int = 28, channels: int = 1, classes: int = CLASSES, width: float = 1.0, hidden: int = 120
) -> nn.Module:
    """LeNet-5 with ReLU and max-pools: two convolutions, three dense layers.

    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition".
    """
    _check_size("cnn", size, 10)
    c1, c2 = _scaled(6, width), _scaled(16, width)
    side = (size // 2 - 4) // 2
    layers = [
        ("conv1", nn.Conv2d(channels, c1, 5, padding=2)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(c1, c2, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc3", nn.Linear(c2 * side * side, hidden)),
        ("relu3", nn.ReLU()),
        ("fc4", nn.Linear(hidden, 84)),
        ("relu4", nn.ReLU()),
        ("fc5", nn.Linear(84, classes)),
    ]
    return _initialised(nn.Sequential(OrderedDict(layers)))


# ---- transformer: tokens [N, T] to scores [N, T, symbols] ----


class SquaredReLU(nn.Module):
    """``relu(x)²``.

    `square` saves ``relu(x)`` once, the tensor that the ReLU has saved already. Written as ``h *
    h``, the product saves it twice more; a hook on what is saved then sees it three times.

    Source: So et al. 2021, "Primer" (arXiv 2109.08668).
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "gelu": nn.GELU,
}


class CausalSelfAttention(nn.Module):
    """``[N, T, width]`` to the same; a token sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward net of four times the width, each on a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.activation = ACTIVATIONS[activation]()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """See :func:`transformer`."""

    def __init__(
        self, size: int, symbols: int, width: int, layers: int, heads: int, activation: str
    ) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Embedding(size, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, activation) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, symbols)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:  # what is added to the stream shrinks with the depth
            for module in (block.attention.proj, block.down):
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.symbol(tokens) + self.place(places)
        return self.scores(self.norm(self.blocks(x)))


def transformer(
    size: int = 128,
    symbols: int = SYMBOLS,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    activation: str = "relu",
) -> nn.Module:
    """GPT-2's arrangement at character level, no dropout. `size` is the longest sequence.

    Args:
        activation: ``relu``, ``relu2`` (squared ReLU) or ``gelu``, of the feed-forward nets.

    Raises:
        ValueError: another activation, or a width that the heads do not divide.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners".
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"transformer: activation is {activation!r}; it takes one of {', '.join(ACTIVATIONS)}"
        )
    if width % heads:
        raise ValueError(f"transformer: width is {width}; it takes a multiple of heads, {heads}")
    return Transformer(size, symbols, width, layers, heads, activation)


# ---- by name ----

NETS: dict[str, Net] = {
    "alexnet": Net("AlexNet: no normalisation", alexnet, 64, 224, make_images),
    "vgg16": Net("VGG-16: no normalisation", vgg16, 32, 224, make_images),
    "squeezenet": Net("SqueezeNet 1.1: no normalisation", squeezenet, 64, 224, make_images),
    "resnet18": Net("ResNet-18: batch normalisation", resnet18, 64, 224, make_images),
    "cnn": Net("LeNet-like digit classifier", cnn, 28, 28, make_digits),
} | {
    f"transformer-{name}": Net(
        f"character transformer, {words} feed-forward nets",
        functools.partial(transformer, activation=name),
        128,
        1024,
        make_tokens,
    )
    for name, words in (("relu", "ReLU"), ("relu2", "squared-ReLU"), ("gelu", "GELU"))
}
