"""The models of benchmarks/models.py: timm's DeiT, plain, with an encoding or the original's."""

import types
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from measure import difference
from original import attention, build_original, load_original
from torch import Tensor, nn

import irpe

SPEC = "rpe-1.9-product-ctx-1-{on}"


class OriginalAttention(nn.Module):
    """timm's attention calling the original's modules, as its own DeiT calls them."""

    def __init__(self, host: nn.Module, original: types.ModuleType, on: str) -> None:
        super().__init__()
        self.qkv, self.proj = host.qkv, host.proj
        self.num_heads, self.scale = host.num_heads, host.scale
        self.rpe_q, self.rpe_k, self.rpe_v = build_original(
            original, irpe.parse(SPEC.format(on=on)), host.head_dim, host.num_heads, skip=1
        )

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        B, L, C = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = attention(q, k, v, (self.rpe_q, self.rpe_k, self.rpe_v), self.scale)
        return self.proj(out.transpose(1, 2).reshape(B, L, C))


def build(name: str, model: str, original: Path | None, backend: str = "auto") -> nn.Module:
    """A model by the name of its cell: plain, k, qk, qkv, original k, ..."""
    torch.manual_seed(0)
    net = timm.create_model(model)
    if name.startswith("original "):
        source = load_original(original)
        for block in net.blocks:
            block.attn = OriginalAttention(block.attn, source, name.split()[1])
    elif name != "plain":
        irpe.attach(net, SPEC.format(on=name), backend=backend)
    return net


def stepper(
    net: nn.Module, batch: int, size: int, device: str = "cpu", amp: bool = False
) -> Callable[[], Tensor]:
    """Forward + backward on fixed images; returns the sum of the logits."""
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    image = image.to(device)

    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            total = net(image).sum()
        total.backward()
        return total.detach()

    return step


def gate(
    model: str, size: int, device: str = "cpu", amp: bool = False, backend: str = "auto"
) -> str | None:
    """What is wrong with a backend's gradients, with tables that are not zero; None if nothing.

    In float32 they may differ from the reference's by 1e-4 of the largest of their kind; under
    autocast they may be twice as far from the reference in float32 as the reference under autocast.
    """
    truth = _gradients(model, size, "reference", device, False)
    found = _gradients(model, size, backend, device, amp)
    plain = _gradients(model, size, "reference", device, True) if amp else None
    return difference(truth, found, plain)


def _gradients(model: str, size: int, backend: str, device: str, amp: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = timm.create_model(model, depth=2)
    irpe.attach(net, SPEC.format(on="qkv"), backend=backend)
    for name, parameter in net.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, std=0.2)
    stepper(net.to(device), 1, size, device, amp)()
    return {name: p.grad for name, p in net.named_parameters()}
