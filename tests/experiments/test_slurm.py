import sys

import finished
import pytest

from experiments import runner, runs, slurm


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


def test_without_slurm_it_says_so(tmp_path):
    with pytest.raises(ValueError, match=r'needs Slurm .*; use --launcher local'):
        slurm.executor(tmp_path)
