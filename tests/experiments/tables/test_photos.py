import importlib
import json

import finished
import pytest

from experiments.harness import ranking
from experiments.harness import run as runs
from experiments.tables import photos

CODECS = {'png': 5.6, 'webp_lossless': 4.5, 'order0_entropy': 7.9}


def evaluation(bits):
    return {'bits_per_dim': bits, 'dataset': 'photos', 'examples': 9, 'step': 1200, 'codecs_bits_per_dim': CODECS}


def finish(workdir, name, bits):
    """What a finished run leaves behind: 100 steps of 8·768 tokens, 60 at 6,144 tokens/s and 40 at half of that."""
    run = photos.TABLE.run(name, workdir)
    finished.train(run.workdir, run.config_arguments())
    (run.workdir / 'evaluation_test_latest.json').write_text(json.dumps(evaluation(bits)))


def test_the_table_is_sorted_with_the_codecs_in_their_place():
    rows = [
        {'attention': name, 'train_minutes': 2.0, **evaluation(bits)} for name, bits in (('axial', 5.0), ('full', 4.2))
    ]
    names = [line.split('|')[1].strip() for line in ranking.table(rows).splitlines()[2:]]
    assert names == ['`full`', '*WebP, lossless*', '`axial`', '*PNG*', '*order-0 entropy*']


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path, capsys):
    finish(tmp_path, 'axial', 5.0)
    finish(tmp_path, 'full', 4.0)
    arguments = ['photos', '--workdir', str(tmp_path), '--results', str(tmp_path / 'results'), '--names', 'axial,full']
    monkeypatch.setattr('sys.argv', arguments)
    ranking.command(photos.TABLE)
    rows = json.loads((tmp_path / 'results' / 'photos.json').read_text())['rows']
    assert [row['bits_per_dim'] for row in rows] == [5.0, 4.0]
    assert rows[0]['train_minutes'] == pytest.approx((60 + 80) / 60, abs=0.01)
    assert '| `full` | 4.000 | 2.3 |' in (tmp_path / 'results' / 'photos.md').read_text()
    assert '`full`' in capsys.readouterr().out


def test_a_run_is_that_of_the_config_as_it_is(tmp_path):
    """Runs that `combiner.train --config configs/photos.py:attention=NAME` made in WORKDIR/NAME count."""
    run = photos.TABLE.run('axial', tmp_path)
    assert run.workdir == tmp_path / 'axial'
    plain = importlib.import_module('configs.photos').get_config('attention=axial')
    assert run.config().to_dict() == plain.to_dict()


def test_a_run_that_failed_is_reported_after_the_others_and_nothing_is_written(monkeypatch, tmp_path, capsys):
    fake = finished.Fake()
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    monkeypatch.setattr(runs.Processes, '__call__', lambda self, command, log: fake(command, log))
    fake.broken = tmp_path.name
    arguments = ['--workdir', str(tmp_path), '--results', str(tmp_path / 'results'), '--names', 'axial,full']
    with pytest.raises(SystemExit) as stopped:
        ranking.command(photos.TABLE, arguments)
    assert stopped.value.code == 1
    assert [where.partition('/')[2] for _, where in fake.said] == ['axial', 'full']
    assert 'Photographs, full, seed 0: train failed with exit status 2' in capsys.readouterr().err
    assert not (tmp_path / 'results').exists()
