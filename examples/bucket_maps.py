"""Draw docs/images/buckets.png: the buckets around one patch, for the four methods.

python examples/bucket_maps.py [FILE]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import irpe
from irpe.tools.plots import plot_buckets

# The ratios of the published models.
SPECS = (
    "rpe-1.9-product-ctx-1-k",
    "rpe-20.0-cross-ctx-1-k",
    "rpe-20.0-euc-ctx-1-k",
    "rpe-33.0-quant-ctx-1-k",
)

figure, axes = plt.subplots(1, 4, figsize=(14.4, 3.8), layout="constrained")
for spec, axis in zip(SPECS, axes, strict=True):
    plot_buckets(spec, irpe.Grid(14, 14), at=(5, 8), axes=axis)
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "docs/images/buckets.png", dpi=100)
