"""The page of results has what results/ has, and says what has not been run."""

import json
from pathlib import Path

from experiments.harness import marked, results_page

ROOT = Path(__file__).parents[3]


def row(model, published=None, mean=None, column='Photos'):
    codecs = {'png': 5.0, 'webp_lossless': 4.25, 'order0_entropy': 7.5}
    run = {'seed': 0, 'value': mean, 'dataset': 'tiles', 'commit': 'abc', 'codecs_bits_per_dim': codecs}
    runs = [run] if mean else []
    ours = {'seeds': 1, 'mean': mean, 'interval': None} if mean else {}
    return {
        **{'model': model, 'column': column, 'metric': 'bits_per_dim', 'published': published},
        **{'ours': ours, 'runs': runs},
    }


def test_the_page_is_that_of_results():
    page = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    new = marked.filled(page, results_page.parts(ROOT / 'results'))
    assert new == page, 'docs/results.md is old: python -m experiments.tables.page'


def test_what_the_paper_has_no_value_for_has_no_column_of_them():
    text = results_page.section('recall', {'scale': 'cpu', 'rows': [row('Full', None, 4.5)]})
    assert '| Photos | ours, bits/dim | seeds |' in text
    assert '| Full | 4.500 | 1 |' in text
    assert 'published' not in text


def test_the_readme_has_the_rows_that_were_run(tmp_path):
    rows = [row('Axial', 3.666, 4.99), row('Fixed', 3.408), row('Full', None, 4.5), row('Axial', 1.0, 2.0, 'Other')]
    rows.append(row('Local', 3.5, 4.0))
    rows[-1]['runs'][0]['codecs_bits_per_dim'] = {'webp_lossless': 4.0}  # other images
    (tmp_path / 'table1.json').write_text(json.dumps({'scale': 'small', 'rows': rows}), encoding='utf-8')
    lines = results_page.readme_parts(tmp_path, 'Photos')['table1'].splitlines()
    assert lines == [
        '| Photos | published, bits/dim | ours, bits/dim |',
        '| --- | --- | --- |',
        '| Axial | 3.666 | 4.990 |',
        '| Full |  | 4.500 |',
        '| *WebP, lossless* |  | *4.250* |',
    ]
    assert results_page.readme_parts(tmp_path, 'Nothing')['table1'] == 'Not run yet.'


def test_photographs_are_ranked_with_the_codecs_in_their_place(tmp_path):
    rows = [row('axial', None, 4.75), row('full', None, 4.1), row('fixed')]
    rows[0]['ours']['train_minutes'], rows[1]['ours']['train_minutes'] = 2.04, None
    (tmp_path / 'photos.json').write_text(json.dumps({'scale': 'cpu', 'rows': rows}), encoding='utf-8')
    assert results_page.parts(tmp_path)['photos'].splitlines() == [
        '| attention | bits/dim | minutes of training |',
        '| --- | --- | --- |',
        '| `full` | 4.100 |  |',
        '| *WebP, lossless* | *4.250* |  |',
        '| `axial` | 4.750 | 2.0 |',
        '| *PNG* | *5.000* |  |',
        '| *order-0 entropy* | *7.500* |  |',
    ]
    (tmp_path / 'photos.json').unlink()
    assert results_page.parts(tmp_path)['photos'] == 'Not run yet.'


def test_the_correlation_with_the_published_order_is_said():
    rows = [row('a', 3.0, 5.0), row('b', 2.0, 4.0), row('c', 1.0, 4.5), row('d', None, 9.0)]
    text = results_page.section('table1', {'scale': 'small', 'rows': rows})
    assert 'Rank correlation of ours with the published order: 0.50 (3 rows).' in text
    assert 'Rank correlation' not in results_page.section('table1', {'scale': 'small', 'rows': rows[1:]})


def test_a_table_with_a_part_of_its_rows():
    costs = {'rows': [{'column': 'Photos', 'model': 'Axial', 'seconds_per_step': 0.125, 'memory_mb': 1234.4}]}
    rows = [row('Axial', 3.666, 4.99), row('Full', None, 4.5), row('Fixed', 3.408), row('Axial', None, None, 'Other')]
    text = results_page.section('table1', {'scale': 'small', 'rows': rows, 'costs': [costs]})
    assert '| Axial | 3.666 | 4.990 | 1 | 0.125 | 1,234 |' in text
    assert '| Full |  | 4.500 | 1 |  |  |' in text
    assert '| Fixed | 3.408 |  |  |  |  |' in text
    assert 'Ours on tiles. Codecs on the same images: PNG 5.000, WebP, lossless 4.250, order-0 entropy 7.500.' in text
    assert 'scale=small, runs: 2, at commit `abc`. Without a result: 2 of 4 rows.' in text
    assert 'Other' not in text
    assert 'experiments.tables.table1' in text


def test_a_commit_that_was_not_recorded_is_said_to_be_so():
    known, unknown = row('Axial', None, 4.99), row('Full', None, 4.5)
    unknown['runs'][0]['commit'] = None
    text = results_page.section('table1', {'scale': 'small', 'rows': [known, unknown]})
    assert 'at commit `abc`, one that was not recorded.' in text


def test_steps_that_were_timed_apart_are_said_to_be():
    machine = {'device': 'abacus', 'machine': 'x86_64', 'cores': 2, 'commit': 'abc', 'rounds': 5}
    cost = {'column': 'Photos', 'seconds_per_step': 0.125, 'memory_mb': 1234.4, 'compile_seconds': 1.0}
    costs = [{**machine, 'rows': [{**cost, 'model': model}]} for model in ('Axial', 'Full')]
    table = {'scale': 'small', 'rows': [row('Axial', None, 4.99), row('Full', None, 4.5)]}
    apart = 'Only seconds of one process can be compared.'
    assert apart in results_page.section('table1', {**table, 'costs': costs})
    assert apart not in results_page.section('table1', {**table, 'costs': costs[:1]})


def test_tables_without_results_are_one_list(tmp_path):
    text = results_page.parts(tmp_path)['tables']
    assert text.startswith('**Not run yet:**')
    assert '###' not in text
    assert all(f'`{results_page.command(name)}`' in text for name in results_page.SECTIONS)


def test_a_table_with_results_leaves_the_list(tmp_path):
    results = {'table1': [row('Axial', 3.666, 4.99)], 'recall': [row('Full')]}
    for name, rows in results.items():
        (tmp_path / f'{name}.json').write_text(json.dumps({'scale': 'small', 'rows': rows}), encoding='utf-8')
    run, not_run = results_page.parts(tmp_path)['tables'].split('**Not run yet:**')
    assert '| Axial | 3.666 | 4.990 |' in run
    assert 'experiments.tables.table1' not in not_run
    assert 'experiments.tables.recall' in not_run  # a file whose rows have no results
