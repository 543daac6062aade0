"""The mechanism computes what its pattern says."""

import pytest
from mylab.past import WholePast

from combiner import testing


@pytest.mark.parametrize('block', [1, 5, 30])
def test_every_position_reaches_all_before_it_once(block):
    testing.check_coverage('mylab.past:WholePast', {'block': block}, causal=True)


def test_outputs_gradients_padding_and_decoding_are_right():
    print(testing.check('mylab.past:WholePast', block=5))


def test_it_costs_less_than_full_attention():
    length = 1024
    assert WholePast(block=32).cost(length).total < length * (length + 1) / 2 / 10
