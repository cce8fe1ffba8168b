"""The hooks of an encoding; each does nothing unless overridden."""

from torch import Tensor, nn

from ..buckets import BucketFunction, BucketIds
from ..errors import IrpeError
from ..geometry import Geometry
from ..terms import Term


class Encoding(nn.Module):
    """A position encoding that models call at four places.

    ``one_for_all``: whether its authors share one among all layers. ``decays``: whether its
    parameters take part in weight decay.
    """

    one_for_all: bool = False
    decays: bool = True

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Change the tokens ``[B, L, C]`` at the model's input."""
        return x

    def inputs(self, xq: Tensor, xk: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Change what enters the query and key projections, ``[B, L, C]`` and ``[B, S, C]``."""
        return xq, xk

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Change queries ``[B, H, L, D]`` and keys ``[B, H, S, D]`` after their projections.

        More channels may come back than went in; the attention's scale stays that of D.
        """
        return q, k

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        """Tables for ``irpe.attention``; tuples of several encodings add up."""
        return ()


class Hooks:
    """The hooks of several encodings, one after the other; see ``Encoding``."""

    def __init__(self, encodings: tuple[Encoding, ...]) -> None:
        self.encodings = encodings

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        for encoding in self.encodings:
            x = encoding.embed(x, geometry)
        return x

    def inputs(self, xq: Tensor, xk: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        for encoding in self.encodings:
            xq, xk = encoding.inputs(xq, xk, geometry)
        return xq, xk

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        for encoding in self.encodings:
            q, k = encoding.transform(q, k, geometry)
        return q, k

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return tuple(term for e in self.encodings for term in e.terms(geometry))


def hooks(owner: nn.Module) -> Hooks:
    """The hooks of the encodings that are attributes of a module, in the order they were set."""
    return Hooks(tuple(e for e in owner.children() if isinstance(e, Encoding)))


def located_buckets(
    what: str, function: BucketFunction, geometry: Geometry, prefix: bool, by_key: bool = False
) -> BucketIds:
    """Buckets of a table that was built with or without a row for prefix tokens.

    Raises:
        IrpeError: where the geometry has prefix tokens and the table no row for them, or the
            other way round. ``what`` is the table's name.
    """
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Grid")
    has_prefix = False
    if geometry.prefix > 0 or geometry.key_prefix > 0:  # sizes may be symbols
        has_prefix = True
    if has_prefix != prefix:
        raise IrpeError(
            f"{geometry!r} has {'a' if has_prefix else 'no'} prefix, but the {what} "
            f"table was built {'with' if prefix else 'without'} a bucket for one "
            f"({function.size + prefix} buckets): build it with prefix={has_prefix}, "
            "or attach inside `with irpe.located(grid):` of such a grid"
        )
    return BucketIds(function, geometry, by_key)
