"""One small model of each family of timm's, on a rectangle, and its attention by loops."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from oracles import attention as truth
from oracles import buckets as plain
from oracles import text as rotary
from timm.models.beit import Beit
from timm.models.crossvit import CrossVit
from timm.models.davit import DaVit
from timm.models.deepseek_vit import DeepseekVitEncoder
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.hieradet_sam2 import HieraDet
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.mobilevit import MobileVitBlock
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.nest import Nest
from timm.models.pit import PoolingVisionTransformer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.qwen3_vit import Qwen3VitEncoder
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.tiny_vit import TinyVit
from timm.models.twins import Twins
from timm.models.visformer import Visformer
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from timm.models.volo import VOLO
from torch import nn

import irpe

QKV, BIAS = "rpe-1.9-product-ctx-0-qkv", "rpe-2.0-cross-bias-0-k"
FLAT = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAT |= {"num_classes": 5}


@dataclass
class Family:
    """A small model on a rectangle: ``grids`` are the positions, attention by attention."""

    make: object
    grids: list
    size: tuple = (32, 48)
    has_own: bool = True
    exact: bool = True  # bit-equal to timm's unfused path on the reference
    given: object = None  # the model's inputs, if not an image
    where: str = "*"
    before: int = 0  # calls of attention before those with an encoding
    fold: object = None  # to [B, H, L, D] and back, for attention with other axes


def eva(**options):
    small = {"global_pool": "avg", "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    return partial(Eva, **{**FLAT, **small, **options})


def naflex(**options):
    small = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "pos_embed": "learned"}
    small |= {"pos_embed_grid_size": (4, 4), "reg_tokens": 1, "global_pool": "avg"}
    return lambda: NaFlexVit(NaFlexVitCfg(**{**small, **options}), num_classes=5)


def patches(mixed=True):
    """A batch of a 2x3 and a 3x1 image, patch by patch, the second one filled up."""
    torch.manual_seed(6)
    places = torch.zeros(2, 6, 2, dtype=torch.int64)
    valid = torch.zeros(2, 6, dtype=torch.bool)
    for b, (height, width) in enumerate(((2, 3), (3, 1))):
        where = [(r, c) for r in range(height) for c in range(width)]
        places[b, : len(where)] = torch.tensor(where)
        valid[b, : len(where)] = True
    given = {"patch_coord": places, "patch_valid": valid}
    return (torch.randn(2, 6, 16 * 16 * 3),), given


SWIN = {"img_size": (16, 24), "patch_size": 4, "window_size": (2, 3), "embed_dim": 16}
SWIN |= {"depths": (2,), "num_heads": (2,), "drop_path_rate": 0.0, "num_classes": 5}


def maxvit(blocks="M", **options):
    """Windows and grids of 2x3, or all of 4x6 places (CoAtNet)."""
    small = {"dim_head": 8, "window_size": (2, 3), **options}
    cfg = MaxxVitCfg(
        (16,), (1,), (blocks,), stem_width=8, transformer_cfg=MaxxVitTransformerCfg(**small)
    )
    size = (16, 24)
    return partial(MaxxVit, cfg, img_size=size, num_classes=5, drop_path_rate=0.0)


def blocks_inside(x):
    """``[B, H, T, L, D]``."""
    return x.transpose(1, 2).flatten(0, 1), lambda y: y.unflatten(0, x.shape[:3:2]).transpose(1, 2)


def blocks_outside(x):
    """``[B, T, H, L, D]``, or no blocks."""
    return (
        (x, lambda y: y)
        if x.dim() == 4
        else (x.flatten(0, 1), lambda y: y.unflatten(0, x.shape[:2]))
    )


def heads_outside(x):
    """``[B * 2, L, D]``."""
    return x.unflatten(0, (-1, 2)), lambda y: y.flatten(0, 1)


def row(prefix, height=2, width=3):
    return [[plain.grid(height, width, prefix)]] * 2


MIXED = [[None, *((r, c) for r in range(2) for c in range(3))]]
MIXED += [[None, (0, 0), (1, 0), (2, 0), (0, 0), (0, 0), (0, 0)]]
FAMILIES = {
    "vit": Family(partial(VisionTransformer, **FLAT, reg_tokens=2), row(3), has_own=False),
    "parallel": Family(
        partial(VisionTransformer, **FLAT, block_fn=ParallelScalingBlock), row(1), has_own=False
    ),
    "eva": Family(eva(), row(1)),
    "eva, no rotary": Family(eva(use_rot_pos_emb=False), row(1), has_own=False),
    "eva02": Family(eva(qkv_fused=False, scale_mlp=True, swiglu_mlp=True), row(1)),
    "eva post norm": Family(eva(use_post_norm=True, num_reg_tokens=2), row(3)),
    "dinov3": Family(
        eva(
            attn_type="rope",
            rope_type="dinov3",
            rope_rotate_half=True,
            dynamic_img_size=True,
            use_abs_pos_emb=False,
            num_reg_tokens=4,
            img_size=(32, 48),
        ),
        row(5, 3, 2),
        size=(48, 32),
    ),
    "rope-vit mixed": Family(eva(attn_type="rope", rope_type="mixed", class_token=False), row(0)),
    "grouped keys": Family(
        eva(attn_type="rope", num_kv_heads=1, num_heads=2, qkv_fused=False), row(1)
    ),
    "beit": Family(partial(Beit, **FLAT, use_rel_pos_bias=True), row(1)),
    "beit, shared bias": Family(
        partial(Beit, **FLAT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True), row(1)
    ),
    "relpos": Family(partial(VisionTransformerRelPos, **FLAT), row(0)),
    "relpos, class token": Family(
        partial(VisionTransformerRelPos, **FLAT, class_token=True, rel_pos_type="bias"), row(1)
    ),
    "relpos, shared": Family(
        partial(VisionTransformerRelPos, **FLAT, shared_rel_pos=True, rel_pos_dim=8), row(0)
    ),
    "swin": Family(partial(SwinTransformer, **SWIN), row(0), size=(16, 24)),
    "swin, other sizes": Family(
        partial(SwinTransformer, **SWIN, strict_img_size=False), row(0), size=(12, 20)
    ),
    "swin v2": Family(partial(SwinTransformerV2, **SWIN), row(0), size=(16, 24), exact=False),
    "swin v2 cr": Family(partial(SwinTransformerV2Cr, **SWIN), row(0), size=(16, 24), exact=False),
    "maxvit": Family(maxvit(), row(0), size=(16, 24)),
    "maxvit, channels first": Family(
        maxvit(use_nchw_attn=True, head_first=False), row(0), size=(16, 24)
    ),
    "coatnet": Family(
        maxvit("T", rel_pos_type="mlp"), row(0, 4, 6)[:1], size=(16, 24), exact=False
    ),
    "pit": Family(
        partial(
            PoolingVisionTransformer,
            **{"img_size": (16, 24), "patch_size": 4, "stride": 4, "base_dims": (16, 16)},
            **{"depth": (1, 1), "heads": (1, 2), "mlp_ratio": 2.0, "num_classes": 5},
        ),
        [*row(1, 4, 6)[:1], *row(1, 2, 3)[:1]],
        size=(16, 24),
        has_own=False,
    ),
    "crossvit": Family(
        partial(
            CrossVit,
            **{"img_size": (32, 48), "img_scale": (1.0, 0.5), "patch_size": (16, 8)},
            **{"embed_dim": (16, 16), "depth": ((1, 2, 1),), "num_heads": (2, 2)},
        ),
        row(1) + row(1)[:1],
        has_own=False,
    ),
    "mobilevit": Family(
        partial(
            MobileVitBlock, 3, 8, transformer_dim=16, num_heads=2, transformer_depth=2, patch_size=2
        ),
        row(0),
        size=(3, 6),
        has_own=False,
    ),
    "deepseek": Family(
        partial(DeepseekVitEncoder, (32, 48), 16, 3, 8, embed_dim=32, depth=2, num_heads=2), row(0)
    ),
    "qwen3": Family(
        partial(Qwen3VitEncoder, (32, 64), 16, embed_dim=32, depth=2, num_heads=2),
        row(0, 2, 4),
        size=(32, 64),
    ),
    "davit": Family(
        partial(
            DaVit, depths=(1,), embed_dims=(16,), num_heads=(2,), window_size=(2, 3), num_classes=5
        ),
        row(0)[:1],
        size=(16, 24),
        has_own=False,
    ),
    "volo": Family(
        partial(
            VOLO,
            [1, 1],
            **{"img_size": (16, 24), "patch_size": 4, "stem_hidden_dim": 8, "embed_dims": [16, 16]},
            **{"num_heads": [2, 2], "downsamples": (True, False), "post_layers": None},
            **{"outlook_attention": (True, False), "use_aux_head": False, "global_pool": "avg"},
        ),
        row(0)[:1],
        size=(16, 24),
        has_own=False,
        where="network.2.*",
    ),
    "fastvit": Family(
        partial(
            FastVit,
            layers=(1, 1),
            token_mixers=("repmixer", "attention"),
            **{"embed_dims": (16, 64), "mlp_ratios": (2, 2), "downsamples": (False, True)},
            **{"se_downsamples": (False, False), "pos_embs": (None, None), "num_classes": 5},
        ),
        row(0)[:1],
        size=(16, 24),
        has_own=False,
    ),
    "visformer": Family(
        partial(
            Visformer,
            **{"img_size": (32, 48), "init_channels": 8, "embed_dim": 16, "depth": (0, 1, 0)},
            **{"num_heads": 2, "attn_stage": "010", "spatial_conv": "000", "group": 1},
        ),
        row(0)[:1],
        has_own=False,
        exact=False,
    ),
    "nest": Family(
        partial(
            Nest,
            **{"img_size": 16, "patch_size": 4, "num_levels": 2, "embed_dims": (16, 16)},
            **{"num_heads": (2, 2), "depths": (1, 1), "drop_path_rate": 0.0},
        ),
        row(0, 2, 2),
        size=(16, 16),
        has_own=False,
        fold=blocks_inside,
    ),
    "tiny vit": Family(
        partial(
            TinyVit,
            **{"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2)},
            **{"window_sizes": (3, 2), "drop_path_rate": 0.0},
        ),
        row(0, 2, 2)[:1],
        size=(16, 32),
    ),
    "twins": Family(
        partial(
            Twins,
            **{"img_size": (16, 24), "embed_dims": (16,), "num_heads": (2,), "mlp_ratios": (2,)},
            **{"depths": (2,), "sr_ratios": (1,), "wss": (2,), "patch_size": 4},
        ),
        [*row(0, 2, 2)[:1], *row(0, 4, 6)[:1]],
        size=(16, 24),
        has_own=False,
        fold=blocks_outside,
    ),
    "pvt v2": Family(
        partial(
            PyramidVisionTransformerV2,
            **{"depths": (1, 1), "embed_dims": (16, 16), "num_heads": (2, 2)},
            **{"sr_ratios": (2, 1), "mlp_ratios": (2, 2)},
        ),
        row(0)[:1],
        size=(16, 24),
        has_own=False,
        where="stages.1.*",
        before=1,
    ),
    "sam": Family(
        partial(
            VisionTransformerSAM,
            **{"img_size": (32, 48), "embed_dim": 32, "depth": 2, "num_heads": 2},
            **{"use_rel_pos": True, "neck_chans": 8, "window_size": 0},
        ),
        row(0),
        fold=heads_outside,
    ),
    "sam 2": Family(
        partial(
            HieraDet,
            **{"embed_dim": 16, "num_heads": 2, "q_pool": 1, "stages": (1, 2)},
            **{"global_pos_size": (4, 6), "window_spec": (2, 2), "global_att_blocks": (2,)},
        ),
        row(0)[:1],
        size=(16, 24),
        has_own=False,
        where="blocks.2.*",
        before=2,
    ),
    "naflex image": Family(naflex(), row(1), has_own=False),
    "naflex": Family(naflex(class_token=False), [MIXED] * 2, has_own=False, given=patches),
    "naflex rope": Family(
        naflex(class_token=False, rope_type="axial", block_fn="EvaBlock"),
        [MIXED] * 2,
        given=patches,
    ),
}


def build(family, seed=0):
    torch.manual_seed(seed)
    model = family.make()
    for path, p in model.named_parameters():  # some start at zero, and hide what they multiply
        if p.dim() <= 1 or p.shape[0] == 1 or "table" in path:
            nn.init.normal_(p, mean=float(p.dim() == 1 and "bias" not in path), std=0.2)
        elif "norm" not in path and "frequ" not in path:
            nn.init.normal_(p, std=0.2)
    return model.eval()


def inputs(family, dtype=torch.float32):
    if family.given is not None:
        (tokens,), given = family.given()
        return (tokens.to(dtype),), given
    torch.manual_seed(2)
    return (torch.randn(2, 3, *family.size, dtype=dtype),), {}


def run(model, family):
    dtype = next(model.parameters()).dtype
    args, given = inputs(family, dtype)
    forward = getattr(model, "forward_features", model)
    return counted(forward(*args, **given), given)


def counted(out, given):
    """Tokens that count; what fills up a smaller image does not, and paths differ there."""
    if isinstance(out, tuple | list):  # branches
        return torch.cat([x.flatten() for x in out])
    if not isinstance(out, dict):
        return out
    tokens, valid = out["patches"], given["patch_valid"]
    prefix = tokens.shape[1] - valid.shape[1]
    return tokens[F.pad(valid, (prefix, 0), value=True)]


def unfused(model):
    for m in model.modules():
        if hasattr(m, "fused_attn"):
            m.fused_attn = False
    return model


def cosine(self, x, mask=None):
    """Swin V2's attention (Liu et al., 2022, Eq. 2), for those of timm that have no fused path."""
    B, L, C = x.shape
    bias = self.qkv.bias
    if hasattr(self, "q_bias"):
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
    qkv = F.linear(x, self.qkv.weight, bias).view(B, L, 3, self.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scale = self.logit_scale.clamp(max=4.605170185988092).exp().view(-1, 1, 1)
    if hasattr(self, "meta_mlp"):
        added = self._relative_positional_encodings()
    else:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        added = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
    added = added.expand(B, self.num_heads, L, L)
    if mask is not None:
        added = added + mask.repeat(B // len(mask), 1, 1).unsqueeze(1)
    q, k = q / q.norm(dim=-1, keepdim=True) * scale, k / k.norm(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)
    return self.proj(out.transpose(1, 2).reshape(B, L, C))


class Loops:
    """scaled_dot_product_attention by loops, call after call, each with its tables."""

    def __init__(self, spec, model, report, family):
        self.spec, self.grids, self.calls = irpe.parse(spec), family.grids, -family.before
        self.fold, self.theirs = family.fold, F.scaled_dot_product_attention
        self.modules = [model.get_submodule(path) for path in report.modules]

    def __call__(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        self.calls += 1
        if self.calls <= 0:
            return self.theirs(q, k, v, attn_mask)
        module, grids = self.modules[self.calls - 1], self.grids[self.calls - 1]
        back = lambda x: x  # noqa: E731
        if self.fold is not None:
            (q, back), (k, _), (v, _) = (self.fold(x) for x in (q, k, v))
            attn_mask = None if attn_mask is None else self.fold(attn_mask)[0]
        assert not is_causal and dropout_p == 0.0
        grids = grids * q.shape[0] if len(grids) == 1 else grids
        mask = None
        if attn_mask is not None:
            mask = attn_mask.expand(*q.shape[:3], k.shape[2])
            mask = mask.masked_fill((mask < -1e30).all(-1, keepdim=True), 0.0)  # equal, as in timm
        tables = []
        if isinstance(self.spec, irpe.RPE):
            on = "bias_k" if self.spec.mode == "bias" else None
            for letter in self.spec.on:
                part = getattr(module, f"rpe_{letter}")
                parts = [part.rp_rows, part.rp_cols] if self.spec.method == "cross" else [part]
                functions = plain.buckets(self.spec)
                for one, function in zip(parts, functions, strict=True):
                    tables.append((on or letter, one.table, function))
        else:  # rope-axial: every token turned by its own place
            planes = rotary.axial(q.shape[-1], self.spec.base, self.spec.order)
            q, k = (self.turned(x, grids, planes) for x in (q, k))
        return back(truth.attention(q, k, v, tables, grids, grids, mask=mask, scale=scale))

    def turned(self, x, grids, planes):
        out = x.clone()
        for b, places in enumerate(grids):
            for i, place in enumerate(places):
                if place is not None:
                    angles = [place[0] * a + place[1] * c for a, c in planes]
                    for h in range(x.shape[1]):
                        out[b, h, i] = rotary.rotated(x[b, h, i], angles, self.spec.layout)
        return out
