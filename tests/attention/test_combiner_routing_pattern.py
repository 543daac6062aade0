import numpy as np
import pytest
from cases import assignments, causal_or_not

from combiner import patterns
from combiner.attention import combiner_routing


@causal_or_not
@pytest.mark.parametrize('block', [3, 16])
def test_coverage_is_the_support_for_any_assignment(block, causal):
    for length in (*range(1, 131), 255, 256, 257):
        support = patterns.support(length, causal=causal)
        bound = combiner_routing.cost(length, block, 5, causal=causal)
        for name, clusters in assignments(length).items():
            pattern = combiner_routing.pattern(clusters, causal=causal, block=block)
            assert (pattern.coverage() == support).all(), (name, length)
            assert (pattern.direct.diagonal()).all()
            cost = pattern.cost()
            assert cost.terms <= bound.terms, (name, length)
            assert cost.members <= bound.members, (name, length)


def test_padding_is_in_no_span():
    clusters = np.array([0, -1, 0, 1, -1, 0])
    pattern = combiner_routing.pattern(clusters, causal=True, block=2)
    expected = np.tri(6) * (clusters >= 0) * (clusters >= 0)[:, None]
    np.testing.assert_array_equal(pattern.coverage(), expected)


def test_pattern_by_hand():
    pattern = combiner_routing.pattern(np.array([0, 1, 0, 0, 1]), causal=True, block=2)
    assert [np.flatnonzero(row).tolist() for row in pattern.direct] == [[0], [1], [0, 2], [3], [1, 4]]
    used = [[np.flatnonzero(pattern.spans[s]).tolist() for s in np.flatnonzero(row)] for row in pattern.uses]
    assert used == [[], [[0]], [[1]], [[1], [0, 2]], [[0, 2], [3]]]
    pattern = combiner_routing.pattern(np.array([0, 1, 0, 0, 1]), causal=False, block=2)
    assert [np.flatnonzero(row).tolist() for row in pattern.spans] == [[0, 2], [1, 4], [3]]
    assert pattern.uses.tolist() == (~pattern.spans.T).tolist()


def test_with_small_clusters_it_is_the_papers_partition():
    clusters = np.random.default_rng(0).integers(0, 4, 40)
    pattern = combiner_routing.pattern(clusters, causal=True, block=40)
    same = clusters[:, None] == clusters
    np.testing.assert_array_equal(pattern.direct, same & np.tri(40, dtype=bool))
    for i in range(40):
        spans = {tuple(np.flatnonzero(span)) for span in pattern.spans[pattern.uses[i]]}
        others = {tuple(np.flatnonzero(clusters[: i + 1] == g)) for g in set(clusters[: i + 1]) - {clusters[i]}}
        assert spans == others
