import ast
import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from combiner import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ('path', 'level', 'shown'),
    [
        (cli.__file__, logging.INFO, True),
        ('/site-packages/jax/_src/xla_bridge.py', logging.INFO, False),
        ('/site-packages/jax/_src/xla_bridge.py', logging.WARNING, True),
        ('/site-packages/orbax/checkpoint/checkpoint_manager.py', logging.WARNING, False),
        ('/site-packages/orbax/checkpoint/checkpoint_manager.py', logging.ERROR, True),
        ('/site-packages/tensorflow_datasets/core/features/image_feature.py', logging.WARNING, False),
    ],
)
def test_what_other_libraries_say_is_shown_when_it_helps(path, level, shown):
    record = logging.LogRecord('absl', level, path, 1, 'said', None, None)
    assert cli._worth_showing(record) == shown


# What takes long to import, or is installed only with an extra.
SLOW = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'scipy', 'pandas', 'submitit', 'gcsfs'}
HELP = """
import importlib, runpy, sys

for module in ('combiner.train', 'experiments.tables.table1'):
    sys.argv = ['command', '--help']
    try:
        runpy.run_module(module, run_name='__main__', alter_sys=True)
    except SystemExit:
        pass
for module in ('combiner.evaluate', 'combiner.sample'):
    importlib.import_module(module)
print(*sys.modules, file=sys.stderr)
"""


def test_help_imports_nothing_slow():
    command = [sys.executable, '-W', 'ignore', '-c', HELP]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '--workdir' in done.stdout
    assert '--rows' in done.stdout
    assert not SLOW & set(done.stderr.split())


PROGRAM = """
import logging, os, sys
from combiner import cli

handler = logging.StreamHandler()
logging.getLogger().addHandler(handler)

@cli.guarded
def main():
    print('box ▯ ± é \\udce9')
    os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), str([os.fstat(n).st_rdev for n in (0, 1, 2)]).encode())
    if 'closed' in sys.argv:
        while True:
            print('more' * 1000)
    assert handler.stream in (None, sys.stderr)
    print('said', file=sys.stderr, flush=True)

main()
"""
# Shell redirections and environment, then the expected status, and what is expected of the output.
SETTINGS = {
    'plain': ('', 0, 'box ▯ ± é \\udce9\n'),
    'latin-1': ('PYTHONIOENCODING=latin-1', 0, 'box \\u25af ± é \\udce9\n'),
    'ascii': ('PYTHONIOENCODING=ascii', 0, 'box \\u25af \\xb1 \\xe9 \\udce9\n'),
    'C': ('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0', 0, None),
    'no stderr': ('2>&-', 0, 'box ▯ ± é \\udce9\n'),
    'no streams': ('<&- >&- 2>&-', 0, ''),
    'full': ('>/dev/full', 1, ''),
    'full unbuffered': ('PYTHONUNBUFFERED=1 >/dev/full', 1, ''),
    'full for messages': ('2>/dev/full', 0, 'box ▯ ± é \\udce9\n'),
    'closed': ('| head -n 1; exit ${PIPESTATUS[0]}', 141, 'box ▯ ± é \\udce9\n'),
    'both closed': ('2>&1 | head -n 1; exit ${PIPESTATUS[0]}', 141, 'box ▯ ± é \\udce9\n'),
}


def test_output_goes_wherever_a_command_is_started(tmp_path):
    """All settings at once, as most of the time is that of importing JAX."""
    (tmp_path / 'program.py').write_text(PROGRAM, encoding='utf-8')
    processes = {}
    for name, (setting, _, _) in SETTINGS.items():
        before, after = (setting, '') if setting[:1].isalpha() else ('', setting)
        word = 'closed' if 'closed' in name else 'open'
        command = (
            f'{before} {sys.executable} {tmp_path / "program.py"} {tmp_path / name.replace(" ", "-")} {word} {after}'
        )
        environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'PYTHONUTF8': '1'}
        environment.pop('PYTHONUNBUFFERED', None)
        processes[name] = subprocess.Popen(
            ['bash', '-c', command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    written = {name: process.communicate() for name, process in processes.items()}
    for name, process in processes.items():
        setting, status, expected = SETTINGS[name]
        output, error = (text.decode('latin-1' if name == 'latin-1' else 'utf-8') for text in written[name])
        assert process.returncode == status, (name, error)
        if expected is not None:
            assert output == expected, name
        assert 'Traceback' not in error, name
        assert 'Exception ignored' not in error, name
        if '>/dev/full' in setting and status:
            said = '' if 'unbuffered' in name else 'said\n'
            unwritten = 'the output could not be written (No space left on device); make room, or send it elsewhere'
            assert error == f'{said}error: {unwritten}\n'
        # A file is never opened in the place of a closed stream, where C libraries would write their messages into it.
        if name != 'full unbuffered':  # which ends before
            assert '0, 0, 0' not in (tmp_path / name.replace(' ', '-')).read_text(encoding='utf-8'), name


def is_command(path):
    """Whether a file is run by its name; not prepare_tfds.py, which runs where only TFDS is installed."""
    return "if __name__ == '__main__':" in path.read_text(encoding='utf-8') and path.name != 'prepare_tfds.py'


COMMANDS = [
    path
    for folder in ('combiner', 'experiments', 'scripts')
    for path in (ROOT / folder).rglob('*.py')
    if is_command(path)
]
each_command = pytest.mark.parametrize('path', COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))


def sources(path):
    """The text of a command, with that of the command of the harness over which it is a declaration or a script."""
    text, harness = path.read_text(encoding='utf-8'), ROOT / 'experiments' / 'harness'
    if path.is_relative_to(ROOT / 'combiner'):
        return text
    shared = re.search(r'^    (\w+)\.command\(', text, re.MULTILINE)
    return text + sources(next(harness.rglob(f'{shared[1]}.py'))) if shared else text


def test_there_are_commands():
    assert len(COMMANDS) >= 25


@each_command
def test_every_command_has_a_guarded_terminal(path):
    assert re.search(r'@cli\.guarded|(cli|processes)\.run\(', sources(path))


@each_command
def test_every_command_prints_what_it_does_first_and_what_to_do_next(path):
    assert 'messages.heading(' in sources(path)
    assert 'messages.next_steps(' in sources(path)


HELP_OF_ALL = """
import json, os, runpy, sys, tempfile, traceback

import importlib, pkgutil
import experiments.harness
from combiner import evaluate, sample, train

for each in pkgutil.iter_modules(experiments.harness.__path__):  # once, and not in each process
    importlib.import_module('experiments.harness.' + each.name)
sys.path.insert(0, os.getcwd())
found = {}
for path in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out:
        process = os.fork()
        if not process:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.argv = [path, '--help']
            module = path.removesuffix('.py').replace('/', '.')
            sys.modules.pop(module, None)
            status = 0
            try:
                if path.startswith('scripts'):
                    runpy.run_path(path, run_name='__main__')
                else:
                    runpy.run_module(module, run_name='__main__', alter_sys=True)
            except SystemExit as stopped:
                status = stopped.code or 0
            except ImportError:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        out.seek(0)
        found[path] = [status, out.read().decode()]
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def helps():
    """The exit status and the text of --help, of every command, each in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', HELP_OF_ALL],
        input=json.dumps([str(path.relative_to(ROOT)) for path in COMMANDS]),
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'COLUMNS': '120'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@each_command
def test_help_shows_the_description_and_then_the_own_options(helps, path):
    status, text = helps[str(path.relative_to(ROOT))]
    if absent := re.search("ModuleNotFoundError: No module named '(?!combiner|experiments)(.*)'", text):
        pytest.skip(f'needs the package {absent[1]}, of an extra')
    assert status == 0, text
    assert 'Traceback' not in text
    described, options = text.split('options:\n', 1)
    first = (ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '').splitlines()[0]
    assert first in described or 'usage:' in described
    assert '--' in options
    assert not re.search('^ +--(verbosity|pdb|alsologtostderr|jax_)', options, re.MULTILINE)  # of absl and JAX


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device; make room and start'),
        (FileNotFoundError(errno.ENOENT, 'No such file', 'a.json'), "No such file: 'a.json'"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line(error, message, capsys):
    @cli.guarded
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_is_one_line_with_the_command_that_starts_again(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'experiments.figures.figure1', '--out', 'my figure.png'])

    @cli.guarded
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    command = "python -m experiments.figures.figure1 --out 'my figure.png'"
    assert capsys.readouterr().err == f'error: stopped by Ctrl-C; to start again: {command}\n'
