"""Backends: implementations of attention with terms, and the registry."""

from . import eager, reference, sdpa, triton
from .call import Call
from .registry import BACKENDS, KNOWN, check_backend, choose, named, register_backend

__all__ = ["BACKENDS", "KNOWN", "Call", "check_backend", "choose", "named", "register_backend"]

for _name, _module in (
    ("reference", reference), ("eager", eager), ("sdpa", sdpa), ("triton", triton)
):  # fmt: skip
    register_backend(
        _name,
        _module.attention,
        unsupported=_module.unsupported,
        preference=_module.preference,
        planned=_module in (triton, eager),
    )
