"""The grids of sequences, by rows and by columns, and a visit to them in steps.

A sequence fills the rows of a grid one after another; the last may be partial. Its cells lie in memory twice, by rows
and by columns, so that every product is one of matrices.

Letters: `b` batch, `l` length, `h` head, `d` head width; `m` lines, which are the rows `b·n` or the columns `b·c` of
all grids, and `c` position in a line.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
from jaxtyping import Array, Bool, Float, Shaped

from combiner.attention.joint import Drop
from combiner.attention.layout import Summary, merge, split, split_valid, transpose_grid
from combiner.attention.pooling import PLAIN, Pools
from combiner.attention.steps import visit_heads
from combiner.attention.sums import Sums

Turned = TypeVar('Turned', Sums, Summary)


class Lines(NamedTuple):
    """All rows or all columns: queries (not scaled), keys, values, and which cells are no padding (None for all)."""

    q: Float[Array, 'h m c d']
    k: Float[Array, 'h m c d']
    v: Float[Array, 'h m c d']
    inside: Bool[Array, 'm c'] | None


class Grid(NamedTuple):
    """The grids of a batch, and how to attend over them."""

    rows: Lines
    columns: Lines
    causal: bool
    drop: Drop | None = None


def lay_out(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Grid:
    """The grids of sequences."""
    batch, length = q.shape[:2]
    inside = split_valid(valid, batch, length, columns, causal=causal)
    q, k, v = (split(x, columns) for x in (q, k, v))
    rows = q.shape[1] // batch
    turned = None if inside is None else turn_labels(inside, rows)
    by_column = Lines(*(transpose_grid(x, rows) for x in (q, k, v)), inside=turned)
    return Grid(Lines(q, k, v, inside), by_column, causal, drop)


def visit_grids(
    attend: Callable[[Grid], Float[Array, 'h m c d']],
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    pools: Pools,
    valid: Bool[Array, 'b l'] | None,
    drop: Drop | None,
) -> Float[Array, 'b l h d']:
    """`attend`, from the grids of sequences to what their rows attend to, on a CPU in steps (see `steps.visit_heads`).

    All at once where heads differ in more than their input: in the parameters of `pools` or in what `drop` draws.
    """

    def visit(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
        cells = lay_out(q, k, v, columns=columns, causal=causal, valid=valid, drop=drop)
        return merge(attend(cells).astype(v.dtype), q.shape[1])

    at_once = drop is not None or pools not in PLAIN.values()
    logits = q[..., 0].size * max(columns, -(-q.shape[1] // columns))
    return visit_heads(visit, 0 if at_once else logits, q, k, v, valid)


def turn(by_line: Turned, size: int) -> Turned:
    """From rows to columns or back; `size` is the length of the lines that come out."""
    return jax.tree.map(lambda x: transpose_grid(x, size), by_line)


def turn_labels(labels: Shaped[Array, 'm c'], size: int) -> Shaped[Array, 'k n']:
    """`turn` for labels of cells."""
    return labels.reshape(-1, size, labels.shape[1]).swapaxes(1, 2).reshape(-1, size)
