"""The wheel, built from a copy of the sources and installed elsewhere: it is whole, and its commands work there."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import combiner

ROOT = Path(__file__).parents[1]
SOURCES = ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'combiner', 'configs')
REPOSITORY = 'https://code.example/lab/combiner'
CODE = re.compile('^```.*?^```', re.MULTILINE | re.DOTALL)
QUIET_PIP = (sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check')

CONFIG = """
from combiner import config as common


def get_config(argument=''):
    args = common.parse(argument, attention='combiner_fixed')
    config = common.base()
    config.task = 'photos16'
    config.steps = config.run.eval_every = config.run.checkpoint_every = 2
    config.data.batch_size = config.run.eval_batch_size = 2
    config.run.eval_examples = config.run.test_examples = 2
    config.model.layers, config.model.width, config.model.heads = 1, 8, 1
    config.model.positions = 'image'
    config.model.tied = False
    config.model.attention = common.attention(args.attention, row=48)
    return config
"""
MECHANISM = """
from combiner.attention.combiner_fixed import CombinerFixed


class Mine(CombinerFixed):
    pass
"""
USES_THE_FUNCTIONS = """
import importlib.util
import sys

import jax

import combiner

site = sys.argv[1]
assert combiner.__file__.startswith(site), combiner.__file__
assert importlib.util.find_spec('combiner.configs').origin.startswith(site)
assert not any(importlib.util.find_spec(name) for name in ('configs', 'experiments', 'scripts', 'tests'))
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 20, 2, 4))
assert combiner.attend(q, k, v, 'combiner_fixed', causal=True, block=4).shape == q.shape
model, variables, *_ = combiner.load('weights')
assert model.apply(variables, jax.numpy.zeros((1, 768), int)).shape == (1, 768, 256)
"""


def run(command, status=0, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def prose(text: str) -> str:
    return CODE.sub('', text)


def publish(setup: Path, address: str) -> None:
    """Sets the address of the repository, as who publishes does."""
    text, count = re.subn("(?m)^REPOSITORY = '.*'$", f"REPOSITORY = '{address}'", setup.read_text())
    assert count == 1
    setup.write_text(text)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('sources')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / name, folder)
    publish(folder / 'setup.py', REPOSITORY)
    out = tmp_path_factory.mktemp('wheel')
    run([*QUIET_PIP, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', str(out), str(folder)])
    (built,) = out.iterdir()
    return built


def test_it_holds_combiner_alone_and_all_of_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith('.dist-info/entry_points.txt'))
        commands = configparser.ConfigParser()
        commands.read_string(archive.read(entry_points).decode())
    found = {name for name in names if '.dist-info/' not in name}
    files = (path for path in (ROOT / 'combiner').rglob('*') if path.is_file() and '__pycache__' not in path.parts)
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {f'combiner/configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
    assert found == expected
    assert 'combiner/py.typed' in found
    assert any(name.endswith('.dist-info/licenses/LICENSE') for name in names)
    assert set(commands['console_scripts']) == {
        f'combiner-{name}' for name in ('train', 'evaluate', 'sample', 'export', 'inspect', 'generate', 'prepare')
    }


def test_what_a_package_index_shows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = email.message_from_string(archive.read(name).decode())
    tag = f'v{combiner.__version__}'
    assert metadata['Version'] == combiner.__version__
    assert metadata.get_all('Project-URL') == [
        f'Repository, {REPOSITORY}',
        f'Documentation, {REPOSITORY}/tree/{tag}/docs',
        f'Changelog, {REPOSITORY}/blob/{tag}/CHANGELOG.md',
        f'Issues, {REPOSITORY}/issues',
    ]
    assert not [line for line in metadata.get_all('Classifier') if line.startswith('Private')]

    shown, written = metadata.get_payload(), (ROOT / 'README.md').read_text()
    link = re.compile(r'(?:\]\(|(?:src|href)=")([^)"\s]+)')
    written_links = [target for target in link.findall(prose(written)) if not target.startswith('#')]
    shown_links = [target for target in link.findall(prose(shown)) if not target.startswith('#')]
    pictures = [target for target in written_links if target.endswith('.png')]
    assert pictures
    assert shown_links == [
        target
        if target.startswith('https:')
        else f'{REPOSITORY}/{"raw" if target in pictures else "blob"}/{tag}/{target}'
        for target in written_links
    ]
    assert re.findall(CODE, shown) == re.findall(CODE, written)


def test_without_an_address_there_are_no_links_and_indexes_refuse_the_package(tmp_path):
    for name in ('setup.py', 'README.md'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'combiner').mkdir()
    shutil.copy(ROOT / 'combiner' / '__init__.py', tmp_path / 'combiner')
    publish(tmp_path / 'setup.py', '')
    asked = ('--quiet', '--version', '--classifiers', '--long-description')
    shown = run([sys.executable, '-W', 'ignore', 'setup.py', *asked], cwd=tmp_path)
    assert 'Private :: Do Not Upload' in shown
    assert shown.rstrip().endswith((ROOT / 'README.md').read_text().rstrip())


def test_the_version_is_everywhere_the_same():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == combiner.__version__
    address = re.findall("(?m)^REPOSITORY = '(.*)'$", (ROOT / 'setup.py').read_text())
    assert [citation.get('repository-code', '')] == address
    newest = re.findall('(?m)^## (.+)$', (ROOT / 'CHANGELOG.md').read_text())[0]
    assert re.fullmatch(r'Unreleased: ([\d.]+)|([\d.]+) - \d{4}-\d\d-\d\d', newest)
    assert combiner.__version__ in newest


def test_it_works_elsewhere(wheel, tmp_path):
    """Two steps of a config and a mechanism of one's own, evaluated, sampled, exported; a config of the project."""
    site, here = tmp_path / 'site', tmp_path / 'here'
    here.mkdir()
    run([*QUIET_PIP, 'install', '--no-deps', '--no-index', '--target', str(site), str(wheel)])
    (here / 'mine.py').write_text(MECHANISM)
    (here / 'small.py').write_text(CONFIG)
    (here / 'functions.py').write_text(USES_THE_FUNCTIONS)
    elsewhere = {'cwd': here, 'env': os.environ | {'PYTHONPATH': str(site), 'JAX_PLATFORMS': 'cpu'}}

    def call(name, *arguments, status=0):
        return run([sys.executable, str(site / 'bin' / f'combiner-{name}'), *arguments], status, **elsewhere)

    call('train', '--config=small.py:attention=mine:Mine', '--workdir=run')
    assert 'bits/dim' in call('evaluate', '--workdir=run')
    call('sample', '--workdir=run', '--examples=1', '--samples=1')
    assert (here / 'run' / 'samples.png').is_file()
    call('export', '--workdir=run', '--out=weights')
    elsewhere['env']['PYTHONPATH'] += f'{os.pathsep}{here}'  # for mine.py
    run([sys.executable, '-P', 'functions.py', str(site)], **elsewhere)
    shown = call('inspect', '--config', 'configs/photos.py:size=32', '--batches=1', '--examples=1')
    assert f'the config is the one installed with combiner: {site}/combiner/configs/photos.py' in shown
    assert 'task photos32' in shown
    helped = call('train', '--help')
    assert helped.startswith('Trains a model from a config.')
    assert '--workdir' in helped
    assert 'lra_listops' in call('prepare', '--list')
