"""The scripts that draw and measure, run for real on something small."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from experiments.harness import timing

SCRIPTS = Path(__file__).parents[2] / 'scripts'


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / script), run_name='__main__')


@pytest.mark.parametrize('script', ['bench.py', 'plot_attention.py', 'plot_bench.py'])
def test_scripts_find_experiments_from_any_folder(script, tmp_path):
    """In a process of its own, as the tests have the root on their path."""
    environment = os.environ | {'PYTHONPATH': '', 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, str(SCRIPTS / script), '--help']
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


MINE = """import numpy as np

from combiner import Mechanism
from combiner.patterns import sparse


class Own(Mechanism):
    def pattern(self, length):
        return sparse(np.eye(length, dtype=bool))
"""


@pytest.mark.parametrize(
    'command',
    [
        'bench.py --lengths 8 --repeats 1 --peak_size 16 --heads 1 --head_width 4',
        'plot_attention.py --length 8 --out o.png',
    ],
)
def test_scripts_find_a_mechanism_in_the_folder_where_they_are_started(command, tmp_path):
    (tmp_path / 'mylab').mkdir()
    (tmp_path / 'mylab' / 'own.py').write_text(MINE, encoding='utf-8')
    script, *arguments = command.split()
    environment = os.environ | {'PYTHONPATH': '', 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), '--names', 'mylab.own:Own', *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'mylab.own:Own' in done.stdout


def bench(monkeypatch, out, *arguments):
    run(monkeypatch, 'bench.py', '--repeats', 1, '--peak_size', 64, '--out', out, *arguments)
    return json.loads(out.read_text())


def test_bench_times_every_pass_and_says_on_what(monkeypatch, tmp_path, capsys):
    out = tmp_path / 'new' / 'bench.json'  # in a folder that is made
    names = 'combiner_fixed+block=8,axial'
    document = bench(monkeypatch, out, '--names', names, '--lengths', '32,33', '--dense_up_to', 32)
    assert document['device']
    assert document['jax']
    assert document['peak_gflops'] > 0
    assert [(row['what'], row['name'], row['length']) for row in document['rows']] == [
        ('core', 'dense', 32),
        *(('core', name, length) for length in (32, 33) for name in names.split(',')),
    ]
    for row in document['rows']:
        for each in ('forward', 'forward_backward'):
            assert row[f'{each}_ms'] > 0
            assert row[f'{each}_compile_s'] > 0
            assert row[f'{each}_temporaries_mb'] >= 0
            assert row[f'{each}_needed_gflops'] > 0
            assert (row[f'{each}_times_faster'] is None) == (row['length'] == 33)
        assert row['name'] != 'dense' or row['forward_times_faster'] == 1
    assert [found['name'] for found in document['summary']] == ['dense', *names.split(',')]
    assert '| `combiner_fixed+block=8` | 33 |' in capsys.readouterr().out


def test_bench_times_whole_layers_where_parameters_are_needed(monkeypatch, tmp_path, capsys):
    projected = 'combiner_axial_rowmajor+key=projected'
    size = ('--heads', 2, '--head_width', 4, '--lengths', 16)
    document = bench(monkeypatch, tmp_path / 'bench.json', '--names', projected, '--what', 'core,layer', *size)
    measured = [(row['what'], row['name']) for row in document['rows']]
    assert measured == [('core', 'dense'), ('layer', 'dense'), ('layer', projected)]
    assert f"{projected} at length 16 skipped: key='projected' owns parameters" in capsys.readouterr().err


@pytest.mark.parametrize('what', ['core', 'layer'])
def test_bench_measures_in_bfloat16(monkeypatch, tmp_path, what):
    computed, compiled = [], timing.compiled

    def compile_and_note(function, inputs):
        computed.append(jax.eval_shape(function, *inputs).dtype)
        return compiled(function, inputs)

    monkeypatch.setattr(timing, 'compiled', compile_and_note)
    size = ('--heads', 2, '--head_width', 4, '--lengths', 16, '--dtype', 'bfloat16')
    document = bench(monkeypatch, tmp_path / 'bench.json', '--names', 'axial', '--what', what, *size)
    assert (document['dtype'], computed) == ('bfloat16', [jnp.bfloat16] * 2)
    assert [row['name'] for row in document['rows']] == ['dense', 'axial']


def test_bench_compares_with_cudnn_on_a_gpu_and_goes_on_where_it_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    size = ('--heads', 2, '--head_width', 4, '--lengths', 16)
    document = bench(monkeypatch, tmp_path / 'bench.json', '--names', 'axial', '--dtype', 'bfloat16', *size)
    assert [row['name'] for row in document['rows']] == ['dense', 'axial']
    assert 'dense+implementation=cudnn at length 16 skipped: ' in capsys.readouterr().err
    bench(monkeypatch, tmp_path / 'bench.json', '--names', 'axial', *size)  # float32, which cuDNN does not take
    assert 'skipped' not in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'name', 'way_out'),
    [
        ([], 'bigbird+block=8', 'it has no causal form; measure it with --bidirectional'),
        (['--bidirectional'], 'compressed', 'it has no bidirectional form; measure it without --bidirectional'),
    ],
)
def test_bench_skips_what_has_no_such_form(monkeypatch, tmp_path, capsys, arguments, name, way_out):
    size = ('--heads', 2, '--head_width', 4, '--lengths', 16)
    document = bench(monkeypatch, tmp_path / 'bench.json', '--names', f'{name},axial', *size, *arguments)
    assert [row['name'] for row in document['rows']] == ['dense', 'axial']
    assert f'{name} skipped: {way_out}' in capsys.readouterr().err


def test_what_bench_measured_is_drawn(monkeypatch, tmp_path):
    size = ('--heads', 2, '--head_width', 4, '--lengths', '16,32')
    bench(monkeypatch, tmp_path / 'bench.json', '--names', 'axial', *size)
    run(monkeypatch, 'plot_bench.py', tmp_path / 'bench.json', '--out', tmp_path / 'bench.png')
    with Image.open(tmp_path / 'bench.png') as picture:
        assert picture.width > picture.height > 100
    with pytest.raises(SystemExit):
        run(monkeypatch, 'plot_bench.py', tmp_path / 'bench.json', '--what', 'layer')


def test_bench_refuses_an_unknown_name(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, 'bench.py', '--names', 'combiner_fixd')
    assert "did you mean 'combiner_fixed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--names', 'combiner_fixed+blok=8'], "combiner_fixed has no hyper-parameter 'blok'"),
        (['--names', 'combiner_fixed+block'], 'write NAME+HYPER=VALUE'),
        (['--what', 'cores'], 'unknown --what cores; choose from core, layer'),
    ],
)
def test_bench_refuses_what_it_does_not_know(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, 'bench.py', *arguments)
    assert message in capsys.readouterr().err


def test_patterns_are_drawn(monkeypatch, tmp_path):
    out = tmp_path / 'patterns.png'
    run(monkeypatch, 'plot_attention.py', '--names', 'combiner_fixed,axial', '--length', 16, '--out', out)
    with Image.open(out) as picture:
        assert picture.width > picture.height > 100
        colours = {colour[:3] for _, colour in picture.convert('RGB').getcolors(1 << 20)}
    assert {(0x2F, 0x6F, 0xB7), (0xF6, 0xC4, 0x45)} <= colours  # direct and span


@pytest.mark.parametrize('direction', [[], ['--bidirectional']])
def test_what_has_no_pattern_is_not_drawn_unless_it_is_named(monkeypatch, tmp_path, capsys, direction):
    out = tmp_path / 'patterns.png'
    run(monkeypatch, 'plot_attention.py', '--length', 4, '--out', out, *direction)
    assert out.exists()
    with pytest.raises(SystemExit):
        run(monkeypatch, 'plot_attention.py', '--names', 'linear', '--length', 4, '--out', out, *direction)
    assert 'Linear has no pattern' in capsys.readouterr().err


def test_the_curve_is_drawn(monkeypatch, tmp_path):
    lines = [{'step': step, 'bits_per_dim': 8 - step / 10} for step in (10, 20)]
    lines.append({'step': 20, 'validation_bits_per_dim': 6.1})
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (tmp_path / 'metrics.jsonl').write_text(text + '{"step": 3')  # a training goes on
    run(monkeypatch, 'plot_curve.py', '--workdir', tmp_path)
    (drawn,) = tmp_path.glob('*.png')
    with Image.open(drawn) as picture:
        assert picture.width > 100


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ({'step': 10, 'loss_nats': 2.5, 'accuracy': 0.25}, 'which only models of images have; experiments.report'),
        ({'step': 1, 'compile_seconds': 2.5}, 'holds no bits_per_dim yet: train for longer'),
    ],
    ids=['of text', 'too early'],
)
def test_a_run_without_bits_per_dim_is_refused_with_its_reason(monkeypatch, tmp_path, capsys, line, said):
    (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
    with pytest.raises(SystemExit):
        run(monkeypatch, 'plot_curve.py', '--workdir', tmp_path)
    assert said in capsys.readouterr().err


def test_a_curve_needs_a_run(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, 'plot_curve.py', '--workdir', tmp_path)
    assert stop.value.code


@pytest.mark.slow
def test_a_kill_during_a_save_loses_nothing(tmp_path):
    command = [sys.executable, str(SCRIPTS / 'kill.py'), '--workdir', str(tmp_path), '--kills', '2', '--seed', '3']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '2 kills (' in done.stdout
    assert 'the newest whole step came back 2 times' in done.stdout
