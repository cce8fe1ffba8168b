"""DeiT with image relative position encoding, built on ``irpe.RPEAttention``.

An example of a custom vision transformer, and an independent reference for tests of
``irpe.attach``. Keys and shapes are those of timm and of the released checkpoints.

DeiT: Touvron et al., ICML 2021. iRPE: Wu et al., ICCV 2021.
"""

import torch
from torch import Tensor, nn

import irpe


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, rpe: irpe.Spec | str | None, backend: str
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = irpe.RPEAttention(dim, num_heads, rpe, prefix=1, backend=backend)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor, grid: irpe.Grid) -> Tensor:
        x = x + self.attn(self.norm1(x), grid)
        hidden = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](hidden)


class PatchEmbed(nn.Module):
    """Patch embedding: images ``[B, 3, H, W]`` to patches ``[B, C, H / P, W / P]``."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class DeiT(nn.Module):
    """DeiT for images of any size.

    Args:
        img_size: side of the images of the absolute embedding, in pixels; the embedding is
            interpolated to other sizes. Relative tables do not depend on the size.
        patch_size: side of a patch, in pixels.
        embed_dim: C.
        depth: number of blocks.
        num_heads: H, a divisor of C.
        mlp_ratio: hidden channels of the MLP, as a multiple of C.
        num_classes: number of classes.
        rpe: spec of the encoding, or None for plain DeiT.
        backend: see ``irpe.attention``.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        rpe: irpe.Spec | str | None = "rpe-1.9-product-ctx-1-k",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.side = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rpe, backend) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward_features(self, image: Tensor) -> Tensor:
        """Return tokens ``[B, 1 + H W / P^2, C]`` of images ``[B, 3, H, W]``, class token first."""
        patches = self.patch_embed(image)
        height, width = patches.shape[-2:]
        grid = irpe.Grid(height, width, prefix=1)  # one geometry for all layers
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        x = x + self._absolute(height, width)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits ``[B, classes]``, or the class token ``[B, C]``, of tokens."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def _absolute(self, height: int, width: int) -> Tensor:
        # A graph for dynamic sizes always resamples, which is exact for the same size.
        dynamic = torch.compiler.is_dynamo_compiling() or isinstance(height + width, torch.SymInt)
        if not dynamic and height == width == self.side:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = rest.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(
            square, size=(height, width), mode="bicubic", antialias=True, align_corners=False
        )
        return torch.cat((first, resized.flatten(2).transpose(1, 2)), dim=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
