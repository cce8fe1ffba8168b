"""The published DeiT models with image relative position encoding, in timm's registry.

``import irpe.zoo``, then ``timm.create_model(name, pretrained=True)``. Names and weights are those
of the authors (Wu et al., ICCV 2021).
"""

import argparse
import sys
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled, _cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from .encodings import Encoding
from .hosts import attach

URL = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/{name}.pth"

# name -> spec. The number in a name is the number of buckets in use at 14x14 with a class token. It
# is less than the number of buckets of the table, and does not determine the ratio.
_PRODUCT, _SMALL = "patch16_224_ctx_product_50_shared", "deit_small_patch16_224_ctx"
SPECS = {
    f"deit_tiny_{_PRODUCT}_k": "rpe-1.9-product-ctx-1-k",
    f"deit_small_{_PRODUCT}_k": "rpe-1.9-product-ctx-1-k",
    f"deit_small_{_PRODUCT}_qk": "rpe-1.9-product-ctx-1-qk",
    f"deit_small_{_PRODUCT}_qkv": "rpe-1.9-product-ctx-1-qkv",
    f"deit_base_{_PRODUCT}_k": "rpe-1.9-product-ctx-1-k",
    f"deit_base_{_PRODUCT}_qkv": "rpe-1.9-product-ctx-1-qkv",
    f"{_SMALL}_euc_20_shared_k": "rpe-20.0-euc-ctx-1-k",
    f"{_SMALL}_quant_51_shared_k": "rpe-33.0-quant-ctx-1-k",
    f"{_SMALL}_cross_56_shared_k": "rpe-20.0-cross-ctx-1-k",
}
_SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}


class _Attaching:
    """A mixin for a VisionTransformer that attaches an encoding.

    Args:
        rpe: spec of the encoding.
        table_decay: whether tables have weight decay, as in the released code. False adds them to
            ``no_weight_decay()``, as in the paper's supplement.
        rpe_backend: see ``irpe.attention``.
    """

    def __init__(
        self,
        *args: Any,
        rpe: str,
        table_decay: bool = True,
        rpe_backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.table_decay = table_decay
        attach(self, rpe, backend=rpe_backend)  # type: ignore[arg-type]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = set(super().no_weight_decay())  # type: ignore[misc]
        if self.table_decay:
            return names
        return names | {
            f"{path}.{name}"
            for path, module in self.named_modules()  # type: ignore[attr-defined]
            if isinstance(module, Encoding)
            for name, _ in module.named_parameters(recurse=False)
        }


class RPEVisionTransformer(_Attaching, VisionTransformer):
    """timm's VisionTransformer with an encoding."""


class RPEVisionTransformerDistilled(_Attaching, VisionTransformerDistilled):
    """timm's VisionTransformer with a distillation token and an encoding."""


def _create(name: str, spec: str, pretrained: bool, distilled: bool, **kwargs: Any) -> Any:
    size = _SIZES[name.split("_")[1]]
    arguments = {"patch_size": 16, "depth": 12, **size, "rpe": spec, **kwargs}
    # The released files also contain an argparse.Namespace; no other class is allowed.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return build_model_with_cfg(
            RPEVisionTransformerDistilled if distilled else RPEVisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
            **arguments,
        )


def _register(name: str, spec: str, distilled: bool) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        return _create(name, spec, pretrained, distilled, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"DeiT with the encoding {spec}" + (", distilled." if distilled else ".")
    setattr(sys.modules[__name__], name, register_model(entrypoint))


# timm's register_model reads this variable of the module.
default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg(URL.format(name=name), license="apache-2.0") for name in SPECS}
    | {
        name.replace("_patch16", "_distilled_patch16"): _cfg(classifier=("head", "head_dist"))
        for name in SPECS
    }
)
for _name, _spec in SPECS.items():
    _register(_name, _spec, distilled=False)
    _register(_name.replace("_patch16", "_distilled_patch16"), _spec, distilled=True)
