"""timm's image transforms, and the small affine ones that it has no option for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import create_transform
from torch import Tensor
from torchvision import transforms as tv

from training.cls.options import AugConfig
from training.errors import UserError


def make_transform(
    aug: AugConfig, data: dict[str, Any], *, training: bool
) -> Callable[[Any], Tensor]:
    """Return a function from a PIL image to a normalised tensor [C, H, W].

    Args:
        aug: augmentation, used in training only.
        data: ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``, ``crop_pct``.
    """
    augment = training and aug.enabled
    shared = {key: data[key] for key in ("input_size", "mean", "std", "interpolation")}
    if not augment:
        return create_transform(**shared, is_training=False, crop_pct=data["crop_pct"])
    try:
        transform = create_transform(
            **shared,
            is_training=True,
            scale=tuple(aug.scale),
            ratio=tuple(aug.ratio),
            hflip=aug.hflip,
            color_jitter=aug.color_jitter,
            auto_augment=aug.aa,
            re_prob=aug.reprob,
            re_mode=aug.remode,
            re_count=aug.recount,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"aug.aa: timm has no augmentation {aug.aa!r} ({error}); "
            "for example rand-m9-mstd0.5-inc1, original, v0, 3a"
        ) from error
    if aug.affine_degrees or aug.affine_translate or aug.affine_scale:
        # After the crop, at the size the model sees, and before the conversion to a tensor.
        affine = tv.RandomAffine(
            degrees=aug.affine_degrees,
            translate=(aug.affine_translate,) * 2,
            scale=(1 - aug.affine_scale, 1 + aug.affine_scale),
            interpolation=tv.InterpolationMode.BILINEAR,
        )
        transform.transforms.insert(1, affine)
    return transform
