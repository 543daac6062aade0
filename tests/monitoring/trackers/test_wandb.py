"""W&B: the logic with a stand-in for the library, and the library itself in offline mode where it is installed."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import cloud
import jax
import pytest

from combiner import train
from combiner.monitoring import trackers
from combiner.monitoring.trackers import wandb as tracker
from combiner.monitoring.writer import Writer

ROOT = Path(__file__).parents[3]


class FakeRun:
    """A run of W&B, which refuses steps out of order. Online its lines go to the server, offline into a folder."""

    def __init__(self, server, folder, identifier, offline):
        self.server, self.id = server, identifier
        self.url = None if offline else f'https://wandb.ai/{identifier}'
        self.dir = str(folder / 'files')
        self.file = folder / f'run-{identifier}.wandb' if offline else None
        if self.file:
            folder.mkdir(parents=True)
            self.file.touch()
        self.step = 0 if offline or not server else max(server) + 1
        self.config, self.known, self.finished = self, {}, False

    def update(self, values, allow_val_change):
        assert allow_val_change
        self.known |= values

    def log(self, values, step):
        assert step >= self.step
        self.step = step + 1
        if self.file:
            self.file.write_text(self.file.read_text() + json.dumps([step, values]) + '\n')
        else:
            self.server[step] = dict(values)

    def finish(self):
        self.finished = True


class Fake(types.SimpleNamespace):
    """The module wandb, with a server that has the lines of each id by step."""

    def __init__(self, mode='online', logged_in=True):
        super().__init__(runs=[], server={}, mode=mode, logged_in=logged_in, Settings=dict)

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, prompt, verify):
        assert (prompt, verify) == (False, False)
        return self.logged_in

    def init(self, **options):
        assert options['resume'] == 'allow'
        self.options, identifier, offline = options, options['id'], self.mode == 'offline'
        folder = Path(options['dir']) / 'wandb' / f'offline-run-{len(self.runs)}-{identifier}'
        self.runs.append(FakeRun(self.server.setdefault(identifier, {}), folder, identifier, offline))
        return self.runs[-1]

    def sync(self, workdir):
        """Uploads the folders of the only run, which must not have a step twice; returns its lines."""
        ((identifier, lines),) = self.server.items()
        for file in sorted(Path(workdir).glob(f'wandb/offline-run-*-{identifier}/*.wandb')):
            for step, values in map(json.loads, file.read_text().splitlines()):
                assert step not in lines
                lines[step] = values
            file.with_suffix('.wandb.synced').touch()
        return lines


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.delenv('WANDB_PROJECT', raising=False)
    return fake


def write(workdir, step, *lines):
    """Continues a run from a step with these lines, as a command does."""
    writer = Writer(workdir, step, trackers.parse('wandb'), {'steps': 9, 'model': {'width': 4}}, 'abc')
    for line in lines:
        writer.write(*line)
    writer.close()


def loss(*steps):
    return [(step, {'loss_nats': float(step)}) for step in steps]


def kill(workdir, step, *lines):
    """Continues a run from a step with these lines, and leaves it as `kill -9` would."""
    writer = Writer(workdir, step, trackers.parse('wandb'))
    for line in lines:
        writer.write(*line)
    writer._trackers[0].flush(wait=True)
    writer._file.close()


@pytest.mark.parametrize('mode', ['online', 'offline'])
def test_each_step_is_logged_once_however_often_a_run_continues(wandb, tmp_path, mode):
    wandb.mode = mode
    write(tmp_path, 0, *loss(1, 2, 3, 4), (4, {'validation_loss_nats': 0.5}), *loss(5))
    write(tmp_path, 2, *loss(3, 4), (4, {'validation_loss_nats': 0.5}), *loss(5, 6, 7))
    kill(tmp_path, 7, *loss(8, 9, 10))
    write(tmp_path, 8, *loss(9, 10), (10, {'validation_loss_nats': 1.0}))
    lines = wandb.sync(tmp_path)
    assert list(lines) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert lines[4] == {'loss_nats': 4.0, 'validation_loss_nats': 0.5}
    assert lines[10] == {'loss_nats': 10.0, 'validation_loss_nats': 1.0}
    written = [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert written == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 10]
    assert [run.finished for run in wandb.runs] == [True, True, False, True]
    assert {run.id for run in wandb.runs} == {json.loads((tmp_path / tracker.FILE).read_text())['id']}
    assert wandb.runs[0].known == {'steps': 9, 'model': {'width': 4}, 'commit': 'abc'}
    assert (wandb.options['name'], wandb.options['project']) == (tmp_path.name, 'combiner')


def test_what_the_server_has_not_received_is_sent_again(wandb, tmp_path):
    write(tmp_path, 0, *loss(1, 2, 3, 4, 5))
    (lines,) = wandb.server.values()
    for lost in (4, 5):
        del lines[lost]
    write(tmp_path, 5, *loss(6))
    assert list(lines) == [1, 2, 3, 4, 5, 6]


def test_the_folder_of_a_killed_command_is_kept_if_it_was_uploaded(wandb, tmp_path):
    wandb.mode = 'offline'
    kill(tmp_path, 0, *loss(1, 2, 3, 4))
    assert list(wandb.sync(tmp_path)) == [1, 2, 3]
    wandb.server[wandb.runs[0].id].clear()
    write(tmp_path, 3, *loss(4, 5))
    assert list(wandb.sync(tmp_path)) == [1, 2, 3, 4, 5]


def test_a_run_in_a_cloud_store_goes_on_too(wandb, monkeypatch):
    cloud.serve(monkeypatch)
    write('gs://bucket/runs/one', 0, *loss(1, 2))
    write('gs://bucket/runs/one', 1, *loss(2, 3))
    ((identifier, lines),) = wandb.server.items()
    assert list(lines) == [1, 2, 3]
    assert json.loads(cloud.OBJECTS[f'bucket/runs/one/{tracker.FILE}'][1])['id'] == identifier


def test_a_damaged_record_starts_a_new_run(wandb, tmp_path):
    write(tmp_path, 0, *loss(1))
    (tmp_path / tracker.FILE).write_text('{"id": ')
    write(tmp_path, 1, *loss(2))
    assert [list(lines) for lines in wandb.server.values()] == [[1], [1, 2]]


def test_the_last_line_shows_or_uploads_the_run(wandb, tmp_path):
    write(tmp_path, 0, *loss(1))
    assert trackers.views('wandb', tmp_path) == [wandb.runs[0].url]
    wandb.mode = 'offline'
    write(tmp_path, 1)
    assert trackers.views('wandb', tmp_path) == [f'wandb sync --yes {tmp_path}/wandb/offline-run-*-{wandb.runs[0].id}']


@pytest.mark.parametrize(
    ('library', 'message'),
    [
        (None, r'needs the package wandb .*: pip install "combiner-jax\[wandb\]"'),
        (Fake(logged_in=False), 'nobody is logged in to W&B; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE'),
    ],
)
def test_what_cannot_work_is_refused_before_the_workdir_is_made(tiny, tmp_path, monkeypatch, library, message):
    monkeypatch.setitem(sys.modules, 'wandb', library)
    with pytest.raises(ValueError, match=message):
        train.train(tiny.config(), tmp_path / 'run', devices=jax.devices()[:1], tracker='tensorboard,wandb')
    assert not (tmp_path / 'run').exists()


def test_offline_needs_no_login(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', Fake(mode='offline', logged_in=False))
    assert list(trackers.parse('wandb')) == ['wandb']


PROGRAM = """
import os, signal, sys
from pathlib import Path
from combiner.monitoring import trackers
from combiner.monitoring.writer import Writer

workdir, start, last, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
writer = Writer(workdir, start, trackers.parse('wandb'), {'steps': 9}, 'abc')
for step in range(start + 1, last + 1):
    writer.write(step, {'loss_nats': float(step)})
    writer.write(step, {'validation_loss_nats': step / 2})
if end == 'kill':
    writer._trackers[0].flush(wait=True)
    os.kill(os.getpid(), signal.SIGKILL)
writer.close()
print(*trackers.views('wandb', workdir))
"""


def histories(file):
    """Yields the values of each step in a file of the library: LevelDB's log, with a header of its own."""
    from wandb.proto import wandb_internal_pb2

    data, start, whole = file.read_bytes(), 7, b''
    while start + 7 <= len(data):
        if start % 32_768 > 32_768 - 7:  # the rest of a block is padding
            start += 32_768 - start % 32_768
            continue
        _, length, kind = struct.unpack('<IHB', data[start : start + 7])
        whole += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b''
            if record.WhichOneof('record_type') == 'history':
                items = record.history.item
                yield {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.skipif(not importlib.util.find_spec('wandb'), reason='needs the package wandb')
def test_the_library_itself_offline(tmp_path):
    """Three commands, of which one is killed: together their files have every step once, with all values."""
    environment = os.environ | {'WANDB_MODE': 'offline', 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    environment.pop('WANDB_API_KEY', None)
    said = []
    for start, last, end in ((0, 5, 'close'), (2, 7, 'kill'), (4, 9, 'close')):
        command = [sys.executable, '-c', PROGRAM, str(tmp_path), str(start), str(last), end]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == (-9 if end == 'kill' else 0), done.stderr
        said.append(done.stdout + done.stderr)
    known = json.loads((tmp_path / tracker.FILE).read_text())
    files = sorted(tmp_path.glob(f'wandb/offline-run-*-{known["id"]}/run-{known["id"]}.wandb'))
    assert len(files) == 2
    found = [(line['_step'], line['loss_nats'], line['validation_loss_nats']) for f in files for line in histories(f)]
    assert found == [(step, float(step), step / 2) for step in range(1, 10)]
    assert said[-1].strip() == f'wandb sync --yes {tmp_path}/wandb/offline-run-*-{known["id"]}'
