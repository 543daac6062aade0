"""Closed forms of the costs of patterns.

Mechanisms choose their default sizes by them, also at lengths for which a `Pattern` does not fit into memory.
"""

import math
from collections.abc import Callable

from combiner.patterns import Cost, check_positive


def own_row_and_column(length: int, columns: int, *, causal: bool) -> int:
    """Counts the terms if each position attends to its own grid row and column (causal: up to itself)."""
    whole, rest = divmod(length, columns)
    if not causal:
        rows_in_column = rest * (whole + 1) ** 2 + (columns - rest) * whole**2
        return whole * columns**2 + rest**2 + rows_in_column - length
    in_rows = whole * triangle(columns) + triangle(rest)
    in_columns = rest * triangle(whole + 1) + (columns - rest) * triangle(whole)
    return in_rows + in_columns - length


def own_block_and_others(length: int, block: int, *, causal: bool) -> int:
    """Counts the terms of attention to the own block, with one more per earlier (bidirectional: other) block."""
    whole, rest = divmod(length, block)
    if causal:
        return whole * triangle(block) + triangle(rest) + block * triangle(whole - 1) + rest * whole
    return whole * block**2 + rest**2 + length * (whole + (rest > 0) - 1)


def siblings(length: int, *, causal: bool) -> Cost:
    """Counts terms and members if each position has one term for its sibling block at every power-of-two size."""
    terms, members = length, 0
    for size in (1 << level for level in range((length - 1).bit_length())):
        pairs, rest = divmod(length, 2 * size)
        right = max(0, rest - size)  # positions of a last, partial right sibling
        in_left, in_right = pairs * size + right, pairs * size + (size if right else 0)
        terms += in_left if causal else in_left + in_right
        if size > 1:
            members += in_right if causal else in_left + in_right
    return Cost(terms, members)


def cheapest_size(cost: Callable[..., Cost], length: int, *, causal: bool) -> int:
    """Returns the power of two up to `length` with the least cost: the default `block` or `columns` of a mechanism."""
    check_positive(length=length)
    return min((1 << e for e in range(length.bit_length())), key=lambda size: cost(length, size, causal=causal).total)


def root_size(length: int) -> int:
    """Returns the power of two nearest to the square root of a length, on a logarithmic scale."""
    return 1 << round(math.log2(length) / 2)


def triangle(n: int) -> int:
    """Returns `1 + 2 + … + n`."""
    return n * (n + 1) // 2


def tree_levels(length: int, branch: int) -> int:
    """Returns the number of levels of spans in a tree, of `branch`, `branch²`, … positions, below its root.

    Raises:
        ValueError: `branch` is less than 2.
    """
    if branch < 2:
        raise ValueError(f'branch must be at least 2, got {branch}')
    levels = 0
    while branch ** (levels + 1) < length:
        levels += 1
    return levels
