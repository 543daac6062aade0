import numpy as np
import pytest
from cases import KNOWN_AHEAD, causal_or_not, every_mechanism

import combiner
from combiner import patterns, testing
from combiner.attention import (
    combiner_axial_horizontal,
    combiner_axial_rowmajor,
    combiner_axial_vertical,
    combiner_fixed,
    combiner_logsparse,
    combiner_mixture,
    combiner_tree,
)
from combiner.baselines import fixed

LENGTHS = [*range(1, 131), 255, 256, 257]
SIZES = (1, 2, 3, 5, 8, 16, 200)


@causal_or_not
@every_mechanism
def test_coverage_is_the_support_exactly_where_it_is_claimed(name, hyper, causal):
    testing.check_coverage(name, hyper, causal=causal, lengths=LENGTHS)


@causal_or_not
@pytest.mark.parametrize('name', KNOWN_AHEAD)
def test_default_sizes_cover_too(name, causal):
    for length in LENGTHS:
        missed = patterns.support(length, causal=causal) - combiner.pattern(name, length, causal=causal).coverage()
        assert (missed >= 0).all()
        assert not (name in combiner.names(full_support=True) and missed.any()), f'length {length}'


@causal_or_not
@pytest.mark.parametrize('split', [False, True])
def test_coverage_of_horizontal_spans_and_mixtures(split, causal):
    for length in (*range(1, 30), 64, 65):
        support = patterns.support(length, causal=causal)
        for value in SIZES:
            options = {'causal': causal, 'columns': value, 'split': split}
            horizontal = combiner_axial_horizontal.pattern(length, **options)
            assert (horizontal.coverage() == support).all(), (length, value)
            assert len(np.unique(horizontal.spans, axis=0)) == len(horizontal.spans)
            mean, joint = (f(length, **options) for f in (combiner_mixture.pattern, combiner_mixture.joint_pattern))
            assert (mean.coverage() == support).all()
            assert (joint.coverage() == 2 * support - joint.direct).all()


def test_sparse_fixed_with_a_longer_summary():
    pattern = fixed.pattern(7, causal=True, block=3, summary=2)
    assert pattern.direct[6].tolist() == [False, True, True, False, True, True, True]


def test_combiner_fixed_by_hand():
    pattern = combiner_fixed.pattern(5, causal=True, block=2)
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
    pattern = combiner_axial_rowmajor.pattern(5, causal=False, columns=2)
    assert pattern.anchors is not None
    used_from_3 = [
        (pattern.anchors[s], np.flatnonzero(pattern.spans[s]).tolist()) for s in np.flatnonzero(pattern.uses[3])
    ]
    assert used_from_3 == [(1, [0, 1]), (patterns.NO_ANCHOR, [4])]


def spans_used_from(pattern, position):
    return sorted(np.flatnonzero(pattern.spans[s]).tolist() for s in np.flatnonzero(pattern.uses[position]))


def test_vertical_by_hand():
    pattern = combiner_axial_vertical.pattern(8, causal=True, columns=3)  # rows 0 1 2, 3 4 5, 6 7
    assert np.flatnonzero(pattern.direct[7]).tolist() == [1, 4, 6, 7]
    assert spans_used_from(pattern, 7) == [[0, 3], [2, 5]]
    assert spans_used_from(pattern, 3) == [[1], [2]]
    assert pattern.cost() == patterns.Cost(15 + 7 + 10, 3 + 3 * 2)  # in rows, in columns, of spans
    both = combiner_axial_vertical.pattern(8, causal=False, columns=3)
    assert spans_used_from(both, 4) == [[0], [2], [6]]
    assert np.flatnonzero(both.direct[4]).tolist() == [1, 3, 4, 5, 7]


def test_horizontal_by_hand():
    pattern = combiner_axial_horizontal.pattern(8, causal=True, columns=3)
    assert np.flatnonzero(pattern.direct[7]).tolist() == [1, 4, 6, 7]
    assert spans_used_from(pattern, 7) == [[0, 2], [3, 5]]
    halves = combiner_axial_horizontal.pattern(8, causal=True, columns=3, split=True)
    assert spans_used_from(halves, 7) == [[0], [2], [3], [5]]
    assert spans_used_from(halves, 6) == [[1, 2], [4, 5]]
    both = combiner_axial_horizontal.pattern(8, causal=False, columns=3)
    assert spans_used_from(both, 2) == [[3, 4], [6, 7]]
    assert spans_used_from(both, 0) == [[4, 5], [7]]


def test_parts_with_the_same_direct_terms_count_them_once():
    parts = combiner_mixture.pattern(12, causal=True, columns=4).parts
    direct = int(parts[0].direct.sum())
    both = sum(part.cost().terms for part in parts)
    assert patterns.Mixture(parts).cost().terms == both - direct
    other = combiner_fixed.pattern(12, causal=True, block=4)
    assert patterns.Mixture((parts[0], other)).cost().terms == parts[0].cost().terms + other.cost().terms


def test_logsparse_by_hand():
    pattern = combiner_logsparse.pattern(8, causal=True)
    assert [np.flatnonzero(reached).tolist() for reached in pattern.direct[[0, 5, 6, 7]]] == [[0], [4, 5], [6], [6, 7]]
    assert spans_used_from(pattern, 6) == [[0, 1, 2, 3], [4, 5]]
    assert spans_used_from(pattern, 5) == [[0, 1, 2, 3]]
    both = combiner_logsparse.pattern(7, causal=False)
    assert spans_used_from(both, 1) == [[2, 3], [4, 5, 6]]
    assert np.flatnonzero(both.direct[6]).tolist() == [6]


def test_tree_by_hand():
    pattern = combiner_tree.pattern(20, causal=True, branch=3)
    assert np.flatnonzero(pattern.direct[16]).tolist() == [15, 16]
    assert spans_used_from(pattern, 16) == [list(range(9)), [9, 10, 11], [12, 13, 14]]
    positions, nested = pattern.parts()
    (whole,) = np.flatnonzero(pattern.spans.sum(axis=1) == 9)[:1]
    assert not positions[whole].any()
    assert [np.flatnonzero(pattern.spans[s]).tolist() for s in np.flatnonzero(nested[whole])] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


def test_a_tree_of_two_levels_is_combiner_fixed():
    for causal in (True, False):
        tree, fixed = (
            f(23, causal=causal, **size)
            for f, size in ((combiner_tree.pattern, {'branch': 5}), (combiner_fixed.pattern, {'block': 5}))
        )
        for part in ('direct', 'spans', 'uses'):
            np.testing.assert_array_equal(getattr(tree, part), getattr(fixed, part))


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
