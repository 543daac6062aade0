import jax
import pytest

from combiner.monitoring import profiling
from combiner.monitoring.profiling import Profile, parse


@pytest.mark.parametrize('text', ['3', '3:', '0:2', '5:4', '2-3', '-1:2', '1:2:3'])
def test_bad_steps_are_refused(text):
    with pytest.raises(ValueError, match=rf'--profile={text}: write the first and the last step to trace as FROM:TO'):
        parse(text)


def test_a_trace_is_written(tmp_path):
    said = []
    profile = Profile(parse('2:3'), 0, tmp_path, said.append)
    double = jax.jit(lambda x: 2 * x)
    assert [float(profile.trace(lambda: double(1.0))) for _ in range(5)] == [2] * 5
    assert said == [f'traced steps 2 to 3: {tmp_path}']
    assert list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))


@pytest.fixture
def called(monkeypatch):
    """Names of the profiler's functions, in the order of their calls."""
    names = []
    for name in ('start_trace', 'stop_trace'):
        monkeypatch.setattr(jax.profiler, name, lambda *_, name=name: names.append(name))
    return names


def test_a_continued_run_traces_what_is_left(called, tmp_path):
    said = []
    profile = Profile(parse('2:5'), 3, tmp_path, said.append)
    for _ in range(3):
        profile.trace(lambda: 0)
    profile.close()
    assert called == ['start_trace', 'stop_trace']
    assert said == [f'traced steps 4 to 5: {tmp_path}']
    Profile(parse('2:3'), 3, tmp_path, said.append).trace(lambda: 0)
    assert said[1:] == ['the steps of --profile=2:3 are done: nothing is traced']
    assert len(called) == 2


def test_a_run_that_stops_early_writes_what_it_has(called, tmp_path):
    profile = Profile(parse('1:5'), 0, tmp_path, print)
    profile.trace(lambda: 0)
    profile.close()
    assert called == ['start_trace', 'stop_trace']


def test_steps_beyond_the_training_are_refused(tmp_path):
    with pytest.raises(ValueError, match='--profile=5:7: the training ends with step 6'):
        profiling.check(profiling.parse('5:7'), 6, tmp_path)
