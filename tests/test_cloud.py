"""Runs whose workdir is in a cloud store; see `cloud`."""

import json
import sys
import time
from pathlib import Path

import cloud
import jax
import pytest
from etils import epath

from combiner import atomic, evaluate, export, paths, sample, train
from combiner.monitoring import mirror, trackers
from combiner.monitoring.writer import Writer
from combiner.run import checkpoint, workdir_lock

WORKDIR = 'gs://bucket/runs/one'
KEY = 'bucket/runs/one'


@pytest.fixture(autouse=True)
def store(monkeypatch):
    cloud.serve(monkeypatch)
    monkeypatch.setattr(workdir_lock, '_SETTLE_SECONDS', 0.0)


def content(name):
    return cloud.OBJECTS[f'{KEY}/{name}'][1].decode()


def steps_measured():
    lines = [json.loads(line) for line in content('metrics.jsonl').splitlines()]
    return [line['step'] for line in lines if 'loss_nats' in line]


def test_a_run_killed_at_any_write_continues_to_bitwise_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(workdir):
        config = tiny.config(**{'model.layers': 1, 'run.log_every': 1})
        return tiny.digest(train.train(config, workdir, devices=jax.devices()[:1]))

    expected = run(tmp_path / 'local')
    assert run(WORKDIR) == expected
    assert (sorted(path.name for path in tmp_path.iterdir()), steps_measured()) == (['local'], [1, 2, 3, 4, 5, 6])
    assert f'{KEY}/{workdir_lock.NAME}' not in cloud.OBJECTS
    whole, states = dict(cloud.OBJECTS), list(cloud.STATES)
    committed = [cloud.WRITES.index(f'{KEY}/checkpoints/{step}/commit_success.txt') for step in (3, 6)]
    resumed_from = []
    for moment in (committed[0] - 1, committed[0], committed[1] - 1):
        cloud.OBJECTS.clear()
        cloud.OBJECTS.update(states[moment])
        del cloud.OBJECTS[f'{KEY}/{workdir_lock.NAME}']  # it names this process, which lives
        resumed_from.append(checkpoint.Checkpoints(WORKDIR, read_only=True).steps())
        assert run(WORKDIR) == expected
        assert steps_measured() == [1, 2, 3, 4, 5, 6]
    assert resumed_from == [[], [3], [3]]
    assert {name.split('/')[3] for name in cloud.OBJECTS} == {name.split('/')[3] for name in whole}

    local, remote = evaluate.evaluate(tmp_path / 'local'), evaluate.evaluate(WORKDIR)
    assert json.loads(content('evaluation_test_latest.json')) == remote == local
    sample.sample(WORKDIR, examples=1, samples=1)
    assert cloud.OBJECTS[f'{KEY}/samples.png'][1].startswith(b'\x89PNG')
    assert (sorted(path.name for path in tmp_path.iterdir())) == ['local']
    one = export.export(tmp_path / 'local', tmp_path / 'one' / 'model')
    other = export.export(WORKDIR, tmp_path / 'other' / 'model')
    assert [file.read_bytes() for file in sorted(one.iterdir())] == [
        file.read_bytes() for file in sorted(other.iterdir())
    ]


def test_the_curve_is_copied_whole_but_not_at_every_line(monkeypatch):
    writer = Writer(WORKDIR, 0, trackers.parse('tensorboard'))
    for step in range(1, 101):
        writer.write(step, {'loss_nats': 1.0})
    writer.flush()
    writer.flush()
    writer.write(101, {'loss_nats': 1.0})
    copies = [name for name in cloud.WRITES if name.endswith('metrics.jsonl')]
    assert steps_measured() == list(range(1, 101))
    assert len(copies) <= 2
    writer.close()
    assert steps_measured() == list(range(1, 102))
    cloud.put(f'{KEY}/tensorboard/of-before', b'')
    monkeypatch.setattr(mirror, 'SECONDS', 0.02)
    again = Writer(WORKDIR, 60, trackers.parse('tensorboard'))
    again.write(61, {'loss_nats': 1.0})
    until = time.monotonic() + 20
    while steps_measured() != list(range(1, 62)):
        assert time.monotonic() < until
        time.sleep(0.02)
    again.close()
    (events,) = (name for name in cloud.OBJECTS if '/tensorboard/' in name)
    assert not events.endswith('of-before')


def test_the_record_of_a_run_is_written_again_and_decides(monkeypatch, absl_log):
    for name, value in {'BEAT_SECONDS': 0.02, 'PATIENCE_SECONDS': 1.0, '_SETTLE_SECONDS': 0.1}.items():
        monkeypatch.setattr(workdir_lock, name, value)
    path = epath.Path(WORKDIR) / workdir_lock.NAME
    with workdir_lock.locked(WORKDIR) as check:
        with pytest.raises(ValueError, match=r'runs in gs://bucket/runs/one; wait'), workdir_lock.locked(WORKDIR):
            pass
        check()
        monkeypatch.setattr(workdir_lock, '_boot', lambda: 'of another machine')
        with pytest.raises(ValueError, match='runs in'), workdir_lock.locked(WORKDIR):
            pass
        path.write_text(json.dumps({'token': 'other', 'host': 'elsewhere'}))
        time.sleep(0.1)  # several beats, which leave the other's record as it is
        with pytest.raises(ValueError, match='has taken over'):
            check()
    assert json.loads(path.read_text())['token'] == 'other'
    with workdir_lock.locked(WORKDIR):  # the other one does not beat
        assert json.loads(path.read_text())['token'] != 'other'
    assert 'ended without releasing gs://bucket/runs/one' in absl_log.text
    assert not path.exists()


def test_a_damaged_checkpoint_is_moved_within_the_store(tiny, absl_log):
    config = tiny.config(**{'model.layers': 1, 'run.log_every': 1})
    whole = tiny.digest(train.train(config, WORKDIR, devices=jax.devices()[:1]))
    damaged = f'{KEY}/checkpoints/6/state/manifest.ocdbt'
    cloud.OBJECTS[damaged] = (cloud.OBJECTS[damaged][0], b'damaged')
    assert tiny.digest(train.train(config, WORKDIR, devices=jax.devices()[:1])) == whole
    assert 'continuing from step 3' in absl_log.text
    assert content('corrupt/6/state/manifest.ocdbt') == 'damaged'
    assert checkpoint.Checkpoints(WORKDIR, read_only=True).steps() == [3, 6]


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ('s3://bucket/run', r'cloud paths such as s3:// are not supported here; copy it to a local folder, or mount'),
        ('gs://', 'has no bucket; write gs://BUCKET/FOLDER'),
        ('gs://other/run', "there is no bucket 'other', or it may not be listed"),
    ],
)
def test_what_cannot_work_says_so_at_the_start(tiny, given, message):
    for call in (lambda: train.train(tiny.config(), given), lambda: evaluate.load(given)):
        with pytest.raises(ValueError, match=message):
            call()
    assert not cloud.OBJECTS


def test_a_store_that_does_not_answer_and_packages_that_are_missing(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cloud.Store, 'info', lambda *_, **__: (_ for _ in ()).throw(RuntimeError('no credentials\nmore')))
        with pytest.raises(ValueError, match=r'cannot be reached \(RuntimeError: no credentials\); check the network'):
            paths.parse(WORKDIR, 'workdir')
    monkeypatch.setitem(sys.modules, 'google.cloud.storage', None)
    with pytest.raises(ValueError, match=r"workdir 'gs://.*needs packages that are not installed.*pip install gcsfs"):
        paths.parse(WORKDIR, 'workdir')


def test_an_object_appears_whole(monkeypatch):
    seen = []
    monkeypatch.setattr(cloud, 'put', lambda name, data, generation=None: seen.append((name, data)))
    atomic.write_text(paths.parse(f'{WORKDIR}/a.json'), 'é' * 10)
    assert seen == [(f'{KEY}/a.json', 'é'.encode() * 10)]
    assert [str(paths.parse(given)) for given in (Path('gs://bucket/x'), 'GS://bucket/x/')] == ['gs://bucket/x'] * 2
