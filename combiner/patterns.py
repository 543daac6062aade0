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
