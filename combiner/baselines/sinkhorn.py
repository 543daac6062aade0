"""Sparse Sinkhorn attention: own block, and one block that a learned sorting assigns to it (Tay et al. 2020).

Letters: `b` batch, `l` length, `h` heads, `d` head width, `e` model width, `n` and `m` blocks.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Count, Mechanism
from combiner.core.registry import register
from combiner.costs import root_size
from combiner.layers import parameters
from combiner.ops.blocks import Blocks, KeyGroup, attend_one, blocks_by_sequence, clip_size, own_mask, split_blocks
from combiner.ops.softmax import Drop, einsum, mask_logits
from combiner.ops.windows import attend_window


def attend_sinkhorn(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    scores: Float[Array, 'b h n m'],
    *,
    block: int,
    iterations: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends to the own block and a sorted one, whose position `c` mixes positions `c` of blocks.

        R = balance(exp(scores))        K'_nc = Σ_m R_nm k_mc        V'_nc = Σ_m R_nm v_mc
        A(i) = Σ_{j ∈ n} p_j v_j + Σ_c p'_c V'_nc,  p and p' one softmax of q_i·k_j/√d (causal: j ≤ i) and q_i·K'_nc/√d

    O(l·(block + l/block)) time and memory, of which `l²/block` is the sorting. Causal, block `n` sorts blocks `m < n`
    only, and the first one attends to itself alone.

    This project's reading: the paper writes the sum of the two products of a query where all its implementations, as
    here, attend to both blocks. Padding, also of a last, partial block, adds nothing to a sorted position, which is
    masked if it has no other term; blocks of padding are not balanced.

    Args:
        scores: of every block and the block to be assigned to it.
        block: positions in a block; the last block may be partial.
        iterations: of balancing.
        q, k, v, causal, valid, drop: see `core.mechanism`.
    """
    batch, length = q.shape[:2]
    block = clip_size(block, length)
    blocks = Blocks.of(q, block, drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid)
    inside = blocks.split(jnp.ones((batch, length), bool) if valid is None else valid).reshape(batch, -1, block)
    some = inside.any(axis=2)
    pairs = some[:, :, None] & some[:, None]
    if causal:
        pairs = pairs & jnp.tri(some.shape[1], k=-1, dtype=bool)
    sorting = balance(scores, pairs[:, None], iterations=iterations, causal=causal)
    mask = (pairs[..., None] & inside[:, None]).any(axis=2).reshape(-1, 1, block)

    def sort_blocks(x: Float[Array, 'm c h d']) -> Float[Array, 'm c h d']:
        x = jnp.where(inside[..., None, None], x.reshape(*inside.shape, *x.shape[2:]), 0)
        x = einsum('bhnm,bmchd->bnchd', sorting.astype(x.dtype), x).astype(x.dtype)
        return x.reshape(-1, *x.shape[2:])

    group = KeyGroup(sort_blocks(blocks.split(k)), sort_blocks(blocks.split(v)), mask)
    return attend_window(blocks, tokens, own_mask(block, causal=causal), [group], drop)


def pool(x: Float[Array, 'b l e'], block: int, *, causal: bool) -> Float[Array, 'b n e']:
    """Sums the sorting network's inputs in each block; causal, all inputs up to its first position."""
    x = jnp.pad(x.astype(jnp.promote_types(x.dtype, jnp.float32)), ((0, 0), (0, -x.shape[1] % block), (0, 0)))
    blocks = x.reshape(x.shape[0], -1, block, x.shape[2])
    total = blocks.sum(axis=2)
    return jnp.pad(jnp.cumsum(total, axis=1)[:, :-1], ((0, 0), (1, 0), (0, 0))) + blocks[:, :, 0] if causal else total


def balance(
    scores: Float[Array, 'b h n m'], pairs: Bool[Array, 'b 1 n m'], *, iterations: int, causal: bool
) -> Float[Array, 'b h n m']:
    """Balances `exp(scores)` (Sinkhorn): divides its rows, then its columns by their sums, `iterations` times.

    Causal: the sum of a column runs over the rows up to the one that it divides, so that no row depends on a later one.

    Args:
        scores: logarithms.
        pairs: which entries exist; all others are zero.
        iterations: number of times; 0 leaves `exp(scores)`.
        causal: whether rows must not depend on later rows.
    """
    for _ in range(iterations):
        scores = mask_logits(scores, pairs)
        scores = mask_logits(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True), pairs)
        over_rows = jax.lax.cumlogsumexp if causal else jax.nn.logsumexp
        column = over_rows(scores, axis=2)
        scores = scores - (column if causal else column[:, :, None])
    return jnp.where(pairs, jnp.exp(mask_logits(scores, pairs)), 0)


def next_row(
    columns: Float[Array, 'b t h m'], scores: Float[Array, 'b h m'], row: Int[Array, ' b']
) -> tuple[Float[Array, 'b t h m'], Float[Array, 'b h m']]:
    """Balances one more row causally: `balance` for decoding.

    Args:
        columns: the logarithm of each column's sum over the earlier rows, before each of the `t` iterations divides.
        scores: of this row.
        row: its number, which is also the number of its entries.
    """
    pairs = jnp.arange(scores.shape[-1]) < row[:, None, None]
    found = []
    for column in jnp.moveaxis(columns, 1, 0):
        scores = mask_logits(scores, pairs)
        scores = mask_logits(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True), pairs)
        found.append(jnp.logaddexp(column, scores))
        scores = scores - found[-1]
    columns = jnp.stack(found, axis=1) if found else columns
    return columns, jnp.where(pairs, jnp.exp(mask_logits(scores, pairs)), 0)


class Cache(NamedTuple):
    """All keys and values, the sorted block of the open block, and the sums for sorting the next one.

    Attributes:
        k: keys by block.
        v: values by block.
        neighbour_k: the sorted keys.
        neighbour_v: the sorted values.
        total: the sum of the inputs.
        columns: see `next_row`.
    """

    k: Float[Array, 'b h n c d']
    v: Float[Array, 'b h n c d']
    neighbour_k: Float[Array, 'b h c d']
    neighbour_v: Float[Array, 'b h c d']
    total: Float[Array, 'b e']
    columns: Float[Array, 'b t h n']

    def sort(self, scores: Float[Array, 'b h n'], index: Int[Array, ' b']) -> 'Cache':
        """Sorts a new block for the open one, if the open one begins at `index`."""
        block = self.k.shape[3]

        def renewed() -> 'Cache':
            columns, weights = next_row(self.columns, scores, index // block)
            sorted_k, sorted_v = (
                einsum('bhn,bhncd->bhcd', weights.astype(x.dtype), x).astype(x.dtype) for x in (self.k, self.v)
            )
            new = self._replace(columns=columns, neighbour_k=sorted_k, neighbour_v=sorted_v)
            begins = index % block == 0
            return jax.tree.map(lambda x, y: jnp.where(begins.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, self)

        return jax.lax.cond((index % block == 0).any(), renewed, lambda: self)


def init_cache(
    x: Float[Array, 'b l e'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    scores: Float[Array, 'b h n m'],
    counts: Int[Array, ' b'],
    *,
    block: int,
    iterations: int,
) -> Cache:
    """Returns a cache of the first `counts` positions, given the scores of their blocks, with room for `m` blocks.

    Its contents for other positions are overwritten before use.
    """
    batch, length, heads, _ = k.shape
    room = ((0, 0), (0, 0), (0, scores.shape[3] - scores.shape[2]), (0, 0), (0, 0))
    k, v = (jnp.pad(blocks_by_sequence(split_blocks(a, block), scores.shape[2]), room) for a in (k, v))
    inside = (jnp.arange(length) < counts[:, None])[..., None]
    total = jnp.where(inside, x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0).sum(axis=1)
    accumulated = jnp.promote_types(scores.dtype, jnp.float32)
    columns = jnp.full((batch, iterations, heads, scores.shape[3]), jnp.finfo(accumulated).min, accumulated)
    cache = Cache(k, v, jnp.zeros_like(k[:, :, 0]), jnp.zeros_like(v[:, :, 0]), total, columns)

    def sort(cache: Cache, row: tuple[Array, Array]) -> tuple[Cache, None]:
        number, scores = row
        index = number * block
        return cache.sort(scores, jnp.where(index < counts, index, 1 - block)), None  # 1 - block begins no block

    rows = jnp.arange(scores.shape[2]), jnp.moveaxis(scores, 2, 0)
    return jax.lax.scan(sort, cache, rows)[0]


def decode_step(
    cache: Cache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
) -> tuple[Cache, Float[Array, 'b h d']]:
    """Decodes one token of each sequence, after sorting if it begins a block; `q` is not scaled."""
    block, rows = cache.k.shape[3], jnp.arange(len(index))
    row, here = index // block, index % block
    held_k, held_v = (held.at[rows, :, row, here].set(new) for held, new in ((cache.k, k), (cache.v, v)))
    own = jnp.arange(block) <= here[:, None]
    near = KeyGroup(held_k[rows, :, row], held_v[rows, :, row], own)
    far = KeyGroup(cache.neighbour_k, cache.neighbour_v, jnp.broadcast_to(row[:, None] > 0, own.shape))
    return cache._replace(k=held_k, v=held_v), jax.vmap(attend_one)(q, near, far)


@register('sinkhorn')
class Sinkhorn(Mechanism):
    """Sinkhorn attention with a sorting network for each head, `scores = relu(relu(pool(x) W_P + b_P) W_B + b_B)`.

    In training Gumbel noise, of the random stream `dropout`, joins the scores before the temperature divides them.

    Attributes:
        block: positions in a block; None for the power of two nearest `√max_length`.
        temperature: the lower, the closer a sorted block is to one block.
        iterations: of balancing.
    """

    block: int | None = None
    temperature: float = 0.75
    iterations: Count = 7

    input_dependent = True
    requires = 'a sorting network'
    needs_rng = True

    def __post_init__(self) -> None:
        """Checks the temperature."""
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f'Sinkhorn: temperature={self.temperature} divides the scores: set it above 0')

    @property
    def size(self) -> int:
        """Returns the number of positions in a block."""
        return root_size(self.max_length or 1) if self.block is None else self.block

    def variables(self, module):
        """Makes the sorting network."""
        if self.max_length is None:
            raise ValueError('Sinkhorn has parameters for each block: set max_length')
        inner = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        outer = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        heads, width = ('heads', module.heads), ('head_dim', module.head_width)
        blocks, zeros = ('features', -(-self.max_length // self.size)), nn.initializers.zeros
        made = {
            'sort_inner_kernel': (inner, (('embed', module.width), heads, width)),
            'sort_inner_bias': (zeros, (heads, width)),
            'sort_outer_kernel': (outer, (heads, width, blocks)),
            'sort_outer_bias': (zeros, (heads, blocks)),
        }
        return parameters(module, made)

    def attend(self, q, k, v, context):
        own, block = self.own_variables(context), min(self.size, q.shape[1])
        scores = self.scores(own, pool(context.x, block, causal=self.causal), -(-q.shape[1] // block), context.rng)
        iterations, causal = self.iterations, self.causal
        valid, drop = context.valid, context.drop
        return attend_sinkhorn(
            q, k, v, scores, block=block, iterations=iterations, causal=causal, valid=valid, drop=drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        own, block = self.own_variables(context), min(self.size, capacity)
        scores = self.scores(own, pool(context.x, block, causal=True), -(-capacity // block))
        return init_cache(context.x, k, v, scores, counts, block=block, iterations=self.iterations)

    def decode_step(self, cache, index, q, k, v, context):
        cache = cache._replace(total=cache.total + context.x)
        scores = self.scores(self.own_variables(context), cache.total[:, None], cache.k.shape[2])
        return decode_step(cache.sort(scores[:, :, 0], index), index, q, k, v)

    def scores(
        self, own: Mapping[str, Array], pooled: Float[Array, 'b n e'], blocks: int, rng: Array | None = None
    ) -> Float[Array, 'b h n m']:
        """Returns the scores of pooled inputs for `blocks` blocks, with noise of a random key if given."""
        if blocks > own['sort_outer_bias'].shape[1]:
            raise ValueError(
                f'{blocks} blocks of {self.size} are more than max_length={self.max_length}; set max_length to the '
                'longest input, or shorten the input'
            )
        hidden = einsum('bne,ehd->bhnd', pooled, own['sort_inner_kernel']) + own['sort_inner_bias'][:, None]
        scores = einsum('bhnd,hdm->bhnm', nn.relu(hidden), own['sort_outer_kernel']) + own['sort_outer_bias'][:, None]
        scores = nn.relu(scores)[..., :blocks]
        if rng is not None:
            scores += jax.random.gumbel(rng, scores.shape, scores.dtype)
        return scores / self.temperature
