"""Tables of relative positions in one dimension: Shaw, the four methods of Huang, and T5."""

import torch
from torch import Tensor, nn

from ..buckets import BucketFunction, bucket_functions
from ..geometry import Geometry
from ..spec import T5, Huang, Shaw
from ..terms import Term
from .base import Encoding, located_buckets


class _Tabled(Encoding):
    """An encoding with one bucket function; prefix tokens share the last bucket."""

    def __init__(self, spec: Shaw | Huang | T5, causal: bool, prefix: bool) -> None:
        super().__init__()
        self.prefix = prefix
        self.text = str(spec)
        self.function: BucketFunction = bucket_functions(spec, causal)[0]
        self.num_buckets = self.function.size + prefix

    def _term(self, kind: str, table: Tensor, geometry: Geometry) -> Term:
        buckets = located_buckets(
            self._get_name(), self.function, geometry, self.prefix, by_key=kind == "key"
        )
        return Term(kind, table, buckets)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{n}={list(p.shape)}" for n, p in self.named_parameters())
        return f"{self.text}, {shapes}"


class ShawRPE(_Tabled):
    """A vector for each clipped offset joins the key, and another one the value.

    Parameters (zero at first):
        table_k ``[H | 1, D, N]``, which meets the query; with on=kv table_v ``[H | 1, N, D]``.
    """

    def __init__(
        self,
        spec: Shaw,
        *,
        head_dim: int,
        num_heads: int,
        prefix: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, False, prefix)
        heads, n = 1 if spec.shared else num_heads, self.num_buckets
        empty = {"device": device, "dtype": dtype}
        self.table_k = nn.Parameter(torch.empty(heads, head_dim, n, **empty))  # type: ignore[arg-type]
        self.table_v = None
        if spec.on == "kv":
            self.table_v = nn.Parameter(torch.empty(heads, n, head_dim, **empty))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the tables, after construction on the meta device as well."""
        for table in self.parameters():
            nn.init.zeros_(table)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        on_k = self._term("query", self.table_k, geometry)
        if self.table_v is None:
            return (on_k,)
        return on_k, self._term("value", self.table_v, geometry)


class HuangRPE(_Tabled):
    """Methods 1 to 3 multiply q . k by the offset's number or channels, 4 meets both q and k.

    Parameters:
        table ``[H | 1, N]`` for methods 1 and 2, ``[H | 1, D, N]`` for 3, all ones at first;
        ``[H | 1, D, N]`` for 4, zero at first. So a fresh table changes nothing.
    """

    def __init__(
        self,
        spec: Huang,
        *,
        head_dim: int,
        num_heads: int,
        prefix: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, False, prefix)
        self.method = spec.method
        heads, n = 1 if spec.shared else num_heads, self.num_buckets
        shape = (heads, n) if spec.method <= 2 else (heads, head_dim, n)
        self.table = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones or zeros, after construction on the meta device as well."""
        nn.init.constant_(self.table, 0.0 if self.method == 4 else 1.0)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        if self.method <= 3:
            return (self._term("channels" if self.method == 3 else "gain", self.table, geometry),)
        # A key term counts offsets from the key: the same vector stands at the opposite offset.
        size = self.function.size
        mirrored = torch.cat((self.table[..., :size].flip(-1), self.table[..., size:]), -1)
        return self._term("query", self.table, geometry), self._term("key", mirrored, geometry)


class T5Bias(_Tabled):
    """A bias for each head and bucket of distances; one module for all layers.

    Parameters (zero at first):
        table ``[H, N]``.
    """

    one_for_all = True

    def __init__(
        self,
        spec: T5,
        *,
        num_heads: int,
        causal: bool,
        prefix: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, causal, prefix)
        shape = (num_heads, self.num_buckets)
        self.table = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the table, after construction on the meta device as well."""
        nn.init.zeros_(self.table)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return (self._term("bias", self.table, geometry),)
