"""Absolute positions of a padded feature map: sines, or learned rows and columns."""

import math

import torch
from torch import Tensor, nn

import irpe


class SinePositions(nn.Module):
    """Sines and cosines of rows and columns, without padding.

    Args:
        features: channels of each axis.
        temperature: largest wavelength divided by 2 pi.
        normalize: scale positions to [0, 2 pi] for any image size.
    """

    def __init__(
        self, features: int = 64, temperature: float = 10000.0, normalize: bool = False
    ) -> None:
        super().__init__()
        self.features, self.temperature, self.normalize = features, temperature, normalize

    def forward(self, mask: Tensor) -> Tensor:
        """Return float32 ``[B, 2 features, H, W]`` of a padding mask bool ``[B, H, W]``."""
        inside = ~mask
        exponents = torch.arange(self.features, dtype=torch.float32, device=mask.device)
        exponents = 2 * torch.div(exponents, 2, rounding_mode="floor") / self.features
        waves = self.temperature**exponents
        parts = []
        for axis in (1, 2):
            place = inside.cumsum(axis, dtype=torch.float32)
            if self.normalize:
                last = place.narrow(axis, place.shape[axis] - 1, 1)
                place = place / (last + 1e-6) * (2 * math.pi)
            angles = place[..., None] / waves
            pairs = (angles[..., 0::2].sin(), angles[..., 1::2].cos())
            parts.append(torch.stack(pairs, dim=4).flatten(3))
        return torch.cat(parts, dim=3).permute(0, 3, 1, 2)


class LearnedPositions(nn.Module):
    """A learned vector for each row and each column.

    Args:
        features: channels of each axis.
        sides: maximum number of rows and columns.
    """

    def __init__(self, features: int = 256, sides: int = 50) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(sides, features)
        self.col_embed = nn.Embedding(sides, features)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Return ``[B, 2 features, H, W]``, columns first, for a mask ``[B, H, W]``."""
        B, height, width = mask.shape
        sides = self.row_embed.num_embeddings
        if height > sides or width > sides:
            raise irpe.IrpeError(
                f"a feature map of {height} x {width} is larger than the {sides} x {sides} learned "
                "positions: use smaller images, sine positions, or sides="
            )
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat((columns, rows), dim=-1).permute(2, 0, 1).expand(B, -1, -1, -1)
