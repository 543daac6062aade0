"""What the patterns of `patterns` cost, in closed form: each function is the `cost()` of its namesake's pattern.

The default sizes of mechanisms follow from them, at lengths for which no pattern could be written down.
"""

import math
from collections.abc import Callable

from combiner.patterns import Cost, check_positive


def own_row_and_column(length: int, columns: int, *, causal: bool) -> int:
    """Counts the terms of all positions in their own grid rows and columns (causal: up to themselves)."""
    whole, rest = divmod(length, columns)
    if not causal:
        rows_in_column = rest * (whole + 1) ** 2 + (columns - rest) * whole**2
        return whole * columns**2 + rest**2 + rows_in_column - length
    in_rows = whole * triangle(columns) + triangle(rest)
    in_columns = rest * triangle(whole + 1) + (columns - rest) * triangle(whole)
    return in_rows + in_columns - length


def own_block_and_others(length: int, block: int, *, causal: bool) -> int:
    """Counts the terms of all positions in their own blocks, and one for every earlier (bidirectional: other) block."""
    whole, rest = divmod(length, block)
    if causal:
        return whole * triangle(block) + triangle(rest) + block * triangle(whole - 1) + rest * whole
    return whole * block**2 + rest**2 + length * (whole + (rest > 0) - 1)


def siblings(length: int, *, causal: bool) -> Cost:
    """Counts the terms and members where each position has one term for its sibling at every level of halving."""
    terms, members = length, 0
    for size in (1 << level for level in range((length - 1).bit_length())):
        pairs, rest = divmod(length, 2 * size)
        right = max(0, rest - size)  # positions of a last, partial right sibling
        seen_left, seen_right = pairs * size + right, pairs * size + (size if right else 0)
        terms += seen_left if causal else seen_left + seen_right
        if size > 1:
            members += seen_right if causal else seen_left + seen_right
    return Cost(terms, members)


def cheapest_size(cost: Callable[..., Cost], length: int, *, causal: bool) -> int:
    """The power of two up to `length` that minimises `cost`: the default `block` or `columns` of a mechanism."""
    check_positive(length=length)
    return min((1 << e for e in range(length.bit_length())), key=lambda size: cost(length, size, causal=causal).total)


def root_size(length: int) -> int:
    """The power of two nearest to the square root of a length, on a scale of logarithms."""
    return 1 << round(math.log2(length) / 2)


def triangle(n: int) -> int:
    """Sums 1 to `n`."""
    return n * (n + 1) // 2
