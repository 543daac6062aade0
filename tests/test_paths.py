import argparse
import ast
import errno
from pathlib import Path

import pytest

from combiner import config, evaluate, paths, sample, train
from combiner.data.task import open_split
from combiner.run import checkpoint, saved_config

ROOT = Path(__file__).parents[1]
REMOTE = ('gs://bucket/run', 's3://b/r', 'http://host/r', 'hdfs://h/r', 'GS://b', Path('gs://bucket/run'), 'host:/run')


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ('runs/a', 'runs/a'),
        ('/runs/a', '/runs/a'),
        ('~/runs/a', '/home/someone/runs/a'),
        ('~', '/home/someone'),
        ('./~', '~'),
        ('a~b', 'a~b'),
        ('$HOME/a', '$HOME/a'),
        ('file:///runs/a%20b', '/runs/a b'),
        ('file://localhost/runs/a', '/runs/a'),
        ('FILE:/runs/a', '/runs/a'),
        ('a:b/c', 'a:b/c'),
        ('with: colon/x', 'with: colon/x'),
    ],
)
def test_what_users_write(given, expected, monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    assert paths.local(given) == Path(expected)
    assert paths.argument(given) == Path(expected)


@pytest.mark.parametrize('given', REMOTE)
def test_what_is_not_on_this_machine_is_refused_with_the_reason(given):
    with pytest.raises(ValueError, match=r"workdir '.*' is not a folder of this machine: cloud paths.* copy it to a"):
        paths.local(given, 'workdir')
    with pytest.raises(argparse.ArgumentTypeError, match='cloud paths'):
        paths.argument(str(given))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ('', 'the path is empty'),
        ('file://elsewhere/runs', 'on another machine'),
        ('file://elsewhere', 'on another machine'),
        ('~nobody-of-that-name/a', r"no user 'nobody-of-that-name'; for a folder, write \./~nobody"),
    ],
)
def test_what_is_no_path_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        paths.local(given)


def test_the_file_and_the_argument_of_a_config(monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    assert paths.split_config('configs/a.py') == ('configs/a.py', '')
    assert paths.split_config('~/a.py:x=1,y=b:c') == ('/home/someone/a.py', ':x=1,y=b:c')
    assert paths.split_config('file:///c/a.py:x=/d') == ('/c/a.py', ':x=/d')
    with pytest.raises(ValueError, match=r"config file 'gs://b/a\.py'"):
        paths.split_config('gs://b/a.py:x=1')


@pytest.mark.parametrize('remote', ['s3://bucket/run', Path('s3://bucket/run')])
def test_every_function_that_takes_a_path_refuses_others(tiny, tmp_path, monkeypatch, remote):
    monkeypatch.chdir(tmp_path)
    remote_data = tiny.config(**{'data.data_dir': str(remote)})
    for call in (
        lambda: train.train(tiny.config(), remote),
        lambda: train.train(remote_data, tmp_path / 'run'),
        lambda: evaluate.evaluate(remote),
        lambda: evaluate.load(remote),
        lambda: evaluate.evaluate(tmp_path, out=remote),
        lambda: sample.sample(remote),
        lambda: saved_config.load(remote),
        lambda: saved_config.claim(remote, tiny.config()),
        lambda: checkpoint.Checkpoints(remote),
        lambda: open_split(tiny.TASK, 'train', str(remote)),
    ):
        with pytest.raises(ValueError, match='cloud paths such as s3:// are not supported'):
            call()
    assert not list(tmp_path.iterdir())


def test_a_data_dir_is_stored_from_the_root_and_can_be_corrected(tiny, tmp_path, monkeypatch):
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    given = tiny.config(steps=3, **{'data.data_dir': 'data', 'run.eval_examples': 1, 'model.layers': 1})
    train.train(given, '~/run')
    assert given.data.data_dir == 'data'
    assert saved_config.load('run').data.data_dir == str(tmp_path / 'data')
    monkeypatch.chdir('/')
    assert evaluate.load('~/run').config.data.data_dir == str(tmp_path / 'data')
    assert evaluate.figures('~/run', 'validation')[0]['examples'] == 24
    (tmp_path / 'data').rename(tmp_path / 'moved')
    with pytest.raises(ValueError, match=r'does not exist; .*--data_dir'):
        evaluate.figures('~/run')
    assert evaluate.figures('~/run', data_dir='~/moved')[0]['examples'] == 24


def test_a_config_without_data_stays_so():
    assert paths.with_data_dir(config.base()).data.data_dir is None


@pytest.mark.parametrize(
    ('error', 'full'),
    [
        (OSError(errno.ENOSPC, 'No space left on device'), True),
        (OSError(errno.EDQUOT, 'Disk quota exceeded'), True),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write 3576 bytes to file 8: [os_error_code='28']"), True),
        (OSError(errno.EACCES, 'Permission denied'), False),
        (ValueError('RESOURCE_EXHAUSTED: out of memory'), False),
    ],
)
def test_a_full_disk_is_known_however_it_is_said(error, full, tmp_path):
    around = RuntimeError('failed')
    around.__cause__ = error
    assert paths.is_full(error) == paths.is_full(around) == full
    expected = pytest.raises(OSError, match=r'no space left in .* for it, which takes about 2.0 kB \(.* free\); do')
    with expected if full else pytest.raises(RuntimeError), paths.full_disk_explained(tmp_path, 'it', 2000, 'do'):
        raise around


def _text_without_encoding(tree):
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
        keywords = {word.arg: word.value for word in node.keywords}
        of_image = isinstance(node.func, ast.Attribute) and getattr(node.func.value, 'id', '') in ('Image', 'os')
        mode = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        binary = any('b' in text and len(text) < 4 for text in mode)
        if (
            (name in ('read_text', 'write_text') and getattr(node.func.value, 'id', '') != 'atomic')
            or (name == 'open' and not of_image and not binary)
            or {'text', 'universal_newlines'} & keywords.keys()
        ) and 'encoding' not in keywords:
            yield node.lineno


@pytest.mark.parametrize('folder', ['combiner', 'configs', 'experiments', 'scripts'])
def test_every_text_file_and_pipe_states_its_encoding(folder):
    found = {
        f'{path}:{line}'
        for path in (ROOT / folder).rglob('*.py')
        for line in _text_without_encoding(ast.parse(path.read_text(encoding='utf-8')))
    }
    assert not found


def _parsers_of_paths():
    for folder in ('combiner', 'experiments', 'scripts'):
        yield from sorted((ROOT / folder).rglob('*.py'))


def test_every_option_that_is_a_path_is_taken_as_one():
    """`type=Path` would make a folder called 'gs:'; paths among flags of absl go through functions that are tested."""
    named = {'--workdir', '--data_dir', '--out', '--results', '--environment', 'measured'}
    found = 0
    for path in _parsers_of_paths():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not (isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'add_argument'):
                continue
            kind = next((ast.unparse(word.value) for word in node.keywords if word.arg == 'type'), '')
            assert kind != 'Path', f'{path}:{node.lineno}'
            option = getattr(node.args[0], 'value', '')  # `cli` writes the help of flags with names that it is given
            if option in named and path.name != 'prepare_tfds.py':  # it gets what prepare.py was given
                assert kind == 'paths.argument', f'{path}:{node.lineno}'
                found += 1
    assert found >= 15
