"""DETR: backbone, transformer, and heads for classes and boxes."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

import irpe

from .backbone import Backbone, resized
from .positions import LearnedPositions, SinePositions
from .transformer import Spec, Transformer


class MLP(nn.Module):
    """Three linear layers with a ReLU after the first two."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = nn.functional.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """DETR (Carion et al., ECCV 2020).

    Args:
        backbone: returns ``[B, num_channels, H, W]``.
        positions: returns absolute positions of a mask.
        transformer: see ``Transformer``.
        num_classes: number of object classes, without "no object".
        num_queries: Q, the maximum number of objects in an image.
        aux_loss: whether to return predictions of every decoder layer.
    """

    def __init__(
        self,
        backbone: Backbone,
        positions: nn.Module,
        transformer: Transformer,
        num_classes: int,
        num_queries: int,
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        dim = transformer.d_model
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, 4)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, 1)
        self.backbone = nn.Sequential(backbone, positions)
        self.aux_loss = aux_loss

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Predict classes and boxes.

        Args:
            images: ``[B, 3, H, W]``, padded at the right and bottom.
            mask: bool ``[B, H, W]``, True for padding; None: no padding.

        Returns:
            pred_logits ``[B, Q, classes + 1]``, "no object" last; pred_boxes ``[B, Q, 4]``,
            center x, center y, width, height as fractions of the image without padding; and
            aux_outputs, a list of such dicts for each decoder layer except the last.
        """
        if mask is None:
            mask = images.new_zeros((images.shape[0], *images.shape[-2:]), dtype=torch.bool)
        body, positions = self.backbone
        features = body(images)
        mask = resized(mask, features.shape[-2:])
        pos = positions(mask).to(features.dtype)
        hs, _ = self.transformer(self.input_proj(features), mask, self.query_embed.weight, pos)
        logits = self.class_embed(hs)
        # Not in bfloat16, whose rounding is several pixels in large images.
        exact = nullcontext() if hs.is_meta else torch.autocast(hs.device.type, enabled=False)
        with exact:
            boxes = self.bbox_embed(hs.to(self.class_embed.weight.dtype)).sigmoid()
        outputs = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        last: dict[str, Any] = dict(outputs[-1])
        if self.aux_loss:
            last["aux_outputs"] = outputs[:-1]
        return last


def build_detr(
    *,
    num_classes: int = 91,
    num_queries: int = 100,
    backbone: str = "resnet50",
    dilation: bool = False,
    pretrained_backbone: bool = False,
    position_embedding: str = "sine",
    hidden_dim: int = 256,
    nheads: int = 8,
    enc_layers: int = 6,
    dec_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    pre_norm: bool = False,
    aux_loss: bool = True,
    enc_rpe2d: Spec | Sequence[Spec] = None,
    backend: str = "auto",
) -> DETR:
    """Return DETR for options with the names of the authors' code; the default is DETR-R50.

    Raises:
        irpe.IrpeError: if a spec, the backbone or the kind of positions is unknown.
    """
    transformer = Transformer(
        hidden_dim,
        nheads,
        enc_layers,
        dec_layers,
        dim_feedforward,
        dropout,
        normalize_before=pre_norm,
        return_intermediate_dec=True,
        enc_rpe2d=enc_rpe2d,
        backend=backend,
    )
    if position_embedding == "sine":
        positions: nn.Module = SinePositions(hidden_dim // 2, normalize=True)
    elif position_embedding == "learned":
        positions = LearnedPositions(hidden_dim // 2)
    else:
        raise irpe.IrpeError(f"position_embedding={position_embedding!r} is 'sine' or 'learned'")
    body = Backbone(backbone, dilation, pretrained_backbone, width=hidden_dim)
    return DETR(body, positions, transformer, num_classes, num_queries, aux_loss)


@torch.no_grad()
def detections(outputs: dict[str, Any], sizes: Tensor) -> list[dict[str, Tensor]]:
    """Return scores, labels and boxes of the outputs of ``DETR``.

    Args:
        outputs: outputs of ``DETR``.
        sizes: ``[B, 2]``, height and width of each image in pixels.

    Returns:
        For each image scores ``[Q]``, labels ``[Q]`` and boxes ``[Q, 4]`` (x0, y0, x1, y1 in
        pixels), at least float32.
    """
    logits, boxes = (
        outputs[key].to(torch.promote_types(outputs[key].dtype, torch.float32))
        for key in ("pred_logits", "pred_boxes")
    )
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    boxes = box_convert(boxes, "cxcywh", "xyxy")
    height, width = sizes.to(boxes).unbind(1)
    boxes = boxes * torch.stack((width, height, width, height), dim=1)[:, None]
    return [
        {"scores": s, "labels": c, "boxes": b}
        for s, c, b in zip(scores, labels, boxes, strict=True)
    ]
