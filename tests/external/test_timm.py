"""Two-dimensional rotary embeddings against timm."""

import pytest
import torch
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    apply_rot_embed_cat,
    get_mixed_freqs,
    get_mixed_grid,
    init_random_2d_freqs,
)

import irpe

H, D = 3, 16
GRIDS = [(7, 5), (1, 6), (4, 4)]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_axial(grid, half):
    q, k = torch.randn(2, H, grid[0] * grid[1], D), torch.randn(2, H, grid[0] * grid[1], D)
    theirs = RotaryEmbeddingCat(
        D, in_pixels=False, temperature=100.0, feat_shape=list(grid), rotate_half=half
    )
    embed = theirs.get_embed(list(grid))
    layout = ",layout=half" if half else ""
    rope = irpe.build(f"rope-axial{layout}", dim=H * D, num_heads=H)["rope"]
    for x, y in zip((q, k), rope.transform(q, k, irpe.Grid(*grid)), strict=True):
        torch.testing.assert_close(
            y, apply_rot_embed_cat(x, embed, half=half), rtol=1e-5, atol=1e-5
        )


def test_axial_columns_first():
    q = torch.randn(2, H, 35, D)
    theirs = RotaryEmbeddingCat(
        D, in_pixels=False, temperature=100.0, feat_shape=[7, 5], grid_indexing="xy"
    )
    rope = irpe.build("rope-axial,order=xy", dim=H * D, num_heads=H)["rope"]
    found, _ = rope.transform(q, q, irpe.Grid(7, 5))
    wanted = apply_rot_embed_cat(q, theirs.get_embed([7, 5]))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_mixed(grid):
    q = torch.randn(2, H, grid[0] * grid[1], D)
    freqs = init_random_2d_freqs(D, 1, H)[:, 0]  # [2, H, D / 2]
    rows, columns = get_mixed_grid(list(grid), "ij")
    wanted = apply_rot_embed_cat(q, get_mixed_freqs(freqs, rows, columns))
    rope = irpe.build("rope-mixed", dim=H * D, num_heads=H)["rope"]
    with torch.no_grad():
        rope.frequencies.copy_(freqs)
    found, _ = rope.transform(q, q, irpe.Grid(*grid))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_mixed_starts_as_theirs():
    torch.manual_seed(5)
    rope = irpe.build("rope-mixed,base=20", dim=H * D, num_heads=H)["rope"]
    torch.manual_seed(5)
    columns, rows = init_random_2d_freqs(D, 1, H, temperature=20.0, dtype=torch.float64)[:, 0]
    torch.testing.assert_close(
        rope.frequencies.double(), torch.stack((rows, columns)), rtol=1e-6, atol=1e-7
    )
