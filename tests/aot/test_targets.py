"""Targets by text, and devices that are not present."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from combiner.aot import targets
from combiner.aot.chips import CHIPS, roofline

ROOT = Path(__file__).parents[2]
with_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the extra tpu-aot')


@pytest.mark.parametrize(
    ('text', 'name', 'chips'),
    [
        ('v5e', 'v5e:1x1', 1),
        ('v5p', 'v5p:1x1x1', 1),
        ('v6e', 'v6e:1x1', 1),
        ('v5e:4x4', 'v5e:4x4', 16),
        ('v5p:2x2x1', 'v5p:2x2x1', 4),
        ('V6E:2x2', 'v6e:2x2', 4),
        ('h100', 'h100:1', 1),
        ('a100:8', 'a100:8', 8),
    ],
)
def test_a_text_names_a_slice(text, name, chips):
    target = targets.parse(text)
    assert (str(target), target.chips) == (name, chips)
    assert targets.parse(name) == target


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('v5', "unknown chip 'v5' in target 'v5'; did you mean 'v5p'|did you mean 'v5e'"),
        ('gtx', 'known: v5e, v5p, v6e, h100, a100'),
        ('v5e:4', 'a slice of v5e has 2 sizes, such as v5e:2x4'),
        ('v5p:2x2', 'a slice of v5p has 3 sizes, such as v5p:2x2x1'),
        ('v5e:0x4', 'has 2 sizes'),
        ('v5e:2*2', 'has 2 sizes'),
        ('h100:2x4', 'a slice of h100 has 1 size, such as h100:8'),
        ('h100:16', 'write 1 to 8 GPUs'),
    ],
)
def test_a_mistake_names_the_way_out(text, message):
    with pytest.raises(ValueError, match=message):
        targets.parse(text)


@pytest.mark.parametrize(('text', 'package'), [('v5e', 'libtpu'), ('h100', 'jax-cuda13-plugin')])
def test_a_missing_compiler_is_named(monkeypatch, text, package):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(targets.MissingCompilerError, match=f'pip install {package}'):
        targets.parse(text).devices()


@with_libtpu
def test_the_devices_of_a_slice_are_those_of_its_chips():
    """In a process of its own: libtpu ends one whose XLA_FLAGS it does not know, as those of the tests."""
    program = (
        'from combiner.aot import targets\n'
        'devices = targets.parse("v5e:2x2").devices()\n'
        'print(len(devices), {device.platform for device in devices})\n'
        'try:\n'
        '    targets.parse("v5e:3x3").devices()\n'
        'except ValueError as error:\n'
        '    print(error)\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    environment |= {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == "4 {'tpu'}"
    assert 'write one such as v5e:1x1' in refused


def test_the_slowest_resource_binds():
    chip = CHIPS['v5e']
    found = roofline(chip, flops=int(chip.flops_per_second), hbm_bytes=int(3 * chip.hbm_bytes_per_second))
    assert found == (1, 3, 0)
    assert (found.seconds, found.bound) == (3, 'hbm')
    found = roofline(chip, flops=0, hbm_bytes=0, sent_bytes=int(chip.interconnect_bytes_per_second))
    assert (found.seconds, found.bound) == (1, 'interconnect')


@pytest.mark.parametrize('chip', CHIPS.values(), ids=CHIPS)
def test_every_peak_has_a_source_and_a_possible_value(chip):
    assert chip.source.startswith('https://')
    assert chip.name in CHIPS
    assert chip.name in targets.SMALLEST
    assert 100 < chip.flops_per_second / chip.hbm_bytes_per_second < 1000  # FLOPs for each byte, of a matrix processor
    assert chip.interconnect_bytes_per_second < chip.hbm_bytes_per_second
