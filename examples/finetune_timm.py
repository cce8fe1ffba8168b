"""Attach an encoding to a timm model and fine-tune it on scikit-learn's digits.

    python examples/finetune_timm.py         (needs timm and scikit-learn; some seconds on a CPU)

Expect "outputs stay the same" from attach, a falling loss, and tables that are no longer zero.
With pretrained weights: timm.create_model(..., pretrained=True), or load_state_dict before attach.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import irpe

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
labels = torch.tensor(digits.target)

# A small model; use any name of docs/support.md.
small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 4}
small |= {"num_classes": 10, "weight_init": "jax"}
model = timm.create_model("vit_tiny_patch16_224", **small)
before = model.eval()(images[:8])
print(irpe.attach(model, "rpe-1.9-product-ctx-1-k"))
print(f"largest change of an output: {(model(images[:8]) - before).abs().max():.0e}")

# Fresh tables start at zero. They need a higher learning rate and no weight decay.
groups = irpe.param_groups(model, lr=3e-3, weight_decay=0.05, table_lr=1e-2, table_weight_decay=0.0)
print("groups:", ", ".join(f"{g['name']} ({len(g['params'])} tensors)" for g in groups))
optimizer = torch.optim.AdamW(groups)
model.train()
for step in range(120):
    batch = torch.randint(0, len(images), (128,))
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 40 == 0 or step == 119:
        print(f"step {step:3}: loss {loss:.2f}")

tables = [m for m in model.modules() if isinstance(m, irpe.Encoding)]
print(f"largest number in the tables: {max(t.table.abs().max().item() for t in tables):.2f}")
