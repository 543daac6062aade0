import numpy as np
import pytest
from cases import KNOWN_AHEAD, causal_or_not, every_mechanism, mechanism_pattern

import combiner
from combiner import patterns
from combiner.attention import registry

LENGTHS = [*range(1, 131), 255, 256, 257]
SIZES = (1, 2, 3, 5, 8, 16, 200)


@causal_or_not
@every_mechanism
def test_coverage_is_the_support_exactly_where_it_is_claimed(name, hyper, causal):
    full_support = name in combiner.names(full_support=True)
    for length in LENGTHS:
        pattern = mechanism_pattern(name, length, causal=causal, hyper=hyper)
        coverage, support = pattern.coverage(), patterns.support(length, causal=causal)
        assert pattern.length == length
        assert (coverage <= support).all(), f'length {length}: covers twice, or outside of the support'
        assert (coverage.diagonal() == 1).all(), f'length {length}: a position does not see itself'
        if full_support:
            assert (coverage == support).all(), f'length {length}: misses part of the support'


@causal_or_not
@pytest.mark.parametrize('name', KNOWN_AHEAD)
def test_default_sizes_cover_too(name, causal):
    for length in LENGTHS:
        missed = patterns.support(length, causal=causal) - combiner.pattern(name, length, causal=causal).coverage()
        assert (missed >= 0).all()
        assert not (name in combiner.names(full_support=True) and missed.any()), f'length {length}'


@causal_or_not
@every_mechanism
def test_cost_in_closed_form_is_the_count(name, hyper, causal):
    mechanism = registry.make(name, hyper, causal=causal)
    for length in (1, 2, 3, 7, 16, 17, 64, 65, 130):
        assert mechanism.cost(length) == mechanism.pattern(length).cost()


@causal_or_not
@pytest.mark.parametrize(
    ('kind', 'size'),
    [('fixed', 'block'), ('axial', 'columns'), ('combiner_fixed', 'block'), ('combiner_axial_rowmajor', 'columns')],
)
def test_cost_in_closed_form_for_every_shape_of_the_last_row(kind, size, causal):
    for length in (*range(1, 40), 64, 65):
        for value in SIZES:
            pattern = getattr(patterns, kind)(length, causal=causal, **{size: value})
            assert getattr(patterns, f'{kind}_cost')(length, value, causal=causal) == pattern.cost(), (length, value)


def test_sparse_fixed_with_a_longer_summary():
    pattern = patterns.fixed(7, causal=True, block=3, summary=2)
    assert pattern.direct[6].tolist() == [False, True, True, False, True, True, True]
    assert patterns.fixed_cost(7, 3, 2, causal=True) == pattern.cost()


def test_combiner_fixed_by_hand():
    pattern = patterns.combiner_fixed(5, causal=True, block=2)
    assert pattern.direct.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert pattern.spans.astype(int).tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert pattern.uses.astype(int).tolist() == [[0, 0], [0, 0], [1, 0], [1, 0], [1, 1]]
    assert pattern.anchors is None


def test_rowmajor_by_hand():
    pattern = patterns.combiner_axial_rowmajor(5, causal=False, columns=2)
    assert pattern.anchors is not None
    seen_from_3 = [
        (pattern.anchors[s], np.flatnonzero(pattern.spans[s]).tolist()) for s in np.flatnonzero(pattern.uses[3])
    ]
    assert seen_from_3 == [(1, [0, 1]), (patterns.NO_ANCHOR, [4])]


def test_cost_grows_like_the_square_root():
    costs = [registry.make('combiner_fixed', causal=True).cost(4**k).total / 4**k for k in (5, 6, 7, 8)]
    assert np.allclose(np.divide(costs[1:], costs[:-1]), 2, rtol=0.1)


@pytest.mark.parametrize('size', [0, -1])
def test_sizes_must_be_positive(size):
    with pytest.raises(ValueError, match=f'block must be at least 1, got {size}'):
        combiner.pattern('combiner_fixed', 8, causal=True, block=size)
    with pytest.raises(ValueError, match='columns must be at least 1'):
        combiner.pattern('axial', 8, causal=True, columns=size)


@pytest.mark.parametrize('name', KNOWN_AHEAD)
def test_length_zero_is_refused(name):
    with pytest.raises(ValueError, match='length must be at least 1, got 0'):
        combiner.pattern(name, 0, causal=True)
