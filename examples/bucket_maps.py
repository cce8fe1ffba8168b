"""Draw docs/images/buckets.png: the buckets around one patch, for the four methods.

python examples/bucket_maps.py [FILE]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import irpe
from irpe.tools.plots import plot_buckets

SPECS = (
    "rpe-1.9-product-ctx-1-k",
    "rpe-1.9-cross-ctx-1-k",
    "rpe-5.0-euc-ctx-1-k",
    "rpe-5.0-quant-ctx-1-k",
)

figure, axes = plt.subplots(1, 4, figsize=(14.4, 3.9), layout="constrained")
for spec, axis in zip(SPECS, axes, strict=True):
    plot_buckets(spec, irpe.Grid(14, 14), at=(5, 8), axes=axis)
    axis.set_title(f"{spec}\n{axis.get_title()}", fontsize=10)
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "docs/images/buckets.png", dpi=100)
