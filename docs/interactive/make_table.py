"""Write table.js, the learned numbers that buckets.html shows, from a trained checkpoint.

python train_cls.py --config configs/cls/digits.yaml --rpe rpe-1.9-product-bias-0-k
python docs/interactive/make_table.py RUN_FOLDER/checkpoints/last-ema.safetensors "HARDWARE"
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open

SPEC = "rpe-1.9-product-bias-0-k"
NAME = "rpe_k.lookup_table_bias"


def main(file, hardware):
    with safe_open(file, "pt") as weights:
        said = weights.metadata()
        names = sorted(name for name in weights.keys() if name.endswith(NAME))  # noqa: SIM118
        layers = [weights.get_tensor(name) for name in names]  # [H, N] each
    if said["rpe"] != SPEC:
        sys.exit(f"{file} was trained with {said['rpe']}, the page shows {SPEC}")
    made = {
        "spec": SPEC,
        "command": f"python train_cls.py --config configs/cls/digits.yaml --rpe {SPEC}",
        "hardware": hardware,
        "grid": [4, 4],
        "epoch": int(said["epoch"]),
        "accuracy": round(100 * float(said["top1"]), 2),
        "layers": [[[round(x, 4) for x in head] for head in layer.tolist()] for layer in layers],
    }
    text = json.dumps(made).replace("], ", "],\n").replace(', "', ',\n"')
    line = (
        "// Written by docs/interactive/make_table.py from a trained model; no number is made up.\n"
    )
    Path(__file__).with_name("table.js").write_text(f"{line}const TRAINED = {text};\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
