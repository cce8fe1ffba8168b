"""Multiply-adds and parameters of a model, counted by fvcore.

fvcore counts one multiply-add as one. It knows no fused attention, so one handler stands here for
torch's scaled_dot_product_attention. Attention with terms is traced as the plain operations of the
reference backend, whose products fvcore counts as they are: a table that meets queries or keys
costs B H L D N, the bucket mass times its table as much. Gathers and sums count nothing, as
additions do everywhere in fvcore.
"""

from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn


def multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of one forward pass in evaluation mode.

    Args:
        model: stays as it is, its training mode too.
        inputs: of the forward pass; a batch of one image gives the figure that papers print.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            count = FlopCountAnalysis(model, inputs)
            count.set_op_handle("aten::scaled_dot_product_attention", _attention)
            count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return int(count.total())
    finally:
        model.train(training)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    q, k, v = (value.type().sizes() for value in inputs[:3])
    pairs = q[0] * q[1] * q[2] * k[2]
    return pairs * (q[3] + v[3])
