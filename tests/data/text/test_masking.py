import numpy as np
import pytest

from combiner.data.text.masking import mask_tokens

MASK = 3
ORDINARY = range(4, 1004)


def masked(tokens, countable, seed=0):
    return mask_tokens(tokens, countable, np.random.default_rng([seed, 1]), mask_id=MASK, ordinary=ORDINARY)


@pytest.mark.parametrize(
    ('countable', 'drawn'), [(0, 0), (1, 1), (3, 1), (9, 1), (10, 2), (20, 3), (100, 15), (111, 17)]
)
def test_exactly_fifteen_percent_of_what_is_countable(countable, drawn):
    tokens = np.arange(4, 134, dtype=np.int32)
    allowed = np.random.default_rng(0).permutation(130) < countable
    for seed in range(20):
        inputs, weights = masked(tokens, allowed, seed)
        assert weights.sum() == drawn
        assert weights.dtype == np.float32
        assert inputs.dtype == np.int32
        assert set(weights.tolist()) <= {0, 1}
        assert not weights[~allowed].any()
        np.testing.assert_array_equal(inputs[weights == 0], tokens[weights == 0])


def test_eighty_ten_ten():
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 1004, 400_000).astype(np.int32)
    inputs, weights = masked(tokens, np.ones(tokens.shape, bool))
    inputs, tokens = inputs[weights == 1], tokens[weights == 1]
    count = len(tokens)
    assert count == 60_000
    # Three standard deviations of a binomial of 60,000 are 0.5 and 0.37 %.
    assert np.mean(inputs == MASK) == pytest.approx(0.8, abs=0.005)
    # One in a thousand of the random tokens is the original.
    assert np.mean(inputs == tokens) == pytest.approx(0.1 + 0.1 / 1000, abs=0.004)
    others = inputs[(inputs != MASK) & (inputs != tokens)]
    assert len(others) / count == pytest.approx(0.1, abs=0.004)
    assert (others.min(), others.max()) == (4, 1003)
    frequencies = np.bincount(others, minlength=1004)[4:] / len(others)
    assert abs(frequencies - 0.001).max() < 0.0025


def test_every_position_is_drawn_equally_often():
    tokens = np.full(40, 9, np.int32)
    weights = np.mean([masked(tokens, np.ones(40, bool), seed)[1] for seed in range(4000)], axis=0)
    assert abs(weights - 0.15).max() < 0.025


def test_a_pure_function_of_its_arguments():
    tokens = np.arange(4, 104, dtype=np.int32)
    before = tokens.copy()
    first, again, other = (masked(tokens, np.ones(100, bool), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[1], other[1])
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize('ordinary', [range(5, 5), range(4, 100, 2)])
def test_no_ordinary_tokens(ordinary):
    with pytest.raises(ValueError, match='must be a range of one or more consecutive ids'):
        mask_tokens(
            np.full(9, 9, np.int32), np.ones(9, bool), np.random.default_rng(0), mask_id=MASK, ordinary=ordinary
        )


def test_shapes_that_differ():
    function = getattr(mask_tokens, '__wrapped__', mask_tokens)  # past the shape check of the tests, as for a user
    with pytest.raises(ValueError, match=r'countable has shape \(8,\), but must have the shape \(9,\)'):
        function(np.full(9, 9, np.int32), np.ones(8, bool), np.random.default_rng(0), mask_id=MASK, ordinary=ORDINARY)
