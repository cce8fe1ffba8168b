"""Seeds for every random decision.

With one generator for all decisions, results would depend on the number of workers, the order of
work and the step of an interruption. So every random decision uses a seed derived from its
coordinates: (seed, epoch, sample) for augmentation, (seed, step) for mixing, (seed, step, process)
for dropout.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive(*coordinates: int | str) -> int:
    """Return a 63-bit seed, a hash of ``coordinates``."""
    text = "/".join(map(str, coordinates)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and restore them on leaving."""
    python, tensor = random.getstate(), torch.random.get_rng_state()
    # Replacing NumPy's generator is ten times faster than copying its state.
    array = np.random.get_bit_generator()
    random.seed(seed)
    np.random.set_bit_generator(np.random.MT19937(seed))
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(array)
        torch.random.set_rng_state(tensor)
