"""Resize absolute position embeddings to another image size, by the model's own library.

This module imports no library: it finds the functions in the module of the model's class.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IrpeError


def resized_positions(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    names: Iterable[str],
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Return the embeddings that can be resized to the model's shapes, by name.

    Sources: ``checkpoint_filter_fn`` of timm's models, ``interpolate_embeddings`` of torchvision,
    ``interpolate_pos_encoding`` of transformers' embeddings.

    Args:
        model: the model.
        weights: all weights of the file.
        names: the embeddings of another shape.
        size: height and width of the file's images in pixels, if known. Otherwise timm uses the
            size of the pretrained weights if it matches, else a square.

    Raises:
        IrpeError: if the library raises.
    """
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        inside = [n for n in names if n.startswith(prefix) and n not in found]
        if not inside:
            continue
        local = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        try:
            made = _resized(module, local, None if path else size)
        except Exception as error:  # any exception of a reshape
            shapes = ", ".join(f"{n} {list(weights[n].shape)}" for n in inside)
            raise IrpeError(
                f"{type(module).__name__} cannot resize {shapes}: {type(error).__name__}: {error}"
            ) from error
        for name in inside:
            value = made.get(name.removeprefix(prefix))
            if value is not None and value.shape == own[name].shape:
                found[name] = value
    return found


def _resized(
    module: Any, weights: dict[str, Tensor], size: tuple[int, int] | None
) -> Mapping[str, Tensor]:
    for kind in type(module).__mro__:
        library = sys.modules.get(kind.__module__)
        if kind.__module__.startswith("timm.") and hasattr(library, "checkpoint_filter_fn"):
            return _by_timm(getattr(library, "checkpoint_filter_fn"), module, weights, size)  # noqa: B009
        if kind.__module__.startswith("torchvision.") and hasattr(
            library, "interpolate_embeddings"
        ):
            interpolate: Any = getattr(library, "interpolate_embeddings")  # noqa: B009
            return interpolate(module.image_size, module.patch_size, dict(weights))
    if hasattr(module, "interpolate_pos_encoding"):
        return _by_transformers(module, weights)
    return {}


def _by_timm(
    convert: Any, module: Any, weights: dict[str, Tensor], size: tuple[int, int] | None
) -> Mapping[str, Tensor]:
    """Call timm's function, which reads the file's image size from ``pretrained_model_args``."""
    own = vars(module).get("pretrained_model_args")
    try:
        if size is not None:
            module.pretrained_model_args = {"img_size": size}
        return convert(dict(weights), module)
    finally:
        if own is not None:
            module.pretrained_model_args = own
        else:
            vars(module).pop("pretrained_model_args", None)


@torch.no_grad()
def _by_transformers(embeddings: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Call ``interpolate_pos_encoding`` with the file's embedding in place of the module's."""
    owners: Any = (
        embeddings,
        getattr(embeddings, "patch_embeddings", None),
        getattr(embeddings, "config", None),
    )
    size = next(owner.image_size for owner in owners if hasattr(owner, "image_size"))
    height, width = (size, size) if isinstance(size, int) else size
    name = "position_embeddings"
    owner, attribute = embeddings, name
    if not hasattr(embeddings, name):  # CLIP's and SigLIP's are an nn.Embedding
        name, attribute = "position_embedding.weight", "weight"
        owner = embeddings.position_embedding
    own, given = getattr(owner, attribute), weights[name]
    tokens = own.new_empty(1, own.shape[-2], own.shape[-1])
    try:
        setattr(owner, attribute, nn.Parameter(given.to(own), requires_grad=False))
        made = embeddings.interpolate_pos_encoding(tokens, height, width)
    finally:
        setattr(owner, attribute, own)
    return {name: made.view(own.shape).to(given.dtype)}
