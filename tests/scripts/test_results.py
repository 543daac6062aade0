"""The script that makes results/ again: it makes all of it, from commands that exist."""

import importlib.util
import re
import shutil
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
    assert set(stages) == set(re.findall(r'^(\w+)\(\) \{', TEXT, re.MULTILINE)) - {'keep', 'note'}
    assert all(float(line.split()[1]) >= 0 for line in listed.splitlines()[1:])


def test_an_unknown_stage_is_refused_before_anything_is_made(tmp_path):
    status, out, said = call(str(tmp_path / 'data'), 'table1', 'table9')
    assert (status, out) == (2, '')
    assert said.startswith('unknown stage table9; known: speed plans')
    assert not (tmp_path / 'data').exists()


@pytest.fixture
def copy(tmp_path):
    """Calls a copy of the script whose Python notes its arguments, and fails with a status at one module."""
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'results').mkdir()
    shutil.copy(SCRIPT, tmp_path / 'scripts')
    (tmp_path / 'scripts' / 'setup.sh').touch()
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)

    def run(module, status, *stages):
        python.write_text(f'#!/bin/sh\necho "$2" >> called\n[ "$2" != experiments.tables.{module} ] || exit {status}\n')
        python.chmod(0o755)
        small = tmp_path / 'runs' / 'small'
        small.mkdir(parents=True, exist_ok=True)
        for name in ('table1', 'pg19'):
            for ending in ('json', 'md', 'png'):
                (small / f'{name}.{ending}').touch()
        command = ['bash', str(tmp_path / 'scripts' / 'results.sh'), str(tmp_path / 'data'), *stages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        called = (tmp_path / 'called').read_text().split()
        return done.returncode, called, {path.stem for path in (tmp_path / 'results').iterdir()}

    return run


def test_a_row_that_fails_stops_neither_its_table_nor_the_stages_after_it(copy):
    called = ['experiments.tables.table1', 'experiments.tables.pg19', 'experiments.tables.page']
    assert copy('table1', 1, 'table1', 'pg19', 'page') == (1, called, {'table1', 'pg19'})


def test_a_table_without_results_is_not_put_into_results(copy):
    status, called, kept = copy('table3', 1, 'table3', 'pg19')
    assert (status, called[-1], kept) == (1, 'experiments.tables.pg19', {'pg19'})


@pytest.mark.parametrize(('module', 'status'), [('table1', 130), ('table1', 2), ('page', 1)])
def test_anything_else_that_fails_ends_the_script(copy, module, status):
    found = copy(module, status, 'table1') if module == 'table1' else copy(module, status, 'page', 'table1')
    assert found == (status, [f'experiments.tables.{module}'], set())


def test_without_failures_it_succeeds(copy):
    assert copy('none', 1, 'table1')[0] == 0
