"""The kernels over tiles of columns: vertical summaries, and attention to the own column and to horizontal summaries.

Letters: as in `tile`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.mixture import pooling, terms
from combiner.kernels.tpu.mixture.arrays import Pair
from combiner.kernels.tpu.mixture.pooling import Running
from combiner.kernels.tpu.mixture.rows import Gradients
from combiner.kernels.tpu.mixture.terms import Given, Share
from combiner.kernels.tpu.mixture.tile import ColumnTile
from combiner.kernels.tpu.rowmajor.tile import get, put
from combiner.kernels.tpu.tiles import product


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
        d_values: those of the values of vertical summaries of each side; None forward.
    """

    tokens: Tokens
    horizontal: Pair
    pooled: tuple[Any, ...]
    d_out: Any = None
    d_values: tuple[Any, ...] | None = None


def _grow(tile: ColumnTile, side: int, ref: Any, visit: Callable[[Any, Running], None]) -> None:
    """Runs `visit` with the number of each row and the span above it (or, of side 1, below it) in every column."""
    rows, unrolled = tile.plan.blocks, tile.plan.unrolled_of(tile.plan.blocks)

    def some(first: Any, span: Running) -> Running:
        for i in range(unrolled):
            row = first * unrolled + i
            row = rows - 1 - row if side else row
            visit(row, span)
            span = pooling.grow(tile.plan.pool, span, ref[row].astype(jnp.float32), tile.inside(row))
        return span

    lax.fori_loop(0, rows // unrolled, some, pooling.empty(tile.plan.pool, (tile.plan.width, tile.plan.lanes)))


def _pool_queries(tile: ColumnTile, queries: Any, pooled: tuple[Any, ...]) -> None:
    """Writes the queries of the vertical spans of each side."""
    for side, turned in enumerate(pooled):
        _grow(tile, side, queries, lambda row, span, turned=turned: put(turned, tile.row(row), _pooled(tile, span)))


def _pooled(tile: ColumnTile, span: Running) -> Array:
    return pooling.pooled(tile.plan.pool, span)


def attend(tile: ColumnTile, x: Inputs, _: None, out: Outputs, numbers: Any, turned: Turned) -> None:
    """Makes the vertical summaries; attends to the own column, and to the horizontal summaries of it.

    `numbers` get the sums of the weights of both parts (see `terms.Weights`).
    """
    for ref, to in zip((*x.tokens, *x.horizontal), (*turned.tokens, *turned.horizontal), strict=True):
        tile.turn(ref, to)
    tile.turn_mask()
    _pool_queries(tile, x.tokens.q, turned.pooled)
    for side, pair in enumerate(out.vertical):

        def write(row: Any, span: Running, ref: Any = pair.k) -> None:
            ref[row] = _pooled(tile, span).astype(ref.dtype)

        _grow(tile, side, x.tokens.k, write)

    tile.for_each_group(lambda group: _attend_group(tile, group, turned, numbers))
    for pair, made in zip(out.vertical, turned.pooled, strict=True):
        tile.write(pair.v, made)
    for ref, made in zip(out.parts, (turned.tokens.q, turned.horizontal.k), strict=True):
        tile.write(ref, made)


def _attend_group(tile: ColumnTile, group: Any, turned: Turned, numbers: Any) -> None:
    q, k, v = (tile.read(refs, group) for refs in turned.tokens)
    span_k, span_v = (tile.read(refs, group) for refs in turned.horizontal)
    for side, refs in enumerate(turned.pooled):
        mask, pooled = tile.related(group, 0, side=side), tile.read(refs, group)
        weights = [terms.local_weights(one, k, mask) for one in tile.of_each_head(pooled, scaled=True)]
        tile.put(refs, group, tiles.own_lanes([product(one.astype(v.dtype), v) for one in weights]))
    queries, weights = tile.of_each_head(q, scaled=True), []
    for kind, (keys, values, to) in enumerate(((k, v, turned.tokens.q), (span_k, span_v, turned.horizontal.k))):
        mask, drops = tile.related(group, kind), tile.drops(group, kind)
        made = [terms.attend(one, keys, values, mask, drop) for one, drop in zip(queries, drops, strict=True)]
        sums, totals, tops = zip(*made, strict=True)
        tile.put(to, group, tiles.own_lanes(list(sums)))
        weights += [totals, tops]
    tile.write_numbers(numbers, group, tile.rows_of(weights))


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
    arrays = (*x.tokens, *x.horizontal, x.d_out, *(pair.v for pair in x.d_vertical))
    to = (*turned.tokens, *turned.horizontal, turned.d_out, *turned.d_values)
    for ref, refs in zip(arrays, to, strict=True):
        tile.turn(ref, refs)
    tile.turn_mask()
    _pool_queries(tile, x.tokens.q, turned.pooled)
    tile.for_each_group(lambda group: _gradient_of_group(tile, group, turned, numbers))
    for side, (pair, pooled) in enumerate(zip(x.d_vertical, turned.pooled, strict=True)):
        of_queries, of_keys = (
            (lambda row, pooled=pooled: get(pooled, tile.row(row))),
            (lambda row, ref=pair.k: ref[row]),
        )
        _pool_gradient(tile, side, x.tokens.q, of_queries, turned.tokens.q, spans)
        _pool_gradient(tile, side, x.tokens.k, of_keys, turned.tokens.k, spans)
    for ref, before, made in zip(out.tokens, x.so_far, turned.tokens, strict=True):

        def add(row: Any, ref: Any = ref, before: Any = before, made: Any = made) -> None:
            ref[row] = (before[row].astype(jnp.float32) + get(made, tile.row(row))).astype(ref.dtype)

        tile.for_each_row(add)
    for ref, made in zip(out.spans, turned.horizontal, strict=True):
        tile.write(ref, made)


def _gradient_of_group(tile: ColumnTile, group: Any, turned: Turned, numbers: Any) -> None:
    q, k, v = (tile.read(refs, group) for refs in turned.tokens)
    spans = tuple(tile.read(refs, group) for refs in turned.horizontal)
    found, d_out = tile.columns_of(tile.numbers(numbers, group)), tile.read(turned.d_out, group)
    queries, d_heads, heads = tile.of_each_head(q, scaled=True), tile.of_each_head(d_out), range(tile.plan.shared_by)
    given = []
    for kind, keys in enumerate(((k, v), spans)):
        shares, drops = [Share(*one) for one in zip(*found[kind::2], strict=True)], tile.drops(group, kind)
        mask = tile.related(group, kind)
        given += [Given(Tokens(queries[i], *keys), d_heads[i], mask, shares[i], drops[i]) for i in heads]
    for side, refs in enumerate(zip(turned.pooled, turned.d_values, strict=True)):
        pooled, d_values = (tile.read(one, group) for one in refs)
        queries, d_heads = tile.of_each_head(pooled, scaled=True), tile.of_each_head(d_values)
        mask = tile.related(group, 0, side=side)
        given += [Given(Tokens(queries[i], k, v), d_heads[i], mask) for i in heads]
    direct, horizontal, *vertical = (tile.merge_heads(one) for one in tile.by_kind(terms.gradients(given)))
    dk, dv = (sum(parts) for parts in zip(*((one.k, one.v) for one in (direct, *vertical)), strict=True))
    made = direct.q + horizontal.q, dk, dv, horizontal.k, horizontal.v
    for refs, x in zip((*turned.tokens, *turned.horizontal), made, strict=True):
        tile.put(refs, group, x)
    for refs, one in zip(turned.pooled, vertical, strict=True):
        tile.put(refs, group, one.q)


def _pool_gradient(
    tile: ColumnTile, side: int, x: Any, d_pooled: Callable[[Any], Array], d_turned: Any, spans: Scratch
) -> None:
    """Adds the gradient of the pooling of the vertical spans of a side to that of the queries or keys."""
    plan = tile.plan

    def save(row: Any, span: Running) -> None:
        spans.value[row], spans.count[row] = span

    _grow(tile, side, x, save)
    unrolled = plan.unrolled_of(plan.blocks)

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
