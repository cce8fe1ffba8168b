"""The command under test, on a network and a data set that train in a second."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TINY = [
    "--model.name=vit_tiny_patch16_224",
    "--model.img_size=8",
    "--model.in_chans=1",
    "--model.kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
    "--data.workers=0",
    "--epochs=2",
    "--batch_size=256",
    "--eval_batch_size=360",
    "--sched.warmup_epochs=0",
    "--optim.lr=0.003",
    "--run.progress=none",
    "--run.threads=1",
]
