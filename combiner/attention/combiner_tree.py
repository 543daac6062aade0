"""Combiner-Tree, of this project: spans of spans, which the paper allows (Combiner, section 3).

The leaves of the tree are the positions. A node's local expectation runs over its children, by their summary keys and
values. So the cost of a level is the number of children, and all levels together cost little more than the lowest.

Decoding takes O(branch · log(l)) work for a token and as much memory. Only the open row of every level is cached: the
children so far of the node above the token. Each token computes that node again from them. The node is final, and
first used, when it has all its children.

Letters: as in `ops.spans`, and `c` children of a node, `t` levels, the positions first.
"""

import operator
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.core.pooled import Pooled
from combiner.core.registry import register
from combiner.costs import tree_levels, triangle
from combiner.kernels.choice import Implementation
from combiner.kernels.gpu import mechanisms as gpu
from combiner.kernels.tpu import mechanisms as tpu
from combiner.ops import parts
from combiner.ops.blocks import (
    Blocks,
    KeyGroup,
    Tokens,
    attend_groups,
    attend_one,
    blocks_by_sequence,
    own_mask,
    split_blocks,
)
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.segments import PADDING_ID
from combiner.ops.softmax import Drop
from combiner.ops.spans import Nodes, in_rows, leaves, parents, parents_of_tokens
from combiner.patterns import Cost, Pattern, check_positive, support


def pattern(length: int, *, causal: bool, branch: int) -> Pattern:
    """Returns the pattern of Combiner-Tree, of this project: nested spans, which the paper's section 3 allows.

    The positions are the leaves of a tree in which `branch` nodes of a level form one of the next. Direct is the own
    lowest node (causal: up to `i`). At every level, spans are the earlier (bidirectional: other) children of the own
    node's parent. A node's local expectation runs over its `branch` children, which are positions or again spans.
    """
    check_positive(length=length)
    position = np.arange(length)
    spans, uses, sizes = [np.zeros((0, length), bool)], [np.zeros((length, 0), bool)], [np.zeros(0, int)]
    for size in (branch**level for level in range(1, tree_levels(length, branch) + 1)):
        own = position // size
        nodes = np.arange(own[-1] + 1)
        siblings = nodes // branch == own[:, None] // branch
        spans.append(nodes[:, None] == own)
        uses.append(siblings & (nodes < own[:, None] if causal else nodes != own[:, None]))
        sizes.append(np.full(len(nodes), size))
    all_spans, all_uses, all_sizes = np.concatenate(spans), np.concatenate(uses, axis=1), np.concatenate(sizes)
    first = all_spans.argmax(axis=1)
    nested = (all_sizes[:, None] == all_sizes * branch) & all_spans[:, first]
    needed = all_uses.any(axis=0)
    for _ in sizes:
        needed |= nested[needed].any(axis=0)
    direct = (position[:, None] // branch == position // branch) & support(length, causal=causal)
    return Pattern(direct, all_spans[needed], all_uses[:, needed], nested=nested[np.ix_(needed, needed)])


def cost(length: int, branch: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form: `O(l branch log(l) / log(branch))`."""
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
        if size < length:  # the parents are spans; the last of a level is unused if causal
            members += whole * branch if causal else nodes
    return Cost(terms, members)


def attend_combiner_tree(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    branch: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends by equation (7) on a tree: `branch` nodes of a level have one parent; the leaves are the positions.

    `Ω_i^0` are the leaves that share the parent of `i` (causal: up to `i`). The spans are, at every higher level, the
    earlier (bidirectional: all) siblings of the node above `i`. A node's local expectation runs over its children:

        V_r = Σ_s softmax_s(Q_r·K_s) V_s        Q_r = pool_s q, K_r = pool_s k over all leaves below r

    O(l·branch·log(l) / log(branch)) time. With `l ≤ branch²` this is `combiner_fixed` with `block = branch`.

    Args:
        branch: children of a node, at least 2.
        q, k, v, causal, pools, valid, segments, drop: see `core.mechanism`.
    """
    branch = _fit(branch, q.shape[1])
    blocks, levels = Blocks.of(q, branch, drop), tree_levels(q.shape[1] * parts.count(), branch)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments, beyond_end=True)
    keys = branch * (levels + 1)

    def attend(tokens, number):
        groups = [tokens.group(own_mask(branch, causal=causal))]
        for level, sees, nodes in visible:
            groups.append(_siblings(nodes, number.reshape(blocks.batch, -1)[0] // branch**level, blocks.batch, sees))
        return attend_groups(tokens.q, groups, tokens.segment_ids, drop)

    visible = []
    for last, sees in _sides(causal, segments) if levels else ():
        nodes = parents_of_tokens(blocks, tokens, pools, last=last, keys=keys)
        count, whole = blocks.count, parts.count() == 1
        for level in range(levels):
            nodes = parents(nodes, pools, last=last) if level else nodes
            if not whole and count % branch:  # siblings lie on several devices from this level on
                nodes, count, whole = _of_all_parts(nodes, blocks.batch), count * parts.count(), True
            nodes, count = in_rows(nodes, blocks.batch, branch, pools), -(-count // branch)
            visible.append((level, sees, nodes))
    numbers = jnp.tile(parts.own_numbers(blocks.count), blocks.batch)
    return blocks.attend(attend, tokens, numbers, keys=keys)


def _fit(branch: int, length: int) -> int:
    """Limits the children of a node to the number of positions: more would be empty."""
    return min(branch, max(2, length))


def _sides(causal, segments):
    """Returns whether summaries are of a node's last or first segment, and which siblings of a node attend to them."""
    if causal:
        return [(True, operator.lt)]
    return [(True, operator.ne)] if segments is None else [(True, operator.lt), (False, operator.gt)]


def _of_all_parts(nodes: Nodes, batch: int) -> Nodes:
    """Returns the nodes `h m 1 d` of all parts of the sequences."""
    segment_ids = nodes.encoded.segment_ids
    ids = None if segment_ids is None else parts.gather_blocks(segment_ids, batch)
    return jax.tree.map(lambda x: parts.gather_blocks(x, batch, -3), nodes.with_segment_ids(None)).with_segment_ids(ids)


def _siblings(nodes: Nodes, number: Int[Array, ' n'], batch: int, sees: Callable[..., Array]) -> KeyGroup:
    """Returns for several blocks, by their `number` at a level, the siblings of the node above each block.

    The nodes are of the whole sequence, or, if that is enough, of the own part.
    """
    branch = nodes.key.shape[2]

    def pick(x: Shaped[Array, '*h g c d']) -> Shaped[Array, '*h m c d']:
        rows = x.reshape(*x.shape[:-3], batch, -1, *x.shape[-2:])
        return jnp.take(rows, number // branch % rows.shape[-3], axis=-3).reshape(*x.shape[:-3], -1, *x.shape[-2:])

    segment_ids = nodes.encoded.segment_ids
    segment_ids = None if segment_ids is None else pick(segment_ids[..., None])[..., 0]
    uses = jnp.tile(sees(jnp.arange(branch), number[:, None] % branch), (batch, 1))
    return KeyGroup(pick(nodes.key), pick(nodes.value), uses[:, None], segment_ids)


def init_cache(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    counts: Int[Array, ' b'],
    *,
    branch: int,
    levels: int,
    pools: Pools,
) -> Nodes:
    """Returns the open rows after the first `counts` positions, `b h t c d`, for `levels` of spans; unscaled `q`."""
    q, k, v = (split_blocks(x, branch) for x in (q, k, v))
    batch, nodes = len(counts), leaves(Tokens(q, k, v), pools)
    found = []
    for level in range(levels + 1):
        if level:
            nodes = in_rows(parents(nodes, pools, last=True), batch, branch, pools)
        found.append(_row(nodes, counts // branch ** (level + 1), batch))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *found)


def decode_step(
    cache: Nodes,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    pools: Pools,
) -> tuple[Nodes, Float[Array, 'b h d']]:
    """Decodes one token of each sequence, at position `index`; `q` is not scaled."""
    return jax.vmap(partial(_decode_one, pools=pools))(cache, index, q, k, v)


def _decode_one(cache, index, q, k, v, pools):
    _, levels, branch, _ = cache.key.shape
    child = jnp.arange(branch)
    node = leaves(Tokens(q[:, None, None], k[:, None, None], v[:, None, None]), pools)
    rows, groups = [], []
    for level in range(levels):
        own = index // branch**level % branch
        row = _put(cache, level, own, node.with_segment_ids(None))
        groups.append(KeyGroup(row.key[:, 0], row.value[:, 0], child < own if level else child <= own))
        node = parents(row.with_segment_ids(jnp.where(child <= own, 0, PADDING_ID)[None]), pools, last=True)
        rows.append(row)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *rows), attend_one(q, *groups)


def _row(nodes: Nodes, number: Int[Array, ' b'], batch: int) -> Nodes:
    """Returns one row of each sequence, as `b h 1 c d`; the last row if the row does not exist yet."""
    rows = nodes.key.shape[1] // batch
    at = jnp.minimum(number, rows - 1)[:, None, None, None, None]
    return jax.tree.map(lambda x: jnp.take_along_axis(blocks_by_sequence(x, rows), at, axis=2), nodes)


def _put(cache: Nodes, level: int, at: Int[Array, ''], node: Nodes) -> Nodes:
    """Returns the row of a level with `node` at `at`, as `h 1 c d`."""
    return jax.tree.map(lambda held, new: held[:, level, None].at[:, :, at].set(new[:, :, 0]), cache, node)


@register('combiner_tree')
class CombinerTree(Pooled):
    """Combiner-Tree with `branch` children of a node; see `kernels.choice` for `implementation`."""

    branch: int = 32
    implementation: str | None = None

    full_support = True
    supports_segments = True
    supports_context = True
    implementations = {  # noqa: RUF012
        'mosaic': tpu.TREE,
        'triton': gpu.TREE,
        'xla': Implementation(attend_combiner_tree),
    }

    def __post_init__(self) -> None:
        """Checks the number of children."""
        super().__post_init__()
        tree_levels(1, self.branch)

    def pattern(self, length):
        return pattern(length, causal=self.causal, branch=self.branch)

    def cost(self, length):
        return cost(length, self.branch, causal=self.causal)

    def attend(self, q, k, v, context):
        return self.attend_by_best(q, k, v, context, branch=self.branch, pools=self.pools(context))

    def context_block(self, length, parts):
        return _fit(self.branch, length)

    def init_cache(self, q, k, v, context, counts, capacity):
        branch = _fit(self.branch, capacity)
        levels = tree_levels(capacity, branch)
        return init_cache(q, k, v, counts, branch=branch, levels=levels, pools=self.pools(context))

    def decode_step(self, cache, index, q, k, v, context):
        return decode_step(cache, index, q, k, v, self.pools(context))
