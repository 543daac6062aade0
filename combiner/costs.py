"""What the patterns of `patterns` cost, in closed form: each function is the `cost()` of its namesake's pattern.

The default sizes of mechanisms follow from them, at lengths for which no pattern could be written down.
"""

import math
from collections.abc import Callable

from combiner.patterns import Cost, check_positive


def full(length: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`."""
    return Cost(triangle(length) if causal else length**2, 0)


def fixed(length: int, block: int, summary: int = 1, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`."""
    whole, rest = divmod(length, block)
    summary = min(summary, block)
    if causal:
        direct = whole * triangle(block) + triangle(rest)
        return Cost(direct + summary * (block * triangle(whole - 1) + rest * whole), 0)
    direct = whole * block**2 + rest**2
    seen_of_rest = max(0, rest - (block - summary))
    return Cost(direct + whole * block * ((whole - 1) * summary + seen_of_rest) + rest * whole * summary, 0)


def own_row_and_column(length: int, columns: int, *, causal: bool) -> int:
    """Counts the terms of all positions in their own grid rows and columns (causal: up to themselves)."""
    whole, rest = divmod(length, columns)
    if not causal:
        rows_in_column = rest * (whole + 1) ** 2 + (columns - rest) * whole**2
        return whole * columns**2 + rest**2 + rows_in_column - length
    in_rows = whole * triangle(columns) + triangle(rest)
    in_columns = rest * triangle(whole + 1) + (columns - rest) * triangle(whole)
    return in_rows + in_columns - length


def axial(length: int, columns: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`."""
    return Cost(own_row_and_column(length, columns, causal=causal), 0)


def logsparse(length: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: the terms of `combiner_logsparse`."""
    return siblings(length, causal=causal)._replace(members=0)


def own_block_and_others(length: int, block: int, *, causal: bool) -> int:
    """Counts the terms of all positions in their own blocks, and one for every earlier (bidirectional: other) block."""
    whole, rest = divmod(length, block)
    if causal:
        return whole * triangle(block) + triangle(rest) + block * triangle(whole - 1) + rest * whole
    return whole * block**2 + rest**2 + length * (whole + (rest > 0) - 1)


def combiner_fixed(length: int, block: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l (block + l / block))`."""
    blocks = -(-length // block)
    members = (blocks - 1) * block if causal else length if blocks > 1 else 0
    return Cost(own_block_and_others(length, block, causal=causal), members)


def combiner_axial_rowmajor(length: int, columns: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l (columns + l / columns))`."""
    terms = own_block_and_others(length, columns, causal=causal)
    whole, rest = divmod(length, columns)
    rows = whole + (rest > 0)
    if rows == 1:
        return Cost(terms, 0)
    if causal:
        used_of_last_but_one = rest or columns
        return Cost(terms, ((rows - 2) * columns + used_of_last_but_one) * columns)
    return Cost(terms, 2 * (rest or columns) * columns if rows == 2 else length * columns)


def combiner_axial_vertical(length: int, columns: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l (columns + l / columns))`."""
    whole, rest = divmod(length, columns)
    terms = own_row_and_column(length, columns, causal=causal) + (length - min(length, columns)) * (columns - 1)
    if columns == 1:
        return Cost(terms, 0)
    last = columns - 1 if rest == 1 else columns if rest else 0  # a lone token does not use the span above itself
    members = columns * triangle(whole - 1) + whole * last
    if not causal and whole:
        terms += ((whole - 1) * columns + rest) * (columns - 1)
        members += columns * triangle(whole - 1) + whole * rest
    return Cost(terms, members)


def combiner_axial_horizontal(length: int, columns: int, split: bool = False, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l (columns + l / columns))`."""
    whole, rest = divmod(length, columns)
    direct = own_row_and_column(length, columns, causal=causal)
    if columns == 1 or not whole:
        return Cost(direct, 0)
    in_row, in_last = (2 * columns - 2, max(0, 2 * rest - 1)) if split else (columns, rest)  # spans by column, summed
    if causal:
        used = (whole - 1) * columns + rest  # of the last row but one, only what is above a token
        return Cost(direct + triangle(whole - 1) * in_row + whole * in_last, (columns - 1) * used)
    terms = direct + whole * (whole - 1) * in_row + whole * in_last
    if rest:
        terms += whole * (columns + rest - 2 if split else columns - (rest == 1))
    return Cost(terms, (columns - 1) * (whole * columns if whole > 1 else rest) + rest**2)


def combiner_mixture(length: int, columns: int, split: bool = False, *, causal: bool) -> Cost:
    """Closed form of the cost of `combiner_mixture` and of `combiner_mixture_joint`."""
    vertical = combiner_axial_vertical(length, columns, causal=causal)
    horizontal = combiner_axial_horizontal(length, columns, split, causal=causal)
    shared = own_row_and_column(length, columns, causal=causal)
    return Cost(vertical.terms + horizontal.terms - shared, vertical.members + horizontal.members)


def combiner_routing(length: int, block: int, clusters: int, *, causal: bool) -> Cost:
    """What `pattern` costs at most, and the program always, whatever the assignment to `clusters`."""
    blocks = (length + min(clusters, length) * (block - 1)) // block
    if not causal:
        return Cost(blocks * block**2 + length * blocks, blocks * block)
    return Cost(blocks * block**2 + length * (max(1, length // block) + 2 * min(clusters, length)), blocks * block**2)


def combiner_logsparse(length: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l log l)`."""
    return siblings(length, causal=causal)


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


def combiner_tree(length: int, branch: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l branch log(l) / log(branch))`."""
    terms, members, size = 0, 0, 1
    while size < length or size == 1:
        nodes = -(-length // size)
        parents, rest = divmod(nodes, branch)
        last = length - (nodes - 1) * size  # positions of the last node
        inside = rest or branch  # nodes of the last parent
        whole = parents - (rest == 0)  # parents before the last one
        if size == 1:
            pairs = triangle if causal else (lambda n: n * n)
            terms += whole * pairs(branch) + pairs(inside)
        elif causal:
            terms += size * (whole * triangle(branch - 1) + triangle(inside - 2)) + last * (inside - 1)
        else:
            terms += size * whole * branch * (branch - 1) + (size * (inside - 1) + last) * (inside - 1)
        size *= branch
        if size < length:  # the parents are spans; nobody sees the last one of a level when causal
            members += whole * branch if causal else nodes
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
