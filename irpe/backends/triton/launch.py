"""Launches the kernels: shapes and strides in, a variant for each kernel from variants.py.

What follows from shapes is computed once. A kernel that was launched before with equal shapes and
strides is launched without Triton's own binding of its arguments.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..call import mask_floor
from . import kernels, table_kernels
from .outputs import padded
from .plan import KINDS, Plan
from .tables import Lists, lists
from .variants import variant

MOST = 1024  # launchers of a plan that are kept
SHARES = 2**26  # bytes of the shares of a kind of table, of all programs
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
        # Tokens of all programs, each of which has sums of W numbers in scratch.
        self.numbers = programs * given.get("BN" if name == "column_pass" else "BM", 0)
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
        given: as in ops.py.
        plan: of the call.
        tables: lists for them, None without terms.
        floats: dropout_p and scale.
        wanted: whether a table requires a gradient.
    """

    def __init__(
        self, tensors: Sequence[Tensor], given: Sequence[Tensor | None], plan: Plan,
        tables: Lists | None, floats: Sequence[float], wanted: bool,
    ) -> None:  # fmt: skip
        q, k, v = tensors[:3]
        (self.B, self.H, L, D), (_, self.G, S, E) = q.shape, v.shape
        self.dtype, self.capability = q.dtype, _capability(q.device)
        self.most = 2 * _multiprocessors(q.device)
        mask, (p, scale) = given[0], floats
        strides = (0, 0, 0, 0) if mask is None else mask.stride()
        ids = plan.ids if plan.ids is not None else given[2]
        kinds = [kind for kind in KINDS[1:] if kind in plan.kinds]
        self.lengths = {
            "project": S, "forward": plan.slots or L, "row_pass": plan.slots or L,
            "column_pass": S if plan.others is None else plan.others.shape[0],
        }  # fmt: skip
        self.scalars = {
            **dict(zip(("mask_sb", "mask_sh", "mask_sl", "mask_ss"), strides, strict=True)),
            "ids_sm": 0 if ids is None else ids.stride(0),
            "ids_sb": 0 if ids is None or ids.shape[1] == 1 else ids.stride(1),
            "ids_so": 0 if ids is None else ids.stride(2),
            "runs_so": 0 if plan.runs is None else plan.runs.shape[-1],
            "units_so": 0 if plan.units is None else plan.units.shape[-1],
            "B": self.B, "H": self.H, "GROUP": self.H // self.G, "L": L, "S": S,
            "scale": scale, "dropout": p, "factor": 1 / (1 - p) if p < 1 else 0.0,
            "floor": mask_floor(q.dtype) if plan.side else float("-inf"),
            "owned": plan.slots or L, "parts": plan.parts, "part_slots": plan.part_slots,
            "slots": 0 if plan.others is None else plan.others.shape[0],
        }  # fmt: skip
        wide = plan.maps * plan.width
        self.options: dict[str, Any] = {
            "D": D, "D_BLOCK": padded(D), "E": E, "E_BLOCK": padded(E),
            "STEP": max(padded(D), padded(E)), "W": wide,
            "MAPS": plan.maps, "N": plan.width, "SIDE": plan.side, "SHARE": plan.share,
            "ROWS": plan.row_use, "SHARED": "query" not in kinds, "BIAS": "bias" in plan.kinds,
            "COLUMNS": plan.column_use, "MASS": plan.mass_use, "WANTED": wanted,
            "KEY": kinds.index("key") if "key" in kinds else 0,
            "VALUE": kinds.index("value") if "value" in kinds else 0,
            "MASK": _mask_kind(mask),
            "CAUSAL": plan.is_causal, "DROPOUT": p > 0.0, "PRECISE": q.dtype == torch.float32,
            "DETERMINISTIC": torch.are_deterministic_algorithms_enabled(),
        }  # fmt: skip
        self.of_tables = {} if tables is None else {
            "prepare": tables.sources.shape[2], "reduce": tables.targets.shape[1],
            "plain": tables.plain, "SOURCES": tables.sources.shape[0],
            "BR": 2048 // self.options["STEP"], "BB": 4, "BP": 2048 // self.options["STEP"],
        }  # fmt: skip
        # What kernels read besides; ids that were given are others in every call.
        self.held = {
            "ids": plan.ids, "order": plan.order, "others": plan.others,
            "runs": plan.runs, "units": plan.units,
        }  # fmt: skip
        self.steps: dict[str, Step] = {}

    def step(self, name: str, strided: dict[str, Tensor], others: Iterable[str]) -> "Step":
        """Return a kernel with its arguments, made once.

        Args:
            name: of the kernel.
            strided: tensors ``[B, H, length, dim]`` that it takes with their strides.
            others: names of its other tensors.
        """
        found = self.steps.get(name)
        if found is None:
            found = self.steps[name] = self._step(name, strided, others)
        return found

    def table_step(self, name: str, tensors: Iterable[str]) -> "Step":
        """``step`` for a kernel of table_kernels.py."""
        found = self.steps.get(name)
        if found is not None:
            return found
        rows, column = (self.steps.get(n) for n in ("row_pass", "column_pass"))
        given = {
            **self.scalars, **self.options, **self.of_tables, "count": self.of_tables[name],
            "row_programs": 0 if rows is None else rows.programs // self.H,
            "column_programs": 0 if column is None else column.programs // self.G,
            "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
        kernel, count = getattr(table_kernels, name), self.of_tables[name]
        names = {*kernel.arg_names, "num_warps", "num_stages"}
        given = {key: x for key, x in given.items() if key in names}
        programs = -(-count // self.of_tables["BR" if name == "prepare" else "BB"])
        found = self.steps[name] = Step(name, kernel, programs, given, list(tensors))
        return found

    def _step(self, name: str, strided: dict[str, Tensor], others: Iterable[str]) -> "Step":
        kernel, options = getattr(kernels, name), self.options
        widest = max(options["D_BLOCK"], options["E_BLOCK"])
        chosen = variant(name, self.dtype, widest, options, self.capability)
        by_key = name in ("project", "column_pass")
        block, wide = chosen.BN if by_key else chosen.BM, options["W"]
        tiles, heads = -(-self.lengths[name] // block), self.G if name == "column_pass" else self.H
        programs = self.B * tiles
        if name in ("row_pass", "column_pass") or (name == "forward" and options["MASS"]):
            # Scratch and shares of programs that loop over tiles stay in a cache.
            room = SHARES // (wide * options["STEP"] * 4 * heads)
            most = max(1, min(self.most // heads, room))
            rounds = max(1, -(-programs // most))
            programs = -(-programs // rounds)  # no more than take as many rounds
        strides = {
            f"{n}_s{a}": x.stride(i) for n, x in strided.items() for i, a in enumerate("bhl")
        }
        # A piece of a row of W numbers, in the products with a table.
        given = {**strides, **self.scalars, **options, **chosen._asdict(), "tiles": tiles}
        given["PIECE"] = min(chosen.PIECE, wide & -wide)
        names = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg"}
        given = {key: x for key, x in given.items() if key in names}
        tensors = [*strided, *others, "mask", "seed", *self.held]
        return Step(name, kernel, programs * heads, given, tensors)


def _mask_kind(mask: Tensor | None) -> str:
    """Return what the kernels distinguish masks by; "keys": the same for all queries and heads."""
    if mask is None:
        return "none"
    if mask.dtype != torch.uint8:
        return "float"
    shared = all(mask.shape[axis] == 1 or mask.stride(axis) == 0 for axis in (1, 2))
    return "keys" if shared else "bool"


def launcher(
    tensors: Sequence[Tensor], given: Sequence[Tensor | None], plan: Plan,
    tables: Sequence[Tensor], floats: Sequence[float], wanted: bool | None = None,
) -> tuple[Launcher, Lists | None]:  # fmt: skip
    """Return the launcher for these shapes and strides, made once, and lists for the tables.

    Args:
        tensors: q, k and v; in a backward pass the gradient of the output as well.
        given: as in ops.py.
        plan: of the call.
        tables: of the terms.
        floats: dropout_p and scale.
        wanted: whether a table requires a gradient; None: in a forward pass.
    """
    key = (
        tensors[0].dtype, *((x.shape, x.stride()) for x in tensors),
        *(None if x is None else (x.dtype, x.shape, x.stride()) for x in given),
        *((x.dtype, x.shape[0]) for x in tables),
        *floats, wanted, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    q, own = tensors[0], None
    if tables:
        own = lists(plan, tables, q.shape[1], q.device)
    found = plan.launchers.get(key)
    if found is None:
        if len(plan.launchers) >= MOST:
            plan.launchers.clear()
        found = plan.launchers[key] = Launcher(tensors, given, plan, own, floats, bool(wanted))
    return found, own


@cache
def _capability(device: torch.device) -> int:
    # Without a GPU the interpreter runs, which takes any variant.
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
