import json

from tensorboardX.proto import event_pb2

from combiner.monitoring import trackers
from combiner.monitoring.writer import Writer


def lines(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def events(path):
    """(step, name) of every scalar that TensorBoard reads."""
    found = []
    for file in sorted((path / 'tensorboard').iterdir()):
        data, start = file.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], 'little')
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            found += [(event.step, value.tag) for value in event.summary.value]
            start += 16 + length
    return found


def test_what_was_written_beyond_the_restored_step_is_dropped(tmp_path):
    writer = Writer(tmp_path, 0, trackers.parse('tensorboard'))
    for step in (1, 2, 3, 4):
        writer.write(step, {'loss_nats': float(step)})
    writer.close()
    with (tmp_path / 'metrics.jsonl').open('ab') as file:
        file.write(b'\xff\x00\n')  # a damaged disk
        file.write(b'{"step": 5, "los')  # killed while writing
    for file in (tmp_path / 'tensorboard').iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    writer = Writer(tmp_path, 2, trackers.parse('tensorboard'))
    writer.write(3, {'loss_nats': 30.0})
    writer.close()
    assert lines(tmp_path) == [{'step': s, 'loss_nats': v} for s, v in [(1, 1.0), (2, 2.0), (3, 30.0)]]
    assert events(tmp_path) == [(1, 'loss_nats'), (2, 'loss_nats'), (3, 'loss_nats')]


def test_the_seconds_of_earlier_commands_are_continued(tmp_path):
    """Steps that are taken again are no steps twice, but their time is gone."""
    writer = Writer(tmp_path, 0)
    assert writer.seconds == (0.0, 0.0)
    for step in (1, 2):
        writer.write(step, {'seconds_in_steps': 10.0 * step, 'seconds_in_all': 15.0 * step})
    writer.write(2, {'validation_loss_nats': 1.0})
    writer.close()
    writer = Writer(tmp_path, 1)
    writer.close()
    assert writer.seconds == (10.0, 30.0)
