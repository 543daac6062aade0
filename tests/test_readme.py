"""What the README says works: its commands name what exists, its links lead somewhere, its code runs."""

import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import combiner

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
FENCE = re.compile(r'^```(\w*)[^\n]*\n(.*?)^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(\s*([^)\s]+)[^)]*\)|(?:src|href)="([^"]+)"')
SHELLS = ('bash', 'sh', 'shell', 'console')


class Command(NamedTuple):
    """One command of the README: `bash target`, `python target` or `python -m target`, and arguments."""

    kind: str
    target: str
    arguments: tuple[str, ...]

    def flags(self) -> dict[str, str]:
        """Values of --name=value and --name value, '' for none."""
        found, name = {}, ''
        for argument in self.arguments:
            if argument.startswith('--'):
                name, _, value = argument[2:].partition('=')
                found[name] = value
            elif name and not found[name]:
                found[name] = argument
        return found


def blocks(*languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(TEXT) if language in languages]


def parse(line: str) -> Command | None:
    """The command on a line; None for those that are none of ours, such as git clone."""
    words = shlex.split(line.removeprefix('$ '), comments=True)
    while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
        words.pop(0)
    if len(words) < 2:
        return None
    program = Path(words[0]).name
    if program == 'bash':
        return Command('bash', words[1], tuple(words[2:]))
    if re.fullmatch(r'python[\d.]*', program):
        if words[1] == '-m' and len(words) > 2:
            return Command('module', words[2], tuple(words[3:]))
        return Command('script', words[1], tuple(words[2:]))
    return None


def commands() -> list[Command]:
    lines = '\n'.join(blocks(*SHELLS)).replace('\\\n', ' ').splitlines()
    return [command for line in lines if (command := parse(line))]


def local_targets() -> list[str]:
    prose = FENCE.sub('', TEXT)
    return sorted({a or b for a, b in LINK.findall(prose) if not re.match(r'\w+:', a or b)})


@functools.cache
def help_text(kind: str, target: str) -> str:
    start = ['-m', target] if kind == 'module' else [target]
    option = '--helpfull' if kind == 'module' else '--help'  # absl's own flags and those of other modules too
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'COLUMNS': '200'}
    done = subprocess.run(
        [sys.executable, *start, option],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


@functools.cache
def config(value: str):
    path, colon, argument = value.partition(':')
    assert (ROOT / path).is_file(), f'{path} does not exist'
    module = importlib.import_module('.'.join(Path(path).with_suffix('').parts))
    return module.get_config(argument) if colon else module.get_config()


def holds(fields, key: str) -> bool:
    first, _, rest = key.partition('.')
    return first in fields and (not rest or holds(fields[first], rest))


def headings() -> set[str]:
    """Anchors of the headings, as code hosts make them."""
    titles = re.findall(r'^#+ +(.+?) *$', FENCE.sub('', TEXT), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def test_tables_are_those_of_the_results():
    from experiments.harness import bench_tables, ranking, verdicts

    found = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / 'results').glob('*.json'))}
    judged = [found[f'claims_{name}']['claims'] for name in ('tiles', 'photographs', 'prose', 'books')]
    accuracies = [found[f'claims_{name}']['claims'] for name in ('listops', 'pathfinder')]
    assert verdicts.table(itertools.chain(*judged)) in TEXT
    assert verdicts.accuracies(itertools.chain(*accuracies)) in TEXT
    assert ranking.table(found['photos']['rows']) in TEXT
    assert bench_tables.table(found['bench']['rows'], 'core', 4096) in TEXT
    assert bench_tables.summary_table(found['bench']['summary'], 'core') in TEXT


def test_the_readme_is_whole():
    assert len(blocks(*SHELLS)) >= 2
    assert len(blocks('python')) >= 1
    assert {'scripts/quickstart.sh', 'scripts/test.sh'} <= {c.target for c in commands() if c.kind == 'bash'}
    assert any(command.kind == 'module' and 'config' in command.flags() for command in commands())
    assert any(Path(target).suffix == '.png' for target in local_targets())


@pytest.mark.parametrize('command', commands(), ids=lambda command: f'{command.kind} {command.target}')
def test_command_names_what_exists(command):
    flags = command.flags()
    if command.kind == 'module':
        assert importlib.util.find_spec(command.target), f'no module {command.target}'
    else:
        assert (ROOT / command.target).is_file(), f'no file {command.target}'
    for flag, value in flags.items():
        name, _, key = flag.partition('.')
        if command.kind != 'bash' and not command.target.startswith('pip'):
            known = re.compile(rf'--(\[no\])?{re.escape(name)}\b')
            assert known.search(help_text(command.kind, command.target)), f'{command.target} has no flag --{name}'
        if flag == 'config':
            mechanism = config(value).model.attention.name
            assert ':' in mechanism or mechanism in combiner.names()
        elif name == 'config':
            assert holds(config(flags['config']), key), f'{flags["config"]} has no field {key}'


@pytest.mark.parametrize('target', local_targets())
def test_link_leads_somewhere(target):
    path, _, anchor = target.partition('#')
    assert (ROOT / path).exists()
    assert not path.startswith('runs/'), 'runs/ is not part of the repository'
    assert path or anchor in headings()


@pytest.fixture(scope='session')
def python_files(tmp_path_factory) -> list[Path]:
    """Every Python block as a file; a first line such as `# mylab/strided.py` names it for others."""
    folder = tmp_path_factory.mktemp('readme')
    files = []
    for index, code in enumerate(blocks('python')):
        named = re.match(r'# ([\w/]+\.py)\s', code)
        files.append(folder / (named[1] if named else f'block_{index}.py'))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text(code, encoding='utf-8')
    return files


@pytest.mark.parametrize('index', range(len(blocks('python'))))
def test_python_block_runs(index, python_files):
    file, folder = python_files[index], Path(os.path.commonpath([path.parent for path in python_files]))
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': f'{folder}{os.pathsep}{ROOT}'}
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
