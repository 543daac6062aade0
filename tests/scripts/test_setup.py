"""scripts/setup.sh: which extras it takes, and which pins on which Python; a stand-in for Python installs nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_readme import PAGES, commands
from test_workflows import arguments_of_setup

ROOT = Path(__file__).parents[2]
EXTRAS = arguments_of_setup()['extras']

# Says that it has a version, makes environments of which it is the Python, and writes down what pip is asked for.
PYTHON = """#!/usr/bin/env bash
case $* in
  --version) echo "Python {version}" ;;
  '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-m pip '*) echo "$*" >>"{asked}" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with the files that the set-up reads."""
    (tmp_path / 'scripts').mkdir()
    for name in ('scripts/setup.sh', 'setup.py', 'constraints.txt', 'constraints-newest.txt'):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def setup(clone, *arguments, version='3.11.7', stack=''):
    """Runs the set-up; returns what ended, and the command lines of pip."""
    asked, python = clone / 'asked.txt', clone / 'python'
    python.write_text(PYTHON.format(version=version, asked=asked), encoding='utf-8')
    python.chmod(0o755)
    asked.write_text('')
    done = subprocess.run(
        ['bash', str(clone / 'scripts' / 'setup.sh'), *arguments],
        env=os.environ | {'PYTHON': str(python), 'STACK': stack},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, asked.read_text().splitlines()


@pytest.mark.parametrize(
    ('version', 'stack', 'pins', 'folder'),
    [
        ('3.11.7', '', 'constraints.txt', '.venv'),
        ('3.12.1', '', 'constraints-newest.txt', '.venv'),
        ('3.14.0', '', 'constraints-newest.txt', '.venv'),
        ('3.12.1', 'newest', 'constraints-newest.txt', '.venv-newest'),
    ],
)
def test_pins_are_those_tested_on_the_python(clone, version, stack, pins, folder):
    done, asked = setup(clone, 'dev', version=version, stack=stack)
    assert done.returncode == 0, done.stderr
    (line,) = asked
    assert f'--constraint {clone / pins} --editable .[dev]' in line
    assert (clone / folder / 'setup-done-dev').is_file()
    _, again = setup(clone, 'dev', version=version, stack=stack)
    assert not again
    with (clone / pins).open('a') as file:
        file.write('# changed\n')
    _, changed = setup(clone, 'dev', version=version, stack=stack)
    assert changed == asked


@pytest.mark.parametrize('extra', ['gpu', 'cuda,gpu', 'jax[cuda13]', '.*'])
def test_an_unknown_extra_is_refused_with_those_there_are(clone, extra):
    done, asked = setup(clone, extra)
    assert done.returncode == 2
    wrong, _, known = done.stderr.strip().partition('; choose from ')
    assert wrong == f"There is no extra '{extra.split(',')[-1]}'"
    assert set(known.split(', ')) == EXTRAS
    assert not asked
    assert not (clone / '.venv').exists()


def test_several_extras_have_commas(clone):
    done, asked = setup(clone, 'cuda', 'slurm')
    assert (done.returncode, done.stderr, asked) == (2, 'Write several extras with commas: cuda,slurm\n', [])
    done, asked = setup(clone, 'cuda,slurm')
    assert done.returncode == 0
    assert asked[0].endswith('.[cuda,slurm]')


def test_an_unknown_stack_is_refused(clone):
    done, asked = setup(clone, stack='latest')
    assert (done.returncode, asked) == (2, [])
    assert 'STACK=latest is unknown' in done.stderr


def test_header_and_pages_name_extras_that_exist():
    header = (ROOT / 'scripts' / 'setup.sh').read_text(encoding='utf-8')
    assert set(re.search(r'# EXTRA: ([\w, -]+);', header)[1].split(', ')) == EXTRAS
    for page, text in PAGES.items():
        for command in commands(text):
            if command.target == 'scripts/setup.sh':
                assert set(','.join(command.arguments).split(',')) <= EXTRAS | {''}, f'{page}: {command}'
