"""train_lm.py on a network and a text that train in a second."""

TINY_TASK = [
    "--data.name=files",
    "--model.dim=16",
    "--model.depth=2",
    "--model.num_heads=2",
    "--epochs=4",
    "--eval_batch_size=4",
    "--sched.warmup_epochs=0",
    "--optim.lr=0.01",
    "--run.progress=none",
    "--run.threads=1",
]
TINY = [
    *TINY_TASK,
    "--steps_per_epoch=3",
    "--budget=128",
    "--stages=[{length: 16}]",
    "--eval_tokens=300",
    "--sample=20",
]
STAGED = "--stages=[{length: 8, until: 5}, {length: 16}]"
