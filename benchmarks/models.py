"""What an encoding costs a DeiT: a training step's time and memory over the plain timm model.

    python benchmarks/models.py                    # a GPU: DeiT-S and -B, batch 256 and 64, bf16
    python benchmarks/models.py --way eager compiled graph
    python benchmarks/models.py --device cpu       # DeiT-S, batch 8, 224 px, float32, 2 threads
    python benchmarks/models.py --original DIR     # also the original's irpe.py, loaded from DIR
    python benchmarks/models.py --encoder          # DETR's encoder instead: encoder.py

Gates on correctness, then times forward + backward of all models interleaved, by the clock on the
wall, and measures peak memory: on a CPU each model in a process of its own. Ratios are taken round
by round; "plain again" is the plain model timed as if it were another, and must read 0.98 to 1.02.
"""

import argparse
import functools
import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import encoder
import torch
from measure import (
    CONTROL,
    compared,
    gpu_peak,
    interleaved,
    machine,
    peak_above,
    quiet,
    reason,
    resident,
    save,
    suffix,
    table,
)
from ways import WAYS, stepped

import irpe

if "--encoder" not in sys.argv:  # which does without timm
    from deit import SPEC, build, gate, stepper

BARS = {"k": 1.06, "qk": 1.12, "qkv": 1.20}  # on a CPU
MEMORY_BAR = 1.3
VALUE_BAR_MIB = 100.0
MODELS = {"cpu": ["deit_small_patch16_224"]}
MODELS["cuda"] = [*MODELS["cpu"], "deit_base_patch16_224"]
BATCHES = {"cpu": [8], "cuda": [256, 64]}  # the largest first: small ones show Python's time


def memory(name: str, arguments: argparse.Namespace) -> float:
    """MiB that a model and its training step take at their peak, in a process of their own."""
    command = [sys.executable, __file__, "--device", "cpu", "--memory-of", name]
    command += ["--model", arguments.model[0], "--batch", str(arguments.batch[0])]
    command += ["--size", str(arguments.size)]
    if arguments.original is not None:
        command += ["--original", str(arguments.original)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(name: str, arguments: argparse.Namespace) -> float:
    before = resident()
    if name.startswith("attention"):
        length, heads, dim = 1024, 6, 64
        q, k, v = (torch.randn(1, heads, length, dim, requires_grad=True) for _ in range(3))
        terms: tuple[irpe.Term, ...] = ()
        if name.endswith(" v"):
            spec = SPEC.format(on="v")
            rpe_v = irpe.build_rpe(spec, head_dim=dim, num_heads=heads, prefix=0)[2]
            terms = rpe_v.terms(irpe.Grid(32, 32))
        for _ in range(2):
            irpe.attention(q, k, v, terms, backend="eager").sum().backward()
    else:
        net = build(name, arguments.model[0], arguments.original)
        step = stepper(net, arguments.batch[0], arguments.size)
        for _ in range(2):
            step()
    return peak_above(before)


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=here)
    parser.add_argument("--model", nargs="+", help="timm ViTs")
    parser.add_argument("--batch", type=int, nargs="+", help="images a step")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, 15 or more")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--original", type=Path, help="folder with the original's irpe.py")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast: always on a GPU")
    parser.add_argument("--backend", default="auto", help="of irpe.attention, with autocast")
    parser.add_argument(
        "--way", nargs="+", choices=WAYS, default=["eager"], help="with autocast: how a step is run"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="on a GPU: for everything")
    parser.add_argument("--name", help="name of the result file; models_<gpu> or models_cpu")
    parser.add_argument("--encoder", action="store_true", help="DETR's encoder, see encoder.py")
    parser.add_argument("--grid", nargs="+", default=encoder.GRIDS, help="of the encoder's tokens")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and here != "cuda":
        parser.error("there is no GPU")
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if arguments.encoder:
        arguments.amp = arguments.amp or device == "cuda"
        arguments.name = arguments.name or f"models_encoder_{suffix(device)}"
        if arguments.memory_of:
            print(encoder.peak(arguments))
        else:
            encoder.run(arguments, begun + 60 * arguments.minutes)
        return
    arguments.model = arguments.model or MODELS[device]
    arguments.batch = arguments.batch or BATCHES[device]
    arguments.name = arguments.name or f"models_{suffix(device)}"
    amp = arguments.amp or device == "cuda"
    if not amp and len(arguments.model) * len(arguments.batch) > 1:
        parser.error("on a CPU: one model and one batch a run")
    if arguments.memory_of:
        print(peak(arguments.memory_of, arguments))
        return
    given = (device, amp, arguments.backend) if amp else ()
    problem = gate(arguments.model[0], arguments.size, *given)
    if problem is not None:
        sys.exit(f"error: the gate is red, nothing is timed: {problem}")
    if amp:
        several(arguments, begun + 60 * arguments.minutes)
    else:
        on_cpu(arguments)


def on_cpu(arguments: argparse.Namespace) -> None:
    """One model, float32, against the bars."""
    (model,), (batch,) = arguments.model, arguments.batch
    names = ["plain", *BARS]
    if arguments.original is not None:
        names += [f"original {on}" for on in BARS]
    nets = {name: build(name, model, arguments.original) for name in names}
    cells = {name: stepper(net, batch, arguments.size) for name, net in nets.items()}
    cells[CONTROL] = cells["plain"]
    times = interleaved(cells, arguments.rounds)
    rows = compared(times, {name: memory(name, arguments) for name in names})
    value = memory("attention v", arguments) - memory("attention", arguments)
    figures = {
        "command": "python benchmarks/models.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "model": model,
        "batch": batch,
        "size": arguments.size,
        "rounds": arguments.rounds,
        "quiet": quiet(rows),
        "rows": rows,
        "value_term_mib": value,
    }
    report(figures)
    print("written to", save(arguments.name, figures).name)


def several(arguments: argparse.Namespace, until: float) -> None:
    """Every model at every batch, in every way, under autocast, as many as there is time for."""
    cases = list(itertools.product(arguments.batch, arguments.model, arguments.way))
    figures: dict[str, Any] = {
        "command": "python benchmarks/models.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "autocast": "bfloat16",
        "backend": arguments.backend,
        "size": arguments.size,
        "rounds": arguments.rounds,
        "cases": [],
        "left_out": [f"{model}, batch {batch}, {way}" for batch, model, way in cases],
    }
    print(figures["machine"])
    longest = 0.0
    for batch, model, way in cases:
        start = time.monotonic()
        if until - start < longest:
            break
        case = {"model": model, "batch": batch, "way": way, **one(model, batch, way, arguments)}
        figures["cases"].append(case)
        figures["left_out"].pop(0)
        print(f"{model}, batch {batch}, {way}, {arguments.size} px, bfloat16 autocast")
        table(case["rows"])
        save(arguments.name, figures)
        longest = max(longest, time.monotonic() - start)
    for text in figures["left_out"]:
        print("no time left:", text)
    print("written to", save(arguments.name, figures).name)


def one(model: str, batch: int, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of a model at a batch in one way; what cannot run has its reason in its row."""
    device, cells, peaks, cannot = arguments.device, {}, {}, {}
    names = ["plain", *BARS]
    if arguments.original is not None:
        names += [f"original {on}" for on in BARS]
    for name in names:
        try:
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            net = build(name, model, arguments.original, arguments.backend).to(device)
            make = functools.partial(
                stepper, batch=batch, size=arguments.size, device=device, amp=True
            )
            step = stepped(way, net, make)
            step()
            peaks[name] = gpu_peak(step, before) if device == "cuda" else None
            cells[name] = step
        except Exception as error:
            if name == "plain":
                return {"quiet": False, "rows": {name: {"cannot": reason(error)}}}
            cannot[name] = {"cannot": reason(error)}
        net = make = step = None  # what failed is not held
    cells[CONTROL] = cells["plain"]
    try:
        rows = compared(interleaved(cells, arguments.rounds), peaks)
    except Exception as error:
        return {"quiet": False, "rows": cannot | {"timing": {"cannot": reason(error)}}}
    return {"quiet": quiet(rows), "rows": rows | cannot}


def report(figures: dict) -> None:
    rows = figures["rows"]
    print(
        f"{figures['model']}, batch {figures['batch']}, {figures['size']} px, {figures['machine']}"
    )
    table(rows, BARS)
    share = rows["qkv"]["peak_mib"] / rows["plain"]["peak_mib"]
    print(f"peak memory of qkv over plain: {share:.2f} (bar {MEMORY_BAR})")
    print(
        f"value term alone, B=1 H=6 L=1024 D=64: {figures['value_term_mib']:.0f} MiB more "
        f"(bar {VALUE_BAR_MIB:.0f})"
    )


if __name__ == "__main__":
    main()
