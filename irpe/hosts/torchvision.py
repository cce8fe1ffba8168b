"""torchvision's ``vit_*``: nn.MultiheadAttention whose grid the patch projection tells.

torchvision itself takes squares of one size only; a rectangle goes through ``model.conv_proj`` and
``model.encoder``, and is right too.
"""

from collections.abc import Iterator

from torch import nn
from torchvision.models import VisionTransformer

from ..spec import Spec
from .mha import MhaSite
from .place import forget, locate, placeable
from .site import misplaced_on_image


def sites(model: nn.Module) -> Iterator["VitSite"]:
    """The attention modules of all torchvision VisionTransformers in a model."""
    for path, vit in model.named_modules():
        if isinstance(vit, VisionTransformer):
            for name, module in vit.named_modules(prefix=path):
                if isinstance(module, nn.MultiheadAttention):
                    yield VitSite(name, module, vit)


class VitSite(MhaSite):
    """One of them. Tables have a bucket for the class token."""

    def __init__(self, name: str, module: nn.Module, vit: VisionTransformer) -> None:
        super().__init__(name, module)
        self.vit = vit

    def obstacle(self, spec: Spec) -> str | None:
        if not placeable(self.vit.encoder.layers):
            return f"its layers are a {type(self.vit.encoder.layers).__name__}, not a Sequential"
        return super().obstacle(spec) or misplaced_on_image(spec)

    def equip(self, spec: Spec, backend: str) -> None:
        super().equip(spec, backend)
        locate(self.vit.conv_proj, self.vit.encoder.layers, prefix=1)

    @property
    def prefix(self) -> bool:
        return True

    def strip(self) -> None:
        super().strip()
        if not any(site.equipped for site in sites(self.vit)):
            forget(self.vit.conv_proj, self.vit.encoder.layers)
