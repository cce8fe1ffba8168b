"""Train or evaluate an image classifier, with or without relative position encoding.

    python train_cls.py --config configs/cls/digits.yaml
    python train_cls.py --config configs/cls/deit_small_k.yaml --data.root /data/imagenet
    python train_cls.py --config FILE --eval-only --checkpoint weights.pth

`--help` lists every option. Several processes: put `accelerate launch` or `torchrun` in front.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training import config as configuration
from training.cls.options import ClsConfig
from training.cls.run import evaluate, train
from training.errors import script


@script
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, then evaluate or train."""
    config = configuration.parse(ClsConfig, argv, "train_cls.py")
    if config.eval_only:
        evaluate(config)
    else:
        train(config)


if __name__ == "__main__":
    sys.exit(main())
