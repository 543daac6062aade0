"""BigBird: blocks that attend to their neighbours, a few global blocks, and random ones (Zaheer et al. 2020)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from combiner.core.mechanism import Count, Mechanism
from combiner.core.registry import register
from combiner.layers import state
from combiner.ops.blocks import Blocks, KeyGroup, clip_size
from combiner.ops.softmax import Drop, attend_full
from combiner.ops.windows import attend_window
from combiner.patterns import Cost, Pattern, check_positive, sparse


def global_blocks(blocks: int, count: int) -> Int[np.ndarray, ' g']:
    """Returns the numbers of `count` global blocks: half the first, half the last; an odd one is a first block."""
    number = np.arange(blocks)
    return number[(number < count - count // 2) | (number >= blocks - count // 2)]


def random_blocks(key: Array, blocks: int, count: int, chosen: int) -> Int[Array, 'n r']:
    """Returns for each block `chosen` others in random order, no neighbours and none of the `count` global ones.

    If there are fewer, the number `blocks` stands for a missing block.
    """
    number = np.arange(blocks)
    others = (abs(number[:, None] - number) > 1) & ~np.isin(number, global_blocks(blocks, count))
    order = jnp.argsort(jnp.where(others, jax.random.uniform(key, others.shape, jnp.float32), 2), axis=-1)[:, :chosen]
    return jnp.where(jnp.take_along_axis(jnp.asarray(others), order, axis=1), order, blocks)


def pattern(length: int, chosen: Int[Array, 'n r'], *, block: int, count: int) -> Pattern:
    """Returns the pattern: own block and neighbours, the `count` global blocks, and the chosen ones, all directly."""
    check_positive(length=length)
    visible, there = (np.asarray(x) for x in visible_blocks(chosen, count))
    row, direct = np.arange(len(visible)), np.eye(len(visible), dtype=bool)
    direct[np.repeat(row[:, None], visible.shape[1], axis=1)[there], visible[there]] = True
    direct[global_blocks(len(visible), count)] = True
    position = np.arange(length) // block
    return sparse(direct[position[:, None], position])


def attend_bigbird(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    chosen: Int[Array, 'n r'],
    *,
    block: int,
    count: int,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to the own block and its neighbours, the `g` global blocks `G`, and the chosen blocks.

        A(i) = Σ_{j: n(j) ∈ S} softmax_j(q_i·k_j/√d) v_j        n(j) = ⌊j / block⌋
        S = {n(i) - 1, n(i), n(i) + 1} ∪ G ∪ chosen(n(i)) for n(i) ∉ G        S = all blocks for n(i) ∈ G

    The paper's internal construction (BigBird-ITC), in blocks as in its appendix D; with `g = 2` the global blocks are
    the first and the last one, as in the authors' code. In a padded row the last block is that of the padded length,
    as in their code. O(l·block·(3 + g + r)) time and memory, and O(g·block·l) for the global positions. Deviations: the
    first block has no left neighbour, the last no right one (in the authors' code: each other), and all heads share the
    chosen blocks (in the authors' code each head has its own).

    Args:
        chosen: distinct blocks for each block, neither neighbours nor global; missing where no such block exists.
        block: positions in a block; the last block may be partial.
        count: the number `g` of global blocks (see `global_blocks`).
        q, k, v, valid, drop: see `core.mechanism`.
    """
    length = q.shape[1]
    block = clip_size(block, length)
    blocks = Blocks.of(q, block, drop)
    tokens = blocks.tokens(q, k, v, causal=False, valid=valid)
    visible, there = visible_blocks(chosen[: blocks.count], count)
    mask = jnp.tile(jnp.repeat(there, block, axis=1)[:, None], (blocks.batch, 1, 1))

    def gather_blocks(x: Shaped[Array, 'm c *rest']) -> Shaped[Array, 'm s *rest']:
        x = x.reshape(blocks.batch, blocks.count, *x.shape[1:])[:, visible]
        return x.reshape(blocks.batch * blocks.count, -1, *x.shape[4:])

    segment_ids = None if tokens.segment_ids is None else gather_blocks(tokens.segment_ids)
    group = KeyGroup(gather_blocks(blocks.split(k)), gather_blocks(blocks.split(v)), mask, segment_ids)
    attended = attend_window(blocks, tokens, None, [group], drop)
    start = min((count - count // 2) * block, length)
    end = max(start, (blocks.count - count // 2) * block)
    mask = None if valid is None else valid[:, None]
    everything = attend_full(jnp.concatenate([q[:, :start], q[:, end:]], axis=1), k, v, mask, drop=drop)
    return jnp.concatenate([everything[:, :start], attended[:, start:end], everything[:, start:]], axis=1)


def visible_blocks(chosen: Int[Array, 'n r'], count: int) -> tuple[Int[Array, 'n s'], Bool[Array, 'n s']]:
    """Returns the other blocks that each non-global block attends to, each once, and whether they exist."""
    blocks = len(chosen)
    number, everywhere = jnp.arange(blocks)[:, None], global_blocks(blocks, count)
    others = jnp.concatenate([number - 1, number + 1, chosen], axis=1)
    there = (others >= 0) & (others < blocks) & ~jnp.isin(others, everywhere)
    visible = jnp.concatenate([jnp.tile(everywhere, (blocks, 1)), jnp.where(there, others, 0)], axis=1)
    return visible, jnp.pad(there, ((0, 0), (len(everywhere), 0)), constant_values=True)


@register('bigbird')
class BigBird(Mechanism):
    """BigBird, bidirectional only, in blocks; the random blocks follow from variable `seed` of collection `state`.

    So they differ by layer, and are the same after a checkpoint. They are drawn for the planned length; a shorter
    sequence leaves out the missing blocks.

    Attributes:
        block: positions in a block.
        globals: number of blocks that attend to all, and all to them: half of them the first, half the last blocks.
        random: number of random blocks to which each block attends.
    """

    block: int = 64
    globals: Count = 2
    random: Count = 3

    supported_causal = (False,)
    input_dependent = True
    requires = 'a seed'

    def variables(self, module):
        """Draws the seed."""
        if self.max_length is None:
            raise ValueError('BigBird draws its blocks before it sees a length: set max_length')
        return {'seed': state(module, 'seed', lambda: jax.random.key_data(module.make_rng('params')))}

    def chosen(self, length: int, seed: UInt32[Array, ' s']) -> Int[Array, 'n r']:
        """Returns the random blocks of the blocks of a sequence.

        Raises:
            ValueError: the sequence is longer than planned.
        """
        if length > (planned := self.max_length or length):
            raise ValueError(
                f'{length} positions are more than max_length={planned}; set max_length to the longest input, or '
                'shorten the input'
            )
        key = jax.random.wrap_key_data(seed)
        return random_blocks(key, -(-planned // self.block), self.globals, self.random)[: -(-length // self.block)]

    def cost(self, length):
        """Returns the greatest cost; the cost is less if random blocks are few, or the last block is partial."""
        whole = min(self.globals * self.block, length)
        visible = min((3 + self.globals + self.random) * self.block, length)
        return Cost(whole * length + (length - whole) * visible, 0)

    def attend(self, q, k, v, context):
        chosen = self.chosen(q.shape[1], self.own_variables(context)['seed'])
        return attend_bigbird(
            q, k, v, chosen, block=self.block, count=self.globals, valid=context.valid, drop=context.drop
        )
