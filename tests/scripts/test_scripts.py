"""The scripts that draw and measure, run for real on something small."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / 'scripts'


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / script), run_name='__main__')


def test_bench_times_every_pass_and_says_on_what(monkeypatch, tmp_path):
    out = tmp_path / 'bench.json'
    run(monkeypatch, 'bench.py', '--names', 'combiner_fixed,axial', '--lengths', '32,33', '--repeats', 1, '--out', out)
    document = json.loads(out.read_text())
    assert document['device']
    assert document['jax']
    assert [(row['name'], row['length']) for row in document['rows']] == [
        (name, length) for length in (32, 33) for name in ('dense', 'combiner_fixed', 'axial')
    ]
    for row in document['rows']:
        for each in ('forward', 'forward_backward'):
            assert row[f'{each}_ms'] > 0
            assert row[f'{each}_compile_s'] > 0
            assert row[f'{each}_temporaries_mb'] >= 0
        assert row['name'] != 'dense' or row['forward_times_faster'] == 1


def test_bench_refuses_an_unknown_name(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, 'bench.py', '--names', 'combiner_fixd')
    assert "did you mean 'combiner_fixed'" in capsys.readouterr().err


def test_patterns_are_drawn(monkeypatch, tmp_path):
    out = tmp_path / 'patterns.png'
    run(monkeypatch, 'plot_attention.py', '--names', 'combiner_fixed,axial', '--length', 16, '--out', out)
    with Image.open(out) as picture:
        assert picture.width > picture.height > 100
        colours = {colour[:3] for _, colour in picture.convert('RGB').getcolors(1 << 20)}
    assert {(0x2F, 0x6F, 0xB7), (0xF6, 0xC4, 0x45)} <= colours  # direct and span


def test_the_curve_is_drawn(monkeypatch, tmp_path):
    lines = [{'step': step, 'bits_per_dim': 8 - step / 10} for step in (10, 20)]
    lines.append({'step': 20, 'validation_bits_per_dim': 6.1})
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    run(monkeypatch, 'plot_curve.py', '--workdir', tmp_path)
    (drawn,) = tmp_path.glob('*.png')
    with Image.open(drawn) as picture:
        assert picture.width > 100


def test_a_curve_needs_a_run(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, 'plot_curve.py', '--workdir', tmp_path)
    assert stop.value.code
