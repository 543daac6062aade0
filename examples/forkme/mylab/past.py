"""An attention of your own: the own block directly, and everything before it in one summary.

The pattern is all that a mechanism needs: it can be trained then, slowly, by the reference code. `attend` makes
training fast, `init_cache` and `decode_step` make sampling fast. `combiner.testing.check` compares all of them with the
pattern.

Letters: `b` batch, `l` length, `n` blocks, `h` heads, `d` head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from combiner import Mechanism
from combiner.ops.blocks import Blocks, KeyGroup, attend_groups, attend_one, own_mask
from combiner.ops.softmax import einsum, mask_logits, softmax
from combiner.patterns import Pattern, support, with_spans


class Cache(NamedTuple):
    """What decoding keeps: keys and values; maxima of queries and of keys, of the past and of the open block."""

    k: Any  # [b l h d]
    v: Any
    past: tuple[Any, Any]  # [b h d]
    block: tuple[Any, Any]


class WholePast(Mechanism):
    """The positions of the own block directly, all positions before it as one span; O(l²/block + l·block)."""

    block: int = 16

    full_support = True
    supported_causal = (True,)

    def pattern(self, length: int) -> Pattern:
        """Returns who reaches whom: the partition that everything else has to agree with."""
        block = np.arange(length) // self.block
        starts = self.block * np.arange(block[-1] + 1)  # of each block
        spans = np.arange(length) < starts[:, None]  # the past of each block
        uses = block[:, None] == np.arange(len(starts))  # each position uses the past of its own block
        return with_spans((block[:, None] == block) & support(length, causal=True), spans, uses)

    def attend(self, q, k, v, context):
        """Attends from all positions."""
        blocks = Blocks.of(q, min(self.block, q.shape[1]), context.drop)
        tokens = blocks.tokens(q, k, v, causal=True, valid=context.valid)
        past_k, past_v, some = summaries(q, k, v, blocks.size, context.valid)

        def attend(tokens, past_k, past_v, some):  # of blocks `m`, heads first: [h m c d]
            own = tokens.group(own_mask(blocks.size, causal=True))
            past = KeyGroup(past_k[..., None, :], past_v[..., None, :], some[:, None, None])
            return attend_groups(tokens.q, [own, past], tokens.segment_ids, context.drop)

        per_block = (x.reshape(-1, *x.shape[2:]) for x in (past_k, past_v, some))
        return blocks.attend(attend, tokens, *per_block, keys=blocks.size + 1)

    def init_cache(self, q, k, v, context, counts, capacity):
        """Returns the cache of the first `counts` positions of each sequence."""
        here, start = jnp.arange(q.shape[1]), (counts // self.block * self.block)[:, None]
        inside = (here < start, (here >= start) & (here < counts[:, None]))
        past, block = (tuple(greatest(x, members) for x in (q, k)) for members in inside)
        room = ((0, 0), (0, capacity - q.shape[1]), (0, 0), (0, 0))
        return Cache(jnp.pad(k, room), jnp.pad(v, room), past, block)

    def decode_step(self, cache, index, q, k, v, context):
        """Attends from one more token of each sequence: O(l), without any queries of the past."""
        first = (index % self.block == 0)[:, None, None]  # the block before is complete, and joins the past
        past = jax.tree.map(lambda a, b: jnp.where(first, jnp.maximum(a, b), a), cache.past, cache.block)
        block = jax.tree.map(lambda a, new: jnp.where(first, new, jnp.maximum(a, new)), cache.block, (q, k))
        rows = jnp.arange(len(index))
        keys, values = cache.k.at[rows, index].set(k), cache.v.at[rows, index].set(v)
        return Cache(keys, values, past, block), jax.vmap(self._attend_one)(index, q, keys, values, *past)

    def _attend_one(self, index, q, k, v, past_q, past_k):
        """Attends from position `index` of one sequence."""
        here, start = jnp.arange(len(k)), index // self.block * self.block
        k, v = (jnp.moveaxis(x, 1, 0) for x in (k, v))  # [h l d]
        past_v = expectation(past_q[:, None], k, v, here < start)
        past = KeyGroup(past_k[:, None], past_v, (start > 0)[None])
        return attend_one(q, KeyGroup(k, v, (here >= start) & (here <= index)), past)


def summaries(q, k, v, block, valid):
    """Returns the summary keys and values `[b n h d]` of the past of each block, and whether there is one, `[b n]`."""
    batch, length, _, _ = q.shape
    starts = block * jnp.arange(-(-length // block))
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    members = (jnp.arange(length) < starts[:, None]) & valid[:, None]  # [b n l]
    past_q, past_k = (greatest(x[:, None], members) for x in (q, k))
    to_heads = (jnp.moveaxis(x, 2, 1) for x in (past_q, k, v))
    past_v = expectation(*to_heads, members[:, None])
    return past_k, jnp.moveaxis(past_v, 1, 2), members.any(axis=-1)


def greatest(x, members):
    """Returns the maximum over the members of a span, the axis `l` of `[… l h d]`; very negative without members."""
    return jnp.where(members[..., None, None], x, jnp.finfo(x.dtype).min).max(axis=-3)


def expectation(past_q, k, v, members):
    """Returns the local expectation `Σ_j softmax_j(Q·k_j/√d) v_j` of spans, `[… h n d]`; zeros without members."""
    logits = einsum('...nd,...ld->...nl', past_q * past_q.shape[-1] ** -0.5, k)
    return einsum('...nl,...ld->...nd', softmax(mask_logits(logits, members)).astype(v.dtype), v).astype(v.dtype)
