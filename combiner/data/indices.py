"""Indices of records in a random-access source."""

from typing import SupportsIndex

import numpy as np
from jaxtyping import Int


def checked(index: SupportsIndex, length: int, what: str) -> int:
    """Converts an index to int and checks that it is in 0..length - 1.

    Args:
        index: an int or another type with `__index__`.
        length: number of records in the source.
        what: the kind of record, for the error message: 'crop', 'document', ….

    Raises:
        IndexError: the index is negative or too large.
    """
    index = index.__index__()
    if not 0 <= index < length:
        raise IndexError(f'{what} {index} of {length}')
    return index


def evenly_spaced(length: int, limit: int | None) -> Int[np.ndarray, ' count']:
    """Returns the indices of `limit` records, evenly spaced over all records; all indices if there are no more."""
    count = length if limit is None else min(limit, length)
    return np.arange(count) * length // max(1, count)


def spread(length: int, limit: int | None) -> Int[np.ndarray, ' count']:
    """Returns the indices of `limit` records, one from each of as many equal parts; all indices if there are no more.

    Of n parts, part i gives record ⌊i·length/n⌋ + (i mod ⌊length/n⌋): each a little further behind its start than the
    one before. Evenly spaced records might all have the same place in a period of the data: with four tiles of each
    image, every 40th record is the first tile of an image.
    """
    starts = evenly_spaced(length, limit)
    return starts + np.arange(len(starts)) % max(1, length // max(1, len(starts)))
