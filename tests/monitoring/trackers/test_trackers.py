"""Trackers by name, and in a thread of their own."""

import json
import sys
import threading
import time

import jax
import pytest

from combiner import train
from combiner.monitoring import trackers
from combiner.monitoring.trackers import background, tensorboard
from combiner.monitoring.trackers.tracker import Tracker, resolve
from combiner.monitoring.writer import Writer

OWN = """
from combiner.monitoring.trackers import Tracker

class Mine(Tracker):
    lines = []

    def __init__(self, run):
        self.lines.append((run.workdir.name, run.folder == run.workdir, run.config['steps']))

    def log(self, step, values):
        self.lines.append((step, values))

    def flush(self):
        self.lines.append('flushed')

    def close(self):
        self.lines.append('closed')
"""


def warnings(log):
    """The messages that were logged; a record can come through several loggers."""
    return [record.getMessage() for record in dict.fromkeys(log.records)]


def steps(workdir):
    return [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'tensorbord',
            "'tensorbord'; did you mean 'tensorboard'. Known: tensorboard, wandb; or a path",
        ),
        ('nowhere:Mine', "cannot import the tracker 'nowhere:Mine'"),
        ('json:nothing', "cannot import the tracker 'json:nothing'"),
        (
            'json:JSONDecoder',
            'is no subclass of combiner.monitoring.trackers.tracker:Tracker; derive it',
        ),
    ],
)
def test_an_unknown_tracker_is_refused_before_the_workdir_is_made(tiny, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        train.train(tiny.config(), tmp_path / 'run', tracker=f'tensorboard,{name}')
    assert not (tmp_path / 'run').exists()


def test_none_one_or_several():
    assert trackers.parse('') == trackers.parse(' , ') == {}
    assert list(trackers.parse('tensorboard')) == ['tensorboard']
    assert list(trackers.parse(f' tensorboard, {Tracker.__module__}:Tracker ')) == [
        'tensorboard',
        f'{Tracker.__module__}:Tracker',
    ]
    assert trackers.names() == ['tensorboard', 'wandb']


def test_an_own_tracker_needs_one_class(tiny, tmp_path, monkeypatch):
    (tmp_path / 'own_tracker.py').write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    state = train.train(tiny.config(), tmp_path / 'run', devices=jax.devices()[:1], tracker='own_tracker:Mine')
    lines = resolve('own_tracker:Mine').lines
    assert int(state.step) == 6
    assert lines[0] == ('run', True, 6)
    assert [line[0] for line in lines[1:] if isinstance(line, tuple)] == steps(tmp_path / 'run')
    assert [line for line in lines if isinstance(line, str)] == ['flushed', 'flushed', 'closed']
    assert not (tmp_path / 'run' / 'tensorboard').exists()


class Broken(Tracker):
    """Fails at step 2, or hangs there."""

    wait: threading.Event | None = None

    def log(self, step, values):
        """See the class."""
        if step == 2 and self.wait is None:
            raise ConnectionError('no network\nat all')
        if step == 2:
            self.wait.wait()


def test_a_tracker_that_fails_gives_one_warning_and_the_rest_goes_on(tmp_path, absl_log):
    writer = Writer(tmp_path, 0, {'broken': Broken} | trackers.parse('tensorboard'))
    for step in range(1, 6):
        writer.write(step, {'loss_nats': 1.0})
        writer.flush()
    writer.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert warnings(absl_log) == [
        'the tracker broken ends here (ConnectionError: no network); metrics.jsonl goes on, and the next start of the '
        'run shows it again'
    ]


def test_a_tracker_that_hangs_is_waited_for_once(tmp_path, absl_log, monkeypatch):
    monkeypatch.setattr(background, 'PATIENCE_SECONDS', 0.2)
    monkeypatch.setattr(Broken, 'wait', threading.Event())
    writer = Writer(tmp_path, 0, {'broken': Broken})
    began = time.perf_counter()
    for step in range(1, 1001):
        writer.write(step, {'loss_nats': 1.0})
        writer.flush()
    for each in writer._trackers:
        each.flush(wait=True)
        each.flush(wait=True)
    writer.close()
    assert time.perf_counter() - began < 5
    (warning,) = warnings(absl_log)
    assert 'the tracker broken ends here (it took longer than 0 s)' in warning
    Broken.wait.set()


def test_a_tracker_that_cannot_start_gives_a_warning(tmp_path, absl_log):
    class Unstartable(Tracker):
        def __init__(self, run):
            raise OSError(28, 'No space left on device')

    writer = Writer(tmp_path, 0, {'none': Unstartable})
    writer.write(1, {'loss_nats': 1.0})
    writer.close()
    assert steps(tmp_path) == [1]
    (warning,) = warnings(absl_log)
    assert 'the tracker none ends here (OSError: [Errno 28] No space left' in warning


def test_a_full_disk_does_not_hang_tensorboard(tmp_path, absl_log, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    writer = Writer(tmp_path, 0, trackers.parse('tensorboard'))
    writer.write(1, {'loss_nats': 1.0})
    writer._trackers[0].flush(wait=True)
    monkeypatch.setattr('tensorboardX.record_writer.RecordWriter.write', full)
    for step in range(2, 300):
        writer.write(step, {'loss_nats': 1.0})
    writer.close()
    assert len(steps(tmp_path)) == 299
    (warning,) = warnings(absl_log)
    assert 'the tracker tensorboard ends here (OSError: [Errno 28]' in warning


def test_only_the_first_process_has_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    writer = Writer(tmp_path / 'run', 0, trackers.parse('tensorboard'))
    writer.write(1, {'loss_nats': 1.0})
    writer.close()
    assert not (tmp_path / 'run').exists()


def test_a_view_is_a_command_to_copy(tmp_path):
    assert trackers.views('tensorboard,wandb', tmp_path) == [f'tensorboard --logdir {tmp_path}/tensorboard']
    assert tensorboard.TensorBoard.view(tmp_path).startswith('tensorboard ')


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="the tracker 'wandb' is registered already, as WeightsAndBiases"):
        sys.modules['combiner.monitoring.trackers.tracker'].register('wandb')(Tracker)
