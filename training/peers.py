"""What the processes of a run tell one another between two steps, and what if one is lost."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator

from training.errors import Interrupted, one_line

# How gloo, NCCL and torch's store report that the other end is gone or does not answer.
_LOST = re.compile(r"(?i)gloo|nccl|connection (closed|reset|refused)|broken pipe|tcpstore")


class Peers:
    """Agreement among the processes of a run.

    It is over gloo, also where gradients go over NCCL: a GPU need not be waited for, and a process
    that was killed is noticed at once, as its connection closes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.several = accelerator.num_processes > 1
        self._group = None
        if self.several and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def any(self, *flags: int) -> tuple[int, ...]:
        """Return the largest of all processes' values of each flag."""
        if not self.several:
            return flags
        told = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        return tuple(told.tolist())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the error of a connection to a lost process into :class:`Interrupted`."""
        try:
            yield
        except RuntimeError as error:
            if not self.several or not _LOST.search(str(error)):
                raise
            raise Interrupted(
                f"another process of this job ended or cannot be reached ({one_line(error):.120}); "
                "the job ends; its command with --resume auto goes on from the newest checkpoint"
            ) from error
