import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from combiner.run import workdir_lock

ROOT = Path(__file__).parents[2]


def record(path):
    return json.loads((path / workdir_lock.NAME).read_text(encoding='utf-8'))


def leave(path, **changes):
    """The record of a training that was killed."""
    found = {'host': workdir_lock.platform.node(), 'boot': workdir_lock._boot(), 'pid': os.getpid(), 'token': 'other'}
    found |= {'process_start': workdir_lock._process_start(os.getpid()), 'started': 'then', 'command': 'train.py'}
    (path / workdir_lock.NAME).write_text(json.dumps(found | changes), encoding='utf-8')


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(workdir_lock, 'BEAT_SECONDS', 0.02)
    monkeypatch.setattr(workdir_lock, 'PATIENCE_SECONDS', 0.3)
    monkeypatch.setattr(workdir_lock, '_SETTLE_SECONDS', 0.1)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(file, operation):
        raise OSError(workdir_lock.errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(workdir_lock.fcntl, 'flock', flock)


def test_the_record_says_who_trains_and_goes_with_the_training(tmp_path):
    with workdir_lock.locked(tmp_path / 'run') as check:
        found = record(tmp_path / 'run')
        assert (found['pid'], found['host']) == (os.getpid(), workdir_lock.platform.node())
        assert found['command'] == ' '.join(sys.argv)
        check()
        with (
            pytest.raises(ValueError, match=rf'\(process {os.getpid()} on .*choose another --workdir'),
            workdir_lock.locked(tmp_path / 'run'),
        ):
            pass
        assert record(tmp_path / 'run') == found
    assert not (tmp_path / 'run' / workdir_lock.NAME).exists()
    with pytest.raises(KeyError), workdir_lock.locked(tmp_path / 'run'):
        raise KeyError
    assert not (tmp_path / 'run' / workdir_lock.NAME).exists()


def test_of_many_at_once_one_gets_the_workdir(tmp_path):
    got, refused, barrier = [], [], threading.Barrier(16)

    def attempt(number):
        for _ in range(20):
            barrier.wait()
            try:
                with workdir_lock.locked(tmp_path):
                    got.append(number)
                    inside = len(got)
                    barrier.wait()
                    assert len(got) == inside
            except ValueError:
                refused.append(number)
                barrier.wait()

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (20, 15 * 20)


def test_what_a_killed_process_of_this_machine_left_is_taken_over_at_once(tmp_path, absl_log):
    leave(tmp_path)
    with workdir_lock.locked(tmp_path):
        assert record(tmp_path)['token'] != 'other'
    assert 'this one takes over' in absl_log.text
    (tmp_path / workdir_lock.NAME).write_text('{"host": ', encoding='utf-8')  # killed as it wrote
    with workdir_lock.locked(tmp_path):
        assert record(tmp_path)['pid'] == os.getpid()


@pytest.mark.parametrize('elsewhere', [{'host': 'elsewhere', 'boot': 'x'}, {'boot': 'of another start or twin'}])
@pytest.mark.usefixtures('impatient')
def test_a_record_of_another_machine_is_watched(tmp_path, elsewhere, absl_log):
    """As on a network file system whose locks do not reach beyond a machine."""
    leave(tmp_path, **elsewhere)
    with workdir_lock.locked(tmp_path):
        assert record(tmp_path)['pid'] == os.getpid()
    assert 'waiting up to 0 s to see whether it still runs' in absl_log.text
    leave(tmp_path, **elsewhere)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.02):
            os.utime(tmp_path / workdir_lock.NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(ValueError, match='if that process is certainly gone, delete'),
            workdir_lock.locked(tmp_path),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert record(tmp_path)['token'] == 'other'
    with pytest.raises(SystemExit) as stopped, workdir_lock.locked(tmp_path, lambda: signal.SIGTERM):
        pass
    assert stopped.value.code == 143


@pytest.mark.usefixtures('impatient')
def test_the_record_is_touched_while_the_training_runs(tmp_path):
    with workdir_lock.locked(tmp_path):
        first = workdir_lock._touched(tmp_path / workdir_lock.NAME)
        until = time.monotonic() + 10
        while workdir_lock._touched(tmp_path / workdir_lock.NAME) == first:
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.mark.usefixtures('impatient', 'no_locks')
def test_without_locks_a_record_counts_as_long_as_its_process_runs(tmp_path):
    with workdir_lock.locked(tmp_path), pytest.raises(ValueError, match='runs in'), workdir_lock.locked(tmp_path):
        pass
    leave(tmp_path, process_start='earlier')  # another process has the number now
    with workdir_lock.locked(tmp_path):
        pass
    leave(tmp_path, pid=2**22 + 1)
    with workdir_lock.locked(tmp_path):
        pass


def test_a_training_that_was_taken_over_stops(tmp_path):
    with workdir_lock.locked(tmp_path) as check:
        leave(tmp_path)
        with pytest.raises(ValueError, match='has taken over'):
            check()
    assert record(tmp_path)['token'] == 'other'


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with (
            pytest.raises(ValueError, match=r'cannot be written \(.*choose another --workdir'),
            workdir_lock.locked(workdir),
        ):
            pass


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'tests' / 'tiny.py'), *map(str, arguments)],
        env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_two_processes_one_workdir(tmp_path):
    """The second changes nothing and says who trains; killed, the first does not stand in the way."""
    settings = ('steps=1000000', 'run.log_every=1', 'run.checkpoint_every=1000000', 'run.eval_every=1000000')
    first = started(tmp_path, *settings)
    try:
        assert any(line.startswith('step 1/') for line in first.stdout)
        first.send_signal(signal.SIGSTOP)  # so that what changes now is the second's doing
        before = everything(tmp_path)
        second = started(tmp_path, *settings)
        error = second.communicate(timeout=120)[1]
        assert second.returncode == 2
        said = [line for line in error.splitlines() if not line.startswith('I')]  # besides the implementation in use
        assert len(said) == 1
        assert re.fullmatch(rf'error: a training \(process {first.pid} on .*\) runs in .*', said[0])
        assert everything(tmp_path) == before
    finally:
        first.kill()
        first.communicate()
    assert (tmp_path / workdir_lock.NAME).exists()
    third = started(tmp_path, *settings)
    assert any(line.startswith('step 1/') for line in third.stdout)
    third.send_signal(signal.SIGTERM)
    _, error = third.communicate(timeout=120)
    assert third.returncode == 143, error
    assert f'(process {first.pid} on' in error
    assert 'this one takes over' in error
    assert not (tmp_path / workdir_lock.NAME).exists()


@pytest.mark.parametrize('shared', [True, False])
def test_a_process_that_does_not_see_the_record_of_the_first_ends_all(shared, impatient, monkeypatch, tmp_path):
    """Two processes, one after the other: the second one is on the same host or on another one."""
    folders = [tmp_path / 'host 0', tmp_path / ('host 0' if shared else 'host 1')]
    sent, seen = [], []
    monkeypatch.setattr(workdir_lock.jax, 'process_count', lambda: 2)

    def broadcast(value):
        sent.append(value)
        return sent[0]

    def gather(value):  # of both, as the first one would see it
        seen.append(int(value))
        return np.array([1, int(shared)])

    monkeypatch.setattr(workdir_lock.multihost_utils, 'broadcast_one_to_all', broadcast)
    monkeypatch.setattr(workdir_lock.multihost_utils, 'process_allgather', gather)

    def second():
        monkeypatch.setattr(workdir_lock.jax, 'process_index', lambda: 1)
        with workdir_lock.locked(folders[1]):
            pass

    if shared:
        with workdir_lock.locked(folders[0]):
            second()
    else:
        for start in (lambda: workdir_lock.locked(folders[0]).__enter__(), second):
            with pytest.raises(ValueError, match=r'process 1 .*does not see .* process 0 .*all hosts share'):
                start()
        assert not list(folders[0].iterdir())
    assert seen == [1, int(shared)]
