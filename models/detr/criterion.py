"""DETR's losses of matched pairs of queries and targets."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from irpe import IrpeError

from .matcher import HungarianMatcher

_ROUNDING = 1e-3


class Criterion(nn.Module):
    """Cross entropy of classes, L1 and generalized IoU of boxes, for every decoder layer.

    Losses of boxes are divided by the number of targets. In training mode this number is averaged
    over all processes, so all processes must call the criterion equally often.

    Args:
        num_classes: number of object classes, without "no object".
        matcher: see ``HungarianMatcher``.
        eos_coef: weight of "no object" in the cross entropy.
        bbox_loss_coef: weight of the L1 loss.
        giou_loss_coef: weight of the generalized IoU loss.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        eos_coef: float = 0.1,
        bbox_loss_coef: float = 5.0,
        giou_loss_coef: float = 2.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.matcher = num_classes, matcher
        self.weights = {"ce": 1.0, "bbox": bbox_loss_coef, "giou": giou_loss_coef}
        weight = torch.ones(num_classes + 1)
        weight[-1] = eos_coef
        self.register_buffer("empty_weight", weight)

    def forward(
        self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            outputs: outputs of ``DETR``.
            targets: for each image labels ``[T]`` and boxes ``[T, 4]``, center and size as
                fractions of the image without padding.

        Returns:
            loss, the weighted sum; loss_ce, loss_bbox and loss_giou, not weighted; and the same
            with ``_i`` for each decoder layer i except the last.

        Raises:
            IrpeError: if a label is not an object class, or a box is outside its image.
        """
        for number, target in enumerate(targets):
            self._check(number, target["labels"], target["boxes"])
        boxes = self._boxes(targets, outputs["pred_boxes"].device)
        found: dict[str, Tensor] = {}
        total = outputs["pred_logits"].new_zeros(())
        layers = [("", outputs)]
        layers += [(f"_{i}", part) for i, part in enumerate(outputs.get("aux_outputs", ()))]
        for suffix, part in layers:
            for name, loss in self._layer(part, targets, boxes).items():
                found[f"loss_{name}{suffix}"] = loss
                total = total + self.weights[name] * loss
        return {"loss": total, **found}

    def _check(self, image: int, labels: Tensor, boxes: Tensor) -> None:
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise IrpeError(
                f"label {int(wrong[0])} of target {image} is not one of the {self.num_classes} "
                f"object classes, 0 to {self.num_classes - 1}"
            )
        # Corners may be off by rounding; comparisons with NaN are false.
        inside = ((boxes >= -_ROUNDING) & (boxes <= 1 + _ROUNDING)).all(-1)
        if not bool(inside.all()):
            raise IrpeError(
                f"box {boxes[~inside][0].tolist()} of target {image} is not within [0, 1]: boxes "
                "are center and size, divided by width and height of the image"
            )

    def _layer(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], boxes: Tensor
    ) -> dict[str, Tensor]:
        logits, predicted = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        pairs = self.matcher(outputs, targets)
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        labels, truth = (
            torch.cat(
                [t[key][i.to(t[key].device)] for t, (_, i) in zip(targets, pairs, strict=True)]
            ).to(logits.device)
            for key in ("labels", "boxes")
        )
        wanted = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        wanted[image, query] = labels.to(wanted)
        matched, truth = predicted[image, query], truth.to(predicted)
        overlap = generalized_box_iou_loss(
            box_convert(matched, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
        )
        return {
            "ce": nn.functional.cross_entropy(
                logits.transpose(1, 2), wanted, self.empty_weight.to(logits)
            ),
            "bbox": (matched - truth).abs().sum() / boxes,
            "giou": overlap.sum() / boxes,
        }

    def _boxes(self, targets: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Return the mean number of targets per process, at least 1."""
        count = torch.tensor(float(sum(len(t["labels"]) for t in targets)), device=device)
        if self.training and dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp(min=1.0)
