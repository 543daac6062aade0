"""Combiner-Logsparse: one summary for each scale of distance (Combiner, section 4.2).

At level `t` the sequence is cut into blocks of `2^t` positions, numbered 0, 1, 2, …. Blocks `2i` and `2i + 1` are
siblings, the left and the right one. At every level a position attends to the sibling of its own block: from a right
block to the left sibling and, if bidirectional, from a left block to the right sibling.

Positions are computed in chunks of, say, 64 positions, which are blocks too. The siblings smaller than a chunk
(`within_blocks`) are one dense masked product: of a chunk's queries with its 31 summaries of a side, of which a query
attends to 5 at most. Of the larger siblings (`beyond_blocks`), each chunk has one of a side at every level: it attends
to the sibling or is part of it. A local expectation is summed over each chunk, then over the chunks. So keys and values
are read once for all levels.

Decoding takes O(log l) work for a token, amortised. A position attends to the left sibling of level `t` if bit `t` of
the position is set; the sibling is then complete. No position attends to it after the next left sibling of its level is
complete, so one summary for each level is cached. Position `i` completes exactly one left sibling, at the level of its
lowest zero bit. Its pooled query and key are computed from the left siblings of lower levels, as a binary counter
carries. Its local expectation runs over all of its positions, some at a time. For `2^t` positions that happens once in
`2^(t+1)` tokens, so each level adds half a position to a token's work.

Letters: as in `ops.blocks`, and `s` spans, `u` levels beyond blocks, `t` levels, `f` features of a pooling.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.core.pooled import Pooled
from combiner.core.registry import register
from combiner.costs import siblings
from combiner.kernels.choice import Implementation
from combiner.kernels.tpu.logsparse.mechanism import LOGSPARSE
from combiner.ops import parts
from combiner.ops.blocks import (
    LEFT,
    RIGHT,
    Blocks,
    KeyGroup,
    Tokens,
    attend_groups,
    attend_one,
    block_length,
    scale_queries,
)
from combiner.ops.pooling import PLAIN, Pool, Pools
from combiner.ops.segments import PADDING_ID, same_segment
from combiner.ops.softmax import Drop, PartialSoftmax, merge_along, merge_partials, partial_softmax, partial_softmax_one
from combiner.ops.spans import EncodedSpans, decode_spans, encode_tokens, join_spans, map_spans, merge_neighbours
from combiner.patterns import Cost, Pattern, check_positive, support, with_spans

CHUNK = 64  # positions that the plain form computes at once by default


def pattern(length: int, *, causal: bool) -> Pattern:
    """Returns the pattern of Combiner-Logsparse (section 4.2): one summary for each scale of distance.

    The sibling of position `i` at level `t` is the block `((i >> t) ^ 1) << t` of `2^t` positions, clipped to the
    sequence. Direct are `i` and its sibling at level 0, which is one position; other siblings are spans. Causal: only
    siblings on the left, one for each set bit of `i`. Bidirectional: all siblings, this project's choice.
    """
    check_positive(length=length)
    position = np.arange(length)
    spans, uses = [np.zeros((0, length), bool)], [np.zeros((length, 0), bool)]
    for level in range(1, (length - 1).bit_length()):
        own = position >> level
        blocks = np.arange(own[-1] + 1)
        sibling = own[:, None] ^ 1 == blocks
        spans.append(blocks[:, None] == own)
        uses.append(sibling & (blocks < own[:, None]) if causal else sibling)
    pairs = (position[:, None] >> 1 == position >> 1) & support(length, causal=causal)
    return with_spans(pairs, np.concatenate(spans), np.concatenate(uses, axis=1))


def cost(length: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form: `O(l log l)`."""
    return siblings(length, causal=causal)


def attend_combiner_logsparse(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    chunk: int | None,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends by equation (7): one span per level `t ≥ 1`, the sibling `((i >> t) ^ 1) << t` of `i`'s block of `2^t`.

    Direct are `i` and its sibling at level 0. Causal: only siblings before `i`. O(l log l) time, O(l) memory.

    Args:
        chunk: a power of two, the length of the blocks that are computed at once; None for the best. The result does
            not depend on it.
        q, k, v, causal, pools, valid, segments, drop: see `core.mechanism`.
    """
    blocks = Blocks.of(q, block_length(CHUNK if chunk is None else chunk, q.shape[1]), drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments, beyond_end=True)
    sides = (LEFT,) if causal else (LEFT, RIGHT)
    beyond = [beyond_blocks(blocks, tokens, side, pools) for side in sides if blocks.count > 1]
    beyond += [beyond_parts(blocks, tokens, side, pools) for side in sides if parts.count() > 1]
    pairs = jnp.asarray(pattern(blocks.size, causal=causal).direct)

    def attend(tokens, beyond):
        within = [within_blocks(tokens, side, pools) for side in sides if blocks.size > 2]
        return attend_groups(tokens.q, [tokens.group(pairs), *within, *beyond], tokens.segment_ids, drop)

    return blocks.attend(attend, tokens, beyond, keys=2 * blocks.size)


def within_blocks(tokens: Tokens, side: int, pools: Pools) -> KeyGroup:
    """Returns the siblings of one side smaller than a block of at least 4, at levels 1 and up; `h m s d`."""
    q, k, v, segment_ids = tokens
    position = np.arange(q.shape[2])
    levels = range(1, len(position).bit_length() - 1)
    spans, by_level = encode_tokens(q, k, segment_ids, pools), []
    for _ in levels:
        spans = merge_neighbours(spans, 2, pools, last=side == LEFT)
        by_level.append(of_side(spans, side))
    spans = join_spans(by_level, jnp.concatenate)
    local_q, key = decode_spans(spans, pools, q.dtype)
    # The level of every span, and its number in that level: its sibling has the number `number ^ 1`.
    level = np.concatenate([np.full(len(position) >> t + 1, t) for t in levels])
    number = np.concatenate([np.arange(side, len(position) >> t, 2) for t in levels])
    members = jnp.asarray(position >> level[:, None] == number[:, None])[None]
    members = same_segment(spans.segment_ids, segment_ids, members)
    value = partial_softmax(local_q, k, v, members).normalize().astype(v.dtype)
    return KeyGroup(key, value, jnp.asarray(position[:, None] >> level == number ^ 1)[None], spans.segment_ids)


def of_side(spans: EncodedSpans, side: int) -> EncodedSpans:
    """Selects every second span, from `side` on."""
    return map_spans(spans, lambda x, axis: jax.lax.slice_in_dim(x, side, None, 2, axis))


def beyond_blocks(blocks: Blocks, tokens: Tokens, side: int, pools: Pools, *, across: bool = False) -> KeyGroup:
    """Returns the siblings of one side that consist of whole blocks: for each block one at every level; `m h u d`.

    Of the part of a sequence that a device has, or (`across`) of the whole sequence: then the parts exchange for every
    block its pooled query and key, and its share of the local expectations.
    """
    gather, own = (partial(exchange, batch=blocks.batch) for exchange in (parts.gather_blocks, parts.own_blocks))
    of_all, of_part = (partial(jax.tree.map, exchange if across else _same) for exchange in (gather, own))

    def pool(tokens):
        q, k, _, segment_ids = tokens
        return merge_neighbours(encode_tokens(q, k, segment_ids, pools), blocks.size, pools, last=side == LEFT)

    def sum_block(tokens, local_q, span_ids, is_part):
        mask = same_segment(span_ids, tokens.segment_ids, is_part[..., None])
        return partial_softmax(local_q, tokens.k, tokens.v, mask)

    keys = 2 * blocks.size
    spans = of_all(blocks.map(pool, tokens._replace(v=None), keys=keys))
    spans = _spans_by_level(spans, blocks.batch, side, pools)
    local_q, key = (_blocks_first(x) for x in decode_spans(spans, pools, tokens.q.dtype))
    span_ids = None if spans.segment_ids is None else spans.segment_ids.reshape(len(local_q), -1)
    number = np.arange(spans.q.shape[2])[:, None] >> np.arange(local_q.shape[2])  # of the block at each level
    is_part = jnp.tile(jnp.asarray(number & 1 == side), (blocks.batch, 1))  # of the span; if not, it attends to it
    local_q, key, span_ids, is_part = of_part((local_q, key, span_ids, is_part))
    sums = of_all(blocks.map(sum_block, tokens._replace(q=None), local_q, span_ids, is_part, keys=keys))
    value = of_part(_local_expectations(sums, blocks.batch).astype(tokens.v.dtype))
    return KeyGroup(key, value, ~is_part[:, None], span_ids)


def beyond_parts(blocks: Blocks, tokens: Tokens, side: int, pools: Pools) -> KeyGroup:
    """Returns the siblings of one side that consist of whole parts of a sequence, the same for all blocks of a part."""
    if tokens.segment_ids is not None:
        tokens = tokens._replace(segment_ids=tokens.segment_ids.reshape(blocks.batch, -1))
    part = dataclasses.replace(blocks, size=blocks.length)
    siblings = beyond_blocks(part, tokens, side, pools, across=True)
    return jax.tree.map(lambda x: jnp.repeat(x, blocks.count, axis=0), siblings)


def _same(x: Array) -> Array:
    return x


def _spans_by_level(spans: EncodedSpans, batch: int, side: int, pools: Pools) -> EncodedSpans:
    """Merges blocks into the spans of one side, and returns for every block its span at each level: `h b n u f`."""
    blocks = len(spans.q) // batch
    count = (blocks - 1).bit_length()
    q, k = (_by_sequence(x, batch, 1 << count, p.identity(x))[..., 0, :] for x, p in zip(spans[:2], pools, strict=True))
    segment_ids = spans.segment_ids
    if segment_ids is not None:
        segment_ids = _by_sequence(segment_ids[:, None], batch, 1 << count, PADDING_ID)[0, ..., 0]
    spans, by_level = EncodedSpans(q, k, segment_ids), []
    for level in range(count):
        spans = merge_neighbours(spans, 2, pools, last=side == LEFT) if level else spans
        by_level.append(map_spans(of_side(spans, side), partial(_repeat, times=2 << level, length=blocks)))
    return join_spans(by_level, jnp.stack)


def _local_expectations(sums: PartialSoftmax, batch: int) -> Float[Array, 'm h u d']:
    """Returns the local expectation of each block's span at every level, from the sums of all blocks."""
    blocks, levels = len(sums.values) // batch, sums.values.shape[2]
    fills = (jnp.finfo(sums.top.dtype).min / 2, 0, 0)
    sums = PartialSoftmax(*(_by_sequence(x, batch, 1 << levels, fill) for x, fill in zip(sums, fills, strict=True)))
    by_level = []
    for level in range(levels):
        pairs = (x[:, :, :, level].reshape(*x.shape[:2], -1, 2 << level, x.shape[-1]) for x in sums)
        merged = merge_along(PartialSoftmax(*pairs), axis=3).normalize()
        by_level.append(_repeat(merged, 2, times=2 << level, length=blocks))
    return _blocks_first(jnp.stack(by_level, axis=3))


def _repeat(x: Shaped[Array, '...'], axis: int, *, times: int, length: int) -> Shaped[Array, '...']:
    """Repeats every element `times` times in a row, up to a length."""
    return jax.lax.slice_in_dim(jnp.repeat(x, times, axis), 0, length, axis=axis)


def _by_sequence(x: Shaped[Array, 'm h *rest'], batch: int, count: int, fill: Any) -> Shaped[Array, 'h b n *rest']:
    """Splits blocks by head and sequence, with room for `count` blocks of each."""
    x = jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 2, 0)
    return jnp.pad(x, ((0, 0), (0, 0), (0, count - x.shape[2]), *((0, 0),) * (x.ndim - 3)), constant_values=fill)


def _blocks_first(x: Float[Array, 'h b n u d']) -> Float[Array, 'm h u d']:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[3:]), 0, 1)


PIECE = 64  # positions that decoding adds to a local expectation at once


class Cache(NamedTuple):
    """Keys and values of all positions; encoded queries and keys of the left sibling of each level, and its summary."""

    k: Float[Array, 'b h l d']
    v: Float[Array, 'b h l d']
    encoded_q: Float[Array, 'b h t f']
    encoded_k: Float[Array, 'b h t f']
    spans: KeyGroup


def init_cache(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    counts: Int[Array, ' b'],
    capacity: int,
    pools: Pools,
) -> Cache:
    """Returns the cache after the first `counts` positions, with room for `capacity`; `q` is not scaled."""
    levels = max(1, (capacity - 1).bit_length())
    room = max(PIECE, 1 << levels) - q.shape[1]
    q, k, v = (jnp.moveaxis(jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))), 2, 0) for x in (q, k, v))
    number = (counts[:, None] >> jnp.arange(levels)) - 1  # of left siblings, if the level's bit is set
    spans, by_level = encode_tokens(q, k, None, pools), []
    for level in range(levels):
        spans = merge_neighbours(spans, 2, pools, last=True) if level else spans
        at = jnp.maximum(number[None, :, level, None, None], 0)
        by_level.append(map_spans(spans, lambda x, axis, at=at: jnp.take_along_axis(x, at, axis)))
    encoded = join_spans(by_level, jnp.concatenate)
    local_q, key = decode_spans(encoded, pools, q.dtype)
    members = jnp.arange(k.shape[2]) >> jnp.arange(levels)[:, None] == number[..., None]
    value = partial_softmax(local_q, k, v, members).normalize().astype(v.dtype)
    cache = Cache(k, v, encoded.q, encoded.k, KeyGroup(key, value))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), cache)


def decode_step(
    cache: Cache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    pools: Pools,
) -> tuple[Cache, Float[Array, 'b h d']]:
    """Decodes one token of each sequence, at position `index`; `q` is not scaled."""
    return jax.vmap(partial(_decode_one, pools=pools))(cache, index, q, k, v)


def _decode_one(cache, index, q, k, v, pools):
    levels = jnp.arange(cache.encoded_q.shape[1])
    held_k, held_v = cache.k.at[:, index].set(k), cache.v.at[:, index].set(v)
    pair = jnp.stack([index, index ^ 1])
    direct = KeyGroup(held_k[:, pair], held_v[:, pair], pair <= index)
    attended = attend_one(q, direct, cache.spans._replace(mask=(index >> levels & 1 == 1) & (levels > 0)))

    complete = jax.lax.population_count(index & ~(index + 1))  # level: the number of ones below the lowest zero
    encoded_q, pooled_q = _carry(pools.q, cache.encoded_q, q, index)
    encoded_k, pooled_k = _carry(pools.k, cache.encoded_k, k, index)
    local_q = scale_queries(pooled_q.astype(q.dtype))
    new = KeyGroup(pooled_k.astype(k.dtype), _local_expectation(local_q, held_k, held_v, index, complete))
    spans = jax.tree.map(lambda held, one: held.at[:, complete].set(one, mode='drop'), cache.spans, new)
    return Cache(held_k, held_v, encoded_q, encoded_k, spans), attended


def _carry(
    pool: Pool, held: Float[Array, 'h t f'], x: Float[Array, 'h d'], index: Int[Array, '']
) -> tuple[Float[Array, 'h t f'], Float[Array, 'h d']]:
    """Adds a position; returns the encoded spans of each level, and the block that the position completes, pooled."""
    new, carry, levels = pool.encode(x), jnp.array(True), []
    for level in range(held.shape[1]):
        one = index >> level & 1 == 1
        levels.append(jnp.where(carry & ~one, new, held[:, level]))
        new = jnp.where(carry & one, pool.combine(held[:, level], new), new)
        carry &= one
    return jnp.stack(levels, axis=1), pool.decode(new)


def _local_expectation(local_q, k, v, index, level):
    """Returns the local expectation over the `2^level` positions up to `index`; zeros at level 0, which is not used."""
    first = index + 1 - (1 << level)
    position = jnp.arange(PIECE)

    def add(piece: Int[Array, ''], sums: PartialSoftmax) -> PartialSoftmax:
        at = piece * PIECE
        some_k, some_v = (jax.lax.dynamic_slice_in_dim(x, at, PIECE, axis=1) for x in (k, v))
        inside = (at + position >= first) & (at + position <= index)
        return merge_partials(sums, partial_softmax_one(local_q, some_k, some_v, inside))

    nothing = partial_softmax_one(local_q, k[:, :1], v[:, :1], jnp.zeros(1, bool))
    pieces = jnp.where(level > 0, index // PIECE + 1, 0)
    return jax.lax.fori_loop(first // PIECE, pieces, add, nothing).normalize()[:, 0, 0].astype(v.dtype)


@register('combiner_logsparse')
class CombinerLogsparse(Pooled):
    """Combiner-Logsparse; `chunk`, a power of two, is the number of positions computed at once, for speed alone.

    None is the best of each implementation; see `kernels.choice` for `implementation`.
    """

    chunk: int | None = None
    implementation: str | None = None

    full_support = True
    supports_segments = True
    supports_context = True
    implementations = {'mosaic': LOGSPARSE, 'xla': Implementation(attend_combiner_logsparse)}  # noqa: RUF012

    def pattern(self, length):
        return pattern(length, causal=self.causal)

    def cost(self, length):
        return cost(length, causal=self.causal)

    def attend(self, q, k, v, context):
        return self.attend_by_best(q, k, v, context, chunk=self.chunk, pools=self.pools(context))

    def context_block(self, length, parts):
        """Returns the whole part, a power of two: all siblings that are smaller lie within it."""
        return 1 << (-(-length // parts) - 1).bit_length()

    def init_cache(self, q, k, v, context, counts, capacity):
        return init_cache(q, k, v, counts, capacity, self.pools(context))

    def decode_step(self, cache, index, q, k, v, context):
        return decode_step(cache, index, q, k, v, self.pools(context))
