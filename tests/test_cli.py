import errno
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
            assert error == f'{said}error: the output could not be written (No space left on device)\n'
        # A file is never opened in the place of a closed stream, where C libraries would write their messages into it.
        if name != 'full unbuffered':  # which ends before
            assert '0, 0, 0' not in (tmp_path / name.replace(' ', '-')).read_text(encoding='utf-8'), name


def test_every_command_has_a_guarded_terminal():
    found = 0
    for folder in ('combiner', 'experiments', 'scripts'):
        for path in (ROOT / folder).rglob('*.py'):
            text = path.read_text(encoding='utf-8')
            if "if __name__ == '__main__':" not in text or path.name == 'prepare_tfds.py':
                continue  # that one runs where only TFDS is installed
            shared = re.search(r'^    (\w+)\.command\(', text, re.MULTILINE)
            if shared and folder != 'combiner':  # a declaration or a script, over a command of the harness
                text += (ROOT / 'experiments' / 'harness' / f'{shared[1]}.py').read_text(encoding='utf-8')
            assert re.search(r'@cli\.guarded|(cli|processes)\.run\(|runner\.command\(', text), path
            found += 1
    assert found >= 25


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
