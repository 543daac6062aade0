"""Combiner-Mixture: the mean of attentions over different partitions, by default vertical and horizontal."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from combiner import patterns
from combiner.attention import combiner_axial_horizontal, combiner_axial_vertical
from combiner.core import registry
from combiner.core.pooled import Pooled
from combiner.core.registry import register
from combiner.costs import own_row_and_column
from combiner.kernels.choice import Implementation
from combiner.kernels.tpu.mixture.mechanism import MIXTURE
from combiner.ops import grid
from combiner.ops.blocks import clip_size
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.softmax import Drop, PartialSoftmax, merge_partials
from combiner.patterns import Cost, Mixture, Pattern

AXIAL = ('combiner_axial_vertical', 'combiner_axial_horizontal')


def pattern(length: int, *, causal: bool, columns: int, split: bool = False) -> Mixture:
    """Returns the paper's mixture: the mean of vertical and horizontal, which share their direct terms."""
    vertical = combiner_axial_vertical.pattern(length, causal=causal, columns=columns)
    return Mixture((vertical, combiner_axial_horizontal.pattern(length, causal=causal, columns=columns, split=split)))


def joint_pattern(length: int, *, causal: bool, columns: int, split: bool = True) -> Pattern:
    """Returns vertical and horizontal spans in one softmax with the direct terms once, as in the authors' code.

    So all positions that are not direct are covered twice. `split` as in `combiner_axial_horizontal`.
    """
    vertical = combiner_axial_vertical.pattern(length, causal=causal, columns=columns)
    horizontal = combiner_axial_horizontal.pattern(length, causal=causal, columns=columns, split=split)
    spans = np.concatenate([vertical.spans, horizontal.spans])
    return Pattern(vertical.direct, spans, np.concatenate([vertical.uses, horizontal.uses], axis=1))


def cost(length: int, columns: int, split: bool = False, *, causal: bool) -> Cost:
    """Returns the cost of `pattern`, and of `joint_pattern`, in closed form."""
    vertical = combiner_axial_vertical.cost(length, columns, causal=causal)
    horizontal = combiner_axial_horizontal.cost(length, columns, split, causal=causal)
    shared = own_row_and_column(length, columns, causal=causal)
    return Cost(vertical.terms + horizontal.terms - shared, vertical.members + horizontal.members)


def attend_combiner_mixture(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    joint: bool = False,
    split: bool = False,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Returns the mean of vertical and horizontal axial attention, or one softmax over both partitions.

        mean:   A(i) = 1/2 (D_i + V_i) / (d_i + v_i) + 1/2 (D_i + H_i) / (d_i + h_i)
        joint:  A(i) = (D_i + V_i + H_i) / (d_i + v_i + h_i)

    The sums are `D_i = Σ exp(q_i·k_j/√d) v_j` over direct terms, `V_i` over summaries of vertical and `H_i` of
    horizontal spans; `d_i`, `v_i`, `h_i` are sums of the weights alone. The paper has the mean. The authors' code has
    the joint form, which covers twice all that is not direct. O(l·(columns + l/columns)) time and memory.

    Args:
        columns: length of a grid row; the last row may be partial.
        joint: one softmax instead of the mean of two.
        split: as for horizontal attention; `joint` with `split` is the authors' code.
        q, k, v, causal, pools, valid, drop: see `core.mechanism`.
    """
    columns = clip_size(columns, q.shape[1])

    def attend(cells):
        in_row, in_column = grid.direct_in_row(cells), grid.direct_in_column(cells)
        vertical = grid.vertical_spans(cells, pools)
        horizontal = grid.horizontal_spans(cells, pools, split=split)
        if joint:
            by_column = grid.transpose_lines(merge_partials(in_column, horizontal), columns)
            return merge_partials(in_row, vertical, by_column).normalize()
        direct = merge_partials(in_row, grid.transpose_lines(in_column, columns))
        return _mean(direct, [vertical], [grid.transpose_lines(horizontal, columns)])

    return grid.map_grids(attend, q, k, v, columns=columns, causal=causal, pools=pools, valid=valid, drop=drop)


def _mean(direct: PartialSoftmax, *parts: list[PartialSoftmax]) -> Float[Array, '*queries d']:
    """Returns the mean of softmaxes that share their direct terms."""
    total = sum(merge_partials(direct, *spans).normalize() for spans in parts)
    return jnp.asarray(total) / len(parts)


@register('combiner_mixture')
class CombinerMixture(Pooled):
    """Combiner-Mixture.

    Attributes:
        columns: length of a grid row of every part that has one; None for the cheapest power of two.
        joint: the spans of both partitions in one softmax with the direct terms once, as in the authors' code, not
            the paper's mean. Only for the default parts.
        split: as for `combiner_axial_horizontal`; the authors' code is `joint` with `split`.
        parts: names of the mechanisms whose attentions are averaged; each has the mixture's `pool` and `columns`, and
            otherwise its default hyper-parameters. None may require parameters or state of its own.
        implementation: see `kernels.choice`. Only for the default parts.
    """

    columns: int | None = None
    joint: bool = False
    split: bool = False
    parts: tuple[str, ...] = AXIAL
    implementation: str | None = None

    full_support = True
    implementations = {  # noqa: RUF012
        'mosaic': MIXTURE,
        'xla': Implementation(lambda q, k, v, *, segments, **options: attend_combiner_mixture(q, k, v, **options)),
    }

    def __post_init__(self) -> None:
        """Checks the parts; a mixture has full support, and supports dropout and wide values, where all of them do."""
        super().__post_init__()
        if not self.parts:
            raise ValueError('a mixture needs at least one mechanism in parts, got none')
        if self._axial():
            return
        if self.joint or self.split or self.implementation:
            raise ValueError(
                f'joint, split and implementation are for the parts {AXIAL}; got parts={self.parts}: leave them unset'
            )
        mechanisms = list(self._mechanisms())
        for name, mechanism in zip(self.parts, mechanisms, strict=True):
            if mechanism.requires:
                raise ValueError(f'{name} owns {mechanism.requires}, and can be no part of a mixture; leave it out')
        for feature in ('full_support', 'supports_dropout', 'allows_value_width'):
            object.__setattr__(self, feature, all(getattr(one, feature) for one in mechanisms))

    def pattern(self, length):
        if not self._axial():
            return patterns.mixture_of([part.pattern(length) for part in self._mechanisms()])
        kind = joint_pattern if self.joint else pattern
        return kind(length, causal=self.causal, columns=self._columns(length), split=self.split)

    def cost(self, length):
        """Returns the cost of `pattern(length)`, of other parts their sum: they share no terms, also where equal."""
        if not self._axial():
            parts = [part.cost(length) for part in self._mechanisms()]
            return Cost(sum(part.terms for part in parts), sum(part.members for part in parts))
        return self._cost(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, context):
        """Attends with the default parts together, with other parts one after the other."""
        if self._axial():
            options = {'joint': self.joint, 'split': self.split, 'pools': self.pools(context)}
            return self.attend_by_best(q, k, v, context, columns=self._columns(q.shape[1]), **options)
        alone = context._replace(variables=None)  # a mixture's only parameters are its poolings'
        parts = [part.attend(q, k, v, context if isinstance(part, Pooled) else alone) for part in self._mechanisms()]
        return jnp.mean(jnp.stack(parts), axis=0, dtype=jnp.promote_types(v.dtype, jnp.float32)).astype(v.dtype)

    def init_cache(self, q, k, v, context, counts, capacity):
        if not self._axial():
            return super().init_cache(q, k, v, context, counts, capacity)
        columns, pools, relations = self._columns(capacity), self.pools(context), grid.horizontal_relations(self.split)
        return grid.init_cache(
            q, k, v, counts, capacity, columns=columns, pools=pools, vertical=True, relations=relations
        )

    def decode_step(self, cache, index, q, k, v, context):
        if not self._axial():
            return super().decode_step(cache, index, q, k, v, context)
        mix = grid.in_one_softmax if self.joint else _mean
        pools, relations = self.pools(context), grid.horizontal_relations(self.split)
        return grid.decode_step(cache, index, q, k, v, pools=pools, relations=relations, mix=mix)

    def _axial(self):
        """Returns whether the parts are the default ones, which share their computation."""
        return sorted(self.parts) == sorted(AXIAL)

    def _mechanisms(self):
        given = {'pool': self.pool} | ({} if self.columns is None else {'columns': self.columns})
        for name in self.parts:
            hyper = {key: value for key, value in given.items() if key in registry.hyper_parameters(name)}
            yield registry.make_mechanism(name, hyper, causal=self.causal, max_length=self.max_length)

    @property
    def _cost(self):
        return partial(cost, split=self.split)

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, self._cost, length)
