"""Export a model with an encoding attached to ONNX for any batch, and run it in onnxruntime.

    python examples/export_onnx.py [FILE]    (needs timm, onnx, onnxscript and onnxruntime)

Expect the largest difference between torch and onnxruntime to be near 1e-6, for batch sizes other
than the exported one. The graph holds standard operators only: it runs without irpe.
"""

import sys

import onnxruntime
import timm
import torch

import irpe

torch.manual_seed(0)
small = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
model = timm.create_model("vit_tiny_patch16_224", **small)
irpe.attach(model, "rpe-1.9-product-ctx-1-qkv")
for name, parameter in model.named_parameters():  # as after training
    if "lookup_table" in name:
        torch.nn.init.normal_(parameter, std=0.3)
model.eval()

file = sys.argv[1] if len(sys.argv) > 1 else "model.onnx"
batch = torch.export.Dim("batch", min=1, max=256)
shapes = ({0: batch},)
images = torch.randn(2, 3, 64, 64)
torch.onnx.export(model, (images,), file, dynamo=True, dynamic_shapes=shapes, opset_version=18)

session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
given = session.get_inputs()[0]
print(f"{file}: input {given.name} {given.shape}")
for size in (1, 5):
    images = torch.randn(size, 3, 64, 64)
    (found,) = session.run(None, {given.name: images.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(found) - model(images)).abs().max()
    print(f"batch of {size}: largest difference {difference:.0e}")
