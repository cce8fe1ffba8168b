"""One process of several: runs of the scripts one after another, as imports take the most time.

    python tests/training/shard_runs.py FILE

FILE is a list of {"script", "arguments"}, and in some "stop": a step before which the first process
gets a SIGTERM, and "copy": two folders, the first of which is copied after the run. Prints how the
tables of sharded runs lie, and ``ended STATUS`` after each run.
"""

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from training import run
from training.distributed import Sharded
from training.loop import Loop


class Told(Sharded):
    """Prints its tables: name, shape and this process's part of it."""

    def __init__(self, *given):
        super().__init__(*given)
        for name, parameter in self.model.named_parameters():
            if "table" in name:
                print("table", name, list(parameter.shape), list(parameter.to_local().shape))


def main(file: str) -> None:
    first = os.environ["RANK"] == "0"
    step, stop, port = Loop._one_step, None, int(os.environ["MASTER_PORT"])

    def stopping(self, *given):
        if self.step == stop and first:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    Loop._one_step, run.Sharded = stopping, Told
    for number, entry in enumerate(json.loads(Path(file).read_text())):
        AcceleratorState._reset_state(True)
        os.environ["MASTER_PORT"] = str(port + number)  # the one before may be closing yet
        stop = entry.get("stop")
        status = importlib.import_module(entry["script"]).main(entry["arguments"])
        print("ended", status, flush=True)
        if first and "copy" in entry:
            shutil.copytree(*entry["copy"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(*sys.argv[1:])
