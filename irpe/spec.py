"""Specs: the options of an encoding as a frozen dataclass, and as an equivalent string.

A string has a name, then options separated by commas; a sum has several::

    rpe-2.0-product-ctx-1-k,index=clip
    rope,layout=half
    rope-axial + rpe-1.9-product-bias-1-k

Default values are omitted from the string, unless they set the size of a table. So a string
determines the shapes of the parameters.
"""

import dataclasses
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import IrpeError
from .fields import spelled

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """The layer that an encoding is built for.

    Args:
        dim: C, number of channels of the tokens.
        num_heads: H, number of query heads.
        head_dim: D, number of channels of a head.
        prefix: number of prefix tokens (class token, registers). If it is not 0, tables of
            relative positions have one more bucket, for all pairs with one.
        causal: whether the attention is causal.
        axes: number of axes of image (2) or video (3) positions; not used for texts.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        IrpeError: if a size is not a positive integer, or ``prefix`` is negative.
    """

    dim: int
    num_heads: int
    head_dim: int
    prefix: int = 0
    causal: bool = False
    axes: int = 2
    device: "torch.device | str | None" = None
    dtype: "torch.dtype | None" = None

    def __post_init__(self) -> None:
        least = {"dim": 1, "num_heads": 1, "head_dim": 1, "prefix": 0, "axes": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < smallest:
                what = "a number of tokens, such as 1" if smallest == 0 else "a positive integer"
                raise IrpeError(f"{name}={value!r} is not {what}")

    @staticmethod
    def split(dim: int, num_heads: int) -> int:
        """Return D = C / H; raise IrpeError if H does not divide C."""
        LayerSize(dim=dim, num_heads=num_heads, head_dim=1)  # checks both
        if dim % num_heads:
            raise IrpeError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        return dim // num_heads

    @property
    def made(self) -> dict[str, Any]:
        """Device and dtype, as keyword arguments."""
        return {"device": self.device, "dtype": self.dtype}


class Spec:
    """Base of all specs. A subclass is a frozen, keyword-only dataclass of ``irpe.fields``.

    Attributes:
        names: names that strings may start with, and the fields that each name sets.
        axes: supported numbers of axes of positions: 1 for text, 2 for images, 3 for videos.
        at_input: whether it is added once, at the model's input, and not in attention.
        neutral: whether a new encoding does not change the model's outputs.
        grammar: form of its strings, if they start with more than a name.
        examples: lines of ``irpe specs``: (string, formula, description).
    """

    __slots__ = ()
    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    axes: ClassVar[tuple[int, ...]] = (1,)
    at_input: ClassVar[bool] = False
    neutral: ClassVar[bool] = False
    grammar: ClassVar[str] = ""
    examples: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    def build(self, size: LayerSize) -> dict[str, Any]:
        """Return the modules of the encoding for one layer, ``irpe.Encoding`` by attribute name."""
        raise NotImplementedError(f"{type(self).__name__} has no build(size)")

    @property
    def parts(self) -> "tuple[Spec, ...]":
        """The specs of a sum; for other specs, the spec itself."""
        return (self,)

    def __add__(self, other: object) -> "Sum":
        if not isinstance(other, Spec):
            return NotImplemented
        return Sum(self.parts + other.parts)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                value = field.metadata["check"](field.name, value)
                object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raise IrpeError if fields contradict each other. Called when a spec is created."""

    @classmethod
    def read_name(cls, name: str) -> Mapping[str, Any] | None:
        """Return the fields that the first part of a string sets; None if it is unknown."""
        return cls.names.get(name)

    def write_name(self) -> str:
        """Return the first part of the string."""
        return next(
            name
            for name, fields in self.names.items()
            if all(getattr(self, key) == value for key, value in fields.items())
        )

    @classmethod
    def options(cls, name: str) -> list[dataclasses.Field]:
        """Return the fields that can be options of a string with this name."""
        given = cls.names.get(name, {})
        return [f for f in dataclasses.fields(cls) if f.name not in given]  # type: ignore[arg-type]

    def __str__(self) -> str:
        name = self.write_name()
        parts = [name]
        for field in self.options(name):
            value = getattr(self, field.name)
            if value is not None and (field.metadata["always"] or value != field.default):
                parts.append(f"{field.name}={spelled(value)}")
        return ",".join(parts)


@dataclasses.dataclass(frozen=True)
class Sum(Spec):
    """Several encodings on one layer, ``a + b``.

    Args:
        specs: the specs, in the order of application; all different.

    Raises:
        IrpeError: if a spec occurs twice, or the specs have no number of axes in common.
    """

    specs: tuple[Spec, ...]

    def __post_init__(self) -> None:
        for n, part in enumerate(self.specs):
            if part in self.specs[:n]:
                raise IrpeError(f"{part} is twice in {self}")
        if not self.axes:
            raise IrpeError(f"{self}: these encodings have no number of axes in common")

    @property
    def parts(self) -> tuple[Spec, ...]:
        return self.specs

    @property
    def axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(n for n in self.specs[0].axes if all(n in p.axes for p in self.specs))

    @property
    def at_input(self) -> bool:  # type: ignore[override]
        return any(part.at_input for part in self.specs)

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        return all(part.neutral for part in self.specs)

    def build(self, size: LayerSize) -> dict[str, Any]:
        """Return the modules of all specs; repeated names get a number: rpe_k, rpe_k_2."""
        made: dict[str, Any] = {}
        for part in self.specs:
            for name, module in part.build(size).items():
                n, free = 1, name
                while free in made:
                    n += 1
                    free = f"{name}_{n}"
                made[free] = module
        return made

    def __str__(self) -> str:
        return " + ".join(map(str, self.specs))


def read_options(given: list[str], known: list[str]) -> dict[str, str]:
    """Return options such as ``["clip=64"]`` as a dict; raise IrpeError for unknown names."""
    fields: dict[str, str] = {}
    for option in given:
        name, equals, value = option.partition("=")
        name, value = name.strip(), value.strip()
        if name not in known or not equals:
            valid = f"options are {', '.join(f'{o}=' for o in known)}" if known else "it has none"
            raise IrpeError(f"unknown option {option!r}; {valid}")
        if name in fields:
            raise IrpeError(f"{name} is given twice")
        fields[name] = value
    return fields
