"""torchvision's ``vit_*``: nn.MultiheadAttention with the grid of the patch projection.

torchvision's forward pass takes square images of one size. For rectangles, call
``model.conv_proj`` and ``model.encoder``.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torchvision.models import VisionTransformer

from ..spec import Spec
from .carry import carry_geometry, stop_carrying
from .torch import MhaSite


def find_sites(model: nn.Module) -> Iterator["VitSite"]:
    """Yield the attention modules of all torchvision VisionTransformers in a model."""
    for path, vit in model.named_modules():
        if isinstance(vit, VisionTransformer):
            for name, module in vit.named_modules(prefix=path):
                if isinstance(module, nn.MultiheadAttention):
                    yield VitSite(name, module, vit)


class VitSite(MhaSite):
    """One attention module of a VisionTransformer. Tables have a bucket for the class token."""

    axes = 2

    def __init__(self, name: str, module: nn.Module, vit: VisionTransformer) -> None:
        super().__init__(name, module)
        self.vit = vit

    def sizes(self) -> dict[str, Any]:
        return {**super().sizes(), "prefix": 1}

    def add(self, spec: Spec | None, *, backend: str, native: str) -> None:
        super().add(spec, backend=backend, native=native)
        carry_geometry(self.vit, self.vit.conv_proj, self.module, prefix=1)

    def remove(self) -> None:
        super().remove()
        stop_carrying(self.vit, self.module)
