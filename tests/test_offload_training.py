"""Training for real with offload_activations: the same losses and parameters, bit for bit, in less memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.offload import Stats

STEPS = 30


pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attend, self.feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.attend(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.up(self.feed(x)).relu()
        return x + self.down(h * h)


class CharacterTransformer(nn.Module):
    """Squared ReLU, predicts the next character."""

    def __init__(self, characters: int, length: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.randn(length, width) / 10)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        x = self.embedding(text) + self.position
        return F.cross_entropy(self.head(self.blocks(x)).flatten(0, 1), following.flatten())


class Pictures(nn.Module):
    """Convolutions, ReLU and max-pooling, as VGG has them; with dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.ReLU(),
            ),
            *(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classify = nn.Sequential(
            nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classify(self.features(images).flatten(1)), labels)


def train(make, batches, offload=None) -> tuple[list[float], list[Tensor]]:
    """Losses by step, and what the parameters are after the last."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for batch in batches:
        with offload or contextlib.nullcontext():
            loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()]


def check(make, batches, offloads) -> dict[str, Stats]:
    losses, parameters = train(make, batches)
    assert losses[-1] < losses[0] / 1.2  # it learns
    stats = {}
    for to in ("cpu", "device", "auto"):
        offload = offloads(to, min_bytes=4096)
        found, ends = train(make, batches, offload)
        assert found == losses
        for got, want in zip(ends, parameters, strict=True):
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))
        stats[to] = offload.stats
        peak = offload.stats.peak_bytes
        assert peak["plain"] == plain_bytes(make, batches[0])
        assert len(offload.stats.steps) == len(batches)
    return stats


def plain_bytes(make, batch) -> int:
    """What autograd holds of one step beside the parameters: each storage once."""
    torch.manual_seed(0)
    model = make()
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def hold(t):
        held.setdefault(t.untyped_storage().data_ptr(), t)  # alive: addresses are not used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        model(*batch)
    return sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in owned)


def share(stats, where: str) -> float:
    """Of the bytes that autograd would hold at the peak."""
    return stats.peak_bytes[where] / stats.peak_bytes["plain"]


@pytest.mark.data
def test_a_character_transformer(text_path, offloads):
    text = np.frombuffer(text_path.read_bytes(), np.uint8)
    characters, text = np.unique(text, return_inverse=True)
    text = torch.from_numpy(text)
    starts = torch.randint(len(text) - 65, (STEPS, 16), generator=torch.Generator().manual_seed(0))
    places = starts[:, :, None] + torch.arange(64)
    batches = [(text[at], text[at + 1]) for at in places]
    stats = check(lambda: CharacterTransformer(len(characters), 64), batches, offloads)
    assert share(stats["device"], "device") < 0.85
    assert share(stats["cpu"], "device") < 0.3


@pytest.mark.data
def test_a_network_of_pictures(mnist_path, offloads):
    with np.load(mnist_path) as data:
        images = (
            torch.from_numpy(data["x_train"][: STEPS * 32])
            .float()
            .div(255)
            .view(STEPS, 32, 1, 28, 28)
        )
        labels = torch.from_numpy(data["y_train"][: STEPS * 32]).long().view(STEPS, 32)
    batches = [(x.clone(), y.clone()) for x, y in zip(images, labels, strict=True)]
    stats = check(Pictures, batches, offloads)
    assert share(stats["device"], "device") < 0.6
    assert share(stats["cpu"], "device") < 0.3
