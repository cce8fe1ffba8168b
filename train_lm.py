"""Train or evaluate a model of text, with any position encoding.

    python train_lm.py --config configs/lm/stdlib.yaml
    python train_lm.py --config configs/lm/stdlib.yaml --data.name files --data.root book.txt
    python train_lm.py --config FILE --eval-only --checkpoint weights.safetensors

`--help` lists all options. For several processes use `accelerate launch` or `torchrun` instead of
`python`.
"""

import sys

from training.lm.options import LmConfig
from training.lm.run import open_task
from training.run import main_of

main = main_of(LmConfig, open_task, "train_lm.py")

if __name__ == "__main__":
    sys.exit(main())
