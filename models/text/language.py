"""A causal language model, and text generation.

Shapes: B texts, L tokens, V the vocabulary's size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import irpe

from .body import Body, Spec, tables
from .cache import Cache, Memory

# (state, tokens [B, L], positions [B, L]) -> (logits [B, L, V], state); see CausalLM.reader.
Reader = Callable[[Cache | None, Tensor, Tensor], tuple[Tensor, Cache | None]]


class CausalLM(nn.Module):
    """A causal language model.

    Args:
        vocab_size: V.
        encoding: spec of the encoding, or None.
        tied: whether output layer and embedding share weights.
        options: further arguments of ``Body``.
    """

    def __init__(
        self,
        vocab_size: int,
        encoding: Spec | None = "rope",
        tied: bool = True,
        **options: object,
    ) -> None:
        super().__init__()
        self.body = Body(vocab_size, encoding=encoding, causal=True, **options)  # type: ignore[arg-type]
        self.head = None
        if not tied:
            self.head = nn.Linear(self.body.dim, vocab_size, bias=False)
            nn.init.normal_(self.head.weight, std=self.body.dim**-0.5)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        state: Cache | None = None,
        *,
        seen: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Return the logits of the next token, at each token.

        Args:
            tokens: integers ``[B, L]``.
            positions: increasing positions ``[L]`` or ``[B, L]``; None: indices without padding,
                after the tokens of the state.
            state: the cache of the same B texts; ``Cache()`` at the start; None: no cache.
            seen: bool ``[B, L]``, False for padding, such as left padding of prompts.
            mask: bool ``[B | 1, L, S]``, True if visible, for texts packed into one row; positions
                may then restart.

        Returns:
            Logits ``[B, L, V]``; with a state, also the new state.

        Raises:
            irpe.IrpeError: if positions do not increase, the state is of other texts, or there are
                more tokens than rows in a table of positions.
        """
        if state is None:
            return self._logits(self.body(tokens, None, seen, positions, mask))
        if not isinstance(state, Memory):
            out, state = self.body.read(tokens, None, seen, positions, state, mask)
            return self._logits(out), state
        if any(given is not None for given in (positions, seen, mask)):
            raise irpe.IrpeError(
                "a memory sets positions itself: positions, seen and mask must be None"
            )
        hidden = []
        for piece in tokens.split(list(state.pieces(tokens.shape[1])), 1):
            out, state = self.body.read(piece, None, None, None, state)
            hidden.append(out)
        return self._logits(torch.cat(hidden, 1)), state

    def memory(self, block: int, size: int | None = None) -> Memory:
        """Return an empty memory for texts that are read in blocks; see ``Memory``.

        Args:
            block: tokens of a block.
            size: tokens kept from block to block; None: ``block``.

        Raises:
            irpe.IrpeError: if positions are added at the input, so that cached tokens cannot get
                new positions.
        """
        size = block if size is None else size
        if block < 1 or size < 0:
            raise irpe.IrpeError(f"block={block} and size={size} are not numbers of tokens")
        if any(isinstance(m, irpe.Encoding) for m in self.body.at_input.children()):
            raise irpe.IrpeError(
                "a memory needs an encoding in attention, such as pia or rope; here positions are "
                "added at the model's input, so cached tokens contain them"
            )
        renumber = any(hasattr(block.attn, "pia") for block in self.body.blocks)
        return Memory(block=block, size=size, renumber=renumber)

    def reader(self, block: int | None = None, size: int | None = None) -> Reader:
        """Return the model as a function of (state, tokens, positions), for scoring texts.

        Args:
            block: tokens of a block of a memory, which sets positions itself; None: calls are
                independent and return no state.
            size: see ``memory``.
        """

        def alone(state: Cache | None, tokens: Tensor, positions: Tensor) -> tuple[Tensor, None]:
            counted = torch.arange(tokens.shape[1], device=tokens.device)
            return self(tokens, None if bool((positions == counted).all()) else positions), None

        def reading(state: Cache | None, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Cache]:
            return self(tokens, state=empty if state is None else state)

        if block is None:
            return alone
        empty = self.memory(block, size)
        return reading

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(hidden)
        return nn.functional.linear(hidden, self.body.embedding.weight)

    def no_weight_decay(self) -> set[str]:
        return tables(self)


@torch.no_grad()
def generate(
    model: CausalLM,
    tokens: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    state: Cache | None = None,
    generator: torch.Generator | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Continue texts token by token.

    Args:
        model: the language model.
        tokens: ``[B, L]``, the prompts.
        count: number of tokens to add.
        temperature: divisor of the logits; 0: always the most likely token.
        state: the cache before the tokens; None: empty.
        generator: random generator, on the CPU.
        seen: bool ``[B, L]``, False for left padding; None: no padding.

    Returns:
        The new tokens, ``[B, count]``.

    Raises:
        irpe.IrpeError: if the temperature is negative, or the last token of a text is padding.
    """
    if seen is not None and not bool(seen[:, -1:].all()):
        raise irpe.IrpeError("the last token of a text must not be padding: pad texts on the left")
    if temperature < 0:
        raise irpe.IrpeError(f"temperature={temperature} is negative")
    state, found, given = Cache() if state is None else state, [], tokens
    for _ in range(count):
        logits, state = model(given, state=state, seen=seen)
        seen = None  # new tokens are not padding
        last = logits[:, -1].float().cpu()
        if temperature:
            given = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
        else:
            given = last.argmax(-1, keepdim=True)
        given = given.to(tokens.device)
        found.append(given)
    return torch.cat(found, 1) if found else tokens[:, :0]
