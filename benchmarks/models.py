"""What an encoding costs a DeiT: a training step's time and memory over the plain timm model.

    python benchmarks/models.py                    # DeiT-S, batch 8, 224 px, float32, 2 threads
    python benchmarks/models.py --original DIR     # also the original's irpe.py, loaded from DIR

Gates on correctness, then times forward + backward of all models interleaved, then measures peak
memory, each model in a process of its own. Ratios are taken round by round; "plain again" is the
plain model timed as if it were another, and must read 0.98 to 1.02.
"""

import argparse
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from measure import CONTROL, interleaved, machine, peak_above, ratio, resident, save
from torch import Tensor, nn

import irpe

SPEC = "rpe-1.9-product-ctx-1-{on}"
BARS = {"k": 1.06, "qk": 1.12, "qkv": 1.20}
MEMORY_BAR = 1.3
VALUE_BAR_MIB = 100.0


class OriginalAttention(nn.Module):
    """timm's attention calling the original's modules, as its own DeiT calls them."""

    def __init__(self, host: nn.Module, original: types.ModuleType, on: str) -> None:
        super().__init__()
        self.qkv, self.proj = host.qkv, host.proj
        self.num_heads, self.scale = host.num_heads, host.scale
        config = original.get_rpe_config(
            ratio=1.9, method="product", mode="ctx", shared_head=True, skip=1, rpe_on=on
        )
        modules = original.build_rpe(config, head_dim=host.head_dim, num_heads=host.num_heads)
        self.rpe_q, self.rpe_k, self.rpe_v = modules

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        B, L, C = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * self.scale
        logits = q @ k.transpose(-2, -1)
        if self.rpe_k is not None:
            logits = logits + self.rpe_k(q)
        if self.rpe_q is not None:
            logits = logits + self.rpe_q(k * self.scale).transpose(2, 3)
        probabilities = logits.softmax(-1)
        out = probabilities @ v
        if self.rpe_v is not None:
            out = out + self.rpe_v(probabilities)
        return self.proj(out.transpose(1, 2).reshape(B, L, C))


def load_original(folder: Path) -> types.ModuleType:
    """The original's irpe.py, from a checkout of it; it wants easydict for one dict."""
    if "easydict" not in sys.modules and importlib.util.find_spec("easydict") is None:
        stand_in = types.ModuleType("easydict")
        stand_in.EasyDict = type(  # type: ignore[attr-defined]
            "EasyDict", (dict,), {"__getattr__": dict.get, "__setattr__": dict.__setitem__}
        )
        sys.modules["easydict"] = stand_in
    path = folder / "irpe.py"
    if not path.is_file():
        sys.exit(f"error: --original {folder}: there is no irpe.py in it")
    module_spec = importlib.util.spec_from_file_location("original_irpe", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def build(name: str, model: str, original: Path | None) -> nn.Module:
    """A model by the name of its cell: plain, k, qk, qkv, original k, ..."""
    torch.manual_seed(0)
    net = timm.create_model(model)
    if name.startswith("original "):
        source = load_original(original)
        for block in net.blocks:
            block.attn = OriginalAttention(block.attn, source, name.split()[1])
    elif name != "plain":
        irpe.attach(net, SPEC.format(on=name))
    return net


def stepper(net: nn.Module, batch: int, size: int) -> Callable[[], Tensor]:
    """Forward + backward on fixed images; returns the sum of the logits."""
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))

    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        total = net(image).sum()
        total.backward()
        return total.detach()

    return step


def gate(model: str, size: int) -> None:
    """Fast backends against the reference, outputs and gradients, with tables that are not zero."""
    grads = {}
    for backend in ("reference", "auto"):
        torch.manual_seed(0)
        net = timm.create_model(model, depth=2)
        irpe.attach(net, SPEC.format(on="qkv"), backend=backend)
        for name, parameter in net.named_parameters():
            if "lookup_table" in name:
                nn.init.normal_(parameter, std=0.2)
        stepper(net, 1, size)()
        grads[backend] = {name: p.grad for name, p in net.named_parameters()}
    # Relative to the parameter's kind: a class token's own last table has a gradient of zero.
    largest: dict[str, float] = {}
    for name, expected in grads["reference"].items():
        kind = name.split(".")[-1]
        largest[kind] = max(largest.get(kind, 0.0), float(expected.abs().max()))
    for name, expected in grads["reference"].items():
        error = (grads["auto"][name] - expected).abs().max() / largest[name.split(".")[-1]]
        if error > 1e-4:
            sys.exit(f"error: the gate is red, nothing is timed: {name} is off by {error:.1e}")


def memory(name: str, arguments: argparse.Namespace) -> float:
    """MiB that a model and its training step take at their peak, in a process of their own."""
    command = [sys.executable, __file__, "--memory-of", name, "--model", arguments.model]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size)]
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
            rpe_v = irpe.build_rpe(spec, head_dim=dim, num_heads=heads, prefix=False)[2]
            terms = rpe_v.terms(irpe.Grid(32, 32))
        for _ in range(2):
            irpe.attention(q, k, v, terms, backend="eager").sum().backward()
    else:
        step = stepper(
            build(name, arguments.model, arguments.original), arguments.batch, arguments.size
        )
        for _ in range(2):
            step()
    return peak_above(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm ViT")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, 15 or more")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--original", type=Path, help="folder with the original's irpe.py")
    parser.add_argument("--name", default="models_cpu", help="name of the result file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(peak(arguments.memory_of, arguments))
        return

    gate(arguments.model, arguments.size)
    names = ["plain", *BARS]
    if arguments.original is not None:
        names += [f"original {on}" for on in BARS]
    nets = {name: build(name, arguments.model, arguments.original) for name in names}
    cells = {name: stepper(net, arguments.batch, arguments.size) for name, net in nets.items()}
    cells[CONTROL] = cells["plain"]
    times = interleaved(cells, arguments.rounds)
    base = times["plain"]
    peaks = {name: memory(name, arguments) for name in names}
    rows = {
        name: {
            "seconds": sorted(seconds)[len(seconds) // 2],
            "ratio": ratio(seconds, base),
            "peak_mib": peaks.get(name),
        }
        for name, seconds in times.items()
    }
    value = memory("attention v", arguments) - memory("attention", arguments)
    control = rows[CONTROL]["ratio"]["median"]
    figures = {
        "command": "python benchmarks/models.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "model": arguments.model,
        "batch": arguments.batch,
        "size": arguments.size,
        "rounds": arguments.rounds,
        "quiet": 0.98 <= control <= 1.02,
        "rows": rows,
        "value_term_mib": value,
    }
    report(figures)
    print("written to", save(arguments.name, figures).name)


def report(figures: dict) -> None:
    rows = figures["rows"]
    print(
        f"{figures['model']}, batch {figures['batch']}, {figures['size']} px, {figures['machine']}"
    )
    print(f"{'':14}{'s a step':>9}{'over plain':>12}{'95 % interval':>17}{'bar':>6}{'MiB':>7}")
    for name, row in rows.items():
        r = row["ratio"]
        bar = f"{BARS[name]:.2f}" if name in BARS else ""
        mib = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        interval = f"{r['low']:.3f} - {r['high']:.3f}"
        print(f"{name:14}{row['seconds']:9.3f}{r['median']:12.3f}{interval:>17}{bar:>6}{mib:>7}")
    share = rows["qkv"]["peak_mib"] / rows["plain"]["peak_mib"]
    print(f"peak memory of qkv over plain: {share:.2f} (bar {MEMORY_BAR})")
    print(
        f"value term alone, B=1 H=6 L=1024 D=64: {figures['value_term_mib']:.0f} MiB more ", end=""
    )
    print(f"(bar {VALUE_BAR_MIB:.0f})")
    if not figures["quiet"]:
        print("the machine is too noisy: plain against plain does not read 0.98 to 1.02")


if __name__ == "__main__":
    main()
