"""Start a script as a launcher would: one process, or several that find one another."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from cls_command import ROOT


def start(processes: int, script: Path, *arguments: str) -> list[subprocess.Popen]:
    """Start ``script`` in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
        running.append(
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return running


def launch(processes: int, script: Path, *arguments: str) -> list[str]:
    """Run ``script`` and return what each process printed; all must end well."""
    running = start(processes, script, *arguments)
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    return outputs
