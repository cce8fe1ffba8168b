"""Print the cost of an encoding: parameters, multiply-adds, the backend, and a time.

    python examples/costs.py                 (needs timm and fvcore; some seconds on a CPU)

Expect the published increment of DeiT-Ti, 22.7 M multiply-adds for a table on k (docs/costs.md has
the larger models), the backend that `auto` takes and why, and a rough time on your machine. Use
benchmarks/models.py for measurements.
"""

import time

import timm
import torch

import irpe
from irpe.tools.complexity import multiply_adds

image = torch.randn(1, 3, 224, 224)
plain = None
for spec in (None, "rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv"):
    model = timm.create_model("deit_tiny_patch16_224").eval()
    if spec is not None:
        irpe.attach(model, spec)
    parameters = sum(p.numel() for p in model.parameters())
    counted = multiply_adds(model, image) / 1e6
    plain = plain or counted
    with torch.inference_mode():
        model(image)
        start = time.perf_counter()
        model(image)
        took = time.perf_counter() - start
    print(
        f"{spec or 'plain':26} {parameters:,} parameters, {counted:.1f} M multiply-adds "
        f"(+{counted - plain:.1f}), {1000 * took:.0f} ms"
    )

_, rpe_k, _ = irpe.build_rpe("rpe-1.9-product-ctx-1-k", head_dim=64, num_heads=3, prefix=1)
q, k, v = (torch.randn(1, 3, 197, 64) for _ in range(3))
print(irpe.explain(q, k, v, rpe_k.terms(irpe.Grid(14, 14, prefix=1))))
