"""The tables of benchmarks/ablation.py: their rows, what is compared, and what the paper found.

Rows that are the same model are the same runs, whatever tables they stand in. The paper is Wu et
al., ICCV 2021: top-1 of DeiT-S on ImageNet, in percent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

# The published models' ratios: irpe/zoo.py.
RATIOS = {"euc": 20.0, "quant": 33.0, "cross": 20.0, "product": 1.9}
SEVERAL = {on: f"rpe-1.9-product-ctx-1-{on}" for on in ("q", "k", "v", "qk", "qkv")}
CTX, BIAS = SEVERAL["k"], "rpe-1.9-product-bias-1-k"


@dataclass(frozen=True)
class Cell:
    """A model: spec of its encoding, and whether it has a learned absolute embedding.

    Attributes:
        scale: canvases, and with them the grid, are so many times as large.
        sizes: whether it is tested at other sizes too.
        budget: share of the steps of training that it has.
    """

    encoding: str | None = None
    absolute: bool = True
    scale: int = 1
    sizes: bool = False
    budget: float = 1.0

    @property
    def key(self) -> str:
        parts = [self.encoding or "none", "absolute" if self.absolute else "relative"]
        parts += [f"scale {self.scale}"] * (self.scale > 1) + ["sizes"] * self.sizes
        parts += [f"budget {self.budget:g}"] * (self.budget != 1)
        return " | ".join(parts)


@dataclass(frozen=True)
class Comparison:
    """A question: the mean of the rows ``more`` minus that of the rows ``less``, seed by seed."""

    text: str
    more: tuple[str, ...]
    less: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows by name; the paper's figures of those that it has; how many seeds by default."""

    title: str
    text: str
    rows: dict[str, Cell]
    paper: dict[str, str]
    comparisons: tuple[Comparison, ...]
    seeds: int = 5


def _over(more: str, less: str) -> Comparison:
    return Comparison(f"{more} over {less}", (more,), (less,))


def _modes() -> Table:
    paper = {
        "absolute only": "79.9",
        "euc, bias": "80.1", "euc, ctx": "80.4", "quant, bias": "80.3", "quant, ctx": "80.5",
        "cross, bias": "80.5", "cross, ctx": "80.8",
        "product, bias": "80.5", "product, ctx": "80.9",
    }  # fmt: skip
    names = list(paper)[1:]

    def spec(method: str, mode: str) -> str:
        return f"rpe-{RATIOS[method]}-{method}-{mode}-{int(mode == 'ctx')}-k"

    def those(*parts: str) -> tuple[str, ...]:
        return tuple(name for name in names if set(parts) & set(name.split(", ")))

    return Table(
        "Modes and methods (Table 1)",
        "Beside a learned absolute embedding, on keys; bias with a table for each head, contextual "
        "with one for all, as in the paper.",
        {"absolute only": Cell(), **{name: Cell(spec(*name.split(", "))) for name in names}},
        paper,
        (
            Comparison("contextual over bias, all methods", those("ctx"), those("bias")),
            Comparison(
                "directed (cross, product) over undirected (euc, quant), both modes",
                those("cross", "product"),
                those("euc", "quant"),
            ),
            _over("product, ctx", "cross, ctx"),
            _over("product, ctx", "absolute only"),
            _over("product, bias", "absolute only"),
        ),
    )


def _shared() -> Table:
    return Table(
        "One table for all heads, or one for each (Table 2)",
        "Product, on keys, beside a learned absolute embedding.",
        {
            "bias, each head": Cell("rpe-1.9-product-bias-0-k"), "bias, shared": Cell(BIAS),
            "ctx, each head": Cell("rpe-1.9-product-ctx-0-k"), "ctx, shared": Cell(CTX),
        },
        {
            "bias, each head": "80.54", "bias, shared": "80.05",
            "ctx, each head": "80.99", "ctx, shared": "80.89",
        },
        (_over("bias, each head", "bias, shared"), _over("ctx, each head", "ctx, shared")),
    )  # fmt: skip


def _index() -> Table:
    rows = {
        f"{index}, {mode}, {grid}": Cell(spec + option, scale=scale)
        for scale, grid in ((1, "6x6"), (2, "12x12"))
        for mode, spec in (("bias", BIAS), ("ctx", CTX))
        for index, option in (("clip", ",index=clip"), ("piecewise", ""))
    }
    names = list(rows)
    return Table(
        "Clip or piecewise index (Table 3)",
        "Product, shared, on keys, beside a learned absolute embedding. The paper's grid is 14x14; "
        "it sees a difference only for longer sequences. 12x12: the canvases twice as large.",
        rows,
        dict(zip(names[:4], ("80.1", "80.0", "80.9", "80.9"), strict=True)),
        tuple(
            _over(piecewise, clip) for clip, piecewise in zip(names[::2], names[1::2], strict=True)
        ),
    )


def _both(specs: dict[str, str]) -> dict[str, Cell]:
    """None, absolute only, then each spec without and with the absolute embedding."""
    rows = {"none": Cell(None, False), "absolute only": Cell()}
    rows |= {name: Cell(spec, False) for name, spec in specs.items()}
    return rows | {f"absolute + {name}": Cell(spec) for name, spec in specs.items()}


def _where() -> Table:
    rows = _both(SEVERAL)
    figures = ["77.6", "79.9", "80.9", "80.9", "80.2", "81.0", "81.3"]
    figures += ["80.9", "80.9", "80.2", "81.1", "81.4"]
    beside = Comparison(
        "absolute + any over any alone", tuple(f"absolute + {on}" for on in SEVERAL), tuple(SEVERAL)
    )
    pairs = ("absolute only", "none"), ("k", "absolute only"), ("qkv", "absolute only")
    return Table(
        "Queries, keys, values, with and without an absolute embedding (Table 4)",
        "Product, contextual, shared.",
        rows,
        dict(zip(rows, figures, strict=True)),
        (*_pairs(*pairs, ("qkv", "k"), ("k", "v"), ("q", "k")), beside),
    )


def _buckets() -> Table:
    counts = {9: 0.5, 25: 1.0, 49: 1.9, 81: 2.0, 121: 2.5, 225: 3.5}
    rows = {"0": Cell()} | {
        str(count): Cell(f"rpe-{ratio}-product-ctx-1-k") for count, ratio in counts.items()
    }
    return Table(
        "Number of buckets (Fig. 3)",
        "Product, contextual, shared, on keys, beside a learned absolute embedding; 0: that alone. "
        "The paper's curve rises up to 50 buckets and is flat from there on.",
        rows,
        {"0": "79.9", "49": "80.9"},
        _pairs(("49", "0"), ("49", "9"), ("225", "49")),
    )


RIVALS = {"k": CTX, "qkv": SEVERAL["qkv"],
          **{name: name for name in ("rope-axial", "rope-mixed", "alibi")}}  # fmt: skip


def _rivals() -> Table:
    others = ("rope-axial", "rope-mixed", "alibi")
    pairs = [(name, "absolute only") for name in RIVALS]
    pairs += [(own, other) for own in ("k", "qkv") for other in others]
    return Table(
        "Against other encodings",
        "Product, contextual, shared (k, qkv) beside rotary embeddings of two axes (Heo et al., "
        "ECCV 2024) and ALiBi by Euclidean distance. The paper has no such table.",
        _both(RIVALS),
        {},
        _pairs(*pairs),
    )


def _sizes() -> Table:
    cells = {"absolute only": Cell(sizes=True), "absolute + k": Cell(CTX, sizes=True)}
    cells |= {name: Cell(spec, False, sizes=True) for name, spec in RIVALS.items()}
    return Table(
        "Trained at one size, tested at others",
        "Squares: the same canvases at another resolution, patches as before. Rectangles: the "
        "same canvases somewhere on a wider one. Tables stay as they are; the absolute embedding "
        "is resized by timm. The paper has no such table.",
        cells,
        {},
        _pairs(
            *((name, "absolute only") for name in list(cells)[1:]),
            ("qkv", "rope-axial"),
            ("qkv", "rope-mixed"),
        ),
    )


def _budget() -> Table:
    cells = {"absolute only": Cell(), "k": Cell(CTX, False), "qkv": Cell(SEVERAL["qkv"], False)}
    cells |= {"absolute + k": Cell(CTX), "rope-axial": Cell("rope-axial", False)}
    shares = (0.25, 0.5, 1.0, 2.0)
    pairs = [
        (f"{more}, {share:.0%}", f"{less}, {share:.0%}")
        for share in shares
        for more, less in [
            *((row, "absolute only") for row in list(cells)[1:]),
            ("qkv", "rope-axial"),
        ]
    ]
    return Table(
        "Length of training",
        "Each length is a schedule of its own; 100%: that of the other tables. The longest alone "
        "may take more than 40 seconds. Product, contextual, shared. The paper trains for 300 "
        "epochs.",
        {f"{row}, {share:.0%}": replace(cell, budget=share)
         for row, cell in cells.items() for share in shares},
        {},
        _pairs(*pairs),
    )  # fmt: skip


def _decide() -> Table:
    rows = {"absolute only": Cell(), "product, no absolute": Cell(CTX, False)}
    rows |= {method: Cell(f"rpe-{ratio}-{method}-ctx-1-k") for method, ratio in RATIOS.items()}
    questions = _pairs(("product", "absolute only"), ("product, no absolute", "absolute only"))
    directed = Comparison(
        "directed (cross, product) over undirected (euc, quant)",
        ("cross", "product"),
        ("euc", "quant"),
    )
    return Table(
        "Two questions, with more seeds",
        "Contextual, shared, on keys; beside a learned absolute embedding but where it says no.",
        rows,
        dict(zip(rows, ("79.9", "80.9", "80.4", "80.5", "80.8", "80.9"), strict=True)),
        (*questions, directed),
        seeds=20,
    )


def _pairs(*pairs: Iterable[str]) -> tuple[Comparison, ...]:
    return tuple(_over(*pair) for pair in pairs)


TABLES = {
    "modes": _modes(), "shared": _shared(), "index": _index(), "where": _where(),
    "buckets": _buckets(), "rivals": _rivals(), "sizes": _sizes(), "budget": _budget(),
    "decide": _decide(),
}  # fmt: skip
