"""The page of results has what results/ has, and says what has not been run."""

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
    assert marked.filled(page, results_page.sections(ROOT / 'results')) == page


def test_the_correlation_with_the_published_order_is_said():
    rows = [row('a', 3.0, 5.0), row('b', 2.0, 4.0), row('c', 1.0, 4.5), row('d', None, 9.0)]
    text = results_page.section('table1', {'scale': 'small', 'rows': rows})
    assert 'Rank correlation of ours with the published order: 0.50 (3 rows).' in text
    assert 'Rank correlation' not in results_page.section('table1', {'scale': 'small', 'rows': rows[1:]})


def test_a_table_with_a_part_of_its_rows():
    costs = {'rows': [{'column': 'Photos', 'model': 'Axial', 'seconds_per_step': 0.125, 'memory_mb': 1234.4}]}
    rows = [row('Axial', 3.666, 4.99), row('Full', None, 4.5), row('Fixed', 3.408), row('Axial', None, None, 'Other')]
    text = results_page.section('table1', {'scale': 'small', 'rows': rows, 'costs': costs})
    assert '| Axial | 3.666 | 4.990 | 1 | 0.125 | 1,234 |' in text
    assert '| Full |  | 4.500 | 1 |  |  |' in text
    assert '| Fixed | 3.408 |  |  |  |  |' in text
    assert 'Ours on tiles. Codecs on the same images: PNG 5.000, WebP, lossless 4.250, order-0 entropy 7.500.' in text
    assert 'scale=small, 2 runs, at commit `abc`. 2 of 4 rows have no result.' in text
    assert 'Other' not in text
    assert 'experiments.tables.table1' in text


def test_a_table_without_results_is_not_run_yet(tmp_path):
    assert all(text.startswith('Not run yet.') for text in results_page.sections(tmp_path).values())
    assert results_page.section('recall', {'scale': 'cpu', 'rows': [row('Full')]}).startswith('Not run yet.')
