"""Train or evaluate a model of text, with any position encoding.

    python train_lm.py --config configs/lm/stdlib.yaml
    python train_lm.py --config configs/lm/stdlib.yaml --data.name files --data.root book.txt
    python train_lm.py --config FILE --eval-only --checkpoint weights.safetensors

`--help` lists every option. Several processes: put `accelerate launch` or `torchrun` in front.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training import config as configuration
from training.errors import script
from training.lm import excerpt_run, question_run
from training.lm import run as lm_run
from training.lm.options import LmConfig

RUNS = {"language": lm_run, "excerpts": excerpt_run, "questions": question_run}


@script
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, then evaluate or train."""
    config = configuration.parse(LmConfig, argv, "train_lm.py")
    task = RUNS[config.task]
    if config.eval_only:
        task.evaluate(config)
    else:
        task.train(config)


if __name__ == "__main__":
    sys.exit(main())
