import re
import time

import jax
import pytest

from combiner import startup


@pytest.fixture
def note(monkeypatch):
    """Begins a command; returns JAX's listener."""
    listeners = []
    monkeypatch.setattr(jax.monitoring, 'register_event_duration_secs_listener', listeners.append)
    for name, value in (('_began', 0.0), ('_seconds', {}), ('_compiling', [])):
        monkeypatch.setattr(startup, name, value)
    assert startup.report('nothing') is None
    startup.begin()
    return listeners[0]


def seconds(line):
    return {name: float(text) for name, text in re.findall(r'(\w+) ([\d.]+) s', line)}


def test_the_line_is_said_once_and_adds_up(note):
    with startup.timing('data'):
        time.sleep(0.3)
    line = startup.report('first step')
    found = seconds(line)
    total = float(re.match(r'first step after ([\d.]+) s: ', line)[1])
    assert list(found)[1:] == ['import', 'data', 'compile', 'rest']
    assert 0.3 <= found['data'] < total
    assert sum(list(found.values())[1:]) == pytest.approx(total, abs=0.3)
    assert startup.report('first step') is None


def test_compiling_within_compiling_or_within_data_counts_once(note):
    with startup.timing('data'):
        time.sleep(0.3)
        note('/jax/core/compile/jaxpr_trace_duration', 0.1)  # an inner trace
        note('/jax/core/compile/backend_compile_duration', 0.2)  # around it
        note('/jax/another/event', 9.0)
    found = seconds(startup.report('first step'))
    assert found['compile'] == 0.2
    assert found['data'] == pytest.approx(0.1, abs=0.05)


def test_the_first_batch_is_waited_for_as_data(note):
    def batches():
        time.sleep(0.2)
        yield from range(3)

    said = []
    assert list(startup.Batches(batches(), said.append)) == [0, 1, 2]
    assert len(said) == 1
    assert seconds(said[0])['data'] >= 0.2
    assert list(startup.Batches([], said.append)) == []
