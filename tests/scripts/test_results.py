"""The script that makes results/ again: it makes all of it, from commands that exist."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'scripts' / 'results.sh'
TEXT = SCRIPT.read_text(encoding='utf-8')


@pytest.mark.parametrize('path', sorted((ROOT / 'results').iterdir()), ids=lambda path: path.name)
def test_everything_in_results_is_made(path):
    name = path.stem.removeprefix('claims_')
    assert path.name in TEXT or re.search(rf'-m experiments\.(tables|claims)\.{name}\b', TEXT)


def test_it_calls_what_exists():
    called = re.findall(r'"\$python" (-m )?(\S+)', TEXT)
    assert len(called) > 5
    for as_module, target in called:
        assert importlib.util.find_spec(target) if as_module else (ROOT / target).is_file()


def call(*arguments):
    done = subprocess.run(['bash', str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_without_arguments_it_lists_its_stages():
    status, out, listed = call()
    assert (status, out) == (2, '')
    assert listed.startswith('usage: bash scripts/results.sh DATA_DIR [STAGE…]')
    stages = [line.split()[0] for line in listed.splitlines()[1:]]
    assert len(stages) > 10
    assert set(stages) == set(re.findall(r'^(\w+)\(\) \{', TEXT, re.MULTILINE)) - {'keep'}
    assert all(float(line.split()[1]) >= 0 for line in listed.splitlines()[1:])


def test_an_unknown_stage_is_refused_before_anything_is_made(tmp_path):
    status, out, said = call(str(tmp_path / 'data'), 'table1', 'table9')
    assert (status, out) == (2, '')
    assert said.startswith('unknown stage table9; known: speed plans')
    assert not (tmp_path / 'data').exists()
