"""The first and the last lines of commands."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from combiner import messages

ROOT = Path(__file__).parents[1]


def test_first_lines_are_the_facts_that_are_known(capsys):
    messages.heading(device='1 device (cpu)', expected_time='', data=None, steps=0)
    assert capsys.readouterr().out == 'device: 1 device (cpu)\nsteps: 0\n'


def test_last_lines_can_be_copied(capsys):
    messages.next_steps('', messages.module_command('combiner.evaluate', '--workdir', 'my runs/x'), '', 'look at x')
    assert capsys.readouterr().out == "next: python -m combiner.evaluate --workdir 'my runs/x'\n      look at x\n"
    messages.next_steps('')
    assert capsys.readouterr().out == ''
    assert messages.training('a.py:b=c', '--config.steps=2', data_dir='d') == (
        'python -m combiner.train --config a.py:b=c --config.steps=2 --config.data.data_dir=d --workdir DIR'
    )


@pytest.mark.parametrize(
    ('started', 'arguments', 'shown'),
    [
        (['python', '-m', 'combiner.train', '--x', 'a b'], ['/x/train.py'], "python -m combiner.train --x 'a b'"),
        (['/v/python3', '/v/combiner-train', '--config=c'], ['/v/combiner-train'], 'combiner-train --config=c'),
        (['python', 'scripts/kill.py', '--kills', '2'], ['scripts/kill.py'], 'python scripts/kill.py --kills 2'),
    ],
)
def test_the_same_command_is_the_one_that_was_typed(monkeypatch, started, arguments, shown):
    monkeypatch.setattr(sys, 'orig_argv', started)
    monkeypatch.setattr(sys, 'argv', [*arguments, *started[2:]])
    assert messages.same_command() == shown


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(1.4, '1 seconds'), (119.0, '119 seconds'), (150.0, '2 minutes'), (7200.0, '2 hours'), (30 * 86_400.0, '30 days')],
)
def test_durations(seconds, text):
    assert messages.duration(seconds) == text


def facts_and_next(command):
    """Runs a command; returns the names of its first lines, in order, and the commands of its last ones."""
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    words = [sys.executable if word == 'python' else word for word in shlex.split(command, comments=True)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    last = next(index for index, line in enumerate(lines) if line.startswith('next: '))
    names = [line.partition(': ')[0] for line in lines[:last]]
    return names, [line[len('next: ') :] for line in lines[last:]]


@pytest.mark.slow
def test_each_command_leads_to_the_next(tmp_path):
    small = (
        '--config.steps=4 --config.optimizer.warmup_steps=1 --config.run.eval_examples=2 --config.run.test_examples=2 '
        '--config.data.batch_size=2'
    )
    names, (train,) = facts_and_next(
        f'python -m combiner.data.inspect --config configs/photos.py:scale=quick,size=16 {small} --batches 1'
    )
    assert names[0] == 'config'
    names, after = facts_and_next(train.replace('DIR', shlex.quote(str(tmp_path / 'a run'))))
    assert names[:5] == ['device', 'config', 'data', 'workdir', 'parameters']
    evaluate, sample, board = after
    assert board == f"tensorboard --logdir '{tmp_path}/a run/tensorboard'"
    names, (_, best, export) = facts_and_next(evaluate)
    assert names[:5] == ['device', 'config', 'data', 'workdir', 'parameters']
    for command in (sample, best):
        names, steps = facts_and_next(command)
        assert names[:5] == ['device', 'config', 'data', 'workdir', 'parameters']
        assert steps
    names, (load,) = facts_and_next(export.replace('DIR', shlex.quote(str(tmp_path / "a model's folder"))))
    assert names[0] == 'device'
    words = [sys.executable, *shlex.split(load)[1:]]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout
    assert shown.startswith('LanguageModel(')
