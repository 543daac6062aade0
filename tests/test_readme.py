"""README and docs are right: commands and links name what exists, code runs, tables are those of results/."""

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
from combiner.core import registry

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / 'README.md', ROOT / 'CONTRIBUTING.md'
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in (README, CONTRIBUTING, *DOCS)}
WORDS = 1500
FENCE = re.compile(r'^```(\w*)[^\n]*\n(.*?)^```', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')
LINK = re.compile(r'\]\(\s*([^)\s]+)[^)]*\)|(?:src|href)="([^"]+)"')
SHELLS = ('bash', 'sh', 'shell', 'console')
COMMAND_WORDS = ('bash', 'python')

# Prints what each command says of its flags: each in a fork of one process, which imports everything once.
HELP = """
import importlib, json, os, runpy, sys, tempfile

def said(kind, target):
    with tempfile.TemporaryFile() as out:
        process = os.fork()
        if not process:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            try:
                if kind == 'module':
                    sys.argv[1:] = ['--helpfull']  # absl's own flags and those of other modules too
                    del sys.modules[target]
                    runpy.run_module(target, run_name='__main__', alter_sys=True)
                else:
                    sys.argv, sys.path[0] = [target, '--help'], os.path.dirname(target)
                    runpy.run_path(target, run_name='__main__')
            finally:
                sys.stdout.flush()
                os._exit(0)  # an orderly end of so large a process takes a second
        os.waitpid(process, 0)
        out.seek(0)
        return out.read().decode()

asked = json.load(sys.stdin)
for kind, target in asked:
    if kind == 'module':
        importlib.import_module(target)
print(json.dumps([said(*each) for each in asked]))
"""


class Command(NamedTuple):
    """One command of a page: `bash target`, `python target` or `python -m target`, and arguments."""

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


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub('', text)


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


def commands(text: str) -> list[Command]:
    """Those of the shell blocks, and those between backquotes."""
    lines = '\n'.join(blocks(text, *SHELLS)).replace('\\\n', ' ').splitlines()
    named = [line for line in INLINE.findall(prose(text)) if Path(line.split()[0]).name in COMMAND_WORDS]
    parts = [part for line in [*lines, *named] for part in line.split(' && ')]
    return [command for part in parts if (command := parse(part))]


COMMANDS = sorted({(command, page) for page, text in PAGES.items() for command in commands(text)})


def local_targets(text: str) -> list[str]:
    return sorted({a or b for a, b in LINK.findall(prose(text)) if not re.match(r'\w+:', a or b)})


@functools.cache
def help_texts() -> dict[tuple[str, str], str]:
    asked = sorted({(c.kind, c.target) for c, _ in COMMANDS if c.kind != 'bash' and c.flags()})
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'COLUMNS': '200'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', HELP],
        input=json.dumps(asked),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))


@functools.cache
def config(value: str):
    path, colon, argument = value.partition(':')
    name = '.'.join(Path(path).with_suffix('').parts)
    assert importlib.util.find_spec(name), f'{path} does not exist'  # in the project, or a block of the page
    module = importlib.import_module(name)
    return module.get_config(argument) if colon else module.get_config()


def holds(fields, key: str) -> bool:
    first, _, rest = key.partition('.')
    return first in fields and (not rest or holds(fields[first], rest))


def headings(text: str) -> set[str]:
    """Anchors of the headings, as code hosts make them."""
    titles = re.findall(r'^#+ +(.+?) *$', prose(text), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@functools.cache
def results() -> dict:
    return {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / 'results').glob('*.json'))}


def compared() -> list[dict]:
    """The comparisons of two models, of all data."""
    names = ('tiles', 'photographs', 'prose', 'books')
    return list(itertools.chain(*(results()[f'claims_{name}']['claims'] for name in names)))


def test_tables_are_those_of_the_results():
    from experiments.harness import bench_tables, marked, results_page, verdicts

    accuracies = [results()[f'claims_{name}']['claims'] for name in ('listops', 'pathfinder')]
    new = marked.filled(PAGES['README.md'], results_page.readme_parts(ROOT / 'results'))
    assert new == PAGES['README.md'], 'README.md is old: python -m experiments.tables.page'
    assert verdicts.table(compared()) in PAGES['docs/results.md']
    assert verdicts.accuracies(itertools.chain(*accuracies)) in PAGES['docs/results.md']
    assert bench_tables.table(results()['bench']['rows'], 'core', 4096) in PAGES['docs/performance.md']
    assert bench_tables.summary_table(results()['bench']['summary'], 'core') in PAGES['docs/performance.md']


def test_throughputs_are_those_of_the_results():
    from experiments.harness import packed_bench

    text = PAGES['docs/performance.md']
    for row in results()['packed_bench']['rows']:
        assert packed_bench.line(row) in text


def test_sentences_of_the_readme_are_those_of_the_results():
    text = ' '.join(PAGES['README.md'].split())
    shown = [claim['shown'] for claim in compared()]
    clear = sum(claim['shown'] and claim['clear'] for claim in compared())
    assert f'In {len(shown)} comparisons' in text
    assert f'is better in {sum(shown)}. In {clear} of these' in text
    assert len(shown) - sum(shown) == 1
    times = {row['name']: row for row in results()['bench']['rows'] if (row['what'], row['length']) == ('core', 4096)}
    for name, words in (
        ('combiner_fixed', 'ms forward and {} ms forward and backward'),
        ('dense', 'ms and {} ms'),
        ('full', 'ms and {} ms'),
    ):
        forward, both = (f'{times[name][f"{each}_ms"]:.0f}' for each in ('forward', 'forward_backward'))
        assert f'{forward} {words.format(both)}' in text


def test_what_each_mechanism_supports_is_on_its_page():
    for name in combiner.names():
        mechanism = registry.resolve(name)
        if not mechanism.__module__.startswith('combiner.'):
            continue  # another test's
        causal, bidirectional = (form in mechanism.supported_causal for form in (True, False))
        facts = (causal, bidirectional, mechanism.supports_segments, not mechanism.requires)
        hyper = ', '.join(f'`{key}={value}`' for key, value in registry.hyper_parameters(name).items())
        line = f'| `{name}` | {" | ".join("yes" if fact else "–" for fact in facts)} | {hyper} |'
        assert line in PAGES['docs/mechanisms.md'], f'write into docs/mechanisms.md: {line}'


def test_the_readme_is_short_and_whole():
    text = PAGES['README.md']
    assert len(text.split()) <= WORDS
    assert len(blocks(text, *SHELLS)) >= 2
    assert len(blocks(text, 'python')) >= 1
    assert {'scripts/quickstart.sh', 'scripts/test.sh'} <= {c.target for c in commands(text) if c.kind == 'bash'}
    assert any(command.kind == 'module' and 'config' in command.flags() for command in commands(text))
    assert any(Path(target).suffix == '.png' for target in local_targets(text))


def test_the_readme_begins_with_picture_code_and_the_two_commands():
    first = PAGES['README.md'].partition('\n## ')[0]
    order = [first.index(part) for part in ('<img src=', '```python', 'scripts/quickstart.sh', 'scripts/test.sh')]
    assert order == sorted(order)


def test_the_readme_links_to_every_page():
    links = set(local_targets(PAGES['README.md']))
    assert links >= PAGES.keys() - {'README.md'}


@pytest.mark.parametrize('page', [page for page in PAGES if page.startswith('docs/')])
def test_a_page_starts_with_its_purpose(page):
    title, paragraph = PAGES[page].split('\n\n')[:2]
    assert title.startswith('# ')
    assert paragraph.startswith('This page ')


@pytest.mark.xdist_group('help')
@pytest.mark.parametrize(('command', 'page'), COMMANDS, ids=lambda part: part if isinstance(part, str) else part.target)
def test_command_names_what_exists(command, page, importable):
    for code in blocks(PAGES['README.md'], 'python') + blocks(PAGES[page], 'python'):
        write_module(code, importable, 'block_0')  # a command may name what an example defines
    flags = command.flags()
    if command.kind != 'module':
        assert (ROOT / command.target).is_file(), f'no file {command.target}'
    elif command.target != 'pre_commit':
        assert importlib.util.find_spec(command.target), f'no module {command.target}'
    for flag, value in flags.items():
        name, _, key = flag.partition('.')
        if command.kind != 'bash':
            known = re.compile(rf'--(\[no\])?{re.escape(name)}\b')
            text = help_texts()[command.kind, command.target]
            assert known.search(text), f'{command.target} has no flag --{name}: {text[-500:]}'
        if flag == 'config':
            mechanism = config(value).model.attention.name
            assert ':' in mechanism or mechanism in combiner.names()
        elif name == 'config':
            assert holds(config(flags['config']), key), f'{flags["config"]} has no field {key}'


@pytest.mark.parametrize(
    ('page', 'target'), [(page, target) for page, text in PAGES.items() for target in local_targets(text)]
)
def test_link_leads_somewhere(page, target):
    path, _, anchor = target.partition('#')
    reached = (ROOT / page).parent / path if path else ROOT / page
    assert reached.exists()
    relative = reached.resolve().relative_to(ROOT.resolve())
    assert relative.parts[:1] != ('runs',), 'runs/ is not part of the repository'
    assert not anchor or anchor in headings(PAGES[relative.as_posix()])


def write_module(code: str, folder: Path, otherwise: str) -> str:
    """Writes a block of Python to the file that its first line names, such as `# mylab/strided.py`, to be imported."""
    named = re.match(r'# ([\w/]+\.py)\s', code)
    file = folder / (named[1] if named else f'{otherwise}.py')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding='utf-8')
    importlib.invalidate_caches()
    return '.'.join(file.relative_to(folder).with_suffix('').parts)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder of modules that can be imported until the test ends."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition('.')[0] in ('mylab', *(f'block_{number}' for number in range(10))):
            del sys.modules[name]


@pytest.mark.parametrize('page', [page for page, text in PAGES.items() if blocks(text, 'python')])
def test_python_blocks_run(page, importable):
    """In order; one whose first line names a file can be imported by those after it."""
    for index, code in enumerate(blocks(PAGES[page], 'python')):
        importlib.import_module(write_module(code, importable, f'block_{index}'))
