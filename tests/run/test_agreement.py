import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from combiner.run import agreement


@pytest.fixture
def others(monkeypatch):
    """The texts of the processes 1, 2, …, where this one is process 0."""
    found = []

    def gathered(data):
        return np.stack([data, *map(agreement.compared, found)])

    monkeypatch.setattr(jax, 'process_count', lambda: 1 + len(found))
    monkeypatch.setattr(multihost_utils, 'process_allgather', gathered)
    return found


def test_a_process_alone_agrees_with_itself():
    assert agreement.difference('anything') is None
    assert agreement.in_all(True)
    assert not agreement.in_all(False)


def test_one_process_is_enough_for_a_no(monkeypatch):
    monkeypatch.setattr(multihost_utils, 'process_allgather', lambda fact: np.array([fact, fact, ~fact]))
    assert not agreement.in_all(True)


def test_the_first_process_that_differs_is_named(others):
    others += ['same', 'other', 'third']
    assert agreement.difference('same') == agreement.Difference(2, 'same', 'other', '')
    others[:] = ['same', 'same']
    assert agreement.difference('same') is None


def test_long_texts_may_differ_behind_what_is_shown(others):
    long = 'ä' * 900  # two bytes each: cut in the middle of what is shown
    others += [f'{long}b']
    found = agreement.difference(f'{long}a')
    assert (found.process, found.first) == (1, found.other)
    assert found.later == 'they differ after the first 1,000 bytes'
