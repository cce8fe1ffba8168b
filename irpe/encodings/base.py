"""The base class of encodings, the registry of specs, ``parse`` and ``build``."""

import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..buckets import BucketFunction, BucketIds
from ..buckets.ids import number_of
from ..errors import IrpeError
from ..geometry import Geometry
from ..spec import LayerSize, Spec, Sum, read_options
from ..terms import Term


class Encoding(nn.Module):
    """A position encoding as a module; a model calls its four methods.

    Each method does nothing unless a subclass overrides it.

    Attributes:
        spec: the spec that it was built from; not a sum.
        one_for_all: whether all layers of a model share one module, as in the paper.
        decays: whether weight decay applies to its parameters.
    """

    spec: Spec
    one_for_all: bool = False
    decays: bool = True

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Return the encoded tokens ``[B, L, C]`` at the model's input."""
        return x

    def inputs(self, xq: Tensor, xk: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return encoded inputs of the query and key projections, ``[B, L, C]``, ``[B, S, C]``."""
        return xq, xk

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return encoded queries ``[B, H, L, D]`` and keys ``[B, H, S, D]``."""
        return q, k

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        """Return the terms for ``irpe.attention``; concatenate those of several encodings."""
        return ()

    def extra_repr(self) -> str:
        shapes = (f"{n}={list(p.shape)}" for n, p in self.named_parameters(recurse=False))
        return ", ".join((str(self.spec), *shapes))


class TableEncoding(Encoding):
    """An encoding of tables with a row for each bucket, initialised to zero.

    Args:
        spec: the encoding.
        size: sizes of the layer.
        function: maps offsets to buckets. If the layer has prefix tokens, one more bucket holds
            all pairs with one.
    """

    def __init__(self, spec: Spec, size: LayerSize, function: BucketFunction) -> None:
        super().__init__()
        self.spec, self.function, self.prefix = spec, function, size.prefix
        self.num_buckets = function.size + (size.prefix > 0)
        self.number = number_of(function)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = number_of(self.function)  # numbers differ between processes

    def reset_parameters(self) -> None:
        """Zero the tables; call it after ``to_empty`` if they were built on the meta device."""
        for table in self.parameters():
            nn.init.zeros_(table)

    def buckets(self, geometry: Geometry) -> BucketIds:
        """Return the buckets; raise IrpeError if only one of geometry and table has a prefix."""
        buckets = BucketIds(self.function, geometry, self.number)
        has_prefix = False
        if geometry.prefix > 0 or geometry.key_prefix > 0:  # a branch, since sizes may be symbolic
            has_prefix = True
        if has_prefix != (self.prefix > 0):
            raise IrpeError(
                f"{geometry!r} has {'a' if has_prefix else 'no'} prefix, but the table of "
                f"{self.spec} was built {'with' if self.prefix else 'without'} a bucket for one: "
                f"build it with prefix={int(has_prefix)}, or attach inside "
                "`with irpe.located(grid):` of such a grid"
            )
        return buckets


class Encodings:
    """Several encodings, applied one after the other; see ``Encoding`` for the methods.

    Tables are multiplied with unrotated queries and keys: with rotated ones, the logits would
    depend on absolute positions. So if there are both rotations and tables, ``transform`` returns
    the rotated channels followed by the unrotated ones, and ``terms`` returns tables that are zero
    for the rotated ones. The scale of attention is still D ** -0.5.
    """

    def __init__(self, encodings: tuple[Encoding, ...]) -> None:
        self.encodings = encodings
        self._transforms = any(type(e).transform is not Encoding.transform for e in encodings)

    @property
    def by_length(self) -> bool:
        """Whether ``transform`` depends on the largest position; a cache then stores raw keys."""
        return any(getattr(e.spec, "by_length", False) for e in self.encodings)

    def embed(self, x: Tensor, geometry: Geometry) -> Tensor:
        for encoding in self.encodings:
            x = encoding.embed(x, geometry)
        return x

    def inputs(self, xq: Tensor, xk: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        for encoding in self.encodings:
            xq, xk = encoding.inputs(xq, xk, geometry)
        return xq, xk

    def transform(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if not self._transforms:
            return q, k
        before = {"query": q, "key": k}
        for encoding in self.encodings:
            q, k = encoding.transform(q, k, geometry)
        for kind in self._content(self._terms(geometry)):
            more = [before[kind], torch.zeros_like(before["key" if kind == "query" else "query"])]
            more_q, more_k = more if kind == "query" else more[::-1]
            q, k = torch.cat((q, more_q), -1), torch.cat((k, more_k), -1)
        return q, k

    def terms(self, geometry: Geometry) -> tuple[Term, ...]:
        terms = self._terms(geometry)
        content = self._content(terms)
        return tuple(
            term.with_table(_padded(term.table, content.index(term.kind), len(content)))
            if term.kind in content
            else term
            for term in terms
        )

    def _terms(self, geometry: Geometry) -> tuple[Term, ...]:
        return tuple(term for e in self.encodings for term in e.terms(geometry))

    def _content(self, terms: tuple[Term, ...]) -> list[str]:
        """Return the kinds of terms, query and key, that need the unrotated channels."""
        kinds = {term.kind for term in terms} if self._transforms else set()
        if "channels" in kinds:
            names = " + ".join(dict.fromkeys(str(e.spec) for e in self.encodings))
            raise IrpeError(
                f"{names}: scales per channel cannot be combined with rotated queries and keys"
            )
        return [kind for kind in ("query", "key") if kind in kinds]


def _padded(table: Tensor, place: int, parts: int) -> Tensor:
    """Pad a table ``[H | 1, D, N]`` with zeros for D rotated channels and ``parts`` times D."""
    dim = table.shape[1]
    return nn.functional.pad(table, (0, 0, (1 + place) * dim, (parts - 1 - place) * dim))


def encodings_of(module: nn.Module) -> Encodings:
    """Return the encodings that are attributes of a module, in the order of assignment."""
    return Encodings(tuple(e for e in module.children() if isinstance(e, Encoding)))


def specs(model: nn.Module) -> dict[str, str]:
    """Return the spec of every module of a model that has encodings.

    Returns:
        Spec strings by module path; the path of the model itself is "". Several encodings of one
        module are joined: ``"rope-axial + rpe-1.9-product-bias-1-k"``.

    Raises:
        IrpeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise IrpeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, Encoding):
            held = dict.fromkeys(str(e.spec) for e in encodings_of(module).encodings)
            if held:
                found[path] = " + ".join(held)
    return found


# Spec classes by name; ``register`` adds to it.
SPECS: dict[str, type[Spec]] = {}
_Kind = TypeVar("_Kind", bound=type[Spec])


def register(spec: _Kind) -> _Kind:
    """Register an encoding; a class decorator of its spec. ``irpe.parse`` then reads its names.

    Args:
        spec: a frozen dataclass, subclass of ``irpe.Spec``, with ``names`` and ``build``.

    Raises:
        IrpeError: if the class is not a spec, or a name is taken or has an invalid form.
    """
    if not isinstance(spec, type) or not issubclass(spec, Spec):
        raise IrpeError(f"register takes a subclass of irpe.Spec, not {spec!r}")
    if "__dataclass_fields__" not in vars(spec) or not spec.names or spec.build is Spec.build:
        raise IrpeError(
            f"{spec.__name__} needs @dataclass(frozen=True, kw_only=True) below @irpe.register, "
            "a class variable names and a method build(size)"
        )
    for name in spec.names:
        if not re.fullmatch("[a-z][a-z0-9_-]*", name):
            raise IrpeError(
                f"name {name!r} of {spec.__name__}: a name has lowercase letters, digits, - and "
                "_, and starts with a letter"
            )
        holder = SPECS.get(name, spec)
        # A reloaded module registers its class again.
        if (holder.__module__, holder.__qualname__) != (spec.__module__, spec.__qualname__):
            raise IrpeError(f"name {name!r} of {spec.__name__} is taken by {holder.__name__}")
    SPECS.update(dict.fromkeys(spec.names, spec))
    return spec


def parse(spec: str | Spec) -> Spec:
    """Return the spec of a string; a spec is returned unmodified.

    Args:
        spec: such as ``"rpe-1.9-product-ctx-1-k"``, ``"rope,layout=half"``, or a sum,
            ``"rope-axial + rpe-1.9-product-bias-1-k"``.

    Raises:
        IrpeError: states the invalid part and its allowed values.
    """
    if isinstance(spec, Spec):
        return spec
    if not isinstance(spec, str):
        raise IrpeError(f"a spec is a string or an irpe.Spec, not {type(spec).__name__}: {spec!r}")
    try:
        # A plus before a digit is part of a number: 5e+5.
        single = tuple(_parse_one(part) for part in re.split(r"\s*\+(?!\d)\s*", spec))
        return single[0] if len(single) == 1 else Sum(single)
    except IrpeError as error:
        raise IrpeError(f"cannot parse the spec {spec!r}: {error}") from None


def _parse_one(text: str) -> Spec:
    name, *given = text.split(",")
    kind = SPECS.get(name) or SPECS.get(name.partition("-")[0])
    fields = None if kind is None else kind.read_name(name)
    if kind is None or fields is None:
        known = ", ".join(some.grammar or start for start, some in SPECS.items())
        raise IrpeError(f"unknown encoding {name!r}; there are {known}")
    return kind(**fields, **read_options(given, [field.name for field in kind.options(name)]))


def build(
    spec: str | Spec,
    *,
    dim: int,
    num_heads: int,
    head_dim: int | None = None,
    prefix: int = 0,
    causal: bool = False,
    axes: int = 2,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Encoding]:
    """Build the modules of a spec, for one attention layer or for a model's input.

    Args:
        spec: the encoding.
        dim: C, number of channels of the tokens.
        num_heads: H, number of query heads.
        head_dim: D; None: C / H.
        prefix: number of prefix tokens (class token, registers). If it is not 0, tables of
            relative positions get one more bucket.
        causal: whether the attention is causal.
        axes: number of axes of image (2) or video (3) positions; not used for texts.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Returns:
        Modules by attribute name, for ``setattr`` on the attention module: rpe_q, rpe_k and rpe_v
        for ``rpe-...``; else one name, such as rope, alibi or t5. ``irpe.encodings_of(module)``
        returns them for use in a forward pass.

    Raises:
        IrpeError: if the encoding does not support these sizes.
    """
    spec = parse(spec)
    made = spec.build(
        LayerSize(
            dim=dim,
            num_heads=num_heads,
            head_dim=LayerSize.split(dim, num_heads) if head_dim is None else head_dim,
            prefix=prefix,
            causal=causal,
            axes=axes,
            device=device,
            dtype=dtype,
        )
    )
    for name, module in made.items():
        if not isinstance(module, Encoding) or not hasattr(module, "spec"):
            raise IrpeError(f"{spec} built {name}, which is not an irpe.Encoding with a .spec")
    return made


def bucket_ids(
    spec: str | Spec, geometry: Geometry, device: torch.device | str = "cpu"
) -> tuple[Tensor | tuple[Tensor, ...], int]:
    """Return the bucket ids of an encoding, and its number of buckets.

    Args:
        spec: the encoding; ``t5`` is bidirectional unless the spec states otherwise.
        geometry: an ``irpe.Grid``, ``irpe.Volume`` or ``irpe.Sequence``. With prefix tokens, one
            more bucket holds all pairs with one.
        device: device of the ids.

    Returns:
        Ids int64 ``[L, S]`` (``[B, L, S]`` for per-sample positions) of offsets query - key; for
        method ``cross`` a tuple of them, (rows, columns) or (frames, rows, columns). And N, the
        number of buckets of one table.

    Raises:
        IrpeError: if the encoding has no buckets.
    """
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Grid")
    spec = parse(spec)
    modules: dict[str, Any] = {}
    if not spec.at_input and geometry.axes in spec.axes:
        prefix = max(geometry.prefix, geometry.key_prefix)
        sizes: dict[str, Any] = {"axes": max(geometry.axes, 2), "prefix": prefix}
        modules = build(spec, dim=768, num_heads=12, **sizes, device="meta")
    terms = (term for module in modules.values() for term in module.terms(geometry))
    functions = dict.fromkeys(term.buckets.function for term in terms if term.kind != "slope")
    if not functions:
        kind, axes = type(geometry).__name__, geometry.axes
        raise IrpeError(
            f"{spec} has no buckets over a {kind} (axes={axes}); relative tables have buckets, "
            "such as rpe-1.9-product-ctx-1-k over a Grid and t5 over a Sequence"
        )
    maps = [BucketIds(function, geometry) for function in functions]
    ids = tuple(m.dense(torch.device(device)) for m in maps)
    return (ids[0] if len(ids) == 1 else ids), maps[0].size
