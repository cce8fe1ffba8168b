"""What the kernels compile to, without a GPU: registers, spills, instructions per score.

    python benchmarks/variants.py --name variants    # all that a GPU can be given, some minutes
    python benchmarks/variants.py --sample           # each kernel, on strips and from maps
    python benchmarks/variants.py --arch 80

Calls the launcher with small tensors and takes down what it would launch; compiles that for the
architecture with the divisibility a launch would find, and reads the machine code. Instructions
per score are those of the innermost loop over pairs (of all the code without a loop), times 32
lanes and the warps, over the pairs of a tile. For ``irpe.lookup`` dim is the number of buckets.
Exit code 1 if a variant that ``auto`` can pick spills, all but float32 attention, or takes more
shared memory than a program of that architecture may.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import irpe
from irpe.backends.call import Call
from irpe.backends.triton import attention, launch, lookup

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESULTS = Path(__file__).parent / "results"
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
SHARED = {80: 163, 90: 227, 100: 227}  # KiB that a program may take; 99 on others
MODES = {
    "plain": None,
    "bias": "rpe-1.9-product-bias-0-k",
    "k": "rpe-1.9-product-ctx-1-k",
    "qk": "rpe-1.9-product-ctx-1-qk",
    "qkv": "rpe-1.9-product-ctx-1-qkv",
    # Nine column buckets.
    "k wide": "rpe-2.0-product-ctx-1-k",
    "qkv wide": "rpe-2.0-product-ctx-1-qkv",
    # Tokens that fill no grid: their buckets come from maps.
    "bias map": "rpe-1.9-product-bias-0-k",
    "k map": "rpe-1.9-product-ctx-1-k",
    "qk map": "rpe-1.9-product-ctx-1-qk",
    "qkv map": "rpe-1.9-product-ctx-1-qkv",
    "cross qkv map": "rpe-1.9-cross-ctx-1-qkv",
    "lookup": None,
}
# Words after a mode.
OPTIONS = ("causal", "padding", "mask", "bias-mask", "dropout", "deterministic")


def launches(mode: str, dtype: torch.dtype, dim: int, arch: int) -> list[tuple]:
    """(name, kernel, arguments) of all launches of a forward and backward pass."""
    if mode == "lookup":
        return lookup_launches(dtype, dim)
    words = mode.split()
    options = [word for word in words if word in OPTIONS]
    mode = " ".join(word for word in words if word not in OPTIONS)
    grid = irpe.Grid(16, 16, prefix=0)
    if mode.endswith("map"):
        grid = grid.select(torch.arange(256))
    q, k, v = (torch.zeros(2, 2, 256, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    terms: tuple[irpe.Term, ...] = ()
    if MODES[mode] is not None:
        modules = irpe.build_rpe(MODES[mode], head_dim=dim, num_heads=2, prefix=0, dtype=dtype)
        terms = sum((m.terms(grid) for m in modules if m is not None), ())
    mask = None
    if "padding" in options:
        mask = torch.ones(2, 1, 1, 256, dtype=torch.uint8).expand(2, 2, 256, 256)
    elif "mask" in options:
        mask = torch.ones(2, 1, 256, 256, dtype=torch.uint8).expand(2, 2, 256, 256)
    elif "bias-mask" in options:
        mask = torch.zeros(2, 2, 256, 256, dtype=dtype)
    noted = []

    def note(step: launch.Step, tensors: dict[str, torch.Tensor | None]) -> None:
        q = tensors["q"]  # a launch takes it for a missing one
        own = {name: q if tensors[name] is None else tensors[name] for _, name in step.places}
        noted.append((step.name, step.kernel, own | step.given))

    real = launch.launch, launch._capability
    launch.launch, launch._capability = note, lambda device: arch
    irpe.clear_cache()
    torch.use_deterministic_algorithms("deterministic" in options)
    p = 0.1 * ("dropout" in options)
    try:
        call = Call(q, k, v, terms, mask, "causal" in options, p, dim**-0.5, q.device)
        attention(call).sum().backward()
    finally:
        launch.launch, launch._capability = real
        torch.use_deterministic_algorithms(False)
    return noted


def lookup_launches(dtype: torch.dtype, size: int) -> list[tuple]:
    """The launches of ``irpe.lookup``, for ids that all rows share and for those of each sample."""
    from irpe.backends.triton import lookup_kernels

    noted = []

    def note(name: str, programs: int, **given: Any) -> None:
        noted.append((name, getattr(lookup_kernels, name), given))

    real, lookup._start = lookup._start, note
    try:
        for ids in (torch.zeros(16, 16).long(), torch.zeros(16, 16, 16).to(torch.uint8)):
            x = torch.zeros(16, 8, 16, size, dtype=dtype, requires_grad=True)
            lookup.lookup(x, ids).backward(torch.zeros(16, 8, 16, 16, dtype=dtype))
    finally:
        lookup._start = real
    return noted


def source(kernel: Any, given: dict[str, Any]) -> tuple[ASTSource, dict[str, int]]:
    """A kernel as a launch with such arguments would specialise it; and the launch's options."""
    signature, constants, attributes = {}, {}, {}
    options = {x: given[x] for x in ("num_warps", "num_stages", "maxnreg") if x in given}
    for at, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[(at,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name] = "constexpr"
            constants[(at,)] = 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def measure(kernel: Any, given: dict[str, Any], arch: int) -> dict[str, Any]:
    """Registers, stack, shared memory and instructions per score of one launch."""
    made, options = source(kernel, given)
    compiled = triton.compile(made, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    registers, stack, _, local = (int(n) for n in found.groups())
    loop = innermost_loop(code, "" if kernel.fn.__name__.startswith("lookup") else "MUFU.EX2")
    tile = {name: given.get(name, 0) for name in ("BM", "BN")}
    scores = tile["BM"] * tile["BN"]
    if not scores:  # kernels of tables have no pairs
        loop, scores = [], 1
    lanes = 32 * given["num_warps"]
    return {
        **tile, **{x: n for x, n in options.items() if x != "maxnreg"}, "registers": registers,
        "spills": max(stack, local), "shared_kib": round(compiled.metadata.shared / 1024),
        "instructions": round(len(loop) * lanes / scores, 1),
        "local_in_loop": sum("LDL" in line or "STL" in line for line in loop),
        "exponentials": round(sum("MUFU.EX2" in line for line in loop) * lanes / scores, 2),
    }  # fmt: skip


def innermost_loop(code: str, mark: str) -> list[str]:
    """Instructions of the longest innermost loop with a mark in it; without any, all of them."""
    lines = [line.strip() for line in code.splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    loops = []
    for at, line in enumerate(lines):
        jump = re.search(r"BRA[^`]*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], at) < at:
            body = [x for x in lines[labels[jump[1]] : at + 1] if x.startswith("/*")]
            if len(body) > 1 and any(mark in x for x in body):
                loops.append(body)
    inner = [b for b in loops if not any(len(o) < len(b) and o[0] in b for o in loops)]
    return max(inner, key=len, default=[x for x in lines if x.startswith("/*")])


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def cases(sample: bool) -> Iterator[tuple[str, torch.dtype, int]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if sample:
        yield "qk", bf16, 64
        yield "qkv map", bf16, 64
        yield "lookup", bf16, 50
        return
    yield from itertools.product([m for m in MODES if m != "lookup"], (bf16,), (64,))
    yield from itertools.product(("k", "qk", "qkv", "qkv map"), (bf16,), (32,))
    yield from itertools.product(("k", "qkv"), (bf16,), (16, 96))
    yield from itertools.product(("bias", "qkv"), (fp16,), (64,))
    yield from itertools.product(("k", "qk", "qkv", "k map", "cross qkv map"), (fp16,), (128,))
    yield from itertools.product(("k map", "cross qkv map"), (fp32,), (64,))
    yield from itertools.product(("lookup",), (bf16, fp16, fp32), (15, 30, 50, 130))
    given = (*OPTIONS, "padding dropout", "bias-mask dropout deterministic")
    for mode, options in itertools.product(("bias", "k", "qk", "qkv"), given):
        yield f"{mode} {options}", bf16, 64
    for mode in ("k", "qk", "qkv"):  # DETR
        yield f"{mode} padding dropout", bf16, 32
    for mode in ("k", "qkv"):
        yield f"{mode} bias-mask dropout", bf16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    every = sorted({mode for mode, *_ in cases(False)})
    parser.add_argument(
        "--arch", type=int, nargs="*", default=[80, 86, 90, 100, 120],
        help="compute capabilities, times 10",
    )  # fmt: skip
    parser.add_argument("--sample", action="store_true", help="each kernel once or twice")
    parser.add_argument(
        "--mode", choices=every, nargs="*", metavar="MODE", help=f"only {', '.join(every)}"
    )
    parser.add_argument("--name", help="of a file in results/, to store the results in")
    arguments = parser.parse_args()
    work = []
    for mode, dtype, dim in cases(arguments.sample):
        if arguments.mode and mode not in arguments.mode:
            continue
        for arch in arguments.arch:
            for name, kernel, given in launches(mode, dtype, dim, arch):
                # Kernels that see no pairs know no options.
                if "BN" in given or not set(mode.split()) & set(OPTIONS):
                    work.append((mode, dtype, dim, name, kernel, given, arch))
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda w: report(*w), work):
            rows.append(row)
            print(" ".join(f"{x!s:>11}" for x in row.values()), flush=True)
    figures = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    if arguments.name:
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(figures, indent=0) + "\n")
    picked = [row for row in rows if row["dtype"] != "float32" or row["mode"] == "lookup"]
    spilling = [row for row in picked if row["spills"]]
    print(f"{len(spilling)} of {len(picked)} variants that auto can pick spill")
    large = [row for row in picked if row["shared_kib"] > SHARED.get(row["arch"], 99)]
    print(f"{len(large)} take too much shared memory")
    if spilling or large:
        sys.exit(1)


def report(
    mode: str, dtype: torch.dtype, dim: int, name: str, kernel: Any, given: dict, arch: int
) -> dict[str, Any]:
    head = {"mode": mode, "dtype": str(dtype).removeprefix("torch."), "dim": dim, "kernel": name}
    return {**head, "arch": arch, **measure(kernel, given, arch)}


if __name__ == "__main__":
    main()
