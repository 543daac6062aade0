"""Summaries that XLA computes, by the poolings that no kernel has.

A kernel pools by `max` or `mean`, and summaries of summaries by `max` only. For a pooling with parameters, and for
means of summaries of summaries, a kernel is given the summaries, and computes their gradients, which flow on into the
parameters.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.ops.blocks import Blocks, clip_size
from combiner.ops.pooling import Pools, plain_name
from combiner.ops.softmax import repeat_heads
from combiner.ops.spans import Nodes, in_rows, parents, parents_of_tokens


def fused_pool(pools: Pools, levels: int) -> str:
    """Returns the pooling that a kernel computes, with some levels of summaries; '' if it is given the summaries."""
    name = plain_name(pools) or ''
    return name if levels == 1 or name == 'max' else ''


def summaries_by_level(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
    *,
    block: int,
    levels: int,
    lasts: Sequence[bool],
    causal: bool,
    pools: Pools,
    valid: Bool[Array, 'b l'] | None,
    segments: Int[Array, 'b l'] | None,
) -> list[tuple[Array, Array]]:
    """Returns the keys and values of summaries of blocks, of rows of these, and so on: each `[b, s, n, h, d]`.

    Args:
        q, k, v, causal, pools, valid, segments: see `core.mechanism`.
        block: positions in a block, and summaries in a row.
        levels: of summaries.
        lasts: for each `s`, whether summaries are of the last document of their span, or the first (see `ops.spans`).
    """
    k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    blocks = Blocks.of(q, clip_size(block, q.shape[1]))
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments, beyond_end=levels > 1)

    sides = []
    for last in lasts:
        nodes = [parents_of_tokens(blocks, tokens, pools, last=last, keys=blocks.size)]
        while len(nodes) < levels:
            nodes.append(parents(in_rows(nodes[-1], blocks.batch, blocks.size, pools), pools, last=last))
        sides.append(nodes)

    def by_sequence(x: Float[Array, 'h m 1 d']) -> Float[Array, 'b n h d']:
        return jnp.moveaxis(x[:, :, 0], 0, 1).reshape(blocks.batch, -1, blocks.heads, x.shape[-1])

    def joined(nodes: Sequence[Nodes]) -> tuple[Array, Array]:
        keys, values = ([by_sequence(x) for x in some] for some in zip(*((n.key, n.value) for n in nodes), strict=True))
        return jnp.stack(keys, axis=1), jnp.stack(values, axis=1)

    return [joined(nodes) for nodes in zip(*sides, strict=True)]
