"""The transformer of all text models: tokens to hidden states, with any encoding.

Shapes: B texts, L new tokens, S tokens with those in the cache, C channels.
"""

import torch
from torch import Tensor, nn

import irpe

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
    """Embedding, blocks and a final norm.

    As in fairseq, token vectors have unit variance at the input, and learned positions 1 / C. A
    sinusoid has variance 1/2, so it does not dominate.

    Args:
        vocab_size: number of tokens.
        dim: C.
        depth: number of blocks.
        num_heads: H, a divisor of C.
        mlp_ratio: hidden channels of the MLP, as a multiple of C.
        encoding: spec of the encoding, or None.
        causal: whether the attention is causal.
        types: number of token types, such as question and context; 0: no types.
        drop: dropout probability of embeddings and outputs of attention and MLP.
        attn_drop: dropout probability of attention probabilities.
        act_drop: dropout probability of the MLP's hidden channels.
        backend: see ``irpe.attention``.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        encoding: Spec | None = None,
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
        if encoding is not None:
            self.attach(encoding)

    def attach(self, spec: Spec) -> None:
        """Add an encoding; a neutral one does not change outputs until it is trained."""
        if "learned" in attach(self, spec):
            nn.init.normal_(self.at_input.learned.weight, std=self.dim**-0.5)

    def forward(
        self,
        tokens: Tensor,
        types: Tensor | None = None,
        seen: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states.

        Args:
            tokens: integers ``[B, L]``.
            types: token types ``[B, L]``; None: all are 0.
            seen: bool ``[B, L]``, False for padding.
            positions: positions ``[L]`` or ``[B, L]``; None: indices without padding.
            mask: bool ``[B | 1, L, L]``, True if visible, for texts packed into one row with
                positions that restart.

        Returns:
            ``[B, L, C]``.
        """
        return self.read(tokens, types, seen, positions, Cache(), mask)[0]

    def read(
        self,
        tokens: Tensor,
        types: Tensor | None,
        seen: Tensor | None,
        positions: Tensor | None,
        state: Cache,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Return ``forward`` after the tokens of a state, and the new state.

        The mask is ``[B | 1, L, S]``.
        """
        check_tokens(tokens)
        self._check_state(tokens, state)
        every = _all_seen(tokens, seen, state)
        here, among, places = self._places(tokens, positions, state, every, mask is None)
        x = self.embedding(tokens) * self.dim**0.5
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        x = self.drop(irpe.encodings_of(self.at_input).embed(x, here))
        if every is not None:
            own = every.unsqueeze(1)
            mask = own if mask is None else mask & own
        mask = None if mask is None else mask.unsqueeze(1)
        layers, terms = [], irpe.encodings_of(self.for_all).terms(among)
        for block, past in zip(self.blocks, state.layers or [None] * len(self.blocks), strict=True):
            x, kept = block(x, here, among, past, mask, terms)
            layers.append(kept)
        return self.norm(x), state.grown(tuple(layers), places, every)

    def _places(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        state: Cache,
        every: Tensor | None,
        ordered: bool,
    ) -> tuple[irpe.Sequence, irpe.Sequence, Tensor]:
        """Return the geometry of new tokens, of new tokens and all keys, and all positions.

        Args:
            tokens: the new tokens.
            positions: their positions, or None.
            state: the state before.
            every: bool ``[B, S]``, False for padding; None: no padding.
            ordered: whether positions must increase.
        """
        length, past = tokens.shape[1], state.positions
        if positions is None and past is None and every is None:
            whole = irpe.Sequence(length)
            return whole, whole, torch.arange(length, device=tokens.device)
        if positions is None:
            positions = torch.arange(1, length + 1, device=tokens.device)
            if every is not None:
                positions = every[:, -length:].cumsum(1) if length else positions.expand(0, -1)
            before = past[..., -1:] if past is not None and past.shape[-1] else -1
            # Padding before the first token has position 0.
            positions = (before + positions).clamp(min=0)
        places = positions
        if past is not None:
            if past.dim() != positions.dim():
                rows = max((past, positions), key=lambda p: p.dim()).shape[0]
                past, positions = past.expand(rows, -1), positions.expand(rows, -1)
            places = torch.cat((past, positions), -1)
        if ordered and self.causal and not torch.compiler.is_compiling():
            _check_order(places, every, positions, past)
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
                "use it with the same batch"
            )


def _all_seen(tokens: Tensor, seen: Tensor | None, state: Cache) -> Tensor | None:
    """Return bool ``[B, S]``, False for padding, with the tokens of the state first; or None."""
    if seen is not None and (seen.dtype != torch.bool or seen.shape != tokens.shape):
        raise irpe.IrpeError(
            f"seen is bool like tokens {list(tokens.shape)}, not {seen.dtype} {list(seen.shape)}"
        )
    if seen is None and state.seen is None:
        return None
    new = torch.ones_like(tokens, dtype=torch.bool) if seen is None else seen
    before = state.seen
    if before is None:
        size = 0 if state.positions is None else state.positions.shape[-1]
        before = new.new_ones(len(tokens), size)
    return torch.cat((before, new), 1)


def _check_order(
    places: Tensor, every: Tensor | None, positions: Tensor, past: Tensor | None
) -> None:
    """Raise unless positions increase, padding ignored."""
    if places.device.type != "cpu":
        return
    rising = places.diff() > 0
    if every is not None:
        rising = rising | ~every[:, :-1] | ~every[:, 1:]
    if not rising.all():
        raise irpe.IrpeError(
            f"positions {positions.tolist()!s:.80} do not increase from token to token"
            + (f", after {past[..., -1:].tolist()!s:.40}" if past is not None else "")
            + "; texts packed into one row need a mask"
        )


def attach(model: nn.Module, spec: Spec) -> set[str]:
    """Add an encoding, or a sum, to a body, and return the names of its modules.

    It is added to every attention module, or as in its paper: at the input, or once for all layers.

    Raises:
        irpe.IrpeError: if the encoding is for images, or the body has one of the same name.
    """
    return {name for part in irpe.parse(spec).parts for name in _attach_one(model, part)}


def _attach_one(model: nn.Module, spec: irpe.Spec) -> set[str]:
    attentions = [block.attn for block in model.blocks]
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
    """Return the names of the parameters of encodings, which have no weight decay."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, irpe.Encoding)
        for name, _ in module.named_parameters()
    }


def check_tokens(tokens: Tensor) -> None:
    """Raise IrpeError unless tokens are integers ``[B, L]``."""
    if tokens.dim() != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        raise irpe.IrpeError(f"tokens are integers [B, L], not {tokens.dtype} {list(tokens.shape)}")
