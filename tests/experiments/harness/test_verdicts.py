import pytest

from experiments.harness import verdicts

CLAIMS = (verdicts.Claim('Images', 'Combiner', 'Axial', clearly=True), verdicts.Claim('Images', 'Fixed', 'Axial'))


def row(column, model, mean, interval, metric='bits_per_dim'):
    return {'column': column, 'model': model, 'metric': metric, 'ours': {'mean': mean, 'interval': interval}}


@pytest.mark.parametrize(
    ('mean', 'interval', 'verdict', 'word'),
    [
        (4.8, 0.05, {'shown': True, 'clear': True, 'holds': True}, 'clearly'),
        (4.8, 0.15, {'shown': True, 'clear': False, 'holds': False}, 'yes'),
        (4.8, None, {'shown': True, 'clear': False, 'holds': False}, 'yes'),
        (5.2, 0.01, {'shown': False, 'clear': False, 'holds': False}, 'no'),
    ],
)
def test_clearly_takes_intervals_that_do_not_meet(mean, interval, verdict, word):
    rows = [row('Images', 'Combiner', mean, interval), row('Images', 'Axial', 5.0, 0.1)]
    (judged,) = verdicts.judge(CLAIMS, rows)
    assert {key: judged[key] for key in verdict} == verdict
    assert judged['gain'] == pytest.approx(5.0 - mean)
    half = '' if interval is None else f' ± {interval:.3f}'
    assert verdicts.table([judged]).endswith(
        f'| Images | Combiner | {mean:.3f}{half} | Axial | 5.000 ± 0.100 | {word} |'
    )


def test_for_other_claims_the_means_are_enough():
    rows = [row('Images', 'Fixed', 4.9, 0.5), row('Images', 'Axial', 5.0, 0.5)]
    (judged,) = verdicts.judge(CLAIMS, rows)
    assert (judged['clear'], judged['holds']) == (False, True)


def test_chance_is_to_be_cleared():
    rows = [row('ListOps', model, 0.35, half, 'accuracy') for model, half in (('Fixed', 0.1), ('Tree', 0.2))]
    fixed, tree = verdicts.above_chance(rows, 0.2)
    assert (fixed['holds'], tree['holds'], tree['shown']) == (True, False, True)
    line = '| ListOps | Fixed | 35.0 ± 10.0 % | the most frequent class | 20.0 % | clearly |'
    assert line in verdicts.table([fixed, tree])


@pytest.mark.parametrize(('examples', 'half', 'clear'), [(2_000, 0.0209, True), (100, 0.0935, False)])
def test_one_seed_has_the_interval_of_its_test_examples(examples, half, clear):
    alone = row('ListOps', 'Fixed', 0.35, None, 'accuracy') | {'runs': [{'examples': examples}]}
    (judged,) = verdicts.above_chance([alone], 0.27)
    assert judged['better']['interval'] == pytest.approx(half, abs=1e-4)
    assert judged['clear'] == clear


def test_rows_that_were_not_run_have_no_verdict():
    not_run = {**row('Images', 'Fixed', 1, 1), 'ours': {}}
    assert verdicts.judge(CLAIMS, [row('Images', 'Axial', 5.0, 0.1), not_run]) == []
    assert verdicts.above_chance([not_run], 0.2) == []


def test_accuracies_stand_side_by_side():
    rows = [row('ListOps', model, 0.35, half, 'accuracy') for model, half in (('Fixed', 0.1), ('Tree', 0.2))]
    others = [row('Pathfinder', 'Tree', 0.75, 0.05, 'accuracy')]
    assert verdicts.accuracies(
        [*verdicts.above_chance(rows, 0.2), *verdicts.above_chance(others, 0.5)]
    ).splitlines() == [
        '| model | ListOps | Pathfinder |',
        '| --- | --- | --- |',
        '| Fixed | 35.0 ± 10.0 % |  |',
        '| Tree | 35.0 ± 20.0 % (not clearly) | 75.0 ± 5.0 % |',
        '| *the most frequent class* | *20.0 %* | *50.0 %* |',
    ]
