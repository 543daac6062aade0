"""The report of scripts/compile.py: restartable, its tables and its picture, and the page as it is."""

import importlib.metadata
import json
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from combiner.aot.chips import GIB
from combiner.kernels import choice
from experiments.harness import compile_report, compiling, runner
from experiments.harness.run import full_size, slug

FIXED, DENSE = 'combiner_fixed+implementation=xla', 'full+implementation=splash'


def alone(name, length, seconds, schedule=None, *, backward=False, **changes):
    times = {'seconds': seconds, 'bound': 'hbm'}
    found = {'name': name, 'length': length, 'backward': backward, 'fits': True, 'times_least': 1.25, 'heads': 8}
    return found | {'roofline': times, 'schedule_seconds': schedule, 'head_width': 128, 'batch': 1} | changes


def step(row, target, *, fits=True, **changes):
    found = {'row': row, 'target': target, 'chips': compiling.targets.parse(target).chips, 'fits': fits}
    found |= {'temporaries_bytes': GIB, 'total_bytes': 3 * GIB // 2, 'flops': 5 * 10**12, 'hbm_bytes': 10**9}
    found |= {'collectives': {'all-reduce': {'count': 2, 'bytes': 100, 'sent_bytes': 10**6}}}
    return found | {'roofline': {'seconds': 0.025, 'bound': 'compute'}} | changes


ATTENTIONS = [
    alone(DENSE, 512, 10e-6, 20e-6),
    alone(FIXED, 512, 12e-6, 15e-6),
    alone(DENSE, 4096, 100e-6, 200e-6),
    alone(FIXED, 4096, 50e-6, 250e-6),
    alone(DENSE, 16384, 1000e-6, 2000e-6),
    alone(FIXED, 16384, 200e-6, None),
    alone(FIXED, 512, 40e-6, backward=True),
    {'name': FIXED, 'length': 4096, 'backward': True, 'fits': False, 'temporaries_bytes': 20 * GIB},
    {'name': FIXED, 'length': 16384, 'backward': True, 'fits': False, 'refused': 'takes no such block'},
]


def test_a_cell_has_traffic_roofline_and_schedule():
    table = compile_report.attention_table(ATTENTIONS, backward=False).splitlines()
    assert table[0] == '| attention | 512 | 4,096 | 16,384 |'
    assert table[3] == f'| `{FIXED}` | 1.2×, 12 µs, 15 µs | 1.2×, 50 µs, 250 µs | 1.2×, 200 µs, – |'
    table = compile_report.attention_table(ATTENTIONS, backward=True).splitlines()
    assert table[2] == f'| `{DENSE}` | – | – | – |'
    assert table[3] == f'| `{FIXED}` | 1.2×, 40 µs, – | needs 20.00 GiB | refused |'


def test_an_attention_is_ahead_from_the_length_after_which_it_stays_ahead():
    forward = {'backward': False}
    assert compile_report.ahead(ATTENTIONS, FIXED, by='roofline', **forward) == 4096
    assert compile_report.ahead(ATTENTIONS, FIXED, by='schedule', **forward) is None  # behind at 4,096, after 512
    assert compile_report.ahead(ATTENTIONS, FIXED, by='roofline', backward=True) is None  # nothing to compare with
    better = [*ATTENTIONS, alone('full+implementation=other', 4096, 40e-6)]
    assert compile_report.ahead(better, FIXED, by='roofline', **forward) == 16384  # than the best of `full`
    assert compile_report.ahead_table(ATTENTIONS).splitlines()[2:] == [f'| `{FIXED}` | 4,096 | – | – | – |']


def test_a_step_is_shown_on_the_smallest_slice_that_holds_it():
    fits, never = 'cifar-10/fixed-6-layers', 'cifar-10/combiner-axial'  # of Tables 1 and 2
    found = [step(never, target, fits=False, temporaries_bytes=17 * GIB) for target in ('v5e:4x4', 'v5e:2x4')]
    found += [step(fits, 'v5e:2x4'), step(fits, 'v5e:2x2'), step(fits, 'v5e:1x1', fits=False)]
    lines = compile_report.step_table(found).splitlines()
    assert lines[2] == f'| {fits} | v5e:2x2 | 1.50 GiB | 5.00 TFLOP | 1.00 GB | 1.00 MB | 25.0 ms | compute |'
    assert lines[3].startswith(f'| {never} | none up to v5e:4x4 | temporaries of 17.00 GiB | –')


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '1')
    monkeypatch.setattr(compile_report, 'RESULTS', tmp_path / 'compile.json')
    return tmp_path / 'compile.json'


def test_a_row_is_compiled_for_larger_slices_until_it_fits_and_only_once(results, monkeypatch):
    asked = []

    def compile_step(config, target):
        asked.append(str(target))
        fits = str(target) == 'v5e:4x4'
        needs = {1: 100, 8: 25, 16: 15}[target.chips] * GIB
        found = {'target': str(target), 'chips': target.chips, 'fits': fits, 'temporaries_bytes': needs}
        return found | compiling.settings(config)._asdict()

    monkeypatch.setattr(compiling, 'training_step', compile_step)
    monkeypatch.setattr(compiling, 'describe_step', lambda name, found: name)
    (row,) = compile_report.rows('cifar-10/combiner-fixed-6-layers')
    compile_report.add_row(row)
    assert asked == ['v5e:1x1', 'v5e:2x4', 'v5e:4x4']  # four chips have 64 GiB, and 100 were needed
    compile_report.add_row(row)
    assert len(asked) == 3
    assert [each['target'] for each in json.loads(results.read_text())['steps']] == asked
    other = {'remat': 'none'}  # of the config, since then
    monkeypatch.setattr(compile_report, 'full_size', lambda row: change(full_size(row), other))
    compile_report.add_row(row)
    assert asked[3:] == asked[:3]
    assert [each['remat'] for each in json.loads(results.read_text())['steps']] == ['none'] * 3


def change(config, settings):
    config.model.update(settings)
    return config


def test_an_attention_is_compiled_once(results, monkeypatch):
    asked = []

    def compile_attention(one):
        asked.append(one)
        return {'name': one.text, **{key: value for key, value in one._asdict().items() if key != 'text'}}

    monkeypatch.setattr(compile_report, 'compile_apart', compile_attention)
    monkeypatch.setattr(compiling, 'describe_attention', lambda found: '')
    for one in compile_report.attentions([512])[:4]:
        compile_report.add_attention(one)
        compile_report.add_attention(one)
    assert len(asked) == len(set(asked)) == 4


def test_a_result_is_never_listed_twice(results, monkeypatch):
    """Neither if it was made before a field was added, nor if another process makes the same at the same time."""
    one = compile_report.attentions([512])[0]
    made = {'name': one.text, **{key: value for key, value in one._asdict().items() if key != 'text'}}
    compile_report.add('attention', {key: value for key, value in made.items() if key != 'packed'})
    monkeypatch.setattr(compile_report, 'compile_apart', lambda asked: pytest.fail('compiled again'))
    compile_report.add_attention(one)
    compile_report.add('attention', made)
    assert len(json.loads(results.read_text())['attention']) == 1
    compile_report.add('attention', {**made, 'packed': True})
    assert len(json.loads(results.read_text())['attention']) == 2


def test_the_results_are_of_the_fields_by_which_they_are_found():
    results = json.loads(compile_report.RESULTS.read_text(encoding='utf-8'))
    for kind, fields in compile_report.IDENTITY.items():
        found = [tuple(each[field] for field in fields) for each in results[kind]]
        assert len(set(found)) == len(found)


def test_steps_were_compiled_as_the_configs_are_now():
    configs = {runner.names_of(row)[0]: row for row in compile_report.rows('')}
    for known in json.loads(compile_report.RESULTS.read_text(encoding='utf-8'))['steps']:
        settings = compiling.settings(full_size(configs[known['row']]))._asdict()
        assert settings.items() <= known.items(), f'{known["row"]}: python scripts/compile.py --report'


def test_a_compiler_that_ends_its_process_is_recorded(monkeypatch):
    def submit(self, function, asked):
        return submitted(self, os.abort)

    submitted = ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, 'submit', submit)
    one = compiling.Attention(FIXED, 512, False, 'v5e')
    found = compile_report.compile_apart(one)
    assert not found['fits']
    assert found['name'] == FIXED
    assert 'failed check' in compiling.why_not(found)


def test_results_of_other_versions_are_not_continued(results):
    results.write_text(json.dumps({'jax': '1', 'jaxlib': '1', 'libtpu': '2', 'attention': [], 'steps': []}))
    with pytest.raises(ValueError, match='remove it to make it again'):
        compile_report.read()


def test_the_report_has_full_and_every_combiner_in_batches_of_equal_size():
    asked = compile_report.attentions([512, 16384])
    names = {one.text.partition('+')[0] for one in asked}
    assert {'full', 'combiner_fixed', 'combiner_tree', 'combiner_mixture'} <= names
    assert {one.batch * one.length for one in asked} == {compile_report.TOKENS}
    left_out = (*compile_report.FALLBACKS, *choice.ONLY_ACROSS)
    assert not any(one.text.endswith(left_out) for one in asked)


def test_rows_are_those_of_the_large_models():
    columns = {slug(row.column) for row in compile_report.rows('')}
    assert columns == {'cifar-10', 'imagenet-64', 'wiki-40b', 'c4', 'pg-19', 'path-x'}
    assert compile_report.rows('none') == []
    with pytest.raises(ValueError, match='no row matches'):
        compile_report.rows('nix')


def test_the_picture_has_a_panel_for_each_pass_and_time():
    drawn = compile_report.picture(ATTENTIONS)
    assert [ax.get_title(loc='left') for ax in drawn.axes] == [
        'Forward: roofline',
        'Forward and backward: roofline',
        'Forward: schedule',
        'Forward and backward: schedule',
    ]
    assert len(drawn.axes[0].lines) >= 2


def test_the_page_has_the_tables_of_the_results():
    text = compile_report.PAGE.read_text(encoding='utf-8')
    results = json.loads(compile_report.RESULTS.read_text(encoding='utf-8'))
    for name, table in compile_report.tables(results).items():
        assert f'<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->' in text
    assert 'compiled for these chips, not run on' in text
