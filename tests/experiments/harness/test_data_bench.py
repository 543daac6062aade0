import json
import runpy
import sys
from pathlib import Path

import pytest

from experiments.harness import data_bench, loop_bench


def test_a_row_has_both_rates(tiny):
    row = data_bench.measure(tiny.config(), seconds=0.05, count=1)
    assert (row['task'], row['length']) == ('tiny', 48)
    assert row['pipeline_tokens_per_second'] > 0
    assert row['model_tokens_per_second'] > 0
    assert row['times'] == pytest.approx(row['pipeline_tokens_per_second'] / row['model_tokens_per_second'], rel=0.1)


def test_the_command_prints_and_writes_a_row_for_each_config(monkeypatch, tmp_path, capsys):
    calls = []

    def measure(config, seconds, count):
        calls.append((config.task, config.model.layers, config.model.width, config.model.heads, config.data.data_dir))
        return {
            'task': config.task,
            'length': 768,
            'pipeline_tokens_per_second': 5000,
            'model_tokens_per_second': 250,
            'times': 20.0,
        }

    monkeypatch.setattr(data_bench, 'measure', measure)
    out = tmp_path / 'data.json'
    data_bench.main(['configs/photos.py', 'configs/text.py:task=mlm', '--data_dir=D', f'--out={out}'])
    here = str(Path('D').resolve())
    assert calls == [('photos16', 6, 512, 8, here), ('prose_masked', 6, 512, 8, here)]
    assert capsys.readouterr().out.splitlines()[4] == '| `photos16` | 768 | 5,000 | 250 | 20.0× |'
    rows = json.loads(out.read_text())['rows']
    assert [row['config'] for row in rows] == ['configs/photos.py', 'configs/text.py:task=mlm']


def test_the_config_is_that_of_the_file_not_of_one_with_its_name_in_configs(monkeypatch, tmp_path):
    mine = tmp_path / 'photos.py'
    mine.write_text(
        'from configs import photos\n\n\n'
        "def get_config(argument=''):\n"
        '    config = photos.get_config(argument)\n'
        '    config.data.batch_size = 3\n'
        '    return config\n'
    )
    sizes = []
    row = {'task': 't', 'length': 1, 'pipeline_tokens_per_second': 1, 'model_tokens_per_second': 1, 'times': 1.0}
    monkeypatch.setattr(data_bench, 'measure', lambda config, *_: sizes.append(config.data.batch_size) or row)
    data_bench.main([f'{mine}:size=32'])
    timed = dict.fromkeys(('bare_ms', 'loop_ms', 'overhead', 'cpu_overhead'), 1.0)
    monkeypatch.setattr(loop_bench, 'measure', lambda config, *_: sizes.append(config.data.batch_size) or timed)
    loop_bench.main([str(mine)])
    assert sizes == [3, 3]


def test_the_benchmark_has_it_as_a_part(monkeypatch):
    calls = []
    monkeypatch.setattr(data_bench, 'main', calls.append)
    monkeypatch.setattr(sys, 'argv', ['bench.py', 'data', '--steps=1'])
    runpy.run_path(str(Path(__file__).parents[3] / 'scripts' / 'bench.py'), run_name='__main__')
    assert calls == [['--steps=1']]


def test_the_guide_has_the_measured_table():
    root = Path(__file__).parents[3]
    rows = json.loads((root / 'results' / 'data_bench.json').read_text())['rows']
    guide = (root / 'docs' / 'performance.md').read_text(encoding='utf-8')
    for row in rows:
        assert data_bench.line(row) in guide
