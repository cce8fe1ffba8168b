"""Train or evaluate an image classifier, with or without relative position encoding.

    python train_cls.py --config configs/cls/digits.yaml
    python train_cls.py --config configs/cls/deit_small_k.yaml --data.root /data/imagenet
    python train_cls.py --config FILE --eval-only --checkpoint weights.pth
    python train_cls.py --config FILE --data.name folder --data.root DIR --checkpoint plain.pth \\
        --rpe rpe-1.9-product-ctx-1-k

A checkpoint may have other classes, another image size or another encoding: the run prints the
loaded tensors. `--help` lists all options. For several processes use `accelerate launch` or
`torchrun` instead of `python`.
"""

import sys

from training.cls.options import ClsConfig
from training.cls.run import open_task
from training.run import main_of

main = main_of(ClsConfig, open_task, "train_cls.py")

if __name__ == "__main__":
    sys.exit(main())
