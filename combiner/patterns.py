"""Attention patterns as data: which positions are reached directly, and which through the summary of a span.

A Combiner variant *is* a partition of each position's support (Combiner, section 3): `Ω_i = Ω_i^0 ∪ Ω_i^1 ∪ …
∪ Ω_i^{n_i}`. A `Pattern` holds this partition for a short sequence. The oracle, the property tests, the pictures
and the cost curves are computed from it. Sparse attention is a pattern without spans. This module uses numpy only.

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
    """The cost of a pattern, in query-key products.

    Attributes:
        terms: number of terms in the softmaxes of all positions, `Σ_i (|Ω_i^0| + n_i)`.
        members: number of members of all unique spans (for a span of spans: of its parts), the work of the local
            expectations.
    """

    terms: int
    members: int

    @property
    def total(self) -> int:
        """Number of all query-key products."""
        return self.terms + self.members


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The support of every position of a sequence of length `l`, split into direct positions and spans.

    Attributes:
        direct: `direct[i, j]`: position `i` attends directly to position `j`, i.e. `j ∈ Ω_i^0`.
        spans: `spans[s, j]`: the unique span `s` contains position `j`.
        uses: `uses[i, s]`: position `i` attends to the summary of span `s`.
        anchors: for spans that are summarised from one token (`combiner_axial_rowmajor`): the position of that
            token, or `NO_ANCHOR` where the grid has no token there; None for pooled spans.
        nested: for spans of spans (`combiner_tree`): `nested[r, s]`: span `r` contains span `s` as one part, and
            the summary of `s` is one term of the local expectation of `r`; None if all spans consist of positions.
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
        """Counts at `[i, j]` how often position `i` reaches position `j`, directly or in a span.

        For a pattern with full support the result is `np.tri(l)` if causal, else `np.ones((l, l))`.
        """
        in_spans = self.uses.astype(np.float32) @ self.spans.astype(np.float32)  # floats: BLAS multiplies no integers
        return self.direct + in_spans.astype(int)

    def parts(self) -> tuple[Bool[np.ndarray, 's l'], Bool[np.ndarray, 's s']]:
        """Returns the terms of every span's local expectation: positions, and nested spans."""
        if self.nested is None:
            return self.spans, np.zeros((len(self.spans),) * 2, bool)
        in_parts = self.nested.astype(np.float32) @ self.spans.astype(np.float32)
        return self.spans & (in_parts == 0), self.nested

    def cost(self) -> Cost:
        """Counts the terms and the members of spans; `costs` has closed forms."""
        return Cost(int(self.direct.sum() + self.uses.sum()), sum(int(parts.sum()) for parts in self.parts()))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The paper's mixture model, `1/M Σ_m A(i; ω_m)`: the mean of the attentions of several partitions of one support.

    Attributes:
        parts: the partitions.
    """

    parts: tuple[Pattern, ...]

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.parts[0].length

    def coverage(self) -> Int[np.ndarray, 'l l']:
        """Returns at each `[i, j]` the largest coverage of all parts.

        If all parts have full support, this is the support, as for a `Pattern`.
        """
        return np.max([part.coverage() for part in self.parts], axis=0)

    def cost(self) -> Cost:
        """Counts the terms and members of all parts; equal direct terms of several parts count once."""
        direct = {part.direct.tobytes(): int(part.direct.sum()) for part in self.parts}
        summaries = sum(int(part.uses.sum()) for part in self.parts)
        return Cost(sum(direct.values()) + summaries, sum(part.cost().members for part in self.parts))


def mixture_of(parts: Sequence[Pattern | Mixture]) -> Mixture:
    """Returns the mixture of all parts; a part that is a mixture is replaced by its own parts.

    Raises:
        ValueError: the parts have different numbers of partitions, so that equal weights would be wrong.
    """
    groups = [part.parts if isinstance(part, Mixture) else (part,) for part in parts]
    if len({len(group) for group in groups}) > 1:
        counts = ', '.join(str(len(group)) for group in groups)
        raise ValueError(f'a mixture of mixtures needs parts with the same number of partitions, got {counts}')
    return Mixture(tuple(itertools.chain.from_iterable(groups)))


def support(length: int, *, causal: bool) -> Bool[np.ndarray, 'l l']:
    """Returns the positions that each position may attend to: `j ≤ i` if causal, else all."""
    check_positive(length=length)
    everything = np.ones((length, length), bool)
    return np.tril(everything) if causal else everything


def sparse(direct: Bool[np.ndarray, 'l l']) -> Pattern:
    """Returns a pattern without spans: only the direct positions are reached."""
    length = direct.shape[0]
    return Pattern(direct, np.zeros((0, length), bool), np.zeros((length, 0), bool))


def grid_support(
    length: int, columns: int, *, causal: bool
) -> tuple[Bool[np.ndarray, 'l l'], Int[np.ndarray, ' l'], Int[np.ndarray, ' l']]:
    """Returns which positions share a row or a column in a grid of `columns`, and the row and column of each."""
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
    """Returns a pattern without the spans that no position uses or that have no members."""
    used = uses.any(axis=0) & spans.any(axis=1)
    return Pattern(direct, spans[used], uses[:, used], None if anchors is None else anchors[used])


def check_positive(**sizes: int) -> None:
    """Raises ValueError, with the name, for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f'{name} must be at least 1, got {size}')
