"""Image relative position encoding (iRPE): bucketed tables on queries, keys and values.

``rpe-{ratio}-{method}-{mode}-{shared}-{on}``, then options separated by commas::

    rpe-2.0-product-ctx-1-k
    rpe-2.0-product-ctx-1-k,index=clip,beta=4

With the bucket n of the offset query - key, mode ``bias`` adds ``b[n]`` to the logits; mode ``ctx``
adds ``q . r[n]`` on k, ``k . r[n']`` on q with the bucket n' of the offset key - query, and
``r[n]`` to the values on v.

Source: Wu et al., Rethinking and Improving Relative Position Encoding for Vision Transformer,
ICCV 2021, Eq. 13 to 20; the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..buckets import ImageBuckets
from ..buckets.image import AXES, ranks
from ..buckets.steps import clip_index, piecewise_index
from ..errors import IrpeError
from ..fields import checked, choice, flag, number, spelled
from ..geometry import Geometry, Grid
from ..spec import LayerSize, Spec
from ..terms import Kind, Term
from .base import Encoding, TableEncoding, encodings_of, parse, register

METHODS = ("euc", "quant", "rank", "cross", "product")
MODES = ("bias", "ctx")
MOST_BUCKETS = 2**22  # 1 GiB for a table of 64 channels
MOST_RANKS = 2**16  # enough for a grid of 400x400
FORM = "rpe-{ratio}-{method}-{mode}-{shared}-{on}"
OPTIONS = ("index", "alpha", "beta", "gamma")


def _check_on(name: str, on: object) -> str:
    if not isinstance(on, str) or not on or "".join(c for c in "qkv" if c in on) != on:
        raise IrpeError(f"on={on!r} is not one of q, k, v, qk, qv, kv, qkv")
    return on


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class RPE(Spec):
    """Image relative position encoding (Wu et al., ICCV 2021).

    Args:
        ratio: scales the piecewise index, in patches: alpha = ratio, beta = 2 ratio,
            gamma = 8 ratio (Eq. 18).
        method: ``euc`` (Euclidean distance), ``quant`` (squared distance, as in the released
            code), ``rank`` (rank of the distance, as in Eq. 20 of the paper), ``cross`` (one table
            per axis) or ``product`` (a bucket for each pair of row and column).
        mode: ``bias`` (a scalar for each bucket, Eq. 13) or ``ctx`` (a vector for each bucket,
            whose dot product with the query or key is added, Eq. 15).
        shared: one table for all heads, or one for each head.
        on: which of the projections ``q``, ``k``, ``v`` are encoded, in this order. ``v`` needs
            mode ``ctx``.
        index: ``piecewise`` (Eq. 18) or ``clip``.
        alpha: replaces the value that follows from ``ratio``.
        beta: likewise.
        gamma: likewise.

    Raises:
        IrpeError: if a value is not allowed.
    """

    names = {"rpe": {}}
    grammar = FORM
    axes = (2, 3)
    neutral = True
    examples = (
        ("rpe-1.9-product-ctx-1-k", "logit + s q . r[n(d)]", "image; a pair of a row and a column"),
        ("rpe-1.9-product-ctx-1-qkv", "also s k . r'[n(-d)]; v + r''[n(d)]", "on q, k and v"),
        ("rpe-20.0-cross-ctx-1-k", "logit + s q . (r[n(dy)] + c[n(dx)])", "a table per axis"),
        ("rpe-20.0-euc-ctx-1-k", "logit + s q . r[n(|d|)]", "Euclidean distance, rounded"),
        ("rpe-33.0-quant-ctx-1-k", "logit + s q . r[n(|d|^2)]", "its square, the released code"),
        ("rpe-33.0-rank-ctx-1-k", "logit + s q . r[n(rank |d|)]", "its rank, the paper"),
        ("rpe-2.0-product-bias-0-k", "logit + b[n(d)]", "a number for each bucket"),
    )

    ratio: float = number(1.9)
    method: str = choice("product", *METHODS, aliases={"euclidean": "euc", "quantization": "quant"})
    mode: str = choice("ctx", *MODES, aliases={"contextual": "ctx"})
    shared: bool = flag(True)
    on: str = checked("k", _check_on)
    index: str = choice("piecewise", "piecewise", "clip")
    alpha: float | None = number(None)
    beta: float | None = number(None)
    gamma: float | None = number(None)

    def check(self) -> None:
        if "v" in self.on and self.mode == "bias":
            raise IrpeError(f"on={self.on!r} needs mode ctx: a bias is not added to values")
        alpha, beta, gamma = self.coefficients
        if int(beta) < 1:
            raise IrpeError(f"beta={beta:g} leaves a single bucket: at least 1 is needed")
        if self.method == "product" and (2 * int(beta) + 1) ** 2 > MOST_BUCKETS:
            raise IrpeError(
                f"beta={beta:g} makes {(2 * int(beta) + 1) ** 2} buckets of method product, "
                f"more than {MOST_BUCKETS}"
            )
        far = max(beta, gamma) if self.index == "piecewise" else beta
        if self.method == "rank" and far > MOST_RANKS:
            raise IrpeError(f"method rank with {far:g} ranks of distances, more than {MOST_RANKS}")
        if self.index == "piecewise" and not alpha <= beta:
            raise IrpeError(f"alpha={alpha:g} must not exceed beta={beta:g} in {self.write_name()}")
        if self.index == "piecewise" and not alpha < gamma:
            raise IrpeError(f"alpha={alpha:g} must be below gamma={gamma:g} in {self.write_name()}")

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """alpha, beta, gamma of the piecewise index (Eq. 18), overrides applied."""
        ratio = self.ratio
        return self.alpha or ratio, self.beta or 2 * ratio, self.gamma or 8 * ratio

    @classmethod
    def read_name(cls, name: str) -> Mapping[str, Any]:
        parts = name.split("-")
        if len(parts) != 6:
            raise IrpeError(f"the form is {FORM}, as in rpe-2.0-product-ctx-1-k")
        return dict(zip(("ratio", "method", "mode", "shared", "on"), parts[1:], strict=True))

    def write_name(self) -> str:
        ratio, shared = spelled(self.ratio, keep_point=True), str(int(self.shared))
        return "-".join(("rpe", ratio, self.method, self.mode, shared, self.on))

    @classmethod
    def options(cls, name: str) -> list[Any]:
        return [f for f in fields(cls) if f.name in OPTIONS]

    def buckets(self, axes: int = 2) -> tuple[ImageBuckets, ...]:
        """Return the bucket functions: for ``cross`` one for each axis, else one."""
        if axes not in self.axes:
            raise IrpeError(f"axes={axes}: {self} takes positions of 2 or 3 numbers")
        alpha, beta, gamma = self.coefficients
        clipped = self.index == "clip"
        index = clip_index(int(beta)) if clipped else piecewise_index(alpha, beta, gamma)
        methods = AXES[-axes:] if self.method == "cross" else (self.method,)
        ranked = ranks(index.reach) if self.method == "rank" else ()
        if ranked and axes != 2:
            raise IrpeError(f"{self}: method rank is for 2 axes only; method quant takes 3 axes")
        made = tuple(ImageBuckets(method, index, ranked, axes) for method in methods)
        if made[0].size > MOST_BUCKETS:
            raise IrpeError(f"{self} on {axes} axes makes {made[0].size} buckets: too many")
        return made

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        made: dict[str, Encoding] = {}
        for on in self.on:
            tables = [ImageRPE(self, size, function, on) for function in self.buckets(size.axes)]
            made[f"rpe_{on}"] = CrossRPE(tables) if self.method == "cross" else tables[0]
        return made


class ImageRPE(TableEncoding):
    """One table on the queries, the keys or the values.

    The names follow the paper (Eq. 16): the vectors of ``rpe_k`` are multiplied with the
    **query**, and those of ``rpe_q`` with the **key**, by offsets key - query.

    Parameters (initialised to zero, so that outputs stay the same):
        lookup_table_bias ``[H | 1, N]`` in mode bias; lookup_table_weight ``[H | 1, D, N]`` in
        mode ctx, ``[H | 1, N, D]`` on the values.
    """

    spec: RPE

    def __init__(self, spec: RPE, size: LayerSize, function: ImageBuckets, on: str) -> None:
        super().__init__(spec, size, function)
        self.on = on
        heads, n = 1 if spec.shared else size.num_heads, self.num_buckets
        if spec.mode == "bias":
            self.lookup_table_bias = nn.Parameter(torch.zeros(heads, n, **size.made))
        else:
            rows = (n, size.head_dim) if on == "v" else (size.head_dim, n)
            self.lookup_table_weight = nn.Parameter(torch.zeros(heads, *rows, **size.made))

    @property
    def table(self) -> nn.Parameter:
        """The parameter; its name depends on the mode."""
        bias = self.spec.mode == "bias"
        return self.lookup_table_bias if bias else self.lookup_table_weight

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        buckets = self.buckets(geometry)
        if self.spec.mode == "bias":
            return (Term("bias", self.table, buckets, by_key=self.on == "q"),)
        kinds: dict[str, Kind] = {"q": "key", "k": "query", "v": "value"}
        return (Term(kinds[self.on], self.table, buckets),)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Return the dense values of the table, as the original module does.

        Args:
            x: scaled queries ``[B, H, L, D]`` for rpe_k, scaled keys for rpe_q (transpose the
                last two axes of the result), probabilities ``[B, H, L, L]`` for rpe_v.
            height: rows of the grid; the first L - height * width tokens are prefix tokens.
            width: columns of the grid.

        Returns:
            ``[B, H, L, L]`` to add to the logits (bias: ``[1, H | 1, L, L]``); for rpe_v
            ``[B, H, L, D]`` to add to the output.

        Raises:
            IrpeError: if the grid or x does not fit.
        """
        if height is None or width is None:
            raise IrpeError(
                f"rpe_{self.on} needs height= and width= of the grid: "
                f"they do not follow from {x.shape[-2]} tokens"
            )
        prefix = x.shape[-2] - Grid(height, width).query_length
        if prefix < 0:
            raise IrpeError(f"a grid of {height}x{width} has more patches than L={x.shape[-2]}")
        buckets = self.buckets(Grid(height, width, prefix))
        self._check(x)
        ids = buckets.dense(x.device)
        if self.spec.mode == "bias":
            return self.table[:, ids].unsqueeze(0)
        if self.on == "v":
            mass = x.new_zeros(*x.shape[:-1], buckets.size)
            return mass.scatter_add(-1, ids.expand_as(x), x) @ self.table
        rows = x @ self.table
        return rows.gather(-1, ids.expand(*rows.shape[:-1], -1))

    def _check(self, x: Tensor) -> None:
        heads = self.table.shape[0]
        wide = None if self.spec.mode == "bias" else self.table.shape[1]
        wide = x.shape[-2] if self.on == "v" else wide
        if x.dim() != 4 or heads not in (1, x.shape[1]) or wide not in (None, x.shape[3]):
            last = "D" if wide is None else wide
            raise IrpeError(
                f"rpe_{self.on} takes [B, {'H' if heads == 1 else heads}, L, {last}], "
                f"not {list(x.shape)}"
            )
        if x.dtype != self.table.dtype and not torch.is_autocast_enabled():
            raise IrpeError(f"x is {x.dtype}, but the table is {self.table.dtype}")

    def extra_repr(self) -> str:
        return f"on={self.on}, {super().extra_repr()}"


class CrossRPE(Encoding):
    """Method cross: the sum of a table for rows, one for columns and, for videos, one for frames.

    Args:
        tables: in the order (frames,) rows, columns.
    """

    rp_rows: ImageRPE
    rp_cols: ImageRPE

    def __init__(self, tables: list[ImageRPE]) -> None:
        super().__init__()
        self.spec = tables[0].spec
        names = ("rp_frames", "rp_rows", "rp_cols")[-len(tables) :]
        for name, table in zip(names, tables, strict=True):
            setattr(self, name, table)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return encodings_of(self).terms(geometry)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Return the sum of the dense values of rows and columns, see ``ImageRPE.forward``."""
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)


def parse_image(spec: str | Spec) -> RPE:
    """Return the spec of an image encoding with buckets; raise IrpeError for any other."""
    parsed = parse(spec)
    if not isinstance(parsed, RPE):
        raise IrpeError(f"{parsed} is not of the form {FORM}: irpe.build builds other encodings")
    return parsed


def build_rpe(
    spec: str | Spec,
    *,
    head_dim: int,
    num_heads: int,
    prefix: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Encoding | None, Encoding | None, Encoding | None]:
    """Build an image encoding with the interface of the authors' code.

    Args:
        spec: the encoding, ``rpe-...``.
        head_dim: D.
        num_heads: H, number of query heads.
        prefix: number of prefix tokens (class token, registers) before the patches.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Returns:
        (rpe_q, rpe_k, rpe_v); None for those that are not in the spec.

    Raises:
        IrpeError: if the spec is not of the form ``rpe-...``.
    """
    sizes: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "prefix": prefix}
    made = parse_image(spec).build(LayerSize(dim=1, **sizes, device=device, dtype=dtype))
    return made.get("rpe_q"), made.get("rpe_k"), made.get("rpe_v")
