"""Image relative position encoding (Wu et al., ICCV 2021) as modules with the released names."""

from numbers import Integral

import torch
from torch import Tensor, nn

from ..buckets import BucketIds, ImageBuckets
from ..buckets.image import image_buckets
from ..errors import IrpeError
from ..geometry import Geometry, Grid
from ..spec import Spec, parse_image
from ..terms import Kind, Term
from .base import Encoding, located_buckets


class ImageRPE(Encoding):
    """One table on the queries, the keys or the values.

    Parameters (zero at first, so that a fresh table changes nothing):
        lookup_table_bias ``[H | 1, N]`` in mode bias; lookup_table_weight ``[H | 1, D, N]`` in
        mode ctx, ``[H | 1, N, D]`` on the values.

    Note that the encoding *on k* (``rpe_k``) is a table that meets the **query**, and the one on
    q meets the **key**, with offsets key - query: the names are the paper's (Eq. 16).
    """

    def __init__(
        self,
        function: ImageBuckets,
        *,
        on: str,
        mode: str,
        head_dim: int,
        heads: int,
        prefix: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.function, self.on, self.mode, self.prefix = function, on, mode, prefix
        self.num_buckets = function.size + prefix
        shape = {"q": (head_dim, self.num_buckets), "v": (self.num_buckets, head_dim)}
        if mode == "bias":
            bias = torch.zeros(heads, self.num_buckets, device=device, dtype=dtype)
            self.lookup_table_bias = nn.Parameter(bias)
        else:
            rows = shape["v" if on == "v" else "q"]
            weight = torch.zeros(heads, *rows, device=device, dtype=dtype)
            self.lookup_table_weight = nn.Parameter(weight)

    @property
    def table(self) -> nn.Parameter:
        """The one parameter, under either name."""
        return self.lookup_table_bias if self.mode == "bias" else self.lookup_table_weight

    def reset_parameters(self) -> None:
        """Zero the table, after construction on the meta device as well."""
        nn.init.zeros_(self.table)

    def _buckets(self, geometry: Geometry, by_key: bool = False) -> BucketIds:
        return located_buckets(f"rpe_{self.on}", self.function, geometry, self.prefix, by_key)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        kind: Kind = "value" if self.on == "v" else "key" if self.on == "q" else "query"
        if self.mode == "bias":
            kind = "bias"
        return (Term(kind, self.table, self._buckets(geometry, by_key=self.on == "q")),)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """The dense values, as the original module returns them, for its tutorial's code.

        Args:
            x: scaled queries ``[B, H, L, D]`` for rpe_k, scaled keys for rpe_q (transpose the
                last two axes of the result), probabilities ``[B, H, L, L]`` for rpe_v.
            height, width: the grid; what L has beyond it are prefix tokens.

        Returns:
            ``[B, H, L, L]`` to add to the logits (bias: ``[1, H | 1, L, L]``); for rpe_v
            ``[B, H, L, D]`` to add to the output.
        """
        if height is None or width is None:
            raise IrpeError(
                f"rpe_{self.on} needs height= and width= of the grid: "
                f"{x.shape[-2]} tokens do not tell it"
            )
        grid = Grid(height, width)
        prefix = x.shape[-2] - grid.query_length
        if prefix < 0:
            raise IrpeError(f"a grid of {height}x{width} has more patches than L={x.shape[-2]}")
        buckets = self._buckets(Grid(height, width, prefix))
        self._check(x, buckets)
        ids = buckets.dense(x.device)
        if self.mode == "bias":
            return self.table[:, ids].unsqueeze(0)
        if self.on == "v":
            mass = x.new_zeros(*x.shape[:-1], buckets.size)
            return mass.scatter_add(-1, ids.expand_as(x), x) @ self.table
        rows = x @ self.table
        return rows.gather(-1, ids.expand(*rows.shape[:-1], -1))

    def _check(self, x: Tensor, buckets: BucketIds) -> None:
        heads = self.table.shape[0]
        length = buckets.geometry.query_length
        wide = {"v": length}.get(self.on, None if self.mode == "bias" else self.table.shape[1])
        if x.dim() != 4 or heads not in (1, x.shape[1]) or wide not in (None, x.shape[3]):
            last = "D" if wide is None else wide
            raise IrpeError(
                f"rpe_{self.on} takes [B, {'H' if heads == 1 else heads}, L, {last}], "
                f"not {list(x.shape)}"
            )
        if x.dtype != self.table.dtype and not torch.is_autocast_enabled():
            raise IrpeError(f"x is {x.dtype}, but the table {self.table.dtype}")

    def extra_repr(self) -> str:
        return (
            f"on={self.on}, mode={self.mode}, method={self.function.method}, "
            f"table={list(self.table.shape)}"
        )


class CrossRPE(Encoding):
    """Method cross: a table for rows and a table for columns, summed."""

    def __init__(self, rows: ImageRPE, columns: ImageRPE) -> None:
        super().__init__()
        self.rp_rows, self.rp_cols = rows, columns

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return self.rp_rows.terms(geometry) + self.rp_cols.terms(geometry)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Sum of the dense values of rows and columns, see ``ImageRPE.forward``."""
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)


def build_rpe(
    spec: str | Spec,
    *,
    head_dim: int,
    num_heads: int,
    prefix: bool | int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Encoding | None, Encoding | None, Encoding | None]:
    """Build the modules of a spec.

    Args:
        spec: the encoding.
        head_dim: D. num_heads: H, the query heads.
        prefix: whether prefix tokens (class token, registers) stand before the patches: they
            get a bucket of their own.

    Returns:
        (rpe_q, rpe_k, rpe_v), None where the spec does not ask for one.
    """
    spec = parse_image(spec)
    for name, value in (("head_dim", head_dim), ("num_heads", num_heads)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise IrpeError(f"{name}={value!r} is not a positive integer")

    if prefix is None or isinstance(prefix, str) or prefix < 0:
        raise IrpeError(f"prefix={prefix!r} is neither a bool nor a number of tokens")

    def build(on: str) -> Encoding | None:
        if on not in spec.on:
            return None
        modules = [
            ImageRPE(
                function,
                on=on,
                mode=spec.mode,
                head_dim=head_dim,
                heads=1 if spec.shared else num_heads,
                prefix=bool(prefix),
                device=device,
                dtype=dtype,
            )
            for function in image_buckets(spec)
        ]
        return CrossRPE(*modules) if len(modules) == 2 else modules[0]

    return build("q"), build("k"), build("v")
