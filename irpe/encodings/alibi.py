"""ALiBi (Press et al., ICLR 2022): a penalty for distance, with a slope for each head."""

import math

import torch
from torch import Tensor

from ..buckets import OneBucket
from ..errors import IrpeError
from ..geometry import Geometry
from ..spec import Alibi
from ..terms import Term
from .base import Encoding, located_buckets

# Extra channels of keys count positions in this unit, so that float16 holds them.
UNIT = 256


def alibi_slopes(num_heads: int, span: float = 8.0) -> tuple[float, ...]:
    """Slopes of H heads: ``2 ** (-span h / H)``, h = 1 to H, where H is a power of two.

    Else those of the power of two below, then every second one of the power above.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-span * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-span * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return tuple(slopes + between[: num_heads - power])


class LinearBias(Encoding):
    """ALiBi. Under causal attention two channels more carry it, and no bias is ever laid out.

    A softmax does not see what is the same for a whole row. So slope * (p_j - p_i) may be
    slope * p_j, which is one product more in q . k. Two channels hold it, its high and its low
    part: 16 bits in bfloat16, 22 in float16. Where slopes and scale are powers of two (8 heads of
    64 channels) that is exact to position 65,536; else a bias of b is off by b / 100,000 at most,
    in bfloat16. Positions must increase, and attention must be called with is_causal and the
    scale of D channels.

    Without ``causal``, or where there are prefix tokens, it is a term of distances.

    Args:
        head_dim: D, whose scale D ** -0.5 the attention is called with. num_heads: H.
        causal: whether no query ever sees a later key. prefix: whether there are prefix tokens.
    """

    place: Tensor

    def __init__(
        self,
        spec: Alibi,
        *,
        head_dim: int,
        num_heads: int,
        causal: bool,
        prefix: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.head_dim, self.prefix = spec, head_dim, prefix
        self.slopes = alibi_slopes(num_heads, spec.span)
        self.in_channels = causal and not prefix
        # Tells the module's device. Slopes are no buffer, which .to(bfloat16) would round.
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        buckets = located_buckets("alibi", OneBucket(), geometry, self.prefix)
        if self.in_channels:
            return ()
        device = self.place.device
        wide = torch.float32 if device.type == "mps" else torch.float64

        def build() -> Tensor:
            return torch.tensor([[-s] for s in self.slopes], dtype=wide, device=device)

        table = geometry.remember(("slopes", self.slopes, device), build)
        return (Term("slope", table, buckets),)

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if not self.in_channels:
            return q, k
        heads, wide = len(self.slopes), torch.promote_types(k.dtype, torch.float32)
        for name, x in (("q", q), ("k", k)):
            if x.shape[1] != heads or x.shape[-1] != self.head_dim:
                raise IrpeError(
                    f"{self.spec} was built for {heads} heads of {self.head_dim} channels, "
                    f"but {name} is {list(x.shape)}"
                )
        self._check(geometry)

        def build() -> tuple[Tensor, Tensor]:
            # slope / scale = 2 ** exponent * rest with rest in [1, 2): the query has the first,
            # exact in any dtype, the key the second times its position.
            parts = [math.frexp(slope * self.head_dim**0.5) for slope in self.slopes]
            exponent = torch.tensor([2.0 ** (e - 1) * UNIT for _, e in parts], dtype=wide)
            rest = torch.tensor([2 * m / UNIT for m, _ in parts], dtype=torch.float64)
            key = geometry.positions(k.device)[1].squeeze(-1).unsqueeze(-2)  # [(B,) 1, S]
            exact = torch.float32 if k.device.type == "mps" else torch.float64
            place = key.to(exact) * rest.to(k.device, exact).unsqueeze(-1)  # [(B,) H, S]
            high = place.to(k.dtype)
            low = (place - high.to(exact)).to(k.dtype)
            on_k = torch.stack((high, low), -1)
            on_q = exponent.to(k.device, q.dtype).view(-1, 1, 1).expand(-1, 1, 2)
            return on_q, on_k

        memo = ("alibi", self.slopes, self.head_dim, k.device, k.dtype, q.dtype)
        on_q, on_k = geometry.remember(memo, build)
        q = torch.cat((q, on_q.expand(*q.shape[:-1], 2)), -1)
        return q, torch.cat((k, on_k.expand(*k.shape[:-1], 2)), -1)

    def _check(self, geometry: Geometry) -> None:
        if geometry.axes != 1:
            raise IrpeError(
                f"{self.spec} was built for causal attention, whose positions are on one axis; "
                f"{geometry!r} has {geometry.axes}: build it with causal=False"
            )
        given = geometry.readable()
        if given is None:
            return
        keys = given[1]
        if not geometry.remember("increasing", lambda: bool((keys.diff(dim=-2) > 0).all())):
            raise IrpeError(
                f"{self.spec} was built for causal attention, which needs positions that "
                f"increase from key to key, not {keys.squeeze(-1)}: build it with causal=False"
            )

    def extra_repr(self) -> str:
        return f"{self.spec}, heads={len(self.slopes)}, in_channels={self.in_channels}"
