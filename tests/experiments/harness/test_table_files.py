import json
import math

import finished
import pytest

from experiments.harness import results_page, table, table_files
from experiments.harness import run as runs


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)


def completed(row, folder, seeds):
    found = [finished.run(row, folder, seed) for seed in range(seeds)]
    for run in found:
        assert runs.complete(run, finished.Fake()) is None
    return found


def text_of(planned):
    return table_files.markdown({'name': 'small', 'scale': 'quick', 'rows': table_files.rows_of(planned)})


def test_columns_stand_side_by_side_and_what_is_absent_is_blank(tmp_path):
    full, larger = finished.row('Full', published=3.4), finished.row('Full', 'Larger')
    fixed = finished.row('Fixed', published=3.325)
    planned = [*completed(full, tmp_path, 3), finished.run(larger, tmp_path), *completed(fixed, tmp_path, 1)]
    lines = text_of(planned).splitlines()
    half_width = 4.302653 * 0.5 / math.sqrt(3)
    assert lines[0] == '# small, scale=quick'
    assert lines[2:6] == [
        '| model | Photos, published | Photos, ours | Larger, published | Larger, ours |',
        '| --- | --- | --- | --- | --- |',
        f'| Full | 3.400 | 4.500 ± {half_width:.3f} |  |  |',
        '| Fixed | 3.325 | 4.000 |  |  |',
    ]
    assert lines[9:11] == [
        '| Full | Photos | 3 | 1,200 | 7,372,800 | 2.3 | 1.5 | 100 |',
        '| Fixed | Photos | 1 | 1,200 | 7,372,800 | 2.3 | 1.5 | 100 |',
    ]
    assert 'Photos: photos 16x16, 1,853 examples, each target given all before.' in lines
    assert 'Run on abacus (x86_64, 2 cores), python 3.11, jax 0.10, commit abc.' in lines


def test_accuracy_is_shown_in_percent(tmp_path):
    row = finished.row('Full', 'ListOps', metric='accuracy', published=0.3665)
    run = finished.run(row, tmp_path)
    finished.train(run.workdir, run.config_arguments())
    finished.evaluate(run.workdir, 0.37126, 'accuracy')
    text = text_of([run])
    assert '| Full | 36.65 | 37.13 |' in text
    assert '| Full | ListOps | 1 | 1,200 | 7,372,800 | 2.3 | 1.5 |  |' in text
    assert 'accuracy in %: ListOps.' in text
    assert 'Run on a machine that was not recorded.' in text


def test_rows_that_are_evaluated_in_several_ways_show_all(tmp_path):
    planned = completed(finished.row('Full', published=3.4), tmp_path, 3)
    before = text_of(planned)
    assert 'evaluation=' not in before
    for run in planned:
        path = run.workdir / runs.EVALUATION
        found = json.loads(path.read_text())
        both = {'stream': {'bits_per_dim': found['bits_per_dim']}, 'documents': {'bits_per_dim': 5.0}}
        path.write_text(json.dumps(found | {'evaluations': both}))
    text = text_of(planned)
    half_width = 4.302653 * 0.5 / math.sqrt(3)
    assert '| model | column | evaluation=stream | evaluation=documents |' in text
    assert f'| Full | Photos | 4.5 ± {half_width:.1f} | 5.0 ± 0.0 |' in text


def test_runs_of_another_machine_are_named(tmp_path, monkeypatch):
    planned = completed(finished.row('Full'), tmp_path, 2)
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT | {'commit': None, 'device': 'slide rule'})
    planned += completed(finished.row('Fixed'), tmp_path, 1)
    text = text_of(planned)
    assert 'Run on abacus (' in text
    assert 'Photos, Fixed, seed 0: on slide rule (x86_64, 2 cores), python 3.11, jax 0.10, commit unknown.' in text


def test_a_seed_that_diverged_is_said_to_be_left_out(tmp_path):
    planned = completed(finished.row('Full'), tmp_path, 3)
    (planned[1].workdir / runs.EVALUATION).unlink()
    with (planned[1].workdir / 'log.txt').open('a') as log:
        log.write('error: training diverged at step 7: loss_nats nan\n')
    with (planned[2].workdir / 'log.txt').open('a') as log:
        log.write('error: training diverged at step 7: loss_nats nan\n')  # before it was repeated by hand
    (row,) = table_files.rows_of(planned)
    assert ([run['seed'] for run in row['runs']], row['diverged']) == ([0, 2], [1])
    said = 'Photos, Full: training with seed 1 diverged and has no result; the mean leaves it out.'
    assert said in text_of(planned)
    assert said in results_page.section('table1', {'scale': 'small', 'rows': [row]})


def test_the_cost_of_a_pretrained_row_is_said_to_be_without_pretraining(tmp_path):
    (row,) = table_files.rows_of(completed(finished.row('Full'), tmp_path, 1))
    said = 'peak memory are those of the training that follows, without the pretraining.'
    assert said in '\n'.join(table.notes([{**row, 'pretrain': 'mlm'}]))
    assert said not in '\n'.join(table.notes([row]))


def test_nothing_was_run(tmp_path):
    planned = [finished.run(finished.row('Full', published=3.4), tmp_path)]
    text = table_files.write_table('small', 'quick', planned, tmp_path)
    assert '| Full | 3.4 |  |' in text
    assert 'No run is finished yet.' in text
    assert not (tmp_path / 'small.png').exists()


def test_the_picture_of_another_scale_is_removed_but_not_that_of_an_earlier_version(tmp_path):
    (tmp_path / 'small.png').touch()
    table = {
        'name': 'small',
        'scale': 'quick',
        'rows': table_files.rows_of([finished.run(finished.row('Full'), 'runs')]),
    }
    table_files.write(table, tmp_path / 'small')
    assert (tmp_path / 'small.png').exists()
    table_files.write({**table, 'curves': []}, tmp_path / 'small')
    assert not (tmp_path / 'small.png').exists()
