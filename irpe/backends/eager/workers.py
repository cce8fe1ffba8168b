"""Jobs side by side, each on one core: fewer meetings of threads than within every operation.

torch splits each operation over its threads, and all wait for the slowest, a few hundred times in
a call that goes tile by tile. Here a thread does whole jobs, with operations on a single core.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of threads; one at most
_lock = threading.Lock()
os.register_at_fork(after_in_child=_pools.clear)  # threads do not live on in a child


def run(jobs: Sequence[Callable[[], None]]) -> None:
    """Do all jobs, in any order, with as many threads as torch has.

    In the calling thread, one after another, if that is as good or if something watches what this
    thread computes: a profiler, or a mode that counts or replaces operations.
    """
    threads = torch.get_num_threads()
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
    if threads == 1 or len(jobs) < threads or watched:
        for job in jobs:
            job()
        return
    inference = torch.is_inference_mode_enabled()

    def alone(job: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            job()

    for done in [_pool(threads).submit(alone, job) for job in jobs]:
        done.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            for pool in _pools.values():
                pool.shutdown(wait=False)
            _pools.clear()
            _pools[threads] = _started(threads)
        return _pools[threads]


def _started(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads do operations on one core each."""
    ready = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of the thread that calls it, and of threads that start later
        ready.wait()

    pool = ThreadPoolExecutor(threads, "irpe", initializer=begin)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # of threads that start later, as it was
    return pool
