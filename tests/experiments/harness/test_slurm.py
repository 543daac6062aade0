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


def test_without_slurm_it_says_so(tmp_path):
    with pytest.raises(ValueError, match=r'needs Slurm .*; use --launcher local'):
        slurm.executor(tmp_path)
