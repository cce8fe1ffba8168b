"""Launches the kernels: shapes and strides in, a variant for each kernel from variants.py.

What follows from shapes is computed once. A kernel that was launched before with equal shapes and
strides is launched without Triton's own binding of its arguments.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .plan import Plan
from .variants import variant

MOST = 1024  # launchers of a plan that are kept
Start = Callable[..., None]


class Step:
    """A kernel with all of its arguments but the tensors.

    Args:
        name: of the kernel.
        kernel: of Triton.
        programs: to launch.
        given: its arguments that are no tensors.
        tensors: names of the tensors at hand.
    """

    def __init__(
        self, name: str, kernel: Any, programs: int, given: dict[str, Any], tensors: Sequence[str]
    ) -> None:
        self.name, self.kernel, self.programs, self.given = name, kernel, programs, given
        names = list(kernel.arg_names)
        self.places = [(names.index(name), name) for name in tensors if name in names]
        self.template = [given.get(name) for name in names]
        # Triton compiles for addresses that are multiples of 16, or not.
        self.compiled: dict[int, Start] = {}


def launch(step: Step, tensors: dict[str, Tensor | None]) -> None:
    """Launch a kernel on tensors by name; None: missing."""
    if not step.programs:
        return
    arguments, unaligned = step.template.copy(), 0
    for at, name in step.places:
        x = tensors[name]
        if x is None:  # q stands for the pointer of a missing tensor, which no kernel reads
            x = tensors["q"]
        elif x.data_ptr() & 15:
            unaligned |= 1 << at
        arguments[at] = x
    start = step.compiled.get(unaligned)
    if start is not None:
        start(*arguments)
        return
    own = {name: arguments[at] for at, name in step.places}
    compiled = step.kernel[(step.programs,)](**own, **step.given)
    if hasattr(compiled, "packed_metadata"):  # not in the interpreter
        step.compiled[unaligned] = compiled[(step.programs, 1, 1)]


class Launcher:
    """Launches the kernels of a call.

    Args:
        tensors: q ``[B, H, L, D]``, k and v ``[B, G, S, E]``, with unit last stride.
        rows: of queries.
        given: as in ops.py.
        plan: of the call.
        floats: dropout_p and scale.
    """

    def __init__(
        self, tensors: Sequence[Tensor], rows: Tensor | None, given: Sequence[Tensor | None],
        plan: Plan, floats: Sequence[float],
    ) -> None:  # fmt: skip
        q, _, v = tensors[:3]
        (self.B, self.H, self.L, D), (_, self.G, self.S, E) = q.shape, v.shape
        self.dtype, self.capability = q.dtype, _capability(q.device)
        self.slots = None if plan.order is None else plan.order.shape[0]
        mask, (p, scale) = given[0], floats
        shared = rows is not None and rows.dim() == 2
        own_heads = rows is not None and shared and rows.shape[0] > 1
        strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.scalars = {
            "rows_sh": plan.maps * plan.width if own_heads else 0,
            **dict(zip(("mask_sb", "mask_sh", "mask_sl", "mask_ss"), strides, strict=True)),
            "B": self.B, "H": self.H, "GROUP": self.H // self.G, "L": self.L, "S": self.S,
            "scale": scale, "dropout": p, "factor": 1 / (1 - p) if p < 1 else 0.0,
            "parts": plan.parts, "part_slots": plan.part_slots,
            "slots": 0 if plan.others is None else plan.others.shape[0],
        }  # fmt: skip
        self.options = {
            "D": D, "D_BLOCK": _block(D), "E": E, "E_BLOCK": _block(E),
            "MAPS": plan.maps, "N": plan.width, "SIDE": plan.side,
            "ROWS": plan.row_use, "SHARED": shared, "COLUMNS": plan.column_use,
            "MASK": "none" if mask is None else "bool" if mask.dtype == torch.uint8 else "float",
            "CAUSAL": plan.is_causal, "DROPOUT": p > 0.0, "PRECISE": q.dtype == torch.float32,
            "DETERMINISTIC": torch.are_deterministic_algorithms_enabled(),
        }  # fmt: skip
        self.steps: dict[str, Step] = {}

    def start(
        self, plan: Plan, given: Sequence[Tensor | None], name: str, strided: dict[str, Tensor],
        others: dict[str, Tensor | None], **constants: int,
    ) -> None:  # fmt: skip
        """Launch a kernel: a program for each block of owned tokens, batch and head.

        Args:
            plan: of the call.
            given: as in ops.py.
            name: of the kernel.
            strided: tensors ``[B, H, length, dim]`` that it takes with their strides.
            others: its other tensors, None: missing.
            constants: its constants, beside those of all kernels.
        """
        turned = int(name == "column_pass")
        mask, seed, *ids = given
        own = (plan.ids, plan.ids_turned)[turned]
        tensors = strided | others | {
            "mask": mask, "seed": seed, "ids": ids[turned] if own is None else own,
            "order": plan.order, "others": plan.others,
            "runs": None if plan.runs is None else plan.runs[turned],
            "units": None if plan.units is None else plan.units[turned],
        }  # fmt: skip
        step = self.steps.get(name)
        if step is None:
            step = self.steps[name] = self._step(name, tensors, strided, constants, turned)
        launch(step, tensors)

    def _step(
        self, name: str, tensors: dict[str, Tensor | None], strided: dict[str, Tensor],
        constants: dict[str, int], turned: int,
    ) -> Step:  # fmt: skip
        kernel = getattr(kernels, name)
        options: dict[str, Any] = {**self.options, **constants}
        widest = max(options["D_BLOCK"], options["E_BLOCK"])
        chosen = variant(name, self.dtype, widest, options, self.capability)
        length, heads = (self.S, self.G) if turned else (self.L, self.H)
        owned = length if self.slots is None else self.slots
        programs = -(-owned // (chosen.BN if turned else chosen.BM)) * self.B * heads
        strides = {
            f"{n}_s{a}": x.stride(i) for n, x in strided.items() for i, a in enumerate("bhl")
        }
        ids, runs, units = (tensors[n] for n in ("ids", "runs", "units"))
        strides |= {"ids_sm": 0, "ids_sb": 0, "ids_so": 0}
        if ids is not None:
            step = ids.stride(1) if ids.shape[1] > 1 else 0
            strides |= {"ids_sm": ids.stride(0), "ids_sb": step, "ids_so": ids.stride(2)}
        strides["runs_so"] = 0 if runs is None else runs.shape[-1]
        strides["units_so"] = 0 if units is None else units.shape[-1]
        given = {**strides, **self.scalars, **options, **chosen._asdict(), "owned": owned}
        names = {*kernel.arg_names, "num_warps", "num_stages"}
        given = {name: x for name, x in given.items() if name in names}
        return Step(name, kernel, programs, given, list(tensors))


def launcher(
    tensors: Sequence[Tensor], rows: Tensor | None, given: Sequence[Tensor | None], plan: Plan,
    floats: Sequence[float], wanted: Sequence[bool] = (),
) -> Launcher:  # fmt: skip
    """Return the launcher for these shapes and strides, made once.

    Args:
        tensors: q, k and v; in a backward pass the gradient of the output as well.
        rows: of queries.
        given: as in ops.py.
        plan: of the call.
        floats: dropout_p and scale.
        wanted: whether each table requires a gradient.
    """
    q = tensors[0]
    key = (
        q.dtype, *((x.shape, x.stride()) for x in tensors),
        None if rows is None else rows.shape,
        *(None if x is None else (x.dtype, x.shape, x.stride()) for x in given),
        *floats, *wanted, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    found: Launcher | None = plan.launchers.get(key)
    if found is None:
        if len(plan.launchers) >= MOST:
            plan.launchers.clear()
        found = plan.launchers[key] = Launcher(tensors, rows, given, plan, floats)
    return found


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


@cache
def _capability(device: torch.device) -> int:
    # Without a GPU the interpreter runs, which takes any variant.
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor
