import os
import sys

import finished
import pytest
import submitit

from experiments.harness import run as runs
from experiments.harness import runner, slurm


def test_without_submitit_it_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(SystemExit) as stopped:
        runner.command([finished.row('Full')], 'small', ['--launcher', 'slurm', '--workdir', str(tmp_path)])
    assert stopped.value.code == 2
    assert 'pip install "combiner-jax[slurm]"' in capsys.readouterr().err


def test_jobs_of_processes_on_this_machine(tmp_path):
    """One job of a run that is done but for nothing, one of a config that is not there."""
    done, wrong = (finished.run(finished.row(model), tmp_path) for model in ('Done', 'Wrong'))
    finished.train(done.workdir, done.config_arguments())
    finished.evaluate(done.workdir, 4.0)
    wrong = runs.Run(runner.Row('Wrong', 'Photos', 'configs/nothing.py', '', 'bits_per_dim'), 'cpu', 0, wrong.workdir)
    executor = slurm.executor(tmp_path / 'jobs', 'local')
    failed, stopped_by = slurm.launch([done, wrong], executor)
    assert stopped_by == 0
    assert list(failed) == [wrong]
    assert "config file 'configs/nothing.py' does not exist" in failed[wrong]
    (line,) = runs.lines_of(wrong.workdir / 'commands.jsonl')
    assert line['status'] == 2


class Running:
    """A job as another process finds it by its number."""

    state = 'RUNNING'

    def __init__(self, folder, job_id):
        self.folder, self.job_id = folder, job_id

    def done(self, force_check):
        assert force_check
        return self.state != 'RUNNING'


def test_a_job_that_has_not_ended_is_waited_for(tmp_path, monkeypatch, capsys):
    """As by the same command after the one that submitted it was killed."""
    run = finished.run(finished.row('Full'), tmp_path)
    finished.train(run.workdir, run.config_arguments())
    finished.evaluate(run.workdir, 4.0)
    executor = slurm.executor(tmp_path / 'jobs', 'local')
    first = slurm.submit(run, executor)
    monkeypatch.setattr(submitit, 'LocalJob', Running)
    again = slurm.submit(run, executor)
    assert (again.job_id, again.folder) == (first.job_id, tmp_path / 'jobs')
    assert f'waiting for job {first.job_id}, RUNNING; to submit another one, delete' in capsys.readouterr().out
    monkeypatch.setattr(Running, 'state', 'FAILED')
    later = slurm.submit(run, executor)
    assert later.job_id != first.job_id
    assert (first.result(), later.result()) == (None, None)


@pytest.mark.parametrize(
    ('problem', 'said'),
    [(ValueError('first\nlast\n'), 'job 7 failed: last'), (TimeoutError(), 'job 7 failed: TimeoutError()')],
    ids=['of two lines', 'without text'],
)
def test_a_job_that_is_ended_is_told_by_the_last_line_of_its_error(tmp_path, monkeypatch, problem, said):
    class Ended:
        job_id = 7

        def results(self):
            raise problem

    run = finished.run(finished.row('Full'), tmp_path)
    monkeypatch.setattr(slurm, 'submit', lambda run, executor: Ended())
    assert slurm.launch([run], None) == ({run: said}, 0)


def test_without_slurm_it_says_so(tmp_path):
    with pytest.raises(ValueError, match=r'needs Slurm .*; use --launcher local'):
        slurm.executor(tmp_path)


def test_each_process_of_a_run_has_a_log_and_the_first_records(tmp_path):
    run = finished.run(finished.row('Full'), tmp_path)
    assert runs.complete(run, finished.Fake('full'), process=1).endswith('error: a pipe burst')
    assert 'a pipe burst' in (run.workdir / 'log_1.txt').read_text()
    assert not {'log.txt', 'commands.jsonl'} & {path.name for path in run.workdir.iterdir()}


def test_several_nodes_need_slurm(tmp_path, capsys):
    with pytest.raises(SystemExit):
        runner.command([finished.row('Full')], 'small', ['--nodes', '2', '--workdir', str(tmp_path)])
    assert '--nodes=2 must be at least 1, and 1 without --launcher slurm' in capsys.readouterr().err


# Stands in for Slurm: sbatch starts a script, srun in it starts a task for each of two nodes, both of this machine.
SBATCH = """#!/bin/bash
export SLURM_JOB_ID={job} SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=2 SLURM_JOB_NODELIST=localhost,localhost
setsid bash "$1" > {folder}/sbatch.txt 2>&1 &
echo Submitted batch job {job}
"""
SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[sys.argv.index('-u') - 1:]
step = {{'SLURM_STEP_ID': '0', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'SLURM_LOCALID': '0'}}
step['SLURM_STEP_NODELIST'] = os.environ['SLURM_JOB_NODELIST']
ids = [{{'SLURM_PROCID': str(i), 'SLURM_NODEID': str(i)}} for i in range(2)]
tasks = [subprocess.Popen(command, env=os.environ | step | each) for each in ids]
sys.exit(max(task.wait() for task in tasks))
"""
SACCT = '#!/bin/bash\necho "JobID|State|NodeList"; echo "{job}|RUNNING|localhost"\n'


@pytest.mark.slow
def test_a_job_of_two_nodes_trains_and_evaluates_one_run(tmp_path, monkeypatch):
    (tmp_path / 'bin').mkdir()
    for name, text in {'sbatch': SBATCH, 'srun': SRUN, 'sacct': SACCT}.items():
        path = tmp_path / 'bin' / name
        path.write_text(text.format(job=os.getpid(), folder=tmp_path, python=sys.executable))
        path.chmod(0o755)
    settings = {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'JAX_NUM_CPU_DEVICES': '1', 'JAX_PLATFORMS': 'cpu'}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    run = finished.run(finished.row('Full'), tmp_path, scale='quick')
    failed, _ = slurm.launch([run], slurm.executor(tmp_path / 'jobs', nodes=2))
    assert failed == {}, (tmp_path / 'sbatch.txt').read_text()
    assert run.evaluation['step'] == 30
    log = (run.workdir / 'log.txt').read_text()
    assert log.count('2 processes, 2 devices (cpu), 1 in each') == 2
    assert 'combiner.evaluate' in (run.workdir / 'log_1.txt').read_text()
    assert [line['command'] for line in runs.lines_of(run.workdir / 'commands.jsonl')] == ['train', 'evaluate']
