"""The operators, as torch knows them: schema, shapes, gradients, autocast. Triton comes later.

``irpe::fused_attention`` takes rows of numbers instead of tables, see plan.py; its backward is an
operator too and has none of its own.
"""

from typing import Any

import torch
from torch import Tensor

from ...errors import IrpeError
from .plan import like

_SETTINGS = (
    "int width, int row_use, int column_use, int mass_use, int gain_use, bool is_causal, "
    "float dropout_p, float scale, int side, int parts, int part_slots"
)
_PAIRS = (
    "Tensor? ids, Tensor? ids_turned, Tensor? rows, Tensor? columns, Tensor? gain, Tensor? mask, "
    "Tensor? seed, Tensor? order, Tensor? others, Tensor? runs, Tensor? units"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_PAIRS}, *, {_SETTINGS}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad, Tensor? grad_mass, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, "
    f"Tensor mass, {_PAIRS}, *, {_SETTINGS}, bool grad_rows, bool grad_columns) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _outputs(q: Tensor, v: Tensor, ids: Tensor | None, width: int, mass_use: int) -> Any:
    B, H, L, _ = q.shape
    out = q.new_empty(B, L, H, v.shape[-1]).transpose(1, 2)
    stats = q.new_empty(2, H, B, L, dtype=torch.float32)
    wide = ids.shape[0] * width if ids is not None and mass_use else 0
    return out, stats, q.new_empty((H, B, L, wide) if wide else (0,))


@torch.library.custom_op("irpe::fused_attention", mutates_args=(), schema=_FORWARD)
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *pairs: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with gathered rows.

    Args:
        q: ``[B, H, L, D]``. k, v: ``[B, G, S, D]`` and ``[B, G, S, E]``.
        pairs: ids ``[maps, 1 | B, L, S']`` and the transposed ones; rows ``[H, B, L, W]`` or
            ``[H | 1, W]``, columns ``[H, B, S, W]``, added to the logits; gain ``[H | 1, W]``;
            mask ``[B, H, L, S]``, uint8 or additive; seed ``[1]`` of the dropout; order, others,
            runs and units of strips.py.
        settings: N as width, bit masks of the maps that each use, what attention takes, and with
            strips the numbers of a run as side, and the parts of the streamed tokens.

    Returns:
        out ``[B, H, L, E]``; stats ``[2, H, B, L]``, the largest logit and the logarithm of the sum
        to base 2; and the probability in each bucket
        ``[H, B, L, W]``, with the dropout in it.
    """
    from . import launch

    ids = pairs[0]
    out, stats, mass = _outputs(q, v, ids, settings["width"], settings["mass_use"])
    return launch.forward(q, k, v, out, stats, mass, *pairs, **settings)


@fused_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *pairs: Tensor | None, **settings: Any) -> Any:
    return _outputs(q, v, pairs[0], settings["width"], settings["mass_use"])


@torch.library.custom_op("irpe::fused_attention_backward", mutates_args=(), schema=_BACKWARD)
def fused_attention_backward(
    grad: Tensor,
    grad_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    mass: Tensor,
    *pairs: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, rows, columns and gain; of those not asked for, nothing."""
    from . import launch

    return launch.backward(grad, grad_mass, q, k, v, out, stats, mass, *pairs, **settings)


@fused_attention_backward.register_fake
def _(
    grad: Tensor,
    grad_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    mass: Tensor,
    ids: Tensor | None,
    ids_turned: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    gain: Tensor | None,
    *rest: Any,
    grad_rows: bool,
    grad_columns: bool,
    **settings: Any,
) -> Any:
    return (
        *(like(x) for x in (q, k, v)),
        q.new_empty(0) if rows is None or not grad_rows else torch.empty_like(rows),
        q.new_empty(0) if columns is None or not grad_columns else torch.empty_like(columns),
        q.new_empty(0) if gain is None else torch.empty_like(gain),
    )


def _setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.settings = keyword_only_inputs
    ctx.wants = (ctx.needs_input_grad[5], ctx.needs_input_grad[6])
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx: Any, grad: Tensor | None, _: Any, grad_mass: Tensor | None) -> tuple:
    q, k, v, out, stats, mass, *pairs = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    grads = fused_attention_backward(
        grad, grad_mass, q, k, v, out, stats, mass, *pairs, **ctx.settings,
        grad_rows=ctx.wants[0], grad_columns=ctx.wants[1],
    )  # fmt: skip
    rows, columns, gain = (g if g.numel() else None for g in grads[3:])
    return (*grads[:3], None, None, rows, columns, gain, *[None] * 6)


fused_attention.register_autograd(_backward, setup_context=_setup)


def _no_second(ctx: Any, *grads: Any) -> None:
    raise IrpeError(
        "the triton backend has no second derivative: pass backend='reference' for a backward "
        "pass that is differentiated itself (create_graph=True, gradient penalties, Hessians)"
    )


fused_attention_backward.register_autograd(_no_second)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if x is not None and x.dtype == torch.float32 else x


_LIBRARY = torch.library.Library("irpe", "FRAGMENT")
_KEYS = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}


def _autocast(device: str) -> Any:
    def call(q: Tensor, k: Tensor, v: Tensor, *pairs: Any, **settings: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        ids, turned, rows, columns, *rest = pairs
        rows, columns = (
            x if x is None or x.dim() == 2 else _cast(x, dtype) for x in (rows, columns)
        )
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEYS[device]))
        ):
            cast = (_cast(x, dtype) for x in (q, k, v))
            return fused_attention(*cast, ids, turned, rows, columns, *rest, **settings)

    return call


for _device, _key in _KEYS.items():
    _LIBRARY.impl("fused_attention", _autocast(_device), _key)
