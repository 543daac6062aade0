"""Every shell command of README and docs is executed, at the smallest size, in a copy of the project.

It takes minutes: bash scripts/test.sh -m slow tests/test_commands.py. In the copy the configs have the scale `quick`
unless a command names another. `SMALLER` makes commands smaller, and `NOT_RUN` has those that cannot run everywhere,
with the reason; a command of a page is in neither list unless it has to be.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import joined
import pytest
import small_data
from test_readme import INLINE, PAGES, SHELLS, blocks, parse, prose

ROOT = Path(__file__).parents[1]
COPIED = ('combiner', 'configs', 'docs', 'experiments', 'results', 'scripts', 'setup.py', 'README.md')
SECONDS = 900  # for one command

# Commands that do not run here, by the first pattern that they contain, and why.
NOT_RUN = {
    r'scripts/setup\.sh': 'installs packages',
    r'source \.venv': 'the environment is that of the tests',
    r'\.ci/run|scripts/test\.sh|pytest ': 'runs tests, which the suite itself runs',
    r'pre_commit install': 'changes the hooks of the repository; tests of the linters are in .ci/run',
    r'scripts/wheel\.sh': 'installs packages; tests/test_wheel.py installs the wheel without them',
    r'scripts/docs\.sh': 'needs the extra docs; .ci/run builds the website',
    r'scripts/compile\.py|tables\.memory': 'needs a compiler for TPUs or GPUs; tests/scripts/test_compile.py',
    r'--tracker=\S*wandb': 'needs the package wandb; tests/monitoring/trackers/test_wandb.py',
    r'gs://': "needs Google's store; tests/test_cloud.py has one in memory",
    r'--launcher=slurm': 'needs Slurm; tests/experiments/harness/test_slurm.py has a stand-in',
    r'data\.prepare (NAME|cifar10)': 'downloads; tests/data/test_prepare.py',
    r'scripts/results\.sh': 'takes many hours; tests/scripts/test_results.py',
    r'experiments\.report --workdir DIR': 'needs finished tables there; the report on those of the page is made',
    r'tables\.loss_by_position': 'needs a run of experiments.claims.books; test_loss_by_position.py',
    r'scripts/notebook\.py': 'takes minutes, and the notebook is executed by tests of its own',
}

# What makes commands smaller: a pattern in a command, and what it becomes.
SMALLER = (
    (r'\bDIR\b', '{data}'),
    (r'runs/quickstart', '{quickstart}'),
    (r'scale=(cpu|small)', 'scale=quick'),
    (r'length=4096', 'length=256'),
    (r'--seeds=3', '--seeds=1'),
    (r'(tables\.table1 .*)', r'\1 --scale=quick --rows=cifar-10/combiner-fixed-6-layers'),
    (r"'listops/\*,\*/combiner-fixed'", 'listops/combiner-fixed'),
    (r"(tables\.(table[235]|pg19|table4_pretrained) .*|tables\.table4 --rows='listops/\*,text.*)", r'\1 --dry_run'),
    (r'tables\.merge results/', 'tables.merge runs/tables/'),
    (r'(tables\.recall .*)', r'\1 --scale=quick --rows=recall/combiner-fixed'),
    (r'(tables\.photos)', r'\1 --scale=quick --rows=photographs/combiner-fixed'),
    (r'claims\.photographs --measure', r'\g<0> --rows photographs/fixed'),
    (r'(experiments\.claims\.\w+.*)', r'\1 --dry_run'),  # their sizes are fixed: minutes to hours a row
    (r'(figures\.figure3)', r'\1 --lengths 64,128 --repeats 1'),
    (
        r'(bench\.py( --| *$).*)',
        r'\1 --lengths 64,128 --dense_up_to 128 --fit_from 64 --repeats 1 --peak_size 256 --names combiner_fixed,full',
    ),
    (r'bench\.py packed', r'\g<0> --length 128 --names local'),
    (r'--repeats [57]', '--repeats 1'),
    (r'bench\.py saving', r'\g<0> configs/photos.py --rounds 1'),
    (r'bench\.py loop', r'\g<0> --rounds 1 --steps 2'),
    (r'bench\.py data', r'\g<0> configs/photos.py --layers 1 --width 32 --seconds 0.2 --steps 1'),
    (r'--kills 20', '--kills 1'),
    (r'(mylab/folder\.py:\S+)', r'\1,steps=30'),
    (r'--limit=6000', '--limit=40'),
    (r'localhost:7200', 'localhost:{port}'),
)


def scripts_of(page: str) -> list[str]:
    """The shell blocks of a page, and each command between backquotes, in order."""
    text = PAGES[page]
    inline = [code for code in INLINE.findall(prose(text)) if parse(code.partition(' && ')[0])]
    return [*(block.replace('\\\n', ' ') for block in blocks(text, *SHELLS)), *inline]


def runnable(script: str, **names: str) -> str:
    """The commands of a script that run here, made smaller; '' if there are none."""
    lines = []
    for line in script.splitlines():
        command = line.partition(' #')[0].strip()
        if not command or any(re.search(pattern, command) for pattern in NOT_RUN):
            continue
        for pattern, smaller in SMALLER:
            command = re.sub(pattern, smaller, command)
        lines.append(command.format(**names) if '{' in command else command)
    return '\n'.join(lines) + ('\nwait' if any(line.endswith('&') for line in lines) else '') if lines else ''


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A copy of the project, with small data, and a finished run of the quickstart."""
    copy = tmp_path_factory.mktemp('project')
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(source, copy / name)
    for path in (copy / 'configs').glob('*.py'):
        text = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r"scale='(cpu|full)'", "scale='quick'", text), encoding='utf-8')
    (copy / '.venv').symlink_to(sys.prefix)
    (copy / 'scripts' / 'setup.sh').write_text('', encoding='utf-8')  # the environment is there
    small_data.write(copy / 'data')
    for number, name in enumerate(('choosing.md', 'data.md', 'performance.md')):  # texts of a user
        shutil.copy(ROOT / 'docs' / name, copy / 'data' / f'{number}.txt')
    execute('bash scripts/quickstart.sh', copy)
    (copy / 'runs' / 'quickstart').rename(copy / 'finished')
    return copy


def execute(script: str, folder: Path) -> None:
    """Runs a script with this Python as `python`, and shows what it printed if it fails."""
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        'COMBINER_CACHE': str(folder / 'cache'),
    }
    command = ['bash', '-euo', 'pipefail', '-c', script]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS * (1 + script.count('\n')),
        check=False,
    )
    assert done.returncode == 0, f'{script}\nends with {done.returncode}:\n{done.stdout[-3000:]}'


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if scripts_of(page)])
def test_commands_run(page, project):
    shutil.rmtree(project / 'runs', ignore_errors=True)
    for code in blocks(PAGES['README.md'], 'python') + blocks(PAGES[page], 'python'):
        if named := re.match(r'# (mylab/\w+\.py)\s', code):
            (project / 'mylab').mkdir(exist_ok=True)
            (project / named[1]).write_text(code, encoding='utf-8')
    if (
        'combiner.train --config' not in PAGES[page] and 'runs/fixed' in PAGES[page]
    ):  # a page that begins with a finished run
        shutil.copytree(project / 'finished', project / 'runs' / 'fixed')
    names = {'data': str(project / 'data'), 'quickstart': str(project / 'finished'), 'port': str(joined.free_port())}
    for script in scripts_of(page):
        if commands := runnable(script, **names):
            execute(commands, project)


def test_every_entry_of_the_lists_is_needed():
    commands = [line for page in PAGES for script in scripts_of(page) for line in script.splitlines()]
    for pattern in (*NOT_RUN, *(pattern for pattern, _ in SMALLER)):
        assert any(re.search(pattern, line) for line in commands), f'no command has {pattern}'
