"""What the processes of one run agree on; all of them must call a function of this module together."""

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

_SHOWN = 1000
_DIGEST = hashlib.sha256().digest_size


class Difference(NamedTuple):
    """Two texts that should be the same.

    Attributes:
        process: the first one whose text is not that of process 0.
        first: text of process 0, as far as it is shown.
        other: text of `process`, as far as it is shown.
        later: where they differ, if what is shown is the same; else ''.
    """

    process: int
    first: str
    other: str
    later: str


def in_all(fact: bool) -> bool:
    """Returns whether something is so in all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(fact))))


def difference(text: str) -> Difference | None:
    """Compares a text, of any length, with those of the other processes; returns None if all are the same."""
    if jax.process_count() == 1:
        return None
    found = [bytes(row) for row in multihost_utils.process_allgather(compared(text))]
    for number, other in enumerate(found):
        if other != found[0]:
            first, second = (each[_DIGEST:].decode(errors='replace').strip() for each in (found[0], other))
            later = f'they differ after the first {_SHOWN:,} bytes' if first == second else ''
            return Difference(number, first, second, later)
    return None


def compared(text: str) -> np.ndarray:
    """Returns the same number of bytes for any text: a digest of all of it, and what is shown of it."""
    shown = text.encode()[:_SHOWN].ljust(_SHOWN)
    return np.frombuffer(hashlib.sha256(text.encode()).digest() + shown, np.uint8)
