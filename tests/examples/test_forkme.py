"""A laboratory of one's own: copied elsewhere, away from this repository, it passes its test and trains."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FORKME = Path(__file__).parents[2] / 'examples' / 'forkme'


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    return shutil.copytree(
        FORKME, tmp_path_factory.mktemp('mine') / 'lab', ignore=shutil.ignore_patterns('__pycache__', 'runs')
    )


def run(folder, *command):
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    environment.pop('PYTHONPATH', None)  # what is not installed is not there
    options = {'capture_output': True, 'text': True, 'timeout': 600, 'check': False}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_test_passes(copy):
    assert re.search(r'\b5 passed', run(copy, '-m', 'pytest', '-q', '-p', 'no:cacheprovider'))


def test_it_trains_and_compares(copy):
    shown = run(copy, 'compare.py', '--steps', '2')
    assert '| attention | bits/dim after 2 steps |' in shown
    rows = re.findall(r'^\| `([\w.:]+)` \| (\d\.\d+) \| [\d,]+ \|$', shown, re.MULTILINE)
    assert sorted(name for name, _ in rows) == ['full', 'mylab.past:WholePast']
    assert len(list(copy.glob('runs/*/metrics.jsonl'))) == 2


def test_the_readme_names_its_files_and_no_other_of_the_repository():
    text = (FORKME / 'README.md').read_text(encoding='utf-8')
    files = {path.relative_to(FORKME).as_posix() for path in FORKME.rglob('*.py')} - {'mylab/__init__.py'}
    named = set(re.findall(r'^\| `([\w/.]+)` \|', text, re.MULTILINE))
    assert named == files
    assert len(re.findall(r'^\d\. ', text, re.MULTILINE)) == 5
    for command in re.findall(r'combiner-\w+', ' '.join(re.findall(r'```bash\n(.*?)```', text, re.DOTALL))):
        assert command == 'combiner-jax' or shutil.which(command, path=str(Path(sys.executable).parent)), command
