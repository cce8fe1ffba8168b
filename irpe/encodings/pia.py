"""Position-infused attention: sinusoids in queries and keys, not in values.

``Wq (x_i + p[i])`` and ``Wk (x_j + p[j])`` in each layer. Layer inputs contain no positions, so
they can be cached and reused at other positions.

Source: Press et al., Shortformer, 2021, arXiv 2012.15832.
"""

from dataclasses import dataclass

from torch import Tensor

from ..fields import choice, number
from ..geometry import Geometry
from ..spec import LayerSize, Spec
from .base import Encoding, register
from .sinusoidal import Waves


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class PIA(Spec):
    """Position-infused attention (Press et al., 2021, arXiv 2012.15832).

    Sinusoids are added to the inputs of the query and key projections of each layer, not to the
    values.

    Args:
        form: see ``Sinusoidal``.
        base: see ``Sinusoidal``.
    """

    names = {"pia": {}}
    examples = (("pia", "Wq (x + p[i]), Wk (x + p[j])", "not in values"),)

    form: str = choice("fairseq", "paper", "fairseq")
    base: float = number(10000.0, most=1e12)

    def build(self, size: LayerSize) -> dict[str, Encoding]:
        return {"pia": PositionInfused(self, size)}


class PositionInfused(Waves):
    """Sinusoids added to the inputs of the query and key projections.

    The geometry has the current positions of cached keys. A projection is linear, so a cache may
    store projected inputs and add projected ``waves``: Wk (y + p) = Wk y + Wk p.
    """

    def inputs(self, xq: Tensor, xk: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        on_q, on_k = self.waves(geometry, xq)
        geometry.check(xq.shape[0], xq.shape[1], xk.shape[1])
        return xq + on_q, xk + on_k
