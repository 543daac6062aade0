import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from combiner import metrics


def test_sums_with_counts_merge_exactly():
    parts = [
        metrics.to_host(metrics.eval_metrics({name: jnp.array(x) for name, x in sums.items()}))
        for sums in [
            {'nats': 6.0, 'targets': 2, 'hits': 1, 'words': 2, 'bytes': 9, 'examples': 2},
            {'nats': 1.0, 'targets': 8, 'hits': 3, 'words': 3, 'bytes': 26, 'examples': 2},
        ]
    ]
    values = metrics.summarize(parts[0].merge(parts[1]), metrics.FIGURES, 'validation_')
    assert values == {
        'validation_loss_nats': 0.7,
        'validation_examples': 4,
        'validation_bits_per_dim': pytest.approx(0.7 / math.log(2)),
        'validation_perplexity': pytest.approx(math.exp(0.7)),
        'validation_word_perplexity': pytest.approx(math.exp(7 / 5)),
        'validation_bits_per_byte': pytest.approx(7 / 35 / math.log(2)),
        'validation_accuracy': 0.4,
    }


def test_figures_whose_sums_are_missing_are_left_out():
    measured = metrics.to_host(metrics.eval_metrics({'nats': jnp.float32(3e4), 'targets': jnp.float32(2)}))
    figures = ('word_perplexity', 'perplexity', 'accuracy')
    values = metrics.summarize(measured, figures)
    assert values == {'loss_nats': 15000.0, 'perplexity': math.inf}
    assert metrics.headline(values, figures) == 'perplexity inf'


def test_train_metrics_average_the_loss_and_keep_the_last_of_the_rest():
    first, second = (
        metrics.to_host(
            metrics.train_metrics({'nats': jnp.float32(nats), 'targets': jnp.float32(count)}, *map(jnp.float32, rest))
        )
        for nats, count, *rest in [(8, 4, 1, 2, 3), (2, 1, 5, 6, 7)]
    )
    values = metrics.summarize(first.merge(second), ('bits_per_dim',))
    assert {name: round(value, 5) for name, value in values.items()} == {
        'loss_nats': 2.0,
        'gradient_norm': 5.0,
        'parameter_norm': 6.0,
        'learning_rate': 7.0,
        'bits_per_dim': round(2 / math.log(2), 5),
    }


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
    writer = metrics.Writer(tmp_path, 0)
    for step in (1, 2, 3, 4):
        writer.write(step, {'loss_nats': float(step)})
    writer.close()
    with (tmp_path / 'metrics.jsonl').open('ab') as file:
        file.write(b'\xff\x00\n')  # a damaged disk
        file.write(b'{"step": 5, "los')  # killed while writing
    for file in (tmp_path / 'tensorboard').iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    writer = metrics.Writer(tmp_path, 2)
    writer.write(3, {'loss_nats': 30.0})
    writer.close()
    assert lines(tmp_path) == [{'step': s, 'loss_nats': v} for s, v in [(1, 1.0), (2, 2.0), (3, 30.0)]]
    assert events(tmp_path) == [(1, 'loss_nats'), (2, 'loss_nats'), (3, 'loss_nats')]


def test_the_seconds_of_earlier_commands_are_continued(tmp_path):
    """Steps that are taken again are no steps twice, but their time is gone."""
    writer = metrics.Writer(tmp_path, 0)
    assert writer.seconds == (0.0, 0.0)
    for step in (1, 2):
        writer.write(step, {'seconds_in_steps': 10.0 * step, 'seconds_in_all': 15.0 * step})
    writer.write(2, {'validation_loss_nats': 1.0})
    writer.close()
    writer = metrics.Writer(tmp_path, 1)
    writer.close()
    assert writer.seconds == (10.0, 30.0)


def test_progress_prints_plain_lines_without_a_terminal(capsys):
    progress = metrics.Progress(0, 20, tokens_per_step=100)
    with progress.pause():
        pass
    steps, rate = progress.measure(10)
    progress.report('8.000 bits/dim', 0.0)
    assert capsys.readouterr().out == 'step 10/20: 8.000 bits/dim\n'
    progress.report('4.500 bits/dim', rate, ', 41.0% MFU')
    out = capsys.readouterr().out
    assert (steps, rate > 0) == (10, True)
    assert out.startswith('step 10/20: 4.500 bits/dim, ')
    assert ' tokens/s, 41.0% MFU, ' in out
    assert out.endswith('left\n')


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    progress = metrics.Progress(5, 20, tokens_per_step=100)
    for _ in range(5):
        progress.advance()
    progress.report('4.500 bits/dim', progress.measure(10)[1])
    progress.close()
    err = capsys.readouterr().err
    assert '10/20' in err
    assert '4.500 bits/dim' in err


def test_to_host_sums_in_float64():
    large, small = (
        metrics.to_host(metrics.eval_metrics({'nats': jnp.float32(nats), 'targets': jnp.float32(1)}))
        for nats in (2**24, 1)
    )
    total = large.merge(small)
    assert total.loss_nats.total == np.float64(2**24 + 1)
