import runpy
import shlex
import sys

import pytest

import combiner
from configs import photos as config
from experiments.harness.run import Run
from experiments.tables import photos


def test_every_causal_mechanism_has_a_row_of_the_config_as_it_is(tmp_path):
    assert {'combiner_fixed', 'full', 'compressed'} < {row.model for row in photos.ROWS} < set(combiner.names())
    for row in photos.ROWS:
        plain = config.get_config(f'attention={row.model}')
        assert Run(row, 'cpu', 0, tmp_path).config().to_dict() == plain.to_dict()


def test_the_command_runs_one_seed_at_cpu_scale(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['photos', '--rows', 'photographs/axial', '--dry_run'])
    monkeypatch.delitem(sys.modules, 'experiments.tables.photos')
    with pytest.raises(SystemExit):
        runpy.run_module('experiments.tables.photos', run_name='__main__')
    train, evaluate = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    workdir = ['--workdir', 'runs/photos/photos/cpu/photographs/axial/seed0']
    assert train[3:] == ['--config', 'configs/photos.py:attention=axial,scale=cpu', '--config.seed=0', *workdir]
    assert evaluate[3:] == workdir
