import types

import jax
import pytest

from combiner import sharding
from combiner.aot import chips, cost
from combiner.monitoring import flops, metering


def program(text='', planned=None):
    return types.SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: planned)


def meter(tiny, **changes):
    return metering.Meter(tiny.config(), tiny.TASK, sharding.make_mesh(devices=jax.devices()[:2]), **changes)


def test_a_count_of_the_compiled_step_says_what_it_lacks_and_ends_no_training(tiny, monkeypatch, absl_log):
    def fail(text):
        raise IndexError(text)

    silent = cost.Kernel('k', 1, 1, states_flops=False)
    for text, lacking, said in (
        ('', {}, ', 2 as compiled'),
        ('', {'loops_of_unknown_length': 1}, ', at least 2 as compiled'),
        ('', {'kernels': [silent]}, ', at least 2 as compiled'),
        ('custom_call_target="__cudnn$fmhaSoftmax"', {}, ', at least 2 as compiled'),
    ):
        counted = cost.Cost(flops=10**9, **lacking)
        monkeypatch.setattr(cost, 'count', lambda text, counted=counted: counted)
        assert said in meter(tiny).describe(program(text))
    monkeypatch.setattr(cost, 'count', fail)
    assert 'as compiled' not in meter(tiny).describe(program('strange'))
    assert "could not be counted (IndexError('strange'))" in absl_log.text


def test_an_unknown_chip_has_no_utilization_and_says_so(tiny):
    measured = meter(tiny)
    assert "no MFU, as the peak of 'cpu' is not known" in measured.describe(program())
    assert 'as compiled' not in measured.describe(program())
    values = measured.measure(2, 1000.0)
    assert 'mfu' not in values
    assert values['tokens_per_second_per_chip'] == 500
    assert metering.text(values) == ''


def test_utilization_is_the_formula_over_the_peak_of_all_chips(tiny, monkeypatch):
    monkeypatch.setattr(chips, 'peak_of', lambda kind: 1e9)
    monkeypatch.setattr(metering, 'peak_memory', lambda: 3_000_000_000)
    measured = meter(tiny)
    assert 'MFU is of 0.001 TFLOP/s' in measured.describe(program())
    values = measured.measure(3, measured.tokens / 0.5)  # half a second a step
    needed = flops.training_step(tiny.config(), tiny.TASK).total
    assert values['mfu'] == pytest.approx(needed / 0.5 / 2 / 1e9)
    assert values['model_tflops_per_second_per_chip'] == pytest.approx(needed / 1e12)
    assert metering.text(values) == f', {values["mfu"]:.1%} MFU, 3.0 GB'


def test_a_line_of_a_first_step_alone_has_no_speed(tiny):
    found = meter(tiny, before=(60.0, 99.0)).measure(0, 0.0)
    assert found.keys() == {'goodput', 'seconds_in_steps', 'seconds_in_all'}
    assert found['seconds_in_steps'] == 60


def test_goodput_counts_the_commands_before(tiny):
    measured = meter(tiny, before=(60.0, 99.0))
    measured.began -= 1.0
    values = measured.measure(20, 20 * measured.tokens / 10.0)  # ten seconds
    assert values['seconds_in_steps'] == pytest.approx(70)
    assert values['goodput'] == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(
    'kind', ['TPU v5 lite', 'TPU v5', 'TPU v6 lite', 'NVIDIA H100 80GB HBM3', 'NVIDIA A100-SXM4-80GB']
)
def test_names_of_devices_lead_to_one_chip(kind):
    assert sum(kind in chip.device_kinds for chip in chips.CHIPS.values()) == 1
    assert chips.peak_of(kind)
    assert chips.peak_of(f'{kind}x') is None
