"""Heads of a bidirectional body: classification of texts, and answers as spans.

A body, ``Body`` or ``Bert``, maps (tokens, types, seen) to hidden states ``[B, L, C]`` and has an
attribute ``dim``.
"""

import torch
from torch import Tensor, nn

from .body import tables


class Classifier(nn.Module):
    """Classifies a text by the mean of its hidden states."""

    def __init__(self, body: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.dim, num_classes)

    def forward(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return logits ``[B, classes]`` of tokens ``[B, L]``; ``seen`` is False for padding."""
        hidden = self.body(tokens, None, seen)
        if seen is None:
            return self.head(hidden.mean(1))
        counted = seen.unsqueeze(-1)
        return self.head((hidden * counted).sum(1) / counted.sum(1).clamp(min=1))

    def no_weight_decay(self) -> set[str]:
        return tables(self)


class SpanFinder(nn.Module):
    """Finds the first and the last token of an answer in a context (Devlin et al., 2019)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.dim, 2)

    def forward(
        self, tokens: Tensor, types: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the first and the last token.

        Args:
            tokens: question and context ``[B, L]``.
            types: 0 for the question, 1 for the context.
            seen: bool ``[B, L]``, False for padding.

        Returns:
            ``[B, L]`` each; padding has the lowest value of the dtype.
        """
        logits = self.head(self.body(tokens, types, seen))
        if seen is not None:
            logits = logits.masked_fill(~seen.unsqueeze(-1), torch.finfo(logits.dtype).min)
        start, end = logits.unbind(-1)
        return start, end

    def no_weight_decay(self) -> set[str]:
        return tables(self)
