"""scripts/compile.py: fast help, mistakes in one line, and, with libtpu, programs for a TPU that is not here.

Commands run in processes of their own: libtpu ends a process whose XLA_FLAGS it does not know, as those of the tests.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import combiner
from combiner.core import registry

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'compile.py'
KERNELS = [name for name in combiner.names() if 'mosaic' in registry.resolve(name).implementations]
with_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the extra tpu-aot')


def run(*arguments, timeout=1800):
    """Runs the script as a user does, without the settings of the tests."""
    ours = ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS', 'JAX_COMPILATION_CACHE_DIR')
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_help_comes_without_jax():
    program = (
        'import runpy, sys\n'
        f'sys.argv = ["compile.py", "--help"]\n'
        'try:\n'
        f'    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")\n'
        'finally:\n'
        '    assert not {"jax", "combiner"} & set(sys.modules)\n'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '--target' in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--attention', 'full', '--target', 'v7'], "unknown chip 'v7'"),
        (['--attention', 'full', '--target', 'v5e:4'], 'has 2 sizes, such as v5e:2x4'),
        (['--attention', 'full', '--lengths', 'x', '--target', 'h100'], 'compiling for GPUs needs'),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(arguments, message):
    if 'needs' in message and importlib.util.find_spec('jax_cuda13_plugin'):
        pytest.skip('the compiler for GPUs is installed')
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, '')
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: ')
    assert message in line


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--nothing'], 'one of the arguments --config --attention --report is required'),
        (['--attention', 'full', '--nothing'], 'unrecognized arguments: --nothing'),
        (['--attention', 'full', '--config.steps=3'], '--config.steps=3 needs --config'),
        ([], 'one of the arguments --config --attention --report is required'),
        (['--attention', 'full', '--module', '--packed'], '--packed has no effect with --module: leave it out'),
        (['--attention', 'full', '--rows', 'none'], '--rows has no effect with --attention: leave it out'),
        (['--config', 'configs/photos.py', '--module'], '--module has no effect with --config: leave it out'),
        (['--report', '--target', 'v5p'], '--target has no effect with --report: leave it out'),
        (['--config', 'configs/photos.py', '--packed'], '--packed has no effect with --config: leave it out'),
    ],
)
def test_options_that_do_not_exist_or_would_be_ignored_are_refused(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert f'compile.py: error: {message}' in done.stderr


@pytest.mark.slow
@with_libtpu
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--attention', 'ful'], "did you mean 'full'"),
        (['--attention', 'full', '--lengths', '4,x'], 'write numbers separated by commas'),
        (['--attention', 'full', '--implementation', 'nix', '--lengths', '256'], 'unknown implementation'),
        (['--config', 'nix.py'], "config file 'nix.py' does not exist"),
        (['--config', 'configs/photos.py:layrs=3'], "did you mean 'layers'"),
        (['--config', 'configs/photos.py', '--config.steps=x'], 'invalid literal'),
        (['--config', 'configs/photos.py', '--config.mesh.fsdp=3'], 'does not fit 1 devices'),
    ],
)
def test_a_mistake_in_what_is_compiled_is_one_line(arguments, message):
    done = run(*arguments)
    output = done.stdout + done.stderr
    assert message in output
    assert 'Traceback' not in output


@pytest.mark.slow
@with_libtpu
@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('options', [[], ['--backward']], ids=['forward', 'backward'])
def test_a_kernel_moves_hardly_more_than_the_least(tmp_path, name, options):
    """Forward every array once, and logsparse its queries twice; backward, q, k and v are read again.

    Row-major keeps as many summaries as it has keys and values; logsparse reads queries and their gradients twice; the
    mixture visits rows and columns in kernels of their own, and writes its summaries in between.
    """
    limits = {
        'combiner_axial_rowmajor': (1.1, 2.1),
        'combiner_logsparse': (1.3, 1.95),
        'combiner_mixture': (5.7, 8.1),
    }
    most = limits.get(name, (1.1, 1.5))[len(options)]
    out = tmp_path / 'found.json'
    kernel = ('--attention', name, '--implementation', 'mosaic', '--lengths', '4096')
    done = run(*kernel, *options, '--json', out)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())['attention']
    assert found['kernels'], 'the kernel is not in the program'
    assert found['times_least'] <= most


@pytest.mark.slow
@with_libtpu
def test_rotary_positions_read_and_write_queries_keys_and_their_gradients_once(tmp_path):
    out = tmp_path / 'found.json'
    done = run('--attention', 'combiner_fixed+implementation=mosaic', '--lengths', '4096', '--module', '--json', out)
    assert done.returncode == 0, done.stderr
    without, rotary = json.loads(out.read_text())['modules']
    assert (without['rotary'], rotary['rotary']) == (False, True)
    assert rotary['arrays'] - without['arrays'] < 8.5


@pytest.mark.slow
@with_libtpu
def test_a_training_step_is_compiled_for_a_slice(tmp_path):
    out = tmp_path / 'found.json'
    done = run('--config', 'configs/photos.py:scale=quick', '--target', 'v5e:2x2', '--json', out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found['fits']
    assert found['chips'] == 4
    assert found['flops'] > 0
    assert found['collectives']['all-reduce']['sent_bytes'] > 0
    assert found['roofline']['seconds'] > 0
    assert 'compiled for it, not run on it' in done.stdout


@pytest.mark.slow
@with_libtpu
def test_a_step_that_is_too_large_is_reported():
    large = ('--config', 'configs/photos.py:scale=quick', '--config.data.batch_size=65536')
    done = run(*large, '--target', 'v5e')
    assert done.returncode == 0, done.stderr
    assert 'DOES NOT FIT' in done.stdout
    assert 'Traceback' not in done.stderr
