"""The three hooks of an encoding; each does nothing unless overridden."""

from torch import Tensor, nn

from ..geometry import Geometry
from ..terms import Term


class Encoding(nn.Module):
    """A position encoding that attention layers call at three places."""

    def inputs(self, xq: Tensor, xk: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Change what enters the query and key projections, ``[B, L, C]`` and ``[B, S, C]``."""
        return xq, xk

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Change queries ``[B, H, L, D]`` and keys ``[B, H, S, D]`` after their projections."""
        return q, k

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        """Tables for ``irpe.attention``; tuples of several encodings add up."""
        return ()


def collect_terms(owner: nn.Module, geometry: Geometry) -> tuple[Term, ...]:
    """The terms of an attention module's rpe_q, rpe_k and rpe_v, where they are not None."""
    encodings = (owner.rpe_q, owner.rpe_k, owner.rpe_v)
    return tuple(t for e in encodings if isinstance(e, Encoding) for t in e.terms(geometry))
