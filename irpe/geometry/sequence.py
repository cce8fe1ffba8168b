"""Texts: tokens on a line."""

import torch
from torch import Tensor

from ..errors import IrpeError
from .base import Geometry, check_size


class Sequence(Geometry):
    """Tokens of a text at positions 0 to length - 1, or at explicit positions.

    Args:
        length: number of tokens, prefix left out.
        prefix: tokens without a position, before the others.
        positions: ``[length]`` or ``[B, length]`` where they are not 0 to length - 1. They may
            have gaps, start anywhere and, for rotary and sinusoidal encodings, be fractions.
        keys: positions of the keys, ``[S]`` or ``[B, S]``, where they are not the queries
            (cached tokens, decoding).
        key_prefix: tokens without a position before the keys; ``None``: as before the queries.
    """

    def __init__(
        self,
        length: int,
        prefix: int = 0,
        *,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
        key_prefix: int | None = None,
    ) -> None:
        check_size("length", length)
        self.length = length
        for given in (positions, keys):
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.dim() not in (1, 2):
                shape = list(given.shape) if isinstance(given, Tensor) else given
                raise IrpeError(f"positions are a tensor [L] or [B, L], not {shape!r}")
        if positions is None and keys is None:
            self._query = self._key = None
            self._set_prefix(prefix, key_prefix)
            return
        if positions is None:
            positions = torch.arange(length, device="cpu")
        if positions.shape[-1] != length:
            raise IrpeError(f"length={length} does not match positions {list(positions.shape)}")
        super().__init__(
            positions.unsqueeze(-1),
            None if keys is None else keys.unsqueeze(-1),
            prefix=prefix,
            key_prefix=key_prefix,
        )

    @property
    def axes(self) -> int:
        return 1

    def _count(self) -> int:
        return self.length

    def _made(self, device: torch.device) -> Tensor:
        return torch.arange(self.length, device=device).unsqueeze(-1)
