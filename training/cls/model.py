"""Build the classifier, a timm model with or without encoding, and its image transforms."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision import transforms as tv

import irpe
import irpe.zoo  # registers the published iRPE names with timm
from training.cls.options import AugConfig, ClsConfig
from training.errors import UserError


def check_name(name: str) -> None:
    """Raise :class:`UserError` with similar names if timm does not have this name."""
    if ":" in name:  # schemes such as hf-hub:... are not in the registry
        return
    base, _, tag = name.partition(".")
    if timm.is_model(base):
        tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{base}.*")]
        if not tag or tag in tags:
            return
        there = f"there are: {', '.join(tags)}" if tags else "it has no published weights"
        raise UserError(f"model.name: {base!r} has no weights {tag!r}; {there}")
    near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "; `timm.list_models()` lists them"
    raise UserError(f"model.name: timm has no model {name!r}{hint}")


def build_model(config: ClsConfig, num_classes: int) -> nn.Module:
    """Create the model of a config and attach its encoding.

    Raises:
        UserError: if the name is unknown, or the model does not take an argument.
        irpe.IrpeError: if the encoding is invalid, or the model does not support it.
    """
    spec = irpe.parse(config.rpe) if config.rpe is not None else None
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": config.model.in_chans}
    given = {"img_size": "img_size", "drop_rate": "drop", "drop_path_rate": "drop_path"}
    values = {key: getattr(config.model, name) for key, name in given.items()}
    options |= {key: value for key, value in values.items() if value}
    model = _create(config, {**options, **config.model.kwargs})
    if spec is not None:
        irpe.attach(model, spec, where=config.rpe_where, backend=config.rpe_backend)
    if config.model.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"model.grad_checkpointing: {config.model.name!r} does not support it")
        model.set_grad_checkpointing(True)
    return model


def _create(config: ClsConfig, options: dict[str, Any]) -> nn.Module:
    name, pretrained = config.model.name, config.model.pretrained
    # At other sizes, timm resizes the trained absolute embeddings.
    dynamic = {} if config.sizes is None else {"dynamic_img_size": True}
    try:
        with contextlib.suppress(*[TypeError] * len(dynamic)):
            return timm.create_model(name, pretrained, **{**dynamic, **options})
        # Convolutional networks have no such option.
        return timm.create_model(name, pretrained, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"model {name!r} cannot be built with {options}: {error}") from error


def check_memory(
    config: ClsConfig, model: nn.Module, size: Sequence[int], batch: int, device: torch.device
) -> None:
    """Raise if the attention logits of one layer exceed the memory of the device.

    Only attention that materialises ``[B, H, L, L]`` is checked: timm's without its fused kernel,
    and encodings with rpe_backend: reference. Windowed models are not checked.
    """
    if not isinstance(model, VisionTransformer) or config.model.kwargs.get("patch_drop_rate"):
        return
    if config.run.compile:  # the compiler may fuse it
        return
    height, width = (n // p for n, p in zip(size, model.patch_embed.patch_size, strict=True))
    tokens = height * width + model.num_prefix_tokens
    encoded = irpe.specs(model)
    for name, module in model.named_modules():
        if not hasattr(module, "fused_attn") or not hasattr(module, "num_heads"):
            continue
        if name in encoded:
            materialises, remedy = config.rpe_backend == "reference", "rpe_backend: auto"
        else:
            materialises, remedy = not module.fused_attn, "timm's fused attention"
        element = 4 if config.run.precision == "fp32" else 2
        needed, there = batch * module.num_heads * tokens**2 * element, device_memory(device)
        if materialises and needed > there:
            raise UserError(
                f"images of {'x'.join(map(str, size))} pixels are {tokens:,} tokens: the logits of "
                f"{name} take {needed / 2**30:,.1f} GiB ({batch} images x {module.num_heads} heads "
                f"x {tokens:,}^2), and the device has {there / 2**30:,.1f} GiB; use smaller "
                f"images, a smaller batch or {remedy}"
            )


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def input_settings(config: ClsConfig, model: nn.Module) -> dict[str, Any]:
    """Return ``input_size``, ``mean``, ``std``, ``interpolation`` and ``crop_pct`` for the model.

    Values that the config does not set come from the model's pretrained configuration.
    """
    data, channels = config.data, config.model.in_chans
    given: dict[str, Any] = {
        "img_size": config.model.img_size or config.model.kwargs.get("img_size"),
        "mean": data.mean,
        "std": data.std,
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
    }
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) != channels:
            raise UserError(
                f"data.{name}: {given[name]} has {len(given[name])} values, "
                f"but model.in_chans is {channels}"
            )
    if channels != 3 and data.mean is None:
        # timm's values are for three channels; use their average for grey images.
        given["mean"], given["std"] = [0.45] * channels, [0.225] * channels
    if given["img_size"] is not None:
        size = given.pop("img_size")
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        given["input_size"] = (channels, height, width)
    settings = resolve_data_config(
        {key: value for key, value in given.items() if value is not None}, model=model
    )
    settings["input_size"] = (channels, *settings["input_size"][1:])
    for name in ("mean", "std"):  # timm repeats a single value for three channels
        settings[name] = settings[name][:channels]
    return settings


def make_transform(
    aug: AugConfig, data: dict[str, Any], *, training: bool
) -> Callable[[Any], Tensor]:
    """Return a function from a PIL image to a normalised tensor [C, H, W].

    The transforms are timm's, and small affine ones, which timm has no option for.

    Args:
        aug: augmentation, used in training only.
        data: ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``, ``crop_pct``.
        training: whether to augment.
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
        # After the crop, and before the conversion to a tensor.
        affine = tv.RandomAffine(
            degrees=aug.affine_degrees,
            translate=(aug.affine_translate,) * 2,
            scale=(1 - aug.affine_scale, 1 + aug.affine_scale),
            interpolation=tv.InterpolationMode.BILINEAR,
        )
        transform.transforms.insert(1, affine)
    return transform
