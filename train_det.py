"""Train or evaluate DETR, with or without relative position encoding in its encoder.

    python train_det.py --config configs/det/digits.yaml
    python train_det.py --config configs/det/detr_r50_k_150.yaml --coco_path /data/coco
    python train_det.py --config FILE --eval-only --checkpoint weights.pth
    python train_det.py --config FILE --data.name coco --coco_path DIR --checkpoint detr.pth

A checkpoint may have other classes, another image size or another encoding: the run prints the
loaded tensors. `--help` lists all options. For several processes use `accelerate launch` or
`torchrun` instead of `python`.
"""

import sys

from training.det.detect import open_task
from training.det.options import DetConfig
from training.run import main_of

main = main_of(DetConfig, open_task, "train_det.py")

if __name__ == "__main__":
    sys.exit(main())
