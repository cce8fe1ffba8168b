"""Encodings as strings: ``parse`` makes a frozen dataclass, ``str`` gives the string back.

A name, and options behind commas::

    rpe-2.0-product-ctx-1-k,index=clip
    rope,layout=half
    shaw,clip=64
"""

from ..errors import IrpeError
from .grammar import Spec, options, read_options
from .image import FORM, RPE, read
from .rotary import Rope, RopeAxial, RopeMixed
from .text import PIA, T5, Alibi, Huang, Learned, Shaw, Sinusoidal

KINDS: tuple[type[Spec], ...] = (
    Rope, RopeAxial, RopeMixed, Sinusoidal, Learned, Shaw, Huang, T5, Alibi, PIA
)  # fmt: skip
NAMES: dict[str, type[Spec]] = {name: kind for kind in KINDS for name in kind.names}

__all__ = [
    "RPE", "Rope", "RopeAxial", "RopeMixed", "Sinusoidal", "Learned", "Shaw", "Huang", "T5",
    "Alibi", "PIA", "Spec", "NAMES", "parse", "parse_image",
]  # fmt: skip


def parse(spec: str | Spec) -> Spec:
    """Parse a spec string; a spec that is parsed already comes back as it is.

    Raises:
        IrpeError: naming the part that is wrong and the values it may take.
    """
    if isinstance(spec, Spec):
        return spec
    if not isinstance(spec, str):
        raise IrpeError(f"a spec is a string or irpe.RPE, not {type(spec).__name__}: {spec!r}")
    head, *given = spec.split(",")
    try:
        if head.partition("-")[0] == "rpe":
            return read(head, given)
        kind = NAMES.get(head)
        if kind is None:
            raise IrpeError(f"unknown encoding {head!r}; there are {', '.join((FORM, *NAMES))}")
        fields = read_options(given, [field.name for field in options(kind, head)])
        return kind(**kind.names[head], **fields)
    except IrpeError as error:
        raise IrpeError(f"cannot parse the spec {spec!r}: {error}") from None


def parse_image(spec: str | Spec) -> RPE:
    """Parse the spec of an image encoding with buckets; raises IrpeError for any other."""
    parsed = parse(spec)
    if not isinstance(parsed, RPE):
        raise IrpeError(f"{parsed} is no image encoding {FORM}: irpe.build makes any")
    return parsed
