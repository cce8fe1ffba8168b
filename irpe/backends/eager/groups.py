"""Terms that look up the same bucket of a pair, with their tables added up."""

from collections.abc import Sequence

from torch import Tensor

from ...buckets import BucketIds
from ...terms import Kind
from .rows import add_times, outer, times
from .spread import Spread

Plan = Sequence[tuple[Kind, BucketIds]]
Grads = list[Tensor | None]


class Group:
    """Tables that are read at the same places.

    Args:
        owner: whose rows of numbers spread over a tile, the ``query``'s or the ``key``'s; with
            ``value`` the tile's probabilities are summed into rows of the query's.
        tables: of the whole call.
    """

    def __init__(self, owner: Kind, spread: Spread, tables: Sequence[Tensor]) -> None:
        self.owner, self.spread, self.tables = owner, spread, tables
        self.members: list[tuple[int, Kind, Tensor | None]] = []  # table, kind, ids in it

    def table(self, kind: Kind) -> Tensor | None:
        """The sum of the tables of a kind."""
        total = None
        for i, own, places in self.members:
            if own == kind:
                one = self.tables[i]
                one = one if places is None else one.index_select(_axis(kind), places)
                total = one if total is None else total + one
        return total

    def numbers(self, x: Tensor) -> Tensor:
        """Rows ``[B * H, R, N]`` for x ``[B, H, R, D]``: queries, keys or the output's gradient."""
        table, bias = self.table(self.owner), self.table("bias")
        if table is None:
            assert bias is not None
            return bias.unsqueeze(1).expand(*x.shape[:3], -1).flatten(0, 1)
        rows = times(x, table.transpose(1, 2) if self.owner == "value" else table)
        return (rows if bias is None else rows.add_(bias.unsqueeze(1))).flatten(0, 1)

    def give(self, grads: Grads, kind: Kind, grad: Tensor) -> None:
        """Hand the gradient of ``table(kind)`` on to its tables."""
        for i, own, places in self.members:
            if own == kind:
                one, table, axis = grad, self.tables[i], _axis(kind)
                if places is not None:
                    shape = [*grad.shape]
                    shape[axis] = table.shape[axis]
                    one = grad.new_zeros(shape).index_add_(axis, places, grad)
                grads[i] = one if table.shape[0] == one.shape[0] else one.sum(0, keepdim=True)

    def back(self, grads: Grads, x: Tensor, own: Tensor, sums: Tensor) -> None:
        """Gradients of the tables and of x, added to own, for one of the numbers of x."""
        table, sums = self.table(self.owner), sums.unflatten(0, x.shape[:2])
        if table is not None:
            add_times(own, sums, table.transpose(1, 2))
            self.give(grads, self.owner, outer(x, sums, table))
        if self.table("bias") is not None:
            self.give(grads, "bias", sums.sum((0, 2)))


def _axis(kind: Kind) -> int:
    return 1 if kind == "value" else -1
