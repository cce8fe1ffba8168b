"""How attached attention modules get the positions of their tokens, for all libraries.

Each patch embedding of a model has one ``Slot``. A forward hook of the embedding stores the grid in
it, patch dropout selects from it, and the attention modules read it when they are called. Blocks
and their containers are unchanged. A hook of the model clears the slot after every forward pass,
also after one that raised. ``located`` sets a geometry for every module. The latest of the two
is used. Slots are thread-local.

Activation checkpointing recomputes after the forward pass, when the slots are empty or hold another
grid. So torch's checkpoint is wrapped: it takes a ``Snapshot`` at the first run and restores it
around the recomputation, in the thread of the recomputation.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

from ..errors import IrpeError
from ..geometry import Geometry, Grid, Patches, Volume

for _owner, _name in (
    (torch._C, "_current_graph_task_id"),
    (torch_checkpoint, "CheckpointFunction"),
    (torch_checkpoint, "_CheckpointFrame"),
):
    if not hasattr(_owner, _name):
        raise IrpeError(
            f"torch {torch.__version__} has no {_owner.__name__}.{_name}, which irpe.attach needs: "
            "install a version of torch that this version of irpe supports"
        )


def _current_task() -> int:
    """Return the id of the backward pass that this thread runs, or -1."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class _State:
    """The state of a slot in one thread.

    It is a separate object because compilers replay writes to it, but not to a thread-local.
    ``depth`` counts the nested ``located`` that are being compiled. ``stored``, of ``_LOCATED``,
    lists the slots that were written inside them. A compiled ``located`` cannot iterate over all
    slots to clear them, and compilers guard integers but not the identity of the latest geometry;
    so depths are compared.
    """

    def __init__(self) -> None:
        self.geometry: Geometry | None = None
        self.task = -1
        self.depth = 0
        self.stored: tuple[Slot, ...] = ()


_OPEN: list[Geometry] = []  # the geometries of ``located`` in all threads
_SLOTS: "weakref.WeakSet[Slot]" = weakref.WeakSet()
_SLOTS_LOCK = threading.Lock()


# A function of (embedding, arguments, keyword arguments, output, prefix) that returns a geometry.
Reader = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, int], Geometry]


def read_map(
    embed: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, prefix: int
) -> Geometry:
    """Return the grid of a map ``[B, C, height, width]``, or the volume of a video's map."""
    if output.dim() == 5:  # [B, C, frames, height, width]
        frames, height, width = output.shape[-3:]
        return Volume(frames, height, width, prefix)
    height, width = output.shape[-2:]
    return Grid(height, width, prefix)


class Slot(threading.local):
    """The geometry of the current forward pass, per thread; its methods are forward hooks.

    Args:
        prefix: number of tokens before the patches.
        read: returns the geometry of a call of the patch embedding.
    """

    def __new__(cls, *args: Any) -> "Slot":
        slot = super().__new__(cls, *args)  # threading.local passes args to __init__ per thread
        with _SLOTS_LOCK:
            _SLOTS.add(slot)
        return slot

    def __init__(self, prefix: int = 0, read: Reader = read_map) -> None:  # once in each thread
        self.prefix, self.read, self.now = prefix, read, _State()

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.prefix, self.read)  # a copy starts empty

    def store(
        self, embed: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook of the patch embedding."""
        refuse_fx(output, "this model")
        now, located = self.now, _LOCATED.now
        now.geometry = self.read(embed, args, kwargs, output, self.prefix)
        now.task, now.depth = _current_task(), located.depth
        if located.depth:
            located.stored = (*located.stored, self)

    def clear(self, model: nn.Module, args: Any, output: Any) -> None:
        """Hook of the model, called after errors too."""
        self.now.geometry = None

    def select(self, kept: Tensor | None) -> None:
        """Keep only the patches with indices ``kept``, int64 ``[B, L']``; None keeps all."""
        geometry = self.now.geometry
        if kept is None or geometry is None:
            return
        if isinstance(geometry, Patches):
            self.now.geometry = geometry.select(kept)
            return
        positions, _ = geometry.positions(kept.device)
        positions = positions.gather(1, kept.unsqueeze(-1).expand(-1, -1, positions.shape[-1]))
        self.now.geometry = Geometry(positions, prefix=geometry.prefix)

    def select_returned(self, drop: nn.Module, args: Any, output: tuple[Any, Tensor]) -> None:
        """Hook of a patch dropout that returns (tokens, indices of the kept patches)."""
        self.select(output[1])

    def select_unmasked(self, embed: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook of an embedding of (pixels, mask ``[B, L']`` or None); True removes the patch."""
        masked = args[1] if len(args) > 1 else None
        if masked is not None:
            order = masked.to(torch.uint8).argsort(dim=1, stable=True)
            self.select(order[:, : output.shape[1] - self.prefix])

    def select_restored(self, embed: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        """Hook of an embedding that returns (tokens, mask, ids that restore the patch order)."""
        self.select(output[2].argsort(dim=1)[:, : output[0].shape[1] - self.prefix])


_LOCATED = Slot()  # the innermost ``located``


def geometry_of(module: nn.Module) -> Geometry:
    """Return the positions of the tokens of an attached module, in the current forward pass."""
    slot: Slot | None = module.__dict__.get("rpe_slot")
    now = _LOCATED.now
    if slot is not None and slot.now.geometry is not None and slot.now.depth == now.depth:
        now = slot.now
    if now.geometry is not None:
        geometry, task = now.geometry, now.task
    elif module.__dict__.get("_is_replica") and len(_OPEN) == 1:
        return _OPEN[0]  # nn.DataParallel runs replicas in new threads
    else:
        raise IrpeError(
            f"no grid: this {type(module).__name__} was called outside a forward pass of its "
            "model. Call the model, or put the call inside `with irpe.located(irpe.Grid(...)):`"
            if slot is not None
            else f"no grid: call the model of this {type(module).__name__} inside "
            "`with irpe.located(irpe.Grid(height, width)):`"
        )
    if not torch.compiler.is_compiling() and task != torch._C._current_graph_task_id():
        raise IrpeError(
            "something other than torch.utils.checkpoint recomputes this layer in a backward "
            "pass: put `with irpe.located(grid):` inside the function that is recomputed"
        )
    return geometry


def located_prefix() -> int:
    """Return the number of prefix tokens in the geometry of the innermost ``located``."""
    geometry = _LOCATED.now.geometry
    return 0 if geometry is None else max(geometry.prefix, geometry.key_prefix)


@contextmanager
def located(geometry: Geometry) -> Iterator[None]:
    """Set the positions of the tokens, for all attached modules that are called inside.

    A patch embedding that runs inside stores its own grid, which its model uses instead.
    ``irpe.attach`` inside ``located`` gives tables a bucket for prefix tokens if the geometry has
    some; models with a supported patch embedding do not need this.

    Args:
        geometry: as ``irpe.Grid(25, 34)``, for all images of the batch. Explicit positions may
            differ between images, and keys may have other positions (cross-attention).

    Raises:
        IrpeError: if it is not a geometry.
    """
    if not isinstance(geometry, Geometry):
        raise IrpeError(f"geometry={geometry!r} is not a geometry: make an irpe.Grid")
    now, before = _LOCATED.now, None if torch.compiler.is_compiling() else Snapshot()
    outer, task, stored = now.geometry, now.task, now.stored
    if before is None:
        now.depth, now.stored = now.depth + 1, ()
    else:
        for slot, *_ in before.slots:
            slot.now.geometry = None
    now.geometry, now.task = geometry, _current_task()
    _OPEN.append(geometry)
    try:
        yield
    finally:
        _OPEN.pop(next(i for i, other in enumerate(_OPEN) if other is geometry))
        if before is None:
            for written in now.stored:
                written.now.geometry = None
            now.depth -= 1
            now.geometry, now.task, now.stored = outer, task, stored
        else:
            before.restore()


class Snapshot:
    """All geometries that are set in this thread."""

    def __init__(self) -> None:
        with _SLOTS_LOCK:
            slots = list(_SLOTS)
        held = [(slot, slot.now) for slot in slots if slot.now.geometry is not None]
        self.slots = [(slot, now.geometry, now.task, now.depth) for slot, now in held]

    def restore(self, task: int | None = None) -> None:
        """Set these geometries in this thread, for backward pass ``task``; clear all others."""
        for slot, *_ in Snapshot().slots:
            slot.now.geometry = None
        for slot, geometry, before, depth in self.slots:
            now = slot.now
            now.geometry, now.task = geometry, before if task is None else task
            if slot is not _LOCATED:
                now.depth = depth

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function wrapped to run with these geometries; unwrapped if there are none."""
        if not self.slots:
            return function

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = Snapshot()
            self.restore(_current_task())
            try:
                return function(*args, **kwargs)
            finally:
                before.restore()

        return run


def _wrap_checkpoint() -> None:
    """Make both kinds of torch's checkpoint take a snapshot at the first run.

    This replaces class attributes, so it also affects code that imported ``checkpoint`` earlier.
    Only the recomputation runs with the snapshot: restoring it after the first run would discard
    the grid that a patch embedding inside the checkpoint stores.
    """
    reentrant, frame = torch_checkpoint.CheckpointFunction, torch_checkpoint._CheckpointFrame
    if hasattr(reentrant, "rpe_wrapped"):
        return
    forward, init = reentrant.forward, frame.__init__

    @functools.wraps(forward)
    def forward_with_snapshot(ctx: Any, run_function: Any, *args: Any) -> Any:
        snapshot = Snapshot()
        result = forward(ctx, run_function, *args)
        ctx.run_function = snapshot.around(run_function)
        return result

    @functools.wraps(init)
    def init_with_snapshot(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        init(self, Snapshot().around(recompute_fn), *args, **kwargs)

    setattr(reentrant, "forward", staticmethod(forward_with_snapshot))  # noqa: B010
    setattr(frame, "__init__", init_with_snapshot)  # noqa: B010
    setattr(reentrant, "rpe_wrapped", True)  # noqa: B010


_wrap_checkpoint()


def carry_geometry(
    model: nn.Module, embed: nn.Module, module: nn.Module, prefix: int, read: Reader = read_map
) -> Slot:
    """Connect an attention module to the grid of a patch embedding, and return their slot.

    Args:
        model: the model that calls both.
        embed: the patch embedding.
        module: the attention module.
        prefix: see ``Slot``.
        read: see ``Slot``.
    """
    owners = (getattr(hook, "__self__", None) for hook in embed._forward_hooks.values())
    slot = next((owner for owner in owners if isinstance(owner, Slot)), None)
    if slot is None:
        slot = Slot(prefix, read)
        embed.register_forward_hook(slot.store, with_kwargs=True)
        model.register_forward_hook(slot.clear, always_call=True)
    module.__dict__["rpe_slot"] = slot
    return slot


def select_by(drop: nn.Module, hook: Callable[..., None]) -> None:
    """Register ``hook``, a ``select_`` method of a slot, on a module that drops patches."""
    if hook not in drop._forward_hooks.values():
        drop.register_forward_hook(hook)


def stop_carrying(model: nn.Module, module: nn.Module) -> bool:
    """Undo ``carry_geometry`` and ``select_by``; return whether the slot has no module left."""
    slot: Slot = module.__dict__.pop("rpe_slot")
    modules = list(model.modules())
    if any(m.__dict__.get("rpe_slot") is slot for m in modules):
        return False
    for owner in modules:
        hooks: dict[int, Any] = owner._forward_hooks
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is slot]:
            del hooks[key]
            owner._forward_hooks_with_kwargs.pop(key, None)
            owner._forward_hooks_always_called.pop(key, None)
    return True


def refuse_fx(value: Any, what: str) -> None:
    """Raise IrpeError if torch.fx traces: its proxies have no sizes to make a grid from."""
    if isinstance(value, torch.fx.Proxy):
        raise IrpeError(
            f"torch.fx cannot trace {what} with an encoding attached: use forward hooks, the "
            "library's own feature extraction without fx, or irpe.attention_maps"
        )
