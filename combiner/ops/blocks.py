"""Blocks of a sequence, and the attention of a block's queries, in one softmax, to groups of keys.

Equations (7) and (9) of Combiner apply to every variant: a block of queries attends to its own keys and to summaries of
spans. A `KeyGroup` holds such keys; `attend_groups` is the softmax over several groups. `Blocks` cuts a batch of
sequences into blocks, and maps functions over them:

    blocks = Blocks.of(q, size)
    tokens = blocks.tokens(q, k, v, causal=causal)
    table = blocks.map(summarise_blocks, tokens, keys=keys)         # the summaries of each block
    return blocks.attend(attend_blocks, tokens, table, keys=keys)   # [b l h d]

A mapped function gets some blocks at a time on a CPU, all at once elsewhere (see `chunking`). In the function heads
come first, `h m c d`: all products are then matrix multiplications with two batch axes, seldom of size one. Heads and
batch lead their axes, so both can be sharded.

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` blocks (or grid rows) of a sequence, `m = b·n` blocks of
the whole batch, `c` position in a block, or grid column, `s` keys of a group.
"""

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.ops import parts
from combiner.ops.chunking import plan_chunks
from combiner.ops.segments import PADDING_ID, same_segment
from combiner.ops.slices import Chunks, Cut, map_slices
from combiner.ops.softmax import Drop, einsum, mask_logits, unnormalized_softmax


class KeyGroup(NamedTuple):
    """Keys to which the positions of a block may attend: tokens, or summaries of spans.

    Each block has its own keys (axis `m`), or all blocks of a sequence share them (axis `b`).

    Attributes:
        k: keys; for spans, the summary keys `K_r`.
        v: values; for spans, the local expectations `V_r`.
        mask: which positions attend to which keys, segment ids aside; None for all.
        segment_ids: of the keys (see `segments`); None if all are equal, or if `mask` alone decides.
    """

    k: Float[Array, '*m s d']
    v: Float[Array, '*m s d']
    mask: Bool[Array, '#m #c s'] | None = None
    segment_ids: Int[Array, 'm s'] | None = None

    def logits(self, q: Float[Array, 'h m c d'], segment_ids: Int[Array, 'm c'] | None) -> Float[Array, 'h m c s']:
        """Returns the logits of all queries, which are scaled; masked where a query does not attend to a key."""
        heads, blocks, _, width = q.shape
        if self.k.shape[1] == blocks:
            logits = einsum('hmcd,hmsd->hmcs', q, self.k)
        else:
            by_sequence = q.reshape(heads, self.k.shape[1], -1, width)
            logits = einsum('hbld,hbsd->hbls', by_sequence, self.k).reshape(*q.shape[:3], -1)
        return mask_logits(logits, same_segment(segment_ids, self.segment_ids, self.mask))

    def weighted_values(self, weights: Float[Array, 'h m c s']) -> Float[Array, 'h m c d']:
        """Returns the sums of the values, for the weights of all queries."""
        heads, blocks, size, keys = weights.shape
        weights = weights.astype(self.v.dtype)
        if self.v.shape[1] == blocks:
            return einsum('hmcs,hmsd->hmcd', weights, self.v)
        by_sequence = weights.reshape(heads, self.v.shape[1], -1, keys)
        return einsum('hbls,hbsd->hbld', by_sequence, self.v).reshape(heads, blocks, size, -1)


def attend_groups(
    q: Float[Array, 'h m c d'],
    groups: Sequence[KeyGroup],
    segment_ids: Int[Array, 'm c'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'h m c d']:
    """Attends from every query to the keys of all groups in one softmax; zeros where a query attends to no key.

        A(i) = Σ_groups Σ_s p_s v_s        p_s ∝ exp(q_i·k_s / √d)

    Args:
        q: queries, not scaled.
        groups: the keys, heads first.
        segment_ids: of the queries (see `segments`); None if all are equal.
        drop: dropout of the joint weights.
    """
    q = scale_queries(q)
    weights, total = unnormalized_softmax(*(group.logits(q, segment_ids) for group in groups), drop=drop)
    attended = groups[0].weighted_values(weights[0])
    for group, of_group in zip(groups[1:], weights[1:], strict=True):
        attended += group.weighted_values(of_group)
    return (attended / total).astype(groups[0].v.dtype)


def attend_one(q: Float[Array, 'h d'], *groups: KeyGroup) -> Float[Array, 'h d']:
    """Attends as `attend_groups` does, from one query of each head, as in decoding; keys `h s d`, masks `s`."""

    def as_block(group: KeyGroup) -> KeyGroup:
        return KeyGroup(group.k[:, None], group.v[:, None], None if group.mask is None else group.mask[None, None])

    return attend_groups(q[:, None, None], [as_block(group) for group in groups])[:, 0, 0]


class Tokens(NamedTuple):
    """Queries (not scaled), keys and values, and the segment ids of blocks (see `segments`), None if all are equal.

    Of sequences, `b l h d`, until `Blocks` maps a function over them; the function gets those of blocks, `h m c d`. So
    nothing is copied to pad the last block of a sequence.
    """

    q: Float[Array, '*m c d']
    k: Float[Array, '*m c d']
    v: Float[Array, '*m c d']
    segment_ids: Int[Array, 'm c'] | None = None

    @property
    def inside(self) -> Bool[Array, 'm c'] | None:
        """Returns which positions are no padding; None if all are."""
        return None if self.segment_ids is None else self.segment_ids != PADDING_ID

    def group(self, mask: Bool[Array, 'c c'] | None = None) -> KeyGroup:
        """Returns the keys of every block, for its own queries."""
        return KeyGroup(self.k, self.v, None if mask is None else mask[None], self.segment_ids)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A batch of sequences, cut into blocks of `size` positions; the last block of a sequence is padded with zeros.

    Outside the mapped functions, `Tokens` are of sequences, `b l h d`, the tokens that each block has besides are
    `m s h d`, and all other arrays `m h …`; inside, heads come first. Integers and masks have no heads.
    """

    batch: int
    length: int
    size: int
    heads: int
    at_once: bool

    @classmethod
    def of(cls, q: Float[Array, 'b l h d'], size: int, drop: Drop | None = None) -> 'Blocks':
        """Makes the blocks of sequences; with dropout all are computed at once, as dropout acts on all blocks together.

        Raises:
            ValueError: the size is no positive integer.
        """
        _check_size(size)
        batch, length, heads, _ = q.shape
        return cls(batch, length, size, heads, drop is not None)

    @property
    def count(self) -> int:
        """Returns the number of blocks of a sequence."""
        return -(-self.length // self.size)

    def split(self, x: Shaped[Array, 'b l *rest']) -> Shaped[Array, 'm c *rest']:
        """Cuts sequences into blocks."""
        room = ((0, 0), (0, self.count * self.size - self.length), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, room).reshape(-1, self.size, *x.shape[2:])

    def tokens(
        self,
        q: Float[Array, 'b l h d'],
        k: Float[Array, 'b l h d'],
        v: Float[Array, 'b l h d'],
        *,
        causal: bool,
        valid: Bool[Array, 'b l'] | None = None,
        segments: Int[Array, 'b l'] | None = None,
        beyond_end: bool = False,
    ) -> Tokens:
        """Returns queries, keys and values, with the segment ids of the positions of their blocks.

        Args:
            q: queries.
            k: keys.
            v: values.
            causal: whether a position attends to itself and earlier positions only.
            valid: positions that are no padding.
            segments: packed documents.
            beyond_end: see `block_segment_ids`.
        """
        segment_ids = block_segment_ids(
            self.batch, self.length, self.size, causal=causal, valid=valid, segments=segments, beyond_end=beyond_end
        )
        return Tokens(q, k, v, segment_ids)

    def map(self, body: Callable[..., Any], tokens: Any, *others: Any, keys: int) -> Any:
        """Returns `body(tokens, *others)`, on a CPU by chunks of blocks: a tree of arrays `m h …`, without heads `m …`.

        Args:
            body: takes and returns arrays with heads first. Blocks are independent.
            tokens: a tree of `Tokens`, and of other tokens for each block, `m s h d`; without heads `m s`.
            *others: trees of arrays `m h …`, and `m …` without heads.
            keys: number of keys to which a position attends, which decides how many blocks fit into a CPU's cache.
        """

        def by_heads(tokens: Any, *others: Any) -> Any:
            return swap_heads(body(heads_first(tokens), *swap_heads(others)))

        return self._map(by_heads, (tokens, *others), keys)

    def attend(self, body: Callable[..., Array], tokens: Any, *others: Any, keys: int) -> Float[Array, 'b l h d']:
        """Computes as `map` does; `body` returns the attended values of the positions of blocks, `h m c d`."""

        def by_heads(tokens: Any, *others: Any) -> Array:
            return jnp.moveaxis(body(heads_first(tokens), *swap_heads(others)), 0, -2)

        return self._map(by_heads, (tokens, *others), keys, join=True)

    def map_blocks_first(self, body: Callable[..., Any], *arrays: Any, keys: int | None) -> Any:
        """Computes `body(*arrays)` as `map` does, with blocks as the first axis of all arrays, `m …`, within it too.

        With `keys` None it takes one block of every sequence at a time, on any device, to save memory.
        """
        return self._map(body, arrays, keys)

    def join(self, x: Shaped[Array, 'm c *rest']) -> Shaped[Array, 'b l *rest']:
        """Inverts `split`."""
        return x.reshape(self.batch, -1, *x.shape[2:])[:, : self.length]

    def by_sequence(self, group: Any) -> Any:
        """Joins the arrays of a sequence's blocks, `m h s d` or `m h d`, into one that they share, `h b (n s) d`.

        If sequences are cut over devices, `n` are the blocks of the whole sequence.
        """

        def shared(x: Float[Array, 'm h *s d']) -> Float[Array, 'h b t d']:
            x = jnp.moveaxis(x.reshape(self.batch, -1, *x.shape[1:]), 2, 0)
            return parts.gather(x.reshape(*x.shape[:2], -1, x.shape[-1]), 2)

        return jax.tree.map(shared, group)

    def _map(self, body: Callable[..., Any], arrays: tuple[Any, ...], keys: int | None, *, join: bool = False) -> Any:
        """Computes `body(*arrays)` for some blocks at a time, with blocks as the first axis within the body.

        Results are arrays `m …`, or `m c …` that are joined to `b l …`.
        """
        logits = self.batch * self.count * self.size * self.heads * (keys or 0)
        chunks = Chunks(self.count, 1) if keys is None else plan_chunks(logits, self.count, at_once=self.at_once)
        leaves, tree = jax.tree.flatten(arrays)
        batch = (self.batch,) if self.batch > 1 else ()  # XLA would copy an array for an axis of one
        axis, result_trees = len(batch), []

        def of_slices(*slices: Array) -> list[Array]:
            blocks = [
                x.reshape(-1, *((self.size,) if of_sequence else ()), *x.shape[axis + 1 :])
                for x, of_sequence in zip(slices, _of_sequences(arrays), strict=True)
            ]
            results, result_tree = jax.tree.flatten(body(*jax.tree.unflatten(tree, blocks)))
            result_trees.append(result_tree)
            return [x.reshape(*batch, -1, *x.shape[2 if join else 1 :]) for x in results]

        whole, cuts = [], []
        for x, of_sequence in zip(leaves, _of_sequences(arrays), strict=True):
            length = self.length if of_sequence else self.count
            whole.append(x.reshape(*batch, length, *x.shape[2 if of_sequence else 1 :]))
            cuts.append((Cut(axis, self.size if of_sequence else 1),))
        result_cut = Cut(axis, self.size, self.length) if join else Cut(axis)
        results = map_slices(of_slices, (chunks,), whole, cuts, (result_cut,))
        first = (self.batch, self.length) if join else (-1,)
        return jax.tree.unflatten(result_trees[0], [x.reshape(*first, *x.shape[axis + 1 :]) for x in results])


def _of_sequences(tree: Any) -> list[bool]:
    """Returns for each array of a tree whether it is of sequences: the queries, keys and values of `Tokens`."""
    found = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Tokens)):
        is_tokens = isinstance(node, Tokens)
        fields = [True, True, True, False] if is_tokens else [False]
        found += [field for field, x in zip(fields, node if is_tokens else [node], strict=True) if x is not None]
    return found


def heads_first(tokens: Any) -> Any:
    """Moves heads from `m c h d` to `h m c d`, in arrays that have heads."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0) if _has_heads(x) else x, tokens)


def swap_heads(tree: Any) -> Any:
    """Exchanges heads and blocks, the first two axes of arrays that have heads: from `h m …` to `m h …` or back."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1) if _has_heads(x) else x, tree)


def _has_heads(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


class Recent(NamedTuple):
    """The tokens of the open block (or of the last two grid rows) during decoding, unchanged."""

    q: Float[Array, '*rows c d']
    k: Float[Array, '*rows c d']
    v: Float[Array, '*rows c d']


LEFT, RIGHT = 0, 1


def block_length(chunk: int, length: int) -> int:
    """Returns the length of the blocks in which a sequence is computed: `chunk`, or less for a shorter sequence.

    Raises:
        ValueError: it is no power of two.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f'chunk must be a power of two, got {chunk}')
    return min(chunk, 1 << (length - 1).bit_length())


def clip_size(size: int, length: int) -> int:
    """Limits the length of a block or grid row to the length of the sequence: beyond it nothing would change.

    Raises:
        ValueError: it is no positive integer.
    """
    _check_size(size)
    return min(size, length)


def _check_size(size: int) -> None:
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f'a block or grid row must hold at least 1 position, got {size}')


def scale_queries(q: Float[Array, '*n d']) -> Float[Array, '*n d']:
    """Divides queries by `√d`. Pooling of queries comes before: rounding can make two different queries equal."""
    return q * q.shape[-1] ** -0.5


def split_blocks(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'h m c d']:
    """Cuts every sequence into blocks of `size` positions, padding the last with zeros."""
    _check_size(size)
    _, length, heads, width = x.shape
    x = jnp.moveaxis(jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0))), 2, 0)
    return x.reshape(heads, -1, size, width)


def merge_blocks(x: Float[Array, 'h m c d'], length: int) -> Float[Array, 'b l h d']:
    """Inverts `split_blocks`, without the padding."""
    heads, _, size, width = x.shape
    return jnp.moveaxis(x.reshape(heads, -1, -(-length // size) * size, width), 0, 2)[:, :length]


def blocks_by_sequence(x: Float[Array, 'h m *rest'], blocks: int) -> Float[Array, 'b h n *rest']:
    """Splits blocks by sequence, for decoding."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, blocks, *x.shape[2:]), 0, 1)


def transpose_grid(x: Float[Array, 'h m c e'], rows: int) -> Float[Array, 'h k n e']:
    """Transposes grids from rows to columns, `k = b·c`; with the number of columns as `rows`, back."""
    heads, _, columns, last = x.shape
    return x.reshape(heads, -1, rows, columns, last).swapaxes(2, 3).reshape(heads, -1, rows, last)


def split_ids(segment_ids: Shaped[Array, 'b l'], size: int, fill: int = 0) -> Shaped[Array, 'm c']:
    """Cuts ids or validity of positions into blocks; the last block is padded with `fill`."""
    _check_size(size)
    room = ((0, 0), (0, -segment_ids.shape[1] % size))
    return jnp.pad(segment_ids, room, constant_values=fill).reshape(-1, size)


def block_segment_ids(
    batch: int,
    length: int,
    size: int,
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None,
    segments: Int[Array, 'b l'] | None,
    beyond_end: bool = False,
) -> Int[Array, 'm c'] | None:
    """Returns the segment ids of the positions of blocks; None if all ids that are ever reached are equal.

    Causal attention never reaches the padding of the last block.

    Args:
        batch: the number of sequences.
        length: of the sequences.
        size: positions in a block.
        causal: whether a position attends to itself and earlier positions only.
        valid: positions that are no padding.
        segments: packed documents.
        beyond_end: whether, if not causal, spans reach beyond the last block, so that ids must mark empty ones.
    """
    if segments is None and valid is None and (causal or not (length % size or beyond_end)):
        return None
    segment_ids = jnp.zeros((batch, length), jnp.int32) if segments is None else segments.astype(jnp.int32)
    return split_ids(segment_ids if valid is None else jnp.where(valid, segment_ids, PADDING_ID), size, PADDING_ID)


def own_mask(size: int, *, causal: bool) -> Bool[Array, 'c c'] | None:
    """Returns which positions of its block a position attends to: itself and earlier ones, or all."""
    return jnp.tri(size, dtype=bool) if causal else None
