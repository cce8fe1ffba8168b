"""Three ways to run a training step: as it is, compiled, and as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WAYS = ("eager", "compiled", "graph")
Step = Callable[[], Tensor]


def stepped(way: str, net: nn.Module, make: Callable[[nn.Module], Step]) -> Step:
    """Return a step of a model.

    Args:
        way: of WAYS.
        net: the model.
        make: returns a step of forward and backward of a model, which zeroes gradients first.
    """
    if way == "compiled":
        torch._dynamo.reset()  # compiled code is kept for few models only
        return make(torch.compile(net))
    if way == "graph":
        return captured(make(net))
    return make(net)


def captured(step: Step) -> Step:
    """Return a step that replays a CUDA graph of another; it returns the same tensor every time."""
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph needs a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()

    def replay() -> Tensor:
        graph.replay()
        return total

    return replay
