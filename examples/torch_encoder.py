"""Plain torch: nn.TransformerEncoder with relative positions, on rectangles with padding.

    python examples/torch_encoder.py         (needs nothing but torch)

Expect the report of attach; outputs on two grids that change only after the tables are trained; and
the error for a forward pass without a grid.
"""

import torch
from torch import nn

import irpe

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True, dropout=0.0)
encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

# As in a detector: a feature map [B, C, height, width], the second image with padding.
features = torch.randn(2, 64, 7, 10)
padding = torch.zeros(2, 7, 10, dtype=torch.bool)
padding[1, :, 8:] = True
tokens, padding = features.flatten(2).mT, padding.flatten(1)

with torch.no_grad():
    before = encoder(tokens, src_key_padding_mask=padding)
    print(irpe.attach(encoder, "rpe-2.0-product-ctx-1-qk"))

    with irpe.located(irpe.Grid(7, 10)):  # around each forward pass, for all layers
        after = encoder(tokens, src_key_padding_mask=padding)
        print(f"fresh tables change outputs by {(after - before)[~padding].abs().max():.0e}")
        for name, table in encoder.named_parameters():
            if "lookup_table" in name:
                table.normal_(std=0.3)
        trained = encoder(tokens, src_key_padding_mask=padding)
        print(f"others change them by {(trained - before)[~padding].abs().max():.1f}")

    with irpe.located(irpe.Grid(3, 5)):  # another size, the same tables
        print(f"on 3x5: {list(encoder(torch.randn(1, 15, 64)).shape)}")

    try:
        encoder(tokens)
    except irpe.IrpeError as error:
        print(f"IrpeError: {error}")
