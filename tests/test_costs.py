"""Closed forms against counts."""

import numpy as np
import pytest
from cases import causal_or_not, every_mechanism

from combiner.attention import (
    combiner_axial_horizontal,
    combiner_axial_rowmajor,
    combiner_axial_vertical,
    combiner_fixed,
    combiner_logsparse,
    combiner_mixture,
    combiner_tree,
)
from combiner.baselines import axial, fixed
from combiner.core import registry

SIZES = (1, 2, 3, 5, 8, 16, 200)


@causal_or_not
@every_mechanism
def test_cost_in_closed_form_is_the_count(name, hyper, causal):
    mechanism = registry.make_mechanism(name, hyper, causal=causal)
    for length in (1, 2, 3, 7, 16, 17, 64, 65, 130):
        assert mechanism.cost(length) == mechanism.pattern(length).cost()


@causal_or_not
@pytest.mark.parametrize(
    ('mechanism', 'size'),
    [
        (fixed, 'block'),
        (axial, 'columns'),
        (combiner_fixed, 'block'),
        (combiner_axial_rowmajor, 'columns'),
        (combiner_axial_vertical, 'columns'),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition('.')[2],
)
def test_cost_in_closed_form_for_every_shape_of_the_last_row(mechanism, size, causal):
    for length in (*range(1, 40), 64, 65):
        for value in SIZES:
            pattern = mechanism.pattern(length, causal=causal, **{size: value})
            assert mechanism.cost(length, value, causal=causal) == pattern.cost(), (length, value)


@causal_or_not
@pytest.mark.parametrize('split', [False, True])
def test_horizontal_spans_and_mixtures(split, causal):
    for length in (*range(1, 30), 64, 65):
        for value in SIZES:
            options = {'causal': causal, 'columns': value, 'split': split}
            horizontal = combiner_axial_horizontal.pattern(length, **options).cost()
            assert combiner_axial_horizontal.cost(length, value, split, causal=causal) == horizontal, (length, value)
            mean, joint = (f(length, **options) for f in (combiner_mixture.pattern, combiner_mixture.joint_pattern))
            cost = combiner_mixture.cost(length, value, split, causal=causal)
            assert cost == mean.cost() == joint.cost(), (length, value)


@causal_or_not
def test_logsparse_and_trees(causal):
    for length in (*range(1, 131), 255, 256, 257):
        assert (
            combiner_logsparse.cost(length, causal=causal) == combiner_logsparse.pattern(length, causal=causal).cost()
        )
        for branch in (2, 3, 8, 200):
            cost = combiner_tree.pattern(length, causal=causal, branch=branch).cost()
            assert combiner_tree.cost(length, branch, causal=causal) == cost, (length, branch)


def test_sparse_fixed_with_a_longer_summary():
    assert fixed.cost(7, 3, 2, causal=True) == fixed.pattern(7, causal=True, block=3, summary=2).cost()


def test_cost_grows_like_the_square_root():
    costs = [registry.make_mechanism('combiner_fixed', causal=True).cost(4**k).total / 4**k for k in (5, 6, 7, 8)]
    assert np.allclose(np.divide(costs[1:], costs[:-1]), 2, rtol=0.1)
