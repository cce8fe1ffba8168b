"""``irpe attention``: the attention of a query patch in every head."""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ...encodings import specs
from ...errors import IrpeError
from ...geometry import Grid
from ..attention import watch
from ..models import attach_named, create, load, opened, prepared
from ..pictures import save
from ..terminal import table


def run(given: argparse.Namespace) -> None:
    """Print distances by layer and the heads of one layer; with --out, draw a picture."""
    picture = _open(given.image)
    name, model = _model(given)
    image, shown = prepared(model, picture, given.size)
    grid = _grid(name, model, image)
    at = (grid.height // 2, grid.width // 2) if given.at is None else given.at
    if len(at) != 2:
        raise IrpeError(f"--at {at[0]} is not a patch of an image: give ROW,COLUMN, as {at[0]},0")
    layers = watch(model, image, grid, at)
    number = given.layer or len(layers)
    if number > len(layers):
        raise IrpeError(f"--layer {number}: {name} has {len(layers)} layers")
    kinds = sorted(set(specs(model).values()))
    title = name + (f" with {', '.join(kinds)}" if kinds else "")
    trained = given.checkpoint is not None or given.pretrained or Path(given.model).exists()
    print(f"{title}, {'trained' if trained else 'RANDOM'} weights")
    if not trained:
        print("use --checkpoint FILE or --pretrained for trained weights")
    print(f"{given.image}: {grid.height}x{grid.width} patches, the query at {at[0]},{at[1]}\n")
    rows: list[tuple[object, ...]] = [("layer", "mean distance", "least head", "most head")]
    for n, layer in enumerate(layers, 1):
        far = layer.distances
        rows.append((n, *(f"{float(x):.2f}" for x in (far.mean(), far.min(), far.max()))))
    print("\n".join(table(rows, left=0)))
    print("distances at which patches attend to patches, in patches\n")
    layer = layers[number - 1]
    head = ("head", "most at row,col", "probability", "on prefix tokens")
    rows = [head if layer.position is None else (*head, "encoding adds", "to")]
    for n, seen in enumerate(layer.attention):
        y, x = divmod(int(seen.argmax()), grid.width)
        numbers = [f"{float(seen.max()):.4f}", f"{float(layer.prefix[n]):.4f}"]
        if layer.position is not None:
            added = layer.position[n]
            numbers += [f"{float(added.min()):.4f}", f"{float(added.max()):.4f}"]
        rows.append((n + 1, f"{y},{x}", *numbers))
    print(f"layer {number}, the query's attention")
    print("\n".join(table(rows, left=0)))
    if given.out:
        from ..attention_plot import draw_layer  # matplotlib is needed here only

        if not trained:
            title += ", RANDOM weights"
        save(draw_layer(layers, number, shown, at, title), given.out)


def _model(given: argparse.Namespace) -> tuple[str, Any]:
    """Return the model's name, and the model with its encoding and weights."""
    if Path(given.model).exists():
        for option in ("rpe", "checkpoint", "pretrained", "model_kwargs"):
            if getattr(given, option):
                raise IrpeError(
                    f"{given.model!r} is a file or a folder with a model, encoding and weights: "
                    f"leave --{option.replace('_', '-')} out"
                )
        return opened(given.model, given.size)
    model = create(given.model, given.size, given.pretrained, dict(given.model_kwargs))
    if given.rpe is not None:
        attach_named(model, given.model, given.rpe)
    if given.checkpoint is not None:
        load(model, given.checkpoint, given.size)
    return given.model, model


def _open(path: str) -> Any:
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise IrpeError(f"image {path!r} is not a file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise IrpeError(f"{path!r} is not a picture that can be read: {error}") from error


def _grid(name: str, model: Any, image: Tensor) -> Grid:
    """Return the model's patches and prefix tokens."""
    embed: Any = getattr(model, "patch_embed", None)
    if not hasattr(embed, "dynamic_feat_size"):
        raise IrpeError(f"{name} has no fixed grid of patches, unlike ViT, DeiT, BEiT and EVA")
    height, width = embed.dynamic_feat_size(tuple(image.shape[-2:]))
    return Grid(height, width, prefix=getattr(model, "num_prefix_tokens", 0))
