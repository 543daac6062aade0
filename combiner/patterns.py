"""Attention patterns as data: which positions are reached directly, and which through the summary of a span.

A Combiner variant *is* a partition of each position's support (Combiner, section 3): `Ω_i = Ω_i^0 ∪ Ω_i^1 ∪ …
∪ Ω_i^{n_i}`. A `Pattern` writes it down for a short sequence; the oracle, the property tests, the pictures
and the cost curves all follow from that one value. Sparse attention is a pattern without spans. Only numpy is
used here.

Letters: `l` length (queries), `m` length (keys), `s` spans, `n` blocks or grid rows, `c` position within a
block, or grid column.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

NO_ANCHOR = -1


class Cost(NamedTuple):
    """What a pattern costs, in units of one query-key product.

    Attributes:
        terms: terms in all joint softmaxes together, `Σ_i (|Ω_i^0| + n_i)`.
        members: members of all unique spans together (of a span of spans: its parts), the work of the local
            expectations.
    """

    terms: int
    members: int

    @property
    def total(self) -> int:
        """Query-key products in all."""
        return self.terms + self.members


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The support of every position of a sequence of length `l`, split into direct positions and spans.

    Attributes:
        direct: `direct[i, j]`: position `i` attends directly to position `j`, i.e. `j ∈ Ω_i^0`.
        spans: `spans[s, j]`: the unique span `s` contains position `j`.
        uses: `uses[i, s]`: position `i` attends to the summary of span `s`.
        anchors: for spans that are seen through one token (`combiner_axial_rowmajor`): the position of that
            token, or `NO_ANCHOR` where the grid has no token there; None for spans that are pooled.
        nested: for spans of spans (`combiner_tree`): `nested[r, s]`: span `r` contains span `s` as one part, which
            its local expectation sees through the summary of `s`; None where all spans consist of positions.
    """

    direct: Bool[np.ndarray, 'l l']
    spans: Bool[np.ndarray, 's l']
    uses: Bool[np.ndarray, 'l s']
    anchors: Int[np.ndarray, ' s'] | None = None
    nested: Bool[np.ndarray, 's s'] | None = None

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.direct.shape[0]

    def coverage(self) -> Int[np.ndarray, 'l l']:
        """How often position `j` is reached from position `i`, directly or in a span.

        A pattern with full support covers exactly `np.tri(l)` when causal and `np.ones((l, l))` when
        bidirectional.
        """
        in_spans = self.uses.astype(np.float32) @ self.spans.astype(np.float32)  # floats: BLAS multiplies no integers
        return self.direct + in_spans.astype(int)

    def parts(self) -> tuple[Bool[np.ndarray, 's l'], Bool[np.ndarray, 's s']]:
        """What every span's local expectation runs over: positions, and spans that are nested in it."""
        if self.nested is None:
            return self.spans, np.zeros((len(self.spans),) * 2, bool)
        in_parts = self.nested.astype(np.float32) @ self.spans.astype(np.float32)
        return self.spans & (in_parts == 0), self.nested

    def cost(self) -> Cost:
        """Counts the terms and the parts of spans; `costs` has the same in closed form."""
        return Cost(int(self.direct.sum() + self.uses.sum()), sum(int(parts.sum()) for parts in self.parts()))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The mean of the attentions of several partitions of one support: the paper's mixture model, `1/M Σ_m A(i; ω_m)`.

    Attributes:
        parts: the partitions.
    """

    parts: tuple[Pattern, ...]

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.parts[0].length

    def coverage(self) -> Int[np.ndarray, 'l l']:
        """How often position `j` is reached from position `i`, in the part that reaches it most often.

        Where all parts have full support that is the support, as for a `Pattern`.
        """
        return np.max([part.coverage() for part in self.parts], axis=0)

    def cost(self) -> Cost:
        """The cost of all parts; direct terms that are the same in several parts count once."""
        direct = {part.direct.tobytes(): int(part.direct.sum()) for part in self.parts}
        far = sum(int(part.uses.sum()) for part in self.parts)
        return Cost(sum(direct.values()) + far, sum(part.cost().members for part in self.parts))


def mixture_of(parts: Sequence[Pattern | Mixture]) -> Mixture:
    """The mean of the attentions of all parts; those of a mixture among them stand for themselves.

    Raises:
        ValueError: mixtures among the parts are of different numbers of partitions, so that no equal weights would do.
    """
    groups = [part.parts if isinstance(part, Mixture) else (part,) for part in parts]
    if len({len(group) for group in groups}) > 1:
        raise ValueError('a mixture of mixtures needs parts of as many partitions each')
    return Mixture(tuple(itertools.chain.from_iterable(groups)))


def support(length: int, *, causal: bool) -> Bool[np.ndarray, 'l l']:
    """Everything a position may see: `j ≤ i` when causal, all positions otherwise."""
    check_positive(length=length)
    everything = np.ones((length, length), bool)
    return np.tril(everything) if causal else everything


def sparse(direct: Bool[np.ndarray, 'l l']) -> Pattern:
    """A pattern without spans: only the direct positions are reached."""
    length = direct.shape[0]
    return Pattern(direct, np.zeros((0, length), bool), np.zeros((length, 0), bool))


def full(length: int, *, causal: bool) -> Pattern:
    """Dense softmax attention: every position of the support directly."""
    return sparse(support(length, causal=causal))


def fixed(length: int, *, causal: bool, block: int, summary: int = 1) -> Pattern:
    """Sparse Transformer's "fixed" attention (Child et al. 2019): own block, last `summary` positions of each block.

    Args:
        length: number of positions.
        causal: whether a position sees only itself and what is before it.
        block: positions in a block; the last block may be partial.
        summary: how many of the last positions of each block every position sees.
    """
    check_positive(block=block, summary=summary)
    row, column = np.divmod(np.arange(length), block)
    own_block = row[:, None] == row
    last = column >= block - summary
    return sparse((own_block | last[None, :]) & support(length, causal=causal))


def axial(length: int, *, causal: bool, columns: int) -> Pattern:
    """Sparse axial attention (Ho et al. 2019): own row and own column of a grid with `columns` columns."""
    return sparse(grid_support(length, columns, causal=causal)[0])


def logsparse(length: int, *, causal: bool) -> Pattern:
    """Logsparse attention (Li et al. 2019, as in Combiner, section 4.2): itself and one position for each scale.

    That is, of every sibling of one's own block, the position next to that block: `((i >> t) << t) - 1` for each set
    bit of `i`. Bidirectional: `((i >> t) + 1) << t` too, for each bit that is not set, this project's choice.
    """
    check_positive(length=length)
    position, reached = np.arange(length), np.eye(length, dtype=bool)
    for level in range((length - 1).bit_length()):
        own = position >> level
        for odd, other in ((1, (own << level) - 1), (0, (own + 1) << level))[: 1 if causal else 2]:
            there = (own % 2 == odd) & (other < length)
            reached[position[there], other[there]] = True
    return sparse(reached)


def combiner_fixed(length: int, *, causal: bool, block: int) -> Pattern:
    """Combiner-Fixed (section 4.1): own block directly, every earlier (bidirectional: other) block as a span."""
    check_positive(length=length, block=block)
    row = np.arange(length) // block
    rows = np.arange(row[-1] + 1)
    spans = rows[:, None] == row
    uses = rows < row[:, None] if causal else rows != row[:, None]
    return with_spans((row[:, None] == row) & support(length, causal=causal), spans, uses)


def combiner_axial_rowmajor(length: int, *, causal: bool, columns: int) -> Pattern:
    """Combiner-Axial, row-major (section 4.3): own row directly, earlier (bidirectional: other) rows from column `c`.

    A row is one set of members but has as many summaries as columns: span `(t, c)` is row `t` seen through
    its token at column `c`, which is its anchor. In a partial last row an anchor may be missing; a missing or
    padded anchor counts as a zero query and, for `token` keys, a zero key: this project's choice, so that
    padding never changes a result.
    """
    check_positive(length=length, columns=columns)
    row, column = np.divmod(np.arange(length), columns)
    rows = row[-1] + 1
    span_row, span_column = np.divmod(np.arange(rows * columns), columns)
    spans = span_row[:, None] == row
    seen = span_row < row[:, None] if causal else span_row != row[:, None]
    anchors = np.where(np.arange(rows * columns) < length, np.arange(rows * columns), NO_ANCHOR)
    direct = (row[:, None] == row) & support(length, causal=causal)
    return with_spans(direct, spans, seen & (span_column == column[:, None]), anchors)


def combiner_logsparse(length: int, *, causal: bool) -> Pattern:
    """Combiner-Logsparse (section 4.2): one summary for each scale of distance.

    The sibling of position `i` at level `t` is the block `((i >> t) ^ 1) << t` of `2^t` positions, clipped to the
    sequence. Direct are `i` and its sibling at level 0, which is one position; the others are spans. Causal: only
    siblings on the left, one for each set bit of `i`. Bidirectional: all of them, this project's choice.
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


def combiner_tree(length: int, *, causal: bool, branch: int) -> Pattern:
    """Combiner-Tree, of this project: nested spans, which the paper's section 3 allows.

    The positions are the leaves of a tree in which `branch` nodes of a level form one of the next. Direct is one's own
    lowest node (causal: up to `i`); then, at every level, the earlier (bidirectional: other) nodes that share one's own
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


def tree_levels(length: int, branch: int) -> int:
    """How many levels of spans a tree has, those of `branch`, `branch²`, … positions, below its root.

    Raises:
        ValueError: a node must have two children at least.
    """
    if branch < 2:
        raise ValueError(f'branch must be at least 2, got {branch}')
    levels = 0
    while branch ** (levels + 1) < length:
        levels += 1
    return levels


def combiner_axial_vertical(length: int, *, causal: bool, columns: int) -> Pattern:
    """Combiner-Axial, vertical (section 4.3): own row and column directly; every other column above, as a span.

    When bidirectional, the rest of another column is a second span, below the own row: this project's choice.
    """
    direct, row, column = grid_support(length, columns, causal=causal)
    rows = np.arange(row[-1] + 1)
    spans, uses = [], []
    for inside in (rows[:, None] > row, rows[:, None] < row)[: 1 if causal else 2]:
        span_row, span_column = (axis.ravel() for axis in np.meshgrid(rows, np.arange(columns), indexing='ij'))
        spans.append(inside[span_row] & (span_column[:, None] == column))
        uses.append((row[:, None] == span_row) & (column[:, None] != span_column))
    return with_spans(direct, np.concatenate(spans), np.concatenate(uses, axis=1))


def combiner_axial_horizontal(length: int, *, causal: bool, columns: int, split: bool = False) -> Pattern:
    """Combiner-Axial, horizontal (section 4.3): own row and column directly; every earlier row without that column.

    Args:
        length: number of positions.
        causal: whether a position sees only itself and what is before it. If not, all other rows are spans: this
            project's choice.
        columns: length of a grid row; the last row may be partial.
        split: whether what is left and what is right of the column are two spans, as in the authors' code.
    """
    direct, row, column = grid_support(length, columns, causal=causal)
    # In a partial last row all columns beyond its end leave out nothing: they share the span of the first of them.
    span_row, span_column = np.divmod(np.arange(min((row[-1] + 1) * columns, length + 1)), columns)
    seen = span_row < row[:, None] if causal else span_row != row[:, None]
    in_last = span_row == length // columns
    left_out = np.where(in_last, np.minimum(column[:, None], length % columns), column[:, None])
    pieces = [span_column[:, None] > column, span_column[:, None] < column]
    if not split:
        pieces = [pieces[0] | pieces[1]]
    spans = [(span_row[:, None] == row) & piece for piece in pieces]
    return with_spans(direct, np.concatenate(spans), np.tile(seen & (left_out == span_column), len(pieces)))


def combiner_mixture_joint(length: int, *, causal: bool, columns: int, split: bool = True) -> Pattern:
    """Vertical and horizontal spans in one softmax with the direct terms once, as in the authors' code.

    So whatever is not direct is covered twice. `split` as in `combiner_axial_horizontal`.
    """
    vertical = combiner_axial_vertical(length, causal=causal, columns=columns)
    horizontal = combiner_axial_horizontal(length, causal=causal, columns=columns, split=split)
    spans = np.concatenate([vertical.spans, horizontal.spans])
    return Pattern(vertical.direct, spans, np.concatenate([vertical.uses, horizontal.uses], axis=1))


def combiner_mixture(length: int, *, causal: bool, columns: int, split: bool = False) -> Mixture:
    """The paper's mixture: the mean of vertical and horizontal, which have their direct terms in common."""
    vertical = combiner_axial_vertical(length, causal=causal, columns=columns)
    return Mixture((vertical, combiner_axial_horizontal(length, causal=causal, columns=columns, split=split)))


def combiner_routing(clusters: Int[np.ndarray, ' l'], *, causal: bool, block: int) -> Pattern:
    """Combiner-Routing: own block of the own cluster directly, what each other block holds as a span.

    The tokens of a cluster, in their order, are cut into blocks of `block`, counted from the cluster's first token.
    Bidirectional, a span is a block. Causal, span `j` is what the block of token `j` holds up to `j`; positions outside
    of it see that until the block's next token. Negative clusters mark padding, which sees and is seen by nothing.
    """
    length = len(clusters)
    check_positive(length=length, block=block)
    real = clusters >= 0
    same = (clusters[:, None] == clusters) & real
    row = np.tril(same, -1).sum(axis=1) // block
    own = same & (row[:, None] == row)
    if not causal:
        spans = own[(own.argmax(axis=1) == np.arange(length)) & real]
        return with_spans(own, spans, ~spans.T & real[:, None])
    later = np.triu(own, 1)
    following = np.where(later.any(axis=1), later.argmax(axis=1), length)
    here = np.arange(length)[:, None]
    uses = (here > np.arange(length)) & (here < following) & real & real[:, None]
    return with_spans(np.tril(own), np.tril(own), uses)


def grid_support(
    length: int, columns: int, *, causal: bool
) -> tuple[Bool[np.ndarray, 'l l'], Int[np.ndarray, ' l'], Int[np.ndarray, ' l']]:
    """Lays positions out in a grid of `columns`: which share a row or a column, and each one's row and column."""
    check_positive(length=length, columns=columns)
    row, column = np.divmod(np.arange(length), columns)
    same = (row[:, None] == row) | (column[:, None] == column)
    return same & support(length, causal=causal), row, column


def with_spans(
    direct: Bool[np.ndarray, 'l l'],
    spans: Bool[np.ndarray, 's l'],
    uses: Bool[np.ndarray, 'l s'],
    anchors: Int[np.ndarray, ' s'] | None = None,
) -> Pattern:
    """Makes a pattern of the spans that some position uses and that have members; drops the others."""
    used = uses.any(axis=0) & spans.any(axis=1)
    return Pattern(direct, spans[used], uses[:, used], None if anchors is None else anchors[used])


def check_positive(**sizes: int) -> None:
    """Refuses a length or another size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f'{name} must be at least 1, got {size}')
