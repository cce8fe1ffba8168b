"""Native relative positions fused into terms, over the models' own: docs/results/native.md.

    python benchmarks/native.py
    python benchmarks/native.py --rounds 1 --quick --out DIR   # toy sizes: proves the script

SAM ViT-B's global block at 1024 pixels (64x64 patches, 12 heads), its whole encoder at batch 1,
BEiT-B and Swin-T: a forward pass, and forward + backward, by timm and after
``attach(native="fuse")``, interleaved. Peak memory is that of a process of its own for each cell.
Then calls of ``irpe.attention``: many buckets over few, few tokens over torch's attention, and the
memory at more and more tokens over plain attention.
Each row is a line of benchmarks/results/native.jsonl; rows that are there are not measured again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from measure import RESULTS, compared, interleaved, machine, peak_above, resident
from timm.models.vision_transformer_sam import Attention
from torch import nn

import irpe

ROOT = Path(__file__).parents[1]
BARS = {("block", "forward"): (1.0, None), ("block", "training"): (0.8, 0.25)}
HEAD = """# Native relative positions, fused

`python benchmarks/native.py` wrote this page: timm's models in float32, and the same models after
`irpe.attach(model, native="fuse")`, in turns; median of the ratios round by round with its 95 %
interval, and memory at the peak, above the model's own. Seconds are the processor's, of one
thread, while other programs ran beside it. {processor}, torch {torch}, {date};
`benchmarks/results/native.jsonl`. GPUs: not measured.

| | | timm, s | fused, s | fused over timm | rounds | timm, MiB | fused, MiB | bar |
|---|---|---|---|---|---|---|---|---|
"""
NAMES = {
    "block": "SAM ViT-B, a global block, 64x64 patches",
    "swin": "Swin-T, 224 pixels, batch 8",
    "beit": "BEiT-B, 224 pixels, batch 4",
    "encoder": "SAM ViT-B, the encoder, 1024 pixels, batch 1",
}
# Two ways to call attention and the most that the second may take over the first.
CALLS = {
    "buckets": ("32x32 patches, 6 heads: 63 buckets an axis over 9", 1.3),
    "tokens": ("17 tokens, 6 heads, batch 1: `k` over torch's attention", 6.0),
}
FEW, MANY = "rpe-20.0-cross-ctx-1-k,index=clip,beta=4", "rpe-20.0-cross-ctx-1-k,index=clip,beta=31"
SOME = "rpe-1.9-product-ctx-1-k"
CALLED = """
## Calls of attention

Head dim 64, float32, one thread; the seconds of the first and of the second.

| | | first, s | second, s | second over first | rounds | bar |
|---|---|---|---|---|---|---|
"""
LENGTHS = {2048: (32, 64), 4096: (64, 64), 8192: (64, 128)}
IMAGES = ("rpe-1.9-product-bias-0-k", "rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv")
GROWN = {f"{spec} {length}": (spec, length)
         for spec in (*IMAGES, "t5", "shaw,clip=64") for length in LENGTHS}  # fmt: skip
GROWTH = """
## Memory by length

Forward + backward of one call, 2 heads of 32 channels, 32x64, 64x64 and 64x128 patches or causal
attention over a text, MiB at the peak above the inputs: it grows with the number of tokens, where a
bias of all pairs would take the last column. {processor}, torch {torch}, {date}.

| encoding | tokens | plain attention, MiB | with terms, MiB | `[1, 2, L, L]`, MiB |
|---|---|---|---|---|
"""


def attend(spec: str, length: int, terms: bool) -> float:
    """MiB at the peak of a call's forward + backward, above those of its inputs."""
    causal = spec not in IMAGES
    geometry = irpe.Sequence(length) if causal else irpe.Grid(*LENGTHS[length])
    q, k, v = (torch.randn(1, 2, length, 32, requires_grad=True) for _ in range(3))
    made = irpe.build(spec, dim=64, num_heads=2, causal=causal).values()
    before = resident()
    given = sum((module.terms(geometry) for module in made), ()) if terms else ()
    irpe.attention(q, k, v, given, is_causal=causal).sum().backward()
    return peak_above(before)


def calls(what: str, train: bool, quick: bool) -> dict[str, Callable[[], object]]:
    """The two calls of ``CALLS``; 50 at a time of few tokens."""
    side, prefix = (4, 1) if what == "tokens" else (8 if quick else 32, 0)
    times = 50 if what == "tokens" else 1
    grid = irpe.Grid(side, side, prefix=prefix)
    shape = (1, 6, prefix + side**2, 64)
    q, k, v = (torch.randn(shape, requires_grad=train) for _ in range(3))

    def called(spec: str | None) -> Callable[[], object]:
        built = irpe.build(spec, dim=384, num_heads=6, prefix=prefix) if spec else {}
        terms = tuple(t for module in built.values() for t in module.terms(grid))

        def call() -> None:
            for _ in range(times):
                with torch.set_grad_enabled(train):
                    if spec:
                        y = irpe.attention(q, k, v, terms)
                    else:
                        y = F.scaled_dot_product_attention(q, k, v)
                    if train:
                        y.sum().backward()

        return call

    first, second = (None, SOME) if what == "tokens" else (FEW, MANY)
    return {"plain": called(first), "fused": called(second)}


def make(what: str, quick: bool) -> tuple[nn.Module, torch.Tensor]:
    """A model, and its input."""
    torch.manual_seed(0)
    if what == "block":
        side = 8 if quick else 64
        model: nn.Module = nn.ModuleDict(
            {"attn": Attention(768, 12, use_rel_pos=True, input_size=(side, side))}
        )
        return model, torch.randn(1, side, side, 768)
    if what == "encoder":
        size = 64 if quick else 1024
        options = {"depth": 3, "global_attn_indexes": (2,)} if quick else {}
        return timm.create_model("samvit_base_patch16", img_size=size, **options), torch.randn(
            1, 3, size, size
        )
    if what == "beit":
        options = {"depth": 2, "embed_dim": 96, "num_heads": 2} if quick else {}
        return timm.create_model("beit_base_patch16_224", **options), torch.randn(
            1 if quick else 4, 3, 224, 224
        )
    model = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0)
    return model, torch.randn(1 if quick else 8, 3, 224, 224)


def cell(what: str, train: bool, fuse: bool, quick: bool):
    """A call of the model: forward, or forward + backward."""
    model, x = make(what, quick)
    if fuse:
        irpe.attach(model, native="fuse")
    run = model["attn"] if isinstance(model, nn.ModuleDict) else model
    x.requires_grad_(train)

    def call() -> None:
        with torch.set_grad_enabled(train):
            y = run(x)
            if train:
                y.sum().backward()
                model.zero_grad()

    return call


def memory(what: str, train: bool, fuse: bool, quick: bool) -> float:
    """MiB at the peak of a call, above those of the model."""
    if what in GROWN:
        return attend(*GROWN[what], fuse)
    call, before = cell(what, train, fuse, quick), resident()
    call()
    return peak_above(before)


def measured(what: str, train: bool, quick: bool) -> dict[str, float]:
    """Peak memory of both ways, each in a process of its own."""
    found = {}
    for name, fuse in (("plain", False), ("fused", True)):
        command = [sys.executable, __file__, "--memory-of", what, str(int(train)), str(int(fuse))]
        command += ["--quick"] if quick else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = float(done.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    order = [*NAMES, *CALLS]
    parser.add_argument("--only", nargs="+", choices=order, default=order)
    parser.add_argument(
        "--kinds", nargs="+", choices=["forward", "training"], default=["forward", "training"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", action="store_true", help="memory by length as well")
    parser.add_argument("--quick", action="store_true", help="toy sizes, into --out")
    parser.add_argument("--out", type=Path, help="folder of the page; none: the repository's")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory_of:
        what, train, fuse = given.memory_of
        print(memory(what, train == "1", fuse == "1", given.quick))
        return
    if given.quick and given.out is None:
        parser.error("--quick needs --out: its numbers mean nothing")
    lines = (given.out or RESULTS) / "native.jsonl"
    rows = read(lines)
    done = {(row["what"], row["kind"]) for row in rows}
    for what in given.only:
        for kind in given.kinds:
            if (what, kind) not in done:
                rows.append(measure(what, kind, given.rounds, given.quick))
                with lines.open("a") as file:
                    print(json.dumps(rows[-1]), file=file)
    for what in GROWN if given.lengths else ():
        if (what, "memory") not in done:
            peaks = {n: {"peak_mib": mib} for n, mib in measured(what, True, False).items()}
            rows.append({"what": what, "kind": "memory", "machine": machine(), **peaks})
            with lines.open("a") as file:
                print(json.dumps(rows[-1]), file=file)
    folder = given.out or ROOT / "docs" / "results"
    (folder / "native.md").write_text(page(rows))
    print("written to", folder / "native.md")


def measure(what: str, kind: str, rounds: int, quick: bool) -> dict:
    """A row: time of both ways in turns, and the memory of each."""
    train = kind == "training"
    peaks: dict[str, float] = {}
    if what in CALLS:
        cells = calls(what, train, quick)
    else:
        peaks = measured(what, train, quick)
        cells = {name: cell(what, train, name == "fused", quick) for name in ("plain", "fused")}
    found = compared(interleaved(cells, rounds, warmup=1, clock=processor), peaks)
    print(what, kind, {n: (r["seconds"], r["ratio"], r["peak_mib"]) for n, r in found.items()})
    return {"what": what, "kind": kind, "rounds": rounds, "machine": machine(), **found}


def processor(run: Callable[[], object]) -> float:
    """Seconds of a call by the processor's clock."""
    start = time.process_time()
    run()
    return time.process_time() - start


def read(lines: Path) -> list[dict]:
    """The rows that were measured, in the order of ``NAMES``."""
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    order = [*NAMES, *CALLS, *GROWN]
    return sorted(rows, key=lambda row: order.index(row["what"]))


def page(rows: list[dict]) -> str:
    """The page of docs/results, from what was measured."""
    text = HEAD.format(**rows[0]["machine"])
    for row in (r for r in rows if r["what"] in NAMES):
        plain, fused = row["plain"], row["fused"]
        ratio, (most, memory) = fused["ratio"], BARS.get((row["what"], row["kind"]), (None, None))
        bar = "" if most is None else f"{most:.1f}"
        if memory is not None:
            bar += f", memory {memory:.2f}"
        text += (
            f"| {NAMES[row['what']]} | {row['kind']} | {plain['seconds']:.3f} "
            f"| {fused['seconds']:.3f} | {ratio['median']:.2f} "
            f"({ratio['low']:.2f} to {ratio['high']:.2f}) | {row['rounds']} "
            f"| {plain['peak_mib']:.0f} | {fused['peak_mib']:.0f} | {bar} |\n"
        )
    some = [row for row in rows if row["what"] in CALLS]
    text += CALLED if some else ""
    for row in some:
        name, most = CALLS[row["what"]]
        first, second, ratio = row["plain"], row["fused"], row["fused"]["ratio"]
        text += (
            f"| {name} | {row['kind']} | {first['seconds']:.4f} | {second['seconds']:.4f} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) "
            f"| {row['rounds']} | {most:.1f} |\n"
        )
    lengths = [row for row in rows if row["kind"] == "memory"]
    text += GROWTH.format(**lengths[-1]["machine"]) if lengths else ""
    for row in lengths:
        (spec, length), pairs = GROWN[row["what"]], 8 * GROWN[row["what"]][1] ** 2 / 2**20
        plain, fused = row["plain"]["peak_mib"], row["fused"]["peak_mib"]
        text += f"| `{spec}` | {length} | {plain:.0f} | {fused:.0f} | {pairs:.0f} |\n"
    return text


if __name__ == "__main__":
    main()
