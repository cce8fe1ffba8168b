"""The parser of the ``irpe`` command: subcommands, their options and an example of each."""

import argparse
import ast
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_RPE = "rpe-1.9-product-ctx-1-k"


class _Parser(argparse.ArgumentParser):
    """Exit with one line that points to the help if arguments are wrong."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}; see: {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def assignment(text: str) -> tuple[str, Any]:
    """Return ("depth", 4) for ``"depth=4"``; a value that is not a Python literal is a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, as depth=4")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def count(text: str) -> int:
    """Return a positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def numbers(
    form: str, between: str, *lengths: int, least: int = 1
) -> Callable[[str], tuple[int, ...]]:
    """Return a function that reads integers of at least ``least``, separated by a character."""

    def read(text: str) -> tuple[int, ...]:
        parts = text.split(between)
        if len(parts) not in lengths or not all(p.isdecimal() and int(p) >= least for p in parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
        return tuple(map(int, parts))

    return read


place = numbers("ROW,COLUMN counted from 0, as 7,7", ",", 1, 2, least=0)
places = numbers("[FRAME,]ROW,COLUMN counted from 0, as 7,7", ",", 1, 2, 3, least=0)
shape = numbers("B,H,L,D, as 1,6,197,64", ",", 4)
size = numbers("HEIGHTxWIDTH, as 14x14", "x", 2)
sides = numbers("HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, as 14x14", "x", 2, 3)


def pixels(text: str) -> tuple[int, ...]:
    """Return (224, 224) for ``"224"``, (224, 160) for ``"224x160"``."""
    return size(text if "x" in text else f"{text}x{text}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command; its result's ``command`` is a module of commands/."""
    top = _Parser(
        prog="irpe",
        description="Inspect relative position encodings, and models with encodings.",
        epilog="irpe COMMAND --help shows the options and an example.",
        allow_abbrev=False,
    )
    top.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE",
        help="import your module first, which registers encodings",
    )  # fmt: skip
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
        "print the bucket of each key for one query",
        f"irpe buckets {_RPE} --grid 14x14 --at 7,7 --out buckets.png",
    )
    one.add_argument("spec", help=f"the encoding, as {_RPE} or t5,buckets=32,max=128")
    one.add_argument(
        "--grid", type=sides, metavar="[Tx]HxW",
        help="rows x columns of patches, for videos frames x rows x columns (default 14x14)",
    )  # fmt: skip
    one.add_argument(
        "--at", type=places, metavar="[FRAME,]ROW,COL", help="the query; default: the middle"
    )
    one.add_argument("--frame", type=int, help="frame of the keys (videos); default: the query's")
    one.add_argument("--length", type=count, help="tokens, for encodings of texts (default 64)")
    _out(one)

    one = add(
        "explain",
        "print the backend that auto selects for attention, and why",
        f"irpe explain {_RPE} --device cuda --dtype bfloat16",
    )
    one.add_argument("rpe", metavar="SPEC", nargs="?", help="the encoding; none: plain attention")
    one.add_argument(
        "--shape", type=shape, default=(1, 6, 197, 64), metavar="B,H,L,D",
        help="batch, heads, tokens, channels of a head (default 1,6,197,64)",
    )  # fmt: skip
    _grid(one, None, "a square of all tokens but --prefix")
    one.add_argument("--prefix", type=int, default=1, help="class tokens and registers (default 1)")
    one.add_argument(
        "--dtype", choices=_DTYPES, default=_DTYPES[0], metavar="DTYPE", help=", ".join(_DTYPES)
    )
    one.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="a device, present or not"
    )
    one.add_argument("--causal", action="store_true", help="causal attention")
    one.add_argument("--compile", action="store_true", help="inside torch.compile")

    one = add(
        "cost",
        "print parameters, multiply-adds and memory, with and without encoding",
        f"irpe cost deit_small_patch16_224 --rpe {_RPE} --size 224",
    )
    one.add_argument("model", help="a timm model name")
    one.add_argument("--rpe", metavar="SPEC", help="the encoding; a published name has one")
    _model_kwargs(one)
    _size(one)

    one = add(
        "tables",
        "print the learned tables of a checkpoint, by layer and head",
        "irpe tables runs/mine --out tables.png",
    )
    one.add_argument(
        "checkpoint", metavar="CKPT", help="a run directory, a .safetensors, .pth, .pt or .bin file"
    )
    one.add_argument("--rpe", metavar="SPEC", help="the encoding, if it is not in the file")
    _grid(one, None, "that of a square pos_embed in the file, else 14x14")
    _out(one)

    one = add(
        "attention",
        "print the attention of a query patch and the bias, by head",
        "irpe attention runs/mine cat.jpg --out attention.png",
    )
    one.add_argument(
        "model", help="a run directory, a file of irpe.save, a timm or a published model name"
    )
    one.add_argument("image", help="a picture")
    one.add_argument("--rpe", metavar="SPEC", help="the encoding to attach")
    one.add_argument("--checkpoint", metavar="FILE", help="weights; else they are random")
    _model_kwargs(one)
    one.add_argument("--pretrained", action="store_true", help="timm downloads trained weights")
    one.add_argument("--layer", type=count, help="number of the layer, from 1; default: the last")
    one.add_argument("--at", type=place, metavar="ROW,COL", help="the query; default: the middle")
    _size(one)
    _out(one)

    one = add(
        "convert",
        "convert a torch checkpoint to safetensors, or back",
        "irpe convert released.pth model.safetensors",
    )
    one.add_argument("source", metavar="IN", help="a .pth, .pt, .bin or .safetensors file")
    one.add_argument("target", metavar="OUT", help="the file to write; must not exist")
    return top


def _grid(one: argparse.ArgumentParser, default: str | None, otherwise: str = "") -> None:
    what = f"rows x columns of patches (default {default or otherwise})"
    one.add_argument("--grid", type=size, default=default, metavar="HxW", help=what)


def _out(one: argparse.ArgumentParser) -> None:
    one.add_argument("--out", metavar="FILE", help="draw a picture: .png, .svg or .pdf")


def _model_kwargs(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--model-kwargs", nargs="+", type=assignment, default=[], metavar="KEY=VALUE",
        help="arguments of the model, as depth=4 num_classes=10",
    )  # fmt: skip


def _size(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--size", type=pixels, metavar="N|HxW", help="pixels of the image; default: the model's"
    )
