"""The transformer below every head: tokens to hidden states, with any encoding.

Shapes: B texts, L tokens read now, S tokens seen in all, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import irpe

from ..geometries import Recent
from .attention import Attention
from .cache import Cache, Kept

Spec = irpe.Spec | str


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        causal: bool,
        drop: float,
        attn_drop: float,
        act_drop: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, causal, attn_drop, backend)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.drop, self.act_drop = nn.Dropout(drop), nn.Dropout(act_drop)

    def forward(
        self,
        x: Tensor,
        here: irpe.Geometry,
        seen: irpe.Geometry,
        past: Kept | None,
        mask: Tensor | None,
        terms: tuple[irpe.Term, ...],
    ) -> tuple[Tensor, Kept]:
        mixed, kept = self.attn(self.norm1(x), here, seen, past, mask, terms)
        x = x + self.drop(mixed)
        hidden = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.drop(self.mlp["fc2"](self.act_drop(hidden))), kept


class Body(nn.Module):
    """Embedding, blocks and a last norm.

    Token vectors have unit variance at the input, and learned positions a C-th of it (as in
    fairseq), so that a sinusoid, whose variance is a half, does not drown them.

    Args:
        vocab_size: tokens there are. dim: C. depth: blocks. num_heads: divides C.
        mlp_ratio: hidden channels of the MLP over C.
        encoding: an encoding's spec, several, or None.
        causal: whether a token sees no later one.
        types: kinds of tokens that have a vector each, as question and context; 0: none.
        drop: dropout on embeddings and on what blocks add. attn_drop: on attention
            probabilities. act_drop: on the MLP's hidden channels.
        backend: see ``irpe.attention``.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        encoding: Spec | Sequence[Spec] | None = None,
        causal: bool = False,
        types: int = 0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        act_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.causal = dim, causal
        self.embedding = nn.Embedding(vocab_size, dim)
        self.types = nn.Embedding(types, dim) if types else None
        for table in (self.embedding, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=dim**-0.5)
        self.at_input, self.for_all = nn.Module(), nn.Module()
        hidden = int(dim * mlp_ratio)
        given = (dim, num_heads, hidden, causal, drop, attn_drop, act_drop, backend)
        self.blocks = nn.ModuleList(Block(*given) for _ in range(depth))
        self.drop, self.norm = nn.Dropout(drop), nn.LayerNorm(dim)
        self._whole = Recent(irpe.Sequence)
        one = encoding is None or isinstance(encoding, Spec)
        for spec in () if encoding is None else (encoding,) if one else encoding:
            self.attach(spec)

    def attach(self, spec: Spec) -> None:
        """Put a further encoding on; one that is neutral changes nothing until it is trained."""
        if "learned" in attach(self, spec):
            nn.init.normal_(self.at_input.learned.weight, std=self.dim**-0.5)

    def forward(
        self,
        tokens: Tensor,
        types: Tensor | None = None,
        seen: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            tokens: integers ``[B, L]``. types: of the tokens ``[B, L]``; None: all are 0.
            seen: bool ``[B, L]``, False for padding.
            positions: of the tokens, ``[L]`` or ``[B, L]``; None: 0 to L - 1.

        Returns:
            ``[B, L, C]``.
        """
        return self.read(tokens, types, seen, positions, Cache())[0]

    def read(
        self,
        tokens: Tensor,
        types: Tensor | None,
        seen: Tensor | None,
        positions: Tensor | None,
        state: Cache,
    ) -> tuple[Tensor, Cache]:
        """As ``forward``, after the tokens of a state; the state after these comes back too."""
        check_tokens(tokens)
        self._check_state(tokens, state)
        here, among, places = self._places(tokens, positions, state)
        x = self.embedding(tokens) * self.dim**0.5
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        x = self.drop(irpe.hooks(self.at_input).embed(x, here))
        mask = None if seen is None else seen[:, None, None]
        layers, terms = [], irpe.hooks(self.for_all).terms(among)
        for block, past in zip(self.blocks, state.layers or [None] * len(self.blocks), strict=True):
            x, kept = block(x, here, among, past, mask, terms)
            layers.append(kept)
        return self.norm(x), state.grown(tuple(layers), places)

    def _places(
        self, tokens: Tensor, positions: Tensor | None, state: Cache
    ) -> tuple[irpe.Sequence, irpe.Sequence, Tensor]:
        """Where the new tokens are, these among all that were seen, and the positions of all."""
        length, past = tokens.shape[1], state.positions
        if positions is None and past is None:
            whole = self._whole.of(length)
            return whole, whole, torch.arange(length, device=tokens.device)
        if positions is None:
            positions = torch.arange(length, device=tokens.device)
            if past.shape[-1]:
                positions = past[..., -1:] + 1 + positions
        places = positions
        if past is not None:
            if past.dim() != positions.dim():
                rows = max((past, positions), key=lambda p: p.dim()).shape[0]
                past, positions = past.expand(rows, -1), positions.expand(rows, -1)
            places = torch.cat((past, positions), -1)
        rising = places.device.type != "cpu" or not self.causal or (places.diff() > 0).all()
        if not rising:
            raise irpe.IrpeError(
                f"positions {positions.tolist()!s:.80} do not increase from token to token"
                + (f", after {past[..., -1:].tolist()!s:.40}" if past is not None else "")
            )
        here = irpe.Sequence(length, positions=positions)
        if past is None:
            return here, here, places
        return here, irpe.Sequence(length, positions=positions, keys=places), places

    def _check_state(self, tokens: Tensor, state: Cache) -> None:
        if not state.layers:
            return
        if len(state.layers) != len(self.blocks):
            raise irpe.IrpeError(
                f"the cache is of a model with {len(state.layers)} blocks, "
                f"but this one has {len(self.blocks)}"
            )
        texts = state.layers[0].texts
        if texts != tokens.shape[0]:
            raise irpe.IrpeError(
                f"the cache is of {texts} texts, but tokens are {list(tokens.shape)}: "
                "it serves the batch that it was made with"
            )


def attach(model: nn.Module, spec: Spec) -> set[str]:
    """Put an encoding on a body, and return its modules' names there.

    It goes on every attention, or where its authors have it: at the input, or one for all layers.
    """
    spec, attentions = irpe.parse(spec), [block.attn for block in model.blocks]
    if 1 not in spec.axes:
        raise irpe.IrpeError(f"{spec} is for images: text has positions on one axis")
    first = attentions[0]
    options = {"num_heads": first.num_heads, "causal": first.causal}
    options |= {"device": first.qkv.weight.device, "dtype": first.qkv.weight.dtype}
    for attention in attentions:
        made = irpe.build(spec, dim=model.dim, **options)
        alone = spec.at_input or any(encoding.one_for_all for encoding in made.values())
        owner = model.at_input if spec.at_input else model.for_all if alone else attention
        for name, encoding in made.items():
            if hasattr(owner, name):
                raise irpe.IrpeError(f"{spec}: there is an encoding {name!r} already")
            setattr(owner, name, encoding)
        if alone:
            break
    return set(made)


def tables(model: nn.Module) -> set[str]:
    """Names of encodings' parameters: a factor of q . k does nothing at 1, so none may decay."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, irpe.Encoding)
        for name, _ in module.named_parameters()
    }


def check_tokens(tokens: Tensor) -> None:
    """Raises IrpeError unless tokens are integers ``[B, L]``."""
    if tokens.dim() != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        raise irpe.IrpeError(f"tokens are integers [B, L], not {tokens.dtype} {list(tokens.shape)}")
