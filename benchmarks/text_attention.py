"""What the encodings of text cost on a CPU: causal attention with them over plain causal attention.

    python benchmarks/text_attention.py

One call with gradients, forward + backward, L = 1024, head dim 64, over torch's fused causal
attention in the same run; the encodings with tables also over the form that makes their bias whole
and hands it to torch's attention as a mask. Tables are drawn, gradients compared ahead of timing.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    CONTROL,
    compared,
    difference,
    interleaved,
    machine,
    quiet,
    ratio,
    save,
    table,
)
from torch import Tensor

import irpe

SPECS = {
    "rope": "rope",
    "alibi": "alibi",
    "t5": "t5",
    "shaw": "shaw,clip=64",
    "huang4": "huang4,clip=64",
}
BARS = {"rope": 1.15, "alibi": 1.2}  # over plain causal attention
MASKED_BARS = {"t5": 0.6, "shaw": 0.6}  # over their own materialised form
MASKED = ", whole"


class Cell:
    """An encoding on fixed q, k and v ``[B, H, L, D]``."""

    def __init__(self, spec: str | None, shape: tuple[int, int, int, int]) -> None:
        torch.manual_seed(0)
        _, H, L, D = shape
        self.qkv = [torch.randn(shape).requires_grad_() for _ in range(3)]
        self.grad = torch.randn(shape)
        self.holder = torch.nn.Module()
        self.where = irpe.Sequence(L)
        self.late = torch.ones(L, L, dtype=torch.bool).triu(1)
        if spec is not None:
            made = irpe.build(spec, dim=H * D, num_heads=H, head_dim=D, causal=True)
            for name, encoding in made.items():
                self.holder.add_module(name, encoding)
        for parameter in self.holder.parameters():
            torch.nn.init.normal_(parameter, std=0.1)

    def step(self) -> None:
        q, k, v = self.qkv
        encodings, scale = irpe.encodings_of(self.holder), q.shape[-1] ** -0.5
        q, k = encodings.transform(q, k, self.where)
        self._back(
            irpe.attention(q, k, v, encodings.terms(self.where), is_causal=True, scale=scale)
        )

    def materialised(self) -> None:
        """The bias of all terms made whole, hidden keys in it, as an attention mask."""
        q, k, v = self.qkv
        (B, H, L, _), scale = q.shape, q.shape[-1] ** -0.5
        bias = q.new_zeros(())
        for term in irpe.encodings_of(self.holder).terms(self.where):
            ids = term.buckets.dense(q.device)
            if term.kind == "bias":
                bias = bias + term.table[:, ids]
            elif term.kind == "query":
                rows = (q * scale) @ term.table
                bias = bias + rows.gather(-1, ids.expand(B, H, L, L))
            else:
                raise ValueError(f"no materialised form of a {term.kind} term")
        bias = bias.masked_fill(self.late, float("-inf")).expand(B, H, L, L)
        self._back(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale))

    def plain(self) -> None:
        self._back(F.scaled_dot_product_attention(*self.qkv, is_causal=True))

    def gradients(self, run: Callable[[], None]) -> dict[str, Tensor]:
        run()
        named = dict(zip("qkv", self.qkv, strict=True)) | dict(self.holder.named_parameters())
        return {name: x.grad.clone() for name, x in named.items()}

    def _back(self, out: Tensor) -> None:
        for x in (*self.qkv, *self.holder.parameters()):
            x.grad = None
        out.backward(self.grad)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="text_attention_cpu", help="of the file of results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.batch, arguments.heads, arguments.length, arguments.dim)

    made = {name: Cell(spec, shape) for name, spec in SPECS.items()}
    plain = Cell(None, shape)
    cells: dict[str, Callable[[], None]] = {"plain": plain.plain, CONTROL: plain.plain}
    for name, cell in made.items():
        cells[name] = cell.step
        if name in MASKED_BARS:
            problem = difference(cell.gradients(cell.materialised), cell.gradients(cell.step))
            if problem is not None:
                sys.exit(f"error: the gate is red, nothing is timed: {name}: {problem}")
            cells[name + MASKED] = cell.materialised
    times = interleaved(cells, arguments.rounds)

    rows: dict[str, dict[str, Any]] = compared(times, {})
    for name in MASKED_BARS:
        rows[name]["over_materialised"] = ratio(times[name], times[name + MASKED])
    figures = {
        "command": "python benchmarks/text_attention.py " + " ".join(sys.argv[1:]),
        "machine": machine(), "shape": list(shape), "rounds": arguments.rounds,
        "specs": SPECS, "bars": BARS, "bars_over_materialised": MASKED_BARS,
        "quiet": quiet(rows), "rows": rows,
    }  # fmt: skip
    report(figures)
    print("written to", save(arguments.name, figures).name)


def report(figures: dict[str, Any]) -> None:
    B, H, L, D = figures["shape"]
    print(f"causal attention, B={B} H={H} L={L} D={D}, float32, {figures['machine']}")
    table(figures["rows"], BARS)
    for name, bar in MASKED_BARS.items():
        over = figures["rows"][name]["over_materialised"]
        interval = f"{over['low']:.3f} to {over['high']:.3f}"
        print(f"{name} over its materialised form: {over['median']:.3f} ({interval}), bar {bar}")


if __name__ == "__main__":
    main()
