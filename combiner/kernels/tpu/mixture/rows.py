"""The kernels over tiles of rows: horizontal summaries, and attention to the own row and to vertical summaries.

Letters: as in `arrays`.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.mixture import terms
from combiner.kernels.tpu.mixture.arrays import Pair
from combiner.kernels.tpu.mixture.pooling import pool_others, pool_others_gradient
from combiner.kernels.tpu.mixture.terms import Query, Share, Weights
from combiner.kernels.tpu.mixture.tile import RowTile
from combiner.kernels.tpu.rowmajor.tile import by_head

LOG_2 = 0.6931471805599453


def _pool(tile: RowTile, group: Any, x: Float[Array, 't e']) -> Float[Array, 't e']:
    """Pools the rest of its row for each position."""
    made = pool_others(tile.plan.pool, tile.by_row(x.astype(jnp.float32)), tile.inside(group))
    return made.reshape(x.shape).astype(x.dtype)


def summarise(tile: RowTile, x: Tokens, _: None, out: Pair, __: None) -> None:
    """Makes the horizontal summaries: of its row without its column, for each cell."""

    def visit(group: Any) -> None:
        q, k, v = (tile.read(ref, group) for ref in x)
        _, others = tile.own_row(group)
        local = terms.attend(tile.queries(Tokens(_pool(tile, group, q), k, v), others))
        tile.write(out.k, group, _pool(tile, group, k))
        tile.write(out.v, group, tile.expectation(local))

    tile.for_each_group(visit)


class Inputs(NamedTuple):
    """What the rows attend to, and what the columns have attended to.

    Attributes:
        tokens: queries, keys and values.
        vertical: summaries, of each side.
        parts: what was attended to in the own column, and of horizontal summaries: values.
    """

    tokens: Tokens
    vertical: tuple[Pair, ...]
    parts: tuple[Any, Any]


class Outputs(NamedTuple):
    """Attended values, and to save: of the mean, those with vertical summaries; None if the softmax is joint."""

    out: Any
    vertical: Any


def attend(tile: RowTile, x: Inputs, numbers: Any, out: Outputs, logarithms: Any) -> None:
    """Attends within rows and to vertical summaries, and merges it with the rest.

    `numbers` are the sums of the weights of `parts` (see `terms.Weights`); `logarithms`, if there are any, get those of
    `terms.gradients`: of direct terms, and of vertical and horizontal summaries.
    """

    def visit(group: Any) -> None:
        q, k, v = (tile.read(ref, group) for ref in x.tokens)
        heads = tile.by_kind(terms.attend(_queries(tile, group, Tokens(q, k, v), x.vertical)))
        values, totals, tops = (list(parts) for parts in zip(*map(tile.merge_terms, heads), strict=True))
        values += [tile.read(ref, group).astype(jnp.float32) for ref in x.parts]
        sums, more = tile.rows_of([*totals, *tops]), tile.numbers(numbers, group)
        totals, tops = [*sums[: len(heads)], *more[:2]], [*sums[len(heads) :], *more[2:]]
        results, logs = _mix(tile, values, totals, tops)
        tile.write(out.out, group, functools.reduce(jnp.add, results) / len(results))
        if out.vertical is not None:
            tile.write(out.vertical, group, results[0])
        if logarithms is not None:
            tile.write_numbers(logarithms, group, _logarithms_of_kinds(logs))

    tile.for_each_group(visit)


def _queries(tile: RowTile, group: Any, x: Tokens, vertical: tuple[Pair, ...]) -> list[Query]:
    """Returns what a group attends to, by kind and head: its own row, and the vertical summaries of each side."""
    own, _ = tile.own_row(group)
    found = tile.queries(x, own, tile.drops(group, 0))
    for side, pair in enumerate(vertical):
        keys, values = (tile.read(ref, group) for ref in pair)
        found += tile.queries(Tokens(x.q, keys, values), tile.vertical(group, side), tile.drops(group, 1 + side))
    return found


def _mix(
    tile: RowTile, values: list[Array], totals: list[list[Array]], tops: list[list[Array]]
) -> tuple[list[Array], list[list[Array]]]:
    """Returns the results of the one or two softmaxes, and their logarithms by head.

    The kinds of terms are the own row, vertical summaries of each side, the own column, and horizontal summaries.
    """
    every = own, *vertical, column, horizontal = tuple(range(len(values)))
    softmaxes = [every] if tile.plan.joint else [(own, *vertical, column), (own, column, horizontal)]
    factors, logs = [], []
    for kinds in softmaxes:
        made = [
            terms.merge([Weights(totals[kind][head], tops[kind][head]) for kind in kinds])
            for head in range(tile.plan.shared_by)
        ]
        factors += zip(*(of_head for of_head, _ in made), strict=True)
        logs.append([log for _, log in made])
    columns = iter(tile.columns_of(factors))
    results = [
        functools.reduce(jnp.add, [values[kind] * by_head(next(columns), tile.plan.lanes) for kind in kinds])
        for kinds in softmaxes
    ]
    return results, logs


def _logarithms_of_kinds(logs: list[list[Array]]) -> list[list[Array]]:
    """Returns the logarithms of `terms.gradients`: of direct terms, vertical and horizontal summaries."""
    if len(logs) == 1:
        return 3 * logs
    first, second = ([log + LOG_2 for log in of_heads] for of_heads in logs)
    both = [
        jnp.minimum(one, other) - jnp.log(1.0 + jnp.exp(-jnp.abs(one - other)))
        for one, other in zip(first, second, strict=True)
    ]
    return [both, first, second]


class GradientInputs(NamedTuple):
    """What the rows attend to, the results (see `Outputs`), and their gradient."""

    tokens: Tokens
    vertical: tuple[Pair, ...]
    results: Outputs
    d_out: Any


class Gradients(NamedTuple):
    """Gradients of queries, keys and values, and of the summaries of vertical or horizontal spans."""

    tokens: Tokens
    spans: Any


def gradient(tile: RowTile, x: GradientInputs, logarithms: Any, out: Gradients, deltas: Any) -> None:
    """Computes the gradients through the own row and the attention to vertical summaries.

    `deltas` get the Δ of direct terms and of horizontal summaries (see `terms`).
    """

    def visit(group: Any) -> None:
        q, k, v = (tile.read(ref, group) for ref in x.tokens)
        d_out = tile.read(x.d_out, group)
        queries, d_heads = _queries(tile, group, Tokens(q, k, v), x.vertical), tile.of_each_head(d_out)
        direct, of_spans = _shares(tile, group, x, d_out, logarithms, deltas)
        shares, d_heads = [*direct, *of_spans * len(x.vertical)], d_heads * (1 + len(x.vertical))
        direct, *vertical = map(tile.merge_heads, tile.by_kind(terms.gradients(queries, d_heads, shares)))
        for pair, one in zip(out.spans, vertical, strict=True):
            tile.write(pair.k, group, one.k)
            tile.write(pair.v, group, one.v)
        dq = functools.reduce(jnp.add, [one.q for one in (direct, *vertical)])
        for ref, made in zip(out.tokens, (dq, direct.k, direct.v), strict=True):
            tile.write(ref, group, made)

    tile.for_each_group(visit)


def _shares(
    tile: RowTile, group: Any, x: GradientInputs, d_out: Array, logarithms: Any, deltas: Any
) -> tuple[list[Share], list[Share]]:
    """Returns the shares of direct terms and of vertical summaries, of each head; writes the `deltas`."""
    both, first, second = tile.numbers(logarithms, group)
    change = d_out.astype(jnp.float32)

    def sums(ref: Any) -> list[Array]:
        parts = tile.of_each_head(change * tile.read(ref, group).astype(jnp.float32))
        return [part.sum(axis=1, keepdims=True) for part in parts]

    if x.results.vertical is None:
        (of_both,) = tile.rows_of([sums(x.results.out)])
        of_first = of_second = of_both
    else:
        of_mean, of_first = tile.rows_of([sums(x.results.out), sums(x.results.vertical)])
        of_second = [2 * mean - one for mean, one in zip(of_mean, of_first, strict=True)]
        of_both = [
            jnp.exp(log - log_1) * delta_1 + jnp.exp(log - log_2) * delta_2
            for log, log_1, log_2, delta_1, delta_2 in zip(both, first, second, of_first, of_second, strict=True)
        ]
    tile.write_numbers(deltas, group, [of_both, of_second])
    columns = tile.columns_of([both, of_both, first, of_first])
    direct, vertical = ([Share(*one) for one in zip(*columns[i : i + 2], strict=True)] for i in (0, 2))
    return direct, vertical


class SummaryInputs(NamedTuple):
    """Queries, keys and values; the gradients of horizontal summaries; and the gradients so far."""

    tokens: Tokens
    d_spans: Pair
    so_far: Tokens


def summary_gradient(tile: RowTile, x: SummaryInputs, _: None, out: Tokens, __: None) -> None:
    """Adds the gradients through the horizontal summaries."""

    def visit(group: Any) -> None:
        q, k, v = (tile.read(ref, group) for ref in x.tokens)
        d_keys, d_values = (tile.read(ref, group) for ref in x.d_spans)
        _, others = tile.own_row(group)
        queries, d_heads = tile.queries(Tokens(_pool(tile, group, q), k, v), others), tile.of_each_head(d_values)
        d_pooled, dk, dv = tile.merge_heads(terms.gradients(queries, d_heads, [None] * len(queries)))

        def of_pool(x: Array, d_pooled: Array) -> Array:
            x, d_pooled = (tile.by_row(one.astype(jnp.float32)) for one in (x, d_pooled))
            return pool_others_gradient(tile.plan.pool, x, tile.inside(group), d_pooled).reshape(d_values.shape)

        dq = of_pool(q, d_pooled)
        for ref, before, made in zip(out, x.so_far, (dq, dk + of_pool(k, d_keys), dv), strict=True):
            tile.write(ref, group, tile.read(before, group).astype(jnp.float32) + made)

    tile.for_each_group(visit)
