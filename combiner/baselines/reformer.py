"""Reformer's attention: shared queries and keys, attention within buckets of a locality-sensitive hash.

Kitaev, Kaiser and Levskaya 2020. Letters: `b` batch, `l` length, `h` heads, `d` head width, `r` rounds, `n` half of the
buckets, `m` chunks of all sequences, `s` heads in each round, `c` place in a chunk, `k` in it and the one before.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.costs import root_size
from combiner.layers import state
from combiner.ops.blocks import Blocks, clip_size
from combiner.ops.softmax import Drop, PartialSoftmax, einsum, mask_logits, merge_along, partial_softmax_of_logits

NOWHERE = 0  # a seat is a position counted from 1
EPSILON = 1e-6  # of the authors' code, added to the mean square of a query


def hashes(q: Float[Array, 'b l h d'], rotations: Float[Array, 'h r d n']) -> Int[Array, 'b h r l']:
    """Returns the bucket of each token in each round, `argmax [x R; -x R]` (Andoni et al. 2015), of `2n`; O(r·l·n).

    At the highest precision, so that the bucket of a token does not depend on the length of the input.
    """
    x, rotations = (jax.lax.stop_gradient(a).astype(jnp.float32) for a in (q, rotations))
    transposed = (jnp.einsum('blhd,hdn->bhln', x, one, precision='highest') for one in jnp.moveaxis(rotations, 1, 0))
    return jnp.stack([jnp.concatenate([one, -one], axis=-1).argmax(axis=-1) for one in transposed], axis=2)


def attend_reformer(
    q: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    buckets: Int[Array, 'b h r l'],
    *,
    chunk: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends by LSH with keys `k_j = q_j / ‖q_j‖`: section 2 of the paper, its rounds joined as in its appendix A.

    In round `r` the tokens are sorted by (bucket, position), token `i` to place `s_i`, and each chunk of `chunk` places
    attends to itself and the chunk before: `P_i^r = {j ≠ i: ⌊s_i/chunk⌋ - 1 ≤ ⌊s_j/chunk⌋ ≤ ⌊s_i/chunk⌋}`, causal
    `j < i`. `N_ij` is the number of rounds in which `P_i^r` holds `j`, so that every `j` counts once:

        A(i) = Σ_r exp(z_i^r - z_i) Σ_{j ∈ P_i^r} exp(q_i·k_j - log N_ij - z_i^r) v_j        z_i = log Σ_r exp(z_i^r)
        A(i) = v_i  if all P_i^r are empty                        z_i^r = log Σ_{j ∈ P_i^r} exp(q_i·k_j - log N_ij)

    As in the authors' code, unit keys need no scale `1/√d`. The second line is the limit of the `-10^5` that they add
    to a token's logit with itself. The first chunk attends to itself only, as in that equation; in their code also to
    the last, or to another round's. O(r·l·chunk) time and memory, and O(r²·l·chunk) comparisons; on a CPU, in steps.

    Args:
        buckets: of every token in every round.
        chunk: places in a chunk; the last chunk may be partial.
        causal: whether a position attends to earlier positions only.
        q, v, valid, drop: see `core.mechanism`; padding is sorted to the end.
    """
    batch, length, heads, _ = q.shape
    chunk = clip_size(chunk, length)
    room = ((0, 0), (0, -length % chunk))
    valid = jnp.pad(jnp.ones((batch, length), bool) if valid is None else valid, room)
    buckets = jnp.pad(buckets, ((0, 0), (0, 0), *room))
    order = sort_by_bucket(jnp.where(valid[:, None, None], buckets, jnp.iinfo(buckets.dtype).max))

    q, v = (jnp.moveaxis(jnp.pad(x, (*room, (0, 0), (0, 0))), 2, 1) for x in (q, v))
    seat = jnp.where(valid, 1 + jnp.arange(valid.shape[1]), NOWHERE)[:, None, :, None]
    seat = jnp.broadcast_to(seat, (batch, heads, *seat.shape[2:]))
    chunks = jnp.moveaxis(order.of_token // chunk, 2, 3)
    sorted_q, *others = (order.sorted(x, chunk) for x in (q, _unit(q), v, seat, chunks))
    k, values, seat_k, chunks_k = (with_previous(x, batch) for x in others)

    attend = partial(_attend_chunks, causal=causal, drop=drop)
    blocks = Blocks(batch, valid.shape[1], chunk, sorted_q.shape[1], at_once=drop is not None)
    sums = blocks.map_blocks_first(attend, sorted_q, k, values, *others[2:], seat_k, chunks_k, keys=2 * chunk)
    joined = merge_along(PartialSoftmax(*(order.restored(x, batch) for x in sums)), axis=2)
    return jnp.moveaxis(jnp.where(joined.total > 0, joined.normalize(), v), 1, 2)[:, :length].astype(v.dtype)


def _attend_chunks(q, k, v, seat, chunks, seat_k, chunks_k, *, causal: bool, drop: Drop | None) -> PartialSoftmax:
    """Computes the partial softmax of each slot in each round."""
    seat_k = jnp.swapaxes(seat_k, -1, -2)
    visible = (seat_k != NOWHERE) & ((seat_k < seat) if causal else (seat_k != seat))
    apart = (chunks[:, :, :, None, one] - chunks_k[:, :, None, :, one] for one in range(chunks.shape[-1]))
    logits = einsum('msqd,mskd->msqk', q, k)
    count = sum((distance >> 1 == 0).astype(logits.dtype) for distance in apart)  # of the rounds with distance 0 or 1
    logits -= jnp.log(jnp.maximum(count, 1))
    return partial_softmax_of_logits(mask_logits(logits, visible), v, drop)


class BucketOrder(NamedTuple):
    """The order of the tokens in every round, and the place of every token."""

    tokens: Int[Array, 'b h r l']
    of_token: Int[Array, 'b h r l']

    def sorted(self, x: Shaped[Array, 'b h l e'], chunk: int) -> Shaped[Array, 'm s c e']:
        """Sorts arrays of tokens into the order of each round, in chunks."""
        batch, heads, rounds, length = self.tokens.shape
        x = jnp.take_along_axis(x, self.tokens.reshape(batch, heads, -1, 1), axis=2)
        x = jnp.moveaxis(x.reshape(batch, heads * rounds, length // chunk, chunk, -1), 2, 1)
        return x.reshape(-1, *x.shape[2:])

    def restored(self, x: Float[Array, 'm s c e'], batch: int) -> Float[Array, 'b h r l e']:
        """Inverts `sorted`, for arrays that differ by round."""
        x = jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 2, 1).reshape(*self.tokens.shape, -1)
        return jnp.take_along_axis(x, self.of_token[..., None], axis=3)


def sort_by_bucket(buckets: Int[Array, 'b h r l']) -> BucketOrder:
    """Sorts by bucket and, within one, by position."""
    tokens = jnp.argsort(buckets, axis=-1)  # stable
    return BucketOrder(tokens, jnp.argsort(tokens, axis=-1))


def with_previous(x: Shaped[Array, 'm s c e'], batch: int) -> Shaped[Array, 'm s k e']:
    """Joins every chunk to the one before it; zeros before the first of a sequence."""
    by_sequence = x.reshape(batch, -1, *x.shape[1:])
    previous = jnp.pad(by_sequence[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0))).reshape(x.shape)
    return jnp.concatenate([previous, x], axis=2)


def _unit(x: Float[Array, '*n d']) -> Float[Array, '*n d']:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPSILON)
    return (wide * scale * x.shape[-1] ** -0.5).astype(x.dtype)


@register('reformer')
class Reformer(Mechanism):
    """LSH attention with `rounds` rotations, by head: float32 `[h r d n]`, variable `rotations` of collection `state`.

    Drawn once; the authors draw new ones in every step. Not strictly causal, as published: a position attends to
    earlier ones only, but which share a chunk with it depends on later tokens. Decoding sorts the tokens so far.

    Attributes:
        rounds: number of hashes of a token.
        chunk: places in a chunk, twice the mean size of a bucket; None for the power of two nearest `√max_length`.
    """

    rounds: int = 4
    chunk: int | None = None

    input_dependent = True
    requires = 'rotations'
    allows_value_width = False  # its keys have length one: a factor that undoes the scale of logits would change them
    projections = ('query', 'query', 'value')
    uses_future = True

    @property
    def size(self) -> int:
        """Returns the number of places in a chunk."""
        return root_size(self.max_length or 1) if self.chunk is None else self.chunk

    def variables(self, module):
        """Draws the rotations."""
        if self.max_length is None:
            raise ValueError('Reformer chooses its buckets before it sees a length: set max_length')
        shape = (module.heads, self.rounds, module.head_width, -(-self.max_length // self.size))

        def draw() -> Float[Array, 'h r d n']:
            return jax.random.normal(module.make_rng('params'), shape, jnp.float32)

        return {'rotations': state(module, 'rotations', draw, ('heads', None, 'head_dim', 'features'))}

    def attend(self, q, k, v, context):
        buckets = hashes(q, self.own_variables(context)['rotations'])
        return attend_reformer(
            q, v, buckets, chunk=self.size, causal=self.causal, valid=context.valid, drop=context.drop
        )
