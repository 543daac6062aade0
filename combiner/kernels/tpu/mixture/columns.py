"""The kernels over tiles of columns: vertical summaries, and attention to the own column and to horizontal summaries.

Letters: as in `tile`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.mixture import pooling, terms
from combiner.kernels.tpu.mixture.arrays import Pair
from combiner.kernels.tpu.mixture.pooling import Running
from combiner.kernels.tpu.mixture.rows import Gradients
from combiner.kernels.tpu.mixture.terms import Query, Share
from combiner.kernels.tpu.mixture.tile import ColumnTile
from combiner.kernels.tpu.rowmajor.tile import get, put


class Inputs(NamedTuple):
    """Queries, keys and values, and the horizontal summaries."""

    tokens: Tokens
    horizontal: Pair


class Outputs(NamedTuple):
    """The vertical summaries of each side, and what was attended to (see `rows.Inputs`)."""

    vertical: tuple[Pair, ...]
    parts: tuple[Any, Any]


class Turned(NamedTuple):
    """Arrays by which a tile changes between rows and columns; the results of a column overwrite its inputs.

    Attributes:
        tokens: queries, keys and values.
        horizontal: summaries.
        pooled: queries of the vertical spans of each side.
        d_out: the gradient of the attended values; None forward.
        d_values: those of the values of vertical summaries of each side; none forward.
    """

    tokens: Tokens
    horizontal: Pair
    pooled: tuple[Any, ...]
    d_out: Any = None
    d_values: tuple[Any, ...] = ()


def _grow(tile: ColumnTile, side: int, refs: Sequence[Any], visit: Callable[..., None]) -> None:
    """Runs `visit` with the number of each row and the spans above it, one for each array; of side 1, those below."""
    rows, unrolled = tile.plan.blocks, tile.plan.unrolled_of(tile.plan.blocks, tile.plan.width)
    empty = pooling.empty(tile.plan.pool, (tile.plan.width, tile.plan.lanes))

    def some(first: Any, spans: tuple[Running, ...]) -> tuple[Running, ...]:
        for i in range(unrolled):
            row = first * unrolled + i
            row = rows - 1 - row if side else row
            visit(row, *spans)
            inside = tile.inside(row)
            cells = [ref[row].astype(jnp.float32) for ref in refs]
            spans = tuple(pooling.grow(tile.plan.pool, span, x, inside) for span, x in zip(spans, cells, strict=True))
        return spans

    lax.fori_loop(0, rows // unrolled, some, (empty,) * len(refs))


def attend(tile: ColumnTile, x: Inputs, _: None, out: Outputs, numbers: Any, turned: Turned) -> None:
    """Makes the vertical summaries; attends to the own column, and to the horizontal summaries of it.

    `numbers` get the sums of the weights of both parts (see `terms.Weights`).
    """
    tile.turn([*x.tokens, *x.horizontal], [*turned.tokens, *turned.horizontal])
    tile.turn_mask()
    for side, (pair, pooled) in enumerate(zip(out.vertical, turned.pooled, strict=True)):

        def pool(row: Any, queries: Running, keys: Running, to: Any = pooled, ref: Any = pair.k) -> None:
            put(to, tile.row(row), pooling.pooled(tile.plan.pool, queries))
            ref[row] = pooling.pooled(tile.plan.pool, keys).astype(ref.dtype)

        _grow(tile, side, x.tokens[:2], pool)
    tile.for_each_group(lambda group: _attend_group(tile, group, turned, numbers))
    results = *turned.pooled, turned.tokens.q, turned.horizontal.k
    tile.write([*(pair.v for pair in out.vertical), *out.parts], results)


def _queries(tile: ColumnTile, group: Any, turned: Turned) -> list[Query]:
    """Returns to what a group attends, by kind and head: columns, horizontal summaries, local expectations by side."""
    q, k, v = (tile.read(refs, group) for refs in turned.tokens)
    keys, values = (tile.read(refs, group) for refs in turned.horizontal)
    found = tile.queries(Tokens(q, k, v), tile.related(group, 0), tile.drops(group, 0))
    found += tile.queries(Tokens(q, keys, values), tile.related(group, 1), tile.drops(group, 1))
    for side, refs in enumerate(turned.pooled):
        found += tile.queries(Tokens(tile.read(refs, group), k, v), tile.related(group, 0, side=side))
    return found


def _attend_group(tile: ColumnTile, group: Any, turned: Turned, numbers: Any) -> None:
    column, horizontal, *local = tile.by_kind(terms.attend(_queries(tile, group, turned)))
    parts, totals, tops = zip(*map(tile.merge_terms, (column, horizontal)), strict=True)
    for refs, values in zip((turned.tokens.q, turned.horizontal.k), parts, strict=True):
        tile.put(refs, group, values)
    for refs, heads in zip(turned.pooled, local, strict=True):
        tile.put(refs, group, tile.expectation(heads))
    tile.write_numbers(numbers, group, tile.rows_of([*totals, *tops]))


class GradientInputs(NamedTuple):
    """What the columns attend to, the gradients of the results and of vertical summaries, and the gradients so far."""

    tokens: Tokens
    horizontal: Pair
    d_out: Any
    d_vertical: tuple[Pair, ...]
    so_far: Tokens


class Scratch(NamedTuple):
    """The spans of the column before each row: their values and counts, `[r, w, e]`."""

    value: Any
    count: Any


def gradient(
    tile: ColumnTile, x: GradientInputs, numbers: Any, out: Gradients, _: None, turned: Turned, spans: Scratch
) -> None:
    """Adds the gradients through the own column and the vertical summaries, and computes those of horizontal ones.

    `numbers` are the logarithms, then the Δ, of direct terms and of horizontal summaries (see `terms`).
    """
    arrays = *x.tokens, *x.horizontal, x.d_out, *(pair.v for pair in x.d_vertical)
    tile.turn(arrays, [*turned.tokens, *turned.horizontal, turned.d_out, *turned.d_values])
    tile.turn_mask()
    for side, pooled in enumerate(turned.pooled):

        def pool(row: Any, queries: Running, to: Any = pooled) -> None:
            put(to, tile.row(row), pooling.pooled(tile.plan.pool, queries))

        _grow(tile, side, [x.tokens.q], pool)
    tile.for_each_group(lambda group: _gradient_of_group(tile, group, turned, numbers))
    for side, (pair, pooled) in enumerate(zip(x.d_vertical, turned.pooled, strict=True)):
        of_queries, of_keys = (
            (lambda row, pooled=pooled: get(pooled, tile.row(row))),
            (lambda row, ref=pair.k: ref[row]),
        )
        _pool_gradient(tile, side, x.tokens.q, of_queries, turned.tokens.q, spans)
        _pool_gradient(tile, side, x.tokens.k, of_keys, turned.tokens.k, spans)
    tile.write([*out.tokens, *out.spans], [*turned.tokens, *turned.horizontal], x.so_far)


def _gradient_of_group(tile: ColumnTile, group: Any, turned: Turned, numbers: Any) -> None:
    log_direct, log_spans, direct, spans = tile.columns_of(tile.numbers(numbers, group))
    pairs = zip([*log_direct, *log_spans], [*direct, *spans], strict=True)
    shares = [*(Share(*pair) for pair in pairs), *[None] * (len(direct) * tile.plan.sides)]
    d_outs = [tile.read(refs, group) for refs in (turned.d_out, turned.d_out, *turned.d_values)]
    d_heads = [head for d_out in d_outs for head in tile.of_each_head(d_out)]
    made = terms.gradients(_queries(tile, group, turned), d_heads, shares)
    direct, horizontal, *local = map(tile.merge_heads, tile.by_kind(made))
    dk, dv = (
        functools.reduce(jnp.add, parts) for parts in zip(*((one.k, one.v) for one in (direct, *local)), strict=True)
    )
    to = *turned.tokens, *turned.horizontal, *turned.pooled
    values = direct.q + horizontal.q, dk, dv, horizontal.k, horizontal.v, *(one.q for one in local)
    for refs, x in zip(to, values, strict=True):
        tile.put(refs, group, x)


def _pool_gradient(
    tile: ColumnTile, side: int, x: Any, d_pooled: Callable[[Any], Array], d_turned: Any, spans: Scratch
) -> None:
    """Adds the gradient of the pooling of the vertical spans of a side to that of the queries or keys."""
    plan = tile.plan

    def save(row: Any, span: Running) -> None:
        spans.value[row], spans.count[row] = span

    _grow(tile, side, [x], save)
    unrolled = plan.unrolled_of(plan.blocks, plan.width)

    def some(first: Any, share: Array) -> Array:
        for i in range(unrolled):
            row = first * unrolled + i
            row = row if side else plan.blocks - 1 - row  # from the longest span to the empty one
            span = Running(spans.value[row], spans.count[row])
            made, share = pooling.shrink(plan.pool, span, x[row].astype(jnp.float32), tile.inside(row), share)
            put(d_turned, tile.row(row), get(d_turned, tile.row(row)) + made)
            share += d_pooled(row).astype(jnp.float32) / jnp.maximum(span.count, 1.0)
        return share

    lax.fori_loop(0, plan.blocks // unrolled, some, jnp.zeros((plan.width, plan.lanes), jnp.float32))
