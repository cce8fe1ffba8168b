"""A vision transformer of your own on irpe.RPEAttention, for images of any size.

    python examples/custom_vit.py            (needs scikit-learn; half a minute on a CPU)

Every batch has another rectangle. Expect the loss on scikit-learn's digits to fall from 2.3 to
below 0.5, and the weights to classify held-out digits of sizes that training did not have.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import irpe


class Block(nn.Module):
    def __init__(self, dim, heads, rpe):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = irpe.RPEAttention(dim, heads, rpe=rpe, prefix=0)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, grid):
        x = x + self.attention(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """Return logits [B, 10] of images [B, 1, height, width] of any size; no absolute positions."""

    def __init__(self, dim=48, heads=4, depth=2, patch=2, rpe="rpe-1.9-product-ctx-1-qkv"):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, patch, patch)
        self.blocks = nn.ModuleList(Block(dim, heads, rpe) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, image):
        x = self.patches(image)
        grid = irpe.Grid(*x.shape[-2:])  # shared by all layers; prefix=1: a class token
        x = x.flatten(2).mT
        for block in self.blocks:
            x = block(x, grid)
        return self.head(x.mean(1))


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
images, labels = images[order], labels[order]
model = SmallViT()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
for step in range(300):
    batch = torch.randint(0, 1400, (128,))
    around = (2 * torch.randint(0, 3, (4,))).tolist()  # left, right, above, below: 8x8 to 16x16
    logits = model(nn.functional.pad(images[batch], around, value=-0.3))
    loss = nn.functional.cross_entropy(logits, labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0 or step == 299:
        print(f"step {step:3}: loss {loss:.2f}")

with torch.no_grad():
    for around in ((0, 0, 0, 0), (4, 6, 0, 2), (2, 8, 2, 8)):
        held_out = nn.functional.pad(images[1400:], around, value=-0.3)
        right = (model(held_out).argmax(-1) == labels[1400:]).float().mean()
        size = "x".join(map(str, held_out.shape[-2:]))
        print(f"held-out digits in images of {size}: {100 * right:.1f} % right")
