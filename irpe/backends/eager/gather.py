"""Gather and scatter-add by the ids of all pairs, for any geometry and bucket function.

Rows of N numbers belong to queries, or to keys if the table is multiplied with the key.
"""

import torch
from torch import Tensor

from ...buckets import BucketIds
from .tile import Tile


class ByMap:
    """Gather and scatter with torch's operations and int64 ids of all pairs.

    Args:
        buckets: buckets of the term.
        device: device of the rows.
    """

    def __init__(self, buckets: BucketIds, device: torch.device) -> None:
        ids = buckets.flat(device)
        ids = ids.view(len(ids), -1, buckets.geometry.key_length)
        self.ids = ids if len(ids) > 1 else ids[0]

    def read(self, numbers: Tensor) -> None:
        """Set the rows ``[n, L | S, N]`` to gather from."""
        self.numbers = numbers.flatten(1)

    def gather(self, out: Tensor, tile: Tile, add: bool) -> None:
        """Write ``numbers[n, owner, id(i, j)]`` to ``out[n, i, j]``, or add it."""
        rows, out = (x.view(*tile.shape[:2], -1) for x in (self.numbers, out))
        if add:
            out.add_(rows.gather(-1, self._index(tile)))
        else:
            torch.gather(rows, -1, self._index(tile), out=out)

    def write(self, total: Tensor) -> None:
        """Set the rows ``[n, L | S, N]`` of zeros to scatter to."""
        self.total = total.view(len(total), -1)

    def scatter(self, x: Tensor, tile: Tile) -> None:
        """Add x ``[n, rows, keys]`` by bucket; called once for each tile."""
        rows, x = (y.view(*tile.shape[:2], -1) for y in (self.total, x))
        rows.scatter_add_(-1, self._index(tile), x)

    def collect(self) -> None:
        """Write the sums to the rows after the last tile; ``scatter`` has done so already."""

    def _index(self, tile: Tile) -> Tensor:
        ids = cut(self.ids, tile)
        return ids.reshape(-1, 1, tile.shape[2] * tile.count).expand(*tile.shape[:2], -1)


def cut(pairs: Tensor, tile: Tile) -> Tensor:
    """Return the part ``[(images,) rows, keys]`` of ``[(B,) L, S]`` in a tile."""
    pairs = pairs[..., tile.rows, :]
    pairs = pairs[tile.images] if pairs.dim() == 3 else pairs
    return pairs[..., : tile.count] if tile.index is None else pairs.index_select(-1, tile.index)


def put(out: Tensor, values: Tensor, add: bool) -> None:
    """Write values to out, or add them."""
    if add:
        out.add_(values)
    else:
        out.copy_(values)
