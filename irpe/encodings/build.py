"""One builder for the modules of any spec."""

from numbers import Integral
from typing import Any

import torch

from ..errors import IrpeError
from ..spec import (
    PIA,
    RPE,
    T5,
    Alibi,
    Huang,
    Learned,
    Rope,
    RopeAxial,
    RopeMixed,
    Shaw,
    Sinusoidal,
    Spec,
    parse,
)  # fmt: skip
from .absolute import LearnedEmbedding, PositionInfused, SinusoidalEmbedding
from .alibi import LinearBias
from .base import Encoding
from .image import build_rpe
from .relative import HuangRPE, ShawRPE, T5Bias
from .rotary import MixedRotary, Rotary


def build(
    spec: str | Spec,
    *,
    dim: int,
    num_heads: int,
    head_dim: int | None = None,
    prefix: bool | int = False,
    causal: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Encoding]:
    """Build the modules of a spec, for one attention layer or for a model's input.

    Args:
        spec: the encoding.
        dim: C, channels of the tokens. num_heads: H, the query heads. head_dim: D; None: C / H.
        prefix: whether prefix tokens (class token, registers) stand before the others: a table of
            relative positions gets a bucket for them.
        causal: whether no query ever sees a later key.

    Returns:
        Attribute names and modules, for ``setattr`` on the attention module: rpe_q, rpe_k, rpe_v
        for images; else one of rope, alibi, t5, shaw, huang, pia; and for the model's input
        sinusoidal or learned. ``irpe.hooks(module)`` runs them. ``one_for_all`` on a module says
        that its authors share one among all layers.

    Raises:
        IrpeError: for sizes that the encoding cannot have.
    """
    spec = parse(spec)
    for name, value in (("dim", dim), ("num_heads", num_heads), ("head_dim", head_dim)):
        if value is None and name == "head_dim":
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise IrpeError(f"{name}={value!r} is not a positive integer")
    if head_dim is None:
        if dim % num_heads:
            raise IrpeError(f"dim={dim} is no multiple of num_heads={num_heads}")
        head_dim = dim // num_heads
    if prefix is None or isinstance(prefix, str) or prefix < 0:
        raise IrpeError(f"prefix={prefix!r} is neither a bool nor a number of tokens")
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    heads: dict[str, Any] = {"head_dim": head_dim, "num_heads": num_heads}
    tabled = {**heads, "prefix": bool(prefix), **made}
    match spec:
        case RPE():
            modules = build_rpe(spec, **heads, prefix=prefix, **made)
            named = zip(("rpe_q", "rpe_k", "rpe_v"), modules, strict=True)
            return {name: module for name, module in named if module is not None}
        case Rope() | RopeAxial():
            return {"rope": Rotary(spec, head_dim)}
        case RopeMixed():
            return {"rope": MixedRotary(spec, **heads, **made)}
        case Sinusoidal():
            return {"sinusoidal": SinusoidalEmbedding(spec, dim)}
        case Learned():
            return {"learned": LearnedEmbedding(spec, dim, **made)}
        case Shaw():
            return {"shaw": ShawRPE(spec, **tabled)}
        case Huang():
            return {"huang": HuangRPE(spec, **tabled)}
        case T5():
            kind = {"num_heads": num_heads, "causal": causal, "prefix": bool(prefix), **made}
            return {"t5": T5Bias(spec, **kind)}
        case Alibi():
            sides: dict[str, Any] = {"causal": causal, "prefix": bool(prefix), "device": device}
            return {"alibi": LinearBias(spec, **heads, **sides)}
        case PIA():
            return {"pia": PositionInfused(spec, dim)}
    raise AssertionError(f"no module for {spec!r}")
