"""Indices of records in a random-access source."""

from typing import SupportsIndex

import numpy as np
from jaxtyping import Int


def checked(index: SupportsIndex, length: int, what: str) -> int:
    """An index as an int; a source takes no negative ones.

    Args:
        index: whatever can be one.
        length: of the source.
        what: it holds, for the message: 'crop', 'document', ….

    Raises:
        IndexError: it does not lie in 0..length - 1.
    """
    index = index.__index__()
    if not 0 <= index < length:
        raise IndexError(f'{what} {index} of {length}')
    return index


def evenly_spaced(length: int, limit: int | None) -> Int[np.ndarray, ' count']:
    """Indices of `limit` records, evenly spaced over all of them; every index if there is no more."""
    count = length if limit is None else min(limit, length)
    return np.arange(count) * length // max(1, count)
