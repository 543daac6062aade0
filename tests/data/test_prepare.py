"""Preparing data sets: what is planned, and what is run, with small commands in the place of TensorFlow's."""

import dataclasses
import fcntl
import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import kit
import numpy as np
import pytest

from combiner.data import prepare, tfds_sources
from combiner.data.lra import generated

TFDS_PROGRAM = str(Path(prepare.__file__).with_name('prepare_tfds.py'))


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The module, with an environment that counts as made."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    environment = tmp_path / 'cache/combiner/prepare'
    environment.mkdir(parents=True)
    (environment / 'setup-done').write_text(prepare.contents())
    return prepare


@pytest.fixture
def call(script, monkeypatch, tmp_path):
    """Calls the command on tmp_path/data."""

    def called(*arguments):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *arguments, '--data_dir', str(tmp_path / 'data')])
        script.main()

    return called


def told(call, *arguments) -> str:
    """Calls the script, which must stop, and returns what it stops with."""
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    return str(stopped.value.code)


@pytest.fixture
def child(script, monkeypatch, tmp_path):
    """Puts a small program in the place of TensorFlow's for cifar10; returns a file with a line for each of its runs.

    Asked to fail, it leaves behind what TFDS leaves when it is killed.
    """
    runs = tmp_path / 'runs'
    runs.touch()
    ready = tmp_path / 'ready'
    kit.write_tfds(
        ready,
        'cifar10',
        {'train': [{'id': 'train_00000', 'image': kit.png(np.zeros((32, 32, 3), np.uint8)), 'label': 3}]},
    )
    program = f"""
import pathlib, shutil, sys
data_dir = pathlib.Path(sys.argv[1])
with open({str(runs)!r}, 'a') as runs:
    print(*map(str, sorted(path.relative_to(data_dir) for path in data_dir.rglob('*'))), file=runs)
(data_dir / 'downloads').mkdir(exist_ok=True)
(data_dir / 'downloads/whole.tar').touch()
if pathlib.Path({str(tmp_path / 'fail')!r}).exists():
    (data_dir / 'downloads/half.tar.tmp.0a').mkdir()
    (data_dir / 'downloads/extracted/incomplete.0a_TAR').mkdir(parents=True)
    (data_dir / 'cifar10/incomplete.AB_3.0.2').mkdir(parents=True)
    sys.exit(3)
shutil.copytree({str(ready)!r}, data_dir, dirs_exist_ok=True)
"""
    recipe = script.RECIPES['cifar10']
    assert recipe.command(Namespace(data_dir='D', beam_options=None, environment='E')) == [
        'E/bin/python',
        '-P',
        TFDS_PROGRAM,
        'cifar10/3.0.2',
        '--data_dir',
        'D',
    ]
    fake = dataclasses.replace(recipe, command=lambda options: [sys.executable, '-c', program, options.data_dir])
    monkeypatch.setitem(script.RECIPES, 'cifar10', fake)
    return runs


def test_every_set_that_is_read_can_be_prepared(script):
    assert set(tfds_sources.SETS) <= set(script.RECIPES)
    for name, one in tfds_sources.SETS.items():
        assert script.RECIPES[name].marker == f'{one.folder}/dataset_info.json'


def test_every_set_that_is_generated_can_be_prepared(script, monkeypatch):
    assert set(script.RECIPES) == {*tfds_sources.SETS, *generated.NAMES}
    recipe = script.RECIPES['lra_listops']
    options = Namespace(data_dir='DIR')
    assert recipe.command(options) == [
        sys.executable,
        '-m',
        'combiner.data.generate',
        'lra_listops',
        '--data_dir',
        'DIR',
    ]
    assert recipe.marker == 'combiner_lra/lra_listops/manifest.json'
    read = []
    monkeypatch.setattr(generated, 'open_split', lambda *arguments: read.append(arguments) or [0] * 3)
    assert recipe.verify('DIR') == 'train 3, validation 3, test 3 records'
    assert read[0] == ('lra_listops', 'train', 'DIR')


def test_the_list(call, script, capsys):
    for arguments in ((), ('--list',)):
        call(*arguments)
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert list(lines) == ['name', *script.RECIPES, 'next:']
        assert '12.6 GB' in lines['downsampled_imagenet/64x64']
        assert '7.0 TB' in lines['c4/en']


def test_the_plan_comes_first_and_nothing_happens_without_an_answer(call, child, tmp_path, monkeypatch, capsys):
    assert '--yes' in told(call, 'cifar10')
    plan = capsys.readouterr().out
    for part in ('CIFAR-10', f'{tmp_path}/data: about 140 MB', 'Downloads about 170 MB', 'takes 14 seconds'):
        assert part in plan
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr('builtins.input', lambda question: '')
    assert told(call, 'cifar10') == 'Nothing was done'
    assert not (tmp_path / 'data').exists()
    monkeypatch.setattr('builtins.input', lambda question: 'y')
    call('cifar10')
    assert len(child.read_text().splitlines()) == 1


def test_the_disk_must_be_large_enough(call, child, script, tmp_path, monkeypatch):
    def usage(path):
        assert path == tmp_path  # the data directory is not there yet
        return SimpleNamespace(free=0.3e9)

    monkeypatch.setattr(script.shutil, 'disk_usage', usage)
    assert told(call, 'cifar10', '--yes').startswith(
        f'cifar10 needs about 310 MB in {tmp_path}/data, where 300 MB are free'
    )
    assert not child.read_text()
    call('cifar10', '--yes', '--ignore_space')
    assert child.read_text()


def test_a_failure_keeps_downloads_and_the_next_run_starts_clean(call, child, tmp_path, capsys):
    (tmp_path / 'fail').touch()
    message = told(call, 'cifar10', '--yes')
    assert 'cifar10 was not prepared; repeat the command' in message
    assert 'exit code 3' in message
    (tmp_path / 'fail').unlink()
    call('cifar10', '--yes')
    said = capsys.readouterr().out
    assert 'cifar10/incomplete.AB_3.0.2, which is incomplete' in said
    assert f'cifar10 is ready in {tmp_path}/data/cifar10/3.0.2, took ' in said
    assert 'seconds: train 1 records' in said
    assert f'{tmp_path}/data/downloads are no longer needed' in said
    first, second = child.read_text().splitlines()
    assert first == '.prepare.lock'
    assert second == '.prepare.lock cifar10 downloads downloads/extracted downloads/whole.tar'
    assert tfds_sources.open_tfds('cifar10', 'train', str(tmp_path / 'data'))[0]['label'] == 3


def test_what_is_ready_is_not_prepared_again(call, child, capsys):
    call('cifar10', '--yes')
    capsys.readouterr()
    call('cifar10')  # with nothing to ask
    assert 'was ready before: train 1 records' in capsys.readouterr().out
    assert len(child.read_text().splitlines()) == 1


def test_a_command_that_leaves_nothing_behind_has_failed(call, child, script, monkeypatch):
    idle = dataclasses.replace(script.RECIPES['cifar10'], command=lambda options: [sys.executable, '-c', ''])
    monkeypatch.setitem(script.RECIPES, 'cifar10', idle)
    assert 'cifar10/3.0.2/dataset_info.json does not exist' in told(call, 'cifar10', '--yes')


def test_a_set_in_another_format_is_refused_and_kept(call, child, tmp_path):
    call('cifar10', '--yes')
    info = tmp_path / 'data/cifar10/3.0.2/dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    said = told(call, 'cifar10', '--yes')
    assert 'prepared in the format tfrecord' in said
    assert 'delete' not in said
    assert json.loads(info.read_text())['name'] == 'cifar10'


def test_one_process_at_a_time(call, child, tmp_path):
    (tmp_path / 'data').mkdir()
    with (tmp_path / 'data/.prepare.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert 'Another process' in told(call, 'cifar10', '--yes')
    assert not child.read_text()
    call('cifar10', '--yes')


@pytest.mark.parametrize('left', ['nothing', 'cut short', 'of other contents'])
def test_the_environment_is_made_once(script, tmp_path, monkeypatch, left):
    environment = tmp_path / 'made'
    if left != 'nothing':
        (environment / 'bin').mkdir(parents=True)
    if left == 'of other contents':
        (environment / 'setup-done').touch()
    commands = []

    def run(command, failure):
        assert commands or not environment.exists()
        environment.mkdir(exist_ok=True)
        commands.append(command)

    monkeypatch.setattr(script, 'run', run)
    script.make_environment(environment)
    script.make_environment(environment)
    pip = ['-m', 'pip', 'install', '-q', '--disable-pip-version-check']
    assert commands == [
        [sys.executable, '-m', 'venv', str(environment)],
        [f'{environment}/bin/python', *pip, *script.REQUIREMENTS],
    ]


def test_an_environment_that_another_command_makes_is_left_alone(script, tmp_path):
    environment = tmp_path / 'made'
    environment.mkdir()
    with (
        script.locked(tmp_path / 'made.lock', ''),
        pytest.raises(SystemExit, match=f'Another process creates {environment}'),
    ):
        script.make_environment(environment)
    assert environment.exists()


def test_a_failing_pip_leaves_no_environment_that_counts(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.sys, 'executable', '/bin/false')
    with pytest.raises(SystemExit, match='could not be created'):
        script.make_environment(tmp_path / 'made')
    assert not script.prepared(tmp_path / 'made')


def test_unknown_names_and_c4_without_a_cluster(call, capsys):
    assert told(call, 'cifar11') == '2'
    assert "unknown data set 'cifar11'; known: cifar10," in capsys.readouterr().err
    assert told(call, 'c4/en', '--yes') == '2'
    assert '--beam_options' in capsys.readouterr().err


def example(**texts: str):
    """A stand-in for TensorFlow's tf.train.Example, as a reader uses it."""
    fields = {name: SimpleNamespace(bytes_list=SimpleNamespace(value=[text.encode()])) for name, text in texts.items()}
    return SimpleNamespace(features=SimpleNamespace(feature=fields))


def test_wiki40b_is_prepared_in_turn(monkeypatch, tmp_path):
    """The other half of the script for real, but for reading the original files, which takes TensorFlow."""

    def read(self, files):
        split = Path(files).parent.name
        assert Path(files).name == 'en_examples-*'
        yield from (example(wikidata_id='Q1', text=f'{split} № {i}', version_id='7') for i in range(3))

    monkeypatch.setattr(type(kit.builder('wiki40b/en', tmp_path)), 'read_tfrecord_as_examples', read)
    monkeypatch.setattr(sys, 'argv', [TFDS_PROGRAM, 'wiki40b/en/1.3.0', '--data_dir', str(tmp_path)])
    runpy.run_path(TFDS_PROGRAM, run_name='__main__')
    for split, folder in {'train': 'train', 'validation': 'dev', 'test': 'test'}.items():
        source = tfds_sources.open_tfds('wiki40b/en', split, str(tmp_path))
        assert {record['text'].decode() for record in source} == {f'{folder} № {i}' for i in range(3)}
        assert source[0]['version_id'] == b'7'
