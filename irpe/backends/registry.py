"""The registry of backends, and the choice of one for a call."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from ..errors import IrpeError
from .call import Call


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention with terms; see ``register_backend``."""

    name: str
    attention: Callable[[Call], Tensor]
    unsupported: Callable[[Call], str | None]
    preference: Callable[[Call], tuple[int, str] | None]
    planned: bool = False


# Backends of calls that were validated before, by the call's key.
KNOWN: dict[Hashable, Backend] = {}
BACKENDS: dict[str, Backend] = {}


def never(call: Call) -> None:
    """Return None for every call: it is supported, or ``auto`` does not take it."""


def register_backend(
    name: str,
    attention: Callable[[Call], Tensor],
    *,
    unsupported: Callable[[Call], str | None] = never,
    preference: Callable[[Call], tuple[int, str] | None] = never,
    planned: bool = False,
) -> None:
    """Register a way to compute attention: ``backend=name`` takes it, and ``auto`` may.

    A backend must equal the backend ``reference``, which is the specification. A name that is
    registered again is replaced.

    Args:
        name: of the backend.
        attention: computes a call, an ``irpe.Call``: ``[B, H, L, E]``.
        unsupported: returns why a call cannot be computed, None if it can.
        preference: returns a rank and, in words for ``irpe.explain``, why; None: ``auto`` never
            takes it. ``auto`` takes the highest rank that supports the call. Built-in backends
            have ranks from 0 to 100.
        planned: whether the backend takes tables of any dtype under autocast, and whether it can
            compute a call, and is chosen for it, follows from shapes, dtypes and devices: then it
            is asked once for equal ones.

    Raises:
        IrpeError: for a name that is no identifier, or ``auto``.
    """
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        raise IrpeError(f"a backend's name is an identifier other than auto, not {name!r}")
    BACKENDS[name] = Backend(name, attention, unsupported, preference, planned)
    KNOWN.clear()


def check_backend(name: str) -> str:
    """Return the name of a backend, or "auto"; raise IrpeError for any other."""
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        valid = ", ".join(("auto", *BACKENDS))
        raise IrpeError(f"unknown backend {name!r}: it is one of {valid}")
    return name


def named(name: str, call: Call) -> Backend:
    """Return the backend of a name for a call, or the one that ``auto`` takes.

    Raises:
        IrpeError: for an unknown name, or a backend that does not support the call.
    """
    if check_backend(name) == "auto":
        return choose(call)[0]
    problem = BACKENDS[name].unsupported(call)
    if problem is not None:
        able = [other.name for other in BACKENDS.values() if other.unsupported(call) is None]
        raise IrpeError(
            f"backend {name!r} cannot compute this call: {problem}. Able: {', '.join(able)}"
        )
    return BACKENDS[name]


def choose(call: Call) -> tuple[Backend, list[str]]:
    """Return the backend that ``auto`` takes, and why: a line for each one considered."""
    ranked = []
    for backend in BACKENDS.values():
        found = backend.preference(call)
        if found is not None:
            ranked.append((*found, backend))
    reasons: list[str] = []
    for _, why, backend in sorted(ranked, key=lambda one: -one[0]):
        problem = backend.unsupported(call)
        if problem is None:
            return backend, [*reasons, f"{backend.name}: {why}"]
        reasons.append(f"not {backend.name}: {problem}")
    raise AssertionError("the reference computes every call")
