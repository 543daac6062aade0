import json
import math

import finished
import pytest

from experiments.harness import run as runs
from experiments.harness import table


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)


def completed(row, folder, seeds):
    found = [finished.run(row, folder, seed) for seed in range(seeds)]
    for run in found:
        assert runs.complete(run, finished.Fake()) is None
    return found


def test_the_interval_is_students():
    # Mean 2, standard deviation 1; t of 2 degrees of freedom is 4.3027.
    assert table.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert table.interval([1.0]) is None


def test_columns_stand_side_by_side_and_what_is_absent_is_blank(tmp_path):
    full, larger = finished.row('Full', published=3.4), finished.row('Full', 'Larger')
    fixed = finished.row('Fixed', published=3.325)
    planned = [*completed(full, tmp_path, 3), finished.run(larger, tmp_path), *completed(fixed, tmp_path, 1)]
    lines = table.markdown(table.document('small', 'quick', planned)).splitlines()
    half_width = 4.302653 * 0.5 / math.sqrt(3)
    assert lines[0] == '# small, scale=quick'
    assert lines[2:6] == [
        '| model | Photos, published | Photos, ours | Larger, published | Larger, ours |',
        '| --- | --- | --- | --- | --- |',
        f'| Full | 3.400 | 4.500 ± {half_width:.3f} |  |  |',
        '| Fixed | 3.325 | 4.000 |  |  |',
    ]
    assert lines[9:11] == [
        '| Full | Photos | 3 | 100 | 614,400 | 2.3 | 1.5 | 100 |',
        '| Fixed | Photos | 1 | 100 | 614,400 | 2.3 | 1.5 | 100 |',
    ]
    assert 'Photos: photos 16x16, 1,853 examples, each target given all before.' in lines
    assert 'Run on abacus (x86_64, 2 cores), python 3.11, jax 0.10, commit abc.' in lines


def test_accuracy_is_shown_in_percent(tmp_path):
    row = finished.row('Full', 'ListOps', metric='accuracy', published=0.3665)
    run = finished.run(row, tmp_path)
    finished.train(run.workdir, run.config_arguments())
    finished.evaluate(run.workdir, 0.37126, 'accuracy')
    text = table.markdown(table.document('lra', 'quick', [run]))
    assert '| Full | 36.65 | 37.13 |' in text
    assert '| Full | ListOps | 1 | 100 | 614,400 | 2.3 | 1.5 |  |' in text
    assert 'accuracy in %: ListOps.' in text
    assert 'Run on a machine that was not recorded.' in text


def test_rows_that_are_evaluated_in_several_ways_show_all(tmp_path):
    planned = completed(finished.row('Full', published=3.4), tmp_path, 3)
    before = table.markdown(table.document('small', 'quick', planned))
    assert 'evaluation=' not in before
    for run in planned:
        path = run.workdir / runs.EVALUATION
        found = json.loads(path.read_text())
        both = {'stream': {'bits_per_dim': found['bits_per_dim']}, 'documents': {'bits_per_dim': 5.0}}
        path.write_text(json.dumps(found | {'evaluations': both}))
    text = table.markdown(table.document('small', 'quick', planned))
    half_width = 4.302653 * 0.5 / math.sqrt(3)
    assert '| model | column | evaluation=stream | evaluation=documents |' in text
    assert f'| Full | Photos | 4.5 ± {half_width:.1f} | 5.0 ± 0.0 |' in text


def test_runs_of_another_machine_are_named(tmp_path, monkeypatch):
    planned = completed(finished.row('Full'), tmp_path, 2)
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT | {'commit': None, 'device': 'slide rule'})
    planned += completed(finished.row('Fixed'), tmp_path, 1)
    text = table.markdown(table.document('small', 'quick', planned))
    assert 'Run on abacus (' in text
    assert 'Photos, Fixed, seed 0: on slide rule (x86_64, 2 cores), python 3.11, jax 0.10, commit unknown.' in text


def test_nothing_was_run(tmp_path):
    planned = [finished.run(finished.row('Full', published=3.4), tmp_path)]
    text = table.write_table('small', 'quick', planned, tmp_path)
    assert '| Full | 3.4 |  |' in text
    assert 'Nothing was run yet.' in text
    assert not (tmp_path / 'small.png').exists()


def test_curves_are_the_median_and_the_range_of_seeds(tmp_path):
    rows = [finished.row('Full'), finished.row('Full', 'Larger'), finished.row('Fixed')]
    planned = [run for row in rows for run in completed(row, tmp_path, 3)]
    for run in planned:
        lines = [f'{{"step": {step}, "validation_bits_per_dim": {9 - step + run.seed**2}}}' for step in (1, 2)]
        (run.workdir / 'metrics.jsonl').write_text('\n'.join(lines))
    figure = table.figure(planned)
    assert [ax.get_title(loc='left') for ax in figure.axes] == ['Photos', 'Larger']
    full, fixed = figure.axes[0].lines
    assert full.get_ydata() == pytest.approx([9, 8])
    assert full.get_color() != fixed.get_color()
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (7, 12)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['Full', 'Fixed']


@pytest.mark.parametrize(
    ('pairs', 'expected'),
    [
        ([(3.0, 5.0), (2.0, 4.0), (1.0, 4.5), (4.0, 9.0)], 0.8),
        ([(3.0, 1.0), (2.0, 2.0), (1.0, 3.0), (None, 4.0), (0.5, None)], -1.0),
        ([(3.0, 1.0), (2.0, 2.0)], None),  # too few
        ([(3.0, 1.0), (2.0, 1.0), (1.0, 1.0)], None),  # no order
        ([(3.0, 5.0), (3.0, 4.0), (3.0, 3.0)], None),
    ],
)
def test_the_order_is_compared_with_the_published_one(pairs, expected):
    rows = [
        {'column': 'Photos', 'published': published, 'ours': {} if mean is None else {'mean': mean}}
        for published, mean in pairs
    ]
    count = sum(None not in pair for pair in pairs)
    other = {'column': 'Other', 'published': None, 'ours': {'mean': 1.0}}
    ((column, found),) = table.rank_correlations([*rows, other]).items()
    assert column == 'Photos'
    assert found == (None if expected is None else pytest.approx(expected), count)
