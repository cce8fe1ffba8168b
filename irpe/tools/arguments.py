"""What one may type after ``irpe``: the subcommands, their options and an example of each."""

import argparse
import sys
from typing import NoReturn

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_RPE = "rpe-1.9-product-ctx-1-k"


class _Parser(argparse.ArgumentParser):
    """Wrong arguments end in one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}; see: {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command; ``command`` in its result names a module of commands/."""
    top = _Parser(
        prog="irpe",
        description="Look at relative position encodings, and at models that carry them.",
        epilog="irpe COMMAND --help says more, with an example.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, what: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    add("specs", "list every encoding: its string and its formula", "irpe specs")

    one = add(
        "buckets",
        "which bucket each key falls into, seen from one query",
        f"irpe buckets {_RPE} --grid 14x14 --at 7,7 --out buckets.png",
    )
    one.add_argument("spec", help=f"the encoding, as {_RPE} or t5,buckets=32,max=128")
    _grid(one, "14x14")
    one.add_argument("--at", type=place, metavar="ROW,COL", help="the query; default: the middle")
    one.add_argument(
        "--length", type=count, default=64, help="tokens, for encodings of texts (default 64)"
    )
    _out(one)

    one = add(
        "explain",
        "which backend auto takes for a call of attention, and why",
        f"irpe explain {_RPE} --device cuda --dtype bfloat16",
    )
    one.add_argument("rpe", metavar="SPEC", nargs="?", help="the encoding; none: plain attention")
    one.add_argument(
        "--shape", type=shape, default=(1, 6, 197, 64), metavar="B,H,L,D",
        help="batch, heads, tokens, channels of a head (default 1,6,197,64)",
    )  # fmt: skip
    _grid(one, None)
    one.add_argument("--prefix", type=int, default=1, help="class tokens and registers (default 1)")
    one.add_argument(
        "--dtype", choices=_DTYPES, default=_DTYPES[0], metavar="DTYPE", help=", ".join(_DTYPES)
    )
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="need not be here")
    one.add_argument("--causal", action="store_true", help="no query sees a later key")
    one.add_argument("--compile", action="store_true", help="inside torch.compile")

    one = add(
        "cost",
        "parameters, multiply-adds and memory of a model, plain and with an encoding",
        f"irpe cost deit_small_patch16_224 --rpe {_RPE} --size 224",
    )
    one.add_argument("model", help="a name of timm's")
    one.add_argument("--rpe", metavar="SPEC", help="the encoding; a published name has one")
    _size(one)

    one = add(
        "tables",
        "the learned tables of a checkpoint, by layer and head, over offsets",
        f"irpe tables model.safetensors --rpe {_RPE} --out tables.png",
    )
    one.add_argument("checkpoint", metavar="CKPT", help="a .safetensors, .pth, .pt or .bin file")
    one.add_argument("--rpe", metavar="SPEC", help="the encoding, where the file does not say it")
    _grid(one, None, "that of a square pos_embed in the file, else 14x14")
    _out(one)

    one = add(
        "attention",
        "where a query patch looks, by head, and what the encoding adds",
        "irpe attention deit_small_patch16_224 cat.jpg --pretrained --out attention.png",
    )
    one.add_argument("model", help="a name of timm's, or a published one")
    one.add_argument("image", help="a picture")
    one.add_argument("--rpe", metavar="SPEC", help="the encoding to attach")
    one.add_argument("--checkpoint", metavar="FILE", help="weights; else they are random")
    one.add_argument("--pretrained", action="store_true", help="timm fetches trained weights")
    one.add_argument("--layer", type=count, help="counted from 1; default: the last")
    one.add_argument("--at", type=place, metavar="ROW,COL", help="the query; default: the middle")
    _size(one)
    _out(one)

    one = add(
        "convert",
        "turn a torch checkpoint into safetensors, or back, by the names of the files",
        "irpe convert released.pth model.safetensors",
    )
    one.add_argument("source", metavar="IN", help="a .pth, .pt, .bin or .safetensors file")
    one.add_argument("target", metavar="OUT", help="the file to write; must not exist")
    return top


def _grid(one: argparse.ArgumentParser, default: str | None, otherwise: str = "") -> None:
    told = default or otherwise
    one.add_argument(
        "--grid",
        type=size,
        default=None if default is None else size(default),
        metavar="HxW",
        help="rows x columns of patches" + (f" (default {told})" if told else ""),
    )


def _out(one: argparse.ArgumentParser) -> None:
    one.add_argument("--out", metavar="FILE", help="draw a picture: .png, .svg or .pdf")


def _size(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--size", type=pixels, metavar="N|HxW", help="pixels of the image; default: the model's"
    )


def pixels(text: str) -> tuple[int, int]:
    """``"224"`` as (224, 224), ``"224x160"`` as (224, 160)."""
    return size(text if "x" in text else f"{text}x{text}")


def shape(text: str) -> tuple[int, ...]:
    """``"8,6,197,64"`` as four numbers."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,L,D, as 1,6,197,64")
    return tuple(map(int, parts))


def size(text: str) -> tuple[int, int]:
    """``"14x10"`` as (height, width)."""
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, as 14x14")
    return int(height), int(width)


def place(text: str) -> tuple[int, ...]:
    """``"7,3"`` as (7, 3), ``"7"`` as (7,)."""
    parts = text.split(",")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN counted from 0, as 7,7")
    return tuple(map(int, parts))


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
