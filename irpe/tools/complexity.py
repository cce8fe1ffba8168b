"""Multiply-adds, activations and parameters of a model, counted by fvcore.

fvcore counts one multiply-add as one. It does not count fused attention, so this module adds a
handler of torch's scaled_dot_product_attention. Attention with terms is traced as the plain
operations of the reference backend: the product of a table with queries or keys costs B H L D N,
and so does the product of bucket masses with a table. fvcore does not count gathers and sums.
"""

from typing import Any

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import Tensor, nn


def multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Return the multiply-adds of one forward pass in evaluation mode.

    Args:
        model: the model; it is not changed.
        inputs: inputs of the forward pass; papers state the number for a batch of one image.
    """
    return _total(FlopCountAnalysis, _attention, model, inputs)


def activations(model: nn.Module, *inputs: Tensor) -> int:
    """Return the number of outputs of the products and convolutions of one forward pass.

    The logits of attention are counted as materialised, with and without an encoding; a fused
    kernel has fewer activations. For arguments see ``multiply_adds``.
    """
    return _total(ActivationCountAnalysis, _materialised, model, inputs)


def _total(analysis: Any, attention: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            count = analysis(model, inputs)
            count.set_op_handle("aten::scaled_dot_product_attention", attention)
            count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return int(count.total())
    finally:
        model.train(training)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    q, k, v = (value.type().sizes() for value in inputs[:3])
    pairs = q[0] * q[1] * q[2] * k[2]
    return pairs * (q[3] + v[3])


def _materialised(inputs: list[Any], outputs: list[Any]) -> int:
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return q[0] * q[1] * q[2] * (k[2] + v[3])
