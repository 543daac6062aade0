"""Which processes join, and what several of them train together."""

import json
import os
import re
import shutil
import signal
import time
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from joined import Joined

from combiner import evaluate, sharding, train
from combiner.run import agreement, processes, workdir_lock

SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_ID': '0', 'SLURM_NTASKS': '6', 'SLURM_PROCID': '5', 'SLURM_NODEID': '2'}
STEP = SLURM | {'SLURM_STEP_NUM_TASKS': '6', 'SLURM_STEP_TASKS_PER_NODE': '2(x3)', 'SLURM_LOCALID': '1'}
ONE_A_NODE = STEP | {'SLURM_STEP_TASKS_PER_NODE': '1(x6)', 'SLURM_LOCALID': '0'}
OPEN_MPI = {f'OMPI_COMM_WORLD_{name}': '2' for name in ('SIZE', 'LOCAL_SIZE')}
OPEN_MPI |= {f'OMPI_COMM_WORLD_{name}': '1' for name in ('RANK', 'LOCAL_RANK')}
OLD_MPI = OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:1'}
OTHERS = ('CUDA_VISIBLE_DEVICES', 'PMI_SIZE', 'KUBERNETES_SERVICE_HOST', 'TPU_ML_PLATFORM', 'TPU_WORKER_HOSTNAMES')
HAND = ('host:1', 2, 1)


@pytest.fixture
def calls(monkeypatch):
    """Calls of jax.distributed.initialize, which does nothing; the environment of no launcher."""
    found = []

    def initialize(coordinator, count, number, local_device_ids, cluster_detection_method, **_):
        found.append((coordinator, count, number, local_device_ids, cluster_detection_method))

    for name in (*STEP, *OLD_MPI, *OTHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    before = jax.config.jax_enable_preemption_service
    yield found
    jax.config.update('jax_enable_preemption_service', before)


@pytest.mark.parametrize(
    ('environment', 'given', 'expected'),
    [
        ({}, (), None),
        (SLURM, (), None),  # a batch script
        (STEP | {'SLURM_STEP_NUM_TASKS': '1'}, (), None),  # a shell in an allocation of six tasks
        (STEP, (None, 1, None), None),
        (STEP, (), (None, 6, 5, [1], None)),
        (STEP | {'CUDA_VISIBLE_DEVICES': '0,1'}, (), (None, 6, 5, [1], None)),
        (STEP | {'CUDA_VISIBLE_DEVICES': '0'}, (), (None, 6, 5, [], None)),  # Slurm has bound it to its GPU
        (ONE_A_NODE | {'CUDA_VISIBLE_DEVICES': '0,1'}, (), (None, 6, 5, [], None)),
        (STEP, ('host:1',), ('host:1', 6, 5, [1], 'deactivate')),
        (OLD_MPI, (), (None, 2, 1, [1], None)),
        (STEP | OPEN_MPI, ('host:1',), ('host:1', 2, 1, [1], 'deactivate')),
        ({}, HAND, (*HAND, None, 'deactivate')),
        ({'KUBERNETES_SERVICE_HOST': 'x'}, (), None),  # a notebook
        ({'KUBERNETES_SERVICE_HOST': 'x', 'JOB_COMPLETION_INDEX': '1'}, (), None),  # the package is not installed
        ({'TPU_ML_PLATFORM': 'JAX'}, (), None),  # tests choose the CPU
        ({'TPU_ML_PLATFORM': 'JAX', 'PLATFORM': 'tpu', 'TPU_WORKER_HOSTNAMES': 'a'}, (), None),
        ({'TPU_ML_PLATFORM': 'JAX', 'PLATFORM': 'tpu', 'TPU_WORKER_HOSTNAMES': 'a,b'}, (), (None,) * 5),
        ({'TPU_ML_PLATFORM': 'JAX', 'PLATFORM': 'tpu'}, (), (None,) * 5),
    ],
)
def test_who_joins(environment, given, expected, calls, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', environment.get('PLATFORM', 'cpu'))
    try:
        processes.join(*given)
    finally:
        jax.config.update('jax_platforms', before)
    assert calls == ([expected] if expected else [])


@pytest.mark.parametrize(
    ('environment', 'given', 'message'),
    [
        ({}, (None, 2, 0), '--coordinator=None --processes=2 --process=0: give all three'),
        ({}, (None, None, 1), 'give all three'),
        ({}, ('host', 2, 0), 'must be HOST:PORT'),
        ({}, ('host:1', 2, 2), r'--process=2 does not lie in 0\.\.1'),
        (OPEN_MPI, (), 'Open MPI started 2 processes, but .* --coordinator=HOST:PORT'),
    ],
)
def test_bad_numbers_are_refused(environment, given, message, calls, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes.join(*given)
    assert not calls


def test_a_failure_to_join_is_one_line(calls, monkeypatch):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    with pytest.raises(ValueError, match=r'could not join at host:1 \(TimeoutError\): .* --processes=1 to run alone'):
        processes.join(*HAND)


@pytest.mark.parametrize(
    ('error', 'status'), [(KeyboardInterrupt(), 130), (SystemExit(2), 2), (RuntimeError('a bug'), 1)]
)
def test_one_that_fails_does_not_wait_for_the_others(error, status, monkeypatch):
    class ExitedError(Exception):
        pass

    def leave(found):
        raise ExitedError(found)

    monkeypatch.setattr(processes, 'flags', mock.MagicMock())  # which are defined once
    monkeypatch.setattr(processes.cli, 'run', mock.Mock(side_effect=error))
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(os, '_exit', leave)
    with pytest.raises(ExitedError, match=f'^{status}$'):
        processes.run(lambda: None)


def test_two_tasks_that_have_not_joined_are_told_how(calls, monkeypatch, tmp_path):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    both = r'\(process \d+ on .*one of 6 that Slurm step 7\.0 started.*--coordinator=HOST:PORT --processes=N'
    with workdir_lock.locked(tmp_path), pytest.raises(ValueError, match=both), workdir_lock.locked(tmp_path):
        pass


def test_other_arguments_are_refused(monkeypatch):
    others = ['--workdir=b']
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    gathered = lambda data: np.stack([data, agreement.compared(others[0])])  # noqa: E731
    monkeypatch.setattr(multihost_utils, 'process_allgather', gathered)
    processes._check_arguments(['--workdir=b', '--process=0', '--coordinator=localhost:1'])
    processes._check_arguments(['--coordinator', 'localhost:1', '--workdir=b', '-process', '0'])
    with pytest.raises(ValueError, match="process 0 has '--workdir=a', process 1 has '--workdir=b'; for"):
        processes._check_arguments(['--workdir=a', '--process=0'])
    others[0] = f'--workdir={"long" * 250}/b'
    with pytest.raises(ValueError, match='they differ after the first 1,000 bytes'):
        processes._check_arguments([f'--workdir={"long" * 250}/a'])


# A mesh whose sums have two terms each: their order is the same however many processes there are.
PAIRS = ('model.dropout=0.1', 'mesh.model=2', 'steps=40', 'run.log_every=1', 'run.checkpoint_every=12')


def on_four_devices(tiny, workdir, arguments):
    changes = {key: json.loads(value) for key, value in (argument.split('=') for argument in arguments)}
    return train.train(tiny.config(**changes), workdir, devices=jax.devices()[:4])


def test_two_processes_are_killed_and_one_continues(tiny, tmp_path):
    workdir = tmp_path / 'killed'
    with Joined(tmp_path, 2, 2, workdir, *PAIRS) as both:
        both.wait_for('step 25/40')  # the next save, which would wait for the other one, is far
        assert both.text().count('2 processes, 4 devices (cpu), 2 in each') == 1
        both.processes[1].kill()
        # It says so itself, unless JAX ends it earlier with a message of its own.
        assert both.processes[0].wait(60) in (1, -signal.SIGABRT)
        assert re.search('another process of this run has ended|another task died', both.text())
    assert (workdir / 'checkpoints' / '12').is_dir()
    assert not (workdir / 'checkpoints' / '36').exists()
    assert 'validation_loss_nats' in (workdir / 'metrics.jsonl').read_text()
    whole = on_four_devices(tiny, tmp_path / 'whole', PAIRS)
    assert tiny.digest(on_four_devices(tiny, workdir, PAIRS)) == tiny.digest(whole)


# Sums of four terms: in one process their order is another than between processes.
FOURS = ('model.dropout=0.1', 'steps=30', 'run.log_every=1')


@pytest.mark.slow
def test_any_number_of_processes_continues(tiny, tmp_path):
    """Two processes are killed; four and two continue bitwise alike, one up to the order of sums."""
    workdir = tmp_path / 'killed'
    with Joined(tmp_path, 2, 2, workdir, *FOURS) as both:
        both.wait_for('step 7/30')
        for process in both.processes:
            process.kill()
    copies = [tmp_path / name for name in ('four', 'one')]
    for copy in copies:
        shutil.copytree(workdir, copy)
    with Joined(tmp_path, 4, 1, copies[0], *FOURS) as four:
        digest = four.digest()
    with Joined(tmp_path, 2, 2, workdir, *FOURS) as both:
        assert both.digest() == digest
    with Joined(tmp_path, 2, 2, tmp_path / 'whole', *FOURS) as both:
        assert both.digest() == digest
    state = on_four_devices(tiny, copies[1], FOURS)
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    other = evaluate.load(workdir, mesh=mesh).variables['params']
    for one, two in zip(jax.tree.leaves(state.params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('signalled', [0, 1])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_the_same_step_in_all(tiny, tmp_path, signalled, number):
    workdir = tmp_path / 'stopped'
    with Joined(tmp_path, 2, 2, workdir, *PAIRS[:2], 'steps=100', 'run.log_every=1') as both:
        both.wait_for('step 7/100')
        both.processes[signalled].send_signal(number)
        assert both.statuses() == [143, 143]
        step = int(re.search('stopped by signal 15 after saving step (.*);', both.text())[1])
    assert (workdir / 'checkpoints' / str(step)).is_dir()
    with Joined(tmp_path, 2, 2, workdir, *PAIRS[:2], 'steps=100', 'run.log_every=1') as both:
        continued = both.digest()
        assert f', from step {step} to 100\n' in both.text()
    assert continued == tiny.digest(on_four_devices(tiny, tmp_path / 'whole', (*PAIRS[:2], 'steps=100')))


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tiny, workdir, tmp_path):
    expected = evaluate.evaluate(workdir)
    with Joined(tmp_path, 2, 2, '--evaluate', workdir) as both:
        assert both.statuses() == [0, 0]
        (found,) = json.loads(re.search('metrics (.*)', both.text())[1])
    assert found.keys() == expected.keys()
    assert found['loss_nats'] == pytest.approx(expected['loss_nats'], rel=1e-6)


@pytest.mark.slow
def test_two_processes_start_from_another_run_whose_arrays_neither_has_whole(tiny, workdir, tmp_path):
    arguments = ('task="tiny_classes"', 'mesh.fsdp=4', 'mesh.data=1', f'init_from="{workdir}"')
    on_four_devices(tiny, tmp_path / 'one', arguments)
    with Joined(tmp_path, 2, 2, tmp_path / 'two', *arguments) as both:
        both.digest()
    one, two = (json.loads((tmp_path / name / 'data.json').read_text()) for name in ('one', 'two'))
    assert one == two
    assert one['init_from'].startswith('step 6, ')


@pytest.mark.slow
def test_a_process_that_no_longer_answers_ends_the_others(tiny, tmp_path):
    with Joined(tmp_path, 2, 1, tmp_path / 'stopped', 'steps=3000', 'run.log_every=1') as both:
        both.wait_for('step 2/3000')
        both.processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert both.processes[0].wait(2 * processes.HEARTBEAT_SECONDS) in (1, -signal.SIGABRT)
        assert time.monotonic() - began < 1.5 * processes.HEARTBEAT_SECONDS
        assert re.search('another process of this run has ended|another task died', both.text())
