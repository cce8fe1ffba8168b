"""Names of rope-vit's released weights (naver-ai/rope-vit, DeiT-III with rotary embeddings)."""

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import IrpeError

_BLOCK = re.compile(r"(blocks\.\d+)\.gamma_([12])")


def in_timms_names(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of timm's ``deit3_*`` with ``rope-mixed`` attached.

    DeiT-III's files name the layer scales ``gamma_1`` and ``gamma_2``. The learned frequencies of
    all layers are one tensor ``freqs [2, layers, H D / 2]``, of columns and rows.

    Args:
        weights: the weights of a file; those of other models are returned unmodified.
        own: the state dict of the model.

    Raises:
        IrpeError: if the file has frequencies, but the model has no ``rope-mixed`` attached.
    """
    if "blocks.0.ls1.gamma" not in own or "blocks.0.gamma_1" not in weights:
        return dict(weights)
    made = {_BLOCK.sub(r"\1.ls\2.gamma", name): value for name, value in weights.items()}
    for name in ("freqs_t_x", "freqs_t_y"):  # positions of the patches
        made.pop(name, None)
    name = "blocks.{}.attn.rope.frequencies"
    if "freqs" in made:
        if name.format(0) not in own:
            raise IrpeError(
                "the file has rope-vit's learned frequencies: "
                "irpe.attach(model, 'rope-mixed') first"
            )
        freqs = made.pop("freqs").flip(0)
        for layer in range(freqs.shape[1]):
            shape = own.get(name.format(layer), freqs[:, layer]).shape
            made[name.format(layer)] = freqs[:, layer].reshape(shape)
    return made
