"""Train or evaluate DETR, with or without relative position encoding in its encoder.

    python train_det.py --config configs/det/digits.yaml
    python train_det.py --config configs/det/detr_r50_k_150.yaml --coco_path /data/coco
    python train_det.py --config FILE --eval-only --checkpoint weights.pth

`--help` lists every option. Several processes: put `accelerate launch` or `torchrun` in front.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training import config as configuration
from training.det.options import DetConfig
from training.det.run import evaluate, train
from training.errors import script


@script
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, then evaluate or train."""
    config = configuration.parse(DetConfig, argv, "train_det.py")
    if config.eval_only:
        evaluate(config)
    else:
        train(config)


if __name__ == "__main__":
    sys.exit(main())
