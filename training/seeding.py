"""Seeds for every random decision.

The state of one long-lived generator would make results depend on the number of workers, on the
order of the work and on where a run was interrupted. So every random decision here starts from
a seed derived from its coordinates: (seed, epoch, sample) for augmentation, (seed, step) for
mixing, (seed, step, process) for dropout.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive(*coordinates: int | str) -> int:
    """Return a 63-bit seed that is a fixed, well mixed function of ``coordinates``."""
    text = "/".join(map(str, coordinates)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and restore them on leaving."""
    python, tensor = random.getstate(), torch.random.get_rng_state()
    # NumPy's generator is replaced: copying its state costs ten times as much.
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
