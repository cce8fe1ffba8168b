"""Match one object query to each target, with the lowest total cost."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

import irpe


class HungarianMatcher:
    """Matches queries and targets by the Hungarian algorithm.

    Args:
        cost_class: weight of the negative probability of the target's class.
        cost_bbox: weight of the L1 distance of boxes.
        cost_giou: weight of the negative generalized IoU of boxes.

    Raises:
        irpe.IrpeError: if all weights are 0.
    """

    def __init__(
        self, cost_class: float = 1.0, cost_bbox: float = 5.0, cost_giou: float = 2.0
    ) -> None:
        if not any((cost_class, cost_bbox, cost_giou)):
            raise irpe.IrpeError("all costs of the matcher are 0")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    @torch.no_grad()
    def __call__(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Match the queries of each image.

        Args:
            outputs: pred_logits ``[B, Q, classes + 1]`` and pred_boxes ``[B, Q, 4]``, center and
                size.
            targets: for each image labels ``[T]`` and boxes ``[T, 4]``, on any device.

        Returns:
            For each image the matched queries, ascending, and their targets: int64
            ``[min(Q, T)]`` each.
        """
        pairs = []
        for logits, boxes, target in zip(
            outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True
        ):
            cost = self.cost(logits.float(), boxes.float(), target)
            found = linear_sum_assignment(cost.cpu())
            pairs.append(tuple(torch.as_tensor(i, dtype=torch.int64) for i in found))
        return pairs

    def cost(self, logits: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Return costs ``[Q, T]``; NaN gets a very high cost."""
        truth, labels = target["boxes"].to(boxes), target["labels"].to(boxes.device)
        overlap = generalized_box_iou(
            box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
        )
        cost = (
            -self.cost_class * logits.softmax(-1)[:, labels]
            + self.cost_bbox * torch.cdist(boxes, truth, p=1)
            # Two boxes without area have no defined overlap.
            - self.cost_giou * overlap.nan_to_num(0.0)
        )
        return cost.nan_to_num(1e6, 1e6, -1e6)
