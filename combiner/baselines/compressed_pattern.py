"""What `compressed` reaches, as data. Letters: `l` length, `n` blocks that are summarised."""

import numpy as np
from jaxtyping import Bool

from combiner.patterns import Cost, Pattern, check_positive


def uses(length: int, blocks: int, block: int, window: int) -> Bool[np.ndarray, 'l n']:
    """Which blocks a position sees: those that start before its window."""
    return np.arange(blocks) * block <= np.arange(length)[:, None] - window


def compressed(length: int, *, block: int, window: int) -> Pattern:
    """The last `window` positions directly, and every block that starts before them as a span."""
    check_positive(length=length, block=block, window=window)
    position = np.arange(length)
    blocks = np.arange(-(-length // block))
    seen = uses(length, len(blocks), block, window)
    used = seen.any(axis=0)
    distance = position[:, None] - position
    return Pattern((distance >= 0) & (distance < window), blocks[used, None] == position // block, seen[:, used])


def cost(length: int, block: int, window: int | None = None, *, causal: bool = True) -> Cost:
    """Closed form of `compressed(…).cost()`; the window is as long as the block if not given.

    Raises:
        ValueError: it is not causal, and has no pattern.
    """
    if not causal:
        raise ValueError('compressed attention is causal')
    window = min(window or block, length)
    whole, rest = divmod(length - window, block)
    terms = window * (window + 1) // 2 + (length - window) * window
    return Cost(terms + block * whole * (whole + 1) // 2 + rest * (whole + 1), (whole + (rest > 0)) * block)
