"""Triton's own dispatch and compiler without a GPU: its launcher is a stub that returns at once."""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Bytes of shared memory that a program may take, by architecture.
SHARED = {80: 166912, 90: 232448, 100: 232448}


class Stub:
    """Stands for Triton's driver of a GPU.

    Args:
        arch: architecture that kernels are compiled for, such as 90.
    """

    binary_ext = "cubin"

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, self
        self.launches: list[str] = []
        self.compiled: dict[str, Any] = {}

    def install(self) -> "Stub":
        """Let the triton backend take tensors on a CPU, and Triton launch nothing."""
        from irpe.backends import triton as backend
        from irpe.backends.triton import launch

        driver.set_active(self)
        backend.absent = lambda device: None
        launch._capability = lambda device: self.arch
        return self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            self.launches.append(metadata.name)

        return launch

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = SHARED.get(self.arch, 101376)
        return {
            "max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32,
            "max_num_regs": 65536,
        }  # fmt: skip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def unload_module(self, *arguments: Any) -> None:
        pass

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind
