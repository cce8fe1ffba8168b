"""The registry of backends, and the selection of one for a call."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from ..errors import IrpeError
from .call import Call


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation of attention with terms; see ``register_backend``."""

    name: str
    attention: Callable[[Call], Tensor]
    unsupported: Callable[[Call], str | None]
    preference: Callable[[Call], tuple[int, str] | None]
    planned: bool = False


# Backends of validated calls, by ``Call.key``.
KNOWN: dict[Hashable, Backend] = {}
BACKENDS: dict[str, Backend] = {}


def never(call: Call) -> None:
    """Return None: the call is supported, or ``auto`` does not select the backend."""


def register_backend(
    name: str,
    attention: Callable[[Call], Tensor],
    *,
    unsupported: Callable[[Call], str | None] = never,
    preference: Callable[[Call], tuple[int, str] | None] = never,
    planned: bool = False,
) -> None:
    """Register an implementation of attention, for ``backend=name`` and ``backend="auto"``.

    Its results must equal those of the backend ``reference``. Registering a name again replaces
    the backend.

    Args:
        name: name of the backend.
        attention: computes an ``irpe.Call`` and returns ``[B, H, L, E]``.
        unsupported: returns why a call is unsupported, or None.
        preference: returns a rank and its reason, which ``irpe.explain`` prints; or None if
            ``auto`` must not select the backend. ``auto`` selects the highest rank that supports
            the call. Built-in backends have ranks from 0 to 100.
        planned: True if the backend takes tables of any dtype under autocast, and its
            ``unsupported`` and ``preference`` depend only on shapes, dtypes and devices. They are
            then called once for equal ones.

    Raises:
        IrpeError: if the name is not an identifier, or is ``auto``.
    """
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        raise IrpeError(f"a backend's name is an identifier other than auto, not {name!r}")
    BACKENDS[name] = Backend(name, attention, unsupported, preference, planned)
    KNOWN.clear()


def check_backend(name: str) -> str:
    """Return the name of a backend, or "auto"; raise IrpeError for other values."""
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        valid = ", ".join(("auto", *BACKENDS))
        raise IrpeError(f"unknown backend {name!r}: it is one of {valid}")
    return name


def named(name: str, call: Call) -> Backend:
    """Return the backend of a name; for ``auto``, the one selected for a call.

    Raises:
        IrpeError: if the name is unknown, or the backend does not support the call.
    """
    if check_backend(name) == "auto":
        return choose(call)[0]
    problem = BACKENDS[name].unsupported(call)
    if problem is not None:
        able = [other.name for other in BACKENDS.values() if other.unsupported(call) is None]
        raise IrpeError(
            f"backend {name!r} cannot compute this call: {problem}. Use one of {', '.join(able)}"
        )
    return BACKENDS[name]


def choose(call: Call) -> tuple[Backend, list[str]]:
    """Return the backend that ``auto`` selects, and a line with the reason for each backend."""
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
    raise AssertionError("the reference supports every call")
