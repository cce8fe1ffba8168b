"""BERT (Devlin et al., 2019), with absolute or relative positions, for released weights.

Huang et al. (2020) trained BERT with Shaw's positions and with their fourth method. Their names in
transformers up to 4.57 are ``relative_key`` and ``relative_key_query``.

Shapes: B texts, L tokens, C channels, D channels of a head.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import irpe

from .attention import Attention
from .body import Spec, attach, check_tokens


class PostNormBlock(nn.Module):
    """Attention, then an MLP; a norm after each."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        drop: float,
        attn_drop: float,
        eps: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, False, attn_drop, backend)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x: Tensor,
        where: irpe.Geometry,
        mask: Tensor | None,
        terms: tuple[irpe.Term, ...],
    ) -> Tensor:
        mixed, _ = self.attn(x, where, where, mask=mask, terms=terms)
        x = self.norm1(x + self.drop(mixed))
        hidden = nn.functional.gelu(self.mlp["fc1"](x))
        return self.norm2(x + self.drop(self.mlp["fc2"](hidden)))


class Bert(nn.Module):
    """BERT's encoder without its pooler: a body for ``Classifier`` and ``SpanFinder``.

    Args:
        vocab_size: number of tokens.
        dim: C.
        depth: number of blocks.
        num_heads: H, a divisor of C.
        hidden: hidden channels of the MLP.
        encoding: spec of the encoding: ``learned,length=512`` as in BERT, ``shaw,clip=511`` or
            ``huang4,clip=511`` as in ``relative_key`` and ``relative_key_query``, or any other.
        types: number of token types.
        drop: dropout probability of embeddings and outputs of attention and MLP.
        attn_drop: dropout probability of attention probabilities.
        eps: epsilon of the norms.
        backend: see ``irpe.attention``.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int = 3072,
        encoding: Spec | None = "learned,length=512",
        types: int = 2,
        drop: float = 0.1,
        attn_drop: float = 0.1,
        eps: float = 1e-12,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.embedding, self.types = nn.Embedding(vocab_size, dim), nn.Embedding(types, dim)
        self.at_input, self.for_all = nn.Module(), nn.Module()
        self.norm, self.drop = nn.LayerNorm(dim, eps=eps), nn.Dropout(drop)
        given = (dim, num_heads, hidden, drop, attn_drop, eps, backend)
        self.blocks = nn.ModuleList(PostNormBlock(*given) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if encoding is not None:
            self.attach(encoding)

    def attach(self, spec: Spec) -> None:
        """Add an encoding; a neutral one does not change outputs until it is trained."""
        attach(self, spec)

    def forward(
        self, tokens: Tensor, types: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Return hidden states.

        Args:
            tokens: integers ``[B, L]``.
            types: token types ``[B, L]``; None: all are 0.
            seen: bool ``[B, L]``, False for padding.

        Returns:
            ``[B, L, C]``.
        """
        check_tokens(tokens)
        where = irpe.Sequence(tokens.shape[1])
        types = torch.zeros_like(tokens) if types is None else types
        x = self.embedding(tokens) + self.types(types)
        x = self.drop(self.norm(irpe.encodings_of(self.at_input).embed(x, where)))
        mask = None if seen is None else seen[:, None, None]
        terms = irpe.encodings_of(self.for_all).terms(where)
        for block in self.blocks:
            x = block(x, where, mask, terms)
        return x


# Option -> its name in config.json.
_OPTIONS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "types": "type_vocab_size",
    "drop": "hidden_dropout_prob",
    "attn_drop": "attention_probs_dropout_prob",
    "eps": "layer_norm_eps",
}
_SPECS = {
    "absolute": "learned,length={length}",
    "relative_key": "shaw,clip={clip}",
    "relative_key_query": "huang4,clip={clip}",
}


def released_options(config: Mapping[str, object]) -> dict[str, object]:
    """Return the options of ``Bert`` for the ``config.json`` of a released checkpoint.

    Raises:
        irpe.IrpeError: if ``Bert`` does not support the positions or the activation.
    """
    kind = config.get("position_embedding_type") or "absolute"
    if kind not in _SPECS:
        raise irpe.IrpeError(f"position_embedding_type={kind!r} is not one of {', '.join(_SPECS)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise irpe.IrpeError(f"hidden_act={config['hidden_act']!r} is not gelu")
    length = int(config.get("max_position_embeddings", 512))  # type: ignore[call-overload]
    options = {ours: config[theirs] for ours, theirs in _OPTIONS.items() if theirs in config}
    return {**options, "encoding": _SPECS[str(kind)].format(length=length, clip=length - 1)}


# Released names except projections: (pattern, name in ``Bert``).
_NAMES = [
    (r"embeddings\.word_embeddings\.(weight)", r"embedding.\1"),
    (r"embeddings\.token_type_embeddings\.(weight)", r"types.\1"),
    (r"embeddings\.LayerNorm\.(weight|bias)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(\w+)", r"blocks.\1.norm2.\2"),
]
_PROJECTION = r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(weight|bias)"
_DISTANCES = r"encoder\.layer\.(\d+)\.attention\.self\.distance_embedding\.weight"
# Heads of pre-training, and a buffer of positions.
_LEFT_OUT = r"pooler\..*|cls\..*|embeddings\.position_ids|classifier\..*"


def released_weights(weights: Mapping[str, Tensor], encoding: str) -> dict[str, Tensor]:
    """Return the weights of a released BERT with the names of ``SpanFinder(Bert(...))``.

    Args:
        weights: the released weights, with or without the prefix ``bert.``.
        encoding: the model's encoding, from ``released_options``. The tables of ``shaw`` and
            ``huang4`` are the released ``distance_embedding [2 P - 1, D]`` as ``[1, D, 2 P - 1]``.

    Returns:
        ``body.*``, and ``head.*`` if the checkpoint has a head for questions.

    Raises:
        irpe.IrpeError: if there are names that are not BERT's.
    """
    table = {"shaw": "shaw.table_k", "huang4": "huang.table"}.get(encoding.partition(",")[0])
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for full, value in weights.items():
        name = full.removeprefix("bert.")
        # Older files have TensorFlow's names of norms.
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if match := re.fullmatch(_PROJECTION, name):
            layer, which, kind = match.groups()
            parts.setdefault(f"body.blocks.{layer}.attn.qkv.{kind}", {})[which] = value
        elif (match := re.fullmatch(_DISTANCES, name)) and table:
            found[f"body.blocks.{match[1]}.attn.{table}"] = value.T.unsqueeze(0)
        elif name == "embeddings.position_embeddings.weight":
            if table is None:  # models with relative positions have it too, but do not use it
                found["body.at_input.learned.weight"] = value
        elif match := re.fullmatch(r"qa_outputs\.(weight|bias)", name):
            found[f"head.{match[1]}"] = value
        elif ours := [re.sub(p, n, name) for p, n in _NAMES if re.fullmatch(p, name)]:
            found[f"body.{ours[0]}"] = value
        elif not re.fullmatch(_LEFT_OUT, name):
            unknown.append(full)
    for name, three in parts.items():
        if len(three) < 3:
            unknown.append(f"{name} without all of query, key and value")
        else:
            found[name] = torch.cat([three[which] for which in ("query", "key", "value")])
    if unknown:
        raise irpe.IrpeError(f"these are not a BERT's weights: {', '.join(unknown[:4])}")
    return found
