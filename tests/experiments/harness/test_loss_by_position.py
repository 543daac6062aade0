import sys

import numpy as np
import pytest
import tiny

from combiner import evaluate
from combiner.data import tasks
from experiments.harness import loss_by_position


@pytest.mark.parametrize(
    ('length', 'expected'),
    [
        (1, [(0, 0)]),
        (2, [(0, 0), (1, 1)]),
        (5, [(0, 0), (1, 1), (2, 3), (4, 4)]),
        (16, [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]),
    ],
)
def test_ranges_double_and_leave_nothing_out(length, expected):
    nats, weights = np.arange(length) * 3.0, np.full(length, 3.0)
    found = loss_by_position.in_ranges(nats, weights)
    assert [(loss.first, loss.last) for loss in found] == expected
    assert [loss.nats for loss in found] == [(loss.first + loss.last) / 2 for loss in found]
    assert sum(loss.targets for loss in found) == 3 * length


def test_positions_without_targets_are_passed_over():
    (loss,) = loss_by_position.in_ranges(np.array([9.0, 2.0, 0.0]), np.array([0.0, 4.0, 0.0]))
    assert loss == (1, 1, 0.5, 4)


def test_the_mean_over_positions_is_the_evaluation(workdir):
    found = loss_by_position.loss_by_position(workdir)
    total = sum(loss.nats * loss.targets for loss in found)
    assert total == pytest.approx(evaluate.evaluate(workdir)['nats'], rel=1e-5)
    assert sum(loss.targets for loss in loss_by_position.loss_by_position(workdir, examples=3)) == 3 * 48


def test_command(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['loss_by_position', '--workdir', str(workdir), '--examples', '2'])
    loss_by_position.command(None)
    lines = capsys.readouterr().out.splitlines()
    table = ['positions', '0-0', '1-1', '2-3', '4-7', '8-15', '16-31', '32-47']
    assert [line.split()[0] for line in lines] == ['workdir:', 'data:', 'parameters:', *table, 'next:']


def test_other_heads_are_refused(workdir, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, 'tiny', lambda: tiny.task('tiny', 'masked_language_model'))
    with pytest.raises(ValueError, match='has the head masked_language_model; only a language_model goes from left'):
        loss_by_position.loss_by_position(workdir)
