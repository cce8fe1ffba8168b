"""The feature extractor: a timm model, or a small stem of convolutions."""

import itertools

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import irpe

FROZEN_STAGES = ("conv1", "layer1")  # as in the released models, which train with small batches


class Backbone(nn.Module):
    """Computes the last feature map of images.

    Batch norms of timm models are frozen: their weights and statistics are buffers. The stem has
    three convolutions of stride 2 and trainable batch norms.

    Args:
        name: ``"stem"``, or a timm model with feature maps, as ``"resnet50"``
            (``"resnet50.tv_in1k"`` has the weights of the authors' code).
        dilation: dilate the last stage instead of halving the resolution.
        pretrained: load published weights (downloads them).
        width: number of channels of the stem.

    Raises:
        irpe.IrpeError: if timm cannot build the model.
    """

    def __init__(
        self,
        name: str = "resnet50",
        dilation: bool = False,
        pretrained: bool = False,
        width: int = 96,
    ) -> None:
        super().__init__()
        if name == "stem":
            self.body: nn.Module = _stem(width)
            self.num_channels, self.stride = width, 8
            return
        options = {"output_stride": 16} if dilation else {}
        try:
            body = timm.create_model(
                name, pretrained=pretrained, features_only=True, out_indices=(-1,), **options
            )
        except (
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            AssertionError,
        ) as error:
            raise irpe.IrpeError(f"backbone {name!r} cannot be built by timm: {error}") from error
        self.num_channels, self.stride = body.feature_info.channels()[-1], 16 if dilation else 32
        self.body = _frozen(body)
        for key, parameter in self.body.named_parameters():
            if name.startswith("resnet") and key.startswith(FROZEN_STAGES):
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[B, num_channels, H / stride, W / stride]``, rounded up, of ``[B, 3, H, W]``."""
        features = self.body(images)
        return features[-1] if isinstance(features, list) else features


def _stem(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = (3, width // 4, width // 2, width)
    for before, after in itertools.pairwise(channels):
        layers += [
            # A receptive field of 29 pixels, for small objects.
            nn.Conv2d(before, after, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def _frozen(module: nn.Module) -> nn.Module:
    """Freeze every batch norm of a module in place, and return it."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            state = {k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"}
            frozen.load_state_dict(state)
            # timm's fused norms include an activation.
            after = [getattr(child, part, None) for part in ("drop", "act")]
            kept = [m for m in after if m is not None and not isinstance(m, nn.Identity)]
            setattr(module, name, nn.Sequential(frozen, *kept) if kept else frozen)
        else:
            _frozen(child)
    return module


def resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a padding mask, bool ``[B, H, W]``, resized to a feature map by nearest pixels."""
    return nn.functional.interpolate(mask[None].float(), size=size)[0].to(torch.bool)
