"""Draw docs/images/concepts.png: geometry, buckets, terms and attention of one query.

python docs/make_concepts.py [FILE]

The table is random (seed 3); docs/interactive/ shows a trained one.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import irpe  # noqa: E402
from irpe.tools.plots import plot_buckets  # noqa: E402

SPEC, HEIGHT, WIDTH, AT, D = "rpe-1.9-product-ctx-1-k", 5, 7, (1, 2), 16
FILE = sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "images" / "concepts.png"

torch.manual_seed(3)
grid, token = irpe.Grid(HEIGHT, WIDTH), AT[0] * WIDTH + AT[1]
ids, N = irpe.bucket_ids(SPEC, grid)
q, table = torch.randn(1, 1, HEIGHT * WIDTH, D), torch.randn(D, N)
rows = D**-0.5 * q @ table  # [B, H, L, N]
logits = irpe.lookup(rows, ids)  # [B, H, L, S]: the term alone, where q . k is 0
shares = logits.softmax(-1)[0, 0, token].view(HEIGHT, WIDTH)

figure, axes = plt.subplots(
    1, 4, figsize=(16, 3.8), layout="constrained", width_ratios=(1, 1, 0.9, 1.12)
)
places, buckets, terms, attention = axes

places.set_title("1. geometry: where the tokens are\nirpe.Grid(5, 7, prefix=1)", fontsize=10)
for y in range(HEIGHT):
    for x in range(WIDTH):
        places.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fc="#eef2f7", ec="#8a97a8"))
        places.text(x, y, f"{y},{x}", ha="center", va="center", fontsize=7, color="#445")
places.add_patch(plt.Rectangle((AT[1] - 0.5, AT[0] - 0.5), 1, 1, fill=False, ec="red", lw=2))
places.add_patch(plt.Rectangle((-0.5, -1.9), 1, 1, fc="#fbe9c8", ec="#8a97a8"))
places.text(0.7, -1.4, "prefix token: no position", va="center", fontsize=8)
places.set(xlim=(-0.7, WIDTH - 0.3), ylim=(HEIGHT - 0.3, -2.1), xticks=[], yticks=[])
places.set_aspect("equal")
places.set_frame_on(False)

plot_buckets(SPEC, grid, AT, buckets)
buckets.set_title(
    "2. buckets: pairs in one bucket share a vector\n(for the query framed in red)", fontsize=10
)
buckets.set(xticks=[], yticks=[], xlabel="", ylabel="")

used = ids[token].unique()
terms.bar(used, rows[0, 0, token, used], color="#4a6fa5")
terms.axhline(0, color="#445", lw=0.8)
terms.set_title("3. terms: dot product of the query\nwith the vector of each bucket", fontsize=10)
terms.set_xlabel("bucket")

image = attention.imshow(shares, cmap="magma", vmin=0)
attention.add_patch(plt.Rectangle((AT[1] - 0.5, AT[0] - 0.5), 1, 1, fill=False, ec="red", lw=2))
attention.set_title(
    "4. attention: softmax of q . k + terms\n(here q . k = 0 and the table is random)", fontsize=10
)
attention.set(xticks=[], yticks=[])
figure.colorbar(image, ax=attention, shrink=0.75)
figure.savefig(FILE, dpi=90)
